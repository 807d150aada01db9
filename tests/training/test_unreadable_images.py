"""Fits on folders in which some photos are broken: what is left out, what is said, and how a run goes on."""

import csv
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from syncbn.cli import main
from syncbn.data.loading.order import ShuffledOrder

pytestmark = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]

WORDS = [
    *("fit", "--global_batch_size=4", "--data.image_size=16", "--model.stem=small", "--model.width_multiplier=0.125"),
    *("--trainer.max_epochs=2", "--trainer.devices=1", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"),
    *("--trainer.enable_progress_bar=false", "--checkpoint.save_top_k=0"),
]


def photo(seed: int) -> bytes:
    image = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", image)[1].tobytes()


WITHOUT_PIXELS = photo(0)[: photo(0).index(b"\xff\xda")] + b"\xff\xd9"
"""What passes for an image by its beginning and end."""


def make_photos(root: Path, broken: dict[str, bytes] = {}) -> Path:  # noqa: B006 (read only)
    for split, count in {"train": 8, "val": 2, "test": 2}.items():
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                (root / split / name / f"{number}.jpg").write_bytes(photo(number))
    for path, content in broken.items():
        (root / path).write_bytes(content)
    return root


def losses(run: Path) -> list[str]:
    rows = csv.DictReader((run / "metrics.csv").read_text().splitlines())
    return [row["train_loss"] for row in rows if row["train_loss"]]


def last_error(capsys: Any) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_broken_photos_are_listed_and_left_out_of_a_whole_run(capsys, monkeypatch):
    broken = {"train/ant/1.jpg": b"", "val/bee/0.jpg": b"no image", "test/ant/1.jpg": photo(1)[:200]}
    data = make_photos(Path("photos"), broken)
    main([*WORDS, "--name=run", "--data", str(data), "--trainer.max_steps=6"])
    run = Path("runs/run/version_0")
    said = capsys.readouterr().out
    assert "3 of 24 images cannot be read and are left out: train/ant/1.jpg (empty file), val/bee/0.jpg (no im" in said
    assert f"all in {run / 'unreadable.json'}" in said
    assert "on 3 images with" in said and "left out of epoch" not in said
    record = json.loads((run / "unreadable.json").read_text())
    assert record["looked_at"] == 24 and sorted(record["unreadable"]) == sorted(broken)
    # The files are mended, and the run goes on as if they were not.
    for path in broken:
        (data / path).write_bytes(photo(1))
    with monkeypatch.context() as patch:
        patch.setattr("syncbn.data.look_through.look_through", None)
        main([*WORDS, "--name=run", "--data", str(data), "--resume", str(run)])
    assert "3 of 24 images cannot be read and are left out" in capsys.readouterr().out
    assert json.loads((run / "unreadable.json").read_text()) == record
    for path, content in broken.items():
        (data / path).write_bytes(content)
    main([*WORDS, "--name=whole", "--data", str(data)])
    assert losses(run) == losses(Path("runs/whole/version_0"))


def test_a_photo_that_fails_later_is_left_out_with_a_warning(capsys):
    data = make_photos(Path("photos"), {"train/ant/1.jpg": WITHOUT_PIXELS})
    with pytest.warns(UserWarning, match=r"left out of its batch: cannot decode the image .*train/ant/1\.jpg"):
        main([*WORDS, "--name=look", "--data", str(data)])
    said = capsys.readouterr().out
    assert "cannot be read" not in said and "1 training image left out of epoch 1; the first: cannot decode" in said


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_fit_that_stops_at_a_photo_keeps_its_steps_and_says_how_to_go_on(accumulate, capsys):
    number = int(ShuffledOrder(16, 0).samples(0, 8, 9)[0])  # the first of the second step
    path = f"train/{'ant' if number < 8 else 'bee'}/{number % 8}.jpg"
    data = make_photos(Path("photos"), {path: WITHOUT_PIXELS})
    words = [*WORDS, "--data", str(data), f"--trainer.accumulate_grad_batches={accumulate}", "--global_batch_size=8"]
    main([*words, "--name=whole", "--data.on_read_error=skip"])
    whole = losses(Path("runs/whole/version_0"))
    with pytest.raises(SystemExit):
        main([*words, "--name=run", "--data.on_read_error=stop"])
    run = Path("runs/run/version_0")
    [checkpoint] = (run / "checkpoints").glob("step=*.ckpt")
    error = last_error(capsys)
    assert error.startswith(f"syncbn: error: cannot decode the image photos/{path}")
    assert f"--data.on_read_error skip leaves such images out; --resume {run} goes on from {checkpoint.name}" in error
    main([*words, "--name=run", "--resume", str(run), "--data.on_read_error=skip"])
    assert losses(run) == whole


def test_a_class_without_a_readable_photo_is_named(capsys):
    data = make_photos(Path("photos"), {f"train/bee/{number}.jpg": b"" for number in range(8)})
    with pytest.raises(SystemExit):
        main([*WORDS, "--data", str(data)])
    expected = "none of the 8 training images of the class 'bee' can be read, such as photos/train/bee/0.jpg"
    assert expected in last_error(capsys)
