"""What the seven method files share: CLIP with prompts, texts and losses, evaluation, and the run.

Read it in this order: `encode_text` and `encode_image` put prompts into an untouched `clip` model;
`Texts`, `batches` and `task_losses` make the loss of a training step; `evaluate` scores. `Method`
defines a method: three functions and their settings (`Args`). `main` runs it as a command: `parse`
reads the settings, a `Run` saves checkpoints and results, `print_table` prints the closing table.

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
import functools
import hashlib
import http.client
import importlib.util
import inspect
import io
import itertools
import json
import math
import operator
import os
import pickle
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
import warnings
import weakref
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from decimal import ROUND_HALF_UP, Decimal
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import numpy as np
import packaging.version
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data as datasets
from data import Images, Task, UserError, hold_out, load_tasks, read_image

# clip imports `packaging` from pkg_resources, which newer releases of setuptools no longer include
without_pkg_resources = "pkg_resources" not in sys.modules
if without_pkg_resources:
    sys.modules["pkg_resources"] = SimpleNamespace(packaging=packaging)
try:
    import clip
    BACKBONES = ["tiny", *clip.available_models()]
except Exception as error:                  # PyPI's package `clip` is a clipboard manager
    print(f"{Path(sys.argv[0]).name}: the installed module clip is not OpenAI's CLIP, or lacks a "
          f"package ({datasets.brief(error)}): pip uninstall clip, then "
          "pip install --force-reinstall --no-deps clip-anytorch", file=sys.stderr)
    sys.exit(2)
if without_pkg_resources:
    del sys.modules["pkg_resources"]

HERE = Path(__file__).resolve().parent
__all__ = ["Images", "Task", "UserError", "hold_out", "load_tasks", "read_image"]


def load_method(name):
    """A method file as a module, loaded by path: `load_method("mmap")` shadows no other module.

    Raises UserError if there is no such file.
    """
    alias = f"method_{name}"
    path = HERE / f"{name}.py"
    if alias in sys.modules:
        return sys.modules[alias]
    if not name.isidentifier() or not path.is_file():   # the name may come from a saved file
        raise UserError(f"there is no method file {path}")
    spec = importlib.util.spec_from_file_location(alias, path)
    module = sys.modules[alias] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------- CLIP

ACCEPTED = ("give a TorchScript archive like OpenAI's, or a state dict (.pt, .bin or .safetensors) "
            "with the parameter names of OpenAI's CLIP, OpenCLIP or transformers' CLIPModel")

# OpenCLIP's copies of OpenAI's weights: repositories of huggingface.co/timm
COPIES = {
    "RN50": "resnet50_clip.openai",
    "RN101": "resnet101_clip.openai",
    "RN50x4": "resnet50x4_clip.openai",
    "RN50x16": "resnet50x16_clip.openai",
    "RN50x64": "resnet50x64_clip.openai",
    "ViT-B/32": "vit_base_patch32_clip_224.openai",
    "ViT-B/16": "vit_base_patch16_clip_224.openai",
    "ViT-L/14": "vit_large_patch14_clip_224.openai",
    "ViT-L/14@336px": "vit_large_patch14_clip_336.openai",
}
TIMEOUT = 20        # seconds to wait for a host

# transformers' tensor names -> OpenAI's, replaced in this order
OPENAI_NAMES = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.": "",
    "text_model.encoder.layers": "transformer.resblocks",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.": "visual.",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "visual_projection.weight": "visual.proj",
    ".self_attn.": ".attn.",
    ".layer_norm": ".ln_",
    ".fc1.": ".c_fc.",
    ".fc2.": ".c_proj.",
}


def load_clip(name, device="cpu"):
    """A frozen float32 CLIP in eval mode, and its image preprocessing: (model, preprocess).

    name: one of `clip.available_models()` (downloaded once to ~/.cache/clip), "tiny" (the built-in
    backbone), or the path of a checkpoint: a TorchScript archive like OpenAI's, or a state dict
    (.pt, .bin, .safetensors) with the parameter names of OpenAI's CLIP, OpenCLIP or transformers'
    CLIPModel. No pickled code is run.
    A checkpoint doesn't record its activation: GELU weights load without an error and give wrong
    features, unless a config file beside them says GELU, which is rejected. Nor does it record the
    number of attention heads, assumed to be width / 64 as in OpenAI's models, or the mean and
    standard deviation of its image preprocessing, assumed to be OpenAI's.
    Raises UserError for an unknown name, a failed download, or a file that is not such a
    checkpoint.
    """
    check_clip(name)
    path = HERE / "data" / "tiny_clip.pt" if name == "tiny" else Path(name)
    if name in COPIES:
        path = _downloaded(name)
    try:
        state = _openai_names(_read_checkpoint(path))
        model = clip.model.build_model(state).float()
        model.load_state_dict(state)        # again, since build_model rounds to half precision
        if (model.context_length, model.vocab_size) != (77, 49408):
            raise ValueError(f"its text encoder has {model.context_length} positions and "
                             f"{model.vocab_size} tokens, not 77 and 49408")
    except Exception as error:      # an arbitrary file can fail anywhere, from reading to building
        remedy = "move it away to download it again" if name in COPIES else ACCEPTED
        raise UserError(f"{path} is not a usable CLIP checkpoint ({_unreadable(error)}): "
                        f"{remedy}") from error
    model = model.eval().requires_grad_(False).to(device)
    return model, clip.clip._transform(model.visual.input_resolution)


def _read_checkpoint(path):
    """The contents of a checkpoint file, read without running any pickled code."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file
        return load_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.jit.load(path, map_location="cpu").state_dict()
        except RuntimeError:                # not a TorchScript archive
            return torch.load(path, map_location="cpu", weights_only=True)


def _openai_names(saved):
    """An OpenAI, OpenCLIP or transformers state dict {name: tensor}, renamed to OpenAI's names.

    A training checkpoint {"state_dict": ...} and the prefix `module.` are unwrapped.
    """
    state = {}
    for key, tensor in saved.get("state_dict", saved).items():
        key = key.removeprefix("module.")
        if key in ("text_projection.weight", "visual_projection.weight"):
            tensor = tensor.T
        for theirs, ours in OPENAI_NAMES.items():
            key = key.replace(theirs, ours)
        if not key.endswith(("input_resolution", "context_length", "vocab_size", "position_ids")):
            state[key] = tensor
    for key in [key for key in state if ".attn.q_proj." in key]:
        parts = [state.pop(key.replace("q_proj", name)) for name in ("q_proj", "k_proj", "v_proj")]
        state[key.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return state


def _downloaded(name):
    """The path of OpenAI's weights in ~/.cache/clip, downloaded if missing.

    Sources: OpenAI's host, then OpenCLIP's copy on Hugging Face, or on the host in HF_ENDPOINT.
    Raises UserError if both fail.
    """
    folder = Path("~/.cache/clip").expanduser()
    url, copy = clip.clip._MODELS[name], COPIES[name]
    archive, copied = folder / url.split("/")[-1], folder / f"{copy}.safetensors"
    if archive.is_file() and _sha256(archive) not in url:
        raise UserError(f"{archive} is not OpenAI's file (its SHA-256 differs): move it away to "
                        "download it again")
    for path in (archive, copied):
        if path.is_file():
            return path
    host = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    copy_url = f"{host}/timm/{copy}/resolve/main/open_clip_model.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for path, url in {archive: url, copied: copy_url}.items():
        try:
            _download(url, path)
            return path
        except (OSError, http.client.HTTPException, ValueError) as error:
            failed.append(f"{url} ({datasets.brief(error)})")
    raise UserError(f"cannot download the weights of {name} from {' or from '.join(failed)}: put "
                    f"the first file into ~/.cache/clip as {archive.name}, or the second as "
                    f"{copied.name}")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and keeps the hash that Hugging Face sends with its redirect to a file."""

    etag = ""

    def redirect_request(self, request, response, code, message, headers, url):
        self.etag = headers.get("X-Linked-ETag", self.etag)
        return super().redirect_request(request, response, code, message, headers, url)


def _download(url, path):
    """Write the file at `url` to `path` only if it is complete and has its source's SHA-256.

    OpenAI's URLs contain the SHA-256. Hugging Face's is in the header X-Linked-ETag, or in ETag
    if the host sends the file itself; after a redirect, ETag is a different hash.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    redirects = _Redirects()
    with urllib.request.build_opener(redirects).open(url, timeout=TIMEOUT) as response:
        etag = redirects.etag or response.headers.get("X-Linked-ETag", "")
        if response.url == url:
            etag = etag or response.headers.get("ETag", "")
        hashes = re.findall(r"\b[0-9a-f]{64}\b", f"{url} {etag}")
        if not hashes:
            raise ValueError("the host does not give the file's SHA-256")
        try:
            bar = dict(total=response.length, desc=path.name, disable=None)
            with open(part, "wb") as file, tqdm.wrapattr(response, "read", **bar) as body:
                shutil.copyfileobj(body, file)
            if _sha256(part) != hashes[0]:
                raise ValueError("the download is incomplete or altered: its SHA-256 differs")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_clip(name):
    """Raise UserError for a backbone that is neither a known name nor a file, or that was trained
    with GELU instead of QuickGELU according to an OpenCLIP or transformers config file beside it.
    """
    if name in BACKBONES:
        return
    path = Path(name)
    if path.is_dir():
        raise UserError(f"unknown backbone '{name}', a folder: give the path of a file in it, such "
                        "as its model.safetensors")
    if not path.is_file():
        raise UserError(f"unknown backbone '{name}'{datasets.nearest(name, BACKBONES)}: use one of "
                        f"{', '.join(BACKBONES)} or the path of a file")
    for config in (path.with_name("open_clip_config.json"), path.with_name("config.json")):
        if _says_gelu(config):
            raise UserError(f"{name} was trained with GELU, as {config} says, but OpenAI's CLIP "
                            "uses QuickGELU: use weights that were trained with QuickGELU")


def _says_gelu(config):
    """Whether the config file of OpenCLIP or transformers beside a checkpoint says GELU."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        if "model_cfg" in content:                                                  # OpenCLIP
            return not content["model_cfg"].get("quick_gelu", False)
        encoders = [content.get(f"{kind}_config", {}) for kind in ("text", "vision")]
        return any(part.get("hidden_act", "quick_gelu") != "quick_gelu" for part in encoders)
    except (OSError, ValueError, AttributeError, TypeError):    # no such file, or another kind
        return False


def _unreadable(error):
    if isinstance(error, pickle.UnpicklingError):   # torch's message suggests running the file
        return "it contains more than tensors and plain values"
    if isinstance(error, (KeyError, AttributeError)):
        return "it lacks CLIP's tensors"
    return datasets.brief(error)


def tokenize(class_names, n_ctx=0, template="{}"):
    """Token ids [C, T] of `[SOS] X X .. X class name . [EOS]` (CoOp), zeros after EOS.

    n_ctx: the number of placeholders X, which learned prompts overwrite. template: wraps the name,
    without the final full stop, e.g. "a photo of a {}". T is the length of the longest row, not
    77: a causal encoder that is read at EOS never sees what follows it.
    Raises UserError if a row is longer than CLIP's 77 positions.
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


@contextlib.contextmanager
def _encoding(model, *inputs):
    """The context of an encoder's forward pass; yields the function that runs each of its layers.

    The precision is `--precision` (an attribute of the model). "auto" is bfloat16 on a GPU that
    supports it, float16 on other GPUs if no gradient is needed, and float32 otherwise. Weights and
    prompts stay float32. Gradients are off if neither inputs nor weights need them, so that a
    frozen encoder runs in half precision on every GPU. With `--recompute`, layers are recomputed in
    the backward pass instead of being stored.
    """
    wanted = torch.is_grad_enabled() and any(
        x.requires_grad for x in (*inputs, *model.parameters()) if x is not None)
    device, asked = model.logit_scale.device.type, getattr(model, "precision", "auto")
    if asked == "auto" and device == "cuda" and torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            asked = "bf16"
        elif not wanted:
            asked = "fp16"
    kinds = dict(bf16=torch.bfloat16, fp16=torch.float16)
    half = torch.autocast(device, kinds[asked]) if asked in kinds else contextlib.nullcontext()
    run = operator.call
    if wanted and getattr(model, "recompute", False):
        run = functools.partial(checkpoint, use_reentrant=False)
    with torch.set_grad_enabled(wanted), half:
        yield run


def _heads(x, attention):
    """[..., tokens, d] -> [..., heads, tokens, d / heads]."""
    return x.unflatten(-1, (attention.num_heads, -1)).transpose(-3, -2)


def _mlp(block, x):
    """x + MLP(LN(x)), with QuickGELU as one silu: x sigmoid(1.702 x) = silu(1.702 x) / 1.702."""
    hidden = block.mlp.c_fc(block.ln_2(x)) * 1.702      # `*=` would make autograd copy slices
    return x + block.mlp.c_proj(F.silu(hidden).mul_(1 / 1.702))


def _text_layer(block, x, S, P, C, set_of, mask, eos):
    """One layer of the text encoder on prefixes and classes.

    x [S*P + C*t, d]: S prefixes of P tokens each, then C texts' own t tokens each. set_of [C]: the
    prefix of each text, or None if each prefix has C / S consecutive texts. mask: [t, t]; in the
    last layer [C, 1, t], with eos [C], the rows of x whose output [C, d] is returned.
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
        prefix = F.scaled_dot_product_attention(q_prefix, k_prefix, v_prefix, is_causal=True)
        own = torch.cat([prefix.transpose(1, 2).flatten(2).flatten(0, 1).to(own.dtype), own])
    return _mlp(block, x + attention.out_proj(own))


def encode_text(model, tokens, prompts=None, sets=None):
    """Text features [C, D] (float32, not normalised) of tokens [C, T], for any `clip.model.CLIP`.

    prompts: None, [L, n, d] (one set for all texts) or [L, S, n, d] with sets [C], the index of
    each text's set (sets=None: S = C, one set per text), for the first L layers. Layer 0's prompts
    take positions 1..n before the positional embedding is added, deeper prompts overwrite positions
    1..n of their layer's input; after layer L they continue as ordinary tokens.
    Raises ValueError if prompts do not fit the encoder.

    Shared prefix: [SOS] and the prompts precede the class name, and in a causal encoder nothing
    after them changes them. So they are computed once per set, and each class's own tokens (name,
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
    in_order = C % S == 0 and set_list == [i * S // C for i in range(C)]     # C / S texts per set
    set_of = None if in_order else torch.tensor(set_list, device=device)
    tokens = tokens.to(device)

    with _encoding(model, prompts) as run:
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
            x = run(_text_layer, block, x, S, P, C, set_of, at_end if last else causal,
                    eos if last else None)
        x = model.ln_final(x).type(model.dtype) @ model.text_projection
        return x.to(torch.promote_types(x.dtype, torch.float32))


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
    mixed = F.scaled_dot_product_attention(*(_heads(part, attention) for part in (q, k, v)))
    return _mlp(block, x + attention.out_proj(mixed.transpose(1, 2).flatten(2)))


def encode_image(model, images, prompts=None, sets=None):
    """Image features [B, D] (float32, not normalised) of images [B, 3, H, W], for any CLIP.

    prompts: None, [L, n, d] (one set for all images) or [L, S, n, d] with sets [B], the index of
    each image's set (sets=None: S = B), for the first L layers of a ViT. They are inserted right
    after the class token of a layer's input; deeper prompts replace the previous layer's; after
    layer L they continue as ordinary tokens. In the last layer only the class token has a query.
    images may also be features [B, D], precomputed by `batches(frozen=True)`, which are returned
    unchanged. Raises UserError for prompts given to a ResNet, ValueError for prompts that do not
    fit.
    """
    if images.ndim == 2 and prompts is None:
        return images
    visual = model.visual
    if not hasattr(visual, "transformer"):
        if prompts is not None:
            raise UserError("image prompts need a ViT backbone, but this one is a ResNet: "
                            "use --clip ViT-B/16 or another ViT")
        with _encoding(model, images):
            return visual(images.type(model.dtype)).float()
    blocks = visual.transformer.resblocks
    layers = [] if prompts is None else prompts
    if len(layers) > len(blocks):
        raise ValueError(f"{len(layers)} layers of prompts do not fit {len(blocks)} layers")
    if len(layers) and prompts.ndim == 3:
        layers = prompts[:, None]
    if len(layers) and sets is None and layers.shape[1] not in (1, len(images)):
        raise ValueError(f"{layers.shape[1]} sets of prompts do not fit {len(images)} images")
    with _encoding(model, images, prompts) as run:
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
            x = run(_image_layer, block, x, i + 1 == len(blocks))
        x = visual.ln_post(x[:, 0]) @ visual.proj
        return x.to(torch.promote_types(x.dtype, torch.float32))


def logits(model, image_features, text_features):
    """CLIP's logits [B, C]: exp(logit_scale) times the cosine of [B, D] and [C, D].

    text_features may be [B, C, D] if each image has its own texts (CoCoOp).
    """
    x, w = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    cosine = x @ w.t() if w.ndim == 2 else (w @ x[..., None])[..., 0]
    return model.logit_scale.exp() * cosine


# ---------------------------------------------------------------------- texts, batches and losses

class Texts:
    """The texts of all tasks as one batch for the text encoder.

    tokens [C, T], sets [C]: arguments of `encode_text`; mine [N, C]: a mask of each task's classes;
    start [N]: each task's first column, the offset of its labels. Tasks with the same prompt set
    and class names share rows.
    """

    def __init__(self, tasks, n_ctx=0, sets=None, templates=False):
        """sets[t]: the prompt set of task t (default 0); templates: use the tasks' templates."""
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
        """Move what a step needs to a device (`sets` stays on the CPU, where it is read)."""
        self.tokens, self.start, self.mine = (x.to(device) for x in
                                              (self.tokens, self.start, self.mine))
        return self

    def of_task(self, t):
        """The texts of task t alone: one task, with one prompt set."""
        rows = torch.where(self.mine[t])[0]
        one = copy.copy(self)
        one.tokens, one.mine = self.tokens[rows], self.mine[t:t + 1, rows]
        one.sets, one.start = torch.zeros(len(rows), dtype=torch.long), self.start[:1] * 0
        return one

    def classifiers(self, text_features):
        """Each task's unit-length classifier [C_t, D], from text features [C, D]."""
        unit = F.normalize(text_features, dim=-1)
        return [unit[mine.to(unit.device)] for mine in self.mine]


def task_losses(model, image_features, text_features, labels, task, texts):
    """Every task's mean cross-entropy over its own classes, [N], MmAP's Eq. (5).

    image_features [B, D], text_features [C, D] (or [B, C, D], see `logits`), labels [B], task [B]
    (each image's task number).
    labels may also be a distribution over classes per image, [B, W], if images have several.
    A task without images in the batch has a loss of zero and no gradient.
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


def nan_where_absent(losses, task):
    """The tasks' losses [N], with NaN for tasks without images in the batch, for `Run.log`."""
    present = torch.zeros_like(losses, dtype=torch.bool).index_fill(0, task, True)
    return losses.detach().masked_fill(~present, math.nan)


open_loader = functools.lru_cache(maxsize=1)(datasets.views)    # the current training's loader
close_loader = open_loader.cache_clear          # ends its worker processes
_view_features = weakref.WeakKeyDictionary()    # Images -> (model, key, features [n, views, D])


class PairMean(nn.Module):
    """The mean [N, N] of a measurement on pairs of tasks, over the steps with images of both."""

    def __init__(self, n_tasks):
        super().__init__()
        self.register_buffer("total", torch.zeros(n_tasks, n_tasks))
        self.register_buffer("steps", torch.zeros(n_tasks, n_tasks))

    def add(self, values, task):
        """Add a step's values [N, N]; task [B]: the tasks of its images."""
        present = torch.isin(torch.arange(len(values), device=task.device), task)
        both = present[:, None] & present
        self.total += values * both
        self.steps += both

    def mean(self):
        """The means so far, 0 for pairs without one."""
        return self.total / self.steps.clamp(min=1)


def steps_per_epoch(args, tasks):
    """How many steps `batches` yields in every epoch."""
    sizes = [len(task.train) for task in tasks]
    images = sum(sizes) if args.batches == "mixed" else max(sizes)
    return math.ceil(images / args.batch_size)


def batches(args, model, tasks, frozen=False):
    """Yield the steps of an epoch: (images [B, 3, H, W], labels [B], task [B]).

    If images have several labels, labels are distributions [B, W] (data.label_tensor).
    args.batches "tasks": one batch from each task, concatenated; an epoch ends when the largest
    task has been seen once, smaller tasks cycle. "mixed": batches from the shuffled union of the
    tasks, every image once. All random draws are made from PyTorch's global generator before the
    first step. args.views: fixed views per image; 0 draws fresh ones. frozen: no image prompts are
    trained, so with fixed views each view is encoded once, and features [B, D] are yielded.
    Worker processes start with the first epoch; `close_loader` ends them.
    """
    lists = tuple(task.train for task in tasks)
    size = model.visual.input_resolution
    device, seed = model.logit_scale.device, args.seeds[0]
    sizes = [len(images.items) for images in lists]
    steps = datasets.plan(sizes, args.batch_size, args.batches == "mixed", args.views)
    augment = tuple(task.augment for task in tasks)
    loader = open_loader(lists, size, seed, args.min_crop, augment, args.workers)
    if not (frozen and args.views):
        for images, labels, task in loader.load(steps):
            yield datasets.normalise(images.to(device)), labels.to(device), task.to(device)
        return

    def encoded(t):
        """The features [n, views, D] of the views of task t's images, computed once."""
        key = (t, seed, size, args.views, args.min_crop, tasks[t].augment,
               getattr(model, "precision", "auto"))
        known_model, known_key, features = _view_features.get(lists[t], (None, None, None))
        if known_model is not model or known_key != key:
            every = [(t, i, view) for i in range(sizes[t]) for view in range(args.views)]
            chunks = [every[k:k + 100] for k in range(0, len(every), 100)]
            with torch.no_grad():
                x = [encode_image(model, datasets.normalise(images.to(device)))
                     for images, _, _ in loader.load(chunks)]
            features = torch.cat(x).unflatten(0, (-1, args.views))
            _view_features[lists[t]] = model, key, features
        return features

    features = [encoded(t) for t in range(len(tasks))]
    close_loader()                          # the steps only need features
    for step in steps:
        yield (torch.stack([features[t][i, view] for t, i, view in step]),
               datasets.label_tensor([lists[t].labels[i] for t, i, _ in step]).to(device),
               torch.tensor([t for t, _, _ in step], device=device))


# ------------------------------------------------------------------------------------- evaluation

ROOM = 4 * 2**30                # bytes of decoded test images that a process keeps
_kept = {}                      # (image, size) -> its pixels
_plain = weakref.WeakKeyDictionary()        # backbone -> {image: CLIP's own features of it}


def _keys(images, size):
    """A dictionary key for each image: its path, its place in a sheet, or the object itself."""
    return [(images.read, id(item) if isinstance(item, np.ndarray) else item, images.crop, size)
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
                _kept[keys[i]] = picture.clone(), images.items[i]   # keeps the item's id valid
        yield chunk, batch


@torch.no_grad()
def image_features(model, images, prompts=None, workers=None, tuned=None):
    """(plain CLIP features [n, D], features with `prompts` [L, n_ctx, d] [n, D], labels [n]).

    tuned: another CLIP, which computes the second features. Without prompts and tuned, both are
    the same. Each image is decoded, and its plain features are computed, once per process.
    """
    device, size = model.logit_scale.device, model.visual.input_resolution
    keys = _keys(images, size)
    known = _plain.setdefault(model, {})
    prompted = [None] * len(keys)
    twice = prompts is not None or tuned is not None
    if twice or any(key not in known for key in keys):
        for chunk, batch in progress(_pixels(images, size, workers), "score"):
            x = datasets.normalise(batch.to(device))
            todo = [j for j, i in enumerate(chunk) if keys[i] not in known]
            if todo:
                for j, feature in zip(todo, encode_image(model, x[todo])):
                    known[keys[chunk[j]]] = feature, images.items[chunk[j]]
            if twice:
                for i, feature in zip(chunk, encode_image(tuned or model, x, prompts)):
                    prompted[i] = feature
    plain = torch.stack([known[key][0] for key in keys]).to(device)
    labels = datasets.label_tensor(images.labels).to(device)
    return plain, torch.stack(prompted) if twice else plain, labels


@torch.no_grad()
def task_logits(args, model, tasks, t, classifiers, image_prompts=None, select=None, tuned=None):
    """A method's logits [n, C_t] of task t's test images, their frozen features [n, D], and labels.

    classifiers: per task a matrix [C_t, D], multiplied with unit-length image features and scaled
    by exp(logit_scale), or a function of these features [n, D] that returns logits.
    image_prompts: [L, S, n, d], S = 1 or N. select(x, t): a function applied to a task's image
    features [n, D]. tuned: the CLIP to encode images with, if it is not the frozen one.
    Raises UserError if a logit is NaN.
    """
    prompts = None if image_prompts is None else image_prompts[:, t % image_prompts.shape[1]]
    frozen, x, labels = image_features(model, tasks[t].test, prompts, args.workers, tuned)
    if select is not None:
        x = select(x, t)
    x, classifier = F.normalize(x, dim=-1), classifiers[t]
    if callable(classifier):
        found = classifier(x)
    else:
        found = (tuned or model).logit_scale.exp() * x @ classifier.t()
    if found.isnan().any():
        raise UserError(f"the training diverged, the features of {tasks[t].name} are NaN: use a "
                        "smaller --lr and another --out")
    return found, frozen, labels


def evaluate(args, model, tasks, classifiers, **how):
    """Zero-shot CLIP's and a method's accuracy on the test images of every task, in %.

    classifiers and how: as `task_logits` takes them.
    Returns dict(zero_shot=[N numbers], accuracy=[N numbers]).
    """
    scores = dict(zero_shot=[], accuracy=[])
    for t, zero_shot in enumerate(zero_shot_classifiers(model, tasks)):
        found, frozen, labels = task_logits(args, model, tasks, t, classifiers, **how)
        metric = tasks[t].metric
        scores["zero_shot"].append(apply_metric(metric, logits(model, frozen, zero_shot), labels))
        scores["accuracy"].append(apply_metric(metric, found, labels))
    return scores


@torch.no_grad()
def zero_shot_classifiers(model, tasks):
    """Zero-shot CLIP's unit-length classifier [C_t, D] of every task, from its own template."""
    texts = Texts(tasks, templates=True)
    return texts.classifiers(encode_text(model, texts.tokens))


def apply_metric(metric, logits, labels):
    """A task's metric, in %, of logits [n, C] and labels [n] (or [n, W], several per image).

    "accuracy", "mean per class" (equal weight per class), "11-point mAP", or a function of both.
    """
    if callable(metric):
        return metric(logits, labels)
    if metric == "11-point mAP":
        return mean_average_precision(logits.cpu().double(), labels.cpu())
    hits = (logits.argmax(dim=-1) == labels).cpu().double()
    labels = labels.cpu()
    if metric == "accuracy":
        return 100 * hits.mean().item()
    return 100 * statistics.mean(hits[labels == k].mean().item() for k in labels.unique())


def mean_average_precision(scores, labels):
    """PASCAL VOC's 11-point interpolated average precision (Everingham et al., IJCV 2010), the
    mean over the classes with a positive image, in %.

    For each class, images are ranked by its score. Its average precision is the mean, over the
    recalls 0, 0.1, ..., 1, of the largest precision at that recall or above.
    """
    from sklearn.metrics import precision_recall_curve
    found = []
    for k, positive in enumerate((labels > 0).t()):
        if positive.any():
            precision, recall, _ = precision_recall_curve(positive, scores[:, k])
            precision, recall = precision[:-1], recall[:-1]     # scikit-learn appends a point
            points = [precision[recall >= t / 10 - 1e-9].max() for t in range(11)]
            found.append(100 * float(np.mean(points)))
    return statistics.mean(found) if found else 0.0


# -------------------------------------------------------- optimizers, and gradients that disagree

def sgd(args, prompts):
    """SGD and its schedule, with momentum 0.9 and weight decay 5e-4: the defaults of Dassl, which
    CoOp's, MaPLe's and JSCPT's programs use."""
    optimizer = torch.optim.SGD(prompts.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    return optimizer, scheduled(args, optimizer)


def scheduled(args, optimizer):
    """The learning rate schedule, stepped once per epoch: a cosine, or --schedule constant.

    The first args.warm_up epochs have CoOp's rate of 1e-5; the cosine, args.epochs long, starts
    after them.
    """
    def factor(epoch):
        if epoch < args.warm_up:
            return 1e-5 / args.lr
        if getattr(args, "schedule", "cosine") == "constant":
            return 1.0
        return (1 + math.cos(math.pi * (epoch - args.warm_up) / args.epochs)) / 2
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


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
    g = grads.cpu().double()            # not every GPU has float64
    units = g / g.norm(dim=1, keepdim=True).clamp(min=1e-300)
    D, U = g[:1] - g[1:], units[:1] - units[1:]
    a = torch.linalg.pinv(D @ U.t()).t() @ (U @ g[0])
    return ((1 - a.sum()) * g[0] + a @ g[1:]).to(grads)


def cagrad(grads, c=0.5, steps=300):
    """CAGrad (Liu et al., NeurIPS 2021): the d within c |g_0| of the mean gradient g_0 whose worst
    dot product with a task's gradient is largest.

    Its dual: w on the simplex minimises g_w . g_0 + c |g_0| |g_w| with g_w = sum_i w_i g_i; then
    d = g_0 + c |g_0| g_w / |g_w|. c = 0.5 (ours: the paper's experiments use 0.4 to 0.9). Solved by
    exponentiated gradient descent on the Gram matrix.
    """
    gram = (grads @ grads.t()).cpu().double()       # small, and read in every step of the solver
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
    return grads.mean(0) + (radius / length(w) * w).to(grads) @ grads


# --------------------------------------------------------------------------------------- settings

@dataclass(frozen=True)
class AtLeast:
    """The range of a setting, as an annotation: `groups: Annotated[int, AtLeast(1)] = 2`."""

    least: float
    most: float = math.inf
    open: bool = False          # whether the lower bound itself is out of range

    def __contains__(self, value):
        above = value > self.least if self.open else value >= self.least
        return above and value <= self.most and value < math.inf

    def __str__(self):
        most = f" and at most {self.most:g}" if self.most < math.inf else ""
        return f"{'above' if self.open else 'at least'} {self.least:g}{most}"


Count = Annotated[int, AtLeast(1)]
Rate = Annotated[float, AtLeast(0, open=True)]
Share = Annotated[float, AtLeast(0, 1, open=True)]
# a part of a method that --no-x drops; --help shows "keep" as its default
Kept = Annotated[bool, tyro.conf.arg(help_behavior_hint="(default: keep)")]


@dataclass
class DataArgs:
    """Data, backbone and device: the settings of every command that reads tasks."""

    # benchmark (data/README.md), folder domain/class/*.jpg, name=path; or several, by commas
    data: str = "emoji"
    split: float | None = None  # fraction of each class to train on
    shots: int | None = None  # images of each class to train on (6 for the built-in data)
    seeds: tuple[int, ...] = (1,)  # as in 1 2 3: one training per seed, reported as mean ± std
    # backbone: a model name of the clip package, "tiny" (built-in data), or a file
    clip: str = "ViT-B/16"
    root: str = "data"  # folder that holds the datasets
    download: bool = False  # first download --data into --root, if torchvision can
    device: str | None = None  # cpu, cuda, cuda:1, ...; None: CUDA if available
    # auto: bf16 on a GPU that supports it
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # processes that read images; 0 works everywhere
    workers: Annotated[int, AtLeast(0)] | None = None
    out: str | None = None  # folder of this run; None: a new one under runs/
    resume: bool = False  # continue the run in --out, with its saved settings
    validate: bool = False  # hold out 20% of the training images and score on them
    plot: bool = False  # also draw figures into the run folder


@dataclass
class TrainArgs(DataArgs):
    """Settings that all trained methods share."""

    epochs: Count = 5  # epochs of training
    lr: Rate = 0.0035  # learning rate
    warm_up: Annotated[int, AtLeast(0)] = 0  # number of first epochs at CoOp's rate of 1e-5
    batch_size: Count = 16  # images per task in a step; with --batches mixed, images in a step
    # a batch from every task, or from the shuffled union of the tasks
    batches: Literal["tasks", "mixed"] = "tasks"
    # fixed augmented views per image; 0 draws fresh ones every epoch
    views: Annotated[int, AtLeast(0)] = 0
    min_crop: Share = 0.08  # smallest fraction of an image's area in a view (Dassl's 0.08)
    eval: str | None = None  # score this prompts.pt instead of training; writes nothing
    recompute: bool = False  # recompute layers in the backward pass: less memory, more time


@dataclass
class Args(TrainArgs):
    """Settings the method files share; each adds its own and sets the paper's values."""

    n_ctx: Count = 16  # prompt length b


# settings that --resume and --eval may change, and further ones that --eval may: what is scored
FREE = {"out", "plot", "device", "root", "download", "workers", "recompute"}
SCORED = {"data", "split", "shots", "seeds", "validate"}


def parse(method, argv=None):
    """The settings of a method's run, checked.

    Precedence, highest first: a flag, the saved run's value (--resume, --eval),
    `method.defaults(args)`, the class default.
    Raises UserError, or SystemExit(2) if tyro rejects a flag.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    inherits = any(word.split("=")[0] in ("--resume", "--eval") for word in argv)
    # on top of saved settings a switch can be given as --x or --no-x; else only as its non-default
    kind = method.Args if inherits else tyro.conf.FlagCreatePairsOff[method.Args]

    def read(**defaults):
        default = replace(method.Args(), **defaults)
        return absolute(tyro.cli(kind, args=argv, default=default, prog=method.command,
                                 description=""))

    show_help(argv, method.doc or "", changes_of(method))
    if inherits:
        return checked(method, inherited(method, read))
    built_in = datasets.built_in_shots(read().data) is not None
    usual = dict(clip="tiny") if built_in else {}
    usual.update(method.defaults(read(**usual)))
    return checked(method, read(**usual))


def show_help(argv, *parts):
    """With --help, print a command's text above its flags: tyro would wrap its tables."""
    if "--help" in argv or "-h" in argv:
        print(*(inspect.cleandoc(part) + "\n" for part in parts if part), sep="\n")


def changes_of(method):
    """How the built-in backbone and the benchmarks change the defaults that --help lists."""
    usual, lines = method.Args(), []
    wheres = {name: dict(data=name) for name in datasets.benchmarks.BENCHMARKS}
    for name, where in dict(tiny=dict(clip="tiny"), **wheres).items():
        found = method.defaults(replace(usual, **where))
        changed = [f"{key} {found[key]}" for key in found if found[key] != getattr(usual, key)]
        if changed:
            lines.append(f"with {name}: {', '.join(changed)}")
    return "\n".join(lines)


def absolute(args):
    """Settings with absolute paths, ~ expanded, so that a saved run can be used from anywhere."""
    paths = {key: str(datasets.expand(getattr(args, key)))
             for key in ("root", "out", "eval", *getattr(args, "PATHS", ()))
             if getattr(args, key, None)}
    if args.clip not in BACKBONES and datasets.expand(args.clip).is_file():
        paths["clip"] = str(datasets.expand(args.clip))
    return replace(args, data=datasets.absolute(args.data), **paths)


def inherited(method, read):
    """The settings of the run that --resume continues or --eval scores, overridden by the flags."""
    given = read()
    if given.resume and getattr(given, "eval", None):
        raise UserError("--resume continues a training and --eval scores a finished one: "
                        "give one of them")
    if given.resume and not given.out:
        raise UserError("--resume needs --out DIR, the folder of the run to continue")
    if given.resume:
        owner, free = f"the run in {given.out}", FREE
        saved = load_json(Path(given.out) / "settings.json", "method", "data", "seeds")
    else:
        owner, free = given.eval, FREE | SCORED
        saved = load_prompts(given.eval, method.name)["settings"]
    if saved["method"] != method.name:
        with usable(owner):
            command = method_of(saved["method"]).command
            raise UserError(f"{owner} belongs to {saved['method']}: use {command}")
    with usable(owner), warnings.catch_warnings():
        warnings.simplefilter("error")      # tyro warns where a value has another type
        usual = {key: tuple(value) if isinstance(value, list) else value    # JSON has no tuples
                 for key, value in saved.items() if key in asdict(given)}
        usual.update(out=None, resume=False, plot=given.resume and usual["plot"])
        args = read(**usual)
        check_kinds(args)
        check_ranges(args)
    default = method.Args()
    for key in sorted(usual.keys() - free - {"resume", "eval"}):
        then, now = usual[key], getattr(args, key)
        if now != then and not moved(then):
            raise UserError(f"{owner} was started {said(key, then, getattr(default, key))}, not "
                            f"{said(key, now, getattr(default, key))}: leave the flag out, or "
                            "start a new run with another --out")
    check_backbone(saved, args.clip, owner)
    new_split = args.split != usual["split"]
    new_shots = args.shots != usual["shots"]
    if new_split and not new_shots:
        args.shots = None
    if new_shots and not new_split:
        args.split = None
    return args


def check_kinds(args):
    """Raise ValueError for a saved number that tyro lets pass although its flag would not take it:
    3 for a choice of words, 2.5 for an integer."""
    for key, hint in get_type_hints(type(args)).items():
        value = getattr(args, key)
        words = get_args(hint) if get_origin(hint) is Literal else [value]
        if value not in words or (hint is int and not isinstance(value, int)):
            raise ValueError(f"its {key} is {value}")


def backbone_of(name):
    """What identifies a backbone, wherever its file is: its name, or the SHA-256 of its file.
    Raises UserError as `check_clip` does."""
    check_clip(name)
    return name if name in BACKBONES else _sha256(name)


def check_backbone(settings, name, owner):
    """Raise UserError if a backbone is not the one in saved settings."""
    found = backbone_of(name)
    with usable(owner):
        if settings["backbone"] != found:
            raise UserError(f"{name} is not the backbone that {owner} was started with (different "
                            "weights): give that one with --clip")


def moved(value):
    """Whether a saved setting names files, and one of them is no longer where it was."""
    paths = [Path(part) for part in re.split("[,=]", str(value)) if part.startswith("/")]
    return not all(path.exists() for path in paths)


def checked(method, args):
    """The settings with shots filled in; UserError for contradictions and values out of range."""
    check_clip(args.clip)
    check_ranges(args)
    datasets.check_size(args.split, args.shots)     # before a download
    method.check(args, None)
    if isinstance(args, TrainArgs):
        check_warm_up(method, args)
    if args.split is None and args.shots is None:
        args.shots = datasets.built_in_shots(args.data)
        if args.shots is None:
            if not args.download:
                datasets.find_listings(args.data, args.root)    # reports a misspelt name first
            raise UserError(f"--data {args.data} needs --split, such as --split 0.1, or --shots, "
                            "such as --shots 4")
    return args


def check_warm_up(method, args):
    """Raise UserError if a warm-up takes all epochs, or if no cosine follows it."""
    if args.warm_up >= args.epochs and args.warm_up != method.Args().warm_up:
        raise UserError(f"--warm-up must be below --epochs {args.epochs}, not {args.warm_up}")
    if args.warm_up and getattr(args, "schedule", "cosine") == "constant":
        raise UserError("--warm-up comes before a cosine, but --schedule constant has none: leave "
                        "one of them out")


def check_ranges(args):
    """Raise UserError for a number outside the range that its setting is annotated with."""
    for key, hint in get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, key)
        for kind in (hint, *get_args(hint)):
            for bounds in getattr(kind, "__metadata__", ()):
                if (isinstance(bounds, AtLeast) and isinstance(value, (int, float))
                        and value not in bounds):
                    raise UserError(f"--{key.replace('_', '-')} must be {bounds}, not {value}")
    seeds = set(args.seeds)
    if len(seeds) < max(len(args.seeds), 1) or not all(0 <= seed < 2**32 for seed in seeds):
        raise UserError("--seeds must be distinct integers from 0 to 2**32 - 1, not "
                        f"{' '.join(map(str, args.seeds))}")


def chosen_device(device):
    """`device`, by default CUDA if available, else the CPU; UserError if it cannot be used."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tried = torch.zeros(1, device=device)
        tried.item()
        if tried.device.type == "cuda":
            torch.cuda.set_device(tried.device)
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} is not available ({datasets.brief(error)}): "
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


def variant_of(method, args):
    """The method's own settings that differ from its defaults, in words, or None."""
    shared = {field.name for field in fields(Args)}
    usual = replace(method.Args(), **method.defaults(args))
    words = []
    for field in fields(args):
        value, default = getattr(args, field.name), getattr(usual, field.name)
        if field.name not in shared and value != default:
            words.append(said(field.name, value, default))
    return ", ".join(words) or None


def agree(args, saved, keys, owner):
    """Raise UserError if the settings `saved` with `owner`, or its backbone, are not this run's."""
    check_backbone(saved, args.clip, owner)
    for key in keys:
        if saved.get(key) != getattr(args, key):
            raise UserError(f"{owner} is from a run {said(key, saved.get(key))}, not "
                            f"{said(key, getattr(args, key))}: use the same, or leave the file out")


# ---------------------------------------------------------------------------------- files of a run

def seed_everything(*names):
    """Seed Python, NumPy and PyTorch from names such as (seed, phase, epoch).

    Every epoch starts here, so a checkpoint needs no random state. On a GPU the backward pass of
    fused attention is not bitwise deterministic.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False     # True fills tensors with NaN
    number = zlib.crc32("/".join(map(str, names)).encode())
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def write_whole(path, content):
    """Write text or bytes under a temporary name, then rename: the file is complete or absent."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path, content):
    """Write a JSON file with `write_whole`."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


def save_whole(path, content):
    """`torch.save` with `write_whole`."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getvalue())


RESTART = "start a new run with another --out"
GIVE_PROMPTS = "give the prompts.pt that a run wrote"


@contextlib.contextmanager
def usable(path, remedy=RESTART):
    """Turn any error while a saved file is read and used into a UserError that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except (OSError, EOFError, pickle.UnpicklingError, LookupError, TypeError, ValueError,
            AttributeError, RuntimeError, AssertionError, Warning) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else _unreadable(error)
        raise UserError(f"{path} cannot be used, it is damaged or not the expected kind of file "
                        f"({why}): {remedy}") from error


def load_saved(path, *keys, remedy=RESTART):
    """A dict from `torch.save` that must have the given keys, read without running any code in it;
    remedy: as for `usable`."""
    with usable(path, remedy):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        assert isinstance(saved, dict) and set(keys) <= saved.keys(), "it holds something else"
    return saved


def load_json(path, *keys):
    """A JSON file of a run folder, a dict that must have the given keys."""
    if not path.is_file():
        raise UserError(f"there is no run in {path.parent} (no {path.name}): give the folder of "
                        "one, or leave out --resume to start one")
    with usable(path):
        saved = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(saved, dict) and set(keys) <= saved.keys(), "it holds something else"
    return saved


def load_prompts(path, name=None, remedy=GIVE_PROMPTS):
    """A run's prompts.pt: its method, settings, tasks, templates, contents, trained_on, prompts.

    Raises UserError if it is damaged or of a method other than `name`.
    """
    path = datasets.expand(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: give a run's prompts.pt, such as "
                        f"{path / 'prompts.pt'}")
    saved = load_saved(path, "method", "settings", "tasks", "templates", "crops", "contents",
                       "trained_on", "prompts", remedy=remedy)
    if name not in (None, saved["method"]):
        with usable(path):
            command = method_of(saved["method"]).command
            raise UserError(f"{path} holds prompts of {saved['method']}, not of {name}: use "
                            f"{command} --eval {path}")
    return saved


def load_result(path):
    """A run's result.json."""
    return load_json(datasets.expand(path), "method", "tasks", "seeds", "settings", "accuracy")


class Run:
    """The folder of one run: settings.json, log.csv, prompts.pt, result.json, figures.

    Two more files exist until it ends: checkpoint.pt, the current phase, written every epoch, and
    finished.pt, written when a phase ends: the results of finished phases, the scores of finished
    seeds, and the tasks. Creating a Run only checks; `open` writes first. A new run needs a folder
    without files of these names, so --resume replaces or removes only the run's own files.
    """

    latest = None
    interrupted = False         # Ctrl-C was pressed: stop after the current epoch at the latest
    FILES = ("settings.json", "result.json", "prompts.pt", "log.csv", "checkpoint.pt",
             "finished.pt")

    def __init__(self, args, settings):
        self.settings, self.resumed = settings, args.resume
        self.folder = datasets.expand(args.out or Path("runs", self._name(settings)))
        self.finished = dict(contents={}, scores={}, phases={}, rows=[])        # finished.pt
        self.running = dict(seed=None, phase=None, rows=[])                     # checkpoint.pt
        self.prompts, self.trained_on = {}, {}
        if self.resumed:
            self._read()
            return
        found = taken(self.folder, *self.FILES, "*.png")
        if args.out and found:
            raise UserError(f"--out {self.folder} holds another run or figures ({found[0]}): "
                            "choose another folder, or --resume to continue the run in it")
        check_writable(self.folder)

    def _name(self, settings):
        names = []
        for name in settings["data"].split(","):            # of task=path, the task
            names.append(Path(name if Path(name).exists() else name.split("=")[0]).name)
        data = re.sub(r"[^\w.-]+", "-", "-".join(names))[:60]
        end = "-validate" if settings["validate"] else ""
        return f"{settings['method']}-{data}-{settings['shots'] or settings['split']}{end}"

    def _read(self):
        finished, running, prompts = (self.folder / name for name in
                                      ("finished.pt", "checkpoint.pt", "prompts.pt"))
        if finished.exists():
            self.finished = load_saved(finished, *self.finished)
        if running.exists():
            last = load_saved(running, "seed", "phase", "epoch", "seconds", "rows", "parts")
            ended = last["phase"] in self.finished["phases"]
            if not ended and last["seed"] not in self.finished["scores"]:
                self.running = last             # else finished.pt has its rows and its result
        if prompts.exists():
            saved = load_prompts(prompts, remedy=RESTART)
            self.prompts, self.trained_on = saved["prompts"], saved["trained_on"]

    def open(self, tasks, sources):
        """Make the folder, and write the settings and the contents of the tasks and source tasks.

        Both are dicts by seed; `train` finds the source tasks in `run.sources`.
        """
        self.sources = sources
        tasks = {seed: own + sources[seed] for seed, own in tasks.items()}
        found = {seed: list(map(datasets.contents, own)) for seed, own in tasks.items()}
        self.seen = {seed: datasets.trained_on(own) for seed, own in tasks.items()}
        if self.finished["contents"] not in ({}, found):
            raise UserError(f"{self.folder / 'finished.pt'} does not match the data as it is now "
                            "(tasks, classes or images): start a new run with another --out")
        if self.settings["out"]:
            self.folder.mkdir(parents=True, exist_ok=True)
        else:
            self.folder = numbered(self.folder)
        if not self.resumed and (self.folder / "settings.json").exists():
            raise UserError(f"--out {self.folder} holds another run, which has just started: "
                            "choose another folder")
        write_json(self.folder / "settings.json", self.settings)
        Run.latest = self.folder
        self.finished["contents"] = found
        save_whole(self.folder / "finished.pt", self.finished)

    def start(self, seed, task=""):
        """Start or continue the training of a seed; with --single-task, of one of its tasks."""
        self.seed, self.task = seed, task
        self.seed_phase("prompts")

    def seed_phase(self, phase):
        """Seed what a phase draws before its first epoch, such as its initial prompts."""
        seed_everything(self.seed, self.task, phase, "start")

    def epochs(self, phase, n, **parts):
        """Yield the remaining epochs of a phase, numbered 0 .. n - 1.

        Restores `parts` (objects with state_dict and load_state_dict) if this phase has a
        checkpoint, seeds every epoch from (seed, phase, epoch), and after each saves `parts` and a
        row with the means of the values given to `log`. A finished phase yields nothing and
        restores the modules among `parts` to their final state.
        Raises UserError if a loss or a parameter is no longer finite.
        """
        phase = f"{self.task}: {phase}" if self.task else phase
        modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
        if phase in self.finished["phases"]:
            self._restore(modules, "finished.pt", self.finished["phases"][phase])
            return
        if (self.running["seed"], self.running["phase"]) == (self.seed, phase):
            self._restore(parts, "checkpoint.pt", self.running)
        else:
            self.running = dict(seed=self.seed, phase=phase, epoch=0, seconds=0.0, rows=[])
        first, text = self.running["epoch"], f"seed {self.seed}, {phase}"
        self.bar = progress(None, text)                     # of steps
        for epoch in range(first, n):
            seed_everything(self.seed, phase, epoch)
            self.values, start = {}, time.time()
            yield epoch
            self._add_row(phase, epoch, modules)
            self.bar.total = self.bar.n * (n - first) // (epoch + 1 - first)
            if "loss" in self.values:
                tell_epoch(text, epoch, n, self.running["rows"][-1]["loss"])
            self.running["seconds"] += time.time() - start
            states = {name: part.state_dict() for name, part in parts.items()}
            self.running.update(epoch=epoch + 1, parts=states)
            save_whole(self.folder / "checkpoint.pt", self.running)
            self._write_log()
            if Run.interrupted:
                raise KeyboardInterrupt
        self.bar.close()
        self.finished["rows"] += self.running["rows"]
        self.finished["phases"][phase] = dict(
            seconds=self.running["seconds"],
            parts={name: state_on_cpu(module) for name, module in modules.items()})
        self.running = dict(seed=None, phase=None, rows=[])
        save_whole(self.folder / "finished.pt", self.finished)

    def once(self, phase, function, **parts):
        """Call a function as a phase, unless that phase has finished; `parts` as for `epochs`."""
        for _ in self.epochs(phase, 1, **parts):
            function()

    def _restore(self, parts, file, saved):
        for name, part in parts.items():
            with usable(self.folder / file):
                part.load_state_dict(saved["parts"][name])

    def log(self, **values):
        """Record values of a step (numbers or tensors); log.csv gets their means over an epoch."""
        for name, value in values.items():
            value = value.detach() if torch.is_tensor(value) else torch.tensor(float(value))
            self.values.setdefault(name, []).append(value)
        self.bar.update("loss" in values)                   # once a step

    def _add_row(self, phase, epoch, modules):
        row = dict(seed=self.seed, phase=phase, epoch=epoch + 1)
        for name, values in self.values.items():
            values = torch.stack(values).cpu().double()
            if values.ndim == 1:
                row[name] = values.mean().item()
            else:
                mean = values.nanmean(dim=0)                    # NaN: a task without images
                row[name] = json.dumps(mean.round(decimals=5).tolist())
        finite = all(p.isfinite().all() for module in modules.values() for p in module.parameters())
        if not finite or not math.isfinite(row.get("loss", 0.0)):
            raise UserError(f"the training diverged in epoch {epoch + 1} of phase '{phase}' (loss "
                            f"{row.get('loss')}): use a smaller --lr and another --out")
        if self.values:
            self.running["rows"].append(row)

    def rows(self):
        """The rows of log.csv."""
        return self.finished["rows"] + self.running["rows"]

    def _write_log(self):
        text = io.StringIO()
        rows = self.rows()
        columns = list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.folder / "log.csv", text.getvalue())

    def save_prompts(self, trained, tasks):
        """Save a seed's prompts, {task or "": module}, before anything else can fail."""
        states = {name: state_on_cpu(prompts) for name, prompts in trained.items()}
        self.prompts[self.seed] = states.get("", states)
        self.trained_on[self.seed] = self.seen[self.seed]
        save_whole(self.folder / "prompts.pt", dict(
            method=self.settings["method"], settings=self.settings, prompts=self.prompts,
            trained_on=self.trained_on, contents=self.finished["contents"],
            tasks={task.name: list(task.class_names) for task in tasks},
            templates={task.name: task.template for task in tasks},
            crops={task.name: task.test.crop for task in tasks}))

    def finish_seed(self, scores):
        """Save a seed's scores, and drop its finished phases."""
        scores["seconds"] = sum(phase["seconds"] for phase in self.finished["phases"].values())
        self.finished["scores"][self.seed] = scores
        self.finished["phases"] = {}
        save_whole(self.folder / "finished.pt", self.finished)

    def finish(self, result, plot):
        """Write result.json, print the closing table, draw the figures, remove the checkpoints."""
        self._write_log()
        write_json(self.folder / "result.json", result)
        print_table(result)
        close(self.folder, result, plot if self.settings["plot"] else None)
        print(f"\nresult, log and prompts are in {self.folder}")


def close(folder, result, plot):
    """Draw a finished run's figures, and remove its checkpoints."""
    if plot:
        plot_run(folder, result, plot)
    for name in ("checkpoint.pt", "finished.pt"):
        (folder / name).unlink(missing_ok=True)


def state_on_cpu(module):
    """A copy of a module's state dict, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


def numbered(path):
    """Make the first of the folders `path-1`, `path-2`, ... that does not exist yet."""
    for i in itertools.count(1):
        folder = path.with_name(f"{path.name}-{i}")
        with contextlib.suppress(FileExistsError):      # another run may have made it just now
            folder.mkdir(parents=True)
            return folder


def taken(folder, *names):
    """The files in a folder with one of these names (`*.png`: any figure), complete or half
    written (with `write_whole`'s temporary name)."""
    found = [folder.glob(f"{name}{end}") for name in names for end in ("", ".part")]
    return [path.name for paths in found for path in paths]


def check_writable(folder):
    """Raise UserError if a folder cannot be created or written to."""
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--out {folder} cannot be written, because {nearest} is a file or "
                        "read-only: choose another folder")


def progress(iterable, text):
    """A progress bar on a terminal, if it takes over two seconds."""
    return tqdm(iterable, desc=text, delay=2, leave=False, disable=None)


def tell_epoch(phase, epoch, n, loss):
    """Print a line per epoch if no terminal shows the progress bar."""
    if not sys.stderr.isatty():
        print(f"{phase}: epoch {epoch + 1} of {n}, loss {loss:.4g}", flush=True)


# ------------------------------------------------------------------------- what a method is; main

@dataclass
class Method:
    """A method's three functions, and what the shared code needs to know about it.

    build(args, model, tasks) -> untrained prompts, a module; train(args, model, tasks, run) ->
    trained prompts; classify(args, model, tasks, prompts) -> a dict of arguments of `task_logits`.
    In all of them, args.seeds[0] is the current seed.
    """

    name: str
    Args: type
    doc: str
    build: Callable
    train: Callable
    classify: Callable
    defaults: Callable = lambda args: {}                    # settings that follow from others
    # raises UserError for what the method cannot do; first with tasks=None, before reading data
    check: Callable = lambda args, tasks: None
    prepare: Callable = lambda args, tasks, seed: tasks     # splits the tasks further
    sources: Callable = lambda args, seed: []               # additional tasks to train on
    report: Callable = lambda args, tasks, prompts: {}      # its own part of result.json
    plot: Callable = lambda folder, result, rows: None      # its own figures
    n_text: int | Callable = 0              # vectors before a class name; or a function of args, or
    #                                         of args and tasks
    image_prompts: bool | Callable = False  # whether it needs a ViT; or a function of args
    bound: bool | Callable = False          # whether prompts are tied to the tasks they were
    #                                         trained on; or a function of args
    second_order: bool = False              # whether gradients are differentiated: then
    #                                         --recompute saves no memory

    @property
    def title(self):
        """Its name in tables and figures: "MmAP"."""
        return self.doc.split(":")[0]

    @property
    def command(self):
        """The command that runs it: "mmap.py", or "common.py finetune"."""
        word = self.name.replace("_", "-")
        return f"common.py {word}" if word in COMMANDS else f"{self.name}.py"


def valued(setting, *known):
    """A setting of a Method: a value, or a function of args (n_text's also of args and tasks)."""
    if not callable(setting):
        return setting
    return setting(*known[:len(inspect.signature(setting).parameters)])


def main(method, argv=None):
    """Run a method as a command: validate, then train, save and score each seed, and report.

    With --single-task each task is trained alone, one after another.
    """
    args = parse(method, argv)
    settings = dict(asdict(args), method=method.name, variant=variant_of(method, args),
                    backbone=backbone_of(args.clip))
    args.device = chosen_device(args.device)
    if args.resume and (Path(args.out) / "result.json").exists():
        path = Path(args.out) / "result.json"
        result = load_result(path)
        with usable(path):
            print_table(result)
        close(Path(args.out), result, method.plot if args.plot else None)
        print(f"\nthe run in {args.out} had already finished")
        return
    saved = load_prompts(args.eval, method.name) if getattr(args, "eval", None) else None
    run = None if saved else Run(args, settings)
    tasks, sources = checked_tasks(args, method, saved)
    model = load_backbone(args, method)
    first = tasks[args.seeds[0]]
    method.build(args, model, next(iter(units(args, first).values())))      # rejects what won't fit
    if run:
        run.open(tasks, sources)
        length = ""
        if isinstance(args, TrainArgs):
            length = f"{args.epochs} epoch{'s' * (args.epochs > 1)}, "
        print(f"{method.title} on {args.data}: {len(first)} task{'s' * (len(first) > 1)}, "
              f"{length}{args.clip}, {args.device} -> {run.folder}", flush=True)
    scores = run.finished["scores"] if run else {}
    for seed in args.seeds:
        if seed in scores:
            continue
        one = replace(args, seeds=(seed,))
        trained = {}
        for name, unit in units(args, tasks[seed]).items():
            if run:
                run.start(seed, name)
                trained[name] = method.train(one, model, unit, run)
                close_loader()
            else:
                trained[name] = method.build(one, model, unit)
                with usable(args.eval, "give the --data and --clip it was trained with"):
                    states = saved["prompts"][seed]
                    trained[name].load_state_dict(states[name] if name else states)
        if run:
            run.save_prompts(trained, tasks[seed])
        scores[seed] = scores_of(one, method, model, tasks[seed], trained)
        if run:
            run.finish_seed(scores[seed])
    result = gather(settings, tasks, model, scores)
    if run:
        run.finish(result, method.plot)
    else:
        print_table(result)


def units(args, tasks):
    """What is trained together: {"": all tasks}, or with --single-task {name: [task]} for each."""
    if getattr(args, "single_task", False):
        return {task.name: [task] for task in tasks}
    return {"": tasks}


def scores_of(args, method, model, tasks, trained):
    """The scores of a seed and the method's own results, lists concatenated over `units`."""
    whole = dict(trainable_parameters=0, seconds=0.0)
    for name, unit in units(args, tasks).items():
        prompts = trained[name]
        found = evaluate(args, model, unit, **method.classify(args, model, unit, prompts))
        found.update(method.report(args, unit, prompts))
        found["trainable_parameters"] = sum(
            p.numel() for p in prompts.parameters() if p.requires_grad)
        for key, value in found.items():
            whole[key] = whole[key] + value if key in whole else value
    return whole


def read_log(folder):
    """The rows of a run's log.csv as dicts, with lists parsed and empty cells left out."""
    with usable(folder / "log.csv"), (folder / "log.csv").open(encoding="utf-8") as file:
        return [{key: value if key == "phase" else json.loads(value)
                 for key, value in row.items() if value} for row in csv.DictReader(file)]


def load_backbone(args, method):
    """The CLIP that the settings ask for; UserError for image prompts on a ResNet."""
    model, _ = load_clip(args.clip, args.device)
    check_vit(args, method, hasattr(model.visual, "transformer"))
    model.precision, model.recompute = args.precision, getattr(args, "recompute", False)
    return model


def check_vit(args, method, is_vit):
    """Raise UserError for image prompts on a ResNet."""
    if valued(method.image_prompts, args) and not is_vit:
        raise UserError(f"{method.name} puts prompts into the image encoder, but {args.clip} has a "
                        "ResNet there: use a ViT, such as --clip ViT-B/16")


def divided_tasks(args, data, seed):
    """The tasks of `data`; with `--validate`, held-out training images are the test images."""
    tasks = load_tasks(data, args.split, args.shots, seed, args.root)
    for task in tasks if args.validate else []:
        task.train, task.test = hold_out(task.train, seed)
        if not len(task.test):
            raise UserError(f"--validate finds no image of {task.name} to hold out, because each "
                            "class keeps at least one: train on 2 or more per class")
    return tasks


def checked_tasks(args, method, saved=None):
    """({seed: tasks}, {seed: source tasks}), checked for everything that would fail later.

    Training images are decoded, and kept in memory while there is room (2 GB). saved: the prompts
    to score instead of training.
    """
    check_vit(args, method, not args.clip.startswith("RN"))     # before a download
    if args.download:
        datasets.find_listings(args.data, args.root, download=True)
    first, room = args.seeds[0], 2 * 2**30 // len(args.seeds)
    tasks, sources = {}, {}
    for seed in args.seeds:
        tasks[seed] = method.prepare(args, divided_tasks(args, args.data, seed), seed)
    method.check(args, tasks[first])
    for seed in args.seeds:
        sources[seed] = [] if saved else method.sources(args, seed)
    n_text = valued(method.n_text, args, tasks[first])
    for task in tasks[first] + sources[first]:
        tokenize(task.class_names, n_text)
        tokenize(task.class_names, template=task.template)
    for seed in args.seeds:
        if saved:
            check_saved(args, method, saved, tasks[seed], seed)
            continue
        if sources[seed]:
            seen = set(datasets.trained_on(sources[seed]).tolist())
            reject_seen(tasks[seed], seen, f"the source tasks (seed {seed})")
        lists = [task.train for task in tasks[seed] + sources[seed]]
        datasets.keep_all(lists, room, args.workers)    # raises where one cannot be decoded
    return tasks, sources


def reject_seen(tasks, seen, owner):
    """Raise UserError if a task's test images were trained on; seen: the digests of those that
    were."""
    for task in tasks:
        both = datasets.tested(task, seen)
        if both:
            raise UserError(f"{owner} trained on {len(both)} of the {len(task.test)} test images "
                            f"of {task.name}, such as {both[0]}: give the --split or --shots and "
                            "the seed of that training, or other tasks")


def check_saved(args, method, saved, tasks, seed):
    """Raise UserError if saved prompts lack this seed, are tied to other tasks, or were trained on
    the test images. On the split they were trained on, copies only give a warning."""
    if seed not in saved["prompts"]:
        known = ", ".join(map(str, saved["prompts"]))
        raise UserError(f"{args.eval} has prompts of the seeds {known}, not of {seed}")
    tied = valued(method.bound, args) or getattr(args, "single_task", False)
    if tied and list(saved["tasks"]) != [task.name for task in tasks]:
        raise UserError(f"the prompts in {args.eval} are of other tasks than --data {args.data}, "
                        "or in another order: give the --data they were trained on")
    with usable(args.eval, GIVE_PROMPTS):
        seen, own = set(saved["trained_on"][seed].tolist()), list(saved["contents"][seed])
    for task in tasks:
        if datasets.contents(task) not in own:
            reject_seen([task], seen, f"the prompts in {args.eval} (seed {seed}) were")
            continue
        copies = datasets.tested(task, seen)
        if copies:
            print(f"warning: {len(copies)} of the {len(task.test)} test images of {task.name} are "
                  f"exact copies of images trained on (seed {seed}), such as {copies[0]}",
                  file=sys.stderr)


def script(command):
    """Run a Method, or a function, as a command.

    A UserError prints a line to stderr, exit code 2; Ctrl-C prints how to continue, exit code 130.
    """
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
        return f"continue with --resume --out {Run.latest}" if Run.latest else "start again"

    def stop(line, code=2):
        print(f"{name}: {line}", file=sys.stderr)
        sys.exit(code)

    try:
        if isinstance(command, Method):
            main(command)
        else:
            command()
        sys.stdout.flush()
    except UserError as error:
        stop(error)
    except BrokenPipeError:                 # `... | head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            stop(f"the disk is full ({error.strerror}): free some space, then {go_on()}")
        if error.filename is None:
            raise
        stop(f"cannot open {error.filename} ({error.strerror}): use another path or fix its "
             "permissions")
    except torch.cuda.OutOfMemoryError:
        recompute = f"{go_on()} with --recompute, or "
        if getattr(command, "second_order", False):
            recompute = ""
        stop(f"the GPU's memory is full: {recompute}start again with a smaller --batch-size")
    except KeyboardInterrupt:
        stop(f"stopped; {go_on()}" if Run.latest else "stopped", 130)


# ------------------------------------------------------------------- results, tables and figures

MATRICES = ["similarity", "affinity", "transfer"]       # a row is a source task, a column a target
# the settings that must be equal for a run to be compared with a paper's column or another run;
# UNSAID: their values if a column does not give them
TRAINING = "epochs lr batch_size batches n_ctx views min_crop warm_up".split()
SETTINGS = ["method", "variant", "data", "split", "shots", "clip", *TRAINING]
UNSAID = dict(batches="tasks", views=0, min_crop=0.08, warm_up=0)


def gather(settings, tasks, model, scores):
    """The contents of result.json, from each seed's scores; a method's own keys are lists over
    seeds."""
    done = [scores[seed] for seed in settings["seeds"]]
    first = tasks[settings["seeds"][0]]
    names = [task.name for task in first]
    zero_shot = {n: [d["zero_shot"][i] for d in done] for i, n in enumerate(names)}
    result = {key: settings[key] for key in ("method", "data", "split", "shots", "clip")}
    result.update(
        seeds=list(settings["seeds"]),
        tasks=names,
        tests=[datasets.tests_of(tasks[seed]) for seed in settings["seeds"]],
        metrics={task.name: getattr(task.metric, "__name__", task.metric) for task in first},
        zero_shot={n: statistics.mean(values) for n, values in zero_shot.items()},
        zero_shot_by_seed=zero_shot,
        accuracy={n: [d["accuracy"][i] for d in done] for i, n in enumerate(names)},
        average=[statistics.mean(d["accuracy"]) for d in done],
        trainable_parameters=done[0]["trainable_parameters"],
        parameters_by_seed=[d["trainable_parameters"] for d in done],
        clip_parameters=sum(p.numel() for p in model.parameters()),
        seconds=[d["seconds"] for d in done],
    )
    for key in done[0].keys() - result.keys():
        result[key] = [d[key] for d in done]
    return dict(result, versions=versions(), hardware=hardware(model), settings=settings)


def versions():
    """The Python, torch, torchvision and commit of this repository that a run was made with."""
    found = dict(python=platform.python_version(), torch=torch.__version__,
                 torchvision=metadata.version("torchvision"))
    if (HERE / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            found["commit"] = subprocess.run(
                ["git", "-C", HERE, "describe", "--always", "--dirty", "--abbrev=40"],
                capture_output=True, text=True, check=True).stdout.strip()
    return found


def hardware(model):
    """The name of the device that a model is on."""
    device = model.logit_scale.device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {platform.machine()}, {torch.get_num_threads()} threads"


def mean_std(values):
    """`85.2 ± 0.4` from % over seeds (sample standard deviation), or `85.2` from one."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def paper_columns(result):
    """The columns of the papers' tables with the settings of a result, and if there are none the
    first that differs in one setting: ([column], (column, setting) or None).

    Only the settings that the method has are compared.
    """
    settings = result["settings"]
    if settings["validate"]:
        return [], None
    columns = json.loads((HERE / "data" / "paper_results.json").read_text("utf-8"))["columns"]
    keys = [key for key in SETTINGS if key in settings]
    same, near = [], None
    for column in columns:
        differ = [key for key in keys if column.get(key, UNSAID.get(key)) != settings[key]]
        if not differ:
            same.append(column)
        elif len(differ) == 1 and differ[0] in TRAINING:
            near = near or (column, differ[0])
    return same, None if same else near


def one_decimal(printed):
    """`75.84 ± 0.50` as `75.8 ± 0.5`: HiPro and MVLPT print two decimals."""
    def rounded(number):
        return str(Decimal(number[0]).quantize(Decimal("0.1"), ROUND_HALF_UP))
    return re.sub(r"\d+\.\d+", rounded, printed)


def letters(name):
    """A name in lower-case letters and digits: "CIFAR-100" and "CIFAR100" are the same task."""
    return "".join(filter(str.isalnum, name)).lower()


def aligned(rows):
    """Rows of cells as text: the first column left-aligned, the others right-aligned."""
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def measured(result):
    """What the numbers of a result measure: "accuracy (VOC2007: 11-point mAP)"."""
    others = [f"{task}: {metric}" for task, metric in result["metrics"].items()
              if metric != "accuracy"]
    what = "accuracy on held-out training images" if result["settings"]["validate"] else "accuracy"
    return what + (f" ({', '.join(others)})" if others else "")


def print_table(result):
    """Print the closing table: rows are tasks and their average; columns are zero-shot CLIP, the
    method and the papers."""
    settings = result["settings"]
    papers, near = paper_columns(result)
    average = statistics.mean(result["zero_shot"].values())
    rows = [["", "zero-shot"], *([name, f"{result['zero_shot'][name]:.1f}"]
                                 for name in result["tasks"]), ["average", f"{average:.1f}"]]
    if settings.get("templates") != "single":           # else they are zero-shot CLIP's own
        cells = [mean_std(result["accuracy"][name]) for name in result["tasks"]]
        for row, cell in zip(rows, [result["method"], *cells, mean_std(result["average"])]):
            row.append(cell)
    for paper in papers:
        rows[0].append(f"{paper['paper']}, {paper['table']}, {paper['column']}")
        printed = {letters(name): one_decimal(number) for name, number in paper["results"].items()}
        for row in rows[1:]:
            row.append(printed.get(letters(row[0]), ""))
    print("\n" + aligned(rows))
    for paper in papers:
        if "note" in paper:
            print(f"\n{paper['paper']}, {paper['table']}, {paper['column']}: {paper['note']}")
    if near:
        column, key = near
        print(f"\nnot the column {column['column']} of {column['paper']}'s {column['table']}: "
              f"{key} {settings[key]}, the paper {column.get(key, UNSAID.get(key))}")
    line = f"{measured(result)} in %, seeds {' '.join(map(str, result['seeds']))}"
    if result["trainable_parameters"]:
        share = 100 * result["trainable_parameters"] / result["clip_parameters"]
        count = f"{result['trainable_parameters']:,} trainable parameters ({share:.2f}% of CLIP's)"
        line = f"{count}; {line}"
    if settings.get("eval"):
        line += f"; scored from {settings['eval']}"
    elif result["trainable_parameters"]:
        line += f"; trained in {statistics.mean(result['seconds']):.0f} s per seed"
    print(f"\n{line}")
    for key in MATRICES:
        for seed, matrix in zip(result["seeds"], result.get(key, [])):
            symmetric = np.allclose(matrix, np.transpose(matrix), rtol=1e-4)
            sides = "" if symmetric else " (rows are sources, columns targets)"
            print(f"\n{key}, seed {seed}{sides}")
            print(aligned([[name, *(f"{x:.3g}" for x in row)]
                           for name, row in zip(result["tasks"], matrix)]))


def pyplot():
    """matplotlib.pyplot, imported only when a figure is drawn.

    Lines differ in colour, dashes and hollow markers, so that overlapping ones can be told apart.
    """
    os.environ["MPLBACKEND"] = "agg"            # whatever a notebook left there
    import matplotlib.pyplot
    matplotlib.rcParams["lines.markerfacecolor"] = "none"
    matplotlib.rcParams["axes.prop_cycle"] = matplotlib.cycler(
        color=matplotlib.colormaps["tab10"].colors * 6, linestyle=["-", "--", "-.", ":"] * 15,
        marker=list("osD^vp") * 10)
    return matplotlib.pyplot


def save_figure(figure, path):
    """Save a matplotlib figure as a PNG file, with `write_whole`, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, bbox_inches="tight")
    write_whole(path, buffer.getvalue())
    pyplot().close(figure)


def legend_beside(axis):
    """A legend to the right of a panel, where it covers nothing."""
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def plot_run(folder, result, plot):
    """accuracy.png, loss.png, losses.png (by task), a figure per matrix, and the method's own."""
    import pandas
    names = result["tasks"]
    rows = read_log(folder)
    plt = pyplot()
    accuracy = pandas.DataFrame(result["accuracy"])                 # [seeds, tasks]
    bars = pandas.DataFrame({"zero-shot CLIP": result["zero_shot"],
                             method_of_result(result["method"]).title: accuracy.mean()}).loc[names]
    spread = np.array([[0.0] * len(names), accuracy.std().fillna(0)[names]])
    axes = bars.plot.bar(yerr=spread, figsize=(2.5 + 0.7 * len(names), 4), width=0.8,
                         ylabel="accuracy (%)")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    legend_beside(axes)
    save_figure(axes.figure, folder / "accuracy.png")
    curves, panels = {}, {}
    for row in rows:
        label = f"seed {row['seed']}, {row['phase']}"
        if "loss" in row:
            curves.setdefault(label, []).append(row["loss"])
        if len(row.get("losses", [])) == len(names) > 1:
            panels.setdefault(label, []).append(row["losses"])
    if curves:
        figure, axes = plt.subplots(squeeze=False)
        for label, losses in curves.items():
            plot_epochs(axes[0, 0], losses, label)
        if len(curves) < 25:
            legend_beside(axes[0, 0])
        save_figure(figure, folder / "loss.png")
    if panels:
        figure, axes = plt.subplots(1, len(panels), figsize=(1.5 + 4 * len(panels), 3.5),
                                    squeeze=False, layout="tight")
        for axis, (label, losses) in zip(axes[0], panels.items()):
            plot_epochs(axis, losses, names, label)
        legend_beside(axes[0, -1])
        save_figure(figure, folder / "losses.png")
    for key in MATRICES:
        for seed, matrix in zip(result["seeds"], result.get(key, [])):
            plot_matrix(folder / f"{key}-{seed}.png", matrix, names, f"{key}, seed {seed}")
    plot(folder, result, rows)


def plot_epochs(axis, values, label, title="", ylabel="training loss"):
    """A curve over the epochs, or one per task."""
    axis.plot(range(1, len(values) + 1), values, label=label)
    axis.set(title=title, xlabel="epoch", ylabel=ylabel)
    axis.locator_params(axis="x", integer=True, min_n_ticks=1)


def plot_matrix(path, matrix, names, title):
    """A matrix over tasks with its numbers: rows are sources, columns targets. The diagonal has no
    colour, so that the other entries use the whole colour scale."""
    if len(names) < 2:
        return
    figure, axes = pyplot().subplots(figsize=(1.5 + 0.6 * len(names), 1 + 0.6 * len(names)))
    image = axes.imshow(np.where(np.eye(len(names)), np.nan, matrix))
    figure.colorbar(image, fraction=0.046, pad=0.04)
    for i, j in np.ndindex(len(names), len(names)):
        luminance = image.to_rgba(matrix[i][j])[:3] @ np.array([0.299, 0.587, 0.114])
        axes.text(j, i, f"{matrix[i][j]:.3g}", ha="center", va="center", fontsize=7,
                  color="black" if i == j or luminance > 0.5 else "white")
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set_title(title)
    save_figure(figure, path)


# ----------------------------------------------- columns of the papers' tables that train no prompt

@dataclass
class ZeroShotArgs(DataArgs):
    """Zero-shot CLIP: one template or an ensemble of them; seeds only choose the test images."""

    templates: Literal["single", "ensemble"] = "single"  # a task's own, or data/templates.txt's


def no_prompts(*_):
    """The prompts of zero-shot CLIP, which trains nothing: an empty module."""
    return nn.Module()


def zero_shot_classify(args, model, tasks, prompts):
    """The classifiers of one template, or of an ensemble of them."""
    if args.templates == "single":
        return dict(classifiers=zero_shot_classifiers(model, tasks))
    return dict(classifiers=[ensemble(model, task.class_names, templates_of(task, args.data))
                             for task in tasks])


def templates_of(task, data):
    """The templates of a task's ensemble (data/templates.txt): by its name, else the benchmark's,
    else the general ones."""
    known, names = {}, []
    for line in (HERE / "data" / "templates.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            names = [letters(name) for name in line.strip("[] ").split(",")]
        elif line.strip() and not line.startswith("#"):
            for name in names:
                known.setdefault(name, []).append(line.strip())
    return known.get(letters(task.name)) or known.get(letters(data)) or known["other"]


@torch.no_grad()
def ensemble(model, class_names, templates):
    """The classifier [C, D] of several templates: the mean of their unit-length text features,
    normalised again (Radford et al., ICML 2021, Sec. 3.1.4)."""
    total = 0
    for template in templates:                                  # with their own full stops
        try:
            tokens = clip.tokenize([template.format(name) for name in class_names])
        except RuntimeError as error:
            raise UserError(f"{datasets.brief(error)}: give the class a shorter name") from error
        tokens = tokens[:, :int(tokens.argmax(dim=-1).max()) + 1]
        total = total + F.normalize(encode_text(model, tokens), dim=-1)
    return F.normalize(total, dim=-1)


@dataclass
class ProbeArgs(DataArgs):
    """Linear probe: logistic regression on frozen image features, one per task.

    As in CLIP's README, with scikit-learn. The inverse regularisation strength C is the one with
    the smallest cross-entropy on the dataset's validation part or on 20% of the training images,
    held out; never on test images. A class without training images is never predicted.
    """

    eval: str | None = None  # score this prompts.pt instead of training; writes nothing


class Probe(nn.Module):
    """A linear classifier per task on unit-length image features: weights [C_t, D], biases [C_t],
    and the regularisation C [N] that was chosen."""

    def __init__(self, tasks, width):
        super().__init__()
        sizes = [len(task.class_names) for task in tasks]
        self.weights = nn.ParameterList(torch.zeros(n, width) for n in sizes)
        self.biases = nn.ParameterList(torch.full((n,), -1e4) for n in sizes)   # for unseen classes
        self.register_buffer("C", torch.ones(len(tasks)))


def build_probe(args, model, tasks):
    """The untrained classifiers."""
    return Probe(tasks, model.text_projection.shape[1]).to(model.logit_scale.device)


def check_probe(args, tasks):
    """UserError for a task with images of one class."""
    for task in tasks or []:
        if len(set(task.train.classes)) < 2:
            raise UserError(f"the task {task.name} has fewer than 2 classes, but probe needs at "
                            "least 2: leave the task out")


def train_probe(args, model, tasks, run):
    """Fit every task's regression, once C has been chosen."""
    from sklearn.linear_model import LogisticRegression
    probe = build_probe(args, model, tasks)

    def features(images):
        """Features and labels; an image with several labels is repeated for each."""
        x, _, labels = image_features(model, images, workers=args.workers)
        x, labels = F.normalize(x, dim=-1).cpu(), labels.cpu()
        if labels.ndim == 2:
            image, labels = labels.nonzero(as_tuple=True)
            x = x[image]
        return x.numpy(), labels.numpy()

    def fit(x, y, C):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # about few images per class
            return LogisticRegression(C=C, max_iter=1000).fit(x, y)

    def cross_entropy(regression, x, labels):
        scores = np.full((len(x), 1 + max(labels.max(), regression.classes_.max())), -50.0)
        scores[:, regression.classes_] = regression.predict_log_proba(x).clip(-50)
        return -scores[np.arange(len(labels)), labels].mean()

    def fit_all():
        for t, task in enumerate(tasks):
            (part,) = datasets.with_held_out([task], args.seeds[0])
            C = 1.0
            if len(part.val):
                (x, y), held_out = features(part.train), features(part.val)
                C = min((10.0 ** k for k in range(-2, 6)),
                        key=lambda C: cross_entropy(fit(x, y, C), *held_out))
            found = fit(*features(task.train), C)
            weight, bias = torch.tensor(found.coef_), torch.tensor(found.intercept_)
            if len(found.classes_) == 2:        # scikit-learn gives only the second class's
                weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
            probe.C[t] = C
            probe.weights[t].data[found.classes_] = weight.to(probe.weights[t])
            probe.biases[t].data[found.classes_] = bias.to(probe.biases[t])

    run.once("fit", fit_all, probe=probe)
    chosen = ", ".join(f"{task.name} {C:g}" for task, C in zip(tasks, probe.C.tolist()))
    print(f"seed {args.seeds[0]}: regularisation C chosen for {chosen}", flush=True)
    return probe


def classify_probe(args, model, tasks, probe):
    """Linear functions of the image features."""
    return dict(classifiers=[functools.partial(F.linear, weight=weight, bias=bias)
                             for weight, bias in zip(probe.weights, probe.biases)])


def report_probe(args, tasks, probe):
    """The regularisation of every task."""
    return dict(C=probe.C.tolist())


# ------------------------------------------------------------ weights in place of prompts: finetune

@dataclass
class FinetuneArgs(TrainArgs):
    """Fine-tuning: all weights, all biases (BitFit) or CLIP-Adapter, in place of prompts.

    Columns of MmAP's Tables 1 and 2 and of JSCPT's Tables 1 to 3. BitFit (Zaken et al., ACL 2022)
    trains every bias of both encoders. CLIP-Adapter (Gao et al., IJCV 2024) trains a bottleneck D
    -> D/4 -> D on the image feature, mixed with it by a residual ratio. Both use the settings of
    the prompts they are compared with: "consistent hyperparameter settings across all parameter
    efficient tuning methods", SGD (MmAP, Sec. 4.1). The texts are the tasks' templates.

    Choices the papers leave open: full fine-tuning uses AdamW at 1e-5 with weight decay 0.1 on all
    weights (as in Goyal et al., CVPR 2023), because MmAP's rate is meant for few parameters; the
    logit scale is trained and not clamped, and a ResNet's running statistics stay fixed.
    CLIP-Adapter has two layers with biases and one ReLU between them, and one adapter per task,
    which gives MmAP's 0.53 M (0.52 M without biases). JSCPT shares one adapter.
    """

    train: Literal["all", "bias", "adapter"] = "all"  # all weights, all biases, or new adapters
    adapters: Literal["task", "shared"] = "task"  # one per task; JSCPT: "task-shared ... adapters"
    ratio: Share = 0.2  # the residual ratio: the weight of the adapter's output
    lr: Rate = 1e-5  # with --train bias and adapter 0.0035: "a learning rate of 0.0035"
    schedule: Literal["cosine", "constant"] = "cosine"  # JSCPT: "a learning rate fixed at 0.0015"
    single_task: bool = False  # a copy of CLIP (or an adapter) per task, each trained alone


# settings of the built-in backbone
FINETUNE_TINY = dict(
    all=dict(epochs=5, lr=9e-5),
    bias=dict(epochs=10, lr=0.001),
    adapter=dict(epochs=15, lr=0.09, views=8))


def finetune_defaults(args):
    """The settings that depend on what is trained, the backbone and the data."""
    if args.clip == "tiny":
        return dict(FINETUNE_TINY[args.train], min_crop=0.6)
    found = dict(lr=1e-5 if args.train == "all" else 0.0035)
    if args.data.split(":")[0] == "minidomainnet":
        found.update(batch_size=4)
    return found


def check_finetune(args, tasks):
    """UserError for settings that contradict each other."""
    if args.train != "adapter" and (args.adapters, args.ratio) != ("task", 0.2):
        raise UserError("--adapters and --ratio are for --train adapter: leave them out")
    if args.train == "all" and args.schedule != "cosine":
        raise UserError("--schedule is for --train bias and adapter, which SGD trains: leave it "
                        "out")
    if args.single_task and args.adapters == "shared":
        raise UserError("--adapters shared shares one adapter between tasks, but --single-task "
                        "trains each task alone: leave one of them out")


class Weights(nn.Module):
    """What `finetune` trains, and `clip`, the CLIP it is used with.

    "all" and "bias": parameters of a copy of CLIP. "adapter": CLIP-Adapter's bottlenecks after the
    frozen CLIP itself. The state dict holds only what is trained.
    """

    def __init__(self, model, train, n_adapters, ratio):
        super().__init__()
        copied = model if train == "adapter" else copy.deepcopy(model)
        object.__setattr__(self, "clip", copied)        # not registered as a submodule
        self.ratio, width = ratio, model.text_projection.shape[1]
        self.parts = nn.ParameterDict({
            name.replace(".", "/"): parameter.requires_grad_()      # keys must not contain dots
            for name, parameter in copied.named_parameters()
            if train == "all" or train == "bias" and name.endswith("bias")})
        self.adapters = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width // 4), nn.ReLU(), nn.Linear(width // 4, width))
            for _ in range(n_adapters)).to(model.logit_scale.device)

    def adapted(self, x, task):
        """CLIP-Adapter's image features [B, D]: ratio A(x) + (1 - ratio) x, where A is the adapter
        of each image's task [B]."""
        if not len(self.adapters):
            return x
        every = torch.stack([adapter(x) for adapter in self.adapters])          # [adapters, B, D]
        mine = every[task % len(self.adapters), torch.arange(len(x), device=x.device)]
        return self.ratio * mine + (1 - self.ratio) * x


def build_weights(args, model, tasks):
    """The untrained weights: those of CLIP, or new adapters."""
    n_adapters = 0
    if args.train == "adapter":
        n_adapters = len(tasks) if args.adapters == "task" else 1
    return Weights(model, args.train, n_adapters, args.ratio)


def train_weights(args, model, tasks, run):
    """Train weights on all tasks' images; the texts use the tasks' templates."""
    weights = build_weights(args, model, tasks)
    texts = Texts(tasks, templates=True).to(model.logit_scale.device)
    frozen = args.train == "adapter"
    if args.train == "all":
        optimizer = torch.optim.AdamW(weights.parameters(), args.lr, weight_decay=0.1)
        schedule = scheduled(args, optimizer)
    else:
        optimizer, schedule = sgd(args, weights)
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
            run.log(loss=losses.sum(), losses=nan_where_absent(losses, task))
        schedule.step()
    return weights


def classify_weights(args, model, tasks, weights):
    """The trained CLIP, or the frozen one with adapted image features."""
    def adapted(x, t):
        return weights.adapted(x, torch.full((len(x),), t, device=x.device))

    return dict(classifiers=zero_shot_classifiers(weights.clip, tasks), select=adapted,
                tuned=None if args.train == "adapter" else weights.clip)


def tied_to_tasks(args):
    """Whether there is an adapter per task."""
    return args.train == "adapter" and args.adapters == "task"


ZERO_SHOT = Method("zero_shot", ZeroShotArgs, ZeroShotArgs.__doc__, build=no_prompts,
                   train=no_prompts, classify=zero_shot_classify)
PROBE = Method("probe", ProbeArgs, ProbeArgs.__doc__, build_probe, train_probe, classify_probe,
               check=check_probe, report=report_probe, bound=True)
FINETUNE = Method("finetune", FinetuneArgs, FinetuneArgs.__doc__, build_weights, train_weights,
                  classify_weights, defaults=finetune_defaults, check=check_finetune,
                  bound=tied_to_tasks)


def method_of(name):
    """A method by its name: one of this file, or of a method file."""
    known = {method.name: method for method in (ZERO_SHOT, PROBE, FINETUNE)}
    return known.get(name) or load_method(name).METHOD


def method_of_result(name):
    """As `method_of`; if its file is not here, a Method with only its name and shared settings."""
    try:
        return method_of(name)
    except UserError:
        return Method(name, Args, name, None, None, None)


# ---------------------------------------------------------------------------------------- commands

def command_line(name, Args, argv):
    """The settings of a command, by tyro."""
    show_help(argv, Args.__doc__)
    return tyro.cli(tyro.conf.FlagCreatePairsOff[Args], args=list(argv), prog=f"common.py {name}",
                    description="")


@dataclass
class CheckArgs:
    """Is a benchmark complete, and can its images be read?"""

    data: str  # as for training: a benchmark, a folder, name=path, or several
    root: str = "data"  # folder that holds the datasets
    quick: bool = False  # do not decode the images
    workers: int = 0  # processes that read images


def check_data(argv):
    """`python common.py check`: a benchmark's contents and problems (exit code 1 if any)."""
    from data.check import report
    args = command_line("check", CheckArgs, argv)
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
class TableArgs:
    """Gather finished runs into tables: methods as columns, tasks as rows, mean ± sample standard
    deviation over seeds; one table per benchmark, split and backbone."""

    folders: tyro.conf.Positional[tuple[str, ...]] = ("runs",)  # run folders, or their parents
    baseline: str | None = None  # a column: also print the other columns' paired difference to it
    out: str | None = None  # also write table.md and table.csv there
    plot: bool = False  # also draw accuracy against parameters and against shots into --out


def table(argv):
    """`python common.py table runs/`: finished runs side by side, like the papers' tables."""
    args = command_line("table", TableArgs, argv)
    if args.plot and not args.out:
        raise UserError("--plot needs --out DIR, the folder for the figures")
    out = datasets.expand(args.out) if args.out else None
    if out:
        check_writable(out)
    runs = read_runs(args.folders)
    known = list(dict.fromkeys(["zero-shot", *runs.label]))
    baseline = args.baseline
    if baseline and baseline not in known:                      # coop_mt also means CoOp-MT
        alike = ([x for x in known if letters(x) == letters(baseline)]
                 or [x for x in known if letters(x).startswith(letters(baseline))])
        if len(alike) != 1:
            raise UserError(f"--baseline '{baseline}' is not a column: give one of "
                            f"{', '.join(map(repr, known))}")
        baseline = alike[0]
    tables = {title: layout(part, baseline) for title, part in runs.groupby("title")}
    rows = runs.drop(columns="folder").to_csv(index=False)
    if out:
        check_table_folder(out, rows)
    for title, cells in tables.items():
        print(f"\n{title}\n{aligned(as_rows(cells))}")
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "table.csv", rows)
        write_whole(out / "table.md", "\n".join(
            f"**{title}**\n\n{as_markdown(cells)}\n" for title, cells in tables.items()))
        names = ["table.md", "table.csv"]
        if args.plot:
            names += plot_parameters(out, runs) + plot_shots(out, runs)
        print(f"\n{', '.join(names)} are in {out}")


def check_table_folder(out, rows):
    """Raise UserError if a folder holds a file that `table` would replace but did not write.

    It wrote them if there is a table.csv, which is written first, with the columns of `rows`.
    """
    known, columns = out / "table.csv", rows.partition("\n")[0].encode()
    if known.is_file() and known.read_bytes().startswith(columns):
        return
    found = taken(out, "table.csv", "table.md", "parameters.png", "shots.png")
    if found:
        raise UserError(f"--out {out} holds a file that this command did not write ({found[0]}): "
                        "choose another folder")


def read_runs(folders):
    """A data frame with a row per finished run, seed and task (and "average"), oldest run first.

    Runs that differ only in their seeds share a `label`; of two runs with the same seed the later
    counts. Runs with --validate are left out, because they scored other images. UserError for an
    unreadable result.
    """
    import pandas
    rows, validated, paths = [], 0, set()
    for folder in map(datasets.expand, folders):
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}: give the folder of a run, or one that "
                            "contains runs")
        paths |= {path.resolve() for path in folder.rglob("result.json")}
    for path in sorted(paths, key=lambda path: (path.stat().st_mtime, str(path))):
        with usable(path, "remove it, or give other folders"):
            result = load_result(path)
            found = [dict(row, folder=str(path.parent)) for row in rows_of(result)]
            if result["settings"]["validate"]:
                validated += 1
            else:
                rows += found
    if validated:
        print(f"left out: {validated} run{'s' * (validated > 1)} with --validate, scored on "
              "held-out training images", file=sys.stderr)
    if not rows:
        raise UserError(f"no finished run on test images in {', '.join(map(str, folders))}: a run "
                        "writes its result.json when it ends")
    for row in rows:            # a path that was given in an ASCII locale is not valid text
        row.update({key: datasets.printable(value) for key, value in row.items()
                    if isinstance(value, str)})
    runs = by_tests(pandas.DataFrame(rows))
    same = ["title", "label", "seed", "task"]
    for folder in runs[runs.duplicated(same, keep="last")].folder.unique():
        print(f"{folder} has a seed that a later run also has: the later run counts",
              file=sys.stderr)
    return runs.drop_duplicates(same, keep="last")


def by_tests(runs):
    """The runs; a run that scored other classes or test images at a seed than earlier runs with its
    title gets another title, and so another table."""
    groups = {}                                 # title -> [{seed: what was scored}]
    for (title, _), part in runs.groupby(["title", "folder"], sort=False):
        tests = dict(zip(part.seed, part.tests))
        known = groups.setdefault(title, [])
        fits = (i for i, group in enumerate(known)
                if all(group.get(seed, mark) == mark for seed, mark in tests.items()))
        place = next(fits, len(known))
        if place == len(known):
            known.append({})
        known[place].update(tests)
        if place:
            runs.loc[part.index, "title"] = f"{title}, other test images ({place + 1})"
    return runs


def benchmark_of(run):
    """The data, split and backbone of a result, or of settings: "emoji, 6 shots, tiny"."""
    size = "all"
    if run["shots"] is not None:
        size = f"{run['shots']} shot{'s' * (run['shots'] > 1)}"
    if run["split"] is not None:
        size = f"split {run['split']}"
    return f"{run['data']}, {size}, {run['clip']}"


def rows_of(result):
    """The rows of one result.json, per seed and task (and "average"); fails if it is damaged."""
    shared = {key: result["settings"].get(key) for key in (*SETTINGS, "precision")}
    shared.update(title=benchmark_of(result), label=label_of(result["settings"]))
    rows = []
    for i, seed in enumerate(result["seeds"]):
        zero_shot = {task: result["zero_shot_by_seed"][task][i] for task in result["tasks"]}
        accuracy = {task: result["accuracy"][task][i] for task in result["tasks"]}
        for scores in (zero_shot, accuracy):
            scores["average"] = statistics.mean(scores.values())
        for task in accuracy:
            rows.append(dict(shared, task=task, seed=seed, tests=result["tests"][i],
                             parameters=result["parameters_by_seed"][i],
                             seconds=result["seconds"][i],
                             zero_shot=zero_shot[task], accuracy=accuracy[task]))
    return rows


def saved_args(method, settings):
    """A method's settings from those saved with a run; settings the method lacks are left out."""
    known = {field.name for field in fields(method.Args)}
    return method.Args(**{key: value for key, value in settings.items() if key in known})


def label_of(settings):
    """The name of a run's column: its method, and the settings that differ from its defaults.

    A run of zero-shot CLIP with one template is the column "zero-shot" that every table has.
    """
    method = method_of_result(settings["method"])
    args = saved_args(method, settings)
    usual = replace(method.Args(), **method.defaults(args))
    words = [settings["variant"]] if settings["variant"] else []
    for key in (*TRAINING, "precision"):
        value = getattr(args, key, None)
        if key in settings and value != getattr(usual, key, None):
            words.append(said(key, value))
    label = ", ".join([method.title, *words]).replace("with --", "--")
    return "zero-shot" if label == ZERO_SHOT.title else label


def layout(part, baseline=None):
    """A table of cells: a row per task, then average, seeds, parameters and training time per seed;
    a column per label.

    With a baseline also "minus baseline": the mean difference of the averages, paired by seed, and
    its standard error.
    """
    import pandas
    zero_shot = part.drop_duplicates(["task", "seed"])
    zero_shot = zero_shot.assign(label="zero-shot", accuracy=zero_shot.zero_shot, parameters=0,
                                 seconds=0)
    every = pandas.concat([zero_shot, part[part.label != "zero-shot"]])
    scores = every.groupby(["task", "label"], sort=False).accuracy.apply(list).unstack()
    tasks = [task for task in dict.fromkeys(every.task) if task != "average"]
    cells = scores.loc[[*tasks, "average"], list(dict.fromkeys(every.label))]
    cells = cells.map(lambda values: mean_std(values) if isinstance(values, list) else "")
    columns = every.groupby("label")
    cells.loc["seeds"] = columns.seed.unique().map(lambda x: " ".join(map(str, sorted(x))))
    cells.loc["parameters"] = columns.parameters.unique().map(
        lambda x: " to ".join(f"{count:,}" for count in sorted({min(x), max(x)})))
    cells.loc["training, s per seed"] = columns.seconds.mean().map("{:,.0f}".format)
    if baseline:
        averages = every[every.task == "average"].pivot_table("accuracy", "seed", "label")
        minus = averages.sub(averages[baseline], axis=0).drop(columns=baseline)
        cells.loc[f"minus {baseline}"] = minus.apply(lambda column: paired(column.dropna()))
    return cells.fillna("")


def paired(differences):
    """`+1.2 ± 0.3`: the mean of differences and its standard error, or `+1.2` for a single one."""
    if not len(differences):
        return ""
    error = f" ± {differences.sem():.1f}" if len(differences) > 1 else ""
    return f"{differences.mean():+.1f}{error}"


def as_rows(cells):
    """The rows of a table of cells, with its header and row names."""
    return [["", *cells.columns], *([name, *row] for name, row in zip(cells.index, cells.values))]


def as_markdown(cells):
    """A table of cells in Markdown."""
    head, *rows = as_rows(cells)
    lines = [[str(cell).replace("|", "\\|") for cell in row]
             for row in (head, ["---"] * len(head), *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot_parameters(out, runs):
    """parameters.png: average accuracy against trainable parameters (MmAP, Figure 1)."""
    runs = runs[(runs.task == "average") & (runs.parameters > 0)]
    if runs.empty:
        return []
    titles = runs.groupby("title", sort=False)
    figure, axes = pyplot().subplots(1, len(titles), figsize=(6 * len(titles), 4.5), squeeze=False,
                                     layout="tight")
    for axis, (title, part) in zip(axes[0], titles):
        for name, column in part.groupby("label", sort=False):
            axis.errorbar(column.parameters.iloc[-1], column.accuracy.mean(),
                          column.accuracy.std() if len(column) > 1 else None, fmt="o", label=name)
        axis.axhline(part.drop_duplicates("seed").zero_shot.mean(), color="grey", linestyle="--",
                     label="zero-shot CLIP")
        axis.set(xscale="log", xlabel="trainable parameters", ylabel="average accuracy (%)",
                 title=title)
        counts = sorted(part.parameters.unique())
        axis.set_xticks(counts, [f"{n:,}" for n in counts], rotation=60)
        axis.minorticks_off()
        legend_beside(axis)
    save_figure(figure, out / "parameters.png")
    return ["parameters.png"]


def plot_shots(out, runs):
    """shots.png: gain over zero-shot CLIP by images per class, mean ± standard error over seeds;
    the average large, the tasks small (MmAP, Figure 4; HiPro, Figure 6)."""
    runs = runs[runs.shots.notna() & (runs.label != "zero-shot")]
    runs = runs.assign(gain=runs.accuracy - runs.zero_shot)
    groups = [part for _, part in runs.groupby(["data", "clip"]) if part.shots.nunique() > 1]
    if not groups:
        return []
    figure = pyplot().figure(figsize=(11, 5 * len(groups)), layout="constrained")
    for panels, part in zip(figure.subfigures(len(groups), squeeze=False)[:, 0], groups):
        tasks = [name for name in part.task.unique() if name != "average"]
        side = math.ceil(math.sqrt(len(tasks)))
        grid = panels.add_gridspec(side, 2 * side)
        large = panels.add_subplot(grid[:, :side])
        plot_gains(large, part[part.task == "average"], markersize=6)
        data, backbone = part[["data", "clip"]].iloc[0]
        large.set(title="average", xlabel=f"images per class ({data}, {backbone})",
                  ylabel="gain over zero-shot CLIP (points)")
        large.legend(fontsize=8)
        for i, name in enumerate(tasks):
            small = panels.add_subplot(grid[i // side, side + i % side])
            plot_gains(small, part[part.task == name], markersize=3)
            small.set_title(name, fontsize=8)
            small.tick_params(labelsize=7)
    save_figure(figure, out / "shots.png")
    return ["shots.png"]


def plot_gains(axis, part, markersize):
    """A point per column at each number of shots, side by side; columns of the same method share a
    colour and differ in markers and dashes."""
    def method(label):
        return label.split(",")[0]
    shots, labels = sorted(part.shots.unique()), list(part.label.unique())
    methods = list(dict.fromkeys(map(method, labels)))
    labels.sort(key=lambda label: methods.index(method(label)))
    gains = part.groupby(["label", "shots"]).gain
    means, errors = gains.mean().unstack(), gains.sem().unstack()
    for i, label in enumerate(labels):
        number = methods.index(method(label))
        variant = sum(method(other) == method(label) for other in labels[:i])
        place = 0.8 * ((i + 0.5) / len(labels) - 0.5)
        axis.errorbar([place + k for k in range(len(shots))], means.loc[label, shots],
                      errors.loc[label, shots], label=label, color=f"C{number % 10}",
                      marker="os^Dv"[variant % 5], linestyle=("-", "--", "-.", ":")[variant % 4],
                      markersize=markersize, linewidth=0.8)
    axis.axhline(0, color="grey", linestyle="--", linewidth=0.8)
    axis.set_xticks(range(len(shots)), [f"{n:g}" for n in shots])


@dataclass
class PredictArgs:
    """The most likely classes of images, by any method's saved prompts; needs no dataset."""

    prompts: tyro.conf.Positional[str]  # the prompts.pt of a run
    images: tyro.conf.Positional[tuple[str, ...]]  # image files
    task: str | None = None  # the images' task, if there are several
    clip: str | None = None  # backbone, if its file has moved
    device: str | None = None  # cpu, cuda, ...; None: CUDA if available


def predict(argv):
    """`python common.py predict CKPT IMAGE...`: the five most likely classes, in %."""
    given = command_line("predict", PredictArgs, argv)
    path = datasets.expand(given.prompts)
    saved = load_prompts(path)
    names = list(saved["tasks"])
    chosen = given.task or names[0]
    if given.task is None and len(names) > 1:
        raise UserError(f"{path} has {len(names)} tasks: give the images' task with --task: "
                        f"{', '.join(names)}")
    if chosen not in names:
        raise UserError(f"{path} has no task '{chosen}'{datasets.nearest(chosen, names)}: "
                        f"give --task one of {', '.join(names)}")
    files = [str(datasets.expand(image)) for image in given.images]
    if not files:
        raise UserError("there is nothing to predict: give image files")
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"there is no image {file}: give image files")
        read_image(file)
    with usable(path, GIVE_PROMPTS):
        method = method_of(saved["method"])
        seed = next(iter(saved["prompts"]))
        settings = dict(saved["settings"], seeds=(seed,), workers=0, device=given.device,
                        eval=str(path), resume=False)
        settings["clip"] = given.clip or settings["clip"]
        args = absolute(saved_args(method, settings))
        check_ranges(args)
        tasks, states = [], saved["prompts"][seed]
        for name, class_names in saved["tasks"].items():
            images = Images(files, [0] * len(files), crop=saved["crops"][name])
            tasks.append(Task(name, class_names, saved["templates"][name], images, images))
        if getattr(args, "single_task", False):
            tasks, states = [tasks[names.index(chosen)]], states[chosen]
    check_backbone(saved["settings"], args.clip, path)
    args.device = chosen_device(args.device)
    model = load_backbone(args, method)
    with usable(path, "give the --clip it was trained with"):
        prompts = method.build(args, model, tasks)
        prompts.load_state_dict(states)
    t = [task.name for task in tasks].index(chosen)
    found, _, _ = task_logits(args, model, tasks, t, **method.classify(args, model, tasks, prompts))
    print(f"{chosen}, seed {seed}, %")
    for file, row in zip(files, found.float().softmax(dim=-1).cpu()):
        print(f"\n{file}")
        for p, k in zip(*(x.tolist() for x in row.topk(min(5, len(row))))):
            print(f"{100 * p:6.1f}  {saved['tasks'][chosen][k]}")


@dataclass
class ShowArgs:
    """What a run's prompts are: method, settings, tasks, groups and scores."""

    prompts: tyro.conf.Positional[str]  # the prompts.pt of a run, or its folder


def show(argv):
    """`python common.py show CKPT`: what a run's prompts are, and their scores.

    Scores and groups come from the result.json beside them.
    """
    path = datasets.expand(command_line("show", ShowArgs, argv).prompts)
    path = path / "prompts.pt" if path.is_dir() else path
    saved = load_prompts(path)
    result = None
    if path.with_name("result.json").is_file():
        result = load_result(path.with_name("result.json"))
    with usable(path.parent, GIVE_PROMPTS):
        print(f"{label_of(saved['settings'])}\n{benchmark_of(saved['settings'])}")
        rows = [[name, f"{len(classes)} classes"] for name, classes in saved["tasks"].items()]
        if result:
            rows = [[*row, mean_std(result["accuracy"][row[0]])] for row in rows]
            rows.append(["average", "", mean_std(result["average"])])
        print(f"\n{aligned(rows)}\n\nseeds {' '.join(map(str, saved['prompts']))}")
        if not result:
            print(f"no scores: there is no result.json in {path.parent}")
            return
        print(f"{measured(result)} in %; {result['trainable_parameters']:,} parameters")
        for key in ("groups", "nodes"):
            for seed, groups in zip(result["seeds"], result.get(key, [])):
                named = ["[" + ", ".join(group) + "]" for group in groups]
                print(f"{key}, seed {seed}: {'  '.join(named) or 'none'}")


COMMANDS = {"check": check_data, "zero-shot": ZERO_SHOT, "probe": PROBE, "finetune": FINETUNE,
            "table": table, "predict": predict, "show": show}


def commands(argv=None):
    """`python common.py check|zero-shot|probe|finetune|table|predict|show ...`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    usage = f"usage: python common.py {'|'.join(COMMANDS)} ...   (each has --help)"
    if not argv:
        raise UserError(usage)
    word, *rest = argv
    if word in ("-h", "--help"):
        print(f"{usage}\n")
        for name, command in COMMANDS.items():
            is_method = isinstance(command, Method)
            text = command.doc if is_method else command.__doc__.partition(": ")[2]
            print(f"{name:11}{text.splitlines()[0]}")
        return
    if word not in COMMANDS:
        raise UserError(f"unknown command '{word}'{datasets.nearest(word, list(COMMANDS))}: use "
                        f"one of {', '.join(COMMANDS)}, or a method's file")
    command = COMMANDS[word]
    if isinstance(command, Method):
        main(command, rest)
    else:
        command(rest)


if __name__ == "__main__":
    from common import commands as of_common  # the module `common`, not this copy as __main__
    from common import script as of_script
    of_script(of_common)
