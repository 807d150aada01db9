"""The layers' messages travel on a communicator of their own, agreed on through a connection of each group's own.

All on ranks 0 and 2 of three, each case in a group of its own; rank 1 is in none of them.
"""

import ast
import datetime
import os
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import syncbn
from ranks import run_ranks
from syncbn.collectives import communicator
from syncbn.collectives.channel import _channel
from syncbn.collectives.communicator import SHARE
from syncbn.nn import SyncBatchNorm

MEMBERS = [0, 2]
TIMEOUT = 4  # of a group whose ranks part ways, seconds
DEPARTURES = {"nothing": 0, "a shorter collective": 1, "a longer collective": 100_000}
CPU = torch.device("cpu")


def network(seed):
    torch.manual_seed(seed)
    conv, last = nn.Conv2d(3, seed, 3), nn.Linear(seed * 36, 2)
    return nn.Sequential(conv, nn.BatchNorm2d(seed), nn.ReLU(), nn.Flatten(), last).double()


def train(net, seed, place, P, group=None):
    """Eight steps on images of one sequence, of which each of P ranks takes its part."""
    generator, optimiser = torch.Generator().manual_seed(seed), torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(8):
        images = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64).chunk(P)[place]
        optimiser.zero_grad()
        net(images).square().mean().backward()
        for parameter in net.parameters():
            if group is not None:
                dist.all_reduce(parameter.grad, group=group)
                parameter.grad /= P
        optimiser.step()
    return torch.cat([value.double().flatten() for value in net.state_dict().values()])


def start(*functions, pause=0.0):
    """Run each in a thread; what they return."""
    found = {}
    threads = [threading.Thread(target=lambda f=f: found.update({f: f()}), daemon=True) for f in functions]
    for thread in threads:
        thread.start()
        time.sleep(pause)
    return threads, found


def threads_in_another_order(rank, groups):
    """Each thread has a model and a group; on one rank they start the other way round."""
    place, seeds = MEMBERS.index(rank), (5, 9)
    nets = [syncbn.convert_sync_batchnorm(network(seed), group) for seed, group in zip(seeds, groups, strict=True)]
    training = [lambda i=i: train(nets[i], seeds[i], place, 2, groups[i]) for i in (0, 1)]
    threads, found = start(*training[:: 1 if place == 0 else -1], pause=0.5)
    for thread in threads:
        thread.join(30)
    return [found[one] for one in training]


def another_thread_in_the_store(rank, group):
    """It waits in the default store for a key, which rank 0 sets when its layer is done."""
    store = dist.distributed_c10d._get_default_store()
    threads = []
    if rank == MEMBERS[1]:
        threads, _ = start(lambda: store.wait(["done"], datetime.timedelta(seconds=20)), pause=0.5)
    found = SyncBatchNorm(3, process_group=group)(torch.arange(12.0).view(4, 3) + 12 * (rank > 0))
    waits = bool(threads) and threads[0].is_alive()
    dist.barrier(group)
    if rank == MEMBERS[0]:
        store.set("done", "")
    for thread in threads:
        thread.join(30)
    return found.mean().item(), waits


def parts_ways(rank, group, length):
    """Two steps together. Then rank 2 leaves for a collective of its own, or for nothing; the error of rank 0."""
    net = nn.ModuleDict({name: SyncBatchNorm(4, process_group=group) for name in ("early", "late")})
    for _ in range(2):
        net["late"](net["early"](torch.randn(5, 4)))
    began = time.monotonic()
    try:
        if rank == MEMBERS[0]:
            net["early"](torch.randn(5, 4))
        elif length:
            dist.all_reduce(torch.ones(length), group=group)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - began
    return "no error", 0


def all_part_ways(rank, groups):
    """At the same time, each in a thread."""
    lengths = DEPARTURES.values()
    cases = [lambda g=g, n=n: parts_ways(rank, g, n) for g, n in zip(groups, lengths, strict=True)]
    threads, found = start(*cases)
    for thread in threads:
        thread.join(30)
    return [found[case] for case in cases]


def held():
    """How many threads and sockets this process has; a descriptor may be closed while they are counted."""
    sockets = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        if os.path.lexists(descriptor):
            sockets += os.path.realpath(descriptor).rpartition("/")[2].startswith("socket:")
    return len(list(Path("/proc/self/task").iterdir())), sockets


def made_and_destroyed(rank):
    """Groups, one after the other, each with a message; and what a layer of a destroyed one says."""
    counts, refusal = [], ""
    for _ in range(6):
        group = dist.new_group(MEMBERS)
        if rank not in MEMBERS:
            continue
        layer = SyncBatchNorm(3, process_group=group)
        layer(torch.randn(4, 3))
        dist.destroy_process_group(group)
        try:
            layer(torch.randn(4, 3))
        except ValueError as error:
            refusal = str(error)
        del layer, group
        counts.append(held())
    return counts, refusal


def another_backend(rank):
    """One that is unknown, whatever carries it; ranks that share the user's communicator, and that differ in that."""
    make = lambda store, rank, size, timeout: dist.ProcessGroupGloo(store, rank, size, timeout=timeout)  # noqa: E731
    dist.Backend.register_backend("another", make, devices=["cpu"])
    found = []
    for backend, share in ("gloo", ""), ("gloo", "1"), ("another", ""), ("gloo", str(rank)):
        os.environ[SHARE] = share
        group = dist.new_group(MEMBERS, backend=backend)
        if rank not in MEMBERS:
            continue
        layer = SyncBatchNorm(3, process_group=group)
        try:
            y = layer(torch.arange(12.0).view(4, 3) + 12 * (rank > 0))
        except RuntimeError as error:
            found.append(str(error))
        else:
            found.append((y.mean().item(), _channel(group, CPU).communicator is group))
    del os.environ[SHARE]
    return found


def cases(rank):
    timeout = datetime.timedelta(seconds=TIMEOUT)
    pair = [dist.new_group(MEMBERS) for _ in range(2)]
    short = [dist.new_group(MEMBERS, timeout=timeout) for _ in DEPARTURES]
    found = {"destroyed": made_and_destroyed(rank), "backends": another_backend(rank)}
    if rank not in MEMBERS:
        return None
    return found | {
        "threads": threads_in_another_order(rank, pair),
        "store": another_thread_in_the_store(rank, pair[0]),
        "departures": all_part_ways(rank, short),
    }


@pytest.fixture(scope="module")
def found():
    ranks = run_ranks(cases, 3, timeout=120)
    return [ranks[rank] for rank in MEMBERS]


@pytest.mark.parametrize("place", [0, 1])
def test_threads_may_start_in_another_order_on_each_rank(found, place):
    for seed, state in zip((5, 9), found[place]["threads"], strict=True):
        torch.testing.assert_close(state, train(network(seed), seed, 0, 1), rtol=0, atol=1e-12)


def test_another_thread_may_wait_in_the_store(found):
    (first, _), (second, waits) = (one["store"] for one in found)
    assert waits
    assert abs(first + second) < 1e-6


@pytest.mark.parametrize("case", range(len(DEPARTURES)), ids=list(DEPARTURES))
def test_a_rank_that_leaves_is_named_with_the_layers_of_all(found, case):
    text, seconds = found[0]["departures"][case]
    assert text.startswith("RuntimeError"), text
    assert "rank 2: silent, last known at message 4, forward of 'late' SyncBatchNorm(4)" in text
    assert "rank 0: forward of 'early' SyncBatchNorm(4)" in text
    assert f"process group: {TIMEOUT} s" in text
    assert seconds < TIMEOUT + 1


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads and sockets in /proc")
def test_a_communicator_goes_with_its_group(found):
    for one in found:
        (first, *others), _ = one["destroyed"]
        assert others == [first] * len(others)


def test_a_destroyed_group_is_refused(found):
    for one in found:
        assert "was destroyed: set layer.process_group" in one["destroyed"][1]


def test_what_carries_the_messages(found):
    """A communicator of their own, over gloo; the group's own where the user or the backend wants it so."""
    for one, other in zip(*(found[place]["backends"] for place in (0, 1)), strict=True):
        if isinstance(one, tuple):
            assert abs(one[0] + other[0]) < 1e-6
    for place in (0, 1):
        *shared, differing = found[place]["backends"]
        assert [own for _, own in shared] == [False, True, True]
        one, other = differing.split("; ")[:2]
        assert SHARE not in one and SHARE in other


# ---- NCCL, as far as PyTorch's description of its own classes goes ---------------------------------


class Recorder:
    """Has any attribute, and remembers which were set."""

    def __init__(self, **given):
        self.__dict__.update(given)

    def __getattr__(self, name):
        self.__dict__[name] = Recorder()
        return self.__dict__[name]


def stub_attributes():
    """Attributes by class in PyTorch's stub file, which PyTorches without NCCL have, too."""
    tree = ast.parse((Path(torch.__file__).parent / "_C/_distributed_c10d.pyi").read_text())
    classes = {c.name: c for c in tree.body if isinstance(c, ast.ClassDef)}
    nested = {
        f"{name}.{c.name}": c for name, owner in classes.items() for c in owner.body if isinstance(c, ast.ClassDef)
    }
    return {
        name: {n.target.id for n in c.body if isinstance(n, ast.AnnAssign)}
        | {n.name for n in c.body if isinstance(n, ast.FunctionDef)}
        for name, c in nested.items()
    }


def test_options_of_nccl_are_those_that_pytorch_has(monkeypatch):
    made = []

    class Stub:
        Options = Recorder

        def __init__(self, store, rank, size, options):
            made.append((store, rank, size, options))

    monkeypatch.setattr(dist, "ProcessGroupNCCL", Stub, raising=False)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [4, 6])
    group = Recorder(rank=lambda: 1, size=lambda: 2, group_name="pair")
    communicator._nccl(group, "a store", datetime.timedelta(seconds=5))
    ((store, rank, size, options),) = made
    assert (store, rank, size) == ("a store", 1, 2)
    assert options._timeout == datetime.timedelta(seconds=5)
    assert options.global_ranks_in_group == [4, 6]
    known = stub_attributes()
    assert options.__dict__.keys() <= known["ProcessGroupNCCL.Options"] | known["Backend.Options"]
    assert options.config.__dict__.keys() <= known["ProcessGroupNCCL.NCCLConfig"]
