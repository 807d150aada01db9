"""Images in, batches out.

The DataModule is imported when it is first used: `syncbn prepare` need not wait for Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from syncbn.data.augmentation import Augmentation
from syncbn.data.batches import BatchedImages, ImageBatch
from syncbn.data.cropping import RandomCrop
from syncbn.data.datasets import ArrayDataset, ImageDataset, ReadError, ShardLayout
from syncbn.data.evaluation import EvaluationCrops
from syncbn.data.fashion_mnist import fashion_mnist
from syncbn.data.image_folder import ImageFolderDataset
from syncbn.data.order import ShuffledOrder, WindowedOrder
from syncbn.data.parquet import ParquetDataset
from syncbn.data.photometric import PhotometricDistortion
from syncbn.data.samplers import EvaluationBatchSampler, GlobalBatchSampler, SampleKey, split_global_batch
from syncbn.data.shard_dataset import ShardDataset
from syncbn.data.sources import ImageSets, open_image_sets
from syncbn.data.window_reader import WindowReader

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
