"""The plan for images in one folder a class."""

import zlib
from pathlib import Path

import numpy as np

from syncbn.data.datasets.image_folder import class_names, images_and_others, no_image_of
from syncbn.data.datasets.shard_files import sample_key
from syncbn.data.datasets.splits import find_splits
from syncbn.data.preparation.plan import (
    NO_IMAGE,
    ORDER_SEED,
    PreparationPlan,
    SourceFinding,
    SourceImage,
    shuffled,
    with_unique_keys,
)

DEFAULT_VALIDATION_FRACTION = 0.1


def plan_folder(source: Path, validation_fraction: float | None) -> PreparationPlan:
    """Plan for ``source/train/<class>/``, ``source/val/<class>/`` and ``source/test/<class>/``, or ``source/<class>/``.

    Args:
        source: The folder.
        validation_fraction: Of each class, how much becomes validation images where there is no folder of them;
            None takes a tenth.

    Raises:
        ValueError: The training images are not found, a class has no image, other images have a class of their own, or
            ``validation_fraction`` is not needed.
    """
    if not source.is_dir():
        raise ValueError(f"{source} is no folder")
    folders = find_splits(source)
    if "val" in folders.of and validation_fraction is not None:
        raise ValueError(f"{folders.of['val']} holds the validation images: leave out --validation_fraction")
    classes = class_names(folders.of["train"])
    findings = [SourceFinding("train", folder.name, "is not used", 0) for folder in folders.unused]
    found = {split: _list_images(split, folder, classes, findings) for split, folder in folders.of.items()}
    if "val" not in found:
        found["train"], found["val"] = _split_off(
            found["train"], classes, validation_fraction or DEFAULT_VALIDATION_FRACTION
        )
    if not found["val"]:
        raise ValueError(f"{source} gives {len(found['train'])} training and no validation images: one is needed")
    splits = {split: with_unique_keys(found[split]) for split in ("train", "val", "test") if found.get(split)}
    splits["train"] = shuffled(splits["train"])
    return PreparationPlan(classes, classes, splits, tuple(findings))


def _list_images(
    split: str, folder: Path, classes: tuple[str, ...], findings: list[SourceFinding]
) -> list[SourceImage]:
    """The images in the class folders and whatever is nested in them, by class, then by path."""
    unknown = sorted(set(class_names(folder)) - set(classes))
    if unknown:
        raise ValueError(f"{folder} holds the class {unknown[0]!r}, of which there are no training images")
    images = []
    for label, name in enumerate(classes):
        names, others = images_and_others(folder / name)
        if not names and (others or split == "train"):
            raise ValueError(no_image_of(folder / name, others))
        findings += [SourceFinding(split, f"{name}/{path}", NO_IMAGE, 0) for path in sorted(others)]
        if not names:
            findings.append(SourceFinding(split, name, "is a class without images", 0))
        for path in sorted(folder / name / path for path in names):
            if not path.is_file():
                reason = "is no file" if path.exists() else "is a link to nothing"
                findings.append(SourceFinding(split, path.relative_to(folder).as_posix(), reason, 1))
                continue
            stem = path.relative_to(folder / name).with_suffix("").as_posix()
            key = stem if stem.startswith(f"{name}_") else f"{name}_{stem}"  # names of ImageNet are kept
            shown = path.relative_to(folder).as_posix()
            images.append(SourceImage(str(path), 0, path.stat().st_size, shown, sample_key(key), label))
    return images


def _split_off(
    images: list[SourceImage], classes: tuple[str, ...], fraction: float
) -> tuple[list[SourceImage], list[SourceImage]]:
    """Training and validation images: of each class a random share, which depends on that class alone."""
    labels = np.array([image.label for image in images])
    held_out = np.zeros(len(images), dtype=bool)
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels == label)
        random = np.random.default_rng([ORDER_SEED, zlib.crc32(name.encode())])
        count = min(round(fraction * len(members)), len(members) - 1)  # one is left to learn from
        held_out[random.permutation(members)[: max(count, 0)]] = True
    train = [image for image, out in zip(images, held_out, strict=True) if not out]
    val = [image for image, out in zip(images, held_out, strict=True) if out]
    return train, val
