"""Stops a training whose loss or statistics are no numbers any more, before they reach a checkpoint."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.collectives.world import all_ranks, gather_objects
from syncbn.models.observation import Look, observe_outputs


class Observation(NamedTuple):
    """What is kept of a batch until the next look at it.

    Attributes:
        step: Optimiser step, from 0.
        learning_rate: In that step.
        values: The loss, then one number for each watched layer, on the device, shape (1 + layers,).
    """

    step: int
    learning_rate: float
    values: Tensor


class Fault(NamedTuple):
    """The first thing that is not finite; faults are in the order in which they come about.

    Attributes:
        step: Optimiser step, from 0.
        layer: Place of the layer in the network; the number of layers where all are finite.
        message: For the user.
    """

    step: int
    layer: int
    message: str


class StopAtNonFinite(Callback):
    """Ends training, on all ranks, when the loss or a layer is not finite, and says where that began.

    Looked at are the running statistics of BatchNorm layers or, where the network has none, the outputs of its layers
    with weights. The numbers are gathered on the device in every step, and read only every ``every_n_steps``, at the
    end of an epoch and before a checkpoint is written: what is saved is finite, and so the last good checkpoint stays.

    Args:
        every_n_steps: Batches between two looks, each of which waits for the device.

    Raises:
        ValueError: ``every_n_steps`` is less than 1.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"StopAtNonFinite: every_n_steps={every_n_steps} must be at least 1")
        self.every_n_steps = every_n_steps
        self._observations: list[Observation] = []
        self._step, self._learning_rate = 0, 0.0
        self._names: list[str] = []
        self._buffers: list[Tensor] = []
        self._outputs: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the layers to watch."""
        self._observations.clear()
        norms = _tracking_norms(pl_module)
        if norms:
            self._names = list(norms)
            self._buffers = [b for norm in norms.values() for b in (norm.running_mean, norm.running_var)]  # type: ignore[misc]
            return
        for name, module in pl_module.named_modules():
            if next(module.children(), None) is None and next(module.parameters(), None) is not None:
                self._names.append(name)
                self._handles += observe_outputs(module, self._output_keeper(name, module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the step and its learning rate, which the schedule changes before the batch ends."""
        self._step = trainer.global_step
        self._learning_rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the numbers of the batch; look at those kept so far every so many batches."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if loss is None:  # a batch that the module skipped
            return
        values = torch.cat([loss.detach().float().reshape(1), self._layer_values(loss.device)])
        self._observations.append(Observation(self._step, self._learning_rate, values))
        if len(self._observations) >= self.every_n_steps:
            self._look(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look before the time for a validation is spent."""
        self._look(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look before the checkpoints of the epoch, which come after all other callbacks."""
        self._look(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look before any other checkpoint, and at the weights in it: the last step may have spoilt them."""
        self._look(trainer)
        weights = [(k, v) for k, v in checkpoint["state_dict"].items() if v.is_floating_point()]
        broken = next((name for name, value in weights if not value.isfinite().all()), None)
        message = (
            f"{broken} is not finite after step {trainer.global_step - 1} at the learning rate"
            f" {self._learning_rate:g}, though the loss was"
        )
        self._stop_if_any(trainer, Fault(trainer.global_step, 0, message) if broken else None)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave no hooks behind."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hooks behind."""
        self._detach()

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._names, self._buffers, self._handles = [], [], []
        self._outputs.clear()
        self._observations.clear()

    def _output_keeper(self, name: str, module: nn.Module) -> Look:
        def keep(output: Tensor) -> None:
            if module.training:
                # A sum holds every NaN and infinity of its terms, in one pass.
                self._outputs[name] = output.sum(dtype=torch.float32)

        return keep

    def _layer_values(self, device: torch.device) -> Tensor:
        """A number for each watched layer, finite where the layer is: float32, shape (layers,)."""
        if self._buffers:
            largest = torch.stack(torch._foreach_norm(self._buffers, float("inf")))
            return largest.view(-1, 2).sum(1).to(device, torch.float32)
        missing = torch.zeros((), device=device)  # of layers that are not called
        return torch.stack([self._outputs.get(name, missing) for name in self._names])

    def _look(self, trainer: Trainer) -> None:
        """Wait for the numbers kept so far, and stop all ranks if one of them is not finite on any."""
        observations, self._observations = self._observations, []
        fault = None
        if observations:
            finite = torch.stack([observation.values for observation in observations]).isfinite().cpu()
            if not finite.all():
                first = int((~finite.all(1)).nonzero()[0])
                fault = self._fault(observations[first], finite[first, 1:])
        self._stop_if_any(trainer, fault)

    def _fault(self, observation: Observation, finite: Tensor) -> Fault:
        step, learning_rate, values = observation
        loss = float(values[0])
        subject = "the loss" if loss != loss or abs(loss) == float("inf") else "a layer"
        message = f"{subject} is not finite in step {step} at the learning rate {learning_rate:g}"
        what = "running statistics" if self._buffers else "output"
        verb = "are" if self._buffers else "is"
        if finite.all():
            return Fault(step, len(self._names), f"{message}; the {what} of all layers {verb} finite")
        layer = int((~finite).nonzero()[0])
        message += f"; the first layer whose {what} {verb} not finite: {self._names[layer]}"
        return Fault(step, layer, message)

    def _stop_if_any(self, trainer: Trainer, fault: Fault | None) -> None:
        """Raise the first fault of all ranks on all of them, so that none waits for another.

        Raises:
            ValueError: There is a fault.
        """
        if all_ranks(fault is None, trainer.strategy.root_device):
            return
        fault = min(f for f in gather_objects(fault) if f is not None)
        good = _newest_checkpoint(trainer)
        kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        raise ValueError(f"{fault.message}; {kept}; lower the learning rate")


def _tracking_norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers with running statistics, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    }


def _newest_checkpoint(trainer: Trainer) -> Path | None:
    """What this run saved last, or went on from. Not best_model_path, which Lightning sets before it saves."""
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    paths = [Path(callback._last_checkpoint_saved) for callback in callbacks if callback._last_checkpoint_saved]
    begun_from = Path(trainer.ckpt_path) if trainer.ckpt_path else None
    return max((path for path in paths if path.is_file()), key=lambda path: path.stat().st_mtime, default=begun_from)
