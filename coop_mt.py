r"""CoOp-MT: one learned text context for all tasks, the multi-task version of context optimisation.

Zhou, Yang, Loy and Liu, "Learning to Prompt for Vision-Language Models", IJCV 2022; multi-task as
the baseline of MmAP (Xin et al., AAAI 2024, Sec. 4.1: "train a task-shared prompt with samples from
all tasks") and of HiPro and JSCPT.

The idea: CLIP classifies an image by the cosine between its feature and the text features of the
class names. Instead of "a photo of a [class]." the text is "[v]_1 [v]_2 ... [v]_b [class].", and
the b vectors are learned by gradient descent through the frozen text encoder. All tasks share them,
and the loss is the sum of the tasks' cross-entropies. Only the text side is trained.

    python coop_mt.py                                                           # built-in benchmark
    python coop_mt.py --data officehome --split 0.1 --seeds 1 2 3               # MmAP, Table 1
    python coop_mt.py --data officehome --split 0.1 --seeds 1 2 3 --single-task # ... column CoOp
    python coop_mt.py --data officehome --split 0.1 --seeds 1 2 3 --clip RN50 --epochs 100 \
        --lr 0.001 --batches mixed --batch-size 20              # HiPro, Table 1, column CoOp-MTL
        # ... with --surgery pcgrad or imtl: its columns PCGrad and IMTL
    python coop_mt.py --data officehome --split 0.1 --seeds 1 2 3 --epochs 50 --lr 0.0015 \
        --schedule constant                                     # JSCPT, Table 1

paper       code                                        paper   code
[v]_1..b    Context.vectors [sets, b, d_l]              L_T     losses [N], MmAP's Eq. (5)

Choices the papers leave open
- b = 16 vectors, N(0, 0.02): CoOp's; MmAP states neither. SGD with momentum 0.9 and weight decay
  5e-4 (Dassl's defaults, on which the authors' programs run), and a cosine that steps once an
  epoch,
  without CoOp's warm-up epoch; JSCPT's fixed learning rate is `--schedule constant`.
- A step takes a batch of every task; an epoch is as long as the largest task needs; smaller tasks
  cycle. `--batches mixed` is HiPro's protocol: batches of the shuffled union of the tasks.
- Views are fresh every epoch. At the built-in backbone 8 views per image are drawn once instead, so
  that the frozen encoder sees each of them once; they show at least 0.6 of the area, because `tiny`
  was never trained on small crops of a drawing.
- `--surgery imtl` is IMTL-G alone: with one shared prompt and no task-specific layers, the loss
  balance is off. IMTL-G and CAGrad return averages of the gradients; times N here, to be as long as
  the sum that PCGrad starts from. PCGrad's random order has a generator of its own, so that all
  kinds of surgery train on the same views. A task that is absent from a mixed batch takes no part.
"""
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

import common

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4      # Dassl's defaults


@dataclass
class Args(common.Args):
    """MmAP, Sec. 4.1, "Implementation Details"."""

    method = "coop_mt"
    clip: str = "ViT-B/16"  # "CLIP (ViT-B/16) chosen as our default model"; tiny for built-in data
    epochs: int = 5  # "train for 5 epochs for Office-Home/MiniDomainNet"
    lr: float = 0.0035  # "We employ the SGD optimizer with a learning rate of 0.0035"
    batch_size: int = 16  # images per task: "a batch size of 16/4" on Office-Home/MiniDomainNet
    n_ctx: int = 16  # context length b; HiPro: "Prompt with 16 tokens"
    schedule: Literal["cosine", "constant"] = "cosine"  # JSCPT: "a learning rate fixed at 0.0015"
    single_task: bool = False  # a context per task, each trained alone (the papers' column CoOp)
    surgery: Literal["none", "pcgrad", "imtl", "cagrad"] = "none"  # where tasks' gradients disagree


TINY = dict(epochs=15, lr=0.03, min_crop=0.6, views=8)
OF_DATA = dict(minidomainnet=dict(batch_size=4))


class Context(nn.Module):
    """The learned context vectors."""

    def __init__(self, n_ctx, width):
        super().__init__()
        self.vectors = nn.Parameter(0.02 * torch.randn(n_ctx, width))

    def text_prompts(self):
        """Prompts [L=1, b, d_l]: context optimisation works on the input layer alone."""
        return self.vectors[None]


def build(args, model, tasks):
    """The untrained context."""
    return Context(args.n_ctx, len(model.ln_final.weight)).to(model.logit_scale.device)


def combined(surgery, grads, generator):
    """The direction [P] to descend along, from the gradients [N, P] of the tasks in the batch."""
    if surgery == "pcgrad":
        return common.pcgrad(grads, generator)
    return len(grads) * dict(imtl=common.imtl, cagrad=common.cagrad)[surgery](grads)


def train(args, model, tasks, run):
    """Learn the context on all tasks' training images."""
    prompts = build(args, model, tasks)
    texts = common.Texts(tasks, args.n_ctx).to(model.logit_scale.device)
    optimizer, schedule = common.sgd(args, prompts, MOMENTUM, WEIGHT_DECAY)
    for epoch in run.epochs("train", args.epochs, prompts=prompts, optimizer=optimizer,
                            schedule=schedule):
        order = torch.Generator().manual_seed(1_000_003 * args.seeds[0] + epoch)    # PCGrad's
        for images, labels, task in common.batches(args, model, tasks, frozen=True):
            x = common.encode_image(model, images)                              # [B, D], frozen
            w = common.encode_text(model, texts.tokens, prompts.text_prompts(), texts.sets)
            losses = common.task_losses(model, x, w, labels, task, texts)       # [N], Eq. (5)
            optimizer.zero_grad()
            if args.surgery == "none":
                losses.sum().backward()                                         # Eq. (11)
            else:
                present = task.unique().tolist()
                grads = [torch.autograd.grad(losses[t], prompts.vectors, retain_graph=True)[0]
                         for t in present]
                direction = combined(args.surgery, torch.stack(grads).flatten(1), order)
                prompts.vectors.grad = direction.view_as(prompts.vectors)
            optimizer.step()
            run.log(loss=losses.sum(), losses=common.of_present(losses, task))
        schedule.step()
    return prompts


def score(args, model, tasks, prompts):
    """The accuracies of zero-shot CLIP and of the learned context, in %."""
    with torch.no_grad():
        texts = common.Texts(tasks, args.n_ctx)
        w = common.encode_text(model, texts.tokens, prompts.text_prompts(), texts.sets)
    return common.evaluate(args, model, tasks, texts.classifiers(w))


def main(argv=None):
    args = common.parse(Args, __doc__, argv, TINY, OF_DATA)
    if args.single_task and args.surgery != "none":
        raise common.UserError("--surgery works on a prompt that tasks share, and --single-task "
                               "leaves none: leave one of them out")
    common.run_seeds(args, build, train, score, n_text=args.n_ctx, tiny=TINY)


if __name__ == "__main__":
    common.script(main)
