"""All benchmarks by name, and those whose tasks are folders of domains: `emoji`, Office-Home, PACS, and a folder of your own.

`find(name, root)` turns one name of `--data` into listings, one a task, which `common.load_tasks` splits into training and
test images. To add a benchmark, write a function that returns listings and name it in `BENCHMARKS`.
"""
import difflib
import json
from pathlib import Path

from PIL import Image, ImageFilter, ImageOps

import common
from common import Listing, UserError, read_tile

files, groups, domainnet, datasets = (common.load_file(Path(__file__).with_name(f"{name}.py"), f"multitask_prompt_{name}")
                                      for name in ("files", "groups", "domainnet", "datasets"))
from multitask_prompt_files import ENDINGS, check_folder, compared, folders, image_depth, images_in, spoken  # noqa: E402


def find(name, root):
    """The listings of a benchmark's name, a `domain/class/images` folder, or `name=path` of a `class/images` folder."""
    if name in BENCHMARKS:
        return BENCHMARKS[name](root)
    task, _, path = name.partition("=")
    if task and path and not Path(name).exists():
        return [class_tree(task, Path(path))]
    path = Path(name)
    if name and path.is_dir():
        return domain_trees(path, {folder: folder.name for folder in folders(path)}, "a photo of a {}")
    if name and path.exists():
        raise UserError(f"{path} is a file, and --data takes the name of a benchmark or a folder domain/class/*.jpg")
    close = difflib.get_close_matches(name.lower(), BENCHMARKS, n=1, cutoff=0.4)
    hint = f"did you mean '{close[0]}'? The benchmarks are" if close else "it is no folder, and the benchmarks are"
    raise UserError(f"--data {name or 'of nothing'} is unknown: {hint} {', '.join(BENCHMARKS)}")


def emoji(root):
    """The built-in benchmark: 4 drawing styles x 58 classes. All drawings of one emoji fall on the same side of a split."""
    styles = {"Noto": "noto", "Twemoji": "twemoji", "Fluent": "fluent", "High Contrast": "high_contrast"}
    return drawings("classes", {style: (file, read_tile) for style, file in styles.items()})


def fxemoji(root):
    """Four looks of a fifth style, FxEmoji, to choose the built-in backbone's settings on: no method is tested on it."""
    looks = {"FxEmoji": lambda x: x, "Grey": lambda x: x.convert("L").convert("RGB"),
             "Other Colours": lambda x: Image.merge("RGB", [x.getchannel(c) for c in "GBR"]),
             "Outlines": lambda x: ImageOps.invert(x.convert("L").filter(ImageFilter.FIND_EDGES)).convert("RGB")}
    return drawings("fxemoji", {look: ("fxemoji", lambda item, change=change: change(read_tile(item))) for look, change in looks.items()})


def drawings(classes, tasks):
    """A listing a task from the pictures in data/emoji: {task: (picture, how a drawing is read)}."""
    here = Path(__file__).resolve().parent / "emoji"
    classes = json.loads((here / f"{classes}.json").read_text(encoding="utf-8"))
    numbers, start = [], 0
    for members in classes.values():
        numbers.append(range(start, start + len(members)))
        start += len(members)
    return [Listing(task, list(classes), "a drawing of a {}", [[(str(here / f"{file}.webp"), i) for i in r] for r in numbers],
                    draw="emoji", read=read) for task, (file, read) in tasks.items()]


def officehome(root):
    """Office-Home: the official archive's folder, Dassl's `office_home`, or either of them as `root` itself."""
    names = ["Art", "Clipart", "Product", "Real World"]
    listings = named_domains(root, "Office-Home", ["OfficeHomeDataset_10072016", "office_home"], names)
    published = files.read_lines(Path(__file__).with_name("class_names") / "officehome.txt")
    return compared(listings, "Office-Home", root, classes=65, images=15_588, names=published)


def pacs(root):
    """PACS in Dassl's layout, `pacs/images/{art_painting,cartoon,photo,sketch}`, or those four folders under `root`."""
    return named_domains(root, "PACS", ["pacs/images", "PACS/images", "pacs", "PACS"], ["Art Painting", "Cartoon", "Photo", "Sketch"])


BENCHMARKS = {"emoji": emoji, "fxemoji": fxemoji, "officehome": officehome, "pacs": pacs, "cifar100": groups.cifar100, **domainnet.BENCHMARKS,
              **datasets.BENCHMARKS}
DOWNLOADS = {"cifar100": groups.download_cifar100, **datasets.DOWNLOADS}


def download(names, root):
    """Fetch benchmarks that torchvision can fetch; refuse before the first if there is another among them that is not here."""
    for name in names:
        if name not in DOWNLOADS:
            try:
                find(name, root)
            except UserError as error:
                raise UserError(f"--download cannot fetch {name}, only {', '.join(DOWNLOADS)}: the README says where to get the "
                                "others") from error
    for name in names:
        DOWNLOADS.get(name, lambda root: None)(root)


def named_domains(root, benchmark, places, names):
    """The domain trees of a benchmark in the first of `places` under `root`, or in `root`, whatever the case of its folders."""
    check_folder(root, "--root")
    for place in [root / p for p in places] + [root]:
        if place.is_dir():
            found = {spoken(p.name): p for p in folders(place)}
            if all(spoken(name) in found for name in names):
                return domain_trees(place, {found[spoken(name)]: name for name in names}, "a photo of a {}")
    raise UserError(f"{benchmark} is not in {root}: put its folders {', '.join(names)} into {root / places[0]}, "
                    "or give --root the folder that holds them")


def domain_trees(path, domains, template):
    """A listing a domain from `domain/class/images`; every domain needs the same classes."""
    depths = [1 + below for below in map(image_depth, domains) if below is not None]        # stray images beside them do no harm
    depth = min(depths) if depths else 0 if images_in(path) else None
    if depth is None:
        raise UserError(f"{path} holds no images: it should be a tree domain/class/*.jpg")
    if depth < 2:
        where = "images themselves" if depth == 0 else "folders of images, the classes of one task"
        raise UserError(f"{path} holds {where}, and --data takes a tree domain/class/*.jpg: "
                        f"{'go two levels up' if depth == 0 else f'go one level up, or give name={path} to make it one task'}")
    if depth > 2:
        inside = " or ".join(str(p) for p in folders(path)[:3])
        raise UserError(f"{path} is {'a level' if depth == 3 else 'levels'} too high for a tree domain/class/*.jpg: try {inside}")
    trees = [class_tree(name, folder, template) for folder, name in domains.items()]
    for tree in trees:
        for other in trees:
            for name in tree.class_names:
                if name not in other.class_names:
                    raise UserError(f"class '{name}' is in {path}'s domain {tree.name} and not in {other.name}: every domain needs the "
                                    "same classes; for tasks with classes of their own give name=path,name=path")
    return trees


def class_tree(name, path, template="a photo of a {}"):
    """One listing from `class/images`, the classes in the order of their spoken names."""
    check_folder(path)
    classes = sorted(folders(path), key=lambda p: spoken(p.name))
    depth = image_depth(path)
    if depth != 1:
        reason = {None: "holds no images", 0: "holds images themselves: go one level up"}.get(depth, "is a level too high")
        raise UserError(f"{path} {reason}; a task is a tree class/*.jpg")
    for one, other in zip(classes, classes[1:]):
        if spoken(one.name) == spoken(other.name):
            raise UserError(f"{one} and {other} are both called '{spoken(one.name)}': put their images into one folder or rename one")
    items = [images_in(p) for p in classes]
    for folder, images in zip(classes, items):
        if not images:
            raise UserError(f"class folder {folder} holds no images ({', '.join(sorted(ENDINGS))}): add some or take it away")
    return Listing(name, [spoken(p.name) for p in classes], template, items, draw=name)
