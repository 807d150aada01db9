"""What ``syncbn fit`` would do with the same words, built in full but not run."""

import contextlib
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from syncbn.data import ImageDataModule
from syncbn.data.datasets.base import ImageDataset
from syncbn.doctor.facts import Configuration
from syncbn.training.command import SyncBNCLI

SAMPLES = 16
"""Images of each set that are read and compared between the nodes."""


class PlannedFit(SyncBNCLI):
    """The data, the network and the trainer of ``syncbn fit``, without a run folder and without a run."""

    error: Exception | None = None

    def instantiate_classes(self) -> None:
        """Build them; keep what was built before an error."""
        try:
            super().instantiate_classes()
        except Exception as error:
            self.error = error
            if not hasattr(self, "datamodule"):
                self._plan_trainer_alone()

    def _plan_trainer_alone(self) -> None:
        """Where there is no data: the trainer that there would be, with the package's own images instead."""
        given, self.config = self.config, self.config.clone()
        self.config[self.subcommand].data.root = "fashion-mnist"
        with contextlib.suppress(Exception):  # the first error is told
            super().instantiate_classes()
            del self.datamodule, self.model
        self.config = given

    def _loggers(self, configured: Any) -> list[Any]:
        return []

    def _run_subcommand(self, subcommand: str) -> None:
        pass


class FitConfiguration:
    """What became of the words of a fit.

    Args:
        words: After ``syncbn fit``.

    Attributes:
        trainer: Lightning's; None if it could not be built.
        model: The network to train; None if it could not be built.
        data: The images; None if they could not be opened.
        error: What stood in the way; None if nothing did.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.trainer: Trainer | None = None
        self.model: LightningModule | None = None
        self.data: ImageDataModule | None = None
        self.error: Exception | None = None
        self.options: Any = {}
        command = list(sys.argv)
        sys.argv[1:] = ["fit", *words]
        try:
            fit = PlannedFit()
        except Exception as error:
            self.error = error
        else:
            self.error = fit.error
            self.options = fit.config["fit"]
            self.trainer, self.model = getattr(fit, "trainer", None), getattr(fit, "model", None)
            self.data = getattr(fit, "datamodule", None)
        finally:
            sys.argv[:] = command

    def configuration(self, reads_data: bool) -> Configuration:
        """The facts of it.

        Args:
            reads_data: Whether to read some of the images, too.
        """
        error = self.error
        digest = None
        if reads_data and self.data is not None:
            try:
                digest = digest_of_data(self.data)
            except (OSError, ValueError) as broken:
                error = error or broken
        return Configuration(
            error=None if error is None else " ".join(str(error).split()) or type(error).__name__,
            data_digest=digest,
            checkpoint_bytes=None if self.model is None else checkpoint_bytes(self.model),
            **self._of_trainer(),
            **self._of_options(),
        )

    def _of_trainer(self) -> dict[str, Any]:
        trainer = self.trainer
        if trainer is None:
            return {}
        device = trainer.strategy.root_device.type
        return {
            "devices": trainer.num_devices,
            "num_nodes": trainer.num_nodes,
            "strategy": type(trainer.strategy).__name__,
            "device": device,
            "backend": getattr(trainer.strategy, "process_group_backend", None) or backend_of(device),
            "rank": trainer.global_rank,
            "world_size": trainer.world_size,
        }

    def _of_options(self) -> dict[str, Any]:
        if not self.options:
            return {}
        model, data = self.options.model, self.options.data
        return {
            "global_batch_size": self.options.global_batch_size,
            "accumulate_grad_batches": self.options.trainer.accumulate_grad_batches,
            "learning_rate_per_32_images": model.learning_rate_per_32_images,
            "normalization_batch_size": model.normalization_batch_size,
            "num_workers": data.num_workers,
            "image_bytes": 4 * self.data.image_size**2 * self.data.channels if self.data else None,  # float32
            "data": data.root,
            "runs_folder": str(Path(self.options.runs_folder).absolute()),
        }


def backend_of(device: str) -> str:
    """Of torch.distributed, for a kind of device, where the strategy names none."""
    return "nccl" if device == "cuda" else "gloo"


def checkpoint_bytes(model: nn.Module) -> int:
    """Size of a checkpoint of a network, at most: weights, momenta and averaged weights."""
    return 3 * sum(tensor.nbytes for tensor in model.state_dict().values() if isinstance(tensor, Tensor))


def digest_of_data(data: ImageDataModule) -> str:
    """A number for the content of three sets: classes, sizes, and evenly spaced images of each.

    Raises:
        ValueError: An image cannot be read.
    """
    digest = sha256(repr(data.classes).encode())
    for images in (data.sets.train, data.sets.validation, data.test_images):
        digest.update(f"{len(images)} images".encode())
        for place in range(min(SAMPLES, len(images))):
            digest.update(content(images, place * len(images) // min(SAMPLES, len(images))))
    return digest.hexdigest()[:12]


def content(images: ImageDataset, index: int) -> bytes:
    """The name, the label and the bytes of an image."""
    encoded = images.encoded(index)
    pixels = images.image(index).tobytes() if encoded is None else encoded
    return f"{images.label(index)} {len(pixels)} ".encode() + pixels
