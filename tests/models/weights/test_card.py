"""The model card: there and back, and what is refused."""

import json
from dataclasses import replace

import pytest

from syncbn.models.weights import ModelCard, card_path, parse_card, read_card_beside
from syncbn.preprocessing import PIXELS, PREPROCESSING, Preprocessing

CARD = ModelCard("cadene", {"variant": "cadene"}, 2, ("grün", "日"), PREPROCESSING["cadene"], 224, 256)


def test_there_and_back(tmp_path):
    assert parse_card(CARD.to_json(), "here") == CARD
    card_path(tmp_path / "a.pth").write_text(CARD.to_json(), encoding="utf-8")
    assert card_path(tmp_path / "a.pth").name == "a.pth.card.json"
    assert read_card_beside(tmp_path / "a.pth") == CARD
    assert read_card_beside(tmp_path / "b.pth") is None


def test_how_pixels_are_made_is_said_in_fields_and_in_words():
    pixels = json.loads(CARD.to_json())["pixels"]
    assert pixels["shrink"] == "area averaging (OpenCV INTER_AREA)" and pixels["crop"] == "centre"
    for words in ("shorter side to 256 pixels", "central 224 x 224", "order BGR", "do not turn as EXIF"):
        assert words in pixels["in_words"]
    turned = replace(CARD, exif_orientation=True)
    assert "; turn as EXIF" in turned.in_words and parse_card(turned.to_json(), "here") == turned


def test_a_card_from_before_there_were_these_parts_means_what_was_done():
    content = json.loads(CARD.to_json())
    del content["pixels"], content["exif_orientation"]
    assert parse_card(json.dumps(content), "here") == CARD and not CARD.exif_orientation


CHANGES = {
    "no class": {"num_classes": 0},
    "a class that is missing": {"classes": ["one"]},
    "an architecture that reads files": {"architecture": {"weights": "other.pth"}},
    "no architecture": {"architecture": 3},
    "images that fill the memory": {"image_size": 10**6, "resize": None},
    "resized to fill the memory": {"resize": 10**6},
    "a centre larger than the image": {"resize": 200},
    "a size in words": {"image_size": "large"},
    "an unknown part": {"colour": "red"},
    "another order of the colours": {"preprocessing": {"colour_order": "GBR", "mean": [1], "std": [1]}},
    "a division by zero": {"preprocessing": {"colour_order": "RGB", "mean": [1], "std": [0]}},
    "numbers that are none": {"preprocessing": {"colour_order": "RGB", "mean": ["a"], "std": [1]}},
    "NaN": {"preprocessing": {"colour_order": "RGB", "mean": [float("nan")], "std": [1]}},
    "a mean without std": {"preprocessing": {"colour_order": "RGB", "mean": [1], "std": None}},
    "a turn that is none": {"exif_orientation": 6},
    "pixels made in another way": {"pixels": PIXELS | {"crop": "random"}},
    "fewer std": {"preprocessing": {"colour_order": "RGB", "mean": [1, 2], "std": [1]}},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_wrong_card_is_refused(change):
    content = json.loads(CARD.to_json()) | change
    with pytest.raises(ValueError, match="here is no model card: ") as raised:
        parse_card(json.dumps(content), "here")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "[1]", "{}", "null", "\x00", b"\xff\xfe\xff", "[" * 200_000], ids=range(7))
def test_junk_is_refused(text):
    with pytest.raises(ValueError, match="here is no model card"):
        parse_card(text, "here")


def test_numbers_of_other_channels_give_way_to_the_datas_own():
    grey = PREPROCESSING["cadene"].resolved((0.5,), (0.25,))
    assert grey == Preprocessing("RGB", (127.5,), (63.75,))
    assert PREPROCESSING["cadene"].resolved((0.5,) * 3, (0.25,) * 3) == PREPROCESSING["cadene"]
    assert Preprocessing("BGR", None, None).resolved((0.5,) * 3, (0.25,) * 3).colour_order == "BGR"
