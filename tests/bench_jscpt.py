"""What an upper step of JSCPT costs in lower steps: `python tests/bench_jscpt.py [--clip ViT-B/16] [--batch 4]` (2 minutes on 2 cores).

Prints, for the built-in benchmark's four tasks with the built-in backbone, or with random weights of the size of ViT-B/16, the
milliseconds of a lower step and of the parts of an upper step: the gradient of the development loss, the tasks' gradients that
can be differentiated once more, and each of the three Hessian products; and the peak memory of the process.
"""
import argparse
import resource
import sys
import time
import types
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import common  # noqa: E402
from conftest import VIT_B16, random_clip  # noqa: E402

jscpt = common.load_method("jscpt")


def milliseconds(device, part, repeats=3):
    """(best time, result) of a part."""
    times = []
    for _ in range(repeats):
        wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        result = part()
        wait()
        times.append(1000 * (time.perf_counter() - start))
    return min(times), result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", choices=["tiny", "ViT-B/16"], default="tiny")
    parser.add_argument("--batch", type=int, default=16, help="images of a task in a step")
    words = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = common.load_clip("tiny", device)[0] if words.clip == "tiny" else random_clip(**VIT_B16).to(device)
    args = types.SimpleNamespace(n_ctx=16, batch_size=words.batch, views=0, min_crop=0.6, lr=1e-4, terms=3, scale=1e-4, no_selection=False,
                                 no_prompt_schedule=False, no_task_schedule=False, cagrad=False)
    common.seed_everything(1)
    tasks, held_out = jscpt.development(common.load_tasks("emoji", split=0.1), 1)
    prompts, texts = jscpt.build(args, model, tasks), jscpt.texts_of(args, tasks)
    theta = list(prompts.parameters())
    batches, dev = (next(iter(common.image_batches(model, x, args, 1))) for x in (tasks, held_out))
    lower, upper = torch.optim.SGD(theta, lr=args.lr), torch.optim.Adam([prompts.alpha, prompts.beta], lr=1e-3)

    def lower_step():
        grads, losses, original = jscpt.task_gradients(model, texts, prompts, batches)
        shared = torch.cat([grads[name].flatten(1) for name in ("P_l_shared", "P_v_shared")], dim=1)
        effect, A = jscpt.causal_effect(original, losses), jscpt.affinity(shared)
        phi = jscpt.schedule(prompts.alpha, prompts.beta, effect, A)
        for p, g in zip(theta, jscpt.scheduled_gradient(phi, grads.values(), theta)):
            p.grad = g
        lower.step()
        return effect, A, phi

    def twice():
        with sdpa_kernel(SDPBackend.MATH):
            return jscpt.task_gradients(model, texts, prompts, batches, create_graph=True)[0]
    lower_step()
    low, (effect, A, phi) = milliseconds(device, lower_step)
    up, _ = milliseconds(device, lambda: jscpt.upper_step(args, model, texts, prompts, batches, dev, effect, A, upper), 2)
    first, v = milliseconds(device, lambda: torch.autograd.grad(jscpt.losses_of(model, texts, prompts.copies(), dev)[0].sum(), theta))
    second, grads = milliseconds(device, twice, 2)
    gradient = jscpt.scheduled_gradient(phi, grads.values(), theta)
    third, _ = milliseconds(device, lambda: torch.autograd.grad(gradient, theta, v, retain_graph=True))
    rows, length = texts.tokens.shape
    print(f"{words.clip} on {device}: 4 tasks, {words.batch} images each, {rows} texts of {length} tokens")
    print(f"  lower step                           {low:8.0f} ms")
    print(f"  upper step                           {up:8.0f} ms, {up / low:.1f} lower steps")
    print(f"    gradient of the development loss   {first:8.0f} ms, {first / low:.1f}")
    print(f"    tasks' gradients, with their graph {second:8.0f} ms, {second / low:.1f}")
    print(f"    Hessian products                   3 x {third:4.0f} ms, {3 * third / low:.1f}")
    print(f"  with the default M: {up / jscpt.PAPER['upper_every'] / low:.1f} lower steps more a step; "
          f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB")
    if device == "cuda":
        print(f"  peak memory on the card {torch.cuda.max_memory_allocated() / 2**30:.1f} GB")


if __name__ == "__main__":
    main()
