"""A run that is stopped or killed anywhere goes on as if nothing had been: bitwise the same weights and logs."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from run_results import same
from syncbn.data import Augmentation, ImageDataModule
from syncbn.training import ImageClassifier, PolyakAveraging
from syncbn.training.checkpoints import callback as checkpointing
from syncbn.training.checkpoints.callback import Checkpointing
from syncbn.training.checkpoints.files import AtomicCheckpointIO, by_step, newest_whole
from syncbn.training.launch.stopping import INTERRUPTED, STOPPED
from syncbn.training.optimization.dropout import RandomByStep
from syncbn.training.run.logs import read_log, run_loggers

NOT_EMPTY = "ignore:Checkpoint directory .* exists and is not empty:UserWarning"
pytestmark = pytest.mark.filterwarnings(NOT_EMPTY)
EPOCHS, STEPS = 3, 6  # of an epoch
WHEN = ["on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end", "on_validation_batch_start"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing is caught, nothing is written any more."""


class Strike(Callback):
    """Kills or signals the run at a place."""

    def __init__(self, hook: str, step: int, blow: Any) -> None:
        self.step, self.blow = step, blow
        setattr(self, hook, self.strike)

    def strike(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step >= self.step and self.blow:
            blow, self.blow = self.blow, None
            blow()


def kill() -> None:
    raise Killed


class Watch(Callback):
    """The weights, the average and the optimiser's state at the end of training."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        average = next(c for c in trainer.callbacks if isinstance(c, PolyakAveraging))._average_model
        assert average is not None
        self.state = [value.clone() for value in (*pl_module.state_dict().values(), *average.state_dict().values())]
        momenta = trainer.optimizers[0].state_dict()["state"].values()
        self.state += [momentum["momentum_buffer"].clone() for momentum in momenta]


def train(folder: Path, *strikes: Callback, resume: bool = False, accumulate: int = 1, **options: Any) -> list[Any]:
    """Three epochs of six steps with dropout, augmentation and averaged weights; what is left at the end."""
    seed_everything(0, verbose=False)
    data = ImageDataModule(8, image_size=8, validation_images=9950, augmentation=Augmentation())
    model = ImageClassifier(
        8, 10, 1, 50, width_multiplier=0.125, stem="small", learning_rate_per_32_images=0.01, dropout=0.5
    )
    run = folder / "name" / "version_0"
    found = newest_whole(run / "checkpoints", print) if resume else None
    watch = Watch()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=EPOCHS,
        limit_val_batches=2,
        accumulate_grad_batches=accumulate,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=run_loggers(run, int(found.stem.partition("=")[2]) if found else None),
        plugins=[AtomicCheckpointIO()],
        callbacks=[
            watch,  # before the average becomes the weights
            PolyakAveraging(0.9),
            *strikes,
            Checkpointing(**{"every_n_steps": 4} | options),
            RandomByStep(seed=0),
            ModelCheckpoint(monitor="val_top1", mode="max", filename="best-{epoch}", enable_version_counter=False),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data, ckpt_path=str(found) if found else None, weights_only=True)
    best = trainer.checkpoint_callback
    assert isinstance(best, ModelCheckpoint)
    return [*watch.state, best.best_model_score, Path(best.best_model_path).name]


def rows(folder: Path) -> list[dict[str, str]]:
    """The log, without the empty fields."""
    log = read_log(folder / "name" / "version_0" / "metrics.csv")[1]
    return [{name: value for name, value in row.items() if value} for row in log]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nothing disturbed, by their number of passes of a step."""
    folders = {accumulate: tmp_path_factory.mktemp("whole") for accumulate in (1, 2)}
    return {n: (train(folder, accumulate=n), rows(folder)) for n, folder in folders.items()}


def test_randomness_is_by_step(whole, tmp_path):
    """Without it the state of the generator would be what a restart loses."""
    expected, log = whole[1]
    assert same(train(tmp_path, every_n_steps=None, every_minutes=None), expected)
    assert rows(tmp_path) == log
    assert len({row["train_loss"] for row in log if "train_loss" in row}) == EPOCHS * STEPS


@pytest.mark.parametrize(
    ("hook", "step", "accumulate"),
    [(WHEN[0], 10, 1), (WHEN[1], 9, 2), (WHEN[2], 12, 1), (WHEN[3], 12, 1)],
)
def test_killed_anywhere_it_goes_on_bitwise(whole, tmp_path, hook, step, accumulate):
    expected, log = whole[accumulate]
    with pytest.raises(Killed):
        train(tmp_path, Strike(hook, step, kill), accumulate=accumulate)
    assert same(train(tmp_path, resume=True, accumulate=accumulate), expected)
    assert rows(tmp_path) == log


@pytest.mark.parametrize(
    ("hook", "step", "saved", "number", "status", "cause"),
    [
        (WHEN[1], 7, 8, signal.SIGTERM, STOPPED, "a signal after 8 steps; a restart goes"),
        (WHEN[3], 6, 6, signal.SIGINT, INTERRUPTED, "Ctrl-C after 6 steps; --resume "),
    ],
)
def test_told_to_stop_it_writes_a_checkpoint_and_goes_on_bitwise(
    whole, tmp_path, hook, step, saved, number, status, cause, capfd, monkeypatch
):
    monkeypatch.setattr(checkpointing, "AGREEMENT_SECONDS", 0)  # else it might train on for a second
    expected, log = whole[1]
    options = {"every_n_steps": None, "every_minutes": None}
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, Strike(hook, step, lambda: os.kill(os.getpid(), number)), **options)
    signal.signal(number, before)
    assert stopped.value.code == status
    errors = capfd.readouterr().err
    assert f"stopped by {cause}" in errors and errors.count("once more") == (number == signal.SIGINT)
    assert by_step(tmp_path / "name" / "version_0" / "checkpoints")[0].name == f"step={saved}.ckpt"
    assert same(train(tmp_path, resume=True, **options), expected)
    assert rows(tmp_path) == log


def test_the_last_ones_are_kept(whole, tmp_path):
    train(tmp_path, keep_last=2)
    checkpoints = tmp_path / "name" / "version_0" / "checkpoints"
    assert [path.name for path in by_step(checkpoints)] == ["step=16.ckpt", "step=12.ckpt"]
    assert not list(checkpoints.glob(".*"))


@pytest.mark.parametrize("option", [{"every_n_steps": 0}, {"every_minutes": 0}, {"keep_last": 0}])
def test_intervals_out_of_range(option):
    name, value = next(iter(option.items()))
    with pytest.raises(ValueError, match=f"checkpointing.{name}={value} must be"):
        Checkpointing(**option)


def test_the_log_has_each_step_once(whole):
    """The truth that the other tests compare with."""
    log = whole[1][1]
    steps = [int(row["step"]) for row in log if "train_loss" in row]
    assert steps == list(range(EPOCHS * STEPS))
    assert [int(row["step"]) for row in log if "val_top1" in row] == [5, 11, 17]
    assert [int(row["step"]) for row in log if "train_top1" in row] == [5, 11, 17]


def test_a_row_that_a_kill_has_cut_off_is_dropped(tmp_path):
    log = tmp_path / "metrics.csv"
    log.write_text("a,step\n0.5,1\n0.25,2\n0.1")
    assert read_log(log) == (["a", "step"], [{"a": "0.5", "step": "1"}, {"a": "0.25", "step": "2"}])
    log.write_text("a,b,step\n1,2,3\n4,5\n")
    assert read_log(log)[1] == [{"a": "1", "b": "2", "step": "3"}]
