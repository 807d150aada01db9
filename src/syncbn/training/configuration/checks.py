"""What the words and configs of ``syncbn fit`` and its sisters may not say, found before anything is built."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from syncbn.data import Augmentation
from syncbn.models.weights.files import WHERE_FROM
from syncbn.training.checkpoints.files import read_without_tensors
from syncbn.training.configuration.lightning_support import as_list, class_of, is_subclass
from syncbn.training.finetuning.unfreezing import GradualUnfreezing

MAY_BE_OFF = ("checkpoint", "checkpointing", "watchdog")
"""Parts of a run that null leaves out."""

OTHER_NETWORK = (
    "the command trains Inception-BN, whose options are model.KEY (syncbn fit --help); train a network of your own in a"
    " LightningModule with syncbn.training.SyncBatchNormPlugin (docs/lightning.md), or in a loop (docs/loop.md)"
)

KEYWORDS = ("best", "last", "hpc", "registry")
"""What Lightning's ckpt_path may say instead of a file: of a fit of the same process, or of a store."""

LINKED = {"global_batch_size": "global_batch_size", "drop_last": "data.drop_last"}
"""Hyperparameters that come from another key, which Lightning puts above a checkpoint's."""


def values_of(option: str, words: Sequence[str]) -> list[str]:
    """What a command line says of an option, each time that it does."""
    following = [*words[1:], ""]
    return [
        value if separator else after
        for (name, separator, value), after in zip((word.partition("=") for word in words), following, strict=True)
        if name == option
    ]


def refuse_other_network(words: Sequence[str]) -> None:
    """Refuse ``--model my.Net``, as other commands that LightningCLI makes take it.

    Raises:
        ValueError: The words name a class of a model.
    """
    for option in ("--model", "--model.class_path"):
        for value in values_of(option, words):
            if not Path(value).is_file() and not value.startswith("{"):
                raise ValueError(f"{option} {value}: {OTHER_NETWORK}")


def split_off(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without ``--watchdog null`` and its like, which would be taken for a file; and what they leave out."""
    kept, off = list(words), []
    for name in MAY_BE_OFF:
        for form in ([f"--{name}=null"], [f"--{name}", "null"]):
            for place in reversed(range(len(kept))):
                if kept[place : place + len(form)] == form:
                    del kept[place : place + len(form)]
                    off.append(name)
    return kept, off


def refuse_nulls(parser: LightningArgumentParser, config: Namespace) -> None:
    """Refuse null for what is no Optional: jsonargparse takes it from YAML files.

    Args:
        parser: Of the verb.
        config: Of the verb.

    Raises:
        ValueError: A setting is null that may not be; the message names it.
    """
    if config.get("trainer") is None:
        raise ValueError("trainer=null: leave the key out for the defaults")
    try:
        parser.validate(config, skip_unset=False)
    except TypeError as error:
        raise ValueError(str(error)) from error
    for name, value in vars(config["trainer"]).items():
        refuse_nulls_within(f"trainer.{name}", value)
    for name in nulls_of(Augmentation, config["data"].get("augmentation"), "data.augmentation"):
        raise ValueError(f"{name}=null: leave the key out for the default")


def refuse_nulls_within(name: str, value: Any) -> None:
    """Refuse null among the arguments of objects that a config describes.

    Raises:
        ValueError: An argument is null that may not be.
    """
    for described in as_list(value):
        arguments = getattr(described, "init_args", None)
        if not arguments:
            continue
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(class_of(described), fail_untyped=False)
        try:
            parser.validate(arguments, skip_unset=False)
        except TypeError as error:
            raise ValueError(f"{name}: {described.class_path}: {error}") from error


def refuse_random_layers(config: Namespace) -> None:
    """Refuse to hold layers of a network that begins with random weights, where they would stay random.

    Args:
        config: Of a fit that begins anew.

    Raises:
        ValueError: No weights are given to a fit that freezes something; the message says what to do.
    """
    model = config["model"]
    callbacks = as_list(config["trainer"].get("callbacks"))
    held = [f"model.freeze={model['freeze']}"] if model["freeze"] else []
    held += [f"model.batch_norm={model['batch_norm']}"] if model["batch_norm"] != "train" else []
    held += ["GradualUnfreezing" for callback in callbacks if is_subclass(callback, GradualUnfreezing)]
    if held and model["weights"] is None and not config["ckpt_path"] and not config["resume"]:
        raise ValueError(
            f"{' and '.join(held)} without model.weights would hold layers that are random: {WHERE_FROM},"
            " but must train all of it (model.batch_norm=train, no model.freeze, no GradualUnfreezing)"
        )


def nulls_of(kind: Any, value: Any, name: str) -> Iterator[str]:
    """The fields of a dataclass, ``kind``, and of those in it, that are null in a config and may not be."""
    hints = get_type_hints(kind)
    for field, given in vars(value).items() if isinstance(value, Namespace) else ():
        kinds = get_args(hints[field]) or (hints[field],)
        if given is None and NoneType not in kinds:
            yield f"{name}.{field}"
        for inner in (kind for kind in kinds if is_dataclass(kind)):
            yield from nulls_of(inner, given, f"{name}.{field}")


def read_hyperparameters(path: str | None) -> Mapping[str, Any]:
    """The hyperparameters of a checkpoint; none where no checkpoint is given, or it is missing, as Lightning reports.

    Raises:
        ValueError: It is a word, a folder, or no checkpoint of a Trainer with tensors only.
    """
    if path in KEYWORDS:
        raise ValueError(
            f"--ckpt_path {path} means a checkpoint of a fit within the same process, and there is none: give the file,"
            " RUN_FOLDER/checkpoints/last.ckpt; or go on with a run by --resume RUN_FOLDER"
        )
    if path and Path(path).is_dir():
        raise ValueError(
            f"--ckpt_path {path} is a folder: a checkpoint of syncbn fit is one file, under any strategy"
            " (DeepSpeed's own folders hold a script zero_to_fp32.py, which makes a file for --model.weights)"
        )
    if not path or not Path(path).is_file():
        return {}
    try:
        checkpoint = read_without_tensors(path)
    except Exception as error:  # whatever unpickling junk may raise
        raise ValueError(f"--ckpt_path {path} is not a checkpoint of tensors only: {type(error).__name__}") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "pytorch-lightning_version"} <= checkpoint.keys():
        raise ValueError(
            f"--ckpt_path {path} holds weights, and is no checkpoint of a training that can be restored: give them by"
            " --model.weights (syncbn predict and export take them as they are)"
        )
    return checkpoint.get("hyper_parameters", {})


def refuse_dropped(
    parser: LightningArgumentParser, config: Namespace, words: Sequence[str], kept: Mapping[str, Any]
) -> None:
    """Refuse options of the network beside a checkpoint that has others: Lightning takes the checkpoint's.

    Of a fit those in config files count, too, and what else the learning rate that the checkpoint goes on with depends
    on. An evaluation may be given the config of another run.

    Args:
        parser: Of the verb.
        config: Of the verb, before the checkpoint's hyperparameters are put into it.
        words: Of the command line.
        kept: The checkpoint's hyperparameters.

    Raises:
        ValueError: An option would be dropped; the message names it and both values.
    """
    path, trains = config["ckpt_path"], "resume" in config
    if trains and config["resume"]:
        raise ValueError(f"--resume {config['resume']} goes on from the run's own checkpoint: leave --ckpt_path out")
    if any(value != "null" for value in values_of("--model.weights", words)):
        raise ValueError(f"--ckpt_path {path} brings its weights: leave --model.weights out, or --ckpt_path")
    said = {word.partition("=")[0].removeprefix("--model.").partition(".")[0] for word in words}
    for name, value in config["model"].as_dict().items():
        if name == "weights" or name not in kept or kept[name] == value:
            continue
        given = trains and (name in LINKED or value != parser.get_default(f"model.{name}"))
        if given or name in said:
            key = LINKED.get(name, f"model.{name}")
            remedy = f"; --model.weights {path} starts anew from its weights" if trains else ""
            raise ValueError(
                f"--ckpt_path {path} has {key}={kept[name]}, which cannot be made {value}: give that value, or leave it"
                f" out{remedy}"
            )
