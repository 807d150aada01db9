"""``syncbn fit`` with the configs of configs/finetune, on made-up photos: new classes, a retrieval, mistakes."""

import csv
import json
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from syncbn.cli import main

CONFIGS = Path(__file__).parents[1] / "configs" / "finetune"
SMALL = [
    *("--data.image_size=32", "--data.resize=32", "--data.num_workers=0", "--global_batch_size=6"),
    *("--model.width_multiplier=0.125", "--model.stem=small", "--trainer.max_epochs=1", "--trainer.devices=1"),
    *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"),
]

pytestmark = [
    pytest.mark.usefixtures("own_folder"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode"),
]


def photos(folder: Path, split: str, classes: dict[str, int], images: int) -> None:
    """Noise about a grey of the class."""
    generator = np.random.default_rng(0)
    for name, grey in classes.items():
        (folder / split / name).mkdir(parents=True)
        for number in range(images):
            image = generator.normal(grey, 20, (40, 40, 3)).clip(0, 255).astype(np.uint8)
            cv2.imwrite(str(folder / split / name / f"{number}.png"), image)


@pytest.fixture
def data(tmp_path) -> Path:
    photos(tmp_path / "photos", "train", {"dark": 40, "bright": 210}, 6)
    photos(tmp_path / "photos", "val", {"dark": 40, "bright": 210}, 4)
    return tmp_path / "photos"


@pytest.fixture
def weights(tmp_path) -> Path:
    """A checkpoint of a network with other classes."""
    from syncbn.training import ImageClassifier

    torch.manual_seed(1)
    model = ImageClassifier(6, 7, 3, 12, width_multiplier=0.125, stem="small")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "pretrained.ckpt")
    return tmp_path / "pretrained.ckpt"


def fit(config: str, data: Path, weights: Path, *words: str) -> None:
    start = ["--data", str(data), "--model.weights", str(weights)]
    main(["fit", "--config", str(CONFIGS / f"{config}.yaml"), *start, *SMALL, *words])


@pytest.mark.parametrize("config", ["full", "partial_bn", "head_only", "estimate", "gradual"])
def test_new_classes(config, data, weights, capsys):
    fit(config, data, weights)
    lines = capsys.readouterr().out.strip().splitlines()
    assert re.match(
        r"validation accuracy \d+\.\d\d % .* on 8 images \(there are no test images\) with best-", lines[-5]
    )
    folder = Path(lines[-1])
    summary = json.loads((folder / "summary.json").read_text())
    assert not [name for name in summary["metrics"] if name.startswith("test")] and "val_top1" in summary["metrics"]
    assert re.match(r"8 images \(there are no test images\) with best-", summary["metrics_of"]["val"])
    with (folder / "confusion_val.csv").open(newline="") as rows:
        table = list(csv.reader(rows))
    assert table[0][1:] == ["bright", "dark"]
    assert sum(int(field) for row in table[1:] for field in row[1:]) == 8
    assert (folder / "confusion_val.png").is_file() and (folder / "classes_val.csv").is_file()
    assert not [file.name for file in folder.iterdir() if "_test" in file.name]
    weights.unlink()  # what was trained stands by itself
    checkpoint = folder / "checkpoints" / "last.ckpt"
    sys.argv[:] = ["syncbn"]
    main(["test", "--config", str(folder / "config.yaml"), "--ckpt_path", str(checkpoint)])
    said, warned = capsys.readouterr()
    assert re.match(r"validation accuracy .* on 8 images .* with last\.ckpt$", said.strip().splitlines()[-1])
    assert "syncbn: takes the 8 validation images; there are no test images" in warned
    assert Path("confusion_val.csv").is_file() and not Path("confusion_test.csv").exists()


def test_images_are_held_out_for_the_test(data, capsys):
    words = ["--data.test_images=4", "--data.validation_images=2", *SMALL]
    main(["test", "--data", str(data / "train"), *words])
    said, warned = capsys.readouterr()
    assert "syncbn: takes the 4 test images (held out of the training images)\n" in warned
    last = said.strip().splitlines()[-1]
    assert re.match(r"test accuracy .* on 4 images \(held out of the training images\) with the weights as they", last)


def test_retrieval_among_classes_never_trained_on(tmp_path, weights, capsys):
    photos(tmp_path / "animals", "train", {"dark": 40, "bright": 210}, 6)
    photos(tmp_path / "animals", "val", {"medium": 120, "black": 5, "white": 250}, 4)
    fit("retrieval", tmp_path / "animals", weights, "--model.embedding_dimension=8")
    lines = capsys.readouterr().out.strip().splitlines()
    line = r"validation recall @1 \d+\.\d\d %, @2 .* on 12 images \(there are no test images\) with best-epoch=0-rec"
    assert re.match(line, lines[-5])
    with (Path(lines[-1]) / "metrics.csv").open(newline="") as rows:
        recalls = [row["val_recall_at_1"] for row in csv.DictReader(rows) if row["val_recall_at_1"]]
    assert len(recalls) == 1 and (float(recalls[0]) * 12) % 1 == pytest.approx(0, abs=1e-4)
    checkpoint = Path(lines[-1]) / "checkpoints" / "last.ckpt"
    sys.argv[:] = ["syncbn"]
    with pytest.raises(SystemExit) as exited:
        main(["predict", str(checkpoint), str(tmp_path / "animals" / "val"), "--format=npz", "--output=a.npz"])
    with np.load("a.npz", allow_pickle=False) as archive:
        assert exited.value.code == 0 and archive["embeddings"].shape == (12, 8)
    main(["export", str(checkpoint), "--format=safetensors", "--output=embedding.safetensors"])
    assert "of numbers up to" in capsys.readouterr().out


MISTAKES = {
    "a missing file": (["--model.weights=nowhere.ckpt"], "weights nowhere.ckpt: there is no such file"),
    "a typing error": (['--model.freeze=["stm*"]'], "freeze: the pattern 'stm*' matches no parameter"),
    "nothing to train": (['--model.freeze=["*"]'], "leaves nothing to train"),
    "an unknown policy": (["--model.batch_norm=frozen"], "frozen"),
    "another width": (["--model.width_multiplier=0.25"], "has the shape (16,), not (32,)"),
    "weights of other classes": (["--model.class_weights=[1,2,3]"], "class_weights has 3 weights, the data have 2"),
    "a factor of what is frozen": (['--model.freeze=["stem"]', '--model.learning_rate_factors={"stem":2}'], "frozen"),
}


@pytest.mark.parametrize(("words", "expected"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_answered_in_one_line(words, expected, data, weights, capsys):
    with pytest.raises(SystemExit) as exited:
        fit("full", data, weights, *words)
    assert exited.value.code not in (0, None)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("syncbn: error:") and expected in last
