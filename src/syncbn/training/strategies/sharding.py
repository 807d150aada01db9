"""What strategies that divide weights or optimiser state among the ranks have in common."""

import atexit

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn

from syncbn.training.finetuning.unfreezing import GradualUnfreezing


def make_contiguous(module: nn.Module) -> None:
    """Give the parameters the plain memory layout, in place.

    Flat buffers are cut from it. Images keep theirs, which convolutions follow: channels-last goes on.
    """
    for parameter in module.parameters():  # contiguous() would leave the strides of 1x1 convolutions as they are
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def refuse_callbacks(trainer: Trainer, strategy: str) -> None:
    """Refuse callbacks that average weights or drop gradients where they are not to be found.

    Args:
        trainer: In a fit.
        strategy: For the message.

    Raises:
        ValueError: The trainer has one of them.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (WeightAveraging, GradualUnfreezing)):
            raise ValueError(
                f"{type(callback).__name__} does not work under {strategy}, which keeps weights and gradients in"
                " buffers of its own: leave trainer.strategy out, for DDP"
            )


def refuse_where_weights_are_divided(trainer: Trainer, strategy: str, remedy: str) -> None:
    """Refuse what uses parts of the network in other ways than a forward pass of the whole, which gathers weights.

    Args:
        trainer: In a fit.
        strategy: That divides the weights, for the message.
        remedy: For the message.

    Raises:
        ValueError: The model estimates statistics or trains an embedding.
    """
    options = trainer.lightning_module.hparams
    for name, refused in (
        ("batch_norm=estimate", options.get("batch_norm") == "estimate"),
        ("embedding_dimension", options.get("embedding_dimension") is not None),
    ):
        if refused:
            raise ValueError(f"model.{name} needs the weights whole, but {strategy} divides them: {remedy}")


def leave_at_exit() -> None:
    """Have the process leave the process group as it exits: without it some processes abort, after all is done."""
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
