"""The model card: what a file of weights does not say by itself, namely the network and what it is fed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from syncbn.preprocessing import PIXELS, Preprocessing, pixels_in_words

CARD_KEY = "syncbn_model_card"
"""Under which safetensors' metadata and Lightning's checkpoints hold the card."""

LARGEST_SIDE = 4096
"""Of the images that a card may ask for, in pixels: larger ones fill the memory before a network sees them."""


@dataclass(frozen=True)
class ModelCard:
    """What is needed to use weights.

    Attributes:
        layout: Of the file that the weights were first read from: "cadene", "slim" or "syncbn".
        architecture: Arguments of `inception_bn`, apart from the number of classes.
        num_classes: Outputs of the classifier; None where there is none.
        classes: Their names, in the order of the outputs; None where they are not known.
        preprocessing: What the network is fed.
        image_size: Side of the square that it sees, in pixels; None where it is not known.
        resize: Of the shorter side before the centre is cut out, in pixels; None for ``image_size``.
        embedding_dimension: Numbers of the embedding that is in the classifier's place; None where there is none.
        exif_orientation: Whether images are turned as their EXIF says; not where a card does not say it.
    """

    layout: str
    architecture: dict[str, Any]
    num_classes: int | None
    classes: tuple[str, ...] | None
    preprocessing: Preprocessing
    image_size: int | None
    resize: int | None
    embedding_dimension: int | None = None
    exif_orientation: bool = False

    @property
    def in_words(self) -> str:
        """How an image file becomes the input of the network."""
        return pixels_in_words(self.image_size, self.resize, self.exif_orientation, self.preprocessing)

    def to_json(self) -> str:
        """The card as JSON; how pixels are made, which is the same of all our cards, is written out for others."""
        content = asdict(self) | {"pixels": {**PIXELS, "in_words": self.in_words}}
        return json.dumps(content, indent=1, ensure_ascii=False)


def parse_card(text: str | bytes, source: str) -> ModelCard:
    """Read a card.

    Args:
        text: What `ModelCard.to_json` wrote.
        source: Where it comes from, for messages.

    Raises:
        ValueError: It is no card; the message names the part that is wrong.
    """
    try:
        content = json.loads(text)
        names = content.pop("classes")
        _check_pixels(content.pop("pixels", PIXELS))
        card = ModelCard(
            classes=None if names is None else tuple(str(name) for name in names),
            preprocessing=Preprocessing.from_dict(content.pop("preprocessing")),
            **content,
        )
        check_card(card)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{source} is no model card: {error}") from error
    return card


def _check_pixels(pixels: dict[str, Any]) -> None:
    """Refuse a card by which pixels are made in another way than here; its words are for people."""
    for name, here in PIXELS.items():
        if pixels.get(name) != here:
            raise ValueError(f"pixels: {name}={pixels.get(name)!r}, where this version of syncbn does {here!r}")


def check_card(card: ModelCard) -> None:
    """Refuse what no card can say.

    Raises:
        ValueError: A part is out of range, or two contradict each other.
    """
    expected: dict[str, type | tuple[type, ...]] = {"layout": str, "architecture": dict, "exif_orientation": bool}
    for name in ("num_classes", "image_size", "resize", "embedding_dimension"):
        expected[name] = (int, type(None))
    for name, kind in expected.items():
        value = getattr(card, name)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, int) and value < 1):
            raise ValueError(f"{name}={value!r} is out of range")
    for name in ("image_size", "resize"):
        if (getattr(card, name) or 0) > LARGEST_SIDE:
            raise ValueError(f"{name}={getattr(card, name)} is out of range, at most {LARGEST_SIDE} pixels")
    if card.resize is not None and card.resize < (card.image_size or 0):
        raise ValueError(f"resize={card.resize} must be at least image_size={card.image_size}")
    if {"weights", "process_group", "num_classes"} & set(card.architecture):
        raise ValueError("architecture names more than a network")
    if card.num_classes is not None and card.embedding_dimension is not None:
        raise ValueError("it has both num_classes and embedding_dimension")
    if card.classes is not None and len(card.classes) != card.num_classes:
        raise ValueError(f"it names {len(card.classes)} classes, but num_classes={card.num_classes}")


def card_path(weights: Path) -> Path:
    """The file beside the weights that holds their card where they cannot: ``a.onnx`` has ``a.onnx.card.json``."""
    return weights.with_name(f"{weights.name}.card.json")


def read_card_beside(weights: Path) -> ModelCard | None:
    """The card beside a file of weights, or None.

    Raises:
        ValueError: The file is no card.
    """
    path = card_path(weights)
    return parse_card(path.read_bytes(), str(path)) if path.is_file() else None
