"""What becomes of the ablations: a table, a plot, a report."""

import csv
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from syncbn.experiments.markdown import markdown_table
from syncbn.experiments.provenance import provenance, revisions_of
from syncbn.experiments.recipe_runs import RUNS, ValidationCurve

RATE_SECTION = "learning rate"


@dataclass(frozen=True)
class Outcome:
    """One training of the ablations.

    Attributes:
        section: Of the report.
        label: What was changed, in the report.
        changes: The same, as keys of the config with values.
        seed: Of the training.
        curve: Its evaluations.
    """

    section: str
    label: str
    changes: dict[str, Any]
    seed: int
    curve: ValidationCurve

    @property
    def diverged(self) -> bool:
        """Whether the loss was not finite any more."""
        return self.curve.diverged_after is not None

    @property
    def final(self) -> float:
        """Accuracy at the end, in 0..1; 0 where the training diverged."""
        return 0.0 if self.diverged or not len(self.curve.top1) else float(self.curve.top1[-1])


def write_report(folder: Path, outcomes: Sequence[Outcome], config: dict[str, Any], num_classes: int) -> str:
    """Write ``ablations.csv``, ``ablations.png`` and ``ablations.md``.

    Args:
        folder: Where to.
        outcomes: Of the trainings so far.
        config: What they have in common, by dotted names.
        num_classes: Of the data.

    Returns:
        The report in Markdown.
    """
    _write_table(outcomes, folder / "ablations.csv")
    _plot(outcomes, folder / "ablations.png")
    text = _report(outcomes, config, num_classes, revisions_of(sorted((folder / "runs").glob(RUNS))))
    (folder / "ablations.md").write_text(text)
    return text


def trains(outcomes: Sequence[Outcome], num_classes: int) -> bool:
    """Whether the trainings of all seeds ended with twice the accuracy of guessing, or more."""
    return not any(o.diverged for o in outcomes) and min(o.final for o in outcomes) >= 2 / num_classes


def _write_table(outcomes: Sequence[Outcome], path: Path) -> None:
    with path.open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["section", "trial", "seed", "final_top1", "best_top1", "steps", "diverged_after"])
        for o in outcomes:
            steps = int(o.curve.steps[-1]) if len(o.curve.steps) else 0
            accuracies = [f"{o.final:.4f}", "" if o.curve.best is None else f"{o.curve.best:.4f}"]
            writer.writerow([o.section, o.label, o.seed, *accuracies, steps, o.curve.diverged_after])


def _report(outcomes: Sequence[Outcome], config: dict[str, Any], num_classes: int, revisions: Sequence[str]) -> str:
    seeds = len({o.seed for o in outcomes})
    rows = [[section, label, _accuracies(of_trial)] for (section, label), of_trial in _trials(outcomes).items()]
    return (
        "\n\n".join(
            [
                "# What BatchNorm makes possible, and what it makes superfluous",
                f"    syncbn {shlex.join(sys.argv[1:])}",
                "![Ablations](ablations.png)",
                f"Top-1 accuracy of the last evaluation, {seeds} seed{'s' if seeds > 1 else ''}; with BN except where"
                " it says otherwise. One thing at a time differs from the config:"
                f" {', '.join(f'{key} {value}' for key, value in config.items())}. {provenance(revisions)}",
                markdown_table(["what", "value", "accuracy"], rows),
                *([_DIVERGED] if any(o.diverged for o in outcomes) else []),
                *(_ranges(outcomes, num_classes) if any(o.section == RATE_SECTION for o in outcomes) else []),
                *(["One seed: differences of a few points are within chance."] if seeds == 1 else []),
            ]
        )
        + "\n"
    )


_DIVERGED = "A training that diverged counts as 0 % in the means of the table and of the picture."


def _trials(outcomes: Sequence[Outcome]) -> dict[tuple[str, str], list[Outcome]]:
    """The outcomes of each trial, one a seed."""
    trials: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        trials.setdefault((outcome.section, outcome.label), []).append(outcome)
    return trials


def _accuracies(of_trial: Sequence[Outcome]) -> str:
    if all(o.diverged for o in of_trial):
        return "diverged"
    diverged = sum(o.diverged for o in of_trial)
    finals = [100 * o.final for o in of_trial]
    text = f"{np.mean(finals):.2f} %"
    text += f" ({min(finals):.2f} to {max(finals):.2f})" if len(finals) > 1 else ""
    return text + (f", {diverged} diverged" if diverged else "")


def _ranges(outcomes: Sequence[Outcome], num_classes: int) -> list[str]:
    """In words, the learning rates that train with and without BatchNorm."""
    lines = []
    for norm, network in (("none", "Without"), ("batch", "With")):
        tried = {
            of_trial[0].changes["model.learning_rate_per_32_images"]: trains(of_trial, num_classes)
            for (section, _), of_trial in _trials(outcomes).items()
            if section == RATE_SECTION and of_trial[0].changes["model.norm"] == norm
        }
        rates = sorted(rate for rate, does_train in tried.items() if does_train)
        found = ", ".join(f"{rate:g}" for rate in rates) or "none of those tried"
        if len(rates) > 1 and all(does for rate, does in tried.items() if rates[0] < rate < rates[-1]):
            found = f"from {rates[0]:g} to {rates[-1]:g}"
        criterion = "at least twice the accuracy of guessing, with every seed"
        lines.append(f"{network} BN these learning rates train ({criterion}): {found}.")
    return lines


def _plot(outcomes: Sequence[Outcome], picture: Path) -> None:
    # Not pyplot: it would choose a windowing system and keep every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rates = [o for o in outcomes if o.section == RATE_SECTION]
    others = [o for o in outcomes if o.section != RATE_SECTION]
    drawings = [(draw, part) for draw, part in ((_draw_sweep, rates), (_draw_bars, others)) if part]
    figure = Figure(figsize=(5.5 * len(drawings), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (draw, part) in zip(figure.subplots(1, len(drawings), squeeze=False)[0], drawings, strict=True):
        draw(axes, part)
    figure.savefig(picture, dpi=90)


def _draw_bars(axes: Any, outcomes: Sequence[Outcome]) -> None:
    """The mean accuracy of each trial, and a dot for each seed."""
    for (section, label), of_trial in _trials(outcomes).items():
        name, values = f"{section}: {label}", [100 * o.final for o in of_trial]
        axes.barh(name, np.mean(values), color="C0", alpha=0.6)
        axes.plot(values, [name] * len(values), "k.", markersize=4)
    axes.invert_yaxis()
    axes.set_xlabel("final top-1 accuracy, %")
    axes.set_xlim(0, 100)
    axes.set_title("with BN, one thing changed")


def _draw_sweep(axes: Any, outcomes: Sequence[Outcome]) -> None:
    """Mean accuracy against the learning rate, from the lowest to the highest seed; what diverged is a cross at 0."""
    for norm, label, style in (("batch", "with BN", "C0o-"), ("none", "without BN", "C3s--")):
        of_network = [o for o in outcomes if o.changes["model.norm"] == norm]
        trials = _trials(of_network).values()
        rates = [of_trial[0].changes["model.learning_rate_per_32_images"] for of_trial in trials]
        finals = [[100 * o.final for o in of_trial] for of_trial in trials]  # trials may have run with fewer seeds yet
        axes.semilogx(rates, [np.mean(values) for values in finals], style, label=label, markersize=4)
        axes.fill_between(rates, [*map(min, finals)], [*map(max, finals)], color=style[:2], alpha=0.2, linewidth=0)
        diverged = [o.changes["model.learning_rate_per_32_images"] for o in of_network if o.diverged]
        axes.plot(diverged, [0] * len(diverged), "kx", markersize=9, clip_on=False)
    axes.plot([], [], "kx", label="diverged")
    axes.set_xlabel("learning rate per 32 images")
    axes.set_ylabel("final top-1 accuracy, %")
    axes.set_ylim(0, 100)
    axes.set_title("higher learning rates")
    axes.grid(alpha=0.3)
    axes.legend()
