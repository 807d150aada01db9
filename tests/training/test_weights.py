"""Training from a file of weights, and what a checkpoint says about itself."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from syncbn.cli import main
from syncbn.models import inception_bn
from syncbn.models.embedding import put_embedding_head
from syncbn.models.weights import ModelCard, build_network, files, read_weights, write_weights
from syncbn.preprocessing import PREPROCESSING, Preprocessing
from syncbn.training.classifier import ImageClassifier

pytestmark = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*number of training batches.*is smaller than the logging interval"),
]

CLASSES = ("ant", "bee", "cat")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["syncbn"])


@pytest.fixture
def photos(tmp_path):
    """A folder of classes."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in CLASSES:
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(3):
                cv2.imwrite(str(folder / f"{number}.png"), generator.integers(0, 255, (40, 40, 3), dtype=np.uint8))
    return tmp_path / "photos"


def save_cadene(path, **arguments):
    """Weights in Cadene's layout, with a card of their own preprocessing where one is given."""
    torch.manual_seed(0)
    network = inception_bn(5, "cadene", width_multiplier=0.125)
    preprocessing = arguments.get("preprocessing", PREPROCESSING["cadene"])
    card = ModelCard("cadene", network.arguments, 5, None, preprocessing, 32, None)
    write_weights(network, card, path, "cadene")
    return network


def fit(photos, *words):
    words = [f"--data={photos}", "--data.image_size=32", "--global_batch_size=4", "--runs_folder=runs", *words]
    words += ["--trainer.max_epochs=1", "--trainer.devices=1", "--trainer.accelerator=cpu", "--name=x"]
    main(["fit", *words, "--trainer.enable_progress_bar=false", "--test_after_fit=false"])
    sys.argv[:] = ["syncbn"]
    return max(Path("runs/x").iterdir(), key=lambda folder: folder.stat().st_mtime)


def test_the_weights_bring_their_network_and_their_preprocessing(photos, capsys, caplog):
    save_cadene(Path("cadene.pth"))
    run = fit(photos, "--model.weights=cadene.pth", "--model.learning_rate_per_32_images=0")
    assert "the classifier is of 5 classes: a new one of 3 classes" in caplog.text
    last = read_weights(run / "checkpoints" / "last.ckpt")
    assert last.card == ModelCard(
        layout="syncbn",
        architecture={"variant": "cadene", "width_multiplier": 0.125},
        num_classes=3,
        classes=CLASSES,
        preprocessing=PREPROCESSING["cadene"],
        image_size=32,
        resize=None,
        exif_orientation=True,  # as of any folder of photos
    )
    before, after = read_weights("cadene.pth").tensors, last.tensors
    assert torch.equal(before["inception_5b.branch_1x1.conv.weight"], after["inception_5b.branch_1x1.conv.weight"])
    again = ["--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    main(["validate", *again])
    with_file = capsys.readouterr().out.strip().splitlines()[-1]
    Path("cadene.pth").unlink()  # and its card; a checkpoint needs neither
    Path("cadene.pth.card.json").unlink()
    sys.argv[:] = ["syncbn"]
    main(["validate", *again])
    assert capsys.readouterr().out.strip().splitlines()[-1] == with_file
    ImageClassifier.load_from_checkpoint(run / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
    sys.argv[:] = ["syncbn"]
    with pytest.raises(SystemExit) as exited:
        main(["predict", str(run / "checkpoints" / "last.ckpt"), str(photos / "val"), "--format=csv", "--top_k=1"])
    lines = capsys.readouterr().out.splitlines()
    assert exited.value.code == 0 and len(lines) == 10 and lines[1].split(",")[3] in CLASSES


def test_a_card_beside_the_weights_decides_what_they_are_fed(photos):
    mine = Preprocessing("RGB", (10.0, 20.0, 30.0), (2.0, 3.0, 4.0))
    save_cadene(Path("mine.pth"), preprocessing=mine)
    run = fit(photos, "--model.weights=mine.pth")
    assert read_weights(run / "checkpoints" / "last.ckpt").card.preprocessing == mine
    sys.argv[:] = ["syncbn"]
    run = fit(photos, f"--model.weights={run / 'checkpoints' / 'last.ckpt'}", "--model.dropout=0.5")
    card = read_weights(run / "checkpoints" / "last.ckpt").card
    assert (card.preprocessing, card.architecture["dropout"]) == (mine, 0.5)


def test_a_checkpoint_of_polyak_averaging_gives_the_average(photos):
    run = fit(
        photos,
        "--model.width_multiplier=0.125",
        "--trainer.callbacks=syncbn.training.PolyakAveraging",
        "--trainer.callbacks.decay=0.5",
    )
    path = run / "checkpoints" / "last.ckpt"
    network = build_network(read_weights(path)).state_dict()
    checkpoint = torch.load(path, weights_only=True)
    for name, tensor in network.items():
        assert torch.equal(tensor, checkpoint["state_dict"][f"network.{name}"])
    current = checkpoint["current_model_state"]
    assert not torch.equal(network["classifier.weight"], current["network.classifier.weight"])


def test_a_checkpoint_without_a_card_is_read_by_its_hyperparameters(photos):
    run = fit(photos, "--model.variant=slim", "--model.width_multiplier=0.25", "--model.stem=small")
    path = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    with_card = read_weights(path)
    del checkpoint["syncbn_model_card"]
    torch.save(checkpoint, "old.ckpt")
    old = read_weights("old.ckpt")
    assert old.card.preprocessing == PREPROCESSING["slim"] and old.card.image_size is None
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(build_network(old)(images), build_network(with_card)(images))


def test_weights_with_options_of_their_own_are_rebuilt_without_their_file(photos):
    network = inception_bn(3, "paper", width_multiplier=0.125, stem="small", eps=0.01, conv_bias=True, momentum=0.3)
    card = ModelCard("syncbn", network.arguments, 3, None, Preprocessing("RGB", (1.0,) * 3, (2.0,) * 3), 32, None)
    write_weights(network, card, Path("odd.safetensors"), "safetensors")
    run = fit(photos, "--model.weights=odd.safetensors")
    Path("odd.safetensors").unlink()
    path = run / "checkpoints" / "last.ckpt"
    again = ImageClassifier.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    assert again.network.variant == network.variant
    assert again.hparams["momentum"] == 0.9 and again.hparams["variant_options"]["momentum"] == 0.3


def save_classifier(path, classes):
    """Weights of a network of ours, in whose head every number is 7."""
    network = inception_bn(3, width_multiplier=0.125, stem="small")
    torch.nn.init.constant_(network.classifier.weight, 7.0)
    card = ModelCard("syncbn", network.arguments, 3, classes, Preprocessing("RGB", (1.0,) * 3, (2.0,) * 3), 32, None)
    write_weights(network, card, path, "safetensors")


HEADS = {
    "the same classes": (CLASSES, "auto", True, ""),
    "others of the same number": (("ant", "bee", "dog"), "auto", False, "('dog' where the data have 'cat')"),
    "the same in another order": (CLASSES[::-1], "auto", False, "other classes"),
    "others that are to be kept": (("ant", "bee", "dog"), "keep", True, ""),
    "the same that are to be new": (CLASSES, "new", False, "a new classifier, as model.head=new asks"),
    "without names": (None, "auto", True, "which the file does not name, is taken over"),
}


@pytest.mark.parametrize(("named", "head", "kept", "said"), HEADS.values(), ids=HEADS.keys())
def test_the_head_of_other_classes_is_not_taken_over(named, head, kept, said, caplog):
    save_classifier(Path("a.safetensors"), named)
    model = ImageClassifier(4, 3, 3, 12, weights="a.safetensors", head=head, classes=CLASSES)
    assert bool((model.network.classifier.weight == 7).all()) is kept
    assert said in caplog.text and bool(caplog.text) is bool(said)


def test_the_names_of_the_data_decide_in_a_run_which_reads_the_file_once(photos, caplog, monkeypatch):
    save_classifier(Path("a.safetensors"), ("ant", "bee", "dog"))
    reads = []
    monkeypatch.setattr(
        "syncbn.models.weights.reading.read_file", lambda path: reads.append(path) or files.read_file(path)
    )
    fit(photos, "--model.weights=a.safetensors")
    assert "('dog' where the data have 'cat'): a new one; model.head=keep takes it over" in caplog.text
    assert len(reads) == 1


def test_a_head_that_is_not_there_cannot_be_kept():
    save_cadene(Path("cadene.pth"))
    with pytest.raises(ValueError, match=r"its classifier is of 5 classes, the data have 3: leave model.head=keep out"):
        ImageClassifier(4, 3, 3, 12, weights="cadene.pth", head="keep", classes=CLASSES)


def test_a_head_is_kept_or_refused_by_their_number_where_no_class_has_a_name():
    save_classifier(Path("a.safetensors"), CLASSES)
    kept = ImageClassifier(4, 3, 3, 12, weights="a.safetensors", head="keep")
    assert bool((kept.network.classifier.weight == 7).all())
    new = ImageClassifier(4, 3, 3, 12, weights="a.safetensors", head="new")
    assert not bool((new.network.classifier.weight == 7).any())
    with pytest.raises(ValueError, match=r"its classifier is of 3 classes, the data have 5"):
        ImageClassifier(4, 5, 3, 12, weights="a.safetensors", head="keep")


def test_what_the_head_policy_does_with_an_embedding(caplog):
    network = inception_bn(3, width_multiplier=0.125, stem="small")
    put_embedding_head(network, 4)
    torch.nn.init.constant_(network.classifier.embedding.weight, 7.0)
    of_images = Preprocessing("RGB", (1.0,) * 3, (2.0,) * 3)
    card = ModelCard("syncbn", network.arguments, None, None, of_images, 32, None, embedding_dimension=4)
    write_weights(network, card, Path("a.safetensors"), "safetensors")

    def weight(dimension, head):
        model = ImageClassifier(4, 3, 3, 12, weights="a.safetensors", head=head, embedding_dimension=dimension)
        return model.network.classifier.embedding.weight

    assert bool((weight(4, "keep") == 7).all()) and bool((weight(4, "auto") == 7).all())
    assert not bool((weight(4, "new") == 7).any()) and "a new embedding, as model.head=new asks" in caplog.text
    assert not bool((weight(5, "auto") == 7).any()) and "an embedding of shape (4, 136)" in caplog.text
    with pytest.raises(ValueError, match=r"an embedding of shape \(4, 136\), the network wants \(5, 136\): leave"):
        weight(5, "keep")
    assert "classifier" not in caplog.text  # which is none of an embedding's concern


MISTAKES = {
    "no such file": (["--model.weights=nowhere.pth"], "weights nowhere.pth: there is no such file"),
    "another width": (["--model.weights=cadene.pth", "--model.width_multiplier=0.5"], "do not fit the network"),
    "half a preprocessing": (["--model.preprocessing={mean: [1]}"], "must have colour_order, mean and std"),
    "an option of no variant": (["--model.variant_options={widht: 1}"], "widht"),
}


@pytest.mark.parametrize(("words", "expected"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_answered_in_one_line(words, expected, photos, capsys):
    save_cadene(Path("cadene.pth"))
    with pytest.raises(SystemExit) as exited:
        fit(photos, *words)
    errors = capsys.readouterr().err.strip().splitlines()
    assert exited.value.code == 1 and len(errors) == 1 and expected in errors[0]
