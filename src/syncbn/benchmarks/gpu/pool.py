"""Inception-BN's max pools on a GPU, against the floor of the memory's bandwidth and torch's. See `gpu`."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from syncbn.benchmarks.gpu.layer import FLOOR, TOLERANCE, TimingOptions, normal, time_prepared
from syncbn.benchmarks.harness import measure
from syncbn.benchmarks.harness.measure import OURS, Measurement
from syncbn.models.table import STEM_CONV1, STEM_CONV2, TABLE
from syncbn.ops.max_pool import max_pool2d

TORCHS = "F.max_pool2d"
CONTENDERS: dict[str, Callable[..., Tensor]] = {OURS: max_pool2d, TORCHS: F.max_pool2d}


class Pool(NamedTuple):
    """A 3x3 max pool of activations (batch, C, side, side)."""

    batch: int
    C: int
    side: int
    stride: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.C}x{self.side}x{self.side}, stride {self.stride}"

    def of(self, max_pool: Callable[..., Tensor], x: Tensor) -> Tensor:
        """By this function, as the network calls it on even sides; at stride 1 with padding."""
        return max_pool(x, 3, self.stride, 0 if self.stride == 2 else 1, ceil_mode=self.stride == 2)


def pools(batch: int) -> list[Pool]:
    """Those of Inception-BN at 224 pixels, in order."""
    found = [Pool(batch, STEM_CONV1, 112, 2), Pool(batch, STEM_CONV2, 56, 2)]
    channels = STEM_CONV2
    for row in TABLE:
        if row.pool == "max":
            found.append(Pool(batch, channels, row.size, row.stride))
        channels = row.out_channels(channels)
    return found


def verify(pool: Pool, x: Tensor, dy: Tensor, contenders: Mapping[str, Callable[..., Tensor]] = CONTENDERS) -> None:
    """Refuse a contender that is off F.max_pool2d in float64.

    Raises:
        measure.WrongContender: naming it.
    """
    wide = x.detach().double().requires_grad_()
    expected = pool.of(F.max_pool2d, wide)
    (true,) = torch.autograd.grad(expected, wide, dy.double())
    for name, max_pool in contenders.items():
        y = pool.of(max_pool, x)
        (dx,) = torch.autograd.grad(y, x, dy)
        errors = {"y": measure.relative_error(y, expected), "dx": measure.relative_error(dx, true)}
        measure.verify(name, errors, TOLERANCE[x.dtype])


def forward_of(pool: Pool, max_pool: Callable[..., Tensor], x: Tensor) -> Callable[[], Any]:
    """What to time of the forward."""
    return partial(pool.of, max_pool, x)


def backward_of(pool: Pool, max_pool: Callable[..., Tensor], x: Tensor, dy: Tensor) -> Callable[[], Any]:
    """What to time of the backward."""
    return partial(torch.autograd.grad, pool.of(max_pool, x), x, dy, retain_graph=True)


def measure_pool(pool: Pool, memory_format: str, options: TimingOptions) -> list[Measurement]:
    """Verify and time the contenders at one pool, both directions.

    The floor is the time in which x (forward) or dx (backward), y or dy, and a byte for each of its elements move.
    """
    generator = torch.Generator(options.device).manual_seed(0)
    x = normal((pool.batch, pool.C, pool.side, pool.side), memory_format, options, generator).requires_grad_()
    dy = normal(pool.of(F.max_pool2d, x).shape, memory_format, options, generator)
    verify(pool, x, dy)
    rows: list[Measurement] = []
    for direction in ("forward", "backward"):
        if direction == "forward":
            prepare = {name: partial(forward_of, pool, max_pool, x) for name, max_pool in CONTENDERS.items()}
        else:
            prepare = {name: partial(backward_of, pool, max_pool, x, dy) for name, max_pool in CONTENDERS.items()}
        times = time_prepared(prepare, options)
        times[FLOOR] = [(x.nbytes + dy.nbytes + dy.numel()) / options.bandwidth * 1e3] * options.rounds
        rows += measure.rows_of(f"pool {direction}", str(pool), memory_format, 1, times)
    return rows
