"""Figure 4 of Ioffe & Szegedy 2015, a table: single crop, 144 crops, and an ensemble, on our checkpoints."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from syncbn.data import ImageDataModule
from syncbn.data.datasets.formats import ImageSets
from syncbn.data.datasets.selection import hold_out
from syncbn.experiments.markdown import markdown_table
from syncbn.experiments.provenance import UNKNOWN, provenance, revisions_of
from syncbn.experiments.scale import Scale, notes_beside, scale_in_words
from syncbn.models.weights import ModelCard, read_weights
from syncbn.training import ImageClassifier
from syncbn.training.checkpoints.files import read_without_tensors
from syncbn.training.checkpoints.trained_classes import say
from syncbn.training.command import TRAINER_DEFAULTS, quieten
from syncbn.training.evaluation import Evaluated, check_same_task, load_ensemble, load_members
from syncbn.training.monitoring.progress import progress_callback

MULTICROP = 144


@dataclass(frozen=True)
class Table4Row:
    """A line of the table.

    Attributes:
        model: What was evaluated.
        resolution: Pixels of a crop's side.
        crops: Of each image.
        models: Networks whose probabilities are averaged.
        top1_error: In 0..1; None where it is not stated.
        top5_error: In 0..1.
    """

    model: str
    resolution: int
    crops: int
    models: int
    top1_error: float | None
    top5_error: float


PAPER = (
    Table4Row("paper: GoogLeNet ensemble", 224, 144, 7, None, 0.0667),
    Table4Row("paper: BN-Inception single crop", 224, 1, 1, 0.252, 0.0782),
    Table4Row("paper: BN-Inception multicrop", 224, 144, 1, 0.2199, 0.0582),
    Table4Row("paper: BN-Inception ensemble", 224, 144, 6, 0.201, 0.049),
)


def table4(
    data: str,
    checkpoints: list[str],
    output: Path | None = None,
    image_size: int | None = None,
    resize: int | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    images: int | None = None,
    devices: int | str = "auto",
    accelerator: str = "auto",
    classes_by_name: bool = True,
) -> None:
    """Validate checkpoints with 1 and with 144 crops, and as an ensemble; print a table beside the paper's Figure 4.

    Args:
        data: Any data of `syncbn fit`; their validation images are used.
        checkpoints: Of `syncbn fit` or `syncbn statistics`, all of one variant.
        output: Where to write the Markdown too.
        image_size: Side of a crop in pixels. Without it, that of the checkpoints' training.
        resize: Pixels of the shorter side, to which an image is resized for a single crop; likewise.
        batch_size: Crops evaluated at a time, over all processes.
        num_workers: Processes of each rank that prepare images.
        images: How many of the validation images to use, evenly spaced, since 144 crops take their time. Without it,
            all.
        devices: How many processes: CPU cores, or GPUs where there are any.
        accelerator: Lightning's name of what to run on.
        classes_by_name: Whether the classes of data and checkpoints are compared by their names, as by
            data.classes_by_name of `syncbn fit`.

    Raises:
        ValueError: There is no checkpoint, one cannot be read, they are of different variants, classes, sizes or
            preprocessing, the data have other classes or fewer images than asked for, or there is no folder for the
            output.
    """
    if not checkpoints:
        raise ValueError("table4 needs checkpoints: '[a.ckpt, ...]'")
    if output is not None and not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}")
    quieten()
    members = load_members(checkpoints, ImageClassifier, classes_by_name=classes_by_name)
    first = members[0]
    trainer = Trainer(
        accelerator=accelerator,
        devices=devices,
        callbacks=[progress_callback()],
        logger=False,
        enable_checkpointing=False,
        **TRAINER_DEFAULTS,
    )
    card = common_card(checkpoints)
    image_size = image_size or card.image_size or 224
    cut: dict[int, ImageDataModule] = {}
    for crops in (1, MULTICROP):
        cut[crops] = ImageDataModule(
            batch_size,
            data,
            image_size,
            resize=resize or card.resize,
            evaluation_crops=crops,
            preprocessing=card.preprocessing,
            num_workers=num_workers,
            classes_by_name=classes_by_name,
            checkpoint_classes=None if card.classes is None else list(card.classes),
        )
        cut[crops].sets = some_of(cut[crops].sets, images)
    say(cut[1].remark_on_classes)
    check_same_task(f"--checkpoints: {checkpoints[0]}", first.hparams, of_data(cut[1], first.hparams))
    rows = evaluate_all(trainer, dict(zip(checkpoints, members, strict=True)), cut, classes_by_name)
    revisions = [revision_of_checkpoint(Path(path)) for path in checkpoints]
    steps = max(steps_of_checkpoint(path) for path in checkpoints)
    scale = Scale(first.hparams["width_multiplier"], image_size, cut[1].num_classes, steps)
    images_in_words = f"{len(cut[1].sets.validation):,} validation images of {data}"
    table = markdown([*rows, *PAPER], images_in_words, revisions, scale, notes_beside(output))
    if trainer.is_global_zero:
        print(table)
        if output is not None:
            output.write_text(table)


def evaluate_all(
    trainer: Trainer,
    members: Mapping[str, ImageClassifier],
    cut: Mapping[int, ImageDataModule],
    classes_by_name: bool = True,
) -> list[Table4Row]:
    """Each network with 1 and with 144 crops, and where there are several, all together with 144.

    Args:
        trainer: Evaluates.
        members: The networks, by the paths of their checkpoints.
        cut: The images, by how many crops they are cut into.
        classes_by_name: As of `load_ensemble`.
    """
    paths = list(members)
    rows = []
    for path, member in members.items():
        rows += [evaluate(trainer, member, images, short_name(path, paths), 1) for images in cut.values()]
    if len(members) > 1:
        ensemble = load_ensemble(paths, members[paths[0]], classes_by_name)
        rows.append(evaluate(trainer, ensemble, cut[MULTICROP], f"ensemble of {len(members)}", len(members)))
    return rows


def some_of(sets: ImageSets, images: int | None) -> ImageSets:
    """The same data with some of the validation images, evenly spaced over them; all of them without a number."""
    available = len(sets.validation)
    if images is None or images == available:
        return sets
    if not 1 <= images < available:
        raise ValueError(f"images={images} must lie in 1..{available}, the validation images there are")
    return replace(sets, validation=hold_out(sets.validation, images)[1])


def short_name(path: str, paths: Sequence[str]) -> str:
    """A checkpoint's file name, or as much of its path as tells it from the others."""
    parts = Path(path).parts
    others = [Path(other).parts for other in paths if other != path]
    alike = max((i for other in others for i in range(1, len(parts)) if other[-i:] == parts[-i:]), default=0)
    return str(Path(*parts[-alike - 1 :]))


def common_card(checkpoints: Sequence[str]) -> ModelCard:
    """The model card of the first checkpoint, whose images suit all of them.

    Raises:
        ValueError: They do not.
    """
    cards = [read_weights(path).card for path in checkpoints]
    for path, card in zip(checkpoints, cards, strict=True):
        for name in ("image_size", "resize", "preprocessing"):
            own, common = getattr(card, name), getattr(cards[0], name)
            if own != common:
                raise ValueError(
                    f"--checkpoints: {path} was trained with {name}={own}, {checkpoints[0]} with {common}:"
                    " an ensemble is of networks that see the same images"
                )
    return cards[0]


def of_data(data: ImageDataModule, hparams: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a network, but with the classes and channels of the data."""
    return {**hparams, "num_classes": data.num_classes, "in_channels": data.channels}


def evaluate(trainer: Trainer, model: Evaluated, data: ImageDataModule, name: str, models: int) -> Table4Row:
    """Validate, with as many crops as the data are cut into."""
    [metrics] = trainer.validate(model, datamodule=data, verbose=False)
    errors = (1 - metrics["val_top1"], 1 - metrics["val_top5"])
    return Table4Row(name, data.image_size, data.crops.count, models, *errors)


def revision_of_checkpoint(path: Path) -> str:
    """Of this package, by the run folder in whose ``checkpoints`` it lies; not known of one that lies elsewhere."""
    return revisions_of([path.parent.parent])[0] if path.parent.name == "checkpoints" else UNKNOWN


def steps_of_checkpoint(path: str) -> int:
    """The optimiser steps after which it was written."""
    return int(read_without_tensors(path)["global_step"])


def markdown(
    rows: Sequence[Table4Row],
    images: str,
    revisions: Sequence[str] = (),
    scale: Scale | None = None,
    notes: str | None = None,
) -> str:
    """The report.

    Args:
        rows: Of the table, which has errors in per cent.
        images: What they were found on, in words.
        revisions: Of this package, that the networks were trained with, as far as known.
        scale: Of the networks.
        notes: The path of the notes on this report, from its folder; None where there are none.
    """
    cells = []
    for row in rows:
        top1 = "-" if row.top1_error is None else f"{100 * row.top1_error:.2f} %"
        counts = [str(count) for count in (row.resolution, row.crops, row.models)]
        cells.append([row.model, *counts, top1, f"{100 * row.top5_error:.2f} %"])
    header = ["model", "resolution", "crops", "models", "top-1 error", "top-5 error"]
    parts = [
        f"Single-crop, multicrop and ensemble error on {images}; the paper's: on ImageNet's 50,000.",
        f"    syncbn {shlex.join(sys.argv[1:])}",
        provenance(revisions),
        *([scale_in_words(scale, notes)] if scale else []),
        markdown_table(header, cells),
    ]
    return "\n\n".join(parts) + "\n"
