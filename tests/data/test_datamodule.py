"""The DataModule without a trainer, and what it refuses."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from shard_cases import make_shards
from syncbn.data import ImageDataModule


def test_it_describes_the_data_and_gives_batches():
    data = ImageDataModule(global_batch_size=50, validation_images=1000, seed=1)
    assert (data.num_classes, data.channels, data.image_size, data.training_images) == (10, 1, 28, 9000)
    assert data.classes[9] == "Ankle boot"
    assert len(data.train_dataloader()) == 180
    assert len(data.val_dataloader()) == 20 and len(data.test_dataloader()) == 40
    batch = next(iter(data.train_dataloader()))
    assert batch.images.shape == (50, 1, 28, 28) and batch.labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("window", "words"),
    [(0, "; 8 shards shuffled, each in its own order, of which each rank holds about 0.0 MB")]
    + [(window, f"; samples shuffled within {min(window, 8)} of 8 shards, of which each rank") for window in (3, 16)],
)
def test_the_shuffling_of_shards_is_described(tmp_path, window, words):
    shards = make_shards(tmp_path / "shards", train=(4,) * 8)
    assert words in ImageDataModule(4, str(shards), image_size=16, shuffle_window=window).describe()


def test_images_can_be_resized():
    data = ImageDataModule(global_batch_size=4, image_size=40)
    assert next(iter(data.test_dataloader())).images.shape == (4, 1, 40, 40)


@pytest.mark.parametrize(("arguments", "message"), [({"seed": -1}, "seed=-1"), ({"image_size": 0}, "image_size=0")])
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageDataModule(global_batch_size=4, **arguments)


def test_lightnings_own_distributed_sampler_is_refused():
    data = ImageDataModule(global_batch_size=4)
    data.trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, barebones=True)
    with pytest.raises(ValueError, match="use_distributed_sampler=False"):
        data.setup("fit")
    data.trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", use_distributed_sampler=False, barebones=True)
    data.setup("fit")


def test_images_of_each_class_are_counted_without_those_held_out():
    data = ImageDataModule(8, validation_images=9000)
    labels = [data.sets.train.label(index) for index in range(1000)]
    assert data.class_counts() == [labels.count(label) for label in range(10)]


def test_the_best_checkpoint_is_not_chosen_by_test_images():
    data = ImageDataModule(8)
    assert data.sets.validation_from == "test" and "2,000 validation (the test images)" in data.describe()
    chooses = {"accelerator": "cpu", "logger": False, "enable_checkpointing": True}
    by_validation = ModelCheckpoint(monitor="val_top1")
    for callback in (by_validation, EarlyStopping(monitor="val_loss")):
        data.trainer = Trainer(**chooses, callbacks=[callback])
        with pytest.raises(ValueError, match=rf"{type(callback).__name__} chooses by .* data\.validation_images=500"):
            data.setup("fit")
        data.setup("test")
    for callback in (
        ModelCheckpoint(),
        ModelCheckpoint(monitor="train_loss"),
        ModelCheckpoint(monitor="val_top1", save_top_k=0),
    ):
        data.trainer = Trainer(**chooses, callbacks=[callback])
        data.setup("fit")
    for options in ({"validate_on_test": True}, {"validation_images": 9}):
        data = ImageDataModule(8, **options)
        data.trainer = Trainer(**chooses, callbacks=[by_validation])
        data.setup("fit")


def test_images_held_out_for_the_test_are_given_by_its_loader():
    data = ImageDataModule(8, validation_images=100, test_images=50)
    assert (data.image_size, data.training_images, len(data.test_images)) == (28, 9850, 50)
    assert data.stage_of_test == "test" and "not used" in data.describe()
    indices = data.sets.test.indices
    labels = torch.cat([batch.labels for batch in data.test_dataloader()])
    assert labels.tolist() == data.sets.train.dataset.labels[indices].tolist()
    assert not {*indices} & ({*data.sets.train.indices} | {*data.sets.validation.indices})


def test_evaluation_on_classes_of_its_own(tmp_path):
    for split, names in {"train": "ab", "val": "bcd"}.items():
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match="holds the class 'c', which is no class of the training images"):
        ImageDataModule(2, root=str(tmp_path), image_size=8)
    data = ImageDataModule(2, root=str(tmp_path), image_size=8, own_evaluation_classes=True)
    assert data.classes == ("a", "b") and data.stage_of_test == "val"
    assert [data.sets.validation.label(index) for index in range(3)] == [0, 1, 2]
