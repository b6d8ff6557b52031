r"""MaPLe-MT: text prompts in the first layers, and linear maps of them as image prompts.

Khattak, Rasheed, Maaz, Khan and Khan, "MaPLe: Multi-modal Prompt Learning", CVPR 2023; multi-task
as the baseline of MmAP (Xin et al., AAAI 2024, Sec. 4.1: "We also construct a multi-task version,
referred to as MaPLE-MT").

The idea: CLIP's two encoders should adapt together. The text encoder gets b learned prompts P_k in
each of its first J layers, and the same layer of the image encoder gets F_k(P_k), a learned linear
map of these prompts ("coupling"), so that gradients from either side update both. All else is
frozen, all tasks share the prompts, and the loss is the sum of the tasks' cross-entropies.

    python maple_mt.py                                                          # built-in benchmark
    python maple_mt.py --data officehome --split 0.1 --seeds 1 2 3              # MmAP, Table 1
    python maple_mt.py --data officehome --split 0.1 --seeds 1 2 3 --single-task    # column MaPLe
    python maple_mt.py --data officehome --split 0.1 --depth 9 --n-ctx 2       # MaPLe's own setting
    python maple_mt.py --data officehome --split 0.1 --seeds 1 2 3 --epochs 50 --lr 0.0015 \
        --schedule constant                                                     # JSCPT, Table 1

paper       code                                        paper       code
P_k         CoupledPrompts.P[k] [b, d_l]                F_k         CoupledPrompts.F[k]
P~_k        image_prompts()[k] = F_k(P_k) [b, d_v]      J           --depth

Choices the papers leave open
- b = 16 in all 12 layers: 4,826,112 parameters, the 4.8 M of MmAP's and JSCPT's tables. MaPLe's own
  setting, 2 prompts in 9 layers (3,555,072), is `--depth 9 --n-ctx 2`.
- Text prompts are initialised from N(0, 0.02), the maps independently, like PyTorch's linear layers
  (the authors' deeper maps start as copies of one). With b up to 4, the first layer's prompts start
  at the first b words of "a photo of a" and the text keeps the rest, as in the authors' program:
  with b = 2 it is "[v]_1 [v]_2 of a [class].".
- The first layer's image prompts pass through `ln_pre`, as in the authors' program; deeper ones
  enter as they are.
- SGD and its cosine: `common.sgd`. MmAP's settings are those of MaPLe's published config, where the
  first of the five epochs runs at 1e-5. No paper states this warm-up; `--warm-up 1` adds it.
  JSCPT's fixed rate is `--schedule constant`. A step takes a batch from every task
  (`common.batches`), with fresh views.
"""
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

import common

PHOTO = "a photo of a {}"


@dataclass
class Args(common.Args):
    """MmAP, Sec. 4.1, "Implementation Details"."""

    clip: str = "ViT-B/16"  # "CLIP (ViT-B/16) chosen as our default model"; tiny for built-in data
    epochs: common.Count = 5  # "train for 5 epochs for Office-Home/MiniDomainNet"
    lr: common.Rate = 0.0035  # "We employ the SGD optimizer with a learning rate of 0.0035"
    # images per task: "a batch size of 16/4" on Office-Home/MiniDomainNet
    batch_size: common.Count = 16
    n_ctx: common.Count = 16  # prompt length b (ours: gives the 4.8 M parameters of MmAP's Table 1)
    depth: common.Count | None = None  # J, the number of layers with prompts; None: all
    schedule: Literal["cosine", "constant"] = "cosine"  # JSCPT: "a learning rate fixed at 0.0015"
    single_task: bool = False  # prompts per task, each trained alone (the papers' column MaPLe)


def defaults(args):
    """The settings of `tiny` (data/README.md says how they were chosen), and MmAP's on
    MiniDomainNet."""
    usual = {}
    if args.data.split(":")[0] == "minidomainnet":
        usual.update(batch_size=4)
    if args.clip == "tiny":
        usual.update(epochs=10, lr=0.03, n_ctx=4, min_crop=0.6)
    return usual


class CoupledPrompts(nn.Module):
    """Text prompts P_k of the first layers, and image prompts F_k(P_k) (MaPLe, Sec. 3.2.3)."""

    def __init__(self, n_layers, n_ctx, d_text, d_image, ln_pre=None, words=None):
        """words: [b, d_l], initial text prompts of the first layer; ln_pre: CLIP's layer."""
        super().__init__()
        self.P = nn.Parameter(0.02 * torch.randn(n_layers, n_ctx, d_text))
        self.F = nn.ModuleList(nn.Linear(d_text, d_image) for _ in range(n_layers))
        self.ln_pre = [ln_pre or nn.Identity()]     # in a list, so it is not a submodule
        if words is not None:
            self.P.data[0] = words

    def text_prompts(self):
        """[J, b, d_l]"""
        return self.P

    def image_prompts(self):
        """[J, b, d_v]"""
        first, *deeper = [F_k(P_k) for F_k, P_k in zip(self.F, self.P)]
        return torch.stack([self.ln_pre[0](first), *deeper])


def texts_of(args, tasks):
    """The tasks' texts: b prompts, the remaining words of "a photo of a", the class name."""
    template = " ".join(PHOTO.split()[min(args.n_ctx, 4):])             # "{}" for 4 prompts or more
    return common.Texts([replace(task, template=template) for task in tasks], args.n_ctx,
                        templates=True)


def build(args, model, tasks):
    """The untrained prompts of the first `--depth` layers of both encoders."""
    visual = model.visual
    layers = min(len(model.transformer.resblocks), len(visual.transformer.resblocks))
    if args.depth is not None and args.depth > layers:
        raise common.UserError(f"--depth {args.depth} does not fit the {layers} layers of "
                               f"{args.clip}: give 1 to {layers}")
    words = None
    if args.n_ctx <= 4:
        start = common.tokenize(PHOTO.split())[:args.n_ctx, 1]           # "a", "photo", "of", "a"
        words = model.token_embedding(start.to(model.logit_scale.device)).float().cpu()
    widths = len(model.ln_final.weight), len(visual.class_embedding)
    prompts = CoupledPrompts(args.depth or layers, args.n_ctx, *widths, visual.ln_pre, words)
    return prompts.to(model.logit_scale.device)


def train(args, model, tasks, run):
    """Learn the coupled prompts on all tasks' training images."""
    prompts = build(args, model, tasks)
    texts = texts_of(args, tasks).to(model.logit_scale.device)
    optimizer, schedule = common.sgd(args, prompts)
    for epoch in run.epochs("train", args.epochs, prompts=prompts, optimizer=optimizer,
                            schedule=schedule):
        for images, labels, task in common.batches(args, model, tasks):         # [B, 3, H, W]
            x = common.encode_image(model, images, prompts.image_prompts())     # [B, D]
            w = common.encode_text(model, texts.tokens, prompts.text_prompts(), texts.sets)
            losses = common.task_losses(model, x, w, labels, task, texts)       # [N], MmAP (5)
            optimizer.zero_grad()
            losses.sum().backward()                                             # MmAP (11)
            optimizer.step()
            run.log(loss=losses.sum(), losses=common.nan_where_absent(losses, task))
        schedule.step()
    return prompts


@torch.no_grad()
def classify(args, model, tasks, prompts):
    """The tasks' classifiers and the image prompts."""
    texts = texts_of(args, tasks)
    w = common.encode_text(model, texts.tokens, prompts.text_prompts(), texts.sets)
    return dict(classifiers=texts.classifiers(w),
                image_prompts=prompts.image_prompts()[:, None])                 # [J, 1, b, d_v]


def check(args, tasks):
    """Raise UserError for texts that are too long."""
    if tasks:
        texts_of(args, tasks)


METHOD = common.Method("maple_mt", Args, __doc__, build, train, classify, defaults=defaults,
                       check=check, n_text=lambda args: args.n_ctx, image_prompts=True)

if __name__ == "__main__":
    common.script(METHOD)
