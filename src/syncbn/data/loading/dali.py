"""Training images decoded by NVIDIA DALI, the extra ``syncbn[dali]``: on a GPU, or on the CPU without one.

The samplers and the random numbers are those of the OpenCV path: DALI decodes the windows they name, resizes and
mirrors them. The order of the samples, the crops and the colours are therefore the same; pixels differ by what
two decoders and two ways of shrinking differ by. DALI decodes JPEG that is upright and not CMYK. Of all else it is
given the pixels that `syncbn.data.datasets.decoding` makes, so that the picture is the same.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib import import_module
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from syncbn.data.datasets.base import ImageDataset, ReadError
from syncbn.data.loading.batches import ImageBatch, Normalisation
from syncbn.data.loading.samplers import GlobalBatchSampler, SampleKey
from syncbn.data.loading.window_reader import WindowReader
from syncbn.data.transforms.augmentation import Augmentation, ImagePlan, draw
from syncbn.data.transforms.cropping import CropWindow
from syncbn.data.transforms.photo import Photo
from syncbn.preprocessing import Preprocessing
from syncbn.random_streams import AUGMENTATION_STREAM, random_stream

BATCHES_AHEAD = 2
"""Batches that DALI works on while the network trains on an earlier one."""


Inputs = tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray], list[np.ndarray]]
"""Of each image of a batch: its file, the crop's top and left, its height and width, whether it is mirrored."""


class Scheduled(NamedTuple):
    """A batch that DALI works on."""

    keys: list[SampleKey]
    plans: list[ImagePlan]
    inputs: Inputs


class DaliLoader:
    """Batches of a data set as `BatchedImages` gives them, decoded by DALI ahead of time.

    Args:
        dataset: Colour images with files.
        batch_sampler: Names the samples of each batch.
        image_size: Side of the square that the network sees, in pixels.
        augmentation: Random changes, with crops.
        seed: Of the run.
        preprocessing: Of which variant the network is, or the numbers themselves.
        reader: Of the encoded images, forwards through windows of shards; None reads image by image.
        num_threads: Of DALI, on the CPU.
        device_id: Number of the GPU that decodes; None decodes on the CPU.

    Raises:
        ValueError: As of `require_decodable`.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_sampler: GlobalBatchSampler,
        image_size: int,
        augmentation: Augmentation | None,
        seed: int,
        *,
        preprocessing: str | Preprocessing = "paper",
        reader: WindowReader | None = None,
        num_threads: int = 1,
        device_id: int | None = None,
    ) -> None:
        require_decodable(dataset, augmentation)
        assert augmentation is not None
        self.dataset = dataset
        self.reader = reader
        self.batch_sampler = batch_sampler
        self.augmentation = augmentation
        self.seed = seed
        self.normalise = Normalisation(dataset, preprocessing)
        self.image_size = image_size
        self.num_threads = num_threads
        self.device_id = device_id

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def state_dict(self) -> dict[str, int]:
        """Nothing: the sampler's place is read off the trainer."""
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Nothing to restore."""

    def __iter__(self) -> Iterator[ImageBatch]:
        batches = iter(self.batch_sampler)
        scheduled: deque[Scheduled] = deque()

        def next_inputs() -> Inputs:
            for keys in batches:
                scheduled.append(self._schedule(keys))
                if keys:  # DALI cannot be given an empty batch
                    return scheduled[-1].inputs
            raise StopIteration

        # A pipeline for each epoch: one that is left early takes with it what was on its way.
        pipeline = build_pipeline(
            next_inputs, self.image_size, self.batch_sampler.per_rank, self.num_threads, self.device_id
        )
        while True:
            try:
                [images] = pipeline.run()
            except StopIteration:
                break
            except RuntimeError:
                self._name_broken_files(scheduled)
                raise
            while not scheduled[0].keys:
                yield self._empty_batch(scheduled.popleft())
            # A copy: DALI writes a later batch into the same memory.
            yield self._batch(torch.from_dlpack(images.as_tensor()).clone(), scheduled.popleft())
        for empty in scheduled:
            yield self._empty_batch(empty)

    def _photo(self, key: SampleKey) -> Photo:
        encoded = self.dataset.encoded(key.sample) if self.reader is None else self.reader.encoded(key)
        return Photo(self.dataset, key.sample, encoded)

    def _schedule(self, keys: list[SampleKey]) -> Scheduled:
        """Draw a batch's random numbers, and put together what DALI is given."""
        photos = [self._photo(key) for key in keys]
        plans = []
        for photo, key in zip(photos, keys, strict=True):
            draws = draw(random_stream(self.seed, key.epoch, key.sample, AUGMENTATION_STREAM))
            plans.append(self.augmentation.plan(photo.height, photo.width, draws))
        return Scheduled(keys, plans, inputs_of(photos, plans))

    def _batch(self, pixels: Tensor, scheduled: Scheduled) -> ImageBatch:
        return ImageBatch(
            images=self.normalise(recolour(pixels, scheduled.plans)),
            labels=torch.tensor([self.dataset.label(key.sample) for key in scheduled.keys], dtype=torch.int64),
            indices=torch.tensor([key.sample for key in scheduled.keys], dtype=torch.int64),
        )

    def _empty_batch(self, scheduled: Scheduled) -> ImageBatch:
        return self._batch(torch.zeros(0, self.image_size, self.image_size, 3, dtype=torch.uint8), scheduled)

    def _name_broken_files(self, scheduled: Iterable[Scheduled]) -> None:
        """Raise an error that names the file that cannot be decoded: DALI's does not.

        Raises:
            ReadError: OpenCV cannot decode it either, or DALI alone.
        """
        photos = [
            Photo(self.dataset, key.sample, self.dataset.encoded(key.sample))
            for batch in scheduled
            for key in batch.keys
        ]
        for photo in photos:
            photo.pixels()
        for photo in photos:
            if reason := self._reason_of(photo):
                raise ReadError(
                    f"DALI cannot decode the image {photo.name} ({reason}), which OpenCV can: take"
                    " data.decoder=opencv, or save the image anew"
                )

    def _reason_of(self, photo: Photo) -> str:
        """Why DALI cannot decode an image; empty if it can."""
        whole = ImagePlan(CropWindow(0, 0, photo.height, photo.width), False, None)
        inputs = inputs_of([photo], [whole])
        try:
            build_pipeline(lambda: inputs, self.image_size, 1, 1, self.device_id).run()
        except RuntimeError as error:
            return " ".join(str(error).split())[:200]
        return ""


def inputs_of(photos: list[Photo], plans: list[ImagePlan]) -> Inputs:
    """What DALI is given of some images."""
    windows = [plan.window for plan in plans if plan.window]
    files = [np.frombuffer(file_for_dali(photo), np.uint8) for photo in photos]
    anchors = [np.array([window.top, window.left], np.int32) for window in windows]
    shapes = [np.array([window.height, window.width], np.int32) for window in windows]
    mirrored = [np.array(plan.mirrored, np.int32) for plan in plans]
    return files, anchors, shapes, mirrored


def file_for_dali(photo: Photo) -> bytes:
    """The file of a photo where DALI makes the same picture of it as OpenCV; else its pixels as BMP."""
    if photo.is_plain_jpeg and photo.encoded is not None:
        return photo.encoded
    written, content = cv2.imencode(".bmp", cv2.cvtColor(photo.pixels(), cv2.COLOR_RGB2BGR))
    assert written
    return content.tobytes()


def recolour(images: Tensor, plans: list[ImagePlan]) -> Tensor:
    """Apply each image's colour map.

    Args:
        images: uint8 RGB, shape (N, H, W, 3), on any device.
        plans: Of the N images, either all with colours or all without.

    Returns:
        uint8 of the same shape.
    """
    maps = [plan.colours for plan in plans if plan.colours is not None]
    if not maps:
        return images
    own, mean, shift = (
        torch.from_numpy(np.stack(parts)).to(images.device, torch.float32) for parts in zip(*maps, strict=True)
    )
    pixels = images.flatten(1, 2).float()
    shift = shift + torch.einsum("nij,nj->ni", mean, pixels.mean(1))
    pixels = torch.baddbmm(shift[:, None], pixels, own.mT)
    return pixels.round().clamp(0, 255).to(torch.uint8).reshape(images.shape)


def require_decodable(dataset: ImageDataset, augmentation: Augmentation | None) -> None:
    """Make sure that DALI can do what is asked of it.

    Raises:
        ValueError: It is not installed, the images are no files or grey, or the augmentation has no crops.
    """
    if augmentation is None or augmentation.crop is None:
        raise ValueError("data.decoder=dali needs data.augmentation.crop; or take data.decoder=opencv")
    with suppress(ReadError):  # which is met where it matters
        if dataset.channels != 3 or dataset.encoded(0) is None:
            raise ValueError("data.decoder=dali is for colour images in files; take data.decoder=opencv")
    load_dali()


def load_dali() -> Any:
    """The package ``nvidia.dali``.

    Raises:
        ValueError: It is not installed.
    """
    try:
        return import_module("nvidia.dali")
    except ImportError as error:
        raise ValueError(
            f"data.decoder=dali needs NVIDIA DALI ({error}): pip install 'syncbn[dali]', or take data.decoder=opencv"
        ) from error


def build_pipeline(
    next_inputs: Callable[[], Inputs], image_size: int, max_batch_size: int, num_threads: int, device_id: int | None
) -> Any:
    """DALI's part: files and windows in, mirrored squares out."""
    dali = load_dali()
    fn, types = dali.fn, dali.types

    @dali.pipeline_def(
        batch_size=max_batch_size,
        num_threads=num_threads,
        device_id=device_id,
        prefetch_queue_depth=BATCHES_AHEAD + 1,
    )
    def photos() -> Any:
        files, anchors, shapes, mirrored = fn.external_source(
            source=next_inputs, num_outputs=4, dtype=[types.UINT8, types.INT32, types.INT32, types.INT32]
        )
        images = fn.decoders.image_slice(
            files,
            anchors,
            shapes,
            device="cpu" if device_id is None else "mixed",
            axes=[0, 1],
            normalized_anchor=False,
            normalized_shape=False,
            output_type=types.RGB,
            adjust_orientation=False,
        )
        images = fn.resize(images, size=[image_size, image_size], interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(images, horizontal=mirrored)

    pipeline = photos()
    pipeline.build()
    return pipeline
