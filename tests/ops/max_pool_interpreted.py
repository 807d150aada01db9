"""Max pooling's GPU kernels under Triton's interpreter: `test_max_pool.py` runs this file in its own process.

Fresh memory holds NaN, so that whatever a kernel leaves unwritten shows.
"""

import mmap

import pytest
import torch
from launches import Launches, passes_for_gpus
from norm_problems import ROWS, assert_near, laid_out
from pool_problems import (
    DTYPES,
    EACH_POOL,
    INCEPTIONS,
    check_pool,
    cut_from_a_wider_gradient,
    few_numbers,
    pooled,
    torchs,
    with_odd_numbers,
)
from torch import nn
from torch.autograd import forward_ad

import syncbn
from exactness import TOLERANCE
from syncbn.models.blocks import max_pool_halving
from syncbn.ops.max_pool import max_pool2d


@pytest.fixture(autouse=True)
def _kernels_take_every_tensor(fresh_memory_is_not_a_number):
    with passes_for_gpus():
        yield


@ROWS
@EACH_POOL
def test_kernels_are_torchs(shape, pool, rows):
    check_pool(pool, few_numbers(shape, rows=rows))


def test_2049_channels():
    check_pool((3, 1, 1, False), few_numbers((1, 2049, 2, 1), rows=True))


@DTYPES
@INCEPTIONS
def test_each_dtype(shape, pool, dtype):
    check_pool(pool, few_numbers(shape, dtype, rows=True))


@ROWS
@INCEPTIONS
def test_numbers_that_are_not(shape, pool, rows):
    check_pool(pool, with_odd_numbers(few_numbers(shape, rows=rows)))


def test_a_gradient_that_is_no_number_reaches_no_other_element():
    x = torch.arange(16.0).view(1, 1, 4, 4).requires_grad_()
    dy = torch.tensor([[[[float("nan"), 1.0], [1.0, float("inf")]]]])
    (dx,) = torch.autograd.grad(max_pool2d(x, 2, 2), x, dy)
    assert dx.isfinite().sum() == 14


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_gradients_are_summed_in_float32(dtype):
    """All nine windows of a pixel name it."""
    x = torch.zeros(1, 64, 7, 7, dtype=dtype)
    x[:, :, 1::3, 1::3] = 1
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    (dx,) = torch.autograd.grad(max_pool2d(x.requires_grad_(), 3, 1, 1), x, dy)
    wide = x.detach().double().requires_grad_()
    (true,) = torch.autograd.grad(torchs((3, 1, 1, False), wide), wide, dy.double())
    assert_near(dx, true, TOLERANCE[dtype])


@ROWS
@INCEPTIONS
def test_channels_of_a_wider_gradient_are_read_where_they_lie(shape, pool, rows):
    x = few_numbers(shape, rows=rows).requires_grad_()
    y = pooled(pool, x)
    dy = cut_from_a_wider_gradient(y.shape, y.dtype, rows)
    launches = Launches()
    with launches:
        torch.autograd.grad(y, x, dy)
    assert launches.take() == {"max_pool_gradient": 1}
    check_pool(pool, x, dy)


def test_other_strides():
    pool, x = (3, 2, 1, True), few_numbers((2, 3, 8, 10))
    check_pool(pool, x.transpose(2, 3))
    check_pool(pool, few_numbers((2, 20, 8, 7), rows=True)[:, 3:14, 1:])
    check_pool(pool, few_numbers((2, 4, 8, 14))[:, 1:, :, ::2])
    check_pool(pool, x, pooled(pool, x).sum().expand(torchs(pool, x).shape))  # as that of a sum


def test_a_batch_of_none():
    x = torch.empty(0, 3, 7, 7, requires_grad=True)
    y = max_pool2d(x, 3, 2, ceil_mode=True)
    assert y.shape == (0, 3, 3, 3)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize(
    ("shape", "pool"), [((2, 0, 8, 8), (3, 2, 0)), ((1, 1, 8, 8), (3, 1, 2)), ((1, 1, 2, 2), (3, 1, 0))], ids=str
)
def test_what_torch_refuses_is_refused(shape, pool):
    messages = []
    for call in (max_pool2d, torch.nn.functional.max_pool2d):
        with pytest.raises(RuntimeError) as error:
            call(torch.empty(shape), *pool)
        messages.append(str(error.value)[:20])  # how it writes a shape differs
    assert messages[0] == messages[1]


@ROWS
def test_one_kernel_each_way(rows):
    x, launches = few_numbers((2, 16, 8, 8), rows=rows).requires_grad_(), Launches()
    max_pool2d(x, 3, 2, ceil_mode=True)  # asks torch for the shape of the output, once
    with launches:
        y = max_pool2d(x, 3, 2, ceil_mode=True)
    assert launches.take() == {"max_pool": 1}
    with launches:
        torch.autograd.grad(y, x, torch.ones_like(y))
    assert launches.take() == {"ones_like": 1, "max_pool_gradient": 1}


def test_nothing_but_the_positions_is_kept():
    x = few_numbers((2, 4, 8, 8)).requires_grad_()
    (kept,) = max_pool2d(x, 3, 2).grad_fn.saved_tensors
    assert (kept.dtype, kept.shape) == (torch.uint8, (2, 4, 3, 3))
    with torch.no_grad():
        assert max_pool2d(x, 3, 2).grad_fn is None


@pytest.mark.parametrize(("pool", "rows"), [((3, 2, 1, True), True), ((3, 1, 1, False), False)], ids=str)
def test_second_derivatives(pool, rows):
    x = torch.randperm(2 * 4 * 3, generator=torch.Generator().manual_seed(0)).double().view(1, 2, 4, 3)
    x = laid_out(x, rows).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pooled(pool, x), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: pooled(pool, x).square(), x, fast_mode=True)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # of torch itself
def test_forward_mode_is_torchs():
    x, tangent = (few_numbers((2, 3, 8, 8), seed=seed) for seed in range(2))
    found = []
    for pool in (max_pool2d, torch.nn.functional.max_pool2d):
        with forward_ad.dual_level():
            y = pool(forward_ad.make_dual(x, tangent), 3, 2)
            found.append(forward_ad.unpack_dual(y).tangent)
    assert torch.equal(*found)


def test_within_recomputed_activations():
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 6, 3), syncbn.SyncBatchNorm(6, activation="relu"), nn.Conv2d(6, 4, 3)]
    images, found = torch.randn(2, 4, 12, 12), []
    for recompute in (False, True):
        x = images.clone().requires_grad_()
        with syncbn.recompute_activations(recompute):
            y = layers[2](max_pool_halving(layers[1](layers[0](x)), odd_padding=True))
        found.append(torch.autograd.grad(y.square().sum(), [x, *(p for layer in layers for p in layer.parameters())]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_addresses_have_64_bits():
    """In memory of which only the few pages are touched that are read."""
    H, W = 70000, 2**15
    memory = mmap.mmap(-1, 2 * H * W, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    numbers = torch.frombuffer(memory, dtype=torch.float16, count=H * W)
    x = numbers.view(1, 1, H, W)
    x[0, 0, H - 1, W // 2] = 3
    assert H * W - W // 2 > 2**31
    assert max_pool2d(x, 1, (H - 1, W // 2)).flatten().tolist() == [0, 0, 0, 3]

    dy = numbers.as_strided((3, 1, 2, 2), (2**30, 4, 2, 1))
    dy[2] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    x = torch.ones(3, 1, 2, 2, dtype=torch.float16, requires_grad=True)
    (dx,) = torch.autograd.grad(max_pool2d(x, 1, 1), x, dy)
    assert dx.flatten().tolist() == [0] * 8 + [1, 2, 3, 4]
