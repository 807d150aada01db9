"""Population statistics of a checkpoint, estimated anew over training mini-batches: ``syncbn statistics``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from syncbn.data import ImageBatch, ImageDataModule
from syncbn.data.loading.samplers import batches_per_epoch
from syncbn.files import atomic_file
from syncbn.nn import estimate_population_statistics
from syncbn.progress import ProgressLines
from syncbn.training.classifier import ImageClassifier

Estimator = Literal["paper", "pooled"]


class PopulationStatistics(Callback):
    """Before validation, replaces the moving averages of the network by statistics over training mini-batches.

    Algorithm 2 of Ioffe & Szegedy 2015. A mini-batch is what normalises together in training, on all ranks; the images
    are cropped and distorted as in training.

    Args:
        num_batches: Global batches to use, at most those of an epoch.
        estimator: "paper", Algorithm 2; or "pooled", which counts the spread between the mini-batches too.
    """

    def __init__(self, num_batches: int, estimator: Estimator = "paper") -> None:
        self.num_batches = num_batches
        self.estimator = estimator

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate, on all ranks together.

        Raises:
            ValueError: The network has no BatchNorm, or an epoch has fewer batches.
        """
        pl_module.setup("fit")  # forms the groups of ranks that normalise together
        pl_module.train()  # but for layers whose statistics are fixed, which keep them
        with torch.inference_mode(False), trainer.precision_plugin.forward_context():
            estimate_population_statistics(
                pl_module, training_images(trainer, self.num_batches), self.num_batches, self.estimator
            )
        pl_module.eval()


def training_images(trainer: Trainer, num_batches: int) -> Iterator[Tensor]:
    """The images of this rank's training batches of the first epoch, where and as the network takes them.

    Args:
        trainer: Whose data and device they are.
        num_batches: That will be taken, for the lines that tell how far it is.
    """
    data: ImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
    with ProgressLines() as lines:
        task = lines.add_task("estimating statistics, batch", total=num_batches)
        for batch in data.train_dataloader():
            on_device: ImageBatch = trainer.strategy.batch_to_device(batch)
            yield trainer.precision_plugin.convert_input(on_device).images
            if trainer.is_global_zero:
                lines.advance(task)


class StatisticsTrainer(Trainer):
    """Lightning's Trainer, with one more thing that it does to a checkpoint."""

    def statistics(
        self,
        model: ImageClassifier,
        datamodule: ImageDataModule,
        ckpt_path: str,
        output: Path,
        num_batches: int = 200,
        estimator: Estimator = "paper",
        weights_only: bool | None = True,
    ) -> list[dict[str, float]]:
        """Estimate the population statistics of a checkpoint anew, and write it with them.

        Of a run with Polyak averaging, these are the statistics of the averaged weights, which the checkpoint's
        ``state_dict`` holds. Validates before and after, and prints both accuracies.

        Args:
            model: The network of the checkpoint.
            datamodule: Its training and validation images.
            ckpt_path: The checkpoint; it is left as it is.
            output: The checkpoint to write, for `validate`, `test` and `predict`; an existing one is replaced.
            num_batches: Global batches to estimate over, at most those of an epoch.
            estimator: "paper", Algorithm 2: the mean over the mini-batches of their means, and of their unbiased
                variances; or "pooled", which counts the spread between the mini-batches too.
            weights_only: Load tensors and numbers, but run no code of the checkpoint.

        Returns:
            The validation metrics with the moving averages, and with the statistics.

        Raises:
            ValueError: The output is the checkpoint or in no folder, the network has no BatchNorm, or an epoch has
                fewer batches.
        """
        if output.resolve() == Path(ckpt_path).resolve():
            raise ValueError(f"--output {output} is the checkpoint itself: name another file, the old one is kept")
        images, batch_size = datamodule.training_images, datamodule.global_batch_size
        available = batches_per_epoch(images, batch_size, datamodule.drop_last)
        if not 1 <= num_batches <= available:
            raise ValueError(
                f"num_batches={num_batches} must lie in 1..{available}, the batches of {batch_size} in an epoch of"
                f" {images:,} training images"
            )
        if not output.parent.is_dir():
            raise ValueError(f"--output {output}: there is no folder {output.parent}")
        evaluation: dict[str, Any] = {"model": model, "datamodule": datamodule, "verbose": False}
        [before] = self.validate(ckpt_path=ckpt_path, weights_only=weights_only, **evaluation)
        callbacks: list[Callback] = self.callbacks  # type: ignore[attr-defined]
        callbacks.append(PopulationStatistics(num_batches, estimator))
        try:
            [after] = self.validate(**evaluation)
        finally:
            callbacks.pop()
        if self.is_global_zero:
            write_with_statistics(Path(ckpt_path), output, model, num_batches, estimator)
            batches = f"{num_batches:,} mini-batches of {batch_size} images ({estimator})"
            print(f"validation accuracy {_accuracy(before)} with the moving averages of {Path(ckpt_path).name}")
            print(f"validation accuracy {_accuracy(after)} with statistics over {batches}")
            print(output, flush=True)
        return [dict(before), dict(after)]


def _accuracy(metrics: Any) -> str:
    top1, top5 = (100 * metrics[f"val_{name}"] for name in ("top1", "top5"))
    return f"{top1:.2f} % (top-5 {top5:.2f} %)"


def write_with_statistics(
    source: Path, output: Path, model: torch.nn.Module, num_batches: int, estimator: Estimator
) -> None:
    """Write a checkpoint anew with the statistics of a network; whole, or not at all.

    Args:
        source: The checkpoint.
        output: Where to write it; an existing file is replaced.
        model: Whose running means and variances are taken.
        num_batches: That they were estimated over, noted in the checkpoint.
        estimator: By which they were estimated, noted likewise.
    """
    checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    state = checkpoint["state_dict"]
    for name, value in model.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            state[name] = value.to("cpu", state[name].dtype)
    checkpoint["population_statistics"] = {"num_batches": num_batches, "estimator": estimator}
    with atomic_file(output) as file:
        torch.save(checkpoint, file)
