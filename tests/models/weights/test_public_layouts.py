"""Weights of the public layouts give the outputs of the public networks, and go back as they came."""

import copy
import dataclasses
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_networks import cadene_network, largest_difference, slim_network

from syncbn.models import inception_bn
from syncbn.models.weights import (
    WeightsError,
    build_network,
    card_path,
    choose_head,
    load_network,
    network_with_weights,
    read_weights,
    write_weights,
)

TOLERANCE = 1e-10  # in float64


def noise(size=64, n=3):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(7))


def save(content, path):
    torch.save(content, path)
    return path


def save_slim(network, path):
    np.savez(path, **network.variables)
    return path


# ---- Cadene --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cadene():
    return cadene_network()


@pytest.mark.parametrize("size", [64, 96, 224])
def test_cadene_outputs(cadene, size, tmp_path):
    network = build_network(read_weights(save(cadene.state_dict(), tmp_path / "a.pth")))
    assert largest_difference(network, cadene, noise(size, 2)) < TOLERANCE


def test_cadene_at_full_width(tmp_path):
    reference = cadene_network(1000, 1.0)
    network = inception_bn(weights=save(reference.state_dict(), tmp_path / "bn_inception.pth")).eval()
    assert largest_difference(network, reference, noise(96, 2)) < TOLERANCE
    assert sum(parameter.numel() for parameter in network.parameters()) == 11_295_240


def rename_head(state, name):
    return {key.replace("last_linear", name): value for key, value in state.items()}


def in_rows(state):
    return {key: value[None] if "_bn." in key and "num_batches" not in key else value for key, value in state.items()}


CADENE_FORMS = {
    "a head called fc": lambda state: rename_head(state, "fc"),
    "TSN, in a training program's checkpoint": lambda state: {
        "epoch": 3,
        "arch": "BNInception",
        "state_dict": {
            f"module.{'' if 'last' in key else 'base_model.'}{key}": value
            for key, value in rename_head(state, "new_fc").items()
        },
    },
    "BN shaped [1, C]": in_rows,
    "no count of batches": lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
}


@pytest.mark.parametrize("form", CADENE_FORMS.values(), ids=CADENE_FORMS.keys())
@pytest.mark.parametrize("zipped", [True, False])
def test_forms_of_cadene(cadene, form, zipped, tmp_path, caplog):
    path = tmp_path / "tsn.pth.tar"
    torch.save(form(cadene.state_dict()), path, _use_new_zipfile_serialization=zipped)
    network = inception_bn(10, weights=path).eval()
    assert largest_difference(network, cadene, noise()) < TOLERANCE
    assert caplog.records == []


def test_what_is_not_matched_is_named(cadene, tmp_path, caplog):
    state = cadene.state_dict() | {"model.whitening.weight": torch.zeros(4, 4), "margin": 0.1}
    weights = read_weights(save(state, tmp_path / "a.pth"))
    assert weights.unmatched == ("margin", "model.whitening.weight")
    build_network(weights)
    assert "margin, model.whitening.weight" in caplog.text


def test_a_missing_tensor_a_wrong_shape_and_a_left_over_one_are_named(cadene, tmp_path):
    state = cadene.state_dict()
    del state["inception_4c_3x3_bn.running_mean"]
    state["inception_3a_1x1.weight"] = torch.zeros(7, 8, 1, 1)
    with pytest.raises(WeightsError) as raised:
        inception_bn(10, weights=save(state, tmp_path / "a.pth"), conv_bias=False)
    text = str(raised.value)
    assert "inception_4c_3x3_bn.running_mean is missing" in text
    assert "inception_3a_1x1.weight has the shape (7, 8, 1, 1), not (8, 24, 1, 1)" in text
    assert "conv1_7x7_s2.bias is left over" in text and str(tmp_path / "a.pth") in text and "\n" not in text


@pytest.mark.parametrize("layer", ["conv2_3x3", "inception_4c_pool_proj", "inception_5b_3x3"])
def test_one_wrong_shape_is_told_alone(cadene, layer, tmp_path):
    state = cadene.state_dict() | {f"{layer}.weight": torch.zeros(4, 4, 3, 3)}
    with pytest.raises(WeightsError) as raised:
        load_network(save(state, tmp_path / "a.pth"))
    assert f"{layer}.weight has the shape (4, 4, 3, 3), not" in str(raised.value)
    assert str(raised.value).count("has the shape") == 1


def test_a_head_of_other_classes_or_none_is_new(cadene, tmp_path, caplog):
    state = cadene.state_dict()
    network = inception_bn(7, weights=save(state, tmp_path / "a.pth"))
    assert network.classifier.weight.shape[0] == 7
    assert "the classifier is of 10 classes: a new one of 7 classes" in caplog.text
    caplog.clear()
    headless = {key: value for key, value in state.items() if "last_linear" not in key}
    path = save(headless, tmp_path / "b.pth")
    network = inception_bn(7, weights=path)
    assert "the file has no classifier: that of the network is new" in caplog.text
    assert torch.equal(network.stem.conv1.conv.weight, state["conv1_7x7_s2.weight"])
    with pytest.raises(WeightsError, match="it has no classifier and no embedding"):
        build_network(read_weights(path))


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


def test_half_a_classifier_is_never_replaced_by_a_random_one(cadene, tmp_path, caplog):
    weights = read_weights(save(without(cadene.state_dict(), "last_linear.bias"), tmp_path / "a.pth"))
    network = build_network(weights)
    assert torch.equal(network.classifier.weight, cadene.last_linear.weight)
    assert torch.equal(network.classifier.bias, torch.zeros(10))
    assert "last_linear.bias is missing: zeros in its place" in caplog.text
    caplog.clear()
    new, said = choose_head(weights, 10, "new")
    network_with_weights(new, 10, {})
    assert said == "a new classifier, as model.head=new asks" and caplog.records == []
    path = save(without(cadene.state_dict(), "last_linear.weight"), tmp_path / "b.pth")
    with pytest.raises(WeightsError, match=r"last_linear.bias is there without a weight"):
        read_weights(path)
    odd = cadene.state_dict() | {"last_linear.weight": torch.tensor(3.0)}
    with pytest.raises(WeightsError, match=r"last_linear.weight has the shape \(\), not \(outputs, inputs\)"):
        read_weights(save(odd, tmp_path / "c.pth"))


def test_slims_background_goes_from_a_classifier_without_a_bias(tmp_path, caplog):
    slim = slim_network(num_classes=1001)
    weights = torch.from_numpy(slim.variables["InceptionV2/Logits/Conv2d_1c_1x1/weights"])
    del slim.variables["InceptionV2/Logits/Conv2d_1c_1x1/biases"]
    network = inception_bn(1000, weights=save_slim(slim, tmp_path / "slim.npz"))
    assert torch.equal(network.classifier.weight, weights[0, 0].T[1:])
    assert torch.equal(network.classifier.bias, torch.zeros(1000)) and "taken without it" in caplog.text


class ProxyAnchorNetwork(torch.nn.Module):
    """As Proxy-Anchor has it: average plus maximum, a linear map, L2 norm, and a classifier that is not used."""

    def __init__(self, cadene):
        super().__init__()
        self.model = copy.deepcopy(cadene)
        self.model.embedding = torch.nn.Linear(cadene.last_linear.in_features, 6)

    def forward(self, images):
        features = self.model.features(images)
        embedded = self.model.embedding(features.mean((2, 3)) + features.amax((2, 3)))
        return embedded / (embedded.pow(2).sum(1, keepdim=True) + 1e-12).sqrt()


def test_an_embedding_of_proxy_anchor_there_and_back(cadene, tmp_path, caplog):
    torch.manual_seed(0)
    reference = ProxyAnchorNetwork(cadene)
    path = save({"model_state_dict": reference.state_dict()}, tmp_path / "best.pth")
    weights = read_weights(path)
    network = build_network(weights)
    assert (weights.card.embedding_dimension, weights.card.num_classes) == (6, None) and weights.unmatched == ()
    assert largest_difference(network, reference, noise()) < TOLERANCE
    for format, output in (("cadene", tmp_path / "again.pth"), ("safetensors", tmp_path / "again.safetensors")):
        write_weights(network, weights.card, output, format)
        again = build_network(read_weights(output))
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in network.state_dict().items())
    classes = inception_bn(10, weights=path)  # which the same file serves, by the classifier that it has, too
    assert torch.equal(classes.classifier.weight, reference.model.last_linear.weight) and caplog.records == []
    new = inception_bn(10, weights=choose_head(weights, 10, "new")[0])
    assert not torch.equal(new.classifier.weight, reference.model.last_linear.weight)
    with pytest.raises(ValueError, match=r"the layout slim has no classifier.embedding.weight"):
        write_weights(network, weights.card, tmp_path / "a.npz", "slim")


def test_two_networks_in_one_file(cadene, tmp_path):
    state = {f"{name}.{key}": value for name in ("student", "teacher") for key, value in cadene.state_dict().items()}
    with pytest.raises(WeightsError, match=r"student.conv1_7x7_s2.weight and teacher.conv1_7x7_s2.weight are both"):
        read_weights(save(state, tmp_path / "a.pth"))


@pytest.mark.parametrize("argument", [{"variant": "slim"}, {"width_multiplier": 0.5}, {"in_channels": 1}])
def test_arguments_that_contradict_the_file(cadene, argument, tmp_path):
    with pytest.raises(WeightsError, match="do not fit the network"):
        inception_bn(10, weights=save(cadene.state_dict(), tmp_path / "a.pth"), **argument)


def test_arguments_that_do_not_change_the_tensors_count(cadene, tmp_path):
    network = inception_bn(10, weights=save(cadene.state_dict(), tmp_path / "a.pth"), dropout=0.5, momentum=0.02)
    assert network.dropout.p == 0.5 and network.stem.conv1.bn.momentum == 0.02


# ---- TF-slim -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slim():
    return slim_network()


@pytest.mark.parametrize("size", [64, 97])
def test_slim_outputs(slim, size, tmp_path):
    weights = read_weights(save_slim(slim, tmp_path / "slim.npz"))
    network = build_network(weights)
    assert largest_difference(network, slim, noise(size)) < TOLERANCE
    assert (weights.card.num_classes, weights.unmatched) == (11, ())


def test_slim_without_its_background(tmp_path, caplog):
    slim = slim_network(num_classes=1001)
    network = inception_bn(1000, weights=save_slim(slim, tmp_path / "slim.npz")).eval()
    assert "1001 classes, the background first: taken without it" in caplog.text
    assert largest_difference(network, slim, noise(), classes=slice(1, None)) < TOLERANCE


@pytest.mark.parametrize("first", ["background", "tench"])
def test_another_class_too_many_is_dropped_only_if_it_is_the_background(slim, tmp_path, caplog, first):
    path = save_slim(slim, tmp_path / "slim.npz")
    inception_bn(10, weights=path)
    assert "a new one of 10 classes" in caplog.text
    caplog.clear()
    card = dataclasses.replace(read_weights(path).card, classes=(first, *map(str, range(10))))
    card_path(Path(path)).write_text(card.to_json())
    inception_bn(10, weights=path)
    assert ("taken without it" in caplog.text) == (first == "background")


@pytest.mark.parametrize(("name", "value"), [("running_var", math.nan), ("running_var", -1.0), ("weight", math.inf)])
def test_numbers_that_are_none_are_refused(tmp_path, name, value):
    network = inception_bn(3, width_multiplier=0.125)
    network.inception_3a.branch_3x3.reduce.bn.state_dict()[name][0] = value
    torch.save(network.state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=rf"inception_3a.branch_3x3.reduce.bn.{name} (holds|are not finite)"):
        load_network(tmp_path / "a.pth")


def test_slim_as_the_object_detection_api_has_it(tmp_path, caplog):
    reference = slim_network(detection=True, prefix="FeatureExtractor/InceptionV2/InceptionV2/")
    reference.variables["global_step"] = np.array(5)
    prefix = "FeatureExtractor/InceptionV2/InceptionV2"
    reference.variables |= {f"{prefix}/Conv2d_2{unit}/weights/RMSProp": np.zeros(3) for unit in ("b_1x1", "c_3x3")}
    network = inception_bn(10, weights=save_slim(reference, tmp_path / "ssd.npz")).eval()
    assert len([name for name, _ in network.named_modules() if name.endswith(".bn")]) == 69
    network.forward = network.forward_features
    assert largest_difference(network, reference, noise()) < TOLERANCE
    assert "left out: RMSProp of 2 variables, global_step" in caplog.text and "no classifier" in caplog.text


def test_slim_names_as_tensorflow_1_prints_them(slim, tmp_path):
    np.savez(tmp_path / "slim.npz", **{f"{name}:0": array for name, array in slim.variables.items()})
    assert largest_difference(build_network(read_weights(tmp_path / "slim.npz")), slim, noise()) < TOLERANCE


def test_a_checkpoint_of_tensorflow(slim, tmp_path):
    tensorflow = pytest.importorskip("tensorflow", reason="the package tensorflow is not installed")
    variables = {name.replace("/", "_"): tensorflow.Variable(array) for name, array in slim.variables.items()}
    saver = tensorflow.compat.v1.train.Saver(dict(zip(slim.variables, variables.values(), strict=True)))
    saver.save(None, str(tmp_path / "inception_v2.ckpt"), write_meta_graph=False)
    for name in ("inception_v2.ckpt", "inception_v2.ckpt.index"):
        network = build_network(read_weights(tmp_path / name))
        assert largest_difference(network, slim, noise()) < TOLERANCE


# ---- there and back ------------------------------------------------------------------------------


def test_cadene_there_and_back(cadene, tmp_path):
    state = cadene.state_dict()
    weights = read_weights(save(state, tmp_path / "a.pth"))
    write_weights(build_network(weights), weights.card, tmp_path / "b.pth", "cadene")
    again = torch.load(tmp_path / "b.pth", weights_only=True)
    assert list(again) == list(state) and all(torch.equal(again[key], state[key]) for key in state)
    cadene_network(seed=1).load_state_dict(again, strict=True)


@pytest.mark.parametrize("detection", [False, True])
def test_slim_there_and_back(detection, tmp_path):
    reference = slim_network(detection=detection)
    weights = read_weights(save_slim(reference, tmp_path / "a.npz"))
    network = inception_bn(11, weights=tmp_path / "a.npz")
    write_weights(network, weights.card, tmp_path / "b.npz", "slim")
    with np.load(tmp_path / "b.npz", allow_pickle=False) as again:
        kept = {name: again[name] for name in again if detection <= ("Logits" not in name)}
    assert kept.keys() == reference.variables.keys()
    assert all(np.array_equal(kept[name], array) for name, array in reference.variables.items())


@pytest.mark.parametrize("source", ["cadene", "slim"])
def test_our_own_layout_there_and_back(source, cadene, slim, tmp_path):
    path = tmp_path / "source.npz"
    path = save(cadene.state_dict(), path) if source == "cadene" else save_slim(slim, path)
    weights = read_weights(path)
    network = build_network(weights)
    write_weights(network, weights.card, tmp_path / "own.safetensors", "safetensors")
    again = read_weights(tmp_path / "own.safetensors")
    assert again.card == weights.card and again.unmatched == ()
    rebuilt = build_network(again)
    assert rebuilt.variant == network.variant
    before, after = network.state_dict(), rebuilt.state_dict()
    assert before.keys() == after.keys() == again.tensors.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_network_without_biases_becomes_cadenes_with_zeros(tmp_path):
    torch.manual_seed(0)
    network = inception_bn(10, "cadene", width_multiplier=0.125, conv_bias=False).eval()
    card = read_weights(save(network.state_dict(), tmp_path / "own.pth")).card
    write_weights(network, card, tmp_path / "cadene.pth", "cadene")
    reference = cadene_network()
    reference.load_state_dict(torch.load(tmp_path / "cadene.pth", weights_only=True), strict=True)
    assert largest_difference(network, reference, noise()) < TOLERANCE


@pytest.mark.parametrize(
    ("arguments", "format", "expected"),
    [
        ({"variant": "paper"}, "cadene", "separable_stem=False, this network True"),
        ({"variant": "cadene", "eps": 1e-3}, "cadene", "eps=1e-05, this network 0.001"),
        ({"variant": "cadene", "stem": "small"}, "cadene", "stem='imagenet', this network 'small'"),
        ({"variant": "cadene", "norm": "none"}, "cadene", "norm='batch', this network 'none'"),
        ({"variant": "cadene"}, "slim", "separable_stem=True, this network False"),
        ({"variant": "slim", "padding": "symmetric"}, "slim", "padding='same', this network 'symmetric'"),
    ],
)
def test_what_a_layout_cannot_express_is_refused(arguments, format, expected, tmp_path):
    network = inception_bn(10, width_multiplier=0.125, **arguments)
    card = read_weights(save(inception_bn(10, width_multiplier=0.125).state_dict(), tmp_path / "own.pth")).card
    with pytest.raises(ValueError, match=expected):
        write_weights(network, card, tmp_path / "out", format)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.pth"]


def test_messages_come_from_rank_0_alone(cadene, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with caplog.at_level(logging.DEBUG):
        inception_bn(7, weights=save(cadene.state_dict(), tmp_path / "a.pth"))
    assert caplog.records == []
