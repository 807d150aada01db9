"""Groups of ranks, and the check inside each message, apart from any layer."""

import pytest
import torch
import torch.distributed as dist

import syncbn
from ranks import RankError, run_ranks
from syncbn.collectives import traced
from syncbn.collectives.agreement import LayerName, Message, id_of


def groups_of(rank, size):
    group = syncbn.new_group(size)
    total = torch.tensor([float(rank)])
    dist.all_reduce(total, group=group)
    return dist.get_process_group_ranks(group), dist.get_rank(group), total.item()


@pytest.mark.parametrize(("P", "size"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_new_group_is_of_consecutive_ranks(P, size):
    for rank, (ranks, place, total) in enumerate(run_ranks(groups_of, P, size)):
        first = rank // size * size
        assert ranks == list(range(first, first + size))
        assert place == rank - first
        assert total == sum(ranks)


def groups_twice(rank):
    """Two sets of groups live side by side."""
    pairs, again, all_of_us = syncbn.new_group(2), syncbn.new_group(2), syncbn.new_group(4)
    return [dist.get_process_group_ranks(g) for g in (pairs, again, all_of_us)]


def test_new_group_more_than_once():
    for rank, found in enumerate(run_ranks(groups_twice, 4)):
        pair = [0, 1] if rank < 2 else [2, 3]
        assert found == [pair, pair, [0, 1, 2, 3]]


def description(path, direction="forward", length=9):
    return str(Message(direction, (LayerName(path, "SyncBatchNorm(3)", 0),), length))


def test_ids_do_not_depend_on_the_process():
    """Python's hash() would: it is salted."""
    assert run_ranks(id_on_rank, 2, "net.bn") == [id_of("net.bn")] * 2


def id_on_rank(rank, text):
    return id_of(text)


def test_ids_of_many_layers_hardly_collide():
    """A thousand messages: an id that two share hides a mismatch."""
    ids = [id_of(description(f"blocks.{i}.bn", d)) for i in range(500) for d in ("forward", "backward")]
    assert len(ids) - len(set(ids)) <= 2


@pytest.mark.parametrize("P", [2, 3, 64, 1024, 8192])
def test_an_id_is_proved_exactly_in_float64(P):
    """Sums of P ids and of their squares are integers that float64 holds."""
    largest = max(id_of(str(i)) for i in range(2000))
    assert float(P * largest**2) == P * largest**2 < 2**53


def left_without_goodbye(rank):
    """A group that was destroyed is refused with a remedy, not used."""
    group = syncbn.new_group(2)
    layer = syncbn.SyncBatchNorm(3, process_group=group)
    dist.destroy_process_group()
    layer(torch.randn(4, 3))


def test_a_destroyed_group_is_refused():
    with pytest.raises(RankError) as caught:
        run_ranks(left_without_goodbye, 4)
    for kind, text in caught.value.errors.values():
        assert kind in ("ValueError", "RuntimeError")
        assert "init_process_group" in text


def all_reduce_differentiable(rank):
    """Sum over ranks; its gradient is the sum over ranks; and so again."""
    x = torch.tensor([1.0 + rank, 2.0], dtype=torch.float64, requires_grad=True)
    message = torch.cat([x, torch.tensor([7, 49], dtype=torch.float64)])
    total = traced.all_reduce_differentiable(message, dist.group.WORLD, 7)
    (first,) = torch.autograd.grad((total[:2] ** 3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    return total[:2].tolist(), first.tolist(), second.tolist()


@pytest.mark.parametrize("P", [1, 2, 3])
def test_all_reduce_can_be_differentiated_twice(P):
    sums = [sum(1.0 + r for r in range(P)), 2.0 * P]
    for total, first, second in run_ranks(all_reduce_differentiable, P):
        assert total == sums
        # The loss of all ranks together is P times s^3, of which each rank's x has the whole derivative.
        assert first == [P * 3 * s**2 for s in sums]
        assert second == [P * P * 6 * s for s in sums]


def ids_that_differ(rank):
    are_nan = []
    for id in (5, 5 + rank, 7 - rank):
        message = torch.tensor([1.0, 2.0, id, id**2], dtype=torch.float64)
        sums = traced.all_reduce_differentiable(message, dist.group.WORLD, id)
        are_nan.append(sums[:2].isnan().all().item())
    return are_nan


def test_different_ids_turn_the_sums_into_nan():
    """Where nothing can be raised (in a compiled graph), wrong sums must not look right."""
    assert run_ranks(ids_that_differ, 2) == [[False, True, True]] * 2
