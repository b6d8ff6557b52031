"""`python common.py table runs/`: finished runs side by side in the layout of the papers' tables."""
import csv
import io
import json
import statistics
import sys
from pathlib import Path

import common
from common import UserError
from multitask_prompt_reports import SETTINGS, mean_std

WORDS = """Gather the finished runs in some folders into tables: methods as columns, tasks as rows, mean ± sample standard
deviation over seeds, a table for each data, split and backbone."""
OWN = [key for key in SETTINGS if key not in ("data", "split", "shots", "clip")]       # what tells the columns of a table apart
NEEDED = {*SETTINGS, "validate", "seeds", "tasks", "zero_shot", "accuracy", "average", "trainable_parameters"}


def main(argv=None):
    parser = common._Parser(prog="common.py table", description=WORDS, allow_abbrev=False)
    add = parser.add_argument
    add("folders", nargs="*", default=["runs"], metavar="DIR", help="run folders, or folders that hold some (default runs)")
    add("--out", metavar="DIR", help="also write table.md and table.csv there")
    add("--plot", action="store_true", help="also draw accuracy against trainable parameters and against shots into --out")
    args = parser.parse_args(argv)
    if args.plot and not args.out:
        raise UserError("--plot needs --out DIR, the folder that the pictures go to")
    tables = tabulate(read_results(args.folders))
    for title, table in tables.items():
        print("\n" + title + "\n" + as_text(layout(table)))
    if args.out:
        out = Path(args.out)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out} cannot be made ({error.strerror}): choose another folder") from error
        sections = [f"**{title}**\n\n{as_markdown(layout(table))}\n" for title, table in tables.items()]
        common.write_whole(out / "table.md", "\n".join(sections))
        common.write_whole(out / "table.csv", as_csv(tables))
        pictures = (plot_parameters(out, tables) + plot_shots(out, tables)) if args.plot else []
        print(f"\n{', '.join(['table.md', 'table.csv', *pictures])} are in {out}")


def read_results(folders):
    """The result.json of every finished run in the folders and below, oldest first; UserError where one cannot be read.

    Runs of `--validate` are left out, as they scored on other images; a line says how many.
    """
    found, validated = [], 0
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}: give the folder of a run, or one that holds some")
    paths = {path.resolve(): path for folder in folders for path in Path(folder).rglob("result.json")}
    for path in sorted(paths.values(), key=lambda path: (path.stat().st_mtime, str(path))):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            fits = NEEDED <= result.keys() and set(result["accuracy"]) == set(result["zero_shot"]) == set(result["tasks"])
            fits = fits and all(len(x) == len(result["seeds"]) for x in result["accuracy"].values())
        except (OSError, ValueError, AttributeError, TypeError, KeyError):
            fits = False
        if not fits:
            raise UserError(f"{path} does not hold the result of a run of this version of the project: take it away, or give other "
                            "folders")
        validated += bool(result.get("validate"))
        if not result.get("validate"):
            found.append(dict(result, folder=str(path.parent)))
    if validated:
        print(f"left out: {validated} run{'s' * (validated > 1)} of --validate, scored on held-out training images", file=sys.stderr)
    if not found:
        raise UserError(f"no finished run on test images in {', '.join(map(str, folders))}: a run writes its result.json at its end")
    return found


def tabulate(results):
    """{title: table}, where a table is {settings: column}: runs on the same data, split and backbone stand in one table.

    A column is a method with its settings: dict(label, tasks, zero_shot, accuracy (task -> a number a seed), seeds,
    trainable_parameters, and the data). Runs that differ in their seeds alone make one column; of two runs of one seed the
    later counts, and a line says so.
    """
    tables = {}
    for result in results:
        columns = tables.setdefault(title_of(result, tables), {})
        key = json.dumps([result[k] for k in OWN])
        column = columns.setdefault(key, dict({k: result[k] for k in SETTINGS}, tasks=result["tasks"], scores={}))
        column["trainable_parameters"] = result["trainable_parameters"]
        for i, seed in enumerate(result["seeds"]):
            if seed in column["scores"]:
                earlier = column["scores"][seed]["folder"]
                print(f"{result['method']}, seed {seed}: {result['folder']} counts, being later than {earlier}", file=sys.stderr)
            column["scores"][seed] = dict(folder=result["folder"], zero_shot=result["zero_shot"],
                                          accuracy={task: result["accuracy"][task][i] for task in result["tasks"]})
    for columns in tables.values():
        for column in columns.values():
            scores = [column["scores"][seed] for seed in sorted(column["scores"])]
            column.update(seeds=sorted(column.pop("scores")), accuracy=by_task(column["tasks"], scores, "accuracy"),
                          zero_shot=by_task(column["tasks"], scores, "zero_shot"))
        for column, label in zip(columns.values(), labels(list(columns.values()))):
            column["label"] = label
    return dict(sorted(tables.items()))


def title_of(result, tables):
    """What the runs of one table share: `officehome, split 0.1, ViT-B/16`, and the tasks where a table so called has others."""
    part = f"split {result['split']}" if result["split"] is not None else f"{result['shots']} shots" if result["shots"] else "all"
    title = f"{result['data']}, {part}, {result['clip']}"
    others = [column["tasks"] for column in tables.get(title, {}).values() if column["tasks"] != result["tasks"]]
    return f"{title}, tasks {', '.join(result['tasks'])}" if others else title


def by_task(tasks, scores, key):
    """{task: a number a seed}, with the seeds' means over the tasks as "average" last."""
    numbers = {task: [score[key][task] for score in scores] for task in tasks}
    return dict(numbers, average=[statistics.mean(x) for x in zip(*numbers.values())])


def labels(columns):
    """The columns' heads: the method and its variant; where two are the same, also the settings in which they differ."""
    names = [column["method"] + (f" ({column['variant']})" if column["variant"] else "") for column in columns]
    heads = []
    for name, column in zip(names, columns):
        twins = [other for other, same in zip(columns, names) if same == name]
        differ = [k for k in OWN[2:] if len({other[k] for other in twins}) > 1]
        heads.append(name + "".join(f", {common.said(k, column[k]).removeprefix('with ')}" for k in differ))
    return heads


def layout(table):
    """A table as rows of cells: the head, a row a task, the average, the seeds and the trainable parameters."""
    columns = list(table.values())
    widest = max(columns, key=lambda column: len(column["seeds"]))              # zero-shot CLIP over the most seeds
    rows = [["", "zero-shot", *(column["label"] for column in columns)]]
    for task in widest["accuracy"]:
        plain = statistics.mean(widest["zero_shot"][task])
        rows.append([task, f"{plain:.1f}", *(mean_std(column["accuracy"][task]) for column in columns)])
    rows.append(["seeds", "", *(" ".join(map(str, column["seeds"])) for column in columns)])
    return rows + [["trained numbers", "", *(f"{column['trainable_parameters']:,}" for column in columns)]]


def as_text(rows):
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]) for row in rows)


def as_markdown(rows):
    line = lambda cells: "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    return "\n".join([line(rows[0]), line(["---"] * len(rows[0])), *map(line, rows[1:])])


def as_csv(tables):
    """A line a table, task and method: the settings, per cent (mean, sample standard deviation, the numbers of the seeds)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*SETTINGS, "task", "zero_shot", "mean", "std", "seeds", "accuracy", "trainable_parameters"])
    for column in [column for table in tables.values() for column in table.values()]:
        for task, values in column["accuracy"].items():
            std = round(statistics.stdev(values), 4) if len(values) > 1 else ""
            writer.writerow([*(column[k] for k in SETTINGS), task, round(statistics.mean(column["zero_shot"][task]), 4),
                             round(statistics.mean(values), 4), std, " ".join(map(str, column["seeds"])),
                             " ".join(str(round(x, 4)) for x in values), column["trainable_parameters"]])
    return text.getvalue()


def plot_parameters(out, tables):
    """parameters.png: the average against the trainable parameters, a panel a table (MmAP, Figure 1)."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(tables), figsize=(6 * len(tables), 4.5), squeeze=False, layout="tight")
    for axis, (title, table) in zip(axes[0], tables.items()):
        columns = [column for column in table.values() if column["trainable_parameters"]]           # an ensemble of templates has none
        sizes = [column["trainable_parameters"] for column in columns] or [1]
        axis.set_xscale("log"), axis.set_xlim(min(sizes) / 2, max(sizes) * 2)
        for column in columns:
            spread = statistics.stdev(column["accuracy"]["average"]) if len(column["seeds"]) > 1 else None
            mean = statistics.mean(column["accuracy"]["average"])
            axis.errorbar(column["trainable_parameters"], mean, spread, fmt="o", label=column["label"])
        widest = max(table.values(), key=lambda column: len(column["seeds"]))
        axis.axhline(statistics.mean(widest["zero_shot"]["average"]), color="grey", linestyle="--", label="zero-shot CLIP")
        axis.set_xlabel("trainable parameters"), axis.set_ylabel("average accuracy (%)")
        axis.set_title(title), axis.legend(fontsize=7)
    common.save_picture(figure, out / "parameters.png")
    plt.close(figure)
    return ["parameters.png"]


def plot_shots(out, tables):
    """shots.png where runs on the same data and backbone differ in their shots (MmAP, Figure 4; HiPro, Figure 6).

    Accuracy against shots: a row of panels a (data, backbone), a panel a task and one for the average, a line a method with its
    settings.
    """
    found = {}
    for column in [column for table in tables.values() for column in table.values() if column["shots"]]:
        lines = found.setdefault((column["data"], column["clip"], *column["tasks"]), {})
        lines.setdefault(json.dumps([column[k] for k in OWN]), []).append(column)
    found = {key: lines for key, lines in found.items() if len({c["shots"] for line in lines.values() for c in line}) > 1}
    if not found:
        return []
    plt = pyplot()
    most = max(len(key) - 1 for key in found)                                   # tasks and the average
    figure, axes = plt.subplots(len(found), most, figsize=(3.5 * most, 3.5 * len(found)), squeeze=False, layout="tight")
    for row, (key, lines) in zip(axes, found.items()):
        names = labels([line[0] for line in lines.values()])
        plain = {c["shots"]: c for line in lines.values() for c in line}
        for axis, task in zip(row, [*key[2:], "average"]):
            shots = sorted(plain)
            axis.plot(shots, [statistics.mean(plain[k]["zero_shot"][task]) for k in shots], "--", color="grey", label="zero-shot CLIP")
            for name, line in zip(names, lines.values()):
                line = sorted(line, key=lambda c: c["shots"])
                spread = [statistics.stdev(c["accuracy"][task]) if len(c["seeds"]) > 1 else 0 for c in line]
                means = [statistics.mean(c["accuracy"][task]) for c in line]
                axis.errorbar([c["shots"] for c in line], means, spread, marker="o", label=name)
            axis.set_title(f"{key[0]}, {key[1]}: {task}", fontsize=9)
            axis.set_xlabel("images a class"), axis.set_ylabel("accuracy (%)")
        for axis in row[len(key) - 1:]:
            axis.axis("off")
        row[0].legend(fontsize=7)
    common.save_picture(figure, out / "shots.png")
    plt.close(figure)
    return ["shots.png"]


def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt
