"""Names of the user's in pictures."""

import numpy as np
import pytest
from matplotlib import font_manager, rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from syncbn.pictures import drawable_names, plain_text, say_numbers, unless_it_fails
from syncbn.training.run.class_report import draw_confusion


def drawn(text, **properties):
    """The pixels of a text."""
    figure = Figure(figsize=(4, 1))
    canvas = FigureCanvasAgg(figure)
    figure.text(0.1, 0.4, text, **properties)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


@pytest.mark.parametrize("name", ["US$5_to_US$10", "$5_$10", "$\\frac$", "a_{b}^c"])
def test_a_name_is_drawn_as_it_is(name, tmp_path):
    with plain_text(name):
        np.testing.assert_array_equal(drawn(name), drawn(name, parse_math=False))
    draw_confusion(tmp_path / "picture.png", np.eye(2, dtype=np.int64), [name, "other"])
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_a_font_that_has_the_letters_is_looked_for(monkeypatch):
    symbols = next(font for font in font_manager.fontManager.ttflist if font.name == "STIXGeneral")
    letter = "\U000f1234"  # of private use: in no font
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [symbols])
    monkeypatch.setattr("syncbn.pictures.letters_of", lambda file: {letter} if file == symbols.fname else set())
    with plain_text(letter):
        assert rcParams["font.family"][-1] == symbols.name
    assert drawable_names([letter]) == [letter]


def test_without_such_a_font_numbers_stand_for_names_and_a_line_says_which(monkeypatch, capsys, recwarn, tmp_path):
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    say_numbers.cache_clear()
    classes = ["ant", "苹果", "\udcff.d"]
    for _ in range(2):
        draw_confusion(tmp_path / "picture.png", np.eye(3, dtype=np.int64), classes)
    assert drawable_names(classes) == ["ant", "class 1", "class 2"]
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "2 names of classes" in line and r"1 = '\u82f9\u679c'; 2 = '\udcff.d'" in line
    assert not [warning for warning in recwarn if "lyph" in str(warning.message)]


def test_a_picture_that_cannot_be_drawn_is_a_line(capsys, tmp_path):
    with unless_it_fails(tmp_path / "curves.png"):
        raise RuntimeError("no\nink")
    assert capsys.readouterr().err == f"syncbn: {tmp_path / 'curves.png'} could not be drawn: RuntimeError: no ink\n"
