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
Liu, "Conditional Prompt Learning for Vision-Language Models", CVPR 2022) adds to every context
vector the output of a small network on the image feature, so each image has its own texts. ProDA
(Lu, Liu, Zhang, Liu and Tian, "Prompt Distribution Learning", CVPR 2022) learns K contexts, treats
their K classifiers as samples of a Gaussian, and minimises an upper bound on the expected loss
under it.

paper           code                                    paper       code
[v]_1..b        Context.vectors [K, b, d_l], K = 1      L_T         losses [N], MmAP's Eq. (5)
h_theta, pi     Context.meta, its output [B, d_l]       v_m(x)      Context.text_prompts(x)
w(P_k)          w [K, C, D]                             mu          mean of the unit-length w over K
L_upper, L_so   upper_bound, orthogonality              lambda      0.1

Choices the papers leave open
- b = 16 vectors, N(0, 0.02): CoOp's; MmAP states neither. JSCPT's fixed learning rate is
  `--schedule constant`.
- SGD and its cosine: `common.sgd`. MmAP's settings are those of MaPLe's published config, where the
  first of the five epochs runs at 1e-5. No paper states this warm-up; `--warm-up 1` adds it.
- A step takes a batch from every task (`common.batches`). `--batches mixed` is HiPro's protocol.
- Views are fresh every epoch. For the built-in backbone 8 views per image are drawn once instead,
  so that the frozen encoder encodes each of them once; they show at least 0.6 of the area, because
  `tiny` was never trained on small crops of a drawing.
- `--surgery imtl` is IMTL-G alone: with one shared prompt and no task-specific layers, the loss
  balance is off. IMTL-G and CAGrad return averages of the gradients; here they are multiplied by
  the number of tasks in the step, to be as long as the sum that PCGrad starts from. PCGrad's random
  order has its own generator, so all kinds of surgery train on the same views. A task without
  images in a mixed batch is left out.
- CoCoOp: b = 16 vectors, N(0, 0.02), like HiPro's other columns (its own paper: 4, from "a photo of
  a"); its own batch size of 1, 10 epochs and learning rate 0.002 are the defaults of
  `--conditional`. The network's input is the unit-length image feature, as in its authors' program.
- ProDA: K = 2 contexts per task have about as many parameters as HiPro's 2N - 1 nodes for N tasks
  ("we limit the number of learnable prompts of ProDA so that its #parameters are close to HiPro"),
  so every step uses all K. The class name comes at the end (ProDA also learns contexts with it in
  the middle and at the front). The covariance is the full one of the K classifiers, divided by K
  (copies of the authors' program keep the diagonal and divide by K + 1); a test image is classified
  by their mean. HiPro's epochs, batch size and learning rate are the defaults of `--proda`.
"""
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import nn

import common

LAMBDA = 0.1                            # ProDA's weight of its orthogonality loss
FEW = 16                                # test images per batch where each has its own texts


@dataclass
class Args(common.Args):
    """MmAP, Sec. 4.1, "Implementation Details"."""

    clip: str = "ViT-B/16"  # "CLIP (ViT-B/16) chosen as our default model"; tiny for built-in data
    epochs: common.Count = 5  # "train for 5 epochs for Office-Home/MiniDomainNet"
    lr: common.Rate = 0.0035  # "We employ the SGD optimizer with a learning rate of 0.0035"
    # images per task: "a batch size of 16/4" on Office-Home/MiniDomainNet
    batch_size: common.Count = 16
    n_ctx: common.Count = 16  # context length b; HiPro: "Prompt with 16 tokens"
    schedule: Literal["cosine", "constant"] = "cosine"  # JSCPT: "a learning rate fixed at 0.0015"
    single_task: bool = False  # a context per task, each trained alone (the papers' column CoOp)
    surgery: Literal["none", "pcgrad", "imtl", "cagrad"] = "none"  # for conflicting task gradients
    conditional: bool = False  # CoCoOp: shift the context by a network's output on the image
    # ProDA: the number K of contexts
    proda: Annotated[int, common.AtLeast(2)] | None = None


def defaults(args):
    """Settings that depend on others: CoCoOp's own, for ProDA HiPro's, on MiniDomainNet MmAP's, and
    those of `tiny` (data/README.md says how they were chosen)."""
    usual = {}
    if args.conditional:
        usual.update(batch_size=1, epochs=10, lr=0.002)
    elif args.proda:
        usual.update(batches="mixed", batch_size=20, epochs=100, lr=0.001)
    elif args.data.split(":")[0] == "minidomainnet":
        usual.update(batch_size=4)
    if args.clip == "tiny" and args.conditional:
        usual.update(epochs=3, lr=0.003, batch_size=4, min_crop=0.6)
    elif args.clip == "tiny":
        usual.update(epochs=15, lr=0.03, batch_size=16, min_crop=0.6, views=8)
    return usual


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
        """Prompts [L=1, S, b, d_l], S contexts: context optimisation only changes the input layer.
        CoCoOp, v_m(x) = v_m + pi: a context for each image of x [B, D]."""
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
    the variance of its difference to the correct class's logit.

    logits [K, B, C] of the K classifiers: scale * x.w_c. With x^T A_c x = Var(x.(w_c - w_y)), where
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


def repeated(tokens, n):
    """The C texts [C, T] repeated for each of n contexts: (tokens [n*C, T], each one's context)."""
    return tokens.repeat(n, 1), torch.arange(n).repeat_interleave(len(tokens))


def cocoop_losses(model, prompts, x, labels, task, texts):
    """CoCoOp: the tasks' losses [N], where every image of x [B, D] has its own texts."""
    tokens, sets = repeated(texts.tokens, len(x))
    w = common.encode_text(model, tokens, prompts.text_prompts(x), sets)        # [B*C, D]
    w = w.unflatten(0, (len(x), -1))                                            # [B, C, D]
    return common.task_losses(model, x, w, labels, task, texts)


def proda_losses(model, prompts, x, labels, texts):
    """ProDA, L_upper + lambda L_so of one task, [1], from image features x [B, D]."""
    contexts = prompts.text_prompts()                                           # [1, K, b, d_l]
    K, b = contexts.shape[1:3]
    tokens, sets = repeated(texts.tokens, K)
    w = common.encode_text(model, tokens, contexts, sets).unflatten(0, (K, -1))     # [K, C, D]
    nameless = common.tokenize([""], b).expand(K, -1)
    bare = common.encode_text(model, nameless, contexts)                        # [K, D]
    logits = torch.stack([common.logits(model, x, w_k) for w_k in w])           # [K, B, C]
    return upper_bound(logits, labels).mean()[None] + LAMBDA * orthogonality(bare)


def combined(surgery, losses, vectors, generator):
    """The direction to descend along, in the context's shape, from the losses [N'] of the tasks
    with images in the step."""
    grads = [torch.autograd.grad(loss, vectors, retain_graph=True)[0] for loss in losses]
    grads = torch.stack(grads).flatten(1)                                       # [N', P]
    if surgery == "pcgrad":
        return common.pcgrad(grads, generator).view_as(vectors)
    direction = dict(imtl=common.imtl, cagrad=common.cagrad)[surgery](grads)
    return len(grads) * direction.view_as(vectors)


def train(args, model, tasks, run):
    """Learn the context on all tasks' training images."""
    prompts = build(args, model, tasks)
    texts = common.Texts(tasks, args.n_ctx).to(model.logit_scale.device)
    optimizer, schedule = common.sgd(args, prompts)
    for epoch in run.epochs("train", args.epochs, prompts=prompts, optimizer=optimizer,
                            schedule=schedule):
        order = torch.Generator().manual_seed(1_000_003 * args.seeds[0] + epoch)    # PCGrad's
        for images, labels, task in common.batches(args, model, tasks, frozen=True):
            x = common.encode_image(model, images)                              # [B, D], frozen
            if args.conditional:
                losses = cocoop_losses(model, prompts, x, labels, task, texts)
            elif args.proda:
                losses = proda_losses(model, prompts, x, labels, texts)
            else:
                w = common.encode_text(model, texts.tokens, prompts.text_prompts(), texts.sets)
                losses = common.task_losses(model, x, w, labels, task, texts)   # [N], MmAP (5)
            optimizer.zero_grad()
            if args.surgery == "none":
                losses.sum().backward()                                         # MmAP (11)
            else:
                present = losses[task.unique()]
                prompts.vectors.grad = combined(args.surgery, present, prompts.vectors, order)
            optimizer.step()
            run.log(loss=losses.sum(), losses=common.nan_where_absent(losses, task))
        schedule.step()
    return prompts


def classify(args, model, tasks, prompts):
    """The tasks' text features; with CoCoOp a function, as each image has its own texts."""
    texts = common.Texts(tasks, args.n_ctx)

    def text_features(x=None):
        """Unit-length text features [S, C, D] of S contexts."""
        contexts = prompts.text_prompts(x)
        tokens, sets = repeated(texts.tokens, contexts.shape[1])
        w = common.encode_text(model, tokens, contexts, sets)
        return F.normalize(w, dim=-1).unflatten(0, (-1, len(texts.tokens)))

    def conditional_logits(x):
        """[n, C], where each image of x [n, D] has its own texts; a few images at a time."""
        return torch.cat([common.logits(model, part, text_features(part))
                          for part in x.split(FEW)])

    if args.conditional:
        return dict(classifiers=[conditional_logits])
    with torch.no_grad():
        w = text_features().mean(dim=0)                 # ProDA's mu, or the only context's w
    return dict(classifiers=[w[mine] for mine in texts.mine.to(w.device)])


def check(args, tasks):
    """Raise UserError for settings that contradict each other, and for tasks whose images have
    several labels under ProDA."""
    if args.conditional and args.proda:
        raise common.UserError("--conditional is CoCoOp and --proda is ProDA: leave one of them "
                               "out")
    if args.surgery != "none" and (args.single_task or args.conditional or args.proda):
        raise common.UserError("--surgery needs a prompt that tasks share, but with --single-task, "
                               "--conditional and --proda there is none: leave one of them out")
    for flag in ("conditional", "proda"):
        if getattr(args, flag) and not args.single_task:
            raise common.UserError(f"--{flag} is trained one task at a time: add --single-task")
    if args.conditional and args.views:
        raise common.UserError("--conditional draws fresh views, as its paper does: leave out "
                               "--views")
    for task in tasks or []:
        if args.proda and any(isinstance(label, tuple) for label in task.train.labels):
            raise common.UserError(f"--proda's loss needs one class per image, but {task.name} "
                                   "has several: leave the task out")


METHOD = common.Method("coop_mt", Args, __doc__, build, train, classify, defaults=defaults,
                       check=check, n_text=lambda args: args.n_ctx)

if __name__ == "__main__":
    common.script(METHOD)
