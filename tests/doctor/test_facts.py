"""What a rank finds out about itself."""

from syncbn.doctor import facts


def test_the_revision_is_that_of_syncbn_not_of_the_checkout_it_is_installed_in(monkeypatch):
    monkeypatch.setattr(facts, "source_revision", lambda: "that of the package")
    assert facts.software_versions()["syncbn revision"] == "that of the package"
