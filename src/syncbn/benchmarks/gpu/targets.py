"""What section `gpu` is to find: the target of each figure, what was predicted before any was measured, what came."""

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from syncbn.benchmarks.gpu.layer import CUDNN, FLOOR, STOCK_SYNC, TENSORS_MOVED
from syncbn.benchmarks.gpu.step import CADENE, GRAPH, IMAGES_PER_SECOND, PEAK_MEMORY
from syncbn.benchmarks.harness.measure import OURS, Measurement

LARGE = 25e6  # elements: 50 MB in bfloat16


class Target(NamedTuple):
    """One figure; `found` computes it from the results, None where they lack it."""

    figure: str
    target: str
    predicted: str
    found: Callable[[Sequence[Measurement]], float | None]


def over_floor(rows: Sequence[Measurement], direction: str) -> float | None:
    """Geometric mean, over activations of 50 MB and more, of time over the floor's."""
    ratios = [
        row.ratio
        for row in rows
        if (row.section, row.contender) == (direction, FLOOR) and elements_of(row.shape) >= LARGE
    ]
    return statistics.geometric_mean(ratios) if ratios else None


def layer_speedup(rows: Sequence[Measurement], contender: str) -> float | None:
    """Geometric mean, over all shapes and both directions, of the contender's time over syncbn's."""
    ratios = [1 / row.ratio for row in rows if row.section in TENSORS_MOVED and row.contender == contender]
    return statistics.geometric_mean(ratios) if ratios else None


def step_figure(rows: Sequence[Measurement], batch: int, contender: str, unit: str) -> float | None:
    """Median of a step at a batch size."""
    found = [
        row.median
        for row in rows
        if row.section == "step"
        and row.shape.startswith(f"step, {batch} x")
        and (row.contender, row.unit) == (contender, unit)
    ]
    return found[0] if found else None


def best_rate(rows: Sequence[Measurement], batch: int) -> float | None:
    """Images a second of syncbn, in eager or as a graph, whichever is faster."""
    rates = [step_figure(rows, batch, name, IMAGES_PER_SECOND) for name in (OURS, GRAPH)]
    return max((rate for rate in rates if rate is not None), default=None)


def step_speedup(rows: Sequence[Measurement], batch: int, contender: str) -> float | None:
    """Syncbn's best images a second over the contender's."""
    ours, theirs = best_rate(rows, batch), step_figure(rows, batch, contender, IMAGES_PER_SECOND)
    return ours / theirs if ours and theirs else None


def memory_share(rows: Sequence[Measurement], batch: int) -> float | None:
    """Syncbn's peak memory over that with nn.SyncBatchNorm."""
    ours, theirs = (step_figure(rows, batch, name, PEAK_MEMORY) for name in (OURS, STOCK_SYNC))
    return ours / theirs if ours and theirs else None


def elements_of(shape: str) -> float:
    """Of a shape written NxCxHxW."""
    total = 1.0
    for part in shape.split("x"):
        total *= int(part)
    return total


TARGETS = (
    Target("forward over the floor, 50 MB and more", "<= 1.15", "1.10", lambda rows: over_floor(rows, "forward")),
    Target("backward over the floor, 50 MB and more", "<= 1.15", "1.12", lambda rows: over_floor(rows, "backward")),
    Target("layer: nn.SyncBatchNorm + ReLU / syncbn", ">= 2.5", "2.5", lambda rows: layer_speedup(rows, STOCK_SYNC)),
    Target("layer: nn.BatchNorm2d + ReLU / syncbn", ">= 1.3", "1.4", lambda rows: layer_speedup(rows, CUDNN)),
    Target("images/s at batch 256", ">= 12,000", "11,500", lambda rows: best_rate(rows, 256)),
    Target("step at 256: nn.SyncBatchNorm / syncbn", ">= 2", "2.2", lambda rows: step_speedup(rows, 256, STOCK_SYNC)),
    Target("step at 256: Cadene layout / syncbn", "-", "1.5", lambda rows: step_speedup(rows, 256, CADENE)),
    Target("step at 32: nn.SyncBatchNorm / syncbn", ">= 4", "5", lambda rows: step_speedup(rows, 32, STOCK_SYNC)),
    Target("memory at 256: syncbn / nn.SyncBatchNorm", "<= 0.6", "0.50", lambda rows: memory_share(rows, 256)),
)


def show_targets(rows: Sequence[Measurement], console: Console) -> None:
    """Print each figure beside its target and its prediction."""
    table = Table("figure", "target", "predicted", "found", title="Targets")
    for target in TARGETS:
        found = target.found(rows)
        table.add_row(target.figure, target.target, target.predicted, "-" if found is None else f"{found:,.2f}")
    console.print(table)
