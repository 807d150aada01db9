"""Evaluation by class probabilities: the mean over an image's crops, and over several networks."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from syncbn.data.datasets.formats import Stage
from syncbn.data.labels import UNNAMED
from syncbn.data.loading.batches import ImageBatch
from syncbn.models.weights.reading import first_not_finite
from syncbn.training.checkpoints.trained_classes import reorder_outputs, say
from syncbn.training.evaluated_images import stage_of_test

SAME_TASK = {
    "num_classes": "give it data of the same classes",
    "in_channels": "give it data of the same kind, grey or coloured",
    "variant": "all of them, and the config, must be of one variant, whose input is prepared in its way",
}
"""Hyperparameters that a checkpoint must have in common with the config, and what to do where it has not."""


class Evaluated(LightningModule, ABC):
    """Validation, test and prediction of whatever gives class probabilities.

    Args:
        num_classes: Classes to tell apart.

    Attributes:
        logs_tests: Whether ``Trainer.test`` writes to the loggers, too.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.logs_tests = True
        self.metrics = accuracy_metrics(num_classes)

    @abstractmethod
    def log_probabilities(self, images: Tensor) -> Tensor:
        """Logarithms of the class probabilities.

        Args:
            images: Normalised, shape (N, C, H, W), or (N, K, C, H, W) with K crops of each image.

        Returns:
            Shape (N, num_classes).
        """

    def on_validation_start(self) -> None:
        """Where nothing is trained, refuse weights that are not finite."""
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self._check_weights()

    def on_test_start(self) -> None:
        """Refuse weights that are not finite."""
        self._check_weights()

    def on_predict_start(self) -> None:
        """Refuse weights that are not finite."""
        self._check_weights()

    def _check_weights(self) -> None:
        if fault := first_not_finite((*self.named_parameters(), *self.named_buffers())):
            raise ValueError(f"{fault}: an accuracy would be that of chance. Take an earlier checkpoint")

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> Tensor | None:
        """Count this rank's hits; returns the logarithms of the class probabilities, for callbacks."""
        return self._evaluate("val", batch)

    def test_step(self, batch: ImageBatch, batch_idx: int) -> Tensor | None:
        """Count this rank's hits; returns the logarithms of the class probabilities, for callbacks."""
        return self._evaluate(stage_of_test(self.trainer), batch)

    def on_validation_epoch_end(self) -> None:
        """Log loss and accuracies over all validation images."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log loss and accuracies over all test images; as of validation, where there are no others."""
        self._log_evaluation(stage_of_test(self.trainer))

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor]:
        """Class probabilities.

        Returns:
            "indices" and "labels", int64, shape (N,); "probabilities", shape (N, num_classes).
        """
        images = batch.images
        probabilities = self.log_probabilities(images).exp() if len(images) else images.new_zeros(0, 1)
        return {"indices": batch.indices, "labels": batch.labels, "probabilities": probabilities}

    def _takes_part_without_images(self) -> bool:
        """Whether the strategy gathers weights, which every rank has to take part in."""
        return getattr(self.trainer.strategy, "gathers_weights", False)

    def _evaluate(self, stage: Stage, batch: ImageBatch) -> Tensor | None:
        images = len(batch.images)
        if images == 0:  # this rank's share of the last batch may be empty; BN sends no message in evaluation
            if self._takes_part_without_images():
                self.log_probabilities(batch.images)
            return None
        log_probabilities = self.log_probabilities(batch.images)
        self._metric(f"{stage}_images").update(images)
        self._metric(f"{stage}_loss").update(F.nll_loss(log_probabilities, batch.labels), weight=images)
        self._metric(f"{stage}_top1").update(log_probabilities, batch.labels)
        self._metric(f"{stage}_top5").update(log_probabilities, batch.labels)
        return log_probabilities

    def _log_evaluation(self, stage: Stage) -> None:
        # Here, and not in the step: every rank has to take part in adding up, also one without an image.
        for name in (f"{stage}_images", f"{stage}_loss", f"{stage}_top1", f"{stage}_top5"):
            self.log(name, self._metric(name), prog_bar=name.endswith("top1"), logger=self._to_loggers())

    def _to_loggers(self) -> bool | None:
        """What `log` takes as ``logger``; None for loggers if there are any."""
        return None if self.logs_tests or self.trainer.state.fn != TrainerFn.TESTING else False

    def _metric(self, name: str) -> Any:
        return self.metrics[name]


class Ensemble(Evaluated):
    """Several networks as one: the arithmetic mean of their class probabilities (section 4.2.3 of the paper).

    Args:
        members: Of the same classes.
        num_classes: How many these are.
    """

    def __init__(self, members: Sequence[Evaluated], num_classes: int) -> None:
        super().__init__(num_classes)
        assert members
        self.members = nn.ModuleList(members)

    def log_probabilities(self, images: Tensor) -> Tensor:
        """Logarithm of the mean over the networks, and over the crops where there are several."""
        members: Any = self.members
        return log_of_mean([member.log_probabilities(images) for member in members])


def log_of_mean(log_probabilities: Sequence[Tensor]) -> Tensor:
    """Logarithm of the arithmetic mean of probabilities that are given as logarithms, all of one shape."""
    return torch.logsumexp(torch.stack(tuple(log_probabilities)), 0) - math.log(len(log_probabilities))


def load_ensemble(paths: Sequence[str], like: Any, classes_by_name: bool = True) -> Ensemble:
    """Build the networks of checkpoints; they may differ in all but their classes and their input.

    Args:
        paths: Of `ImageClassifier`'s checkpoints.
        like: The ImageClassifier of the config, to which the data are prepared.
        classes_by_name: Whether the names of their classes decide which outputs are averaged; else their places do.

    Returns:
        An ensemble of networks of the class of ``like``.

    Raises:
        ValueError: A file is no checkpoint of an ImageClassifier, or of one with other classes, channels or variant.
    """
    members = load_members(paths, type(like), like.hparams, classes_by_name)
    return Ensemble(members, like.hparams["num_classes"])


def load_members(
    paths: Sequence[str], kind: Any, wanted: Mapping[str, Any] | None = None, classes_by_name: bool = True
) -> list[Any]:
    """Build the networks of checkpoints, whose outputs are of the same classes in the same order.

    Args:
        paths: Of the checkpoints.
        kind: The class of the networks: ImageClassifier.
        wanted: The hyperparameters that they must have in common with these; None takes those of the first.
        classes_by_name: As of `load_ensemble`.

    Raises:
        ValueError: As of `load_ensemble`.
    """
    members = [load_member(path, kind) for path in paths]
    for path, member in zip(paths, members, strict=True):
        check_same_task(f"--checkpoints: {path}", member.hparams, wanted or members[0].hparams)
    if classes_by_name:
        named = [(path, member) for path, member in zip(paths, members, strict=True) if member.trained_classes]
        for path, member in named[1:]:
            first, like = named[0]
            reorder_outputs(member.network, member.trained_classes, path, like.trained_classes, first)
        if len(named) < len(members):
            say(UNNAMED)
    return members


def load_member(path: str, kind: Any) -> Any:
    """Build the network of a checkpoint as it was trained.

    Args:
        path: Of the checkpoint.
        kind: The class of the network: ImageClassifier.

    Raises:
        ValueError: There is no such file, or it is no checkpoint of such a network.
    """
    if not Path(path).is_file():
        raise ValueError(f"--checkpoints: there is no file {path}")
    try:
        return kind.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling junk, or a foreign checkpoint, may raise
        reason = " ".join(str(error).partition(". ")[0].split())[:200]  # of torch's, without its advice to run code
        raise ValueError(f"--checkpoints: {path} is not a checkpoint of syncbn's: {reason}") from error


def check_same_task(checkpoint: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose classes, channels or variant are not those of the config and its data.

    Args:
        checkpoint: How a message calls it.
        found: The hyperparameters in it; one that it does not have is not looked at.
        wanted: Those of the network that is configured.

    Raises:
        ValueError: One differs; the message names it and both values.
    """
    for name, remedy in SAME_TASK.items():
        if name in found and found[name] != wanted[name]:
            raise ValueError(f"{checkpoint} has {name}={found[name]}, the config {wanted[name]}: {remedy}")


class _WideState(Metric):
    """A metric whose sums stay in float32 or wider.

    For ``precision=bf16-true`` Lightning calls ``to(torch.bfloat16)`` on the module, and so on its metrics, whose
    guard (torchmetrics 1.9) knows ``bfloat16()`` alone. In bfloat16 a count stops at 256.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        def keep_width(state: Tensor) -> Tensor:
            applied = fn(state)
            return state.to(applied.device) if applied.itemsize < state.itemsize else applied

        return super()._apply(keep_width, exclude_state)


class WideSum(_WideState, SumMetric):
    """torchmetrics' `SumMetric`, exact in every precision of the module."""


class WideMean(_WideState, MeanMetric):
    """torchmetrics' `MeanMetric`, the same in every precision of the module."""


def accuracy_metrics(num_classes: int) -> nn.ModuleDict:
    """Of each stage the number of images, mean loss, top-1 and top-5 accuracy, by sample over all ranks."""

    def accuracy(top_k: int) -> Metric:
        return MulticlassAccuracy(num_classes, min(top_k, num_classes), average="micro", validate_args=False)

    metrics: dict[str, Metric] = {"train_top1": accuracy(1)}
    for stage in ("val", "test"):
        metrics |= {
            f"{stage}_images": WideSum(),
            f"{stage}_loss": WideMean(),
            f"{stage}_top1": accuracy(1),
            f"{stage}_top5": accuracy(5),
        }
    return nn.ModuleDict(metrics)
