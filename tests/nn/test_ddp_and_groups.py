"""Inside DistributedDataParallel on CPU, and with process groups of every kind."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from norm_cases import buffer_bytes, relative
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from traffic import Traffic

import syncbn
from ranks import run_ranks
from syncbn import SyncBatchNorm, sync_batch_norm_group
from syncbn.ops import reference


class Network(nn.Module):
    """A residual block and a pair of branches: the layer alone, with residual, grouped; and a branch seldom used."""

    def __init__(self, norm=SyncBatchNorm, **options):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = norm(4, activation="relu", **options)
        self.again, self.again_norm = nn.Conv2d(4, 4, 3, padding=1), norm(4, activation="relu", **options)
        self.a, self.b = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 2, 3, padding=1)
        self.a_norm, self.b_norm = norm(3, **options), norm(2, **options)
        self.seldom, self.seldom_norm = nn.Conv2d(4, 5, 1), norm(5, **options)
        self.head = nn.Linear(5, 3)
        self.double()

    def forward(self, x, use_all=True, recompute=None):
        x = self.norm(self.conv(x))
        if recompute is None:
            x = self.block(x)
        else:
            x = checkpoint(self.block, x, use_reentrant=recompute)
        x = torch.cat(sync_batch_norm_group([self.a_norm, self.b_norm], [self.a(x), self.b(x)]), 1)
        return self.head(x.mean((2, 3)))

    def block(self, x):
        return self.again_norm(self.again(x), x)


def images(n, step=0):
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(step)).double()


def trained(net, batches, **arguments):
    """Two SGD steps on each batch; the loss is the mean over the batch."""
    optimiser = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1, momentum=0.9)
    for x in batches:
        optimiser.zero_grad()
        net(x, **arguments).pow(2).sum(1).mean().backward()
        optimiser.step()
    return net


def compare(net, twin):
    pairs = zip(net.state_dict().values(), twin.state_dict().values(), strict=True)
    return max(relative(a.detach(), b.detach()) for a, b in pairs)


def ddp_training(rank, P):
    """DDP on P ranks against one process with the whole batches, under DDP's several options."""
    batches = [images(4 * P, step) for step in range(3)]
    mine = [x[4 * rank : 4 * rank + 4] for x in batches]
    group = dist.new_group([rank]) if P == 1 else None
    twin = trained(alone(Network()), batches)
    worst = {}
    for options in (
        {"broadcast_buffers": False},
        {"broadcast_buffers": True},
        {"broadcast_buffers": False, "static_graph": True},
        {"broadcast_buffers": False, "gradient_as_bucket_view": True},
        {"broadcast_buffers": False, "bucket_cap_mb": 1e-4},
    ):
        options = {"find_unused_parameters": not options.get("static_graph"), **options}
        net = trained(DistributedDataParallel(Network(), **options), mine).module
        worst[str(options)] = compare(net, twin)
    for reentrant in (False, True):
        options = {"static_graph": True, "broadcast_buffers": False}
        net = trained(DistributedDataParallel(Network(), **options), mine, recompute=reentrant).module
        worst[f"checkpoint {reentrant}"] = compare(net, twin)
    return worst, buffer_bytes(net), group is None


def alone(net):
    """The same network, whose layers exchange nothing: the whole batch in one process."""
    for m in net.modules():
        if isinstance(m, SyncBatchNorm):
            m.process_group = _solo()
    return net


_SOLO = []


def _solo():
    if not _SOLO:
        groups = [dist.new_group([r]) for r in range(dist.get_world_size())]
        _SOLO.append(groups[dist.get_rank()])
    return _SOLO[0]


@pytest.mark.parametrize("P", [2, 3])
@pytest.mark.filterwarnings("ignore:find_unused_parameters=True was specified:UserWarning")
def test_ddp_is_one_process_with_the_whole_batch(P):
    found = run_ranks(ddp_training, P, P)
    for worst, buffers, _ in found:
        assert {k: v for k, v in worst.items() if not v < 1e-10} == {}
        assert buffers == found[0][1]


def accumulation(rank):
    """Two micro-batches under no_sync, the third with the all-reduce; ours goes on synchronising in each."""
    batches = [images(8, step) for step in range(3)]
    mine = [x[4 * rank : 4 * rank + 4] for x in batches]
    twin = alone(Network())
    for x in batches:
        twin(x).pow(2).sum(1).mean().backward()
    net = DistributedDataParallel(Network(), broadcast_buffers=False, find_unused_parameters=True)
    with net.no_sync():
        for x in mine[:2]:
            net(x).pow(2).sum(1).mean().backward()
    net(mine[2]).pow(2).sum(1).mean().backward()
    errors = [
        relative(p.grad, q.grad)
        for (name, p), q in zip(net.module.named_parameters(), twin.parameters(), strict=True)
        if q.grad is not None and q.grad.abs().max() > 1e-9
    ]
    return errors, compare(net.module, twin)


def test_gradient_accumulation_under_no_sync():
    for errors, buffers in run_ranks(accumulation, 2):
        assert max(errors) < 1e-10
        assert buffers < 1e-12


def uneven_under_ddp(rank):
    """Ranks with 3, 1 and 0 images: with the loss weighted by images, DDP's mean is the whole batch's gradient."""
    sizes = [3, 1, 0]
    whole = images(4)
    twin = alone(Network())
    twin(whole).pow(2).sum(1).mean().backward()
    net = DistributedDataParallel(Network(), broadcast_buffers=False, find_unused_parameters=True)
    x = whole.split(sizes)[rank]
    (net(x).pow(2).sum() * 3 / 4).backward()
    return [
        relative(p.grad, q.grad)
        for p, q in zip(net.module.parameters(), twin.parameters(), strict=True)
        if q.grad is not None and q.grad.abs().max() > 1e-9
    ]


def test_uneven_batches_under_ddp():
    for errors in run_ranks(uneven_under_ddp, 3):
        assert max(errors) < 1e-10


# ---- process groups ------------------------------------------------------------------------------


def groups_side_by_side(rank):
    """Pairs, a triple and a single, and the world, all in use in one process: each normalises its own ranks."""
    triple = dist.new_group([0, 1, 3])
    memberships = {
        "pairs": ([0, 1] if rank < 2 else [2, 3], syncbn.new_group(2)),
        "singles": ([rank], syncbn.new_group(1)),
        "all": ([0, 1, 2, 3], syncbn.new_group(4)),
        "world": ([0, 1, 2, 3], None),
    }
    if rank != 2:
        memberships["triple"] = ([0, 1, 3], triple)
    whole = torch.randn(12, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    dy = torch.randn(12, 3, 5, generator=torch.Generator().manual_seed(1)).double()
    parts, dys = whole.split(3), dy.split(3)
    layers = {name: SyncBatchNorm(3, process_group=group).double() for name, (_, group) in memberships.items()}
    errors = {}
    for step in range(2):
        for name, (ranks, _) in memberships.items():
            x = parts[rank].clone().requires_grad_()
            with Traffic() as sent:
                y = layers[name](x)
                y.backward(dys[rank])
            batch, gradient = torch.cat([parts[r] for r in ranks]), torch.cat([dys[r] for r in ranks])
            place = slice(3 * ranks.index(rank), 3 * ranks.index(rank) + 3)
            errors[name, step] = (
                relative(y.detach(), reference.batch_norm(batch).y[place]),
                relative(x.grad, reference.batch_norm_gradients(gradient, batch).x[place]),
            )
            assert sent.count == (0 if len(ranks) == 1 else 2), (name, sent.sent)
    return errors, {name: buffer_bytes(layer) for name, layer in layers.items()}, repr(layers["pairs"])


def test_groups_side_by_side():
    found = run_ranks(groups_side_by_side, 4)
    for errors, _, _ in found:
        assert {k: v for k, v in errors.items() if not max(v) < 1e-12} == {}
    buffers = [b for _, b, _ in found]
    assert buffers[0]["pairs"] == buffers[1]["pairs"] != buffers[2]["pairs"] == buffers[3]["pairs"]
    assert buffers[0]["triple"] == buffers[1]["triple"] == buffers[3]["triple"]
    assert buffers[0]["world"] == buffers[2]["world"] == buffers[2]["all"]
    assert ["[0, 1]" in r or "[2, 3]" in r for _, _, r in found] == [True] * 4


def group_changed(rank):
    layer = SyncBatchNorm(3).double()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(rank)).double()
    layer(x)
    layer.process_group = syncbn.new_group(2)
    layer.running_mean.zero_()
    layer(x)
    return layer.running_mean.tolist(), layer.process_group.size()


def test_the_group_of_a_layer_can_be_changed():
    found = run_ranks(group_changed, 4)
    assert [size for _, size in found] == [2] * 4
    for first, second in itertools.pairwise(range(4)):
        same = found[first][0] == found[second][0]
        assert same == (first % 2 == 0)


def a_world_of_one(rank):
    layer = SyncBatchNorm(3).double()
    plain = nn.BatchNorm1d(3).double()
    x = torch.randn(4, 3, 5).double()
    with Traffic() as sent:
        leaf = x.clone().requires_grad_()
        layer(leaf).pow(3).sum().backward()
    other = x.clone().requires_grad_()
    plain(other).pow(3).sum().backward()
    return sent.count, relative(leaf.grad, other.grad), relative(layer.running_var, plain.running_var)


def test_a_world_of_one():
    ((sent, *errors),) = run_ranks(a_world_of_one, 1)
    assert sent == 0
    assert max(errors) < 1e-12


def world_destroyed_and_made_again(rank):
    """Tests and notebooks do; what was agreed in the first world must not be read in the second."""
    layer = SyncBatchNorm(3)
    layer(torch.randn(4, 3))
    store = dist.distributed_c10d._get_default_store()
    dist.barrier()
    dist.destroy_process_group()
    layer(torch.randn(4, 3))  # alone
    dist.init_process_group("gloo", store=dist.PrefixStore("again", store), rank=rank, world_size=2)
    other = SyncBatchNorm(5)
    for _ in range(2):
        other(torch.randn(4, 5, generator=torch.Generator().manual_seed(rank)))
    return buffer_bytes(other)


def test_world_destroyed_and_made_again():
    first, second = run_ranks(world_destroyed_and_made_again, 2)
    assert first == second


def copies_in_use(rank):
    """An average of the weights kept as a deep copy: both models go on working, and are not each other's layers."""
    net = Network()
    net(images(4, rank))
    twin = copy.deepcopy(net)
    for step in range(2):
        net(images(4, rank + 2 * step)).sum().backward()
        twin(images(4, rank + 2 * step)).sum().backward()
    return buffer_bytes(net), buffer_bytes(twin)


def test_copies_in_use():
    found = run_ranks(copies_in_use, 2)
    assert found[0] == found[1]
    assert found[0][0] == found[0][1]
