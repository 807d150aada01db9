"""Which files of a folder are found to be no images, and that all ranks leave out the same."""

import io
import os
import warnings
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from PIL import Image

from data.photos import encode, noise
from ranks import run_ranks
from syncbn.data import BatchedImages, ImageDataModule, ReadError
from syncbn.data import look_through as module
from syncbn.data.datasets.image_folder import ImageFolderDataset
from syncbn.data.datasets.selection import Selection
from syncbn.data.labels import RelabelledDataset
from syncbn.data.loading.batches import UnreadableImageWarning
from syncbn.data.loading.samplers import EvaluationBatchSampler, GlobalBatchSampler, SampleKey
from syncbn.data.look_through import find_unreadable, folders_of, is_unusual, look_through
from syncbn.training import SynchronisedDDPStrategy
from training.conftest import IGNORED

PILLOWS = {".jpg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP", ".gif": "GIF", ".tif": "TIFF"}
PILLOWS |= {".avif": "AVIF", ".jp2": "JPEG2000"}
WITHOUT_PIXELS = encode(noise(8, 8))[: encode(noise(8, 8)).index(b"\xff\xda")] + b"\xff\xd9"


def saved(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise(40, 40)).save(file, kind)
    return file.getvalue()


def make_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.mark.parametrize("suffix", PILLOWS)
def test_whole_images_of_each_kind_are_usual_and_broken_ones_are_found(suffix, tmp_path):
    content = saved(PILLOWS[suffix])
    whole = tmp_path / f"whole{suffix}"
    whole.write_bytes(content)
    assert not is_unusual(whole)
    broken = {f"empty{suffix}": b"", f"junk{suffix}": b"junk", f"header{suffix}": content[:20]}
    root = make_folder(tmp_path / "photos", {f"a/{name}": bad for name, bad in broken.items()})
    make_folder(root, {f"a/whole{suffix}": content, f"b/whole{suffix}": content})
    assert sorted(look_through([ImageFolderDataset(root)], root).unreadable) == sorted(f"a/{name}" for name in broken)


def test_a_photo_that_lacks_its_end_is_found_and_one_that_is_only_unusual_is_not(tmp_path):
    large, small = encode(noise(400, 400)), encode(noise(9, 9))
    assert len(large) > module.HEAD
    long_before = small[:2] + 2 * (b"\xff\xe2\xff\xff" + bytes(0xFFFD)) + small[2:]  # the frame beyond what is read
    files = {"cut.jpg": large[:-2000], "trailer.jpg": large + bytes(3000), "profile.jpg": long_before}
    root = make_folder(tmp_path, {f"a/{name}": content for name, content in files.items()})
    assert all(is_unusual(root / "a" / name) for name in files)
    make_folder(root, {"a/large.jpg": large, "b/small.jpg": small})
    look = look_through([ImageFolderDataset(root)], root)
    assert look.unreadable == {"a/cut.jpg": "the image file is truncated: the JPEG has no end"}


def test_files_that_cannot_be_opened_and_odd_names(tmp_path):
    root = make_folder(tmp_path / "photos", {"a/1.jpg": encode(noise(9, 9)), "b/1.jpg": encode(noise(9, 9))})
    (root / "a" / "gone.jpg").symlink_to("nowhere")
    odd = os.fsdecode(b"a/\xfc.jpg")
    make_folder(root, {odd: b""})
    run = tmp_path / "run"
    found = find_unreadable([ImageFolderDataset(root)], root, run)
    assert found.unreadable == {"a/gone.jpg": "No such file or directory", odd: "empty file"}
    (root / odd).unlink()
    assert find_unreadable([ImageFolderDataset(root)], root, run) == found, "once for a run"


def test_images_that_a_resumed_run_labels_anew_are_looked_at_too(tmp_path):
    photos = {f"{name}/{number}.jpg": encode(noise(9, 9)) for name in "ab" for number in range(4)}
    root = make_folder(tmp_path, photos | {"a/1.jpg": b"", "b/2.jpg": b""})
    folder = ImageFolderDataset(root)
    look = look_through([folder], root)
    relabelled = RelabelledDataset(folder, ("b", "a"), np.array([1, 0]))
    some = Selection(relabelled, np.array([1, 4, 6]))
    assert folders_of([relabelled, some, folder]) == [folder]
    assert look.places_in(relabelled) == look.places_in(folder) == {1, 6}
    assert look.places_in(some) == {0, 2}


def test_of_very_many_images_evenly_spaced_ones_are_looked_at(tmp_path, monkeypatch):
    root = make_folder(tmp_path, {f"{name}/{number}.jpg": b"" for name in "ab" for number in range(6)})
    monkeypatch.setattr(module, "MOST_IMAGES", 4)
    look = look_through([ImageFolderDataset(root)], root)
    assert (look.images, look.looked_at, list(look.unreadable)) == (12, 4, ["a/0.jpg", "a/3.jpg", "b/0.jpg", "b/3.jpg"])
    assert "looked at 4 of 12 images" in look.describe(None)


def test_a_disk_that_is_gone_is_no_few_broken_files(tmp_path):
    files = {f"{name}/{number}.jpg": WITHOUT_PIXELS for name in "ab" for number in range(8)}
    images = BatchedImages(ImageFolderDataset(make_folder(tmp_path, files)), 8, on_read_error="look")
    keys = [SampleKey(0, sample) for sample in range(16)]
    with pytest.warns(UnreadableImageWarning, match="left out of its batch: cannot decode the image"):
        assert len(images.__getitems__(keys[:15]).left_out) == 15
    with pytest.raises(ReadError, match=r"16 images in a row cannot be read; the last: cannot decode .*7\.jpg"):
        images.__getitems__(keys[15:])


def test_what_is_left_out_moves_no_other_sample():
    whole, without = (
        [[key.sample for key in keys] for keys in GlobalBatchSampler(12, 4, rank=1, num_ranks=2, left_out=left_out)]
        for left_out in ((), {3, 5, 8})
    )
    assert without == [[sample for sample in batch if sample not in (3, 5, 8)] for batch in whole] != whole
    ranks = [EvaluationBatchSampler(9, 4, rank=rank, num_ranks=2, left_out={0, 4}) for rank in (0, 1)]
    batches = [[key.sample for keys in step for key in keys] for step in zip(*ranks, strict=True)]
    assert batches == [[1, 2, 3, 5], [6, 7, 8]] and len(ranks[0]) == 2


def seen_on_rank(rank: int, parent: Path) -> tuple:
    """What a rank takes of its own copy of the photos, of which only rank 0's is looked through."""
    warnings.simplefilter("error")
    for line in IGNORED:
        warnings.filterwarnings("ignore", line.split(":")[1])
    os.environ |= {"LOCAL_RANK": str(rank), "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    data = ImageDataModule(4, str(parent / f"node{rank}"), 8, None, validation_images=4)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=SynchronisedDDPStrategy(timeout_seconds=30),
        plugins=[TorchElasticEnvironment()],
        use_distributed_sampler=False,
        logger=False,
    )
    data.trainer = trainer
    trainer.strategy.setup_environment()
    data.setup("fit")
    loaders = (data.train_dataloader(), data.val_dataloader())
    return *([batch.indices.tolist() for batch in loader] for loader in loaders), data.class_counts()


def test_all_ranks_leave_out_what_rank_0_has_found(tmp_path):
    files = {f"{name}/{number}.jpg": encode(noise(9, 9, seed=number)) for name in "ab" for number in range(8)}
    make_folder(tmp_path / "node1", files)
    make_folder(tmp_path / "node0", files | {"a/0.jpg": b"", "a/1.jpg": b"", "b/7.jpg": b"no"})
    (train, validation, counts), (train_1, validation_1, counts_1) = run_ranks(seen_on_rank, 2, tmp_path)
    assert counts == counts_1 == [5, 5]
    # Every fourth of the 16 is held out, of which the first is broken; of the other twelve two are.
    assert sorted(chain(*validation, *validation_1)) == [1, 2, 3]
    assert sorted(chain(*train, *train_1)) == [*range(1, 11)]
    assert [len(first) + len(second) for first, second in zip(train, train_1, strict=True)] != [4, 4, 4]


def test_images_in_memory_are_not_looked_at():
    data = ImageDataModule(4, image_size=8, validation_images=4)
    assert data._policy == "stop" and data.class_counts() == np.bincount(data.sets.train.labels).tolist()
