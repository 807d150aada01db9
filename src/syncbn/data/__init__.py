"""Images in, batches out.

What is on the disk: `datasets`. What is done to one image: `transforms`. Which images make up which batch: `loading`.
`preparation` writes shards, `labels` follows the class names of a checkpoint, `look_through` finds broken photos, and
`show` draws what the network sees.

The DataModule, which puts these together, is imported when it is first used: `syncbn prepare` need not wait for
Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from syncbn.data.datasets.array import ArrayDataset
from syncbn.data.datasets.base import ImageDataset, ReadError, ShardLayout
from syncbn.data.datasets.fashion_mnist import fashion_mnist
from syncbn.data.datasets.formats import ImageSets, open_image_sets
from syncbn.data.datasets.image_folder import ImageFolderDataset
from syncbn.data.datasets.parquet import ParquetDataset
from syncbn.data.datasets.shards import ShardDataset
from syncbn.data.loading.batches import BatchedImages, ImageBatch
from syncbn.data.loading.order import ShuffledOrder, WindowedOrder
from syncbn.data.loading.samplers import EvaluationBatchSampler, GlobalBatchSampler, SampleKey, split_global_batch
from syncbn.data.loading.window_reader import WindowReader
from syncbn.data.transforms.augmentation import Augmentation
from syncbn.data.transforms.cropping import RandomCrop
from syncbn.data.transforms.evaluation_crops import EvaluationCrops
from syncbn.data.transforms.photometric import PhotometricDistortion

if TYPE_CHECKING:
    from syncbn.data.datamodule import ImageDataModule

__all__ = [
    "ArrayDataset",
    "Augmentation",
    "BatchedImages",
    "EvaluationBatchSampler",
    "EvaluationCrops",
    "GlobalBatchSampler",
    "ImageBatch",
    "ImageDataModule",
    "ImageDataset",
    "ImageFolderDataset",
    "ImageSets",
    "ParquetDataset",
    "PhotometricDistortion",
    "RandomCrop",
    "ReadError",
    "SampleKey",
    "ShardDataset",
    "ShardLayout",
    "ShuffledOrder",
    "WindowReader",
    "WindowedOrder",
    "fashion_mnist",
    "open_image_sets",
    "split_global_batch",
]


def __getattr__(name: str) -> Any:
    if name != "ImageDataModule":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.datamodule").ImageDataModule
