"""How the benchmarks measure: verify, then time in turns (A B C A B C ...), then compare round by round.

What neighbours on the machine do hits all contenders of a round alike, so their ratio within a round is steadier than
their times. A ratio in the results is the median over rounds of: time of syncbn / time of this contender. Below 1
syncbn is faster.
"""

import datetime
import gc
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

OURS = "syncbn"
SMOKE_RUN = "smoke run (--quick), its times mean nothing"
RESULTS = Path("benchmarks/results")  # of the current folder
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MAX_REPEATS = 50
# Lets glibc keep freed memory. Otherwise it is given back to the system and taken again, page by page, or not, by the
# luck of the heap's layout.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


@dataclass(frozen=True)
class Measurement:
    """One line of the results.

    Attributes:
        section: which comparison.
        shape: what was run, in words.
        memory_format: "contiguous" or "channels_last".
        ranks: P.
        contender: who.
        median: over the rounds; on several ranks, of the slowest rank's time. In `unit`.
        p20: 20th percentile.
        p80: 80th percentile.
        ratio: median over the rounds of syncbn's time / this contender's in the same round.
        unit: "ms", or what was counted.
    """

    section: str
    shape: str
    memory_format: str
    ranks: int
    contender: str
    median: float
    p20: float
    p80: float
    ratio: float
    unit: str = "ms"


class WrongContender(AssertionError):
    """A contender computes something else: its time would mean nothing."""


@torch.no_grad()
def relative_error(found: Tensor, expected: Tensor, scale: float = 0.0) -> float:
    """The largest error over the largest expected magnitude, or over `scale` where that is more; NaN is infinite."""
    error = (found.double() - expected).abs().max() / expected.abs().max().clamp(min=max(scale, 1e-30))
    return error.nan_to_num(math.inf, math.inf).item()


def verify(contender: str, errors: Mapping[str, float], tolerance: float) -> None:
    """Refuse a contender that is off the float64 oracle.

    Args:
        contender: who.
        errors: relative error of each quantity.
        tolerance: the largest that passes.

    Raises:
        WrongContender: naming the contender, and what is furthest off with its error.
    """
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    if wrong:
        worst = sorted(wrong, key=lambda name: -wrong[name])
        off = ", ".join(f"{name} by {wrong[name]:.1e}" for name in worst[:8])
        off += f" and {len(worst) - 8} more" if len(worst) > 8 else ""
        raise WrongContender(f"{contender!r} is off the float64 oracle (at most {tolerance:.0e} is accepted): {off}")


Timer = Callable[[Callable[[], Any], int], float]
"""Calls a function some times; returns milliseconds per call."""


def wall_time(run: Callable[[], Any], repeats: int) -> float:
    """Milliseconds per call that pass; all ranks of a world begin together."""
    return _milliseconds(run, repeats, time.perf_counter)


def cpu_time(run: Callable[[], Any], repeats: int) -> float:
    """Milliseconds per call of this process's CPU time; all ranks of a world begin together."""
    return _milliseconds(run, repeats, time.process_time)


def _milliseconds(run: Callable[[], Any], repeats: int, clock: Callable[[], float]) -> float:
    if dist.is_initialized():
        dist.barrier()
    start = clock()
    for _ in range(repeats):
        run()
    return (clock() - start) / repeats * 1e3


def time_in_turns(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 2,
    least_ms: float = 5.0,
    timer: Timer = wall_time,
    max_repeats: int = MAX_REPEATS,
) -> dict[str, list[float]]:
    """Time each contender once a round.

    In a world of several ranks all start together and the slowest rank's time counts.

    Args:
        contenders: what to call, by name.
        rounds: how many are kept.
        warmup: how many come before these.
        least_ms: a contender that takes less is called several times for one timing, as often as all others.
        timer: `wall_time`; `cpu_time`, which leaves out other processes of the machine and this one's other waits; or
            a device's own.
        max_repeats: how often a contender is called for one timing at most.

    Returns:
        Milliseconds per call, one for each round, by name.
    """
    for run in contenders.values():
        run()
    first = _slowest([timer(run, 1) for run in contenders.values()])
    repeats = min(max_repeats, max(1, math.ceil(least_ms / min(first))))
    times = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(warmup + rounds):
            times.append([timer(run, repeats) for run in contenders.values()])
    finally:
        gc.enable()
    kept = torch.tensor(times[warmup:]).T.contiguous()
    return dict(zip(contenders, (_slowest(row) for row in kept.tolist()), strict=True))


def _slowest(times: list[float]) -> list[float]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return times
    longest = torch.tensor(times, dtype=torch.float64)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return longest.tolist()


def rows_of(
    section: str, shape: str, memory_format: str, ranks: int, times: Mapping[str, list[float]]
) -> list[Measurement]:
    """The results of one `time_in_turns`; `times` must hold OURS."""
    rows = []
    for contender, own in times.items():
        p20, median, p80 = (percentile(own, q) for q in (0.2, 0.5, 0.8))
        ratio = statistics.median(ours / theirs for ours, theirs in zip(times[OURS], own, strict=True))
        rows.append(Measurement(section, shape, memory_format, ranks, contender, median, p20, p80, ratio))
    return rows


def percentile(values: Sequence[float], q: float) -> float:
    """The value below which a part q of the values lies, interpolated."""
    return torch.tensor(values, dtype=torch.float64).quantile(q).item()


def geometric_means(rows: Sequence[Measurement]) -> dict[tuple[str, int, str, str], float]:
    """Of the ratios over the shapes, by (section, ranks, memory format, contender)."""
    ratios: dict[tuple[str, int, str, str], list[float]] = {}
    for row in rows:
        if row.unit == "ms" and row.contender != OURS:
            key = (row.section, row.ranks, row.memory_format, row.contender)
            ratios.setdefault(key, []).append(row.ratio)
    return {key: statistics.geometric_mean(values) for key, values in ratios.items()}


@cache
def environment(threads: int) -> dict[str, str | int]:
    """Date, machine and versions: the first columns of the results."""
    model = next((line for line in _cpu_info() if line.startswith("model name")), "")
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": model.partition(":")[2].strip() or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": threads,
        "memory": "kept" if KEEP_MEMORY.items() <= os.environ.items() else "default",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
