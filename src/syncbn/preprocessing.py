"""What each public layout of Inception-BN is fed: how pixels are made, the order of the colours, the normalisation.

The data module and the networks both need it, so it stands below both.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Preprocessing:
    """From pixels, RGB of 0..255, to the input of a network: ``(pixel - mean) / std``.

    Attributes:
        colour_order: Of the channels that the network sees.
        mean: Per channel in that order, on the scale 0..255. None for the data's own.
        std: Per channel in that order, on the scale 0..255. None for the data's own.
    """

    colour_order: Literal["RGB", "BGR"]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    def resolved(self, mean: Sequence[float], std: Sequence[float]) -> "Preprocessing":
        """The same with numbers for data of as many channels as ``mean`` and ``std``, on the scale 0..1, have.

        Where it has none of its own, or those of another number of channels, the data's own are taken.
        """
        if self.mean is not None and len(self.mean) == len(mean):
            return self
        order = self.colour_order if self.mean is None else "RGB"
        return Preprocessing(order, tuple(255 * value for value in mean), tuple(255 * value for value in std))

    def to_dict(self) -> dict[str, Any]:
        """The parts by name, with lists, as JSON and YAML have them."""
        mean, std = (None if values is None else list(values) for values in (self.mean, self.std))
        return {"colour_order": self.colour_order, "mean": mean, "std": std}

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> "Preprocessing":
        """Read what `to_dict` wrote.

        Raises:
            ValueError: A part is missing, unknown or out of range.
        """
        if not isinstance(content, Mapping) or set(content) != {"colour_order", "mean", "std"}:
            raise ValueError(f"preprocessing={content!r} must have colour_order, mean and std")
        order, mean, std = content["colour_order"], content["mean"], content["std"]
        if order not in ("RGB", "BGR"):
            raise ValueError(f"colour_order={order!r} must be RGB or BGR")
        if mean is None and std is None:
            return Preprocessing(order, None, None)
        try:
            mean, std = tuple(map(float, mean)), tuple(map(float, std))
        except (TypeError, ValueError):
            raise ValueError(f"mean={mean!r} and std={std!r} must be numbers for each channel") from None
        sound = len(mean) == len(std) > 0 and all(map(math.isfinite, mean + std)) and min(std) > 0
        if not sound:
            raise ValueError(f"mean={mean} and std={std} must be as many finite numbers, std greater than 0")
        return Preprocessing(order, mean, std)


PREPROCESSING = {
    "paper": Preprocessing("RGB", None, None),  # not stated: the data's own, for photos ImageNet's constants
    "cadene": Preprocessing("BGR", (104.0, 117.0, 128.0), (1.0, 1.0, 1.0)),  # Caffe's
    "slim": Preprocessing("RGB", (127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),  # -1..1
}
"""By the name of the variant, as `syncbn.models.inception_bn` takes it."""


def find_preprocessing(name: str | Preprocessing) -> Preprocessing:
    """Look up what the variant ``name`` is fed; a Preprocessing stays what it is.

    Raises:
        ValueError: There is no such variant.
    """
    if isinstance(name, Preprocessing):
        return name
    if name not in PREPROCESSING:
        raise ValueError(f"preprocessing={name!r} must be one of {', '.join(PREPROCESSING)}")
    return PREPROCESSING[name]


PIXELS = {
    "decoded_to": "8 bits a channel, transparency left out, colour profile not applied",
    "resized": "shorter side, aspect kept",
    "shrink": "area averaging (OpenCV INTER_AREA)",
    "enlarge": "bilinear (OpenCV INTER_LINEAR)",
    "crop": "centre",
}
"""How an image file becomes the pixels that a network is evaluated on, as `syncbn.data` does it; sizes come on top."""


def pixels_in_words(
    image_size: int | None, resize: int | None, exif_orientation: bool, preprocessing: Preprocessing
) -> str:
    """How an image file becomes the input of a network, for people who have to do the same elsewhere.

    Args:
        image_size: Side of the square that the network sees, in pixels; None where it is not known.
        resize: Pixels of the shorter side before the centre is cut out; None for ``image_size``.
        exif_orientation: Whether an image is turned as its EXIF says.
        preprocessing: The order of the colours and the normalisation.
    """
    size = "the size of the network's input" if image_size is None else f"{image_size}"
    numbers = "the data's own mean and std"
    if preprocessing.mean is not None:
        numbers = f"mean {list(preprocessing.mean)} and std {list(preprocessing.std or ())}"
    return (
        f"Decode to {PIXELS['decoded_to']}; {'turn' if exif_orientation else 'do not turn'} as EXIF's orientation says."
        f" Resize the shorter side to {resize or size} pixels, the longer in proportion, rounded: by {PIXELS['shrink']}"
        f" where that makes the image smaller, {PIXELS['enlarge']} where larger. Cut out the central {size} x {size}"
        " pixels."
        f" In the order {preprocessing.colour_order}, (pixel of 0..255 - mean) / std with {numbers}."
    )
