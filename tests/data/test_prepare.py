"""``syncbn prepare`` from archives and folders to shards: whole, damaged, interrupted, and begun otherwise."""

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
from PIL import Image

from imagenet_archives import encode, make_images, photo, tar, write_archives, write_devkit
from real_data import real_data
from syncbn.cli import main
from syncbn.data import open_image_sets
from syncbn.data.datasets.shard_files import read_index
from syncbn.data.preparation.command import check, folder, imagenet
from syncbn.data.preparation.imagenet import read_devkit
from syncbn.data.preparation.plan import SourceImage
from syncbn.data.preparation.tasks import read_bytes

WNIDS = ("n01440764", "n02102040", "n03000684")


@pytest.fixture
def source(tmp_path):
    """Three classes of 12, 13 and 14 images, and 6 validation images."""
    train = {wnid: make_images(wnid, 12 + i, 100 * i) for i, wnid in enumerate(WNIDS)}
    val = [(WNIDS[i % 3], encode(photo(1000 + i))) for i in range(6)]
    write_archives(tmp_path / "source", train, val)
    return tmp_path / "source"


def read_samples(destination, split):
    """(key, image, label) of each sample, as the members of the shards have it; compared with the records."""
    index = read_index(destination)
    samples = []
    for shard in index.splits[split].shards:
        with tarfile.open(destination / shard.name) as archive:
            members = archive.getmembers()
            for image, label in zip(members[::2], members[1::2], strict=True):
                content = archive.extractfile(image).read()
                samples.append((image.name.removesuffix(".jpg"), content, int(archive.extractfile(label).read())))
    records = index.splits[split].records
    assert records["label"].tolist() == [label for _, _, label in samples]
    assert records["size"].tolist() == [len(content) for _, content, _ in samples]
    return samples


def checksums(destination):
    """Of every file that stays."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in destination.iterdir()}


def read_report(destination):
    content = json.loads((destination / "report.json").read_text())
    dropped = {(entry["split"], entry["name"]): entry["reason"] for entry in content["dropped"]}
    repaired = {(entry["split"], entry["name"]): entry["reason"] for entry in content["repaired"]}
    return dropped, repaired


# ---- the archives of ImageNet --------------------------------------------------------------------


def test_every_image_comes_through(source, tmp_path, capsys):
    destination = tmp_path / "shards"
    imagenet(source, destination, shard_megabytes=0.02, workers=2)
    index = read_index(destination)
    assert index.classes == WNIDS
    assert index.class_names == tuple(f"words of {wnid}" for wnid in WNIDS)
    assert index.splits["train"].per_class == (12, 13, 14)
    assert index.splits["val"].per_class == (2, 2, 2)
    assert len(index.splits["train"].shards) > 2
    wanted = {
        (name.removesuffix(".JPEG"), content, label)
        for label, wnid in enumerate(WNIDS)
        for name, content in make_images(wnid, 12 + label, 100 * label)
    }
    train = read_samples(destination, "train")
    assert len(train) == len(wanted)
    assert set(train) == wanted
    labels = [label for _, _, label in train]
    assert labels != sorted(labels), "training images are shuffled"
    assert read_samples(destination, "val") == [
        (f"ILSVRC2012_val_{i + 1:08d}", encode(photo(1000 + i)), i % 3) for i in range(6)
    ]
    assert read_report(destination) == ({}, {})
    assert {path.suffix for path in destination.iterdir()} == {".json", ".npy", ".tar"}
    output = capsys.readouterr().out
    assert f"syncbn fit --data {destination}" in output
    assert "39" in output
    check(destination, workers=1)


def test_devkit_translates_the_ground_truth(tmp_path):
    """ILSVRC2012_IDs, which the ground truth counts by, are not in the order of the wnids, which labels are."""
    identifiers = {"n03": 1, "n01": 3, "n02": 2}
    path = tmp_path / "devkit.tar.gz"
    counts = {"n01": 10, "n02": 20, "n03": 30}
    write_devkit(path, identifiers, counts, [1, 1, 2, 3], words={"n01": "tench, Tinca tinca"})
    devkit = read_devkit(path)
    assert devkit.wnids == ("n01", "n02", "n03")
    assert devkit.words == ("tench, Tinca tinca", "words of n02", "words of n03")
    assert devkit.train_counts == (10, 20, 30)
    assert devkit.val_labels == (2, 2, 1, 0)


def test_broken_devkits(tmp_path, monkeypatch):
    path = tmp_path / "devkit.tar.gz"
    write_devkit(path, {"n01": 1}, {"n01": 1}, [1, 7])
    with pytest.raises(ValueError, match="ground truth names the class 7"):
        read_devkit(path)
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], b"junk" * 100, b""):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"devkit\.tar\.gz is broken"):
            read_devkit(path)
    path.write_bytes(tar([("data/meta.mat", b"junk")]))
    with pytest.raises(ValueError, match=r"devkit\.tar\.gz is broken"):
        read_devkit(path)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ValueError, match=r"takes scipy: pip install 'syncbn\[imagenet\]'"):
        read_devkit(path)


def test_a_missing_archive_is_named(source, tmp_path):
    (source / "ILSVRC2012_img_val.tar").unlink()
    with pytest.raises(ValueError, match=r"lacks ILSVRC2012_img_val\.tar: download"):
        imagenet(source, tmp_path / "shards", workers=1)


def make_damaged_source(path):
    """Every kind of damage, one image or archive each; returns the keys that must survive."""
    good = encode(photo(width=120, height=90))
    cmyk = encode(photo(mode="CMYK"))
    broken_exif = good[:2] + b"\xff\xe1\x00\x18Exif\0\0II*\0\x08\0\0\0\xff\xff\x99\x99\x99\x99\x99\x99" + good[2:]
    first = [
        *make_images("n01", 20),
        ("n01_truncated.JPEG", good[: len(good) // 2]),
        ("n01_cmyk.JPEG", cmyk),
        ("n01_png.JPEG", encode(photo(), "PNG")),
        ("n01_zero.JPEG", b""),
        ("n01_exif.JPEG", broken_exif),
    ]
    corrupt = bytearray(tar(make_images("n02", 10, 50)))
    at = corrupt.index(b"n02_4.JPEG")
    corrupt[at : at + 400] = b"\xaa" * 400
    train = {"n01": first, "n02": bytes(corrupt), "n03": [], "n04": make_images("n04", 10, 80), "n05": b"\xaa" * 5000}
    val = [("n01", good), ("n02", good[:-50]), ("n04", good)]
    write_archives(path, train, val, counts={"n02": 10, "n05": 3})
    survivors = {f"n01_{i}" for i in range(20)} | {"n01_cmyk", "n01_png", "n01_exif"}
    return survivors | {f"n02_{i}" for i in range(10) if i != 4} | {f"n04_{i}" for i in range(10)}


def test_damage_is_reported_by_name_and_costs_nothing_else(tmp_path, capsys):
    survivors = make_damaged_source(tmp_path / "source")
    destination = tmp_path / "shards"
    imagenet(tmp_path / "source", destination, workers=2, max_dropped=0.5)
    dropped, repaired = read_report(destination)
    assert set(dropped) == {
        ("train", "n01_truncated.JPEG"),
        ("train", "n01_zero.JPEG"),
        ("train", "n02.tar"),
        ("train", "n03.tar"),
        ("train", "n05.tar"),
        ("val", "ILSVRC2012_val_00000002.JPEG"),
    }
    assert "truncated" in dropped["train", "n01_truncated.JPEG"]
    assert dropped["train", "n01_zero.JPEG"] == "empty file"
    assert dropped["train", "n02.tar"] == "has 9 whole images, 10 by the development kit"
    assert dropped["train", "n03.tar"] == "has no whole images, 0 by the development kit"
    assert "truncated" in dropped["val", "ILSVRC2012_val_00000002.JPEG"]
    assert repaired == {
        ("train", "n01_cmyk.JPEG"): "CMYK to RGB",
        ("train", "n01_png.JPEG"): "PNG to JPEG",
        ("train", "n01_exif.JPEG"): "broken EXIF removed",
    }
    train = read_samples(destination, "train")
    assert len(train) == len(survivors)
    assert {key for key, _, _ in train} == survivors
    assert {key[:3]: label for key, _, label in train} == {"n01": 0, "n02": 1, "n04": 3}
    assert [key for key, _, _ in read_samples(destination, "val")] == [f"ILSVRC2012_val_0000000{i}" for i in (1, 3)]
    output = capsys.readouterr().out
    assert "damaged header after n02_3.JPEG" in output
    for _, name in [*dropped, *repaired]:
        assert name in output


def test_too_much_damage_is_an_error_and_may_be_allowed_afterwards(tmp_path):
    make_damaged_source(tmp_path / "source")
    destination = tmp_path / "shards"
    with pytest.raises(ValueError, match=r"13\.73% of the images were dropped.*report\.json"):
        imagenet(tmp_path / "source", destination, workers=1)
    assert (destination / "report.json").exists()
    with pytest.raises(ValueError, match="no finished shards"):
        read_index(destination)
    before = (destination / "train-000000.tar").stat().st_mtime_ns
    imagenet(tmp_path / "source", destination, workers=1, max_dropped=0.15)
    assert (destination / "train-000000.tar").stat().st_mtime_ns == before
    check(destination, workers=1)


def test_truncated_archives(source, tmp_path):
    path = source / "ILSVRC2012_img_train.tar"
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"n03000684_5.JPEG") + 700])
    path = source / "ILSVRC2012_img_val.tar"
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"ILSVRC2012_val_00000005.JPEG")])
    destination = tmp_path / "shards"
    imagenet(source, destination, workers=1, max_dropped=0.5)
    assert read_index(destination).splits["train"].per_class == (12, 13, 5)
    assert read_index(destination).splits["val"].samples == 4
    dropped, _ = read_report(destination)
    assert dropped["train", "ILSVRC2012_img_train.tar"] == "the archive ends within n03000684.tar"
    assert dropped["train", "n03000684.tar"] == "has 5 whole images, 14 by the development kit"
    assert dropped["val", "ILSVRC2012_img_val.tar"] == "lacks 2 of 6 images, the first number 5"


def test_files_that_are_no_part_of_imagenet_are_named(source, tmp_path):
    extra = [("ILSVRC2012_val_00000001.JPEG", encode(photo())), ("notes.txt", b"x"), ("README.JPEG", b"x")]
    path = source / "ILSVRC2012_img_val.tar"
    named = [(f"ILSVRC2012_val_{i + 1:08d}.JPEG", encode(photo(1000 + i))) for i in range(6)]
    path.write_bytes(tar([*named, *extra]))
    imagenet(source, tmp_path / "shards", workers=1)
    dropped, _ = read_report(tmp_path / "shards")
    assert {name for _, name in dropped} == {"ILSVRC2012_val_00000001.JPEG", "notes.txt", "README.JPEG"}
    assert read_samples(tmp_path / "shards", "val")[0][1] == encode(photo(1000))


def test_resize(tmp_path):
    images = [(f"n01_{i}.JPEG", encode(photo(i, 200, 150))) for i in range(60)]
    write_archives(tmp_path / "source", {"n01": images}, [("n01", encode(photo(0, 80, 100)))])
    imagenet(tmp_path / "source", tmp_path / "shards", shorter_side=64, quality=80, shard_megabytes=0.05, workers=2)
    samples = read_samples(tmp_path / "shards", "train") + read_samples(tmp_path / "shards", "val")
    shapes = {cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR).shape for _, content, _ in samples}
    assert shapes == {(64, 85, 3), (80, 64, 3)}
    sizes = [shard.bytes for shard in read_index(tmp_path / "shards").splits["train"].shards]
    assert len(sizes) > 2
    assert all(abs(size - 5e4) < 1.5e4 for size in sizes[:-1]), "sized by what is written, not by what was read"


# ---- interrupted, repeated -----------------------------------------------------------------------


def test_workers_do_not_matter(source, tmp_path):
    for workers in (1, 3):
        imagenet(source, tmp_path / str(workers), shorter_side=32, shard_megabytes=0.02, workers=workers)
    assert checksums(tmp_path / "1") == checksums(tmp_path / "3")


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def is_gone(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_and_run_again(tmp_path, kill):
    contents = [encode(photo(i, 400, 300)) for i in range(10)]
    images = {wnid: [(f"{wnid}_{i}.JPEG", contents[i % 10]) for i in range(150)] for wnid in WNIDS}
    write_archives(tmp_path / "source", images, [("n01440764", contents[0])] * 10)
    options = {"shorter_side": 250, "shard_megabytes": 0.2}
    words = [f"--{key}={value}" for key, value in options.items()]
    destination = tmp_path / "killed"
    start = [sys.executable, "-m", "syncbn", "prepare", "imagenet", str(tmp_path / "source"), str(destination)]
    process = subprocess.Popen([*start, *words, "--workers=2"], start_new_session=True, stderr=subprocess.PIPE)
    wait_until(lambda: len(list(destination.glob(".prepare/*.tar.json"))) >= 3)
    process.send_signal(kill)
    error = process.communicate(timeout=30)[1].decode()
    assert process.returncode == (-signal.SIGKILL if kill == signal.SIGKILL else 130)
    assert kill == signal.SIGKILL or error.startswith("interrupted: ")
    assert "Traceback" not in error
    wait_until(lambda: is_gone(process.pid))  # the workers too
    assert not (destination / "index.json").exists(), "killed too late to show anything"
    finished = {
        path.name: path.stat().st_mtime_ns
        for path in destination.glob("*.tar")
        if (destination / ".prepare" / f"{path.name}.json").exists()
    }
    assert len(finished) >= 3
    imagenet(tmp_path / "source", destination, workers=2, **options)
    assert {name: (destination / name).stat().st_mtime_ns for name in finished} == finished, "redone"
    imagenet(tmp_path / "source", tmp_path / "whole", workers=2, **options)
    assert checksums(destination) == checksums(tmp_path / "whole")


def test_a_failed_start_leaves_the_destination_to_another(source, tmp_path):
    destination = tmp_path / "shards"
    with pytest.raises(ValueError, match="lacks ILSVRC2012"):
        imagenet(tmp_path, destination, workers=1)
    imagenet(source, destination, shorter_side=32, workers=1)


def test_going_on_otherwise_is_refused(source, tmp_path, monkeypatch):
    destination = tmp_path / "shards"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr("syncbn.data.preparation.command.finish", Mock(side_effect=OSError("disk full")))
        imagenet(source, destination, shorter_side=32, workers=1)
    for _ in ("begun", "finished"):
        with pytest.raises(ValueError, match=r"begun with shorter_side=32, and this is shorter_side=None: go on as"):
            imagenet(source, destination, workers=1)
        with pytest.raises(ValueError, match=r"begun with source=imagenet, and this is source=folder"):
            folder(source, destination, shorter_side=32, workers=1)
        imagenet(source, destination, shorter_side=32, workers=1)


def test_another_source_is_refused(source, tmp_path):
    destination = tmp_path / "shards"
    write_archives(tmp_path / "bad", {"n01": [("a.JPEG", b"")]}, [("n01", b"")])
    with pytest.raises(ValueError, match=r"100\.00% of the images were dropped"):
        imagenet(tmp_path / "bad", destination, workers=1)
    with pytest.raises(ValueError, match="begun with images="):
        imagenet(source, destination, workers=1)


def test_finished_is_finished(source, tmp_path, capsys):
    imagenet(source, tmp_path / "shards", workers=1)
    before = checksums(tmp_path / "shards")
    capsys.readouterr()
    imagenet(source, tmp_path / "shards", workers=1)
    assert "is finished already" in capsys.readouterr().out
    assert checksums(tmp_path / "shards") == before


def test_a_finished_folder_of_another_source_is_refused(source, tmp_path):
    imagenet(source, tmp_path / "shards", workers=1)
    source.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"is finished, made of {source} and not of .*elsewhere: name another"):
        imagenet(tmp_path / "elsewhere", tmp_path / "shards", workers=1)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"short")])
def test_a_shard_lost_from_a_finished_folder_is_noticed(source, tmp_path, damage):
    imagenet(source, tmp_path / "shards", workers=1)
    damage(tmp_path / "shards" / "train-000000.tar")
    with pytest.raises(ValueError, match=r"train-000000\.tar (is missing|has 5 bytes, .*): delete"):
        imagenet(source, tmp_path / "shards", workers=1)


def test_a_damaged_or_missing_shard_of_an_unfinished_job_is_made_again(source, tmp_path):
    destination = tmp_path / "shards"
    make_damaged_source(tmp_path / "damaged")
    with pytest.raises(ValueError, match="were dropped"):
        imagenet(tmp_path / "damaged", destination, shard_megabytes=0.01, workers=1)
    (destination / "train-000001.tar").unlink()
    (destination / "train-000002.tar").write_bytes(b"half")
    (destination / ".train-000003.tar.x.part").write_bytes(b"left behind")
    imagenet(tmp_path / "damaged", destination, shard_megabytes=0.01, workers=1, max_dropped=1)
    check(destination, workers=1)
    assert not list(destination.glob(".*"))


def test_folders_that_are_in_use_or_hold_something_else(source, tmp_path):
    destination = tmp_path / "shards"
    destination.mkdir()
    (destination / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"holds other files \(thesis\.tex\): name a new folder"):
        imagenet(source, destination, workers=1)
    (destination / "thesis.tex").unlink()
    (destination / ".prepare").mkdir()
    with (destination / ".prepare" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another `syncbn prepare` is writing to"):
            imagenet(source, destination, workers=1)
    imagenet(source, destination, workers=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shorter_side": 0}, "shorter_side=0 must be at least 1"),
        ({"quality": 101}, "quality=101 must be in 1..100"),
        ({"shard_megabytes": 0}, "shard_megabytes=0 must be positive"),
        ({"workers": 0}, "workers=0 must be at least 1"),
        ({"max_dropped": 1.5}, "max_dropped=1.5 must be in 0..1"),
    ],
)
def test_options_out_of_range(source, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        imagenet(source, tmp_path / "shards", **options)


# ---- folders -------------------------------------------------------------------------------------


def write_files(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def test_folders_train_and_val(tmp_path):
    files = {f"train/cat/{i}.jpg": encode(photo(i)) for i in range(5)}
    files |= {"train/dog/old/a/1.png": encode(photo(9), "PNG"), "train/dog/1.JPG": encode(photo(10))}
    files |= {"train/dog/notes.txt": b"x", "train/dog/.hidden.jpg": b"x", "train/emu/broken.jpg": b"junk"}
    files |= {"val/dog/x.jpg": encode(photo(11)), "val/cat/same.jpg": encode(photo(12)), "val/cat/same.png": b""}
    write_files(tmp_path / "source", files)
    folder(tmp_path / "source", tmp_path / "shards", workers=1, max_dropped=0.5)
    index = read_index(tmp_path / "shards")
    assert index.classes == index.class_names == ("cat", "dog", "emu")
    train = {key: (label, content) for key, content, label in read_samples(tmp_path / "shards", "train")}
    assert set(train) == {*(f"cat_{i}" for i in range(5)), "dog_old_a_1", "dog_1"}
    assert train["cat_3"] == (0, files["train/cat/3.jpg"])
    assert train["dog_old_a_1"][0] == 1
    assert [(key, label) for key, _, label in read_samples(tmp_path / "shards", "val")] == [
        ("cat_same", 0),
        ("dog_x", 1),
    ]
    dropped, repaired = read_report(tmp_path / "shards")
    assert set(dropped) == {
        ("train", "dog/notes.txt"),
        ("train", "emu/broken.jpg"),
        ("val", "emu"),
        ("val", "cat/same.png"),
    }
    assert dropped["val", "emu"] == "is a class without images"
    assert repaired == {("train", "dog/old/a/1.png"): "PNG to JPEG"}


def test_names_that_collide_get_keys_of_their_own(tmp_path):
    names = ("a.b.jpg", "a_b.jpg", "a/b.jpg")
    files = {f"{split}/cat/{name}": encode(photo(i)) for split in ("train", "val") for i, name in enumerate(names)}
    write_files(tmp_path / "source", {"train/dog/1.jpg": encode(photo(9))})
    write_files(tmp_path / "source", files)
    folder(tmp_path / "source", tmp_path / "shards", workers=1)
    val = read_samples(tmp_path / "shards", "val")
    assert [key for key, _, _ in val] == ["cat_a_b", "cat_a_b-2", "cat_a_b-3"]
    assert {content for _, content, _ in val} == set(files.values())


def test_links_are_followed_and_broken_ones_reported(tmp_path):
    files = {f"{split}/cat/{i}.jpg": encode(photo(i)) for split in ("train", "val") for i in range(3)}
    files["train/dog/1.jpg"] = encode(photo(9))
    write_files(tmp_path / "source", files)
    write_files(tmp_path / "elsewhere", {"more/7.jpg": encode(photo(7))})
    (tmp_path / "source" / "train" / "cat" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    (tmp_path / "source" / "train" / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    folder(tmp_path / "source", tmp_path / "shards", workers=1, max_dropped=0.2)
    keys = {key for key, _, _ in read_samples(tmp_path / "shards", "train")}
    assert keys == {"cat_0", "cat_1", "cat_2", "cat_more_7", "dog_1"}
    assert read_report(tmp_path / "shards")[0] == {
        ("train", "cat/gone.jpg"): "is a link to nothing",
        ("val", "dog"): "is a class without images",
    }


def test_shards_do_not_go_among_the_classes(tmp_path):
    write_files(tmp_path / "source", flat_files())
    with pytest.raises(ValueError, match="would pass for a class"):
        folder(tmp_path / "source", tmp_path / "source" / "shards", workers=1)


def flat_files(dogs=10):
    files = {f"cat/{i}.jpg": encode(photo(i)) for i in range(20)}
    return files | {f"dog/{i}.jpg": encode(photo(100 + i)) for i in range(dogs)} | {"emu/1.jpg": encode(photo(7))}


def test_flat_folders_are_divided_by_class(tmp_path):
    write_files(tmp_path / "a", flat_files())
    write_files(tmp_path / "b", flat_files(dogs=14))
    chosen = {}
    for name in ("a", "b"):
        destination = tmp_path / f"{name}.shards"
        folder(tmp_path / name, destination, validation_fraction=0.3, workers=1)
        splits = read_index(destination).splits
        dogs = {"a": (7, 3), "b": (10, 4)}[name]
        assert splits["train"].per_class == (14, dogs[0], 1)
        assert splits["val"].per_class == (6, dogs[1], 0)
        train, val = ({key for key, _, _ in read_samples(destination, split)} for split in ("train", "val"))
        assert not train & val
        assert len(train | val) == splits["train"].samples + splits["val"].samples
        chosen[name] = {key for key in val if key.startswith("cat")}
    assert chosen["a"] == chosen["b"], "a class is divided whatever the other classes are"


def test_a_tenth_is_held_out_where_nothing_is_said(tmp_path):
    write_files(tmp_path / "source" / "train", flat_files())
    folder(tmp_path / "source", tmp_path / "shards", workers=1)
    assert read_index(tmp_path / "shards").splits["val"].per_class == (2, 1, 0)


@pytest.mark.parametrize("turns", [None, False])
def test_orientation_and_a_test_set(tmp_path, turns):
    exif = Image.Exif()
    exif[0x112] = 6
    content = encode(photo(), exif=exif)
    names = [f"{split}/{name}/1.jpg" for split in ("Train", "valid", "testing", "extra") for name in ("cat", "dog")]
    write_files(tmp_path / "source", dict.fromkeys(names, content))
    folder(tmp_path / "source", tmp_path / "shards", workers=1, exif_orientation=turns)
    sets = open_image_sets(str(tmp_path / "shards"))
    assert (len(sets.train), len(sets.validation), len(sets.test)) == (2, 2, 2)
    for images in (sets.train, sets.validation, sets.test):
        assert images.image(0).shape == ((40, 48, 3) if turns is False else (48, 40, 3))
    assert sets.exif_orientation == (turns is None)
    assert read_report(tmp_path / "shards")[0] == {("train", "extra"): "is not used"}
    folder(tmp_path / "source", tmp_path / "shards", workers=1)  # goes on as it was begun
    with pytest.raises(ValueError, match=rf"was begun with exif_orientation={turns is None}"):
        folder(tmp_path / "source", tmp_path / "shards", workers=1, exif_orientation=turns is False)
    with pytest.raises(ValueError, match=r"data\.exif_orientation=.*, but .* was prepared with"):
        open_image_sets(str(tmp_path / "shards"), exif_orientation=turns is False)


def test_names_of_imagenet_are_kept(tmp_path):
    files = {f"{split}/{wnid}/{wnid}_7.JPEG": encode(photo()) for split in ("train", "val") for wnid in WNIDS}
    write_files(tmp_path / "source", files)
    folder(tmp_path / "source", tmp_path / "shards", workers=1)
    assert {key for key, _, _ in read_samples(tmp_path / "shards", "train")} == {f"{wnid}_7" for wnid in WNIDS}
    assert not read_index(tmp_path / "shards").exif_orientation, "ImageNet's labels are about the pixels as stored"


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, {}, "is no folder"),
        ({"a.jpg": b"x"}, {}, "holds no class folders"),
        ({"cat/a.jpg": b"x"}, {}, "holds one class, cat"),
        ({"cat/a.txt": b"x", "dog/a.jpg": b"x"}, {}, r"the class cat has no image: .* holds 1 \.txt; convert them"),
        ({"cat/a.jpg": b"x", "dog/a.jpg": b"x"}, {}, "gives 2 training and no validation images"),
        (
            {"train/cat/a.jpg": b"x", "train/emu/a.jpg": b"x", "val/dog/a.jpg": b"x"},
            {},
            "holds the class 'dog', of which there are no training",
        ),
        (
            {"train/cat/a.jpg": b"x", "train/emu/a.jpg": b"x", "val/cat/a.jpg": b"x"},
            {"validation_fraction": 0.5},
            "leave out",
        ),
        ({"cat/a.jpg": b"x"}, {"validation_fraction": 1.0}, "must be between 0 and 1"),
    ],
)
def test_folders_that_cannot_be_prepared(tmp_path, files, options, message):
    write_files(tmp_path / "source", files)
    with pytest.raises(ValueError, match=message):
        folder(tmp_path / "source", tmp_path / "shards", workers=1, **options)


def test_an_unreadable_image_stops_the_work(tmp_path):
    """A failing disk must not pass for thousands of bad images; the next run goes on."""
    path = tmp_path / "a.jpg"
    path.write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"a\.jpg has become shorter"):
        read_bytes(SourceImage(str(path), 1, 3, "a", "a", 0))
    path.unlink()
    with pytest.raises(OSError, match=r"cannot read a \(No such file.*a\.jpg"):
        read_bytes(SourceImage(str(path), 0, 3, "a", "a", 0))


# ---- check, and the command ----------------------------------------------------------------------


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap_records(path):
    records = np.load(path)
    records["offset"][:2] = records["offset"][1::-1]
    np.save(path, records)


@pytest.mark.parametrize(
    ("name", "damage", "bad", "flaw"),
    [
        ("val-000000.tar", flip, "val-000000.tar", "has the SHA-256"),
        ("train-000001.tar", lambda path: path.write_bytes(path.read_bytes()[:-512]), "train-000001.tar", "bytes, the"),
        ("train-000001.tar", Path.unlink, "train-000001.tar", "cannot be read"),
        ("train.samples.npy", swap_records, "train-000000.tar", "members are not where the index says"),
    ],
)
def test_check_names_what_is_bad(source, tmp_path, capsys, monkeypatch, name, damage, bad, flaw):
    destination = tmp_path / "shards"
    imagenet(source, destination, shard_megabytes=0.02, workers=1)
    damage(destination / name)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["syncbn"])
    with pytest.raises(SystemExit) as stop:
        main(["prepare", "check", str(destination), "--workers=1"])
    assert stop.value.code == 1
    output, error = capsys.readouterr()
    assert f"{destination / bad}: " in output
    assert flaw in output
    assert output.count(".tar: ") == 1
    assert error.startswith("syncbn: error: 1 of ")
    assert error.count("\n") == 1


# ---- the real layout -----------------------------------------------------------------------------


def test_the_mini_archive(tmp_path):
    imagenet(real_data("ilsvrc2012-mini"), tmp_path / "shards", shard_megabytes=10, workers=2)
    index = read_index(tmp_path / "shards")
    assert len(index.classes) == 10
    assert (index.splits["train"].samples, index.splits["val"].samples) == (9469, 3925)
    assert index.class_names[0] == "tench, Tinca tinca"
    assert read_report(tmp_path / "shards") == ({}, {})
    keys = [key for key, _, _ in read_samples(tmp_path / "shards", "val")]
    assert keys == [f"ILSVRC2012_val_{i + 1:08d}" for i in range(3925)]
    first = np.bincount(index.splits["train"].records["label"][:1000], minlength=10)
    assert first.min() > 50, "classes are mixed from the first image on"
