"""Reader of idx files, the format of MNIST and Fashion-MNIST.

Source of the format: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits": a
big-endian header (two zero bytes, a type code, the number of dimensions, then each dimension as a
32-bit unsigned integer), followed by the values in row-major order.
"""

import gzip
import struct
from pathlib import Path

import numpy as np

from syncbn.data.datasets.array import ArrayDataset
from syncbn.data.datasets.base import Reading, Splits

UNSIGNED_BYTE = 0x08
"""The type code of idx files that hold unsigned bytes, as all image sets do."""

IDX_FILES = {
    ("train", "images"): "train-images-idx3-ubyte",
    ("train", "labels"): "train-labels-idx1-ubyte",
    ("test", "images"): "t10k-images-idx3-ubyte",
    ("test", "labels"): "t10k-labels-idx1-ubyte",
}
"""File name of each part of a data set in MNIST's layout.

Each may have a dot for the hyphen before ``idx``, as some archives unpack it, and may carry the suffix ``.gz``.
"""

BELOW = ("raw", "*/raw")
"""Where torchvision keeps the files, below the folder that it is given: ``MNIST/raw``."""


def find_idx_file(folder: Path, split: str, part: str) -> Path | None:
    """Path of one idx file of a folder, gzipped or not.

    Args:
        folder: Folder in MNIST's layout.
        split: ``"train"`` or ``"test"``.
        part: ``"images"`` or ``"labels"``.

    Returns:
        The path, or None when neither the plain nor the gzipped file is there.
    """
    name = IDX_FILES[split, part]
    names = (name, name.replace("-idx", ".idx"))
    candidates = (folder / f"{stem}{suffix}" for stem in names for suffix in ("", ".gz"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def find_idx_folder(folder: Path) -> Path | None:
    """The folder that holds idx files: ``folder`` itself, or where torchvision puts them in it.

    Raises:
        ValueError: There are several below.
    """
    below = sorted(path for pattern in BELOW for path in folder.glob(pattern))
    found = [place for place in (folder, *below) if any(find_idx_file(place, *part) for part in IDX_FILES)]
    if len(found) > 1 and found[0] != folder:
        raise ValueError(f"{folder} holds several data sets, in {' and '.join(map(str, found))}: name one of them")
    return found[0] if found else None


def read_idx(path: Path) -> np.ndarray:
    """Read one idx file of unsigned bytes.

    Args:
        path: An idx file, gzipped when its name ends in ``.gz``.

    Returns:
        uint8 array with the dimensions the header names: (N, H, W) for images, (N,) for labels.

    Raises:
        ValueError: The file is no complete idx file of unsigned bytes.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != UNSIGNED_BYTE:
        raise ValueError(f"{path} is not an idx file of unsigned bytes (it begins with {content[:4].hex()})")
    dimensions = content[3]
    header_size = 4 + 4 * dimensions
    if len(content) < header_size:
        raise ValueError(f"{path} ends within its header")
    shape = struct.unpack(f">{dimensions}I", content[4:header_size])
    values = np.frombuffer(content, np.uint8, offset=header_size)
    expected = int(np.prod(shape, dtype=np.int64))
    if values.size != expected:
        raise ValueError(f"{path} names {expected} values of shape {shape} in its header, and holds {values.size}")
    return values.reshape(shape)


DESCRIPTION = "of MNIST idx files (train-images-idx3-ubyte[.gz] ...)"


def matches(folder: Path) -> bool:
    """Whether ``folder`` holds idx files.

    Raises:
        ValueError: There are several such folders in it.
    """
    return find_idx_folder(folder) is not None


def open_splits(folder: Path, reading: Reading) -> Splits:  # which has no option for arrays
    """Open the splits of a folder of idx files.

    Raises:
        ValueError: A file is missing, or the images have no shape (N, H, W).
    """
    found = find_idx_folder(folder)
    assert found is not None
    folder = found
    arrays = {}
    for (split, part), name in IDX_FILES.items():
        path = find_idx_file(folder, split, part)
        if path is None:
            raise ValueError(f"{folder} lacks {name} (or {name}.gz): a folder of idx files needs all four")
        arrays[split, part] = read_idx(path)
    labels = arrays["train", "labels"]
    images = arrays["train", "images"]
    if images.ndim != 3 or not labels.size:
        raise ValueError(f"{folder} holds training images of shape {images.shape}; (N, H, W) with N > 0 is needed")
    classes = tuple(str(label) for label in range(int(labels.max()) + 1))
    # A histogram gives both moments in one pass over uint8, with exact sums.
    counts = np.bincount(images.reshape(-1), minlength=256).astype(np.float64)
    levels = np.arange(256) / 255
    mean = float(counts @ levels / counts.sum())
    std = float(np.sqrt(counts @ (levels - mean) ** 2 / counts.sum())) or 1.0
    return Splits(
        {
            split: ArrayDataset(arrays[split, "images"], arrays[split, "labels"], classes, mean, std)
            for split in ("train", "test")
        }
    )
