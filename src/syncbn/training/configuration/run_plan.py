"""What a fit will do, known before it begins: its steps, whether it validates, which metrics there will be."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint, Timer

from syncbn.training.checkpoints.callback import OwnCheckpoint, is_named_as_own
from syncbn.training.configuration.lightning_support import are_of_lightning


@dataclass(frozen=True)
class RunPlan:
    """The passes (forward and backward) and steps (of the optimiser) of a fit.

    Args:
        steps_of_data: Global batches of a whole epoch.
        accumulate: Passes of a step.
        limit: Of the passes of an epoch, a number or a part; as the Trainer's limit_train_batches.
        max_epochs: -1 for no limit.
        max_steps: -1 for no limit.
        begun_at: Steps done before, by the run that is gone on with.
        validation_interval: Passes from one validation to the next, a number or a part of an epoch.
        every_n_epochs: Epochs from one with validations to the next; None counts the interval across epochs.
        has_validation: Whether there is anything to validate on.

    Raises:
        ValueError: An epoch would end within a global batch.
    """

    steps_of_data: int
    accumulate: int
    limit: int | float
    max_epochs: int
    max_steps: int
    begun_at: int = 0
    validation_interval: int | float = 1.0
    every_n_epochs: int | None = 1
    has_validation: bool = True

    @classmethod
    def of(cls, trainer: Trainer, steps_of_data: int, begun_at: int) -> "RunPlan":
        """That of a trainer."""
        max_epochs = trainer.max_epochs
        return cls(
            steps_of_data,
            trainer.accumulate_grad_batches,
            trainer.limit_train_batches,
            (1000 if trainer.max_steps == -1 else -1) if max_epochs is None else max_epochs,  # as Lightning does
            trainer.max_steps,
            begun_at,
            trainer.val_check_interval,
            trainer.check_val_every_n_epoch,
            trainer.limit_val_batches > 0,
        )

    def __post_init__(self) -> None:
        if self.passes % self.accumulate:
            raise ValueError(
                f"trainer.limit_train_batches={self.limit} (or overfit_batches) ends an epoch after {self.passes} of"
                f" {self.steps_of_data * self.accumulate} batches, within a global batch of"
                f" trainer.accumulate_grad_batches={self.accumulate}: make it a multiple of that"
            )

    @property
    def passes(self) -> int:
        """Of an epoch."""
        whole = self.steps_of_data * self.accumulate
        return min(self.limit, whole) if isinstance(self.limit, int) else int(whole * self.limit)

    @property
    def steps_of_epoch(self) -> int:
        """Of an epoch, which may be limited."""
        return self.passes // self.accumulate

    @property
    def last_step(self) -> float:
        """Steps done when the run ends by itself; infinity where it does not."""
        limits = [self.max_steps, self.max_epochs * self.steps_of_epoch if self.max_epochs >= 0 else -1]
        return min((limit for limit in limits if limit >= 0), default=math.inf)

    @property
    def validates(self) -> bool:
        """Whether a validation lies between the run's begin and its end."""
        interval, passes = self.validation_interval, self.passes
        if not self.has_validation or passes == 0:
            return False
        every = interval if isinstance(interval, int) else max(1, int(passes * interval))
        done, end = self.begun_at * self.accumulate, self.last_step * self.accumulate
        if self.every_n_epochs is None:
            return (done // every + 1) * every <= end
        epoch, within = divmod(done, passes)
        if (epoch + 1) % self.every_n_epochs or (within // every + 1) * every > passes:
            epoch, within = epoch + self.every_n_epochs - (epoch + 1) % self.every_n_epochs, 0
        return epoch * passes + (within // every + 1) * every <= end


def describe_plan(plan: RunPlan, trainer: Trainer) -> str:
    """Where an epoch is not all of the training images, which part of them it is, one line; "" where it is."""
    if plan.steps_of_epoch == plan.steps_of_data:
        return ""
    same = ", the same ones every time" if getattr(trainer, "overfit_batches", 0) else ""
    return f"an epoch is {plan.steps_of_epoch:,} of {plan.steps_of_data:,} global batches{same}"


def check_monitors(plan: RunPlan, trainer: Trainer, logged: Iterable[str]) -> list[str]:
    """What the callbacks that look at a metric will miss.

    Args:
        plan: Of the run.
        trainer: Whose callbacks these are.
        logged: The metrics of the network, which are those of a run without callbacks of the user's own.

    Returns:
        Remarks on what will be left out, each one line.

    Raises:
        ValueError: A callback would end the run, for want of its metric.
    """
    remarks = []
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if not isinstance(callback, (EarlyStopping, ModelCheckpoint)) or monitor is None:
            continue
        name = "checkpoint" if isinstance(callback, OwnCheckpoint) else type(callback).__name__
        what = f"{name}.monitor={monitor}"
        if monitor.startswith("val_") and not plan.validates:
            missing = f"{what}: this run has no validation ({why_no_validation(plan, trainer)})"
            if isinstance(callback, EarlyStopping) and callback.strict:
                raise ValueError(f"{missing}: leave the callback out, or give it strict: false")
            effect = "it does not stop early" if isinstance(callback, EarlyStopping) else "no checkpoint is kept by it"
            remarks.append(f"{missing}: {effect}")
        elif not is_logged(monitor, logged, callbacks):
            raise ValueError(f"{what} is logged by nobody: there are {', '.join(logged)}")
    return remarks


def is_logged(name: str, logged: Iterable[str], callbacks: list[Callback]) -> bool:
    """Whether a metric may be there to be looked at."""
    if not are_of_lightning(callbacks):
        return True
    rates = any(isinstance(callback, LearningRateMonitor) for callback in callbacks)
    return name in {*logged, "epoch", "step"} or name.endswith("_left_out") or (rates and name.startswith("lr-"))


def why_no_validation(plan: RunPlan, trainer: Trainer) -> str:
    """The settings by which there is none."""
    if not plan.has_validation:
        return f"trainer.limit_val_batches={trainer.limit_val_batches}"
    return (
        f"it ends after step {plan.last_step:g} of {plan.steps_of_epoch} an epoch, with trainer.val_check_interval="
        f"{plan.validation_interval} and check_val_every_n_epoch={plan.every_n_epochs}"
    )


def check_names_of_checkpoints(trainer: Trainer) -> None:
    """Refuse files of another ModelCheckpoint that would be taken for the run's own.

    Raises:
        ValueError: One of the user's is called as they are.
    """
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or isinstance(callback, OwnCheckpoint) or callback.dirpath:
            continue
        name = callback.format_checkpoint_name({"epoch": torch.tensor(1), "step": torch.tensor(1)})
        if is_named_as_own(name):
            raise ValueError(
                f"trainer.callbacks: ModelCheckpoint(filename={callback.filename!r}) writes {name}, as the run's own"
                " checkpoints are called: give it another filename, or a dirpath"
            )


def reason_of_early_end(plan: RunPlan, trainer: Trainer) -> str:
    """Why a fit ended before its last step, or took no step at all; "" where it ended as planned."""
    step = trainer.global_step
    if plan.passes == 0:
        return f"trainer.limit_train_batches={plan.limit} leaves nothing to train on"
    if step >= plan.last_step:
        return "there was nothing left to train" if step == plan.begun_at else ""
    reasons: list[Any] = [
        f"EarlyStopping: {callback.stopping_reason_message}"
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message
    ]
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    if any((timer.time_remaining() or 0.0) <= 0 for timer in timers if timer.time_remaining() is not None):
        reasons.append("its time is over (trainer.max_time)")
    return "; ".join(reasons) or "a callback asked for it"
