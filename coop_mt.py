"""CoOp-MT: one learned text context for all tasks, the multi-task version of context optimisation.

Zhou, Yang, Loy and Liu, "Learning to Prompt for Vision-Language Models", IJCV 2022; multi-task as the baseline of MmAP
(Xin et al., AAAI 2024, Sec. 4.1: "train a task-shared prompt with samples from all tasks") and of HiPro and JSCPT.

The idea: CLIP classifies an image by the cosine between its feature and the text features of the class names. Instead of
"a photo of a [class]." the text is "[v]_1 [v]_2 ... [v]_b [class].", and the b vectors are learned by gradient descent
through the frozen text encoder. All tasks share them, and the loss is the sum of the tasks' cross-entropies. Only the text
side is trained, so every image goes through its encoder once.

    python coop_mt.py                                                           # built-in benchmark and backbone
    python coop_mt.py --data officehome --split 0.1 --seeds 1 2 3               # MmAP, Table 1, column CoOp-MT
    python coop_mt.py --data officehome --split 0.1 --seeds 1 2 3 --single-task # ... its single-task column CoOp
    python coop_mt.py --data officehome --split 0.1 --seeds 1 2 3 --clip RN50 --epochs 100 --lr 0.001 --batch-size 5
                                                                                # HiPro, Table 1, column CoOp-MTL
    python coop_mt.py ... --surgery pcgrad                                      # ... its columns PCGrad and (imtl) IMTL
    python coop_mt.py --data officehome --split 0.1 --seeds 1 2 3 --epochs 50 --lr 0.0015     # JSCPT's, but for its fixed rate

Choices the papers leave open
- b = 16 vectors, N(0, 0.02): CoOp's; MmAP states neither. SGD with momentum 0.9 and weight decay 5e-4
  (Dassl's defaults, on which the authors' programs run), and a cosine that steps once an epoch, without CoOp's warm-up epoch.
- A step takes a batch of every task; an epoch is as long as the largest task needs; smaller tasks cycle.
- The image features of `--views` random views an image are computed once and reused (0: fresh views every epoch).
- `tiny` was never trained on small crops of a drawing, so its views show at least 0.6 of the area.
- `--surgery imtl` is IMTL-G alone: with one shared prompt and no task-specific layers, the loss balance is off. IMTL-G and CAGrad
  return averages of the gradients; times N here, as long as the sum that PCGrad starts from.
- `--single-task` trains all tasks' contexts in one pass: the summed loss has no term with two contexts in it, so each
  context gets its own task's gradient and nothing else. Momentum and weight decay act on each number by itself.
"""
import torch
import torch.nn.functional as F
from torch import nn

import common

PAPER = dict(                       # MmAP, Sec. 4.1, "Implementation Details"
    clip="ViT-B/16",                # "with CLIP (ViT-B/16) chosen as our default model"
    epochs=5,                       # "train for 5 epochs for Office-Home/MiniDomainNet"
    lr=0.0035,                      # "We employ the SGD optimizer with a learning rate of 0.0035"
    batch_size=16,                  # "a batch size of 16/4"
    n_ctx=16,                       # HiPro, "Training Details": "Prompt with 16 tokens"
    views=8,                        # ours
    min_crop=0.08,                  # Dassl's random resized crop
    surgery="none")                 # HiPro's baselines on CoOp-MT: pcgrad, imtl
TINY = dict(epochs=15, lr=0.03, min_crop=0.6)      # the built-in backbone's, chosen on validation images
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # Dassl's defaults
SURGERY = dict(none=None, pcgrad=common.pcgrad, imtl=lambda grads: len(grads) * common.imtl(grads),
               cagrad=lambda grads: len(grads) * common.cagrad(grads))     # the last two average: made as long as a sum


class Context(nn.Module):
    """The learned context vectors: one set for all tasks, or one a task."""

    def __init__(self, n_sets, n_ctx, width):
        super().__init__()
        self.vectors = nn.Parameter(0.02 * torch.randn(n_sets, n_ctx, width))

    def text_prompts(self):
        """Prompts [L=1, n_sets, b, d_l]: context optimisation works on the input layer alone."""
        return self.vectors[None]


def build(args, model, tasks):
    """The untrained prompts, one set or one a task."""
    width = model.ln_final.weight.shape[0]
    return Context(len(tasks) if args.single_task else 1, args.n_ctx, width).to(model.logit_scale.device)


def texts_of(args, tasks):
    """The tasks' texts `[SOS] v_1 .. v_b class name . [EOS]`; tasks that share context and names share rows."""
    return common.Texts(tasks, args.n_ctx, owners=list(range(len(tasks))) if args.single_task else None)


def losses_of(model, texts, prompts, views, batches):
    """Every task's mean cross-entropy of a batch, [N], MmAP's Eq. (5); their sum is the loss, Eq. (11).

    views: (features [V, n, D], labels [n]) a task; batches: indices of images [b] a task. Each image shows a random view.
    """
    with common.autocast(model):
        text_features = texts.encode(model, prompts.text_prompts())             # [C, D] a task, one pass for all
    losses = []
    for (features, labels), picked, text in zip(views, batches, text_features):
        x = features[torch.randint(len(features), picked.shape), picked]        # [b, D]
        losses.append(F.cross_entropy(common.logits(model, x, text.float()), labels[picked]))
    return torch.stack(losses)


def train(args, model, tasks, run, seed):
    """Learn the context on all tasks' training images; returns the trained prompts."""
    common.seed_everything(seed)
    prompts, texts = build(args, model, tasks), texts_of(args, tasks)
    optimizer = torch.optim.SGD(prompts.parameters(), lr=args.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    views, start = None, run.restore(seed, prompts=prompts, optimizer=optimizer, schedule=schedule)
    for epoch in common.progress(range(start, args.epochs), "train"):
        if views is None or not args.views:                                     # the frozen encoder sees every image here
            common.seed_everything(seed, 0 if args.views else 2 * epoch)
            views = [common.view_features(model, task.train, args.views or 1, args.min_crop) for task in tasks]
        common.seed_everything(seed, 2 * epoch + 1)
        losses = []
        for batches in common.epoch_batches([len(task.train) for task in tasks], args.batch_size):
            of_task = losses_of(model, texts, prompts, views, batches)
            optimizer.zero_grad()
            if args.surgery == "none":
                of_task.sum().backward()
            else:
                last = len(of_task) - 1
                grads = torch.stack([torch.autograd.grad(x, prompts.vectors, retain_graph=i < last)[0].flatten()
                                     for i, x in enumerate(of_task)])
                prompts.vectors.grad = SURGERY[args.surgery](grads).view_as(prompts.vectors)
            optimizer.step()
            losses.append(of_task.sum().item())
        schedule.step()
        row = dict(loss=sum(losses) / len(losses))
        run.checkpoint(seed, epoch + 1, row, prompts=prompts, optimizer=optimizer, schedule=schedule)
    return prompts


def score(args, model, preprocess, tasks, prompts):
    """Zero-shot CLIP's and the method's accuracy on every task, in per cent; both use the same image features."""
    with torch.no_grad():
        text_features = texts_of(args, tasks).encode(model, prompts.text_prompts())
    scores = dict(zero_shot=[], accuracy=[])
    for task, plain, learned in zip(tasks, common.zero_shot(model, tasks), text_features):
        features = common.image_features(model, task.test, preprocess)
        scores["zero_shot"].append(common.evaluate(model, preprocess, task, plain, features=features))
        scores["accuracy"].append(common.evaluate(model, preprocess, task, learned, features=features))
    return scores


def main(argv=None):
    parser = common.arguments("coop_mt", __doc__, PAPER, TINY)
    parser.add_argument("--single-task", action="store_true", help="a context for each task alone (the papers' CoOp column)")
    parser.add_argument("--surgery", choices=list(SURGERY),
                        help="what is done where the tasks' gradients disagree (default none: their sum)")
    args = common.parse(parser, argv)
    if args.single_task and args.surgery != "none":
        raise common.UserError("--surgery works on a prompt that tasks share, and --single-task leaves none: leave one of them out")
    args.variant = "single-task" if args.single_task else None if args.surgery == "none" else f"with --surgery {args.surgery}"
    common.run_seeds(args, build, train, score, n_text=args.n_ctx, shared=not args.single_task)


if __name__ == "__main__":
    common.script(main)
