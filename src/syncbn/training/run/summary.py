"""A file of JSON that says how a run went."""

import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from syncbn.collectives.world import gather_objects
from syncbn.run_folders import BEST, SUMMARY
from syncbn.training.evaluated_images import KINDS, describe_images
from syncbn.training.monitoring.throughput import Throughput, Totals, peak_memory
from syncbn.training.run.folder import describe_run, run_folder


class RunSummary(Callback):
    """Writes ``summary.json`` into the run folder: accuracy, speed, memory, versions, and how the run ended.

    It is written when training ends, when an exception ends it, and again by `finish`. Speed and memory are
    what `Throughput` measured.

    Attributes:
        ended_early: Why it took fewer steps than it might have; None where it did not.
        keeper: Of the best checkpoint, which is named; None names none.
        evaluated: The weights that the metrics are of, where they are not those of the last validation.
    """

    def __init__(self) -> None:
        self.ended_early: str | None = None
        self.evaluated: str | None = None
        self._trained = False
        self.keeper: ModelCheckpoint | None = None
        self._speed: dict[str, Any] = {}
        self._description: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Describe the run once, as it begins: its code may be edited while it trains."""
        if stage == "fit" and trainer.is_global_zero:
            self._description = describe_run(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect what the ranks measured, on all of them."""
        self._trained = True
        for throughput in [c for c in trainer.callbacks if isinstance(c, Throughput)]:  # type: ignore[attr-defined]
            mine = {"seconds": mean_seconds(throughput.totals), "memory": peak_memory()}
            self._speed = speed_of_run(throughput.totals, gather_objects(mine))
        if trainer.is_global_zero:
            self._write(trainer, self._summary(trainer, "trained"))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The run has ended otherwise."""
        text = " ".join(str(exception).split())
        cause = type(exception).__name__ + (f": {text}" if text else "")
        if trainer.is_global_zero:
            self._write(trainer, self._summary(trainer, cause))

    def finish(self, trainer: Trainer) -> None:
        """Write the summary of a run that went through."""
        if trainer.is_global_zero:
            summary = self._summary(trainer, "finished")
            if not self._trained:  # the run that it went on with was over
                summary = with_earlier(summary, run_folder(trainer))
            self._write(trainer, summary)

    def _summary(self, trainer: Trainer, exit_cause: str) -> dict[str, Any]:
        folder = run_folder(trainer)
        best = self.keeper.best_model_path if self.keeper else ""
        metrics = {
            name: round(float(value), 6)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(("val_", "test_"))
        }
        return {
            "exit": exit_cause,
            **({"ended_early": self.ended_early} if self.ended_early else {}),
            "run_folder": str(folder),
            **({BEST: os.path.relpath(best, folder)} if best and folder else {}),
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
            "metrics_of": {
                stage: f"{describe_images(trainer, stage)} with {self.evaluated or 'the weights as they then were'}"
                for stage in KINDS
                if f"{stage}_images" in metrics
            },
            **self._speed,
            **self._description,
        }

    @staticmethod
    def _write(trainer: Trainer, summary: dict[str, Any]) -> None:
        folder = run_folder(trainer)
        if folder is not None and folder.is_dir():
            (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")


def with_earlier(summary: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """The summary of a start that trained nothing, with what an earlier one in the same folder has measured."""
    try:
        earlier = json.loads((folder / SUMMARY).read_text()) if folder else {}
    except (OSError, json.JSONDecodeError):  # there was none, or a kill has cut it off
        earlier = {}
    known = ("exit", "ended_early", "run_folder", "epochs", "steps")
    metrics = {part: earlier.get(part, {}) | summary[part] for part in ("metrics", "metrics_of")}
    return summary | earlier | {name: summary[name] for name in known if name in summary} | metrics


def mean_seconds(totals: Totals) -> dict[str, float]:
    """Of each part of a step, over the steps counted."""
    return {part: seconds / max(1, len(totals.durations)) for part, seconds in totals.seconds.items()}


def speed_of_run(totals: Totals, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Speed and memory of a run.

    Args:
        totals: Of this rank.
        ranks: Of each rank, mean "seconds" of the parts of its steps, and its peak "memory" in bytes.
    """
    durations = sorted(totals.durations)
    if not durations:
        return {}
    images_per_second = totals.images / sum(durations)
    step = {
        "median": statistics.median(durations),
        "p90": durations[math.ceil(0.9 * len(durations)) - 1],
        "mean": statistics.fmean(durations),
    }
    return {
        "images_per_second": round(images_per_second, 2),
        "images_per_second_per_device": round(images_per_second / len(ranks), 2),
        "step_seconds": {name: round(value, 6) for name, value in step.items()},
        "parts_seconds": {part: over_ranks([rank["seconds"][part] for rank in ranks]) for part in totals.seconds},
        "memory_gib": over_ranks([rank["memory"] / 2**30 for rank in ranks]),
    }


def over_ranks(values: list[float]) -> dict[str, float | int]:
    """The mean of a value of each rank, the largest, and whose it is."""
    largest = max(values)
    return {"mean": round(statistics.fmean(values), 6), "max": round(largest, 6), "max_rank": values.index(largest)}
