"""The recipes of configs/imagenet: what differs between them, and that each of them trains."""

import csv
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from shard_cases import make_shards
from syncbn.cli import main

IMAGENET = Path(__file__).parents[1] / "configs" / "imagenet"
RECIPES = sorted(IMAGENET.rglob("*.yaml"))
DATA = Path(os.environ.get("SYNCBN_TEST_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]

DECAY = "trainer.callbacks.0.init_args.decay"
CHANGES = {  # section 4.2.1, from BN-Baseline to BN-x5
    "model.learning_rate_per_32_images": (0.0015, 0.0075),
    "model.dropout": (0.4, 0.0),
    "model.weight_decay": (2e-4, 4e-5),
    "model.decay_every": (10_249_336, 1_708_223),
    "model.local_response_norm": (True, False),
    "data.shuffle_window": (0, 16),  # shards whose samples are shuffled: none but the shards themselves
    "data.augmentation.photometric.brightness": (0.5, 0.2),
    "data.augmentation.photometric.contrast": (0.5, 0.2),
    "data.augmentation.photometric.saturation": (0.5, 0.2),
    "data.augmentation.photometric.lighting": (0.1, 0.05),
    "trainer.max_epochs": (775, 150),  # the length, which the paper does not fix
}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings and lists, by their dotted names."""
    if not isinstance(value, (dict, list)):
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {name: leaf for key, part in items for name, leaf in flat(part, f"{prefix}.{key}".lstrip(".")).items()}


def differences(first: str, second: str) -> dict[str, tuple[Any, Any]]:
    """Keys with other values in two recipes, without their names."""
    a, b = (flat(yaml.safe_load((IMAGENET / f"{name}.yaml").read_text())) for name in (first, second))
    return {key: (a.get(key), b.get(key)) for key in (a.keys() | b.keys()) - {"name"} if a.get(key) != b.get(key)}


def test_bn_baseline_changes_the_normalisation_and_nothing_else():
    assert differences("inception", "bn_baseline") == {"model.norm": ("none", "batch")}


def test_bn_x5_changes_what_section_421_changes_and_nothing_else():
    assert differences("bn_baseline", "bn_x5") == CHANGES


def test_learning_rates_and_decays_are_in_the_papers_ratios():
    models = {path.stem: yaml.safe_load(path.read_text())["model"] for path in IMAGENET.glob("*.yaml")}
    reference = models["inception"]
    ratios = {"inception": 1, "bn_baseline": 1, "bn_x5": 5, "bn_x30": 30, "bn_x5_sigmoid": 5, "bn_x5_large_batch": 5}
    for name, model in models.items():
        rate = model["learning_rate_per_32_images"] / reference["learning_rate_per_32_images"]
        assert rate == pytest.approx(ratios[name]), name
    assert reference["decay_every"] == 8 * 1_281_167  # epochs of ImageNet
    assert models["bn_x5"]["decay_every"] == round(reference["decay_every"] / 6)
    assert models["bn_x5"]["weight_decay"] == pytest.approx(reference["weight_decay"] / 5)


def test_the_other_two_change_one_thing():
    assert differences("bn_x5", "bn_x30") == {"model.learning_rate_per_32_images": (0.0075, 0.045)}
    assert differences("bn_x5", "bn_x5_sigmoid") == {"model.activation": ("relu", "sigmoid")}


def test_the_large_batch_changes_what_its_header_says():
    assert differences("bn_x5", "bn_x5_large_batch") == {
        "global_batch_size": (32, 1024),
        "model.warmup": (None, 6.4e6),
        "model.normalization_batch_size": (None, 128),
        "trainer.devices": ("auto", 8),
        "trainer.precision": (None, "bf16-mixed"),
        DECAY: (0.9999, 0.997),
    }


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_expected_time_is_that_of_the_images(recipe):
    """At 1,000 images a second."""
    text = recipe.read_text()
    images = yaml.safe_load(text)["trainer"]["max_epochs"] * 1_281_167
    assert f"# Expected time: {images / 1e6:.0f} million images, so {images / 1000 / 3600:.0f} hours on" in text


def test_members_of_the_ensemble_change_what_section_423_changes():
    found = [differences("bn_x30", f"ensemble/member_{number}") for number in range(1, 7)]
    assert len({tuple(sorted(change.items())) for change in found}) == 6
    for change in found:
        assert change.pop("seed_everything")[0] == 0
        assert change and change.keys() <= {"model.init_scale", "model.dropout", "model.per_activation_head"}
        assert change.get("model.dropout", (0.0, 0.05))[1] in (0.05, 0.1)
        assert change.get("model.init_scale", (None, 1.5))[1] > 1
        assert change.get("model.per_activation_head", (None, 224))[1] == 224


def test_the_learning_rate_falls_by_images_at_any_batch_size():
    from syncbn.training import ImageClassifier

    model = yaml.safe_load((IMAGENET / "bn_x30.yaml").read_text())["model"]
    for batch_size in (32, 1024):
        classifier = ImageClassifier(batch_size, 10, 3, 1_281_167, **(model | {"width_multiplier": 0.125}))
        assert classifier.learning_rate_factor(1_708_223) == pytest.approx(0.96)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """The mini ImageNet, or noise where it is not there."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    archives = DATA / "ilsvrc2012-mini"
    if archives.is_dir():
        main(["prepare", "imagenet", str(archives), str(folder), "--workers=1", "--shard_megabytes=4"])
        return folder
    return make_shards(folder, train=(40, 40))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
@pytest.mark.usefixtures("own_folder")
def test_every_recipe_takes_two_steps(recipe, shards, capsys):
    words = ["--data", str(shards), "--data.image_size=32", "--data.resize=36", "--data.num_workers=0"]
    words += ["--global_batch_size=16", "--model.width_multiplier=0.125", "--trainer.devices=1"]
    words += ["--trainer.accelerator=cpu", "--trainer.max_steps=2", "--trainer.limit_val_batches=1"]
    words += ["--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false"]
    options = yaml.safe_load(recipe.read_text())["model"]
    if "per_activation_head" in options:
        words.append("--model.per_activation_head=32")
    if options.get("normalization_batch_size"):
        words.append("--model.normalization_batch_size=16")
    main(["fit", "--config", str(recipe), *words, "--test_after_fit=false"])
    folder = Path(capsys.readouterr().out.strip().splitlines()[-1])
    with (folder / "metrics.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [int(row["step"]) for row in rows if row["train_loss"]] == [0, 1]
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2 and "current_model_state" in checkpoint  # Polyak averaging is on
    resolved = yaml.safe_load((folder / "config.yaml").read_text())["model"]
    for name in options.keys() - {"per_activation_head", "normalization_batch_size"}:
        assert resolved[name] == options[name], name


def test_the_evaluation_in_the_headers_resolves(tmp_path, monkeypatch):
    """All of the command but the checkpoints and the validation itself."""
    from syncbn.training.command import SyncBNCLI

    commands = set()
    for recipe in IMAGENET.glob("ensemble/*.yaml"):
        header = recipe.read_text().replace("\\\n#", " ")
        commands.add(re.search(r"^# +syncbn (validate .*)$", header, re.MULTILINE)[1])
    assert len(commands) == 1
    validated = []
    monkeypatch.chdir(IMAGENET.parents[1])
    monkeypatch.setattr("syncbn.training.command.load_ensemble", lambda paths, like, by_name: like)
    monkeypatch.setattr(SyncBNCLI, "_run_subcommand", lambda cli, verb: validated.append(cli.datamodule))
    shards = make_shards(tmp_path / "shards", train=(5,))
    words = shlex.split(commands.pop().replace("SHARDS", str(shards)))
    main([*words, "--trainer.accelerator=cpu", "--trainer.devices=1", "--model.width_multiplier=0.125"])
    assert [(data.crops.count, data.crops.resize) for data in validated] == [(144, 256)]
