"""Hugging Face's tables: found, read by row group, in windows, and what is wrong with them."""

import json
import sys

import numpy as np
import pytest

from shard_cases import digest_of, encoded_photo, train_loader
from syncbn.data import ParquetDataset, ReadError, open_image_sets
from syncbn.data.datasets import parquet as parquet_module

pa = pytest.importorskip("pyarrow", reason="the extra syncbn[huggingface] is not installed")
pq = pytest.importorskip("pyarrow.parquet")

NAMES = ["ant", "bee", "cat"]
PHOTO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_table(path, numbers, *, names=NAMES, labels=None, photos=None, row_group_size=4, columns=("image", "label")):
    """One file, as `datasets` writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if photos is None:
        photos = pa.array([{"bytes": encoded_photo(i), "path": f"{i}.jpg"} for i in numbers], PHOTO)
    labels = pa.array([i % 3 for i in numbers] if labels is None else labels)
    table = pa.table(dict(zip(columns, (photos, labels), strict=True)))
    if names is not None:
        features = {columns[0]: {"_type": "Image"}, columns[1]: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=row_group_size)


@pytest.fixture
def folder(tmp_path):
    write_table(tmp_path / "train-00000-of-00002.parquet", range(22))
    write_table(tmp_path / "train-00001-of-00002.parquet", range(22, 43))
    write_table(tmp_path / "validation-00000-of-00001.parquet", range(5))
    write_table(tmp_path / "test-00000-of-00001.parquet", range(4), labels=[-1] * 4)
    return tmp_path


def test_tables_are_found_and_read(folder):
    sets = open_image_sets(str(folder))
    assert (len(sets.train), len(sets.validation)) == (43, 5)
    assert sets.test is None and sets.remarks == ("not used: test-00000-of-00001.parquet",), "it has no labels"
    assert sets.train.classes == tuple(NAMES)
    for index in (0, 42, 21, 22, 3, 4):
        assert sets.train.encoded(index) == encoded_photo(index)
        assert sets.train.label(index) == index % 3
    assert sets.train.image(7).shape == (18, 20, 3)
    assert sets.train.name(23) == f"{folder / 'train-00001-of-00002.parquet'} (row 1)"


def test_tables_in_a_folder_data_with_other_columns(tmp_path):
    photos = pa.array([encoded_photo(i) for i in range(6)], pa.binary())
    write_table(tmp_path / "data" / "train-0.parquet", range(6), photos=photos, columns=("picture", "kind"))
    write_table(tmp_path / "data" / "test-0.parquet", range(6), photos=photos, columns=("picture", "kind"))
    sets = open_image_sets(str(tmp_path), validate_on_test=True)
    assert sets.train.encoded(5) == encoded_photo(5) and sets.train.classes == tuple(NAMES)
    assert len(sets.test) == 6


@pytest.mark.parametrize(("labels", "classes"), [([0, 3, 1], ("0", "1", "2", "3")), (["b", "a", "b"], ("a", "b"))])
def test_labels_without_names_of_classes(tmp_path, labels, classes):
    write_table(tmp_path / "train-0.parquet", range(3), names=None, labels=labels)
    write_table(tmp_path / "test-0.parquet", range(1), names=None, labels=labels[2:])
    sets = open_image_sets(str(tmp_path), validate_on_test=True)
    assert sets.train.classes == classes
    assert [classes[sets.train.label(index)] for index in range(3)] == [str(label) for label in labels]
    assert classes[sets.test.label(0)] == str(labels[2])


def test_numbers_are_those_of_the_names_that_their_own_file_has(tmp_path):
    write_table(tmp_path / "train-0.parquet", range(3), labels=[0, 1, 2])
    write_table(tmp_path / "train-1.parquet", range(3), labels=[0, 1, 2], names=["cat", "ant", "bee"])
    write_table(tmp_path / "validation-0.parquet", range(3), labels=[0, 1, 2], names=["bee", "cat", "ant"])
    sets = open_image_sets(str(tmp_path))
    assert [NAMES[sets.train.label(index)] for index in range(6)] == ["ant", "bee", "cat", "cat", "ant", "bee"]
    assert [NAMES[sets.validation.label(index)] for index in range(3)] == ["bee", "cat", "ant"]
    write_table(tmp_path / "validation-0.parquet", range(3), labels=[0, 1, 2], names=["bee", "dog", "ant"])
    with pytest.raises(ValueError, match="hold the label dog, which is none of the 3 classes"):
        open_image_sets(str(tmp_path))


def test_labels_that_are_floating_point_numbers(tmp_path):
    for split in ("train", "validation"):
        write_table(tmp_path / f"{split}-0.parquet", range(3), names=None, labels=[2.0, 1.0, 3.0])
    sets = open_image_sets(str(tmp_path))
    assert sets.train.classes == ("0", "1", "2", "3")
    assert [sets.train.label(index) for index in range(3)] == [2, 1, 3]
    write_table(tmp_path / "train-0.parquet", range(3), names=None, labels=[0.0, float("nan"), 1.0])
    with pytest.raises(ValueError, match="hold the label nan: a whole number or a name is needed"):
        open_image_sets(str(tmp_path))


def test_row_groups_are_shuffled_in_windows_and_read_once(folder, monkeypatch):
    monkeypatch.setattr(parquet_module, "SHARD_BYTES", 1)
    sets = open_image_sets(str(folder))
    assert sets.train.layout.starts.tolist() == [0, 4, 8, 12, 16, 20, 22, 26, 30, 34, 38, 42, 43]
    read = []
    original = pq.ParquetFile.read_row_group

    def read_row_group(file, number, **options):
        read.append(number)
        return original(file, number, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read_row_group)
    loader = train_loader(sets.train, drop_last=False)
    used = [index for batch in loader for index in batch.indices.tolist()]
    assert sorted(used) == list(range(43))
    assert len(read) <= 12 + 2, "each row group once, and those of the next epoch's first window"


def test_small_row_groups_of_a_file_make_one_shard(folder):
    assert np.diff(open_image_sets(str(folder)).train.layout.starts).tolist() == [22, 21]


@pytest.mark.filterwarnings("ignore:.*suggested max number of worker:UserWarning")
@pytest.mark.parametrize(("num_ranks", "num_workers"), [(2, 0), (1, 2)])
def test_global_batches_do_not_depend_on_ranks_or_workers(folder, monkeypatch, num_ranks, num_workers):
    monkeypatch.setattr(parquet_module, "SHARD_BYTES", 1)
    dataset = open_image_sets(str(folder)).train
    expected = [digest_of([batch]) for batch in train_loader(dataset)]
    ranks = [train_loader(dataset, rank=r, num_ranks=num_ranks, num_workers=num_workers) for r in range(num_ranks)]
    assert [digest_of(shares) for shares in zip(*map(list, ranks), strict=True)] == expected


@pytest.mark.parametrize("column", [[{"path": "near.jpg"}, {"path": "far.jpg"}], ["near.jpg", "far.jpg"]])
def test_images_of_which_the_table_has_paths_are_read_there(folder, column):
    """As `Dataset.to_parquet` writes them, or as plain text."""
    photos = pa.array(column, PHOTO if isinstance(column[0], dict) else pa.string())
    write_table(folder / "train-00000-of-00002.parquet", range(2), photos=photos)
    with pytest.raises(ValueError, match=r"holds paths of images, .* no file near\.jpg: .*embed_table_storage"):
        open_image_sets(str(folder))
    (folder / "near.jpg").write_bytes(encoded_photo(7))
    dataset = open_image_sets(str(folder)).train
    assert dataset.encoded(0) == encoded_photo(7)
    with pytest.raises(ReadError, match=r"of-00002\.parquet \(row 1\): .*No such file .*far\.jpg"):
        dataset.encoded(1)


def test_tables_of_other_names_are_found_or_named(folder):
    (folder / "test-00000-of-00001.parquet").rename(folder / "unsupervised-0.parquet")
    (folder / "validation-00000-of-00001.parquet").rename(folder / "Valid.parquet")
    sets = open_image_sets(str(folder))
    assert len(sets.validation) == 5 and sets.remarks == ("not used: unsupervised-0.parquet",)
    for split in ("train", "validation"):
        write_table(folder / "converted" / split / "0000.parquet", range(5))
    assert len(open_image_sets(str(folder / "converted")).validation) == 5


def test_a_deleted_table_and_an_image_without_bytes_are_named(folder):
    photos = pa.array([{"bytes": encoded_photo(0)}, {}], PHOTO)
    write_table(folder / "train-00000-of-00002.parquet", range(2), photos=photos)
    dataset = open_image_sets(str(folder)).train
    with pytest.raises(ReadError, match=r"of-00002\.parquet \(row 1\): the table holds nothing there"):
        dataset.encoded(1)
    (folder / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(ReadError, match=r"cannot read the image .*train-00001-of-00002\.parquet \(row 0\): ") as raised:
        dataset.encoded(2)
    assert "\n" not in str(raised.value)


def test_broken_tables_are_named(folder):
    (folder / "validation-00000-of-00001.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"cannot read the table .*validation-00000-of-00001\.parquet") as raised:
        open_image_sets(str(folder))
    assert "\n" not in str(raised.value)
    write_table(folder / "validation-00000-of-00001.parquet", range(3), labels=[0, 7, 1])
    with pytest.raises(ValueError, match="hold the label 7, which is none of the 3 classes"):
        open_image_sets(str(folder))
    write_table(folder / "train-00000-of-00002.parquet", range(3), names=None, columns=("a", "b"))
    with pytest.raises(ValueError, match="has the columns a, b: a column 'image' and a column 'label' are needed"):
        open_image_sets(str(folder))


def test_without_pyarrow_the_remedy_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"needs pyarrow: pip install 'syncbn\[huggingface\]'$"):
        ParquetDataset([folder / "train-00000-of-00002.parquet"])
