"""Which classes are told apart, and which are taken for which: a confusion matrix and the accuracy of every class."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from syncbn.data.datasets.formats import Stage
from syncbn.paths import open_text
from syncbn.pictures import drawable_names, plain_text, unless_it_fails
from syncbn.training.evaluated_images import KINDS, stage_of_test
from syncbn.training.run.folder import run_folder

NAMED_CLASSES = 40
"""Up to so many classes have their names on the axes of the picture ..."""
COUNTED_CLASSES = 20
"""... and up to so many their numbers of images in the fields."""
FIELDS = 250
"""Of more classes, a field of the picture is the strongest of several."""
WORST = 15
"""Of more classes than have names, so many are named: those of the lowest accuracy, and the commonest confusions."""


class ClassReport(Callback):
    """Writes ``confusion_STAGE.csv``, ``classes_STAGE.csv`` and ``confusion_STAGE.png``; STAGE is val or test.

    Counted over all ranks, each image once. In a fit, those of validation are of its last epoch. Where there are no
    test images, a test writes those of validation: at the end of ``syncbn fit`` they are of the best checkpoint.

    Args:
        folder: Where to write. Null takes the folder of the run; outside of a fit, the present one.

    Raises:
        ValueError: The model is an embedding, which tells no classes apart.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._metric: MulticlassConfusionMatrix | None = None
        self._of_last_epoch: np.ndarray | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a model that has no class probabilities."""
        if getattr(pl_module, "hparams", {}).get("embedding_dimension") is not None:
            raise ValueError("ClassReport needs class probabilities, and embedding_dimension trains an embedding")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from 0."""
        self._start(trainer, pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from 0."""
        self._start(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *places: int
    ) -> None:
        """Count a batch."""
        self._count(outputs, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *places: int
    ) -> None:
        """Count a batch."""
        self._count(outputs, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up the ranks; write, unless another epoch may follow."""
        counts = self._sum_over_ranks()
        if trainer.state.fn == TrainerFn.FITTING:
            self._of_last_epoch = counts
        else:
            self._write(trainer, "val", counts)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what the last validation gave."""
        if self._of_last_epoch is not None:
            self._write(trainer, "val", self._of_last_epoch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up the ranks and write."""
        self._write(trainer, stage_of_test(trainer), self._sum_over_ranks())

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._metric = MulticlassConfusionMatrix(len(class_names(trainer)), validate_args=False).to(pl_module.device)

    def _count(self, log_probabilities: Tensor | None, batch: Any) -> None:
        assert self._metric is not None
        if log_probabilities is not None:  # this rank's share of the batch was not empty
            self._metric.update(log_probabilities, batch.labels)

    def _sum_over_ranks(self) -> np.ndarray:
        metric, self._metric = self._metric, None
        assert metric is not None
        return metric.compute().cpu().numpy()

    def _write(self, trainer: Trainer, stage: Stage, counts: np.ndarray) -> None:
        if not trainer.is_global_zero:
            return
        folder = Path(self.folder) if self.folder else run_folder(trainer) or Path()
        folder.mkdir(parents=True, exist_ok=True)
        classes = class_names(trainer)
        write_confusion(folder / f"confusion_{stage}.csv", counts, classes)
        write_classes(folder / f"classes_{stage}.csv", counts, classes)
        picture = folder / f"confusion_{stage}.png"
        with unless_it_fails(picture):
            draw_confusion(picture, counts, classes, KINDS[stage])


def class_names(trainer: Trainer) -> Sequence[str]:
    """Names of the classes of the trainer's data.

    Raises:
        ValueError: They are not known.
    """
    classes = getattr(trainer.datamodule, "classes", None)  # type: ignore[attr-defined]
    if classes is None:
        raise ValueError("ClassReport needs the names of the classes: give the trainer an ImageDataModule")
    return classes


def accuracies(counts: np.ndarray) -> np.ndarray:
    """Share of each class's images that was recognised: float64, shape (K,); NaN of a class without images."""
    images = counts.sum(axis=1)
    return np.divide(np.diagonal(counts), images, out=np.full(len(counts), np.nan), where=images > 0)


def write_confusion(path: Path, counts: np.ndarray, classes: Sequence[str]) -> None:
    """Write the matrix: a row for each true class, a column for each predicted one."""
    with open_text(path) as lines:
        writer = csv.writer(lines)
        writer.writerow(["true \\ predicted", *classes])
        writer.writerows([name, *row] for name, row in zip(classes, counts.tolist(), strict=True))


def write_classes(path: Path, counts: np.ndarray, classes: Sequence[str]) -> None:
    """Write a row for each class: its images, how many were recognised, and what it was most often taken for."""
    confused = counts - np.diag(np.diagonal(counts))
    with open_text(path) as lines:
        writer = csv.writer(lines)
        writer.writerow(["class", "images", "recognised", "accuracy", "most_often_taken_for", "so_many_times"])
        for label, (name, accuracy) in enumerate(zip(classes, accuracies(counts), strict=True)):
            other = int(confused[label].argmax())
            times = int(confused[label, other])
            images, recognised = int(counts[label].sum()), int(counts[label, label])
            share = "" if np.isnan(accuracy) else f"{accuracy:.4f}"
            writer.writerow([name, images, recognised, share, classes[other] if times else "", times])


def draw_confusion(path: Path, counts: np.ndarray, classes: Sequence[str], kind: str = "") -> None:
    """Draw the matrix, each row in shares of the true class, and beside it the accuracies of the classes.

    Args:
        path: The PNG file to write.
        counts: Images of each true class that were taken for each class, shape (K, K).
        classes: Their names.
        kind: Of the images: "validation" or "test".
    """
    # Not pyplot: it would choose a windowing system and keep every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = drawable_names(classes)
    side = 5 + 0.2 * min(len(names), NAMED_CLASSES)
    with plain_text(*names):
        figure = Figure(figsize=(2 * side, side), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        _draw_matrix(left, counts, names)
        _draw_accuracies(right, counts, names, f"{kind} images".strip())
        figure.savefig(path, dpi=120, bbox_inches="tight")  # long names of classes included


def _draw_matrix(axes: Any, counts: np.ndarray, classes: Sequence[str]) -> None:
    from matplotlib.colors import PowerNorm

    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    edges = (-0.5, len(classes) - 0.5, len(classes) - 0.5, -0.5)
    # The square root, so that a few confusions among many images are seen.
    image = axes.imshow(strongest(shares), cmap="Blues", norm=PowerNorm(0.5, 0, 1), extent=edges)
    axes.set(xlabel="predicted", ylabel="true", title="share of each true class")
    if len(classes) <= NAMED_CLASSES:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= COUNTED_CLASSES:
        for row, column in np.argwhere(counts):
            colour = "white" if shares[row, column] > 0.3 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=8)
    axes.figure.colorbar(image, ax=axes, shrink=0.8)


def strongest(shares: np.ndarray) -> np.ndarray:
    """The largest of each square of fields, of so many that no field of the picture is smaller than a pixel."""
    step = -(-len(shares) // FIELDS)
    padded = np.pad(shares, (0, -len(shares) % step))
    blocks = len(padded) // step
    return padded.reshape(blocks, step, blocks, step).max(axis=(1, 3))


def _draw_accuracies(axes: Any, counts: np.ndarray, classes: Sequence[str], images: str) -> None:
    from matplotlib import rcParams

    accuracy = accuracies(counts)
    order = [int(label) for label in np.argsort(accuracy) if not np.isnan(accuracy[label])]
    overall = np.trace(counts) / max(1, counts.sum())
    axes.set(title=f"accuracy of each class ({overall:.1%} of {counts.sum():,} {images})")
    if len(classes) <= NAMED_CLASSES:
        axes.barh(range(len(order)), accuracy[order[::-1]])
        axes.set_yticks(range(len(order)), [classes[label] for label in reversed(order)])
        axes.set(xlabel="accuracy", xlim=(0, 1))
    else:
        axes.plot(accuracy[order], range(1, len(order) + 1))
        axes.set(xlabel="accuracy", ylabel="classes of this accuracy or less", xlim=(0, 1))
        worst = [f"{accuracy[label]:5.1%}  {short(classes[label])}" for label in order[:WORST]]
        text = "\n".join(
            ["lowest:", *worst, "", "most often taken for another:", *commonest_confusions(counts, classes)]
        )
        families = ["monospace", *rcParams["font.family"]]
        axes.text(0.03, 0.98, text, transform=axes.transAxes, va="top", fontsize=7, family=families)
    axes.grid(alpha=0.3)


def commonest_confusions(counts: np.ndarray, classes: Sequence[str]) -> list[str]:
    """Lines of the largest numbers beside the diagonal: how many, of which class, taken for which."""
    confused = counts - np.diag(np.diagonal(counts))
    largest = np.argsort(confused, axis=None)[::-1][:WORST]
    places = [divmod(int(place), len(classes)) for place in largest]
    return [
        f"{confused[true, other]:5}  {short(classes[true])} as {short(classes[other])}"
        for true, other in places
        if confused[true, other]
    ]


def short(name: str) -> str:
    """A name that fits into the picture."""
    return name if len(name) <= 24 else f"{name[:23]}."
