"""convert_sync_batchnorm and revert_sync_batchnorm: what is kept, what is refused."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from norm_cases import buffer_bytes, relative
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn
from ranks import run_ranks
from syncbn import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm

PLAIN = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm]


class Network(nn.Module):
    """One of each, a shared layer under two names, a frozen one, one in eval, a parameter list beside."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=None), nn.ReLU())
        self.shared = nn.BatchNorm2d(4)
        self.body = nn.ModuleDict({"a": nn.Sequential(nn.Conv2d(4, 4, 1), self.shared), "again": self.shared})
        self.frozen = nn.BatchNorm2d(4, affine=False).eval()
        self.head_norm = nn.BatchNorm1d(4, track_running_stats=False)
        self.head_norm.weight.requires_grad_(False)
        self.other = nn.GroupNorm(2, 4)

    def forward(self, x):
        x = self.stem(x)
        x = self.shared(x) + self.body["a"](x) + self.body["again"](x)
        return self.head_norm(self.other(self.frozen(x)).mean((2, 3)))


def norms(net):
    return {name: m for name, m in net.named_modules(remove_duplicate=False) if isinstance(m, _BatchNorm)}


def identity(net):
    """Everything that an optimiser, a checkpoint or a hook may hold on to."""
    tensors = {
        name: (id(t), t.requires_grad)
        for name, t in [*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)]
    }
    modules = {name: (id(m), m.training) for name, m in net.named_modules(remove_duplicate=False)}
    return tensors, modules, list(net.state_dict())


def test_conversion_keeps_identities_flags_and_names():
    net = Network()
    before, kinds = identity(net), {name: type(m) for name, m in net.named_modules()}
    converted = convert_sync_batchnorm(net)
    assert converted is net
    assert identity(net) == before
    assert all(type(m) is SyncBatchNorm for m in norms(net).values())
    assert net.stem[1].eps == 1e-3
    assert net.stem[1].momentum is None
    assert net.shared is net.body["again"] is net.body["a"][1]
    assert revert_sync_batchnorm(net) is net
    assert identity(net) == before
    assert {name: type(m) for name, m in net.named_modules()} == kinds


def test_revert_leaves_nothing_behind():
    net, pristine = Network(), Network()
    convert_sync_batchnorm(net)
    net(torch.randn(4, 3, 6, 6)).sum().backward()
    revert_sync_batchnorm(net)
    for name, layer in norms(net).items():
        assert set(layer.__dict__) == set(norms(pristine)[name].__dict__), name
        assert repr(layer) == repr(norms(pristine)[name])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("times", [1, 2, 3])
def test_there_and_back_again(times):
    net, twin = Network(), Network()
    x = torch.randn(4, 3, 6, 6)
    for _ in range(times):
        convert_sync_batchnorm(convert_sync_batchnorm(net))
        torch.testing.assert_close(net(x), twin(x))
        revert_sync_batchnorm(revert_sync_batchnorm(net))
        torch.testing.assert_close(net(x), twin(x))
    for (name, a), b in zip(net.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("plain", PLAIN)
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str
)
def test_a_single_layer(plain, options):
    layer = plain(3, 1e-4, **options)
    before = {name: id(t) for name, t in [*layer.named_parameters(), *layer.named_buffers()]}
    converted = convert_sync_batchnorm(layer)
    assert converted is layer
    assert type(layer) is SyncBatchNorm
    assert {name: id(t) for name, t in [*layer.named_parameters(), *layer.named_buffers()]} == before
    layer(torch.randn(4, 3, 5, requires_grad=True)).sum().backward()
    assert type(revert_sync_batchnorm(layer)) is plain


@pytest.mark.usefixtures("float64")
def test_a_layer_without_bias():
    """A new option of torch's layers: gamma without beta."""
    layer = nn.BatchNorm2d(3)
    layer.bias = None
    x = torch.randn(4, 3, 5, 5)
    true = layer(x)
    convert_sync_batchnorm(layer)
    torch.testing.assert_close(layer(x), true)


def test_hooks_survive_and_fire_once():
    net, fired = nn.Sequential(nn.BatchNorm2d(3)), []
    layer = net[0]
    layer.register_forward_pre_hook(lambda m, args: fired.append("pre"))
    layer.register_forward_hook(lambda m, args, out: fired.append("post"))
    layer.register_full_backward_hook(lambda m, gi, go: fired.append("backward"))
    layer.register_state_dict_post_hook(lambda *args: fired.append("state"))
    layer.weight.register_hook(lambda g: fired.append("weight"))
    layer.note = "an attribute of the user's"
    for change in (convert_sync_batchnorm, revert_sync_batchnorm):
        change(net)
        fired.clear()
        net(torch.randn(4, 3, 5, 5, requires_grad=True)).sum().backward()
        assert sorted(fired) == ["backward", "post", "pre", "weight"]
        net.state_dict()
        assert fired[-1] == "state"
        assert net[0].note == "an attribute of the user's"


def test_an_optimiser_made_before_still_trains():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimiser = torch.optim.SGD(net.parameters(), 0.1)
    convert_sync_batchnorm(net)
    before = net[1].weight.clone()
    net(torch.randn(4, 3, 6, 6)).pow(3).sum().backward()
    optimiser.step()
    assert not torch.equal(net[1].weight, before)


def test_half_precision_statistics_are_widened_on_the_way():
    net = nn.Sequential(nn.BatchNorm2d(3)).bfloat16()
    convert_sync_batchnorm(net)
    assert net[0].running_var.dtype == torch.float32
    net(torch.randn(4, 3, 5, 5).bfloat16())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_of_a_converted_network_can_be_reverted(duplicate):
    net = convert_sync_batchnorm(Network())
    net(torch.randn(4, 3, 6, 6)).sum().backward()
    net.zero_grad()
    twin = revert_sync_batchnorm(duplicate(net))
    assert type(twin.shared) is nn.BatchNorm2d
    assert twin.shared is twin.body["again"]
    file = io.BytesIO()
    torch.save(twin, file)


@pytest.mark.usefixtures("float64")
def test_layers_built_synchronised_become_plain_too():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), SyncBatchNorm(4, activation="relu"))
    x = torch.randn(4, 3, 6, 6)
    true = net(x)
    revert_sync_batchnorm(net)
    assert not isinstance(net[1], SyncBatchNorm)
    torch.testing.assert_close(net(x), true)
    convert_sync_batchnorm(net)
    assert type(net[1]) is SyncBatchNorm
    torch.testing.assert_close(net(x), true)


# ---- subclasses ----------------------------------------------------------------------------------


class Renamed(nn.BatchNorm2d):
    """No behaviour of its own."""


class WithForward(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class WithCheck(nn.BatchNorm2d):
    def _check_input_dim(self, x):
        pass


class FrozenInTraining(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(False)


class Renormalising(_BatchNorm):
    def forward(self, x):
        return x


class WithLoading(nn.BatchNorm2d):
    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)


class WithState(nn.BatchNorm2d):
    """Keeps its checkpoints in a layout of its own."""

    def state_dict(self, *args, **kwargs):
        return {f"old_{k}": v for k, v in super().state_dict(*args, **kwargs).items()}


class WithMethod(nn.BatchNorm2d):
    """Has something to say that the training loop asks for."""

    def sparsity(self):
        return self.weight.abs().sum()


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's: the activation is in the layer."""

    def __init__(self, num_features):
        super().__init__(num_features)
        self.drop, self.act = nn.Identity(), nn.SiLU(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def parametrized():
    layer = nn.BatchNorm2d(3)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())
    return layer


def patched():
    layer = nn.BatchNorm2d(3)
    layer.forward = lambda x: x * 2
    return layer


def lightning_reverted():
    """What a Trainer(sync_batchnorm=True) makes of a layer by the end of a fit."""
    sync = TorchSyncBatchNorm()
    return sync.revert(sync.apply(nn.Sequential(nn.BatchNorm2d(3))))[0]


UNKNOWN = {
    "renamed": lambda: Renamed(3),
    "forward": lambda: WithForward(3),
    "check": lambda: WithCheck(3),
    "train": lambda: FrozenInTraining(3),
    "base": lambda: Renormalising(3),
    "loading": lambda: WithLoading(3),
    "state": lambda: WithState(3),
    "method": lambda: WithMethod(3),
    "act": lambda: BatchNormAct2d(3),
    "lazy": nn.LazyBatchNorm2d,
    "parametrized": parametrized,
    "patched": patched,
    "instance": lambda: nn.InstanceNorm2d(3),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_subclasses_are_refused_by_name_or_keep_their_behaviour(kind):
    torch.manual_seed(0)
    layer = UNKNOWN[kind]()
    net = nn.Sequential(nn.BatchNorm2d(3), nn.ModuleDict({"odd": layer}))
    torch.manual_seed(0)
    twin, x = UNKNOWN[kind](), torch.randn(4, 3, 5, 5)
    class_before = type(layer)
    try:
        convert_sync_batchnorm(net)
    except ValueError as error:
        assert class_before.__name__.removeprefix("Parametrized") in str(error)
        assert "1.odd" in str(error)
        assert "\n" not in str(error)
        assert type(net[0]) is nn.BatchNorm2d, "half converted"
        assert type(layer) is class_before
        return
    true = twin.train()(x.clone())
    torch.testing.assert_close(layer.train()(x.clone()), true)
    assert list(layer.state_dict()) == list(twin.state_dict())
    assert {n for n in dir(twin) if not n.startswith("_")} <= set(dir(layer))
    revert_sync_batchnorm(net)
    assert type(layer) is class_before
    assert repr(layer) == repr(twin)


@pytest.mark.parametrize("reverted", [WithCheck(3), lightning_reverted()], ids=["own check", "sync_batchnorm=True"])
def test_what_overrides_the_check_of_dimensions_alone_converts(reverted):
    """Lightning leaves such layers behind, and so do functions that undo torch's conversion."""
    kind, x = type(reverted), torch.randn(4, 3, 5, 5)
    true = reverted(x)
    convert_sync_batchnorm(reverted)
    assert isinstance(reverted, SyncBatchNorm)
    torch.testing.assert_close(reverted(x), true)
    assert type(revert_sync_batchnorm(reverted)) is kind


def test_subclasses_inside_a_refused_network_leave_no_trace():
    net = nn.Sequential(nn.BatchNorm2d(3), WithForward(3), nn.BatchNorm2d(3))
    keys = [set(m.__dict__) for m in net]
    with pytest.raises(ValueError):
        convert_sync_batchnorm(net)
    assert [set(m.__dict__) for m in net] == keys


@pytest.mark.usefixtures("float64")
def test_timm_batch_norm_act():
    """By its module name, as timm is not installed here."""
    kind = type("BatchNormAct2d", (BatchNormAct2d,), {"__module__": "timm.layers.norm_act"})
    layer, twin = kind(3), BatchNormAct2d(3)
    x = torch.randn(4, 3, 5, 5)
    true = twin(x.clone())
    convert_sync_batchnorm(layer)
    torch.testing.assert_close(layer(x.clone()), true)
    layer.eval(), twin.eval()
    torch.testing.assert_close(layer(x.clone()), twin(x.clone()))
    assert type(revert_sync_batchnorm(layer)) is kind


def test_a_lazy_layer_converts_once_it_knows_its_size():
    net = nn.Sequential(nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="forward"):
        convert_sync_batchnorm(net)
    net(torch.randn(4, 3, 5, 5))
    convert_sync_batchnorm(net)
    assert type(net[0]) is SyncBatchNorm
    assert net[0].num_features == 3


# ---- on ranks ------------------------------------------------------------------------------------


def converted_on_ranks(rank):
    torch.manual_seed(0)
    net = convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double())
    twin = revert_sync_batchnorm(copy.deepcopy(net))
    whole = torch.randn(7, 3, 6, 6, generator=torch.Generator().manual_seed(1)).double()
    y = net(whole.split([3, 4])[rank])
    true = twin(whole).split([3, 4])[rank]
    return relative(y.detach(), true.detach()), buffer_bytes(net), buffer_bytes(twin) == buffer_bytes(net)


def test_converted_on_ranks():
    found = run_ranks(converted_on_ranks, 2)
    assert max(error for error, *_ in found) < 1e-12
    assert found[0][1] == found[1][1]


def groups_in_conversion(rank):
    pair, triple = syncbn.new_group(2), dist.new_group([0, 1, 2])
    net = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3), nn.SyncBatchNorm(3, process_group=None)), pair)
    same = [layer.process_group is pair for layer in net]
    again = convert_sync_batchnorm(net)
    text = ""
    plain = nn.Sequential(nn.BatchNorm1d(3))
    try:
        convert_sync_batchnorm(plain, triple)
    except ValueError as error:
        text = str(error)
    revert_sync_batchnorm(net)
    return (
        same,
        again[0] is net[0],
        text,
        type(plain[0]).__name__,
        set(plain[0].__dict__) - set(nn.BatchNorm1d(3).__dict__),
    )


def test_the_group_of_converted_layers():
    found = run_ranks(groups_in_conversion, 4)
    for rank, (same, again, text, kind, left) in enumerate(found):
        assert same == [True, True]
        assert again
        if rank == 3:
            assert "3" in text and "\n" not in text
            assert kind == "BatchNorm1d"
            assert left == set()
        else:
            assert text == ""
            assert kind == "SyncBatchNorm"


def test_bad_group():
    with pytest.raises(ValueError, match="process_group"):
        convert_sync_batchnorm(nn.BatchNorm2d(3), "world")
