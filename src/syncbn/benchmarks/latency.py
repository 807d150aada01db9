"""Two hosts, and a message between them that takes long: what fewer messages bring, and what waiting for them costs.

    syncbn benchmark --section latency        # needs Linux and root: two network namespaces

Part one, "step": a training step of a small Inception-BN, most of whose time messages take. Contenders:
- "syncbn": branches share their messages, and compute while these travel;
- "syncbn, waiting": the same, but each message is waited for as soon as it is sent;
- "per layer": syncbn's layers, one message each;
- "all gather, plain": one all-gather for each layer, as in nn.SyncBatchNorm; see `peers`.

Part two, "module": one Inception module whose independent branches take about as long as a message.

Of "syncbn" and "syncbn, waiting" it also says how long the host stood still in a message. One minus the ratio of the
two is the share of the messages' time that computation hides; neighbours on the machine change it less than the times.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor

from syncbn.benchmarks.harness import measure, report
from syncbn.benchmarks.harness.cable import delayed_cable
from syncbn.benchmarks.harness.measure import OURS, Measurement
from syncbn.benchmarks.harness.world import run_ranks
from syncbn.benchmarks.step import CONTENDERS, Setting, Trainer, verify
from syncbn.collectives.channel import Ticket
from syncbn.collectives.reduction import Reduction
from syncbn.functional import exchange
from syncbn.models.blocks import UnitSpec
from syncbn.models.network import InceptionModule
from syncbn.models.table import STEM_CONV2, TABLE
from syncbn.ops import Signature

KEEP_MEMORY = False
WAITING, WAITED = "syncbn, waiting", "ms waited"
MAKERS = {name: CONTENDERS[name] for name in (OURS, "per layer", "all gather, plain")}
RANKS = 2  # a cable has two ends


class TimedReduction(Reduction):
    """An all-reduce that notes how long the host stands still in it."""

    at_once = False
    seconds = 0.0  # of all together

    def __init__(self, message: Tensor, ticket: Ticket) -> None:
        super().__init__(message, ticket)
        if self.at_once:
            self._stand_still()

    def wait(self) -> tuple[Tensor, Signature | None]:
        """As that of any Reduction."""
        self._stand_still()
        return super().wait()

    def _stand_still(self) -> None:
        assert self.work is not None
        begin = time.perf_counter()
        self.work.wait()
        TimedReduction.seconds += time.perf_counter() - begin


class WaitingReduction(TimedReduction):
    """An all-reduce that nothing else runs beside."""

    at_once = True


class Watched:
    """A computation with messages in it; `waited` is how many milliseconds each call stood still in them."""

    def __init__(self, run: Callable[[], Any], reduction: type[TimedReduction]) -> None:
        self.run, self.reduction, self.waited = run, reduction, list[float]()

    def __call__(self) -> None:
        """Run once."""
        TimedReduction.seconds = 0.0
        with mock.patch.object(exchange, "Reduction", self.reduction):
            self.run()
        self.waited.append(TimedReduction.seconds * 1e3)


@dataclass(frozen=True)
class ModuleSetting:
    """An Inception module of the table at full width, on `batch` images of each rank."""

    name: str
    batch: int

    def __post_init__(self) -> None:
        names = [row.name for row in TABLE]
        if self.name not in names:
            raise ValueError(f"--latency.module {self.name}: it is one of {names}")

    def build(self, rank: int) -> tuple[InceptionModule, Tensor]:
        """The module, the same on every rank, and this rank's input (N, C, H, W)."""
        torch.manual_seed(0)
        channels, size = STEM_CONV2, 0
        for row in TABLE:
            module, size = InceptionModule(channels, row, UnitSpec()), row.size
            if row.name == self.name:
                break
            channels = module.out_channels
        generator = torch.Generator().manual_seed(rank)
        return module, torch.randn(self.batch, channels, size, size, generator=generator)

    def __str__(self) -> str:
        return f"module {self.name}, {self.batch} images"


def time_with_waits(
    section: str, shape: str, run: Callable[[], Any], others: Mapping[str, Callable[[], Any]], rounds: int, warmup: int
) -> list[Measurement]:
    """Time a computation of syncbn's, the same waiting for its messages, and others; note how long both waited."""
    watched = {OURS: Watched(run, TimedReduction), WAITING: Watched(run, WaitingReduction)}
    times = measure.time_in_turns({**watched, **others}, rounds, warmup, least_ms=0)
    waits = {name: contender.waited[-rounds:] for name, contender in watched.items()}
    waited = [replace(row, unit=WAITED) for row in measure.rows_of(section, shape, "contiguous", RANKS, waits)]
    return measure.rows_of(section, shape, "contiguous", RANKS, times) + waited


def measure_step(rank: int, setting: Setting, rounds: int, warmup: int) -> Iterator[list[Measurement]]:
    """Verify, then time a training step of each contender."""
    verify(setting, rank, RANKS, MAKERS)
    images, labels = (t.chunk(RANKS)[rank] for t in setting.whole_batch(RANKS))
    steps: dict[str, Callable[[], Any]] = {
        name: partial(Trainer(make(setting.network())).step, images, labels) for name, make in MAKERS.items()
    }
    yield time_with_waits("step", str(setting), steps.pop(OURS), steps, rounds, warmup)


def measure_module(rank: int, setting: ModuleSetting, rounds: int, warmup: int) -> Iterator[list[Measurement]]:
    """Time a module's forward, then its backward, with and without waiting; the numbers of both are the same."""
    module, x = setting.build(rank)
    x.requires_grad_()
    y = module(x)
    dy, leaves = torch.ones_like(y).cumsum(1).sin(), (x, *module.parameters())
    backward = partial(torch.autograd.grad, y, leaves, dy, retain_graph=True)
    expected = (y, *backward())
    with mock.patch.object(exchange, "Reduction", WaitingReduction):
        found = (module(x), *backward())
    if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
        raise measure.WrongContender(f"{WAITING!r} and {OURS!r} differ in a module")
    for section, run in (("module, forward", partial(module, x)), ("module, backward", backward)):
        yield time_with_waits(section, str(setting), run, {}, rounds, warmup)


def measure_on_rank(
    rank: int, step: Setting, module: ModuleSetting, rounds: int, warmup: int
) -> Iterator[list[Measurement]]:
    """What each process runs."""
    yield from measure_step(rank, step, rounds, warmup)
    yield from measure_module(rank, module, rounds, warmup)


def show_hidden(rows: list[Measurement], console: Console) -> None:
    """Print how much of the messages' time was hidden."""
    for row in rows:
        if row.unit == WAITED and row.contender == WAITING:
            console.print(
                f"{row.section}, {row.shape}: stood still in messages for {row.median:.0f} ms waiting at once, for "
                f"{1 - row.ratio:.0%} less computing in the meantime"
            )


def run(
    delay_ms: float = 5.0,
    pixels: int = 32,
    batch: int = 2,
    width: float = 0.125,
    module: str = "3b",
    module_batch: int = 8,
    rounds: int = 9,
    warmup: int = 1,
    quick: bool = False,
    output: Path = measure.RESULTS,
) -> None:
    """Time a training step on two hosts with a delay between them: grouped messages, one a layer, all-gathers.

    Args:
        delay_ms: of the network, one way.
        pixels: size of the images of the step.
        batch: images of each rank in the step.
        width: multiplier of all channel counts in the step.
        module: the Inception module that is timed by itself, by its name in Figure 5.
        module_batch: its images on each rank.
        rounds: timings of each contender that count.
        warmup: rounds before these.
        quick: a smoke run.
        output: folder for the CSV and the figure.

    Raises:
        ValueError: this machine or user cannot make two network namespaces, or there is no such module.
    """
    console = report.console()
    if quick:
        delay_ms, batch, module_batch, rounds, warmup = 1.0, 2, 1, 1, 0
    settings = Setting(pixels, batch, width), ModuleSetting(module, module_batch)
    rows: list[Measurement] = []
    with delayed_cable(delay_ms) as hosts, report.progress(console) as bar:
        task = bar.add_task(f"two hosts, {delay_ms:g} ms each way", total=3)
        for more in run_ranks(measure_on_rank, RANKS, *settings, rounds, warmup, hosts=hosts):
            rows += more
            bar.update(task, advance=1)
    title = f"Inception-BN on two hosts, {delay_ms:g} ms each way, one thread each, float32"
    report.publish_results(rows, output, "latency", report.titled(title, quick), 1, console)
    show_hidden(rows, console)
