"""SyncBatchNorm on 1 to 4 gloo ranks against the float64 oracle on the whole batch."""

import itertools

import pytest
import torch
import torch.distributed as dist
from norm_cases import Case, buffer_bytes, errors, failures, lay_out, make_layer, relative, share, whole_batch
from torch import nn

import syncbn
from exactness import TOLERANCE
from ranks import run_ranks
from syncbn import SyncBatchNorm
from syncbn.ops import reference

TAILS = [(3,), (3, 10), (3, 6, 4), (3, 4, 2, 5)]
SIZES = {1: [(8,)], 2: [(5, 5), (1, 9)], 3: [(4, 4, 4), (7, 1, 3)], 4: [(3, 3, 3, 3), (3, 1, 0, 7), (0, 0, 11, 0)]}


def cases(P):
    """Every layout, dtype and option at least once, combined so that each P stays within seconds."""
    made = []
    layouts = ["contiguous", "channels_last", "batch_second", "sliced_channels", "sliced_batch"]
    mixes = [*zip(layouts, [*layouts[1:], layouts[0]], strict=True), ("contiguous",) * 2, ("channels_last",) * 2]
    for sizes, tail, (layout, dy_layout) in itertools.product(SIZES[P], TAILS, mixes):
        dtype = (torch.float64, torch.float32)[len(made) % 2]
        made.append(Case(tail, sizes, dtype, layout, dy_layout))
    for sizes, tail in itertools.product(SIZES[P], TAILS):
        for options in (
            {"affine": False},
            {"activation": "relu"},
            {"residual": True},
            {"residual": True, "activation": "relu"},
            {"residual": True, "activation": "relu", "affine": False},
            {"momentum": None},
            {"momentum": 1.0},
            {"eps": 1e-2},
        ):
            made.append(Case(tail, sizes, (torch.float64, torch.float32)[len(made) % 2], **options))
    return made


def failed_cases(rank, made):
    failed = []
    layers = [make_layer(case) for case in made]  # all at once: naming a layer at its first message takes a while
    for case, layer in zip(made, layers, strict=True):
        failed += [f"rank {rank}: {f}" for f in failures(case, errors(case, rank, layer))]
    return failed


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


@pytest.mark.parametrize("P", [1, 2, 3, 4])
def test_outputs_gradients_and_running_statistics(P):
    made = cases(P)
    assert joined(run_ranks(failed_cases, P, made)) == []


@pytest.mark.parametrize("P", [2, 3])
def test_mean_large_against_deviation(P):
    made = [
        Case(tail, (5,) * P, mean=mean, std=1.0, layout=layout, activation=activation)
        for tail in ((5, 9, 7), (5, 63))
        for mean in (1000.0, 3000.0, -1000.0)
        for layout in ("contiguous", "channels_last")
        for activation in (None, "relu")
    ]
    assert joined(run_ranks(failed_cases, P, made)) == []


def errors_of_ranks_with_means_of_their_own(rank, P):
    """Rank r holds values around (-1)^r 1000: each rank's pivot is far from the others'."""
    case = Case((4, 8, 8), (4,) * P, mean=0.0, std=1.0)
    batch = whole_batch(case)
    for r in range(P):
        share(batch.x, case.sizes, r).add_(1000.0 * (-1) ** r)
    x = share(batch.x, case.sizes, rank).clone().requires_grad_()
    layer = make_layer(case)
    y = layer(x)
    y.backward(share(batch.dy, case.sizes, rank))
    oracle, gradients = reference.batch_norm(batch.x), reference.batch_norm_gradients(batch.dy, batch.x)
    return (
        relative(y.detach(), share(oracle.y, case.sizes, rank)),
        relative(x.grad, share(gradients.x, case.sizes, rank)),
        relative(layer.running_var, 0.9 + 0.1 * batch.x.double().var((0, 2, 3))),
    )


@pytest.mark.parametrize("P", [2, 4])
def test_ranks_with_means_of_their_own(P):
    for found in run_ranks(errors_of_ranks_with_means_of_their_own, P, P):
        assert max(found) < TOLERANCE[torch.float32]


def running_statistics_of_steps(rank, P):
    """Ten steps of unequal batches, every combination of layout and dtype: the buffers, bit by bit."""
    found = []
    for dtype, momentum in itertools.product((torch.float32, torch.bfloat16), (0.1, None)):
        layer = SyncBatchNorm(5, momentum=momentum)
        for i in range(10):
            generator = torch.Generator().manual_seed(100 * i + rank)
            x = torch.randn((rank + i) % 4, 5, 7, 3, generator=generator).mul(3).add(50 * i).to(dtype)
            layer(lay_out(x, "channels_last" if (rank + i) % 2 else "contiguous"))
        found.append(buffer_bytes(layer))
    return found


@pytest.mark.parametrize("P", [2, 3, 4])
def test_running_statistics_are_bitwise_equal_on_all_ranks(P):
    found = run_ranks(running_statistics_of_steps, P, P)
    assert all(one == found[0] for one in found)


def cumulative_average(rank):
    layer = SyncBatchNorm(2, momentum=None).double()
    for i in range(5):
        x = torch.randn(12, 2, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        layer(x[:5] if rank == 0 else x[5:])
    return layer.running_mean.tolist(), layer.running_var.tolist(), layer.num_batches_tracked.item()


def test_cumulative_average():
    batches = [torch.randn(12, 2, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(5)]
    for mean, var, count in run_ranks(cumulative_average, 2):
        torch.testing.assert_close(torch.tensor(mean).double(), torch.stack([x.mean(0) for x in batches]).mean(0))
        torch.testing.assert_close(torch.tensor(var).double(), torch.stack([x.var(0) for x in batches]).mean(0))
        assert count == 5


def low_precision_errors(rank):
    """fp16 and bf16 on two ranks, against torch's same-dtype layer on the whole batch in one process."""
    bad = []
    for dtype, layout in itertools.product((torch.float16, torch.bfloat16), ("contiguous", "channels_last")):
        case = Case((6, 12, 10), (5, 3), dtype, layout, layout)
        batch = whole_batch(case)
        plain = nn.BatchNorm2d(6)
        x_plain = lay_out(batch.x, layout).clone().requires_grad_()
        y_plain = plain(x_plain)
        y_plain.backward(batch.dy)
        x = lay_out(share(batch.x, case.sizes, rank), layout).clone().requires_grad_()
        y = SyncBatchNorm(6)(x)
        y.backward(share(batch.dy, case.sizes, rank))
        for name, mine, theirs, true in (
            ("y", y, y_plain, reference.batch_norm(batch.x).y),
            ("dx", x.grad, x_plain.grad, reference.batch_norm_gradients(batch.dy, batch.x).x),
        ):
            error = relative(mine.detach(), share(true, case.sizes, rank))
            if not error <= 2 * relative(theirs.detach(), true):
                bad.append((dtype, layout, name, error))
    return bad


def test_low_precision():
    assert run_ranks(low_precision_errors, 2) == [[], []]


def ranks_of_different_dtype(rank):
    """Whatever a rank's activations are stored in, the message is the same."""
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(rank))
    layer = SyncBatchNorm(3)
    layer(x.to([torch.float32, torch.bfloat16, torch.float64][rank])).sum().backward()
    return buffer_bytes(layer)


def test_ranks_of_different_dtype():
    found = run_ranks(ranks_of_different_dtype, 3)
    assert found[0] == found[1] == found[2]


def count_above_two_to_the_24(rank):
    """A float32 count rounds 2^24 + 1 down; the mean of ones is then no longer 1."""
    layer = SyncBatchNorm(1, momentum=1.0).double()
    with torch.no_grad():
        layer(torch.ones(1, 1, dtype=torch.float64).expand(2**23 + rank, 1))
    return layer.running_mean.item()


def test_count_above_two_to_the_24():
    assert run_ranks(count_above_two_to_the_24, 2) == [1.0, 1.0]


def eval_without_company(rank):
    """In eval nothing is exchanged: a rank may be alone in it."""
    layer = SyncBatchNorm(3)
    layer(torch.randn(4, 3))
    layer.eval()
    if rank == 0:
        for options in ({}, {"track_running_stats": False}):
            other = SyncBatchNorm(3, **options).eval()
            other(torch.randn(4, 3))
            layer(torch.randn(4, 3))
    dist.barrier()
    layer.train()
    layer(torch.randn(4, 3))
    return layer.num_batches_tracked.item()


def test_eval_without_company():
    assert run_ranks(eval_without_company, 2) == [2, 2]


def one_gradient_only(rank):
    """Frozen parameters, an input without gradient, and gradients asked for one at a time."""
    case = Case((3, 5), (4, 4))
    batch = whole_batch(case)
    gradients = reference.batch_norm_gradients(batch.dy, batch.x)
    x, dy = (share(t, case.sizes, rank) for t in (batch.x, batch.dy))
    found = []
    layer = SyncBatchNorm(3)
    layer(x).backward(dy)  # no gradient for x: nothing to exchange
    total = layer.weight.grad.clone()
    dist.all_reduce(total)
    found.append(relative(total, gradients.gamma))
    layer.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    layer(leaf).backward(dy)
    found.append(relative(leaf.grad, share(gradients.x, case.sizes, rank)))
    layer.requires_grad_(True)
    y = layer(leaf)
    (dgamma,) = torch.autograd.grad(y, layer.weight, dy, retain_graph=True)
    (dx,) = torch.autograd.grad(y, leaf, dy, retain_graph=True)
    (again,) = torch.autograd.grad(y, leaf, dy)
    dist.all_reduce(dgamma)
    return [*found, relative(dgamma, gradients.gamma), relative(dx, leaf.grad), relative(again, leaf.grad)]


def test_one_gradient_only():
    for found in run_ranks(one_gradient_only, 2):
        assert max(found) < TOLERANCE[torch.float32], found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_groups_of_consecutive_ranks(size):
    found = run_ranks(errors_in_groups_of, 4, size)
    assert joined(found) == []


def errors_in_groups_of(rank, size):
    group = syncbn.new_group(size)
    sizes = (3, 2, 4, 5)[:size]
    case = Case((3, 5), sizes, torch.float64, residual=True, activation="relu", affine=False, seed=rank // size)
    return failures(case, errors(case, rank % size, make_layer(case, process_group=group)))
