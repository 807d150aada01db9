"""Images of one size, all in memory."""

from collections.abc import Sequence

import numpy as np

from syncbn.data.datasets.base import ShardLayout


class ArrayDataset:
    """Images of one size, all in memory.

    Args:
        images: uint8, shape (N, H, W).
        labels: Integers in 0..len(classes) - 1, shape (N,).
        classes: Names of the classes, in the order of their labels.
        mean: Mean of the training images, on the scale 0..1.
        std: Standard deviation of the training images, on the scale 0..1.

    Raises:
        ValueError: As many images as labels are needed, and every label must name a class.
    """

    channels = 1
    layout: ShardLayout | None = None
    numbers_classes = True

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: Sequence[str], mean: float, std: float) -> None:
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise ValueError(
                f"images of shape (N, H, W) and labels of shape (N,) are needed, got {images.shape} and {labels.shape}"
            )
        if labels.size and not 0 <= labels.min() <= labels.max() < len(classes):
            raise ValueError(f"labels must lie in 0..{len(classes) - 1}, got {labels.min()}..{labels.max()}")
        self.images = images
        self.labels = labels
        self.classes = classes
        self.mean = (mean,)
        self.std = (std,)

    def __len__(self) -> int:
        return len(self.labels)

    def encoded(self, index: int) -> None:
        """None: the images exist decoded only."""
        return None

    def image(self, index: int) -> np.ndarray:
        """The image at ``index``: uint8, shape (H, W, 1)."""
        return self.images[index][:, :, None]

    def label(self, index: int) -> int:
        """The class of the image at ``index``."""
        return int(self.labels[index])

    def name(self, index: int) -> str:
        """The number of the image."""
        return f"number {index}"
