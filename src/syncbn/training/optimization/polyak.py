"""Polyak averaging of the weights, as Lightning has it."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn


class PolyakAveraging(EMAWeightAveraging):
    """Exponential moving average of the weights: validated, tested and saved in their place.

    Source: section 4.2 of the paper follows GoogLeNet, which used Polyak averaging. The checkpoint's
    ``state_dict`` holds the average, ``current_model_state`` what training goes on with. The running
    statistics are averaged along with the weights.

    Args:
        decay: Weight of the average so far in each update, in 0..1.
        start_step: The first optimiser step, from 0, that is averaged.
    """

    def __init__(self, decay: float = 0.999, start_step: int = 0) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay={decay} of the Polyak averaging must lie in 0..1")
        super().__init__(decay=decay, update_starting_at_step=start_step)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse weights in which small steps of an average get lost.

        Raises:
            ValueError: ``precision`` keeps the weights in half precision.
        """
        if stage == "fit" and trainer.precision in ("bf16-true", "16-true"):
            raise ValueError(
                f"PolyakAveraging cannot average weights of precision={trainer.precision}, which would lose its steps:"
                f" take precision={trainer.precision.replace('true', 'mixed')}, or leave the callback out"
            )
        super().setup(trainer, pl_module, stage)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore both sets of weights to go on training; otherwise leave the average in the model.

        Lightning's own, called by ``trainer.test(ckpt_path=...)`` after a fit, would put the weights that
        were not averaged back into the model, and test those.
        """
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
