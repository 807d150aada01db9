"""What becomes of Figure 1's runs: a picture, a table of every point, a report."""

import csv
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from syncbn.experiments.figure1_plot import plot_figure1
from syncbn.experiments.markdown import markdown_table
from syncbn.experiments.provenance import provenance
from syncbn.experiments.sigmoid_network import Curves, Run
from syncbn.training.monitoring.covariate_shift import PERCENTILES

STEPS_IN_TABLE = (1_000, 10_000, 50_000)
DIVERGED = "diverged"
NETWORKS = {False: "without BN", True: "with BN"}

Results = Mapping[Run, Curves]


def write_report(results: Results, folder: Path, threshold: int, revisions: Sequence[str]) -> None:
    """Write ``figure1.png``, ``figure1.csv`` and ``figure1.md``.

    Args:
        results: Of all runs of the experiment.
        folder: Where to.
        threshold: Of the pixels, for the report.
        revisions: Of this package in each run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A run on several ranks shows the sigmoid of the run on one that it is compared with.
    units = {run: typical_unit(results[replace(run, ranks=1)].percentiles.numpy()) for run in results}
    write_table(results, units, folder / "figure1.csv")
    plot_figure1(results, units, folder / "figure1.png")
    (folder / "figure1.md").write_text(report(results, threshold, revisions))


def unsteadiness(percentiles: np.ndarray) -> np.ndarray:
    """How much the inputs of sigmoids move in training, relative to how much they are spread out at a time.

    The standard deviation over training of a percentile, averaged over the three percentiles, divided by the mean
    over training of the distance from the first to the last. Free of scale: a BatchNorm that makes all inputs larger
    gains nothing by it, and loses nothing.

    Args:
        percentiles: At T times, of C sigmoids, shape (T, 3, C).

    Returns:
        float64, shape (C,); infinite where the input does not vary at all.
    """
    movement = percentiles.std(axis=0).mean(axis=0)
    width = (percentiles[:, -1] - percentiles[:, 0]).mean(axis=0)
    return np.divide(movement, width, out=np.full_like(movement, np.inf), where=width > 0)


def typical_unit(percentiles: np.ndarray) -> int:
    """The sigmoid whose `unsteadiness` is the median: "one typical sigmoid" of Figure 1 (b, c)."""
    order = np.argsort(unsteadiness(percentiles), kind="stable")
    return int(order[len(order) // 2])


def write_table(results: Results, units: Mapping[Run, int], path: Path) -> None:
    """One row for each evaluation of each run, with the percentiles of one sigmoid of each run."""
    with path.open("w", newline="") as lines:
        writer = csv.writer(lines)
        columns = ["network", "learning_rate", "weight_std", "seed", "ranks", "step", "test_accuracy", "test_loss"]
        writer.writerow([*columns, "sigmoid", *(f"p{percentile}" for percentile in PERCENTILES)])
        for run, curves in results.items():
            unit, network = units[run], "batch_norm" if run.batch_norm else "plain"
            identity = [network, run.learning_rate, run.weight_std, run.seed, run.ranks]
            values = zip(curves.steps, curves.accuracy, curves.loss, curves.percentiles[:, :, unit], strict=True)
            for step, accuracy, loss, percentiles in values:
                measured = [f"{float(value):.5g}" for value in (accuracy, loss)]
                writer.writerow(
                    [*identity, int(step), *measured, unit, *(f"{float(value):.5g}" for value in percentiles)]
                )


def report(results: Results, threshold: int, revisions: Sequence[str]) -> str:
    """The report in Markdown."""
    first = next(iter(results))
    seeds = sorted({run.seed for run in results})
    parts = [
        "# Figure 1 of Ioffe & Szegedy 2015: MNIST with and without BatchNorm",
        f"    syncbn {shlex.join(sys.argv[1:])}",
        "![Figure 1](figure1.png)",
        f"Binary images (pixels above {threshold}), three hidden layers of 100 sigmoid units, cross-entropy,"
        f" {first.steps:,} steps of {first.batch_size} images (section 4.1). Not stated in the paper and chosen here:"
        " plain SGD at a constant learning rate, the learning rate, the standard deviation (std) of the initial"
        " weights (the same weights with and without BatchNorm), the threshold; BatchNorm with eps 1e-5 and moving"
        f" averages of momentum 0.1 for evaluation. Seeds {', '.join(map(str, seeds))}; {first.precision}; CPU."
        f" {provenance(revisions, ('torch', 'numpy'))}",
        "## Test accuracy",
        _accuracy_table(results),
        "## The claims",
        _claims_table(results),
        "Unsteadiness: of a sigmoid of the last hidden layer the standard deviation over training of the 15th, 50th"
        " and 85th percentile of its input over the test images, averaged over the three, divided by the mean distance"
        " between the 15th and the 85th. Median of the 100 sigmoids, mean over the seeds; smaller is steadier. The"
        " picture shows the sigmoid with the median of each run.",
    ]
    parts += [_rank_agreement(results, run) for run in results if run.ranks > 1]
    parts += [_divergence(run, curves) for run, curves in results.items() if curves.diverged_at is not None]
    return "\n\n".join(parts) + "\n"


def of_setting(results: Results, setting: tuple[float, float], batch_norm: bool) -> list[Curves]:
    """The curves of one network at one setting on one rank, by seed."""
    return [
        curves
        for run, curves in results.items()
        if (run.learning_rate, run.weight_std) == setting and run.batch_norm == batch_norm and run.ranks == 1
    ]


def settings_of(results: Results) -> list[tuple[float, float]]:
    """The different pairs of learning rate and std, in the order of the runs."""
    return list(dict.fromkeys((run.learning_rate, run.weight_std) for run in results))


def accuracy_at(curves: Curves, step: int) -> float:
    """The test accuracy after a number of steps that was evaluated, in 0..1."""
    return float(curves.accuracy[curves.steps == step][0])


def _steps_of(results: Results) -> list[int]:
    """The steps of the table that were evaluated, and the last one."""
    evaluated = next(iter(results.values())).steps.tolist()
    return sorted({step for step in STEPS_IN_TABLE if step in evaluated} | {evaluated[-1]})


def _divergence(run: Run, curves: Curves) -> str:
    return f"{run.name} diverged: its loss was first found not finite after {curves.diverged_at:,} steps."


def _accuracy_table(results: Results) -> str:
    steps = _steps_of(results)
    rows = []
    for setting in settings_of(results):
        for batch_norm, network in NETWORKS.items():
            name = [f"{setting[0]:g}", f"{setting[1]:g}", network]
            of_seeds = [
                [accuracy_at(curves, step) for step in steps] for curves in of_setting(results, setting, batch_norm)
            ]
            rows += [[*name, str(seed), *_percent(values)] for seed, values in enumerate(of_seeds)]
            rows.append([*name, "**mean**", *(f"**{value}**" for value in _percent(np.mean(of_seeds, axis=0)))])
    header = ["learning rate", "std", "network", "seed", *(f"{step:,} steps" for step in steps)]
    return markdown_table(header, rows)


def _claims_table(results: Results) -> str:
    steps = _steps_of(results)
    rows = []
    for setting in settings_of(results):
        plain, normalised = (of_setting(results, setting, batch_norm) for batch_norm in (False, True))
        row = [f"{setting[0]:g}", f"{setting[1]:g}"]
        for step in steps:
            ahead = [accuracy_at(b, step) - accuracy_at(a, step) for a, b in zip(plain, normalised, strict=True)]
            row.append(_ahead(ahead))
        row += [_mean_unsteadiness(of_network) for of_network in (plain, normalised)]
        rows.append(row)
    ahead_at = [f"BN ahead at {step:,} steps, by seed" for step in steps]
    return markdown_table(["learning rate", "std", *ahead_at, "unsteadiness without BN", "with BN"], rows)


def _ahead(points: Sequence[float]) -> str:
    """How far one network is before the other, by seed; NaN where one of them diverged."""
    if np.isnan(points).any():
        return DIVERGED
    return f"{100 * np.mean(points):+.2f} points, ahead in {sum(a > 0 for a in points)} of {len(points)}"


def _mean_unsteadiness(of_seeds: Sequence[Curves]) -> str:
    if any(curves.diverged_at is not None for curves in of_seeds):
        return DIVERGED
    return f"{np.mean([np.median(unsteadiness(curves.percentiles.numpy())) for curves in of_seeds]):.2f}"


def _rank_agreement(results: Results, run: Run) -> str:
    """How far a run on several ranks is from that on one."""
    alone, together = results[replace(run, ranks=1)], results[run]
    accuracy, loss, percentiles = (
        float((getattr(alone, name) - getattr(together, name)).abs().max())
        for name in ("accuracy", "loss", "percentiles")
    )
    last = float((alone.accuracy[-1] - together.accuracy[-1]).abs())
    assert torch.equal(alone.steps, together.steps)
    return (
        f"On {run.ranks} ranks instead of 1 ({run.name}, {run.precision}) the curves differ by at most"
        f" {100 * accuracy:.3g} points of test accuracy ({100 * last:.3g} at the end), {loss:.3g} of test loss and"
        f" {percentiles:.3g} of a percentile."
    )


def _percent(values: Sequence[float] | np.ndarray) -> list[str]:
    return [DIVERGED if np.isnan(value) else f"{100 * value:.2f} %" for value in values]
