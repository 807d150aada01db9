"""Counts the images that could not be read."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from syncbn.collectives.world import gather_objects
from syncbn.training.evaluated_images import KINDS, stage_of_test

STAGES: dict[str, str] = {"train": "training", "predict": "predicted"} | {stage: KINDS[stage] for stage in KINDS}


class LeftOutImages(Callback):
    """Says at the end of an epoch how many images were left out of their batches, and why the first was.

    Where there are any, their number over all ranks is also logged, as ``train_left_out``, ``val_left_out`` or
    ``test_left_out``. In an epoch that was resumed the number counts from there on.
    """

    def __init__(self) -> None:
        self._counts = dict.fromkeys(STAGES, 0)
        self._first = dict.fromkeys(STAGES, "")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count those of a training batch."""
        self._add("train", batch)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *places: int
    ) -> None:
        """Count those of a validation batch."""
        self._add("val", batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *places: int
    ) -> None:
        """Count those of a test batch."""
        self._add(stage_of_test(trainer), batch)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *places: int
    ) -> None:
        """Count those of a predicted batch."""
        self._add("predict", batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report those of the training images."""
        self._report("train", trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report those of the validation images."""
        self._report("val", trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report those of the test images."""
        self._report(stage_of_test(trainer), trainer, pl_module)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report those of the predicted images."""
        self._report("predict", trainer, pl_module)

    def _add(self, stage: str, batch: Any) -> None:
        if batch.left_out:
            self._first[stage] = self._first[stage] or batch.left_out[0]
            self._counts[stage] += len(batch.left_out)

    def _report(self, stage: str, trainer: Trainer, pl_module: LightningModule) -> None:
        own, first = self._counts[stage], self._first[stage]
        self._counts[stage], self._first[stage] = 0, ""
        ranks = gather_objects((own, first))
        total = sum(count for count, _ in ranks)
        if not total:
            return
        if stage != "predict":  # where Lightning logs nothing
            pl_module.log(f"{stage}_left_out", float(own), sync_dist=True, reduce_fx="sum")
        if trainer.is_global_zero:
            first = next(message for _, message in ranks if message)
            images = f"{total:,} {STAGES[stage]} image{'s' if total > 1 else ''}"
            print(f"{images} left out of epoch {trainer.current_epoch}; the first: {first}", flush=True)
