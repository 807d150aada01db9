"""Where the time of a step goes: the parts add up, and the right one grows."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from ranks import run_ranks
from syncbn import SyncBatchNorm
from syncbn.collectives.reduction import observe_waits
from syncbn.data import ImageDataModule
from syncbn.training import ImageClassifier, RunSummary, Throughput
from syncbn.training.monitoring.step_clock import PARTS, DeviceMarks, HostMarks, StepClock, StepTime
from syncbn.training.monitoring.throughput import WARM_UP_STEPS, Totals, WaitTimer
from syncbn.training.run.summary import over_ranks, speed_of_run

SLOW = {"data_wait": 0.05, "forward": 0.08, "backward": 0.11, "optimizer": 0.14}
"""Seconds that the test adds to each part of a pass, and to the optimiser of a step."""


class ScriptedMarks:
    """Points in time out of a list; those up to `reached` can be read."""

    def __init__(self, *times: float) -> None:
        self.times = iter(times)
        self.reached = float("inf")
        self.recycled: list[float] = []

    def take(self) -> float:
        return next(self.times)

    def passed(self, mark: float) -> bool:
        return mark <= self.reached

    def seconds(self, earlier: float, later: float) -> float:
        return later - earlier

    def recycle(self, mark: float) -> None:
        self.recycled.append(mark)


def one_step(clock: StepClock, waits: WaitTimer) -> None:
    clock.switch("data_wait")
    clock.switch("other")
    clock.switch("forward")
    waits.begin()
    waits.end()
    clock.switch("backward")
    clock.switch("optimizer")
    clock.end_step(32)


def test_every_moment_belongs_to_one_part():
    clock = StepClock(ScriptedMarks(0, 1, 3, 4, 6, 9, 13, 18, 24))
    clock.resume()
    one_step(clock, WaitTimer(clock))
    [step] = clock.finished()
    expected = {"other": 1 + 1, "data_wait": 2, "forward": 2 + 4, "collective_wait": 3, "backward": 5, "optimizer": 6}
    assert step == (expected, 32) and step.duration == 24


def test_what_happens_in_a_pause_belongs_to_no_step():
    clock = StepClock(ScriptedMarks(0, 10, 100, 110, 130))
    clock.resume()
    clock.pause()
    WaitTimer(clock).begin()  # of layers outside of training
    WaitTimer(clock).end()
    clock.switch("forward")
    clock.resume()
    clock.switch("forward")
    clock.end_step(1)
    [step] = clock.finished()
    assert step.seconds["other"] == 20 and step.seconds["forward"] == 20 and step.duration == 40


def test_steps_are_read_only_once_the_device_has_passed_them():
    marks = ScriptedMarks(*range(100))
    clock = StepClock(marks)
    clock.resume()
    for _ in range(2):
        one_step(clock, WaitTimer(clock))
    marks.reached = 7
    assert clock.finished() == []
    marks.reached = 8
    assert len(clock.finished()) == 1 and len(marks.recycled) == 8
    marks.reached = 16
    assert len(clock.finished()) == 1 and clock.finished() == []
    assert len(set(marks.recycled)) == len(marks.recycled)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_marks_of_a_gpu_measure_its_own_time():
    clock = StepClock(DeviceMarks())
    clock.resume()
    clock.switch("forward")
    torch.cuda._sleep(200_000_000)  # cycles
    started = time.perf_counter()
    clock.end_step(1)
    assert clock.finished() == [] and time.perf_counter() - started < 0.02
    [step] = clock.finished(wait=True)
    assert step.seconds["forward"] > 0.05


class Slow(Callback):
    """Makes the forward, the backward and the optimiser slow, and takes the time at the end of each pass."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        module.network.register_forward_pre_hook(lambda *_: time.sleep(SLOW["forward"]))
        trainer.optimizers[0].register_step_post_hook(lambda *_: time.sleep(SLOW["optimizer"]))

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: torch.Tensor) -> None:
        loss.register_hook(lambda _: time.sleep(SLOW["backward"]))

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())


def make() -> tuple[ImageClassifier, ImageDataModule]:
    """A narrow network, and 24 training images in 3 steps an epoch."""
    seed_everything(0)
    data = ImageDataModule(8, image_size=8, validation_images=9976, seed=0)
    return ImageClassifier(8, 10, 1, data.training_images, width_multiplier=0.125, stem="small"), data


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        logger=CSVLogger(folder, "", ""),
        num_sanity_val_steps=0,
        limit_val_batches=2,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_the_right_part_grows_and_the_parts_add_up_to_the_step(tmp_path):
    model, data = make()
    read = data.sets.train.image

    def slow_image(index: int) -> np.ndarray:
        time.sleep(SLOW["data_wait"] / 4)  # 4 images in a pass
        return read(index)

    data.sets.train.image = slow_image
    throughput, slow = Throughput(), Slow()
    run = trainer(tmp_path, throughput, slow, RunSummary(), max_epochs=2, accumulate_grad_batches=2)
    run.fit(model, data)
    totals, steps = throughput.totals, 2 * 3
    assert totals.steps == steps == run.global_step
    counted = steps - WARM_UP_STEPS
    assert len(totals.durations) == counted and totals.images == 8 * counted
    for part, seconds in SLOW.items():
        passes = 1 if part == "optimizer" else 2
        assert totals.seconds[part] >= 0.95 * seconds * passes * counted, part
    assert sum(totals.seconds.values()) == pytest.approx(sum(totals.durations))
    # The last step, by another clock: from the end of the pass before it to its own.
    assert totals.durations[-1] == pytest.approx(slow.ends[-1] - slow.ends[-3], rel=0.25)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["exit"] == "trained" and summary["steps"] == steps
    assert summary["step_seconds"]["median"] == pytest.approx(totals.durations[0], rel=1e-3)
    assert type(run.profiler).__name__ == "PassThroughProfiler"


class Broken(Callback):
    def on_before_backward(self, *_: Any) -> None:
        raise RuntimeError("the power\nwent away")


def test_the_summary_of_a_run_that_fails_names_the_cause(tmp_path):
    model, data = make()
    with pytest.raises(RuntimeError):
        trainer(tmp_path, Throughput(), RunSummary(), Broken(), max_epochs=1).fit(model, data)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["exit"] == "RuntimeError: the power went away" and summary["steps"] == 0


def waits_of_rank(rank: int) -> float:
    """Seconds that a rank waits for its layers' messages when rank 1 comes late to both directions."""
    layer, clock = SyncBatchNorm(4), StepClock(HostMarks())
    observe_waits(WaitTimer(clock))
    seconds = 0.0
    for late in (0, 0, 0, 0, 0, 0.3 * rank):  # the first messages meet in the store before they are sent
        x = torch.randn(2, 4, 3, 3, requires_grad=True)
        clock.resume()
        clock.switch("forward")
        time.sleep(late)
        y = layer(x)
        clock.switch("backward")
        time.sleep(late)
        y.square().sum().backward()
        clock.end_step(2)
        clock.pause()
        seconds = clock.finished()[0].seconds["collective_wait"]
    observe_waits(None)
    return seconds


def test_a_late_rank_shows_as_the_others_wait_for_messages():
    early, late = run_ranks(waits_of_rank, 2)
    assert early >= 0.5 and late < early - 0.3


def test_totals_forget_the_first_steps_once_there_are_more():
    totals = Totals()
    for _number in range(WARM_UP_STEPS):
        totals.add(StepTime(dict.fromkeys(PARTS, 100.0), 8))
    assert totals.images == 8 * WARM_UP_STEPS
    totals.add(StepTime(dict.fromkeys(PARTS, 0.5), 16))
    assert totals.images == 16 and list(totals.durations) == [0.5 * len(PARTS)]


def test_the_speed_of_a_run():
    totals, rng = Totals(), np.random.default_rng(0)
    durations = rng.uniform(0.1, 0.2, 40)
    for seconds in durations:
        totals.add(StepTime(dict.fromkeys(PARTS, 0.0) | {"forward": seconds}, 64))
    counted = durations[WARM_UP_STEPS:]
    ranks = [{"seconds": dict.fromkeys(PARTS, 0.5), "memory": 2**30 * (1 + rank)} for rank in range(2)]
    speed = speed_of_run(totals, ranks)
    assert speed["images_per_second"] == pytest.approx(64 / counted.mean(), rel=1e-3)
    assert speed["images_per_second_per_device"] == pytest.approx(32 / counted.mean(), rel=1e-3)
    assert speed["step_seconds"]["median"] == pytest.approx(np.median(counted), abs=1e-5)
    assert speed["step_seconds"]["p90"] == pytest.approx(np.percentile(counted, 90, method="inverted_cdf"), abs=1e-5)
    assert speed["memory_gib"] == {"mean": 1.5, "max": 2.0, "max_rank": 1}
    assert speed_of_run(Totals(), ranks) == {}
    assert over_ranks([3.0, 1.0]) == {"mean": 2.0, "max": 3.0, "max_rank": 0}
