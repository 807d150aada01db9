"""What training takes from a file of weights, and what it writes down about its own."""

import logging
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from syncbn.data.datamodule import ImageDataModule
from syncbn.models import InceptionBN
from syncbn.models.embedding import EmbeddingHead
from syncbn.models.variants import VariantSpec
from syncbn.models.weights import HeadPolicy, ModelCard, Weights, WeightsError, choose_head, read_weights
from syncbn.models.weights.heads import EMBEDDING
from syncbn.models.weights.reading import STORED_OPTIONS
from syncbn.preprocessing import Preprocessing, find_preprocessing
from syncbn.training.checkpoints.files import read_without_tensors

logger = logging.getLogger("syncbn.weights")


def make_card(network: InceptionBN, data: ImageDataModule) -> ModelCard:
    """The card of a network that was trained on data."""
    images, head = data.sets.train, network.classifier
    embeds = isinstance(head, EmbeddingHead)
    return ModelCard(
        layout="syncbn",
        architecture=network.arguments,
        num_classes=None if embeds else head.out_features,
        classes=None if embeds else data.classes,
        preprocessing=find_preprocessing(data.preprocessing).resolved(images.mean, images.std),
        image_size=data.image_size,
        resize=data.crops.resize,
        embedding_dimension=head.embedding.out_features if embeds else None,
        exif_orientation=data.exif_orientation,
    )


def read_once(path: str) -> Weights:
    """What `read_weights` reads, kept until `forget_weights`: the options and the network both come from it."""
    file = Path(path).expanduser()
    stamp = (file.stat().st_mtime_ns, file.stat().st_size) if file.is_file() else None
    return _read_once(path, stamp)


@lru_cache(maxsize=1)
def _read_once(path: str, stamp: tuple[int, int] | None) -> Weights:
    return read_weights(path)


def forget_weights() -> None:
    """Free the memory of `read_once`."""
    _read_once.cache_clear()


def choose_preprocessing(
    variant: str, weights: str | None, preprocessing: dict[str, Any] | None
) -> str | dict[str, Any]:
    """What the data module is to prepare: what is asked for, else what the weights were trained on, else the variant's.

    Args:
        variant: Of the network.
        weights: File of weights, or None.
        preprocessing: Of `ImageClassifier`.

    Raises:
        ValueError: The weights cannot be read, or ``preprocessing`` is none.
    """
    if preprocessing is not None:
        return Preprocessing.from_dict(preprocessing).to_dict()
    return variant if weights is None else read_once(weights).card.preprocessing.to_dict()


def weights_to_start_from(path: str, classes: Sequence[str] | int, head: HeadPolicy, embeds: bool) -> Weights:
    """What a network begins with.

    Args:
        path: File of weights.
        classes: Names of the classes to tell apart; where they are not known, their number, which then decides.
        head: What is done with the file's classifier.
        embeds: Whether an embedding is trained, which leaves no classifier; `take_embedding` then obeys ``head``.

    Raises:
        ValueError: The file cannot be read, or ``head`` asks for a classifier that it does not have.
    """
    weights = read_once(path)
    if embeds:
        return replace(weights, new_head=True)
    weights, said = choose_head(weights, classes, head)
    _say(path, said)
    return weights


def _say(path: str | Path, said: str) -> None:
    if said and os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":
        logger.warning("%s: %s", path, said)


@torch.no_grad()
def take_embedding(network: InceptionBN, weights: Weights, head: HeadPolicy) -> None:
    """Go on with the embedding of a file where it has as many numbers; say where it is new.

    Args:
        network: With a `ProxyHead`.
        weights: Of the file.
        head: "new" leaves the file's embedding; "keep" insists on it. The proxies are new in any case.

    Raises:
        ValueError: "keep", and the file has no embedding of so many numbers; or its bias is of another length.
    """
    linear = network.classifier.embedding
    weight, bias = (weights.tensors.get(name) for name in EMBEDDING)
    if head == "new":
        _say(weights.path, "a new embedding, as model.head=new asks")
        return
    if weight is None or weight.shape != linear.weight.shape:
        what = "no embedding" if weight is None else f"an embedding of shape {tuple(weight.shape)}"
        reason = f"it has {what}, the network wants {tuple(linear.weight.shape)}"
        if head == "keep":
            raise WeightsError(weights.path, f"{reason}: leave model.head=keep out")
        _say(weights.path, f"{reason}: a new one")
        return
    bias = torch.zeros_like(linear.bias) if bias is None else bias
    if bias.shape != linear.bias.shape:
        raise WeightsError(weights.path, f"{weights.key(EMBEDDING[1])} has the shape {tuple(bias.shape)}")
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)


def options_of_weights(network: InceptionBN, card: ModelCard, preprocessing: dict[str, Any] | None) -> dict[str, Any]:
    """Options of `ImageClassifier` that make the same network without the file of weights.

    Args:
        network: With the weights.
        card: Of the file.
        preprocessing: What the network is fed instead of what the card says, or None.
    """
    rest = {name: value for name, value in network.arguments.items() if name not in STORED_OPTIONS}
    stored = {name: value for name, value in network.arguments.items() if name in STORED_OPTIONS}
    fed = preprocessing or card.preprocessing.to_dict()
    return stored | {"weights": None, "variant_options": rest or None, "preprocessing": fed}


def checked_variant_options(options: dict[str, Any] | None) -> dict[str, Any]:
    """Attributes of a variant that are to be replaced.

    Raises:
        ValueError: One is none of a variant's.
    """
    known = [field.name for field in fields(VariantSpec)]
    for name in options or {}:
        if name not in known:
            raise ValueError(f"variant_options has {name!r}, which is none of {', '.join(known)}")
    return options or {}


def words_without_weights(words: Sequence[str]) -> list[str]:
    """Command line by which a checkpoint is used without the file of weights that its training began with.

    Lightning takes a checkpoint's hyperparameters over the config's, but reads the config first, weights and all.

    Args:
        words: Of the command line.

    Returns:
        The words; where they name a checkpoint of `ImageClassifier`, with ``model.weights`` taken back at their end.
    """
    for place, word in enumerate(words):
        option, separator, value = word.partition("=")
        if option == "--ckpt_path":
            path = Path(value if separator else "".join(words[place + 1 : place + 2])).expanduser()
            return [*words, "--model.weights=null"] if _holds_hyperparameters(path) else list(words)
    return list(words)


def _holds_hyperparameters(path: Path) -> bool:
    try:
        checkpoint = read_without_tensors(path)
    except Exception:  # no checkpoint, which is reported where it is used
        return False
    return isinstance(checkpoint, dict) and "weights" in checkpoint.get("hyper_parameters", {})
