"""Build the `emoji` benchmark: the emoji that all four of its free sets draw, sorted into classes
that a person would name.

    npm install --prefix /tmp/npm @iconify/json@2.2.535 emojibase-data@17.0.0
    pip install resvg-py
    python data/build/make_emoji.py --npm /tmp/npm      # data/emoji/, data/contact_sheet.png

A task is a drawing style and is stored as one image: all its drawings, 64 x 64 pixels each, 40 per
row, in the order of `classes.json`, the same in all four. So emoji number i is the tile in row
i // 40, column i % 40, of every style.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent))
from collect_drawings import SIZE, icon_svgs, render  # noqa: E402

HERE = Path(__file__).resolve().parents[1] / "emoji"
COLUMNS = 40
STYLES = {
    "Noto": "noto",
    "Twemoji": "twemoji",
    "Fluent": "fluent-emoji-flat",
    "High Contrast": "fluent-emoji-high-contrast",
}

# class name: Unicode subgroups (after "+") and single emoji labels; "-" removes labels from the
# subgroups. Variants of a person that differ only in gender are near copies, so the classes of
# people use only the neutral one.
CLASSES = {
    "smiling face":
        "+face-smiling +face-affection, face savoring food, face with tongue,"
        " winking face with tongue,squinting face with tongue, smiling face with sunglasses,"
        " cowboy hat face, - upside-down face, melting face,smiling face with tear,"
        " face blowing a kiss",
    "sad face":
        "worried face, slightly frowning face, frowning face, pleading face,"
        " face holding back tears,frowning face with open mouth, anguished face, fearful face,"
        " anxious face with sweat, sad but relieved face,crying face, loudly crying face,"
        " confounded face, persevering face, disappointed face, downcast face with sweat,"
        "weary face, tired face, pensive face, confused face, angry face, enraged face",
    "cat face": "+cat-face, cat face, tiger face, lion",
    "monster":
        "skull, skull and crossbones, ogre, goblin, ghost, alien, alien monster, robot,"
        " jack-o-lantern, vampire, zombie, troll",
    "heart": "+heart, heart suit, anatomical heart, - love letter, heart exclamation",
    "hand":
        "+hand-fingers-open +hand-fingers-partial +hand-single-finger +hand-fingers-closed +hands,"
        "writing hand, nail polish, - handshake",
    "person": "+person",
    "worker":
        "health worker, student, teacher, judge, farmer, cook, mechanic, factory worker,"
        " office worker, scientist,technologist, singer, artist, pilot, astronaut, firefighter,"
        " police officer, detective, guard, construction worker",
    "person playing sport":
        "person fencing, skier, snowboarder, person golfing, person surfing, person swimming,"
        " person bouncing ball,person lifting weights, person cartwheeling, people wrestling,"
        " person playing water polo, person playing handball,person juggling, person climbing,"
        " person running",
    "mammal":
        "+animal-mammal +monkey-face, - cat face, tiger face, lion, unicorn, bat, paw prints,"
        " pig nose",
    "bird": "+animal-bird, - feather, wing",
    "reptile": "+animal-reptile",
    "marine animal": "+animal-marine, - spiral shell, coral",
    "insect": "+animal-bug, - snail, spider web, worm, microbe",
    "flower": "+plant-flower, - rosette",
    "plant":
        "+plant-other, Christmas tree, tanabata tree, pine decoration, leafy green,"
        " - sheaf of rice, empty nest, nest with eggs,mushroom",
    "fruit": "+food-fruit",
    "vegetable": "+food-vegetable, - leafy green, beans",
    "bread":
        "bread, croissant, baguette bread, flatbread, pretzel, bagel, pancakes, waffle,"
        " stuffed flatbread, sandwich",
    "prepared food":
        "hamburger, french fries, pizza, hot dog, taco, burrito, cooking, shallow pan of food,"
        " pot of food, fondue,bowl with spoon, green salad, bento box, cooked rice, curry rice,"
        " steaming bowl, spaghetti, sushi, takeout box",
    "dessert": "+food-sweet, fortune cookie, moon cake, - honey pot",
    "drink": "+drink, - ice, pouring liquid, teapot",
    "landscape":
        "+place-geographic, foggy, night with stars, cityscape, sunrise over mountains, sunrise,"
        " cityscape at dusk, sunset,bridge at night, milky way, - camping, national park",
    "building":
        "+place-building +place-religious, - building construction, brick, rock, wood, wedding,"
        " kaaba, Statue of Liberty,Tokyo tower",
    "train":
        "locomotive, railway car, high-speed train, bullet train, train, metro, light rail,"
        " station, tram, monorail,mountain railway, tram car, suspension railway",
    "vehicle":
        "ambulance, police car, oncoming police car, taxi, oncoming taxi, automobile,"
        " oncoming automobile,sport utility vehicle, pickup truck, racing car, bus, oncoming bus,"
        " trolleybus, minibus, fire engine,delivery truck, articulated lorry, tractor, motorcycle,"
        " motor scooter, bicycle, kick scooter, auto rickshaw",
    "boat":
        "sailboat, canoe, speedboat, passenger ship, ferry, motor boat, ship, person rowing boat",
    "aircraft":
        "airplane, small airplane, airplane departure, airplane arrival, helicopter, rocket,"
        " flying saucer, satellite",
    "clock": "+time, - hourglass done, hourglass not done",
    "moon":
        "new moon, waxing crescent moon, first quarter moon, waxing gibbous moon, full moon,"
        " waning gibbous moon,last quarter moon, waning crescent moon, crescent moon,"
        " new moon face, first quarter moon face, last quarter moon face,full moon face",
    "cloud":
        "cloud, sun behind cloud, cloud with lightning and rain, sun behind small cloud,"
        " sun behind large cloud,sun behind rain cloud, cloud with rain, cloud with snow,"
        " cloud with lightning, fog, face in clouds",
    "star":
        "star, glowing star, shooting star, sparkles, sparkle, eight-pointed star, star of David,"
        " dotted six-pointed star, dizzy,star and crescent",
    "medal": "+award-medal, reminder ribbon, rosette",
    "ball":
        "soccer ball, baseball, softball, basketball, volleyball, american football,"
        " rugby football, tennis, bowling,pool 8 ball, crystal ball, mirror ball",
    "sport":
        "cricket game, field hockey, ice hockey, lacrosse, ping pong, badminton, boxing glove,"
        " goal net, flag in hole,fishing pole, skis, sled, curling stone, flying disc, diving mask",
    "shoe":
        "thong sandal, man’s shoe, running shoe, hiking boot, flat shoe, high-heeled shoe,"
        " woman’s sandal, ballet shoes,woman’s boot, ice skate, roller skate",
    "hat":
        "crown, woman’s hat, top hat, graduation cap, billed cap, military helmet,"
        " rescue worker’s helmet",
    "clothes":
        "lab coat, safety vest, t-shirt, jeans, scarf, gloves, coat, socks, dress, kimono, sari,"
        " one-piece swimsuit, briefs,shorts, bikini, woman’s clothes, running shirt,"
        " martial arts uniform",
    "handbag": "purse, handbag, clutch bag, shopping bags, backpack, briefcase, luggage, money bag",
    "musical instrument": "+musical-instrument, postal horn",
    "phone": "+phone, no mobile phones, mobile phone off, vibration mode, - pager, fax machine",
    "computer":
        "+computer, television, video game, joystick, fax machine, - abacus, electric plug,"
        " battery, low battery",
    "camera": "movie camera, film projector, camera, camera with flash, video camera, cinema",
    "loudspeaker":
        "+sound, microphone, studio microphone, headphone, radio, - bell, bell with slash,"
        " postal horn",
    "book":
        "notebook with decorative cover, closed book, open book, green book, blue book,"
        " orange book, books, notebook, ledger",
    "paper":
        "page with curl, scroll, page facing up, newspaper, rolled-up newspaper, bookmark tabs,"
        " memo, receipt, clipboard,spiral notepad, bar chart, chart increasing, chart decreasing,"
        " calendar, tear-off calendar, spiral calendar",
    "money":
        "coin, yen banknote, dollar banknote, euro banknote, pound banknote, money with wings,"
        " credit card, heavy dollar sign,currency exchange",
    "mail": "+mail, love letter, red envelope, - outbox tray, inbox tray, ballot box with ballot",
    "tool":
        "hammer, axe, pick, hammer and pick, hammer and wrench, carpentry saw, wrench,"
        " screwdriver, nut and bolt, clamp,scissors, kitchen knife, razor, plunger, pencil,"
        " fountain pen, pen, paintbrush, crayon, toolbox, ladder",
    "furniture":
        "bed, couch and lamp, chair, toilet, bathtub, door, window, mirror, shower, file cabinet",
    "flag": "+flag",
    "warning sign":
        "children crossing, no entry, prohibited, no bicycles, no smoking, no littering,"
        " non-potable water, no pedestrians,no one under eighteen, stop sign",
    "media button":
        "+av-symbol, - cinema, dim button, bright button, antenna bars, wireless, vibration mode,"
        " mobile phone off",
    "religion":
        "+religion, - atom symbol, peace symbol, star of David, star and crescent,"
        " dotted six-pointed star",
    "letters":
        "input latin uppercase, input latin lowercase, input latin letters, A button (blood type),"
        " AB button (blood type),B button (blood type), CL button, COOL button, FREE button,"
        " ID button, circled M, NEW button, NG button,O button (blood type), OK button, P button,"
        " SOS button, UP! button, VS button",
    "arrow": "+arrow",
    "zodiac sign": "+zodiac",
    "keycap number": "+keycap, input numbers, - keycap: #, keycap: *",
}


def split_rule(text):
    """The parts of a rule between its commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def select(rule, by_label, by_subgroup):
    """The emoji of one class, in Unicode's order."""
    take, _, leave = rule.partition("- ")
    chosen = set()
    for part in split_rule(take):
        names = part.split("+")
        chosen |= {by_label[names[0].strip()]["hexcode"]} if names[0].strip() else set()
        for subgroup in names[1:]:
            chosen |= {x["hexcode"] for x in by_subgroup[subgroup.strip()]}
    return chosen - {by_label[label]["hexcode"] for label in split_rule(leave)}


def save_sheet(svgs, file):
    """Draw SVGs into one image, in order."""
    sheet = np.full((-(-len(svgs) // COLUMNS) * SIZE, COLUMNS * SIZE, 3), 255, np.uint8)
    for i, svg in enumerate(svgs):
        row, column = i // COLUMNS * SIZE, i % COLUMNS * SIZE
        sheet[row : row + SIZE, column : column + SIZE] = render(svg)
    Image.fromarray(sheet).save(HERE / f"{file}.webp", lossless=True, quality=100, method=6)


def save_classes(classes, file):
    content = {
        name: [[x["hexcode"], x["label"]] for x in members] for name, members in classes.items()
    }
    (HERE / f"{file}.json").write_text(
        json.dumps(content, ensure_ascii=False, indent=0) + "\n", encoding="utf-8"
    )


def contact_sheet(classes):
    """A picture of 16 classes, one per column, in the four styles, one per row."""
    shown = list(classes)[::3][:16]
    sheet = Image.new("RGB", (120 + 70 * len(shown), 30 + 70 * len(STYLES)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    first = {
        name: sum(len(m) for m in list(classes.values())[:k]) for k, name in enumerate(classes)
    }
    for row, style in enumerate(STYLES):
        draw.text((8, 55 + 70 * row), style, "black", ImageFont.load_default(14))
        drawings = Image.open(HERE / f"{style.lower().replace(' ', '_')}.webp")
        for column, name in enumerate(shown):
            number = first[name] + len(classes[name]) // 2
            left, top = number % COLUMNS * SIZE, number // COLUMNS * SIZE
            sheet.paste(
                drawings.crop((left, top, left + SIZE, top + SIZE)),
                (123 + 70 * column, 30 + 70 * row),
            )
            draw.text((155 + 70 * column, 12), name, "black", font, anchor="mm")
    sheet.save(HERE.parent / "contact_sheet.png", optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--npm", type=Path, required=True, help="the folder that npm installed into"
    )
    npm = parser.parse_args().npm / "node_modules"
    entries = json.loads((npm / "emojibase-data/en/data.json").read_text())
    groups = json.loads((npm / "emojibase-data/meta/groups.json").read_text())["subgroups"]

    def plain(code):
        return "-".join(p for p in code.lower().split("-") if p != "fe0f")

    drawn = {}  # style -> code -> icon name
    for style, prefix in STYLES.items():
        chars = json.loads((npm / f"@iconify/json/json/{prefix}.json").read_text())["chars"]
        drawn[style] = {plain(code): name for code, name in chars.items()}
    common = [
        x for x in entries if "group" in x and all(plain(x["hexcode"]) in d for d in drawn.values())
    ]
    by_label = {x["label"]: x for x in common}
    by_subgroup = {}
    for x in common:
        by_subgroup.setdefault(groups[str(x["subgroup"])], []).append(x)

    classes, owner = {}, {}
    for name, rule in CLASSES.items():
        chosen = select(rule, by_label, by_subgroup)
        classes[name] = [x for x in common if x["hexcode"] in chosen]
        for x in classes[name]:
            assert owner.setdefault(x["hexcode"], name) == name, (
                f"{x['label']} is in {owner[x['hexcode']]} and in {name}"
            )
        assert 6 <= len(classes[name]) <= 80, (name, len(classes[name]))

    HERE.mkdir(exist_ok=True)
    order = [x for members in classes.values() for x in members]
    for style, prefix in STYLES.items():
        svgs = dict(icon_svgs(npm, prefix))
        aliases = json.loads((npm / f"@iconify/json/json/{prefix}.json").read_text()).get(
            "aliases", {}
        )
        names = [drawn[style][plain(x["hexcode"])] for x in order]
        save_sheet(
            [svgs[aliases[name]["parent"] if name in aliases else name] for name in names],
            style.lower().replace(" ", "_"),
        )
    save_classes(classes, "classes")
    contact_sheet(classes)
    print(len(classes), "classes,", len(order), "emoji in each of", len(STYLES), "styles")
    for name, members in classes.items():
        print(f"| {name} | {len(members)} | {', '.join(x['label'] for x in members[:4])}, ... |")


if __name__ == "__main__":
    main()
