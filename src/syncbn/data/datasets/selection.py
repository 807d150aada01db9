"""Some images of a data set as a data set, and what is held out of it."""

import numpy as np

from syncbn.data.datasets.base import ImageDataset, ShardLayout, applies_orientation, numbers_classes


class DatasetView:
    """The images of a data set, as another data set shows them.

    Args:
        dataset: Where the images come from.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset
        self.classes = dataset.classes
        self.channels = dataset.channels
        self.mean = dataset.mean
        self.std = dataset.std
        self.exif_orientation = applies_orientation(dataset)
        self.numbers_classes = numbers_classes(dataset)

    def _place(self, index: int) -> int:
        """Of the image at ``index`` in the data set that it comes from."""
        return index

    @property
    def layout(self) -> ShardLayout | None:
        """The shards of the data set."""
        return self.dataset.layout

    def __len__(self) -> int:
        return len(self.dataset)

    def encoded(self, index: int) -> bytes | None:
        """The file of the image at ``index``; None where only decoded arrays exist."""
        return self.dataset.encoded(self._place(index))

    def image(self, index: int) -> np.ndarray:
        """The image at ``index``: uint8, shape (H, W, channels)."""
        return self.dataset.image(self._place(index))

    def label(self, index: int) -> int:
        """The class of the image at ``index``."""
        return self.dataset.label(self._place(index))

    def name(self, index: int) -> str:
        """Where the image at ``index`` comes from, for messages."""
        return self.dataset.name(self._place(index))


class Selection(DatasetView):
    """Some images of a data set, as a data set.

    Args:
        dataset: Where the images come from.
        indices: Which of them, ascending; integers, shape (N,).
    """

    def __init__(self, dataset: ImageDataset, indices: np.ndarray) -> None:
        super().__init__(dataset)
        self.indices = indices

    def _place(self, index: int) -> int:
        return int(self.indices[index])

    @property
    def labels(self) -> np.ndarray:
        """Of the images: int64, shape (N,)."""
        return labels_of(self.dataset)[self.indices]

    @property
    def layout(self) -> ShardLayout | None:
        """The shards of the data set, of which the selection holds a part of the samples."""
        whole = self.dataset.layout
        return None if whole is None else ShardLayout(np.searchsorted(self.indices, whole.starts), whole.sizes)

    def __len__(self) -> int:
        return len(self.indices)


def origin_of(dataset: ImageDataset) -> ImageDataset:
    """The data set that holds the images, under all views of it."""
    while isinstance(dataset, DatasetView):
        dataset = dataset.dataset
    return dataset


def labels_of(dataset: ImageDataset) -> np.ndarray:
    """The labels of all images of a data set: int64, shape (N,)."""
    labels = getattr(dataset, "labels", None)  # not every data set has them at hand
    if labels is None:
        labels = [dataset.label(index) for index in range(len(dataset))]
    return np.asarray(labels, dtype=np.int64)


def class_counts(dataset: ImageDataset) -> list[int]:
    """How many images of each class a data set holds."""
    return np.bincount(labels_of(dataset), minlength=len(dataset.classes)).tolist()


def hold_out(dataset: ImageDataset, count: int, option: str = "validation_images") -> tuple[Selection, Selection]:
    """Split a data set into what remains and ``count`` images held out, for validation or test.

    The images held out lie evenly spaced over the data set, so that a set sorted by class gives some of
    each class. The choice depends on nothing else: not on the seed, not on the number of ranks.

    Args:
        dataset: The training images, N of them; or what remains of them.
        count: How many to hold out, 0 < count < N.
        option: What the user calls ``count``.

    Returns:
        The N - count images that remain, and the ``count`` held out.

    Raises:
        ValueError: ``count`` is not between 0 and N.
    """
    total = len(dataset)
    if not 0 < count < total:
        left = " left" if isinstance(dataset, Selection) else ""
        raise ValueError(
            f"{option}={count} must lie between 1 and {total - 1}: there are {total} training images{left}"
        )
    held_out = np.arange(count, dtype=np.int64) * total // count
    kept = np.setdiff1d(np.arange(total, dtype=np.int64), held_out, assume_unique=True)
    if isinstance(dataset, Selection):
        whole, indices = dataset.dataset, dataset.indices
        return Selection(whole, indices[kept]), Selection(whole, indices[held_out])
    return Selection(dataset, kept), Selection(dataset, held_out)
