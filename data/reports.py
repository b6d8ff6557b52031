"""What a run ends with: result.json's contents and the closing table. `common` passes these names on."""
import json
import re
import statistics
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

PAPERS = Path(__file__).with_name("paper_results.json")
MATRICES = ["similarity", "affinity", "transfer"]       # of the tasks: a row is a source, a column a target
SETTINGS = "method variant data split shots clip epochs lr batch_size n_ctx".split()     # a paper's number is shown where these agree


def gather(settings, tasks, model, finished):
    """What result.json holds, from the scores of every seed. A key that a method adds becomes a list, an entry a seed."""
    names, done = [task.name for task in tasks], [finished[seed] for seed in settings["seeds"]]
    shared = ("zero_shot", "accuracy", "trainable_parameters", "seconds")
    return dict({key: settings.get(key) for key in (*SETTINGS, "seeds", "validate")}, tasks=names,
                zero_shot={n: statistics.mean(d["zero_shot"][i] for d in done) for i, n in enumerate(names)},
                accuracy={n: [d["accuracy"][i] for d in done] for i, n in enumerate(names)},
                average=[statistics.mean(d["accuracy"]) for d in done], trainable_parameters=done[0]["trainable_parameters"],
                clip_parameters=sum(p.numel() for p in model.parameters()), seconds=[d["seconds"] for d in done],
                **{key: [d[key] for d in done] for key in done[0] if key not in shared})


def mean_std(values):
    """`85.2 ± 0.4` from per cents over seeds (sample standard deviation), or `85.2` from one."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def papers_columns(result):
    """The columns of the papers' tables (paper_results.json) whose method, data and settings are those of a result."""
    papers = json.loads(PAPERS.read_text(encoding="utf-8"))["columns"]
    return [] if result["validate"] else [p for p in papers if all(p.get(key) == result.get(key) for key in SETTINGS)]


def one_decimal(printed):
    """`75.84 ± 0.50` as `75.8 ± 0.5`: HiPro and MVLPT print two decimals."""
    return re.sub(r"\d+\.\d+", lambda number: str(Decimal(number[0]).quantize(Decimal("0.1"), ROUND_HALF_UP)), printed)


def print_table(result):
    """The closing table: a row a task and the average; zero-shot CLIP, the method, the papers' numbers where there are some."""
    rows = [[name, f"{result['zero_shot'][name]:.1f}", mean_std(result["accuracy"][name])] for name in result["tasks"]]
    rows.append(["average", f"{statistics.mean(result['zero_shot'].values()):.1f}", mean_std(result["average"])])
    head = ["", "zero-shot", result["method"]]
    plain = lambda name: "".join(filter(str.isalnum, name)).lower()             # "CIFAR-100" and "CIFAR100" are one task
    papers = papers_columns(result)
    for paper in papers:
        head.append(f"{paper['paper']}, {paper['table']}")
        printed = {plain(name): one_decimal(number) for name, number in paper["results"].items()}
        for row in rows:
            row.append(printed.get(plain(row[0]), ""))
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print()
    for row in [head, *rows]:
        print("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]))
    for paper in papers:
        if "note" in paper:
            print(f"\n{paper['paper']}, {paper['table']}: {paper['note']}")
    share = 100 * result["trainable_parameters"] / result["clip_parameters"]
    print(f"\n{result['trainable_parameters']:,} trainable parameters, {share:.2f} per cent of CLIP's; accuracy in per cent, "
          f"seeds {' '.join(map(str, result['seeds']))}; trained in {statistics.mean(result['seconds']):.0f} s a seed")
    for key in [key for key in MATRICES if key in result]:
        for seed, matrix in zip(result["seeds"], result[key]):
            print(f"\n{key}, seed {seed} (a row is a source, a column a target in the same order)")
            for name, row in zip(result["tasks"], matrix):
                print(name.ljust(widths[0]), "".join(f"{x:10.3g}" for x in row))
