"""Trains a narrow Inception-BN for a few steps on P ranks, in single and in double precision.

Usage: ``invariance_worker.py RANKS OUTPUT.json`` on each rank; rank 0 writes, for each precision, the loss of every
step over the global batch, and the loss and accuracy of the validation after them.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from syncbn.data import Augmentation, ImageDataModule
from syncbn.training import ImageClassifier, SynchronisedDDPStrategy

STEPS = 6
GLOBAL_BATCH_SIZE = 32


class LossCurve(Callback):
    """Keeps the loss of the global batch, step by step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *_: Any) -> None:
        loss = outputs["loss"].detach().double()
        self.losses.append(float(trainer.strategy.reduce(loss, reduce_op="mean")))


def train(num_ranks: int, precision: Any) -> dict[str, Any]:
    """One short training; returns the losses and the validation's metrics."""
    seed_everything(1)
    data = ImageDataModule(GLOBAL_BATCH_SIZE, image_size=16, augmentation=Augmentation(), validation_images=3, seed=1)
    model = ImageClassifier(
        GLOBAL_BATCH_SIZE,
        data.num_classes,
        data.channels,
        data.training_images,
        width_multiplier=0.125,
        stem="small",
        learning_rate_per_32_images=0.001,
    )
    curve = LossCurve()
    trainer = Trainer(
        accelerator="cpu",
        devices=num_ranks,
        strategy=SynchronisedDDPStrategy(timeout_seconds=60),
        precision=precision,
        max_epochs=1,
        limit_train_batches=STEPS,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[curve],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
    norms = [float(parameter.detach().double().norm()) for parameter in model.parameters()]
    buffers = [float(buffer.double().norm()) for name, buffer in model.named_buffers() if "running" in name]
    return {"losses": curve.losses, "validation": metrics, "parameters": norms, "running_statistics": buffers}


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks = int(sys.argv[1])
    results = {precision: train(ranks, precision) for precision in ("64-true", "32-true")}
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
