r"""VPT-MT: image prompts learned in every layer and shared by all tasks (visual prompt tuning).

Jia, Tang, Chen, Cardie, Belongie, Hariharan and Lim, "Visual Prompt Tuning", ECCV 2022 (its "deep"
variant); multi-task as the baseline of MmAP (Xin et al., AAAI 2024, Sec. 4.1: "train a task-shared
prompt with samples from all tasks").

The idea: b learned tokens are inserted between the class token and the image patches, and every
layer gets b new ones in place of the previous layer's. The rest of CLIP stays frozen, the text
features come from the task's fixed template ("a photo of a [class]."), and the loss is the sum over
tasks of the cross-entropy of CLIP's image-text similarities. The texts are encoded once.

    python vpt_mt.py                                                            # built-in benchmark
    python vpt_mt.py --data officehome --split 0.1 --seeds 1 2 3                # MmAP, Table 1
    python vpt_mt.py --data officehome --split 0.1 --seeds 1 2 3 --single-task  # ... column VPT
    python vpt_mt.py --data officehome --split 0.1 --seeds 1 2 3 --epochs 50 --lr 0.0015 \
        --schedule constant                                                     # JSCPT, Table 1

paper           code
P_i [b, d_v]    ImagePrompts.vectors[i], of layer i

Choices the papers leave open
- b = 16 vectors in each layer: 147,456 parameters at ViT-B/16. MmAP's table prints 0.17 M without
  an explanation.
- Initialised from N(0, 0.02), like text prompts. Layer 0's prompts enter after `ln_pre` and have no
  positional embedding.
- No head is trained, unlike in the VPT paper: CLIP's text features are the classifier.
- SGD and its cosine: `common.sgd`. MmAP's settings are those of MaPLe's published config, where the
  first of the five epochs runs at 1e-5. No paper states this warm-up; `--warm-up 1` adds it.
  JSCPT's fixed rate is `--schedule constant`. A step takes a batch from every task
  (`common.batches`), with fresh views.
"""
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

import common


@dataclass
class Args(common.Args):
    """MmAP, Sec. 4.1, "Implementation Details"."""

    clip: str = "ViT-B/16"  # "CLIP (ViT-B/16) chosen as our default model"; tiny for built-in data
    epochs: common.Count = 5  # "train for 5 epochs for Office-Home/MiniDomainNet"
    lr: common.Rate = 0.0035  # "We employ the SGD optimizer with a learning rate of 0.0035"
    # images per task: "a batch size of 16/4" on Office-Home/MiniDomainNet
    batch_size: common.Count = 16
    n_ctx: common.Count = 16  # prompt length b (ours, as for CoOp-MT)
    schedule: Literal["cosine", "constant"] = "cosine"  # JSCPT: "a learning rate fixed at 0.0015"
    single_task: bool = False  # prompts per task, each trained alone (the papers' column VPT)


def defaults(args):
    """The settings of `tiny` (data/README.md says how they were chosen), and MmAP's on
    MiniDomainNet."""
    usual = {}
    if args.data.split(":")[0] == "minidomainnet":
        usual.update(batch_size=4)
    if args.clip == "tiny":
        usual.update(epochs=10, lr=0.03, n_ctx=4, min_crop=0.6)
    return usual


class ImagePrompts(nn.Module):
    """The learned image prompts of every layer."""

    def __init__(self, n_layers, n_ctx, width):
        super().__init__()
        self.vectors = nn.Parameter(0.02 * torch.randn(n_layers, n_ctx, width))

    def image_prompts(self):
        """Prompts [L, b, d_v], b for each layer ("VPT-deep")."""
        return self.vectors


def build(args, model, tasks):
    """The untrained prompts."""
    visual = model.visual
    shape = len(visual.transformer.resblocks), args.n_ctx, len(visual.class_embedding)
    return ImagePrompts(*shape).to(model.logit_scale.device)


def train(args, model, tasks, run):
    """Learn the image prompts on all tasks' training images."""
    prompts = build(args, model, tasks)
    texts = common.Texts(tasks, templates=True).to(model.logit_scale.device)
    w = common.encode_text(model, texts.tokens)                                 # [C, D], fixed
    optimizer, schedule = common.sgd(args, prompts)
    for epoch in run.epochs("train", args.epochs, prompts=prompts, optimizer=optimizer,
                            schedule=schedule):
        for images, labels, task in common.batches(args, model, tasks):         # [B, 3, H, W]
            x = common.encode_image(model, images, prompts.image_prompts())     # [B, D]
            losses = common.task_losses(model, x, w, labels, task, texts)       # [N], MmAP (5)
            optimizer.zero_grad()
            losses.sum().backward()                                             # MmAP (11)
            optimizer.step()
            run.log(loss=losses.sum(), losses=common.nan_where_absent(losses, task))
        schedule.step()
    return prompts


def classify(args, model, tasks, prompts):
    """The tasks' classifiers, those of zero-shot CLIP, and the image prompts."""
    return dict(classifiers=common.zero_shot_classifiers(model, tasks),
                image_prompts=prompts.image_prompts()[:, None])                 # [L, 1, b, d_v]


METHOD = common.Method("vpt_mt", Args, __doc__, build, train, classify, defaults=defaults,
                       image_prompts=True)

if __name__ == "__main__":
    common.script(METHOD)
