"""The local passes over one activation, with ATen operators, on any device that computes in float64.

Letters: N batch, C channels, M elements per channel on this rank, "rows" the (M, C) matrix that a channels-last
activation is in memory, "planes" the (N, C, ...) blocks of a contiguous one. The passes run in the compute dtype:
float32, or float64 for float64 input.

Two things keep float32 sums good to 1e-7. Something near each channel's mean is subtracted first wherever the mean is
large against the deviation. And no accumulator takes more than some 500 elements: a tall matrix is read as a wide one,
in blocks, and a long plane as short ones; their sums are then added up.

On a CPU, ATen's batch norm operators are used for what they are inside: its backward in training holds a vectorised
reduction of sum a and sum a * (x - centre), its forward in inference one pass of (x - centre) * scale + shift.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor

from syncbn.ops.common import (
    Affine,
    Gradient,
    Running,
    address,
    as_statistic,
    at_least_one,
    compute_dtype,
    has_memory,
    per_channel,
)

_ROWS = 512  # how many an accumulator takes
_WIDTH = 4096  # accumulators side by side: few calls, whose data still stay in a near cache
_PIECE = 4096  # elements of a plane, which a vector of 8 accumulators takes
_aten = torch.ops.aten


class Sums(NamedTuple):
    """Of one activation, (C) each, in the compute dtype or float64: of the first factor, and of the products."""

    total: Tensor
    dot: Tensor


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `ops.moments`."""
    sums, pivot = _sums_about_pivot(x)
    return moments_of(sums, pivot, x.numel() // x.shape[1])


def input_sums(x: Tensor) -> Tensor:
    """As `ops.input_sums`."""
    sums, pivot = _sums_about_pivot(x)
    return torch.cat(about_origin(sums, pivot, x.numel() // x.shape[1]))


def normalize(x: Tensor, affine: Affine, residual: Tensor | None) -> Tensor:
    """As `ops.normalize`."""
    values, centre = _about_mean(x, affine)
    var = affine.var.to(values.dtype)
    y = _affine(values, centre, var, affine.eps, affine.weight, affine.bias, values is not x)
    if residual is not None:
        y = y.add_(residual)
    return (y.relu_() if affine.relu else y).to(x.dtype)


def before_relu(dy: Tensor, x: Tensor, affine: Affine) -> tuple[Tensor, Affine]:
    """As `ops.before_relu`."""
    if not affine.relu:
        return dy, affine
    return _aten.threshold_backward(dy, normalize(x, affine, None), 0), affine._replace(relu=False)


def gradient(dy: Tensor, x: Tensor, affine: Affine) -> Gradient:
    """As `ops.gradient`, of a map without relu."""
    if x.numel() == 0:
        sums = affine.mean.new_zeros(2 * x.shape[1])
    else:
        values, centre = _about_mean(x, affine)
        sums = torch.cat(_sums_of_products(dy.to(values.dtype), values, centre)).double()
    total, dot = sums.chunk(2)
    weight = None if affine.weight is None else (dot * (affine.var + affine.eps).rsqrt()).to(affine.weight.dtype)
    return Gradient(sums, weight, None if affine.bias is None else total.to(affine.bias.dtype))


def input_gradient(dy: Tensor, x: Tensor, affine: Affine, sums: Tensor, M: float | Tensor) -> Tensor:
    """As `ops.input_gradient`, of a map without relu: dx = scale * dy + slope * (x - mean) + offset."""
    if x.numel() == 0:
        return torch.empty_like(x)
    total, dot = sums.chunk(2)
    variance = affine.var + affine.eps
    scale = variance.rsqrt() if affine.weight is None else variance.rsqrt() * affine.weight
    share = scale / -M
    values, centre = _about_mean(x, affine)
    unit = torch.ones_like(centre)
    dx = _affine(values, centre, unit, 0.0, dot / variance * share, total * share, values is not x)
    return dx.addcmul_(dy.to(dx.dtype), per_channel(scale.to(dx.dtype), x)).to(x.dtype)


def update_running(running: Running, mean: Tensor, var: Tensor, M: float | Tensor) -> None:
    """As `ops.update_running`."""
    _refuse_batched(mean, running.mean)
    device = running.mean.device  # the moments may be on the host
    if has_memory(running.mean) and not running.mean.is_meta:  # in place, operators read what was freed
        for t in running[:3]:
            address(t)
    seen = M > 0
    if running.steps is not None:
        seen_there = seen.to(device) if isinstance(seen, Tensor) else seen
        running.steps.add_(_for_memory_of(running.steps, seen_there))
    factor: float | Tensor
    if running.momentum is not None:
        # In float64: a tensor of bool times a number would be rounded to float32.
        factor = (seen.double() if isinstance(seen, Tensor) else seen) * running.momentum
    else:
        assert running.steps is not None
        factor = seen * as_statistic(running.steps.clamp(min=1)).reciprocal()
    for average, new in ((running.mean, mean), (running.var, var * (M / at_least_one(M - 1)))):
        new = new.to(average.dtype).to(device)
        if isinstance(seen, Tensor):  # what was not seen may be NaN, of which even a weight of 0 leaves some
            new = torch.where(seen.to(device), new, average)
        weight = factor.to(new.dtype).to(device) if isinstance(factor, Tensor) else factor
        average.lerp_(_for_memory_of(average, new), _for_memory_of(average, weight))


def _refuse_batched(new: Tensor, average: Tensor) -> None:
    """Raise ValueError where torch.vmap has several new values for one average."""
    if not torch.compiler.is_compiling() and is_batchedtensor(new) and not is_batchedtensor(average):
        raise ValueError(
            "torch.vmap runs a BatchNorm layer for several batches, and its running_mean can follow one alone: build "
            "the layer with track_running_stats=False, map over its buffers too (torch.func.stack_module_state), or "
            "call .eval()"
        )


def _for_memory_of(average: Tensor, new: Any) -> Any:
    """What an average outside of torch.func.functionalize can be given of a tensor, or number, inside."""
    if torch.compiler.is_compiling() or not isinstance(new, Tensor):
        return new
    if not torch._is_functional_tensor(new) or torch._is_functional_tensor(average):
        return new
    torch._sync(new)
    return torch._from_functional_tensor(new)


def pivot(x: Tensor) -> Tensor:
    """A value (C) near each channel's mean: the average of a few elements here and there."""
    few = x[:16].flatten(2) if x.dim() > 2 else x[:64, :, None]
    few = few[:, :, :: max(1, few.shape[2] // 8)]
    return few.mean((0, 2), dtype=compute_dtype(x.dtype))


def composed_sums(z: Tensor) -> Sums:
    """Sum z and sum z^2 (C) as differentiable operators."""
    return _composed(z, z, None)


def about_origin(sums: Sums, pivot: Tensor | None, M: int) -> Sums:
    """Sums about a pivot -> sums about 0: sum x = s1 + M p; sum x^2 = s2 + 2 p s1 + M p^2, in float64."""
    if pivot is None:
        return Sums(*map(as_statistic, sums))
    s1, s2, p = as_statistic(sums.total), as_statistic(sums.dot), as_statistic(pivot)
    total = s1 + M * p
    return Sums(total, s2 + p * (s1 + total))


def moments_of(sums: Sums, pivot: Tensor | None, M: float | Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C), float64, from sums about a pivot; zeros of an empty batch."""
    total, dot, divisor = as_statistic(sums.total), as_statistic(sums.dot), at_least_one(M)
    mean = total / divisor
    var = torch.addcmul(dot / divisor, mean, mean, value=-1).clamp(min=0)
    return mean if pivot is None else mean + as_statistic(pivot), var


def _sums_about_pivot(x: Tensor) -> tuple[Sums, Tensor | None]:
    """Sum z and sum z^2 of z = x - pivot, and the pivot (C); None for 0."""
    dtype = compute_dtype(x.dtype)
    if x.numel() == 0:
        zero = x.new_zeros(x.shape[1], dtype=dtype)
        return Sums(zero, zero), None
    if x.is_cpu and x.dtype == dtype and has_memory(x):
        sums, M = _sums_of_products(x, x, None), x.numel() // x.shape[1]
        if not bool((sums.total.square() > 0.5 * M * sums.dot).any()):  # mean^2 exceeds the variance nowhere
            return sums, None
    about = pivot(x)
    z = torch.sub(x, per_channel(about, x))
    return _sums_of_products(z, z, None), about


def _about_mean(x: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
    """Values in the compute dtype and a centre (C), whose difference is x - mean to the compute dtype's precision."""
    dtype = compute_dtype(x.dtype)
    high = affine.mean.to(dtype)
    if x.is_cpu and x.dtype == dtype and has_memory(x) and not bool((affine.mean.square() > affine.var).any()):
        return x, high
    return torch.sub(x, per_channel(high, x)), (affine.mean - high).to(dtype)


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.movedim(1, -1).reshape(-1, x.shape[1])


def _sums_of_products(a: Tensor, x: Tensor, centre: Tensor | None) -> Sums:
    """Sum a and sum a * (x - centre) per channel, for a and x dense and of one layout and dtype."""
    if x.device.type != "cpu":
        return _composed(a, x, centre)
    if x.dim() == 2 or not x.is_contiguous():
        return _sums_of_rows(a, x, centre)
    return _sums_of_planes(a, x, centre)


def _composed(a: Tensor, x: Tensor, centre: Tensor | None) -> Sums:
    dims = [d for d in range(x.dim()) if d != 1]
    product = a * x if centre is None else a * (x - per_channel(centre, x))
    return Sums(a.sum(dims), product.sum(dims))


def _sums_of_rows(a: Tensor, x: Tensor, centre: Tensor | None) -> Sums:
    C = x.shape[1]
    M = x.numel() // C
    accumulators = max(-(-M // _ROWS), 4 if M >= 64 else 1)
    if accumulators == 1 and x.dim() in (2, 4):
        return _reduce(a, x, centre)
    fewest = min(accumulators, max(1, _WIDTH // C))
    k = _divisor(M, (*range(fewest, 8 * fewest), *range(fewest, 1, -1)))  # the matrix is read as (M/k, k*C)
    a, x = _rows(a).view(-1, k * C), _rows(x).view(-1, k * C)
    centre = None if centre is None else centre.repeat(k)
    if len(x) <= _ROWS:
        sums = _reduce(a, x, centre)
        return Sums(sums.total.view(k, C).sum(0), sums.dot.view(k, C).sum(0))
    parts = [_reduce(*pair, centre) for pair in zip(a.split(_ROWS), x.split(_ROWS), strict=True)]
    return Sums(*(torch.stack(s).view(-1, C).sum(0, dtype=torch.float64) for s in zip(*parts, strict=True)))


def _sums_of_planes(a: Tensor, x: Tensor, centre: Tensor | None) -> Sums:
    N, C = x.shape[:2]
    area = x.numel() // (N * C)
    if area <= _PIECE:
        return _reduce(a, x, centre)
    fewest = -(-area // _PIECE)
    k = _divisor(area, range(fewest, 8 * fewest))
    if k == 1:  # no way to cut the plane evenly
        return _composed(a, x, centre)
    pieces = (N, C * k, area // k)
    sums = _reduce(a.view(pieces), x.view(pieces), None if centre is None else centre.repeat_interleave(k))
    return Sums(*(s.view(C, k).sum(1, dtype=torch.float64) for s in sums))


@lru_cache(maxsize=4096)
def _divisor(number: int, candidates: Iterable[int]) -> int:
    """The first of the candidates that divides the number, 1 if none does."""
    return next((k for k in candidates if number % k == 0), 1)


def _reduce(a: Tensor, x: Tensor, centre: Tensor | None) -> Sums:
    """Sum a and sum a * (x - centre) per channel, by the reduction inside ATen's batch norm backward."""
    unit = x.new_ones(x.shape[1])
    centre = unit.new_zeros(x.shape[1]) if centre is None else centre
    wanted = [False, True, True]
    _, dot, total = _aten.native_batch_norm_backward(a, x, None, None, None, centre, unit, True, 0.0, wanted)
    return Sums(total, dot)


def _affine(
    values: Tensor, centre: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None, in_place: bool
) -> Tensor:
    """(values - centre) / sqrt(var + eps) * weight + bias, in one pass (ATen's inference batch norm)."""
    if values.numel() == 0:
        return values
    dtype, flat = values.dtype, values
    if not values.is_contiguous() and values.dim() != 4:  # rows, which ATen knows as (1, C, M, 1) channels-last
        flat = _rows(values)[None, :, None].permute(0, 3, 1, 2)
    out, unused = flat if in_place else torch.empty_like(flat), values.new_empty(0)
    weight = None if weight is None else weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    _aten.native_batch_norm.out(
        flat,
        weight,
        bias,
        centre.to(dtype),
        var.to(dtype),
        False,
        0.0,
        eps,
        out=out,
        save_mean=unused,
        save_invstd=unused,
    )
    if flat is values:
        return out
    return out.permute(0, 2, 3, 1).view(values.movedim(1, -1).shape).movedim(-1, 1)
