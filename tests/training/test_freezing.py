"""What is frozen, what trains, and what is said about choices that make no sense."""

import pytest
import torch
from torch import nn

from syncbn import SyncBatchNorm
from syncbn.models import inception_bn
from syncbn.training.finetuning.freezing import freeze_network
from syncbn.training.finetuning.selection import is_selected, select_parameters
from syncbn.training.optimization.parameter_groups import parameter_groups, scale_groups


def network(**options) -> nn.Module:
    return inception_bn(4, width_multiplier=0.125, stem="small", **options)


def layers(net: nn.Module) -> list[str]:
    return [name for name, layer in net.named_modules() if isinstance(layer, SyncBatchNorm)]


@pytest.mark.parametrize(
    ("pattern", "name", "selected"),
    [
        ("stem", "stem.conv1.conv.weight", True),
        ("stem", "stem", True),
        ("stem", "stem2.weight", False),
        ("inception_3*", "inception_3a.branch_1x1.bn.weight", True),
        ("*.bn", "inception_3a.branch_1x1.bn.weight", True),
        ("*.bn", "bnx.weight", False),
        ("conv", "stem.conv.weight", False),
        ("layer1", "layer10.weight", False),
    ],
)
def test_patterns_mean_modules_with_all_in_them(pattern, name, selected):
    assert is_selected(name, [pattern]) is selected


def test_a_pattern_that_matches_nothing_is_an_error_that_lists_what_there_is():
    with pytest.raises(ValueError, match=r"freeze: the pattern 'stm\*' matches no .* stem, inception_3a, .*classifier"):
        select_parameters(network(), ["stem", "stm*"], "freeze")


def test_frozen_modules_keep_their_statistics_and_the_others_train():
    net = network()
    fixed = freeze_network(net, ["stem", "inception_3*"], "train")
    assert set(fixed) == {name for name in layers(net) if name.startswith(("stem.", "inception_3"))}
    for name, parameter in net.named_parameters():
        assert parameter.requires_grad is not name.startswith(("stem.", "inception_3")), name


@pytest.mark.parametrize("policy", ["freeze", "estimate"])
def test_all_layers_are_frozen_and_the_convolutions_train(policy):
    net = network()
    fixed = freeze_network(net, [], policy)
    assert list(fixed) == layers(net)
    for name, parameter in net.named_parameters():
        assert parameter.requires_grad is (".bn." not in name), name


def test_partial_leaves_the_first_layer():
    net = network()
    fixed = freeze_network(net, [], "partial")
    assert list(fixed) == layers(net)[1:] and layers(net)[0] == "stem.conv1.bn"
    assert net.stem.conv1.bn.weight.requires_grad and not net.stem.conv2.bn.weight.requires_grad


def test_a_scale_that_a_variant_does_not_learn_stays_as_it_is():
    net = network(variant="slim")
    freeze_network(net, ["inception_3a"], "train")
    assert not net.stem.conv2.bn.weight.requires_grad and net.stem.conv2.bn.bias.requires_grad


MISTAKES = {
    "everything": (["*"], "train", {}, r"freeze=\['\*'\] leaves nothing to train: .*estimate_population_statistics"),
    "no norm": ([], "partial", {"norm": "none"}, "batch_norm='partial' has no meaning in a network without BatchNorm"),
    "an unknown policy": ([], "half", {}, "batch_norm='half' must be one of train, freeze, partial, estimate"),
    "the first layer": (["stem"], "partial", {}, "batch_norm='partial' trains .* stem.conv1.bn, which freeze="),
    "one sibling": (
        ["inception_4a.branch_1x1"],
        "train",
        {},
        "freeze holds inception_4a.branch_1x1.bn but not inception_4a.branch_3x3.reduce.bn",
    ),
}


@pytest.mark.parametrize(("patterns", "policy", "options", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_contradictions_are_named(patterns, policy, options, message):
    with pytest.raises(ValueError, match=message):
        freeze_network(network(**options), patterns, policy)


def test_frozen_siblings_run():
    """What the check above lets pass, a training step must not trip over."""
    net = network()
    patterns = ["inception_4a.branch_1x1", "inception_4a.*.reduce"]
    fixed = freeze_network(net, patterns, "train")
    net.train()
    for name in fixed:
        net.get_submodule(name).eval()
    before = net.inception_4a.branch_1x1.bn.running_mean.clone()
    net(torch.randn(2, 3, 16, 16)).sum().backward()
    assert torch.equal(net.inception_4a.branch_1x1.bn.running_mean, before)


def test_learning_rates_of_groups():
    net = network()
    freeze_network(net, ["stem"], "train")
    factors = {"inception_*": 0.1, "inception_5*": 0.5, "*.bn": 2.0}
    groups = scale_groups(parameter_groups(net, 1e-4), net, factors, 0.3)
    assert groups[0]["name"] == "weights" and groups[0]["lr"] == pytest.approx(0.3)
    seen: dict[int, dict] = {}
    for group in groups:
        for parameter in group["params"]:
            assert id(parameter) not in seen
            seen[id(parameter)] = group
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert {id(p) for p in trained.values()} == set(seen)
    for name, factor in {
        "inception_3a.branch_1x1.conv.weight": 0.1,
        "inception_5b.branch_1x1.conv.weight": 0.5,
        "inception_5b.branch_1x1.bn.weight": 2.0,
        "classifier.weight": 1.0,
    }.items():
        assert seen[id(trained[name])]["lr"] == pytest.approx(factor * 0.3), name
    assert seen[id(trained["inception_5b.branch_1x1.bn.weight"])]["weight_decay"] == 0
    assert seen[id(trained["classifier.weight"])]["weight_decay"] == 1e-4


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"clasifier": 10.0}, "learning_rate_factors: the pattern 'clasifier' matches no"),
        ({"classifier": 0.0}, "classifier: 0.0 must be positive; model.freeze is to freeze"),
        ({"stem": 0.1}, "all that 'stem' matches is frozen"),
    ],
)
def test_senseless_factors_are_refused(factors, message):
    net = network()
    freeze_network(net, ["stem"], "train")
    with pytest.raises(ValueError, match=message):
        scale_groups(parameter_groups(net, 1e-4), net, factors, 0.1)
