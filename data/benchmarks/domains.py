"""Domains as tasks: Office-Home, PACS, miniDomainNet and DomainNet.

Peng et al., ICCV 2019 (DomainNet; the subset is from Zhou et al., Domain Adaptive Ensemble
Learning). Layouts of DomainNet: Dassl's `domainnet/splits/` and `domainnet/splits_mini/`, or the
official lists beside the folders of the domains. A line is `clipart/alarm_clock/file.jpg 7`.
miniDomainNet pools its train and test lists, so that a split draws from all its images and tests on
the rest: 1% is 3 images per class of the 140,000 that MmAP counts, and zero-shot CLIP's accuracy
in its and JSCPT's Table 2 changes with the split. DomainNet is tested on its test lists.
"""
from functools import partial
from pathlib import Path

from ..errors import UserError
from .folders import domain_trees
from .lists import (
    check_folder,
    compared,
    elsewhere,
    folders,
    label_names,
    read_lines,
    split_listing,
    spoken,
)

CLASS_NAMES = Path(__file__).resolve().parents[1] / "class_names"
DOMAINS = ["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]
# The published painting_train.txt has no t-shirt (a note in Dassl's loader).
LACKING = {"painting": {"t-shirt"}}


def officehome(root):
    """Office-Home: the official archive's folder, Dassl's `office_home`, or either as `root`."""
    names = ["Art", "Clipart", "Product", "Real World"]
    places = ["OfficeHomeDataset_10072016", "office_home"]
    published = read_lines(CLASS_NAMES / "officehome.txt")
    listings = named_domains(root, "Office-Home", places, names, published)
    return compared(listings, "Office-Home", root, classes=65, images=15_588, names=published)


def pacs(root):
    """PACS: Dassl's `pacs/images/{art_painting,cartoon,photo,sketch}`, or those under `root`."""
    places = ["pacs/images", "PACS/images", "pacs", "PACS"]
    return named_domains(root, "PACS", places, ["Art Painting", "Cartoon", "Photo", "Sketch"])


def named_domains(root, benchmark, places, names, classes=()):
    """The domain trees of a benchmark in the first of `places` under `root`, or in `root`.

    classes: the published class names.
    """
    check_folder(root, "--root")
    for place in [root / p for p in places] + [root]:
        if place.is_dir():
            found = {spoken(p.name): p for p in folders(place)}
            if all(spoken(name) in found for name in names):
                domains = {found[spoken(name)]: name for name in names}
                return domain_trees(place, domains, "a photo of a {}", classes)
    raise UserError(f"{benchmark} is not in {root}: put its folders {', '.join(names)} into "
                    f"{root / places[0]}, or give --root the folder that holds them")


def domainnet(root, title="DomainNet", domains=DOMAINS, lists=("splits", "."), classes=345,
              pooled=False):
    """A listing per domain, from `{domain}_{train,test}.txt` in one of the folders `lists` of
    `root/domainnet` or `root`. pooled: both lists are images to draw from."""
    check_folder(root, "--root")
    first = f"{domains[0]}_train.txt"
    places = [(place, place / folder) for place in (root / "domainnet", root) for folder in lists]
    found = [(place, folder) for place, folder in places if (folder / first).is_file()]
    if not found:
        needs = (
            f"{title} needs {root / 'domainnet' / lists[0]}/{first} and so on, beside the folders"
        )
        remedy = elsewhere(root, "domainnet", DOMAINS) or "put them there or give another --root"
        raise UserError(f"{needs} of its domains: {remedy}")
    place, folder = found[0]
    parts = {domain: {part: read_list(folder / f"{domain}_{part}.txt", place)
                      for part in ("train", "test")} for domain in domains}
    names = {}
    for domain in domains:
        label_names(parts[domain], folder, names)
    for domain in domains:
        own = {label for items in parts[domain].values() for _, label, _ in items}
        for label in sorted(names.keys() - own):
            if names[label] not in LACKING.get(domain, ()):
                other = next(d for d in domains if any(
                    x == label for items in parts[d].values() for _, x, _ in items))
                raise UserError(f"class '{names[label]}' is in {folder}'s lists of {other} but not "
                                f"in those of {domain}: download the lists again, every domain has "
                                "the same classes")
    if pooled:
        parts = {domain: dict(train=x["train"] + x["test"]) for domain, x in parts.items()}
    listings = [split_listing(domain.capitalize(), "a photo of a {}", parts[domain], names,
                              folder / f"{domain}_*.txt", f"{title}/{domain}",
                              LACKING.get(domain, ())) for domain in domains]
    return compared(listings, title, place, classes)


def read_list(path, place):
    """[(path, label, class name)] of a list of images below `place`."""
    items, names = [], {}
    for line in read_lines(path):
        image, _, label = line.strip().replace("\\", "/").rpartition(" ")
        parts = image.split("/")
        if len(parts) < 3 or not label.isdigit():
            raise UserError(f"{path} has a line '{line[:80]}', but a line should be "
                            "domain/class/image.jpg and a label: download the file again")
        if parts[1] not in names:
            names[parts[1]] = spoken(parts[1])
        items.append((f"{place}/{image}", int(label), names[parts[1]]))
    return items


minidomainnet = partial(domainnet, title="miniDomainNet", classes=126, lists=("splits_mini",),
                        domains=["clipart", "painting", "real", "sketch"], pooled=True)
BENCHMARKS = dict(
    officehome=officehome, pacs=pacs, minidomainnet=minidomainnet, domainnet=domainnet
)
