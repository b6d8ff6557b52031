"""What the seven method files share: CLIP with prompts, texts and losses, evaluation, and the run.

Read it in this order: `encode_text` and `encode_image` put prompts into an untouched `clip` model;
`Texts`, `batches` and `task_losses` make the loss of a training step; `evaluate` scores; `Args`,
`Run` and `run_seeds` are the shell around a method: command line, checkpoints, the closing table.

    model, preprocess = load_clip("tiny", "cpu")
    task = load_tasks("emoji", shots=6)[0]
    text = encode_text(model, tokenize(task.class_names, template=task.template))       # [C, D]
    image = encode_image(model, preprocess(task.test[0][0])[None])                      # [1, D]
    print(task.class_names[logits(model, image, text).argmax()])
"""
import contextlib
import copy
import csv
import errno
import hashlib
import importlib.util
import inspect
import io
import json
import math
import os
import pickle
import random
import re
import signal
import statistics
import sys
import time
import warnings
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed
from tqdm import tqdm

import data as datasets
from data import Images, Task, UserError, hold_out, load_tasks, read_image

with warnings.catch_warnings():
    warnings.simplefilter("ignore")         # clip imports pkg_resources, which warns that it is old
    import clip

HERE = Path(__file__).resolve().parent
__all__ = ["Images", "Task", "UserError", "hold_out", "load_tasks", "read_image"]


def load_method(name):
    """The module of a method file, loaded by path: `load_method("mmap")` shadows no other module.

    Raises UserError when there is no such file.
    """
    alias, path = f"method_{name}", HERE / f"{name}.py"
    if alias in sys.modules:
        return sys.modules[alias]
    if not name.isidentifier() or not path.is_file():       # no path: it may stand in a file
        raise UserError(f"there is no method file {path}")
    spec = importlib.util.spec_from_file_location(alias, path)
    module = sys.modules[alias] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------- CLIP

def load_clip(name, device="cpu"):
    """A frozen float32 CLIP in eval mode, and its image preprocessing: (model, preprocess).

    name: one of `clip.available_models()` (downloaded to ~/.cache/clip), "tiny" (the built-in
    backbone), or the path of a checkpoint of OpenAI's CLIP: a TorchScript archive or a state dict.
    Tensors do not tell the activation: weights that were trained with GELU in place of OpenAI's
    QuickGELU (most of OpenCLIP's) load and are wrong.
    Raises UserError for an unknown name, a failed download and a file that is no such checkpoint.
    """
    check_clip(name)
    path = str(HERE / "data" / "tiny_clip.pt") if name == "tiny" else name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, preprocess = clip.load(path, device="cpu")
    except Exception as error:      # foreign files fail anywhere between unpickling and building
        if name in clip.available_models():
            url = clip.clip._MODELS[name]
            raise UserError(f"cannot get the weights of {name} ({datasets.brief(error)}): "
                            f"put {url} into ~/.cache/clip yourself") from error
        raise UserError(f"{path} is not a CLIP checkpoint that clip.load can read "
                        f"({_unreadable(error)}): give a TorchScript archive as OpenAI ships them, "
                        "or the state dict of such a model saved with torch.save") from error
    model = model.float()
    if name not in clip.available_models() and name != "tiny":
        model.load_state_dict(_full_precision(path), strict=False)
    return model.eval().requires_grad_(False).to(device), preprocess


def _full_precision(path):
    """The weights of a checkpoint as they are stored; clip.load rounds them to half precision."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            state = torch.jit.load(path, map_location="cpu").state_dict()
        except RuntimeError:                # no TorchScript archive
            state = torch.load(path, map_location="cpu", weights_only=True)
    sizes = ("input_resolution", "context_length", "vocab_size")
    return {key: value for key, value in state.items() if key not in sizes}


def check_clip(name):
    """Raise UserError for a backbone that is neither a known name nor a file."""
    known = ["tiny", *clip.available_models()]
    if name not in known and not Path(name).is_file():
        raise UserError(f"unknown backbone '{name}'{datasets.nearest(name, known)}: use one of "
                        f"{', '.join(known)} or the path of a file")


def _unreadable(error):
    if isinstance(error, pickle.UnpicklingError):   # torch's own text advises to run the file
        return "it holds something else than tensors and plain values"
    if isinstance(error, KeyError):
        return ("its tensors are not called as those of OpenAI's CLIP: it is of another family, or "
                "they are inside of another dict")
    return datasets.brief(error)


def tokenize(class_names, n_ctx=0, template="{}"):
    """Token ids [C, T] of `[SOS] X X .. X class name . [EOS]` (CoOp), zeros behind EOS.

    n_ctx: the number of placeholders X, which learned prompts overwrite. template wraps the name
    and has no full stop of its own, e.g. "a photo of a {}". T is the longest row, not 77: a causal
    encoder that is read at EOS never sees what follows.
    Raises UserError where a row is longer than CLIP's 77 positions.
    """
    words = clip.clip._tokenizer
    start, end = words.encoder["<|startoftext|>"], words.encoder["<|endoftext|>"]
    placeholder = words.encode("X")[0]
    texts = [words.encode(template.format(name) + ".") for name in class_names]
    longest = max(texts, key=len)
    if n_ctx + len(longest) + 2 > 77:
        name = template.format(class_names[texts.index(longest)])
        room = 77 - len(longest) - 2
        what = f"{n_ctx} context vectors and '{name}'" if n_ctx else f"'{name}'"
        remedy = "give the class a shorter name"
        if n_ctx and room > 0:
            remedy = f"use at most {room} context vectors"
        raise UserError(
            f"{what} take {n_ctx + len(longest) + 2} of the 77 text positions: {remedy}"
        )
    rows = [torch.tensor([start, *[placeholder] * n_ctx, *ids, end]) for ids in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _precision(model):
    """The autocast context of an encoder, as `--precision` (an attribute of the model) says.

    "auto": on a GPU bfloat16 where it has it, else float16 where no gradient is wanted; otherwise
    float32. Weights and prompts stay float32.
    """
    device, asked = model.logit_scale.device.type, getattr(model, "precision", "auto")
    if asked == "auto" and device == "cuda" and torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            asked = "bf16"
        elif not torch.is_grad_enabled():
            asked = "fp16"
    kinds = dict(bf16=torch.bfloat16, fp16=torch.float16)
    return torch.autocast(device, kinds[asked]) if asked in kinds else contextlib.nullcontext()


def _layer(model, function, *inputs):
    """Run one layer; `--checkpoint` recomputes it in the backward pass instead of keeping it."""
    if getattr(model, "checkpoint", False) and torch.is_grad_enabled():
        return recomputed(function, *inputs, use_reentrant=False)
    return function(*inputs)


def _heads(x, attention):
    """[..., tokens, d] -> [..., heads, tokens, d / heads]."""
    return x.unflatten(-1, (attention.num_heads, -1)).transpose(-3, -2)


def _fused_attention(q, k, v, causal=False):
    """Fused attention; in float32 on a CPU, where its half-precision backward pass is slow."""
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", enabled=False):
            return _fused_attention(q.float(), k.float(), v.float(), causal)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _mlp(block, x):
    """x + MLP(LN(x)), with QuickGELU as one silu: x sigmoid(1.702 x) = silu(1.702 x) / 1.702."""
    hidden = block.mlp.c_fc(block.ln_2(x)).mul_(1.702)
    return x + block.mlp.c_proj(F.silu(hidden).mul_(1 / 1.702))


def _text_layer(block, x, S, P, C, set_of, mask, eos):
    """One layer of the text encoder on prefixes and classes.

    x [S*P + C*t, d]: the S prefixes of P tokens, then the own t tokens of C texts. set_of: the
    prefix of each text [C], or None where each has C / S texts in a row. mask [t, t], or in the
    last layer [C, 1, t], where eos [C] are the rows of x whose output is wanted: returns [C, d].
    """
    attention, d = block.attn, x.shape[-1]
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    y = block.ln_1(x)
    if eos is None:
        q, k, v = F.linear(y, weight, bias).chunk(3, dim=-1)
        q_prefix = _heads(q[:S * P].unflatten(0, (S, P)), attention)
        q_own = q[S * P:]
    else:
        k, v = F.linear(y, weight[d:], bias[d:]).chunk(2, dim=-1)
        q_own = F.linear(y[eos], weight[:d], bias[:d])
        x = x[eos]
    k_prefix = _heads(k[:S * P].unflatten(0, (S, P)), attention)                # [S, h, P, d/h]
    v_prefix = _heads(v[:S * P].unflatten(0, (S, P)), attention)
    q_own, k_own, v_own = (_heads(part.unflatten(0, (C, -1)), attention)        # [C, h, t, d/h]
                           for part in (q_own, k[S * P:], v[S * P:]))
    groups = S
    k_shared, v_shared = k_prefix, v_prefix
    if set_of is not None:
        k_shared, v_shared, groups = k_prefix[set_of], v_prefix[set_of], C
    q_own = q_own * q_own.shape[-1] ** -0.5
    h, t = q_own.shape[1:3]
    q_rows = q_own.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2, 3)     # [S, h, C/S*t, d/h]
    to_prefix = (q_rows @ k_shared.transpose(-1, -2)).unflatten(2, (-1, t)).transpose(1, 2)
    to_own = q_own @ k_own.transpose(-1, -2) + mask                             # [C, h, t, t]
    scores = torch.cat([to_prefix.flatten(0, 1), to_own], dim=-1).softmax(dim=-1).to(v.dtype)
    from_prefix = (
        scores[..., :P].unflatten(0, (groups, -1)).transpose(1, 2).flatten(2, 3) @ v_shared
    )
    from_prefix = from_prefix.unflatten(2, (-1, t)).transpose(1, 2).flatten(0, 1)
    own = (from_prefix + scores[..., P:] @ v_own).transpose(1, 2).flatten(2).flatten(0, 1)
    if eos is None:
        prefix = _fused_attention(q_prefix, k_prefix, v_prefix, causal=True)
        own = torch.cat([prefix.transpose(1, 2).flatten(2).flatten(0, 1).to(own.dtype), own])
    return _mlp(block, x + attention.out_proj(own))


def encode_text(model, tokens, prompts=None, sets=None):
    """Text features [C, D] (float32, not normalised) of tokens [C, T], for any `clip.model.CLIP`.

    prompts: None, [L, n, d] (one set for every text) or [L, S, n, d] with sets [C] saying which of
    the S sets a text takes (sets=None: S = C, a set for each), for the first L layers. Layer 0's
    prompts take positions 1..n before the positional embedding is added, deeper layers' overwrite
    positions 1..n of that layer's input; after layer L they flow on.
    Raises ValueError where prompts do not fit the encoder.

    Shared prefix: before a class name stand [SOS] and the prompts, and in a causal encoder nothing
    behind them changes them. So they are computed once per set, and each class's own tokens (name,
    full stop, EOS) attend to the set's keys and values. In the last layer only EOS has a query.
    """
    blocks = model.transformer.resblocks
    device = model.positional_embedding.device
    C, T = tokens.shape
    layers = [] if prompts is None else prompts
    n = prompts.shape[-2] if len(layers) else 0
    if len(layers) > len(blocks) or n > T - 2:
        raise ValueError(f"{len(layers)} layers of {n} prompts do not fit "
                         f"{len(blocks)} layers and {T} tokens")
    if len(layers) and prompts.ndim == 3:
        layers = prompts[:, None]
    S, P = layers.shape[1] if len(layers) else 1, 1 + n
    if S == 1:
        set_list = [0] * C
    elif sets is None:
        set_list = list(range(C))
    else:
        set_list = sets.tolist() if torch.is_tensor(sets) else list(sets)
    if len(set_list) != C or max(set_list) >= S or sets is None and S not in (1, C):
        raise ValueError(f"{S} sets of prompts and the sets of {len(set_list)} texts do not fit "
                         f"{C} texts")
    used = Counter(set_list)
    if len(used) < S:                       # only the sets that some text takes
        layers, place = layers[:, sorted(used)], {s: i for i, s in enumerate(sorted(used))}
        set_list, S = [place[s] for s in set_list], len(used)
    order = sorted(range(C), key=set_list.__getitem__)
    even = len(set(used.values())) == 1
    set_of = None if even else torch.tensor([set_list[i] for i in order], device=device)
    tokens = tokens.to(device)
    if order != list(range(C)):
        tokens = tokens[torch.tensor(order, device=device)]

    with _precision(model):
        position = model.positional_embedding.type(model.dtype)
        start = model.token_embedding(tokens[:1, :1]).type(model.dtype).expand(S, 1, -1)
        prefix = torch.cat([start, layers[0].to(start.dtype)], dim=1) if n else start
        prefix = prefix + position[:P]                                          # [S, P, d]
        own = model.token_embedding(tokens[:, P:]).type(model.dtype) + position[P:T]    # [C, t, d]
        x = torch.cat([prefix.flatten(0, 1), own.flatten(0, 1)])
        end = tokens[:, P:].argmax(dim=-1)                                     # EOS: the largest id
        t, column = T - P, torch.arange(T - P, device=device)
        causal = torch.full((t, t), -math.inf, device=device, dtype=x.dtype).triu(1)
        at_end = torch.zeros(C, 1, 1, t, device=device, dtype=x.dtype)
        at_end = at_end.masked_fill(column > end[:, None, None, None], -math.inf)
        eos = S * P + torch.arange(C, device=device) * t + end
        for i, block in enumerate(blocks):
            if 0 < i < len(layers):
                prefix = x[:S * P].unflatten(0, (S, P))[:, :1]
                prefix = torch.cat([prefix, layers[i].to(x.dtype)], dim=1)
                x = torch.cat([prefix.flatten(0, 1), x[S * P:]])
            last = i + 1 == len(blocks)
            x = _layer(model, _text_layer, block, x, S, P, C, set_of,
                       at_end if last else causal, eos if last else None)
        x = model.ln_final(x).type(model.dtype) @ model.text_projection
        x = x.to(torch.promote_types(x.dtype, torch.float32))
    if order != list(range(C)):
        x = x[torch.tensor(sorted(range(C), key=order.__getitem__), device=device)]
    return x


def _image_layer(block, x, last):
    """One layer of the image encoder on x [B, N, d]; the last returns class tokens [B, 1, d]."""
    attention, d = block.attn, x.shape[-1]
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    y = block.ln_1(x)
    if last:
        q = F.linear(y[:, :1], weight[:d], bias[:d])
        k, v = F.linear(y, weight[d:], bias[d:]).chunk(2, dim=-1)
        x = x[:, :1]
    else:
        q, k, v = F.linear(y, weight, bias).chunk(3, dim=-1)
    mixed = _fused_attention(*(_heads(part, attention) for part in (q, k, v)))
    return _mlp(block, x + attention.out_proj(mixed.transpose(1, 2).flatten(2)))


def encode_image(model, images, prompts=None, sets=None):
    """Image features [B, D] (float32, not normalised) of images [B, 3, H, W], for any CLIP.

    prompts: None, [L, n, d] (one set for every image) or [L, S, n, d] with sets [B] saying which of
    the S sets an image takes (sets=None: S = B), for the first L layers of a ViT. They enter a
    layer's input right behind the class token, as they are; deeper layers' replace the previous
    ones; after layer L they flow on. In the last layer only the class token has a query.
    images may also be features [B, D] that `batches(frozen=True)` has computed once: they are
    returned. Raises UserError for prompts given to a ResNet, ValueError for prompts that do not
    fit.
    """
    if images.ndim == 2 and prompts is None:
        return images
    visual = model.visual
    if not hasattr(visual, "transformer"):
        if prompts is not None:
            raise UserError("image prompts need a ViT backbone, and this one is a ResNet: "
                            "use --clip ViT-B/16 or another ViT")
        with _precision(model):
            return visual(images.type(model.dtype)).float()
    blocks = visual.transformer.resblocks
    layers = [] if prompts is None else prompts
    if len(layers) > len(blocks):
        raise ValueError(f"{len(layers)} layers of prompts do not fit {len(blocks)} layers")
    if len(layers) and prompts.ndim == 3:
        layers = prompts[:, None]
    if len(layers) and sets is None and layers.shape[1] not in (1, len(images)):
        raise ValueError(f"{layers.shape[1]} sets of prompts do not fit {len(images)} images")
    with _precision(model):
        x = visual.conv1(images.type(model.dtype)).flatten(2).transpose(1, 2).type(model.dtype)
        x = torch.cat([visual.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = visual.ln_pre(x + visual.positional_embedding.to(x.dtype))         # [B, 1 + patches, d]
        replaced = 0
        for i, block in enumerate(blocks):
            if i < len(layers):
                inserted = layers[i].to(x.dtype)                                # [S, n, d]
                if len(inserted) == 1:
                    inserted = inserted.expand(len(x), -1, -1)
                elif sets is not None:
                    inserted = inserted[sets]
                x = torch.cat([x[:, :1], inserted, x[:, 1 + replaced:]], dim=1)
                replaced = inserted.shape[1]
            x = _layer(model, _image_layer, block, x, i + 1 == len(blocks))
        x = visual.ln_post(x[:, 0]) @ visual.proj
        return x.to(torch.promote_types(x.dtype, torch.float32))


def logits(model, image_features, text_features):
    """CLIP's logits [B, C]: exp(logit_scale) times the cosine of [B, D] and [C, D].

    text_features may be [B, C, D], where each image has texts of its own (CoCoOp).
    """
    x, w = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    cosine = x @ w.t() if w.ndim == 2 else (w @ x[..., None])[..., 0]
    return model.logit_scale.exp() * cosine


# ---------------------------------------------------------------------- texts, batches and losses

class Texts:
    """The texts of all tasks as one batch for the text encoder.

    tokens [C, T], sets [C]: what `encode_text` takes; mine [N, C]: which texts are which task's
    classes; start [N]: a task's first column, from which its labels count. Tasks that agree in
    prompt set and class names share rows.
    """

    def __init__(self, tasks, n_ctx=0, sets=None, templates=False):
        """sets[t]: the prompt set of task t (default 0); templates: write the tasks' templates."""
        sets = [0] * len(tasks) if sets is None else list(sets)
        rows, owners, found, start = [], [], {}, []
        for task, owner in zip(tasks, sets, strict=True):
            template = task.template if templates else "{}"
            key = (owner, template, tuple(task.class_names))
            if key not in found:
                found[key] = len(rows)
                rows += tokenize(task.class_names, n_ctx, template)
                owners += [owner] * len(task.class_names)
            start.append(found[key])
        self.tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        self.sets = torch.tensor(owners)
        self.start = torch.tensor(start)
        self.mine = torch.zeros(len(tasks), len(rows), dtype=torch.bool)
        for t, task in enumerate(tasks):
            self.mine[t, start[t]:start[t] + len(task.class_names)] = True

    def to(self, device):
        """Move what a step needs to a device (`sets` stay on the CPU, where they are read)."""
        self.tokens, self.start, self.mine = (x.to(device) for x in
                                              (self.tokens, self.start, self.mine))
        return self

    def classifiers(self, text_features):
        """Each task's unit-length classifier [C_t, D], from text features [C, D]."""
        unit = F.normalize(text_features, dim=-1)
        return [unit[mine.to(unit.device)] for mine in self.mine]


def task_losses(model, image_features, text_features, labels, task, texts):
    """Every task's mean cross-entropy over its own classes, [N], MmAP's Eq. (5).

    image_features [B, D], text_features [C, D] (or [B, C, D], see `logits`), labels [B], task [B]
    (an image's task number).
    labels may also be a distribution over classes per image, [B, W], where images have several.
    A task without images in the batch has a loss of zero, and no gradient.
    """
    mine, start = texts.mine.to(task.device), texts.start.to(task.device)
    scores = logits(model, image_features, text_features)                       # [B, C]
    scores = scores.masked_fill(~mine[task], -math.inf)
    if labels.ndim == 1:
        losses = F.cross_entropy(scores, start[task] + labels, reduction="none")    # [B]
    else:
        column = start[task, None] + torch.arange(labels.shape[1], device=task.device)  # [B, W]
        log_p = scores.log_softmax(dim=1).gather(1, column.clamp(max=scores.shape[1] - 1))
        losses = -(labels * log_p.masked_fill(labels == 0, 0)).sum(dim=1)       # 0 * -inf is NaN
    members = F.one_hot(task, len(start)).t().to(losses.dtype)                  # [N, B]
    return members @ losses / members.sum(dim=1).clamp(min=1)


def of_present(losses, task):
    """The tasks' losses [N], with NaN for those that have no image in the batch, for `Run.log`."""
    present = torch.zeros_like(losses, dtype=torch.bool).index_fill(0, task, True)
    return losses.detach().masked_fill(~present, math.nan)


def batches(args, model, tasks, frozen=False):
    """Yield the steps of an epoch: (images [B, 3, H, W], labels [B], task [B]).

    Where an image has several labels, a step's are their distribution [B, W] (data.label_tensor).
    args.batches "tasks": a batch of every task in one flat batch; an epoch ends when the largest
    task has been seen once, smaller tasks cycle. "mixed": batches of the shuffled union of the
    tasks, every image once. All draws are made from PyTorch's global generator before the first
    step. args.views: fixed views per image; 0 draws fresh ones. frozen: no image prompts are
    trained, so with fixed views each view is encoded once, and its features [B, D] are yielded.
    """
    lists, size = [task.train for task in tasks], model.visual.input_resolution
    device, seed = model.logit_scale.device, args.seeds[0]
    sizes = [len(images) for images in lists]
    steps = datasets.plan(sizes, args.batch_size, args.batches == "mixed", args.views)
    augment = [task.augment for task in tasks]

    def rendered(lists, steps):
        for images, labels, task in datasets.rendered(lists, steps, size, seed, args.min_crop,
                                                      augment, args.workers):
            yield datasets.normalise(images.to(device)), labels.to(device), task.to(device)

    if not (frozen and args.views):
        yield from rendered(lists, steps)
        return
    kept = []
    for t, images in enumerate(lists):
        key = (t, seed, size, args.views, args.min_crop, augment[t],
               getattr(model, "precision", "auto"))
        kept_for, kept_key, features = getattr(images, "view_features", (None, None, None))
        if kept_for is not model or kept_key != key:
            every = [(t, i, view) for i in range(len(images)) for view in range(args.views)]
            chunks = [every[k:k + 100] for k in range(0, len(every), 100)]
            with torch.no_grad():
                x = [encode_image(model, chunk) for chunk, _, _ in rendered(lists, chunks)]
            features = torch.cat(x).unflatten(0, (-1, args.views))              # [n, views, D]
            images.view_features = model, key, features
        kept.append(features)
    for step in steps:
        yield (torch.stack([kept[t][i, view] for t, i, view in step]),
               datasets.label_tensor([lists[t].labels[i] for t, i, _ in step]).to(device),
               torch.tensor([t for t, _, _ in step], device=device))


# ------------------------------------------------------------------------------------- evaluation

ROOM = 4 * 2**30                # bytes of decoded test images that a process keeps
_kept = {}                      # (image, size) -> its pixels
_plain = {}                     # (image, backbone) -> CLIP's own image features


def _keys(images, mark):
    """A dictionary key for each image: its path, its place in a sheet, or the object itself."""
    return [(images.read, id(item) if isinstance(item, np.ndarray) else item, mark)
            for item in images.items]


def _pixels(images, size, workers):
    """Yield (positions, images uint8 [B, 3, size, size]) of all images; each is decoded once."""
    keys = _keys(images, size)
    ready = [i for i, key in enumerate(keys) if key in _kept]
    missing = [i for i, key in enumerate(keys) if key not in _kept]
    for k in range(0, len(ready), 100):
        chunk = ready[k:k + 100]
        yield chunk, torch.stack([_kept[keys[i]][0] for i in chunk])
    position = 0
    for batch, _ in datasets.in_order(images.subset(missing), size, workers):
        chunk = missing[position:position + len(batch)]
        position += len(chunk)
        for i, picture in zip(chunk, batch):
            if len(_kept) * 3 * size * size < ROOM:
                _kept[keys[i]] = picture.clone(), images.items[i]               # the item lives on
        yield chunk, batch


@torch.no_grad()
def image_features(model, images, prompts=None, workers=None, tuned=None):
    """(CLIP's own features [n, D], features under `prompts` [L, n_ctx, d] [n, D], labels [n]).

    tuned: another CLIP, whose features are the second ones. They are the first where both are None.
    An image is read and decoded once per process, and CLIP's own features are computed once,
    whatever is scored on it.
    """
    device, size = model.logit_scale.device, model.visual.input_resolution
    keys = _keys(images, id(model))
    prompted, twice = [None] * len(keys), prompts is not None or tuned is not None
    if twice or any(key not in _plain for key in keys):
        for chunk, batch in progress(_pixels(images, size, workers), "score"):
            x = datasets.normalise(batch.to(device))
            todo = [j for j, i in enumerate(chunk) if keys[i] not in _plain]
            if todo:
                for j, feature in zip(todo, encode_image(model, x[todo])):
                    _plain[keys[chunk[j]]] = feature, images.items[chunk[j]], model
            if twice:
                for i, feature in zip(chunk, encode_image(tuned or model, x, prompts)):
                    prompted[i] = feature
    plain = torch.stack([_plain[key][0] for key in keys])
    labels = datasets.label_tensor(images.labels).to(device)
    return plain, torch.stack(prompted) if twice else plain, labels


@torch.no_grad()
def evaluate(args, model, tasks, classifiers, image_prompts=None, select=None, tuned=None):
    """Zero-shot CLIP's and a method's score on the test images of every task, in %.

    classifiers: [C_t, D] per task, multiplied with unit-length image features, or a function of
    these [n, D] that returns cosines [n, C_t]. image_prompts: [L, S, n, d], S = 1 or N. select(x,
    t): what a method makes of a task's image features [n, D]. tuned: the CLIP to encode images
    with, where it is not the frozen one.
    Returns dict(zero_shot=[N numbers], accuracy=[N numbers]).
    """
    scores, scale = dict(zero_shot=[], accuracy=[]), model.logit_scale.exp()
    own_scale = (tuned or model).logit_scale.exp()
    for t, (task, own, w) in enumerate(
        zip(tasks, zero_shot_classifiers(model, tasks), classifiers)
    ):
        prompts = None if image_prompts is None else image_prompts[:, t % image_prompts.shape[1]]
        plain, x, labels = image_features(model, task.test, prompts, args.workers, tuned)
        if select is not None:
            x = select(x, t)
        scores["zero_shot"].append(
            score(task.metric, scale * F.normalize(plain, dim=-1) @ own.t(), labels))
        x = F.normalize(x, dim=-1)
        cosine = w(x) if callable(w) else x @ w.t()
        scores["accuracy"].append(score(task.metric, own_scale * cosine, labels))
    return scores


@torch.no_grad()
def zero_shot_classifiers(model, tasks):
    """Zero-shot CLIP's unit-length classifier [C_t, D] of every task, from its own template."""
    texts = Texts(tasks, templates=True)
    return texts.classifiers(encode_text(model, texts.tokens))


def score(metric, scores, labels):
    """A task's metric, in %, from scores [n, C] and labels [n] (or [n, W], several per image).

    "accuracy", "mean per class" (the classes weigh equally), "ROC AUC" (two classes), "11-point
    mAP", or a function of both.
    """
    if callable(metric):
        return metric(scores, labels)
    if metric == "ROC AUC":
        return roc_auc(scores.double().cpu(), labels.cpu())
    if metric == "11-point mAP":
        return mean_average_precision(scores.double().cpu(), labels.cpu())
    hits, labels = (scores.argmax(dim=-1) == labels).cpu().double(), labels.cpu()
    if metric == "accuracy":
        return 100 * hits.mean().item()
    return 100 * statistics.mean(hits[labels == k].mean().item() for k in labels.unique())


def roc_auc(scores, labels):
    """The area under the ROC curve of class 1, ranked by its softmax probability, in %.

    50, which is chance, where all images are of one class.
    """
    from sklearn.metrics import roc_auc_score
    if len(labels.unique()) < 2:
        return 50.0
    return 100 * float(roc_auc_score(labels, scores[:, 1] - scores[:, 0]))


def mean_average_precision(scores, labels):
    """PASCAL VOC's 11-point interpolated average precision (Everingham et al., IJCV 2010), the
    mean over the classes with a positive image, in %.

    A class ranks the images by its score. Its average precision is the mean, over the recalls
    0, 0.1, ..., 1, of the largest precision at that recall or a larger one.
    """
    from sklearn.metrics import precision_recall_curve
    found = []
    for k, positive in enumerate((labels > 0).t()):
        if positive.any():
            precision, recall, _ = precision_recall_curve(positive, scores[:, k])
            precision, recall = precision[:-1], recall[:-1]     # the last point is not an image's
            points = [precision[recall >= t / 10 - 1e-9].max() for t in range(11)]
            found.append(100 * float(np.mean(points)))
    return statistics.mean(found) if found else 0.0


# -------------------------------------------------------- optimizers, and gradients that disagree

def sgd(args, prompts, momentum, weight_decay):
    """SGD and its schedule: a cosine that steps once an epoch, or with --schedule constant none."""
    optimizer = torch.optim.SGD(prompts.parameters(), lr=args.lr, momentum=momentum,
                                weight_decay=weight_decay)
    if getattr(args, "schedule", "cosine") == "constant":
        return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)


# Each takes the tasks' gradients [N, P] and returns the direction [P] to descend along.

def pcgrad(grads, generator=None):
    """PCGrad (Yu et al., NeurIPS 2020): the sum of the gradients, each projected off those that it
    conflicts with (a negative dot product), in a random order from `generator`."""
    projected = grads.clone()
    for i in range(len(grads)):
        for j in torch.randperm(len(grads), generator=generator).tolist():
            dot = projected[i] @ grads[j]
            if i != j and dot < 0:
                projected[i] -= dot / (grads[j] @ grads[j]) * grads[j]
    return projected.sum(0)


def imtl(grads):
    """IMTL-G (Liu et al., ICLR 2021): sum_i a_i g_i, with sum_i a_i = 1, that has equal projections
    onto all gradients.

    With u_i = g_i / |g_i|, D = [g_1 - g_i] and U = [u_1 - u_i], i = 2..N:
    a_2..N = g_1 U^T (D U^T)^-1. A singular D U^T is solved by least squares.
    """
    g = grads.double()
    units = g / g.norm(dim=1, keepdim=True).clamp(min=1e-300)
    D, U = g[:1] - g[1:], units[:1] - units[1:]
    a = torch.linalg.pinv(D @ U.t()).t() @ (U @ g[0])
    return ((1 - a.sum()) * g[0] + a @ g[1:]).to(grads.dtype)


def cagrad(grads, c=0.5, steps=300):
    """CAGrad (Liu et al., NeurIPS 2021): the d within c |g_0| of the mean gradient g_0 whose worst
    dot product with a task's gradient is largest.

    Its dual: w on the simplex minimises g_w . g_0 + c |g_0| |g_w| with g_w = sum_i w_i g_i; then
    d = g_0 + c |g_0| g_w / |g_w|. c = 0.5 (choice: its experiments have 0.4 to 0.9). Solved by
    exponentiated gradient descent on the Gram matrix.
    """
    gram = (grads @ grads.t()).double()
    scale = gram.diagonal().mean().clamp(min=1e-300)
    gram, w = gram / scale, gram.new_full((len(grads),), 1 / len(grads))
    to_mean, radius = gram.mean(1), c * gram.mean().clamp(min=0).sqrt()     # g_i . g_0 and c |g_0|

    def length(w):
        return (w @ gram @ w).clamp(min=1e-20).sqrt()

    def value(w):
        return w @ to_mean + radius * length(w)

    rate = 1.0
    for _ in range(steps):
        slope = to_mean + radius * gram @ w / length(w)
        tried = torch.softmax(w.clamp(min=1e-30).log() - rate * slope, dim=0)
        if value(tried) < value(w):
            w, rate = tried, 1.5 * rate
        else:
            rate = rate / 2
    return grads.mean(0) + (radius / length(w)).to(grads.dtype) * (w.to(grads.dtype) @ grads)


# --------------------------------------------------------------------------------------- settings

@dataclass
class Args:
    """What all methods share; a method file adds its own settings and sets the paper's values."""

    # benchmark (data/README.md), folder domain/class/*.jpg, name=path; or several
    data: str = "emoji"
    split: float | None = None  # fraction of each class to train on
    shots: int | None = None  # images of each class to train on (6 for the built-in data)
    seeds: tuple[int, ...] = (1,)  # one training per seed, reported as mean ± std
    # backbone: a name of the clip package, "tiny" (built-in data), or a file
    clip: str = "ViT-B/16"
    root: str = "data"  # folder that holds the datasets
    download: bool = False  # first fetch --data into --root, where torchvision can
    device: str | None = None  # cpu, cuda, cuda:1, ... (default: CUDA where there is one)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on a GPU that has it
    workers: int | None = None  # processes that read images; 0 works everywhere
    epochs: int = 5  # epochs of training
    lr: float = 0.0035  # learning rate
    batch_size: int = 16  # images per task in a step; of all tasks with --batches mixed
    batches: Literal["tasks", "mixed"] = "tasks"  # a batch of every task, or of the shuffled union
    n_ctx: int = 16  # prompt length b
    views: int = 0  # fixed augmented views per image; 0 draws fresh ones every epoch
    min_crop: float = 0.08  # smallest part of an image's area that a view shows (Dassl's 0.08)
    out: str | None = None  # folder of this run (default: one of its own under runs/)
    resume: bool = False  # go on with the run in --out, with the settings saved there
    eval: str | None = None  # score this prompts.pt instead of training; writes nothing
    validate: bool = False  # hold out 20% of the training images and score on them
    checkpoint: bool = False  # recompute layers in the backward pass: less memory, more time
    plot: bool = False  # also draw figures into the run folder


def parse(Args, doc, argv=None, tiny=None, of_data=None, own=None):
    """Parse flags, inherit saved settings for --resume and --eval, fill in defaults, validate.

    Args: a method's settings, with the paper's values as defaults; tiny: the built-in backbone's
    own, of_data: those that a paper gives a dataset, own(args): those that follow from other
    settings; tiny may be such a function, too. tiny overrides own, own of_data, and a given flag
    all of them. --resume and --eval inherit saved settings.
    Raises UserError, and SystemExit(2) where tyro rejects a flag.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    flags = (re.fullmatch(r"--(?:no-)?([a-z][a-z_-]*)(=.*)?", word) for word in argv)
    given = {match[1].replace("-", "_") for match in flags if match}

    # --x and --no-x each where a saved setting is the default; else only what changes the default
    kind = Args if {"resume", "eval"} & given else tyro.conf.FlagCreatePairsOff[Args]

    def read(default):
        return tyro.cli(kind, args=argv, default=default,
                        description=inspect.cleandoc(doc or ""), prog=script_of(Args.method))

    args = _absolute(read(Args()))
    if args.resume and args.eval:
        raise UserError("--resume continues a training and --eval scores a finished one: "
                        "give one of them")
    saved, owner = {}, ""
    if args.resume:
        if args.out is None:
            raise UserError("--resume needs --out DIR, the folder of the run to go on with")
        owner, free = f"the run in {args.out}", Run.FREE
        saved = saved_settings(args)
    elif args.eval:
        owner, free = args.eval, Run.FREE | {"data", "split", "shots", "seeds", "validate"}
        saved = load_prompts(args.eval, Args.method)["settings"]
        saved = {key: value for key, value in saved.items() if key not in ("out", "plot")}
    else:
        usual = dict((of_data or {}).get(args.data.split(":")[0], {}))
        usual.update(own(args) if own else {})
        built_in = datasets.built_in_shots(args.data) is not None
        if args.clip == "tiny" or built_in and "clip" not in given:
            usual.update(_of_tiny(tiny, args), clip="tiny")
        args = _absolute(read(replace(Args(), **usual)))
    if saved:
        kinds = get_type_hints(Args)
        saved = {key: tuple(value) if isinstance(value, list) else value     # JSON has no tuples
                 for key, value in saved.items() if key in kinds}
        for key, value in saved.items():
            if not _is_a(kinds[key], value):
                raise UserError(f"{owner} is damaged (its setting '{key}' has a value that the "
                                "flag does not take): start another run in another --out")
        if args.eval and {"split", "shots"} & given:
            saved.update(split=None, shots=None)
        merged = _absolute(read(replace(Args(), **saved)))
        for key in sorted(given & saved.keys()):
            now, then = getattr(merged, key), saved[key]
            if key not in free and now != then:
                default = getattr(Args, key, None)
                raise UserError(f"{owner} was started {said(key, then, default)}, not "
                                f"{said(key, now, default)}: leave the flag out, or start another "
                                "run in another --out")
        args = replace(merged, out=args.out, resume=args.resume, eval=args.eval)
    _validate(args)
    return args


def script_of(method):
    """The words that start a method: "mmap.py", or "common.py finetune"."""
    return "common.py finetune" if method == "finetune" else f"{method}.py"


def _of_tiny(tiny, args):
    """The built-in backbone's own settings."""
    return tiny(args) if callable(tiny) else tiny or {}


def _is_a(kind, value):
    """Whether a saved value has the type of its field, such as `int | None` or a Literal."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_a(get_args(kind)[0], x) for x in value)
    if get_args(kind):
        return any(_is_a(one, value) for one in get_args(kind))
    return isinstance(value, (int, float) if kind is float else kind)


def _absolute(args):
    """Paths with ~ expanded, and absolute, so that a saved run can be used from anywhere."""
    paths = {}
    for field in fields(args):
        value = getattr(args, field.name)
        if field.name in ("root", "out", "eval", *getattr(args, "PATHS", ())) and value:
            paths[field.name] = str(datasets.expand(value))
    if args.clip not in clip.available_models() and datasets.expand(args.clip).is_file():
        paths["clip"] = str(datasets.expand(args.clip))
    return replace(args, data=datasets.absolute(args.data), **paths)


def _validate(args):
    """Fill in what depends on the machine and the data; raise UserError for values out of range."""
    check_clip(args.clip)
    if args.split is None and args.shots is None:
        args.shots = datasets.built_in_shots(args.data)
        if args.shots is None:
            if not args.download:
                datasets.find_listings(args.data, args.root)    # tells of a misspelt name first
            raise UserError(f"--data {args.data} needs --split, such as --split 0.1, or --shots, "
                            "such as --shots 4")
    for key, least in dict(epochs=1, batch_size=1, n_ctx=1, views=0, workers=0).items():
        value = getattr(args, key)
        if value is not None and value < least:
            raise UserError(f"--{key.replace('_', '-')} {value} is too small: give {least} or more")
    if not 0 < args.lr < math.inf:
        raise UserError(f"--lr {args.lr} is no learning rate: give a number above 0")
    if not 0 < args.min_crop <= 1:
        raise UserError(f"--min-crop {args.min_crop} is no part of an image: give a number above 0 "
                        "and up to 1")
    args.seeds = tuple(args.seeds)
    if not args.seeds or min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: give whole numbers from 0 up, "
                        "each once")
    args.device = checked_device(args.device)


def checked_device(device):
    """The device to use: `device`, or by default CUDA where there is one; UserError without it."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
        if torch.device(device).type == "cuda":
            torch.cuda.set_device(torch.zeros(1, device=device).device)
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} is not there ({datasets.brief(error)}): "
                        "use --device cpu") from error
    return device


def said(key, value, default=None):
    """A setting in words: "with --n-ctx 4", "without --shots", "with --no-specific"."""
    flag = f"--{key.replace('_', '-')}"
    if value is True:
        return f"with {flag}"
    if value is False and default is True:
        return f"with --no-{flag[2:]}"
    if value is None or value is False:
        return f"without {flag}"
    words = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    return f"with {flag} {words}"


def variant_of(args, tiny=None):
    """The method's own settings that are not the paper's, in words, or None."""
    shared, usual = {field.name for field in fields(Args)}, type(args)()
    if args.clip == "tiny":
        usual = replace(usual, **_of_tiny(tiny, args))
    words = []
    for field in fields(args):
        value, default = getattr(args, field.name), getattr(usual, field.name)
        if field.name not in shared and value != default:
            words.append(said(field.name, value, default))
    return ", ".join(words) or None


# -------------------------------------------------------------------------------- the run folder

def seed_everything(*names):
    """Seed Python, NumPy and PyTorch from names such as (seed, phase, epoch).

    Every epoch starts here, so a checkpoint needs no random state. On a GPU the backward pass of
    fused attention stays free in its last bits.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    number = zlib.crc32("/".join(map(str, names)).encode())
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def write_whole(path, content):
    """Write text or bytes under a temporary name and rename it: the file is there whole or not."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error.strerror}): free the disk or choose another "
                        "--out") from error


def save_whole(path, content):
    """`torch.save`, as `write_whole`."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getvalue())


def load_saved(path, what, kinds, remedy):
    """A dict from `torch.save`, read without running any code in it.

    kinds: {key: type} that it has to hold. Raises UserError where the file is not what it should
    be.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # truncated, foreign and malicious files fail in many ways
        raise UserError(f"{path} is not {what} of this project ({_unreadable(error)}): "
                        f"{remedy}") from error
    if not isinstance(saved, dict) or not all(
            isinstance(saved.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"{path} is not {what} of this project (it holds something else): {remedy}")
    return saved


def load_prompts(path, method):
    """A run's prompts.pt: its method, settings, tasks, templates, trained_on and prompts."""
    kinds = dict(
        method=str, settings=dict, prompts=dict, tasks=dict, templates=dict, trained_on=dict
    )
    saved = load_saved(
        path, "a prompts.pt", kinds, f"give the prompts.pt that a run of {method} wrote"
    )
    if saved["method"] != method:
        raise UserError(f"{path} holds prompts of {saved['method']}, not of {method}: "
                        f"use {script_of(saved['method'])} --eval {path}")
    return saved


def saved_settings(args):
    """The settings.json of the run in args.out."""
    path = Path(args.out) / "settings.json"
    saved = read_json(path)
    if not isinstance(saved, dict) or not {"method", "data", "seeds"} <= saved.keys():
        raise UserError(f"{path} does not hold the settings of a run: start one in another --out")
    if saved["method"] != args.method:
        raise UserError(f"the run in {args.out} is one of {saved['method']}: "
                        f"use {script_of(saved['method'])} --resume --out {args.out}")
    return saved


def read_json(path):
    """A JSON file of a run folder; UserError where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no run to resume in {path.parent} (no {path.name}): leave out "
                        "--resume to start one") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({datasets.brief(error)}): start the run again in "
                        "another --out") from error


def fingerprints(images, sizes=True):
    """A hash (int64) per image: of the end of its path and its size, its place, or its pixels."""
    found = []
    for item in images.items:
        if isinstance(item, np.ndarray):
            text = item.tobytes()
        elif isinstance(item, (str, Path)):
            text = "/".join(Path(item).parts[-3:]).encode("utf-8", "surrogateescape")
            text += str(os.path.getsize(item)).encode() if sizes else b""
        else:
            text = repr(_in_file(*item) if isinstance(item, tuple) else item).encode()
        found.append(int.from_bytes(hashlib.sha1(text).digest()[:8], "big", signed=True))
    return torch.tensor(found, dtype=torch.long)


def _in_file(path, *place):
    """What tells an image inside a file, wherever the file is: zip files of several datasets have
    one name, so their folder counts too."""
    path = Path(path)
    name = f"{path.parent.name}/{path.name}" if path.suffix == ".zip" else path.name
    return name, *place


def contents(tasks):
    """What a resumed run has to find again: each task's classes and a hash of its image lists."""
    found = {}
    for task in tasks:
        lists = [fingerprints(x, sizes=False).tolist() for x in (task.train, task.test)]
        found[task.name] = [*task.class_names, hashlib.sha1(repr(lists).encode()).hexdigest()]
    return found


class Run:
    """The folder of one run: settings.json, log.csv, prompts.pt, result.json, figures, checkpoints.

    checkpoint.pt holds the scores of finished seeds, checkpoint-PHASE.pt a phase of the present
    seed. Making a Run only checks; `open` is the first to write.
    """

    latest = None
    interrupted = False         # Ctrl-C was pressed: stop after the epoch if nothing else stopped
    # what a resumed run may change
    FREE = {"out", "plot", "device", "root", "download", "workers", "checkpoint", "resume", "eval"}
    FILES = ("settings.json", "result.json", "prompts.pt", "log.csv", "checkpoint.pt")

    def __init__(self, args, settings):
        self.settings, self.resumed = settings, args.resume
        self.folder = Path(args.out) if args.out else self._free_folder()
        self.state = dict(method=args.method, data={}, finished={}, rows=[])
        self.prompts, self.trained_on, self.phases, self.unit = {}, {}, {}, ""
        if args.resume:
            self._read()
            return
        for name in self.FILES:
            if (self.folder / name).exists():
                raise UserError(f"--out {self.folder} holds another run ({name}): choose another "
                                "folder, or --resume to go on with it")
        nearest = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise UserError(
                f"--out {self.folder} cannot be written, because {nearest} is a file or "
                "read-only: choose another folder"
            )

    def _read(self):
        remedy = "start the run again in another --out"
        if (self.folder / "checkpoint.pt").exists():
            kinds = dict(method=str, data=dict, finished=dict, rows=list)
            self.state = load_saved(self.folder / "checkpoint.pt", "a checkpoint", kinds, remedy)
        if (self.folder / "prompts.pt").exists():
            saved = load_saved(self.folder / "prompts.pt", "a prompts.pt",
                               dict(prompts=dict, trained_on=dict), remedy)
            self.prompts, self.trained_on = saved["prompts"], saved["trained_on"]

    def _free_folder(self):
        data = re.sub(r"[^\w.-]+", "-", "-".join(map(lambda name: Path(name).name,
                                                     self.settings["data"].split(","))))[:60]
        size = self.settings["shots"] or self.settings["split"]
        base = f"{self.settings['method']}-{data}-{size}"
        return next(path for path in (Path("runs", f"{base}-{i}").absolute()
                                      for i in range(1, 10**6)) if not path.exists())

    def open(self, found):
        """Make the folder and note the settings; `found` are the tasks' `contents`, by seed."""
        if self.state["data"] and self.state["data"] != found:
            raise UserError(f"{self.folder / 'checkpoint.pt'} does not fit the data as it is now "
                            "(tasks, classes or images): start the run again in another --out")
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            while not self.resumed and self.settings["out"] is None:
                try:
                    self.folder.mkdir()
                    break
                except FileExistsError:     # a run that was started at the same moment was faster
                    self.folder = self._free_folder()
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--out {self.folder} cannot be made ({error.strerror}): choose another folder"
            ) from error
        if self.resumed:
            for part in self.folder.glob("*.part"):     # of a process killed while it wrote
                part.unlink(missing_ok=True)
        elif (self.folder / "settings.json").exists():
            raise UserError(f"--out {self.folder} holds another run, which has just begun: "
                            "choose another folder")
        write_whole(self.folder / "settings.json", json.dumps(self.settings, indent=1))
        self.state["data"] = found
        Run.latest = self.folder

    def start_seed(self, seed):
        """Begin (or go on with) the training of a seed; returns False where it has finished."""
        self.seed, self.phases = seed, {}
        return seed not in self.state["finished"]

    def seed_phase(self, phase):
        """Seed what a phase draws before its first epoch, such as the start of its prompts."""
        seed_everything(self.seed, self.unit, phase, "start")

    def epochs(self, phase, n, **parts):
        """Yield the numbers of the epochs of a phase that are left, 0 .. n - 1.

        Restores `parts` (things with state_dict and load_state_dict) where a checkpoint of this
        phase exists, seeds every epoch from (seed, phase, epoch), and after each saves `parts` and
        a row of the means of what `log` was given. A finished phase yields nothing.
        Raises UserError where a loss or a parameter is no longer finite.
        """
        phase = f"{self.unit}: {phase}" if self.unit else phase
        mark = f"{re.sub('[^A-Za-z0-9]+', '-', phase)[:60]}-{zlib.crc32(phase.encode()):08x}"
        path = self.folder / f"checkpoint-{mark}.pt"
        saved = self.phases[phase] = self._restore(path, phase, parts)
        bar = progress(range(saved["epoch"], n), phase)
        for epoch in bar:
            seed_everything(self.seed, phase, epoch)
            self.values, start = {}, time.time()
            yield epoch
            row = self._row(phase, epoch)
            self._check_finite(phase, epoch, row, parts)
            saved["rows"].append(row)
            saved.update(epoch=epoch + 1, seconds=saved["seconds"] + time.time() - start)
            states = {name: part.state_dict() for name, part in parts.items()}
            found = self.state["data"].get(self.seed)
            save_whole(path, dict(saved, seed=self.seed, phase=phase, parts=states, data=found))
            self._write_log()
            if Run.interrupted:
                raise KeyboardInterrupt

    def _restore(self, path, phase, parts):
        fresh = dict(epoch=0, seconds=0.0, rows=[])
        if not self.resumed or not path.exists():
            return fresh
        remedy = "start the run again in another --out"
        kinds = dict(seed=int, phase=str, epoch=int, seconds=float, rows=list, parts=dict)
        saved = load_saved(path, "a checkpoint", kinds, remedy)
        if saved["seed"] != self.seed or saved["phase"] != phase:
            return fresh
        if saved.get("data") != self.state["data"].get(self.seed):
            raise UserError(f"{path} does not fit the data as it is now (tasks, classes or "
                            f"images): {remedy}")
        try:
            for name, part in parts.items():
                part.load_state_dict(saved["parts"][name])
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(f"{path} does not fit the data as it is now "
                            f"({datasets.brief(error)}): {remedy}") from error
        return {key: saved[key] for key in fresh}

    def log(self, **values):
        """Note values of a step (numbers or tensors); log.csv gets their means over an epoch."""
        for name, value in values.items():
            value = value.detach() if torch.is_tensor(value) else torch.tensor(float(value))
            self.values.setdefault(name, []).append(value)

    def _row(self, phase, epoch):
        row = dict(seed=self.seed, phase=phase, epoch=epoch + 1)
        for name, values in self.values.items():
            values = torch.stack(values).double().cpu()
            if values.ndim == 1:
                row[name] = values.mean().item()
            else:
                mean = values.nanmean(dim=0)                    # NaN: a task without images
                row[name] = json.dumps(mean.round(decimals=5).tolist())
        return row

    def _check_finite(self, phase, epoch, row, parts):
        where = f"in epoch {epoch + 1} of phase '{phase}'"
        remedy = "use a smaller --lr in another --out"
        if not math.isfinite(row.get("loss", 0.0)):
            raise UserError(f"the training diverged {where} (loss {row['loss']}): {remedy}")
        for part in parts.values():
            if isinstance(part, nn.Module):
                if not all(p.isfinite().all() for p in part.parameters()):
                    raise UserError(f"the training diverged {where} (a parameter is no longer "
                                    f"finite): {remedy}")

    def rows(self):
        """The rows of log.csv."""
        return self.state["rows"] + [row for saved in self.phases.values() for row in saved["rows"]]

    def _write_log(self):
        text, rows = io.StringIO(), self.rows()
        columns = list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.folder / "log.csv", text.getvalue())

    def save_prompts(self, states, tasks):
        """Keep a seed's trained prompts, a state dict, before anything else can fail."""
        self.prompts[self.seed] = states
        lists = [
            images for task in tasks for images in (task.train, task.val) if images is not None
        ]
        self.trained_on[self.seed] = torch.cat(list(map(fingerprints, lists)))
        save_whole(self.folder / "prompts.pt", dict(
            method=self.settings["method"], settings=self.settings, prompts=self.prompts,
            trained_on=self.trained_on,
            tasks={task.name: list(task.class_names) for task in tasks},
            templates={task.name: task.template for task in tasks}))

    def finish_seed(self, scores):
        """Keep a seed's scores and log, and remove the checkpoints of its phases."""
        seconds = sum(saved["seconds"] for saved in self.phases.values())
        self.state["finished"][self.seed] = dict(scores, seconds=seconds)
        self.state["rows"], self.phases = self.rows(), {}
        save_whole(self.folder / "checkpoint.pt", self.state)
        self._remove_phases()

    def _remove_phases(self):
        for path in self.folder.glob("checkpoint-*.pt"):
            path.unlink(missing_ok=True)

    def finish(self, tasks, model, plot=None):
        """Write result.json, draw the figures, print the closing table."""
        result = gather(self.settings, tasks, model, self.state["finished"])
        self._write_log()
        write_whole(self.folder / "result.json", json.dumps(result, indent=1))
        self._remove_phases()               # of a process killed behind its last seed
        if self.settings["plot"]:
            plot_run(self.folder, result, self.rows(), plot)
        print_table(result)
        print(f"\nresult, log and prompts are in {self.folder}")


def progress(iterable, text):
    """A progress bar on a terminal, for what takes over two seconds."""
    return tqdm(iterable, desc=text, delay=2, leave=False, disable=None)


# ------------------------------------------------------------------- the frame of a method's `main`

def run_seeds(args, build, train, score, n_text=0, image_prompts=False, own=False, check=None,
              prepare=None, plot=None, tiny=None):
    """Refuse early, then train, keep and score the prompts of each seed, and report.

    build(args, model, tasks) -> untrained prompts; train(args, model, tasks, run) -> trained ones;
    score(args, model, tasks, prompts) -> dict of zero_shot and accuracy, a number per task, and the
    method's own results. n_text: vectors before the class name; image_prompts: needs a ViT; own:
    prompts belong to these very tasks, so that `--eval` needs the same ones; check(args, tasks)
    rejects what a method cannot do; prepare(args, tasks, seed) -> tasks divides them further;
    plot(folder, result, rows) draws its figures.

    With args.single_task each task is trained alone, one after another.
    """
    single = getattr(args, "single_task", False)
    settings = dict(asdict(args), method=args.method, variant=variant_of(args, tiny))
    if args.resume and (Path(args.out) / "result.json").exists():
        finished_again(args, plot)
        return
    saved = _checked_prompts(args) if args.eval else None
    run = None if args.eval else Run(args, settings)
    if args.download:
        datasets.find_listings(args.data, args.root, download=True)
    tasks = checked_tasks(args, args.data, n_text)
    if prepare:
        tasks = {seed: prepare(args, tasks[seed], seed) for seed in args.seeds}
    first = tasks[args.seeds[0]]
    if args.eval:
        _check_fit(args, saved, tasks, own or single)
    if check:
        check(args, first)
    model = load_backbone(args, image_prompts)

    def units(seed):
        return [[task] for task in tasks[seed]] if single else [tasks[seed]]

    build(args, model, units(args.seeds[0])[0])     # rejects settings that do not fit
    if run:
        run.open({seed: contents(tasks[seed]) for seed in args.seeds})
    finished = {}
    for seed in args.seeds:
        if run and not run.start_seed(seed):
            continue
        one = replace(args, seeds=(seed,))
        trained = []
        for unit in units(seed):
            if run:
                run.unit = unit[0].name if single else ""
                run.seed_phase("prompts")
                trained.append(train(one, model, unit, run))
            else:
                states = saved["prompts"][seed]
                trained.append(restored(one, build(one, model, unit),
                                        states[unit[0].name] if single else states))
        if run:
            states = [{k: v.detach().cpu() for k, v in prompts.state_dict().items()}
                      for prompts in trained]
            names = [unit[0].name for unit in units(seed)]
            run.save_prompts(dict(zip(names, states)) if single else states[0], tasks[seed])
        scores = merged([score(one, model, unit, prompts)
                         for unit, prompts in zip(units(seed), trained)])
        scores["trainable_parameters"] = sum(
            p.numel() for prompts in trained for p in prompts.parameters() if p.requires_grad)
        if run:
            run.finish_seed(scores)
        finished[seed] = dict(scores, seconds=0.0)
    if run:
        run.finish(first, model, plot)
    else:
        print_table(gather(settings, first, model, finished))


def finished_again(args, plot):
    """Print the closing table of a run that had finished, and draw its figures with --plot."""
    path = Path(args.out) / "result.json"
    result = read_json(path)
    try:
        print_table(result)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({datasets.brief(error)}): start the run again in "
                        "another --out") from error
    if args.plot:
        plot_run(Path(args.out), result, read_log(Path(args.out)), plot)
    print(f"\nthe run in {args.out} had finished")


def read_log(folder):
    """The rows of a run's log.csv."""
    with (Path(folder) / "log.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.update(seed=int(row["seed"]), epoch=int(row["epoch"]))
        if row.get("loss"):
            row["loss"] = float(row["loss"])
    return rows


def merged(scores):
    """The scores of several units, their lists joined."""
    whole = dict(scores[0])
    for other in scores[1:]:
        for key, value in other.items():
            whole[key] = whole[key] + value
    return whole


def restored(args, prompts, states):
    """prompts with saved states; UserError where they do not fit."""
    try:
        prompts.load_state_dict(states)
    except (LookupError, RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"the prompts in {args.eval} do not fit {args.data} "
            f"({datasets.brief(error)}): give the --data they were trained on"
        ) from error
    return prompts


def load_backbone(args, image_prompts=False):
    """CLIP as the settings ask for it; UserError where image prompts would meet a ResNet."""
    resnet = UserError(f"{args.method} puts prompts into the image encoder, and {args.clip} has a "
                       "ResNet there: use a ViT, such as --clip ViT-B/16")
    if image_prompts and args.clip.startswith("RN") and args.clip in clip.available_models():
        raise resnet
    model, _ = load_clip(args.clip, args.device)
    if image_prompts and not hasattr(model.visual, "transformer"):
        raise resnet
    model.precision, model.checkpoint = args.precision, args.checkpoint
    return model


def divided_tasks(args, data, seed):
    """The tasks of `data`; under `--validate` held-out training images are the test images."""
    tasks = load_tasks(data, args.split, args.shots, seed, args.root)
    for task in tasks if args.validate else []:
        task.train, task.test = hold_out(task.train, seed)
    return tasks


def checked_tasks(args, data, n_text):
    """{seed: tasks}, after checking what a training would fail on later.

    Training images are decoded, and kept in memory while there is room (2 GB).
    """
    tasks = {seed: divided_tasks(args, data, seed) for seed in args.seeds}
    for task in tasks[args.seeds[0]]:
        try:
            tokenize(task.class_names, n_text)
        except UserError as error:
            if n_text <= args.n_ctx:
                raise
            raise UserError(f"{error} in all; a text has {n_text // args.n_ctx} prompts") from None
        tokenize(task.class_names, template=task.template)
    for seed in args.seeds:
        room = 2 * 2**30 // len(args.seeds)
        for task in tasks[seed]:
            if not len(task.test):
                raise UserError(f"--validate finds no image of {task.name} to hold out: a class "
                                "keeps its last one, so train on more")
            for i in progress(range(0 if args.eval else len(task.train)), f"check {task.name}"):
                room = task.train.keep(i, room)         # raises where it cannot be decoded
    return tasks


def _checked_prompts(args):
    """The saved prompts of args.eval, with every seed of args.seeds."""
    saved = load_prompts(args.eval, args.method)
    for seed in args.seeds:
        if seed not in saved["prompts"]:
            known = ", ".join(map(str, saved["prompts"]))
            raise UserError(f"{args.eval} has prompts of the seeds {known}, not of {seed}")
        if not torch.is_tensor(saved["trained_on"].get(seed)):
            raise UserError(f"{args.eval} is damaged (it does not say which images seed {seed} was "
                            "trained on): give the prompts.pt that a run wrote")
    return saved


def _check_fit(args, saved, tasks, own):
    """Refuse to score prompts on other tasks than theirs, or on images they were trained on."""
    for seed in args.seeds:
        if own and list(saved["tasks"]) != [task.name for task in tasks[seed]]:
            raise UserError(
                f"the prompts in {args.eval} are of other tasks than those of --data "
                f"{args.data}, or in another order: give the --data they were trained on"
            )
        seen = set(saved["trained_on"][seed].tolist())
        for task in tasks[seed]:
            both = len(seen.intersection(fingerprints(task.test).tolist()))
            if both:
                raise UserError(
                    f"the prompts in {args.eval} (seed {seed}) were trained on {both} of "
                    f"{task.name}'s {len(task.test)} test images: give the --split or "
                    "--shots and the seed that they were trained with"
                )


def script(main):
    """Run a `main`: a UserError becomes a line on stderr and exit code 2, Ctrl-C a hint and 130."""
    name = Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")        # names that the terminal cannot show

    def interrupt(*_):
        Run.interrupted = True      # an exception inside a destructor would be ignored by Python
        raise KeyboardInterrupt

    Run.interrupted = False
    signal.signal(signal.SIGINT, interrupt)

    def go_on():
        return f"go on with --resume --out {Run.latest}" if Run.latest else "start again"

    def stop(line, code=2):
        print(f"{name}: {line}", file=sys.stderr)
        sys.exit(code)

    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        stop(error)
    except BrokenPipeError:                 # `... | head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            stop(f"the disk is full ({error.strerror}): free it, then {go_on()}")
        if error.filename is None:
            raise
        stop(f"{error.filename} cannot be used ({error.strerror}): give another path or mend it")
    except torch.cuda.OutOfMemoryError:
        stop(f"the GPU's memory is full: {go_on()} with --checkpoint, or start again with a "
             "smaller --batch-size")
    except KeyboardInterrupt:
        stop(f"stopped; {go_on()}" if Run.latest else "stopped", 130)


# ------------------------------------------------------------------- results, tables and figures

MATRICES = ["similarity", "affinity", "transfer"]       # a row is a source task, a column a target
SETTINGS = "method variant data split shots clip epochs lr batch_size batches n_ctx".split()


def gather(settings, tasks, model, finished):
    """What result.json holds, from each seed's scores; a method's own key is a list over seeds."""
    names, done = [task.name for task in tasks], [finished[seed] for seed in settings["seeds"]]
    shared = ("zero_shot", "accuracy", "trainable_parameters", "seconds")
    result = {key: settings.get(key) for key in (*SETTINGS, "seeds", "validate")}
    zero_shot = {n: [d["zero_shot"][i] for d in done] for i, n in enumerate(names)}
    result.update(
        seeds=list(settings["seeds"]),
        tasks=names,
        metrics={task.name: getattr(task.metric, "__name__", task.metric) for task in tasks},
        zero_shot={n: statistics.mean(values) for n, values in zero_shot.items()},
        zero_shot_by_seed=zero_shot,
        accuracy={n: [d["accuracy"][i] for d in done] for i, n in enumerate(names)},
        average=[statistics.mean(d["accuracy"]) for d in done],
        trainable_parameters=done[0]["trainable_parameters"],
        clip_parameters=sum(p.numel() for p in model.parameters()),
        seconds=[d["seconds"] for d in done],
    )
    for key in done[0]:
        if key not in shared:
            result[key] = [d[key] for d in done]
    return result


def mean_std(values):
    """`85.2 ± 0.4` from % over seeds (sample standard deviation), or `85.2` from one."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def paper_columns(result):
    """The columns of the papers' tables whose method, data and settings are those of a result."""
    if result["validate"]:
        return []
    columns = json.loads((HERE / "data" / "paper_results.json").read_text("utf-8"))["columns"]
    return [column for column in columns
            if all(column.get(key, "tasks" if key == "batches" else None) == result.get(key)
                   for key in SETTINGS)]


def one_decimal(printed):
    """`75.84 ± 0.50` as `75.8 ± 0.5`: HiPro and MVLPT print two decimals."""
    def rounded(number):
        return str(Decimal(number[0]).quantize(Decimal("0.1"), ROUND_HALF_UP))
    return re.sub(r"\d+\.\d+", rounded, printed)


def plain(name):
    """A name in small letters and digits: "CIFAR-100" and "CIFAR100" are one task."""
    return "".join(filter(str.isalnum, name)).lower()


def aligned(rows):
    """Rows of cells as text: the first column to the left, the others to the right."""
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def measured(result):
    """What the numbers of a result are: "accuracy (VOC2007: 11-point mAP)"."""
    others = [f"{task}: {metric}" for task, metric in result.get("metrics", {}).items()
              if metric != "accuracy"]
    return "accuracy" + (f" ({', '.join(others)})" if others else "")


def print_table(result):
    """The closing table: a row per task and the average; zero-shot CLIP, the method, the papers."""
    head, papers = ["", "zero-shot", result["method"]], paper_columns(result)
    zero_shot = dict(result["zero_shot"], average=statistics.mean(result["zero_shot"].values()))
    accuracy = dict(result["accuracy"], average=result["average"])
    rows = [[name, f"{zero_shot[name]:.1f}", mean_std(accuracy[name])] for name in accuracy]
    for paper in papers:
        head.append(f"{paper['paper']}, {paper['table']}")
        printed = {plain(name): one_decimal(number) for name, number in paper["results"].items()}
        for row in rows:
            row.append(printed.get(plain(row[0]), ""))
    print("\n" + aligned([head, *rows]))
    for paper in papers:
        if "note" in paper:
            print(f"\n{paper['paper']}, {paper['table']}: {paper['note']}")
    share = 100 * result["trainable_parameters"] / result["clip_parameters"]
    print(f"\n{result['trainable_parameters']:,} trainable parameters ({share:.2f}% of CLIP's); "
          f"{measured(result)} in %, seeds {' '.join(map(str, result['seeds']))}; trained in "
          f"{statistics.mean(result['seconds']):.0f} s per seed")
    for key in [key for key in MATRICES if key in result]:
        for seed, matrix in zip(result["seeds"], result[key]):
            print(f"\n{key}, seed {seed} (rows are sources, columns targets in the same order)")
            print(aligned([[name, *(f"{x:.3g}" for x in row)]
                           for name, row in zip(result["tasks"], matrix)]))


def pyplot():
    """matplotlib.pyplot, imported where a figure is wanted."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def save_figure(figure, path, **how):
    """A matplotlib figure as a PNG file, written whole, and closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, **how)
    write_whole(path, buffer.getvalue())
    pyplot().close(figure)


def plot_run(folder, result, rows, plot=None):
    """accuracy.png, loss.png, losses.png (by task), a figure per matrix, and the method's own."""
    plt, names, width = pyplot(), result["tasks"], 0.4
    figure, axes = plt.subplots(figsize=(1.5 + 1.3 * len(names), 4))
    values = [result["accuracy"][name] for name in names]
    spreads = [statistics.stdev(x) if len(x) > 1 else 0 for x in values]
    axes.bar([i - width / 2 for i in range(len(names))], [result["zero_shot"][n] for n in names],
             width, label="zero-shot CLIP")
    axes.bar([i + width / 2 for i in range(len(names))], [statistics.mean(x) for x in values],
             width, yerr=spreads, label=result["method"])
    axes.set_xticks(range(len(names)), names, rotation=20)
    axes.set_ylabel("accuracy (%)")
    axes.legend()
    save_figure(figure, folder / "accuracy.png", bbox_inches="tight")
    figure, axes = plt.subplots(figsize=(6, 4))
    curves = {}
    for row in rows:
        if row.get("loss") not in (None, ""):
            curves.setdefault((row["seed"], row["phase"]), []).append((row["epoch"], row["loss"]))
    for (seed, phase), points in curves.items():
        axes.plot(*zip(*points), label=f"seed {seed}, {phase}" if len(curves) < 12 else None)
    axes.set(xlabel="epoch", ylabel="training loss")
    if 0 < len(curves) < 12:
        axes.legend()
    save_figure(figure, folder / "loss.png", bbox_inches="tight")
    plot_losses(folder / "losses.png", names, rows)
    for key in [key for key in MATRICES if key in result]:
        for seed, matrix in zip(result["seeds"], result[key]):
            plot_matrix(folder / f"{key}-{seed}.png", matrix, names, f"{key}, seed {seed}")
    if plot:
        plot(folder, result, rows)


def plot_losses(path, names, rows):
    """The tasks' losses by epoch, a panel per seed and phase that trains all tasks together."""
    panels = {}
    for row in rows:
        losses = json.loads(row.get("losses") or "[]")
        if len(losses) == len(names):
            panels.setdefault((row["seed"], row["phase"]), []).append(losses)
    if not panels:
        return
    figure, axes = pyplot().subplots(
        1, len(panels), figsize=(4 * len(panels), 3.5), squeeze=False, layout="tight"
    )
    for axis, ((seed, phase), losses) in zip(axes[0], panels.items()):
        for i, name in enumerate(names):
            axis.plot(range(1, len(losses) + 1), [x[i] for x in losses], label=name)
        axis.set(title=f"seed {seed}, {phase}", xlabel="epoch", ylabel="training loss")
    axes[0, 0].legend(fontsize=7)
    save_figure(figure, path)


def plot_matrix(path, matrix, names, title):
    """A matrix over tasks with its numbers: rows are sources, columns targets."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(1.5 + 0.8 * len(names), 1 + 0.8 * len(names)))
    figure.colorbar(axes.imshow(matrix))
    for i, j in np.ndindex(len(names), len(names)):
        axes.text(j, i, f"{matrix[i][j]:.3g}", ha="center", va="center", fontsize=7, color="white",
                  backgroundcolor="#00000060")
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set_title(title)
    save_figure(figure, path, bbox_inches="tight")


# ---------------------------------------------------------------------------------------- commands

@dataclass
class CheckArgs:
    """Is a benchmark complete, and can its images be read?"""

    data: str  # as for training: a benchmark, a folder, name=path, or several
    root: str = "data"  # folder that holds the datasets
    quick: bool = False  # do not decode the images
    workers: int = 0  # processes that read images


def check(argv):
    """`python common.py check`: what a benchmark holds, and what is wrong (exit code 1)."""
    from data.check import report
    args = _command("check", CheckArgs, argv)
    lines, remarks, problems, images = report(args.data, args.root, args.quick, args.workers)
    print("\n".join(lines) + "\n")
    for line in remarks:
        print(f"note: {line}")
    for line in problems[:10]:
        print(f"problem: {line}")
    if len(problems) > 10:
        print(f"... and {len(problems) - 10:,} more")
    state = f"{len(problems):,} problem{'s' * (len(problems) > 1)}" if problems else "all is well"
    undecoded = ", none of them decoded" if args.quick else ""
    tasks = len(lines) - 1
    print(f"{tasks} task{'s' * (tasks > 1)}, {images:,} images{undecoded}: {state}")
    if problems:
        sys.exit(1)


@dataclass
class BaselineArgs:
    """What `zero-shot` and `probe` share with the method files."""

    data: str = "emoji"  # as in the method files
    split: float | None = None  # fraction of each class to train on; the rest is the test set
    shots: int | None = None  # images of each class to train on (6 for the built-in data)
    seeds: tuple[int, ...] = (1,)  # a split per seed, reported as mean ± std
    clip: str | None = None  # backbone (default: ViT-B/16; tiny for the built-in data)
    root: str = "data"  # folder that holds the datasets
    download: bool = False  # first fetch --data into --root, where torchvision can
    device: str | None = None  # cpu, cuda, ... (default: CUDA where there is one)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on a GPU that has it
    workers: int | None = None  # processes that read images; 0 works everywhere
    out: str | None = None  # write result.json into this new folder, for `python common.py table`


@dataclass
class ZeroShotArgs(BaselineArgs):
    """Zero-shot CLIP; the seeds draw the test images alone."""

    templates: Literal["single", "ensemble"] = "single"  # a task's own, or data/templates.txt's


def _command(name, Args, argv):
    """The settings of a command, by tyro."""
    return tyro.cli(tyro.conf.FlagCreatePairsOff[Args], args=list(argv), prog=f"common.py {name}",
                    description=inspect.cleandoc(Args.__doc__))


def _checked_out(out):
    """The folder of --out; UserError where it cannot be made or written."""
    out = datasets.expand(out)
    nearest = next(p for p in (out, *out.parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--out {out} cannot be written, because {nearest} is a file or read-only: "
                        "choose another folder")
    return out


def _made(out):
    """The folder of --out, made where it is missing."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made ({error.strerror}): choose another "
                        "folder") from error
    return out


def _baseline(name, Args, argv, n_classes=1):
    """(settings, tasks of every seed, CLIP) of a baseline, its settings validated.

    n_classes: how many classes a task has to have images of.
    """
    given = _command(name, Args, argv)
    built_in = datasets.built_in_shots(given.data) is not None
    given.clip = given.clip or ("tiny" if built_in else "ViT-B/16")
    given = _absolute(given)
    shared = {field.name for field in fields(BaselineArgs)} - {"out"}
    checked = as_args(given, shared)
    _validate(checked)
    given.shots, given.device = checked.shots, checked.device
    if given.out and (_checked_out(given.out) / "result.json").exists():
        raise UserError(f"--out {given.out} holds another result: choose another folder")
    if given.download:
        datasets.find_listings(given.data, given.root, download=True)
    tasks = {seed: load_tasks(given.data, given.split, given.shots, seed, given.root)
             for seed in given.seeds}
    for task in tasks[given.seeds[0]]:
        if len(set(task.train.classes)) < n_classes:
            raise UserError(f"the task {task.name} has fewer than {n_classes} classes: {name} "
                            "needs them to tell apart, so leave the task out")
    model, _ = load_clip(given.clip, given.device)
    model.precision = given.precision
    return given, tasks, model


def as_args(given, names):
    """The settings of a command as those of a method, to be checked alike."""
    return Args(**{name: getattr(given, name) for name in names})


def _report(args, method, variant, tasks, model, finished):
    """Print the closing table of a baseline, and keep its result in --out."""
    settings = dict(asdict(args), method=method, variant=variant, validate=False, batches="tasks")
    result = gather(settings, tasks[args.seeds[0]], model, finished)
    if args.out:
        write_whole(_made(Path(args.out)) / "result.json", json.dumps(result, indent=1))
    print_table(result)


def zero_shot(argv):
    """`python common.py zero-shot`: CLIP as it is, with one template or an ensemble of them."""
    args, tasks, model = _baseline("zero-shot", ZeroShotArgs, argv)
    finished = {}
    for seed in args.seeds:
        classifiers = zero_shot_classifiers(model, tasks[seed])
        if args.templates == "ensemble":
            classifiers = [ensemble(model, task.class_names, templates_of(task, args.data))
                           for task in tasks[seed]]
        scores = evaluate(args, model, tasks[seed], classifiers)
        finished[seed] = dict(scores, trainable_parameters=0, seconds=0.0)
    variant = "with --templates ensemble" if args.templates == "ensemble" else None
    _report(args, "zero_shot", variant, tasks, model, finished)


def templates_of(task, data):
    """The templates of a task's ensemble (data/templates.txt): by its name, else the benchmark's,
    else the general ones."""
    known, names = {}, []
    for line in (HERE / "data" / "templates.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            names = [plain(name) for name in line.strip("[] ").split(",")]
        elif line.strip() and not line.startswith("#"):
            for name in names:
                known.setdefault(name, []).append(line.strip())
    return known.get(plain(task.name)) or known.get(plain(data)) or known["other"]


@torch.no_grad()
def ensemble(model, class_names, templates):
    """The classifier [C, D] of several templates: the mean of their unit-length text features, at
    unit length again (Radford et al., ICML 2021, Sec. 3.1.4)."""
    total = 0
    for template in templates:                                  # with their own full stops
        try:
            tokens = clip.tokenize([template.format(name) for name in class_names])
        except RuntimeError as error:
            raise UserError(f"{datasets.brief(error)}: give the class a shorter name") from error
        tokens = tokens[:, :int(tokens.argmax(dim=-1).max()) + 1]
        total = total + F.normalize(encode_text(model, tokens), dim=-1)
    return F.normalize(total, dim=-1)


def probe(argv):
    """`python common.py probe`: logistic regression on frozen image features, one per task.

    As in CLIP's README, by scikit-learn. Its inverse strength of regularisation, C, is chosen by
    the smallest cross-entropy on the dataset's validation part or on 20% of the training images,
    held out; never on test images.
    """
    from sklearn.linear_model import LogisticRegression
    args, tasks, model = _baseline("probe", BaselineArgs, argv, n_classes=2)
    finished = {}

    def fit(x, y, C):
        return LogisticRegression(C=C, max_iter=1000).fit(x, y)

    def unit(images):
        """Features and labels; an image that has several labels stands once for each."""
        x, _, labels = image_features(model, images, workers=args.workers)
        x, labels = F.normalize(x, dim=-1).cpu(), labels.cpu()
        if labels.ndim == 2:
            image, labels = labels.nonzero(as_tuple=True)
            x = x[image]
        return x.numpy(), labels.numpy()

    for seed in args.seeds:
        found, start, size = [], time.time(), 0
        for task in tasks[seed]:
            (part,) = datasets.with_held_out([task], seed)
            C = 1.0
            if len(part.val):
                (x, y), (x_val, y_val) = unit(part.train), unit(part.val)
                C = min((10.0 ** k for k in range(-2, 6)),
                        key=lambda C: cross_entropy(fit(x, y, C), x_val, y_val))
            regression = fit(*unit(task.train), C)
            found.append(regression)
            size += regression.coef_.size + regression.intercept_.size
        scores = evaluate(args, model, tasks[seed], zero_shot_classifiers(model, tasks[seed]))
        scores["accuracy"] = []
        for task, regression in zip(tasks[seed], found):
            x, _, labels = image_features(model, task.test, workers=args.workers)
            x = F.normalize(x, dim=-1).cpu().numpy()
            own = torch.tensor(class_scores(regression, x, len(task.class_names)))
            scores["accuracy"].append(score(task.metric, own, labels))
        finished[seed] = dict(scores, trainable_parameters=size, seconds=time.time() - start,
                              C=[regression.C for regression in found])
        told = ", ".join(f"{task.name} {r.C:g}" for task, r in zip(tasks[seed], found))
        print(f"seed {seed}: C {told}", flush=True)
    _report(args, "probe", None, tasks, model, finished)


def class_scores(regression, x, n_classes):
    """Log-probabilities [n, C]; a class that the regression has not seen cannot be the answer."""
    found = np.full((len(x), n_classes), -np.inf)
    found[:, regression.classes_] = regression.predict_log_proba(x)
    return found


def cross_entropy(regression, x, labels):
    """The mean cross-entropy of a regression on held-out features."""
    scores = class_scores(regression, x, int(max(labels.max(), regression.classes_.max())) + 1)
    return -np.maximum(scores[np.arange(len(labels)), labels], -50).mean()


# ------------------------------------------------------------ weights in place of prompts: finetune

@dataclass
class FinetuneArgs(Args):
    """Full fine-tuning, BitFit and CLIP-Adapter: trains weights in place of prompts.

    Columns of MmAP's Tables 1 and 2 and of JSCPT's Tables 1 to 3. BitFit (Zaken et al., ACL 2022)
    trains every bias of both encoders. CLIP-Adapter (Gao et al., IJCV 2024) trains a bottleneck D
    -> D/4 -> D on the image feature, mixed with it by a residual ratio. Both have the settings
    of the prompts beside them: "consistent hyperparameter settings across all parameter efficient
    tuning methods", SGD (MmAP, Sec. 4.1). The texts are the tasks' templates.

    Choices the papers leave open: full fine-tuning has AdamW at 1e-5 with weight decay 0.1 on all
    weights (as in Goyal et al., CVPR 2023), because MmAP's rate is one for few parameters; the
    logit scale is trained and not clamped, and a ResNet's running statistics stay as they are.
    CLIP-Adapter's two layers have biases, one ReLU between them, and there is one per task:
    that makes MmAP's 0.53 M (without biases it would be 0.52 M). JSCPT shares one.
    """

    method = "finetune"
    train: Literal["all", "bias", "adapter"] = "all"  # all weights, all biases, or new adapters
    adapters: Literal["task", "shared"] = "task"  # one per task; JSCPT: "task-shared ... adapters"
    ratio: float = 0.2  # the residual ratio: how much of a feature comes from the adapter
    lr: float = 1e-5  # with --train bias and adapter 0.0035: "a learning rate of 0.0035"
    schedule: Literal["cosine", "constant"] = "cosine"  # JSCPT: "a learning rate fixed at 0.0015"
    single_task: bool = False  # a copy of CLIP (or an adapter) per task, each trained alone


MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4      # of SGD: Dassl's defaults
TUNED = dict(                           # settings of the built-in backbone
    all=dict(epochs=5, lr=9e-5),
    bias=dict(epochs=10, lr=0.001),
    adapter=dict(epochs=15, lr=0.09, views=8))


def finetune_own(args):
    """The settings that follow from what is trained."""
    return dict(lr=1e-5 if args.train == "all" else 0.0035)


def finetune_tiny(args):
    """The settings of the built-in backbone."""
    return dict(TUNED[args.train], min_crop=0.6)


class Weights(nn.Module):
    """What `finetune` trains, and `clip`, the CLIP that it belongs to.

    "all" and "bias": parameters of a copy of CLIP. "adapter": CLIP-Adapter's bottlenecks behind the
    frozen CLIP itself. The state dict holds what is trained and nothing else.
    """

    def __init__(self, model, train, n_adapters, ratio):
        super().__init__()
        copied = model if train == "adapter" else copy.deepcopy(model)
        object.__setattr__(self, "clip", copied)        # neither in the state nor a parameter
        self.ratio, width = ratio, model.text_projection.shape[1]
        self.parts = nn.ParameterDict({
            name.replace(".", "/"): parameter.requires_grad_()      # a key may not have a dot
            for name, parameter in copied.named_parameters()
            if train == "all" or train == "bias" and name.endswith("bias")})
        self.adapters = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width // 4), nn.ReLU(), nn.Linear(width // 4, width))
            for _ in range(n_adapters)).to(model.logit_scale.device)

    def adapted(self, x, task):
        """CLIP-Adapter's image features [B, D]: ratio A(x) + (1 - ratio) x, A that of each image's
        task [B]."""
        if not len(self.adapters):
            return x
        every = torch.stack([adapter(x) for adapter in self.adapters])          # [adapters, B, D]
        mine = every[task % len(self.adapters), torch.arange(len(x), device=x.device)]
        return self.ratio * mine + (1 - self.ratio) * x


def build_weights(args, model, tasks):
    """The untrained weights: those of CLIP, or new adapters."""
    n = dict(task=len(tasks), shared=1)[args.adapters] if args.train == "adapter" else 0
    return Weights(model, args.train, n, args.ratio)


def train_weights(args, model, tasks, run):
    """Train weights on all tasks' images; the texts have the tasks' templates."""
    weights = build_weights(args, model, tasks)
    texts = Texts(tasks, templates=True).to(model.logit_scale.device)
    frozen = args.train == "adapter"
    if args.train != "all":
        optimizer, schedule = sgd(args, weights, MOMENTUM, WEIGHT_DECAY)
    else:
        optimizer = torch.optim.AdamW(weights.parameters(), args.lr, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    w = encode_text(model, texts.tokens) if frozen else None                    # [C, D], fixed
    for _ in run.epochs("train", args.epochs, prompts=weights, optimizer=optimizer,
                        schedule=schedule):
        for images, labels, task in batches(args, model, tasks, frozen):
            x = weights.adapted(encode_image(weights.clip, images), task)       # [B, D]
            if not frozen:
                w = encode_text(weights.clip, texts.tokens)                     # [C, D]
            losses = task_losses(weights.clip, x, w, labels, task, texts)       # [N]
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            run.log(loss=losses.sum(), losses=of_present(losses, task))
        schedule.step()
    return weights


def score_weights(args, model, tasks, weights):
    """The accuracies of zero-shot CLIP and of the trained weights, in %."""
    def adapted(x, t):
        return weights.adapted(x, torch.full((len(x),), t, device=x.device))

    return evaluate(args, model, tasks, zero_shot_classifiers(weights.clip, tasks), select=adapted,
                    tuned=None if args.train == "adapter" else weights.clip)


def finetune(argv):
    """`python common.py finetune`: full fine-tuning, BitFit, CLIP-Adapter; a run like any other."""
    args = parse(FinetuneArgs, FinetuneArgs.__doc__, argv, finetune_tiny,
                 dict(minidomainnet=dict(batch_size=4)), finetune_own)
    if args.train != "adapter" and (args.adapters, args.ratio) != ("task", 0.2):
        raise UserError("--adapters and --ratio are for --train adapter: leave them out")
    if args.train == "all" and args.schedule != "cosine":
        raise UserError("--schedule is for --train bias and adapter, which SGD trains: leave it "
                        "out")
    if args.n_ctx != FinetuneArgs.n_ctx:
        raise UserError("--n-ctx is for prompts, and finetune has none: leave it out")
    if args.single_task and args.adapters == "shared":
        raise UserError("--adapters shared shares one among tasks, and --single-task trains each "
                        "alone: leave one of them out")
    if not 0 < args.ratio <= 1:
        raise UserError(f"--ratio {args.ratio} is no part of a feature: give a number above 0 and "
                        "up to 1")
    run_seeds(args, build_weights, train_weights, score_weights, tiny=finetune_tiny,
              own=args.train == "adapter" and args.adapters == "task")


FINETUNE = SimpleNamespace(Args=FinetuneArgs, build=build_weights, score=score_weights)


@dataclass
class TableArgs:
    """Gather finished runs into tables: methods as columns, tasks as rows, mean ± sample standard
    deviation over seeds; a table for each data, split and backbone."""

    folders: tyro.conf.Positional[tuple[str, ...]] = ("runs",)  # run folders, or folders of some
    baseline: str | None = None  # a column: print the others' paired difference to its average
    out: str | None = None  # also write table.md and table.csv there
    plot: bool = False  # also draw accuracy against parameters and against shots into --out


OWN = [key for key in SETTINGS if key not in ("data", "split", "shots", "clip")]


def table(argv):
    """`python common.py table runs/`: finished runs side by side, as the papers' tables are."""
    args = _command("table", TableArgs, argv)
    if args.plot and not args.out:
        raise UserError("--plot needs --out DIR, the folder that the figures go to")
    out = _checked_out(args.out) if args.out else None
    runs = read_runs(args.folders)
    known = ["zero-shot", *dict.fromkeys(runs.label)]
    if args.baseline not in (None, *known):
        raise UserError(f"--baseline '{args.baseline}' is no column: give one of "
                        f"{', '.join(known)}")
    tables = {title: layout(part, args.baseline) for title, part in runs.groupby("title")}
    for title, cells in tables.items():
        rows = [
            ["", *cells.columns],
            *([name, *row] for name, row in zip(cells.index, cells.values)),
        ]
        print(f"\n{title}\n{aligned(rows)}")
    if out:
        write_whole(_made(out) / "table.md", "\n".join(
            f"**{title}**\n\n{as_markdown(cells)}\n" for title, cells in tables.items()))
        write_whole(out / "table.csv", runs.drop(columns=["folder", "key"]).to_csv(index=False))
        names = ["table.md", "table.csv"]
        if args.plot:
            names += plot_parameters(out, runs) + plot_shots(out, runs)
        print(f"\n{', '.join(names)} are in {out}")


def read_runs(folders):
    """A data frame with a row per finished run, seed and task (and "average"), oldest run first.

    Runs that differ in their seeds alone have one `key`; of two runs of one seed the later counts.
    Runs of --validate are left out, as they scored other images. UserError for an unreadable
    result.
    """
    import pandas
    rows, validated, paths = [], 0, set()
    for folder in map(datasets.expand, folders):
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}: give the folder of a run, or one that "
                            "holds some")
        paths |= {path.resolve() for path in folder.rglob("result.json")}
    for path in sorted(paths, key=lambda path: (path.stat().st_mtime, str(path))):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            found = rows_of(result)
        except (OSError, ValueError, AttributeError, TypeError, LookupError) as error:
            raise UserError(f"{path} does not hold the result of a run of this version of the "
                            "project: take it away, or give other folders") from error
        if result["validate"]:
            validated += 1
        else:
            rows += [dict(row, folder=str(path.parent)) for row in found]
    if validated:
        print(f"left out: {validated} run{'s' * (validated > 1)} of --validate, scored on held-out "
              "training images", file=sys.stderr)
    if not rows:
        raise UserError(f"no finished run on test images in {', '.join(map(str, folders))}: a run "
                        "writes its result.json at its end")
    runs = pandas.DataFrame(rows)
    same = ["title", "key", "seed", "task"]
    for folder in runs[runs.duplicated(same, keep="last")].folder.unique():
        print(f"{folder} has a seed that a later run has, too: the later one counts",
              file=sys.stderr)
    return label(runs.drop_duplicates(same, keep="last"))


def rows_of(result):
    """The rows of one result.json, per task (and "average") and seed; fails on a damaged one."""
    size = "all" if result["shots"] is None else f"{result['shots']} shots"
    if result["split"] is not None:
        size = f"split {result['split']}"
    shared = {key: result[key] for key in SETTINGS}
    shared.update(title=f"{result['data']}, {size}, {result['clip']}",
                  key=json.dumps([result[key] for key in OWN]),
                  parameters=int(result["trainable_parameters"]))
    accuracy = {task: result["accuracy"][task] for task in result["tasks"]}
    zero_shot = {task: result["zero_shot_by_seed"][task] for task in result["tasks"]}
    accuracy["average"] = result["average"]
    zero_shot["average"] = [statistics.mean(values) for values in zip(*zero_shot.values())]
    return [dict(shared, task=task, seed=seed, accuracy=float(value), zero_shot=float(plain))
            for task in accuracy
            for seed, value, plain in zip(result["seeds"], accuracy[task], zero_shot[task],
                                          strict=True)]


def label(runs):
    """The runs with a `label`: the method, its variant, the settings in which twins differ."""
    runs = runs.assign(
        label=runs.method + [f" ({x})" if isinstance(x, str) else "" for x in runs.variant]
    )
    for _, twins in runs.groupby(["data", "clip", "label"]):
        differ = [key for key in OWN[2:] if twins[key].astype(str).nunique() > 1]
        for key in differ:
            words = twins[key].map(lambda value, key=key: said(key, value).removeprefix("with "))
            runs.loc[twins.index, "label"] += ", " + words
    return runs


def layout(part, baseline=None):
    """A table of cells, a row per task, average, seeds, parameters; a column per label.

    With a baseline also "minus baseline": the mean difference of the averages, paired by seed, and
    its standard error.
    """
    cells, tasks = {}, list(dict.fromkeys(part.task))
    tasks = [task for task in tasks if task != "average"] + ["average"]
    by_task = part.drop_duplicates(["task", "seed"]).groupby("task").zero_shot.mean()
    cells["zero-shot"] = [f"{by_task[task]:.1f}" for task in tasks] + ["", ""]
    averages = part[part.task == "average"].set_index("seed")
    base = averages[averages.label == baseline].accuracy
    if baseline == "zero-shot":
        base = averages.zero_shot.groupby("seed").first()
    rows = [*tasks, "seeds", "parameters"]
    for name in dict.fromkeys(part.label):
        column = part[part.label == name]
        values = column.groupby("task").accuracy.apply(list)
        seeds = " ".join(str(seed) for seed in sorted(column.seed.unique()))
        cells[name] = [mean_std(values[task]) if task in values else "" for task in tasks]
        cells[name] += [seeds, f"{column.parameters.iloc[-1]:,}"]
        if len(base):
            own = averages[averages.label == name].accuracy
            cells[name].append("" if name == baseline else paired((own - base).dropna()))
    if len(base):
        rows.append(f"minus {baseline}")
        cells["zero-shot"].append("")
    import pandas
    return pandas.DataFrame(cells, index=rows)


def paired(differences):
    """`+1.2 ± 0.3`: the mean of differences and its standard error, or `+1.2` of one."""
    if not len(differences):
        return ""
    error = f" ± {differences.std() / len(differences) ** 0.5:.1f}" if len(differences) > 1 else ""
    return f"{differences.mean():+.1f}{error}"


def as_markdown(cells):
    """A table of cells in Markdown."""
    def line(row):
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |"
    head = [line(["", *cells.columns]), line(["---"] * (len(cells.columns) + 1))]
    return "\n".join([*head, *(line([name, *row]) for name, row in zip(cells.index, cells.values))])


def plot_parameters(out, runs):
    """parameters.png: average accuracy against trainable parameters (MmAP, Figure 1)."""
    runs = runs[(runs.task == "average") & (runs.parameters > 0)]
    if runs.empty:
        return []
    titles = list(dict.fromkeys(runs.title))
    figure, axes = pyplot().subplots(1, len(titles), figsize=(6 * len(titles), 4.5), squeeze=False,
                                     layout="tight")
    for axis, title in zip(axes[0], titles):
        part = runs[runs.title == title]
        for name, column in part.groupby("label", sort=False):
            axis.errorbar(column.parameters.iloc[-1], column.accuracy.mean(),
                          column.accuracy.std(ddof=1) if len(column) > 1 else None, fmt="o",
                          label=name)
        axis.axhline(part.drop_duplicates("seed").zero_shot.mean(), color="grey", linestyle="--",
                     label="zero-shot CLIP")
        axis.set(xscale="log", xlabel="trainable parameters", ylabel="average accuracy (%)",
                 title=title)
        axis.legend(fontsize=7)
    save_figure(figure, out / "parameters.png")
    return ["parameters.png"]


def plot_shots(out, runs):
    """shots.png: accuracy against shots, a panel per task (MmAP, Figure 4; HiPro, Figure 6)."""
    runs = runs[runs.shots.notna()]
    groups = [part for _, part in runs.groupby(["data", "clip"]) if part.shots.nunique() > 1]
    if not groups:
        return []
    most = max(part.task.nunique() for part in groups)
    figure, axes = pyplot().subplots(len(groups), most, figsize=(3.5 * most, 3.5 * len(groups)),
                                     squeeze=False, layout="tight")
    for row, part in zip(axes, groups):
        for axis, (task, panel) in zip(row, part.groupby("task", sort=False)):
            plain_scores = (
                panel.drop_duplicates(["shots", "seed"]).groupby("shots").zero_shot.mean()
            )
            axis.plot(plain_scores.index, plain_scores, "--", color="grey", label="zero-shot CLIP")
            for name, line in panel.groupby("label", sort=False):
                by_shots = line.groupby("shots").accuracy
                axis.errorbar(by_shots.mean().index, by_shots.mean(), by_shots.std().fillna(0),
                              marker="o", label=name)
            axis.set(title=f"{part['data'].iloc[0]}, {part['clip'].iloc[0]}: {task}",
                     xlabel="images per class", ylabel="accuracy (%)", xticks=plain_scores.index)
        for axis in row[part.task.nunique():]:
            axis.axis("off")
        row[0].legend(fontsize=7)
    save_figure(figure, out / "shots.png")
    return ["shots.png"]


@dataclass
class PredictArgs:
    """The likeliest classes of some images, by any method's saved prompts; needs no dataset."""

    prompts: tyro.conf.Positional[str]  # the prompts.pt of a run
    images: tyro.conf.Positional[tuple[str, ...]]  # files of images
    task: str | None = None  # the task that the images are of, where there are several
    clip: str | None = None  # backbone, where its file has moved
    device: str | None = None  # cpu, cuda, ... (default: CUDA where there is one)


def predict(argv):
    """`python common.py predict CKPT IMAGE...`: the five likeliest classes, in %."""
    given = _command("predict", PredictArgs, argv)
    path = datasets.expand(given.prompts)
    kinds = dict(
        method=str, settings=dict, prompts=dict, tasks=dict, templates=dict, trained_on=dict
    )
    saved = load_saved(path, "a prompts.pt", kinds, "give the prompts.pt that a run wrote")
    if not _is_whole(saved):
        raise UserError(f"{path} is damaged: give the prompts.pt that a run wrote")
    names = list(saved["tasks"])
    if given.task is None and len(names) > 1:
        raise UserError(f"{path} has {len(names)} tasks: say with --task which one the images are "
                        f"of: {', '.join(names)}")
    if given.task is not None and given.task not in names:
        raise UserError(f"{path} has no task '{given.task}'{datasets.nearest(given.task, names)}: "
                        f"give --task one of {', '.join(names)}")
    if not given.images:
        raise UserError("there is nothing to predict: give the files of images")
    files = [str(datasets.expand(image)) for image in given.images]
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"there is no image {file}: give the files of images")
        read_image(file)
    method = FINETUNE if saved["method"] == "finetune" else load_method(saved["method"])
    chosen = given.task or names[0]
    seed = next(iter(saved["prompts"]))
    known = {field.name for field in fields(method.Args)}
    settings = {key: value for key, value in saved["settings"].items() if key in known}
    settings.update(clip=given.clip or settings["clip"], seeds=(seed,), workers=0,
                    device=given.device, eval=str(path), resume=False)
    kinds = get_type_hints(method.Args)
    for key, value in settings.items():
        if not _is_a(kinds[key], tuple(value) if isinstance(value, list) else value):
            raise UserError(f"{path} is damaged (its setting '{key}'): give the prompts.pt that a "
                            "run wrote")
    try:
        args = _absolute(method.Args(**settings))
        _validate(args)
    except TypeError as error:
        raise UserError(f"{path} is damaged ({datasets.brief(error)}): give the prompts.pt that a "
                        "run wrote") from error
    model, kept = load_backbone(args), []

    def keep(scores, labels):
        kept.append(scores)
        return 0.0

    images = Images(files, [0] * len(files))
    tasks = [Task(name, classes, saved["templates"][name], images,
                  images if name == chosen else images.subset([0]),
                  metric=keep if name == chosen else "accuracy")
             for name, classes in saved["tasks"].items()]
    states = saved["prompts"][seed]
    if getattr(args, "single_task", False):
        tasks, states = [task for task in tasks if task.name == chosen], states.get(chosen)
    try:
        prompts = method.build(args, model, tasks)
        prompts.load_state_dict(states)
    except (LookupError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the prompts in {path} do not fit {args.clip} ({datasets.brief(error)}): "
                        "give the --clip that they were trained with") from error
    method.score(args, model, tasks, prompts)
    print(f"{chosen}, seed {seed}, %")
    for file, row in zip(files, kept[-1].float().softmax(dim=-1).cpu()):    # zero-shot comes first
        print(f"\n{file}")
        for p, k in zip(*(x.tolist() for x in row.topk(min(5, len(row))))):
            print(f"{100 * p:6.1f}  {saved['tasks'][chosen][k]}")


def _is_whole(saved):
    """Whether a prompts.pt names classes and a template of every task, a backbone and prompts."""
    parts = [*saved["tasks"], *saved["templates"].values(), saved["settings"].get("clip")]
    for names in saved["tasks"].values():
        if not isinstance(names, (list, tuple)) or not names:
            return False
        parts += names
    states = saved["prompts"].values()
    return (saved["method"] != "common" and saved["tasks"].keys() == saved["templates"].keys()
            and all(isinstance(part, str) for part in parts)
            and bool(saved["tasks"] and states) and all(isinstance(x, dict) for x in states))


COMMANDS = {"check": check, "zero-shot": zero_shot, "probe": probe, "finetune": finetune,
            "table": table, "predict": predict}


def commands(argv=None):
    """`python common.py check|zero-shot|probe|finetune|table|predict ...`: what is no method."""
    argv = sys.argv[1:] if argv is None else list(argv)
    usage = f"usage: python common.py {'|'.join(COMMANDS)} ...   (each has --help)"
    if not argv:
        raise UserError(usage)
    word, *rest = argv
    if word in ("-h", "--help"):
        print(usage)
        return
    if word not in COMMANDS:
        raise UserError(
            f"'{word}' is no command{datasets.nearest(word, list(COMMANDS))}: say python "
            f"common.py {' or '.join(COMMANDS)}, or use a method's file"
        )
    COMMANDS[word](rest)


if __name__ == "__main__":
    from common import commands as of_common  # the one `common` there is
    from common import script as of_script
    of_script(of_common)
