"""Your own data: trees `domain/class/images`, and trees `class/images` that are one task."""
import re

from ..errors import UserError
from ..listing import Listing
from .lists import (
    check_folder,
    counted,
    folders,
    image_depth,
    images_in,
    plain,
    printable,
    skipped,
    skipped_runs,
    spoken,
)

PARTS = dict(train="train", training="train", trainval="train", val="val", valid="val",
             validate="val", validation="val", dev="val", eval="val", test="test", testing="test")
# words that may appear beside these; any word may end in "set"
FILLERS = {"", "data", "image", "images", "img", "imgs", "split"}


def tree(path):
    """The listings of a folder `domain/class/images`, a task per domain."""
    parts = own_split(path)
    if parts:
        return [split_tree(spoken(path.name), path, parts)]
    inside = folders(path)
    divided = [p for p in inside if own_split(p)]
    if divided:
        names = ", ".join(p.name for p in own_split(divided[0]).values())
        remedy = ",".join(f"{printable(p.name)}={p}" for p in inside)
        raise UserError(f"{divided[0]} has its own split ({names}), but the domains of a tree "
                        f"domain/class/*.jpg have none: give --data {remedy}")
    domains = {p: printable(p.name) for p in inside}
    return domain_trees(path, domains, "a photo of a {}")


def own_split(path):
    """{part: folder} of a tree `{train,val,test}/class/images`, empty for any other folder.

    Raises UserError if there are other folders beside these, or two for the same part: taken as
    tasks, one would be trained on another's test images.
    """
    inside, alike = folders(path), {}
    for p in inside:
        part, rest = part_of(p.name)
        if part:
            alike.setdefault(rest, {})[part] = p
    parts = next((parts for parts in alike.values() if "train" in parts and len(parts) > 1), None)
    if parts is None:
        return {}
    odd = [p for p in inside if p not in parts.values()]
    if odd:
        raise UserError(f"{path} holds {', '.join(p.name for p in parts.values())}, the parts of a "
                        f"split, and beside them {odd[0].name}: remove that folder")
    return {part: unwrapped(p) for part, p in parts.items()}


def part_of(name):
    """("train", "val" or "test", the other words) for a folder such as `training_set`, `seg_test`
    or `val2017`; (None, all words) for one that is not a part of a split."""
    words = [word.removesuffix("set") for word in re.findall(r"[^\W\d_]+", name.lower())]
    found = [PARTS[word] for word in words if word in PARTS]
    rest = [word for word in words if word not in PARTS and word not in FILLERS]
    return found[0] if found else None, tuple(rest)


def unwrapped(path):
    """A folder, or the folder inside it if that is the only one and has the same name."""
    inside = folders(path)
    return inside[0] if [p.name for p in inside] == [path.name] else path


def class_names(names):
    """The class names, from the names of a task's folders.

    A leading number is taken as a label and dropped if every class has one, zero-padded to the same
    width or counting from 0 or 1, and the names still differ without it:
    `001.Black_footed_Albatross`, but not `10_to_19` or `5_euro`. A WordNet ID is dropped:
    `n02085620-Chihuahua`.
    """
    names = [re.sub(r"^n\d{8}[-_. ]+(?=.)", "", name) for name in names]
    numbered = re.compile(r"(\d+)[-_. ]+(?!to[-_. ]?\d)([^-_. \d].*)", re.ASCII)
    found = [numbered.fullmatch(name) for name in names]
    if all(found):
        numbers, rest = [match[1] for match in found], [spoken(match[2]) for match in found]
        padded = len(set(map(len, numbers))) == 1 and any(re.match("0.", x) for x in numbers)
        counts = [list(range(first, first + len(names))) for first in (0, 1)]
        counting = sorted(map(int, numbers)) in counts
        if (padded or counting) and len(set(rest)) == len(rest):
            return rest
    return [spoken(name) for name in names]


def domain_trees(path, domains, template, names=()):
    """A listing per domain from `domain/class/images`; every domain needs the same classes.

    names: published class names, used if a folder's name has the same letters.
    """
    depth = image_depth(path)
    if depth is None:
        raise UserError(f"{path} holds no images: it should be a tree domain/class/*.jpg")
    if depth == 0:
        raise UserError(f"{path} holds images directly, but --data takes a tree "
                        "domain/class/*.jpg: go two levels up")
    if depth == 1:
        raise UserError(
            f"{path} holds folders of images, the classes of one task, but --data takes "
            "a tree domain/class/*.jpg: go one level up, or give "
            f"name={path} to make it one task"
        )
    if depth > 2:
        inside = " or ".join(str(p) for p in folders(path)[:3])
        levels = "a level" if depth == 3 else "levels"
        raise UserError(f"{path} is {levels} too high for a tree domain/class/*.jpg: try {inside}")
    trees = [class_tree(name, folder, template, names)
             for folder, name in domains.items()]
    for one in trees:
        for other in trees:
            for name in one.class_names:
                if name not in other.class_names:
                    raise UserError(f"class '{name}' is in {path}'s domain {one.name} but not in "
                                    f"{other.name}: every domain needs the same classes; for tasks "
                                    "with different classes give name=path,name=path")
    stray = images_in(path)
    if stray:
        trees[0].notes.append(f"skipped {counted(stray, 'image')} beside the domains in {path}, "
                              f"such as {stray[0].name}")
    trees[0].remarks += skipped_runs(path)
    return trees


def class_tree(name, path, template="a photo of a {}", names=()):
    """One listing from `class/images`, the classes sorted by name; or from
    `{train,val,test}/class/images`, whose split is kept."""
    check_folder(path)
    parts = own_split(path)
    if parts:
        return split_tree(name, path, parts, template)
    inside, depth = folders(path), image_depth(path)
    if depth is None:
        raise UserError(f"{path} holds no images; a task is a tree class/*.jpg")
    if depth == 0:
        raise UserError(f"{path} holds images directly: go one level up; a task is a tree "
                        "class/*.jpg")
    if depth > 1:
        raise UserError(f"{path} is a level too high; a task is a tree class/*.jpg")
    published, notes = {plain(known): known for known in names}, []
    named = {}
    for p, own in zip(inside, class_names([p.name for p in inside])):
        named[p] = published.get(plain(p.name), own)
    classes = sorted(inside, key=named.get)
    for one, other in zip(classes, classes[1:]):
        if named[one] == named[other]:
            raise UserError(f"{one} and {other} are both called '{named[one]}': put their images "
                            "into one folder or rename one")
    items = [images_in(p) for p in classes]
    for folder, images in zip(classes, items):
        notes += skipped(folder)
        if not images:
            raise UserError(f"class folder {folder} holds no images that can be read: add some or "
                            "remove it")
    stray = images_in(path)
    if stray:
        notes.append(f"skipped {counted(stray, 'image')} beside the classes in {path}, such as "
                     f"{stray[0].name}")
    return Listing(name, [named[p] for p in classes], template, items, draw=name, notes=notes,
                   remarks=skipped_runs(path))


def split_tree(name, path, parts, template="a photo of a {}"):
    """One listing from `{train,val,test}/class/images`, torchvision's ImageFolder layout.

    parts: the folders of train, val and test below `path`.
    """
    trees = {part: class_tree(name, folder, template) for part, folder in parts.items()}
    train = trees["train"]
    for part, one in trees.items():
        if one.class_names != train.class_names:
            odd = sorted(set(one.class_names) ^ set(train.class_names))
            raise UserError(f"{parts['train']} and {parts[part]} have different classes "
                            f"('{odd[0]}' is in only one of them): all parts of a split need the "
                            "same classes")
    notes = [note for one in trees.values() for note in one.notes]
    remarks = [f"{path} is taken as one task, {name}, with its own split into {', '.join(trees)}"]
    remarks += skipped_runs(path)
    for one in trees.values():
        remarks += one.remarks
    found = Listing(name, train.class_names, template, train.items, draw=name, notes=notes,
                    remarks=remarks)
    if "test" in trees:
        found.test = trees["test"].items
        found.val = trees["val"].items if "val" in trees else None
    elif "val" in trees:
        found.test = trees["val"].items     # many trees have only train and val
    return found
