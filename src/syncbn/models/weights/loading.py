"""Weights into a network: what fits, what is missing, and the head of another number of classes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from syncbn.models.embedding import put_embedding_head
from syncbn.models.network import InceptionBN, InceptionBNConfig
from syncbn.models.weights.card import ModelCard
from syncbn.models.weights.files import WeightsError
from syncbn.models.weights.heads import HEAD, fit_head
from syncbn.models.weights.reading import Weights, read_weights

logger = logging.getLogger("syncbn.weights")

OPTIMISER_SLOTS = (
    *("Momentum", "ExponentialMovingAverage", "RMSProp", "RMSProp_1", "Adam", "Adam_1", "Adagrad"),
    *("Adadelta", "Adadelta_1", "Ftrl", "Ftrl_1"),
)
"""What TensorFlow's optimisers and averages keep beside a variable, under the variable's name."""


def build_network(weights: Weights) -> InceptionBN:
    """The network of a file, as it is there, in eval mode: it gives logits, or embeddings where these were trained.

    Raises:
        ValueError: The file has neither classifier nor embedding, or its tensors do not make a network.
    """
    card = weights.card
    if card.num_classes is None and card.embedding_dimension is None:
        raise WeightsError(
            weights.path,
            "it has no classifier and no embedding, which this needs: `syncbn fit --model.weights` trains one",
        )
    require_head(weights)
    return network_with_weights(weights, card.num_classes or 1, {}, card.embedding_dimension).eval()


def require_head(weights: Weights) -> None:
    """Refuse a file without the classifier of which its card speaks: a network of it would have a random one.

    Raises:
        ValueError: It is such a file.
    """
    classes = weights.card.num_classes
    if classes is not None and HEAD[0] not in weights.tensors:
        raise WeightsError(
            weights.path,
            f"its card is of {classes} classes, but it has no {weights.key(HEAD[0])}:"
            " `syncbn fit --model.weights` trains a classifier",
        )


def network_with_weights(
    weights: Weights, num_classes: int, changed: dict[str, Any], embedding_dimension: int | None = None
) -> InceptionBN:
    """A network with the weights of a file.

    Args:
        weights: What was read.
        num_classes: Outputs of the network; where the file has as many, its classifier is taken.
        changed: Arguments of `inception_bn` that count instead of the file's.
        embedding_dimension: Of an embedding in the classifier's place, which the file must have; None for a classifier.

    Raises:
        ValueError: The tensors do not fit the network that the arguments describe; every difference is named.
    """
    arguments = weights.card.architecture | changed
    try:
        with torch.device("meta"):  # before memory is taken for a network of whatever size a card describes
            skeleton = _new_network(num_classes, arguments, embedding_dimension)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # torch's, where a size is beyond any
        raise WeightsError(weights.path, f"no network is so: {str(error).splitlines()[0]}") from error
    _check_fit(skeleton, weights)
    network = _new_network(num_classes, arguments, embedding_dimension)
    load_into(network, weights)
    return network


def _new_network(num_classes: int, arguments: dict[str, Any], embedding_dimension: int | None) -> InceptionBN:
    network = InceptionBN(InceptionBNConfig(num_classes, **arguments))
    if embedding_dimension is not None:
        put_embedding_head(network, embedding_dimension)
    return network


@torch.no_grad()
def load_into(network: InceptionBN, weights: Weights) -> None:
    """Copy weights into a network; what could not be taken is said through the logger ``syncbn.weights``.

    The classifier stays new where the file has none or one of other classes. TF-slim's 1001 classes count the
    background first: a network of 1000 takes the others.

    Raises:
        ValueError: Another tensor is missing, is left over or has another shape; each is named.
    """
    tensors, said = _check_fit(network, weights)
    state = network.state_dict()
    for name, tensor in tensors.items():
        state[name].copy_(tensor.reshape(state[name].shape))
    if said and os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":
        logger.warning("%s (layout %s): %s", weights.path, weights.layout.name, "; ".join(said))


def _check_fit(network: InceptionBN, weights: Weights) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors that go into a network, and what is to be said about the others.

    Raises:
        ValueError: They do not fit.
    """
    state = network.state_dict()
    tensors = dict(weights.tensors)
    said = fit_head(tensors, state, weights)
    if weights.unmatched:
        said.append(f"not of Inception-BN, left out: {', '.join(_in_short(weights.unmatched))}")
    differences = _differences(tensors, weights, network)
    if differences:
        described = ", ".join(f"{name}={value!r}" for name, value in weights.card.architecture.items())
        raise WeightsError(
            weights.path,
            f"the tensors (layout {weights.layout.name}, of a network with {described or 'default arguments'})"
            f" do not fit the network: {'; '.join(differences)}",
        )
    return tensors, said


def _in_short(keys: Iterable[str]) -> list[str]:
    """The keys; of those of an optimiser, which stores several beside each variable, only their kinds."""
    kinds: dict[str, int] = {}
    others = []
    for key in keys:
        kind = key.removesuffix(":0").rpartition("/")[2]
        if kind in OPTIMISER_SLOTS:
            kinds[kind] = kinds.get(kind, 0) + 1
        else:
            others.append(key)
    return [f"{kind} of {count} variables" for kind, count in kinds.items()] + others


def _differences(tensors: dict[str, Tensor], weights: Weights, network: InceptionBN) -> list[str]:
    """What does not fit, in words, each tensor as the file calls it."""
    found = []
    state = network.state_dict()
    for name, target in state.items():
        tensor, key = tensors.get(name), weights.key(name)
        if tensor is not None:
            if not _same_shape(tensor, target):
                found.append(f"{key} has the shape {tuple(tensor.shape)}, not {tuple(target.shape)}")
            elif tensor.is_floating_point() != target.is_floating_point():
                found.append(f"{key} is {tensor.dtype}, not {target.dtype}")
            elif not tensor.isfinite().all():
                found.append(f"{key} holds numbers that are not finite")
            elif name.endswith(".running_var") and tensor.min() < 0:
                found.append(f"{key} holds a negative variance")
        elif not _may_be_missing(name, network):
            found.append(f"{key} is missing")
    return found + [f"{weights.key(name)} is left over" for name in tensors if name not in state]


def _same_shape(tensor: Tensor, target: Tensor) -> bool:
    """Whether the shapes agree; a vector may have axes of size 1 besides, as BN's [1, C] in some files."""
    if target.dim() == 1 and tensor.dim() > 1:
        return tensor.numel() == len(target) == max(tensor.shape)
    return tensor.shape == target.shape


def _may_be_missing(name: str, network: InceptionBN) -> bool:
    """Old files do not count batches; slim's BN has no scale; a classifier that is missing is new."""
    no_scale = name.endswith(".bn.weight") and not network.variant.gamma
    return name.endswith(".num_batches_tracked") or name in HEAD or no_scale


def load_network(path: str | Path) -> InceptionBN:
    """The network of a file of weights, in eval mode; errors as in `read_weights` and `build_network`."""
    return build_network(read_weights(path))


def check_input(card: ModelCard, network: InceptionBN) -> None:
    """Refuse a card by which a network would be fed what it cannot take.

    Raises:
        ValueError: The numbers of channels differ, or the images are not of a size that the network takes.
    """
    mean, size, only = card.preprocessing.mean, card.image_size, network.head_image_size
    if mean is not None and len(mean) != network.in_channels:
        raise ValueError(f"mean and std have {len(mean)} numbers, the network {network.in_channels} channels")
    if size is not None and size < network.minimum_size:
        raise ValueError(f"image_size={size} is too small: this network takes {network.minimum_size} pixels up")
    if size is not None and only not in (None, (size, size)):
        raise ValueError(f"image_size={size}, but per_activation_head was built for images of {only}")
