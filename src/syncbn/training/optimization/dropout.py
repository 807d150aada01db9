"""Dropout's random numbers as a function of the step."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from syncbn.random_streams import DROPOUT_STREAM, random_stream


class RandomByStep(Callback):
    """Makes what is drawn in a training step (dropout) a function of the seed, the step and the rank.

    So there are no states of generators to keep, one for each rank and device, and none is lost in a restart.

    Args:
        seed: Of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed torch's generators."""
        stream = random_stream(self.seed, trainer.fit_loop.total_batch_idx, trainer.global_rank, DROPOUT_STREAM)
        torch.manual_seed(int(stream.integers(2**63)))
