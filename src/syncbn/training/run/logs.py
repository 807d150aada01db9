"""The logs of a run, which outlive restarts: each step has its line once, whatever was killed in between."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment

from syncbn.files import atomic_file


def run_loggers(folder: Path, from_step: int | None = None) -> list[Logger]:
    """A CSV and a TensorBoard logger that write into a run folder.

    Args:
        folder: Of the run. On other ranks than 0, which write nothing, any.
        from_step: The run goes on there: what its logs hold of this step and later ones is dropped. None of a new run.
    """
    parent, name, version = str(folder.parent.parent), folder.parent.name, folder.name
    if from_step is not None:
        cut_log(folder / "metrics.csv", from_step)
    return [
        KeptCSVLogger(parent, name, version, flush_logs_every_n_steps=10),
        TensorBoardLogger(parent, name, version, default_hp_metric=False, purge_step=from_step),
    ]


class KeptLog(ExperimentWriter):
    """Writes a CSV log; unlike Lightning's own it adds to one that is there, and a kill spoils none of it."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        log = Path(self.metrics_file_path)
        if log.is_file():
            self.metrics_keys = read_log(log)[0]

    def _check_log_dir_exists(self) -> None:
        """Delete nothing."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        log = Path(self.metrics_file_path)
        write_log(log, fieldnames, read_log(log)[1])


class KeptCSVLogger(CSVLogger):
    """Lightning's, with a log that is added to."""

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """What writes the log."""
        if not isinstance(self._experiment, KeptLog):
            self._experiment = KeptLog(self.log_dir)
        return self._experiment


def read_log(log: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and the rows of a CSV log; one that a kill has cut off is left out."""
    text = log.read_text()
    whole = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(whole, newline=""))
    rows = [row for row in reader if None not in row and None not in row.values()]
    return list(reader.fieldnames or []), rows


def write_log(log: Path, columns: Sequence[str], rows: Sequence[dict[str, str]]) -> None:
    """Write a CSV log, in the place of one that may be there."""
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, fieldnames=columns)
    writer.writeheader()
    writer.writerows(rows)
    with atomic_file(log) as file:
        file.write(lines.getvalue().encode())


def cut_log(log: Path, step: int) -> None:
    """Drop the rows of a CSV log from a step on."""
    if log.is_file():
        columns, rows = read_log(log)
        write_log(log, columns, [row for row in rows if int(row["step"]) < step])
