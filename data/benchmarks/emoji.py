"""The built-in benchmarks: drawings of emoji in four styles (data/README.md says whose).

`emoji`: 4 tasks, the styles, with 58 shared classes. `emoji24`: the same drawings as 24 tasks, 4
styles times 6 topics, each with the classes of its topic. All drawings of one emoji are on the same
side of a split in every style, and in both benchmarks.
"""
import json
from pathlib import Path

from ..images import read_tile
from ..listing import Listing

FOLDER = Path(__file__).resolve().parents[1] / "emoji"
STYLES = {
    "Noto": "noto",
    "Twemoji": "twemoji",
    "Fluent": "fluent",
    "High Contrast": "high_contrast",
}
TOPICS = {
    "People": [
        "smiling face",
        "sad face",
        "monster",
        "heart",
        "hand",
        "person",
        "worker",
        "person playing sport",
        "hat",
        "shoe",
        "clothes",
        "handbag",
    ],
    "Nature": [
        "cat face",
        "mammal",
        "bird",
        "reptile",
        "marine animal",
        "insect",
        "flower",
        "plant",
        "moon",
        "cloud",
        "star",
    ],
    "Food": ["fruit", "vegetable", "bread", "prepared food", "dessert", "drink"],
    "Places": ["landscape", "building", "train", "vehicle", "boat", "aircraft", "clock"],
    "Things": [
        "medal",
        "ball",
        "sport",
        "musical instrument",
        "phone",
        "computer",
        "camera",
        "loudspeaker",
        "book",
        "paper",
        "money",
        "mail",
        "tool",
        "furniture",
    ],
    "Symbols": [
        "flag",
        "warning sign",
        "media button",
        "religion",
        "letters",
        "arrow",
        "zodiac sign",
        "keycap number",
    ],
}


def drawings():
    """{class name: the numbers of its drawings}, the same in every style's sheet."""
    classes = json.loads((FOLDER / "classes.json").read_text(encoding="utf-8"))
    numbers, start = {}, 0
    for name, members in classes.items():
        numbers[name] = range(start, start + len(members))
        start += len(members)
    return numbers


def listing(task, sheet, names, numbers):
    """The Listing of some classes in one style."""
    path = str(FOLDER / f"{sheet}.webp")
    items = [[(path, number) for number in numbers[name]] for name in names]
    places = [list(numbers).index(name) for name in names]
    return Listing(
        task, names, "a drawing of a {}", items, draw="emoji", numbers=places, read=read_tile
    )


def emoji(root):
    """4 drawing styles x 58 classes."""
    numbers = drawings()
    return [listing(style, sheet, list(numbers), numbers) for style, sheet in STYLES.items()]


def emoji24(root):
    """4 drawing styles x 6 topics, each task with the 6 to 14 classes of its topic."""
    numbers = drawings()
    return [listing(f"{style} {topic}", sheet, names, numbers)
            for style, sheet in STYLES.items() for topic, names in TOPICS.items()]


BENCHMARKS = dict(emoji=emoji, emoji24=emoji24)
