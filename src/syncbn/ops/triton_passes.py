"""The passes as GPU kernels (triton_kernels.py), over float64, float32, bfloat16 and float16.

They need Triton, which torch brings along where it supports CUDA, and a GPU of compute capability 8.0 (A100) or above;
elsewhere `aten` does the same, slower. The environment variable SYNCBN_TRITON=0 leaves them unused.

A forward is two kernels, a backward too, each one pass over memory; nothing here makes the host wait for the device.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from syncbn.ops.aten import Sums, moments_of
from syncbn.ops.common import (
    Affine,
    BatchSums,
    Gradient,
    Map,
    Normalized,
    Running,
    Signature,
    Upstream,
    address,
    as_stored,
    compute_dtype,
    has_memory,
    in_rows,
    is_rows,
    step_of,
    stored,
)
from syncbn.ops.triton_plan import COUNTERS, KernelPlan, aligned_to, plan_of

_KNOWN = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
_STREAMS = 64  # that get counters at once
_NO_PLACE = -1


def takes(x: Tensor) -> bool:
    """Whether these passes can process x."""
    return x.is_cuda and x.dtype in _KNOWN and has_memory(x) and as_stored(x) and _usable(x.device)


@cache
def _usable(device: torch.device) -> bool:
    wanted = os.environ.get("SYNCBN_TRITON", "1") != "0" and torch.version.cuda is not None
    return wanted and find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def prepare(device: torch.device) -> None:
    """Take the memory that kernels keep now, so that it does not come out of what a CUDA graph has to itself."""
    if device.type == "cuda" and _usable(device):
        _counters(device, torch.cuda.current_stream(device).cuda_stream)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `ops.moments`."""
    return moments_of(Sums(*input_sums(x).chunk(2)), None, x.numel() // x.shape[1])


def input_sums(x: Tensor) -> Tensor:
    """As `ops.input_sums`."""
    sums = x.new_empty(2 * x.shape[1], dtype=torch.float64)
    _launch_input_sums(x, sums, 0, _NO_PLACE, _NO_PLACE)
    return sums


def forward_message(inputs: Sequence[Tensor], signature: tuple[int, int]) -> Tensor:
    """As `ops.forward_message`."""
    channels = 2 * sum(x.shape[1] for x in inputs)
    message = inputs[0].new_empty(channels + len(inputs) + len(signature), dtype=torch.float64)
    at = 0
    for i, x in enumerate(inputs):
        _launch_input_sums(x, message, at, channels + i, signature[0] if i == 0 else _NO_PLACE)
        at += 2 * x.shape[1]
    return message


def normalize(x: Tensor, affine: Affine, residual: Tensor | None) -> Tensor:
    """As `ops.normalize`."""
    y = _dense_like(x)
    mean, var = stored(affine.mean), stored(affine.var)
    map = Map(affine.eps, affine.weight, affine.bias, affine.relu)
    _launch_normalize(x, y, mean, var, None, map, residual, None)
    return y


def normalize_batch(
    x: Tensor, batch: BatchSums | None, map: Map, residual: Tensor | None, running: Running | None
) -> Normalized:
    """As `ops.normalize_batch`."""
    if batch is None:
        batch = BatchSums(input_sums(x), x.numel() // x.shape[1], None)
    y = _dense_like(x)
    mean, var = x.new_empty((2, x.shape[1]), dtype=torch.float64).unbind()
    folded = running is not None and running.momentum is not None
    _launch_normalize(x, y, mean, var, batch, map, residual, running if folded else None)
    if running is not None and not folded:
        update_running(running, mean, var, batch.M)
    return Normalized(y, mean, var)


def gradient(dy: Tensor, x: Tensor, affine: Affine) -> Gradient:
    """As `ops.gradient`."""
    sums = x.new_empty(2 * x.shape[1], dtype=torch.float64)
    return _launch_gradient(Upstream(dy, x, affine, None), sums, 0, _NO_PLACE, copies=False)[1]


def backward_sums(
    upstream: Sequence[Upstream], signature: tuple[int, int] | None
) -> tuple[list[tuple[Upstream, Gradient]], Tensor]:
    """As `ops.backward_sums`."""
    channels = 2 * sum(one.x.shape[1] for one in upstream)
    length = channels + (0 if signature is None else len(signature))
    message = upstream[0].x.new_empty(length, dtype=torch.float64)
    found, at = [], 0
    for i, one in enumerate(upstream):
        id = signature[0] if signature is not None and i == 0 else _NO_PLACE
        found.append(_launch_gradient(one, message, at, id, copies=signature is not None))
        at += 2 * one.x.shape[1]
    return found, message


def input_gradient(
    dy: Tensor,
    x: Tensor,
    affine: Affine,
    sums: Tensor,
    M: float | Tensor,
    signature: Signature | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """As `ops.input_gradient`."""
    dx = torch.empty_like(x) if into is None else into
    assert dx.stride() == x.stride()
    _check_memory(dy, x, affine.weight)
    plan, strides = _plan_beside(dy, x, 2)
    kernel = _kernels().input_gradient
    with _on(x.device):
        kernel[plan.grid](
            dy,
            x,
            dx,
            sums.contiguous(),
            *_number(M),
            *_expected(signature),
            *_parameters(affine),
            *plan.layout,
            *strides,
            plan.splits,
            RELU=affine.relu,
            COMPUTE=compute_type(x),
            DY_LIKE_X=dy.stride() == x.stride(),
            **plan.tile,
        )
    return dx


def update_running(running: Running, mean: Tensor, var: Tensor, M: float | Tensor) -> None:
    """As `ops.update_running`."""
    assert running.momentum is not None or running.steps is not None
    _check_memory(*running[:3])
    momentum = float("nan") if running.momentum is None else running.momentum
    with _on(mean.device):
        _kernels().update_running[(1,)](
            *running[:3], mean.contiguous(), var.contiguous(), *_number(M), momentum, len(mean), BLOCK_C=1024
        )
    increment_version([t for t in running[:3] if t is not None])


def _launch_input_sums(x: Tensor, message: Tensor, sums_at: int, count_at: int, id: int) -> None:
    _check_memory(x)
    plan = _plan(x, 1)
    with _on(x.device):
        _kernels().input_sums[plan.grid](
            x,
            message,
            *_workspace(x, plan),
            *plan.layout,
            plan.splits,
            sums_at,
            count_at,
            len(message),
            id,
            COMPUTE=compute_type(x),
            SPLIT=plan.splits > 1,
            **plan.tile,
        )


def _launch_normalize(
    x: Tensor,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    batch: BatchSums | None,
    map: Map,
    residual: Tensor | None,
    running: Running | None,
) -> None:
    """Mean and variance are written where there is a batch, else read."""
    plan, strides = _plan_beside(y, x, 1)
    sums, M, signature = (None, 0.0, None) if batch is None else batch
    averages = (None, None, None, 0.0) if running is None else running
    _check_memory(x, residual, map.weight, map.bias, *averages[:3])
    with _on(x.device):
        _kernels().normalize[plan.grid](
            x,
            residual,
            y,
            mean,
            var,
            sums,
            *_number(M),
            *_expected(signature),
            stored(map.weight),
            stored(map.bias),
            map.eps,
            *averages,
            *plan.layout,
            *strides,
            plan.splits,
            RELU=map.relu,
            COMPUTE=compute_type(x),
            Y_LIKE_X=y.stride() == x.stride(),
            **plan.tile,
        )
    if running is not None:
        increment_version([t for t in running[:3] if t is not None])


def _launch_gradient(one: Upstream, message: Tensor, at: int, id: int, copies: bool) -> tuple[Upstream, Gradient]:
    """What the second pass reads, whose map has copies of the parameters on demand; and the gradient."""
    dy, x, affine, y = one
    _check_memory(dy, x, affine.weight, affine.bias)
    plan, strides = _plan_beside(dy, x, 2)
    cut = None if y is None else torch.empty_like(x)
    weight, bias = _empty_like(affine.weight), _empty_like(affine.bias)
    later = affine
    if copies:
        later_bias = _empty_like(affine.bias) if affine.relu else None
        later = affine._replace(weight=_empty_like(affine.weight), bias=later_bias)
    with _on(x.device):
        _kernels().gradient[plan.grid](
            dy,
            x,
            y,
            cut,
            message,
            weight,
            bias,
            *((later.weight, later.bias) if copies else (None, None)),
            *_workspace(x, plan),
            *_parameters(affine),
            *plan.layout,
            *strides,
            plan.splits,
            at,
            len(message),
            id,
            RELU=affine.relu,
            COMPUTE=compute_type(x),
            DY_LIKE_X=dy.stride() == x.stride(),
            SPLIT=plan.splits > 1,
            **plan.tile,
        )
    sums = message[at : at + 2 * x.shape[1]]
    return Upstream(dy if cut is None else cut, x, later, None), Gradient(sums, weight, bias)


def _check_memory(*tensors: Tensor | None) -> None:
    """What a kernel reads where there is none is an error that ends the process's use of the GPU."""
    for t in tensors:
        address(t)


def _kernels() -> Any:
    return import_module("syncbn.ops.triton_kernels")  # imports Triton, which `import syncbn` must not


def _plan(x: Tensor, tensors: int) -> KernelPlan:
    """Of a pass that reads so many tensors like x. Both passes of a direction have the same.

    So the second finds in the cache what the first read last.
    """
    step = None if x.is_contiguous() or is_rows(x) else step_of(x, x)
    return plan_of(x.shape, not in_rows(x), x.element_size(), tensors, _multiprocessors(x.device), step)


def _plan_beside(other: Tensor, x: Tensor, tensors: int) -> tuple[KernelPlan, tuple[int, int]]:
    """The plan of a pass over x and `other`, and outer and inner stride of that one: see triton_parts.py."""
    plan = _plan(x, tensors)
    if other.stride() == x.stride():
        return plan, (plan.layout[3], plan.layout[5])
    step = step_of(other, x)
    assert step is not None, "ops.upstream_gradient and _dense_like see to it"
    if in_rows(x):
        return plan, (0, step)
    return aligned_to(plan, step), (step, 1)


def _dense_like(x: Tensor) -> Tensor:
    """Fresh memory like x, also where that has gaps: in planes or rows without."""
    if x.is_contiguous() or is_rows(x):
        return torch.empty_like(x)
    if not in_rows(x):
        return x.new_empty(x.shape)
    steps, step = [], x.shape[1]
    for size in reversed(x.shape[2:]):
        steps.append(step)
        step *= size
    # No view of other memory: what autograd returns is to be a tensor by itself.
    return x.new_empty_strided(x.shape, (step, 1, *reversed(steps)))


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":  # in tests, where Triton's interpreter runs one program after the other
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def compute_type(x: Tensor) -> Any:
    """`compute_dtype` of x, as Triton names it."""
    language = import_module("triton.language")
    return language.float64 if compute_dtype(x.dtype) == torch.float64 else language.float32


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels start on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _number(M: float | Tensor) -> tuple[Tensor | None, float]:
    return (M, 0.0) if isinstance(M, Tensor) else (None, float(M))


def _expected(signature: Signature | None) -> tuple[Tensor | None, float, float]:
    return (None, 0.0, 0.0) if signature is None else (signature.found, *signature.expected)


def _parameters(affine: Affine) -> tuple[Tensor | float | None, ...]:
    mean, var, eps, weight, bias, _ = affine
    return stored(mean), stored(var), stored(weight), stored(bias), eps


def _empty_like(v: Tensor | None) -> Tensor | None:
    return None if v is None else torch.empty_like(v).contiguous()


def _workspace(x: Tensor, plan: KernelPlan) -> tuple[Tensor | None, Tensor | None]:
    """Where programs leave their sums, and counters of those that did; none where nothing is split."""
    if plan.splits == 1:
        return None, None
    partials = x.new_empty(plan.splits * 2 * x.shape[1], dtype=torch.float64)
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    return partials, _counters(x.device, stream)


@cache
def _counters(device: torch.device, stream: int) -> Tensor:
    """Zeros (COUNTERS), which every kernel leaves as it found them; a stream's kernels run one after the other.

    They come from a block made before, so that a stream on which a graph is being captured gets zeros as well. Graphs
    captured on one stream share them, and must not be replayed at the same time.
    """
    block, taken = _blocks.setdefault(device, (torch.empty(0), 0))
    if taken == len(block):
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a graph's first SyncBatchNorm kernels: run the step once before capturing it")
        block, taken = torch.zeros(_STREAMS, COUNTERS, dtype=torch.int32, device=device), 0
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # once: any stream may come to use them
    _blocks[device] = (block, taken + 1)
    return block[taken]


_blocks: dict[torch.device, tuple[Tensor, int]] = {}
