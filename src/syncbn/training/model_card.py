"""What training takes from a file of weights, and what it writes down about its own."""

from dataclasses import fields
from typing import Any

from syncbn.data.datamodule import ImageDataModule
from syncbn.models import InceptionBN
from syncbn.models.variants import VariantSpec
from syncbn.models.weights import ModelCard, read_weights
from syncbn.models.weights.reading import STORED_OPTIONS
from syncbn.preprocessing import Preprocessing, find_preprocessing


def make_card(network: InceptionBN, data: ImageDataModule) -> ModelCard:
    """The card of a network that was trained on data."""
    images = data.sets.train
    return ModelCard(
        layout="syncbn",
        architecture=network.arguments,
        num_classes=network.classifier.out_features,
        classes=data.classes,
        preprocessing=find_preprocessing(data.preprocessing).resolved(images.mean, images.std),
        image_size=data.image_size,
        resize=data.crops.resize,
    )


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
    return variant if weights is None else read_weights(weights).card.preprocessing.to_dict()


def options_of_weights(network: InceptionBN, weights: str) -> dict[str, Any]:
    """Options of `ImageClassifier` that make the same network without the file of weights.

    Args:
        network: With the weights.
        weights: The file.
    """
    rest = {name: value for name, value in network.arguments.items() if name not in STORED_OPTIONS}
    stored = {name: value for name, value in network.arguments.items() if name in STORED_OPTIONS}
    preprocessing = read_weights(weights).card.preprocessing.to_dict()
    return stored | {"weights": None, "variant_options": rest or None, "preprocessing": preprocessing}


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
