"""torch.jit.script, freeze, trace and torch.export of layers and of networks that are reverted or folded."""

import copy

import pytest
import torch
from norm_cases import relative
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ranks import run_ranks
from syncbn import SyncBatchNorm, convert_sync_batchnorm, fold_batch_norm, revert_sync_batchnorm
from syncbn.nn import BatchNorm, PerActivationBatchNorm

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning")  # torch's own

SIZE = (4, 3, 5, 5)
OPTIONS = [
    {},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"activation": "relu"},
    {"momentum": None},
    {"eps": 1},
]


def batch(seed=0, dtype=torch.float64):
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype) * 2 + 1


def settled(module):
    """In eval mode, with statistics and parameters away from their first values."""
    torch.manual_seed(0)
    for m in module.modules():
        if isinstance(m, _BatchNorm):
            if m.running_mean is not None:
                m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)
            for p in m.parameters():
                p.data.uniform_(0.5, 2)
    return module.eval()


def every_form(module):
    """The module scripted, frozen, and optimised for inference."""
    scripted = torch.jit.script(module)
    frozen = torch.jit.freeze(scripted)
    return scripted, frozen, torch.jit.optimize_for_inference(frozen)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [SyncBatchNorm, BatchNorm])
def test_a_layer_in_eval_mode(kind, options, dtype):
    """In double as it is itself; in less by no more than rounding to that dtype."""
    layer, x = settled(kind(3, **options)).double(), batch(dtype=dtype)
    if dtype != torch.float64:
        layer.to(dtype)
    tolerance = 1e-14 if dtype == torch.float64 else torch.finfo(dtype).eps
    for scripted in every_form(layer):
        assert scripted(x).dtype == dtype
        assert relative(scripted(x), layer(x)) <= tolerance
        assert relative(scripted(x, x.flip(0)), layer(x, x.flip(0))) <= tolerance
    with pytest.raises(torch.jit.Error, match="residual must have the size of the input"):
        torch.jit.script(layer)(x, x[:1])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_reverted_layer_trains_as_plain(options):
    """Scripted as it is, and updating the same averages."""
    layer = revert_sync_batchnorm(SyncBatchNorm(3, **options)).double()
    twin, x = copy.deepcopy(layer), batch().requires_grad_()
    scripted = torch.jit.script(layer)
    for step in range(3):
        y, true = scripted(x + step), twin(x + step)
        assert relative(y, true) < 1e-12
    assert relative(*(torch.autograd.grad(v.pow(3).sum(), x)[0] for v in (y, true))) < 1e-11
    for found, expected in zip(layer.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(found, expected)


class TimmLike(nn.BatchNorm2d):
    def __init__(self, num_features):
        super().__init__(num_features)
        self.drop, self.act = nn.Identity(), nn.SiLU(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def timm_like():
    kind = type("BatchNormAct2d", (TimmLike,), {"__module__": "timm.layers.norm_act"})
    return convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 3, 1), kind(3)))


def network(norm=nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 3, 1), norm(3))


NETWORKS = {
    "converted": lambda: convert_sync_batchnorm(network()),
    "converted and reverted": lambda: revert_sync_batchnorm(convert_sync_batchnorm(network())),
    "built": lambda: network(SyncBatchNorm),
    "built and reverted": lambda: revert_sync_batchnorm(network(SyncBatchNorm)),
    "per activation": lambda: nn.Sequential(PerActivationBatchNorm((3, 5, 5), activation="relu")),
    "with a norm that activates": timm_like,
    "linear": lambda: nn.Sequential(nn.Linear(5, 3), SyncBatchNorm(3, activation="relu")),
}
ROUTES = {
    "script": lambda net, x: every_form(net)[-1],
    "fold and script": lambda net, x: every_form(fold_batch_norm(net))[-1],
    "trace": torch.jit.trace,
    "export": lambda net, x: torch.export.export(net, (x,)).module(),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_on_their_way_out(name, route):
    net = settled(NETWORKS[name]()).double()
    layers = list(net.modules())
    assert relative(ROUTES[route](net, batch())(batch(1)), net(batch(1))) < 1e-12
    assert all(a is b for a, b in zip(net.modules(), layers, strict=True)), "the network stays as it is"


def test_per_activation_refuses_other_samples():
    scripted = torch.jit.script(PerActivationBatchNorm((3, 5, 4)).eval())
    with pytest.raises(torch.jit.Error, match="normalized_shape"):
        scripted(torch.randn(2, 3, 4, 5))


@pytest.mark.parametrize("build", [network, lambda: network(SyncBatchNorm)], ids=["converted", "built"])
def test_a_synchronised_network_in_training_mode_is_refused(build):
    net = convert_sync_batchnorm(build())
    for _ in range(2):  # torch remembers the classes that it has begun to compile
        with pytest.raises(ValueError, match=r"'1' SyncBatchNorm\(4\).*training.*\.eval\(\).*revert") as caught:
            torch.jit.script(net)
        assert "\n" not in str(caught.value)
    scripted = torch.jit.script(net.eval())
    scripted.train()
    with pytest.raises(torch.jit.Error, match=r"does not synchronise.*\.eval\(\).*revert"):
        scripted(batch(dtype=torch.float32))


def traced_on_ranks(rank):
    net, x = convert_sync_batchnorm(network()).double(), batch(rank)
    with pytest.raises(ValueError, match=r"torch.jit.trace.*'1' SyncBatchNorm\(4\).* 2 ranks.*\.eval\(\).*revert"):
        torch.jit.trace(net, x)
    exported = torch.export.export(net, (x,)).module()
    net(x), exported(x)
    net.eval()
    return [relative(torch.jit.trace(net, x)(x), net(x)), relative(exported(x), copy.deepcopy(net).train()(x))]


def test_traces_over_several_ranks():
    for errors in run_ranks(traced_on_ranks, 2):
        assert max(errors) < 1e-12
