"""``~`` in what a user writes, of every verb and option."""

from pathlib import Path

import pytest
from jsonargparse import Namespace

from syncbn.cli import main
from syncbn.paths import ExpandingParser, expand_home


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_texts_and_paths_are_expanded_however_deep(home):
    given = Namespace(
        runs_folder="~/runs", callbacks=[Namespace(init_args=Namespace(dirpath="~"))], weights=Path("~/a.pt"), steps=3
    )
    given["options"] = {"cache": ("~/x", None), "other": "a~/b", "nobody": "~no such user/x"}
    expanded = expand_home(given)
    assert expanded.runs_folder == f"{home}/runs" and expanded.callbacks[0].init_args.dirpath == str(home)
    assert expanded.weights == home / "a.pt" and expanded.steps == 3
    assert expanded["options"] == {"cache": (f"{home}/x", None), "other": "a~/b", "nobody": "~no such user/x"}


def test_a_parser_expands_what_a_config_says_too(home, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("folder: ~/runs\n")
    parser = ExpandingParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--folder", type=str)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args([f"--config={config}", "--output=~/x.csv"])
    assert (options.folder, options.output) == (f"{home}/runs", home / "x.csv")


def test_verbs_write_into_the_home_folder(home, capsys):
    main(["data", "show", "--output", "~/seen.png", "--images=1", "--epochs=1", "--image_size=32"])
    assert (home / "seen.png").is_file() and capsys.readouterr().out.strip() == str(home / "seen.png")
