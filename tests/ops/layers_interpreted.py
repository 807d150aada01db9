"""Layers and a module on the GPU kernels under Triton's interpreter: `test_triton_kernels.py` runs this file, as well.

Fresh memory holds NaN, so that whatever a kernel leaves unwritten shows.
"""

import copy
from collections import Counter

import pytest
import torch
from launches import Launches, passes_for_gpus
from norm_problems import ROWS, assert_near, laid_out
from torch import nn

import syncbn
from exactness import TOLERANCE
from ranks import run_ranks
from syncbn.models import inception_bn
from syncbn.ops import reference, triton_passes

pytestmark = pytest.mark.usefixtures("fresh_memory_is_not_a_number")


def launches_of_a_step(make_inputs, layers, split=False):
    """What one training step of the layers' group puts on a device: (forward, backward), by name."""
    inputs, residuals = make_inputs()
    launches = Launches()
    with launches:
        ys = syncbn.nn.start_sync_batch_norm(layers, inputs, split).finish(residuals)
    forward = launches.take()
    leaves = [*inputs, *(p for entry in layers for p in nn.ModuleList(entry if split else [entry]).parameters())]
    leaves += [r for r in residuals or [] if r is not None]
    dys = [torch.ones_like(y) for y in ys]
    with launches:
        torch.autograd.grad(ys, leaves, dys)
    return forward, launches.take()


def alone(residual):
    def make():
        x = torch.randn(4, 6, 5, 5).contiguous(memory_format=torch.channels_last)
        return [x.requires_grad_()], [torch.randn_like(x).requires_grad_() if residual else None]

    return make


@pytest.mark.parametrize("residual", [False, True])
def test_a_layer_alone_is_two_kernels_each_way(residual):
    layer = syncbn.SyncBatchNorm(6, activation="relu")
    with passes_for_gpus():
        forward, backward = launches_of_a_step(alone(residual), [layer])
    assert forward == {"input_sums": 1, "normalize": 1}
    assert backward == {"gradient": 1, "input_gradient": 1}
    assert layer.num_batches_tracked == 1


def step_in_hooks(layers):
    """Spoils each parameter once it has its gradient, as an optimiser in hooks steps it: before dx is computed."""

    def spoil(parameter):
        parameter.detach().fill_(torch.nan)

    for layer in layers:
        for parameter in layer.parameters():
            parameter.register_post_accumulate_grad_hook(spoil)


def two_layers_in_one_message(rank):
    layers = [syncbn.SyncBatchNorm(6, activation="relu"), syncbn.SyncBatchNorm(4)]

    def make():
        xs = [torch.randn(3, C, 5, 5, generator=torch.Generator().manual_seed(9 * rank + C)) for C in (6, 4)]
        return [x.requires_grad_() for x in xs], None

    with passes_for_gpus():
        counted = [launches_of_a_step(make, layers) for _ in range(3)]
        xs, _ = make()
        ys = syncbn.sync_batch_norm_group(layers, xs)
        dys = [y.detach().square() for y in ys]
        dxs = torch.autograd.grad(ys, xs, dys, retain_graph=True)
        step_in_hooks(layers)
        torch.autograd.backward(ys, dys)
    assert all(torch.equal(x.grad, dx) for x, dx in zip(xs, dxs, strict=True))
    xs, ys = ([t.detach() for t in ts] for ts in (xs, ys))
    return counted[-1], xs, ys, dxs, [layer.running_var for layer in layers]


def test_layers_in_one_message_are_two_kernels_each_and_one_collective_each_way():
    results = run_ranks(two_layers_in_one_message, 2)
    for (forward, backward), *_ in results:
        assert forward == {"input_sums": 2, "allreduce": 1, "normalize": 2}
        assert backward == {"gradient": 2, "allreduce": 1, "input_gradient": 2}
    for i, activation in enumerate(("relu", None)):
        x = torch.cat([xs[i] for _, xs, *_ in results]).detach()
        y = reference.batch_norm(x, activation=activation).y
        assert_near(torch.cat([ys[i] for _, _, ys, *_ in results]), y, TOLERANCE[torch.float32])
        true = reference.batch_norm_gradients(y.square(), x, activation=activation)
        assert_near(torch.cat([dxs[i] for *_, dxs, _ in results]), true.x, TOLERANCE[torch.float32])
        assert torch.equal(results[0][-1][i], results[1][-1][i])


WIDTHS = (6, 16, 3)


def side_by_side(rank, rows, N, space, dtype=torch.float64):
    """Three layers of one activation and one of another, in one message; gradients lie in memory in every way."""
    torch.manual_seed(rank)
    layers = [[syncbn.SyncBatchNorm(C, activation="relu").to(dtype) for C in WIDTHS], [syncbn.SyncBatchNorm(4)]]
    layers[1][0].to(dtype)
    for layer in (*layers[0], *layers[1]):
        torch.nn.init.uniform_(layer.weight, 0.5, 2, generator=torch.Generator().manual_seed(layer.num_features))

    def make():
        xs = [laid_out(torch.randn(N + rank, C, *space, dtype=dtype) + 1, rows) for C in (25, 4)]
        return [x.requires_grad_() for x in xs], None

    with passes_for_gpus():
        counted = [launches_of_a_step(make, layers, split=True) for _ in range(2)][-1]  # the first makes counters
        xs, _ = make()
        ys = syncbn.nn.start_sync_batch_norm(layers, xs, split=True).finish()
        wide = laid_out(torch.randn(N + rank, 40, *space, dtype=dtype), rows)
        dys = [wide[:, 2:8], laid_out(wide[:, 8:24], rows), wide[:, 24:27], laid_out(wide[:, :4], not rows)]
        parameters = [p for entry in layers for layer in entry for p in layer.parameters()]
        gradients = torch.autograd.grad(ys, [*xs, *parameters], dys, retain_graph=True)
        weights = [p.detach().clone() for p in parameters]
        step_in_hooks([layer for entry in layers for layer in entry])
        torch.autograd.backward(ys, dys)
    assert all(torch.equal(x.grad, dx) for x, dx in zip(xs, gradients[:2], strict=True))
    assert all(dx.stride() == x.stride() for dx, x in zip(gradients[:2], xs, strict=True))
    assert all(laid_out(y, rows).stride() == y.stride() for y in ys) or 1 in (N, *space)
    running = [(layer.running_mean, layer.running_var, layer.num_batches_tracked) for layer in (*layers[0], *layers[1])]
    xs, ys, dys = ([t.detach() for t in ts] for ts in (xs, ys, dys))
    return counted, [*xs[0].split(WIDTHS, 1), xs[1]], ys, dys, gradients, weights, running


def check_side_by_side(results):
    for i, activation in enumerate(["relu"] * 3 + [None]):
        x, y, dy = (torch.cat([found[k][i] for found in results]) for k in (1, 2, 3))
        gamma, beta = results[0][5][2 * i : 2 * i + 2]
        expected = reference.batch_norm(x, gamma, beta, activation=activation)
        assert_near(y, expected.y, 1e-12)
        true = reference.batch_norm_gradients(dy, x, gamma, beta, activation=activation)
        parts = [(*found[4][0].split(WIDTHS, 1), found[4][1]) for found in results]
        assert_near(torch.cat([part[i] for part in parts]), true.x, 1e-10)
        assert_near(sum(found[4][2 + 2 * i] for found in results), true.gamma, 1e-11)
        assert_near(sum(found[4][3 + 2 * i] for found in results), true.beta, 1e-11)
        assert all(found[6][i][2] == 3 for found in results)
        assert all(torch.equal(found[6][i][1], results[0][6][i][1]) for found in results)


@ROWS
@pytest.mark.parametrize(("N", "space"), [(3, (4, 5)), (5, ()), (5, (1, 1)), (1, (3, 2)), (2, (1, 7)), (3, (2, 2, 3))])
def test_layers_side_by_side_alone(N, space, rows, many_programs):
    found = side_by_side(0, rows, N, space)
    forward, backward = found[0]
    assert forward == {"input_sums": 4, "normalize": 4}
    assert backward.pop("copy", 0) <= 1, "of the gradient that lies in the other layout"
    assert {k: v for k, v in backward.items() if k != "copy"} == {"gradient": 4, "input_gradient": 4}
    check_side_by_side([found])


@ROWS
def test_layers_side_by_side_over_ranks(rows):
    results = run_ranks(side_by_side, 2, rows, 3, (4, 5))
    for (forward, backward), *_ in results:
        assert (forward["input_sums"], forward["normalize"], forward["allreduce"]) == (4, 4, 1)
        assert backward == {"gradient": 4, "allreduce": 1, "input_gradient": 4}
    check_side_by_side(results)


def one_rank_with_gaps(rank):
    layers = [[syncbn.SyncBatchNorm(C) for C in (2, 3)]]
    x = torch.randn(3, 5, 4, 6)
    with passes_for_gpus():
        ys = syncbn.nn.start_sync_batch_norm(layers, [x[..., :4] if rank else x[..., :4].contiguous()], True).finish()
    return x[..., :4], torch.cat(ys, 1).detach()


def test_layers_side_by_side_send_the_same_message_whatever_the_memory():
    xs, ys = (torch.cat(parts) for parts in zip(*run_ranks(one_rank_with_gaps, 2), strict=True))
    assert_near(ys, reference.batch_norm(xs).y, TOLERANCE[torch.float32])


@ROWS
def test_layers_side_by_side_differentiated_twice_and_recomputed(rows):
    layers = [syncbn.SyncBatchNorm(C, activation="relu").double() for C in (2, 1)]
    x = laid_out(torch.randn(3, 3, 2, 2, dtype=torch.float64), rows).requires_grad_()

    def outputs(x):
        return tuple(syncbn.nn.start_sync_batch_norm([layers], [x], split=True).finish())

    with passes_for_gpus():
        assert torch.autograd.gradgradcheck(outputs, (x,), fast_mode=True)
        expected = torch.autograd.grad(sum(y.square().sum() for y in outputs(x)), x)
        (with_graph,) = torch.autograd.grad(sum(y.square().sum() for y in outputs(x)), x, create_graph=True)
        assert_near(with_graph.detach(), *expected, 1e-11)
        with syncbn.recompute_activations():
            loss = sum(y.square().sum() for y in outputs(x))
        assert torch.equal(*torch.autograd.grad(loss, x), *expected)
        y = torch.utils.checkpoint.checkpoint(outputs, x, use_reentrant=False)
        assert torch.equal(*torch.autograd.grad(sum(part.square().sum() for part in y), x), *expected)


def test_layers_side_by_side_keep_their_input_once():
    kept = []
    layers = [[syncbn.SyncBatchNorm(C) for C in (2, 3)]]
    x = torch.randn(3, 5, requires_grad=True)
    with passes_for_gpus(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        syncbn.nn.start_sync_batch_norm(layers, [x], True).finish()
    assert kept.count(x.shape) == 1


def step_of_a_module(module, size, recomputed, launches):
    """Output, gradients and buffers of a training step."""
    x = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    with launches:
        with syncbn.recompute_activations(recomputed):
            y = module(x)
        gradients = torch.autograd.grad(y, [x, *module.parameters()], y.detach().square())
    return [y.detach(), *gradients], list(module.buffers())


def check_step(found, expected):
    tolerances = (1e-11, TOLERANCE[torch.float32])  # here momentum has 32 bits
    for ours, theirs, tolerance in zip(found, expected, tolerances, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert_near(a, b.double(), tolerance)


def test_a_module_that_normalises_each_activation_is_what_it_is_on_a_cpu():
    network = inception_bn(2, stem="small", width_multiplier=0.125, per_activation_head=16).double()
    module, size = network.inception_5b, (3, 136, 2, 2)
    expected = step_of_a_module(copy.deepcopy(module), size, False, Launches())
    with passes_for_gpus():
        found = step_of_a_module(module, size, False, Launches())
    check_step(found, expected)


@pytest.mark.parametrize("recomputed", [False, True])
def test_an_inception_module_is_what_it_is_on_a_cpu(recomputed):
    """And launches its convolutions, its pool, two kernels for a layer each way, and little else."""
    module = inception_bn(2, stem="small", width_multiplier=0.125).inception_3a.double()
    module = module.to(memory_format=torch.channels_last)
    launches = Launches()
    expected = step_of_a_module(copy.deepcopy(module), (2, 24, 4, 4), False, launches)
    launches.take()
    with passes_for_gpus():
        found = step_of_a_module(module, (2, 24, 4, 4), recomputed, launches)
    check_step(found, expected)
    counted = launches.take()
    kernels = [counted.pop(name) for name in ("input_sums", "normalize", "gradient", "input_gradient")]
    assert kernels == [7, 7 + 3 * recomputed, 7, 7], "three layers have a convolution after them"
    convolutions = {"convolution": 5, "convolution_backward": 5, "avg_pool2d": 1, "avg_pool2d_backward": 1}
    joined = {"cat": 2, "add": 1}  # weights of siblings, and the branches; gradients of the input
    assert counted == {**convolutions, **joined, "pow": 1}


def layers_that_disagree(rank):
    with passes_for_gpus():
        layer = syncbn.SyncBatchNorm(4)
        x = torch.randn(3, 4, requires_grad=True)
        layer(x)
        if rank == 0:  # as if it had been in another layer, which only the signature shows
            launch = triton_passes._launch_input_sums
            triton_passes._launch_input_sums = lambda *a: launch(*a[:-1], a[-1] + 1)
        y = layer(x)
        return y.tolist(), layer.running_mean.tolist()


def test_ranks_in_different_layers_get_nan():
    for y, running_mean in run_ranks(layers_that_disagree, 2):
        assert torch.tensor(y).isnan().all()
        assert torch.tensor(running_mean).isfinite().all()


def test_second_derivatives_and_frozen_inputs():
    with passes_for_gpus():
        layer = syncbn.SyncBatchNorm(3).double()
        x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(layer, (x,))
        layer(x.detach()).square().sum().backward()
    assert layer.weight.grad is not None


def test_a_checkpointed_forward_updates_once():
    layer = syncbn.SyncBatchNorm(3)
    x = torch.randn(4, 3, 2, requires_grad=True)
    with passes_for_gpus():
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert layer.num_batches_tracked == 1


def test_the_search_for_launches_finds_them():
    launches = Launches()
    with launches:
        torch.zeros(3).add(1)
        torch.empty(4).view(2, 2)
    assert launches.take() == Counter({"zeros": 1, "add": 1})
