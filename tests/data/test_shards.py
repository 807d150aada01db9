"""Shards and their index: what is written is what is read, here and by WebDataset, and nothing is ever half there."""

import gc
import hashlib
import io
import json
import tarfile
import warnings

import numpy as np
import pytest
from PIL import Image

from imagenet_archives import encode, photo
from syncbn.data.datasets.shard_files import (
    SAMPLE_DTYPE,
    Shard,
    ShardIndex,
    file_sha256,
    make_split,
    read_index,
    sample_key,
    write_index,
    write_shard,
)

SAMPLES = [(f"n01_{number}", encode(photo(number)), number % 3) for number in range(7)]


def write_folder(folder, groups=(SAMPLES[:4], SAMPLES[4:])):
    shards, records = [], []
    for number, group in enumerate(groups):
        path = folder / f"train-{number:06d}.tar"
        places = write_shard(path, group)
        shards.append(Shard(path.name, len(places), path.stat().st_size, file_sha256(path)))
        records += [(number, *place) for place in places]
    split = make_split(shards, np.array(records, SAMPLE_DTYPE), 3)
    index = ShardIndex(folder, ("a", "b", "c"), ("A", "B", "C"), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), {"train": split})
    write_index(index)
    return index


def test_index_round_trip(tmp_path):
    written = write_folder(tmp_path)
    read = read_index(str(tmp_path))
    assert (read.classes, read.class_names, read.mean, read.std) == (
        written.classes,
        written.class_names,
        written.mean,
        written.std,
    )
    split = read.splits["train"]
    assert (split.samples, split.per_class) == (7, (3, 2, 2))
    assert split.shards == written.splits["train"].shards
    assert split.records.dtype == SAMPLE_DTYPE
    for record, (_, image, label) in zip(split.records, SAMPLES, strict=True):
        content = (tmp_path / split.shards[record["shard"]].name).read_bytes()
        assert content[record["offset"] : record["offset"] + record["size"]] == image
        assert record["label"] == label
    for shard in split.shards:
        assert hashlib.sha256((tmp_path / shard.name).read_bytes()).hexdigest() == shard.sha256


def test_a_shard_is_a_function_of_its_samples(tmp_path):
    (tmp_path / "later").mkdir()
    write_shard(tmp_path / "a.tar", SAMPLES)
    write_shard(tmp_path / "later" / "b.tar", iter(SAMPLES))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "later" / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as archive:
        first, second = archive.getmembers()[:2]
    assert (first.name, second.name) == ("n01_0.jpg", "n01_0.cls")
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in (first, second)} == {(0, 0, 0, "", "", 0o644)}


def test_keys_that_plain_tar_headers_cannot_hold(tmp_path):
    keys = ["Käse_日本", "long_" + "x" * 200]
    places = write_shard(tmp_path / "a.tar", [(key, SAMPLES[0][1], 1) for key in keys])
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert [m.name for m in archive.getmembers()[::2]] == [f"{key}.jpg" for key in keys]
        assert [(m.offset_data, m.size) for m in archive.getmembers()[::2]] == [place[:2] for place in places]


def test_keys_hold_nothing_that_means_something_to_webdataset():
    assert sample_key("a/b.c/d") == "a_b_c_d"


def test_nothing_is_there_when_writing_fails(tmp_path):
    def failing():
        yield SAMPLES[0]
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        write_shard(tmp_path / "train-000000.tar", failing())
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_is_there_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "train-000000.tar"
    write_shard(path, SAMPLES[:1])
    before = path.read_bytes()

    def looking():
        yield SAMPLES[1]
        assert path.read_bytes() == before
        yield SAMPLES[2]

    write_shard(path, looking())
    assert path.read_bytes() != before


def damage_json(**changes):
    def damage(folder):
        path = folder / "index.json"
        content = json.loads(path.read_text())
        for key, value in changes.items():
            if value is None:
                del content[key]
            else:
                content[key] = value
        path.write_text(json.dumps(content))

    return damage


def damage_records(change):
    def damage(folder):
        path = folder / "train.samples.npy"
        np.save(path, change(np.load(path)))

    return damage


def with_label(records, label):
    records["label"][2] = label
    return records


def with_shard(records):
    records["shard"][3] = 1
    return records


def truncate(folder):
    path = folder / "train.samples.npy"
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "index.json").unlink(), r"no finished shards.*index\.json.*syncbn prepare"),
        (lambda folder: (folder / "index.json").write_text("{"), r"index\.json is not JSON"),
        (lambda folder: (folder / "index.json").write_text("[]"), r"index\.json is of format None"),
        (damage_json(format=2), r"index\.json is of format 2; format 1 is read"),
        (damage_json(classes=None), r"index\.json lacks a part.*classes"),
        (damage_json(splits={"train": {}}), r"index\.json lacks a part.*shards"),
        (damage_json(splits=[]), r"index\.json lacks a part"),
        (lambda folder: (folder / "train.samples.npy").unlink(), r"cannot read .*train\.samples\.npy"),
        (lambda folder: (folder / "train.samples.npy").write_bytes(b""), r"cannot read .*train\.samples\.npy"),
        (truncate, r"cannot read .*train\.samples\.npy"),
        (damage_records(lambda records: records["label"]), r"train\.samples\.npy holds int32"),
        (damage_records(lambda records: records[:-1]), r"train\.samples\.npy and .* disagree about .* each shard"),
        (damage_records(with_shard), r"train\.samples\.npy and .* disagree about .* each shard"),
        (damage_records(lambda records: with_label(records, 3)), r"labels outside of the 3 classes"),
        (damage_records(lambda records: with_label(records, -1)), r"labels outside of the 3 classes"),
        (damage_records(lambda records: with_label(records, 1)), r"disagree about the samples of each class"),
    ],
)
def test_broken_index(tmp_path, damage, message):
    write_folder(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_index(tmp_path)


def test_webdataset_reads_shards(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    index = write_folder(tmp_path)
    urls = [str(tmp_path / shard.name) for shard in index.splits["train"].shards]
    reader = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("__key__", "jpg", "cls")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files to the garbage collector
        samples = list(reader)
        gc.collect()
    assert [(key, label) for key, _, label in samples] == [(key, label) for key, _, label in SAMPLES]
    for (_, image, _), (_, content, _) in zip(samples, SAMPLES, strict=True):
        assert np.array_equal(image, np.asarray(Image.open(io.BytesIO(content))))
