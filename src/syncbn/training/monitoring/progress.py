"""How far a run is: one bar in a terminal; in a log a line with the time at every so many steps."""

import math
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, Timer, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from syncbn.progress import SECONDS_BETWEEN_LINES, left, stamped

OF_STEPS = {
    "train_loss": ("loss {:.4g}", 1.0),
    "learning_rate": ("lr {:.3g}", 1.0),
    "images_per_second": ("{:,.0f} images/s", 1.0),
}
OF_VALIDATION = {
    "val_top1": ("val accuracy {:.2f} %", 100.0),
    "val_recall_at_1": ("val recall@1 {:.2f} %", 100.0),
    "val_loss": ("val loss {:.4g}", 1.0),
}
"""How metrics are written, and by what they are multiplied."""


def progress_callback() -> ProgressBar:
    """What tells of a run on this rank's standard output."""
    return RunBar() if sys.stdout.isatty() else RunLines()


def in_words(trainer: Trainer, formats: dict[str, tuple[str, float]]) -> list[str]:
    """Those metrics that there are."""
    metrics = trainer.callback_metrics
    return [text.format(factor * float(metrics[name])) for name, (text, factor) in formats.items() if name in metrics]


def epoch_in_words(trainer: Trainer) -> str:
    """The epoch, from 1."""
    epochs = trainer.max_epochs or -1
    return f"epoch {trainer.current_epoch + 1}" + (f"/{epochs}" if epochs > 0 else "")


def steps_of(trainer: Trainer) -> int | None:
    """Optimiser steps of the whole run; None where it has no end."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if math.isfinite(steps) else None


def ends_step(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the optimiser stepped after this batch."""
    is_last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    return is_last or (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class RunLines(ProgressBar):
    """Prints a line every ``trainer.log_every_n_steps``, at each validation, and at least every so many seconds."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._begun = self._said = time.monotonic()
        self._first_step = 0
        self._steps: int | None = None

    def disable(self) -> None:
        """Print nothing: on ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure the pace of the run, validations included."""
        self._begun, self._first_step, self._steps = time.monotonic(), trainer.global_step, steps_of(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell of the step, where the loggers are told of it."""
        is_due = trainer._logger_connector.should_update_logs or self._is_due()
        if self._enabled and is_due and ends_step(trainer, batch_idx):
            self._say_step(trainer, in_words(trainer, OF_STEPS))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Tell of the batch, if nothing was told for long."""
        self._say_batch("validation", batch[2], trainer.num_val_batches)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Tell of the batch, if nothing was told for long."""
        self._say_batch("test", batch[2], trainer.num_test_batches)

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Tell of the batch, if nothing was told for long."""
        self._say_batch("prediction", batch[2], trainer.num_predict_batches)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell of the accuracy."""
        if self._enabled and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._say_step(trainer, in_words(trainer, OF_VALIDATION))

    def _is_due(self) -> bool:
        return time.monotonic() - self._said >= SECONDS_BETWEEN_LINES

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        print(stamped(text), flush=True)

    def _say_batch(self, what: str, batch_idx: int, batches: Any) -> None:
        if self._enabled and self._is_due():
            self._say(f"{what} batch {batch_idx + 1:,}/{sum(batches):,}")

    def _say_step(self, trainer: Trainer, figures: list[str]) -> None:
        step, steps = trainer.global_step, self._steps
        words = [epoch_in_words(trainer), f"step {step:,}" + (f"/{steps:,}" if steps else ""), *figures]
        if (seconds := self._seconds_left(trainer)) is not None:
            words.append(left(seconds))
        self._say(", ".join(words))

    def _seconds_left(self, trainer: Trainer) -> float | None:
        timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
        limits = [seconds for timer in timers if (seconds := timer.time_remaining()) is not None]
        done = trainer.global_step - self._first_step
        if self._steps and done:
            limits.append((time.monotonic() - self._begun) / done * (self._steps - trainer.global_step))
        return min(limits, default=None)


class RunBar(TQDMProgressBar):
    """One bar for all steps of a fit, so that its time left is that of the run; Lightning's bars for the rest."""

    RUN_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining} left{postfix}]"

    def init_validation_tqdm(self) -> Tqdm:
        """None in a fit."""
        return Tqdm(disable=True) if self._is_fit else super().init_validation_tqdm()

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Draw the bar."""
        self.train_progress_bar = Tqdm(
            desc=epoch_in_words(trainer),
            initial=trainer.global_step,
            total=steps_of(trainer),
            disable=self.is_disabled,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,
            bar_format=self.RUN_FORMAT,
        )

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Name the epoch."""
        self.train_progress_bar.set_description_str(epoch_in_words(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance; look at the metrics, for which a GPU has to be waited for, where the loggers are told of them."""
        bar = self.train_progress_bar
        if not bar.disable and ends_step(trainer, batch_idx):
            if trainer._logger_connector.should_update_logs:
                self._show_metrics(trainer)
            bar.update(trainer.global_step - bar.n)

    def on_train_epoch_end(self, *_: Any) -> None:
        """Nothing: the bar is that of the run."""

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Say in the bar of a fit that it validates."""
        if self._is_fit:
            self.train_progress_bar.set_description_str(f"validation {batch[2] + 1}/{sum(trainer.num_val_batches)}")
        else:
            super().on_validation_batch_end(trainer, pl_module, *batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to the epoch, with the accuracy."""
        if not self._is_fit:
            super().on_validation_end(trainer, pl_module)
        elif not trainer.sanity_checking:
            self.reset_dataloader_idx_tracker()
            self.train_progress_bar.set_description_str(epoch_in_words(trainer), refresh=False)
            self._show_metrics(trainer)

    @property
    def _is_fit(self) -> bool:
        return self.trainer.state.fn == "fit"

    def _show_metrics(self, trainer: Trainer) -> None:
        accuracy = {name: OF_VALIDATION[name] for name in ("val_top1", "val_recall_at_1")}
        figures = [*in_words(trainer, OF_STEPS | accuracy)]
        # Within 80 columns: without the learning rate, and short.
        kept = [text for text in figures if not text.startswith("lr ")]
        self.train_progress_bar.set_postfix_str(", ".join(kept).replace("accuracy ", "").replace("images/s", "im/s"))
