"""What one rank computes on one activation: a few passes over it, no collective and no module.

This is the one dispatch point: `native` where it was built and takes the tensor, else ATen's operators, on any device.
x is (N, C, ...), floating point, and dense: planes or rows in memory (see `dense`). dy and residual are like it, in
its layout. Sums and moments are float64.
"""

from types import ModuleType

from torch import Tensor

from syncbn.ops import aten, native
from syncbn.ops.aten import Sums, about_origin, composed_sums, moments_of, pivot
from syncbn.ops.common import Affine, Gradient, Running, at_least_one, compute_dtype, dense, per_channel

__all__ = [
    "Affine",
    "Gradient",
    "Running",
    "Sums",
    "about_origin",
    "at_least_one",
    "before_relu",
    "composed_sums",
    "compute_dtype",
    "dense",
    "gradient",
    "input_gradient",
    "input_sums",
    "moments",
    "moments_of",
    "normalize",
    "per_channel",
    "pivot",
    "update_running",
]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C) of this rank's x; zeros for an empty one."""
    return _passes(x).moments(x)


def input_sums(x: Tensor) -> Tensor:
    """This rank's part of the forward message: [sum x (C), sum x^2 (C)]."""
    return _passes(x).input_sums(x)


def normalize(x: Tensor, affine: Affine, residual: Tensor | None = None) -> Tensor:
    """Apply the map, with the residual added before the ReLU; like x."""
    return _passes(x).normalize(x, affine, residual)


def before_relu(dy: Tensor, x: Tensor, affine: Affine) -> tuple[Tensor, Affine]:
    """Dy and the map as the two passes of the backward shall read them.

    Their ReLU's mask is computed again from x: in them where they can, else here, in a pass of its own.
    """
    return (dy, affine) if native.takes(x) else aten.before_relu(dy, x, affine)


def gradient(dy: Tensor, x: Tensor, affine: Affine) -> Gradient:
    """First pass of the backward: this rank's part of its message, and of the parameters' gradients."""
    return _passes(x).gradient(dy, x, affine)


def input_gradient(dy: Tensor, x: Tensor, affine: Affine, sums: Tensor, M: float | Tensor) -> Tensor:
    """Second pass of the backward: scale * (dy - sum dy / M - (x - mean) / (var + eps) * sum dy (x - mean) / M).

    scale is weight / sqrt(var + eps).

    Args:
        dy: gradient of y.
        x: input of the forward.
        affine: the map.
        sums: those of `gradient`, over all ranks.
        M: elements per channel over all ranks, 1 or more.

    Returns:
        Like x.
    """
    return _passes(x).input_gradient(dy, x, affine, sums, M)


def update_running(running: Running, mean: Tensor, var: Tensor, M: float | Tensor) -> None:
    """One step of the moving averages towards mean and M / (M - 1) * var; none where M is 0."""
    alike = running.mean.dtype == running.var.dtype and running.mean.is_contiguous() and running.var.is_contiguous()
    (native if alike and native.takes(running.mean) else aten).update_running(running, mean, var, M)


def _passes(x: Tensor) -> ModuleType:
    return native if native.takes(x) else aten
