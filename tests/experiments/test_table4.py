"""``syncbn paper table4``: its rows against the trainer's own validation, and what it refuses."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from shard_cases import make_shards
from syncbn.cli import main
from syncbn.data import ImageDataModule
from syncbn.experiments.table4 import PAPER, common_card, markdown, short_name, some_of, table4
from syncbn.models.weights import read_weights
from syncbn.models.weights.card import CARD_KEY
from syncbn.training import ImageClassifier
from syncbn.training.evaluation import load_ensemble

IMAGE_SIZE, RESIZE = 32, 36


@pytest.fixture(autouse=True)
def one_thread():
    """Lightning would set as many threads as there are cores."""
    before = dict(os.environ)
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    """Seven validation images of three classes."""
    return str(make_shards(tmp_path_factory.mktemp("shards"), train=(9,), val=(7,)))


def save(path: Path, seed: int, **options: object) -> str:
    """A checkpoint of a network of its own opinion on each image."""
    seed_everything(seed, verbose=False)
    settings = {"num_classes": 3, "in_channels": 3, "width_multiplier": 0.125} | options
    model = ImageClassifier(8, training_images=9, **settings)
    torch.nn.init.normal_(model.network.classifier.weight, std=5.0)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return str(path)


def errors(paths: list[str], shards: str, crops: int) -> tuple[float, float]:
    """In per cent, by the trainer itself."""
    like = ImageClassifier.load_from_checkpoint(paths[0], weights_only=True)
    data = ImageDataModule(9, shards, IMAGE_SIZE, None, RESIZE if crops == 1 else None, crops)
    model = load_ensemble(paths, like)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    [metrics] = trainer.validate(model, data, verbose=False)
    return 100 - 100 * metrics["val_top1"], 100 - 100 * metrics["val_top5"]


def test_rows_are_what_the_trainer_finds(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["syncbn"])
    paths = [save(tmp_path / f"{seed}.ckpt", seed, activation=kind) for seed, kind in enumerate(("relu", "sigmoid"))]
    words = ["paper", "table4", shards, f"[{paths[0]}, {paths[1]}]", f"--output={tmp_path / 'table.md'}"]
    words += [f"--image_size={IMAGE_SIZE}", f"--resize={RESIZE}", "--batch_size=8", "--devices=1", "--accelerator=cpu"]
    main(words)
    table = (tmp_path / "table.md").read_text()
    assert "Trained here: 0.125 of the width, 32 px, 3 classes, 0 steps: not the paper's scale.\n" in table
    assert table.strip() in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")][2:]
    expected = [("0.ckpt", paths[:1], 1), ("0.ckpt", paths[:1], 144), ("1.ckpt", paths[1:], 1)]
    expected += [("1.ckpt", paths[1:], 144), ("ensemble of 2", paths, 144)]
    for row, (name, of, crops) in zip(rows, expected, strict=False):
        top1, top5 = errors(of, shards, crops)
        assert row == [name, str(IMAGE_SIZE), str(crops), str(len(of)), f"{top1:.2f} %", f"{top5:.2f} %"]
    assert [row[0] for row in rows[len(expected) :]] == [row.model for row in PAPER]
    assert rows[-1] == ["paper: BN-Inception ensemble", "224", "144", "6", "20.10 %", "4.90 %"]


def test_some_of_the_images(shards, tmp_path, capsys):
    path = save(tmp_path / "one.ckpt", 0)
    options = {"image_size": IMAGE_SIZE, "resize": RESIZE, "devices": 1, "accelerator": "cpu"}
    table4(shards, [path], images=3, **options)
    assert "error on 3 validation images of" in capsys.readouterr().out
    sets = ImageDataModule(9, shards, IMAGE_SIZE, None).sets
    assert some_of(sets, 3).validation.indices.tolist() == [0, 2, 4]
    assert some_of(sets, 7) is sets is some_of(sets, None)
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        table4(shards, [path], tmp_path / "nowhere" / "table.md", **options)
    for images in (0, 8):
        with pytest.raises(ValueError, match=rf"images={images} must lie in 1\.\.7, the validation images there are"):
            table4(shards, [path], images=images, **options)


def test_names_tell_checkpoints_apart():
    paths = ["runs/a/version_0/last.ckpt", "runs/b/version_0/last.ckpt", "other.ckpt"]
    assert [short_name(path, paths) for path in paths] == [
        "a/version_0/last.ckpt",
        "b/version_0/last.ckpt",
        "other.ckpt",
    ]
    assert short_name(paths[0], paths[:1]) == "last.ckpt"


def test_what_the_paper_does_not_state_is_a_dash():
    assert "| paper: GoogLeNet ensemble | 224 | 144 | 7 | - | 6.67 % |" in markdown(PAPER, "7 images")


def test_checkpoints_that_do_not_belong_together_are_refused_in_one_line(shards, tmp_path):
    fitting = save(tmp_path / "fitting.ckpt", 0)
    others = {
        "variant": save(tmp_path / "slim.ckpt", 0, variant="slim"),
        "num_classes": save(tmp_path / "five.ckpt", 0, num_classes=5),
    }
    cases = [([], "needs checkpoints"), ([str(tmp_path / "none.ckpt")], "there is no file")]
    cases += [([fitting, other], f"has {name}=") for name, other in others.items()]
    cases.append(([others["num_classes"]], r"five.ckpt has num_classes=5, the config 3: give it data of the same"))
    for checkpoints, message in cases:
        with pytest.raises(ValueError, match=message) as raised:
            table4(shards, checkpoints, image_size=IMAGE_SIZE, resize=RESIZE, devices=1, accelerator="cpu")
        assert "\n" not in str(raised.value)


def test_images_are_those_that_the_networks_were_trained_on(shards, tmp_path, capsys):
    paths = [save(tmp_path / f"{size}.ckpt", 0) for size in (40, 48)]
    for path, size in zip(paths, (40, 48), strict=True):
        checkpoint = torch.load(path, weights_only=True)
        checkpoint[CARD_KEY] = dataclasses.replace(read_weights(path).card, image_size=size, resize=50).to_json()
        torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"48.ckpt was trained with image_size=48, .*40.ckpt with 40"):
        common_card(paths)
    table4(shards, paths[:1], devices=1, accelerator="cpu")
    assert "| 40.ckpt | 40 | 1 | 1 |" in capsys.readouterr().out
