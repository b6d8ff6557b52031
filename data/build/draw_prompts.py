"""Draws data/prompts.png: where each method's prompts enter CLIP, and which tasks share them.

    python data/build/draw_prompts.py
"""
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

# Okabe and Ito's colours, which colour-blind people can tell apart; the letters say the same.
SHARED, GROUP, OWN = "#0072B2", "#E69F00", "#009E73"
LETTER = {SHARED: "A", GROUP: "G", OWN: "T"}
FROZEN, TOKEN, INK = "#ECECEC", "#C4C4C4", "#222222"
ROWS = {"1": 0.0, "2": 1.0, "3": 2.0, "12": 3.55}       # layers drawn, and their height
ALL, PAIRS, EACH = [(0, 3)], [(0, 1), (2, 3)], [(0, 0), (1, 1), (2, 2), (3, 3)]

# method: (prompts of text layer 1, of deeper ones, of image layers, bars over tasks, a line)
PANELS = {
    "CoOp-MT": ([SHARED], [], [], [(SHARED, ALL)], "one text context for all tasks"),
    "VPT-MT": ([], [], [SHARED], [(SHARED, ALL)], "image prompts in every layer"),
    "MaPLe-MT": ([SHARED], [SHARED], [SHARED], [(SHARED, ALL)],
                 "image prompts are linear maps of text prompts"),
    "MVLPT": ([OWN], [], [OWN], [(SHARED, ALL), (OWN, EACH)],
              "A is learned first and starts each T"),
    "HiPro": ([SHARED, GROUP, OWN], [], [], [(SHARED, ALL), (GROUP, PAIRS), (OWN, EACH)],
              "a text per tree node, classifiers averaged"),
    "MmAP": ([GROUP, OWN], [GROUP, OWN], [GROUP, OWN], [(GROUP, PAIRS), (OWN, EACH)],
             "Kronecker products of one source per layer"),
    "JSCPT": ([SHARED, OWN], [], [SHARED, OWN], [(SHARED, ALL), (OWN, EACH)],
              "image features selected, tasks weighted"),
}


def square(axis, x, y, colour, width=0.36, height=0.6):
    """One token, with the letter of who shares it."""
    axis.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white",
                             linewidth=0.8))
    if colour in LETTER:
        axis.text(x + width / 2, y + height / 2, LETTER[colour], ha="center", va="center",
                  fontsize=7.5 if height > 0.3 else 5.5, color="white", fontweight="bold")


def encoder(axis, left, title, first, deeper, ends, alternatives=False):
    """A stack of layers; each holds its tokens, with the prompts in colour.

    ends: how many frozen tokens follow the prompts. alternatives: the prompts are not side by side,
    but each in a separate text.
    """
    for row, y in ROWS.items():
        axis.add_patch(FancyBboxPatch((left, y), 2.1, 0.76, facecolor=FROZEN, edgecolor="none",
                                      boxstyle="round,pad=0,rounding_size=0.1"))
        square(axis, left + 0.08, y + 0.08, TOKEN)
        prompts, x = first if row == "1" else deeper, left + 0.47
        if alternatives and prompts:
            for k, colour in enumerate(reversed(prompts)):
                square(axis, x, y - 0.06 + 0.3 * k, colour, height=0.28)
            x += 0.39
        else:
            for colour in prompts:
                square(axis, x, y + 0.08, colour)
                x += 0.39
        for k in range(ends):
            square(axis, x + 0.39 * k, y + 0.08, TOKEN)
    axis.text(left + 1.05, 3.16, "⋮", ha="center", va="center", fontsize=11, color=INK)
    axis.text(left + 1.05, 4.45, title, ha="center", va="bottom", fontsize=8.5, color=INK)


def links(axis, name):
    """What ties the two encoders' prompts together."""
    heights = [y + 0.38 for y in ROWS.values()]
    arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0,
             "mutation_scale": 7}
    if name == "MaPLe-MT":
        for y in heights:
            axis.annotate("", (2.87, y), (2.16, y), arrowprops=arrow)
    if name == "MmAP":
        for y in heights:
            axis.annotate("", (2.14, y), (2.42, y), arrowprops=arrow)
            axis.annotate("", (2.88, y), (2.6, y), arrowprops=arrow)
            axis.text(2.51, y, "⊗", ha="center", va="center", fontsize=8, color=INK)
    if name == "MVLPT":
        axis.plot([2.5, 2.5], [heights[0], heights[-1]], color=INK, linewidth=0.9)
        axis.annotate("", (2.14, heights[0]), (2.5, heights[0]), arrowprops=arrow)
        for y in heights:
            axis.annotate("", (2.88, y), (2.5, y), arrowprops=arrow)


def sharing(axis, name, bars):
    """Four tasks, and above them a bar per prompt that spans the tasks which share it."""
    left, step = 1.0, 0.85
    for task in range(4):
        x = left + step * task
        axis.text(x + 0.35, -2.62, f"{task + 1}", ha="center", va="center", fontsize=8, color=INK,
                  bbox={"boxstyle": "circle,pad=0.22", "facecolor": "white", "edgecolor": INK,
                        "linewidth": 0.7})
    axis.text(0.72, -2.62, "tasks", ha="right", va="center", fontsize=8, color=INK)
    for row, (colour, spans) in enumerate(reversed(bars)):
        y = -2.12 + 0.44 * row
        for first, last in spans:
            x, width = left + step * first, step * (last - first) + 0.7
            source = name == "MVLPT" and colour == SHARED
            axis.add_patch(Rectangle((x, y), width, 0.34, facecolor="white" if source else colour,
                                     edgecolor=colour, linewidth=1.2,
                                     linestyle="--" if source else "-"))
            axis.text(x + width / 2, y + 0.15, "A" if source else LETTER[colour], ha="center",
                      va="center", fontsize=7, fontweight="bold",
                      color=colour if source else "white")


def panel(axis, name, first, deeper, image, bars, line):
    """One method: the two encoders above, the tasks below."""
    encoder(axis, 0, "text encoder", first, deeper, 2, alternatives=name == "HiPro")
    encoder(axis, 2.92, "image encoder", image, image, 2)
    for row, y in ROWS.items():
        axis.text(-0.14, y + 0.38, row, ha="right", va="center", fontsize=7.5, color=INK)
    links(axis, name)
    sharing(axis, name, bars)
    axis.set(xlim=(-0.75, 5.15), ylim=(-3.05, 5.0))
    axis.set_title(name, fontsize=11, fontweight="bold", pad=15, color=INK)
    axis.text(0.5, 1.005, line, transform=axis.transAxes, ha="center", va="bottom", fontsize=8,
              color=INK)
    axis.axis("off")


def legend(axis):
    """What the colours, letters and signs mean."""
    axis.set(xlim=(-0.75, 5.15), ylim=(-3.05, 5.0))
    axis.axis("off")
    entries = [(SHARED, "prompt of all tasks"), (GROUP, "prompt of a group of tasks"),
               (OWN, "prompt of one task"), (TOKEN, "word or patch, no prompt")]
    for i, (colour, words) in enumerate(entries):
        square(axis, 0, 3.9 - 0.9 * i, colour)
        axis.text(0.6, 4.2 - 0.9 * i, words, va="center", fontsize=8.5, color=INK)
    note = ("Grey bars are layers of a frozen CLIP,\n"
            "layer 1 at the bottom. Below, a bar per\n"
            "learned prompt spans the tasks that\n"
            "share it. ⊗ is the Kronecker product;\n"
            "MVLPT's prompts pass through a\n"
            "small shared transformer.")
    axis.text(0, 0.6, note, va="top", fontsize=8.5, color=INK, linespacing=1.35)


def main():
    figure = Figure(figsize=(11.6, 6.9))
    axes = figure.subplots(2, 4)
    figure.subplots_adjust(left=0.01, right=0.995, top=0.915, bottom=0.01, wspace=0.04, hspace=0.21)
    for axis, (name, settings) in zip(axes.flat, PANELS.items()):
        panel(axis, name, *settings)
    legend(axes.flat[-1])
    out = Path(__file__).resolve().parents[1] / "prompts.png"
    figure.savefig(out, dpi=130)
    print(out)


if __name__ == "__main__":
    main()
