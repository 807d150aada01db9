"""Max pooling of (N, C, H, W): on NVIDIA GPUs as kernels of its own (triton_pool_kernels.py), else as torch's.

torch's CUDA kernels keep the place of each maximum in 8 bytes, and their backward adds with atomics: its bits depend on
who comes first. Here a place takes one byte, and the backward, a sum in a fixed order, gives the same bits every time.
"""

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from math import gcd
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.autograd import forward_ad

from syncbn.ops import triton_passes
from syncbn.ops.common import as_stored
from syncbn.ops.triton_plan import WIDEST_LOAD, tile_of

LARGEST_KERNEL = 15  # whose 225 positions one byte can tell apart
MOST_UNROLLED = 3  # steps of a loop
MOST_ALIGNED = 16  # elements
MOST_WARPS = 4


class PoolWindow(NamedTuple):
    """A square kernel and how it moves; stride and padding of rows and columns. As F.max_pool2d's arguments."""

    kernel: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    ceil_mode: bool


def max_pool2d(
    input: Tensor,
    kernel_size: int,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
) -> Tensor:
    """`F.max_pool2d` with a square kernel.

    Args:
        input: (N, C, H, W), floating point, any strides.
        kernel_size: side of the kernel.
        stride: of rows and columns.
        padding: of rows and columns, on both sides, at most half the kernel; never the maximum.
        ceil_mode: whether windows may be cut short at the end.

    Returns:
        (N, C, OH, OW), channels-last where the input is.

    Raises:
        RuntimeError: what F.max_pool2d refuses.
    """
    if not _takes(input, kernel_size):
        return F.max_pool2d(input, kernel_size, stride, padding, ceil_mode=ceil_mode)
    window = PoolWindow(kernel_size, _pair(stride), _pair(padding), ceil_mode)
    if torch.is_grad_enabled() and input.requires_grad:
        return _MaxPool.apply(input, window)
    return _pooled(input, window, with_positions=False)[0]


def _takes(x: Tensor, kernel_size: int) -> bool:
    if isinstance(x, fx.Proxy) or torch.jit.is_tracing():
        return False
    if not (triton_passes.takes(x) and x.dim() == 4 and 1 <= kernel_size <= LARGEST_KERNEL):
        return False
    return forward_ad._current_level < 0  # forward-mode AD needs torch's operator


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


class _MaxPool(torch.autograd.Function):
    """Keeps nothing but the positions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: PoolWindow) -> Tensor:
        y, positions = _pooled(x, window, with_positions=True)
        ctx.save_for_backward(positions)
        ctx.window, ctx.shape, ctx.rows = window, x.shape, _rows(x)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _Gradient.apply(dy, *ctx.saved_tensors, ctx.window, ctx.shape, ctx.rows), None


class _Gradient(torch.autograd.Function):
    """dx from dy, to which it is linear: its own backward picks the elements to which this one adds."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, positions: Tensor, window: PoolWindow, shape: torch.Size, rows: bool) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.window, ctx.width = window, shape[3]
        return _input_gradient(dy, positions, window, shape, rows)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> Any:
        (positions,) = ctx.saved_tensors
        places = _places(positions, ctx.window, ctx.width)
        ddy = ddx.flatten(2).gather(2, places.flatten(2)).view(positions.shape)
        return ddy, None, None, None, None


def _places(positions: Tensor, window: PoolWindow, width: int) -> Tensor:
    """The element h * width + w of the input that each position names, int64 (N, C, OH, OW)."""
    kernel, (stride_h, stride_w), (padding_h, padding_w), _ = window
    OH, OW = positions.shape[2:]
    top = torch.arange(OH, device=positions.device).view(-1, 1) * stride_h - padding_h
    left = torch.arange(OW, device=positions.device) * stride_w - padding_w
    position = positions.long()
    return (top + position // kernel) * width + left + position % kernel


def _pooled(x: Tensor, window: PoolWindow, with_positions: bool) -> tuple[Tensor, Tensor | None]:
    if 1 not in (x.stride(1), x.stride(3)):
        x = x.contiguous()
    y = _empty(_output_shape(x.shape, window), x, _rows(x))
    positions = torch.empty_like(y, dtype=torch.uint8) if with_positions else None
    _launch("max_pool", (x, y, positions), (x, y), window, x.shape, y.shape, pixels=y.shape[2:])
    return y, positions


def _rows(x: Tensor) -> bool:
    """Whether the channels lie side by side."""
    return x.stride(1) == 1 and not x.is_contiguous()


def _empty(shape: Sequence[int], like: Tensor, rows: bool) -> Tensor:
    format = torch.channels_last if rows else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=format)


@lru_cache(maxsize=4096)
def _output_shape(shape: torch.Size, window: PoolWindow) -> torch.Size:
    """As torch has it, which also refuses what it refuses."""
    kernel, stride, padding, ceil_mode = window
    return F.max_pool2d(torch.empty(shape, device="meta"), kernel, stride, padding, ceil_mode=ceil_mode).shape


def _input_gradient(dy: Tensor, positions: Tensor, window: PoolWindow, shape: torch.Size, rows: bool) -> Tensor:
    if dy.stride(1 if rows else 3) != 1 or not as_stored(
        dy
    ):  # channels cut out of a wider gradient are read where they lie
        dy = torch.empty_like(positions, dtype=dy.dtype).copy_(dy)
    dx = _empty(shape, dy, rows)
    patches = [-(-size // step) for size, step in zip(shape[2:], window.stride, strict=True)]
    tensors = (dy, positions, dx)
    _launch("max_pool_gradient", tensors, tensors, window, shape, positions.shape, pixels=patches)
    return dx


def _launch(
    kernel: str,
    tensors: Sequence[Tensor | None],
    strided: Sequence[Tensor],
    window: PoolWindow,
    shape: torch.Size,
    out_shape: torch.Size,
    pixels: Sequence[int],
) -> None:
    """Start programs for so many pixels (rows, columns) of each image of x (shape) or of y (out_shape)."""
    N, C = shape[:2]
    if N == 0:
        return
    first = strided[0]
    tile = _tile(C, pixels[0] * pixels[1], first.element_size(), _alignment(C, strided))
    channel_blocks, pixel_blocks = -(-C // tile["BLOCK_C"]), -(-pixels[0] * pixels[1] // tile["BLOCK_P"])
    with torch.cuda.device_of(first):  # kernels start on the current device
        getattr(_kernels(), kernel)[(N * channel_blocks * pixel_blocks,)](
            *tensors,
            C,
            *shape[2:],
            *out_shape[2:],
            channel_blocks,
            pixel_blocks,
            *(stride for t in strided for stride in t.stride()),
            KERNEL=window.kernel,
            STRIDE_H=window.stride[0],
            STRIDE_W=window.stride[1],
            PADDING_H=window.padding[0],
            PADDING_W=window.padding[1],
            COMPUTE=triton_passes.compute_type(first),
            UNROLL=max(window.kernel, *window.stride) <= MOST_UNROLLED,
            **tile,
        )


def _kernels() -> Any:
    return import_module("syncbn.ops.triton_pool_kernels")  # imports Triton, which `import syncbn` must not


def _alignment(C: int, strided: Sequence[Tensor]) -> int:
    """Of how many elements, at most 16, C and all other strides are multiples; 0 where channels do not lie together."""
    if any(t.stride(1) != 1 for t in strided):
        return 0
    return gcd(MOST_ALIGNED, C, *(t.stride(d) for t in strided for d in (0, 2, 3) if t.shape[d] > 1))


def _tile(C: int, pixels: int, element_size: int, alignment: int) -> dict[str, int]:
    """One load of the widest for each thread of four warps, or less where there is no more."""
    elements = 32 * MOST_WARPS * WIDEST_LOAD // element_size
    block_c, block_p = tile_of(C, pixels, rows=alignment > 0, elements=elements)
    warps = max(1, MOST_WARPS * block_c * block_p // elements)
    return {"BLOCK_C": block_c, "BLOCK_P": block_p, "ALIGNED": max(1, alignment), "num_warps": warps}
