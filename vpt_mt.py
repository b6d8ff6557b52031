"""VPT-MT: learned prompts in every layer of the image encoder, shared by all tasks; the multi-task version of visual prompt tuning.

Jia, Tang, Chen, Cardie, Belongie, Hariharan and Lim, "Visual Prompt Tuning", ECCV 2022 (its "deep" variant); multi-task as
the baseline of MmAP (Xin et al., AAAI 2024, Sec. 4.1: "train a task-shared prompt with samples from all tasks").

The idea: b learned tokens join the image's patches behind the class token, and every layer gets b new ones in place of the
last layer's. The rest of CLIP stays frozen, the text features come from the fixed words of the task's template ("a photo of
a [class]."), and the loss is the sum over tasks of the cross-entropy of CLIP's image-text similarities. The prompts change
what the image encoder sees, so every step runs it forwards and backwards; the texts are encoded once.

    python vpt_mt.py                                                            # built-in benchmark and backbone
    python vpt_mt.py --data officehome --split 0.1 --seeds 1 2 3                # MmAP, Table 1, column VPT-MT
    python vpt_mt.py --data officehome --split 0.1 --seeds 1 2 3 --single-task  # ... its single-task column VPT
    python vpt_mt.py --data officehome --split 0.1 --seeds 1 2 3 --epochs 50 --lr 0.0015      # JSCPT's, but for its fixed rate

Choices the papers leave open
- b = 16 vectors in each of the layers: 147,456 numbers at ViT-B/16. MmAP's table prints 0.17 M and does not say how.
- N(0, 0.02) to start from, as for text prompts. Layer 0's prompts enter behind `ln_pre` and have no positional embedding.
- No head is trained, unlike in the VPT paper: CLIP's text features are the classifier.
- SGD with momentum 0.9 and weight decay 5e-4 (Dassl's defaults, on which the authors' programs run), and a cosine that steps
  once an epoch, without the warm-up epoch that MaPLe's and CoOp's configurations have.
- A step takes a batch of every task; an epoch is as long as the largest task needs; smaller tasks cycle. Views of an image
  are fresh every epoch (`--views 8` would fix eight).
- `--single-task` trains all tasks' prompts in one pass: no term of the summed loss has two tasks' prompts in it. A
  smaller task still cycles to the end of the epoch.
"""
import torch
from torch import nn

import common

PAPER = dict(                       # MmAP, Sec. 4.1, "Implementation Details"
    clip="ViT-B/16",                # "with CLIP (ViT-B/16) chosen as our default model"
    epochs=5,                       # "train for 5 epochs for Office-Home/MiniDomainNet"
    lr=0.0035,                      # "We employ the SGD optimizer with a learning rate of 0.0035"
    batch_size=16,                  # "a batch size of 16/4"
    n_ctx=16,                       # ours, as for CoOp-MT
    views=0,                        # fresh views every epoch
    min_crop=0.08)                  # Dassl's random resized crop
TINY = dict(epochs=10, lr=0.03, n_ctx=4, min_crop=0.6)      # the built-in backbone's, chosen on fxemoji; 36 patches want fewer prompts
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # Dassl's defaults


class ImagePrompts(nn.Module):
    """The learned image prompts of every layer: one set for all tasks, or one a task."""

    def __init__(self, n_layers, n_sets, n_ctx, width):
        super().__init__()
        self.vectors = nn.Parameter(0.02 * torch.randn(n_layers, n_sets, n_ctx, width))

    def image_prompts(self):
        """Prompts [L, n_sets, b, d_v], a layer each ("VPT-deep")."""
        return self.vectors


def build(args, model, tasks):
    """The untrained prompts, one set or one a task."""
    visual = model.visual
    n_sets = len(tasks) if args.single_task else 1
    prompts = ImagePrompts(len(visual.transformer.resblocks), n_sets, args.n_ctx, visual.class_embedding.shape[0])
    return prompts.to(model.logit_scale.device)


def loss_of(model, text_features, prompts, batches):
    """The sum over tasks of the mean cross-entropy of a batch, MmAP's Eq. (5) and (11).

    text_features: [C, D] a task. batches: (images [b, 3, H, W], labels [b]) a task; all go through the encoder as one batch.
    """
    with common.autocast(model):
        features = common.encode_batches(model, batches, prompts.image_prompts())
    return common.task_losses(model, features, text_features, batches).sum()


def train(args, model, tasks, run, seed):
    """Learn the image prompts on all tasks' training images; returns the trained prompts."""
    common.seed_everything(seed)
    prompts, text_features = build(args, model, tasks), common.zero_shot(model, tasks)
    optimizer = torch.optim.SGD(prompts.parameters(), lr=args.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    start = run.restore(seed, prompts=prompts, optimizer=optimizer, schedule=schedule)
    for epoch in common.progress(range(start, args.epochs), "train"):
        common.seed_everything(seed, epoch + 1)
        losses = []
        for batches in common.image_batches(model, tasks, args, seed):
            loss = loss_of(model, text_features, prompts, batches)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        schedule.step()
        row = dict(loss=sum(losses) / len(losses))
        run.checkpoint(seed, epoch + 1, row, prompts=prompts, optimizer=optimizer, schedule=schedule)
    return prompts


def score(args, model, preprocess, tasks, prompts):
    """Zero-shot CLIP's and the method's accuracy on every task, in per cent; both use the same texts."""
    return common.score_tasks(model, preprocess, tasks, None, prompts.image_prompts())


def main(argv=None):
    parser = common.arguments("vpt_mt", __doc__, PAPER, TINY)
    parser.add_argument("--single-task", action="store_true", help="prompts for each task alone (the papers' VPT column)")
    args = common.parse(parser, argv)
    args.variant = "single-task" if args.single_task else None
    common.run_seeds(args, build, train, score, n_text=0, image_prompts=True, shared=not args.single_task)


if __name__ == "__main__":
    common.script(main)
