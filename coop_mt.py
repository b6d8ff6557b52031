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
    python coop_mt.py --data officehome --split 0.1 --seeds 1 2 3 --clip RN50 --single-task \
        --conditional                                   # HiPro, Tables 1 to 3, column CoCoOp
    python coop_mt.py --data officehome --split 0.1 --seeds 1 2 3 --clip RN50 --single-task \
        --proda 2                                       # ... column ProDA

Two related methods, trained one task at a time, as in HiPro's tables. CoCoOp (Zhou, Yang, Loy and
Liu, "Conditional Prompt Learning for Vision-Language Models", CVPR 2022) adds to each context
vector one vector that a small network makes of the image's feature, so every image has its own
texts. ProDA (Lu, Liu, Zhang, Liu and Tian, "Prompt Distribution Learning", CVPR 2022) learns K
contexts, takes the K classifiers that they give for samples of a Gaussian, and minimises an upper
bound of the expected loss under it.

paper           code                                    paper       code
[v]_1..b        Context.vectors [K, b, d_l], K = 1      L_T         losses [N], MmAP's Eq. (5)
h_theta, pi     Context.meta, its output [B, d_l]       v_m(x)      Context.text_prompts(x)
w(P_k)          w [K, C, D]                             mu          mean of the unit-length w over K
L_upper, L_so   upper_bound, orthogonality              lambda      0.1

Choices the papers leave open
- b = 16 vectors, N(0, 0.02): CoOp's; MmAP states neither. SGD with momentum 0.9 and weight decay
  5e-4 (Dassl's defaults, on which the authors' programs run), and a cosine that steps once an
  epoch, without CoOp's warm-up epoch; JSCPT's fixed learning rate is `--schedule constant`.
- A step takes a batch of every task; an epoch is as long as the largest task needs; smaller tasks
  cycle. `--batches mixed` is HiPro's protocol: batches of the shuffled union of the tasks.
- Views are fresh every epoch. At the built-in backbone 8 views per image are drawn once instead, so
  that the frozen encoder sees each of them once; they show at least 0.6 of the area, because `tiny`
  was never trained on small crops of a drawing.
- `--surgery imtl` is IMTL-G alone: with one shared prompt and no task-specific layers, the loss
  balance is off. IMTL-G and CAGrad return averages of the gradients; times N here, to be as long as
  the sum that PCGrad starts from. PCGrad's random order has a generator of its own, so that all
  kinds of surgery train on the same views. A task that is absent from a mixed batch takes no part.
- CoCoOp: b = 16 vectors, N(0, 0.02), as the other columns of HiPro have (its own paper: 4, from "a
  photo of a"); its own batch of 1, 10 epochs and learning rate 0.002 are the defaults of
  `--conditional`. The network sees the image feature at unit length, as its authors' program does.
- ProDA: K = 2 contexts per task have about as many parameters as HiPro's 2N - 1 nodes for N tasks
  ("we limit the number of learnable prompts of ProDA so that its #parameters are close to HiPro"),
  so all K are in every step. The class name stands at the end (ProDA also learns contexts around
  and behind it). The covariance is the full one of the K classifiers, divided by K (its authors'
  program, as copied by others, keeps the diagonal and divides by K + 1); a test image is classified
  by their mean. HiPro's epochs, batch and learning rate are the defaults of `--proda`.
"""
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import common

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4      # Dassl's defaults
LAMBDA = 0.1                            # ProDA's weight of its orthogonality loss
FEW = 16                                # test images whose own texts fit into memory at once


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
    conditional: bool = False  # CoCoOp: shift the context by what a network makes of the image
    proda: int = 0  # ProDA: the number K of contexts (0: off)


def own(args):
    """CoCoOp's own settings, and for ProDA those of HiPro's comparison."""
    if args.conditional:
        return dict(batch_size=1, epochs=10, lr=0.002)
    hipro = dict(batches="mixed", batch_size=20, epochs=100, lr=0.001)
    return hipro if args.proda else {}


def tiny(args):
    """The settings of the built-in backbone, chosen as data/README.md says."""
    if args.conditional:
        return dict(epochs=3, lr=0.003, batch_size=4, min_crop=0.6)
    return dict(epochs=15, lr=0.03, batch_size=16, min_crop=0.6, views=8)


OF_DATA = dict(minidomainnet=dict(batch_size=4))


class Context(nn.Module):
    """The learned context vectors, and CoCoOp's network."""

    def __init__(self, n_ctx, width, n_contexts=1, n_features=None):
        """n_contexts: ProDA's K; n_features: the length D of an image feature, for CoCoOp."""
        super().__init__()
        self.vectors = nn.Parameter(0.02 * torch.randn(n_contexts, n_ctx, width))
        self.meta = None
        if n_features:
            hidden = max(1, n_features // 16)
            self.meta = nn.Sequential(nn.Linear(n_features, hidden), nn.ReLU(),
                                      nn.Linear(hidden, width))

    def text_prompts(self, x=None):
        """Prompts [L=1, S, b, d_l], S contexts: context optimisation works on the input layer
        alone. CoCoOp, v_m(x) = v_m + pi: a context for each image of x [B, D]."""
        if self.meta is None:
            return self.vectors[None]
        return (self.vectors + self.meta(F.normalize(x, dim=-1))[:, None])[None]


def build(args, model, tasks):
    """The untrained context."""
    features = model.text_projection.shape[1] if args.conditional else None
    context = Context(args.n_ctx, len(model.ln_final.weight), args.proda or 1, features)
    return context.to(model.logit_scale.device)


def upper_bound(logits, labels):
    """ProDA's surrogate loss L_upper [B]: the cross-entropy of the mean logits, each raised by half
    the variance of its distance to the right class's.

    logits [K, B, C] by the K classifiers: scale * x.w_c. With x^T A_c x = Var(x.(w_c - w_y)), where
    A_c = S_cc + S_yy - S_cy - S_yc of the classifiers' covariance S, no covariance is ever formed.
    """
    right = logits.gather(2, labels.expand(len(logits), -1)[..., None])         # [K, B, 1]
    spread = (logits - right).var(dim=0, correction=0)                          # [B, C]
    return F.cross_entropy(logits.mean(dim=0) + spread / 2, labels, reduction="none")


def orthogonality(w):
    """ProDA's L_so: the mean |cosine| of two contexts' texts without a class name, w [K, D]."""
    unit = F.normalize(w, dim=-1)
    cosines = (unit @ unit.t()).abs()
    return (cosines.sum() - cosines.diagonal().sum()) / (len(w) * (len(w) - 1))


def combined(surgery, grads, generator):
    """The direction [P] to descend along, from the gradients [N, P] of the tasks in the batch."""
    if surgery == "pcgrad":
        return common.pcgrad(grads, generator)
    return len(grads) * dict(imtl=common.imtl, cagrad=common.cagrad)[surgery](grads)


def copies(tokens, n):
    """Repeat the C texts [C, T] for each of n contexts: (tokens [n*C, T], the context of each)."""
    return tokens.repeat(n, 1), torch.arange(n).repeat_interleave(len(tokens))


def proda_loss(model, x, w, bare, labels):
    """ProDA's loss, [1]: L_upper + lambda L_so, from image features x [B, D], text features w
    [K, C, D], and those of the contexts without a class name, bare [K, D]."""
    logits = torch.stack([common.logits(model, x, one) for one in w])           # [K, B, C]
    return upper_bound(logits, labels).mean()[None] + LAMBDA * orthogonality(bare)


def train(args, model, tasks, run):
    """Learn the context on all tasks' training images."""
    prompts = build(args, model, tasks)
    texts = common.Texts(tasks, args.n_ctx).to(model.logit_scale.device)
    nameless = common.tokenize([""], args.n_ctx)
    C = len(texts.tokens)
    optimizer, schedule = common.sgd(args, prompts, MOMENTUM, WEIGHT_DECAY)
    for epoch in run.epochs("train", args.epochs, prompts=prompts, optimizer=optimizer,
                            schedule=schedule):
        order = torch.Generator().manual_seed(1_000_003 * args.seeds[0] + epoch)    # PCGrad's
        for images, labels, task in common.batches(args, model, tasks, frozen=True):
            x = common.encode_image(model, images)                              # [B, D], frozen
            context = prompts.text_prompts(x)                                   # [1, S, b, d_l]
            tokens, sets = copies(texts.tokens, context.shape[1])               # S times the texts
            w = common.encode_text(model, tokens, context, sets).unflatten(0, (-1, C))  # [S, C, D]
            if args.proda:
                bare = common.encode_text(model, nameless.expand(args.proda, -1), context)  # [K, D]
                losses = proda_loss(model, x, w, bare, labels)
            else:
                w = w if args.conditional else w[0]
                losses = common.task_losses(model, x, w, labels, task, texts)   # [N], MmAP (5)
            optimizer.zero_grad()
            if args.surgery == "none":
                losses.sum().backward()                                         # MmAP (11)
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
    texts = common.Texts(tasks, args.n_ctx)

    def classifiers(x=None):
        """Unit-length text features [S, C, D]."""
        context = prompts.text_prompts(x)
        tokens, sets = copies(texts.tokens, context.shape[1])
        w = common.encode_text(model, tokens, context, sets)
        return F.normalize(w, dim=-1).unflatten(0, (-1, len(texts.tokens)))

    def cosines(x):
        """[n, C], where each image of x [n, D] has its own texts; a few images at a time."""
        return torch.cat([(classifiers(part) @ part[..., None])[..., 0] for part in x.split(FEW)])

    if args.conditional:
        return common.evaluate(args, model, tasks, [cosines])
    with torch.no_grad():
        w = classifiers().mean(dim=0)                   # ProDA's mu; of one context, its own
    return common.evaluate(args, model, tasks, [w[mine] for mine in texts.mine.to(w.device)])


def check_tasks(args, tasks):
    """Raise UserError for tasks that ProDA's loss is not defined on."""
    for task in tasks:
        if args.proda and any(isinstance(label, tuple) for label in task.train.labels):
            raise common.UserError(f"--proda has a loss for one class per image, and {task.name} "
                                   "has several: leave the task out")


def check(args):
    """Raise UserError for settings that contradict each other."""
    if args.conditional and args.proda:
        raise common.UserError("--conditional is CoCoOp and --proda is ProDA: leave one of them "
                               "out")
    if args.surgery != "none" and (args.single_task or args.conditional or args.proda):
        raise common.UserError("--surgery works on a prompt that tasks share, and --single-task, "
                               "--conditional and --proda leave none: leave one of them out")
    for flag in ("conditional", "proda"):
        if getattr(args, flag) and not args.single_task:
            raise common.UserError(f"--{flag} is trained one task at a time: add --single-task")
    if args.conditional and args.views:
        raise common.UserError("--conditional draws fresh views, as its paper does: leave out "
                               "--views")
    if args.proda < 0 or args.proda == 1:
        raise common.UserError(f"--proda {args.proda} contexts have no distribution: give 2 or "
                               "more")


def main(argv=None):
    args = common.parse(Args, __doc__, argv, tiny, OF_DATA, own)
    check(args)
    common.run_seeds(args, build, train, score, n_text=args.n_ctx, check=check_tasks, tiny=tiny)


if __name__ == "__main__":
    common.script(main)
