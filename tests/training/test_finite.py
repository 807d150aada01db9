"""A training that goes to infinity stops, says where, and keeps its last good checkpoint."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from syncbn.data import ImageDataModule
from syncbn.training import ImageClassifier, StopAtNonFinite

FASHION_MNIST = Path(__file__).parents[2] / "configs" / "fashion_mnist.yaml"


def make(**options: Any) -> tuple[ImageClassifier, ImageDataModule]:
    """A narrow network, and 50 training images in 6 steps an epoch."""
    seed_everything(0)
    data = ImageDataModule(8, image_size=8, validation_images=9950, seed=0)
    settings = {"width_multiplier": 0.125, "stem": "small", "learning_rate_per_32_images": 0.01} | options
    return ImageClassifier(8, 10, 1, data.training_images, **settings), data


def fit(folder: Path, module: ImageClassifier, data: ImageDataModule, *callbacks: Callback, **options: Any) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        callbacks=list(callbacks),
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        **{"max_epochs": 3} | options,
    )
    trainer.fit(module, data)
    return trainer


class Spoil(Callback):
    """Makes a weight NaN, before the forward of a step."""

    def __init__(self, name: str, step: int) -> None:
        self.name, self.step = name, step

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                module.get_parameter(self.name).fill_(float("nan"))


def last(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="last", enable_version_counter=False)


@pytest.mark.parametrize(
    ("norm", "spoilt", "expected"),
    [
        (
            "batch",
            "network.inception_4a.branch_1x1.conv.weight",
            "the first layer whose running statistics are not finite: network.inception_4a.branch_1x1.bn",
        ),
        ("batch", "network.classifier.weight", "the running statistics of all layers are finite"),
        (
            "none",
            "network.inception_4a.branch_3x3.spatial.conv.weight",
            "the first layer whose output is not finite: network.inception_4a.branch_3x3.spatial.conv",
        ),
        (  # which runs as one with other convolutions
            "none",
            "network.inception_4a.branch_3x3.reduce.conv.weight",
            "the first layer whose output is not finite: network.inception_4a.branch_3x3.reduce.conv",
        ),
        ("none", "network.classifier.bias", "the first layer whose output is not finite: network.classifier"),
    ],
)
def test_the_step_and_the_layer_are_named_and_the_checkpoint_is_kept(tmp_path, norm, spoilt, expected):
    module, data = make(norm=norm)
    spoil = Spoil(spoilt, step=8)
    with pytest.raises(ValueError) as raised:
        fit(tmp_path, module, data, spoil, StopAtNonFinite(), last(tmp_path))
    message = str(raised.value)
    assert "the loss is not finite in step 8 at the learning rate 0.0" in message and f"{expected};" in message
    assert f"the last good checkpoint is {tmp_path / 'last.ckpt'}" in message and "\n" not in message
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6  # of the first epoch; the second ended in NaN
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt"]
    # No hooks are left on the network.
    assert not any(layer._forward_hooks for layer in module.modules())


def test_weights_that_the_last_step_spoilt_are_not_saved(tmp_path):
    class SpoilAfter(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
            if trainer.global_step == 6:
                with torch.no_grad():
                    module.get_parameter("network.classifier.weight").fill_(float("inf"))

    module, data = make()
    steps = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    with pytest.raises(ValueError, match=r"network\.classifier\.weight is not finite after step 5 at .*step=3\.ckpt"):
        fit(tmp_path, module, data, SpoilAfter(), StopAtNonFinite(), steps)
    assert [path.name for path in tmp_path.iterdir()] == ["step=3.ckpt"]


def test_without_a_checkpoint_it_says_so_and_looks_every_so_many_steps(tmp_path):
    module, data = make()
    stop = StopAtNonFinite(every_n_steps=2)
    with pytest.raises(ValueError, match=r"in step 2 at .*; there is no checkpoint yet"):
        fit(tmp_path, module, data, Spoil("network.classifier.weight", 2), stop, enable_checkpointing=False)
    assert module.trainer.global_step == 4


def test_a_healthy_training_is_the_same_with_and_without(tmp_path):
    def weights(*callbacks: Callback) -> list[torch.Tensor]:
        module, data = make(norm="none")
        fit(tmp_path, module, data, *callbacks, enable_checkpointing=False, max_epochs=1)
        return list(module.parameters())

    assert all(map(torch.equal, weights(), weights(StopAtNonFinite(2))))


def test_too_small_an_interval_is_refused():
    with pytest.raises(ValueError, match="every_n_steps=0 must be at least 1"):
        StopAtNonFinite(0)


def test_fit_of_two_ranks_ends_with_one_line(tmp_path):
    """As a user meets it: far too high a learning rate."""
    words = ["fit", "--config", str(FASHION_MNIST), "--model.learning_rate_per_32_images=1e18", "--model.norm=none"]
    words += ["--data.image_size=8", "--global_batch_size=32", "--trainer.max_epochs=1", "--trainer.devices=2"]
    words += ["--model.warmup=0", "--trainer.log_every_n_steps=1"]
    words += ["--trainer.limit_train_batches=3", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    finished = subprocess.run(
        [sys.executable, "-m", "syncbn", *words],
        env=os.environ | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 1 and "Traceback" not in finished.stderr, finished.stderr
    errors = [line for line in finished.stderr.splitlines() if line.startswith("syncbn: error")]
    own = [line for line in errors if "(rank" not in line]
    assert len(own) == 1 and len({line.partition(": the ")[2] for line in errors}) == 1
    assert re.match(r"syncbn: error: the loss is not finite in step \d at the learning rate .*network\.", own[0])
    assert not list(tmp_path.rglob("*.ckpt"))
