"""Choose the settings of `tiny`: one grid for every method, on held-out training images.

    python tests/tune.py --out runs/tune                        # all methods, seeds 1 to 5
    python tests/tune.py --out runs/tune --only mmap --seeds 1 2 3

Tries a third, once and three times the middle learning rate in METHODS, each with the file's epochs
and half as many, under `--validate`: 20% of the training images of `emoji` at 6 shots are held out
and scored. No test images are used. Finished runs are not repeated. Prints a Markdown table with
the best of each method in bold; data/README.md says which settings were chosen, and why.
"""
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

METHODS = {                             # the command, and the middle learning rate
    "CoOp-MT": ("coop_mt.py", 0.03),
    "CoOp": ("coop_mt.py --single-task", 0.03),
    "CoCoOp": ("coop_mt.py --single-task --conditional", 0.003),
    "ProDA": ("coop_mt.py --single-task --proda 2", 0.03),
    "VPT-MT": ("vpt_mt.py", 0.03),
    "MaPLe-MT": ("maple_mt.py", 0.03),
    "MVLPT": ("mvlpt.py", 0.002),
    "HiPro": ("hipro.py", 0.03),
    "MmAP": ("mmap.py", 0.1),
    "JSCPT": ("jscpt.py", 0.005),
    "full fine-tuning": ("common.py finetune", 3e-5),
    "BitFit": ("common.py finetune --train bias", 0.003),
    "CLIP-Adapter": ("common.py finetune --train adapter", 0.03),
}
FACTORS = (1 / 3, 1.0, 3.0)             # of the learning rate; epochs: all and half


@dataclass
class Tune:
    """A grid of learning rates and epochs on held-out training images."""

    out: str = "runs/tune"  # folder of the runs
    only: tuple[str, ...] = ()  # only these methods, by their names in the table or their files
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    lr_alone: bool = False  # not half the epochs


def epochs_of(words):
    """The epochs of a command at `tiny`."""
    file, *rest = words
    name = rest.pop(0) if file == "common.py" else file.removesuffix(".py")
    return common.parse(common.method_of(name), rest).epochs


def held_out(words, lr, epochs, seeds, out):
    """The average held-out accuracy of each seed; a missing run is made first."""
    if not (out / "result.json").exists():
        resumed = ["--resume"] if (out / "settings.json").exists() else [
            "--validate", "--lr", f"{lr:g}", "--epochs", str(epochs), "--seeds", *map(str, seeds)]
        subprocess.run([sys.executable, "-W", "ignore", *words, *resumed, "--out", str(out)],
                       cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return json.loads((out / "result.json").read_text())["average"]


def main():
    args = tyro.cli(Tune, description=__doc__)
    files = {command.split()[0].removesuffix(".py") for command, _ in METHODS.values()}
    for name in args.only:
        if name not in files | METHODS.keys():
            known = ", ".join([*METHODS, *sorted(files)])
            sys.exit(f"tune.py: --only {name} is not one of {known}")
    print("| method | epochs | " + " | ".join(f"lr x {f:.2g}" for f in FACTORS) + " |")
    print("| --- | --- |" + " --- |" * len(FACTORS))
    for name, (command, middle) in METHODS.items():
        words = command.split()
        if args.only and not {name, words[0].removesuffix(".py")} & set(args.only):
            continue
        epochs, found = epochs_of(words), {}
        for n in (epochs,) if args.lr_alone else (epochs, max(1, round(epochs / 2))):
            for factor in FACTORS:
                rate = float(f"{factor * middle:.2g}")
                out = Path(args.out).absolute() / f"{name.replace(' ', '-')}-{n}-{rate:g}"
                out = out.with_name(f"{out.name}-seeds-{'-'.join(map(str, args.seeds))}")
                found[n, rate] = held_out(words, rate, n, args.seeds, out)
        best = max(found, key=lambda key: statistics.mean(found[key]))
        for n in dict.fromkeys(n for n, _ in found):
            cells = []
            for key, values in found.items():
                if key[0] == n:
                    cell = f"{key[1]:g}: {common.mean_std(values)}"
                    cells.append(f"**{cell}**" if key == best else cell)
            print(f"| {name} | {n} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
