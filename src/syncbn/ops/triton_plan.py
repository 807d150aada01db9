"""How a GPU kernel divides an activation among its programs: pure Python, in one place, to be tuned by measurement.

No autotuning when a program runs: it would make the order of a sum depend on timings, stall the device, and fail while
a CUDA graph is captured. Letters: N batch, C channels, M elements per channel.

The reasoning, in bytes and multiprocessors. To keep a memory of 3 to 5 TB/s busy at a latency of 0.7 to 1 us, 2 to 5 MB
must be under way: 16 to 38 KB for each of 132 multiprocessors, at all times. So programs do not wait for what they
asked for last: with S stages, a program's next S - 1 tiles are copied to shared memory while it computes with one, and
S - 2 are still under way when the oldest arrives. A multiprocessor gets 32 KB of tiles: two of 16 KB, counting all
tensors that a pass reads, or more of smaller ones. With four stages 64 to 96 KB are then under way, in 96 KB of the 227
of shared memory that an H100 has (twice that where a residual is added). GPUs of 100 KB run one such program at a time,
which still has 32 KB under way. A program of one chunk has two stages: a place for its one tile. It has that, and not a
plain load, since a program's first copies start before it computes its coefficients, roots and divisions in float64 of
500 to 1000 instructions; a plain load would start after.

More programs would only add to what the last one must merge (16 bytes a channel and program), and larger tiles would
take the registers: a thread of 256 may use 128 for two programs on a multiprocessor, and a reduction's two accumulators
for each of 32 elements are 64 of them.

Rows (channels-last) are read in pieces of BLOCK_C channels: 64, which in bfloat16 are a whole cache line of 128 bytes,
or 32 where else much of the last block would be empty. Of planes, a tile takes one whole piece of each of up to 32
channels: a thread keeps four coefficients of every channel that it meets. How many of a plane's elements can be copied
at once depends on what divides its area: 8 bytes of bfloat16 for 14x14.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd, prod
from typing import Any

RESIDENT_BYTES = 32 * 1024  # of a tile of each program on a multiprocessor
TILE_BYTES = RESIDENT_BYTES // 2
MOST_STAGES = 4
WIDEST_LOAD = 16  # bytes
SMALLEST_TILE = 1024  # elements
ELEMENTS_PER_WARP = 256  # of a small tile: 8 for each thread
MOST_WARPS, WARPS_PER_MULTIPROCESSOR = 8, 64
MOST_REGISTERS = 128  # of a thread
LONGEST_SUM = 512  # elements that a float32 accumulator takes
MOST_PLANES = 32  # in a tile
EMPTY_CHANNELS = 1 / 8  # of the channels of all blocks, at most
COUNTERS = 1024  # one for each channel block of an activation whose sums are split


@dataclass(frozen=True)
class KernelPlan:
    """What a kernel needs to know of the activation, and its grid.

    Attributes:
        layout: C, outer, inner, outer_stride, channel_stride, inner_stride: see triton_parts.py.
        grid: (channel blocks, splits).
        tile: BLOCK_C and BLOCK_I, powers of two; ALIGNED, ONE_BLOCK: see triton_parts.py; STAGES; and how to compile:
            num_warps, maxnreg.
    """

    layout: tuple[int, int, int, int, int, int]
    grid: tuple[int, int]
    tile: dict[str, Any]

    @property
    def splits(self) -> int:
        """Among how many programs the elements of a channel are divided."""
        return self.grid[1]


@lru_cache(maxsize=4096)
def plan_of(
    shape: Sequence[int], planes: bool, element_size: int, tensors: int, multiprocessors: int, step: int | None = None
) -> KernelPlan:
    """The plan of a pass over an activation.

    Args:
        shape: (N, C, ...).
        planes: whether it is contiguous; else rows.
        element_size: bytes.
        tensors: how many like it the pass reads.
        multiprocessors: of the GPU.
        step: how many elements its rows, or its images in planes, lie apart; None where there is nothing between them.
    """
    layout = _layout(shape, planes, step)
    C, outer, inner = layout[:3]
    elements = TILE_BYTES // (element_size * tensors)
    while True:
        block_c, block_i = tile_of(C, inner, rows=layout[4] == 1, elements=elements)
        channel_blocks = -(-C // block_c)
        chunks = outer * max(1, -(-inner // block_i))
        if channel_blocks * chunks >= multiprocessors or elements <= SMALLEST_TILE:
            break
        elements //= 2
    tile = block_c * block_i
    warps = min(MOST_WARPS, max(1, tile // ELEMENTS_PER_WARP))
    at_once = min(RESIDENT_BYTES // (tile * element_size * tensors), WARPS_PER_MULTIPROCESSOR // warps)
    splits = min(chunks, at_once * multiprocessors // channel_blocks)
    splits = max(1, splits, -(-chunks // LONGEST_SUM)) if channel_blocks <= COUNTERS else 1
    constants = {
        "BLOCK_C": block_c,
        "BLOCK_I": block_i,
        "ALIGNED": gcd(inner, layout[3], WIDEST_LOAD // element_size) if layout[4] > 1 else 1,
        "ONE_BLOCK": outer == 1,
        "STAGES": MOST_STAGES if chunks > splits else 2,
    }
    return KernelPlan(layout, (channel_blocks, splits), {**constants, "num_warps": warps, "maxnreg": MOST_REGISTERS})


def aligned_to(plan: KernelPlan, step: int) -> KernelPlan:
    """The plan for planes of which one tensor's images lie `step` elements apart."""
    aligned = gcd(plan.tile["ALIGNED"], step)
    return plan if aligned == plan.tile["ALIGNED"] else replace(plan, tile={**plan.tile, "ALIGNED": aligned})


def _layout(shape: Sequence[int], planes: bool, step: int | None) -> tuple[int, int, int, int, int, int]:
    N, C, *space = shape
    area = prod(space)
    if N * area == 0:
        return C, 1, 0, 0, 1, C
    if planes and area > 1:
        return C, N, area, step or C * area, area, 1
    return C, 1, N * area, 0, 1, step or C


def tile_of(C: int, inner: int, rows: bool, elements: int) -> tuple[int, int]:
    """BLOCK_C and BLOCK_I of a tile of so many elements, or of fewer where there are no more."""
    if rows:
        fits = -(-C // 64) * 64 * (1 - EMPTY_CHANNELS) <= C
        block_c = 64 if fits else min(32, _power_of_two(C))
        return block_c, min(_power_of_two(inner), elements // block_c)
    block_i = min(_power_of_two(inner), elements)
    return min(_power_of_two(C), MOST_PLANES, elements // block_i), block_i


def _power_of_two(number: int) -> int:
    """The smallest that is not less; 1 for 0."""
    return 1 << max(0, number - 1).bit_length()
