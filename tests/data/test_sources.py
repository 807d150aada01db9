"""Detecting and reading idx files and folders of images, whole and broken."""

import gzip
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest

from real_data import real_data
from shard_cases import make_shards
from syncbn.data import ImageFolderDataset, open_image_sets
from syncbn.data.datasets.formats import open_training_set
from syncbn.data.datasets.idx import IDX_FILES, read_idx
from syncbn.data.datasets.image_folder import images_and_others
from syncbn.data.datasets.selection import hold_out


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    content = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def make_idx_folder(folder: Path, suffix: str = "") -> dict[tuple[str, str], np.ndarray]:
    random = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 12), ("test", 5)):
        arrays[split, "images"] = random.integers(0, 256, (count, 9, 9))
        arrays[split, "labels"] = np.arange(count) % 4
        for part in ("images", "labels"):
            write_idx(folder / f"{IDX_FILES[split, part]}{suffix}", arrays[split, part])
    return arrays


def make_image_folder(folder: Path, splits: dict[str, dict[str, int]]) -> None:
    random = np.random.default_rng(0)
    for split, classes in splits.items():
        for name, count in classes.items():
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                image = random.integers(0, 256, (10 + number, 14, 3), dtype=np.uint8)
                assert cv2.imwrite(str(folder / split / name / f"{number}.png"), image)


def test_idx_files_with_a_dot_in_the_name_and_where_torchvision_puts_them(tmp_path):
    for place in ("dots", "vision/MNIST/raw", "both/MNIST/raw", "both/FashionMNIST/raw"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        make_idx_folder(folder, "")
    for path in (tmp_path / "dots").iterdir():
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    for place in ("dots", "vision", "vision/MNIST", "vision/MNIST/raw"):
        assert len(open_image_sets(str(tmp_path / place), validate_on_test=True).train) == 12
    with pytest.raises(ValueError, match=r"several data sets, in .*FashionMNIST/raw and .*/MNIST/raw: name one"):
        open_image_sets(str(tmp_path / "both"))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_read_gzipped_or_not(tmp_path, suffix):
    arrays = make_idx_folder(tmp_path, suffix)
    sets = open_image_sets(str(tmp_path), validate_on_test=True)
    for split, images in (("train", sets.train), ("test", sets.test)):
        assert len(images) == len(arrays[split, "labels"])
        for index in range(len(images)):
            assert np.array_equal(images.image(index)[:, :, 0], arrays[split, "images"][index])
            assert images.label(index) == arrays[split, "labels"][index]
    pixels = arrays["train", "images"] / 255
    assert sets.train.mean[0] == pytest.approx(pixels.mean()) and sets.train.std[0] == pytest.approx(pixels.std())
    assert sets.train.classes == ("0", "1", "2", "3")
    assert sets.validation is sets.test and sets.validation_from == "test"


def test_an_idx_folder_must_be_complete(tmp_path):
    make_idx_folder(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="lacks t10k-labels-idx1-ubyte"):
        open_image_sets(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\0\x08\x01\0\0\0\x05abc", "names 5 values .* and holds 3"),
        (b"GIF89a", "not an idx file"),
        (b"\0\0\x0d\x01\0\0\0\x01abcd", "not an idx file of unsigned bytes"),
        (b"\0\0\x08\x03\0\0", "ends within its header"),
    ],
)
def test_a_broken_idx_file_is_named(tmp_path, content, message):
    path = tmp_path / "broken"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_idx(path)
    assert str(path) in str(raised.value)


def test_a_truncated_gzip_file_is_named(tmp_path):
    path = tmp_path / "broken.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x05abcde")[:-12])
    with pytest.raises(ValueError, match=r"cannot read .*broken\.gz"):
        read_idx(path)


def test_mnist_itself():
    sets = open_image_sets(str(real_data("mnist")), validation_images=5000)
    assert sets.validation_from == "train"
    assert (len(sets.train), len(sets.validation), len(sets.test)) == (55_000, 5_000, 10_000)
    assert sets.test.label(0) == 7
    assert sets.train.mean[0] == pytest.approx(0.1307, abs=1e-4)


def test_images_in_class_folders(tmp_path):
    make_image_folder(tmp_path, {"train": {"cat": 3, "ant": 2}, "val": {"cat": 1, "ant": 2}})
    sets = open_image_sets(str(tmp_path))
    assert sets.train.classes == ("ant", "cat") and sets.train.channels == 3
    assert [sets.train.label(index) for index in range(5)] == [0, 0, 1, 1, 1]
    assert len(sets.validation) == 3 and sets.test is None and sets.validation_from == "val"
    path = tmp_path / "train" / "ant" / "0.png"
    assert np.array_equal(sets.train.image(0), cv2.imread(str(path))[:, :, ::-1])  # OpenCV's files are BGR


def test_class_folders_alone_need_images_held_out(tmp_path):
    make_image_folder(tmp_path, {".": {"cat": 6, "ant": 4}})
    with pytest.raises(ValueError, match=r"10 training images, as by data\.validation_images=1$"):
        open_image_sets(str(tmp_path))
    sets = open_image_sets(str(tmp_path), validation_images=3)
    assert (len(sets.train), len(sets.validation)) == (7, 3) and sets.test is None and sets.validation_from == "train"
    assert sets.train.classes == ("ant", "cat")


def test_folders_within_a_class_and_suffixes_in_any_case(tmp_path):
    make_image_folder(
        tmp_path, {"train": {"ant": 2, "bee": 1}, "train/ant": {"red/old": 1, "black": 2}, "val": {"ant": 1}}
    )
    ants = tmp_path / "train" / "ant"
    (ants / "0.png").rename(ants / "z.PNG")
    (ants / "notes.txt").write_text("no image")
    (ants / ".hidden").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (ants / "1.png").rename(elsewhere / "1.png")
    (ants / "linked").symlink_to(elsewhere)
    train = open_image_sets(str(tmp_path)).train
    expected = ["z.PNG", "black/0.png", "black/1.png", "linked/1.png", "red/old/0.png"]
    assert [train.name(index) for index in range(5)] == [str(ants / name) for name in expected]
    assert train.classes == ("ant", "bee") and train.left_out == {".txt": 1}
    assert train.encoded(0) == (ants / "z.PNG").read_bytes()


def test_an_orientation_in_exif_is_not_applied(tmp_path):
    make_image_folder(tmp_path, {".": {"ant": 1}})
    image = np.zeros((8, 16, 3), np.uint8)
    content = cv2.imencode(".jpg", image)[1].tobytes()
    turned = struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, 0x0112, 3, 1, 6, 0, 0)  # TIFF: orientation 6
    exif = b"\xff\xe1" + struct.pack(">H", 2 + 6 + len(turned)) + b"Exif\0\0" + turned
    (tmp_path / "ant" / "0.png").write_bytes(content[:2] + exif + content[2:])
    assert cv2.imread(str(tmp_path / "ant" / "0.png")).shape == (16, 8, 3), "OpenCV would turn it"
    assert ImageFolderDataset(tmp_path).image(0).shape == (8, 16, 3)


def test_a_class_missing_in_val_keeps_the_labels_and_one_missing_in_train_is_an_error(tmp_path):
    make_image_folder(tmp_path, {"train": {"ant": 1, "bee": 1, "cat": 1}, "val": {"cat": 2}})
    assert open_image_sets(str(tmp_path)).validation.label(0) == 2
    make_image_folder(tmp_path, {"val": {"dog": 1}})
    with pytest.raises(ValueError, match=r"the class 'dog', which is no class of the training images \(.*known\)$"):
        open_image_sets(str(tmp_path))


@pytest.mark.parametrize(("train", "val"), [("cr\u00e8me", "cre\u0300me"), ("Ant", "ant"), ("ant", "ant ")])
def test_a_name_that_looks_like_that_of_a_class(tmp_path, train, val):
    make_image_folder(tmp_path, {"train": {train: 1, "bee": 1}, "val": {val: 1}})
    with pytest.raises(ValueError, match="give both folders one name") as refused:
        open_image_sets(str(tmp_path))
    assert f"it looks like {train!a} but is {val!a}" in str(refused.value)


@pytest.mark.parametrize("link", ["val", "val/bee"])
def test_training_images_in_the_place_of_validation_images_are_said(tmp_path, link):
    make_image_folder(tmp_path, {"train": {"ant": 1, "bee": 1}, **({"val": {"ant": 1}} if link != "val" else {})})
    (tmp_path / link).symlink_to(tmp_path / link.replace("val", "train"))
    said = open_image_sets(str(tmp_path)).describe()
    assert f"{tmp_path / link} is a folder of training images: the figures of val mean nothing" in said


@pytest.mark.parametrize("content", [b"", b"no image"])
def test_a_broken_image_is_named(tmp_path, content):
    make_image_folder(tmp_path, {"train": {"ant": 1, "bee": 1}, "val": {"ant": 1}})
    path = tmp_path / "train" / "ant" / "0.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot decode the image .*ant/0\.png"):
        open_image_sets(str(tmp_path)).train.image(0)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({}, "no data of a known layout"),
        ({"train": {"ant": 1, "bee": 1}}, "neither val nor test"),
        ({"train": {"ant": 0, "bee": 1}, "val": {"ant": 1}}, "the class ant has no image: .*/train/ant is empty"),
        ({"val": {"ant": 1, "bee": 1}}, "has val, but no training images: name their folder train"),
        ({"other": {"ant": 0}}, "holds one class, other: two or more .*; name data.root=.*/other if ant is one"),
        ({"ant": {".": 20}}, "holds one class, ant: two or more are needed"),
    ],
)
def test_what_is_missing_is_said(tmp_path, folders, message):
    make_image_folder(tmp_path, folders)
    with pytest.raises(ValueError, match=message):
        open_image_sets(str(tmp_path))


def test_a_train_folder_without_classes(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="holds no class folders"):
        open_image_sets(str(tmp_path))


def test_a_missing_folder_is_named_and_what_is_accepted():
    with pytest.raises(ValueError, match=r"no data at '/no/such/folder': data\.root takes") as raised:
        open_image_sets("/no/such/folder")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("count", [1, 7, 11])
def test_images_held_out_are_spread_and_in_one_part_only(tmp_path, count):
    make_idx_folder(tmp_path)
    dataset = open_training_set(str(tmp_path))
    kept, held_out = hold_out(dataset, count)
    assert len(held_out) == count
    assert sorted([*kept.indices, *held_out.indices]) == list(range(12))
    gaps = np.diff([*held_out.indices, 12])
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("count", [12, 13, -1])
def test_holding_out_too_many_is_refused(tmp_path, count):
    make_idx_folder(tmp_path)
    for option in ("validation_images", "test_images"):
        with pytest.raises(ValueError, match=f"^{option}={count} must"):
            open_image_sets(str(tmp_path), validate_on_test=True, **{option: count})


def make_class_folders(folder, *splits):
    for split in splits:
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for number in range(6):
                cv2.imwrite(str(folder / split / name / f"{number}.png"), np.zeros((4, 4, 3), np.uint8))


def names_of(dataset):
    return [dataset.name(index) for index in range(len(dataset))]


def test_test_images_are_held_out_apart_from_those_for_validation(tmp_path):
    make_class_folders(tmp_path, ".")
    drawn = set()
    for validation_images in (1, 4, 7):
        sets = open_image_sets(str(tmp_path), validation_images, test_images=4)
        assert (len(sets.train), len(sets.validation), len(sets.test)) == (8 - validation_images, validation_images, 4)
        assert len({*names_of(sets.train), *names_of(sets.validation), *names_of(sets.test)}) == 12
        assert [sets.test.label(index) for index in range(4)] == [0, 0, 1, 1]
        drawn.add(tuple(names_of(sets.test)))
    assert len(drawn) == 1, "whatever is held out for validation"
    assert "1 training, 7 validation (held out of the training images), 4 test images (held out of" in sets.describe()
    with pytest.raises(ValueError, match=r"validation_images=8 must lie between 1 and 7: .* 8 training images left"):
        open_image_sets(str(tmp_path), 8, test_images=4)


@pytest.mark.parametrize(
    ("splits", "held_out", "validation", "test"),
    [
        (("train", "val", "test"), {}, "", ""),
        (("train", "val"), {}, "", None),
        (("train",), {"validation_images": 2}, "held out of the training images", None),
        (("train", "val"), {"test_images": 2}, "", "held out of the training images"),
        (("train", "test"), {"validation_images": 2}, "held out of the training images", ""),
        (("train", "test"), {"validate_on_test": None}, "the test images", ""),
        (
            ("train", "val"),
            {"validation_images": 2},
            "held out of the training images",
            "the data's validation set, by which nothing is chosen",
        ),
    ],
)
def test_it_is_said_where_the_images_come_from(tmp_path, splits, held_out, validation, test):
    make_class_folders(tmp_path, *splits)
    sets = open_image_sets(str(tmp_path), **held_out)
    assert sets.origin("val") == validation
    assert (sets.test is None) == (test is None) and sets.origin("test") == (test or "")


def test_test_images_of_their_own_are_not_used_beside_those_held_out(tmp_path):
    make_class_folders(tmp_path, "train", "val", "test")
    sets = open_image_sets(str(tmp_path), test_images=2)
    assert sets.remarks == ("the 12 test images of their own are not used",) and len(sets.test) == 2
    assert len(sets.train) == 10 and sets.validation_from == "val"


def test_links_that_go_round_are_followed_once(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        cv2.imwrite(str(tmp_path / name / "a.png"), np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "more").mkdir()
    cv2.imwrite(str(tmp_path / "more" / "b.png"), np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "cat" / "up").symlink_to("..")
    (tmp_path / "cat" / "self").symlink_to(".")
    (tmp_path / "cat" / "elsewhere").symlink_to(tmp_path / "more")
    (tmp_path / "cat" / "again").symlink_to(tmp_path / "more")
    assert images_and_others(tmp_path / "cat") == (["a.png", "again/b.png"], [])


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"short")])
def test_lost_shards_are_noticed_at_once(tmp_path, damage):
    folder = make_shards(tmp_path / "shards")
    damage(folder / "train-000001.tar")
    with pytest.raises(ValueError, match=r"train-000001\.tar (is missing|has 5 bytes, .*) \(1 such shards\)"):
        open_image_sets(str(folder))
    with pytest.warns(UserWarning, match=r"train-000001\.tar (is|has) .*left out"):
        assert len(open_image_sets(str(folder), on_read_error="skip").train) == 43
