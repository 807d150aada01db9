"""The images that come with the package: 12,000 of Fashion-MNIST's 70,000.

Source: H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine
Learning Algorithms", 2017, under the MIT licence (see ``assets/LICENSE-fashion-mnist.txt``). The file is
made by ``scripts/make_embedded_fashion_mnist.py``, which states the selection.
"""

from importlib.resources import as_file, files

import numpy as np

from syncbn.data.datasets.array import ArrayDataset

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

ASSET = "fashion_mnist_12k.npz"
ASSET_SHA256 = "efefbe05b9d7eaf04f28ae39025070e3f555b25bf705ff9319bf8a7a4784fc6b"
"""SHA-256 of the asset; a test compares it, and the script prints it."""

MEAN, STD = 0.28668, 0.35401
"""Of the 10,000 training images, on the scale 0..1."""


def fashion_mnist(split: str) -> ArrayDataset:
    """The embedded selection of Fashion-MNIST.

    Args:
        split: ``"train"`` (10,000 images, 1,000 of each class) or ``"test"`` (2,000, 200 of each class).

    Returns:
        Grey images of 28x28 pixels.
    """
    with as_file(files("syncbn.data") / "assets" / ASSET) as path, np.load(path) as arrays:
        return ArrayDataset(arrays[f"{split}_images"], arrays[f"{split}_labels"], CLASSES, MEAN, STD)
