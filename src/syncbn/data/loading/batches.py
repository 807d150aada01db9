"""From sample keys to a batch of tensors."""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from syncbn.data.datasets.base import ImageDataset, OnReadError, ReadError
from syncbn.data.loading.samplers import SampleKey
from syncbn.data.loading.window_reader import WindowReader
from syncbn.data.transforms.augmentation import Augmentation
from syncbn.data.transforms.evaluation_crops import EvaluationCrops
from syncbn.data.transforms.photo import Photo
from syncbn.preprocessing import Preprocessing, find_preprocessing
from syncbn.random_streams import AUGMENTATION_STREAM, random_stream

LOST = 16
"""So many images in a row that cannot be read, with "look", are not a few broken files: the disk may be gone."""


class UnreadableImageWarning(UserWarning):
    """An image cannot be read, and was left out of its batch."""


class ImageBatch(NamedTuple):
    """What the network is given.

    Attributes:
        images: float32, normalised, shape (N, C, H, W); or (N, K, C, H, W) with K > 1 crops of each image.
        labels: int64, shape (N,).
        indices: int64, shape (N,): the number of each image in its data set.
        left_out: Of each image that could not be read, what was wrong with it.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    left_out: tuple[str, ...] = ()


class BatchedImages(Dataset[ImageBatch]):
    """Makes a whole batch at a time out of sample keys.

    Args:
        dataset: Where the images come from.
        image_size: Side of the square that the network sees, in pixels.
        augmentation: Random changes, for training; None for none.
        seed: Of the run; decides the random changes, with the epoch and the index.
        crops: Without augmentation: the parts of an image that are looked at. None for its central square.
        preprocessing: Of which variant the network is, "paper", "cadene" or "slim", or the numbers themselves. Images
            of another number of channels are normalised by the data's own mean and standard deviation.
        reader: Reads the files of the images in shards ahead of need; None reads each when it is needed.
        on_read_error: "stop" raises the error, "skip" leaves the image out of its batch, "look" does so with a warning
            and raises where 16 in a row cannot be read.

    Raises:
        ValueError: ``preprocessing`` is no variant's.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        image_size: int,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        *,
        crops: EvaluationCrops | None = None,
        preprocessing: str | Preprocessing = "paper",
        reader: WindowReader | None = None,
        on_read_error: OnReadError = "stop",
    ) -> None:
        assert augmentation is None or crops is None
        self.dataset = dataset
        self.image_size = image_size
        self.augmentation = augmentation
        self.seed = seed
        self.crops = crops or EvaluationCrops(image_size)
        self.normalise = Normalisation(dataset, preprocessing)
        self.reader = reader
        self.on_read_error = on_read_error
        self._failed_in_a_row = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def encoded(self, key: SampleKey) -> bytes | None:
        """The file of the image that a key names; None where only decoded arrays exist."""
        return self.dataset.encoded(key.sample) if self.reader is None else self.reader.encoded(key)

    def prepared_image(self, key: SampleKey) -> np.ndarray:
        """What a key names, as the network sees it but for the normalisation.

        Returns:
            uint8, shape (K, image_size, image_size, C): one image randomly changed, or K crops of it.
        """
        photo = Photo(self.dataset, key.sample, self.encoded(key))
        if self.augmentation is None:
            return self.crops(photo.pixels())
        stream = random_stream(self.seed, key.epoch, key.sample, AUGMENTATION_STREAM)
        return self.augmentation(photo, self.image_size, stream)[None]

    def pixels(self, keys: list[SampleKey]) -> tuple[np.ndarray, list[int], tuple[str, ...]]:
        """The prepared images of a batch, and which they are.

        Returns:
            uint8, shape (N, K, image_size, image_size, C); the N samples; what was wrong with each one left out.
        """
        shape = (self.crops.count, self.image_size, self.image_size, self.dataset.channels)
        pixels = np.empty((len(keys), *shape), np.uint8)
        samples: list[int] = []
        left_out: list[str] = []
        for key in keys:
            try:
                pixels[len(samples)] = self.prepared_image(key)
                samples.append(key.sample)
                self._failed_in_a_row = 0
            except ReadError as error:
                self._answer(error)
                left_out.append(str(error))
        return pixels[: len(samples)], samples, tuple(left_out)

    def _answer(self, error: ReadError) -> None:
        """Do what ``on_read_error`` says; where this returns, the image is left out."""
        self._failed_in_a_row += 1
        if self.on_read_error == "stop":
            raise error
        if self.on_read_error == "look" and self._failed_in_a_row >= LOST:
            raise ReadError(f"{LOST} images in a row cannot be read; the last: {error}") from error
        if self.on_read_error == "look":
            warnings.warn(f"left out of its batch: {error}", UnreadableImageWarning, stacklevel=3)

    def __getitem__(self, key: SampleKey) -> ImageBatch:
        """A batch of one."""
        return self.__getitems__([key])

    def __getitems__(self, keys: list[SampleKey]) -> ImageBatch:
        """The batch that a list of keys names; an empty list gives an empty batch.

        Raises:
            ReadError: An image cannot be read or decoded, and ``on_read_error`` is "stop"; or many, and it is "look".
        """
        pixels, samples, left_out = self.pixels(keys)
        images = self.normalise(torch.from_numpy(pixels))
        return ImageBatch(
            images=images.squeeze(1) if self.crops.count == 1 else images,
            labels=torch.tensor([self.dataset.label(sample) for sample in samples], dtype=torch.int64),
            indices=torch.tensor(samples, dtype=torch.int64),
            left_out=left_out,
        )


class Normalisation:
    """From pixels to the input of a network.

    Args:
        dataset: Whose mean and standard deviation are taken where the variant has none of its own.
        preprocessing: Name of the variant, a key of `PREPROCESSING`, or the numbers themselves.
    """

    def __init__(self, dataset: ImageDataset, preprocessing: str | Preprocessing) -> None:
        chosen = find_preprocessing(preprocessing).resolved(dataset.mean, dataset.std)
        mean, std = chosen.mean, chosen.std
        self.is_bgr = chosen.colour_order == "BGR"
        self._mean, self._std = (torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1) for values in (mean, std))

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalise.

        Args:
            pixels: uint8, RGB or grey, shape (..., H, W, C).

        Returns:
            float32, shape (..., C, H, W).
        """
        images = (pixels.flip(-1) if self.is_bgr else pixels).movedim(-1, -3).float()
        return ((images - self._mean.to(images.device)) / self._std.to(images.device)).contiguous()


def keep_batch(batch: ImageBatch) -> ImageBatch:
    """The collate function of a `BatchedImages`, whose batches need no collating."""
    return batch
