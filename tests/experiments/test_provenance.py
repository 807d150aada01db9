"""What a report says of the code that trained."""

import platform
from importlib.metadata import version

from syncbn.experiments.provenance import provenance, revisions_of
from syncbn.experiments.table4 import revision_of_checkpoint


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
    texts = ["syncbn_git_revision: a", "syncbn_git_revision: b-dirty", "ranks: 1", "", "[a]", "a: b: c", None]
    runs = [tmp_path / f"version_{number}" for number in range(len(texts))]
    for run, text in zip(runs, texts, strict=True):
        run.mkdir()
        if text is not None:
            (run / "provenance.yaml").write_text(text)
    (runs[-1] / "other").mkdir()
    (runs[-1] / "other" / "provenance.yaml").write_text(texts[0])  # of something else
    assert revisions_of(runs) == ["a", "b-dirty", *5 * ["unknown"]]
    for folder, revision in (("checkpoints", "a"), ("elsewhere", "unknown")):
        assert revision_of_checkpoint(runs[0] / folder / "last.ckpt") == revision
