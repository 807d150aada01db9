"""Max pools to compute, and how they are compared with torch's."""

import pytest
import torch
import torch.nn.functional as F
from norm_problems import laid_out

from syncbn.ops.max_pool import max_pool2d

# Shape of the input; kernel, stride, padding, ceil_mode.
POOLS = [
    ((2, 3, 8, 10), (3, 2, 0, True)),  # Inception-BN's on even sizes: the last windows are cut short
    ((2, 3, 7, 9), (3, 2, 1, True)),  # and on odd ones
    ((1, 3, 8, 7), (3, 2, (0, 1), True)),
    ((1, 8, 7, 7), (3, 1, 1, False)),
    ((1, 70, 5, 4), (3, 2, 0, False)),
    ((3, 2, 1, 1), (3, 1, 1, False)),
    ((2, 1, 6, 5), (2, 2, 1, True)),
    ((2, 3, 9, 8), (2, (3, 4), 0, False)),  # elements that no window holds
    ((1, 3, 12, 11), (5, (2, 3), (2, 1), True)),
    ((1, 1, 16, 9), (15, 4, 7, True)),
    ((1, 2, 6, 7), (1, (1, 2), 0, False)),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
EACH_POOL = pytest.mark.parametrize(("shape", "pool"), POOLS, ids=str)
INCEPTIONS = pytest.mark.parametrize(("shape", "pool"), [POOLS[0], POOLS[3]], ids=str)


def few_numbers(shape, dtype=torch.float32, rows=False, device="cpu", seed=0):
    """Whole numbers, many of which are equal, and whose sums any dtype holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-4, 5, shape, generator=generator)
    return laid_out(x.to(device, dtype), rows)


def pooled(pool, x):
    return max_pool2d(x, *pool)


def torchs(pool, x):
    kernel, stride, padding, ceil_mode = pool
    return F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode)


def assert_same(found, expected):
    """Bit by bit, but for which NaN one is."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def check_pool(pool, x, dy=None):
    """Output and gradient are torch's, its gradient in float64 on the CPU; a NaN of x must not be in dy's way."""
    x = x.detach().requires_grad_()
    y = pooled(pool, x)
    expected = torchs(pool, x.detach().cpu())
    assert_same(y.detach().cpu(), expected)
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        assert y.stride() == torchs(pool, x.detach()).stride()
    if dy is None:
        dy = laid_out(few_numbers(y.shape, x.dtype, device=x.device, seed=1), y.stride(1) == 1)
    (dx,) = torch.autograd.grad(y, x, dy)
    wide = x.detach().cpu().double().requires_grad_()
    (true,) = torch.autograd.grad(torchs(pool, wide), wide, dy.cpu().double())
    assert_same(dx.cpu().double(), true)
    assert dx.dtype == x.dtype
    return y, dx


def with_odd_numbers(x):
    """Some NaN, some infinite: windows of several, of nothing but -inf, and of both."""
    x = x.clone(memory_format=torch.preserve_format)
    x[:, 0, 1:3, 2:4] = float("nan")
    x[:, 0, 4, ::2] = float("nan")
    x[:, 1] = -float("inf")
    x[:, 1, 3, 3] = float("nan")
    x[:, 2, :5] = -float("inf")
    x[:, 2, 2:4, 5] = float("inf")
    return x


def cut_from_a_wider_gradient(shape, dtype, rows, device="cpu"):
    """dy (N, C, H, W) that lies between other channels."""
    N, C, H, W = shape
    wide = few_numbers((N, 2 * C + 2, H, W), dtype, rows, device)
    return wide[:, C : 2 * C]
