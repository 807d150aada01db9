"""Which code and libraries a report's figures come from."""

import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import yaml

UNKNOWN = "unknown"


def provenance(revisions: Sequence[str], libraries: Sequence[str] = ("torch", "lightning")) -> str:
    """A sentence on what the figures come from.

    Args:
        revisions: Of this package when it trained, in any order, also several times the same.
        libraries: Besides this package; their versions are those installed now.
    """
    versions = ", ".join(f"{name} {version(name)}" for name in ("syncbn", *libraries))
    found = [f"git {revision}" for revision in sorted(set(revisions) - {UNKNOWN})]
    if UNKNOWN in revisions:
        found.append("a revision that is not known")
    return ", ".join([versions, *([" and ".join(found)] if found else []), platform.machine()]) + "."


def revisions_of(folders: Iterable[Path]) -> list[str]:
    """The revision of this package that each training in some folders ran with, by what the run has noted."""
    return [
        yaml.safe_load(path.read_text()).get("syncbn_git_revision", UNKNOWN)
        for folder in folders
        for path in sorted(folder.rglob("provenance.yaml"))
    ]
