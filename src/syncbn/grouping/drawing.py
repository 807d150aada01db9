"""A picture of a schedule."""

from collections.abc import Sequence
from pathlib import Path

from torch import fx

from syncbn.grouping.scheduling import Schedule, SharedMessage
from syncbn.pictures import plain_text

_HEIGHT, _WIDTH = 0.4, 0.09  # inches: of a line, of a letter


def draw(schedules: Sequence[Schedule], path: Path) -> None:
    """Draw messages from top to bottom, their layers side by side, and lines from each layer to those that need it.

    Args:
        schedules: one below the other.
        path: the image file; its suffix is its format.
    """
    from matplotlib.figure import Figure

    rows = [message for schedule in schedules for message in schedule.messages]
    texts = [_text(message) for message in rows]
    places = {node: (i, k) for i, m in enumerate(rows) for k, node in enumerate(m.layers)}
    widest = max((len(name) for row in texts for name in row), default=1) + 2
    columns = max((len(row) for row in texts), default=1)
    figure = Figure(figsize=(1 + columns * widest * _WIDTH, 1 + len(rows) * _HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    for target, (row, column) in places.items():
        for source in _layers_before(target, places):
            above, left = places[source]
            axes.plot([left, column], [above, row], color="0.8", linewidth=1, zorder=1)
    box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "0.5"}
    with plain_text(*(name for row in texts for name in row)):
        for i, names in enumerate(texts):
            for k, name in enumerate(names):
                axes.text(k, i, name, ha="center", va="center", fontsize=8, bbox=box, zorder=2)
        axes.set(xlim=(-0.6, columns - 0.4), ylim=(len(rows) - 0.5, -0.5), xticks=[], ylabel="message")
        axes.set_yticks(range(len(rows)), [str(i + 1) for i in range(len(rows))], fontsize=8)
        figure.savefig(path)


def _text(message: SharedMessage) -> list[str]:
    return [str(node.target) for node in message.layers]


def _layers_before(node: fx.Node, layers: dict[fx.Node, tuple[int, int]]) -> set[fx.Node]:
    """The layers whose output a layer needs, with no other layer between."""
    found, seen, stack = set[fx.Node](), set[fx.Node](), list(node.all_input_nodes)
    while stack:
        one = stack.pop()
        if one in seen:
            continue
        seen.add(one)
        if one in layers:
            found.add(one)
        else:
            stack += one.all_input_nodes
    return found
