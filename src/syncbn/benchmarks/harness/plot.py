"""The results of a benchmark as one figure, beside its CSV."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from syncbn.benchmarks.harness.measure import OURS, Measurement

MARKERS = {"contiguous": "o", "channels_last": "s"}


def plot_ratios(rows: Sequence[Measurement], path: Path, title: str) -> None:
    """Draw each contender's ratio at each shape: a panel for each number of ranks, hollow where channels-last."""
    timed = [row for row in rows if row.unit == "ms" and row.contender != OURS]
    panels = list(dict.fromkeys((row.section, row.ranks) for row in timed))
    shapes = list(dict.fromkeys(row.shape for row in timed))
    figure, axes = plt.subplots(
        len(panels),
        1,
        sharex=True,
        squeeze=False,
        figsize=(max(10.0, 0.55 * len(shapes) + 4), 1.8 + 3.2 * len(panels)),
        layout="constrained",
    )
    for axis, (section, ranks) in zip(axes[:, 0], panels, strict=True):
        _draw(axis, [row for row in timed if (row.section, row.ranks) == (section, ranks)], shapes)
        axis.set_title(f'section "{section}", P = {ranks}')
        axis.set_ylabel("time of syncbn /\ntime of the contender")
    axes[0, 0].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0))
    axes[-1, 0].set_xticks(range(len(shapes)), shapes, rotation=30, ha="right")
    axes[-1, 0].set_xlabel("what was run")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_projection(rows: Sequence[Measurement], path: Path, title: str) -> None:
    """Draw time, bytes and receive memory of the rows of section "projected" over the number of ranks."""
    projected = [row for row in rows if row.section == "projected"]
    schemes = list(dict.fromkeys(row.contender for row in projected))
    panels = {
        "time, ms": {"ms, ring": "-", "ms, tree": "--"},
        "bytes sent by each rank": {"bytes sent": "-"},
        "receive memory, bytes": {"receive memory, bytes": "-"},
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(14, 4.6), layout="constrained")
    for axis, (label, lines) in zip(axes, panels.items(), strict=True):
        for i, scheme in enumerate(schemes):
            for unit, style in lines.items():
                points = [(row.ranks, row.median) for row in projected if (row.contender, row.unit) == (scheme, unit)]
                name = f"{scheme}, {unit.removeprefix('ms, ')}" if len(lines) > 1 else scheme
                axis.plot(*zip(*points, strict=True), style, color=f"C{i}", marker=".", label=name)
        axis.set(yscale="log", xlabel="ranks P", ylabel=label)
        axis.set_xscale("log", base=2)
        axis.legend(fontsize="small")
        axis.grid(color="0.92")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw(axis: Axes, rows: Sequence[Measurement], shapes: Sequence[str]) -> None:
    series = list(dict.fromkeys((row.contender, row.memory_format) for row in rows))
    contenders = list(dict.fromkeys(contender for contender, _ in series))
    for i, (contender, memory_format) in enumerate(series):
        color = f"C{contenders.index(contender)}"
        points = [row for row in rows if (row.contender, row.memory_format) == (contender, memory_format)]
        beside = 0.6 * ((i + 0.5) / len(series) - 0.5)
        axis.plot(
            [shapes.index(row.shape) + beside for row in points],
            [row.ratio for row in points],
            linestyle="",
            marker=MARKERS[memory_format],
            color=color,
            fillstyle="full" if memory_format == "contiguous" else "none",
            label=f"{contender}, {memory_format}",
        )
    for boundary in range(len(shapes) - 1):
        axis.axvline(boundary + 0.5, color="0.92", linewidth=0.8, zorder=0)
    axis.axhline(1.0, color="black", linewidth=1, label="as fast (below: syncbn is faster)")
    axis.set_ylim(bottom=0)
