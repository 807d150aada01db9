"""Predictions as a table."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from syncbn.collectives.world import gather_objects
from syncbn.paths import open_text


class PredictionTable(BasePredictionWriter):
    """Writes what ``predict_step`` of `ImageClassifier` returns into a CSV file, in the order of the images.

    Columns: the number of the image in its data set, its label, the predicted class, its probability.

    Args:
        path: The file to write; an existing one is replaced.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(write_interval="epoch")
        self.path = path

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Gather the rows of all ranks on rank 0 and write them."""
        rows = [row for batch in predictions for row in _rows(batch)]
        rows = [row for part in gather_objects(rows) for row in part]
        if trainer.is_global_zero:
            with open_text(self.path) as lines:
                writer = csv.writer(lines)
                writer.writerow(["index", "label", "prediction", "probability"])
                writer.writerows(sorted(rows))


def _rows(batch: dict[str, Any]) -> list[tuple[int, int, int, float]]:
    if not len(batch["indices"]):
        return []
    probability, prediction = batch["probabilities"].max(1)
    columns = (batch["indices"], batch["labels"], prediction, probability)
    return list(zip(*(column.tolist() for column in columns), strict=True))
