"""MaPLe-MT: text prompts in the first layers and the image prompts that linear maps make of them, shared by all tasks.

Khattak, Rasheed, Maaz, Khan and Khan, "MaPLe: Multi-modal Prompt Learning", CVPR 2023; multi-task as the baseline of MmAP
(Xin et al., AAAI 2024, Sec. 4.1: "We also construct a multi-task version, referred to as MaPLE-MT").

The idea: CLIP's two encoders should adapt together. The text encoder gets b learned prompts P_k in each of its first J
layers, and the image encoder of the same layer gets F_k(P_k), a learned linear map of the same prompts ("coupling"), so
that the gradient of either side moves both. All else is frozen, and the loss is the sum of the tasks' cross-entropies.

    python maple_mt.py                                                          # built-in benchmark and backbone
    python maple_mt.py --data officehome --split 0.1 --seeds 1 2 3              # MmAP, Table 1, column MaPLe-MT
    python maple_mt.py --data officehome --split 0.1 --seeds 1 2 3 --single-task        # ... its single-task column MaPLe
    python maple_mt.py --data officehome --split 0.1 --depth 9 --n-ctx 2        # MaPLe's own depth and length
    python maple_mt.py --data officehome --split 0.1 --seeds 1 2 3 --epochs 50 --lr 0.0015    # JSCPT's, but for its fixed rate

Choices the papers leave open
- b = 16 in all 12 layers: 4,826,112 numbers, the 4.8 M of MmAP's and JSCPT's tables. MaPLe's own 9 layers of 2 are flags.
- Text prompts start at N(0, 0.02), the maps as PyTorch's linear layers do, each drawn by itself (the authors'
  deeper maps start as copies of one). With b up to 4 the first layer's start at the
  words "a photo of a", cut to b, as in the authors' program.
- The first layer's image prompts pass through `ln_pre`, as in the authors' program; deeper ones enter as they are.
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
    n_ctx=16,                       # ours: gives the 4.8 M parameters of MmAP's Table 1
    views=0,                        # fresh views every epoch
    min_crop=0.08)                  # Dassl's random resized crop
TINY = dict(epochs=10, lr=0.03, n_ctx=4, min_crop=0.6)      # the built-in backbone's, chosen on fxemoji; 36 patches want fewer prompts
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # Dassl's defaults


class CoupledPrompts(nn.Module):
    """Text prompts P_k of the first layers, and image prompts F_k(P_k); MaPLe, Sec. 3.2.3, "Vision Language Prompt Coupling"."""

    def __init__(self, n_layers, n_ctx, d_text, d_image, ln_pre=None, words=None):
        """words: [b, d_l], what the first layer's text prompts start at. ln_pre: applied to the first layer's image prompts."""
        super().__init__()
        self.P = nn.Parameter(0.02 * torch.randn(n_layers, n_ctx, d_text))
        self.F = nn.ModuleList(nn.Linear(d_text, d_image) for _ in range(n_layers))
        self.ln_pre = [ln_pre or nn.Identity()]                                 # in a list: CLIP's layer is no part of us
        if words is not None:
            self.P.data[0] = words

    def text_prompts(self):
        """[L, b, d_l]"""
        return self.P

    def image_prompts(self):
        """[L, b, d_v]"""
        first, *deeper = [coupling(prompts) for coupling, prompts in zip(self.F, self.P)]
        return torch.stack([self.ln_pre[0](first), *deeper])


class Prompts(nn.Module):
    """One set of coupled prompts for all tasks, or one a task."""

    def __init__(self, sets):
        super().__init__()
        self.sets = nn.ModuleList(sets)

    def text_prompts(self):
        """[L, n_sets, b, d_l]"""
        return torch.stack([one.text_prompts() for one in self.sets], dim=1)

    def image_prompts(self):
        """[L, n_sets, b, d_v]"""
        return torch.stack([one.image_prompts() for one in self.sets], dim=1)


def build(args, model, tasks):
    """The untrained prompts, one set or one a task, for the first `--depth` layers of both encoders."""
    layers = min(len(model.transformer.resblocks), len(model.visual.transformer.resblocks))
    if args.depth is not None and args.depth > layers:
        raise common.UserError(f"--depth {args.depth} does not fit the {layers} layers of {args.clip}: give 1 to {layers}")
    d_text, d_image = model.ln_final.weight.shape[0], model.visual.class_embedding.shape[0]
    words = None
    if args.n_ctx <= 4:
        start = common.tokenize(["a photo of a"])[0, 1:1 + args.n_ctx]
        words = model.token_embedding(start.to(model.logit_scale.device)).float().cpu()
    make = lambda: CoupledPrompts(args.depth or layers, args.n_ctx, d_text, d_image, model.visual.ln_pre, words)
    return Prompts(make() for _ in range(len(tasks) if args.single_task else 1)).to(model.logit_scale.device)


def texts_of(args, tasks):
    """The tasks' texts `[SOS] v_1 .. v_b class name . [EOS]`; tasks that share prompts and names share rows."""
    return common.Texts(tasks, args.n_ctx, owners=list(range(len(tasks))) if args.single_task else None)


def loss_of(model, texts, prompts, batches):
    """The sum over tasks of the mean cross-entropy of a batch, MmAP's Eq. (5) and (11).

    batches: (images [b, 3, H, W], labels [b]) a task. All texts go through their encoder as one batch, and all images.
    """
    return common.prompted_losses(model, texts, prompts.text_prompts(), prompts.image_prompts(), batches).sum()


def train(args, model, tasks, run, seed):
    """Learn the coupled prompts on all tasks' training images; returns the trained prompts."""
    common.seed_everything(seed)
    prompts, texts = build(args, model, tasks), texts_of(args, tasks)
    optimizer = torch.optim.SGD(prompts.parameters(), lr=args.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    start = run.restore(seed, prompts=prompts, optimizer=optimizer, schedule=schedule)
    for epoch in common.progress(range(start, args.epochs), "train"):
        common.seed_everything(seed, epoch + 1)
        losses = []
        for batches in common.image_batches(model, tasks, args, seed):
            loss = loss_of(model, texts, prompts, batches)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        schedule.step()
        row = dict(loss=sum(losses) / len(losses))
        run.checkpoint(seed, epoch + 1, row, prompts=prompts, optimizer=optimizer, schedule=schedule)
    return prompts


def score(args, model, preprocess, tasks, prompts):
    """Zero-shot CLIP's and the method's accuracy on every task, in per cent."""
    with torch.no_grad():
        text_features, image_prompts = texts_of(args, tasks).encode(model, prompts.text_prompts()), prompts.image_prompts()
    return common.score_tasks(model, preprocess, tasks, text_features, image_prompts)


def main(argv=None):
    parser = common.arguments("maple_mt", __doc__, PAPER, TINY)
    parser.add_argument("--depth", type=int, help="layers with prompts (default all)")
    parser.add_argument("--single-task", action="store_true", help="prompts for each task alone (the papers' MaPLe column)")
    args = common.parse(parser, argv)
    if args.depth is not None and args.depth < 1:
        raise common.UserError(f"--depth {args.depth} is too small: give 1 or more layers")
    args.variant = ", ".join(["single-task"] * args.single_task + [f"with --depth {args.depth}"] * (args.depth is not None)) or None
    common.run_seeds(args, build, train, score, n_text=args.n_ctx, image_prompts=True, shared=not args.single_task)


if __name__ == "__main__":
    common.script(main)
