"""All benchmarks by name; `find` turns one name of `--data` into listings, one per task.

To add a benchmark, write a function that takes the root folder and returns listings, and register
it here.
"""
import difflib
import os
from fnmatch import fnmatchcase

from ..errors import UserError, expand
from . import cifar100, coop, domains, elevater, emoji, folders
from .lists import printable

FAMILIES = (emoji, domains, cifar100, coop, elevater)
BENCHMARKS = {name: read for family in FAMILIES for name, read in family.BENCHMARKS.items()}
DOWNLOADS = {**cifar100.DOWNLOADS, **coop.DOWNLOADS, **elevater.DOWNLOADS}


def names_of(data):
    """The parts of `--data`: a folder (its name may contain a comma), or names joined by commas."""
    data = str(data)
    if os.path.isdir(os.path.expanduser(data)):
        return [data]
    return [name.strip() for name in data.split(",")]


def absolute(data):
    """`--data` with its folders absolute and ~ expanded, so that it means the same anywhere."""
    found = []
    for name in names_of(data):
        task, sign, path = name.partition("=")
        if sign and not os.path.exists(name):
            found.append(f"{task}={expand(path)}")
        elif name.split(":")[0] not in BENCHMARKS and os.path.exists(os.path.expanduser(name)):
            found.append(str(expand(name)))
        else:
            found.append(name)
    return ",".join(found)


def find(name, root):
    """The listings of a benchmark, of some of its tasks (`name:PATTERN+PATTERN`), of a tree
    `domain/class/images`, or of a tree `class/images` (`task=path`)."""
    benchmark, _, patterns = name.partition(":")
    if benchmark in BENCHMARKS:
        listings = BENCHMARKS[benchmark](root)
        return chosen(benchmark, listings, patterns.split("+")) if patterns else listings
    task, sign, path = name.partition("=")
    if sign and task and path and not os.path.exists(name):
        return [folders.class_tree(printable(task), expand(path))]
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return folders.tree(expand(path))
    if os.path.exists(path):
        raise UserError(f"{path} is a file, but --data takes the name of a benchmark or a folder "
                        "domain/class/*.jpg")
    if os.sep in name:
        raise UserError(f"there is no folder {name}: --data takes the name of a "
                        "benchmark, a folder domain/class/*.jpg, or name=folder")
    close = difflib.get_close_matches(name.lower(), BENCHMARKS, n=1, cutoff=0.4)
    hint = f"it is not a folder, and the benchmarks are {', '.join(BENCHMARKS)}"
    if close:
        hint = f"did you mean '{close[0]}'?"
    raise UserError(f"--data {name or '(empty)'} is unknown: {hint}")


def chosen(benchmark, listings, patterns):
    """The listings whose names match one of the patterns (`*` stands for anything)."""
    picked = []
    for pattern in patterns:
        matching = [x for x in listings if fnmatchcase(x.name.lower(), pattern.strip().lower())]
        if not matching:
            names = ", ".join(x.name for x in listings)
            raise UserError(f"{benchmark} has no task '{pattern}': its tasks are {names}")
        picked += [x for x in matching if x not in picked]
    return picked


def download(names, root):
    """Download benchmarks with torchvision, after rejecting any that it cannot download."""
    names = [name.split(":")[0] for name in names]
    for name in names:
        if name not in DOWNLOADS:
            try:
                find(name, root)
            except UserError as error:
                raise UserError(f"--download cannot fetch {name}, only {', '.join(DOWNLOADS)}: the "
                                "README says where to get the others") from error
    for name in names:
        if name in DOWNLOADS:
            DOWNLOADS[name](root)
