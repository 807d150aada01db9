"""Figure 1's picture: test accuracy, and the percentiles of a sigmoid's input without and with BatchNorm."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from syncbn.experiments.sigmoid_network import Curves, Run

LABELS = {False: "without BN", True: "with BN"}
STYLES = {False: "--", True: "-"}
COLOURS = {False: "C3", True: "C0"}
PAPERS_LOWEST_ACCURACY = 0.7


def plot_figure1(results: Mapping[Run, Curves], units: Mapping[Run, int], picture: Path) -> None:
    """Draw panels a, b and c of the paper's Figure 1, a row for each setting.

    Args:
        results: Of all runs of the experiment.
        units: Of each run the sigmoid to show.
        picture: Where to write the PNG.
    """
    # Not pyplot: it would choose a windowing system and keep every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = list(dict.fromkeys((run.learning_rate, run.weight_std) for run in results))
    figure = Figure(figsize=(12, 0.6 + 3.1 * len(settings)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(settings), 3, squeeze=False)
    for (rate, std), (accuracy, without, with_norm) in zip(settings, rows, strict=True):
        runs = [run for run in results if (run.learning_rate, run.weight_std) == (rate, std)]
        _draw_accuracy(accuracy, {run: results[run] for run in runs})
        accuracy.set_title(f"(a) test accuracy, learning rate {rate:g}, std {std:g}")
        for axes, batch_norm, letter in ((without, False, "b"), (with_norm, True, "c")):
            for run in runs:
                if run.batch_norm == batch_norm:
                    _draw_percentiles(axes, run, results[run], units[run])
            axes.set_title(f"({letter}) input to a sigmoid, {LABELS[batch_norm]}")
        _share_limits(without, with_norm)
    for axes in rows.flat:
        _draw_steps(axes, next(iter(results)).steps)
    rows[0, 0].legend(loc="lower right", fontsize="small")
    rows[0, 1].legend(loc="lower left", fontsize="small")
    if any(run.ranks > 1 for run in results):
        rows[0, 2].legend(loc="lower left", fontsize="small")
    figure.savefig(picture, dpi=80)


def _draw_accuracy(axes: Any, results: Mapping[Run, Curves]) -> None:
    """Mean over the seeds, and the band from the lowest to the highest; over it a run on several ranks."""
    for batch_norm in (True, False):
        alone = [curves for run, curves in results.items() if run.batch_norm == batch_norm and run.ranks == 1]
        steps, accuracies = alone[0].steps.numpy(), np.stack([curves.accuracy.numpy() for curves in alone])
        colour = COLOURS[batch_norm]
        axes.plot(steps, accuracies.mean(axis=0), STYLES[batch_norm], color=colour, label=LABELS[batch_norm])
        axes.fill_between(steps, accuracies.min(axis=0), accuracies.max(axis=0), color=colour, alpha=0.25, linewidth=0)
    for run, curves in results.items():
        if run.ranks > 1:
            label = f"{LABELS[run.batch_norm]}, {run.ranks} ranks, seed {run.seed}"
            axes.plot(curves.steps, curves.accuracy, ":", color="black", label=label)
    axes.set_ylim(_lowest_accuracy(results.values()), 1)


def _lowest_accuracy(curves: Iterable[Curves]) -> float:
    """Where the axis begins: at the paper's 0.7, or below all of a curve that never gets well above it."""
    of_runs = [one.accuracy[one.accuracy.isfinite()] for one in curves]
    low = [accuracy for accuracy in of_runs if len(accuracy) and accuracy.max() < PAPERS_LOWEST_ACCURACY + 0.1]
    return min([PAPERS_LOWEST_ACCURACY, *(max(0.0, float(accuracy.min()) - 0.02) for accuracy in low)])


def _draw_percentiles(axes: Any, run: Run, curves: Curves, unit: int) -> None:
    """The three percentiles: of the first seed in colour, of the others in pale grey, of several ranks dotted."""
    look: dict[str, Any] = {"color": "0.8", "linewidth": 0.8, "zorder": 1, "label": "other seeds"}
    if run.ranks > 1:
        look = {"color": "black", "linestyle": ":", "zorder": 3, "label": f"{run.ranks} ranks"}
    elif run.seed == 0:
        look = {"color": COLOURS[run.batch_norm], "zorder": 2, "label": "15th, 50th, 85th percentile"}
    known = axes.get_legend_handles_labels()[1]
    for number, percentile in enumerate(curves.percentiles[:, :, unit].T):
        again = number > 0 or look["label"] in known
        axes.plot(curves.steps, percentile, **look | ({"label": None} if again else {}))


def _share_limits(*panels: Any) -> None:
    """The paper's -2..2, or more where a curve leaves that; the same in both panels."""
    low = min(-2.0, *(axes.dataLim.y0 for axes in panels))
    high = max(2.0, *(axes.dataLim.y1 for axes in panels))
    for axes in panels:
        axes.set_ylim(low, high)


def _draw_steps(axes: Any, steps: int) -> None:
    ticks = np.linspace(0, steps, 6)
    axes.set_xlim(0, steps)
    axes.set_xticks(ticks, [f"{tick / 1000:g}K" for tick in ticks])
    axes.grid(alpha=0.3)
