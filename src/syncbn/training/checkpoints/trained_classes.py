"""Which classes a checkpoint tells apart, and how those of the data are compared with them."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from syncbn.data import ImageDataModule
from syncbn.data.labels import UNNAMED, match_classes
from syncbn.models.weights import CARD_KEY
from syncbn.training.checkpoints.files import checkpoints_of, read_without_tensors
from syncbn.training.launch.processes import is_rank_zero

TRAINED_CLASSES = "syncbn_trained_classes"
"""Under which the checkpoint of an embedding, whose card names none, holds the names of its training classes."""


def classes_of(checkpoint: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of the classes that a checkpoint was trained on, in the order of their labels; None if it has none."""
    try:
        names = json.loads(checkpoint[CARD_KEY])["classes"] or checkpoint.get(TRAINED_CLASSES)
        return None if names is None else tuple(str(name) for name in names)
    except (KeyError, TypeError, ValueError):  # no card, or none of ours
        return None


def settle_classes(config: Any) -> None:
    """Let the labels of data that are evaluated follow the names of the checkpoint's classes.

    Of several checkpoints the first that names its classes counts; `load_ensemble` compares the others with it.

    Args:
        config: Of a subcommand; its part ``data`` is changed. That of a fit is not: training goes on with all of a
            checkpoint's classes alone, as `compare_classes` and `follow_classes` see to.
    """
    if "resume" in config:
        return
    for path in checkpoints_of(config):
        if names := _classes_to_evaluate(path):
            config["data"]["checkpoint_classes"] = list(names)
            return


def _classes_to_evaluate(path: str) -> tuple[str, ...] | None:
    """Names of the outputs of a checkpoint; none of an embedding, or of what is no checkpoint (said elsewhere)."""
    try:
        checkpoint = read_without_tensors(path)
        embeds = checkpoint.get("hyper_parameters", {}).get("embedding_dimension") is not None
        return None if embeds else classes_of(checkpoint)
    except Exception:  # whatever unpickling junk may raise
        return None


def compare_classes(data: ImageDataModule, ckpt_path: str | Path | None) -> None:
    """Compare the data of a fit with the classes of the checkpoint that it goes on from, before its folder is touched.

    Raises:
        ValueError: They have other classes.
    """
    checkpoint = read_without_tensors(ckpt_path) if ckpt_path and Path(ckpt_path).is_file() else {}
    if names := classes_of(checkpoint):
        data.remark_on_classes = data.follow_classes(names, whole=True)
        say(data.remark_on_classes)


def say(remark: str) -> None:
    """Print a remark about the classes, if there is one, on rank 0."""
    if remark and is_rank_zero():
        print(f"syncbn: {remark}", file=sys.stderr, flush=True)


def follow_classes(trainer: Trainer, names: tuple[str, ...] | None, embeds: bool) -> None:
    """Compare the classes of a checkpoint that is loaded with the data's; labels follow their names.

    Args:
        trainer: Whose data are compared, if they are an `ImageDataModule`.
        names: Of the checkpoint's classes, or None.
        embeds: Whether it is an embedding, which is evaluated on whatever classes there are.

    Raises:
        ValueError: A class of the data is none of the checkpoint's; or, where training goes on, the other way round.
    """
    data, trains = getattr(trainer, "datamodule", None), trainer.state.fn == TrainerFn.FITTING
    if not isinstance(data, ImageDataModule) or (embeds and not trains):
        return
    said = data.remark_on_classes
    remark = UNNAMED if names is None else data.follow_classes(names, whole=trains)
    if remark != said:
        say(remark)
    data.remark_on_classes = remark or said  # that of a fit is not said again by its test


@torch.no_grad()
def reorder_outputs(network: Any, names: Sequence[str], path: str, wanted: Sequence[str], first: str) -> None:
    """Give the outputs of one of several networks the order that those of the others have.

    Args:
        network: Whose ``classifier`` is changed.
        names: Of its classes, in the order of its outputs.
        path: Of its checkpoint, for messages.
        wanted: Names of the classes of the first network, in the order of its outputs.
        first: Of its checkpoint, for messages.

    Raises:
        ValueError: They are other classes.
    """
    match = match_classes(wanted, names, whole=True, here=first, there=path)
    if match is not None:
        for parameter in network.classifier.parameters():
            parameter.copy_(parameter[match.labels])
        say(match.remark)
