"""What the GPU kernels share: where a program finds its part of an activation, sums over programs, the map.

Letters: N batch, C channels, H W space. One description serves both layouts: an activation is `outer` blocks of C x
`inner` elements, and element (o, c, i) lies at o * outer_stride + c * channel_stride + i * inner_stride. Planes have
outer N and inner H*W; rows (channels-last) have outer 1 and inner N*H*W.

Two constants tell the compiler what it cannot find out: ONE_BLOCK, that outer is 1; and ALIGNED, more than 1 for planes
only, of how many elements both their length and all their strides but 1 are multiples (Triton looks for 16 only). Such
a hint counts where a value is computed, not where it is an argument.

Every kernel runs on a grid (channel blocks, splits). A program reads tiles of BLOCK_C channels x BLOCK_I elements: of
its channel block, the chunks split, split + splits, split + 2 * splits, ... of all outer * cdiv(inner, BLOCK_I).
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

_MERGED = tl.constexpr(32)  # partial sums of a channel that are loaded at once


@triton.jit
def channels_of_program(C, BLOCK_C: tl.constexpr):
    """The channels of this program's block, and which of them exist."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    return c, c < C


@triton.jit
def offsets_in_chunk(c, channel_stride, inner_stride, BLOCK_I: tl.constexpr, ALIGNED: tl.constexpr):
    """Offsets (BLOCK_C, BLOCK_I) in a chunk; 64 bits, as all addresses."""
    of_channels = c.to(tl.int64) * channel_stride
    if ALIGNED > 1:
        of_channels = tl.multiple_of(of_channels, ALIGNED)
    i = tl.arange(0, BLOCK_I)
    return of_channels[:, None] + i.to(tl.int64)[None, :] * inner_stride


@triton.jit
def find_chunk(
    k, inner, outer_stride, inner_stride, BLOCK_I: tl.constexpr, ALIGNED: tl.constexpr, ONE_BLOCK: tl.constexpr
):
    """Where chunk k begins, and how many elements of a channel it holds."""
    if ONE_BLOCK:
        first = tl.cast(k, tl.int64) * BLOCK_I
        start = first * inner_stride
    else:
        chunks = tl.maximum(tl.cdiv(inner, BLOCK_I), 1)
        first = tl.cast(k % chunks, tl.int64) * BLOCK_I
        start = tl.cast(k // chunks, tl.int64) * outer_stride + first * inner_stride
    held = tl.cast(tl.minimum(inner - first, BLOCK_I), tl.int32)
    if ALIGNED > 1:
        start = tl.multiple_of(start, ALIGNED)
        held = tl.multiple_of(held, ALIGNED)
    return start, held


@triton.jit
def number_of_chunks(outer, inner, BLOCK_I: tl.constexpr):
    """Of a channel block; 1 or more."""
    return outer * tl.maximum(tl.cdiv(inner, BLOCK_I), 1)


@triton.jit
def inside(held, exists, BLOCK_I: tl.constexpr):
    """Which elements (BLOCK_C, BLOCK_I) of a chunk that holds so many of each channel there are."""
    return exists[:, None] & (tl.arange(0, BLOCK_I) < held)[None, :]


@triton.jit
def is_last(total, dot, partials, counters, c, exists, C, splits):
    """Store this program's sums (BLOCK_C); whether all programs of the channel block have now done so.

    The last to come resets the counter for the next kernel on the stream.
    """
    own = partials + tl.cast(tl.program_id(1), tl.int64) * 2 * C + c
    tl.store(own, total, mask=exists)
    tl.store(own + C, dot, mask=exists)
    tl.debug_barrier()  # the sums of all threads, before the count of one of them
    counter = counters + tl.program_id(0)
    last = tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def merged_sums(partials, c, exists, C, splits, BLOCK_C: tl.constexpr):
    """All programs' sums, added up in an order that does not depend on who came last. Reads past the L1 cache."""
    total = tl.zeros((BLOCK_C, _MERGED), tl.float64)
    dot = tl.zeros((BLOCK_C, _MERGED), tl.float64)
    for first in range(0, splits, _MERGED):
        s = first + tl.arange(0, _MERGED)
        at = s.to(tl.int64)[None, :] * 2 * C + c[:, None]
        present = exists[:, None] & (s < splits)[None, :]
        total += tl.load(partials + at, mask=present, other=0.0, cache_modifier=".cg")
        dot += tl.load(partials + at + C, mask=present, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 1), tl.sum(dot, 1)


@triton.jit
def write_sums(message, total, dot, c, exists, C, sums_at):
    """Both sums (C) of an activation, one after the other."""
    tl.store(message + sums_at + c, total, mask=exists)
    tl.store(message + sums_at + C + c, dot, mask=exists)


@triton.jit
def write_signature(message, length, id):
    """The id and its square at the end, by the first program of the first activation."""
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (id >= 0):
        signed = tl.cast(id, tl.float64)
        tl.store(message + length - 2, signed)
        tl.store(message + length - 1, signed * signed)


@triton.jit
def scale_of(var, weight, c, exists, eps):
    """The factor weight / sqrt(var + eps), float64."""
    scale = 1.0 / tl.sqrt(var + eps)
    if weight is not None:
        scale *= tl.load(weight + c, mask=exists, other=0.0).to(tl.float64)
    return scale


@triton.jit
def coefficients(mean, var, weight, bias, c, exists, eps, COMPUTE: tl.constexpr):
    """(high, low, scale, shift) of y = ((x - high) - low) * scale + shift, (BLOCK_C, 1) each.

    The mean in two parts keeps the digits that a difference of large numbers needs.
    """
    high = mean.to(COMPUTE)
    low = (mean - high.to(tl.float64)).to(COMPUTE)
    scale = scale_of(var, weight, c, exists, eps).to(COMPUTE)
    if bias is not None:
        shift = tl.load(bias + c, mask=exists, other=0.0).to(COMPUTE)
    else:
        shift = tl.zeros_like(scale)
    return high[:, None], low[:, None], scale[:, None], shift[:, None]


@triton.jit
def ranks_disagree(signature, id_sum, square_sum):
    """Whether the ranks sent different layers' messages; their sums are then made NaN."""
    if signature is not None:
        wrong = (tl.load(signature) != id_sum) | (tl.load(signature + 1) != square_sum)
    else:
        wrong = False
    return wrong


@triton.jit
def elements_of(count, M):
    """Elements per channel over all ranks: in memory at count, or M where there is no such place."""
    if count is not None:
        found = tl.load(count)
    else:
        found = tl.cast(M, tl.float64)
    return found
