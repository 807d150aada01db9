"""Make the selection of Fashion-MNIST that comes with the package.

The selection: of each of the ten classes the first 1,000 training images and the first 200 test images,
in the order of the original files, which is kept. No random number is involved.

The original idx files are in Debian's package ``dataset-fashion-mnist``, among other places::

    apt-get download dataset-fashion-mnist
    dpkg -x dataset-fashion-mnist_*.deb fashion-mnist
    python scripts/make_embedded_fashion_mnist.py fashion-mnist/usr/share/datasets/fashion-mnist

The script prints the SHA-256 of what it wrote; ``syncbn.data.datasets.fashion_mnist`` records it.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np

from syncbn.data.datasets.fashion_mnist import ASSET
from syncbn.data.datasets.idx import find_idx_file, read_idx

IMAGES_PER_CLASS = {"train": 1000, "test": 200}
ASSETS = Path(__file__).parents[1] / "src" / "syncbn" / "data" / "assets"


def select_first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Sorted indices of the first ``count`` samples of each class; ``labels`` has shape (N,)."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]))


def read_part(folder: Path, split: str, part: str) -> np.ndarray:
    """Read one idx file of ``folder``, or stop and name what is missing."""
    path = find_idx_file(folder, split, part)
    if path is None:
        raise SystemExit(f"{folder} holds no idx file of the {split} {part}")
    return read_idx(path)


def main() -> None:
    """Read the idx files and write the asset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with the four idx files, gzipped or not")
    parser.add_argument("--output", type=Path, default=ASSETS / ASSET)
    arguments = parser.parse_args()

    arrays = {}
    for split, count in IMAGES_PER_CLASS.items():
        labels = read_part(arguments.folder, split, "labels")
        chosen = select_first_of_each_class(labels, count)
        arrays[f"{split}_images"] = read_part(arguments.folder, split, "images")[chosen]
        arrays[f"{split}_labels"] = labels[chosen]
    np.savez_compressed(arguments.output, **arrays)
    content = arguments.output.read_bytes()
    print(f"{arguments.output}: {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
