"""Your own data: trees `domain/class/images`, and trees `class/images` that make one task."""
from pathlib import Path

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
    spoken,
)

PARTS = dict(train="train", training="train", val="val", valid="val", validation="val", test="test",
             testing="test")


def tree(path):
    """The listings of a folder `domain/class/images`, a task per domain."""
    parts = own_split(path)
    if parts:
        return [split_tree(spoken(path.name), parts)]
    domains = {p: printable(p.name) for p in folders(path)}
    return domain_trees(path, domains, "a photo of a {}")


def own_split(path):
    """{part: folder} of a tree `{train,val,test}/class/images`, empty where it is none.

    Raises UserError where other folders lie beside these or two have one part: taken as tasks, one
    would be trained on another's test images.
    """
    inside = folders(path)
    named = [p for p in inside if p.name.lower() in PARTS]
    parts = {PARTS[p.name.lower()]: p for p in named}
    if "train" not in parts or len(parts) < 2:
        return {}
    odd = [p for p in inside if p not in parts.values()]
    if odd:
        raise UserError(f"{path} holds {', '.join(p.name for p in parts.values())}, the parts of a "
                        f"split, and beside them {odd[0].name}: take that folder away")
    return parts


def domain_trees(path, domains, template, names=()):
    """A listing per domain from `domain/class/images`; every domain needs the same classes.

    names: published class names, taken where a folder's name has the same letters.
    """
    depth = image_depth(path)
    if depth is None:
        raise UserError(f"{path} holds no images: it should be a tree domain/class/*.jpg")
    if depth == 0:
        raise UserError(f"{path} holds images themselves, and --data takes a tree "
                        "domain/class/*.jpg: go two levels up")
    if depth == 1:
        raise UserError(
            f"{path} holds folders of images, the classes of one task, and --data takes "
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
                    raise UserError(f"class '{name}' is in {path}'s domain {one.name} and not in "
                                    f"{other.name}: every domain needs the same classes; for tasks "
                                    "with classes of their own give name=path,name=path")
    stray = images_in(path)
    if stray:
        trees[0].notes.append(f"skipped {counted(stray, 'image')} beside the domains in {path}, "
                              f"such as {stray[0].name}")
    return trees


def class_tree(name, path, template="a photo of a {}", names=()):
    """One listing from `class/images`, the classes in the order of their spoken names; or from
    `{train,val,test}/class/images`, whose split is kept."""
    check_folder(path)
    parts = own_split(path)
    if parts:
        return split_tree(name, parts, template)
    inside, depth = folders(path), image_depth(path)
    if depth is None:
        raise UserError(f"{path} holds no images; a task is a tree class/*.jpg")
    if depth == 0:
        raise UserError(f"{path} holds images themselves: go one level up; a task is a tree "
                        "class/*.jpg")
    if depth > 1:
        raise UserError(f"{path} is a level too high; a task is a tree class/*.jpg")
    published, notes = {plain(known): known for known in names}, []
    named = {p: published.get(plain(p.name), spoken(p.name)) for p in inside}
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
                            "take it away")
    stray = images_in(path)
    if stray:
        notes.append(f"skipped {counted(stray, 'image')} beside the classes in {path}, such as "
                     f"{stray[0].name}")
    return Listing(name, [named[p] for p in classes], template, items, draw=name, notes=notes)


def split_tree(name, parts, template="a photo of a {}"):
    """One listing from `{train,val,test}/class/images`, torchvision's ImageFolder layout."""
    trees = {part: class_tree(name, Path(path), template) for part, path in parts.items()}
    train = trees["train"]
    for part, one in trees.items():
        if one.class_names != train.class_names:
            odd = sorted(set(one.class_names) ^ set(train.class_names))
            raise UserError(f"{parts['train']} and {parts[part]} have other classes ('{odd[0]}' is "
                            "in one of them only): a split needs the same classes on every side")
    notes = [note for one in trees.values() for note in one.notes]
    folder = Path(parts["train"]).parent
    remark = f"{folder} is taken as one task, {name}, with its own split into {', '.join(trees)}"
    found = Listing(name, train.class_names, template, train.items, draw=name, notes=notes,
                    remarks=[remark])
    if "test" in trees:
        found.test = trees["test"].items
        found.val = trees["val"].items if "val" in trees else None
    elif "val" in trees:
        found.test = trees["val"].items     # many trees have train and val only
    return found
