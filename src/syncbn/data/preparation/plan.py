"""What is to be written: the images of each split in order, and what is amiss with the source."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

ORDER_SEED = 0
"""Of the order in which training images are written; the order of an epoch is another matter."""


NO_IMAGE = "is no image by its name"
"""The reason for which a file is left out."""


class SourceImage(NamedTuple):
    """An image that has not been read yet.

    Attributes:
        path: Of the file that holds its bytes: its own, or a tar.
        offset: Of its first byte in that file.
        size: In bytes.
        name: For people, as the source has it.
        key: Names it in its split of the shards.
        label: Of its class.
    """

    path: str
    offset: int
    size: int
    name: str
    key: str
    label: int


class SourceFinding(NamedTuple):
    """Something that a user should know about the source.

    Attributes:
        split: "train", "val" or "test".
        name: Of the image or archive or class, as the source has it.
        reason: What is wrong, or what was repaired.
        lost: How many images it cost.
    """

    split: str
    name: str
    reason: str
    lost: int


@dataclass(frozen=True)
class PreparationPlan:
    """All images of a source in the order in which they are written.

    Attributes:
        classes: Identifiers in the order of the labels.
        class_names: For people, likewise.
        splits: "train", in shuffled order, "val" and, where there is one, "test".
        findings: What was amiss before any image was read.
    """

    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    splits: dict[str, list[SourceImage]]
    findings: tuple[SourceFinding, ...]

    def fingerprint(self) -> str:
        """A digest of everything but the place of the source: equal for the same images in the same order."""
        digest = hashlib.sha256(repr((self.classes, self.class_names)).encode())
        for split, images in self.splits.items():
            digest.update(split.encode())
            for image in images:
                digest.update(repr(image[1:]).encode())
        return digest.hexdigest()


def shuffled(images: Sequence[SourceImage]) -> list[SourceImage]:
    """The images in an order that mixes the classes, the same every time."""
    order = np.random.default_rng(ORDER_SEED).permutation(len(images))
    return [images[index] for index in order]


def with_unique_keys(images: Sequence[SourceImage]) -> list[SourceImage]:
    """The images, the second and later ones of a key with a number after it."""
    taken: set[str] = set()
    unique = []
    for image in images:
        key, number = image.key, 1
        while key in taken:
            number += 1
            key = f"{image.key}-{number}"
        taken.add(key)
        unique.append(image._replace(key=key))
    return unique
