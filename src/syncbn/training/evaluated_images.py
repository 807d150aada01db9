"""Which images the figures of an evaluation are of: they are called by these, not by the verb that asks for them."""

from collections.abc import Iterable

from lightning.pytorch import Trainer

from syncbn.data.datamodule import ImageDataModule
from syncbn.data.datasets.formats import Stage

KINDS: dict[Stage, str] = {"val": "validation", "test": "test"}
"""The stages of an evaluation, in words."""


def stage_of_test(trainer: Trainer) -> Stage:
    """What figures of ``Trainer.test`` are called: "val" where the data have no test images but those of validation."""
    return getattr(trainer.datamodule, "stage_of_test", "test")  # type: ignore[attr-defined]


def describe_images(trainer: Trainer, stage: Stage) -> str:
    """How many images the trainer's last figures of a stage are of, and which these are, in words."""
    count = f"{int(trainer.callback_metrics[f'{stage}_images']):,} images"
    sets = getattr(trainer.datamodule, "sets", None)  # type: ignore[attr-defined]
    if sets is None:
        return count
    remarks = [sets.origin(stage)] if sets.origin(stage) else []
    if stage == "val" and sets.test is None:
        remarks.append("there are no test images")
    if stage == "test" and sets.validation_from == "test" and trainer.global_step:
        remarks.append("this run was validated on them, too")
    return f"{count} ({'; '.join(remarks)})" if remarks else count


def announce_images(data: ImageDataModule, stage: Stage, trained_on: Iterable[int]) -> str:
    """What an evaluation begins with: which images it takes, and what is to be known of them, in words, one line.

    Args:
        data: Of which the images are.
        stage: By which the figures are called.
        trained_on: How many training images the checkpoints had.
    """
    sets = data.sets
    origin = sets.origin(stage)
    images = f"the {len(data.test_images if stage == 'test' else sets.validation):,} {KINDS[stage]} images"
    words = [f"{images} ({origin})" if origin else images]
    if stage == "val" and sets.test is None:
        words.append("there are no test images (fit --data.test_images N holds some out)")
    others = sorted({count for count in trained_on if count != data.training_images})
    if others and (sets.validation_from if stage == "val" else sets.test_from) == "train":
        words.append(
            f"trained on may be some of them: the checkpoint had {others[0]:,} training images, here they are"
            f" {data.training_images:,} (data.validation_images, data.test_images)"
        )
    return "; ".join(words)
