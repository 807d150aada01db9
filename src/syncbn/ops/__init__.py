"""What one rank computes on one activation: a few passes over it, no collective and no module.

This is the one dispatch point: GPU kernels (`triton_passes`) or compiled code (`native`) where these are at hand and
take the tensor, else ATen's operators: `aten`, or `aten32` on devices without float64.
x is (N, C, ...), floating point, and dense: planes or rows in memory (see `dense`); or a `Span` of such a tensor, where
`reads_spans` allows it. The residual is like it, in its layout; dy as `upstream_gradient` returns it. Sums and moments
are float64, on the device of x or, where that has none, on the host (`statistics_device`).
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from syncbn.ops import aten, aten32, native, triton_passes
from syncbn.ops.aten import Sums, about_origin, composed_sums, moments_of, pivot
from syncbn.ops.common import (
    Affine,
    BatchSums,
    Gradient,
    Map,
    Normalized,
    Running,
    Signature,
    Span,
    Upstream,
    are_batched,
    as_statistic,
    as_stored,
    at_least_one,
    beside,
    compute_dtype,
    copy_like,
    dense,
    has_float64,
    has_memory,
    have_memory,
    in_rows,
    need_operators,
    per_channel,
    statistics_device,
    step_of,
)

__all__ = [
    "Affine",
    "BatchSums",
    "Gradient",
    "Map",
    "Normalized",
    "Running",
    "Signature",
    "Span",
    "Sums",
    "Upstream",
    "about_origin",
    "are_batched",
    "as_statistic",
    "as_stored",
    "at_least_one",
    "backward_sums",
    "before_relu",
    "beside",
    "composed_sums",
    "compute_dtype",
    "copy_like",
    "dense",
    "forward_message",
    "gradient",
    "has_float64",
    "has_memory",
    "input_gradient",
    "input_sums",
    "message_of",
    "moments",
    "moments_of",
    "need_operators",
    "normalize",
    "normalize_batch",
    "per_channel",
    "pivot",
    "prepare",
    "reads_spans",
    "statistics_device",
    "update_running",
    "upstream_gradient",
]


def message_of(sums: Sequence[Tensor], counts: Sequence[int], signature: tuple[int, int]) -> Tensor:
    """One flat float64 message: sums, counts, id and its square."""
    numbers, device = (*counts, *signature), sums[0].device
    if device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.cat([*sums, torch.tensor(numbers, dtype=torch.float64, device=device)])
    # Elsewhere a tensor of numbers would be copied from the host, which stalls the device and rules out CUDA graphs.
    return torch.cat([*sums, *(torch.full((1,), n, dtype=torch.float64, device=device) for n in numbers)])


def prepare(device: torch.device) -> None:
    """Be ready to run where torch.compile replays CUDA graphs, before it makes the first."""
    triton_passes.prepare(device)


def forward_message(inputs: Sequence[Tensor], signature: tuple[int, int]) -> Tensor:
    """This rank's forward message: [sum x (C), sum x^2 (C)] of each input, M of each, and the signature (2)."""
    if _all_on_gpu(inputs):
        return triton_passes.forward_message(inputs, signature)
    return message_of([input_sums(x) for x in inputs], [x.numel() // x.shape[1] for x in inputs], signature)


def normalize_batch(
    x: Tensor, batch: BatchSums | None, map: Map, residual: Tensor | None = None, running: Running | None = None
) -> Normalized:
    """Normalise by the sums over all ranks, and take a step of the moving averages.

    Args:
        x: (N, C, ...).
        batch: the sums; None for those of x alone.
        map: what to apply besides.
        residual: like x, added before the ReLU.
        running: to be updated in place.
    """
    passes = _passes(x)
    if passes is triton_passes and (running is None or _passes_update(running)):
        return triton_passes.normalize_batch(x, batch, map, residual, running)
    if batch is None:
        M: float | Tensor = x.numel() // x.shape[1]
        mean, var = passes.moments(x)
    else:
        M = batch.M
        sums = batch.sums if batch.signature is None else batch.signature.poisoned(batch.sums)
        mean, var = moments_of(Sums(*sums.chunk(2)), None, M)
    y = passes.normalize(x, map.at(mean, var), residual)
    if running is not None:
        update_running(running, mean, var, M)
    return Normalized(y, mean, var)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C) of this rank's x; zeros for an empty one."""
    return _passes(x).moments(x)


def input_sums(x: Tensor) -> Tensor:
    """This rank's part of the forward message: [sum x (C), sum x^2 (C)]."""
    return _passes(x).input_sums(x)


def normalize(x: Tensor, affine: Affine, residual: Tensor | None = None) -> Tensor:
    """Apply the map, with the residual added before the ReLU; like x."""
    return _passes(x).normalize(x, affine, residual)


def reads_spans(x: Tensor) -> bool:
    """Whether the passes take the `Span`s of x, dense; elsewhere layers side by side are faster taken as one.

    The same on all ranks that have devices of one kind: it decides what their messages look like.
    """
    return triton_passes.takes(x)


def upstream_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """Dy as the passes over x can read it: like x in memory and dtype, or channels cut out of such a wider tensor."""
    if dy.dtype == x.dtype and as_stored(dy):
        if dy.stride() == x.stride():
            return dy
        passes = _passes(x)
        # Rows on a CPU are copied: to read them twice with gaps between them takes longer.
        reads_parts = passes is triton_passes or (passes is native and not in_rows(x))
        if reads_parts and step_of(dy, x) is not None:
            return dy
    return copy_like(x, dy)


def before_relu(dy: Tensor, x: Tensor, affine: Affine) -> tuple[Tensor, Affine]:
    """Dy and the map as the two passes of the backward shall read them.

    Their ReLU's mask is computed again from x: in them where they can, else here, in a pass of its own.
    """
    passes = _passes(x)
    return (dy, affine) if passes in _COMPILED else passes.before_relu(dy, x, affine)


def backward_sums(
    upstream: Sequence[Upstream], signature: tuple[int, int] | None
) -> tuple[list[tuple[Upstream, Gradient]], Tensor]:
    """First pass of the backward, of several normalisations.

    Args:
        upstream: of each.
        signature: the last two numbers of the message; None for no message.

    Returns:
        For each, what the second pass reads, whose dy is cut by the ReLU where y was given, and its gradient. With a
        message, whose answer comes when others may have changed the parameters, the maps hold copies of these.
        This rank's backward message: [sum dy (C), sum dy * (x - mean) (C)] of each, and the signature (2).
    """
    if _all_on_gpu([one.x for one in upstream]):
        return triton_passes.backward_sums(upstream, signature)
    found = []
    for dy, x, affine, y in upstream:
        if y is not None:
            dy = torch.ops.aten.threshold_backward(dy, y, 0)
        passes = _passes(x)
        if passes not in _COMPILED:
            dy, affine = passes.before_relu(dy, x, affine)
        gradient = passes.gradient(dy, x, affine)
        found.append((Upstream(dy, x, affine if signature is None else affine.copied(), None), gradient))
    sums = [gradient.sums for _, gradient in found]
    if signature is None:
        return found, sums[0] if len(sums) == 1 else torch.cat(sums)
    return found, message_of(sums, (), signature)


def gradient(dy: Tensor, x: Tensor, affine: Affine) -> Gradient:
    """First pass of the backward: this rank's part of its message, and of the parameters' gradients."""
    return _passes(x).gradient(dy, x, affine)


def input_gradient(
    dy: Tensor,
    x: Tensor,
    affine: Affine,
    sums: Tensor,
    M: float | Tensor,
    signature: Signature | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """Second pass of the backward: scale * (dy - sum dy / M - (x - mean) / (var + eps) * sum dy (x - mean) / M).

    scale is weight / sqrt(var + eps).

    Args:
        dy: gradient of y.
        x: input of the forward.
        affine: the map.
        sums: those of `gradient`, over all ranks.
        M: elements per channel over all ranks.
        signature: of the message that held the sums, where that has not been checked.
        into: where to write it, for an x that is a `Span`'s; in the strides of x.

    Returns:
        Like x; NaN where the ranks' signatures disagree.
    """
    passes = _passes(x)
    if passes is triton_passes:
        return triton_passes.input_gradient(dy, x, affine, sums, M, signature, into)
    assert into is None, "only these passes read spans"
    if signature is not None:
        sums = signature.poisoned(sums)
    return passes.input_gradient(dy, x, affine, sums, at_least_one(M))


def update_running(running: Running, mean: Tensor, var: Tensor, M: float | Tensor) -> None:
    """One step of the moving averages towards mean and M / (M - 1) * var; none where M is 0."""
    passes = _passes(running.mean) if _passes_update(running) and have_memory((mean, var)) else aten
    passes.update_running(running, mean, var, M)


def _passes_update(running: Running) -> bool:
    """Whether moving averages lie in memory as compiled code takes them."""
    if torch.compiler.is_compiling():  # nothing has memory yet
        return False
    mean, var, steps, _ = running
    if not have_memory((var, steps)) or mean.dtype != var.dtype:
        return False
    if steps is not None and (steps.dtype != torch.int64 or steps.numel() != 1 or steps.device != mean.device):
        return False
    return mean.is_contiguous() and var.is_contiguous() and as_stored(mean) and as_stored(var)


_COMPILED = (native, triton_passes)  # which compute a ReLU's mask again in passes that they make anyway


def _passes(x: Tensor) -> ModuleType:
    if native.takes(x):
        return native
    if triton_passes.takes(x):
        return triton_passes
    return aten if has_float64(x.device) else aten32


def _all_on_gpu(tensors: Sequence[Tensor]) -> bool:
    return all(triton_passes.takes(x) for x in tensors)
