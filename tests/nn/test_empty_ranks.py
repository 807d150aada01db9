"""Ranks without data, all ranks without data, and one value in all."""

import itertools

import pytest
import torch
from norm_cases import buffer_bytes, lay_out, relative
from torch import nn

from exactness import TOLERANCE
from ranks import RankError, run_ranks
from syncbn import SyncBatchNorm, sync_batch_norm_group
from syncbn.ops import reference

SIZES = (3, 0, 5)


def steps_with_an_empty_rank(rank):
    """Two steps, each rank empty in turn, over shapes, dtypes, layouts and options; under autocast too."""
    failed = []
    combinations = itertools.product(
        [(3,), (3, 10), (3, 6, 4), (3, 4, 2, 5)],
        [torch.float32, torch.bfloat16],
        ["contiguous", "channels_last"],
        [{}, {"activation": "relu"}, {"affine": False}, {"momentum": None}],
    )
    made = [(SyncBatchNorm(3, **options), tail, dtype, layout) for tail, dtype, layout, options in combinations]
    for layer, tail, dtype, layout in made:
        for shift in range(2):
            sizes = SIZES[shift:] + SIZES[:shift]
            generator = torch.Generator().manual_seed(shift)
            whole = torch.randn(sum(sizes), *tail, generator=generator).to(dtype)
            dy = torch.randn(sum(sizes), *tail, generator=generator).to(dtype)
            x = lay_out(whole.split(sizes)[rank], layout).clone().requires_grad_()
            y = layer(x)
            y.backward(dy.split(sizes)[rank])
            oracle = reference.batch_norm(whole, activation=layer.activation)
            gradients = reference.batch_norm_gradients(dy, whole, activation=layer.activation)
            for found, true in ((y.detach(), oracle.y), (x.grad, gradients.x)):
                if not relative(found, true.split(sizes)[rank]) < TOLERANCE[dtype]:
                    failed.append((layer, tail, dtype, layout, shift))
        if layer.num_batches_tracked != 2 or not layer.running_var.isfinite().all():
            failed.append((layer, "statistics"))
    return [str(f) for f in failed], [buffer_bytes(layer) for layer, *_ in made]


def test_an_empty_rank_forward_and_backward():
    found = run_ranks(steps_with_an_empty_rank, 3)
    assert [failed for failed, _ in found] == [[], [], []]
    assert found[0][1] == found[1][1] == found[2][1]


def autocast_step(rank, dtype, sizes):
    """conv -> bn -> conv under autocast: the empty rank's activations have no reason to differ, but in torch's did."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), SyncBatchNorm(4, activation="relu"), nn.Conv2d(4, 2, 3))
    x = torch.randn(sum(sizes), 3, 8, 8).split(list(sizes))[rank]
    with torch.autocast("cpu", dtype):
        y = net(x)
        loss = y.float().square().sum()
    loss.backward()
    with torch.autocast("cpu", dtype):  # the layer alone, on float32 input
        net[1](torch.randn(len(x), 4, 3))
    return buffer_bytes(net[1]), str(y.dtype), [p.grad.isfinite().all().item() for p in net.parameters()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(4, 0), (0, 4), (0, 0)], ids=str)
def test_an_empty_rank_under_autocast(dtype, sizes):
    first, second = run_ranks(autocast_step, 2, dtype, sizes)
    assert first == second
    assert all(first[2])


def inputs_of_different_dtype(rank):
    """What autocast can lead to: the empty rank's dummy batch is float32, the others' are bfloat16."""
    layer = SyncBatchNorm(3)
    x = torch.randn(4, 3, 5).bfloat16() if rank else torch.empty(0, 3, 5)
    layer(x.requires_grad_()).sum().backward()
    return buffer_bytes(layer)


def test_an_empty_rank_of_another_dtype():
    first, second = run_ranks(inputs_of_different_dtype, 2)
    assert first == second


def all_empty(rank):
    """Nothing moves, nothing is NaN; and the next step is as if this one had not been."""
    unchanged = []
    layers = [SyncBatchNorm(3, momentum=m, activation=a) for m in (0.1, None, 1.0) for a in (None, "relu")]
    for layer in layers:
        for tail in ((3,), (3, 4), (3, 4, 5)):
            before = buffer_bytes(layer)
            x = torch.empty(0, *tail, requires_grad=True)
            y = layer(x)
            y.sum().backward()
            unchanged.append(y.shape == x.shape == x.grad.shape)
            unchanged.append(before == buffer_bytes(layer))
            unchanged.append(layer.weight.grad.tolist() == layer.bias.grad.tolist() == [0.0] * 3)
            layer.zero_grad()
    grouped = sync_batch_norm_group(layers[:2], [torch.empty(0, 3, 4), torch.ones(2, 3) * torch.tensor([[1.0], [3.0]])])
    unchanged.append(layers[0].num_batches_tracked == 0)
    unchanged.append(layers[1].num_batches_tracked == 1)
    unchanged.append(not grouped[1].isnan().any().item())
    for layer in layers[2:]:
        layer(torch.randn(4, 3, generator=torch.Generator().manual_seed(rank)))
        unchanged.append(layer.num_batches_tracked == 1)
        unchanged.append(layer.running_var.isfinite().all().item())
    return [bool(u) for u in unchanged]


@pytest.mark.parametrize("P", [1, 2, 3])
def test_all_ranks_empty(P):
    for found in run_ranks(all_empty, P):
        assert all(found), found


def one_value_in_all(rank, shape):
    """On the last rank one value per channel, on the others none: who raises, what, and whether life goes on."""
    import torch.distributed as dist

    layer = SyncBatchNorm(3)
    before = buffer_bytes(layer)
    empty = (0, *shape[1:])
    try:
        layer(torch.ones(shape if rank == dist.get_world_size() - 1 else empty))
        text = "no error"
    except ValueError as error:
        text = str(error)
    kept = before == buffer_bytes(layer)
    layer(torch.randn(4, 3)).sum()  # nobody was left behind in a collective
    return text, kept, layer.num_batches_tracked.item()


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("P", [1, 2, 3])
def test_one_value_in_all_is_an_error_on_every_rank(P, shape):
    for text, kept, tracked in run_ranks(one_value_in_all, P, shape):
        assert "more than 1 value per channel" in text
        assert "\n" not in text
        assert kept
        assert tracked == 1


def one_value_each(rank):
    """The paper's normalisation over a batch of one image a rank: refused by nn.BatchNorm1d, right here."""
    x = torch.tensor([[1.0, -2.0], [3.0, 5.0], [4.0, 1.0]], dtype=torch.float64)
    leaf = x[rank : rank + 1].clone().requires_grad_()
    layer = SyncBatchNorm(2).double()
    y = layer(leaf)
    dy = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [3.0, 1.0]], dtype=torch.float64)
    y.backward(dy[rank : rank + 1])
    return (
        relative(y.detach(), reference.batch_norm(x).y[rank : rank + 1]),
        relative(leaf.grad, reference.batch_norm_gradients(dy, x).x[rank : rank + 1]),
        relative(layer.running_var, 0.9 + 0.1 * x.var(0)),
    )


def test_one_value_on_each_rank_is_a_batch():
    for found in run_ranks(one_value_each, 3):
        assert max(found) < 1e-12


def one_value_in_a_group_of_layers(rank):
    layers = [SyncBatchNorm(3), SyncBatchNorm(2)]
    sync_batch_norm_group(layers, [torch.randn(4, 3), torch.ones(1 - rank, 2)])


def test_one_value_in_one_of_several_layers():
    with pytest.raises(RankError) as caught:
        run_ranks(one_value_in_a_group_of_layers, 2)
    assert [kind for kind, _ in caught.value.errors.values()] == ["ValueError", "ValueError"]
