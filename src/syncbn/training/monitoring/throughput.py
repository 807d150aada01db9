"""Images a second, where the time of a step goes, and memory: logged while training, and kept for its summary."""

import resource
import sys
from array import array
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.profilers.profiler import Profiler

from syncbn.collectives.reduction import observe_waits
from syncbn.data.loading.samplers import images_of_global_batch
from syncbn.training.monitoring.step_clock import PARTS, DeviceMarks, HostMarks, StepClock, StepTime

WARM_UP_STEPS = 5
"""Left out of a run's totals where it has more: memory is allocated, kernels are chosen, layers are compared."""

FETCH = ".train_dataloader_next"
"""End of what Lightning calls the profiled action of fetching a batch."""


class Throughput(Callback):
    """Logs ``images_per_second``, ``step_seconds``, the parts of it and ``memory_gib`` every log_every_n_steps.

    The values are means over the steps since they were last logged. With a profiler of the user's own, the wait for
    data is part of ``other``. Lightning's ThroughputMonitor waits for the GPU in every step and does not
    divide it; its DeviceStatsMonitor logs all counters of the allocator, and needs psutil on a CPU.
    """

    def __init__(self) -> None:
        self.totals = Totals()
        self._clock = StepClock(HostMarks())
        self._since_logged: list[StepTime] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose a clock, and have the loader's and the layers' waits reported."""
        on_gpu = trainer.strategy.root_device.type == "cuda"
        self._clock, self.totals = StepClock(DeviceMarks() if on_gpu else HostMarks()), Totals()
        if type(trainer.profiler) is PassThroughProfiler:  # type: ignore[attr-defined]
            trainer.profiler = FetchTimer(self._clock)  # type: ignore[attr-defined]
        observe_waits(WaitTimer(self._clock))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Steps begin, in the middle of an epoch where the run is gone on with: no epoch starts then."""
        self._clock.resume()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Steps begin."""
        self._clock.resume()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The forward begins."""
        self._clock.switch("forward")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        """The forward ends."""
        self._clock.switch("backward")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The backward ends."""
        self._clock.switch("optimizer")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step ends, where the optimiser stepped; log the steps since the last time."""
        clock, accumulated = self._clock, trainer.accumulate_grad_batches
        if (batch_idx + 1) % accumulated and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            clock.switch("other")
            return
        options = pl_module.hparams
        number, size = batch_idx // accumulated, options["global_batch_size"]
        clock.end_step(images_of_global_batch(number, options["training_images"], size))
        if trainer._logger_connector.should_update_logs:  # as Lightning's own callbacks ask
            self._since_logged += self._read()
            if self._since_logged and trainer.is_global_zero:
                self._log(pl_module, trainer.world_size)
            self._since_logged = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation is no part of a step."""
        self._clock.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to training."""
        self._clock.resume()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nor is the end of an epoch, where checkpoints are written."""
        self._clock.pause()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read what is left."""
        self._read(wait=True)
        self._detach(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop looking at the layers."""
        self._detach(trainer)

    def _read(self, wait: bool = False) -> list[StepTime]:
        steps = self._clock.finished(wait)
        for step in steps:
            self.totals.add(step)
        return steps

    def _log(self, module: LightningModule, ranks: int) -> None:
        steps = self._since_logged
        duration, images = sum(step.duration for step in steps), sum(step.images for step in steps)
        values = {"images_per_second_per_device": images / duration / ranks, "step_seconds": duration / len(steps)}
        for part in PARTS:
            values[f"{part}_seconds"] = sum(step.seconds[part] for step in steps) / len(steps)
        values["memory_gib"] = peak_memory() / 2**30
        options: dict[str, Any] = {"rank_zero_only": True, "batch_size": 1}
        module.log("images_per_second", images / duration, prog_bar=True, **options)
        module.log_dict(values, **options)

    def _detach(self, trainer: Trainer) -> None:
        observe_waits(None)
        if isinstance(trainer.profiler, FetchTimer):  # type: ignore[attr-defined]
            trainer.profiler = PassThroughProfiler()  # type: ignore[attr-defined]


class Totals:
    """Sums over the steps of a run, and the duration of each."""

    def __init__(self) -> None:
        self.steps = 0
        self._restart()

    def _restart(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.images = 0
        self.durations = array("d")  # of each step, in seconds: 8 MB for a million

    def add(self, step: StepTime) -> None:
        """Count a step; the first few are forgotten once there are more."""
        if self.steps == WARM_UP_STEPS:
            self._restart()
        self.steps += 1
        self.images += step.images
        self.durations.append(step.duration)
        for part, seconds in step.seconds.items():
            self.seconds[part] += seconds


class FetchTimer(Profiler):
    """Takes note of the time that Lightning waits for the next batch; a profiler, since no callback is told."""

    def __init__(self, clock: StepClock) -> None:
        super().__init__()
        self.clock = clock

    def start(self, action_name: str) -> None:
        """Something begins."""
        if action_name.endswith(FETCH):
            self.clock.switch("data_wait")

    def stop(self, action_name: str) -> None:
        """Something ends."""
        if action_name.endswith(FETCH):
            self.clock.switch("other")


class WaitTimer:
    """Takes note of the time that synchronised layers wait for a message."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock
        self._interrupted: str | None = None

    def begin(self) -> None:
        """A layer begins to wait."""
        self._interrupted = self.clock.part
        self.clock.switch("collective_wait")

    def end(self) -> None:
        """It goes on."""
        if self._interrupted is not None:
            self.clock.switch(self._interrupted)


def peak_memory() -> int:
    """Most bytes in use so far: allocated on the GPU where one is used, else resident in this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
