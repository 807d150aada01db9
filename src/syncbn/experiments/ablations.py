"""What BatchNorm makes possible, and what it makes superfluous (sections 3.3, 3.4 and 4.2.1 of Ioffe & Szegedy 2015).

One config is trained again and again, each time with one thing changed: the learning rate with and without BatchNorm,
dropout, the weight of L2, the shuffling within shards.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from syncbn.data.datasets.formats import EMBEDDED, open_training_set
from syncbn.experiments.ablations_report import Outcome, write_report
from syncbn.experiments.recipe_runs import claimed_folder, train, validation_curve
from syncbn.training.command import expand_data_shorthand

RATE = "model.learning_rate_per_32_images"
WINDOW = "data.shuffle_window"
DEFAULT_WINDOW = 16
"""Of the DataModule."""
LEARNING_RATES = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
DROPOUT = 0.4
"""GoogLeNet's, which the paper's Inception and BN-Baseline have."""


@dataclass(frozen=True)
class Trial:
    """One change to the config.

    Attributes:
        section: Of the report.
        label: In the report.
        changes: Keys of the config with other values.
    """

    section: str
    label: str
    changes: dict[str, Any]


def ablations(
    output: Path = Path("runs/ablations"),
    recipe: Path = Path("configs/ablations.yaml"),
    learning_rates: list[float] = LEARNING_RATES,
    seeds: int = 1,
    sections: list[str] | None = None,
    options: list[str] = [],  # noqa: B006 (never changed)
) -> None:
    """Train one config with one thing changed at a time: learning rate, BatchNorm, dropout, L2, shuffling.

    Each training is a ``syncbn fit``. May be interrupted at any moment: the same command again keeps the trainings
    that are finished, and goes on with the present one from its newest checkpoint.

    Args:
        output: Folder for ablations.png, ablations.csv, ablations.md, and the runs.
        recipe: A config of `syncbn fit`: the data, the network and the budget of each training.
        learning_rates: For a batch of 32 images; each is tried with and without BatchNorm.
        seeds: How many: 0, 1 and so on decide the initial weights, the order of the images and the augmentation.
        sections: Which to run, of learning rate, dropout, L2 and, for data in shards, shuffling within shards. Without
            it, all.
        options: More of `syncbn fit`, for all trainings, as '["--data.root=SHARDS", "--trainer.devices=2"]'.

    Raises:
        ValueError: An argument is out of range, the recipe is missing, a training stopped with an error other than a
            loss that is not finite, or the output folder holds runs with other settings.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds} must be at least 1")
    if not learning_rates or min(learning_rates) <= 0:
        raise ValueError(f"learning_rates={learning_rates} must be positive numbers, at least one")
    options = expand_data_shorthand(options)
    configured = _read_config(recipe, options)
    images = open_training_set(configured.get("data.root", EMBEDDED))
    trials = of_sections(all_trials(configured, learning_rates, in_shards=images.layout is not None), sections)
    settings = {"config": json.loads(json.dumps(configured)), "options": options}
    outcomes: list[Outcome] = []
    with claimed_folder(output / "runs", settings) as lock:
        for seed in range(seeds):
            for trial in trials:
                name = run_name(trial, configured)
                print(f"{trial.section}, {trial.label}, seed {seed}: {name}", flush=True)
                words = [f"--config={recipe}", *options, f"--seed_everything={seed}"]
                words += [f"--{key}={value}" for key, value in trial.changes.items()]
                folder = train(output / "runs" / f"seed_{seed}", name, words, lock)
                outcomes.append(Outcome(trial.section, trial.label, trial.changes, seed, validation_curve(folder)))
                report = write_report(output, outcomes, settings["config"], len(images.classes))
    print(report)


def all_trials(configured: dict[str, Any], learning_rates: Sequence[float], in_shards: bool) -> list[Trial]:
    """The changes to try; the shuffling only of data in shards."""
    decay = float(configured.get("model.weight_decay", 1e-4))
    rates = [
        Trial("learning rate", f"{label}, {rate:g}", {"model.norm": norm, RATE: rate})
        for norm, label in (("none", "without BN"), ("batch", "with BN"))
        for rate in learning_rates
    ]
    dropout = [Trial("dropout", f"{p:.0%}", {"model.dropout": p}) for p in (0.0, DROPOUT)]
    weights = (("as configured", decay), ("a fifth", decay / 5), ("none", 0.0))
    l2 = [Trial("L2", f"{label} ({weight:g})", {"model.weight_decay": weight}) for label, weight in weights]
    windows = (("yes", configured.get(WINDOW) or DEFAULT_WINDOW), ("no", 0))
    shuffling = [Trial("shuffling within shards", label, {WINDOW: shards}) for label, shards in windows]
    return [*rates, *dropout, *l2, *(shuffling if in_shards else [])]


def of_sections(trials: list[Trial], sections: list[str] | None) -> list[Trial]:
    """Those of some sections; of all of them without any named.

    Raises:
        ValueError: There is no such section.
    """
    known = list(dict.fromkeys(trial.section for trial in trials))
    unknown = [section for section in sections or [] if section not in known]
    if unknown or sections == []:
        raise ValueError(f"sections={sections}: of these data and this recipe there are: {', '.join(known)}")
    return [trial for trial in trials if sections is None or trial.section in sections]


def run_name(trial: Trial, configured: dict[str, Any]) -> str:
    """Of the trial's run: what it changes. Trials that leave the config as it is share one run."""
    defaults = {"model.norm": "batch", "model.dropout": 0.0, WINDOW: DEFAULT_WINDOW}
    changes = {k: v for k, v in trial.changes.items() if v != configured.get(k, defaults.get(k))}
    return "_".join(f"{key.rpartition('.')[2]}={value}" for key, value in changes.items()) or "as_configured"


def _read_config(path: Path, options: Sequence[str]) -> dict[str, Any]:
    """The values of a config by their dotted names, those of options before those of the file."""
    if not path.is_file():
        raise ValueError(f"there is no {path}: --recipe takes a config of `syncbn fit`, as configs/ablations.yaml")
    values = _flatten(yaml.safe_load(path.read_text()))
    for option in options:
        key, separator, value = option.removeprefix("--").partition("=")
        if not (option.startswith("--") and separator):
            raise ValueError(f"options: {option!r} must have the form --key=value")
        values[key] = yaml.safe_load(value)
    return values


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
