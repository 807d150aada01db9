"""Real Trainers on shards: incomplete batches weigh by sample, and a run goes on at any step on any number of ranks."""

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import TorchElasticEnvironment

from ranks import run_ranks
from shard_cases import GLOBAL_BATCH_SIZE, SHUFFLE_WINDOW, digest_of, make_shards
from syncbn.collectives.world import gather_objects
from syncbn.data import Augmentation, ImageBatch, ImageDataModule
from syncbn.training import ImageClassifier, LeftOutImages, SynchronisedDDPStrategy
from training.conftest import IGNORED

NO_SAVING_WHEN_RESUMED = "ignore:.*callbacks used to create the checkpoint:UserWarning"
LOST_SHARD = "ignore:.*its images are left out:UserWarning"
pytestmark = [pytest.mark.filterwarnings(line) for line in (NO_SAVING_WHEN_RESUMED, LOST_SHARD)]
TOLERANCE = 1e-9  # relative, in float64


@dataclass
class Record(Callback):
    """What a run saw and did, by the number of the step from 0."""

    batches: dict[int, str] = field(default_factory=dict)
    sizes: dict[int, list[int]] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    parameters: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any):
        shares: list[ImageBatch] = gather_objects(batch)
        step = trainer.global_step - 1
        self.batches[step] = digest_of(shares)
        self.sizes[step] = [len(share.labels) for share in shares]
        self.losses[step] = float(trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean"))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule):
        self.parameters = [float(parameter.detach().norm()) for parameter in pl_module.parameters()]


def train(
    folder: Path,
    num_ranks: int,
    *,
    checkpoint: str = "",
    norm: str = "batch",
    accumulate: int = 1,
    max_steps: int = -1,
    last: Path | None = None,
    **data_options,
):
    """Two epochs of 43 images, six steps each, of which the last has three images."""
    seed_everything(1, verbose=False)
    options = {"shuffle_window": SHUFFLE_WINDOW, "drop_last": False, "seed": 3, "image_size": 16} | data_options
    data = ImageDataModule(GLOBAL_BATCH_SIZE, str(folder), augmentation=Augmentation(), **options)
    model = ImageClassifier(
        GLOBAL_BATCH_SIZE,
        data.num_classes,
        data.channels,
        data.training_images,
        norm=norm,
        width_multiplier=0.125,
        stem="small",
        learning_rate_per_32_images=0.004,
        drop_last=data.drop_last,
    ).double()  # now: Lightning would only after it has restored a checkpoint, in single precision
    record = Record()
    saving = ModelCheckpoint(folder / f"by-{num_ranks}", "{step}", every_n_train_steps=2, save_top_k=-1)
    if last:
        saving = ModelCheckpoint(last.parent, last.stem, save_on_train_epoch_end=True)
    trainer = Trainer(
        accelerator="cpu",
        devices=num_ranks,
        strategy=SynchronisedDDPStrategy(timeout_seconds=30) if num_ranks > 1 else "auto",
        plugins=[TorchElasticEnvironment()] if num_ranks > 1 else None,
        precision="64-true",
        max_epochs=2,
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[record, LeftOutImages(), *([] if checkpoint else [saving])],
        enable_checkpointing=not checkpoint,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data, ckpt_path=checkpoint or None, weights_only=True)
    record.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return record


def train_on_rank(rank: int, folder: Path, num_ranks: int, options: dict[str, Any]) -> tuple:
    """In a process of `run_ranks`, whose world Lightning takes as it is."""
    warnings.simplefilter("error")
    for line in (*IGNORED, NO_SAVING_WHEN_RESUMED, LOST_SHARD):
        warnings.filterwarnings("ignore", line.split(":")[1])
    os.environ |= {"LOCAL_RANK": str(rank), "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(num_ranks)}
    record = train(folder, num_ranks, **options)
    return record.batches, record.sizes, record.losses, record.parameters, record.metrics


def train_on(num_ranks: int, folder: Path, **options: Any) -> Record:
    """Train on several ranks; the record of rank 0."""
    return Record(*run_ranks(train_on_rank, num_ranks, folder, num_ranks, options, timeout=90, group_timeout=60)[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def alone(folder):
    return train(folder, 1)


@pytest.fixture(scope="module")
def on_two(folder):
    return train_on(2, folder)


def check_same(found: Record, expected: Record, first: int = 0) -> None:
    """The same samples, pixels, losses and weights from a step on."""
    assert sorted(found.batches) == list(range(first, 12))
    assert found.batches == {step: digest for step, digest in expected.batches.items() if step >= first}
    losses = [expected.losses[step] for step in sorted(found.losses)]
    assert [found.losses[step] for step in sorted(found.losses)] == pytest.approx(losses, rel=TOLERANCE)
    assert found.parameters == pytest.approx(expected.parameters, rel=TOLERANCE)


def test_uneven_shares_train_as_one_process_does(alone, on_two):
    assert alone.sizes[5] == [3] and on_two.sizes[5] == [2, 1] and on_two.sizes[4] == [4, 4]
    check_same(on_two, alone)


@pytest.mark.parametrize("step", [4, 8])
def test_a_run_of_two_ranks_goes_on_alone(folder, alone, on_two, step):
    check_same(train(folder, 1, checkpoint=str(folder / "by-2" / f"step={step}.ckpt")), alone, first=step)


@pytest.mark.parametrize("max_steps", [4, 6, 8])
@pytest.mark.parametrize("raised", [-1, 12])
def test_a_run_that_max_steps_stopped_goes_on_where_it_was(folder, alone, tmp_path, max_steps, raised):
    last = tmp_path / "last.ckpt"
    train(folder, 1, max_steps=max_steps, last=last)
    check_same(train(folder, 1, checkpoint=str(last), max_steps=raised), alone, first=max_steps)


def test_a_run_of_two_ranks_goes_on_on_four_of_which_one_is_empty(folder, alone, on_two):
    on_four = train_on(4, folder, checkpoint=str(folder / "by-2" / "step=8.ckpt"))
    assert on_four.sizes[11] == [1, 1, 1, 0]
    check_same(on_four, alone, first=8)


def test_parts_of_an_incomplete_batch_weigh_by_sample_too(tmp_path):
    """Without BatchNorm, which would see other batches: 3 images in passes of 1, 1, 1 and 0 are a batch of 3."""
    whole, in_parts = (
        train(make_shards(tmp_path / str(parts)), 1, norm="none", accumulate=parts).parameters for parts in (1, 4)
    )
    assert in_parts == pytest.approx(whole, rel=TOLERANCE)


def test_images_left_out_are_counted_and_weigh_the_same_on_any_number_of_ranks(tmp_path, capsys):
    folder = make_shards(tmp_path / "shards")
    (folder / "train-000001.tar").unlink()
    record = train(folder, 1, on_read_error="skip")
    for epoch in range(2):
        assert sum(sum(record.sizes[step]) for step in range(6 * epoch, 6 * epoch + 6)) == 43 - 8
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(lines) == 2
    for epoch, line in enumerate(lines):
        assert line.startswith(f"8 training images left out of epoch {epoch}; the first: cannot read the image ")
        assert "train-000001.tar" in line
    on_two = train_on(2, folder, on_read_error="skip")
    assert any(first != second for first, second in on_two.sizes.values())
    check_same(on_two, record)
    for found in (record, on_two):
        assert found.metrics["train_left_out"] == 8 and "val_left_out" not in found.metrics


@pytest.mark.parametrize("options", [{"shuffle_window": 3}, {"seed": 4}, {"drop_last": True}, {"accumulate": 2}])
def test_an_epoch_divided_otherwise_is_not_gone_on_with(folder, alone, options):
    name, value = next(iter(options.items()))
    name = "accumulate_grad_batches" if name == "accumulate" else name
    with pytest.raises(ValueError, match=rf"^{name}={value}, but the checkpoint lies in the middle of an epoch with"):
        train(folder, 1, checkpoint=str(folder / "by-1" / "step=4.ckpt"), **options)


def test_after_the_end_of_an_epoch_another_division_is_fine(folder, alone):
    record = train(folder, 1, checkpoint=str(folder / "by-1" / "step=6.ckpt"), shuffle_window=3)
    assert sorted(record.batches) == list(range(6, 12))
