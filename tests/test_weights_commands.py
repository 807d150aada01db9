"""What README and docs tell a user to type about weights, fine-tuning and export, typed."""

import glob
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from syncbn.cli import main
from syncbn.models import inception_bn
from syncbn.models.weights import card_path, read_weights, write_weights

REPOSITORY = Path(__file__).parents[1]
QUICK = [
    *("--data.image_size=32", "--data.resize=32", "--data.num_workers=0", "--global_batch_size=4"),
    *("--trainer.max_epochs=1", "--trainer.devices=1", "--trainer.accelerator=cpu"),
    *("--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"),
]
NAMES = {"CONFIG": "configs/finetune/head_only.yaml", "PHOTOS": "photos", "FILE": "bn_inception.pth"}

pytestmark = [
    pytest.mark.usefixtures("own_folder"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode"),
]


def commands(page: str, containing: str) -> list[list[str]]:
    """The words of the commands in those shell blocks of a page that hold a text."""
    blocks = re.findall(r"```(?:bash|text)\n(.*?)```", (REPOSITORY / page).read_text(), flags=re.DOTALL)
    lines = [line for block in blocks if containing in block for line in block.strip().splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("syncbn ")]


def run(words: list[str]) -> None:
    """Run a command as a shell would."""
    words = [NAMES.get(word, word) for word in words[1:]]
    words = [match for word in words for match in (glob.glob(word) if "runs/" in word else [word])]  # noqa: PTH207
    if words[0] == "fit":
        words += QUICK if "--data" in words else [*QUICK, "--data=photos"]
    sys.argv[:] = ["syncbn"]
    try:
        main(words)
    except SystemExit as exited:
        assert exited.code == 0, words


@pytest.fixture
def files(tmp_path):
    """Photos, and weights in Cadene's layout without a card, as people have them."""
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    generator = np.random.default_rng(0)
    counts = {"photos/train/a": 4, "photos/train/b": 4, "photos/val/a": 2, "photos/val/b": 2, "new": 1}
    for place, count in counts.items():
        (tmp_path / place).mkdir(parents=True)
        for number in range(count):
            image = generator.integers(0, 256, (48, 40, 3), dtype=np.uint8)
            cv2.imwrite(str(tmp_path / place / f"{number}.jpg"), image)
    torch.manual_seed(0)
    torch.save(inception_bn(5, "cadene", width_multiplier=0.125).state_dict(), "ours.pth")
    ours = read_weights("ours.pth")
    network = inception_bn(5, "cadene", width_multiplier=0.125, weights="ours.pth")
    write_weights(network, ours.card, tmp_path / "bn_inception.pth", "cadene")
    card_path(tmp_path / "bn_inception.pth").unlink()
    (tmp_path / "names.txt").write_text("\n".join("vwxyz"))
    return tmp_path


def test_the_commands_run(files, capsys):
    pytest.importorskip("onnxruntime", reason="the extra syncbn[export] is not installed")
    five_minutes = commands("docs/finetuning.md", "syncbn")
    assert [words[1] for words in five_minutes] == ["data", "fit", "predict", "export"]
    for words in five_minutes:
        run(words)
    [best] = (files / "runs/finetune_partial_bn/version_0/checkpoints").glob("best-*.ckpt")
    (files / "best.ckpt").symlink_to(best)
    of_weights = commands("docs/weights.md", "syncbn import")
    assert [words[1] for words in of_weights] == ["import", "predict", "fit", "export"]
    for words in of_weights:
        run(words)
    assert (files / "best.onnx").is_file() and (files / "bn_inception.safetensors").is_file()
    check_onnxruntime(files, capsys)


def check_onnxruntime(folder: Path, capsys) -> None:
    """The program of the page predicts what syncbn does; of a photo that is not resized, whose pixels are the same."""
    [export] = commands("docs/weights.md", "pixels.onnx")
    run(export)
    pixels = np.random.default_rng(1).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / "photo.png"), pixels)
    [program] = re.findall(r"```py\n(.*?)```", (REPOSITORY / "docs/weights.md").read_text(), flags=re.DOTALL)
    capsys.readouterr()
    names: dict[str, Any] = {}
    exec(program.replace("photo.jpg", "photo.png"), names)
    printed = capsys.readouterr().out.strip()
    run(shlex.split("syncbn predict best.ckpt photo.png --format jsonl"))
    [line] = capsys.readouterr().out.strip().splitlines()
    expected = {entry["class"]: entry["probability"] for entry in json.loads(line)["predictions"]}
    logits = torch.tensor(names["logits"])
    assert printed == max(expected, key=expected.__getitem__)
    probabilities = dict(zip(names["card"]["classes"], logits.softmax(0).tolist(), strict=True))
    assert probabilities == pytest.approx(expected, abs=1e-4)
