"""Figure 2 and the table beside it: the five models of section 4.2.2 of Ioffe & Szegedy 2015, one after another."""

from pathlib import Path
from typing import Any

import yaml

from syncbn.data.datasets.formats import open_training_set
from syncbn.experiments.figure2_models import MODELS, NEGATIVES, Model
from syncbn.experiments.figure2_report import Result, write_report
from syncbn.experiments.recipe_runs import claimed_folder, seconds_trained, train, validation_curve
from syncbn.experiments.scale import Scale
from syncbn.training.checkpoints.resuming import flatten


def figure2(
    data: str,
    output: Path = Path("runs/figure2"),
    configs: Path = Path("configs/imagenet"),
    global_batch_size: int | None = None,
    images: int | None = None,
    evaluate_every: int | None = None,
    image_size: int | None = None,
    width_multiplier: float | None = None,
    learning_rate: float | None = None,
    decay_every: int | None = None,
    seeds: int = 1,
    models: list[str] | None = None,
    options: list[str] = [],  # noqa: B006 (never changed)
) -> None:
    """Train the five models of the paper's Figure 2; draw accuracy against steps; count the steps to match Inception.

    Each training is a ``syncbn fit`` with the model's own config. May be interrupted at any moment: the same command
    again keeps the models that are finished, and goes on with the present one from its newest checkpoint.

    Args:
        data: Any data of `syncbn fit`, in shards.
        output: Folder for figure2.png, figure2.csv (the curves), table.csv, figure2.md, and the runs.
        configs: Folder with the five configs.
        global_batch_size: Images of a step, instead of the configs'; the learning rates scale with it.
        images: That each model is trained on, counted again in every epoch. Without it, what its config says.
        evaluate_every: Images from one evaluation to the next, no more than ``images``. Without it, an epoch.
        image_size: In pixels, instead of the configs'.
        width_multiplier: On all channel counts, instead of the configs'.
        learning_rate: Of Inception, for a batch of 32 images; the other models keep their ratio to it.
        decay_every: Of Inception, in images; the other models keep their ratio to it.
        seeds: How many: 0, 1 and so on decide the initial weights, the order of the images and the augmentation.
        models: Which to train, inception first. Without it, the five, and what fails without BN: inception_x5,
            Inception at 5 times its rate, and inception_sigmoid.
        options: More of `syncbn fit`, for all models, as '["--trainer.devices=2"]'.

    Raises:
        ValueError: An argument is out of range, a config is missing, a training stopped with an error, it would end
            before its first evaluation, or the output folder holds runs with other settings or of other configs.
    """
    _check(global_batch_size=global_batch_size, images=images, evaluate_every=evaluate_every, seeds=seeds)
    chosen = _choose(models)
    # All of them: which models are chosen may change from one command to the next, the configs may not.
    recipes = {model.recipe: _read_recipe(configs / f"{model.recipe}.yaml") for model in (*MODELS, *NEGATIVES)}
    batch_size = global_batch_size or recipes["inception"]["global_batch_size"]
    common = [f"--data.root={data}", f"--global_batch_size={batch_size}"]
    common += _size_options(image_size, width_multiplier) + _length_options(images, evaluate_every, batch_size)
    training_set = open_training_set(data)
    _check_evaluation(images, evaluate_every, batch_size, len(training_set))
    schedule = {"learning_rate_per_32_images": learning_rate, "decay_every": decay_every}
    settings: dict[str, Any] = {"options": [*common, *options], **schedule}
    scale = _scale(recipes["inception"], settings["options"], len(training_set.classes), batch_size)
    results: list[Result] = []
    with claimed_folder(output / "runs", settings | _in_full(recipes)) as lock:
        for seed in range(seeds):
            for model in chosen:
                own = [f"--config={configs / model.recipe}.yaml", f"--seed_everything={seed}", *settings["options"]]
                own += [*_schedule_options(model, recipes, schedule), *model.options]
                print(f"{model.label}, seed {seed}: {output / 'runs' / f'seed_{seed}' / model.name}", flush=True)
                folder = train(output / "runs" / f"seed_{seed}", model.name, own, lock)
                results.append(Result(model, seed, validation_curve(folder), seconds_trained(folder)))
                report = write_report(output, results, batch_size, settings, scale)  # each time: a run may take weeks
    print(report)


def _check(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def _check_evaluation(images: int | None, evaluate_every: int | None, batch_size: int, epoch: int) -> None:
    """Refuse a training that ends before its first evaluation."""
    if images is None:
        return
    steps, until_first = -(-images // batch_size), -(-evaluate_every // batch_size) if evaluate_every else None
    if until_first is None:
        until_first = max(1, epoch // batch_size)
    if steps < until_first:
        first = f"evaluate_every={evaluate_every}" if evaluate_every else f"an epoch of {epoch} images"
        raise ValueError(
            f"images={images} ({steps} steps) end before the first evaluation, after {first} ({until_first} steps):"
            " give a smaller --evaluate_every"
        )


def _in_full(recipes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All values of the configs, by names as bn_x5.model.dropout."""
    return {".".join(path): value for name, recipe in recipes.items() for path, value in flatten(recipe, (name,))}


def _scale(recipe: dict[str, Any], options: list[str], classes: int, batch_size: int) -> Scale:
    """By a config, and the options that go before it."""
    values = {".".join(path): value for path, value in flatten(recipe, ())}
    for option in options:
        key, separator, value = option.removeprefix("--").partition("=")
        if separator:
            values[key] = yaml.safe_load(value)
    width, size = float(values.get("model.width_multiplier", 1.0)), int(values["data.image_size"])
    steps = int(values.get("trainer.max_steps", -1))
    return Scale(width, size, classes, steps if steps > 0 else None, batch_size)


def _choose(names: list[str] | None) -> list[Model]:
    known = {model.name: model for model in (*MODELS, *NEGATIVES)}
    names = list(known) if names is None else names
    unknown = [name for name in names if name not in known]
    if unknown or names[:1] != [MODELS[0].name]:
        raise ValueError(
            f"models={names}: the first must be {MODELS[0].name}, which the others are compared with,"
            f" and the rest of {', '.join(list(known)[1:])}"
        )
    return [known[name] for name in names]


def _read_recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"there is no {path}: --configs takes the folder of the five configs, configs/imagenet")
    return yaml.safe_load(path.read_text())


def _size_options(image_size: int | None, width_multiplier: float | None) -> list[str]:
    options = []
    if image_size is not None:
        options += [f"--data.image_size={image_size}", f"--data.resize={round(image_size * 256 / 224)}"]
    if width_multiplier is not None:
        options.append(f"--model.width_multiplier={width_multiplier}")
    return options


def _length_options(images: int | None, evaluate_every: int | None, batch_size: int) -> list[str]:
    options = []
    if images is not None:
        options += ["--trainer.max_epochs=-1", f"--trainer.max_steps={-(-images // batch_size)}"]
    if evaluate_every is not None:
        steps = -(-evaluate_every // batch_size)
        options += [f"--trainer.val_check_interval={steps}", "--trainer.check_val_every_n_epoch=null"]
    return options


def _schedule_options(model: Model, recipes: dict[str, dict[str, Any]], schedule: dict[str, float | None]) -> list[str]:
    """The model's own learning rate and decay, scaled as Inception's are."""
    values = {}
    for name, wanted in schedule.items():
        reference, own = recipes["inception"]["model"][name], recipes[model.recipe]["model"][name]
        values[name] = own if wanted is None else own * wanted / reference
    values["learning_rate_per_32_images"] *= model.rate_factor
    return [f"--model.{name}={value:.10g}" for name, value in values.items()]
