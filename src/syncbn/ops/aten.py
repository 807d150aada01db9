"""The four local passes over one activation, with ATen operators, on any device.

Letters: N batch, C channels, M elements per channel on this rank, "rows" the (M, C) matrix of a channels-last
activation. Sums are returned in float64; the passes run in float32, or float64 for float64 input.

Two things keep float32 sums good to 1e-7 here. A pivot per channel is subtracted first wherever a channel's mean is
large against its deviation. And no accumulator runs over more than about a thousand rows: a tall matrix is folded
into a wide one before it is summed, its columns are added up in float64 afterwards.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_ROWS_PER_SUM = 1024
_PLANE_PER_SUM = 16384
_aten = torch.ops.aten


class Shifted(NamedTuple):
    """An activation as the passes read it: `values` = x - `pivot`, in float32 or wider; `pivot` None stands for 0."""

    values: Tensor
    pivot: Tensor | None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which one activation of `dtype` is processed: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """View v (C) so that it broadcasts over x (N, C, ...)."""
    return v.view(1, -1, *[1] * (x.dim() - 2))


def shift(x: Tensor, pivot: Tensor | None) -> Shifted:
    """X - pivot, without a copy where there is nothing to subtract and nothing to convert."""
    dtype = compute_dtype(x.dtype)
    if pivot is None:
        return Shifted(x.to(dtype), None)
    return Shifted(torch.sub(x, per_channel(pivot, x)), pivot)


def dense(x: Tensor) -> Tensor:
    """X itself where it is laid out as planes (contiguous) or rows (channels-last), else a contiguous copy."""
    return x if x.is_contiguous() or _is_rows(x) else x.contiguous()


def input_sums(x: Tensor) -> tuple[Tensor, Shifted]:
    """First pass of the forward: local sums for the message.

    Args:
        x: (N, C, ...), dense, floating point; N may be 0.

    Returns:
        sums (2, C) float64, the rows sum x and sum x^2; and x as it was read, for `normalize`.
    """
    if x.numel() == 0:
        return x.new_zeros(2, x.shape[1], dtype=torch.float64), Shifted(x.to(compute_dtype(x.dtype)), None)
    if x.device.type == "cpu" and x.dtype == compute_dtype(x.dtype):
        sums = _sums_of_products(x, x, None)
        if x.dtype == torch.float64 or not _cancels(sums, x.numel() // x.shape[1]):
            return sums, Shifted(x, None)
    shifted = shift(x, pivot(x))
    sums = _sums_of_products(shifted.values, shifted.values, None)
    return _to_origin(sums, shifted.pivot, x.numel() // x.shape[1]), shifted


def composed_sums(z: Tensor, pivot: Tensor | None) -> Tensor:
    """`input_sums` as differentiable operators: [sum x (C), sum x^2 (C), M] in float64, from z = x - pivot."""
    dims = [d for d in range(z.dim()) if d != 1]
    sums = torch.stack([z.sum(dims), z.square().sum(dims)]).double()
    count = z.numel() // z.shape[1]
    return torch.cat([_to_origin(sums, pivot, count).view(-1), sums.new_full((1,), count)])


def normalize(
    shifted: Shifted,
    mean: Tensor,
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
        mean: (C) float64.
        var: (C) float64, biased.
        eps: added to var.
        weight: (C) or None.
        bias: (C) or None.
        in_place: overwrite `shifted.values`.

    Returns:
        y in the dtype and layout of `shifted.values`.
    """
    values = shifted.values
    if values.numel() == 0:
        return values
    centre = mean if shifted.pivot is None else mean - shifted.pivot
    return _affine(values, centre, var, eps, weight, bias, in_place)


def gradient_sums(dy: Tensor, x: Tensor, pivot: Tensor | None, mean: Tensor) -> Tensor:
    """First pass of the backward: (2, C) float64, the rows sum dy and sum dy * (x - mean).

    Args:
        dy: like x, in x's layout.
        x: (N, C, ...), dense.
        pivot: (C) as in the forward, or None.
        mean: (C) float64.
    """
    if x.numel() == 0:
        return x.new_zeros(2, x.shape[1], dtype=torch.float64)
    shifted = shift(x, pivot)
    centre = mean if pivot is None else mean - pivot
    centre_rounded = centre.to(shifted.values.dtype)
    sums = _sums_of_products(dy.to(shifted.values.dtype), shifted.values, centre_rounded)
    sums[1].addcmul_(sums[0], centre_rounded - centre)  # what rounding the centre left out
    return sums


def input_gradient(
    dy: Tensor, x: Tensor, pivot: Tensor | None, mean: Tensor, scale: Tensor, mean_dy: Tensor, slope: Tensor
) -> Tensor:
    """Second pass of the backward: dx = scale * (dy - mean_dy - slope * (x - mean)).

    Args:
        dy: like x, in x's layout.
        x: (N, C, ...), dense.
        pivot: (C) as in the forward, or None.
        mean: (C) float64.
        scale: (C) float64, weight / sqrt(var + eps).
        mean_dy: (C) float64, the global mean of dy.
        slope: (C) float64, the global mean of dy * (x - mean), over var + eps.
    """
    if x.numel() == 0:
        return torch.zeros_like(x)
    shifted = shift(x, pivot)
    centre = mean if pivot is None else mean - pivot
    dtype = shifted.values.dtype
    own = pivot is not None or dtype != x.dtype  # the values are ours to overwrite
    unit = torch.ones_like(centre)
    dx = _affine(shifted.values, centre, unit, 0.0, -scale * slope, -scale * mean_dy, own)
    return dx.addcmul_(dy.to(dtype), per_channel(scale.to(dtype), x)).to(x.dtype)


def _affine(
    values: Tensor,
    centre: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    in_place: bool,
) -> Tensor:
    """(values - centre) / sqrt(var + eps) * weight + bias, in one pass (ATen's inference batch norm)."""
    dtype = values.dtype
    rows = None if values.is_contiguous() else _rows(values)
    flat = values.unsqueeze(-1) if values.dim() == 2 else values
    if rows is not None:  # as (1, C, M, 1) channels-last, for which ATen has a kernel at any rank of tensor
        flat = rows.view(1, rows.shape[0], 1, rows.shape[1]).permute(0, 3, 1, 2)
    out = flat if in_place else torch.empty_like(flat)
    unused = values.new_empty(0)
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
    if rows is not None:
        channels_last_shape = (values.shape[0], *values.shape[2:], values.shape[1])
        return out.permute(0, 2, 3, 1).view(channels_last_shape).movedim(-1, 1)
    return out.view(values.shape)


def _is_rows(x: Tensor) -> bool:
    return x.dim() > 2 and x.movedim(1, -1).is_contiguous()


def _rows(x: Tensor) -> Tensor | None:
    """The (M, C) matrix that a channels-last or two-dimensional x is in memory, or None for planes."""
    if x.dim() == 2:
        return x if x.is_contiguous() else None
    last = x.movedim(1, -1)
    return last.view(-1, x.shape[1]) if last.is_contiguous() else None


def pivot(x: Tensor) -> Tensor:
    """(C) a value near each channel's mean: the average of a few samples at the middle position."""
    few = x[:16]
    for _ in range(x.dim() - 2):
        few = few.select(2, few.shape[2] // 2)
    return few.mean(0, dtype=compute_dtype(x.dtype))


def _cancels(sums: Tensor, count: int) -> bool:
    """Whether in some channel mean^2 exceeds 4 variances, so that float32 sums about 0 lose digits."""
    square_of_mean = (sums[0] / count).square_()
    return bool((sums[1] / count < square_of_mean * 1.25).any())


def _to_origin(sums: Tensor, pivot: Tensor | None, count: int) -> Tensor:
    """Sums about a pivot -> sums about 0: sum x = s1 + n p; sum x^2 = s2 + 2 p s1 + n p^2, in float64."""
    if pivot is None:
        return sums
    p = pivot.double()
    s1 = sums[0] + count * p
    s2 = sums[1] + p * (sums[0] + s1)
    return torch.stack([s1, s2])


def _sums_of_products(a: Tensor, x: Tensor, centre: Tensor | None) -> Tensor:
    """(2, C) float64: sum a and sum a * (x - centre), for a and x dense and of one layout and dtype."""
    if x.device.type != "cpu":
        dims = [d for d in range(x.dim()) if d != 1]
        product = a * x if centre is None else a * (x - per_channel(centre, x))
        return torch.stack([a.sum(dims, dtype=torch.float64), product.sum(dims, dtype=torch.float64)])
    a_rows, x_rows = (None, None) if x.dim() > 2 and x.is_contiguous() else (_rows(a), _rows(x))
    if x_rows is not None and a_rows is not None:
        return _fold_rows(a_rows, x_rows, centre)
    return _fold_planes(a, x, centre)


def _fold_rows(a: Tensor, x: Tensor, centre: Tensor | None) -> Tensor:
    """`_sums_of_products` of (M, C) matrices, read as (M/k, k*C)."""
    M, C = x.shape
    k = max(1, M // _ROWS_PER_SUM)
    whole = M // k * k
    sums = _reduce(a[:whole].view(-1, k * C), x[:whole].view(-1, k * C), centre, repeat=(k,))
    sums = sums.view(2, k, C).sum(1, dtype=torch.float64)
    if whole < M:
        rest_a, rest_x = a[whole:].double(), x[whole:].double()
        sums[0] += rest_a.sum(0)
        sums[1] += (rest_a * (rest_x if centre is None else rest_x - centre)).sum(0)
    return sums


def _fold_planes(a: Tensor, x: Tensor, centre: Tensor | None) -> Tensor:
    """`_sums_of_products` of contiguous (N, C, ...), its planes cut into pieces where they are long."""
    N, C = x.shape[:2]
    area, k = x[0, 0].numel(), 1
    while area // k > _PLANE_PER_SUM and area % (2 * k) == 0:
        k *= 2
    pieces = (N, C * k, area // k)
    repeated = None if centre is None else centre.repeat_interleave(k)
    return _reduce(a.view(pieces), x.view(pieces), repeated).view(2, C, k).sum(2, dtype=torch.float64)


def _reduce(a: Tensor, x: Tensor, centre: Tensor | None, repeat: tuple[int, ...] = ()) -> Tensor:
    """(2, C): sum a and sum a * (x - centre) per channel, by the reduction inside ATen's batch norm backward."""
    C = x.shape[1]
    if centre is None:
        centre = x.new_zeros(C)
    elif repeat:
        centre = centre.repeat(repeat)
    unit = x.new_ones(C)
    _, dot, total = _aten.native_batch_norm_backward(
        a, x, None, None, None, centre, unit, True, 0.0, [False, True, True]
    )
    return torch.stack([total, dot])
