"""The plan for images in one folder a class."""

import zlib
from pathlib import Path

import numpy as np

from syncbn.data.image_folder import SUFFIXES, class_names, visible_files
from syncbn.data.preparation.plan import ORDER_SEED, Finding, Plan, SourceImage, shuffled, with_unique_keys
from syncbn.data.shards import sample_key

DEFAULT_VALIDATION_FRACTION = 0.1
PREPARED_SUFFIXES = tuple(sorted((*SUFFIXES, ".gif", ".tif", ".tiff")))  # of what is converted to JPEG


def plan_folder(source: Path, validation_fraction: float | None) -> Plan:
    """Plan for ``source/train/<class>/`` and ``source/val/<class>/``, or for ``source/<class>/``.

    Args:
        source: The folder.
        validation_fraction: Of each class, how much becomes validation images where there is no folder val;
            None takes a tenth.

    Raises:
        ValueError: There are no images, the validation images have a class of their own, or
            ``validation_fraction`` is not in 0..1, or not needed.
    """
    if validation_fraction is not None and not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction={validation_fraction} must be between 0 and 1")
    if not source.is_dir():
        raise ValueError(f"{source} is no folder")
    train_folder = source / "train" if (source / "train").is_dir() else source
    classes = class_names(train_folder)
    findings: list[Finding] = []
    train = _list_images("train", train_folder, classes, findings)
    if train_folder != source and (source / "val").is_dir():
        if validation_fraction is not None:
            raise ValueError(f"{source / 'val'} holds the validation images: leave out --validation_fraction")
        val = _list_images("val", source / "val", classes, findings)
    else:
        train, val = _split_off(train, classes, validation_fraction or DEFAULT_VALIDATION_FRACTION)
    if not train or not val:
        raise ValueError(
            f"{source} gives {len(train)} training and {len(val)} validation images, at least one of each is needed;"
            f" files ending in {', '.join(PREPARED_SUFFIXES)} are read"
        )
    splits = {"train": shuffled(with_unique_keys(train)), "val": with_unique_keys(val)}
    return Plan(classes, classes, splits, tuple(findings))


def _list_images(split: str, folder: Path, classes: tuple[str, ...], findings: list[Finding]) -> list[SourceImage]:
    """The images in the class folders and whatever is nested in them, by class, then by path."""
    unknown = sorted(set(class_names(folder)) - set(classes))
    if unknown:
        raise ValueError(f"{folder} holds the class {unknown[0]!r}, of which there are no training images")
    images = []
    for label, name in enumerate(classes):
        paths = sorted(folder / name / path for path in visible_files(folder / name))
        of_class = [path for path in paths if path.suffix.lower() in PREPARED_SUFFIXES]
        findings += [
            Finding(split, path.relative_to(folder).as_posix(), "is no image by its name", 0)
            for path in sorted(set(paths) - set(of_class))
        ]
        if not of_class:
            findings.append(Finding(split, name, "is a class without images", 0))
        for path in of_class:
            if not path.is_file():
                reason = "is no file" if path.exists() else "is a link to nothing"
                findings.append(Finding(split, path.relative_to(folder).as_posix(), reason, 1))
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
