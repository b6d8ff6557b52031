"""What the seven method files share: CLIP with prompts, tasks, evaluation, the command line, and the run folder.

Read it in this order: `encode_text` and `encode_image` put prompts into an untouched `clip` model, `load_tasks` makes the
tasks, `Texts` and `epoch_batches` make a training step's batches, `evaluate` scores, `arguments` and `Run` are the shell.

    model, preprocess = load_clip("tiny", "cpu")
    tasks = load_tasks("emoji", split=0.1, seed=1)
    text = encode_text(model, tokenize(tasks[0].class_names, template=tasks[0].template))
    print(evaluate(model, preprocess, tasks[0], text))                          # zero-shot accuracy in per cent
"""
import argparse
import csv
import difflib
import errno
import importlib.util
import io
import json
import math
import os
import pickle
import random
import statistics
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")         # the clip package imports pkg_resources, which warns that it is old
    import clip

HERE = Path(__file__).resolve().parent
sys.modules.setdefault("common", sys.modules[__name__])         # under `python common.py` too there is one of it


class UserError(ValueError):
    """A mistake that the user can mend: one line that names the culprit and the remedy. Scripts exit with code 2."""


def load_file(path, alias):
    """A module by path and under a name that shadows nothing; the same one whenever it is asked for again."""
    if alias in sys.modules:
        return sys.modules[alias]
    spec = importlib.util.spec_from_file_location(alias, path)
    module = sys.modules[alias] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_method(name):
    """The module of a method file beside this one, by path: `load_method("mmap")` shadows no standard module.

    Raises UserError when there is no such file.
    """
    path = HERE / f"{name}.py"
    if not path.is_file():
        raise UserError(f"there is no method file {path}")
    return load_file(path, f"method_{name}")


def seed_everything(seed, epoch=0):
    """Seed Python, NumPy and PyTorch. Every epoch starts here, so a checkpoint needs no random state to go on exactly.

    On a card fused attention's backward pass stays free in its last bits: torch fixes them only where it may refuse other operations.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    mixed = (seed * 1_000_003 + epoch) % 2**32
    random.seed(mixed), np.random.seed(mixed), torch.manual_seed(mixed)


load_file(HERE / "data" / "computing.py", "multitask_prompt_computing")     # precision, memory and compilation of the encoders
from multitask_prompt_computing import autocast, fused_attention, in_pieces, scaled, set_up  # noqa: E402, F401


# ---------------------------------------------------------------------------------------------------------------- CLIP

def load_clip(name, device="cpu"):
    """A frozen float32 CLIP in eval mode and its image preprocessing.

    name: one of `clip.available_models()` (downloaded to ~/.cache/clip), "tiny" (the built-in backbone), or the path of a
    checkpoint: a TorchScript archive as OpenAI ships them, or a state dict. Returns (model, preprocess).
    Raises UserError for an unknown name, a failed download and a file that is no CLIP.
    """
    check_clip(name)
    path = str(HERE / "data" / "tiny_clip.pt") if name == "tiny" else name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, preprocess = clip.load(path, device="cpu")
    except Exception as error:              # a foreign file can fail anywhere between unpickling and building the model
        if name in clip.available_models():
            url = clip.clip._MODELS[name]
            raise UserError(f"cannot get the weights of {name} ({_brief(error)}): put {url} into ~/.cache/clip yourself") from error
        raise UserError(f"{path} is not a CLIP checkpoint that clip.load can read ({_brief(error)}): give the file of a "
                        "TorchScript archive or of a state dict saved with torch.save") from error
    return model.float().eval().requires_grad_(False).to(device), preprocess


def check_clip(name):
    """Raise UserError for a backbone that is neither a name of the clip package, nor "tiny", nor a file."""
    known = ["tiny", *clip.available_models()]
    if name not in known and not Path(name).is_file():
        raise UserError(f"unknown backbone '{name}'{_nearest(name, known)}: use one of {', '.join(known)} or the path of a file")


def _brief(error):
    if isinstance(error, pickle.UnpicklingError):       # torch's own text advises to run what is in the file
        return "it holds something else than tensors and plain values"
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())[:120]


def _nearest(word, known):
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def tokenize(class_names, n_ctx=0, template="{}"):
    """Token ids of `[SOS] X X .. X class name . [EOS]`, with `n_ctx` placeholders X that learned prompts overwrite (CoOp).

    class_names: list of C strings; template wraps the name and has no full stop of its own, e.g. "a photo of a {}".
    Returns a LongTensor [C, T], zeros behind EOS; T is the longest row and not 77, because a causal encoder read at EOS
    never sees what follows. Raises UserError when a row is longer than CLIP's 77 positions.
    """
    words = clip.clip._tokenizer
    start, end, placeholder = words.encoder["<|startoftext|>"], words.encoder["<|endoftext|>"], words.encode("X")[0]
    texts = [words.encode(template.format(name) + ".") for name in class_names]
    longest = max(texts, key=len)
    length, most = n_ctx + len(longest) + 2, 77 - len(longest) - 2
    if length > 77:
        name = template.format(class_names[texts.index(longest)])
        remedy = f"use at most {most} context vectors" if n_ctx and most > 0 else "give the class a shorter name"
        raise UserError(f"{f'{n_ctx} context vectors and ' * (n_ctx > 0)}'{name}' take {length} of the 77 text positions: {remedy}")
    tokens = torch.zeros(len(texts), length, dtype=torch.long)
    for row, ids in zip(tokens, texts):
        row[:n_ctx + len(ids) + 2] = torch.tensor([start, *[placeholder] * n_ctx, *ids, end])
    return tokens


def _block(block, x, causal):
    """One layer of CLIP's transformer on x [rows, tokens, width], with fused attention and no mask to carry around."""
    attention = block.attn
    q, k, v = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)     # [rows, heads, tokens, width / heads]
               for part in F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1))
    mixed = fused_attention(q, k, v, causal).transpose(1, 2).flatten(2)
    x = x + attention.out_proj(mixed)
    return x + block.mlp(block.ln_2(x))


def _insert(x, prompts, replace):
    """Put prompts [n, d] or [R, n, d] behind the first token of x [R, T, d], over `replace` tokens that stand there."""
    prompts = prompts.to(x.dtype).expand(len(x), -1, -1)
    return torch.cat([x[:, :1], prompts, x[:, 1 + replace:]], dim=1)


@in_pieces
@scaled
def encode_text(model, tokens, prompts=None):
    """Text features [C, D], not normalised, of tokens [C, T] for any `clip.model.CLIP`.

    prompts: None, [L, n, d] (the same for every text) or [L, C, n, d], for the first L layers. Layer 0's take positions
    1..n before the positional embedding is added, deeper layers' overwrite positions 1..n of that layer's input; after
    layer L they flow on as they are. Raises ValueError where prompts do not fit the encoder.
    """
    layers, n = ([], 0) if prompts is None else (prompts, prompts.shape[-2])
    blocks = model.transformer.resblocks
    if len(layers) > len(blocks) or n > tokens.shape[1] - 2:
        raise ValueError(f"{len(layers)} layers of {n} prompts do not fit {len(blocks)} layers and {tokens.shape[1]} tokens")
    tokens = tokens.to(model.positional_embedding.device)
    x = model.token_embedding(tokens).type(model.dtype)                         # [C, T, d]
    if len(layers):
        x = _insert(x, layers[0], replace=n)
    x = x + model.positional_embedding[:x.shape[1]].type(model.dtype)
    for i, block in enumerate(blocks):
        if 0 < i < len(layers):
            x = _insert(x, layers[i], replace=n)
        x = getattr(model, "block", _block)(block, x, causal=True)   # `--compile` puts a faster one there
    x = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)]         # EOS has the largest id
    return model.ln_final(x).type(model.dtype) @ model.text_projection


@in_pieces
@scaled
def encode_image(model, images, prompts=None):
    """Image features [B, D], not normalised, of images [B, 3, H, W] for any `clip.model.CLIP`.

    prompts: None, [L, n, d] (the same for every image) or [L, B, n, d], for the first L layers of a ViT. They enter a
    layer's input right behind the class token, as they are; deeper layers' replace the previous ones; after layer L they
    flow on. Raises UserError for prompts given to a ResNet, ValueError for more layers than there are.
    """
    visual = model.visual
    if not hasattr(visual, "transformer"):
        if prompts is not None:
            raise UserError("image prompts need a ViT backbone, and this one is a ResNet: use --clip ViT-B/16 or another ViT")
        return model.encode_image(images)
    layers = [] if prompts is None else prompts
    blocks = visual.transformer.resblocks
    if len(layers) > len(blocks):
        raise ValueError(f"{len(layers)} layers of prompts do not fit {len(blocks)} layers")
    x = visual.conv1(images.type(model.dtype)).flatten(2).transpose(1, 2).type(model.dtype)     # [B, patches, d]
    x = torch.cat([visual.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
    x = visual.ln_pre(x + visual.positional_embedding.to(x.dtype))
    for i, block in enumerate(blocks):
        if i < len(layers):
            x = _insert(x, layers[i], replace=layers[i].shape[-2] if i else 0)
        x = getattr(model, "block", _block)(block, x, causal=False)
    return visual.ln_post(x[:, 0]) @ visual.proj


def logits(model, image_features, text_features):
    """CLIP's logits [B, C]: exp(logit_scale) times the cosine of image features [B, D] and text features [C, D]."""
    return model.logit_scale.exp() * F.normalize(image_features, dim=-1) @ F.normalize(text_features, dim=-1).t()


# --------------------------------------------------------------------------------------------------------------- tasks

load_file(HERE / "data" / "listings.py", "multitask_prompt_listings")       # finding, splitting, reading, batching images
from multitask_prompt_listings import (PIXEL_MEAN, PIXEL_STD, Images, Listing, Prepared, Steps, Task, checked_tasks,  # noqa: E402, F401
                                       collate, divided_tasks, encode_batches, epoch_batches, find_listings, hold_out, image_batches,
                                       image_features, load_tasks, read_image, read_tile, train_transform, view_batches, view_features, warn_once,
                                       with_validation)
load_file(HERE / "data" / "reports.py", "multitask_prompt_reports")         # the closing table, result.json's contents
from multitask_prompt_reports import gather, print_table  # noqa: E402
load_file(HERE / "data" / "transfer.py", "multitask_prompt_transfer")       # what MVLPT takes from outside a run
from multitask_prompt_transfer import check_transfer, read_source, read_transfer, write_transfer  # noqa: E402, F401
load_file(HERE / "data" / "prompts.py", "multitask_prompt_prompts")         # MmAP's Figure 5
from multitask_prompt_prompts import MLP, Joint  # noqa: E402, F401
load_file(HERE / "data" / "plots.py", "multitask_prompt_plots")
from multitask_prompt_plots import plot_run, plot_schedule, plot_tree, save_picture  # noqa: E402, F401
for _thing in (Images, read_image, read_tile, collate, Prepared, Steps):
    _thing.__module__ = __name__            # where a spawned worker process finds them again


# ------------------------------------------------------------------------------------------------- batches and scoring

class Texts:
    """The texts of a multi-task step as one batch for the text encoder; tasks that agree in prompts and names share rows.

    owners[t] says which of P prompt sets task t uses (default: set 0 for every task).
    """

    def __init__(self, tasks, n_ctx=0, owners=None, templates=False):
        owners = owners or [0] * len(tasks)
        keys = [(owner, task.template if templates else "{}", tuple(task.class_names)) for owner, task in zip(owners, tasks)]
        distinct = list(dict.fromkeys(keys))
        self.slots = [distinct.index(key) for key in keys]                      # task -> its place among the distinct texts
        self.sizes = [len(names) for _, _, names in distinct]
        self.owners = torch.tensor([owner for owner, _, names in distinct for _ in names])
        self.tokens = torch.nn.utils.rnn.pad_sequence(
            [row for _, template, names in distinct for row in tokenize(names, n_ctx, template)], batch_first=True)

    def encode(self, model, prompts=None):
        """Features [C_t, D] of every task t, as a list, from prompts [L, P, n, d]."""
        if prompts is not None:
            prompts = prompts[:, 0] if prompts.shape[1] == 1 else prompts[:, self.owners.to(prompts.device)]
        parts = encode_text(model, self.tokens, prompts).split(self.sizes)
        return [parts[slot] for slot in self.slots]


def evaluate(model, preprocess, task, text_features, prompts=None, images=None, features=None):
    """Per cent of the test images of `task` that are classified right by its metric.

    text_features: [C, D]. prompts: image prompts [L, n, d]. images: other images than task.test. features: the pair that
    `image_features` returned, where the image encoder is frozen and has seen these images before.
    """
    with torch.no_grad():
        if features is None:
            features = image_features(model, task.test if images is None else images, preprocess, prompts)
        return per_cent_right(logits(model, features[0], text_features.float()), features[1], task.metric)


def per_cent_right(scores, labels, metric="accuracy"):
    """Per cent of rows of scores [B, C] whose largest is at labels [B]; "mean per class" weighs the classes equally.

    Or what a function `metric(scores, labels)` makes of them.
    """
    if callable(metric):
        return metric(scores, labels)
    hits, labels = (scores.argmax(dim=-1) == labels).cpu().double(), labels.cpu()
    if metric == "accuracy":
        return 100 * hits.mean().item()
    return 100 * statistics.mean(hits[labels == k].mean().item() for k in labels.unique())


def prompted_losses(model, texts, text_prompts, image_prompts, batches):
    """Every task's mean cross-entropy [N] under text prompts [L, P, n, d_l] and image prompts [L, P, n, d_v], MmAP's Eq. (5).

    texts: a `Texts`; batches: (images [b, 3, H, W], labels [b]) a task. All texts go through their encoder as one batch, and all
    images through theirs.
    """
    with autocast(model):
        text_features, image_features = texts.encode(model, text_prompts), encode_batches(model, batches, image_prompts)
    return task_losses(model, image_features, text_features, batches)


def task_losses(model, image_features, text_features, batches):
    """Every task's mean cross-entropy [N], MmAP's Eq. (5), from image features [b, D], text features [C, D] and a batch a task."""
    return torch.stack([F.cross_entropy(logits(model, x.float(), w.float()), labels)
                        for x, w, (_, labels) in zip(image_features, text_features, batches)])


def score_tasks(model, preprocess, tasks, text_features, prompts):
    """Zero-shot CLIP's accuracy and the method's on every task, in per cent.

    text_features: [C, D] a task, or None for zero-shot CLIP's. prompts: image prompts [L, P, n, d], P = 1 or one a task.
    """
    plain, own = zero_shot(model, tasks), [prompts[:, i % prompts.shape[1]] for i in range(len(tasks))]
    return dict(zero_shot=[evaluate(model, preprocess, task, w) for task, w in zip(tasks, plain)],
                accuracy=[evaluate(model, preprocess, task, w, p) for task, w, p in zip(tasks, text_features or plain, own)])


@torch.no_grad()
def zero_shot(model, tasks):
    """Zero-shot text features [C, D] of every task, from its own template."""
    return Texts(tasks, templates=True).encode(model)


# ----------------------------------------------------------------------------------- gradients of tasks that disagree
# Each takes the tasks' gradients [N, P] and returns the direction [P] to descend along.

def pcgrad(grads):
    """PCGrad (Yu et al., NeurIPS 2020): the sum of the gradients, each projected off those that it conflicts with.

    "Conflicts": has a negative dot product with; the others come in random order, from PyTorch's global generator.
    """
    projected = grads.clone()
    for i in range(len(grads)):
        for j in torch.randperm(len(grads)).tolist():
            dot = projected[i] @ grads[j]
            if i != j and dot < 0:
                projected[i] -= dot / (grads[j] @ grads[j]) * grads[j]
    return projected.sum(0)


def imtl(grads):
    """IMTL-G (Liu et al., ICLR 2021): sum_i a_i g_i, with sum_i a_i = 1, that has equal projections onto all gradients.

    With u_i = g_i / |g_i|, D = [g_1 - g_i] and U = [u_1 - u_i], i = 2..N: a_2..N = g_1 U^T (D U^T)^-1. Where the gradients are
    too much alike to solve that (a singular D U^T), the least squares solution serves.
    """
    g = grads.double()
    units = g / g.norm(dim=1, keepdim=True).clamp(min=1e-300)
    D, U = g[:1] - g[1:], units[:1] - units[1:]
    a = torch.linalg.pinv(D @ U.t()).t() @ (U @ g[0])
    return ((1 - a.sum()) * g[0] + a @ g[1:]).to(grads.dtype)


def cagrad(grads, c=0.5, steps=300):
    """CAGrad (Liu et al., NeurIPS 2021): the d within c |g_0| of the mean gradient g_0 whose worst dot product with a task's
    gradient is largest.

    Its dual: w on the simplex minimises g_w . g_0 + c |g_0| |g_w|, where g_w = sum_i w_i g_i; then d = g_0 + c |g_0| g_w / |g_w|.
    c = 0.5 (choice: its experiments have 0.4 to 0.9). The dual is solved by exponentiated gradient descent on the Gram matrix.
    """
    gram = (grads @ grads.t()).double()
    scale = gram.diagonal().mean().clamp(min=1e-300)
    gram, w = gram / scale, gram.new_full((len(grads),), 1 / len(grads))
    to_mean, radius = gram.mean(1), c * gram.mean().clamp(min=0).sqrt()         # g_i . g_0 and c |g_0|
    length = lambda w: (w @ gram @ w).clamp(min=1e-20).sqrt()
    value, rate = lambda w: w @ to_mean + radius * length(w), 1.0
    for _ in range(steps):
        slope = to_mean + radius * gram @ w / length(w)
        tried = torch.softmax(w.clamp(min=1e-30).log() - rate * slope, dim=0)
        w, rate = (tried, 1.5 * rate) if value(tried) < value(w) else (w, rate / 2)
    return grads.mean(0) + (radius / length(w)).to(grads.dtype) * (w.to(grads.dtype) @ grads)


# ---------------------------------------------------------------------------------------------- command line and runs

BUILT_IN = dict(emoji=0.1, fxemoji=0.25)        # the data that come along, and how much of each class is trained on


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def arguments(method, doc, paper, tiny, batch="images of a task in a step"):
    """The command line that all method files share; a file adds its own flags before `parse`.

    paper, tiny: the file's settings at full size, and what the built-in backbone has of its own; batch: what its size counts.
    """
    says = lambda key: f"(default {paper[key]}" + (f"; tiny {tiny[key]})" if key in tiny else ")")
    parser = _Parser(prog=f"{method}.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--data", metavar="NAME|DIR", help="emoji, fxemoji, officehome, pacs, minidomainnet, domainnet, cifar100, coop10, coop11, one of "
        "CoOp's datasets (data/README.md), a folder domain/class/*.jpg, or name=path for a folder class/*.jpg that makes one task; "
        "several joined by commas (default emoji)")
    add("--split", type=float, help="fraction of each class to train on (default 0.1 for emoji)")
    add("--shots", type=int, help="images of each class to train on, instead of --split")
    add("--seeds", type=int, nargs="+", help="one training a seed, reported as mean ± std (default 1)")
    add("--clip", metavar="NAME|FILE", help=f"backbone (default {paper['clip']}; tiny for emoji)")
    add("--root", metavar="DIR", help="where the datasets are (default data)")
    add("--download", action="store_true", help="first fetch --data into --root, where torchvision can (cifar100, dtd, ...)")
    add("--device", help="cpu, cuda, cuda:1, ... (default CUDA where there is one)")
    add("--epochs", type=int, help=says("epochs"))
    add("--lr", type=float, help="learning rate " + says("lr"))
    add("--batch-size", type=int, help=f"{batch} " + says("batch_size"))
    add("--n-ctx", type=int, help="prompt length b " + says("n_ctx"))
    add("--views", type=int, help="fixed augmented views an image; 0 draws fresh ones every epoch " + says("views"))
    add("--min-crop", type=float, help="smallest part of an image's area that a view shows " + says("min_crop"))
    add("--out", metavar="DIR", help="folder of this run (default one of its own under runs/)")
    add("--resume", action="store_true", help="go on with the run in --out, with the settings saved there")
    add("--eval", metavar="CKPT", help="score a saved prompts.pt instead of training; writes nothing")
    add("--predict", metavar="IMAGE", nargs="+", help="with --eval: print the likeliest classes of these images, and no table")
    add("--task", metavar="NAME", help="with --predict: the task that the images are of, where there are several")
    add("--validate", action="store_true", help="hold out 20%% of the training images and score on them, to choose settings")
    add("--amp", action="store_true", help="compute in bfloat16 on a CPU too; a CUDA card always computes in a half precision")
    add("--compile", action="store_true", help="compile CLIP's layers with torch.compile")
    add("--max-mem", type=float, metavar="GB", help="memory for a step: texts and images that need more go through CLIP in pieces (default "
        "nine tenths of a card's free memory; no limit on a CPU); JSCPT's upper step keeps its pieces")
    add("--plot", action="store_true", help="also draw PNGs into the run folder")
    parser.set_defaults(method=method, paper=paper, tiny=tiny, finished=None)
    return parser


def parse(parser, argv=None):
    """Parse, take over the settings of a run that is resumed or scored, fill in defaults, refuse what cannot be."""
    args = parser.parse_args(argv)
    paper, tiny = vars(args).pop("paper"), vars(args).pop("tiny")
    given = {k: v for k, v in vars(args).items() if v is not None and v is not False}
    if args.resume and args.eval:
        raise UserError("--resume goes on with a training and --eval scores a finished one: give one of them")
    if (args.predict or args.task) and not (args.eval and args.predict):
        raise UserError("--task belongs to --predict IMAGE..., and --predict to --eval CKPT, a run's prompts.pt: give them together")
    if args.resume:
        if args.out is None:
            raise UserError("--resume needs --out DIR, the folder of the run to go on with")
        _take_over(args, given, _run_settings(args), f"the run in {args.out}", Run.FREE)
        if (Path(args.out) / "result.json").exists():
            args.finished = _read_json(Path(args.out) / "result.json")
            return args
    elif args.eval:
        saved = load_prompts(args.eval, args.method)["settings"]
        saved = {key: value for key, value in saved.items() if key not in ("out", "plot", "device", "validate", "compile", "max_mem")}
        _take_over(args, given, saved, args.eval, Run.FREE | {"data", "split", "shots", "seeds"})
        if "split" in given or "shots" in given:
            args.split, args.shots = given.get("split"), given.get("shots")
    fill = lambda key, value: setattr(args, key, value) if getattr(args, key) is None else None
    fill("data", "emoji")
    fill("clip", "tiny" if args.data in BUILT_IN else paper["clip"])
    check_clip(args.clip)
    for key, value in {**paper, **(tiny if args.clip == "tiny" else {})}.items():
        fill(key, value)
    if args.split is None and args.shots is None:
        if args.data not in BUILT_IN:
            if not args.download:
                find_listings(args.data, args.root or "data")                   # tells of a misspelt name first
            raise UserError(f"--data {args.data} needs --split, such as --split 0.1, or --shots, such as --shots 4")
        args.split = BUILT_IN[args.data]
    fill("seeds", [1]), fill("root", "data"), fill("device", "cuda" if torch.cuda.is_available() else "cpu")
    for key, least in dict(epochs=1, batch_size=1, n_ctx=1, views=0).items():
        if getattr(args, key) < least:
            raise UserError(f"--{key.replace('_', '-')} {getattr(args, key)} is too small: give {least} or more")
    if not 0 < args.lr < math.inf:
        raise UserError(f"--lr {args.lr} is no learning rate: give a number above 0")
    if not 0 < args.min_crop <= 1:
        raise UserError(f"--min-crop {args.min_crop} is no part of an image: give a number above 0 and up to 1")
    if args.max_mem is not None and not 0 < args.max_mem < math.inf:
        raise UserError(f"--max-mem {args.max_mem} is no amount of memory: give gigabytes, above 0")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: give whole numbers from 0 up, each once")
    try:
        torch.zeros(1, device=args.device).item()
        if torch.device(args.device).type == "cuda":
            torch.cuda.set_device(torch.zeros(1, device=args.device).device)    # what torch asks about "the card" is about this one
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device} is not there ({_brief(error)}): use --device cpu") from error
    return args


def said(key, value):
    """A setting as words: "with --n-ctx 4", "without --shots"."""
    flag, words = f"--{key.replace('_', '-')}", " ".join(map(str, value)) if isinstance(value, list) else value
    return f"without {flag}" if value is None or value is False else f"with {flag}" if value is True else f"with {flag} {words}"


def _take_over(args, given, saved, owner, free):
    """Set args to the saved settings of `owner`; a word on the command line wins where it is free, and else must agree."""
    for key, value in saved.items():
        if key not in given:
            setattr(args, key, value)
        elif given[key] != value and key not in free:
            raise UserError(f"{owner} was started {said(key, value)}, not {said(key, given[key])}: leave the word out, or start "
                            "another run in another --out")


def _run_settings(args):
    path = Path(args.out) / "settings.json"
    saved = _read_json(path)
    if not isinstance(saved, dict) or not {"method", "data", "seeds"} <= saved.keys():
        raise UserError(f"{path} does not hold the settings of a run: start one in another --out")
    if saved["method"] != args.method:
        raise UserError(f"the run in {args.out} is one of {saved['method']}: use {saved['method']}.py --resume --out {args.out}")
    return saved


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no run to resume in {path.parent} (no {path.name}): leave out --resume to start one") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({_brief(error)}): start the run again in another --out") from error


def script(main):
    """Run a method file's `main`: a UserError becomes one line on stderr and exit code 2, Ctrl-C a hint and 130."""
    name = Path(sys.argv[0]).name
    go_on = lambda: f"go on with --resume --out {Run.latest}" if Run.latest else "start again"
    try:
        main()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:                # a path that the system refuses: too long a name, no permission
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            print(f"{name}: the disk is full ({error.strerror}): free it, then {go_on()}", file=sys.stderr)
            sys.exit(2)
        if error.filename is None:
            raise
        print(f"{name}: {error.filename} cannot be used ({error.strerror}): give another path or mend it", file=sys.stderr)
        sys.exit(2)
    except torch.cuda.OutOfMemoryError:
        print(f"{name}: the card's memory is full: {go_on()} with a smaller --max-mem, or start anew with a smaller --batch-size",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: stopped; {go_on()}" if Run.latest else f"{name}: stopped", file=sys.stderr)
        sys.exit(130)


load_file(HERE / "data" / "saving.py", "multitask_prompt_saving")           # files whole or not at all, and none that runs code
from multitask_prompt_saving import load_prompts, load_saved, write_whole  # noqa: E402, F401


class Run:
    """The folder of one run: settings.json, log.csv, checkpoint.pt, prompts.pt, result.json and plots.

    Making a Run only checks; `open` writes first. The checkpoint of every epoch holds all that is needed to go on, the
    scores of finished seeds included.
    """
    latest = None
    FREE = {"out", "plot", "device", "root", "download", "compile", "max_mem"}   # settings that a resumed run may change

    def __init__(self, args):
        self.settings = {key: value for key, value in vars(args).items() if key not in ("resume", "eval", "predict", "task")}
        self.folder, self.resumed = Path(args.out) if args.out else self._free_folder(self.settings), args.resume
        self.state = dict(method=args.method, settings=self.settings, finished={}, rows=[], current=None)
        self.prompts = {}
        if args.resume:
            remedy = "start the run again in another --out"
            if (self.folder / "checkpoint.pt").exists():
                path = self.folder / "checkpoint.pt"
                self.state = load_saved(path, "a checkpoint", self.state, remedy)
                if any(self.state["settings"].get(k, v) != v for k, v in self.settings.items() if k not in self.FREE):
                    raise UserError(f"{path} is of a run with other settings: {remedy}")
            if (self.folder / "prompts.pt").exists():
                self.prompts = load_saved(self.folder / "prompts.pt", "a prompts.pt", ["prompts"], remedy)["prompts"]
            return
        for name in ("settings.json", "result.json", "prompts.pt", "log.csv", "checkpoint.pt"):
            if (self.folder / name).exists():
                raise UserError(f"--out {self.folder} holds another run ({name}): choose another folder, or --resume to go on with it")
        nearest = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise UserError(f"--out {self.folder} cannot be written, because {nearest} is a file or read-only: choose another folder")

    @staticmethod
    def _free_folder(settings):
        data = Path(settings["data"]).name.replace("=", "-").replace(",", "-")
        base = f"{settings['method']}-{data}-{settings['shots'] or settings['split']}"
        return next(p for p in (Path("runs") / f"{base}-{i}" for i in range(1, 10**6)) if not p.exists())

    def open(self, data):
        """Make the folder and note the settings: from here on there is a run to resume, on the same `data` (class names, counts)."""
        if self.state.setdefault("data", data) != data:
            raise UserError(f"{self.folder / 'checkpoint.pt'} does not fit the data as it is now (tasks, classes or numbers of images): "
                            "start the run again in another --out")
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            if not self.resumed and not self.settings["out"]:
                while True:                                                     # a run started at the same moment may be faster
                    try:
                        self.folder.mkdir()
                        break
                    except FileExistsError:
                        self.folder = self._free_folder(self.settings)
            self.folder.mkdir(exist_ok=True)
            for part in self.folder.glob("*.part") if self.resumed else []:     # of a process that was killed while it wrote
                part.unlink(missing_ok=True)
            write_whole(self.folder / "settings.json", json.dumps(self.settings, indent=1), new=not self.resumed)
        except FileExistsError:
            raise UserError(f"--out {self.folder} holds another run, which has just begun: choose another folder") from None
        except OSError as error:
            raise UserError(f"--out {self.folder} cannot be made ({error.strerror}): choose another folder") from error
        Run.latest = self.folder

    def restore(self, seed, **parts):
        """Load the last checkpoint of this seed into `parts` (things with load_state_dict); returns the epoch to go on with."""
        self.clock, self.seconds, current = time.time(), 0.0, self.state["current"]
        if not current or current["seed"] != seed:
            return 0
        try:
            for name, part in parts.items():
                part.load_state_dict(current["parts"][name])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(f"{self.folder / 'checkpoint.pt'} does not fit the data as it is now ({_brief(error)}): start the run "
                            "again in another --out") from error
        self.seconds = current["seconds"]
        return current["epoch"]

    def checkpoint(self, seed, epoch, row, **parts):
        """Save `parts` after `epoch` epochs, and a row for log.csv."""
        if not math.isfinite(row["loss"]):
            raise UserError(f"the training diverged in epoch {epoch} (loss {row['loss']}): use a smaller --lr in another --out")
        now = time.time()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        self.state["rows"].append(dict(seed=seed, epoch=epoch, **row))
        parts = {name: part.state_dict() for name, part in parts.items()}
        self.state["current"] = dict(seed=seed, epoch=epoch, seconds=self.seconds, parts=parts)
        self._save("checkpoint.pt", self.state)
        self._write_log()

    def _write_log(self):
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(k for r in self.state["rows"] for k in r)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.state["rows"])
        write_whole(self.folder / "log.csv", text.getvalue())

    def save_prompts(self, seed, module, tasks):
        """Keep trained prompts before anything else can fail."""
        self.prompts[seed] = {k: v.detach().cpu() for k, v in module.state_dict().items()}
        self._save("prompts.pt", dict(method=self.settings["method"], settings=self.settings, prompts=self.prompts,
                                      tasks={task.name: list(task.class_names) for task in tasks},
                                      templates={task.name: task.template for task in tasks}))

    def finish_seed(self, seed, scores):
        """Keep a seed's scores: zero_shot and accuracy (a number a task), trainable_parameters, and the method's own."""
        self.state["finished"][seed] = dict(scores, seconds=self.seconds)
        self.state["current"] = None
        self._save("checkpoint.pt", self.state)

    def _save(self, name, content):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_whole(self.folder / name, buffer.getvalue())

    def finish(self, tasks, model, plot=None):
        """Write result.json, print the closing table, draw the plots."""
        result = gather(self.settings, tasks, model, self.state["finished"])
        self._write_log()
        write_whole(self.folder / "result.json", json.dumps(result, indent=1))
        if self.settings["plot"]:
            plot_run(self.folder, result, self.state["rows"], plot)
        print_table(result)
        print(f"\nresult, log and prompts are in {self.folder}")


def run_seeds(args, build, train, score, n_text, image_prompts=False, shared=False, check=None, plot=None):
    """The frame of every method file: refuse early, then train, keep and score the prompts of each seed, and report.

    build(args, model, tasks) -> prompts, untrained; train(args, model, tasks, run, seed) -> prompts;
    score(args, model, preprocess, tasks, prompts) -> dict of zero_shot and accuracy, a number a task. n_text: how many
    vectors stand before the class name in the text; image_prompts: whether the backbone has to be a ViT; shared: whether the
    prompts serve whatever tasks there are, or each task has its own (then `--eval` needs the same tasks in the same order);
    check(args, tasks): refuses what a method cannot do, and may return a dict of what else a resumed run has to find as it
    was; plot(folder, result): draws its own pictures.
    """
    if args.finished:
        print_table(args.finished)
        if args.plot:
            with (Path(args.out) / "log.csv").open() as file:
                rows = [dict(seed=int(row["seed"]), epoch=int(row["epoch"]), loss=float(row["loss"])) for row in csv.DictReader(file)]
            plot_run(Path(args.out), args.finished, rows, plot)
        return print(f"\nthe run in {args.out} had finished")
    del args.finished
    resnet = UserError(f"{args.method} puts prompts into the image encoder, and {args.clip} has a ResNet there: use a ViT, such as "
                       "--clip ViT-B/16")
    if image_prompts and args.clip.startswith("RN") and args.clip in clip.available_models():
        raise resnet
    saved = load_prompts(args.eval, args.method) if args.eval else dict(prompts={})
    for seed in args.seeds if args.eval else []:
        if seed not in saved["prompts"]:
            raise UserError(f"{args.eval} has prompts of the seeds {', '.join(map(str, saved['prompts']))}, not of {seed}")

    def restore(prompts, seed):
        try:
            prompts.load_state_dict(saved["prompts"][seed])
        except (RuntimeError, TypeError, KeyError, AttributeError, ValueError) as error:
            raise UserError(f"the prompts in {args.eval} do not fit {args.data} ({_brief(error)}): give the --data they were "
                            "trained on") from error

    if args.predict:
        predictions = load_file(HERE / "data" / "predictions.py", "multitask_prompt_predictions")
        return predictions.predict(args, saved, build, restore, score)
    run = None if args.eval else Run(args)
    if args.download:
        find_listings(args.data, args.root, download=True)
    tasks = checked_tasks(args, args.data, n_text)
    if args.eval and not shared and list(saved["tasks"]) != [task.name for task in tasks[args.seeds[0]]]:
        raise UserError(f"the prompts in {args.eval} are of other tasks than those of --data {args.data}, or in another order: give the "
                        "--data they were trained on")
    found = {f"{seed} {task.name}": [*task.class_names, len(task.train), len(task.test)] for seed in args.seeds for task in tasks[seed]}
    found.update(check(args, tasks[args.seeds[0]]) or {} if check else {})
    model, preprocess = load_clip(args.clip, args.device)
    if image_prompts and not hasattr(model.visual, "transformer"):
        raise resnet
    set_up(model, args, _block)
    if run:
        run.settings["max_mem"] = model.max_mem                                 # other pieces would have other last bits
    build(args, model, tasks[args.seeds[0]])                                    # refuses settings that do not fit

    def scored(seed, prompts, **extra):
        trainable = sum(p.numel() for p in prompts.parameters() if p.requires_grad)
        return dict(score(args, model, preprocess, tasks[seed], prompts), trainable_parameters=trainable, **extra)

    if args.eval:
        finished = {}
        for seed in args.seeds:
            prompts = build(args, model, tasks[seed])
            restore(prompts, seed)
            finished[seed] = scored(seed, prompts, seconds=0.0)
        return print_table(gather(vars(args), tasks[args.seeds[0]], model, finished))
    run.open(found)
    for seed in args.seeds:
        if seed not in run.state["finished"]:
            prompts = train(args, model, tasks[seed], run, seed)
            run.save_prompts(seed, prompts, tasks[seed])
            run.finish_seed(seed, scored(seed, prompts))
    run.finish(tasks[args.seeds[0]], model, plot)


def progress(iterable, text):
    """A progress bar on a terminal, for what takes over two seconds."""
    return tqdm(iterable, desc=text, delay=2, leave=False, disable=None)


def commands(argv=None):
    """`python common.py check|table|zero-shot|probe ...`: what belongs to no method; word -> (file in data/, its function)."""
    known = {"check": ("checks.py", "check"),
             "table": ("tables.py", "main"),
             "zero-shot": ("baselines.py", "zero_shot"),
             "probe": ("baselines.py", "probe")}
    word, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["nothing"]
    if word in ("-h", "--help"):
        return print(f"usage: python common.py {'|'.join(known)} ...   (each has --help)")
    if word not in known:
        raise UserError(f"'{word}' is no command{_nearest(word, known)}: say python common.py {' or '.join(known)}, or use a method's file")
    file, function = known[word]
    getattr(load_file(HERE / "data" / file, f"multitask_prompt_{file[:-3]}"), function)(rest)


if __name__ == "__main__":
    script(commands)
