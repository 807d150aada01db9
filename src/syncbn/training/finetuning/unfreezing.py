"""Gradual unfreezing: the last layers first, the others from later epochs on.

Not Lightning's BaseFinetuning, which sets ``requires_grad`` in the middle of a fit: DistributedDataParallel averages
the gradients of the parameters that were trainable when it was built, so that ranks part ways (seen in Lightning 2.6).
"""

from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.optim import Optimizer

from syncbn.training.finetuning.selection import select_parameters


class GradualUnfreezing(Callback):
    """Holds parameters where they are until an epoch of theirs.

    A parameter that is held has its gradient dropped before the optimiser's step: neither weight decay nor
    momentum touches it, on any number of ranks. The backward pass costs what it costs without holding. Statistics
    of BatchNorm follow the model's ``batch_norm``, whatever is held.

    Args:
        schedule: From an epoch (from 1; the first epoch is 0) to the patterns of what is trained from then on, see
            `syncbn.training.finetuning.selection`. What no pattern matches is trained from the start.

    Raises:
        ValueError: An epoch is not positive; in a fit, a pattern matches nothing, or what is frozen for good or held
            until another epoch, or nothing would be trained in epoch 0.
    """

    def __init__(self, schedule: dict[int, list[str]]) -> None:
        if not schedule or min(schedule) < 1:
            raise ValueError(f"GradualUnfreezing: schedule={schedule} must name epochs from 1 on")
        self.schedule = schedule
        self._held: list[tuple[int, nn.Parameter]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the parameters."""
        if stage != "fit":
            return
        network = pl_module.network
        assert isinstance(network, nn.Module)
        epoch_of: dict[str, int] = {}
        for epoch, patterns in self.schedule.items():
            for name in trainable_names(network, patterns):
                if name in epoch_of:
                    raise ValueError(f"GradualUnfreezing: {name} is held until epochs {epoch_of[name]} and {epoch}")
                epoch_of[name] = epoch
        parameters = dict(network.named_parameters(remove_duplicate=False))
        if not any(p.requires_grad for name, p in parameters.items() if name not in epoch_of):
            raise ValueError(f"GradualUnfreezing: schedule={self.schedule} leaves nothing to train in epoch 0")
        self._held = [(epoch, parameters[name]) for name, epoch in epoch_of.items()]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Drop the gradients of what is held."""
        for epoch, parameter in self._held:
            if trainer.current_epoch < epoch:
                parameter.grad = None


def trainable_names(network: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the parameters that patterns mean and that are not frozen for good.

    Raises:
        ValueError: A pattern matches nothing, or nothing else than what is frozen.
    """
    option = "GradualUnfreezing.schedule"
    for pattern in patterns:
        if not any(p.requires_grad for p in select_parameters(network, [pattern], option).values()):
            raise ValueError(
                f"{option}: all that {pattern!r} matches is frozen for good by model.freeze or model.batch_norm:"
                " leave it out of one of them"
            )
    return [name for name, p in select_parameters(network, patterns, option).items() if p.requires_grad]
