"""Short trainings under several strategies, one after another in the same two processes."""

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import TorchElasticEnvironment

from shard_cases import GLOBAL_BATCH_SIZE, SHUFFLE_WINDOW
from syncbn.data import Augmentation, ImageDataModule
from syncbn.training import (
    ImageClassifier,
    LeftOutImages,
    StopAtNonFinite,
    SynchronisedDDPStrategy,
    SynchronisedDeepSpeedStrategy,
    SynchronisedFSDP2Strategy,
)
from training.conftest import IGNORED

TIMEOUT = 120  # seconds
STEPS = 6  # of which the last has 3 images, 2 and 1
SAVED_AFTER = 4
OTHERS = (
    "ignore:.*callbacks used to create the checkpoint:UserWarning",
    "ignore:.*Checkpoint directory .* exists and is not empty:UserWarning",
    "ignore:.*in eval mode at the start of training:UserWarning",
    "ignore:The ``compute`` method of metric:UserWarning",  # on the rank that validates no image
)


@dataclass(frozen=True)
class Case:
    """One training: under "ddp", "fsdp2" or "zero0" to "zero3"."""

    strategy: str
    precision: str = "32-true"
    resumed_from: str | None = None  # a strategy, whose checkpoint it goes on from


@dataclass
class Outcome(Callback):
    """What rank 0 saw of a training."""

    losses: list[float] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tested: dict[str, float] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = ()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        loss = outputs["loss"].detach().double()
        self.losses.append(float(trainer.strategy.reduce(loss, reduce_op="mean")))
        layer = pl_module.network.stem.conv2.bn
        self.dtypes = (layer.weight.dtype, layer.running_mean.dtype)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights = {name: value.clone() for name, value in trainer.strategy.lightning_module_state_dict().items()}


def strategy_of(case: Case) -> Any:
    if case.strategy == "ddp":
        return SynchronisedDDPStrategy(timeout_seconds=TIMEOUT)
    if case.strategy == "fsdp2":
        return SynchronisedFSDP2Strategy(timeout_seconds=TIMEOUT)
    stage: Any = int(case.strategy[-1])
    as_of_command = {"logging_batch_size_per_gpu": "auto"}  # a config's options come with Lightning's defaults
    strategy = SynchronisedDeepSpeedStrategy(stage=stage, timeout_seconds=TIMEOUT, **as_of_command)
    if stage == 3:  # or none of this small network's weights would be divided
        strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return strategy


def checkpoint_of(folder: Path, strategy: str, precision: str) -> Path:
    return folder / f"{strategy}-{precision}.ckpt"


def train(case: Case, folder: Path) -> Outcome:
    """With parameter groups, a frozen layer, warm-up, clipped gradients and an uneven last batch."""
    seed_everything(1, verbose=False)
    data = ImageDataModule(
        GLOBAL_BATCH_SIZE,
        str(folder / "shards"),
        augmentation=Augmentation(),
        shuffle_window=SHUFFLE_WINDOW,
        drop_last=False,
        seed=3,
        image_size=16,
    )
    model = ImageClassifier(
        GLOBAL_BATCH_SIZE,
        data.num_classes,
        data.channels,
        data.training_images,
        width_multiplier=0.125,
        stem="small",
        learning_rate_per_32_images=0.02,
        learning_rate_factors={"classifier": 2.0},
        warmup=0.5,
        freeze=["stem.conv1"],
        drop_last=data.drop_last,
        channels_last=False,  # as flat buffers want it, so that the same convolutions run in all
    )
    outcome = Outcome()
    path = checkpoint_of(folder, case.strategy, case.precision)
    saving = ModelCheckpoint(folder, path.stem, every_n_train_steps=SAVED_AFTER, enable_version_counter=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy_of(case),
        plugins=[TorchElasticEnvironment()],
        precision=case.precision,
        max_epochs=1,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[outcome, LeftOutImages(), StopAtNonFinite(), *([] if case.resumed_from else [saving])],
        enable_checkpointing=not case.resumed_from,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    begun_from = case.resumed_from and str(checkpoint_of(folder, case.resumed_from, case.precision))
    trainer.fit(model, data, ckpt_path=begun_from, weights_only=True)
    outcome.metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "val_" in name}
    if not case.resumed_from:
        [outcome.tested] = trainer.validate(model, data, ckpt_path=str(path), verbose=False, weights_only=True)
    return outcome


def train_on_rank(rank: int, cases: list[Case], folder: Path) -> dict[Case, tuple]:
    """In a process of `run_ranks`, whose world Lightning and DeepSpeed take as it is."""
    warnings.simplefilter("error")
    for line in (*IGNORED, *OTHERS):
        warnings.filterwarnings("ignore", line.split(":")[1])
    os.environ |= {"LOCAL_RANK": str(rank), "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # never used: the world exists
    found = {}
    for case in cases:
        outcome = train(case, folder)
        weights = {name: value.numpy() for name, value in outcome.weights.items()}
        found[case] = (outcome.losses, weights, outcome.metrics, outcome.tested, outcome.dtypes)
    return found
