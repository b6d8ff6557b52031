"""What the methods are measured against: `python common.py zero-shot ...` and `python common.py probe ...`.

Zero-shot CLIP with one template a task or with an ensemble of templates, and a linear probe: logistic regression on the
features of the frozen image encoder (Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
ICML 2021, Sec. 3.1 and 3.2; the probe is in HiPro's Figure 6). Both end with the closing table of the methods.
"""
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import common
from common import UserError

TEMPLATES = Path(__file__).with_name("templates.txt")
STRENGTHS = [10.0 ** k for k in range(-6, 3)]           # of the L2 penalty; from 100 on the weights stay at their start


def arguments(name, description):
    parser = common._Parser(prog=f"common.py {name}", description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--data", default="emoji", metavar="NAME|DIR", help="as in the method files (default emoji)")
    add("--split", type=float, help="fraction of each class to train on (default 0.1 for emoji); the rest is the test set")
    add("--shots", type=int, help="images of each class to train on, instead of --split")
    add("--seeds", type=int, nargs="+", default=[1], help="a split a seed, reported as mean ± std (default 1)")
    add("--clip", metavar="NAME|FILE", help="backbone (default ViT-B/16; tiny for emoji)")
    add("--root", default="data", metavar="DIR", help="where the datasets are (default data)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ... (default CUDA where there is one)")
    add("--out", metavar="DIR", help="write result.json into this new folder, for `python common.py table`")
    return parser


def load(args):
    """The tasks of every seed, and CLIP; UserError for what cannot be, before anything is computed."""
    args.clip = args.clip or ("tiny" if args.data in common.BUILT_IN else "ViT-B/16")
    if args.split is None and args.shots is None:
        args.split = common.BUILT_IN.get(args.data)
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: give whole numbers from 0 up, each once")
    if args.out and (Path(args.out) / "result.json").exists():
        raise UserError(f"--out {args.out} holds another result: choose another folder")
    common.check_clip(args.clip)
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device} is not there ({common._brief(error)}): use --device cpu") from error
    tasks = {seed: common.load_tasks(args.data, args.split, args.shots, seed, args.root) for seed in args.seeds}
    return tasks, *common.load_clip(args.clip, args.device)


def report(args, method, variant, tasks, model, finished):
    """Print the closing table from the scores of every seed, and keep them in --out."""
    settings = dict(vars(args), method=method, variant=variant, validate=False)
    result = common.gather(settings, tasks[args.seeds[0]], model, finished)
    if args.out:
        try:
            Path(args.out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {args.out} cannot be made ({error.strerror}): choose another folder") from error
        common.write_whole(Path(args.out) / "result.json", json.dumps(result, indent=1))
    common.print_table(result)


# ------------------------------------------------------------------------------------------------------------ zero-shot

def read_templates(path=TEMPLATES):
    """{name of a task or benchmark, in small letters and digits: its templates} from templates.txt; "other" is for the rest."""
    found, names = {}, []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            names = [plain(name) for name in line.strip("[] ").split(",")]
        elif line.strip() and not line.startswith("#"):
            for name in names:
                found.setdefault(name, []).append(line.strip())
    return found


def plain(name):
    return "".join(filter(str.isalnum, name)).lower()


def templates_of(task, data):
    """The templates of a task's ensemble: those of its name, else of the benchmark's, else the general ones."""
    known = read_templates()
    return known.get(plain(task.name)) or known.get(plain(data)) or known["other"]


@torch.no_grad()
def ensemble(model, class_names, templates):
    """Zero-shot text features [C, D]: the mean over templates of the unit-length features, at unit length again."""
    total = 0
    for template in templates:                                                  # as they are, their full stop included
        try:
            tokens = common.clip.tokenize([template.format(name) for name in class_names])
        except RuntimeError as error:
            raise UserError(f"{common._brief(error)}: give the class a shorter name") from error
        tokens = tokens[:, :int(tokens.argmax(dim=-1).max()) + 1]               # nothing behind the longest text's end
        total = total + F.normalize(common.encode_text(model, tokens).float(), dim=-1)
    return F.normalize(total, dim=-1)


def zero_shot(argv=None):
    """`python common.py zero-shot`: nothing is trained; the seeds draw the test images alone."""
    parser = arguments("zero-shot", "Zero-shot CLIP, with one template a task or an ensemble of templates.")
    parser.add_argument("--templates", choices=["single", "ensemble"], default="single",
                        help="single: a task's own template; ensemble: those of data/templates.txt (default single)")
    args = parser.parse_args(argv)
    tasks, model, preprocess = load(args)
    finished = {}
    for seed in args.seeds:
        scores = dict(zero_shot=[], accuracy=[], trainable_parameters=0, seconds=0.0)
        for task, text in zip(tasks[seed], common.zero_shot(model, tasks[seed])):
            features = common.image_features(model, task.test, preprocess)
            more = ensemble(model, task.class_names, templates_of(task, args.data)) if args.templates == "ensemble" else text
            scores["zero_shot"].append(common.evaluate(model, preprocess, task, text, features=features))
            scores["accuracy"].append(common.evaluate(model, preprocess, task, more, features=features))
        finished[seed] = scores
    report(args, "zero_shot", "with --templates ensemble" if args.templates == "ensemble" else None, tasks, model, finished)


# ---------------------------------------------------------------------------------------------------------- linear probe

def fit(x, labels, start, strength, scale):
    """Logistic regression by L-BFGS: weights [C, D] and biases [C] from unit-length features x [n, D] and labels [n].

    Logits are scale * x (start + V)^T + b, and the loss is the mean cross-entropy + strength / 2 |V|^2: the penalty draws the
    weights to `start` [C, D] (zeros, or the zero-shot classifier). The problem is convex, so its start matters no further.
    """
    V, b = torch.zeros_like(start, requires_grad=True), torch.zeros(len(start), device=start.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([V, b], max_iter=200, tolerance_grad=1e-5, tolerance_change=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(scale * x @ (start + V).t() + b, labels) + strength / 2 * V.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (start + V).detach(), b.detach()


def choose_strength(model, preprocess, task, seed, start, scale, train):
    """The L2 strength that is best on validation images (the dataset's, or a fifth of the training images, held out), or None.

    train: the training images' (features, labels). Best is the smallest cross-entropy: CLIP's paper searches by accuracy, which
    a fifth of a few images is too coarse for. None: no image can be held out.
    """
    if task.val is not None:
        (x, y), (held_x, held_y) = train, unit_features(model, task.val, preprocess)
    else:
        rest, held = (torch.tensor(part.items, dtype=torch.long) for part in
                      common.hold_out(common.Images(range(len(task.train)), task.train.labels), seed))
        if not len(held):
            return None
        (x, y), (held_x, held_y) = [(train[0][part], train[1][part]) for part in (rest, held)]
    loss = {}
    for strength in STRENGTHS:
        weights, bias = fit(x, y, start, strength, scale)
        loss[strength] = F.cross_entropy(scale * held_x @ weights.t() + bias, held_y).item()
    return min(loss, key=loss.get)


def unit_features(model, images, preprocess):
    x, labels = common.image_features(model, images, preprocess)
    return F.normalize(x, dim=-1), labels


def probe(argv=None):
    """`python common.py probe`: a logistic regression for each task."""
    parser = arguments("probe", "Linear probe: logistic regression on frozen image features, one for each task. Its L2 strength is "
                       "chosen on validation images (a dataset's own, or a fifth of the training images), never on test images.")
    parser.add_argument("--start", choices=["zero", "zero-shot"], default="zero",
                        help="what the penalty draws the weights to: zero, or the zero-shot classifier (default zero)")
    args = parser.parse_args(argv)
    tasks, model, preprocess = load(args)
    finished, scale = {}, model.logit_scale.exp()
    for seed in args.seeds:
        scores, begin = dict(zero_shot=[], accuracy=[], trainable_parameters=0, l2=[]), time.time()
        for task, text in zip(tasks[seed], common.zero_shot(model, tasks[seed])):
            train = unit_features(model, task.train, preprocess)
            start = F.normalize(text.float(), dim=-1) if args.start == "zero-shot" else torch.zeros_like(text, dtype=torch.float32)
            strength = choose_strength(model, preprocess, task, seed, start, scale, train)
            if strength is None:
                strength = 1.0
                print(f"{task.name}: no training image can be held out, so the L2 strength is {strength}, unchosen", flush=True)
            weights, bias = fit(*train, start, strength, scale)
            x, labels = unit_features(model, task.test, preprocess)
            scores["zero_shot"].append(common.evaluate(model, preprocess, task, text, features=(x, labels)))
            scores["accuracy"].append(common.per_cent_right(scale * x @ weights.t() + bias, labels, task.metric))
            scores["l2"].append(strength)
            scores["trainable_parameters"] += weights.numel() + bias.numel()
        finished[seed] = dict(scores, seconds=time.time() - begin)
        print(f"seed {seed}: L2 strength " + ", ".join(f"{t.name} {s:g}" for t, s in zip(tasks[seed], scores["l2"])), flush=True)
    report(args, "probe", None if args.start == "zero" else "with --start zero-shot", tasks, model, finished)
