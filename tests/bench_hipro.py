"""What a HiPro step costs: `python tests/bench_hipro.py` (random weights at the text width of RN50; a minute or two on 2 cores).

Prints, for 4 tasks of the same 65 classes and for 20 tasks of 5 of their own, the milliseconds of a step for growing numbers
of nodes, those of the plain text encoder's forward and backward on as many tokens, and their ratio; and how often the image
encoder saw each image in a whole training with 2 views.
"""
import sys
import time
import types
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import common  # noqa: E402
from conftest import TINY, Log, noise, random_clip  # noqa: E402

hipro = common.load_method("hipro")
TEXT = dict(TINY, embed_dim=1024, transformer_width=512, transformer_heads=8, transformer_layers=12)


def tasks_of(n, classes, shared):
    names = lambda t: [f"class {0 if shared else t} number {i}" for i in range(classes)]
    images = common.Images(range(10), [i % classes for i in range(10)], noise)
    return [common.Task(f"task {t}", names(t), "a {}", images, images) for t in range(n)]


def seconds(step, repeats=3):
    step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times)


def main():
    model = random_clip(**TEXT)
    for n, classes, shared in [(4, 65, True), (20, 5, False)]:
        tasks = tasks_of(n, classes, shared)
        tree = hipro.task_tree(torch.rand(n, n, generator=torch.Generator().manual_seed(0)))
        batch = [(torch.randn(5, 1024), torch.randint(classes, (5,))) for _ in tasks]
        print(f"\n{n} tasks of {classes} classes{', the same for all' if shared else ''}")
        for m in sorted({1, n, len(tree)}):
            nodes = tree[-m:]
            texts, vectors = hipro.NodeTexts(tasks, nodes, 16), torch.randn(m, 16, 512, requires_grad=True)
            rows, length = texts.texts.tokens.shape
            plain = torch.randn(1, rows, 16, 512, requires_grad=True)

            def node_step():
                sum(hipro.losses_of(model, texts, vectors[texts.node_of], batch).values()).backward()

            def floor():
                common.encode_text(model, texts.texts.tokens, plain).sum().backward()
            mine, least = seconds(node_step), seconds(floor)
            print(f"  {m:3} nodes, {rows:4} texts of {length} tokens: {1000 * mine:7.0f} ms a step, plain {1000 * least:7.0f} ms, "
                  f"ratio {mine / least:.2f}, {1000 * mine / rows:.2f} ms a text")
    seen, encode = [0], common.encode_image

    def counting(model, images, prompts=None):
        seen[0] += len(images)
        return encode(model, images, prompts)
    sys.modules[common.view_features.__module__].encode_image = counting
    args = types.SimpleNamespace(n_ctx=2, grouping="tree", epochs=4, lr=0.01, batch_size=12, views=2, min_crop=0.6)
    tasks = tasks_of(3, 5, True)
    hipro.train(args, random_clip(**TINY), tasks, Log(), seed=1)
    images = sum(len(task.train) for task in tasks)
    print(f"\nthe image encoder saw {seen[0]} images in a training of 8 epochs: {images} images x 2 views = {2 * images}")


if __name__ == "__main__":
    main()
