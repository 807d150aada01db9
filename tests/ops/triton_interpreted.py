"""The GPU kernels under Triton's interpreter, on a CPU: `test_triton_kernels.py` runs this file in its own process.

Fresh memory holds NaN, so that whatever a kernel leaves unwritten shows.
"""

import mmap

import pytest
import torch
from launches import passes_for_gpus
from norm_problems import ROWS, assert_near, laid_out, problem

from exactness import TOLERANCE
from syncbn import ops
from syncbn.ops import aten, reference, triton_passes
from syncbn.ops.triton_plan import KernelPlan

SHAPES = [(3, 5), (1, 3, 2, 2), (2, 70, 5, 5), (5, 7, 1, 1), (3, 1, 9, 9), (2, 3, 2, 3, 4), (3, 5, 40, 29)]
FLOAT32 = TOLERANCE[torch.float32]
pytestmark = pytest.mark.usefixtures("fresh_memory_is_not_a_number")


def step(x, dy, weight, bias, relu, residual=None):
    """The kernels' forward and backward, alone: (Normalized, Gradient, dx, dy after the ReLU)."""
    map = ops.Map(1e-5, weight, bias, relu)
    found = triton_passes.normalize_batch(x, None, map, residual, None)
    affine = map.at(found.mean, found.var)
    y = found.y if relu and residual is not None else None
    upstream = ops.Upstream(dy, x, affine._replace(relu=relu and y is None), y)
    ((one, gradient),), _ = triton_passes.backward_sums([upstream], None)
    M = x.numel() // x.shape[1]
    return found, gradient, triton_passes.input_gradient(one.dy, x, one.affine, gradient.sums, M), one.dy


@ROWS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "relu"), list(zip(TOLERANCE, [False, True, True, False], strict=True)), ids=str)
def test_kernels_are_the_reference(dtype, shape, rows, relu, many_programs):
    x, dy, _, weight, bias = problem(shape, dtype, rows)
    weight, bias = (weight.double(), bias.double()) if dtype == torch.float64 else (weight, bias)
    tolerance, activation = TOLERANCE[dtype], "relu" if relu else None
    expected = reference.batch_norm(x, weight, bias, activation=activation)
    found, gradient, dx, _ = step(x, dy, weight, bias, relu)
    wide = min(tolerance, FLOAT32)
    assert_near(found.mean, expected.mean, wide)
    assert_near(found.var, expected.var, wide)
    assert_near(found.y, expected.y, tolerance)
    assert (found.y.dtype, found.y.stride()) == (dtype, x.stride())
    true = reference.batch_norm_gradients(dy, x, weight, bias, activation=activation)
    assert_near(gradient.weight, true.gamma, wide)
    assert_near(gradient.bias, true.beta, wide)
    assert_near(dx, true.x, tolerance)
    assert (dx.dtype, dx.stride()) == (dtype, x.stride())


@ROWS
@pytest.mark.parametrize("shape", [(3, 5), (2, 70, 5, 5), (3, 5, 40, 29)], ids=str)
def test_channels_of_a_wider_gradient_are_read_where_they_lie(shape, rows, many_programs):
    x, dy, _, weight, bias = problem(shape, torch.float32, rows)
    wide = laid_out(torch.cat([dy.flip(0), dy, dy.flip(0)[:, :2]], dim=1), rows)
    part = wide[:, shape[1] : 2 * shape[1]]
    with passes_for_gpus():
        assert ops.upstream_gradient(part, x) is part
    expected, found = (step(x, g, weight, bias, True) for g in (dy, part))
    assert torch.equal(found[1].sums, expected[1].sums)
    assert torch.equal(found[2], expected[2])


@pytest.mark.parametrize("shape", [(2, 2049), (2, 257, 3, 1)], ids=str)
def test_many_channels_of_few_elements(shape):
    x, dy, _, weight, bias = problem(shape, torch.float32, rows=False)
    found, gradient, dx, _ = step(x, dy, weight, bias, False)
    assert_near(found.y, reference.batch_norm(x, weight, bias).y, FLOAT32)
    true = reference.batch_norm_gradients(dy, x, weight, bias)
    assert_near(gradient.weight, true.gamma, FLOAT32)
    assert_near(dx, true.x, FLOAT32)


def test_one_element_of_each_of_2049_channels():
    x = torch.randn(1, 2049)
    sums = triton_passes.input_sums(x)
    assert_near(sums, torch.cat([x[0], x[0].double().square()]).double(), FLOAT32)


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3, 3), (3, 4, 0, 2)], ids=str)
def test_an_empty_rank(shape):
    """It sends zeros, and learns the statistics of the others."""
    x = torch.empty(shape)
    message = triton_passes.forward_message([x], (7, 49))
    assert message.tolist() == [0.0] * 9 + [7, 49]
    sums = torch.tensor([2.0] * 4 + [10.0] * 4, dtype=torch.float64)
    running = ops.Running(torch.zeros(4), torch.ones(4), torch.tensor(0), 0.5)
    batch = ops.BatchSums(sums, torch.tensor(2.0, dtype=torch.float64), None)
    found = triton_passes.normalize_batch(x, batch, ops.Map(1e-5, None, None, True), None, running)
    assert found.y.shape == x.shape
    assert found.mean.tolist() == [1.0] * 4
    assert found.var.tolist() == [4.0] * 4
    assert running.mean.tolist() == [0.5] * 4
    assert running.var.tolist() == [4.5] * 4
    affine = ops.Affine(found.mean, found.var, 1e-5, None, None, True)
    found, backward = triton_passes.backward_sums([ops.Upstream(x, x, affine, None)], (3, 9))
    assert backward.tolist() == [0.0] * 8 + [3, 9]
    assert triton_passes.input_gradient(x, x, affine, backward[:8], batch.M).shape == x.shape


@ROWS
@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_a_mean_far_from_zero_costs_no_digits(mean, rows, many_programs):
    x, dy, _, weight, bias = problem((8, 5, 24, 24), torch.float32, rows, mean=mean, std=3)
    y, _, var = reference.batch_norm(x, weight, bias)
    found, gradient, dx, _ = step(x, dy, weight, bias, False)
    assert_near(found.var, var, FLOAT32)
    assert_near(found.y, y, FLOAT32)
    true = reference.batch_norm_gradients(dy, x, weight, bias)
    assert_near(gradient.weight, true.gamma, FLOAT32)
    assert_near(dx, true.x, FLOAT32)


@ROWS
@pytest.mark.parametrize("place", [0, 777])
def test_an_element_far_from_all_others_costs_no_digits(place, rows, many_programs):
    x, *_ = problem((4, 2, 30, 30), torch.float32, rows)
    x[place // 200, :, place % 30, place % 7] = 1e5
    _, mean, var = reference.batch_norm(x)
    found = triton_passes.normalize_batch(x, None, ops.Map(1e-5, None, None, False), None, None)
    assert_near(found.mean, mean, FLOAT32)
    assert_near(found.var, var, FLOAT32)


@ROWS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_residual_enters_before_the_relu(dtype, rows, many_programs):
    x, dy, residual, weight, bias = problem((4, 6, 12, 11), dtype, rows)
    y, *_ = reference.batch_norm(x, weight, bias, residual=residual, activation="relu")
    found, gradient, dx, cut = step(x, dy, weight, bias, True, residual)
    assert_near(found.y, y, TOLERANCE[dtype])
    true = reference.batch_norm_gradients(dy, x, weight, bias, residual=residual, activation="relu")
    assert_near(cut, true.residual, TOLERANCE[dtype])
    assert_near(gradient.weight, true.gamma, FLOAT32)
    assert_near(dx, true.x, TOLERANCE[dtype])


@ROWS
def test_low_precision_errs_at_most_twice_as_much_as_torch(rows, many_programs):
    """bfloat16 on a GPU only (test_triton_gpu.py): the interpreter cuts its digits off instead of rounding."""
    dtype = torch.float16
    x, dy, _, weight, bias = problem((6, 9, 11, 13), dtype, rows)
    weight, bias = weight.float(), bias.float()
    found, gradient, dx, _ = step(x, dy, weight, bias, True)
    leaf, w, b = (t.clone().requires_grad_() for t in (x, weight, bias))
    y = torch.nn.functional.batch_norm(leaf, None, None, w, b, training=True).relu()
    torchs = (y, *torch.autograd.grad(y, (leaf, w, b), dy))
    true = reference.batch_norm_gradients(dy, x, weight, bias, activation="relu")
    truth = (reference.batch_norm(x, weight, bias, activation="relu").y, *true[:3])
    for ours, theirs, expected in zip((found.y, dx, gradient.weight, gradient.bias), torchs, truth, strict=True):
        error, allowed = ((t.double() - expected).abs().max() for t in (ours, theirs))
        assert error <= 2 * allowed + FLOAT32 * expected.abs().max()


@ROWS
def test_the_same_bits_every_time(rows, many_programs):
    x, dy, _, weight, bias = problem((4, 70, 15, 15), torch.float32, rows)
    assert triton_passes._plan(x, 1).splits > 1
    first, again = (step(x, dy, weight, bias, True) for _ in range(2))
    for a, b in zip((*first[0], *first[1], first[2]), (*again[0], *again[1], again[2]), strict=True):
        assert torch.equal(a, b)
    assert not triton_passes._counters(x.device, 0).any(), "a kernel must leave its counters as it found them"


def test_kernels_and_atens_passes_find_the_same_gradients(many_programs):
    x, dy, _, weight, bias = problem((3, 6, 11, 9), torch.float32, True)
    found, gradient, dx, _ = step(x, dy, weight, bias, True)
    affine = ops.Affine(found.mean, found.var, 1e-5, weight, bias, True)
    cut, affine = aten.before_relu(dy, x, affine)
    theirs = aten.gradient(cut, x, affine)
    for ours, other in zip(gradient, theirs, strict=True):
        assert_near(ours, other.double(), FLOAT32)
    assert_near(dx, aten.input_gradient(cut, x, affine, theirs.sums, x.numel() // 6).double(), FLOAT32)


def test_not_a_number_stays_one():
    x = torch.tensor([[1.0, 2.0], [float("nan"), 3.0], [4.0, 5.0]])
    y = triton_passes.normalize(x, ops.Affine(*torch.zeros(2, 2, dtype=torch.float64), 1.0, None, None, True), None)
    assert y[1, 0].isnan()
    assert y.isfinite().sum() == 5


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)], ids=str)
def test_parameters_of_other_dtypes(dtypes):
    x, dy, _, weight, bias = problem((4, 6, 5, 5), torch.float32, False)
    weight, bias = weight.to(dtypes[0]), bias.to(dtypes[1])
    found, gradient, _, _ = step(x, dy, weight, bias, False)
    assert_near(found.y, reference.batch_norm(x, weight, bias).y, FLOAT32)
    assert (gradient.weight.dtype, gradient.bias.dtype) == dtypes
    true = reference.batch_norm_gradients(dy, x, weight, bias)
    assert_near(gradient.weight, true.gamma, TOLERANCE[dtypes[0]])
    assert_near(gradient.bias, true.beta, TOLERANCE[dtypes[1]])


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_moving_averages(momentum, dtype):
    """In the pass that normalises, and in a kernel of their own."""
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)) + 1
    _, mean, var = reference.batch_norm(x)
    found = [
        ops.Running(torch.zeros(5, dtype=dtype), torch.ones(5, dtype=dtype), torch.tensor(0), momentum)
        for _ in range(2)
    ]
    for _ in range(2):
        triton_passes.normalize_batch(x, None, ops.Map(1e-5, None, None, False), None, found[0])
        triton_passes.update_running(found[1], mean, var, torch.tensor(12.0, dtype=torch.float64))
        triton_passes.update_running(found[1], mean, var, 0.0)  # an empty batch
    true_mean, true_var = torch.zeros(1), torch.ones(1)
    for factor in (momentum or 1, momentum or 1 / 2):
        true_mean, true_var = reference.running_statistics(mean, var, 12, true_mean, true_var, factor)
    for running in found:
        assert running.steps == 2
        assert_near(running.mean, true_mean, FLOAT32)
        assert_near(running.var, true_var, FLOAT32)
        assert running.mean._version > 0, "autograd must see that a buffer changed"


@pytest.mark.parametrize("wrong", ["id", "square", "one element"])
def test_what_may_not_be_used_turns_into_nan(wrong):
    """Where the ranks disagree, or a channel has one element in all; the moving averages stay."""
    x = torch.randn(2, 3, 2)
    numbers = torch.tensor([6.0, 20.0], dtype=torch.float64)
    expected = {"id": (4.0, 20.0), "square": (6.0, 18.0)}.get(wrong, (6.0, 20.0))
    M = torch.tensor(1.0 if wrong == "one element" else 4.0, dtype=torch.float64)
    signature = ops.Signature(numbers, expected)
    running = ops.Running(torch.zeros(3), torch.ones(3), torch.tensor(0), 0.1)
    batch = ops.BatchSums(triton_passes.input_sums(x), M, signature)
    found = triton_passes.normalize_batch(x, batch, ops.Map(1e-5, None, None, True), None, running)
    assert found.y.isnan().all()
    assert found.mean.isnan().all()
    assert (running.mean.tolist(), running.var.tolist(), running.steps) == ([0.0] * 3, [1.0] * 3, 0)
    affine = ops.Affine(torch.zeros(3).double(), torch.ones(3).double(), 1e-5, None, None, False)
    dx = triton_passes.input_gradient(x, x, affine, batch.sums, M, signature)
    assert dx.isnan().all() == (wrong != "one element")


def test_addresses_have_64_bits(monkeypatch):
    """Two images that lie 2^31 + 64 elements apart; the memory between them is never touched."""
    C, S, apart = 3, 8, 2**31 + 64
    memory = mmap.mmap(-1, 2 * (apart + C * S), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    near, far = (torch.frombuffer(memory, dtype=torch.float16, count=C * S, offset=2 * o) for o in (0, apart))
    generator = torch.Generator().manual_seed(0)
    for part in (near, far):
        part.copy_(torch.randn(C * S, generator=generator))
    x = torch.stack([near, far]).view(2, C, S)
    tile = {"BLOCK_C": 4, "BLOCK_I": 8, "ALIGNED": 8, "ONE_BLOCK": False, "STAGES": 2}
    plan = KernelPlan((C, 2, S, apart, S, 1), (1, 2), tile)
    monkeypatch.setattr(triton_passes, "_plan", lambda x, tensors: plan)
    near = near.view(1, C, S)
    assert_near(
        triton_passes.input_sums(near), torch.cat([x.double().sum((0, 2)), x.double().square().sum((0, 2))]), FLOAT32
    )
    statistics = torch.zeros(C, dtype=torch.float64), torch.ones(C, dtype=torch.float64)
    map = ops.Map(1e-5, None, torch.ones(C), False)
    triton_passes._launch_normalize(near, near, *statistics, None, map, None, None)
    assert_near(far.view(C, S), x[1].double() + 1, TOLERANCE[torch.float16])
    gradient = triton_passes.gradient(near, near, map.at(*statistics))
    assert_near(gradient.bias, (x.double() + 1).sum((0, 2)), TOLERANCE[torch.float16])
