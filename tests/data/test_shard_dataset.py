"""Images in shards, whole and damaged."""

import re
import shutil

import numpy as np
import pytest
import torch

from shard_cases import CLASSES, encoded_photo, make_shards, train_loader, train_set
from syncbn.data import ReadError, open_image_sets
from syncbn.errors import one_line


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "shards")


def delete(folder):
    """Delete a shard; returns its samples, and what is said of each."""
    path = folder / "train-000002.tar"
    path.unlink()
    return range(17, 26), rf"{path} \(image \d of the shard\): No such file or directory$"


def truncate(folder):
    """Cut off a shard within its second image."""
    dataset, path = train_set(folder), folder / "train-000002.tar"
    with path.open("r+b") as file:
        file.truncate(int(dataset.records[18]["offset"]) + 100)
    said = rf"{path} \((train_18.jpg|image \d of the shard)\): the file ends early; `syncbn prepare check {folder}` "
    return range(18, 26), said


def scramble(folder):
    """Overwrite an image by zeros."""
    record, path = train_set(folder).records[20], folder / "train-000002.tar"
    with path.open("r+b") as file:
        file.seek(record["offset"])
        file.write(bytes(int(record["size"])))
    return [20], rf"cannot decode the image {path} \(train_20.jpg\) \({record['size']} bytes\): remove or replace"


def test_a_folder_of_shards_is_opened(whole):
    sets = open_image_sets(str(whole))
    assert (len(sets.train), len(sets.validation), sets.test) == (43, 5, None)
    assert sets.train.classes == CLASSES and sets.train.mean == (0.5, 0.4, 0.3)
    for index in (0, 8, 9, 42, 16):
        assert sets.train.encoded(index) == encoded_photo(index)
        assert sets.train.label(index) == index % 3
        assert sets.train.name(index).endswith(f".tar (train_{index}.jpg)")
    assert sets.train.image(7).shape == (18, 20, 3)


def test_images_held_out_keep_their_shards(whole):
    sets = open_image_sets(str(whole), validation_images=10)
    assert sets.train.layout.starts.tolist() == [0, 6, 13, 19, 19, 26, 33]
    starts = train_set(whole).layout.starts
    for shard, (first, stop) in enumerate(zip(sets.train.layout.starts, sets.train.layout.starts[1:], strict=False)):
        kept = sets.train.indices[first:stop]
        assert ((kept >= starts[shard]) & (kept < starts[shard + 1])).all()
    assert sets.train.encoded(3) == encoded_photo(int(sets.train.indices[3]))
    assert sets.train.name(3) == train_set(whole).name(int(sets.train.indices[3]))
    assert len(sets.test) == 5


def test_a_broken_index_is_named(folder):
    (folder / "train.samples.npy").unlink()
    with pytest.raises(ValueError, match=r"cannot read .*train\.samples\.npy"):
        open_image_sets(str(folder))


# torch waits 5 s for each worker of a loader that has raised: a single one is enough.
@pytest.mark.parametrize(("damage", "num_workers"), [(delete, 0), (truncate, 0), (scramble, 0), (delete, 1)])
def test_damage_stops_with_the_name_of_the_file(folder, damage, num_workers):
    _, said = damage(folder)
    with pytest.raises(ReadError) as stopped:
        list(train_loader(train_set(folder), num_workers=num_workers))
    message = one_line(str(stopped.value))
    assert re.search(said, message), message
    assert "\n" not in message and message.startswith("cannot ")


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("damage", [delete, truncate, scramble])
def test_damage_is_left_out_and_counted(whole, folder, damage, num_workers):
    lost, said = damage(folder)
    options = {"num_workers": num_workers, "drop_last": False}
    expected = list(train_loader(train_set(whole), **options))
    found = list(train_loader(train_set(folder), on_read_error="skip", **options))
    for before, after in zip(expected, found, strict=True):
        kept = torch.from_numpy(~np.isin(before.indices.numpy(), lost))
        for part in ("images", "labels", "indices"):
            assert torch.equal(getattr(after, part), getattr(before, part)[kept])
        assert len(after.left_out) == int((~kept).sum())
    messages = [message for batch in found for message in batch.left_out]
    assert len(messages) == len(lost)
    for message in messages:
        assert re.search(said, message), message


def test_an_image_of_an_impossible_size_cannot_be_decoded(folder):
    dataset = train_set(folder)
    content = bytearray(encoded_photo(0))
    header = content.index(b"\xff\xc0")
    content[header + 5 : header + 9] = b"\xff\xff\xff\xff"  # height and width
    dataset.encoded = lambda index: bytes(content)
    with pytest.raises(ReadError, match=r"cannot decode the image .*train_0\.jpg"):
        dataset.image(0)
