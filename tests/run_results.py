"""What runs leave behind, to compare."""

from pathlib import Path

import torch

from syncbn.training.run.logs import read_log

OF_SPEED = ("_seconds", "_second", "_per_device", "memory_gib")
"""How the names of columns end that no two runs agree on."""


def learned(run: Path) -> list[dict[str, str]]:
    """The rows of a run folder's log, without speed and memory."""
    rows = read_log(run / "metrics.csv")[1]
    return [{name: value for name, value in row.items() if not name.endswith(OF_SPEED)} for row in rows]


def same(found: object, expected: object) -> bool:
    """Whether two nested structures hold the same bits."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected
