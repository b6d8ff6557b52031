"""JSCPT: image features selected by learned masks, and tasks weighted by a schedule that a development set trains.

Li, Qin, Cui, Liu, Hu and Liao, "Joint Scheduling of Causal Prompts and Tasks for Multi-Task Learning", CVPR 2025.

The idea: prompts pick up what merely goes along with a class, and tasks help or hinder each other differently as training goes
on. So (1) every task has prompts shared by all beside its own, and a mask and a small network select its image features, Eq. (2).
(2) A task's weight phi in a step grows with what selection gains, the causal effect, Eq. (4), and with how well the other tasks'
gradients on the shared prompts suit it, the affinity, Eq. (5); alpha and beta say how strongly, Eq. (6). (3) The prompts descend
along the weighted gradients, Eq. (9), and every M steps alpha and beta along the gradient that the loss on held-out images has
through the prompts, Eq. (10)-(11): implicit differentiation with a truncated Neumann series.

    python jscpt.py                                                             # built-in benchmark and backbone
    python jscpt.py --data officehome --split 0.1 --seeds 1 2 3                 # Table 1 (Table 2: --data minidomainnet --split 0.01
                                                                # --batch-size 4; Table 3: --data coop10 --shots 5 --batch-size 32)
    python jscpt.py --data officehome --split 0.1 --seeds 1 2 3 --no-selection  # Table 4; its other rows: --no-prompt-schedule,
                                                                                # --no-task-schedule, --cagrad
    python jscpt.py --data officehome --split 0.2 --plot                        # Figures 4 and 5

Choices the paper leaves open
- Text prompts enter the first layer only, image prompts every layer: with text prompts "into each transformer block" it would be
  1.26 M numbers, and the paper counts 0.203 M a task. Shared and own ones stand side by side, 2b in all.
- The selection network is shared by the tasks, D - 32 - D with ReLU (CoCoOp's meta-net), and Eq. (2) applies it twice; masks are
  sigma(m), m = 0 at the start. Together 813,600 numbers for four tasks at ViT-B/16, 0.2034 M a task. alpha and beta count apart.
- Eq. (4) as printed, the sigma of an exponential, lies in (0.5, 1), so the "below 0.5" of the text cannot occur. Its original
  loss is that of the same step's features without selection.
- Eq. (5) is clamped to the [-1, 1] that the paper states. In Eq. (6) beta_i is a vector over the source tasks and the product a
  dot product; alpha and beta start at 1. phi is a constant for the prompts' gradient.
- D_v is the dataset's validation set, or 20% of a task's training images, held out by the seed (in the ablations too); D_dev is
  a batch a task of it at every upper step, augmented as in training. Where none can be held out, the training images serve.
- The upper step takes L from the latest training batch at the updated prompts, effect and affinity as that batch had them, and
  moves alpha and beta by Adam. The Neumann series needs a scale s, s sum_j (I - s Hessian)^j (Lorraine et al., AISTATS 2020);
  it is the lower learning rate. The last prompts are returned.
- A factor of Eq. (6) that an ablation leaves out is 1, so its steps are 1.5 to 2 times as long. CAGrad combines the gradients of
  all shared numbers, weighted by the prompts' factor; times N, to be a sum. Its upper step takes the lower level for a plain sum.
- SGD with momentum 0.9 and weight decay 5e-4 (Dassl's defaults), which Eq. (10) does not see. Prompts start at N(0, 0.02). Eq. (2)
  has no residual, so with a network of random weights the selected features would know nothing of CLIP's classes. It starts as the
  projection onto the 32 directions that hold most of the class names' zero-shot text features, and Eq. (2) passes that part of a
  feature on. What is left is shorter, so the logits are larger (1.6 times at `tiny`), the first losses lie above zero-shot's and
  Eq. (4) below sigma(1). Of a thousand class names 32 directions hold less, about 3/4.
- A step takes a batch of every task; an epoch is as long as the largest task needs. Views are fresh every epoch.
"""
import itertools
import json
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import common

PAPER = dict(                       # Sec. 4.1, "Implementation details"
    clip="ViT-B/16",                # "with CLIP (ViT-B/16) as our default model"
    epochs=50,                      # "trained for 50 epochs"
    lr=0.0015,                      # "we employ the SGD optimizer with a learning rate fixed at 0.0015"
    batch_size=16,                  # "a batch size of 16, 4, and 32 respectively for the Office-Home, MiniDomainNet, and ..."
    n_ctx=16,                       # "set the number of prompt tokens to 16"
    views=0,                        # fresh views every epoch
    min_crop=0.08,                  # Dassl's random resized crop
    upper_every=10,                 # Sec. 3.4: "H is set to 3 and M to 10": M
    terms=3,                        # ... H
    upper_lr=0.0015)                # eta_2: ours, the paper states none
TINY = dict(epochs=5, lr=0.0003, batch_size=8, n_ctx=4, min_crop=0.6, upper_every=5, upper_lr=0.05)    # chosen on fxemoji
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # Dassl's defaults
HIDDEN = 32                         # of the selection network: what the paper's 0.203 M numbers a task leave room for
OPEN = 8.0                          # how far below 0 a feature's part in a direction may lie before ReLU cuts it off at first


# ------------------------------------------------------------------------------- prompts and selection (Sec. 3.2)

class MTVLP(nn.Module):
    """The multi-task vision-language prompts, masks and selection network (theta), the schedule's alpha and beta (Omega).

    Every tensor of theta has the tasks first: a task's own ones [N, ...], shared ones [1, ...].
    """

    def __init__(self, n_tasks, n_ctx, d_text, d_image, n_layers, V, selection=True):
        """V [32, D]: orthonormal directions that the selection network passes on at first; selection: whether masks are learned."""
        super().__init__()
        self.P_l_shared = nn.Parameter(0.02 * torch.randn(1, n_ctx, d_text))
        self.P_v_shared = nn.Parameter(0.02 * torch.randn(1, n_layers, n_ctx, d_image))
        self.P_l = nn.Parameter(0.02 * torch.randn(n_tasks, n_ctx, d_text))
        self.P_v = nn.Parameter(0.02 * torch.randn(n_tasks, n_layers, n_ctx, d_image))
        self.W_1, self.b_1 = nn.Parameter(V[None] / 2), nn.Parameter(torch.full((1, len(V)), OPEN / 2))         # [1, 32, D], [1, 32]
        self.W_2, self.b_2 = nn.Parameter(2 * V.t()[None]), nn.Parameter(-OPEN * V.sum(0)[None])                # [1, D, 32], [1, D]
        self.register_buffer("m", torch.zeros(n_tasks, V.shape[1]))             # masks are sigma(m)
        if selection:
            self.m = nn.Parameter(self.m)
        state = dict(alpha=torch.ones(n_tasks), beta=torch.ones(n_tasks, n_tasks), steps=torch.tensor(0),       # lower steps so far
                     effect=torch.zeros(n_tasks), affinity=torch.zeros(n_tasks, n_tasks), phi=torch.zeros(n_tasks))     # epoch's means
        for name, x in state.items():
            self.register_buffer(name, x)

    def copies(self):
        """theta with a copy of every tensor for every task, {name: [N, ...]}: the gradient of a sum of losses keeps them apart."""
        theta = {**dict(self.named_parameters()), "m": self.m}
        return {name: x.expand(len(self.alpha), *x.shape[1:]) for name, x in theta.items()}


def prompts_of(theta):
    """[P_l^sh, P_l,Ti] [1, N, 2b, d_l] and [P_v^sh, P_v,Ti] [K, N, 2b, d_v] of every task, of theta as `copies` gives it."""
    return (torch.cat([theta["P_l_shared"], theta["P_l"]], dim=1)[None],
            torch.cat([theta["P_v_shared"], theta["P_v"]], dim=2).transpose(0, 1))


def select(theta, x, task):
    """The selected image features [B, D] of a task's features x [B, D], Eq. (2): MLP(M_i * x + MLP(M_i * x))."""
    W_1, b_1, W_2, b_2 = (theta[name][task] for name in ("W_1", "b_1", "W_2", "b_2"))
    mlp = lambda x: F.linear(F.relu(F.linear(x, W_1, b_1)), W_2, b_2)
    masked = torch.sigmoid(theta["m"][task]) * x
    return mlp(masked + mlp(masked))


def build(args, model, tasks):
    """The untrained prompts, masks and network, and a schedule of ones."""
    visual, d_text = model.visual, len(model.text_projection)
    words = F.normalize(torch.cat(common.zero_shot(model, tasks)), dim=-1)
    V = torch.linalg.svd(words).Vh[:HIDDEN].clone().cpu()                       # where the class names' features lie
    return MTVLP(len(tasks), args.n_ctx, d_text, visual.class_embedding.shape[0], len(visual.transformer.resblocks), V,
                 selection=not args.no_selection).to(model.logit_scale.device)


def texts_of(args, tasks):
    """The tasks' texts `[SOS] shared_1 .. shared_b own_1 .. own_b class name . [EOS]`."""
    return common.Texts(tasks, 2 * args.n_ctx, owners=list(range(len(tasks))))


def losses_of(model, texts, theta, batches):
    """Every task's mean cross-entropy on selected features, Eq. (3), and on the features as they are (no gradient): [N], [N].

    batches: (images [b, 3, H, W], labels [b]) a task. The texts of all tasks go through their encoder as one batch, and all
    images through theirs.
    """
    text, image = prompts_of(theta)
    with common.autocast(model):
        text_features, image_features = texts.encode(model, text), common.encode_batches(model, batches, image)
    losses, original = [], []
    for i, (x, z, (_, labels)) in enumerate(zip(image_features, text_features, batches)):       # x [b, D], z [C, D]
        x, z = x.to(theta["m"].dtype), z.to(theta["m"].dtype)                   # float32 after autocast
        losses.append(F.cross_entropy(common.logits(model, select(theta, x, i), z), labels))
        original.append(F.cross_entropy(common.logits(model, x.detach(), z.detach()), labels))
    return torch.stack(losses), torch.stack(original)


# ------------------------------------------------------------------------------------- the scheduler (Sec. 3.3)

def causal_effect(loss_original, loss_selected):
    """What selection gains, sigma(exp(L(x) - L(selected x))) in (0.5, 1), Eq. (4). Tensors of one shape, e.g. [N]."""
    return torch.sigmoid(torch.exp(loss_original - loss_selected))


def affinity(grads):
    """A[i, j] of source task i on target task j, Eq. (5): g_i . g_j / |g_j|^2, clamped to [-1, 1], zero on the diagonal.

    grads: [N, P], the tasks' gradients on the shared prompts. A gradient of zero has no affinity. Returns [N, N].
    """
    gram = grads @ grads.t()
    A = gram / gram.diagonal().clamp(min=torch.finfo(grads.dtype).tiny)
    return A.clamp(-1, 1).fill_diagonal_(0)


def schedule(alpha, beta, effect, affinity):
    """The tasks' weights phi [N], Eq. (6), from alpha [N], beta [N, N], effect [N] and affinity [N, N].

    Where an ablation leaves alpha or beta out (None), its factor is 1.
    """
    prompt_weights = torch.ones_like(effect) if alpha is None else torch.sigmoid(alpha * effect)
    task_weights = 1 if beta is None else torch.sigmoid((beta * affinity.t()).sum(1))           # row i: sum_j beta[i, j] A[j, i]
    return prompt_weights * task_weights


def omega_of(args, prompts):
    """What is learned of Omega, {name: tensor}: alpha and beta, without those whose factor an ablation leaves out."""
    learned = dict(alpha=not args.no_prompt_schedule, beta=not (args.no_task_schedule or args.cagrad))
    return {name: getattr(prompts, name) for name in learned if learned[name]}


# ----------------------------------------------------------------------------------- bi-level optimization (Sec. 3.4)

def task_gradients(model, texts, prompts, batches, create_graph=False):
    """The gradient of every task's loss at all of theta, from one backward pass: ({name: [N, ...]}, losses [N], original [N])."""
    theta = prompts.copies()
    losses, original = losses_of(model, texts, theta, batches)
    names = [name for name, _ in prompts.named_parameters()]
    grads = torch.autograd.grad(losses.sum(), [theta[name] for name in names], create_graph=create_graph)
    return dict(zip(names, grads)), losses.detach(), original


def scheduled_gradient(phi, grads, theta):
    """The gradient of sum_i phi_i L_i, Eq. (9), shaped as theta, from phi [N] and the tasks' gradients [N, ...]; phi is constant."""
    return [torch.einsum("n,n...->n...", phi.detach(), g).sum_to_size(p.shape) for g, p in zip(grads, theta)]


def cagrad_gradient(phi, grads, theta):
    """As `scheduled_gradient`, but shared tensors descend along N times CAGrad's direction (Table 4, MTL-CAGrad)."""
    rows = [torch.einsum("n,n...->n...", phi, g) for g in grads]
    shared = [k for k, p in enumerate(theta) if len(p) < len(phi)]
    if shared:                              # with one task there is nothing to combine
        direction = len(phi) * common.cagrad(torch.cat([rows[k].flatten(1) for k in shared], dim=1))
        for k, part in zip(shared, direction.split([theta[k].numel() for k in shared])):
            rows[k] = part.view_as(theta[k])
    return rows


def neumann(hvp, v, steps, scale):
    """scale * sum_{j=0..steps} (I - scale * H)^j v, which tends to H^-1 v: the sum in Eq. (11), with the scale of Lorraine et al.

    v: a list of tensors; hvp maps such a list to H times it. Returns such a list.
    """
    term, total = v, v
    for _ in range(steps):
        term = [t - scale * h for t, h in zip(term, hvp(term))]
        total = [a + t for a, t in zip(total, term)]
    return [scale * a for a in total]


def implicit_gradient(theta, grads, dev_grads, phi, omega, steps, scale):
    """The gradient of the development loss with respect to Omega, Eq. (10)-(11): a list of tensors shaped as omega.

    theta: tensors [N, ...] or [1, ...]; grads: the tasks' gradients [N, ...] for each, differentiable once more; dev_grads:
    shaped as theta; phi [N]: a function of omega. L is linear in phi, so the mixed term is sum_i (grad phi_i) (grad_theta L_i).
    """
    gradient = scheduled_gradient(phi, grads, theta)
    hvp = lambda v: torch.autograd.grad(gradient, theta, v, retain_graph=True)                  # H v, a double backward pass
    p = neumann(hvp, dev_grads, steps, scale)
    dots = sum((g.detach() * x.expand_as(g)).flatten(1).sum(1) for g, x in zip(grads, p))       # [N]
    return torch.autograd.grad(phi, omega, -dots)


def upper_step(args, model, texts, prompts, batches, dev_batches, effect, A, upper):
    """Move alpha and beta along the implicit gradient; returns the development losses [N]."""
    theta = list(prompts.parameters())
    dev_losses, _ = losses_of(model, texts, prompts.copies(), dev_batches)
    dev_grads = torch.autograd.grad(dev_losses.sum(), theta)                    # Eq. (8)
    with sdpa_kernel(SDPBackend.MATH):                                          # fused attention has no second derivative
        grads, _, _ = task_gradients(model, texts, prompts, batches, create_graph=True)
    omega = {name: x.clone().requires_grad_() for name, x in omega_of(args, prompts).items()}
    phi = schedule(omega.get("alpha"), omega.get("beta"), effect, A)
    found = implicit_gradient(theta, list(grads.values()), dev_grads, phi, list(omega.values()), args.terms, args.scale)
    for x, g in zip(omega_of(args, prompts).values(), found):
        x.grad = g
    upper.step()
    return dev_losses.detach()


def development(tasks, seed):
    """(tasks, tasks whose training images are D_v): a dataset's validation set, or 20% of the training images, held out by seed."""
    tasks = common.with_validation(tasks, seed)
    for task in tasks:
        if not task.val:
            print(f"{task.name}: no training image can be held out for development, so the training images serve", flush=True)
    return tasks, [replace(task, train=task.val or task.train) for task in tasks]


def stop_at_nan(tasks, losses, where):
    """Raise UserError with the task whose loss is not finite, and where it happened."""
    for task, loss in zip(tasks, losses.tolist()):
        if not math.isfinite(loss):
            raise common.UserError(f"the loss of {task.name} is {loss} {where}: use a smaller --lr in another --out")


def train(args, model, tasks, run, seed):
    """Algorithm 1; returns the trained prompts, with the schedule that they ended with."""
    common.seed_everything(seed)
    prompts, (tasks, held_out) = build(args, model, tasks), development(tasks, seed)
    theta, omega, texts = list(prompts.parameters()), omega_of(args, prompts), texts_of(args, tasks)
    lower = torch.optim.SGD(theta, lr=args.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    upper = torch.optim.Adam([prompts.alpha, prompts.beta], lr=args.upper_lr)          # passes over what gets no gradient
    start = run.restore(seed, prompts=prompts, lower=lower, upper=upper)
    if len(tasks) == 1:
        print("one task: the schedule changes the size of its steps and nothing else")
    number = sum(x.numel() for x in omega.values())
    print(f"{number} more numbers, {' and '.join(omega) or 'none'}, make the schedule; they count apart", flush=True)
    for epoch in common.progress(range(start, args.epochs), "train"):
        common.seed_everything(seed, epoch + 1)
        endless = (common.image_batches(model, held_out, args, seed) for _ in itertools.count())        # D_v again and again
        dev_batches, seen = itertools.chain.from_iterable(endless), []
        for step, batches in enumerate(common.image_batches(model, tasks, args, seed), 1):
            # lower level: update theta with fixed Omega
            grads, losses, original = task_gradients(model, texts, prompts, batches)
            stop_at_nan(tasks, losses, f"at step {step} of epoch {epoch + 1}")
            effect = causal_effect(original, losses)                            # Eq. (4)
            A = affinity(torch.cat([grads[name].flatten(1) for name in ("P_l_shared", "P_v_shared")], dim=1))                 # Eq. (5)
            phi = schedule(omega.get("alpha"), omega.get("beta"), effect, A)    # Eq. (6)
            combine = cagrad_gradient if args.cagrad else scheduled_gradient
            for p, g in zip(theta, combine(phi, grads.values(), theta)):        # Eq. (9)
                p.grad = g
            lower.step()
            prompts.steps += 1
            seen.append((losses, effect, phi, A))
            # upper level: update Omega with the present theta
            if omega and prompts.steps % args.upper_every == 0:
                dev_losses = upper_step(args, model, texts, prompts, batches, next(dev_batches), effect, A, upper)
                stop_at_nan(tasks, dev_losses, f"on the development images after step {step} of epoch {epoch + 1}")
        run.checkpoint(seed, epoch + 1, log_row(prompts, *map(torch.stack, zip(*seen))), prompts=prompts, lower=lower, upper=upper)
    return prompts


def log_row(prompts, losses, effects, phis, affinities):
    """An epoch's row for log.csv from what its steps had ([steps, N] and [steps, N, N]): lists as JSON, in the tasks' order.

    The means of effect, phi and affinity are kept with the prompts, too.
    """
    prompts.effect, prompts.phi, prompts.affinity = effects.mean(0), phis.mean(0), affinities.mean(0)
    cell = lambda x: json.dumps(x.double().cpu().round(decimals=5).tolist())
    return dict(loss=losses.sum(1).mean().item(), losses=cell(losses.mean(0)), effect=cell(prompts.effect), phi=cell(prompts.phi),
                affinity=cell(prompts.affinity), alpha=cell(prompts.alpha), beta=cell(prompts.beta),
                batch_effect=cell(effects[:16].t()), batch_phi=cell(phis[:16].t()))     # Figure 4 shows 16 batches


def score(args, model, preprocess, tasks, prompts):
    """Zero-shot CLIP's and the method's accuracy on every task, in per cent; the schedule, and what it was made of at the end."""
    theta = {name: x.detach() for name, x in prompts.copies().items()}
    text, image = prompts_of(theta)
    text_features, scores = texts_of(args, tasks).encode(model, text), dict(zero_shot=[], accuracy=[])
    for i, (task, plain) in enumerate(zip(tasks, common.zero_shot(model, tasks))):
        x, labels = common.image_features(model, task.test, preprocess, image[:, i])
        scores["zero_shot"].append(common.evaluate(model, preprocess, task, plain))
        scores["accuracy"].append(common.evaluate(model, preprocess, task, text_features[i], features=(select(theta, x, i), labels)))
    own = {name: getattr(prompts, name).tolist() for name in ("alpha", "beta", "effect", "affinity", "phi")}
    return dict(scores, **own, schedule_parameters=sum(x.numel() for x in omega_of(args, prompts).values()))


def main(argv=None):
    parser = common.arguments("jscpt", __doc__, PAPER, TINY)
    says = lambda key: f"(default {PAPER[key]}" + (f"; tiny {TINY[key]})" if key in TINY else ")")
    parser.add_argument("--upper-every", type=int, metavar="M", help="lower steps between two upper steps " + says("upper_every"))
    parser.add_argument("--upper-lr", type=float, help="learning rate of alpha and beta " + says("upper_lr"))
    parser.add_argument("--terms", type=int, metavar="H", help="Hessian products in the Neumann series " + says("terms"))
    parser.add_argument("--scale", type=float, help="scale of the Neumann series (default: the value of --lr)")
    for flag, does in (("no-selection", "masks fixed at 0.5"), ("no-prompt-schedule", "weights without the causal effect"),
                       ("no-task-schedule", "weights without the inter-task affinity"), ("cagrad", "CAGrad instead of the task schedule")):
        parser.add_argument(f"--{flag}", action="store_true", help=f"{does} (Table 4)")
    args = common.parse(parser, argv)
    args.scale = args.lr if args.scale is None else args.scale
    for key, remedy in dict(upper_every="1 or more", terms="0 or more", upper_lr="a number above 0", scale="a number above 0").items():
        if not (0 < getattr(args, key) < math.inf or key == "terms" and args.terms == 0):
            raise common.UserError(f"--{key.replace('_', '-')} {getattr(args, key)} cannot be: give {remedy}")
    if args.cagrad and args.no_task_schedule:
        raise common.UserError("--cagrad takes the place of the task schedule already: leave out --no-task-schedule")
    usual = {**PAPER, **(TINY if args.clip == "tiny" else {}), "scale": args.lr}
    own = "upper_every upper_lr terms scale no_selection no_prompt_schedule no_task_schedule cagrad".split()
    args.variant = ", ".join(common.said(key, getattr(args, key)) for key in own if getattr(args, key) != usual.get(key, False)) or None
    common.run_seeds(args, build, train, score, 2 * args.n_ctx, image_prompts=True, plot=common.plot_schedule)


if __name__ == "__main__":
    common.script(main)
