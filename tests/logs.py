"""What a run's log says of the training itself."""

from pathlib import Path

from syncbn.training.run_logs import read_log

OF_SPEED = ("_seconds", "_second", "_per_device", "memory_gib")
"""How the names of columns end that no two runs agree on."""


def learned(run: Path) -> list[dict[str, str]]:
    """The rows of a run folder's log, without speed and memory."""
    rows = read_log(run / "metrics.csv")[1]
    return [{name: value for name, value in row.items() if not name.endswith(OF_SPEED)} for row in rows]
