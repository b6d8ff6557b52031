"""What a training step and an evaluation cost: `python tests/bench_speed.py [--method coop_mt] [--clip ViT-B/16] [--device cpu]`.

Random weights of the size of ViT-B/16 (or `--clip tiny`), 4 tasks of Office-Home's 65 class names, 4 images a task on a CPU and 16
on a card. A row a method: milliseconds of a training step, images a second in an evaluation, the memory that a step adds to the
model's, and the ratio of each to its floor. The floor is the clip package's own layers over as many rows of as many tokens as the method's
encoders saw, prompts counted, in the same run and in turns with it: forward, and backward to what enters the first layer, where the
method trains through that encoder; of an evaluation, forward. Best of `--repeats`. On a CPU the memory is that of a process
for each measurement. Below 1.3 for a step and its memory and 1.1 for an evaluation is as it should be. 20 minutes on 2 idle cores.
"""
import argparse
import json
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import common  # noqa: E402
from conftest import VIT_B16, random_clip  # noqa: E402

listings = sys.modules["multitask_prompt_listings"]
METHODS = "coop_mt vpt_mt maple_mt mvlpt hipro mmap jscpt".split()
OFFICE_HOME = """Alarm Clock, Backpack, Batteries, Bed, Bike, Bottle, Bucket, Calculator, Calendar, Candles, Chair, Clipboards,
Computer, Couch, Curtains, Desk Lamp, Drill, Eraser, Exit Sign, Fan, File Cabinet, Flipflops, Flowers, Folder,
Fork, Glasses, Hammer, Helmet, Kettle, Keyboard, Knives, Lamp Shade, Laptop, Marker, Monitor, Mop, Mouse, Mug,
Notebook, Oven, Pan, Paper Clip, Pen, Pencil, Postit Notes, Printer, Push Pin, Radio, Refrigerator, Ruler,
Scissors, Screwdriver, Shelf, Sink, Sneakers, Soda, Speaker, Spoon, TV, Table, Telephone, Toothbrush, Toys,
Trash Can, Webcam""".replace("\n", " ").lower().split(", ")
FLAGS = dict(single_task=False, depth=None, no_specific=False, adapt_epochs=1, init=None, eval=None, seeds=[1], no_selection=False,
             no_prompt_schedule=False, no_task_schedule=False, cagrad=False, transferability=False)


def tasks_of(model, n_tasks, batch, names=OFFICE_HOME):
    """Tasks of the same classes, whose test images are tensors already: no time goes into files."""
    size = model.visual.input_resolution
    picture = lambda number: torch.randn(3, size, size, generator=torch.Generator().manual_seed(number))
    images = common.Images(range(4 * batch), [i % len(names) for i in range(4 * batch)], picture)
    return [common.Task(f"task {t}", names, "a photo of a {}", images, images) for t in range(n_tasks)]


def training(name, model, tasks, batch, **changes):
    """(prompts, gradients) of a method: gradients() is a training step but for the optimizer's part, and returns the loss."""
    method, device = common.load_method(name), model.logit_scale.device
    args = types.SimpleNamespace(**{**method.PAPER, **FLAGS, **changes})
    common.seed_everything(1)
    prompts = method.build(args, model, tasks)
    labels = [torch.arange(batch, device=device) % len(task.class_names) for task in tasks]
    pictures = [torch.stack([task.train[i][0] for i in range(batch)]).to(device) for task in tasks]
    batches = list(zip(pictures, labels))
    features = [torch.randn(batch, model.text_projection.shape[1], device=device) for _ in tasks]
    if name == "coop_mt":
        texts, views = method.texts_of(args, tasks), [(x[None], y) for x, y in zip(features, labels)]
        loss = lambda: method.losses_of(model, texts, prompts, views, [torch.arange(batch)] * len(tasks)).sum()
    elif name == "hipro":
        nodes = method.task_tree(torch.rand(len(tasks), len(tasks), generator=torch.Generator().manual_seed(0)))
        texts, pairs = method.NodeTexts(tasks, nodes, args.n_ctx), list(zip(features, labels))
        loss = lambda: sum(method.losses_of(model, texts, prompts.vectors[texts.node_of], pairs).values())
    elif name == "vpt_mt":
        texts = common.zero_shot(model, tasks)
        loss = lambda: method.loss_of(model, texts, prompts, batches)
    elif name == "maple_mt":
        texts = method.texts_of(args, tasks)
        loss = lambda: method.loss_of(model, texts, prompts, batches)
    elif name == "mvlpt":
        prompts, texts = prompts.source.requires_grad_(), method.texts_of(args, model, tasks)
        loss = lambda: method.losses_of(model, texts, prompts, batches).sum()
    elif name == "mmap":
        prompts.set_groups([list(range(len(tasks)))[::2], list(range(len(tasks)))[1::2]])
        texts = common.Texts(tasks, method.n_text(args), prompts.owners())
        loss = lambda: common.prompted_losses(model, texts, prompts.text_prompts(), prompts.image_prompts(), batches).sum()
    elif name == "jscpt":
        texts = method.texts_of(args, tasks)

        def lower_step():
            theta = list(prompts.parameters())
            grads, losses, original = method.task_gradients(model, texts, prompts, batches)
            shared = torch.cat([grads[key].flatten(1) for key in ("P_l_shared", "P_v_shared")], dim=1)
            phi = method.schedule(prompts.alpha, prompts.beta, method.causal_effect(original, losses), method.affinity(shared))
            for p, g in zip(theta, method.scheduled_gradient(phi, grads.values(), theta)):
                p.grad = g
            return losses.sum()
        return prompts, lower_step

    def gradients():
        prompts.zero_grad()
        value = loss()
        value.backward()
        return value.detach()
    return prompts, gradients


def passes(step):
    """What a step sent through the encoders: ("text" or "image", rows, tokens with the prompts, whether gradients go back) a pass."""
    seen, text, image = [], common.encode_text, listings.encode_image
    trained = lambda prompts: prompts is not None and prompts.requires_grad and torch.is_grad_enabled()

    def spy_text(model, tokens, prompts=None):
        seen.append(("text", *tokens.shape, trained(prompts)))
        return text(model, tokens, prompts)

    def spy_image(model, images, prompts=None):
        n = len(model.visual.positional_embedding) + (0 if prompts is None else prompts.shape[-2])
        seen.append(("image", len(images), n, trained(prompts)))
        return image(model, images, prompts)
    common.encode_text, listings.encode_image = spy_text, spy_image
    try:
        step()
    finally:
        common.encode_text, listings.encode_image = text, image
    return seen


def floor_of(model, seen):
    """As many rows of as many tokens through the clip package's own layers, forward and where the method does so backward."""
    device, jobs = model.logit_scale.device, []
    for kind, rows, tokens, trained in seen:
        part = model.transformer if kind == "text" else model.visual.transformer
        x = torch.randn(tokens, rows, part.width, device=device, requires_grad=trained)     # the package has the tokens first
        read = (lambda y: model.ln_final(y[-1]) @ model.text_projection) if kind == "text" else \
            (lambda y: model.visual.ln_post(y[0]) @ model.visual.proj)
        jobs.append((part, x, read, torch.full((tokens, tokens), float("-inf"), device=device).triu(1) if kind == "text" else None))

    def floor():
        total = 0
        for part, x, read, mask in jobs:
            x.grad = None
            for block in part.resblocks:
                block.attn_mask = mask
            with common.autocast(model):
                total = total + read(part(x)).float().sum()
        if total.requires_grad:
            total.backward()
    return floor


def milliseconds(device, *parts, repeats):
    """The best time of each part, the parts in turns."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    best = [float("inf")] * len(parts)
    for repeat in range(repeats + 1):       # the first one warms up
        for i, part in enumerate(parts):
            wait()
            start = time.perf_counter()
            part()
            wait()
            if repeat:
                best[i] = min(best[i], 1000 * (time.perf_counter() - start))
    return best


def megabytes(device, part):
    """What a part adds to the memory at its peak."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        part()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return float("nan")                                                     # only Linux tells
    peak = lambda: int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 1024
    clear.write_text("5")                                                       # the peak starts again at what is in use now
    before = peak()
    part()
    return peak() - before


def setting(words, name):
    """(model, tasks, step, prompts) of a method, as the words of the command line say."""
    model = common.load_clip("tiny", words.device)[0] if words.clip == "tiny" else random_clip(**VIT_B16).to(words.device)
    batch = 16 if words.device.startswith("cuda") else 4
    tasks = tasks_of(model, 4, batch)
    prompts, gradients = training(name, model, tasks, batch)
    optimizer = torch.optim.SGD(prompts.parameters(), lr=0.001, momentum=0.9)

    def step():
        gradients()
        optimizer.step()
    return model, tasks, step, prompts


def row_of(words, name):
    """A method's numbers: [ms, ratio, images a second, ratio, MB, ratio]."""
    model, tasks, step, prompts = setting(words, name)
    seen = passes(step)
    floor = floor_of(model, seen)
    images = None
    if hasattr(prompts, "image_prompts") or name in ("mvlpt", "jscpt"):
        method = common.load_method(name)
        with torch.no_grad():
            images = prompts()[1] if name == "mvlpt" else method.prompts_of(prompts.copies())[1][:, 0] if name == "jscpt" else \
                prompts.image_prompts()[:, 0]
    text = torch.randn(65, model.text_projection.shape[1], device=model.logit_scale.device)
    evaluation = lambda: common.evaluate(model, lambda image: image, tasks[0], text, images)
    plain = floor_of(model, passes(evaluation))

    def forward():
        with torch.no_grad():
            plain()
    times = milliseconds(words.device, step, floor, evaluation, forward, repeats=words.repeats)
    if words.device.startswith("cuda"):
        peaks = megabytes(words.device, step), megabytes(words.device, floor)
    else:
        call = [sys.executable, __file__, "--method", name, "--clip", words.clip, "--device", words.device, "--peak"]
        peaks = [float(subprocess.run([*call, json.dumps(rows)], stdout=subprocess.PIPE, text=True, check=True).stdout)
                 for rows in ([], seen)]
    return [times[0], times[0] / times[1], 1000 * len(tasks[0].test) / times[2], times[2] / times[3], peaks[0],
            peaks[0] / peaks[1] if peaks[1] else float("nan")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, nargs="+", default=METHODS)
    parser.add_argument("--clip", choices=["tiny", "ViT-B/16"], default="ViT-B/16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.device.startswith("cuda:"):
        torch.cuda.set_device(words.device)
    if words.peak:                          # a process of its own for the memory: a method's step, or the floor of what it encoded
        model, _, step, _ = setting(words, words.method[0])
        seen = json.loads(words.peak)
        return print(megabytes(words.device, floor_of(model, seen) if seen else step))
    print(f"{words.clip}, random weights, {words.device}, {torch.get_num_threads()} threads: 4 tasks of {len(OFFICE_HOME)} classes\n")
    print(f"{'':10}{'ms a step':>12}{'ratio':>8}{'images/s':>12}{'ratio':>8}{'MB a step':>12}{'ratio':>8}")
    for name in words.method:
        print(f"{name:10}" + "{:12.0f}{:8.2f}{:12.1f}{:8.2f}{:12.0f}{:8.2f}".format(*row_of(words, name)), flush=True)


if __name__ == "__main__":
    main()
