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


def revisions_of(runs: Iterable[Path]) -> list[str]:
    """The revision of this package that each run was trained with, as it has noted; `UNKNOWN` where it has not.

    Args:
        runs: Their folders, ``version_N``.
    """
    return [_revision(run / "provenance.yaml") for run in runs]


def _revision(noted: Path) -> str:
    try:
        content = yaml.safe_load(noted.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return UNKNOWN
    return str(content.get("syncbn_git_revision", UNKNOWN)) if isinstance(content, dict) else UNKNOWN
