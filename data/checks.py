"""`python common.py check --data NAME --root DIR`: is a benchmark whole, and can its images be read?"""
import sys
from collections import Counter

from torch.utils.data import DataLoader
from torchvision import transforms

import common
from common import Images, Prepared, UserError, find_listings, progress
from multitask_prompt_listings import images_of, workers

SHOWN = 10                      # problems in words; the rest is a number


def check(argv):
    """Print what a benchmark holds and what is wrong with it; exit with 1 where something is."""
    parser = common._Parser(prog="common.py check", description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", required=True, metavar="NAME|DIR", help="as for training: a benchmark, a folder, name=path, or several")
    parser.add_argument("--root", default="data", metavar="DIR", help="where the datasets are (default data)")
    parser.add_argument("--quick", action="store_true", help="do not decode the images")
    args = parser.parse_args(argv)
    listings = find_listings(args.data, args.root)
    print_listings(listings)
    problems = [note for x in listings for note in x.notes] + [line for x in listings for line in gaps(x)]
    if not args.quick:
        problems += [line for x in listings for line in undecoded(x)]
    for line in problems[:SHOWN]:
        print(f"problem: {line}")
    if len(problems) > SHOWN:
        print(f"... and {len(problems) - SHOWN:,} more")
    tasks, images = len(listings), sum(len(items) for x in listings for items in images_of(x).values())
    state = f"{len(problems):,} problem{'s' * (len(problems) > 1)}" if problems else "all is well"
    print(f"{tasks} task{'s' * (tasks > 1)}, {images:,} images{', none of them decoded' * args.quick}: {state}")
    if problems:
        sys.exit(1)


def print_listings(listings):
    """A row a task; the training images are those to choose from, "rest": the test images are what a split leaves of them."""
    rows = [["task", "classes", "train", "val", "test", "template", "metric"]]
    for x in listings:
        parts = {part: f"{len(items):,}" for part, items in images_of(x).items()}
        rows.append([x.name, str(len(x.class_names)), parts["train"], parts["val"] if x.val else "-", parts["test"] if x.test else "rest",
                     x.template, x.metric])
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [cell.rjust(w) if 0 < i < 5 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())
    print()


def gaps(listing):
    """What is odd about the lists: a class without test images, an image that is in two parts or twice in one."""
    if listing.test:
        for name, items in zip(listing.class_names, listing.test):
            if not items:
                yield f"class '{name}' of {listing.name} has no test image"
    if listing.read is common.read_image:
        count = Counter(str(item) for items in images_of(listing).values() for item in items)
        for path in (path for path, n in count.items() if n > 1):
            yield f"{path} is listed {count[path]} times in {listing.name}"


def undecoded(listing):
    """The images that cannot be decoded, a line each; worker processes read them where there are many."""
    items = [item for part in images_of(listing).values() for item in part]
    images = Images(items, [0] * len(items), listing.read)
    small = transforms.Compose([transforms.Resize((8, 8), transforms.InterpolationMode.NEAREST), transforms.ToTensor()])
    batches = DataLoader(Prepared(images, small, copies=1, seed=0), 64, num_workers=workers([images]), collate_fn=list)
    return [str(image) for batch in progress(batches, f"read {listing.name}") for image in batch if isinstance(image, UserError)]
