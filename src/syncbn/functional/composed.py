"""The normalization as plain differentiable operators around a differentiable all-reduce.

For second derivatives, torch.func, forward-mode AD, torch.export, and subclasses of tensors that see every operator.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn import ops
from syncbn.collectives.traced import all_reduce_differentiable
from syncbn.functional.exchange import batches_of
from syncbn.functional.norm import Norm, Route, Statistics, id_of_widths, refuse_single_value


def composed(norms: Sequence[Norm], route: Route | None) -> tuple[list[Tensor], list[Statistics]]:
    """The same normalisation as differentiable operators, over a group or, with no route, alone."""
    inputs = [norm.tensors.x for norm in norms]
    shifted = [_shifted(x) for x in inputs]
    sums = [ops.composed_sums(s.values) for s in shifted]
    counts = [x.numel() // x.shape[1] for x in inputs]
    if route is None:
        for M, x in zip(counts, inputs, strict=True):
            refuse_single_value(M, x.shape, P=1)
        statistics = [
            Statistics(*ops.moments_of(s, z.pivot, M), M) for s, z, M in zip(sums, shifted, counts, strict=True)
        ]
    else:
        sums = [ops.about_origin(s, z.pivot, M) for s, z, M in zip(sums, shifted, counts, strict=True)]
        channels = [x.shape[1] for x in inputs]
        id = id_of_widths(channels)
        message = ops.message_of([t for s in sums for t in s], counts, (id, id**2))
        totals = all_reduce_differentiable(message, route.group, id)
        batches = batches_of(totals, None, channels)
        statistics = [_statistics(batch, x, route) for batch, x in zip(batches, inputs, strict=True)]
    outputs = [_normalize(n, z, s.mean, s.var) for n, z, s in zip(norms, shifted, statistics, strict=True)]
    return outputs, statistics


def _statistics(batch: ops.BatchSums, x: Tensor, route: Route) -> Statistics:
    """From sums over all ranks; NaN of a single value where its number cannot be read."""
    # var = E[x^2] - E[x]^2, which float64 can afford
    mean, var = ops.moments_of(ops.Sums(*batch.sums.chunk(2)), None, batch.M)
    if isinstance(batch.M, Tensor):
        mean = torch.where(batch.M == 1, float("nan"), mean)
    else:
        refuse_single_value(batch.M, x.shape, route.group.size())
    return Statistics(mean, var, batch.M)


class _Shifted(NamedTuple):
    """values = x - pivot in the compute dtype; pivot (C), None for 0."""

    values: Tensor
    pivot: Tensor | None


def _shifted(x: Tensor) -> _Shifted:
    z = x.to(ops.compute_dtype(x.dtype))
    if x.numel() == 0:
        return _Shifted(z, None)
    pivot = ops.pivot(x.detach())
    return _Shifted(z - ops.per_channel(pivot, x), pivot)


def _normalize(norm: Norm, shifted: _Shifted, mean: Tensor, var: Tensor) -> Tensor:
    (x, weight, bias, residual), settings = norm
    z, pivot = shifted
    scale = ops.beside((var + settings.eps).rsqrt(), z)
    if weight is not None:
        scale = scale * weight
    centre = ops.beside(mean if pivot is None else mean - ops.as_statistic(pivot), z)
    y = (z - ops.per_channel(centre.to(z.dtype), z)) * ops.per_channel(scale.to(z.dtype), z)
    if bias is not None:
        y = y + ops.per_channel(bias.to(z.dtype), z)
    if residual is not None:
        y = y + residual
    if settings.activation == "relu":
        y = y.relu()
    return y.to(x.dtype)
