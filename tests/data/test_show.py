"""``syncbn data show``: the picture it writes, and what it refuses."""

import sys

import cv2
import numpy as np
import pytest
from photos import encode, smooth

from syncbn.cli import main
from syncbn.data.show import DOTS_PER_INCH, WIDTH
from syncbn.data.transforms.evaluation_crops import EvaluationCrops


@pytest.fixture
def class_folders(tmp_path):
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "1.jpg").write_bytes(encode(smooth(90, 120)))
    return tmp_path


def show(*words: str) -> None:
    before = list(sys.argv)
    try:
        main(["data", "show", *words])
    finally:
        sys.argv[:] = before


def test_a_picture_of_photos(class_folders, capsys):
    path = class_folders / "sheet.png"
    show("--data", str(class_folders), "--output", str(path), "--image_size", "32", "--epochs", "2")
    assert capsys.readouterr().out.strip() == str(path)
    picture = cv2.imread(str(path))
    # Two images and the labels side by side; three rows, titles and the crops, whose height is fixed.
    assert picture.shape[1] == WIDTH * DOTS_PER_INCH
    assert picture.shape[0] == pytest.approx((WIDTH / 3 * 3 + 1.0 + 18.5) * DOTS_PER_INCH, abs=2)
    assert np.mean((picture == 255).all(axis=2)) < 0.6, "more than paper"


def test_a_folder_of_classes_alone(class_folders):
    path = class_folders / "alone.png"
    show("--data", str(class_folders / "train"), "--output", str(path), "--image_size", "32", "--epochs", "1")
    assert path.exists()


def test_the_picture_shows_every_crop(class_folders, monkeypatch):
    """The mosaics that are drawn are the epochs' and the 144 crops' pixels."""
    drawn = []
    monkeypatch.setattr("syncbn.data.show.draw_mosaic", lambda axes, rows: drawn.append(rows))
    monkeypatch.setattr("syncbn.data.show.label_mosaic", lambda axes, rows, columns: axes.set_xticks(range(12)))
    show("--data", str(class_folders), "--output", str(class_folders / "a.png"), "--image_size", "16", "--epochs=1")
    epochs, crops = drawn
    assert np.array_equal(np.shape(epochs), (2, 2, 16, 16, 3))
    image = cv2.imread(str(class_folders / "train" / "ant" / "1.jpg"))[:, :, ::-1]
    expected = EvaluationCrops(16, count=144)(np.ascontiguousarray(image)).reshape(2, 12, 6, 16, 16, 3)
    assert np.array_equal(np.array(crops)[:, :6], expected[0]) and np.array_equal(np.array(crops)[:, 6:], expected[1])


def test_a_picture_of_grey_images(tmp_path):
    path = tmp_path / "grey.png"
    words = ["--image_size=28", "--images=1", "--epochs=1", "--augmentation.crop=null", "--augmentation.max_shift=2"]
    show(f"--output={path}", *words)
    assert cv2.imread(str(path)) is not None


@pytest.mark.parametrize("mistake", ["--images=0", "--output=picture.pdf", "--image_size=-1", "--data=/no/such/folder"])
def test_mistakes_are_answered_in_one_line(mistake, capsys):
    with pytest.raises(SystemExit):
        show(mistake)
    [line] = capsys.readouterr().err.strip().splitlines()
    assert mistake.split("=")[1] in line and line.startswith("syncbn: error:")
