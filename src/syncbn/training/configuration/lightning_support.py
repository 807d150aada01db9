"""What of Lightning's Trainer and callbacks ``syncbn fit`` takes, and what it refuses: the option to use instead.

Every option of the Trainer and every callback of Lightning has a row; docs/lightning.md shows them. Refused is what
would change the batch, the learning rate or the images behind what a run prints, and what would be taken and then
ignored.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pydoc import locate
from typing import Any, NamedTuple

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.callbacks.timer import Interval


class Support(NamedTuple):
    """A line of a table.

    Attributes:
        name: Of an option of the Trainer, or of a callback.
        note: Where it works, what is to be known; where it is refused, why, and what to use instead.
        refuses: Whether a value of the option is refused, given all options of the Trainer. None of what always works.
            Of a callback, true.
        excepted: What is refused, in words, where other values work.
        beside: Another option, whose value makes this one refused.
    """

    name: str
    note: str = ""
    refuses: Callable[[Any, Mapping[str, Any]], bool] | None = None
    excepted: str = ""
    beside: str = ""

    @property
    def verdict(self) -> str:
        """In the words of the documentation."""
        if self.excepted:
            return f"works; {self.excepted} refused"
        return "works" if self.refuses is None else "refused"


def is_given(value: Any, options: Mapping[str, Any]) -> bool:
    """Whether an option has a value at all."""
    return value is not None and value is not False


def exceeds(limit: str) -> Callable[[Any, Mapping[str, Any]], bool]:
    """Whether a number is larger than that of another option, where -1 and None stand for no limit."""

    def refuses(value: Any, options: Mapping[str, Any]) -> bool:
        most = options.get(limit)
        return value is not None and most is not None and 0 <= most < value

    return refuses


def writes_checkpoints(plugins: Any, options: Mapping[str, Any]) -> bool:
    """Whether one of some plugins writes checkpoints."""
    return any(is_subclass(plugin, CheckpointIO) for plugin in as_list(plugins))


def is_time(value: Any, options: Mapping[str, Any]) -> bool:
    """Whether an interval is one by the clock."""
    return isinstance(value, (str, dict, timedelta))


def is_no_interval(value: Any, options: Mapping[str, Any]) -> bool:
    """Whether an interval between validations is one by the clock, or none at all."""
    return is_time(value, options) or (value is not None and value == 0)


def is_below(least: float) -> Callable[[Any, Mapping[str, Any]], bool]:
    """Whether a number is smaller than the least that makes sense."""
    return lambda value, options: value is not None and value < least


def beside_timer(value: Any, options: Mapping[str, Any]) -> bool:
    """Whether there is a callback that counts the time, beside which the option is ignored."""
    return value is not None and any(is_subclass(callback, Timer) for callback in as_list(options.get("callbacks")))


MORE_THAN_MOST = "the run ends before: make one of them fit"

TRAINER_OPTIONS = (
    Support("accelerator"),
    Support("strategy", "auto is DDP on several processes; DeepSpeed and FSDP2: docs/strategies.md"),
    Support("devices", "processes on a node; global_batch_size is divided among all of them"),
    Support("num_nodes"),
    Support("precision", "auto is bf16-mixed on GPUs that know it"),
    Support(
        "logger",
        "the run folder and the curves need the logs: leave it out; a logger given here is added to them",
        lambda value, options: value is False,
        "false",
    ),
    Support("callbacks", "see the next table; your own by class_path, also from the working directory"),
    Support("fast_dev_run", "no run folder, no checkpoint"),
    Support("max_epochs"),
    Support("min_epochs", MORE_THAN_MOST, exceeds("max_epochs"), "more than max_epochs", "max_epochs"),
    Support("max_steps", "optimiser steps"),
    Support("min_steps", MORE_THAN_MOST, exceeds("max_steps"), "more than the run has", "max_steps"),
    Support("max_time", "ignored beside the callback: leave one out", beside_timer, "beside Timer", "callbacks"),
    Support(
        "limit_train_batches",
        "of each epoch's order; a multiple of accumulate_grad_batches; said at the start",
        excepted="parts of a global batch",
    ),
    Support("limit_val_batches", "of global_batch_size images; 0 for no validation, and then no best checkpoint"),
    Support("limit_test_batches"),
    Support("limit_predict_batches"),
    Support(
        "overfit_batches",
        "the same batches in every epoch, images changed in the same way; else as limit_train_batches",
    ),
    Support(
        "val_check_interval",
        "give batches, 500, or a part of an epoch, 0.5: by the clock, ranks and restarts would validate at other steps",
        is_no_interval,
        "a time, or 0,",
    ),
    Support(
        "check_val_every_n_epoch",
        "at least 1: limit_val_batches=0 is for no validation",
        is_below(1),
        "less than 1",
    ),
    Support("num_sanity_val_steps", "0 unless it is given"),
    Support("log_every_n_steps", "10 unless it is given"),
    Support(
        "enable_checkpointing",
        "restarts need checkpoints: leave it out; checkpoint=null keeps no best one, checkpointing=null none between",
        lambda value, options: value is False,
        "false",
    ),
    Support("enable_progress_bar"),
    Support("enable_model_summary"),
    Support(
        "accumulate_grad_batches",
        "divides global_batch_size, which stays what it is: at least 1",
        is_below(1),
        "less than 1",
    ),
    Support(
        "gradient_clip_val", "of the gradient over the global batch; null clips nothing", is_below(0), "less than 0"
    ),
    Support("gradient_clip_algorithm"),
    Support("deterministic"),
    Support("benchmark", "on unless deterministic, on GPUs"),
    Support("inference_mode"),
    Support("use_distributed_sampler", "the data divide each batch themselves", excepted="true on several ranks"),
    Support(
        "profiler",
        "needs a TPU; simple and advanced print their reports, pytorch also writes a trace into the run folder",
        lambda value, options: value == "xla",
        "xla",
    ),
    Support("detect_anomaly"),
    Support(
        "barebones",
        "a run keeps logs and checkpoints: leave it out; what Lightning itself costs is in other_seconds",
        is_given,
    ),
    Support(
        "plugins",
        "checkpoints are written by syncbn, whole or not at all: leave it out",
        writes_checkpoints,
        "a CheckpointIO",
    ),
    Support("sync_batchnorm", "the layers are synchronised already: leave it out", is_given),
    Support("reload_dataloaders_every_n_epochs", "the images of each step stay the same"),
    Support("default_root_dir", "nothing is written there: use runs_folder and name", is_given),
    Support("enable_autolog_hparams"),
    Support(
        "model_registry", "checkpoints are not uploaded: leave it out, upload the files of the run folder", is_given
    ),
)
"""Every option of Lightning's Trainer."""


def always(value: Any, options: Mapping[str, Any]) -> bool:
    """Of a callback that is refused."""
    return True


FINETUNING = (
    "ranks would part ways, as DDP exchanges what was trainable at first: use syncbn.training.GradualUnfreezing,"
    " model.freeze or model.learning_rate_factors"
)

CALLBACKS = (
    Support("BackboneFinetuning", FINETUNING, always),
    Support("BaseFinetuning", FINETUNING, always),
    Support("BasePredictionWriter", "to derive from, for syncbn predict"),
    Support("BatchSizeFinder", "changes the batch: use global_batch_size", always),
    Support("Callback", "to derive from"),
    Support("Checkpoint", "to derive from"),
    Support("DeviceStatsMonitor", "needs psutil on a CPU"),
    Support(
        "EarlyStopping", "the reason is printed; of a metric that the run will not have, refused unless strict: false"
    ),
    Support(
        "EMAWeightAveraging", "averaged weights are validated, saved and tested; as syncbn.training.PolyakAveraging"
    ),
    Support(
        "GradientAccumulationScheduler",
        "changes the batch during training: use trainer.accumulate_grad_batches, one number for the run",
        always,
    ),
    Support("LambdaCallback", "functions by their import path"),
    Support("LearningRateFinder", "changes the learning rate: use model.learning_rate_per_32_images", always),
    Support("LearningRateMonitor"),
    Support("ModelCheckpoint", "beside the run's own (key checkpoint); not for files step=N.ckpt or last.ckpt"),
    Support(
        "ModelPruning", "convolutions that run as one read the weights before they are pruned; there is none", always
    ),
    Support("ModelSummary"),
    Support(
        "OnExceptionCheckpoint",
        "the next fit would go on from its file: use checkpointing and --resume, or checkpoint.save_on_exception",
        always,
    ),
    Support("ProgressBar", "to derive from"),
    Support("RichModelSummary"),
    Support("RichProgressBar"),
    Support(
        "SpikeDetection",
        "its state cannot be read back, for a test or a restart: a loss that is not finite ends every run without it",
        always,
    ),
    Support(
        "StochasticWeightAveraging",
        "changes the learning rate, adds an epoch: use syncbn.training.PolyakAveraging, then syncbn statistics",
        always,
    ),
    Support("ThroughputMonitor", "waits for the GPU in every step; images_per_second is logged anyhow"),
    Support("Timer", "as trainer.max_time"),
    Support("TQDMProgressBar"),
    Support("WeightAveraging", "the averaged weights are validated, saved and tested"),
)
"""Every callback of Lightning's, with those derived from it."""


def refuse_options(options: Mapping[str, Any], global_batch_size: int) -> None:
    """Refuse what a run of this trainer cannot have.

    Args:
        options: The Trainer's, as a config holds them.
        global_batch_size: Named in the message.

    Raises:
        ValueError: One is refused; the message names it, its value, the reason and what to use instead.
    """
    for row in TRAINER_OPTIONS:
        value = options.get(row.name)
        if row.refuses and row.name in options and row.refuses(value, options):
            beside = f" with trainer.{row.beside}={describe(options.get(row.beside))}" if row.beside else ""
            raise ValueError(f"trainer.{row.name}={describe(value)}{beside}: {row.note}")
    for callback in as_list(options.get("callbacks")):
        for row in CALLBACKS:
            if row.refuses and is_subclass(callback, getattr(lightning_callbacks, row.name)):
                what = f"{describe(callback)} with global_batch_size={global_batch_size}"
                raise ValueError(f"trainer.callbacks: {what}: {row.note}")


def make_writable(callbacks: Any) -> None:
    """Make configs of callbacks such that YAML holds them, in place: a `Timer` has an enumeration for its text."""
    for callback in as_list(callbacks):
        arguments = getattr(callback, "init_args", None)
        if is_subclass(callback, Timer) and arguments and isinstance(arguments.get("interval"), Interval):
            arguments["interval"] = arguments["interval"].value


def as_list(value: Any) -> Sequence[Any]:
    """The values of an option that takes one or several."""
    return [] if value is None else value if isinstance(value, (list, tuple)) else [value]


def is_subclass(spec: Any, kind: type) -> bool:
    """Whether what a config holds for an object, or the object itself, is of a class."""
    return issubclass(class_of(spec), kind)


def class_of(spec: Any) -> type:
    """The class that a config names by its class_path; of an object its own."""
    path = getattr(spec, "class_path", None)
    found = locate(path) if isinstance(path, str) else type(spec)
    return found if isinstance(found, type) else object


def describe(spec: Any) -> str:
    """What a config holds: objects as one would write them in Python, values as in YAML."""
    if isinstance(spec, (list, tuple)):
        return f"[{', '.join(map(describe, spec))}]"
    if getattr(spec, "class_path", None) is None:
        return str(spec) if isinstance(spec, str) else json.dumps(spec, default=str)
    arguments = dict(getattr(spec, "init_args", None) or {})
    given = ", ".join(f"{name}={value!r}" for name, value in arguments.items() if value is not None)
    return f"{class_of(spec).__name__}({given})"


def are_of_lightning(callbacks: Iterable[Callback]) -> bool:
    """Whether all of some callbacks are Lightning's or this package's, none the user's own."""
    return all(type(callback).__module__.partition(".")[0] in ("lightning", "syncbn") for callback in callbacks)


def markdown_tables() -> str:
    """The tables for the documentation."""
    return "\n\n".join(
        "\n".join(
            [f"| {title} | | |", "|---|---|---|", *(f"| `{row.name}` | {row.verdict} | {row.note} |" for row in rows)]
        )
        for title, rows in (("trainer.", TRAINER_OPTIONS), ("callback", CALLBACKS))
    )
