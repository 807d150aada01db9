"""What a report says of the code that trained."""

import platform
from importlib.metadata import version

from syncbn.experiments.provenance import provenance, revisions_of


def test_every_revision_is_named_once():
    libraries = ", ".join(f"{name} {version(name)}" for name in ("syncbn", "torch", "numpy"))
    cases = {
        "git a": ["a", "a"],
        "git a and git b": ["b", "a", "b"],
        "git a and a revision that is not known": ["unknown", "a"],
        "a revision that is not known": ["unknown"],
    }
    for words, revisions in cases.items():
        assert provenance(revisions, ["torch", "numpy"]) == f"{libraries}, {words}, {platform.machine()}."
    assert provenance([], ["torch", "numpy"]) == f"{libraries}, {platform.machine()}."


def test_the_revision_is_that_of_the_trainings(tmp_path):
    for number, text in enumerate(("syncbn_git_revision: a", "syncbn_git_revision: b-dirty", "ranks: 1")):
        folder = tmp_path / "runs" / f"run_{number}" / "version_0"
        folder.mkdir(parents=True)
        (folder / "provenance.yaml").write_text(text)
    assert revisions_of([tmp_path / "runs"]) == ["a", "b-dirty", "unknown"]
