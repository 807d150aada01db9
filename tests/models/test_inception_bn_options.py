"""The options of Inception-BN, its names, and its errors."""

import dataclasses
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from small_networks import SMALL, images, shake, trainable
from torch import nn

import syncbn.nn
from syncbn.models import InceptionBN, blocks, inception_bn
from syncbn.models.blocks import ConvNorm
from syncbn.models.network import InceptionBNConfig, final_size
from syncbn.models.table import TABLE, scale_channels
from syncbn.nn import SyncBatchNorm

# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["paper", "cadene", "slim"])
@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_every_combination_trains_a_step(variant, norm, activation, stem):
    network = inception_bn(**SMALL, variant=variant, norm=norm, activation=activation, stem=stem, dropout=0.4)
    loss = F.cross_entropy(network(images(4)), torch.arange(4))
    loss.backward()
    for name, p in network.named_parameters():
        assert (p.grad is not None and p.grad.isfinite().all()) if p.requires_grad else p.grad is None, name
    assert network.eval()(images(1)).shape == (1, 10)


@pytest.mark.parametrize(
    ("stem", "size", "modules"),
    [
        ("small", 28, (14, 7, 4)),
        ("small", 32, (16, 8, 4)),
        ("small", 64, (32, 16, 8)),
        ("small", 8, (4, 2, 1)),
        ("imagenet", 32, (4, 2, 1)),
        ("imagenet", 299, (37, 19, 10)),
    ],
)
@pytest.mark.parametrize("variant", ["paper", "slim"])
def test_spatial_sizes(stem, size, modules, variant):
    if (variant, size) == ("slim", 299):
        modules = (38, 19, 10)  # SAME rounds up in the stem too
    network = inception_bn(**SMALL, variant=variant, stem=stem, in_channels=1).eval()
    sides = []
    for name in ("stem", "inception_3c", "inception_4e"):
        getattr(network, name).register_forward_hook(lambda _, __, out: sides.append(out.shape[-2:]))
    with torch.no_grad():
        features = network.forward_features(images(1, size, channels=1))
    assert sides == [(s, s) for s in modules]
    assert features.shape[-2:] == final_size((size, size), stem, "same" if variant == "slim" else "symmetric")


def test_oblong_images():
    with torch.no_grad():
        assert inception_bn(**SMALL).eval()(torch.randn(1, 3, 75, 130)).shape == (1, 10)


@pytest.mark.parametrize(("width", "channels"), [(1, 96), (0.5, 48), (0.25, 24), (0.3, 32), (0.01, 8), (2, 192)])
def test_width_multiplier(width, channels):
    assert scale_channels(96, width) == channels
    with torch.device("meta"):
        network = inception_bn(width_multiplier=width)
    assert network.inception_3a.branch_double_3x3.spatial_2.bn.num_features == channels
    assert all(m.num_features % 8 == 0 for m in network.modules() if isinstance(m, SyncBatchNorm))


def test_dropout_before_the_classifier():
    network = inception_bn(**SMALL, activation="sigmoid", dropout=0.4)  # no zeros but dropout's
    seen = []
    network.classifier.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    network(images(4))
    network.eval()(images(4))
    assert 0.3 < (seen[0] == 0).float().mean() < 0.5
    assert not (seen[1] == 0).any()


def test_slim_has_beta_only_and_slims_numbers():
    network = inception_bn(**SMALL, variant="slim")
    for m in network.modules():
        if isinstance(m, SyncBatchNorm):
            assert not m.weight.requires_grad and m.bias.requires_grad and bool((m.weight == 1).all())
            assert (m.eps, m.momentum) == (1e-3, pytest.approx(3e-4))
    assert isinstance(network.stem.conv1.bn, nn.Identity)
    assert network.stem.conv1.conv.depthwise.bias is None
    assert network.stem.conv1.conv.pointwise.bias is not None


def test_every_norm_gets_the_process_group(monkeypatch):
    group, given = object(), []

    class Recorder(SyncBatchNorm):
        def __init__(self, *args, process_group, **kwargs):
            given.append(process_group)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(blocks, "SyncBatchNorm", Recorder)
    inception_bn(**SMALL, process_group=group)
    assert given == [group] * 69


def test_initialisation():
    network = inception_bn(10, width_multiplier=0.5, variant="cadene")
    weight = network.inception_4d.branch_3x3.spatial.conv.weight
    std = math.sqrt(2 / weight[0].numel())
    assert weight.std().item() == pytest.approx(std, rel=0.02)
    assert weight.abs().max().item() <= 2 * std / 0.8796 + 1e-6
    assert not network.inception_4d.branch_3x3.spatial.conv.bias.any()
    torch.manual_seed(0)
    once = inception_bn(10, width_multiplier=0.5, variant="cadene")
    torch.manual_seed(0)
    double = inception_bn(10, width_multiplier=0.5, variant="cadene", init_scale=2.0)
    for (name, a), b in zip(once.named_parameters(), double.parameters(), strict=True):
        torch.testing.assert_close(b, 2 * a if a.dim() == 4 else a, msg=name)


# ---- names, and norms replaced by others ---------------------------------------------------------


def cadene_name(name):
    """The name in Cadene's bninception of a parameter or buffer of this network."""
    if name.startswith("classifier."):
        return name.replace("classifier", "last_linear")
    unit, _, leaf = name.rpartition(".")
    unit, _, kind = unit.rpartition(".")
    for ours, theirs in (
        ("stem.conv1", "conv1_7x7_s2"),
        ("stem.conv2_reduce", "conv2_3x3_reduce"),
        ("stem.conv2", "conv2_3x3"),
        (".branch_1x1", "_1x1"),
        (".branch_3x3.reduce", "_3x3_reduce"),
        (".branch_3x3.spatial", "_3x3"),
        (".branch_double_3x3.reduce", "_double_3x3_reduce"),
        (".branch_double_3x3.spatial", "_double_3x3"),
        (".branch_pool.projection", "_pool_proj"),
    ):
        if ours in unit:
            return unit.replace(ours, theirs) + ("_bn" if kind == "bn" else "") + "." + leaf
    raise KeyError(name)


def test_names_map_one_to_one_to_cadene():
    with torch.device("meta"):
        ours = list(inception_bn(variant="cadene").state_dict())
    columns = ("1x1", "3x3_reduce", "3x3", "double_3x3_reduce", "double_3x3_1", "double_3x3_2", "pool_proj")
    convs = ["conv1_7x7_s2", "conv2_3x3_reduce", "conv2_3x3"]
    for row in TABLE:
        missing = ("1x1", "pool_proj") if row.stride == 2 else ()
        convs += [f"inception_{row.name}_{column}" for column in columns if column not in missing]
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    theirs = {f"{c}.{leaf}" for c in convs for leaf in ("weight", "bias")}
    theirs |= {f"{c}_bn.{leaf}" for c in convs for leaf in norm} | {"last_linear.weight", "last_linear.bias"}
    mapped = [cadene_name(name) for name in ours]
    assert len(set(mapped)) == len(ours)
    assert set(mapped) == theirs


def test_state_dict_keys_are_stable():
    with torch.device("meta"):
        keys = list(inception_bn().state_dict())
    assert keys[:7] == [
        "stem.conv1.conv.depthwise.weight",
        "stem.conv1.conv.pointwise.weight",
        *(f"stem.conv1.bn.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")),
        "stem.conv1.bn.num_batches_tracked",
    ]
    assert "inception_4a.branch_3x3.reduce.conv.weight" in keys
    assert len(keys) == 1 + 69 * 6 + 2
    other = inception_bn(**SMALL)
    other.load_state_dict(inception_bn(**SMALL).state_dict(), strict=True)


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_runs_reverted_and_with_plain_batch_norm(activation):
    """The units add the activation where the norm in their place has not fused it."""
    network = shake(inception_bn(**SMALL, activation=activation).double())
    x = images(2, 64, dtype=torch.float64)
    expected = network(x)
    assert_close(syncbn.nn.revert_sync_batchnorm(network)(x), expected)
    for unit in network.modules():
        if isinstance(unit, ConvNorm):
            plain = nn.BatchNorm2d(unit.out_channels, unit.bn.eps).double()
            plain.load_state_dict(unit.bn.state_dict())
            unit.bn = plain
    assert_close(network(x), expected)


@pytest.mark.parametrize("variant", ["paper", "cadene", "slim"])
@pytest.mark.parametrize("head", [None, 64])
def test_folds_itself(variant, head):
    network = shake(inception_bn(**SMALL, variant=variant, per_activation_head=head).double())
    x = images(4, 64, dtype=torch.float64)
    network(x)
    folded = syncbn.nn.fold_batch_norm(network)
    assert not folded.training and network.training
    assert sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules()) == (7 if head else 0)
    assert_close(folded(x), network.eval()(x))


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


# ---- per-activation BN ---------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_per_activation_head(activation, monkeypatch):
    network = inception_bn(**SMALL, activation=activation, per_activation_head=64).double()
    head = [m for m in network.modules() if isinstance(m, syncbn.nn.PerActivationBatchNorm)]
    assert len(head) == 7
    # One gamma and beta per activation: module 5b ends with 2x2 positions.
    plain, positions = trainable(inception_bn(**SMALL, activation=activation)), 4
    channels = sum(unit.out_channels for unit in network.inception_5b.modules() if isinstance(unit, ConvNorm))
    assert trainable(network) == plain + 2 * channels * (positions - 1)
    network(images(8, 64, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    x = torch.randn(8, network.inception_5a.out_channels, 2, 2, dtype=torch.float64)
    y = network.inception_5b.branch_1x1(x)
    gamma, beta = (p.detach().view(1, -1, 2, 2) for p in (head[0].weight, head[0].bias))
    z = network.inception_5b.branch_1x1.conv(x)
    expected = (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() * gamma + beta
    assert_close(y, getattr(torch, activation)(expected))
    started = []
    real = blocks.start_sync_batch_norm
    monkeypatch.setattr(blocks, "start_sync_batch_norm", lambda *a, **k: started.append(1) or real(*a, **k))
    network(images(4, 64, dtype=torch.float64))
    assert len(started) == 33
    with pytest.raises(ValueError, match=r"built for images of \(64, 64\), got .* \(32, 32\)"):
        network(images(2, 32, dtype=torch.float64))


# ---- bad arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "torchvision"}, 'variant must be "paper" or "cadene" or "slim", got \'torchvision\''),
        ({"norm": "layer"}, 'norm must be "batch" or "none", got \'layer\''),
        ({"activation": "gelu"}, 'activation must be "relu" or "sigmoid", got \'gelu\''),
        ({"stem": "big"}, 'stem must be "imagenet" or "small", got \'big\''),
        ({"padding": "valid"}, 'padding must be "symmetric" or "same", got \'valid\''),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"projection_4cd": 0}, "projection_4cd must be at least 1, got 0"),
        ({"width_multiplier": 0}, "width_multiplier must be positive, got 0"),
        ({"width_multiplier": math.nan}, "width_multiplier must be positive, got nan"),
        ({"init_scale": -1.0}, "init_scale must be positive, got -1.0"),
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
        ({"dropout": 1.0}, "dropout must be in [0, 1), got 1.0"),
        ({"dropout": -0.1}, "dropout must be in [0, 1), got -0.1"),
        ({"momentum": 1.5}, "momentum must be in [0, 1], got 1.5"),
        ({"norm": "none", "gamma": False}, "gamma must be None with norm='none', got False"),
        (
            {"norm": "none", "per_activation_head": 64},
            "per_activation_head must be None with norm='none', got 64",
        ),
        ({"per_activation_head": (64, 16)}, "per_activation_head must be at least 32 pixels, got (64, 16)"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError) as error:
        inception_bn(**arguments)
    assert str(error.value) == message


def test_bad_images():
    network: InceptionBN = inception_bn(**SMALL)
    with pytest.raises(ValueError, match=r"images of 31x40 are too small: this network takes 32x32 up"):
        network(torch.randn(1, 3, 31, 40))
    with pytest.raises(ValueError, match=r"expected images of shape \(N, 3, H, W\), got \(2, 1, 32, 32\)"):
        network(images(2, 32, channels=1))
    with pytest.raises(ValueError, match=r"expected images of shape .*, got \(3, 32, 32\)"):
        network(torch.randn(3, 32, 32))


def test_the_factory_and_the_config_have_the_same_options():
    arguments = {name: one.default for name, one in inspect.signature(inception_bn).parameters.items()}
    assert arguments.pop("weights") is None
    assert arguments == {field.name: field.default for field in dataclasses.fields(InceptionBNConfig)}
