"""The local passes over one activation, with ATen operators, on any device.

Letters: N batch, C channels, M elements per channel on this rank, "rows" the (M, C) matrix that a channels-last
activation is in memory, "planes" the (N, C, ...) blocks of a contiguous one. The passes run in the compute dtype:
float32, or float64 for float64 input.

Two things keep float32 sums good to 1e-7. A pivot per channel is subtracted first wherever a channel's mean is large
against its deviation. And no accumulator takes more than some 500 elements: a tall matrix is read as a wide one, in
blocks, and a long plane as short ones; their sums are then added up.

On a CPU, ATen's batch norm operators are used for what they are inside: its backward in training holds a vectorised
reduction of sum a and sum a * (x - centre), its forward in inference one pass of (x - centre) * scale + shift.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_ROWS = 512  # how many an accumulator takes
_WIDTH = 4096  # accumulators side by side: few calls, whose data still stay in a near cache
_PIECE = 4096  # elements of a plane, which a vector of 8 accumulators takes
_PLANE = 16384  # the longest plane that `whole_gradient` leaves whole ...
_FEW_ROWS = 8192  # ... and the most rows
_aten = torch.ops.aten


class Shifted(NamedTuple):
    """An activation as the passes read it: `values` = x - `pivot` in the compute dtype; `pivot` (C), None for 0."""

    values: Tensor
    pivot: Tensor | None


class Sums(NamedTuple):
    """Of one activation, (C) each, in the compute dtype or float64: of the first factor, and of the products."""

    total: Tensor
    dot: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an activation of `dtype` is processed: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """View v (C) so that it broadcasts over x (N, C, ...)."""
    return v.view(-1, *[1] * (x.dim() - 2))


def shift(x: Tensor, pivot: Tensor | None) -> Shifted:
    """X - pivot, without a copy where there is nothing to subtract and nothing to convert."""
    if pivot is None:
        return Shifted(x.to(compute_dtype(x.dtype)), None)
    return Shifted(torch.sub(x, per_channel(pivot, x)), pivot)


def dense(x: Tensor) -> Tensor:
    """X itself where it lies in memory as planes or as rows, else a contiguous copy."""
    return x if x.is_contiguous() or _is_rows(x) else x.contiguous()


def pivot(x: Tensor) -> Tensor:
    """A value (C) near each channel's mean: the average of a few elements here and there."""
    few = x[:16].flatten(2) if x.dim() > 2 else x[:64, :, None]
    few = few[:, :, :: max(1, few.shape[2] // 8)]
    return few.mean((0, 2), dtype=compute_dtype(x.dtype))


def input_sums(x: Tensor) -> tuple[Sums, Shifted]:
    """First pass of the forward.

    Args:
        x: (N, C, ...), dense, floating point; N may be 0.

    Returns:
        Sum z and sum z^2 of z = x - pivot, and x as it was read, for `normalize`.
    """
    dtype = compute_dtype(x.dtype)
    if x.numel() == 0:
        zero = x.new_zeros(x.shape[1], dtype=dtype)
        return Sums(zero, zero), Shifted(x.to(dtype), None)
    if x.device.type == "cpu" and x.dtype == dtype:
        sums = _sums_of_products(x, x, None)
        if not _cancels(sums, x.numel() // x.shape[1]):
            return sums, Shifted(x, None)
    shifted = shift(x, pivot(x))
    return _sums_of_products(shifted.values, shifted.values, None), shifted


def composed_sums(z: Tensor) -> Sums:
    """The sums of `input_sums` as differentiable operators."""
    return _composed(z, z, None)


def about_origin(sums: Sums, pivot: Tensor | None, M: int) -> Sums:
    """Sums about a pivot -> sums about 0: sum x = s1 + M p; sum x^2 = s2 + 2 p s1 + M p^2, in float64."""
    if pivot is None:
        return sums
    s1, s2, p = sums.total.double(), sums.dot.double(), pivot.double()
    total = s1 + M * p
    return Sums(total, s2 + p * (s1 + total))


def normalize(
    shifted: Shifted,
    centre: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    in_place: bool = False,
) -> Tensor:
    """Second pass of the forward: (x - mean) / sqrt(var + eps) * weight + bias.

    Args:
        shifted: x (N, C, ...), dense.
        centre: mean - pivot (C).
        var: (C), biased.
        eps: added to var.
        weight: (C) or None.
        bias: (C) or None.
        in_place: overwrite `shifted.values`.

    Returns:
        y in the dtype and layout of `shifted.values`.
    """
    return _affine(shifted.values, centre, var, eps, weight, bias, in_place)


def gradient_sums(dy: Tensor, x: Tensor, pivot: Tensor | None, centre: Tensor) -> Sums:
    """First pass of the backward: sum dy and sum dy * (x - mean).

    Args:
        dy: like x, in x's layout.
        x: (N, C, ...), dense.
        pivot: (C) as in the forward, or None.
        centre: mean - pivot (C), in the compute dtype.
    """
    if x.numel() == 0:
        zero = torch.zeros_like(centre)
        return Sums(zero, zero)
    values = shift(x, pivot).values
    return _sums_of_products(dy.to(values.dtype), values, centre)


def whole_gradient(
    dy: Tensor, x: Tensor, pivot: Tensor | None, centre: Tensor, invstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Sums] | None:
    """Both passes of the backward in one, which needs no message; None where that is not the faster way.

    Args:
        dy: like x, in x's layout.
        x: (N, C, ...), dense.
        pivot: (C) as in the forward, or None.
        centre: mean - pivot (C), in the compute dtype.
        invstd: 1 / sqrt(var + eps) (C).
        weight: (C) or None.

    Returns:
        dx, and the sums of `gradient_sums`.
    """
    if x.device.type != "cpu" or x.numel() == 0 or pivot is not None or not x.dtype == dy.dtype == centre.dtype:
        return None
    M, N = x.numel() // x.shape[1], x.shape[0]
    planes = x.dim() > 2 and x.is_contiguous()
    if M > N * _PLANE if planes else x.dim() != 4 or M > _FEW_ROWS:
        return None
    weight = None if weight is None else weight.to(x.dtype)
    dx, dot, total = _aten.native_batch_norm_backward(
        dy, x, weight, None, None, centre, invstd, True, 0.0, [True, True, True]
    )
    return dx, Sums(total, dot.div_(invstd))


def input_gradient(
    dy: Tensor, x: Tensor, pivot: Tensor | None, centre: Tensor, scale: Tensor, slope: Tensor, offset: Tensor
) -> Tensor:
    """Second pass of the backward: dx = scale * dy + slope * (x - mean) + offset.

    Args:
        dy: like x, in x's layout.
        x: (N, C, ...), dense.
        pivot: (C) as in the forward, or None.
        centre: mean - pivot (C), in the compute dtype.
        scale: (C).
        slope: (C).
        offset: (C).
    """
    if x.numel() == 0:
        return torch.zeros_like(x)
    values = shift(x, pivot).values
    dx = _affine(values, centre, torch.ones_like(centre), 0.0, slope, offset, values is not x)
    return dx.addcmul_(dy.to(dx.dtype), per_channel(scale.to(dx.dtype), x)).to(x.dtype)


def _is_rows(x: Tensor) -> bool:
    """Whether x is channels-last in memory, at any number of dimensions."""
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.movedim(1, -1).reshape(-1, x.shape[1])


def _cancels(sums: Sums, count: int) -> bool:
    """Whether in some channel mean^2 exceeds the variance, so that sums about 0 lose digits."""
    return bool((sums.total.square().sub_(sums.dot, alpha=0.5 * count).max() > 0).item())


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
    k = _divisor(M, range(min(accumulators, max(1, _WIDTH // C)), 0, -1))  # the matrix is read as (M/k, k*C)
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
def _divisor(number: int, candidates: range) -> int:
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
