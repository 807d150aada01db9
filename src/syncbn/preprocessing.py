"""What each public layout of Inception-BN is fed: the order of the colours and the normalisation.

The data module and the networks both need it, so it stands below both.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Preprocessing:
    """From pixels, RGB of 0..255, to the input of a network: ``(pixel - mean) / std``.

    Attributes:
        colour_order: Of the channels that the network sees.
        mean: Per channel in that order, on the scale 0..255. None for the data's own.
        std: Per channel in that order, on the scale 0..255. None for the data's own.
    """

    colour_order: Literal["RGB", "BGR"]
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None


PREPROCESSING = {
    "paper": Preprocessing("RGB", None, None),  # not stated: the data's own, for photos ImageNet's constants
    "cadene": Preprocessing("BGR", (104.0, 117.0, 128.0), (1.0, 1.0, 1.0)),  # Caffe's
    "slim": Preprocessing("RGB", (127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),  # -1..1
}
"""By the name of the variant, as `syncbn.models.inception_bn` takes it."""


def find_preprocessing(name: str) -> Preprocessing:
    """Look up what the variant ``name`` is fed.

    Raises:
        ValueError: There is no such variant.
    """
    if name not in PREPROCESSING:
        raise ValueError(f"preprocessing={name!r} must be one of {', '.join(PREPROCESSING)}")
    return PREPROCESSING[name]
