"""The curves of a run as a picture: loss, accuracy and learning rate over the steps."""

import csv
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from syncbn.pictures import plain_text, unless_it_fails
from syncbn.training.run.folder import run_folder

PANELS = (
    ("cross-entropy loss", {"train_loss": "training (one global batch)", "val_loss": "validation"}),
    (
        "top-1 accuracy",
        {
            "train_top1": "training (mean of the epoch)",
            "val_top1": "validation",
            "val_recall_at_1": "validation, recall@1",
        },
    ),
    ("learning rate", {"learning_rate": "learning rate"}),
)
"""Of each panel the label of the y axis, and the columns of the log with their names in the legend."""


def read_series(log: Path, column: str) -> tuple[list[int], list[float]]:
    """One column of a CSV log: the steps at which it has a value, and the values.

    Args:
        log: ``metrics.csv`` of Lightning's CSVLogger.
        column: Name of the column. One that is not there has no values.
    """
    with log.open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row.get(column)]
    return [int(row["step"]) for row in rows], [float(row[column]) for row in rows]


def plot_curves(log: Path, picture: Path) -> None:
    """Draw the curves of a CSV log.

    Args:
        log: ``metrics.csv`` of Lightning's CSVLogger.
        picture: Where to write the PNG.
    """
    # Not pyplot: it would choose a windowing system and keep every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    title = str(log.parent)
    figure = Figure(figsize=(8, 10), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (label, columns) in zip(figure.subplots(len(PANELS), sharex=True), PANELS, strict=True):
        for column, name in columns.items():
            steps, values = read_series(log, column)
            if not steps:
                continue
            # An epoch's values are few: markers show them even where there is but one.
            axes.plot(steps, values, label=name, marker="." if len(values) < 200 else None, linewidth=1)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    axes.set_xlabel("optimiser step")
    with plain_text(title):
        figure.suptitle(title)
        figure.savefig(picture, dpi=120)


class CurvesPlot(Callback):
    """Draws ``curves.png`` into the run folder when training ends, is interrupted or fails."""

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        self._draw(trainer)

    @rank_zero_only
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw what there is."""
        self._draw(trainer)

    @staticmethod
    def _draw(trainer: Trainer) -> None:
        folder = run_folder(trainer)
        for logger in trainer.loggers:
            logger.save()  # the CSV logger writes only every so many steps
        if folder and (folder / "metrics.csv").is_file():
            with unless_it_fails(folder / "curves.png"):
                plot_curves(folder / "metrics.csv", folder / "curves.png")
