"""The passes, compiled and as ATen's operators, against the float64 reference."""

import os
import subprocess
import sys

import pytest
import torch
from norm_problems import assert_near, laid_out, limits_of_float32_sums, problem

import syncbn
from exactness import TOLERANCE
from syncbn import ops
from syncbn.ops import aten, aten32, native, reference

PASSES = [
    pytest.param(aten, id="aten"),
    pytest.param(aten32, id="aten32"),
    pytest.param(native, id="native", marks=pytest.mark.skipif(not native._functions, reason="not built: no compiler")),
]
SHAPES = [(3, 5), (70, 16), (4, 3, 7), (2, 64, 5, 5), (5, 7, 1, 1), (3, 1, 9, 9), (2, 3, 4, 5, 6), (6, 33, 30, 31)]
FLOAT32 = TOLERANCE[torch.float32]


def limits_of(passes, x, *more):
    """By name. Compiled passes sum in float64 whatever the input, others in float32 but for float64."""
    if passes is not native and x.dtype != torch.float64:
        return limits_of_float32_sums(x, *more)
    return {"mean": 1e-12, "var": 1e-12, "sums": 1e-12, "dweight": FLOAT32, "dbias": FLOAT32}


@pytest.mark.parametrize("rows", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
def test_passes_are_those_of_the_reference(passes, dtype, shape, rows, relu):
    if passes is aten32 and dtype == torch.float64:
        pytest.skip("which these passes are for the lack of")
    x, dy, _, weight, bias = problem(shape, dtype, rows)
    activation = "relu" if relu else None
    limits = limits_of(passes, x, dy, weight, bias, activation)
    y, mean, var = reference.batch_norm(x, weight, bias, activation=activation)
    found_mean, found_var = passes.moments(x)
    assert_near(found_mean, mean, limits["mean"])
    assert_near(found_var, var, limits["var"])
    M = x.numel() // shape[1]
    sums = passes.input_sums(x)
    assert sums.dtype == torch.float64
    assert_near(sums, torch.cat([mean * M, (var + mean.square()) * M]), limits["sums"])

    affine = ops.Affine(mean, var, 1e-5, weight, bias, relu)
    found = passes.normalize(x, affine, None)
    assert found.dtype == dtype
    assert found.stride() == x.stride()
    assert_near(found, y, TOLERANCE[dtype])

    if passes is not native:
        dy, affine = passes.before_relu(dy, x, affine)
    expected = reference.batch_norm_gradients(dy, x, weight, bias, activation=activation)
    sums, dweight, dbias = passes.gradient(dy, x, affine)
    assert_near(dweight, expected.gamma, limits["dweight"])
    assert_near(dbias, expected.beta, limits["dbias"])
    dx = passes.input_gradient(dy, x, affine, sums, M)
    assert dx.dtype == dtype
    assert dx.stride() == x.stride()
    assert_near(dx, expected.x, TOLERANCE[dtype])


def wider(dy, rows, before, after):
    """A tensor like dy, and equal to it, cut out of one with more channels."""
    parts = [torch.randn(dy.shape[0], n, *dy.shape[2:]).to(dy.dtype) for n in (before, after)]
    return laid_out(torch.cat([parts[0], dy, parts[1]], dim=1), rows)[:, before : before + dy.shape[1]]


@pytest.mark.skipif(not native._functions, reason="not built: no compiler")
@pytest.mark.parametrize("shape", [*SHAPES, (2, 1, 3, 4), (1, 5, 4, 4), (3, 4, 1, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_of_a_wider_gradient_are_read_where_they_lie(dtype, shape):
    x, dy, _, weight, bias = problem(shape, dtype, False)
    affine = ops.Affine(*native.moments(x), 1e-5, weight, bias, True)
    part = wider(dy, False, before=2, after=3)
    assert (ops.upstream_gradient(part, x) is part) == (x[0, 0].numel() > 1)
    part = ops.upstream_gradient(part, x)
    expected, found = (native.gradient(g, x, affine) for g in (dy, part))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    M = x.numel() // shape[1]
    assert torch.equal(*(native.input_gradient(g, x, affine, expected.sums, M) for g in (dy, part)))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.ones((), dtype=x.dtype).expand(x.shape),
        lambda x: torch.randn(x.shape[0], x.shape[1], x.shape[3], x.shape[2]).transpose(2, 3),
        lambda x: torch.randn(*x.shape[:3], 2 * x.shape[3])[..., ::2],
        lambda x: torch.randn(x.shape[0], 2 * x.shape[1], *x.shape[2:])[:, ::2],
        lambda x: torch.randn(*x.shape[:2], 2 * x.shape[2], x.shape[3])[:, :, 1 : 1 + x.shape[2]],
        lambda x: torch.randn(x.shape, dtype=torch.float64),
        lambda x: torch.randn(1, *x.shape[1:]).expand(x.shape),
    ],
    ids=["one number", "turned", "every second column", "every second channel", "rows cut out", "float64", "repeated"],
)
@pytest.mark.parametrize("rows", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 1, 5, 6), (3, 4, 1, 1)], ids=str)
def test_a_gradient_that_lies_in_memory_in_another_way(shape, rows, make):
    """The same numbers as of its copy."""
    x, *_ = problem(shape, torch.float32, rows)
    dy = make(x)
    layer = syncbn.SyncBatchNorm(shape[1], activation="relu")
    found, expected = (
        torch.autograd.grad(layer(leaf), leaf, gradient)
        for leaf, gradient in ((x.requires_grad_(), dy), (x, torch.empty_like(x).copy_(dy)))
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(4, 3, 6, 6).contiguous(memory_format=torch.channels_last)[2][None],
        torch.randn(1, 6).t(),
        torch.randn(1, 6, 1).transpose(0, 1),
        torch.randn(1, 6, 3).permute(1, 2, 0),
    ],
    ids=["one of several images", "one channel", "one channel, one position", "one position"],
)
def test_strides_where_there_is_nothing_to_step_over(x):
    layer, residual = syncbn.SyncBatchNorm(x.shape[1], activation="relu"), torch.randn(x.shape)
    found, expected = (
        torch.autograd.grad(layer(leaf, residual).square().sum(), [leaf, layer.weight])
        for leaf in (
            x.detach().requires_grad_(),
            x.detach().clone(memory_format=torch.contiguous_format).requires_grad_(),
        )
    )
    for a, b in zip(found, expected, strict=True):
        assert_near(a, b.double(), FLOAT32)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("rows", [False, True], ids=["planes", "rows"])
def test_a_residual_enters_before_the_relu(passes, rows):
    x, _, residual, weight, bias = problem((4, 6, 5, 5), torch.float32, rows)
    y, mean, var = reference.batch_norm(x, weight, bias, residual=residual, activation="relu")
    assert_near(passes.normalize(x, ops.Affine(mean, var, 1e-5, weight, bias, True), residual), y, FLOAT32)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("mean", [1e3, -1e4])
@pytest.mark.parametrize("rows", [False, True], ids=["planes", "rows"])
def test_a_mean_far_from_zero_costs_no_digits(passes, mean, rows):
    x, dy, _, weight, bias = problem((16, 5, 12, 12), torch.float32, rows)
    limits = limits_of(passes, x, dy, weight, bias)
    x, *_ = problem((16, 5, 12, 12), torch.float32, rows, mean=mean)
    y, _, var = reference.batch_norm(x, weight, bias)
    found_mean, found_var = passes.moments(x)
    assert_near(found_var, var, limits["var"])
    affine = ops.Affine(found_mean, found_var, 1e-5, weight, bias, False)
    assert_near(passes.normalize(x, affine, None), y, FLOAT32)
    expected = reference.batch_norm_gradients(dy, x, weight, bias)
    sums, dweight, _ = passes.gradient(dy, x, affine)
    assert_near(dweight, expected.gamma, limits["dweight"])
    assert_near(passes.input_gradient(dy, x, affine, sums, x.numel() // 5), expected.x, FLOAT32)


@pytest.mark.parametrize("passes", PASSES)
def test_not_a_number_stays_one(passes):
    x = torch.tensor([[1.0, 2.0], [float("nan"), 3.0], [4.0, 5.0]])
    affine = ops.Affine(*torch.zeros(2, 2, dtype=torch.float64), 1.0, None, None, True)
    y = passes.normalize(x, affine, None)
    assert y[1, 0].isnan()
    assert y.isfinite().sum() == 5


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)], ids=str)
def test_parameters_of_other_dtypes(passes, dtypes):
    x, dy, _, weight, bias = problem((4, 6, 5, 5), torch.float32, False)
    weight, bias = weight.to(dtypes[0]), bias.to(dtypes[1])
    y, mean, var = reference.batch_norm(x, weight, bias)
    affine = ops.Affine(mean, var, 1e-5, weight, bias, False)
    assert_near(passes.normalize(x, affine, None), y, FLOAT32)
    _, dweight, dbias = passes.gradient(dy, x, affine)
    assert (dweight.dtype, dbias.dtype) == dtypes
    expected = reference.batch_norm_gradients(dy, x, weight, bias)
    assert_near(dweight, expected.gamma, TOLERANCE[dtypes[0]])
    assert_near(dbias, expected.beta, TOLERANCE[dtypes[1]])


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_moving_averages(passes, momentum, dtype):
    running = ops.Running(torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype), torch.tensor(0), momentum)
    values = torch.arange(1.0, 4.0, dtype=torch.float64)
    passes.update_running(running, values, values, 5.0)
    passes.update_running(running, values, values, 0.0)  # an empty batch
    passes.update_running(running, 2 * values, values, 3.0)
    assert running.steps == 2
    if momentum is None:
        mean, var = 1.5 * values, (1.25 + 1.5) / 2 * values
    else:
        mean = 0.9 * 0.1 * values + 0.1 * 2 * values
        var = 0.9 * (0.9 + 0.1 * 1.25 * values) + 0.1 * 1.5 * values
    assert_near(running.mean, mean, TOLERANCE[dtype])
    assert_near(running.var, var, TOLERANCE[dtype])
    assert running.mean._version > 0, "autograd must see that a buffer changed"


@pytest.mark.skipif(not native._functions, reason="not built: no compiler")
def test_sums_do_not_depend_on_the_number_of_threads():
    x = torch.randn(16, 24, 28, 28)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found += [ops.input_sums(laid_out(x, rows)) for rows in (False, True)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[i], found[i % 2]) for i in range(6))


def test_without_the_compiled_passes_atens_are_used():
    code = "import torch; from syncbn.ops import native; assert not native.takes(torch.ones(2, 2))"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "SYNCBN_NATIVE": "0"}, timeout=60)


@pytest.mark.skipif(not native._functions, reason="not built: no compiler")
def test_tensors_without_memory_are_left_to_aten():
    assert native.takes(torch.ones(2, 2))
    assert not native.takes(torch.ones(2, 2, device="meta"))
    assert not native.takes(torch.ones(2, 2, dtype=torch.int64))
    with torch._subclasses.fake_tensor.FakeTensorMode():
        assert not native.takes(torch.ones(2, 2))


@pytest.mark.parametrize("wrong", ["x", "dy"])
def test_a_tensor_that_is_negated_when_read(wrong):
    x, dy = torch.randn(4, 3, 5, dtype=torch.float64), torch.randn(4, 3, 5, dtype=torch.float64)
    x, dy = (torch._neg_view(t) if name == wrong else t for name, t in (("x", x), ("dy", dy)))
    layer, plain = syncbn.SyncBatchNorm(3).double(), torch.nn.BatchNorm1d(3).double()
    gradients = []
    for norm in (layer, plain):
        leaf = x.detach().requires_grad_()
        y = norm(leaf)
        gradients.append((y, *torch.autograd.grad(y, (leaf, norm.weight), dy)))
    for found, expected in zip(*gradients, strict=True):
        assert_near(found, expected.double(), 1e-12)


def test_running_statistics_in_float64_are_not_rounded_to_float32():
    """M is a tensor where the host does not look at it: on a GPU, and in a graph of torch.compile."""
    mean, var = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    running = ops.Running(torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64), None, 0.1)
    aten.update_running(running, mean, var, torch.tensor(7.0, dtype=torch.float64))
    torch.testing.assert_close(running.mean, 0.1 * mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(running.var, 0.9 + 0.1 * var * (7 / 6), rtol=1e-12, atol=0)
