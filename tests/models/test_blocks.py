"""The blocks of the models by themselves: padding and pooling."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrizations, prune

from syncbn.models.blocks import Conv2dSame, PoolBranch, SeparableConv2d, max_pool_halving, same_padding
from syncbn.models.observation import observe_outputs


def images(n=2, size=32, channels=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, channels, size, size, generator=generator, dtype=dtype)


def slow_pad(x, kernel, stride, padding, value):
    """Pad as the variant's convolutions do, written from TensorFlow's documentation of SAME."""
    if padding == "symmetric":
        return F.pad(x, (kernel // 2,) * 4, value=value)
    pads = []
    for size in (x.shape[3], x.shape[2]):
        total = max(kernel - stride, 0) if size % stride == 0 else max(kernel - size % stride, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pads"),
    [
        (224, 7, 2, (2, 3)),
        (28, 3, 2, (0, 1)),
        (7, 3, 2, (1, 1)),
        (15, 7, 2, (3, 3)),
        (28, 3, 1, (1, 1)),
        (1, 1, 2, (0, 0)),
    ],
)
def test_same_padding(size, kernel, stride, pads):
    assert same_padding(size, kernel, stride) == pads


@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (3, 2)])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 8), (11, 14)])
def test_same_convolution(kernel, stride, height, width):
    """Output (i, j) is the sum over the window that begins at stride * i - pad_before, zeros outside."""
    conv = Conv2dSame(1, 1, kernel, stride, bias=False).double()
    x = torch.randn(1, 1, height, width, dtype=torch.float64)
    expected = torch.zeros(1, 1, math.ceil(height / stride), math.ceil(width / stride), dtype=torch.float64)
    top = max((math.ceil(height / stride) - 1) * stride + kernel - height, 0) // 2
    left = max((math.ceil(width / stride) - 1) * stride + kernel - width, 0) // 2
    for i in range(expected.shape[2]):
        for j in range(expected.shape[3]):
            for u in range(kernel):
                for v in range(kernel):
                    row, column = stride * i - top + u, stride * j - left + v
                    if 0 <= row < height and 0 <= column < width:
                        expected[0, 0, i, j] += conv.weight[0, 0, u, v].detach() * x[0, 0, row, column]
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize("size", range(3, 12))
def test_halving_pool(size):
    x = images(1, size) - 5  # negative: padding with zeros would show
    same = F.max_pool2d(slow_pad(x, 3, 2, "same", -math.inf), 3, 2)
    torch.testing.assert_close(max_pool_halving(x, odd_padding=True), same)
    torch.testing.assert_close(max_pool_halving(x, odd_padding=False), F.max_pool2d(x, 3, 2, ceil_mode=True))


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_separable_convolution_as_one(padding, bias):
    """Output and gradients are those of the two convolutions, though neither is called."""
    conv = SeparableConv2d(3, 10, 7, 2, depth_multiplier=8, padding=padding, bias=bias).double()
    x = images(size=19, dtype=torch.float64).requires_grad_()
    leaves = [x, *conv.parameters()]
    expected = conv(x)
    dy = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, leaves, dy)
    conv.depthwise.register_forward_pre_hook(lambda *_: pytest.fail("called"))
    found = conv.as_one(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, leaves, dy), gradients)


def test_when_a_separable_convolution_may_run_as_one():
    """In training, unless somebody looks at its parts or changes them."""
    plain, observed, pruned, parametrised = (
        SeparableConv2d(3, 8, 7, 2, depth_multiplier=8, padding="same", bias=True) for _ in range(4)
    )
    assert plain.may_run_as_one()
    assert not plain.eval().may_run_as_one()
    observe_outputs(observed.depthwise, lambda y: None)
    prune.identity(pruned.pointwise, "weight")
    parametrizations.weight_norm(parametrised.depthwise)
    assert not any(conv.may_run_as_one() for conv in (observed, pruned, parametrised))
    x = images(size=16)
    assert torch.equal(pruned(x), pruned.pointwise(pruned.depthwise(x)))


def test_the_weight_of_a_separable_convolution_is_rounded_once_under_autocast():
    conv = SeparableConv2d(3, 8, 7, 2, depth_multiplier=8, padding="symmetric", bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv.dense_weight().dtype == torch.float32
        assert conv.as_one(images(size=16)).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("stride", [1, 2])
def test_torch_fx_and_torch_jit_trace_a_max_pool(stride):
    pool = PoolBranch("max", stride, None, "symmetric")
    x = images(size=9)
    assert torch.equal(torch.fx.symbolic_trace(pool)(x), pool(x))
    assert torch.equal(torch.jit.trace(pool, x, check_trace=False)(x), pool(x))
