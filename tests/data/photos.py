"""Images for the tests of photos: made up, in memory, or the real ones outside the repository."""

import cv2
import numpy as np

from real_data import real_data
from syncbn.data.datasets.base import IMAGENET_MEAN, IMAGENET_STD, ReadError
from syncbn.data.transforms.photo import Photo


class ImagesInMemory:
    """A data set of arrays, or of files' contents; the label is the number of the image."""

    layout = None

    def __init__(self, *images: np.ndarray | bytes) -> None:
        self.images = images
        self.classes = tuple(f"class {number}" for number in range(len(images)))
        self.channels = 3 if isinstance(images[0], bytes) else images[0].shape[2]
        self.mean, self.std = IMAGENET_MEAN[: self.channels], IMAGENET_STD[: self.channels]

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> np.ndarray:
        image = self.images[index]
        if isinstance(image, bytes):
            raise ReadError(f"cannot decode {self.name(index)}")
        return image

    def encoded(self, index: int) -> bytes | None:
        image = self.images[index]
        return image if isinstance(image, bytes) else None

    def label(self, index: int) -> int:
        return index

    def name(self, index: int) -> str:
        return f"image number {index}"

    def photo(self, index: int = 0) -> Photo:
        return Photo(self, index, self.encoded(index))


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """Red rises to the right, green downwards, blue is constant: colours tell the place."""
    down, right = np.mgrid[:height, :width] + 0.5
    red, green = right / width * 255, down / height * 255
    return np.stack([red, green, np.full_like(red, 128)], axis=-1).round().astype(np.uint8)


def encode(image: np.ndarray, suffix: str = ".jpg", quality: int = 95) -> bytes:
    flags = [cv2.IMWRITE_JPEG_QUALITY, quality] if suffix == ".jpg" else []
    done, content = cv2.imencode(suffix, image[:, :, ::-1] if image.shape[2] == 3 else image, flags)
    assert done
    return content.tobytes()


def originals(count: int = 100) -> ImagesInMemory:
    """Photos of ImageNet at their original size, or the test is skipped."""
    paths = sorted(real_data("imagenet-originals").glob("*.JPEG"))
    return ImagesInMemory(*(path.read_bytes() for path in paths[:count]))
