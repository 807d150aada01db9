"""Small archives in the layout of the ILSVRC2012 download, and images to put into them."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def encode(image, kind="JPEG", **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(seed=0, width=48, height=40, mode="RGB"):
    """Smooth random colours, which JPEG keeps well."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def tar(files):
    """The bytes of a tar with these files, given as (name, content)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files:
            add(archive, name, content)
    return file.getvalue()


def write_devkit(path, identifiers, train_counts, truth, words=None):
    """The development kit as it is: a row for each class, and rows for the inner nodes of WordNet above them.

    `identifiers` maps the wnid of each class to its ILSVRC2012_ID, `truth` lists the IDs of the validation images.
    """
    from scipy.io import savemat

    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss"]
    fields += ["num_children", "children", "wordnet_height", "num_train_images"]
    rows = [
        (identifier, wnid, (words or {}).get(wnid, f"words of {wnid}"), "gloss", 0, [], 0, train_counts[wnid])
        for wnid, identifier in sorted(identifiers.items(), key=lambda item: item[1])
    ]
    inner = len(rows) + 1
    rows += [(inner, "n00000001", "entity", "gloss", 2, [1, 2], 3, 0), (inner + 1, "n09999999", "x", "y", 1, [1], 2, 0)]
    synsets = np.array(rows, dtype=[(field, object) for field in fields])[:, None]
    file = io.BytesIO()
    savemat(file, {"synsets": synsets})
    lines = "".join(f"{identifier}\n" for identifier in truth)
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "ILSVRC2012_devkit_t12/readme.txt", b"")
        add(archive, "ILSVRC2012_devkit_t12/data/meta.mat", file.getvalue())
        add(archive, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", lines.encode())


def write_archives(folder: Path, train, val, identifiers=None, counts=None):
    """The three archives.

    `train` maps a wnid to its images, (name, bytes), or to the bytes of its archive; `val` lists (wnid, bytes).
    """
    folder.mkdir(parents=True, exist_ok=True)
    identifiers = identifiers or {wnid: len(train) - i for i, wnid in enumerate(sorted(train))}  # unlike the labels
    inner = {wnid: images if isinstance(images, bytes) else tar(images) for wnid, images in train.items()}
    counts = {wnid: len(images) for wnid, images in train.items() if not isinstance(images, bytes)} | (counts or {})
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar((f"{wnid}.tar", content) for wnid, content in inner.items()))
    named = ((f"ILSVRC2012_val_{number:08d}.JPEG", content) for number, (_, content) in enumerate(val, 1))
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar(named))
    write_devkit(folder / "ILSVRC2012_devkit_t12.tar.gz", identifiers, counts, [identifiers[wnid] for wnid, _ in val])


def make_images(wnid, count, first_seed=0):
    return [(f"{wnid}_{number}.JPEG", encode(photo(first_seed + number))) for number in range(count)]
