"""``syncbn import``."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from reference_networks import cadene_network, largest_difference, slim_network

from syncbn.cli import main
from syncbn.models import inception_bn
from syncbn.models.weights import WeightsError, build_network, card_path, read_weights
from syncbn.models.weights.files import FileContent


@pytest.fixture(autouse=True)
def untouched_words(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["syncbn"])


def import_file(*words):
    main(["import", *map(str, words)])


def refusal(capsys, *words):
    """What is said about words, in one line."""
    with pytest.raises(SystemExit) as exited:
        import_file(*words)
    errors = capsys.readouterr().err.strip().splitlines()
    assert exited.value.code == 1 and len(errors) == 1 and errors[0].startswith("syncbn: error: ")
    return errors[0]


def test_cadene_becomes_a_file_that_needs_nothing_else(tmp_path, capsys):
    reference = cadene_network()
    torch.save(reference.state_dict(), tmp_path / "cadene.pth")
    (tmp_path / "names.txt").write_text("\n".join(f"class-{number}" for number in range(10)) + "\n")
    import_file(tmp_path / "cadene.pth", "--classes", tmp_path / "names.txt")
    lines = capsys.readouterr().out.strip().splitlines()
    parameters = sum(parameter.numel() for parameter in reference.parameters())
    assert lines[0] == f"layout cadene: 485 tensors, {parameters:,} parameters"
    assert "BGR of 224 pixels, mean [104.0, 117.0, 128.0], std [1.0, 1.0, 1.0]" in lines[2]
    assert lines[-1] == str(tmp_path / "cadene.safetensors")
    (tmp_path / "cadene.pth").unlink()
    weights = read_weights(tmp_path / "cadene.safetensors")
    assert weights.card.layout == "cadene" and weights.card.classes[3] == "class-3"
    assert largest_difference(build_network(weights), reference, torch.randn(2, 3, 64, 64)) < 1e-10


def test_slims_background_gets_a_name(tmp_path, capsys):
    np.savez(tmp_path / "slim.npz", **slim_network().variables)
    (tmp_path / "names.txt").write_text("\n".join("abcdefghij"))
    import_file(tmp_path / "slim.npz", "--classes", tmp_path / "names.txt", "--output", tmp_path / "out.safetensors")
    assert read_weights(tmp_path / "out.safetensors").card.classes == ("background", *"abcdefghij")
    assert "class 0 is TF-slim's background" in capsys.readouterr().out


def test_a_file_without_a_classifier(tmp_path, capsys):
    state = {name: tensor for name, tensor in cadene_network().state_dict().items() if "last_linear" not in name}
    torch.save(state, tmp_path / "a.pth")
    import_file(tmp_path / "a.pth")
    assert "no classes" in capsys.readouterr().out
    weights = read_weights(tmp_path / "a.safetensors")
    assert weights.card.num_classes is None and not any("classifier" in name for name in weights.tensors)


def test_what_the_file_does_not_say_is_given(tmp_path):
    torch.save(cadene_network().state_dict(), tmp_path / "a.pth")
    words = ["--image_size=96", "--resize=110", "--mean=[1,2,3]", "--std=[4,5,6]"]
    import_file(tmp_path / "a.pth", *words)
    card = read_weights(tmp_path / "a.safetensors").card
    assert (card.image_size, card.resize, card.preprocessing.mean) == (96, 110, (1.0, 2.0, 3.0))
    assert json.loads(card.to_json())["preprocessing"]["std"] == [4, 5, 6]


def test_mistakes(tmp_path, capsys):
    torch.save(cadene_network().state_dict(), tmp_path / "a.pth")
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    assert "names 2 classes, the network has 10" in refusal(
        capsys, tmp_path / "a.pth", "--classes", tmp_path / "names.txt"
    )
    assert "is the file itself" in refusal(capsys, tmp_path / "a.pth", "--output", tmp_path / "a.pth")
    assert "--mean and --std belong together" in refusal(capsys, tmp_path / "a.pth", "--mean=[1,2,3]")
    assert "there is no such file" in refusal(capsys, tmp_path / "nowhere.pth")
    assert "nowhere.txt" in refusal(capsys, tmp_path / "a.pth", "--classes", tmp_path / "nowhere.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "names.txt"]


def test_a_card_that_the_network_cannot_be_fed_by_is_not_written(tmp_path, capsys):
    torch.save(cadene_network().state_dict(), tmp_path / "a.pth")
    for words, expected in {
        ("--image_size=-3",): "image_size=-3 is out of range",
        ("--image_size=1000000",): "image_size=1000000 is out of range",
        ("--image_size=8",): "image_size=8 is too small: this network takes 32 pixels up",
        ("--image_size=64", "--resize=48"): "resize=48 must be at least image_size=64",
        ("--mean=[0]", "--std=[1]"): "mean and std have 1 numbers, the network 3 channels",
    }.items():
        assert expected in refusal(capsys, tmp_path / "a.pth", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_names_of_classes_in_any_unicode_of_windows_and_in_no_other_code(tmp_path, capsys):
    torch.save(cadene_network().state_dict(), tmp_path / "a.pth")
    names = [f"grün {number}" for number in range(10)]
    (tmp_path / "names.txt").write_text("\r\n".join(names), encoding="utf-8-sig")
    import_file(tmp_path / "a.pth", "--classes", tmp_path / "names.txt")
    assert read_weights(tmp_path / "a.safetensors").card.classes == tuple(names)
    (tmp_path / "latin.txt").write_text("\n".join(names), encoding="latin-1")
    assert f"--classes {tmp_path}/latin.txt is not in UTF-8" in refusal(
        capsys, tmp_path / "a.pth", "--classes", tmp_path / "latin.txt"
    )


def test_a_tensorflow_checkpoint_is_imported_again(tmp_path, monkeypatch):
    variables = {name: torch.from_numpy(array) for name, array in slim_network().variables.items()}
    monkeypatch.setattr("syncbn.models.weights.files._read_tensorflow", lambda path: FileContent(variables))
    (tmp_path / "inception_v2.ckpt.index").write_bytes(b"names alone")
    for _ in range(2):
        import_file(tmp_path / "inception_v2.ckpt")
        sys.argv[:] = ["syncbn"]
    assert read_weights(tmp_path / "inception_v2.safetensors").card.layout == "slim"


def test_a_classifier_of_which_the_card_alone_knows_is_not_made_up(tmp_path, capsys):
    state = {name: tensor for name, tensor in cadene_network().state_dict().items() if "last_linear" not in name}
    torch.save(state, tmp_path / "a.pth")
    card = dataclasses.replace(read_weights(tmp_path / "a.pth").card, num_classes=10)
    card_path(tmp_path / "a.pth").write_text(card.to_json())
    assert "its card is of 10 classes, but it has no last_linear.weight" in refusal(capsys, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"but it has no last_linear.weight"):
        build_network(read_weights(tmp_path / "a.pth"))
    assert inception_bn(7, weights=tmp_path / "a.pth").classifier.out_features == 7


def test_reading_weights_brings_neither_lightning_nor_opencv():
    code = "import sys, syncbn.models.weights; sys.exit(bool({'lightning', 'cv2', 'tensorflow'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
