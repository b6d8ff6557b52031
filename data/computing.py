"""How the two encoders compute: their precision, the memory of a step, compilation. `common` passes these names on.

What the command line asks for (`--amp`, `--max-mem`, `--compile`) is noted on the model (`set_up`), so that the encoders find
it there and the method files need not pass it around. A model without such notes computes in float32 and in one piece on a CPU.
"""
import contextlib
import functools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from common import UserError

KEPT = 16           # floats that a backward pass needs for each token, layer and unit of width; measured 14.0 without the edges


def autocast(model):
    """Autocast on CUDA, to bfloat16 where the card has it and else to float16 (see `scaled`); on a CPU to bfloat16 for `--amp`.

    Weights and prompts stay float32. So does all where a gradient is differentiated once more without bfloat16.
    """
    device = model.logit_scale.device.type
    card = device == "cuda" and torch.cuda.is_available()
    if card and torch.cuda.is_bf16_supported(including_emulation=False) or device == "cpu" and getattr(model, "amp", False):
        return torch.autocast(device, torch.bfloat16)
    return torch.autocast(device, torch.float16) if card and not second_derivatives() else contextlib.nullcontext()


def scaled(encode):
    """Let gradients pass an encoder in float16, whose small numbers are zero, times a power of two that prompts take back.

    This is the loss scaling of mixed precision, with the scale chosen in each backward pass, from the gradient that arrives at the
    features, and inside the encoder: training loops need not know of it.
    """
    @functools.wraps(encode)
    def encoder(model, rows, prompts=None):
        device = model.logit_scale.device.type
        half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        if not half or prompts is None or not (torch.is_grad_enabled() and prompts.requires_grad):
            return encode(model, rows, prompts)
        scale = None

        def up(gradient):                   # its largest number comes to 8 to 16, of the 65,504 and 0.00006 that float16 has
            nonlocal scale
            scale = 2 ** torch.floor(torch.log2(16 / gradient.abs().amax().clamp(min=1e-30)))
            return gradient * scale
        entering = prompts.view_as(prompts)
        entering.register_hook(lambda gradient: gradient / scale)
        features = encode(model, rows, entering).float()
        features.register_hook(up)
        return features.view_as(features)                                       # whose own gradient is as it is
    return encoder


def fused_attention(q, k, v, causal):
    """Fused attention on q, k, v [rows, heads, tokens, width / heads]; in float32 on a CPU, where a half's backward pass is slow."""
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=causal)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def set_up(model, args, block):
    """Note on a model what `--amp`, `--max-mem` (GB; on a card by itself nine tenths of what is free) and `--compile` ask for.

    block: the function that computes one layer, which `--compile` compiles. UserError where there is no compiler.
    """
    device = model.logit_scale.device
    model.amp, model.max_mem = args.amp, args.max_mem
    if args.max_mem is None and device.type == "cuda":
        model.max_mem = 0.9 * torch.cuda.mem_get_info(device)[0] / 2**30
        print(f"a step may take {model.max_mem:.1f} GB of the card (--max-mem); texts and images that need more go in pieces", flush=True)
    if args.compile:
        model.block = compiled(block, device)


def compiled(block, device):
    """`block` compiled by torch; where second derivatives are wanted, which compiled code has not, as it is."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(2, device=device))
    except Exception as error:              # no compiler, no headers, no Triton: each fails in its own way
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"--compile finds no compiler that works ({reason}): install one, such as g++, or leave out --compile") from error
    fast = torch.compile(block, dynamic=True)
    return lambda *layer, **how: (block if second_derivatives() else fast)(*layer, **how)


def second_derivatives():
    """Whether fused attention is switched off, as it has to be where a gradient is differentiated once more."""
    return not torch.backends.cuda.flash_sdp_enabled()


def in_pieces(encode):
    """Let an encoder take only as many rows (texts, images) at once as fit half of `model.max_mem`, one half for each encoder.

    In training the backward pass then computes each piece again instead of keeping what it needs of all of them: the same features
    and gradients, in the memory of one piece and with another forward pass. Differentiating a gradient once more (JSCPT's upper
    step) keeps the pieces after all.
    """
    @functools.wraps(encode)
    def encoder(model, rows, prompts=None):
        room = getattr(model, "max_mem", None)
        if room is None or rows.ndim != 2 and not hasattr(model.visual, "transformer"):         # a ResNet's is not known
            return encode(model, rows, prompts)
        trained = prompts is not None and torch.is_grad_enabled() and prompts.requires_grad
        most = max(1, int(room * 2**30 / 2 / bytes_a_row(model, rows, prompts, trained)))
        if len(rows) <= most:
            return encode(model, rows, prompts)
        plain = second_derivatives()

        def piece(rows, prompts):
            with sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext():       # computed again, it does the same
                return encode(model, rows, prompts)
        compute = functools.partial(checkpoint, piece, use_reentrant=False, preserve_rng_state=False) if trained else piece
        return torch.cat([compute(rows[i:i + most], prompts if prompts is None or prompts.ndim == 3 else prompts[:, i:i + most])
                          for i in range(0, len(rows), most)])
    return encoder


def bytes_a_row(model, rows, prompts, trained):
    """What a text (rows [C, T]) or an image (rows [B, 3, H, W]) keeps: all layers' for a backward pass, else two at a time."""
    if rows.ndim == 2:
        tokens, part = rows.shape[1], model.transformer
    else:
        tokens, part = len(model.visual.positional_embedding) + (0 if prompts is None else prompts.shape[-2]), model.visual.transformer
    return 4 * KEPT * tokens * part.width * (len(part.resblocks) if trained else 2)
