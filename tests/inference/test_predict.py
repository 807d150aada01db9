"""``syncbn predict`` on files, folders and patterns."""

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from weights_of_noise import by_hand, make_card, make_embedding_file, make_file, make_network, photos

from syncbn.cli import main
from syncbn.inference.images import find_images
from syncbn.models.weights import write_weights


@pytest.fixture(autouse=True)
def untouched_words(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["syncbn"])


def predict(*words):
    """Run the command; returns its exit status."""
    with pytest.raises(SystemExit) as exited:
        main(["predict", *map(str, words)])
    return exited.value.code


@pytest.mark.parametrize("variant", ["paper", "cadene", "slim"])
def test_probabilities_are_those_of_the_network_on_what_the_variant_is_fed(variant, tmp_path):
    paths = photos(5)
    weights, network = make_file(tmp_path, variant)
    output = tmp_path / "out.jsonl"
    assert predict(weights, *paths, "--format=jsonl", "--top_k=10", f"--output={output}", "--batch_size=2") == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["image"] for line in lines] == [str(path) for path in paths]
    with torch.no_grad():
        expected = network(torch.stack([by_hand(path, variant) for path in paths])).softmax(1)
    for line, probabilities in zip(lines, expected, strict=True):
        found = {entry["label"]: entry["probability"] for entry in line["predictions"]}
        assert torch.tensor([found[label] for label in range(10)]).sub(probabilities).abs().max() < 0.02
        listed = [entry["probability"] for entry in line["predictions"]]
        assert listed == sorted(listed, reverse=True)
        assert line["predictions"][0]["class"] == f"name {probabilities.argmax()}"


def test_images_are_turned_as_the_card_or_the_switch_says(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x112] = 6
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    picture.save(tmp_path / "a.png", exif=exif)
    picture.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    picture.save(tmp_path / "stored.png")
    network = make_network()

    def outputs(turned, *words):
        write_weights(network, make_card(network, exif_orientation=turned), tmp_path / "a.safetensors", "safetensors")
        paths = [tmp_path / f"{name}.png" for name in ("a", "upright", "stored")]
        assert predict(tmp_path / "a.safetensors", *paths, "--format=csv", "--top_k=10", *words) == 0
        rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
        return [[row["probability"] for row in rows if row["image"] == str(path)] for path in paths]

    for given, upright, stored in (outputs(True), outputs(False, "--exif_orientation=true")):
        assert given == upright != stored
    for given, upright, stored in (outputs(False), outputs(True, "--exif_orientation=false")):
        assert given == stored != upright


def test_csv_has_a_line_for_each_image_and_class(tmp_path):
    paths = photos(3)
    weights, _ = make_file(tmp_path)
    output = tmp_path / "out.csv"
    assert predict(weights, *paths, "--format=csv", "--top_k=2", f"--output={output}", "--num_workers=1") == 0
    with output.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["image"], row["rank"]) for row in rows] == [(str(path), rank) for path in paths for rank in "12"]
    assert all(row["class"] == f"name {row['label']}" and 0 < float(row["probability"]) <= 1 for row in rows)


def test_a_file_name_of_another_encoding_is_escaped(tmp_path):
    path = tmp_path / "photo.png"
    cv2.imwrite(str(path), np.full((32, 32, 3), 90, np.uint8))
    weights, _ = make_file(tmp_path)
    (tmp_path / "new").mkdir()
    odd = os.fsdecode(bytes(tmp_path) + b"/new/gr\xfcn.png")
    for name in ("a.png", odd, "z.png"):
        shutil.copy(path, tmp_path / "new" / name)
    for form in ("csv", "jsonl"):
        output = tmp_path / f"out.{form}"
        assert predict(weights, tmp_path / "new", f"--format={form}", "--top_k=1", f"--output={output}") == 0
        text = output.read_text(encoding="utf-8")
        assert "a.png" in text and r"gr\udcfcn.png" in text and "z.png" in text
    assert json.loads(text.splitlines()[1])["image"] == odd


def test_several_crops_average_probabilities(tmp_path):
    (path,) = photos(1)
    weights, network = make_file(tmp_path)
    output = tmp_path / "out.jsonl"
    assert predict(weights, path, "--format=jsonl", "--top_k=10", "--crops=10", f"--output={output}") == 0
    entries = json.loads(output.read_text())["predictions"]
    whole = by_hand(path, "paper", 72, 72)
    places = [(0, 0), (0, 8), (8, 0), (8, 8), (4, 4)]
    crops = torch.stack([whole[:, top : top + 64, left : left + 64] for top, left in places])
    with torch.no_grad():
        expected = network(torch.cat([crops, crops.flip(-1)])).softmax(1).mean(0)
    assert (
        torch.tensor([entry["probability"] for entry in entries]).sub(expected.sort(descending=True)[0]).abs().max()
        < 0.02
    )


def test_broken_images_are_named_left_out_and_told_by_the_exit_status(tmp_path, capsys):
    paths = photos(2)
    weights, _ = make_file(tmp_path)
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    shutil.copy(paths[0], folder / "a.jpg")
    shutil.copy(paths[1], folder / "deeper" / "c.jpg")
    (folder / "b.png").write_bytes(b"no image")
    (folder / "empty.jpg").touch()
    assert predict(weights, folder, "--top_k=1") == 2
    output, errors = capsys.readouterr()
    assert f"{folder}/a.jpg" in output and f"{folder}/deeper/c.jpg" in output and "b.png" not in output
    assert f"left out: cannot decode the image {folder}/b.png (8 bytes)" in errors
    assert f"{folder}/empty.jpg" in errors and "2 of 4 images were left out" in errors
    assert "name " in output and " %" in output
    assert predict(weights, folder / "b.png", "--format=csv") == 2
    assert capsys.readouterr().out.splitlines() == ["image,rank,label,class,probability"]


def test_a_grey_network_and_one_without_names(tmp_path, capsys):
    (path,) = photos(1)
    network = make_network(in_channels=1)
    write_weights(network, make_card(network, classes=None), tmp_path / "grey.safetensors", "safetensors")
    assert predict(tmp_path / "grey.safetensors", path, "--format=csv", "--top_k=1") == 0
    assert ",class " in capsys.readouterr().out.splitlines()[1]


def test_an_embedding_gives_its_numbers(tmp_path, capsys):
    paths = photos(3)
    weights, network = make_embedding_file(tmp_path)
    with torch.no_grad():
        expected = network(torch.stack([by_hand(path, "cadene") for path in paths]))
    assert predict(weights, *paths, f"--output={tmp_path / 'a.csv'}") == 0
    with (tmp_path / "a.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert predict(weights, *paths, "--format=jsonl") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (tmp_path / "b.jpg").write_bytes(b"no image")
    assert predict(weights, *paths, tmp_path / "b.jpg", "--format=npz", f"--output={tmp_path / 'a.npz'}") == 2
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        images, embeddings = archive["images"], torch.from_numpy(archive["embeddings"])
    names = [str(path) for path in paths]
    assert [row["image"] for row in rows] == [line["image"] for line in lines] == images.tolist() == names
    assert embeddings.dtype == torch.float32 and (embeddings - expected).abs().max() < 0.02
    of_csv = torch.tensor([[float(row[str(number)]) for number in range(6)] for row in rows])
    assert torch.equal(of_csv, embeddings) and torch.equal(torch.tensor([line["embedding"] for line in lines]), of_csv)


EMBEDDING_MISTAKES = {
    "classes": (["--top_k=2"], "--top_k 2 has no meaning with these weights, which give embeddings"),
    "several crops": (["--crops=10"], "--crops 10 has no meaning"),
    "a table": (
        ["--format=table"],
        "--format table cannot hold embeddings, which these weights give: take csv",
    ),
    "an archive on the screen": (["--format=npz"], "--format npz is not for the screen: name a file with --output"),
}


@pytest.mark.parametrize(("words", "expected"), EMBEDDING_MISTAKES.values(), ids=EMBEDDING_MISTAKES.keys())
def test_what_an_embedding_cannot_do(words, expected, tmp_path, capsys):
    weights, _ = make_embedding_file(tmp_path)
    (tmp_path / "a.jpg").touch()
    assert predict(weights, tmp_path / "a.jpg", *words) == 1
    assert expected in capsys.readouterr().err


MISTAKES = {
    "no such image": (["nowhere.jpg"], "'nowhere.jpg' names no image"),
    "a pattern without a match": (["*.gif"], "'*.gif' names no image"),
    "a folder without images": (["."], "'.' holds no images"),
    "no class at all": (["model.safetensors", "--top_k=0"], "--top_k 0 must be at least 1"),
    "other crops": (["model.safetensors", "--crops=3"], "evaluation_crops=3 must be 1, 10 or 144"),
    "classes in an archive": (["model.safetensors", "--format=npz"], "--format npz cannot hold classes"),
    "a format that does not exist": (["model.safetensors", "--format=xml"], "format"),
    "a device that is not there": (["model.safetensors", "--device=cuda:77"], "--device cuda:77 is not there"),
    "no images": ([], "images"),
    "a folder that is not there": (["model.safetensors", "--output=no/a.csv"], "--output no/a.csv: there is no folder"),
    "a folder as a file": (["model.safetensors", "--output=."], "--output . is a folder: name a file in it"),
    "the weights themselves": (
        ["model.safetensors", "--output=model.safetensors"],
        "--output model.safetensors is the file of weights itself",
    ),
}


@pytest.mark.parametrize(("words", "expected"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_answered_in_one_line(words, expected, tmp_path, capsys, monkeypatch):
    make_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert predict("model.safetensors", *words) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("syncbn: error:") and expected in errors[0]


def test_weights_that_are_not_finite_are_refused(tmp_path, capsys):
    network = make_network()
    with torch.no_grad():
        network.classifier.weight[3, :2] = torch.tensor([float("nan"), float("inf")])
    weights = str(tmp_path / "broken.safetensors")
    write_weights(network, make_card(network, "paper"), Path(weights), "safetensors")
    for words in (["predict", weights, __file__], ["export", weights]):
        with pytest.raises(SystemExit) as exited:
            main(words)
        error = capsys.readouterr().err
        assert exited.value.code == 1 and "2 of " in error and "values of classifier.weight are not finite" in error


def test_weights_that_do_not_say_what_they_are_fed(tmp_path, capsys):
    network = make_network()
    torch.save(network.state_dict(), tmp_path / "model.pth")
    assert predict(tmp_path / "model.pth", *photos(1)) == 1
    assert "`syncbn import FILE --image_size N" in capsys.readouterr().err
    main(["import", str(tmp_path / "model.pth"), "--image_size=64", "--mean=[1,2,3]", "--std=[4,5,6]"])
    sys.argv[:] = ["syncbn"]
    assert predict(tmp_path / "model.safetensors", *photos(1)) == 0


def test_files_folders_and_patterns(tmp_path):
    for name in ("b.jpg", "a.PNG", "notes.txt", "in/c.webp", "in/.hidden.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(*words):
        return [str(path.relative_to(tmp_path)) for path in find_images([f"{tmp_path}/{word}" for word in words])]

    assert found("b.jpg", "notes.txt") == ["b.jpg", "notes.txt"]
    assert found("") == ["a.PNG", "b.jpg", "in/c.webp"]
    assert found("b.jpg", "*.jpg", "") == ["b.jpg", "a.PNG", "in/c.webp"]
    assert found("**/*.webp") == ["in/c.webp"]
    assert found("i*") == ["in/c.webp"]
