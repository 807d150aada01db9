"""Checkpoints from which training goes on exactly: when they are written, and how signals stop a training."""

import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from syncbn.collectives.world import sum_over_world
from syncbn.data.datasets.base import ReadError
from syncbn.files import PARTIAL, publish, remove
from syncbn.run_folders import CHECKPOINTS, LAST
from syncbn.training.checkpoints.files import by_step
from syncbn.training.launch.stopping import StopSignals, exit_status, requeue_job, requeue_signal
from syncbn.training.run.folder import run_folder

AGREEMENT_SECONDS = 1.0
"""About so often the ranks ask each other whether one of them was told to stop."""


class Agreement(NamedTuple):
    """What all ranks know after they asked each other.

    Attributes:
        told: A rank was told to stop.
        interrupted: By Ctrl-C.
        requeue: The job is to be requeued.
        due: It is time for a checkpoint.
    """

    told: bool
    interrupted: bool
    requeue: bool
    due: bool


class Checkpointing(Callback):
    """Writes ``checkpoints/step=N.ckpt`` into the run folder, and stops the training when a signal asks for it.

    A checkpoint is written between two steps, when everything of the step before is over, its validation and its lines
    in the logs included: at the start of every epoch but the first, at the intervals below, and before stopping. What
    goes on from it repeats nothing and leaves nothing out.

    On SIGTERM or SIGUSR1, to whichever rank, all ranks finish the step under way (or the validation), write a
    checkpoint and exit with status 75. In a job of SLURM started by srun, SIGUSR1 also requeues the job. On Ctrl-C
    (SIGINT) they do the same, with status 130; a second one ends the run at once.

    Args:
        every_n_steps: Optimiser steps from one checkpoint to the next. Null for none of that kind.
        every_minutes: Minutes from one checkpoint to the next. Null for none of that kind.
        keep_last: Checkpoints to keep, the newest ones.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self, every_n_steps: int | None = None, every_minutes: float | None = 10.0, keep_last: int = 3
    ) -> None:
        for name, value in {"every_n_steps": every_n_steps, "keep_last": keep_last}.items():
            if value is not None and value < 1:
                raise ValueError(f"checkpointing.{name}={value} must be at least 1")
        if every_minutes is not None and every_minutes <= 0:
            raise ValueError(f"checkpointing.every_minutes={every_minutes} must be positive")
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self.keep_last = keep_last
        self._signals = StopSignals()
        self._folder: Path | None = None
        self._saved_step, self._saved_at = 0, 0.0
        self._agreed_step, self._agreed_at, self._next_agreement = 0, 0.0, 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note signals from now on; learn the folder from rank 0."""
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._signals.install(trainer)
        folder = run_folder(trainer) or Path(trainer.default_root_dir)
        self._folder = Path(trainer.strategy.broadcast(str(folder))) / CHECKPOINTS

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count; replace Lightning's handlers of signals, which would act in the middle of a step."""
        if self._folder is None:
            return
        self._signals.install(trainer)
        self._saved_step = self._agreed_step = self._next_agreement = trainer.global_step
        self._saved_at = self._agreed_at = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Between two steps: write a checkpoint if one is due, stop if a rank was told to.

        Raises:
            SystemExit: It stops.
            ValueError: It stops, and the checkpoint could not be written.
        """
        if self._folder is None or batch_idx % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        nothing = Agreement(False, False, False, False)
        told, interrupted, requeue, due = self._agree(trainer) if step >= self._next_agreement else nothing
        due |= batch_idx == 0 or (self.every_n_steps is not None and step % self.every_n_steps == 0)
        if (told or due) and step > self._saved_step:
            self._save(trainer, self._folder)
        if told:
            self._stop(trainer, self._folder.parent, requeue, interrupted)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Where an image cannot be read, keep the steps before it; of several ranks the others are in the next one."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        at_next_batch = trainer.training and progress.current.ready == progress.current.completed
        if not isinstance(exception, ReadError) or trainer.world_size > 1 or not at_next_batch:
            return
        is_between_steps = progress.current.ready % trainer.accumulate_grad_batches == 0
        if self._folder is not None and is_between_steps and trainer.global_step > self._saved_step:
            progress.increment_ready()  # as after the batch is taken, which failed
            self._save(trainer, self._folder)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What comes after the training is stopped by a signal at once."""
        self._signals.remove()

    def how_to_go_on(self) -> str:
        """What goes on from the newest checkpoint, in words; "" where there is none."""
        files = by_step(self._folder) if self._folder else []
        return f"--resume {files[0].parent.parent} goes on from {files[0].name}" if files else ""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let the keepers of the best checkpoints find them where the run folder is now."""
        if trainer.state.fn == TrainerFn.FITTING and self._folder is not None:
            states = checkpoint.get("callbacks", {})
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, OwnCheckpoint):
                    callback.take_older_state(states)
                state = states.get(callback.state_key)
                if isinstance(callback, ModelCheckpoint) and state:
                    move_paths(state, str(callback.dirpath))

    def _agree(self, trainer: Trainer) -> "Agreement":
        """Learn what other ranks were told.

        One small message; the next one is about `AGREEMENT_SECONDS` later, counted in steps, since ranks agree on
        those. Of the times only rank 0's count.
        """
        step, now = trainer.global_step, time.monotonic()
        steps = step - self._agreed_step
        received = self._signals.received
        since, seconds = (now - self._saved_at, now - self._agreed_at) if trainer.is_global_zero else (0.0, 0.0)
        requeue = received is not None and received == requeue_signal(trainer)
        flags = [received is not None, received == signal.SIGINT, requeue]
        values = torch.tensor([*flags, since, seconds], dtype=torch.float32)
        told, interrupted, requeued, since, seconds = sum_over_world(values.to(trainer.strategy.root_device)).tolist()
        pace = seconds / steps if steps else AGREEMENT_SECONDS
        self._agreed_step, self._agreed_at = step, now
        self._next_agreement = step + max(1, min(1000, int(AGREEMENT_SECONDS / max(pace, 1e-6))))
        due = self.every_minutes is not None and since >= 60 * self.every_minutes
        return Agreement(told > 0, interrupted > 0, requeued > 0, due)

    def _save(self, trainer: Trainer, folder: Path) -> None:
        path = folder / f"step={trainer.global_step}.ckpt"
        partial = path.with_name(f".{path.name}{PARTIAL}")
        with between_steps(trainer):
            trainer.save_checkpoint(partial)
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        if trainer.is_global_zero and partial.exists():  # it does not where the disk is full
            publish(partial, path)
            for old in by_step(folder)[self.keep_last :]:
                remove(old)

    def _stop(self, trainer: Trainer, run: Path, requeue: bool, interrupted: bool) -> None:
        failure = getattr(trainer.strategy.checkpoint_io, "failure", "")
        if trainer.is_global_zero:
            if not failure:
                cause, how = ("Ctrl-C", f"--resume {run}") if interrupted else ("a signal", "a restart")
                line = f"syncbn: stopped by {cause} after {trainer.global_step} steps"
                goes_on = f"; {how} goes on there" if self._saved_step or not interrupted else ""
                print(line + goes_on, file=sys.stderr, flush=True)
            if requeue:
                requeue_job()
        failure = trainer.strategy.broadcast(failure)  # before any rank ends, which may make the launcher kill rank 0
        if failure:
            raise ValueError(f"told to stop, but {failure}")
        raise SystemExit(exit_status(trainer, interrupted))


class OwnCheckpoint(ModelCheckpoint):
    """One of the run's own, whose state in a checkpoint has another name than that of a user's `ModelCheckpoint`."""

    def take_older_state(self, states: dict[str, Any]) -> None:
        """Find the state where runs have it that were begun when it had the name of Lightning's class.

        Args:
            states: Of all callbacks, in a checkpoint; changed in place.
        """
        older = self.state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)
        if older in states and self.state_key not in states:
            states[self.state_key] = states.pop(older)


class BestCheckpoint(OwnCheckpoint):
    """Keeps the best: the key ``checkpoint`` of a config."""


class LastCheckpoint(OwnCheckpoint):
    """Saves ``last.ckpt`` after every epoch.

    Lightning's option save_last does not: in a callback that keeps the best, it copies the best.
    """

    def __init__(self) -> None:
        super().__init__(filename="last", enable_version_counter=False)


def is_named_as_own(name: str) -> bool:
    """Whether a file is called as what `Checkpointing` and `LastCheckpoint` write."""
    return name == LAST or re.fullmatch(r"step=\d+\.ckpt", name) is not None


@contextmanager
def between_steps(trainer: Trainer) -> Iterator[None]:
    """Make Lightning's counters those after a batch, and before it has taken the next one from the loader.

    Where it would take the place for one at which validation is due, as at the start of an epoch, it goes on by leaving
    that out, as it should, and counts a batch for its loggers, which it should not: that is allowed for.
    """
    loop = trainer.fit_loop.epoch_loop
    progress = loop.batch_progress
    is_last, progress.is_last_batch = progress.is_last_batch, False
    for counter in (progress.current, progress.total):
        counter.ready -= 1
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    counted_again = int(loop._should_check_val_fx(fetcher))
    loop._batches_that_stepped -= counted_again
    try:
        yield
    finally:
        loop._batches_that_stepped += counted_again
        progress.is_last_batch = is_last
        for counter in (progress.current, progress.total):
            counter.ready += 1


def move_paths(state: dict[str, Any], folder: str) -> None:
    """Make the state of a ModelCheckpoint one of the same files in another folder."""
    before = str(state.get("dirpath"))

    def moved(path: str) -> str:
        return str(Path(folder) / Path(path).name) if path and str(Path(path).parent) == before else path

    for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[name] = moved(state.get(name, ""))
    state["best_k_models"] = {moved(path): score for path, score in state.get("best_k_models", {}).items()}
    state["dirpath"] = folder
