"""Checkpoints, data and batches that do not fit together: one clear line each."""

import sys
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from syncbn.cli import main
from syncbn.training import ImageClassifier

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

WORDS = [
    *("--data.image_size=16", "--global_batch_size=16", "--model.stem=small", "--model.width_multiplier=0.125"),
    *(
        "--trainer.devices=1",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.max_epochs=1",
    ),
]
"""For Fashion-MNIST, which has ten classes and one channel."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """Of a network that fits, and of three that do not."""
    folder = tmp_path_factory.mktemp("checkpoints")
    kinds = {
        "fitting": {},
        "classes": {"num_classes": 5},
        "channels": {"in_channels": 3},
        "variant": {"variant": "slim"},
    }
    for name, options in kinds.items():
        settings = {"num_classes": 10, "in_channels": 1, "width_multiplier": 0.125, "stem": "small"} | options
        trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
        trainer.strategy.connect(ImageClassifier(16, training_images=100, **settings))
        trainer.save_checkpoint(folder / f"{name}.ckpt")
    return {name: str(folder / f"{name}.ckpt") for name in kinds}


def last_line(capsys, *words: str) -> str:
    """What a command that fails says, which is one line."""
    with pytest.raises(SystemExit) as exited:
        main(list(words))
    assert exited.value.code not in (0, None)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if "error" in line]) == 1 and "Traceback" not in "".join(lines)
    return lines[-1]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["syncbn"])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("classes", "classes.ckpt has num_classes=5, the config 10: give it data of the same classes"),
        ("channels", "channels.ckpt has in_channels=3, the config 1: give it data of the same kind, grey or coloured"),
        ("variant", "variant.ckpt has variant=slim, the config paper: all of them, and the config, must be of one"),
    ],
)
def test_a_checkpoint_of_another_task(checkpoints, kind, expected, capsys):
    if kind != "variant":  # which Lightning takes from the checkpoint that is given alone
        assert expected in last_line(capsys, "validate", *WORDS, f"--ckpt_path={checkpoints[kind]}")
    ensemble = f"--checkpoints=[{checkpoints['fitting']}, {checkpoints[kind]}]"
    assert expected in last_line(capsys, "test", *WORDS, ensemble)


def test_going_on_with_other_data(checkpoints, capsys):
    line = last_line(capsys, "fit", *WORDS, "--test_after_fit=false", f"--ckpt_path={checkpoints['classes']}")
    assert line.startswith("syncbn: error: --ckpt_path ") and "has num_classes=5, the config 10" in line


def test_a_batch_of_more_images_than_there_are(capsys):
    words = ("--global_batch_size=9999", "--data.validation_images=2", "--test_after_fit=false")
    line = last_line(capsys, "fit", *WORDS, *words)
    assert "global_batch_size=9999 exceeds the 9998 training images: at most that many fit" in line
