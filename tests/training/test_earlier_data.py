"""A run, config or checkpoint from before an option of the data existed means what was done then."""

import io
from dataclasses import replace

import pytest
import torch
import yaml
from PIL import Image

from syncbn.cli import main
from syncbn.models.weights import CARD_KEY, ModelCard
from syncbn.preprocessing import PREPROCESSING
from syncbn.training.checkpoints.earlier_data import MEANT, NEVER, OF_EVERY_RUN, OPEN, options_of_run, settle_data
from syncbn.training.checkpoints.resuming import check_config

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

CARD = ModelCard("cadene", {"variant": "cadene"}, 2, None, PREPROCESSING["cadene"], 224, 256)
EARLIER = dict.fromkeys(OF_EVERY_RUN) | {"root": "photos", "validation_images": 0}


def make_photos(folder):
    """Files wider than they are high, which EXIF turns; and a kind that was not read before."""
    exif = Image.Exif()
    exif[0x112] = 6
    for split in ("train", "val", "test"):
        for colour, name in enumerate(("cat", "dog")):
            place = folder / split / name
            place.mkdir(parents=True)
            file = io.BytesIO()
            Image.new("RGB", (48, 32), (200 * colour, 99, 9)).save(file, "JPEG", exif=exif)
            for number in range(4):
                (place / f"{number}.jpg").write_bytes(file.getvalue())
            Image.new("RGB", (48, 32)).save(place / "scan.tif")


@pytest.mark.parametrize("data", [None, {}, {"root": "photos", "image_size": 32}])
def test_a_config_written_by_hand_decides_nothing(data):
    assert options_of_run(data, "photos") == {}


def test_the_config_of_a_run_decides(tmp_path):
    assert options_of_run(EARLIER, "photos") == MEANT | NEVER | {"validate_on_test": False}
    assert options_of_run(EARLIER, "fashion-mnist")["validate_on_test"]
    for names, expected in ((("train", "test"), True), (("train", "test", "val"), False)):
        for name in names:
            (tmp_path / name).mkdir(exist_ok=True)
        assert options_of_run(EARLIER, str(tmp_path))["validate_on_test"] == expected
    later = {"exif_orientation": True, "suffixes": None, "validate_on_test": False, "test_images": 3}
    assert options_of_run(EARLIER | later, "fashion-mnist") == later


def settled(tmp_path, **words):
    config = {"data": dict(OPEN) | {"root": "photos"} | words.pop("data", {})} | words
    settle_data(config)
    return {name: config["data"][name] for name in OPEN}


def test_what_is_left_open_follows_the_run_and_what_is_said_stays(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": EARLIER}))
    assert settled(tmp_path) == OPEN
    for words in ({"resume": str(tmp_path)}, {"config": [tmp_path / "config.yaml"]}):
        assert settled(tmp_path, **words) == MEANT | {"validate_on_test": False}
        assert settled(tmp_path, **words, data={"exif_orientation": True})["exif_orientation"] is True
    meant = EARLIER | MEANT | {"validate_on_test": False}
    check_config(tmp_path, {"data": meant | {"test_images": 0}})
    with pytest.raises(ValueError, match=r"data\.test_images=5, but the run .* began with 0"):
        check_config(tmp_path, {"data": meant | {"test_images": 5}})
    with pytest.raises(ValueError, match=r"data\.exif_orientation=True, but the run .* began with False"):
        check_config(tmp_path, {"data": meant | {"exif_orientation": True, "test_images": 0}})


def test_checkpoints_of_different_pixels_are_refused(tmp_path):
    for name, turned in (("a", True), ("b", False)):
        torch.save({CARD_KEY: replace(CARD, exif_orientation=turned).to_json()}, tmp_path / name)
    torch.save({}, tmp_path / "earlier")
    paths = {name: str(tmp_path / name) for name in ("a", "b", "earlier")}
    assert settled(tmp_path, ckpt_path=paths["a"]) == OPEN | {"exif_orientation": True}
    assert settled(tmp_path, ckpt_path=paths["earlier"]) == OPEN | MEANT
    with pytest.raises(ValueError, match=r"of .*/a were turned as .* says, those of .*/b were not: .*data\.exif"):
        settled(tmp_path, checkpoints=[paths["a"], paths["b"]])
    assert settled(tmp_path, checkpoints=[paths["a"], paths["b"]], data={"exif_orientation": False})


WORDS = [
    *("--data=photos", "--data.image_size=16", "--model.stem=small", "--model.width_multiplier=0.125"),
    *("--global_batch_size=4", "--trainer.devices=1", "--trainer.accelerator=cpu", "--trainer.max_epochs=1"),
    "--trainer.log_every_n_steps=1",
    *("--trainer.enable_progress_bar=false", "--test_after_fit=false"),
]


@pytest.mark.usefixtures("own_folder")
def test_a_run_of_an_earlier_version_goes_on_with_its_pixels(tmp_path, capsys):
    make_photos(tmp_path / "photos")
    main(["fit", *WORDS])
    run = tmp_path / "runs" / "unnamed" / "version_0"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["exif_orientation"] is True, "as it was, whatever the default will be"
    assert "10 training, 10 validation, 10 test images; EXIF orientation applied" in "".join(capsys.readouterr())
    for name in (*OPEN, *NEVER):
        del config["data"][name]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", *WORDS, f"--resume={run}", "--trainer.max_epochs=2"])
    assert "8 training, 8 validation, 8 test images; EXIF orientation not applied; 6 .tif left out" in "".join(
        capsys.readouterr()
    )
