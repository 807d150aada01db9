"""What goes over the wire: how many collectives, how many bytes, and that neither grows with the number of ranks."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from traffic import Traffic

from ranks import run_ranks
from syncbn import SyncBatchNorm, convert_sync_batchnorm, sync_batch_norm_group
from syncbn.nn import PerActivationBatchNorm

FORWARD_EXTRA = 3  # the count, the id, its square
BACKWARD_EXTRA = 2


def traffic_of(build, *shapes):
    """[(collective, bytes)] of a forward and of its backward."""
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    with Traffic() as forward:
        outputs = build(*inputs)
    with Traffic() as backward:
        sum(y.pow(2).sum() for y in outputs).backward()
    return forward.sent, backward.sent


def all_kinds(rank):
    """By name: the traffic of one layer, of several, of each option; the second step of each."""
    one, options = SyncBatchNorm(8), SyncBatchNorm(8, activation="relu", momentum=None)
    bare = SyncBatchNorm(8, affine=False, track_running_stats=False)
    many = [SyncBatchNorm(c) for c in (8, 3, 5)]
    frozen = SyncBatchNorm(8).requires_grad_(False)
    halves = [SyncBatchNorm(2), SyncBatchNorm(6)]
    each = PerActivationBatchNorm((2, 2, 2))
    kinds = {
        "one": (lambda x: [one(x)], (4, 8, 5)),
        "options": (lambda x: [options(x, x)], (4, 8, 5)),
        "bare": (lambda x: [bare(x)], (4, 8, 5)),
        "frozen": (lambda x: [frozen(x)], (4, 8, 5)),
        "half": (lambda x: [one(x.bfloat16())], (4, 8, 5)),
        "empty": (lambda x: [one(x[:0] if rank else x)], (4, 8, 5)),
        "larger batch": (lambda x: [one(x)], (64, 8, 50)),
        "many": (lambda *xs: sync_batch_norm_group(many, xs), (4, 8), (4, 3, 5), (4, 5, 2, 2)),
        "side by side": (lambda x: sync_batch_norm_group([halves], [x]), (4, 8)),
        "per activation": (lambda x: [each(x)], (4, 2, 2, 2)),
    }
    for build, *shapes in kinds.values():
        traffic_of(build, *shapes)
    return {name: traffic_of(build, *shapes) for name, (build, *shapes) in kinds.items()}


def first_message(rank):
    """Also the very first message costs no further collective."""
    layer = SyncBatchNorm(8)
    return traffic_of(lambda x: [layer(x)], (4, 8))


def in_a_fake_world(rank, P):
    """The same on one of P pretended ranks, whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=P)
    return all_kinds(rank)


@pytest.fixture(scope="module")
def on_two_ranks():
    return run_ranks(all_kinds, 2)


def test_one_all_reduce_each_way(on_two_ranks):
    for found in on_two_ranks:
        for name, (forward, backward) in found.items():
            assert [kind for kind, _ in forward] == ["allreduce"], name
            assert [kind for kind, _ in backward] == ["allreduce"], name


def test_bytes_of_a_message(on_two_ranks):
    """float64: sum x, sum x^2 (C each) and a count for each input, then the id; and two sums (C each) going back."""
    widths = {name: [8] for name in on_two_ranks[0]} | {"many": [8, 3, 5]}
    for found in on_two_ranks:
        for name, (forward, backward) in found.items():
            C, inputs = sum(widths[name]), len(widths[name])
            assert forward[0][1] == 8 * (2 * C + inputs + FORWARD_EXTRA - 1), name
            assert backward[0][1] == 8 * (2 * C + BACKWARD_EXTRA), name


def test_no_more_at_1024_ranks(on_two_ranks):
    ((found),) = run_ranks(in_a_fake_world, 1, 1024)
    assert found == on_two_ranks[0]


def test_first_message():
    for forward, backward in run_ranks(first_message, 2):
        assert len(forward) == len(backward) == 1


def without_need(rank):
    """Where there is nothing to exchange: eval, no gradient for the input, a group of one."""
    solo = [dist.new_group([r]) for r in range(2)][rank]
    layers = [SyncBatchNorm(4), SyncBatchNorm(4).eval(), SyncBatchNorm(4, process_group=solo)]
    x = torch.randn(5, 4)
    with Traffic() as no_input_gradient:
        layers[0](x).sum().backward()
    with Traffic() as no_gradient, torch.no_grad():
        layers[0](x)
    with Traffic() as none:
        for layer in layers[1:]:
            layer(x.clone().requires_grad_()).sum().backward()
        SyncBatchNorm(4, track_running_stats=False).eval()(x.clone().requires_grad_()).sum().backward()
    return no_input_gradient.count, no_gradient.count, none.count


def test_nothing_is_sent_without_need():
    for no_input_gradient, no_gradient, none in run_ranks(without_need, 2):
        assert no_input_gradient <= 2
        assert no_gradient == 1
        assert none == 0


def network_traffic(rank):
    """A converted network: one message a layer each way, nothing else, in the first step and later."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
    convert_sync_batchnorm(net)
    x = torch.randn(2, 3, 8, 8)
    counts = []
    for _ in range(3):
        with Traffic() as sent:
            net(x).pow(2).sum().backward()
        counts.append(sent.count)
    twin = copy.deepcopy(net)
    with Traffic() as sent:
        twin(x).pow(2).sum().backward()
    return [*counts, sent.count]


def test_a_converted_network():
    assert run_ranks(network_traffic, 2) == [[4, 4, 4, 4]] * 2
