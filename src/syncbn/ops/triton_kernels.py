"""The GPU kernels. Only `triton_passes` imports this file, and with it Triton, once a tensor on a GPU asks for them.

Layouts and grid are those of `triton_parts`. Passes that follow a reduction go through the chunks backwards, since
those read last may still be in the cache.

Elements are computed with in COMPUTE: float32, or float64 for float64. Sums over programs and coefficients per channel
are float64. What several kernels or ranks must find bitwise alike is written with fma, so that no compiler chooses.

The loops over chunks copy the tiles that come next to shared memory while they compute (STAGES, see `triton_plan`). The
mask of such a copy would have to be kept until its tile is used, so sums do without it, or derive another from `held`.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from syncbn.ops.triton_parts import (
    channels_of_program,
    coefficients,
    elements_of,
    find_chunk,
    inside,
    is_last,
    merged_sums,
    number_of_chunks,
    offsets_in_chunk,
    ranks_disagree,
    scale_of,
    write_signature,
    write_sums,
)

# Arguments whose value must not make another variant of a kernel.
_PLAIN = ["outer", "splits", "sums_at", "count_at", "id"]
_ANYWHERE = ["count", "signature"]  # in a message


@triton.jit(do_not_specialize=[*_PLAIN, "length"])
def input_sums(
    x,
    message,
    partials,
    counters,
    C,
    outer,
    inner,
    outer_stride,
    channel_stride,
    inner_stride,
    splits,
    sums_at,
    count_at,
    length,
    id,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    ALIGNED: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Sum x (C) and sum x^2 (C) at sums_at of a message, and the number of elements at count_at (none below 0).

    A program sums about the mean of its first tile, whose deviations then are all that float32 has to hold, also
    where the mean is large or one element is.
    """
    c, exists = channels_of_program(C, BLOCK_C)
    tile = offsets_in_chunk(c, channel_stride, inner_stride, BLOCK_I, ALIGNED)
    split = tl.program_id(1)
    pivot = tl.zeros((BLOCK_C,), COMPUTE)
    s1 = tl.zeros((BLOCK_C, BLOCK_I), COMPUTE)
    s2 = tl.zeros((BLOCK_C, BLOCK_I), COMPUTE)
    seen = tl.cast(0, tl.int64)
    for k in tl.range(split, number_of_chunks(outer, inner, BLOCK_I), splits, num_stages=STAGES):
        start, held = find_chunk(k, inner, outer_stride, inner_stride, BLOCK_I, ALIGNED, ONE_BLOCK)
        ok = inside(held, exists, BLOCK_I)
        v = tl.load(x + start + tile, mask=ok, other=0.0).to(COMPUTE)
        if k == split:
            pivot = tl.sum(v, 1) / tl.maximum(held, 1).to(COMPUTE)
        missing = tl.arange(0, BLOCK_I) >= held  # a channel that does not exist has zeros, and so a pivot of 0
        z = tl.where(missing[None, :], 0.0, v - pivot[:, None])
        s1 += z
        s2 += z * z
        seen += held
    about_pivot, p = tl.sum(s1.to(tl.float64), 1), pivot.to(tl.float64)
    total = about_pivot + seen.to(tl.float64) * p
    dot = tl.sum(s2.to(tl.float64), 1) + p * (about_pivot + total)  # sum z^2 + 2 p sum z + n p^2

    if (tl.program_id(0) == 0) & (split == 0) & (count_at >= 0):
        tl.store(message + count_at, tl.cast(outer, tl.float64) * inner)
    write_signature(message, length, id)
    if SPLIT:
        if is_last(total, dot, partials, counters, c, exists, C, splits):
            total, dot = merged_sums(partials, c, exists, C, splits, BLOCK_C)
            write_sums(message, total, dot, c, exists, C, sums_at)
    else:
        write_sums(message, total, dot, c, exists, C, sums_at)


@triton.jit
def _average(average, new, factor, at, mask):
    """One step of a moving average towards new, in float64."""
    old = tl.load(average + at, mask=mask, other=0.0).to(tl.float64)
    tl.store(average + at, tl.fma(new - old, tl.cast(factor, tl.float64) + tl.zeros_like(old), old), mask=mask)


@triton.jit
def _unbiased(var, M):
    return var * (M / tl.maximum(M - 1.0, 1.0))


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_ANYWHERE)
def normalize(
    x,
    residual,
    y,
    mean_out,
    var_out,
    sums,
    count,
    M: tl.float64,
    signature,
    id_sum: tl.float64,
    square_sum: tl.float64,
    weight,
    bias,
    eps: tl.float64,
    running_mean,
    running_var,
    steps,
    momentum: tl.float64,
    C,
    outer,
    inner,
    outer_stride,
    channel_stride,
    inner_stride,
    y_outer_stride,
    y_inner_stride,
    splits,
    RELU: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    ALIGNED: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    Y_LIKE_X: tl.constexpr,
):
    """Write y, the map of x, with the residual added before the ReLU.

    X may be channels cut out of a wider tensor; y then has strides of its own, and there is no residual.
    Mean and variance are those of the sums (2C) over all ranks: then also written, and entered into the moving
    averages. Where sums is None they are read instead. NaN where the ranks disagree, or have one element in all.
    """
    c, exists = channels_of_program(C, BLOCK_C)
    tile = offsets_in_chunk(c, channel_stride, inner_stride, BLOCK_I, ALIGNED)
    split = tl.program_id(1)
    if sums is not None:
        total_M = elements_of(count, M)
        divisor = tl.maximum(total_M, 1.0)
        mean = tl.load(sums + c, mask=exists, other=0.0) / divisor
        var = tl.maximum(tl.fma(-mean, mean, tl.load(sums + C + c, mask=exists, other=0.0) / divisor), 0.0)
        wrong = ranks_disagree(signature, id_sum, square_sum) | (total_M == 1.0)
        mean = tl.where(wrong, float("nan"), mean)
        if split == 0:
            tl.store(mean_out + c, mean, mask=exists)
            tl.store(var_out + c, var, mask=exists)
            if (total_M > 0) & (wrong == 0):
                if running_mean is not None:
                    _average(running_mean, mean, momentum, c, exists)
                    _average(running_var, _unbiased(var, total_M), momentum, c, exists)
                if steps is not None:  # noqa: SIM102 - decided when compiled, the next when run
                    if tl.program_id(0) == 0:
                        tl.store(steps, tl.load(steps) + 1)
    else:
        mean = tl.load(mean_out + c, mask=exists, other=0.0)
        var = tl.load(var_out + c, mask=exists, other=0.0)
    high, low, scale, shift = coefficients(mean, var, weight, bias, c, exists, eps, COMPUTE)
    y_tile = tile if Y_LIKE_X else offsets_in_chunk(c, channel_stride, y_inner_stride, BLOCK_I, ALIGNED)
    chunks = number_of_chunks(outer, inner, BLOCK_I)
    for k in tl.range(split, chunks, splits, num_stages=STAGES):
        k_back = chunks - 1 - k
        start, held = find_chunk(k_back, inner, outer_stride, inner_stride, BLOCK_I, ALIGNED, ONE_BLOCK)
        y_start = start
        if not Y_LIKE_X:
            y_start, _ = find_chunk(k_back, inner, y_outer_stride, y_inner_stride, BLOCK_I, ALIGNED, ONE_BLOCK)
        ok = inside(held, exists, BLOCK_I)
        v = tl.load(x + start + tile, mask=ok, other=0.0).to(COMPUTE)
        out = ((v - high) - low) * scale + shift
        if residual is not None:
            out += tl.load(residual + start + tile, mask=ok, other=0.0).to(COMPUTE)
        if RELU:
            out = tl.where(out < 0.0, 0.0, out)  # a NaN stays
        tl.store(y + y_start + y_tile, out, mask=ok)


@triton.jit(do_not_specialize=["C"])
def update_running(
    running_mean, running_var, steps, mean, var, count, M: tl.float64, momentum: tl.float64, C, BLOCK_C: tl.constexpr
):
    """One step of the moving averages by one program; over all steps so far where momentum is NaN."""
    total_M = elements_of(count, M)
    if total_M > 0:
        factor = tl.cast(momentum, tl.float64)
        if steps is not None:
            taken = tl.load(steps) + 1
            tl.store(steps, taken)
            factor = tl.where(factor != factor, 1.0 / taken.to(tl.float64), factor)
        for first in range(0, C, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            exists = c < C
            _average(running_mean, tl.load(mean + c, mask=exists, other=0.0), factor, c, exists)
            unbiased = _unbiased(tl.load(var + c, mask=exists, other=0.0), total_M)
            _average(running_var, unbiased, factor, c, exists)


@triton.jit
def _store_float64(pointer, value, c, exists):
    """Store in the pointer's dtype; 16 bits by way of 32, the only conversion that there is."""
    if pointer.dtype.element_ty.primitive_bitwidth < 64:
        value = value.to(tl.float32)
    tl.store(pointer + c, value, mask=exists)


@triton.jit
def _write_gradient(message, dweight, dbias, total, dot, deviation_scale, c, exists, C, sums_at):
    write_sums(message, total, dot, c, exists, C, sums_at)
    if dweight is not None:
        _store_float64(dweight, dot * deviation_scale, c, exists)
    if dbias is not None:
        _store_float64(dbias, total, c, exists)


@triton.jit
def _copy(values, copy, c, exists):
    if copy is not None:
        tl.store(copy + c, tl.load(values + c, mask=exists), mask=exists)


@triton.jit(do_not_specialize=[*_PLAIN, "length"])
def gradient(
    dy,
    x,
    y,
    cut,
    message,
    dweight,
    dbias,
    weight_copy,
    bias_copy,
    partials,
    counters,
    mean,
    var,
    weight,
    bias,
    eps: tl.float64,
    C,
    outer,
    inner,
    outer_stride,
    channel_stride,
    inner_stride,
    dy_outer_stride,
    dy_inner_stride,
    splits,
    sums_at,
    length,
    id,
    RELU: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    ALIGNED: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    DY_LIKE_X: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Sum g (C) and sum g * (x - mean) (C) at sums_at of a message, and the parameters' gradients.

    Where there is room for copies of the parameters, it writes them: for the pass that follows the message.
    Dy may be channels cut out of a wider tensor, and then has strides of its own.
    g is dy where the ReLU let pass, else 0. Whether it did is computed again from x with RELU, and read from y where
    that is given; g is then written to cut.
    """
    c, exists = channels_of_program(C, BLOCK_C)
    tile = offsets_in_chunk(c, channel_stride, inner_stride, BLOCK_I, ALIGNED)
    dy_tile = tile if DY_LIKE_X else offsets_in_chunk(c, channel_stride, dy_inner_stride, BLOCK_I, ALIGNED)
    split = tl.program_id(1)
    v_mean = tl.load(mean + c, mask=exists, other=0.0)
    v_var = tl.load(var + c, mask=exists, other=0.0)
    high, low, scale, shift = coefficients(v_mean, v_var, weight, bias, c, exists, eps, COMPUTE)
    if split == 0:
        _copy(weight, weight_copy, c, exists)
        _copy(bias, bias_copy, c, exists)
    s1 = tl.zeros((BLOCK_C, BLOCK_I), COMPUTE)
    s2 = tl.zeros((BLOCK_C, BLOCK_I), COMPUTE)
    for k in tl.range(split, number_of_chunks(outer, inner, BLOCK_I), splits, num_stages=STAGES):
        start, held = find_chunk(k, inner, outer_stride, inner_stride, BLOCK_I, ALIGNED, ONE_BLOCK)
        dy_start = start
        if not DY_LIKE_X:
            dy_start, _ = find_chunk(k, inner, dy_outer_stride, dy_inner_stride, BLOCK_I, ALIGNED, ONE_BLOCK)
        ok = inside(held, exists, BLOCK_I)
        g = tl.load(dy + dy_start + dy_tile, mask=ok, other=0.0).to(COMPUTE)
        deviation = (tl.load(x + start + tile, mask=ok, other=0.0).to(COMPUTE) - high) - low
        if RELU:
            g = tl.where(deviation * scale + shift <= 0.0, 0.0, g)
        if y is not None:
            g = tl.where(tl.load(y + start + tile, mask=ok, other=0.0).to(COMPUTE) <= 0.0, 0.0, g)
            tl.store(cut + start + tile, g, mask=ok)
        s1 += g
        s2 += g * deviation  # g is 0 outside
    total, dot = tl.sum(s1.to(tl.float64), 1), tl.sum(s2.to(tl.float64), 1)

    deviation_scale = 1.0 / tl.sqrt(v_var + eps)
    write_signature(message, length, id)
    if SPLIT:
        if is_last(total, dot, partials, counters, c, exists, C, splits):
            total, dot = merged_sums(partials, c, exists, C, splits, BLOCK_C)
            _write_gradient(message, dweight, dbias, total, dot, deviation_scale, c, exists, C, sums_at)
    else:
        _write_gradient(message, dweight, dbias, total, dot, deviation_scale, c, exists, C, sums_at)


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_ANYWHERE)
def input_gradient(
    dy,
    x,
    dx,
    sums,
    count,
    M: tl.float64,
    signature,
    id_sum: tl.float64,
    square_sum: tl.float64,
    mean,
    var,
    weight,
    bias,
    eps: tl.float64,
    C,
    outer,
    inner,
    outer_stride,
    channel_stride,
    inner_stride,
    dy_outer_stride,
    dy_inner_stride,
    splits,
    RELU: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    ALIGNED: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    DY_LIKE_X: tl.constexpr,
):
    """Write dx = scale * g + slope * (x - mean) + offset, given the sums (2C) of `gradient` over all ranks."""
    c, exists = channels_of_program(C, BLOCK_C)
    tile = offsets_in_chunk(c, channel_stride, inner_stride, BLOCK_I, ALIGNED)
    dy_tile = tile if DY_LIKE_X else offsets_in_chunk(c, channel_stride, dy_inner_stride, BLOCK_I, ALIGNED)
    split = tl.program_id(1)
    v_mean = tl.load(mean + c, mask=exists, other=0.0)
    v_var = tl.load(var + c, mask=exists, other=0.0)
    high, low, scale, shift = coefficients(v_mean, v_var, weight, bias, c, exists, eps, COMPUTE)
    share = -scale_of(v_var, weight, c, exists, eps) / tl.maximum(elements_of(count, M), 1.0)
    share = tl.where(ranks_disagree(signature, id_sum, square_sum), float("nan"), share)
    offset = (tl.load(sums + c, mask=exists, other=0.0) * share).to(COMPUTE)[:, None]
    dot = tl.load(sums + C + c, mask=exists, other=0.0)
    slope = (dot / (v_var + eps) * share).to(COMPUTE)[:, None]
    chunks = number_of_chunks(outer, inner, BLOCK_I)
    for k in tl.range(split, chunks, splits, num_stages=STAGES):
        k_back = chunks - 1 - k
        start, held = find_chunk(k_back, inner, outer_stride, inner_stride, BLOCK_I, ALIGNED, ONE_BLOCK)
        dy_start = start
        if not DY_LIKE_X:
            dy_start, _ = find_chunk(k_back, inner, dy_outer_stride, dy_inner_stride, BLOCK_I, ALIGNED, ONE_BLOCK)
        ok = inside(held, exists, BLOCK_I)
        g = tl.load(dy + dy_start + dy_tile, mask=ok, other=0.0).to(COMPUTE)
        deviation = (tl.load(x + start + tile, mask=ok, other=0.0).to(COMPUTE) - high) - low
        if RELU:
            g = tl.where(deviation * scale + shift <= 0.0, 0.0, g)
        tl.store(dx + start + tile, g * scale + (deviation * slope + offset), mask=ok)
