"""What is published of Figure 2: the plot, the curves and the table as CSV, and a report in Markdown."""

import csv
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from syncbn.experiments.figure2_models import NEGATIVES, Model
from syncbn.experiments.markdown import markdown_table
from syncbn.experiments.provenance import provenance, revisions_of
from syncbn.experiments.recipe_runs import RUNS, ValidationCurve
from syncbn.experiments.scale import Scale, notes_beside, scale_in_words


@dataclass(frozen=True)
class Result:
    """The outcome of one training.

    Attributes:
        model: Which was trained.
        seed: Of the run.
        curve: Its validation accuracy.
        seconds: That it took, evaluations included; None where that was not noted.
    """

    model: Model
    seed: int
    curve: ValidationCurve
    seconds: float | None = None


@dataclass(frozen=True)
class Figure2Row:
    """A line of the table: one model with one seed.

    Attributes:
        result: The training.
        steps_to_match: Steps to the best accuracy of Inception with this seed; None if that is never reached.
        ratio: Inception's steps to it, divided by these; None likewise.
    """

    result: Result
    steps_to_match: int | None
    ratio: float | None


def compare(results: Sequence[Result]) -> list[Figure2Row]:
    """Compare each training with that of the plain Inception of the same seed, which is the first of its seed."""
    rows = []
    reference: dict[int, ValidationCurve] = {}
    for result in results:
        inception = reference.setdefault(result.seed, result.curve)
        steps = own = None
        if inception.best is not None:
            steps, own = (curve.steps_to(inception.best) for curve in (result.curve, inception))
        rows.append(Figure2Row(result, steps, own / steps if own and steps else None))
    return rows


def write_report(
    output: Path, results: Sequence[Result], batch_size: int, settings: dict[str, Any], scale: Scale
) -> str:
    """Write figure2.png, figure2.csv, table.csv and figure2.md.

    Args:
        output: The folder.
        results: Of the trainings, for each seed the plain Inception first.
        batch_size: Images of a step.
        settings: What the trainings have in common.
        scale: Of all trainings.

    Returns:
        The Markdown.
    """
    rows = compare(results)
    _write_csv(output / "figure2.csv", ("model", "seed", "steps", "images", "top1"), _points(results, batch_size))
    header = ("model", "seed", "steps_to_match", "ratio", "best_top1", "last_top1", "diverged_after_steps")
    _write_csv(output / "table.csv", (*header, "seconds", "paper_steps", "paper_best"), map(_csv_row, rows))
    _plot(results, output / "figure2.png", scale)
    in_words = scale_in_words(scale, notes_beside(output / "figure2.md"))
    report = _markdown(rows, settings, revisions_of(sorted((output / "runs").glob(RUNS))), in_words)
    (output / "figure2.md").write_text(report)
    return report


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(header)
        writer.writerows(rows)


def _points(results: Sequence[Result], batch_size: int) -> Iterable[Sequence[Any]]:
    for result in results:
        for steps, top1 in zip(result.curve.steps.tolist(), result.curve.top1.tolist(), strict=True):
            yield result.model.name, result.seed, steps, steps * batch_size, top1


def _csv_row(row: Figure2Row) -> Sequence[Any]:
    curve, model = row.result.curve, row.result.model
    last = curve.top1[-1] if len(curve.top1) else None
    found = (row.steps_to_match, row.ratio, curve.best, last, curve.diverged_after, row.result.seconds)
    return model.name, row.result.seed, *found, model.paper_steps, model.paper_best


def _plot(results: Sequence[Result], path: Path, scale: Scale) -> None:
    # Not pyplot: it would choose a windowing system and keep every figure.
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    models = list(dict.fromkeys(result.model for result in results))
    for number, model in enumerate(models):
        runs = [result for result in results if result.model == model]
        for place, result in enumerate(runs):
            axes.plot(
                result.curve.steps,
                result.curve.top1,
                label=None if place else model.label,
                color=colormaps["tab10"](number),
                linestyle=":" if model in NEGATIVES else "-",
                marker=".",
                markersize=4,
                linewidth=1.2,
            )
            if model == models[0] and result.curve.best is not None:
                axes.axhline(result.curve.best, color=colormaps["tab10"](number), linewidth=0.8, linestyle="--")
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel("validation accuracy (top-1, single crop)")
    axes.set_ylim(bottom=0)
    seeds = "; a curve for each seed" if len({result.seed for result in results}) > 1 else ""
    axes.set_title(f"{scale}\nDashed: the best of Inception, which is to be matched{seeds}", fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)


def _markdown(rows: Sequence[Figure2Row], settings: dict[str, Any], revisions: Sequence[str], scale: str) -> str:
    seeds = sorted({row.result.seed for row in rows})
    header = ["model", "steps to match", "ratio", "paper: steps", "paper: ratio", "maximum", "paper: maximum"]
    paper_reference = rows[0].result.model.paper_steps
    models = dict.fromkeys(row.result.model for row in rows if row.result.model not in NEGATIVES)
    cells = [_cells(model, [row for row in rows if row.result.model == model], paper_reference) for model in models]
    negatives = [_negative(row.result) for row in rows if row.result.model in NEGATIVES]
    parts = [
        "# Figure 2: single-crop validation accuracy against training steps",
        f"    syncbn {shlex.join(sys.argv[1:])}",
        "![Figure 2](figure2.png)",
        provenance(revisions),
        f"Seeds: {', '.join(map(str, seeds))}.",
        "Of all models, besides their configs: " + _in_words(settings),
        scale,
        markdown_table(header, cells),
        *_training_times(rows),
        _EXPLANATION,
        *(["\n".join(negatives)] if negatives else []),
    ]
    return "\n\n".join(parts) + "\n"


def _training_times(rows: Sequence[Figure2Row]) -> list[str]:
    """How long each training took, where that was noted."""
    noted = [(row.result, row.result.seconds) for row in rows if row.result.seconds is not None]
    times = [f"{result.model.label}, seed {result.seed}: {seconds / 60:,.1f}" for result, seconds in noted]
    return [f"Minutes of training, evaluations included: {'; '.join(times)}."] if times else []


_EXPLANATION = (
    "Steps to match: to the first evaluation that finds the best accuracy of Inception with the same seed. Ratio:"
    " Inception's own steps to its best, divided by them. Of several seeds: the mean (smallest to largest)."
)


def _in_words(settings: dict[str, Any]) -> str:
    words = [f"`{option}`" for option in settings["options"]]
    for name, value in settings.items():
        if name != "options" and value is not None:
            words.append(f"`{name}` of Inception {value:g}, the others in the configs' ratio to it")
    return ", ".join(words) + "." if words else "nothing."


def _cells(model: Model, rows: Sequence[Figure2Row], paper_reference: float | None) -> list[str]:
    """The model's row of the table."""
    unmatched = sum(row.steps_to_match is None for row in rows)
    bests = [100 * row.result.curve.best for row in rows if row.result.curve.best is not None]
    steps, ratio = "not reached" if bests else "not evaluated", "-"
    if unmatched < len(rows):
        missing = f"; not reached by {unmatched} of {len(rows)} seeds" if unmatched else ""
        steps = _spread([row.steps_to_match for row in rows if row.steps_to_match], "{:,.0f}") + missing
        ratio = _spread([row.ratio for row in rows if row.ratio], "{:.1f}")
    diverged = sum(row.result.curve.diverged_after is not None for row in rows)
    if diverged:
        steps += f"; diverged with {diverged} of {len(rows)} seeds"
    best = _spread(bests, "{:.1f} %") if bests else "not evaluated"
    if 0 < len(bests) < len(rows):
        best += f"; {len(rows) - len(bests)} of {len(rows)} seeds not evaluated"
    paper_steps = "-" if model.paper_steps is None else f"{model.paper_steps / 1e6:.1f} M"
    paper_ratio = "-" if not (model.paper_steps and paper_reference) else f"{paper_reference / model.paper_steps:.1f}"
    paper_best = "-" if model.paper_best is None else f"{100 * model.paper_best:.1f} %"
    return [model.label, steps, ratio, paper_steps, paper_ratio, best, paper_best]


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    mean = form.format(sum(values) / len(values))
    return f"{mean} ({form.format(min(values))} to {form.format(max(values))})" if len(values) > 1 else mean


def _negative(result: Result) -> str:
    curve = result.curve
    outcome = "not evaluated"
    if curve.best is not None:
        outcome = f"at most {100 * curve.best:.1f} %, at the end {100 * curve.top1[-1]:.1f} %"
    if curve.diverged_after is not None:
        outcome += f"; its training loss was first found not finite after {curve.diverged_after:,} steps"
    return f"- {result.model.label}, seed {result.seed}: {outcome}."
