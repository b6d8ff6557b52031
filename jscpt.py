"""JSCPT: image features selected by learned masks, and tasks weighted by a learned schedule.

Li, Qin, Cui, Liu, Hu and Liao, "Joint Scheduling of Causal Prompts and Tasks for Multi-Task
Learning", CVPR 2025.

The idea: prompts pick up features that merely co-occur with a class, and how tasks help or hinder
each other changes during training. So (1) every task has its own prompts beside those shared by all
tasks, and a mask and a small network select its image features, Eq. (2). (2) A task's weight phi in
a step grows with the gain from selection, the causal effect, Eq. (4), and with how well the other
tasks' gradients on the shared prompts suit it, the affinity, Eq. (5); alpha and beta set how
strongly, Eq. (6). (3) The prompts descend along the weighted gradients, Eq. (9), and every M steps
alpha and beta descend along the gradient of the held-out loss through the prompts, Eq. (10)-(11):
implicit differentiation with a truncated Neumann series.

    python jscpt.py                                                     # built-in benchmark, CPU
    python jscpt.py --data officehome --split 0.1 --dev-shots 4 --seeds 1 2 3       # Table 1
    python jscpt.py --data minidomainnet --split 0.01 --dev-shots 4 --seeds 1 2 3   # Table 2
    python jscpt.py --data coop10 --shots 5 --dev-shots 4 --seeds 1 2 3             # Table 3
    python jscpt.py --data officehome --split 0.1 --dev-shots 4 --seeds 1 2 3 --no-selection
                        # Table 4; others: --no-prompt-schedule, --no-task-schedule, --cagrad
    python jscpt.py --data officehome --split 0.2 --dev-shots 4 --plot             # Figures 4 and 5

paper               code                            paper           code
P_l^sh, P_v^sh      P_l_shared, P_v_shared          phi             phi = schedule(...), Eq. (6)
P_l,Ti, P_v,Ti      P_l[i], P_v[i]                  Omega           alpha, beta
M_i                 sigmoid(m[i])                   C_i             effect = causal_effect(...)
MLP                 W_1, b_1, W_2, b_2              A_ij            A[i, j] = affinity(...)
theta               the parameters of MTVLP         M, H, eta_2     upper_every, terms, upper_lr

Choices the paper leaves open
- Text prompts enter the first layer only, image prompts every layer: with text prompts "into each
  transformer block" there would be 1.26 M parameters, but the paper counts 0.203 M per task. Shared
  and task-specific prompts are concatenated, 2b in all, and initialised from N(0, 0.02).
- The selection network is shared by the tasks and has 32 hidden units and a skip connection (as in
  the authors' program): MLP(z) = z + W_2 ReLU(W_1 z + b_1) + b_2 with W_1 ~ N(0, 1/D), the rest
  zero, and m = 0. So at the start the selected features equal the features, 2 sigma(0) x = x, the
  causal effect is sigma(1), and any selection is learned. Prompts, masks and network have 813,600
  parameters for four tasks at ViT-B/16, 0.2034 M per task; alpha and beta are counted separately.
- Eq. (4) as printed, the sigmoid of an exponential, lies in (0.5, 1), so the paper's case of an
  effect < 0.5 cannot occur. Its original loss is that of the same step's features without
  selection.
- Eq. (5) is clamped to the [-1, 1] that the paper states, with a zero diagonal. In Eq. (6) beta_i
  is a vector over source tasks and the product a dot product; alpha and beta start at 1. phi is a
  constant in the lower step, which uses one gradient per task.
- An ablated factor of Eq. (6) is fixed at its initial value (task 0.5, prompt sigma(sigma(1))). The
  first steps of all ablations then have about the same length. `--no-selection` fixes the masks
  at 0.5; the network stays. `--cagrad` combines the gradients of all shared parameters by CAGrad,
  times N to match a sum, after weighting them by the prompt factor alone.
- D_dev is the dataset's validation part, or 20% of a task's training images, held out by seed (in
  the ablations too), so that all methods of a comparison train and test on the same images. Every
  upper step draws a random batch per task from it, not augmented. The paper samples it "from the
  validation set" (Sec. 3.4), not from the training images: `--dev-shots k` (k = 4 in the commands
  of its tables; the authors' program: up to 4) takes k images per class from the validation part,
  else from unused training images, else from the test images, which are then fewer. With
  `--validate` it has no effect.
- The upper step computes L on the latest training batch with the updated prompts, keeps that
  batch's effect and affinity, and updates alpha and beta by Adam, lr 0.0015 (the authors' program).
  At the paper's settings on 10% of Office-Home there are about 115 upper steps, each of about
  0.0015 at most: alpha and beta stay within about 0.17 of 1. The Neumann series has a scale s
  (Lorraine et al., AISTATS 2020): s sum_j (I - s Hessian)^j, j = 0..H; it is eta_1 by default. The
  prompts of the last step are returned.
- A step takes a batch from every task (`common.batches`), with fresh views. Eq. (10) ignores the
  momentum and weight decay of `common.sgd`.
- The authors' program averages the shared and the specific prompts and their features, computes the
  affinity from losses without selection, never updates Omega, switches the causal factor off, has
  softplus in place of sigma, a mean of affinities and weights rescaled to sum to N, and steps its
  learning rate schedule twice per epoch: this file follows the paper.
"""
import itertools
import math
import random
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import common
import data as datasets

HIDDEN = 32     # units of the selection network, as many as the paper's 0.203 M parameters allow


@dataclass
class Args(common.Args):
    """Sec. 4.1, "Implementation details"."""

    clip: str = "ViT-B/16"  # "CLIP (ViT-B/16) as our default model"; tiny for built-in data
    epochs: common.Count = 50  # "trained for 50 epochs"
    lr: common.Rate = 0.0015  # eta_1: "the SGD optimizer with a learning rate fixed at 0.0015"
    # images per task: "16, 4, and 32" (Office-Home, MiniDomainNet, datasets)
    batch_size: common.Count = 16
    # "set the number of prompt tokens to 16": 16 shared and 16 task-specific ones
    n_ctx: common.Count = 16
    upper_every: common.Count = 10  # M: lower steps per upper step; "H is set to 3 and M to 10"
    terms: Annotated[int, common.AtLeast(0)] = 3  # H: Hessian products in the Neumann series
    upper_lr: common.Rate = 0.0015  # eta_2: Adam's learning rate for alpha and beta (ours)
    scale: common.Rate | None = None  # scale of the Neumann series; None: the learning rate
    # D_dev: number of images per class, from outside the training split
    dev_shots: common.Count | None = None
    selection: common.Kept = True  # drop the learned masks, fixing them at 0.5: Table 4
    prompt_schedule: common.Kept = True  # drop the causal effect from phi: Table 4
    task_schedule: common.Kept = True  # drop the affinity from phi: Table 4
    cagrad: bool = False  # CAGrad in place of the task schedule: Table 4


def defaults(args):
    """The settings of `tiny` (data/README.md says how they were chosen), and the paper's batch
    sizes."""
    if args.clip == "tiny":
        return dict(epochs=7, lr=0.005, batch_size=8, n_ctx=4, min_crop=0.6, upper_lr=0.05)
    sizes = dict(minidomainnet=4, coop10=32, coop11=32)
    return dict(batch_size=sizes.get(args.data.split(":")[0], 16))


# --------------------------------------------------------------- prompts and selection (Sec. 3.2)

class MTVLP(nn.Module):
    """Multi-task vision-language prompts, masks and selection network (theta), and Omega.

    The first dimension of theta's tensors is the task: specific ones [N, ...], shared [1, ...].
    """

    def __init__(self, n_tasks, n_ctx, d_text, d_image, n_layers, dim, selection=True):
        """dim: D, the width of the features; selection: whether masks are learned."""
        super().__init__()
        N = n_tasks
        self.P_l_shared = nn.Parameter(0.02 * torch.randn(1, n_ctx, d_text))
        self.P_v_shared = nn.Parameter(0.02 * torch.randn(1, n_layers, n_ctx, d_image))
        self.P_l = nn.Parameter(0.02 * torch.randn(N, n_ctx, d_text))
        self.P_v = nn.Parameter(0.02 * torch.randn(N, n_layers, n_ctx, d_image))
        self.W_1 = nn.Parameter(torch.randn(1, HIDDEN, dim) / math.sqrt(dim))
        self.b_1 = nn.Parameter(torch.zeros(1, HIDDEN))
        self.W_2 = nn.Parameter(torch.zeros(1, dim, HIDDEN))
        self.b_2 = nn.Parameter(torch.zeros(1, dim))
        self.register_buffer("m", torch.zeros(N, dim))          # masks are sigma(m)
        if selection:
            self.m = nn.Parameter(self.m)
        self.register_buffer("alpha", torch.ones(N))
        self.register_buffer("beta", torch.ones(N, N))
        for name, shape in dict(effect=(N,), affinity=(N, N), phi=(N,)).items():
            self.register_buffer(name, torch.zeros(shape))      # the last epoch's means

    def theta(self):
        """theta, {name: [N, ...] or [1, ...]}, including m if it is fixed."""
        return {**dict(self.named_parameters()), "m": self.m}

    def copies(self):
        """theta with a copy of each shared tensor for every task, {name: [N, ...]}.

        The gradient of the summed losses with respect to these copies is each task's own gradient.
        """
        N = len(self.alpha)
        return {name: x.expand(N, *x.shape[1:]) for name, x in self.theta().items()}

    def of_task(self, t):
        """Task t's part of theta and what is shared, {name: [1, ...]}."""
        return {name: x if len(x) == 1 else x[t:t + 1] for name, x in self.theta().items()}


def text_prompts(theta):
    """[P_l^sh, P_l,Ti] of every task, [1, N, 2b, d_l], of theta as `MTVLP.copies` gives it."""
    return torch.cat([theta["P_l_shared"], theta["P_l"]], dim=1)[None]


def image_prompts(theta):
    """[P_v^sh, P_v,Ti] of every task, [K, N, 2b, d_v]."""
    return torch.cat([theta["P_v_shared"], theta["P_v"]], dim=2).transpose(0, 1)


def select(theta, x, task):
    """The selected image features x_bar = MLP(M_i * x + MLP(M_i * x)), Eq. (2).

    x: [B, D]; task: one task number for all images, or one per image, [B]. Returns [B, D].
    """
    m, W_1, b_1, W_2, b_2 = (theta[name][task] for name in ("m", "W_1", "b_1", "W_2", "b_2"))

    def mlp(z):
        hidden = torch.relu(torch.einsum("...hd,...d->...h", W_1, z) + b_1)
        return z + torch.einsum("...dh,...h->...d", W_2, hidden) + b_2

    masked = torch.sigmoid(m) * x
    return mlp(masked + mlp(masked))


def build(args, model, tasks):
    """The untrained prompts, masks and network, and a schedule of ones."""
    visual = model.visual
    layers, d_image = len(visual.transformer.resblocks), len(visual.class_embedding)
    prompts = MTVLP(len(tasks), args.n_ctx, len(model.ln_final.weight), d_image, layers,
                    model.text_projection.shape[1], args.selection)
    return prompts.to(model.logit_scale.device)


def texts_of(args, tasks):
    """The tasks' texts `[SOS] shared_1 .. shared_b own_1 .. own_b class name . [EOS]`."""
    return common.Texts(tasks, 2 * args.n_ctx, sets=range(len(tasks)))


# --------------------------------------------------------------------- the scheduler (Sec. 3.3)

def causal_effect(loss_original, loss_selected):
    """The gain from selection, sigma(exp(L(x) - L(x_bar))), in (0.5, 1), Eq. (4)."""
    return torch.sigmoid(torch.exp(loss_original - loss_selected))


def affinity(grads):
    """A[i, j] = g_i . g_j / |g_j|^2 of source task i on target task j, Eq. (5).

    grads: [N, P], the tasks' gradients on the shared prompts. Clamped to [-1, 1], zero on the
    diagonal; a zero gradient has affinity 0. Returns [N, N].
    """
    gram = grads @ grads.t()
    A = gram / gram.diagonal().clamp(min=torch.finfo(grads.dtype).tiny)
    return A.clamp(-1, 1).fill_diagonal_(0)


def schedule(alpha, beta, effect, affinity):
    """phi_i = sigma(alpha_i effect_i) sigma(sum_j beta[i, j] affinity[j, i]), [N], Eq. (6).

    alpha [N], beta [N, N], effect [N], affinity [N, N]. If an ablation drops alpha or beta (None),
    its factor is fixed at the initial value.
    """
    if alpha is None:
        prompt_factor = torch.sigmoid(torch.sigmoid(torch.ones_like(effect)))
    else:
        prompt_factor = torch.sigmoid(alpha * effect)
    if beta is None:
        task_factor = torch.full_like(effect, 0.5)
    else:
        task_factor = torch.sigmoid((beta * affinity.t()).sum(dim=1))
    return prompt_factor * task_factor


@torch.no_grad()
def weigh(losses_original, losses, shared_grads, alpha, beta):
    """A step's causal effect [N], affinity [N, N] and weights phi [N], Eq. (4)-(6).

    losses_original, losses: the tasks' losses without and with selection [N]; shared_grads [N, P]:
    their gradients on the shared prompts; alpha, beta: as for `schedule`.
    """
    effect = causal_effect(losses_original, losses)                             # Eq. (4)
    A = affinity(shared_grads)                                                  # Eq. (5)
    return effect, A, schedule(alpha, beta, effect, A)                          # Eq. (6)


def omega_of(args, prompts):
    """The parts of Omega that are learned, {name: tensor}: all but those an ablation drops."""
    omega = {}
    if args.prompt_schedule:
        omega["alpha"] = prompts.alpha
    if args.task_schedule and not args.cagrad:
        omega["beta"] = prompts.beta
    return omega


# ------------------------------------------------------------- bi-level optimization (Sec. 3.4)

def scheduled_gradient(phi, grads, parameters):
    """The gradient of sum_i phi_i L_i with a constant phi [N], Eq. (9), in the parameters' shapes.

    grads: the tasks' gradients [N, ...] of each of the parameters [N, ...] or [1, ...].
    """
    return [torch.einsum("n,n...->n...", phi.detach(), g).sum_to_size(p.shape)
            for g, p in zip(grads, parameters)]


def cagrad_gradient(phi, grads, parameters):
    """As `scheduled_gradient`, but shared tensors descend along N times CAGrad's direction."""
    rows = [torch.einsum("n,n...->n...", phi.detach(), g) for g in grads]
    shared = [k for k, p in enumerate(parameters) if len(p) < len(phi)]
    if shared:                              # with one task there is nothing to combine
        flat = torch.cat([rows[k].flatten(1) for k in shared], dim=1)
        direction = len(phi) * common.cagrad(flat)
        for k, part in zip(shared, direction.split([parameters[k].numel() for k in shared])):
            rows[k] = part.view_as(parameters[k])
    return rows


def neumann(hvp, v, steps, scale):
    """scale * sum_{j=0..steps} (I - scale H)^j v, which tends to H^-1 v: the sum in Eq. (11).

    v: a list of tensors; hvp maps such a list to H times it. Returns such a list.
    """
    term, total = v, v
    for _ in range(steps):
        term = [t - scale * h for t, h in zip(term, hvp(term))]
        total = [a + t for a, t in zip(total, term)]
    return [scale * a for a in total]


def implicit_gradient(parameters, losses, dev_losses, phi, omega, steps, scale):
    """The gradient of the development loss with respect to Omega, Eq. (10)-(11), in omega's shape.

    parameters: theta's tensors; losses, dev_losses: for each task a function that computes its loss
    on the training and on the development batch; phi [N]: a function of omega.

    L = sum_i phi_i L_i, so its Hessian products are sums over tasks, and memory holds the graph of
    one task at a time, rebuilt for each product. L is linear in phi, so the mixed term is
    sum_i (grad_Omega phi_i) (grad_theta L_i) and needs no second derivative.
    """
    def hvp(v):                                                 # sum_i phi_i (Hessian of L_i) v
        total = [torch.zeros_like(p) for p in parameters]
        for phi_i, loss in zip(phi.detach(), losses):
            for h, part in zip(total, hessian_product(loss, parameters, v)):
                h += phi_i * part
        return total

    dev_grads = [torch.zeros_like(p) for p in parameters]
    for loss in dev_losses:
        for total, g in zip(dev_grads, torch.autograd.grad(loss(), parameters)):
            total += g
    p = neumann(hvp, dev_grads, steps, scale)                                   # Eq. (11)
    dots = []
    for loss in losses:
        grads = torch.autograd.grad(loss(), parameters)
        dots.append(sum((g * x).sum() for g, x in zip(grads, p)))
    return torch.autograd.grad(phi, omega, -torch.stack(dots))                  # Eq. (10)


def hessian_product(loss, parameters, v):
    """The Hessian of loss(), a function of the parameters, times v, in the parameters' shapes."""
    with sdpa_kernel(SDPBackend.MATH):      # fused attention has no second derivative
        grads = torch.autograd.grad(loss(), parameters, create_graph=True)
    return torch.autograd.grad(grads, parameters, v)


def losses_at(model, texts, theta, batch):
    """Every task's loss [N] on the selected features of a batch (images, labels, task), Eq. (3)."""
    images, labels, task = batch
    x = common.encode_image(model, images, image_prompts(theta), task)
    w = common.encode_text(model, texts.tokens, text_prompts(theta), texts.sets)
    return common.task_losses(model, select(theta, x, task), w, labels, task, texts)


def loss_of_task(model, texts, prompts, batch, t):
    """Task t's loss on its part of a batch, from its own prompts and texts alone."""
    images, labels, task = batch
    mine = torch.where(task == t)[0]
    batch = images[mine], labels[mine], torch.zeros_like(mine)      # here the only task, number 0
    return losses_at(model, texts.of_task(t), prompts.of_task(t), batch)[0]


def upper_step(args, model, texts, prompts, batch, dev_batch, effect, A, upper):
    """Move alpha and beta along the implicit gradient, Eq. (10)-(11).

    batch: the latest training batch, with its effect [N] and affinity A [N, N] as constants;
    dev_batch: a batch of D_dev; upper: Adam on alpha and beta.
    """
    omega = {name: x.clone().requires_grad_() for name, x in omega_of(args, prompts).items()}
    phi = schedule(omega.get("alpha"), omega.get("beta"), effect, A)            # Eq. (6)
    at = partial(loss_of_task, model, texts, prompts)
    present = batch[2].unique().tolist()
    losses = [partial(at, batch, t) for t in present]
    dev_losses = [partial(at, dev_batch, t) for t in dev_batch[2].unique().tolist()]
    found = implicit_gradient(list(prompts.parameters()), losses, dev_losses, phi[present],
                              list(omega.values()), args.terms, args.scale or args.lr)
    for x, g in zip(omega_of(args, prompts).values(), found):
        x.grad = g
    upper.step()


class Development:
    """D_dev in memory, not augmented; gives random batches in the form of `common.batches`."""

    def __init__(self, args, model, tasks):
        self.batch_size, self.device = args.batch_size, model.logit_scale.device
        self.pixels, self.labels = [], []
        for task in tasks:
            images = task.val or task.train
            if not task.val:
                print(f"{task.name}: no training image can be held out for development, so the "
                      "training images are used", flush=True)
            parts = datasets.in_order(images, model.visual.input_resolution, args.workers)
            self.pixels.append(torch.cat([pixels for pixels, _ in parts]))
            self.labels.append(images.labels)

    def batch(self):
        """(images [B, 3, H, W], labels [B], task [B]), from PyTorch's global generator."""
        chosen = [torch.randperm(len(x))[:self.batch_size] for x in self.labels]
        images = torch.cat([x[i] for x, i in zip(self.pixels, chosen)])
        labels = datasets.label_tensor(
            [x[k] for x, i in zip(self.labels, chosen) for k in i.tolist()])
        task = torch.cat([torch.full((len(i),), t) for t, i in enumerate(chosen)])
        return (datasets.normalise(images.to(self.device)), labels.to(self.device),
                task.to(self.device))


def train(args, model, tasks, run):
    """Algorithm 1; returns the trained prompts with their final schedule."""
    prompts = build(args, model, tasks)
    if args.dev_shots is None or args.validate:
        tasks = datasets.with_held_out(tasks, args.seeds[0])
    development = Development(args, model, tasks)
    theta, omega = dict(prompts.named_parameters()), omega_of(args, prompts)
    texts = texts_of(args, tasks).to(model.logit_scale.device)
    lower, _ = common.sgd(args, prompts)                        # "a learning rate fixed at 0.0015"
    upper = torch.optim.Adam([prompts.alpha, prompts.beta], lr=args.upper_lr)
    combine = cagrad_gradient if args.cagrad else scheduled_gradient
    n_steps = common.steps_per_epoch(args, tasks)
    for epoch in run.epochs("train", args.epochs, prompts=prompts, lower=lower, upper=upper):
        seen = []
        steps = common.batches(args, model, tasks)
        for step, (images, labels, task) in enumerate(steps, epoch * n_steps + 1):
            # lower level: update theta with fixed Omega
            copies = prompts.copies()
            x = common.encode_image(model, images, image_prompts(copies), task)             # [B, D]
            w = common.encode_text(model, texts.tokens, text_prompts(copies), texts.sets)   # [C, D]
            x_bar = select(copies, x, task)                                     # Eq. (2)
            losses = common.task_losses(model, x_bar, w, labels, task, texts)   # [N], Eq. (3)
            grads = torch.autograd.grad(losses.sum(), [copies[name] for name in theta])
            with torch.no_grad():
                original = common.task_losses(model, x, w, labels, task, texts)
            of_task = dict(zip(theta, grads))
            shared = [of_task[name].flatten(1) for name in ("P_l_shared", "P_v_shared")]
            effect, A, phi = weigh(original, losses, torch.cat(shared, dim=1),  # Eq. (4)-(6)
                                   omega.get("alpha"), omega.get("beta"))
            for p, g in zip(theta.values(), combine(phi, grads, list(theta.values()))):
                p.grad = g                                                      # Eq. (9)
            lower.step()
            # upper level: update Omega with the current theta, Eq. (10)-(11)
            if omega and step % args.upper_every == 0:
                batch, dev_batch = (images, labels, task), development.batch()
                upper_step(args, model, texts, prompts, batch, dev_batch, effect, A, upper)
            losses, effect, phi = (common.nan_where_absent(x, task) for x in (losses, effect, phi))
            run.log(loss=losses.nansum(), losses=losses, effect=effect, phi=phi, affinity=A,
                    alpha=prompts.alpha.clone(), beta=prompts.beta.clone())
            seen.append((effect, phi, A))
        effects, phis, affinities = map(torch.stack, zip(*seen))
        prompts.effect.copy_(effects.nanmean(dim=0))
        prompts.phi.copy_(phis.nanmean(dim=0))
        prompts.affinity.copy_(affinities.mean(dim=0))
        run.log(batch_effect=effects[:16].t(), batch_phi=phis[:16].t())         # for Figure 4
    return prompts


@torch.no_grad()
def classify(args, model, tasks, prompts):
    """The tasks' classifiers, image prompts and feature selection."""
    theta, texts = prompts.copies(), texts_of(args, tasks)
    w = common.encode_text(model, texts.tokens, text_prompts(theta), texts.sets)

    def selected(x, t):
        return select(theta, x, t)

    return dict(classifiers=texts.classifiers(w), image_prompts=image_prompts(theta),
                select=selected)


def report(args, tasks, prompts):
    """The schedule at the end, and the number of its parameters."""
    found = {name: getattr(prompts, name).tolist()
             for name in ("alpha", "beta", "effect", "affinity", "phi")}
    found["schedule_parameters"] = sum(x.numel() for x in omega_of(args, prompts).values())
    return found


# -------------------------------------------------------------------------- data, figures

def set_aside(args, tasks, seed):
    """The tasks; with --dev-shots k, `val` is k images per class from outside the training split.

    They come from the dataset's validation part, else from training images that the split doesn't
    use, else from the test images.
    """
    if args.dev_shots is None or args.validate:
        return tasks
    return [aside(args, task, seed) for task in tasks]


def aside(args, task, seed):
    """One task of `set_aside`."""
    pool = task.val or task.unused or task.test
    places, draw, chosen = defaultdict(list), random.Random(f"{seed}/dev/{task.name}"), []
    for i, label in enumerate(pool.classes):
        places[label].append(i)
    for label in sorted(places):
        spare = len(places[label]) - (pool is task.test)        # each class keeps a test image
        chosen += draw.sample(places[label], min(args.dev_shots, spare))
    if not chosen:
        raise common.UserError(f"--dev-shots {args.dev_shots} finds no image of {task.name} that "
                               "the test set can spare: leave the flag out")
    val = pool.subset(sorted(chosen))
    if pool is not task.test:
        return replace(task, val=val)
    taken = set(chosen)
    return replace(task, val=val, test=pool.subset([i for i in range(len(pool)) if i not in taken]))


def plot(folder, result, rows):
    """causal-SEED.png (Figure 4); schedule-SEED.png; beta-SEED.png; for Figure 5 losses.png and
    affinity-SEED-epoch-5.png and -10.png (affinity-SEED.png has the last epoch)."""
    names = result["tasks"]
    for seed, beta in zip(result["seeds"], result["beta"]):
        mine = [row for row in rows if row["seed"] == seed]
        plot_causal(folder / f"causal-{seed}.png", names, mine)
        figure, axes = common.pyplot().subplots(1, 2, figsize=(10, 3.5), layout="tight")
        for axis, key in zip(axes, ("alpha", "phi")):
            common.plot_epochs(axis, [row[key] for row in mine], names, key, "mean over the epoch")
        common.legend_beside(axes[1])
        common.save_figure(figure, folder / f"schedule-{seed}.png")
        common.plot_matrix(folder / f"beta-{seed}.png", beta, names,
                           f"beta of a target (row) for a source, seed {seed}")
        for row in mine[:-1]:
            if row["epoch"] in (5, 10):
                common.plot_matrix(folder / f"affinity-{seed}-epoch-{row['epoch']}.png",
                                   row["affinity"], names,
                                   f"affinity, seed {seed}, epoch {row['epoch']}")


def plot_causal(path, names, rows):
    """The causal effect and the weight of each task over 16 batches, in epochs 1 and 20."""
    titles = dict(batch_effect="causal effect, Eq. (4)", batch_phi="weight, Eq. (6)")
    figure, axes = common.pyplot().subplots(len(names), 2, figsize=(9, 2.2 * len(names)),
                                            squeeze=False, layout="tight")
    shown = rows[:1] + rows[1:20][-1:]
    for (i, name), (k, key) in itertools.product(enumerate(names), enumerate(titles)):
        for row in shown:
            common.plot_epochs(axes[i, k], row[key][i], f"epoch {row['epoch']}",
                               f"{name}: {titles[key]}", "")
        axes[i, k].set_xlabel("batch")
    common.legend_beside(axes[0, 1])
    common.save_figure(figure, path)


def check(args, tasks):
    """Raise UserError for settings that contradict each other."""
    if args.warm_up:
        raise common.UserError("--warm-up comes before a cosine, but the learning rate is fixed: "
                               "leave it out")
    if args.cagrad and not args.task_schedule:
        raise common.UserError("--cagrad already replaces the task schedule: leave out "
                               "--no-task-schedule")


def n_text(args):
    """b shared and b task-specific vectors precede a class name."""
    return 2 * args.n_ctx


METHOD = common.Method("jscpt", Args, __doc__, build, train, classify, defaults=defaults,
                       check=check, prepare=set_aside, report=report, plot=plot, n_text=n_text,
                       image_prompts=True, bound=True, second_order=True)

if __name__ == "__main__":
    common.script(METHOD)
