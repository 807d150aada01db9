"""From sample keys to a batch of tensors."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from syncbn.data.augmentation import AUGMENTATION_STREAM, Augmentation, fit_square, random_stream
from syncbn.data.datasets import ImageDataset
from syncbn.data.samplers import SampleKey


class ImageBatch(NamedTuple):
    """What the network is given.

    Attributes:
        images: float32, normalised, shape (N, C, H, W).
        labels: int64, shape (N,).
        indices: int64, shape (N,): the number of each image in its data set.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


class BatchedImages(Dataset[ImageBatch]):
    """Makes a whole batch at a time out of sample keys.

    Args:
        dataset: Where the images come from.
        image_size: Side of the square that the network sees, in pixels.
        augmentation: Random changes; None for none.
        seed: Of the run; decides the random changes, with the epoch and the index.
    """

    def __init__(
        self, dataset: ImageDataset, image_size: int, augmentation: Augmentation | None = None, seed: int = 0
    ) -> None:
        self.dataset = dataset
        self.image_size = image_size
        self.augmentation = augmentation
        self.seed = seed
        self._mean = torch.tensor(dataset.mean, dtype=torch.float32).reshape(-1, 1, 1) * 255
        self._std = torch.tensor(dataset.std, dtype=torch.float32).reshape(-1, 1, 1) * 255

    def __len__(self) -> int:
        return len(self.dataset)

    def prepared_image(self, key: SampleKey) -> np.ndarray:
        """The image a key names, resized and randomly changed: uint8, shape (image_size, image_size, C)."""
        image = fit_square(self.dataset.image(key.sample), self.image_size)
        if self.augmentation is None:
            return image
        return self.augmentation(image, random_stream(self.seed, key.epoch, key.sample, AUGMENTATION_STREAM))

    def __getitem__(self, key: SampleKey) -> ImageBatch:
        """A batch of one."""
        return self.__getitems__([key])

    def __getitems__(self, keys: list[SampleKey]) -> ImageBatch:
        """The batch that a list of keys names; an empty list gives an empty batch."""
        pixels = np.empty((len(keys), self.image_size, self.image_size, self.dataset.channels), np.uint8)
        for row, key in enumerate(keys):
            pixels[row] = self.prepared_image(key)
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
        return ImageBatch(
            images=((images - self._mean) / self._std).contiguous(),
            labels=torch.tensor([self.dataset.label(key.sample) for key in keys], dtype=torch.int64),
            indices=torch.tensor([key.sample for key in keys], dtype=torch.int64),
        )


def keep_batch(batch: ImageBatch) -> ImageBatch:
    """The collate function of a `BatchedImages`, whose batches need no collating."""
    return batch
