"""Domains as tasks, images listed in text files: DomainNet (6 domains, 345 classes) and miniDomainNet (4 domains, 126 classes).

Peng et al., ICCV 2019; the subset is from Zhou et al., Domain Adaptive Ensemble Learning. Layouts: Dassl's `domainnet/splits/` and
`domainnet/splits_mini/`, or the official lists beside the folders of the domains. A line is `clipart/alarm_clock/file.jpg 7`.
"""
from functools import partial

from common import UserError
from multitask_prompt_files import check_folder, compared, elsewhere, label_names, read_lines, split_listing, spoken

DOMAINS = ["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]
# The published painting_train.txt has no t-shirt (a note in Dassl's loader): that task is trained without one.
LACKING = {"painting": {"t-shirt"}}


def domainnet(root, title="DomainNet", domains=DOMAINS, lists=("splits", "."), classes=345):
    """A listing a domain, from `{domain}_{train,test}.txt` in one of the folders `lists` of `root/domainnet` or `root`."""
    check_folder(root, "--root")
    files = [f"{domain}_{part}.txt" for domain in domains for part in ("train", "test")]
    places = [(place, place / folder) for place in (root / "domainnet", root) for folder in lists]
    place, folder = next(((p, f) for p, f in places if (f / files[0]).is_file()), (None, None))
    if not place:
        needs = f"{title} needs {root / 'domainnet' / lists[0]}/{files[0]} and so on, beside the folders of its domains"
        raise UserError(f"{needs}: {elsewhere(root, 'domainnet', DOMAINS) or 'put them there or give another --root'}")
    parts = {domain: {part: read_list(folder / f"{domain}_{part}.txt", place) for part in ("train", "test")} for domain in domains}
    names = {}
    for domain in domains:
        label_names(parts[domain], folder, names)
    for domain in domains:
        own = {label for items in parts[domain].values() for _, label, _ in items}
        for label in sorted(names.keys() - own):
            if names[label] not in LACKING.get(domain, ()):
                other = next(d for d in domains if any(x == label for items in parts[d].values() for _, x, _ in items))
                raise UserError(f"class '{names[label]}' is in {folder}'s lists of {other} and not in those of {domain}: get the lists "
                                "anew, every domain has the same classes")
    return compared([split_listing(domain.capitalize(), "a photo of a {}", parts[domain], names, folder / f"{domain}_*.txt",
                                   f"{title}/{domain}", LACKING.get(domain, ())) for domain in domains], title, place, classes)


def read_list(path, place):
    """[(path, label, class name)] of a list of images below `place`."""
    items, spoken_names = [], {}
    for line in read_lines(path):
        image, _, label = line.strip().rpartition(" ")
        folders = image.split("/")
        if len(folders) < 3 or not label.isdigit():
            raise UserError(f"{path} has a line '{line[:80]}', and a line should be domain/class/image.jpg and a label: get the file anew")
        name = spoken_names.get(folders[1]) or spoken_names.setdefault(folders[1], spoken(folders[1]))
        items.append((f"{place}/{image}", int(label), name))
    return items


BENCHMARKS = {"minidomainnet": partial(domainnet, title="miniDomainNet", domains=["clipart", "painting", "real", "sketch"],
                                       lists=("splits_mini",), classes=126), "domainnet": domainnet}
