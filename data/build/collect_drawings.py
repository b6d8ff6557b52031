"""Rasterise free emoji and icon sets into one array, the pretraining images of the `tiny` backbone.

    npm install --prefix /tmp/npm @iconify/json@2.2.535 emojibase-data@17.0.0 openmoji@17.0.0
    pip install resvg-py
    python data/build/collect_drawings.py --npm /tmp/npm --out /tmp/tiny/drawings.npz

None of the four styles of the `emoji` benchmark, and no other edition of one (Noto 1, Fluent 3D,
Fluent's UI icons), is among the sets below. FxEmoji, a fifth style, is held out: no training step
uses it, and the accuracy on it monitors the training. Every drawing gets a `concept`: the emoji it
draws (skin tones and sets share it) or, for an icon, the words of its name. A concept's label, tags
and group make its captions.
"""

import argparse
import io
import json
import re
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image

EMOJI_SETS = ["openmoji", "emojione", "emojione-v1", "emojione-monotone", "streamline-emojis"]
HELD_OUT = "fxemoji"
ICON_SETS = """mdi tabler ph game-icons solar lucide carbon healthicons maki temaki pinhead
fa6-solid fa7-solid ion bi ri mingcute
    iconoir streamline streamline-color streamline-flex streamline-flex-color streamline-plump
    streamline-plump-color
    streamline-sharp streamline-sharp-color streamline-ultimate streamline-ultimate-color
    streamline-freehand
    streamline-freehand-color streamline-kameleon-color streamline-stickies-color streamline-cyber
    streamline-cyber-color
    streamline-pixel streamline-block icon-park icon-park-outline icon-park-solid icon-park-twotone
    flat-color-icons hugeicons
    material-symbols ic meteocons marketeq lets-icons boxicons glyphs-poly mynaui iconamoon uil
    tdesign la eva vaadin grommet-icons
    medical-icon covid osmic roentgen gis wi pixelarticons pepicons-pop pepicons-print
    pepicons-pencil f7 duo-icons icons8
    lineicons clarity nrk typcn bx bxs iconmind keyline-icons reicon dinkie-icons circum""".split()
STYLE_WORDS = set(
    """outline outlined filled fill line linear solid bold light thin duotone broken sharp rounded
    round regular two
    tone twotone off alt o s l m xl sm lg min mini small large variant icon icons symbol one ii iii
    freehand color flat remix
    print pop pencil 24 16 20 32 circle square box add remove plus minus check edit settings search
    user""".split()
)
SIZE = 64


def words(text):
    return re.findall(r"[a-z]+", text.lower().replace("’", "").replace("'", ""))


def slug(text):
    return "-".join(re.findall(r"[a-z0-9]+", text.lower().replace("’", "").replace("'", "")))


def render(svg):
    """A [64, 64, 3] raster of an SVG on white, or None if the drawing cannot be read."""
    import resvg_py

    try:
        png = resvg_py.svg_to_bytes(
            svg_string=svg, width=SIZE, height=SIZE, background="#ffffff", skip_system_fonts=True
        )
        image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    except ValueError:
        return None
    if image.size != (SIZE, SIZE):
        image.thumbnail((SIZE, SIZE), Image.BICUBIC)
        canvas = Image.new("RGB", (SIZE, SIZE), "white")
        canvas.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
        image = canvas
    return np.asarray(image)


def icon_svgs(npm, name):
    """Yield (icon name, SVG text) of one Iconify set, without hidden duplicates."""
    data = json.loads((npm / f"@iconify/json/json/{name}.json").read_text())
    for key, icon in data["icons"].items():
        box = [
            icon.get(k, data.get(k, d))
            for k, d in [("left", 0), ("top", 0), ("width", 16), ("height", 16)]
        ]
        yield (
            key,
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" '
                f'xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{" ".join(map(str, box))}" color="black">{icon["body"]}</svg>'
            ),
        )


def emoji_index(npm):
    """Map names (also without hyphens) and shortcodes to emojibase's entries; skin tones map to
    their base emoji."""
    entries = json.loads((npm / "emojibase-data/en/data.json").read_text())
    by_hex = {x["hexcode"]: x for x in entries}
    index = {}
    for file in sorted((npm / "emojibase-data/en/shortcodes").glob("*.json")):
        for code, names in json.loads(file.read_text()).items():
            if code in by_hex:
                for name in [names] if isinstance(names, str) else names:
                    index.setdefault(slug(name), by_hex[code])
    for x in entries:
        for label in [x["label"]] + [s["label"] for s in x.get("skins", [])]:
            index[slug(label)] = index[slug(label).replace("-", "")] = x
    return entries, index


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--npm", type=Path, required=True, help="the folder that npm installed into"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    npm = args.npm / "node_modules"
    entries, index = emoji_index(npm)
    groups = json.loads((npm / "emojibase-data/meta/groups.json").read_text())["subgroups"]
    vocabulary = {
        w
        for x in entries
        if x.get("group") not in (None, 9)
        for t in [x["label"], *x.get("tags", [])]
        for w in words(t)
    }

    def emoji_concept(entry):
        if "group" not in entry or groups[str(entry["subgroup"])] in (
            "country-flag",
            "subdivision-flag",
            "skin-tone",
        ):
            return None
        subgroup = " ".join(dict.fromkeys(words(groups[str(entry["subgroup"])])))
        return dict(
            key=entry["hexcode"],
            label=entry["label"].lower(),
            tags=entry.get("tags", []),
            group=subgroup,
        )

    def icon_concept(name):
        kept = [w for w in words(name) if w not in STYLE_WORDS]
        if (
            not 1 <= len(kept) <= 4
            or not all(w in vocabulary for w in kept)
            or max(map(len, kept)) < 3
        ):
            return None
        return dict(key=" ".join(kept), label=" ".join(kept), tags=[], group="")

    jobs = []  # (svg, concept, set name)
    for name in EMOJI_SETS + [HELD_OUT]:
        for key, svg in icon_svgs(npm, name):
            entry = (
                index.get(key)
                or index.get(re.sub(r"-\d+$", "", key))
                or index.get(key.replace("-", ""))
            )
            if entry or name != HELD_OUT:
                jobs.append((svg, emoji_concept(entry) if entry else icon_concept(key), name))
    by_hex = {x["hexcode"]: x for x in entries} | {
        s["hexcode"]: x for x in entries for s in x.get("skins", [])
    }
    for file in sorted((npm / "openmoji/black/svg").glob("*.svg")):  # OpenMoji's line drawings
        if file.stem in by_hex:
            jobs.append((file.read_text(), emoji_concept(by_hex[file.stem]), "openmoji-black"))
    for name in ICON_SETS:
        jobs += [(svg, icon_concept(key), name) for key, svg in icon_svgs(npm, name)]
    jobs = [j for j in jobs if j[1]]

    with Pool(2) as pool:
        images = pool.map(render, [j[0] for j in jobs], chunksize=200)
    kept, seen = [], set()
    for (_, concept, name), image in zip(jobs, images):
        if image is None or image.min() > 200 or (concept["key"], image.tobytes()) in seen:
            continue  # unreadable, empty or drawn twice
        seen.add((concept["key"], image.tobytes()))
        kept.append((concept, name, image))
    concepts = {c["key"]: c for c, _, _ in kept}
    number = {key: i for i, key in enumerate(concepts)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        args.out,
        images=np.stack([i for _, _, i in kept]),
        concept=np.array([number[c["key"]] for c, _, _ in kept]),
        held_out=np.array([name == HELD_OUT for _, name, _ in kept]),
        sets=np.array([name for _, name, _ in kept]),
        concepts=json.dumps(list(concepts.values())),
    )
    print(
        len(kept),
        "drawings of",
        len(concepts),
        "concepts;",
        sum(n == HELD_OUT for _, n, _ in kept),
        "held out",
    )


if __name__ == "__main__":
    main()
