"""Draw the figure of docs/how_it_works.md: one layer over two ranks, forward and backward.

::

    python scripts/draw_how_it_works.py

It writes docs/figures/how_it_works.svg. The figure has a light background of its own, so that it can be read on a
dark page.
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "how_it_works.svg"
LOCAL, SHARED, INK, QUIET = "#e3eefb", "#fbe6c8", "#1c2733", "#5a6673"
FORWARD, BACKWARD = 3.0, 10.1  # x of the middle of each half
APART = 1.5  # of a rank's column from that middle
DX, START, SENT, FINISH, DY = 7.3, 5.75, 4.0, 2.05, 0.5  # y of the rows, from x and dx above to y and dy below


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
    """A box with its middle at (x, y)."""
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=color, edgecolor=INK, linewidth=0.8))
    axes.text(x, y, text, ha="center", va="center", color=INK, fontsize=9, linespacing=1.7)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], dashed: bool = False) -> None:
    """An arrow; dashed for what is saved."""
    style = {"arrowstyle": "-|>", "color": QUIET if dashed else INK, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style | {"linestyle": "--" if dashed else "-"})


def note(axes: Axes, x: float, y: float, text: str) -> None:
    """A remark without a box."""
    axes.text(x, y, text, ha="center", va="center", color=QUIET, fontsize=8.5, style="italic", linespacing=1.4)


def half(axes: Axes, middle: float, title: str, rows: dict[float, str], message: str, downward: bool) -> None:
    """One direction: the boxes of two ranks, and the message that they share."""
    axes.text(middle, 8.45, title, ha="center", va="center", color=INK, fontsize=12, weight="bold")
    stations = [DX - 0.25, START + 0.55, START - 0.55, SENT + 0.5, SENT - 0.5, FINISH + 0.75, FINISH - 0.75, DY + 0.25]
    for rank, x in enumerate((middle - APART, middle + APART)):
        axes.text(x, 7.95, f"rank {rank}", ha="center", va="center", color=QUIET, fontsize=9.5)
        for y, text in rows.items():
            if y in (DX, DY):
                axes.text(x, y, text, ha="center", va="center", color=INK, fontsize=11)
            else:
                box(axes, x, y, 2.9, 1.1 if y == START else 1.5, text, LOCAL)
        for above, below in zip(stations[::2], stations[1::2], strict=True):
            arrow(axes, *(((x, above), (x, below)) if downward else ((x, below), (x, above))))
    box(axes, middle, SENT, 5.9, 1.0, message, SHARED)


def draw() -> None:
    """Write the figure."""
    plt.rcParams.update({"svg.hashsalt": "syncbn", "mathtext.fontset": "dejavusans", "font.family": "DejaVu Sans"})
    figure = plt.figure(figsize=(10.6, 7.0), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 13.1), ylim=(0.2, 8.8))
    axes.axis("off")
    forward = {
        DX: "$x$",
        START: "start: a pass over $x$\n$S_1=\\sum x \\quad S_2=\\sum x^2 \\quad n$",
        FINISH: "finish: a pass over $x$\n$\\mu=S_1/M \\quad \\sigma^2=S_2/M-\\mu^2$\n"
        "$y=\\gamma\\,(x-\\mu)/\\sqrt{\\sigma^2+\\epsilon}+\\beta$",
        DY: "$y$",
    }
    backward = {
        DX: "$dx$",
        START: "start's backward: a pass\n$dx$ of $dy,\\ x,\\ T_1,\\ T_2,\\ M$",
        FINISH: "finish's backward: a pass\n$T_1=\\sum dy \\quad T_2=\\sum dy\\,(x-\\mu)$\n"
        "$d\\gamma,\\ d\\beta$ of this rank",
        DY: "$dy$",
    }
    sums = "one all-reduce, float64"
    half(
        axes,
        FORWARD,
        "forward",
        forward,
        f"{sums}\n$S_1 \\quad S_2 \\quad M=\\sum n \\quad |\\quad id \\quad id^2$",
        True,
    )
    half(axes, BACKWARD, "backward", backward, f"{sums}\n$T_1 \\quad T_2 \\quad |\\quad id \\quad id^2$", False)
    note(axes, FORWARD, (START + SENT) / 2, "agreement:\nleave to send")
    note(axes, BACKWARD, (FINISH + SENT) / 2 + 0.12, "agreement:\nleave to send")
    note(axes, FORWARD, (FINISH + SENT) / 2 + 0.12, "signature\nchecked")
    note(axes, BACKWARD, (START + SENT) / 2, "signature\nchecked")
    edge, other = FORWARD + APART + 1.45, BACKWARD - APART - 1.45
    arrow(axes, (edge, FINISH), (other, FINISH), dashed=True)
    note(axes, (edge + other) / 2, FINISH + 0.62, "saved:\n$x,\\ \\gamma$\n$\\mu,\\ \\sigma^2$")
    note(axes, (edge + other) / 2, SENT, "other work\ngoes on\nmeanwhile")
    figure.savefig(FIGURE, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    draw()
