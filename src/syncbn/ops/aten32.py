"""The local passes over one activation on devices without float64, with ATen's plain operators.

What is as large as x stays on the device, in float32. Sums (C) are taken there about a pivot near the mean, and moved
to the host: messages, means and variances are float64 there. Coefficients (C) come back in float32, of the mean a high
part, which is subtracted from x, and a low part, which goes into other coefficients. So each pass that sums waits for
the device; elsewhere none does.
"""

import torch
from torch import Tensor

from syncbn.ops.aten import Sums, about_origin, moments_of, pivot
from syncbn.ops.aten import update_running as update_running
from syncbn.ops.common import Affine, Gradient, as_statistic, beside, per_channel


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `ops.moments`."""
    return moments_of(*_sums_about_pivot(x), x.numel() // x.shape[1])


def input_sums(x: Tensor) -> Tensor:
    """As `ops.input_sums`."""
    return torch.cat(about_origin(*_sums_about_pivot(x), x.numel() // x.shape[1]))


def normalize(x: Tensor, affine: Affine, residual: Tensor | None) -> Tensor:
    """As `ops.normalize`: y = (x - high) * scale + shift."""
    high, low = _parts(affine.mean)
    scale = (affine.var + affine.eps).rsqrt()
    high, scale, shift = beside(torch.stack([high, scale, -low * scale]), x)
    if affine.weight is not None:
        scale, shift = scale * affine.weight, shift * affine.weight
    if affine.bias is not None:
        shift = shift + affine.bias
    y = _minus(x, high).mul_(per_channel(scale, x)).add_(per_channel(shift, x))
    if residual is not None:
        y.add_(residual)
    return (y.relu_() if affine.relu else y).to(x.dtype)


def before_relu(dy: Tensor, x: Tensor, affine: Affine) -> tuple[Tensor, Affine]:
    """As `ops.before_relu`."""
    if not affine.relu:
        return dy, affine
    return torch.ops.aten.threshold_backward(dy, normalize(x, affine, None), 0), affine._replace(relu=False)


def gradient(dy: Tensor, x: Tensor, affine: Affine) -> Gradient:
    """As `ops.gradient`, of a map without relu."""
    high, low = _parts(affine.mean)
    total, dot = _sums_of_products(dy.float(), _minus(x, beside(high, x)))
    dot = dot - low * total
    parameters = ((affine.weight, dot * (affine.var + affine.eps).rsqrt()), (affine.bias, total))
    weight, bias = (None if v is None else found.to(v.dtype).to(v.device) for v, found in parameters)
    return Gradient(torch.cat([total, dot]), weight, bias)


def input_gradient(dy: Tensor, x: Tensor, affine: Affine, sums: Tensor, M: float | Tensor) -> Tensor:
    """As `ops.input_gradient`, of a map without relu: dx = scale * dy + slope * (x - high) + offset."""
    (high, low), (total, dot) = _parts(affine.mean), sums.chunk(2)
    variance = affine.var + affine.eps
    scale = variance.rsqrt()
    slope = dot / variance * scale / -M
    offset = total * scale / -M - slope * low
    high, *coefficients = beside(torch.stack([high, scale, slope, offset]), x)
    if affine.weight is not None:
        coefficients = [v * affine.weight for v in coefficients]
    scale, slope, offset = (per_channel(v, x) for v in coefficients)
    return _minus(x, high).mul_(slope).add_(offset).add_(dy.float() * scale).to(x.dtype)


def _sums_about_pivot(x: Tensor) -> tuple[Sums, Tensor]:
    """Sum z and sum z^2 of z = x - pivot, and the pivot: (C), float64, on the host."""
    if x.numel() == 0:
        zero = torch.zeros(x.shape[1], dtype=torch.float64)
        return Sums(zero, zero), zero
    M, about = x.numel() // x.shape[1], pivot(x)
    sums = _sums_of_squares(x, about)
    if bool((sums.total.square() > 0.5 * M * sums.dot).any()):  # somewhere the pivot is far from the mean
        about = beside(as_statistic(about) + sums.total / M, x)
        sums = _sums_of_squares(x, about)
    return sums, as_statistic(about)


def _sums_of_squares(x: Tensor, about: Tensor) -> Sums:
    z = _minus(x, about)
    return _sums_of_products(z, z)


def _sums_of_products(a: Tensor, b: Tensor) -> Sums:
    """Sum a and sum a * b per channel, (C), float64, on the host."""
    dims = [d for d in range(a.dim()) if d != 1]
    return Sums(*as_statistic(torch.stack([a.sum(dims), (a * b).sum(dims)])))


def _parts(mean: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers, float64, whose sum is the mean, and of which float32 holds the first."""
    high = mean.float().double()
    return high, mean - high


def _minus(x: Tensor, v: Tensor) -> Tensor:
    """X - v in float32; v (C)."""
    return torch.sub(x, per_channel(v, x))
