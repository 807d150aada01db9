"""Ranks in different layers: an error that names layers and ranks on every live rank, not a hang, not wrong numbers.

And the other side: what all ranks do alike, in whatever order, must not raise.
"""

import datetime
import itertools
import random
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from ranks import RankError, run_ranks
from syncbn import SyncBatchNorm, sync_batch_norm_group
from syncbn.collectives.agreement import Agreement, LayerName, Message

TIMEOUT = 3  # of the process group, seconds


class Network(nn.Module):
    """Three layers of 4 channels and one of 6, each to be called by name."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (SyncBatchNorm(4) for _ in range(3))
        self.wide = SyncBatchNorm(6)
        self.spare, self.wide_spare = SyncBatchNorm(4), SyncBatchNorm(6)

    def run(self, path, backward=True):
        """Call the layers named in `path`, one after the other, then backward through them all."""
        x = torch.randn(5, 4, requires_grad=True)
        for name in path.split():
            if name.startswith("wide"):
                x = getattr(self, name)(torch.cat([x, x[:, :2]], 1))[:, :4]
            elif name == "group":
                x = sum(sync_batch_norm_group([self.first, self.second], [x, x.sin()]))
            else:
                x = getattr(self, name)(x)
        if backward:
            x.sum().backward()


ALL = "first second wide third"
SCENARIOS = {
    # name: the paths of one rank (the last) and of the others, step by step
    "another layer of the same width, first step": (["first third"], ["first second"]),
    "another layer of the same width, later step": ([ALL, ALL, "first third wide third"], [ALL, ALL, ALL]),
    "two layers exchanged, later step": ([ALL, "second first wide third"], [ALL, ALL]),
    "another width, first step": (["first wide"], ["first second"]),
    "another width, later step": ([ALL, "first wide second third"], [ALL, ALL]),
    "another width in the very first message": (["wide"], ["first"]),
    "skips the first, first step": (["second wide third", ALL], [ALL, ALL]),
    "skips the first, later step": ([ALL, "second wide third", ALL], [ALL, ALL, ALL]),
    "skips one in the middle, first step": (["first wide third"], [ALL]),
    "skips one in the middle, later step": ([ALL, "first wide third"], [ALL, ALL]),
    "skips the wide one, later step": ([ALL, "first second third"], [ALL, ALL]),
    "skips the last, later step": ([ALL, "first second wide", ALL], [ALL, ALL, ALL]),
    "one layer too many": ([ALL, "first first second wide third"], [ALL, ALL]),
    "a layer never run before, later step": ([ALL, ALL, "first spare wide third"], [ALL, ALL, ALL]),
    "a layer never run before, of another width": ([ALL, "first wide_spare wide third"], [ALL, ALL]),
    "two layers never run before": ([ALL, "first spare wide third"], [ALL, "first wide_spare wide third"]),
    "a group against single layers": ([ALL, "group wide third"], [ALL, ALL]),
    "a group against single layers, first step": (["group"], ["first second"]),
}


def outcome(net, paths):
    """(kind, text, seconds) of the error that a rank ended with."""
    began = time.monotonic()
    try:
        for path in paths:
            net.run(path)
    except BaseException as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return "none", "", time.monotonic() - began


def all_scenarios(rank, P, names):
    """Each in a process group of its own, so that one that is broken does not spoil the next."""
    found = {}
    for name in names:
        timeout = datetime.timedelta(seconds=TIMEOUT)
        group = dist.new_group(list(range(P)), timeout=timeout)
        net = Network()
        for layer in net.children():
            layer.process_group = group
        odd, others = SCENARIOS[name]
        found[name] = outcome(net, odd if rank == P - 1 else others)
    return found


def describe(found, P):
    """What is wrong with the errors of one scenario."""
    wrong = []
    for rank, (kind, text, seconds) in enumerate(found):
        if kind == "none":
            wrong.append(f"rank {rank} noticed nothing")
        elif kind not in ("LayerMismatch", "RuntimeError", "ValueError"):
            wrong.append(f"rank {rank}: {kind}: {text}")
        elif "\n" in text or not any(name in text for name in ("first", "second", "third", "wide", "spare")):
            wrong.append(f"rank {rank} names no layer: {text}")
        elif not all(f"rank {r}" in text for r in range(P)):
            wrong.append(f"rank {rank} does not name all ranks: {text}")
        if seconds > TIMEOUT + 6:
            wrong.append(f"rank {rank} took {seconds:.0f} s")
    return wrong


@pytest.mark.parametrize("P", [2, 3])
@pytest.mark.parametrize("part", range(3))
def test_ranks_in_different_layers(P, part):
    names = list(SCENARIOS)[part::3]
    found = run_ranks(all_scenarios, P, P, names, timeout=150, group_timeout=60)
    wrong = {name: describe([f[name] for f in found], P) for name in names}
    assert {name: w for name, w in wrong.items() if w} == {}


def drawn_scenarios(rank, seeds):
    """Steps drawn alike on both ranks, but for one call that rank 1 replaces, adds or leaves out."""
    found = []
    names = ["first", "second", "third", "wide", "group", "spare", "wide_spare"]
    for seed in seeds:
        draw = random.Random(seed)
        steps = [draw.choices(names, k=draw.randint(2, 5)) for _ in range(draw.randint(1, 5))]
        if draw.random() < 0.7:
            steps = [steps[0]] * draw.randint(1, 3) + steps
        odd = [list(step) for step in steps]
        step = draw.choice(odd)
        place, kind = draw.randrange(len(step)), draw.choice(["replace", "add", "leave out"])
        other = draw.choice([n for n in names if n != step[place]])
        step[place : place + 1] = {"replace": [other], "add": [step[place], other], "leave out": []}[kind]
        group = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=TIMEOUT))
        net = Network()
        for layer in net.children():
            layer.process_group = group
        paths = [" ".join(s) for s in (odd if rank else steps) if s] + [ALL]
        found.append((paths, *outcome(net, paths)))
    return found


def test_one_call_astray_anywhere():
    seeds = range(24)
    found = run_ranks(drawn_scenarios, 2, seeds, timeout=200, group_timeout=60)
    wrong = {}
    for seed, one, other in zip(seeds, *found, strict=True):
        problems = describe([one[1:], other[1:]], 2)
        if problems:
            wrong[seed] = (problems, one[0], other[0])
    assert wrong == {}


def twins(rank, how):
    """Two models of one architecture, e.g. teacher and student: each rank calls another one."""
    import copy

    net = nn.Sequential(SyncBatchNorm(3))
    if how == "copied after use":
        net(torch.randn(4, 3))
    other = nn.Sequential(SyncBatchNorm(3)) if how == "built alike" else copy.deepcopy(net)
    for _ in range(2):  # in agreement at first
        net(torch.randn(4, 3))
        other(torch.randn(4, 3))
    (net if rank == 0 else other)(torch.randn(4, 3))


@pytest.mark.parametrize("how", ["copied before use", "copied after use", "built alike"])
def test_two_models_of_one_architecture_are_told_apart(how):
    with pytest.raises(RankError) as caught:
        run_ranks(twins, 2, how, group_timeout=TIMEOUT)
    assert {kind for kind, _ in caught.value.errors.values()} <= {"LayerMismatch", "RuntimeError"}
    assert len(caught.value.errors) == 2


def stops_early(rank, P, step):
    net = Network()
    for i in range(3):
        if rank == P - 1 and i == step:
            return  # its process stays: the sockets are open, and silent
        net.run(ALL)


@pytest.mark.parametrize(("P", "step"), [(2, 1), (3, 0)])
def test_a_rank_that_stops_early(P, step):
    began = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(stops_early, P, P, step, timeout=TIMEOUT + 15, group_timeout=TIMEOUT)
    assert time.monotonic() - began < TIMEOUT + 10
    errors = caught.value.errors
    assert sorted(errors) == list(range(P - 1))
    for rank, (kind, text) in errors.items():
        assert kind in ("LayerMismatch", "RuntimeError"), (rank, kind, text)
        assert "first" in text, text
        assert f"rank {rank}" in text, text


class Unreachable:
    """The key-value store behind a link that was cut: no error, and no answer for a long time."""

    def set(self, key, value):
        pass

    def check(self, keys):
        time.sleep(120)
        raise RuntimeError("connection reset")


def describes_without_a_store(rank):
    agreement = Agreement(dist.group.WORLD, torch.device("cpu"))
    agreement.store = Unreachable()
    began = time.monotonic()
    said = agreement.describe(7, Message("forward", (LayerName("first", "SyncBatchNorm(4)", 0),), 9))
    return said, time.monotonic() - began


def test_a_store_that_does_not_answer_is_not_waited_for():
    for rank, (said, seconds) in enumerate(run_ranks(describes_without_a_store, 2)):
        assert said.split("; ")[rank] == f"rank {rank}: forward of 'first' SyncBatchNorm(4)"
        assert said.split("; ")[1 - rank] == f"rank {1 - rank}: nothing heard"
        assert seconds < 30


def dies(rank):
    import os

    net = Network()
    net.run(ALL)
    if rank == 1:
        os._exit(1)
    net.run(ALL)


def test_a_rank_that_dies():
    with pytest.raises(RankError) as caught:
        run_ranks(dies, 2, timeout=TIMEOUT + 15, group_timeout=TIMEOUT)
    kind, text = caught.value.errors[0]
    assert kind in ("LayerMismatch", "RuntimeError")
    assert "rank 0" in text and ("first" in text or "wide" in text or "third" in text), text


def silent_in_a_group(rank, how):
    """In a group of its own the timeout of that group holds (new_group's is the world's), not PyTorch's 30 minutes."""
    if how == "new_group":
        group = syncbn.new_group(2)
    else:
        group = dist.new_group([0, 1] if rank < 2 else [2, 3], timeout=datetime.timedelta(seconds=2))
    layer = SyncBatchNorm(3, process_group=group)
    if how == "later":
        layer(torch.randn(4, 3))
    began = time.monotonic()
    if rank % 2:
        return None  # its process stays: silent, not gone
    try:
        layer(torch.randn(4, 3))
    except RuntimeError as error:
        return time.monotonic() - began, str(error)
    return None


@pytest.mark.parametrize(("how", "world"), [("new_group", 2), ("first", 30), ("later", 30)])
def test_the_timeout_is_the_process_groups(how, world):
    found = run_ranks(silent_in_a_group, 2, how, timeout=20, group_timeout=world)
    seconds, text = found[0]
    assert seconds < 7
    assert "SyncBatchNorm(3)" in text and "rank 0" in text


def backward_of_some(rank, step):
    """A rank whose loss leaves one layer out: the others' backward has a message more."""
    net = Network()
    for i in range(3):
        x = torch.randn(5, 4, requires_grad=True)
        a, b = net.first(x), net.second(x)
        loss = a.sum() if rank == 1 and i == step else a.sum() + b.sum()
        loss.backward()


@pytest.mark.parametrize("step", [0, 1])
def test_a_backward_that_leaves_a_layer_out(step):
    with pytest.raises(RankError) as caught:
        run_ranks(backward_of_some, 2, step, timeout=TIMEOUT + 15, group_timeout=TIMEOUT)
    for rank, (kind, text) in caught.value.errors.items():
        assert kind in ("LayerMismatch", "RuntimeError"), (rank, kind, text)
        assert "second" in text and "backward" in text, text
    assert len(caught.value.errors) == 2


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.seldom = nn.Linear(4, 4), SyncBatchNorm(4)

    def forward(self, x, skip):
        x = self.body(x)
        return x if skip else self.seldom(x)


def skips_the_last_under_ddp(rank, step):
    """The rank that skips goes on to DDP's own all-reduce of gradients, in the same process group."""
    net = DistributedDataParallel(Skipping(), broadcast_buffers=False, find_unused_parameters=True)
    for i in range(3):
        net(torch.randn(5, 4), skip=rank == 1 and i == step).pow(2).sum().backward()


@pytest.mark.parametrize("step", [0, 1])
def test_a_layer_skipped_under_ddp(step):
    with pytest.raises(RankError) as caught:
        run_ranks(skips_the_last_under_ddp, 2, step, timeout=TIMEOUT + 20, group_timeout=TIMEOUT)
    kinds = {rank: kind for rank, (kind, _) in caught.value.errors.items()}
    assert set(kinds.values()) <= {"LayerMismatch", "RuntimeError"}, caught.value.errors
    assert "seldom" in caught.value.errors[0][1]


def running_statistics_after_a_mismatch(rank):
    """Wrong sums must not reach the running statistics that a checkpoint would keep."""
    net = Network()
    net.run(ALL)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    try:
        net.second(torch.randn(5, 4)) if rank else net.first(torch.randn(5, 4))
    except RuntimeError:
        return all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    return "no error"


def test_nothing_is_updated_by_a_mismatch():
    assert run_ranks(running_statistics_after_a_mismatch, 2, group_timeout=TIMEOUT) == [True, True]


# ---- what is no disagreement ---------------------------------------------------------------------

ROUTES = [
    [ALL, ALL, ALL],
    [ALL, "third wide second first", ALL, "third wide second first"],
    ["first", "second", "wide", "first second", "second first", "wide wide", "first"],
    ["first first first", "first", "first first first first", "first"],
    [ALL, "first second third", ALL, "wide", ALL],
    ["group", ALL, "group group", "first second", "group"],
    ["wide", "first", "wide", "wide", "first", "first", "wide"],
    ["first wide", "first second", "first wide", "first third"],
]


def legitimate_routes(rank, seed):
    """All ranks alike: every route above, and a hundred drawn at random from one seed; now and then no backward."""
    draw = random.Random(seed)
    for route in ROUTES:
        net = Network()
        for path in route:
            net.run(path)
    net, other = Network(), Network()
    names = ["first", "second", "third", "wide", "group"]
    for _ in range(100):
        path = " ".join(draw.choices(names, k=draw.randint(1, 5)))
        draw.choice([net, other]).run(path, backward=draw.random() < 0.7)
    return True


def test_new_routes_taken_by_all():
    assert run_ranks(legitimate_routes, 3, 0) == [True] * 3


def worlds_of_their_own(rank):
    """Ranks differ in what they built besides the model: an extra layer, a wrapper, a logger that holds the model."""
    keep = []
    if rank == 0:
        keep.append(SyncBatchNorm(4))  # never called
        keep.append(nn.Sequential(SyncBatchNorm(3), SyncBatchNorm(4)))
    loose = SyncBatchNorm(4)
    net = Network()
    if rank == 1:
        keep.append(nn.ModuleDict({"watched": net, "loose": loose}))
    for _ in range(2):
        net.run(ALL)
        loose(torch.randn(5, 4))
    if rank == 0:
        keep.append(nn.Sequential(nn.Identity(), net))
        keep.append(SyncBatchNorm(4))
    late = SyncBatchNorm(4)
    for _ in range(2):
        net.run(ALL)
        late(torch.randn(5, 4))
    return True


def test_ranks_may_differ_in_what_they_hold_besides():
    assert run_ranks(worlds_of_their_own, 2, group_timeout=TIMEOUT) == [True, True]


def evaluated_on_one_rank(rank):
    """Rank 0 alone validates between the epochs, with a copy of the model too."""
    import copy

    net = Network()
    for _ in range(3):
        net.run(ALL)
        if rank == 0:
            twin = copy.deepcopy(net).eval()
            twin.run(ALL, backward=False)
            net.eval()
            net.run("third first wide", backward=False)
            net.train()
    return True


def test_evaluation_on_one_rank():
    assert run_ranks(evaluated_on_one_rank, 2, group_timeout=TIMEOUT) == [True, True]


def other_collectives_between(rank):
    net = Network()
    for path in itertools.chain(*ROUTES):
        dist.all_reduce(torch.ones(3))
        net.run(path)
        dist.barrier()
    return True


def test_other_collectives_between():
    assert run_ranks(other_collectives_between, 2, group_timeout=TIMEOUT) == [True, True]
