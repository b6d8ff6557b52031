"""Pretrain `tiny`, a CLIP of 10 M parameters that knows drawings, on the sets that
`collect_drawings.py` rasterised.

    python data/build/pretrain_tiny.py --drawings /tmp/tiny/drawings.npz \\
        --state /tmp/tiny/state.pt --minutes 100
    python data/build/pretrain_tiny.py ... --minutes 0 --export data/tiny_clip.pt

The first command trains, saves its state every few minutes and continues from it when run again
with the same flags. The learning rate follows the clock (warm-up, then a cosine over `--minutes`,
counted over all runs), so the training time is known in advance. The second command writes the
averaged weights in half precision, the format that `clip.load(path)` reads.

A step takes `CONCEPTS` concepts and two drawings of each, from different sets if there are two,
with one caption: both styles are matched to the same text, and the text encoder does half the work.
Captions vary in length, so that a name is seen at every text position that learned prompts will
push it to. Besides CLIP's contrastive loss, both encoders are pulled towards one learned anchor per
concept and away from those of all other concepts, not only those in the batch; the anchors are
discarded at the end. Memory grows by about 0.1 GB a minute and is freed when a run ends.
"""

import argparse
import functools
import json
import math
import os
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import packaging.version
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

CONCEPTS, VIEWS, EMOJI_SHARE = 96, 2, 0.65
ANCHOR_SCALE = 20.0
LR, WEIGHT_DECAY, WARMUP, EMA = 1e-3, 0.1, 0.05, 0.998
# no long captions in the first SHORT_ONLY of the training: starting with only them stays at chance
LONG_EVERY, SHORT_ONLY = 2, 0.12
LENGTHS = (20, 60)  # two text lengths only: every new shape costs memory that is never freed
TEMPLATES = [
    "{}",
    "a {}",
    "a drawing of a {}",
    "an icon of a {}",
    "a picture of a {}",
    "a photo of a {}",
    "an image of a {}",
    "a simple drawing of a {}",
    "a {} in a cartoon style",
    "a small picture that shows a {}",
    "the {}",
    "this is a {}",
    "a black and white drawing of a {}",
    "clip art of a {}",
    "a colourful {}",
    "one of many drawings of a {}",
]
FILLER = """a the of in and with this that here is one picture drawing icon image simple small large
nice clean old new black white
    colour style sheet set series page shows you see we can find from some many very just another
    made by hand for use on web
    print book sign symbol art design flat line outline shape""".split()


def build(seed):
    from clip.model import CLIP

    torch.manual_seed(seed)
    model = CLIP(
        embed_dim=192,
        image_resolution=48,
        vision_layers=6,
        vision_width=192,
        vision_patch_size=8,
        context_length=77,
        vocab_size=49408,
        transformer_width=128,
        transformer_heads=2,
        transformer_layers=6,
    )
    return model.float()


def encode_text(model, tokens):
    """Text features [B, D] of tokens [B, T]; T may be below `model.encode_text`'s 77."""
    T = tokens.shape[1]
    mask = model.transformer.resblocks[0].attn_mask[:T, :T]
    x = (model.token_embedding(tokens) + model.positional_embedding[:T]).transpose(0, 1)
    for block in model.transformer.resblocks:
        y = block.ln_1(x)
        x = x + block.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        x = x + block.mlp(block.ln_2(x))
    x = model.ln_final(x).transpose(0, 1)                       # [B, T, d]
    return x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ model.text_projection


@functools.cache
def clip_words():
    """The longer words of CLIP's vocabulary. Most occur nowhere else in the training, so they stay
    as meaningless as a prompt's random vectors."""
    import clip

    return [
        w[:-4]
        for w in clip.clip._tokenizer.encoder
        if w.endswith("</w>") and w[:-4].isalpha() and len(w) > 6
    ]


def caption(concept, vocabulary, rng, long):
    """A caption of a concept: its label, tags or subgroup, alone or together, after filler of any
    length if `long`."""
    parts = (
        [concept["label"]]
        + rng.sample(concept["tags"], min(len(concept["tags"]), 3))
        + [concept["group"]] * bool(concept["group"])
    )
    pick = rng.random()
    if pick < 0.45 or len(parts) == 1:
        text = concept["label"]
    elif pick < 0.65 and concept["group"]:
        text = concept["group"]
    elif pick < 0.8:
        text = rng.choice(parts)
    else:
        rng.shuffle(parts)
        text = " ".join(parts[: rng.randint(2, 4)])
    if rng.random() < 0.6:
        text = rng.choice(TEMPLATES).format(text)
    if long:  # the name lands anywhere up to about position 50
        source = rng.choice([FILLER, vocabulary, clip_words(), FILLER + 4 * concept["tags"]])
        text = " ".join(rng.choices(source, k=rng.randint(0, 42)) + [text])
    if rng.random() < 0.15:
        text += " " + " ".join(rng.choices(FILLER, k=rng.randint(1, 4)))
    return text + ("." if rng.random() < 0.5 else "")


def tokenize(texts, length):
    import clip

    tokenizer = clip.clip._tokenizer
    rows = torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in zip(rows, texts):
        ids = tokenizer.encode(text)[-(length - 2) :]  # the name is at the end: cut the filler
        row[: len(ids) + 2] = torch.tensor(
            [tokenizer.encoder["<|startoftext|>"], *ids, tokenizer.encoder["<|endoftext|>"]]
        )
    return rows


def augment(images, generator, train=True):
    """uint8 [B, 64, 64, 3] -> float [B, 3, 48, 48] with CLIP's normalisation; in training, with
    random geometry and colour."""
    x = images.permute(0, 3, 1, 2).float() / 255
    B = len(x)
    rand = functools.partial(torch.rand, generator=generator)
    if train:
        pick = rand(B)
        grey = x.mean(1, keepdim=True)
        level = 0.35 + 0.45 * rand(B, 1, 1, 1)
        binary = torch.sigmoid((grey - level) * 40).expand_as(
            x
        )  # black and white drawings made from colour ones
        shift = F.avg_pool2d(grey, 3, stride=1, padding=1)
        edges = (1 - 6 * (grey - shift).abs()).clamp(0, 1).expand_as(x)  # ... and line drawings
        x = torch.where((pick < 0.15)[:, None, None, None], binary, x)
        x = torch.where(((pick >= 0.15) & (pick < 0.2))[:, None, None, None], edges, x)
        x = torch.where(((pick >= 0.2) & (pick < 0.3))[:, None, None, None], grey.expand_as(x), x)
        mono = (x.amax((1, 2, 3)) - x.amin((1, 2, 3)) > 0) & (
            (x.amax(1) - x.amin(1)).amax((1, 2)) < 0.02
        )
        ink, paper = (
            rand(B, 3, 1, 1) * rand(B, 1, 1, 1),
            1 - 0.3 * rand(B, 3, 1, 1) * rand(B, 1, 1, 1),
        )
        dye = mono & (rand(B) < 0.35)  # coloured ink on coloured paper
        x = torch.where(dye[:, None, None, None], ink + (paper - ink) * x, x)
        x = torch.where((mono & (rand(B) < 0.08))[:, None, None, None], 1 - x, x)
        gain, bias = 0.75 + 0.5 * rand(B, 1, 1, 1), 0.2 * (rand(B, 1, 1, 1) - 0.5)
        mix = torch.eye(3) + 0.25 * (rand(B, 3, 3) - 0.5) * (rand(B, 1, 1) < 0.5)
        x = torch.einsum("bij,bjhw->bihw", mix, x)
        x = (1 - (1 - x) * gain + bias * (rand(B, 1, 1, 1) < 0.3)).clamp(0, 1)
        angle, scale = (rand(B) - 0.5) * 0.4, 0.8 + 0.4 * rand(B)
        aspect, flip = 1 + 0.3 * (rand(B) - 0.5), torch.where(rand(B) < 0.2, -1.0, 1.0)
        c, s = torch.cos(angle) * scale, torch.sin(angle) * scale
        theta = torch.stack(
            [
                torch.stack([c * flip * aspect, -s, 0.25 * (rand(B) - 0.5)], -1),
                torch.stack([s * flip, c / aspect, 0.25 * (rand(B) - 0.5)], -1),
            ],
            1,
        )
        x = 1 - F.grid_sample(
            1 - x, F.affine_grid(theta, (B, 3, 48, 48), align_corners=False), align_corners=False
        )
    else:
        x = F.interpolate(x, 48, mode="bicubic", antialias=True).clamp(0, 1)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    return (x - mean) / std


def held_out_score(model, data):
    """(zero-shot accuracy, a linear probe's gain on it), in %, on the held-out style's subgroups.

    The probe starts at the text classifier and trains on a tenth of the drawings: an estimate of
    what prompt learning can gain.
    """
    groups = np.array([data["concepts"][c]["group"] for c in data["concept"]])
    which = np.flatnonzero(data["held_out"])
    names, counts = np.unique(groups[which], return_counts=True)
    names = [n for n, c in zip(names, counts) if c >= 6]
    which = which[np.isin(groups[which], names)]
    labels = torch.tensor([names.index(groups[i]) for i in which])
    with torch.inference_mode():
        images = augment(torch.from_numpy(data["images"][which]), None, train=False)
        x = F.normalize(
            torch.cat([model.encode_image(b) for b in images.split(250)]).float(), dim=-1
        )
        text = F.normalize(
            encode_text(model, tokenize([f"a drawing of a {n}." for n in names], 20)).float(),
            dim=-1,
        )
    scale = model.logit_scale.exp().item()
    zero_shot = ((x @ text.t()).argmax(-1) == labels).float().mean().item()
    few = torch.zeros(len(labels), dtype=torch.bool)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    for k in range(len(names)):
        mine = order[labels[order] == k]
        few[mine[: max(1, round(0.1 * len(mine)))]] = True
    x, weight = x.clone(), text.clone().requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=3e-3)
    for _ in range(60):
        loss = F.cross_entropy(scale * x[few] @ F.normalize(weight, dim=-1).t(), labels[few])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    before = ((x[~few] @ text.t()).argmax(-1) == labels[~few]).float().mean().item()
    probe = (
        ((x[~few] @ F.normalize(weight.detach(), dim=-1).t()).argmax(-1) == labels[~few])
        .float()
        .mean()
        .item()
    )
    return 100 * zero_shot, 100 * (probe - before)


def save(path, state):
    torch.save(state, f"{path}.part")
    os.replace(f"{path}.part", path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--drawings", type=Path, required=True, help="what collect_drawings.py wrote"
    )
    parser.add_argument(
        "--state", type=Path, required=True, help="checkpoint to continue from and to write"
    )
    parser.add_argument(
        "--minutes", type=float, default=100, help="total training time, over all runs"
    )
    parser.add_argument(
        "--from-minute",
        type=float,
        default=0,
        help="where the cosine starts: later than 0 for a second cycle",
    )
    parser.add_argument("--lr", type=float, default=LR, help="the cycle's highest learning rate")
    parser.add_argument(
        "--score-minutes",
        type=float,
        default=5,
        help="minutes between scores; the state is saved at each",
    )
    parser.add_argument(
        "--export", type=Path, help="write the averaged weights here, in half precision"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile; needs a C++ compiler"
    )
    args = parser.parse_args()

    archive = np.load(args.drawings)
    data = {k: archive[k] for k in ("images", "concept", "held_out", "sets")}
    data["concepts"] = json.loads(str(archive["concepts"]))
    members = {}  # concept -> set -> drawings
    for i in np.flatnonzero(~data["held_out"]):
        members.setdefault(int(data["concept"][i]), {}).setdefault(str(data["sets"][i]), []).append(
            int(i)
        )
    emoji = [c for c in members if data["concepts"][c]["group"]]
    icons = [c for c in members if not data["concepts"][c]["group"]]
    icon_weights = [math.sqrt(sum(map(len, members[c].values()))) for c in icons]
    vocabulary = sorted({w for c in data["concepts"] for w in c["label"].split()})

    model, average = build(args.seed), build(args.seed).eval().requires_grad_(False)
    anchors = torch.nn.Parameter(torch.randn(len(data["concepts"]), model.text_projection.shape[1]))
    decay = [p for n, p in model.named_parameters() if p.ndim > 1]
    rest = [p for n, p in model.named_parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            dict(params=decay, weight_decay=WEIGHT_DECAY),
            dict(params=[*rest, anchors], weight_decay=0),
        ],
        lr=LR,
        betas=(0.9, 0.98),
        eps=1e-6,
        fused=True,
    )
    step, seconds = 0, 0.0
    if args.state.exists():
        state = torch.load(args.state, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        anchors.data.copy_(state["anchors"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
    rng = random.Random(args.seed + step)
    generator = torch.Generator().manual_seed(args.seed + step)

    def loss_of(images, tokens, same, concept):
        with (
            torch.autocast("cpu", torch.bfloat16),
            sdpa_kernel(SDPBackend.MATH),
        ):  # the fused backward is slower here
            x, t = model.encode_image(images), encode_text(model, tokens)
        x, t = F.normalize(x.float(), dim=-1), F.normalize(t.float(), dim=-1)
        logits = model.logit_scale.exp() * x @ t.t()  # [concepts * views, concepts]
        target = same / same.sum(1, keepdim=True)  # equal captions are all correct
        rows = target.repeat_interleave(VIEWS, 0)
        columns = rows.t() / rows.t().sum(1, keepdim=True)
        contrast = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.t(), columns)) / 2
        towards = ANCHOR_SCALE * F.normalize(anchors, dim=-1).t()
        of_image = F.cross_entropy(
            x @ towards, concept.repeat_interleave(VIEWS), label_smoothing=0.1
        )
        of_text = F.cross_entropy(t @ towards, concept, label_smoothing=0.1)
        return contrast + 0.5 * of_image + 0.25 * of_text, contrast

    run = torch.compile(loss_of, dynamic=False) if args.compile else loss_of
    mark, since, losses = time.time(), time.time(), []
    while seconds < 60 * args.minutes:
        progress = (seconds / 60 - args.from_minute) / (args.minutes - args.from_minute)
        lr = (
            args.lr * min(1, progress / WARMUP + 1e-2) * (0.5 + 0.5 * math.cos(math.pi * progress))
            + 1e-5
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        n = round(CONCEPTS * EMOJI_SHARE)
        chosen = rng.sample(emoji, n) + rng.choices(icons, icon_weights, k=CONCEPTS - n)
        picked = []
        for c in chosen:
            sets = rng.sample(sorted(members[c]), min(VIEWS, len(members[c])))
            sets += rng.choices(sets, k=VIEWS - len(sets))
            picked += [rng.choice(members[c][s]) for s in sets]
        long = step % LONG_EVERY == 0 and progress > SHORT_ONLY
        texts = [caption(data["concepts"][c], vocabulary, rng, long) for c in chosen]
        tokens = tokenize(texts, LENGTHS[long])
        names = [data["concepts"][c]["key"] for c in chosen]
        same = torch.tensor(
            [[float(a == b or s == t) for b, t in zip(names, texts)] for a, s in zip(names, texts)]
        )
        images = augment(torch.from_numpy(data["images"][picked]), generator)
        loss, contrast = run(images, tokens, same, torch.tensor(chosen))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        step += 1
        keep = min(EMA, step / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
        losses.append(contrast.item())
        now = time.time()
        seconds, mark = seconds + min(now - mark, 5), now  # a pause, or compiling, is not training
        if now - since > 60 * args.score_minutes or seconds >= 60 * args.minutes:
            zero_shot, probe = held_out_score(average, data)
            rss = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**30
            print(
                f"step {step}  {seconds / 60:.1f} min  loss {np.mean(losses):.3f}  "
                f"scale {model.logit_scale.exp().item():.1f}  "
                f"held-out style: zero-shot {zero_shot:.1f}, probe {probe:+.1f}  {rss:.1f} GB",
                flush=True,
            )
            save(
                args.state,
                dict(
                    model=model.state_dict(),
                    average=average.state_dict(),
                    optimizer=optimizer.state_dict(),
                    anchors=anchors.detach(),
                    step=step,
                    seconds=seconds,
                ),
            )
            since, losses = time.time(), []
            mark = time.time()
    if args.export:
        save(args.export, {k: v.half() for k, v in average.state_dict().items()})
        print("wrote", args.export)


if __name__ == "__main__":
    # clip imports `packaging` from pkg_resources, which newer releases of setuptools no longer have
    sys.modules["pkg_resources"] = SimpleNamespace(packaging=packaging)
    main()
