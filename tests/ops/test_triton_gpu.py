"""The kernels on a GPU, against the float64 reference, cuDNN and ATen; skipped where there is none."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from norm_problems import ROWS, assert_near, laid_out, problem
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

import syncbn
from syncbn import ops
from syncbn.collectives import reduction as distributed
from syncbn.ops import aten, reference, triton_passes
from syncbn.ops.max_pool import max_pool2d

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SHAPES = [
    (3, 5),
    (2, 2049),
    (70000, 3),
    (5, 7, 1, 1),
    (2, 70, 5, 5),
    (9, 33, 31, 29),
    (8, 1024, 7, 7),
    (32, 64, 56, 56),
    (64, 64, 57, 57),  # many tiles a program, of which the last is not full
    (256, 64, 14, 14),
    (2, 6, 300, 301),
    (2, 3, 4, 5, 6),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def _fresh_memory_is_not_a_number():
    torch.use_deterministic_algorithms(True)  # under which torch fills it
    yield
    torch.use_deterministic_algorithms(False)


@contextmanager
def no_host_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def nccl(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def group_of_one(nccl, monkeypatch):
    """An NCCL group of this process alone, over which layers synchronise all the same."""
    monkeypatch.setattr(distributed, "active_group", lambda group: dist.group.WORLD)


def step(layer, x, dy, residual=None):
    """Forward and backward: (y, dx, dweight, dbias[, residual's gradient]); nothing keeps the autograd graph.

    It would tie x to the stream of this step, of which autograd warns in a step on another.
    """
    y = layer(x) if residual is None else layer(x, residual)
    leaves = [x, layer.weight, layer.bias, *([] if residual is None else [residual])]
    return (y.detach(), *torch.autograd.grad(y, leaves, dy))


def layer_with(weight, bias, **arguments):
    layer = syncbn.SyncBatchNorm(len(weight), device="cuda", **arguments)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


@ROWS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_the_layer_is_the_reference(dtype, shape, rows, activation):
    x, dy, _, weight, bias = problem(shape, dtype, rows, device="cuda")
    weight, bias = (weight.double(), bias.double()) if dtype == torch.float64 else (weight, bias)
    layer = layer_with(weight, bias, activation=activation, dtype=weight.dtype)
    assert triton_passes.takes(x)
    y, dx, dweight, dbias = step(layer, x.requires_grad_(), dy)
    expected = reference.batch_norm(x.detach(), weight, bias, activation=activation)
    true = reference.batch_norm_gradients(dy, x.detach(), weight, bias, activation=activation)
    tolerance = TOLERANCE[dtype]
    wide = min(tolerance, 2e-6)
    M = x.numel() // shape[1]
    assert (y.dtype, y.stride()) == (dtype, x.stride())
    assert_near(y, expected.y, tolerance if M > 2 else 1e2 * tolerance)
    assert_near(dweight, true.gamma, 5 * wide)
    assert_near(dbias, true.beta, 5 * wide)
    if M > 2:  # else dx is the small rest of what cancels
        assert_near(dx, true.x, 3 * tolerance)
    running_mean, running_var = reference.running_statistics(
        expected.mean, expected.var, M, torch.zeros_like(expected.mean), torch.ones_like(expected.var), 0.1
    )
    assert_near(layer.running_mean, running_mean, 2e-6)
    assert_near(layer.running_var, running_var, 2e-6)
    assert layer.num_batches_tracked == 1


@ROWS
@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_a_mean_far_from_zero_costs_no_digits(mean, rows):
    x, dy, _, weight, bias = problem((32, 5, 56, 56), torch.float32, rows, mean=mean, std=3, device="cuda")
    y, dx, dweight, _ = step(layer_with(weight, bias), x.requires_grad_(), dy)
    true = reference.batch_norm_gradients(dy, x.detach(), weight, bias)
    assert_near(y, reference.batch_norm(x.detach(), weight, bias).y, 2e-6)
    assert_near(dweight, true.gamma, 1e-5)
    assert_near(dx, true.x, 5e-6)


@ROWS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_errs_at_most_twice_as_much_as_torch(dtype, rows):
    x, dy, _, weight, bias = problem((16, 48, 28, 28), dtype, rows, device="cuda")
    ours = step(layer_with(weight, bias, activation="relu"), x.requires_grad_(), dy)
    w, b = (t.clone().requires_grad_() for t in (weight, bias))
    y = nn.functional.batch_norm(x, None, None, w, b, training=True).relu()
    torchs = (y, *torch.autograd.grad(y, (x, w, b), dy))
    x = x.detach()
    true = reference.batch_norm_gradients(dy, x, weight, bias, activation="relu")
    truth = (reference.batch_norm(x, weight, bias, activation="relu").y, *true[:3])
    for found, theirs, expected in zip(ours, torchs, truth, strict=True):
        error, allowed = ((t.double() - expected).abs().max() for t in (found, theirs))
        assert error <= 2 * allowed + 1e-6 * expected.abs().max()


@ROWS
def test_a_residual_enters_before_the_relu(rows):
    x, dy, residual, weight, bias = problem((8, 96, 28, 28), torch.bfloat16, rows, device="cuda")
    layer = layer_with(weight, bias, activation="relu")
    y, dx, dweight, _, dresidual = step(layer, x.requires_grad_(), dy, residual.requires_grad_())
    x, residual = x.detach(), residual.detach()
    assert_near(y, reference.batch_norm(x, weight, bias, residual=residual, activation="relu").y, 8e-3)
    # The mask is that of the rounded output: a few elements next to 0 may differ.
    true = reference.batch_norm_gradients(dy * (y > 0), x, weight, bias)
    assert torch.equal(dresidual, dy * (y > 0))
    assert_near(dweight, true.gamma, 1e-5)
    assert_near(dx, true.x, 2e-2)


@ROWS
def test_kernels_and_atens_passes_find_the_same_gradients(rows):
    x, dy, _, weight, bias = problem((8, 96, 28, 28), torch.float32, rows, device="cuda")
    mean, var = triton_passes.moments(x)
    affine = ops.Affine(mean, var, 1e-5, weight, bias, True)
    cut, without = aten.before_relu(dy, x, affine)
    ours, theirs = triton_passes.gradient(dy, x, affine), aten.gradient(cut, x, without)
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a, b.double(), 1e-5)
    M = x.numel() // 96
    found = triton_passes.input_gradient(dy, x, affine, ours.sums, M)
    assert_near(found, aten.input_gradient(cut, x, without, theirs.sums, M).double(), 1e-5)


@ROWS
@pytest.mark.parametrize("synchronised", [False, True])
def test_an_output_is_made_again_bit_by_bit(rows, synchronised, request):
    if synchronised:
        request.getfixturevalue("group_of_one")
    x, *_, weight, bias = problem((8, 96, 28, 28), torch.bfloat16, rows, device="cuda")
    y = layer_with(weight, bias, activation="relu")(x.requires_grad_())
    again = y.grad_fn.outputs_again.recipe(y.grad_fn, y.output_nr)
    assert torch.equal(again.tensor(), y)


@pytest.mark.parametrize("area", [(8, 8), (14, 14)])
@pytest.mark.parametrize("more", [3, 4, 8])
def test_a_gradient_whose_images_are_oddly_far_apart(area, more):
    """As where numbers are appended to what a layer gave: its images' gradients begin anywhere."""
    x, dy, _, weight, bias = problem((64, 32, *area), torch.bfloat16, False, device="cuda")
    flat = torch.cat([dy.flatten(1), dy.new_zeros(len(dy), more)], dim=1)
    apart = flat[:, : dy[0].numel()].view(dy.shape)
    assert apart.stride() != dy.stride()
    layer = layer_with(weight, bias, activation="relu")
    x.requires_grad_()
    assert all(torch.equal(a, b) for a, b in zip(step(layer, x, apart), step(layer, x, dy), strict=True))


@ROWS
def test_the_same_bits_every_time(rows):
    x, dy, _, weight, bias = problem((32, 64, 56, 56), torch.bfloat16, rows, device="cuda")
    layer = layer_with(weight, bias, activation="relu")
    first = step(layer, x.requires_grad_(), dy)
    for _ in range(50):  # the programs come to their end in another order each time
        assert all(torch.equal(a, b) for a, b in zip(first, step(layer, x, dy), strict=True))
    stream = torch.cuda.current_stream().cuda_stream
    assert not triton_passes._counters(x.device, stream).any(), "a kernel must leave its counters as it found them"


def test_streams_do_not_share_counters():
    x = torch.randn(32, 64, 56, 56, device="cuda").contiguous(memory_format=torch.channels_last)
    alone = ops.input_sums(x)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(ops.input_sums(x))
    torch.cuda.synchronize()
    assert all(torch.equal(alone, one) for one in found)


def test_tensors_of_more_than_2_31_elements():
    """13 GB at most; the last image must be found, and the first not written twice."""
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free GPU memory")
    torch.use_deterministic_algorithms(False)  # filling would double the time
    N, C, H = 2**31 // (64 * 1024) + 2, 64, 32
    for rows in (False, True):
        x = torch.zeros(N, C, H, H, dtype=torch.bfloat16, device="cuda")
        x = x.contiguous(memory_format=torch.channels_last) if rows else x
        x[-1] = 1
        M = N * H * H
        sums = ops.input_sums(x)
        assert_near(sums, torch.full((2 * C,), H * H, dtype=torch.float64, device="cuda"), 1e-6)
        mean, var = torch.full((C,), H * H / M).double().cuda(), torch.ones(C).double().cuda()
        y = ops.normalize(x, ops.Affine(mean, var, 0.0, None, None, False))
        assert (y[-1] > 0.9).all()
        assert (y[0] < 0).all()
        del x, y


@pytest.mark.parametrize("synchronised", [False, True])
def test_a_step_launches_two_kernels_each_way(synchronised, request):
    if synchronised:
        request.getfixturevalue("group_of_one")
    torch.use_deterministic_algorithms(False)  # else torch fills fresh memory
    x, dy, _, weight, bias = problem((8, 64, 28, 28), torch.bfloat16, True, device="cuda")
    layer = layer_with(weight, bias, activation="relu")
    x.requires_grad_()
    for _ in range(4):
        step(layer, x, dy)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(layer, x, dy)
        torch.cuda.synchronize()
    launched = Counter(e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    launched = Counter({name: n for name, n in launched.items() if "nccl" not in name.lower()})
    # In a group of one NCCL may copy or do nothing at all.
    launched = Counter({name: n for name, n in launched.items() if "memcpy" not in name.lower()})
    assert launched == {"input_sums": 1, "normalize": 1, "gradient": 1, "input_gradient": 1}


@pytest.mark.parametrize("synchronised", [False, True])
def test_a_training_step_never_waits_for_the_device(synchronised, request):
    if synchronised:
        request.getfixturevalue("group_of_one")
    conv = nn.Conv2d(3, 64, 3, device="cuda")
    layer = syncbn.SyncBatchNorm(64, activation="relu", device="cuda")
    x = torch.randn(8, 3, 30, 30, device="cuda")
    optimizer = torch.optim.SGD([*conv.parameters(), *layer.parameters()], lr=0.1, momentum=0.9)

    def train():
        optimizer.zero_grad()
        layer(conv(x)).square().mean().backward()
        optimizer.step()

    for _ in range(4):
        train()
    with no_host_synchronisation():
        train()
    assert layer.num_batches_tracked == 5


@pytest.mark.parametrize("synchronised", [False, True])
def test_a_step_can_be_captured_in_a_graph(synchronised, request):
    if synchronised:
        request.getfixturevalue("group_of_one")
    torch.use_deterministic_algorithms(False)
    x, dy, _, weight, bias = problem((8, 64, 28, 28), torch.bfloat16, True, device="cuda")
    layer, eager = (layer_with(weight, bias, activation="relu") for _ in range(2))
    x.requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(4):
            step(layer, x, dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(layer, x, dy)
    layer.reset_running_stats()
    for seed in range(3):
        with torch.no_grad():
            x.copy_(laid_out(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)), True))
        graph.replay()
        found = step(eager, x, dy)
        assert all(torch.equal(a, b) for a, b in zip(captured, found, strict=True))
    assert torch.equal(layer.running_var, eager.running_var)
    assert layer.num_batches_tracked == 3


def test_over_a_group_it_is_the_layer_alone(group_of_one):
    x, dy, _, weight, bias = problem((8, 64, 28, 28), torch.float32, True, device="cuda")
    x.requires_grad_()
    layer = layer_with(weight, bias, activation="relu")
    together = step(layer, x, dy)
    expected = reference.batch_norm(x.detach(), weight, bias, activation="relu").y
    assert_near(together[0], expected, 2e-6)
    true = reference.batch_norm_gradients(dy, x.detach(), weight, bias, activation="relu")
    for found, value in zip(together[1:], true[:3], strict=True):
        assert_near(found, value, 1e-5)


# ---- max pooling ---------------------------------------------------------------------------------


@ROWS
@DTYPES
@EACH_POOL
def test_pools_are_torchs(shape, pool, dtype, rows):
    check_pool(pool, few_numbers(shape, dtype, rows, "cuda"))


@ROWS
@DTYPES
@INCEPTIONS
def test_pools_of_numbers_that_are_not(shape, pool, dtype, rows):
    check_pool(pool, with_odd_numbers(few_numbers(shape, dtype, rows, "cuda")))


@ROWS
@INCEPTIONS
def test_a_pools_gradient_may_be_cut_from_a_wider_one(shape, pool, rows):
    x = few_numbers(shape, torch.bfloat16, rows, "cuda")
    check_pool(pool, x, cut_from_a_wider_gradient(torchs(pool, x).shape, x.dtype, rows, "cuda"))


@ROWS
@pytest.mark.parametrize("pool", [(3, 2, 0, True), (3, 1, 1, False)], ids=str)
@pytest.mark.parametrize("shape", [(32, 64, 112, 112), (7, 2049, 15, 13), (32, 1024, 7, 7)], ids=str)
def test_a_pools_gradient_has_the_same_bits_every_time(shape, pool, rows):
    x, *_ = problem(shape, torch.bfloat16, rows, device="cuda")
    y = pooled(pool, x.requires_grad_())
    assert torch.equal(y, torchs(pool, x))
    dy = laid_out(torch.randn(y.shape).bfloat16().cuda(), rows)
    first, *others = (torch.autograd.grad(y, x, dy, retain_graph=True)[0] for _ in range(10))
    assert all(torch.equal(first, other) for other in others)
    wide = x.detach().cpu().double().requires_grad_()
    (true,) = torch.autograd.grad(torchs(pool, wide), wide, dy.cpu().double())
    assert_near(first.cpu(), true, 4e-3)


def test_second_derivatives_of_a_pool():
    x = torch.randperm(2 * 3 * 6 * 5).double().view(2, 3, 6, 5).cuda().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: max_pool2d(x, 3, 2, 1).square(), x)


@ROWS
def test_pools_of_more_than_2_31_elements(rows):
    """11 GB at most, of x and its gradient, without the output."""
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of free GPU memory")
    torch.use_deterministic_algorithms(False)  # filling would double the time
    N, C, H = 2**31 // (64 * 1024) + 2, 64, 32
    format = torch.channels_last if rows else torch.contiguous_format
    x = torch.empty(N, C, H, H, dtype=torch.bfloat16, device="cuda", memory_format=format).zero_()
    x[-1, :, 1::2, 1::2] = 1
    y = max_pool2d(x.requires_grad_(), 2, 2)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    x = x.detach()
    assert (y[-1] == 1).all()
    assert (y[0] == 0).all()
    assert torch.equal(dx[-1], x[-1])
    assert dx[0].count_nonzero() == 0


def test_a_pool_never_waits_for_the_device_and_can_be_captured():
    x = laid_out(torch.randn(8, 64, 28, 28, device="cuda"), True).requires_grad_()

    def run():
        y = max_pool2d(x, 3, 2, ceil_mode=True)
        return y.detach(), *torch.autograd.grad(y, x, torch.ones_like(y))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        with no_host_synchronisation():
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))


def test_a_network_gives_the_same_gradients_every_time():
    """The promise of a resumed run, of which torch's max pools would fall short."""
    torch.use_deterministic_algorithms(False)  # which would refuse torch's other operators
    torch.manual_seed(0)
    network = syncbn.models.inception_bn(10, width_multiplier=0.25).cuda().to(memory_format=torch.channels_last)
    images = laid_out(torch.randn(8, 3, 224, 224, device="cuda"), True)

    def gradients():
        return torch.autograd.grad(network(images).square().sum(), list(network.parameters()))

    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        first, again = gradients(), gradients()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
