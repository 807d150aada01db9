"""Fully sharded data parallelism (torch's FSDP2) as this trainer uses it."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities import apply_to_collection
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from syncbn.training.launch.attempts import join_attempt
from syncbn.training.strategies.ddp import TIMEOUT_SECONDS
from syncbn.training.strategies.sharding import (
    leave_at_exit,
    make_contiguous,
    refuse_callbacks,
    refuse_where_weights_are_divided,
)


class SynchronisedFSDP2Strategy(ModelParallelStrategy):
    """FSDP2 for networks whose BatchNorm is synchronised: weights, gradients and optimiser state are divided.

    Each part of the network (the stem, each Inception module, the classifier) is gathered when it is used. Lightning
    never calls a LayerSync here: the network must be built of synchronised layers, as `ImageClassifier`'s is. A
    checkpoint is the one file that DDP writes: it goes on under any strategy and on any number of ranks.

    Args:
        timeout_seconds: How long a rank waits for the others in a collective before it gives up.
        network: Attribute of the LightningModule that holds the network; dots go deeper. It is the part that is
            divided.

    Raises:
        ValueError: The module has no such attribute, or a fit asks for what cannot be (docs/strategies.md).
    """

    def __init__(self, timeout_seconds: float = TIMEOUT_SECONDS, network: str = "network") -> None:
        super().__init__(
            tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timedelta(seconds=timeout_seconds)
        )
        self.network_name = network

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The checkpoint holds the optimiser's state."""
        return True

    @property
    def gathers_weights(self) -> bool:
        """Whether every rank has to take part in each forward pass, also without images."""
        return isinstance(self._network, FSDPModule)

    @property
    def _network(self) -> nn.Module:
        module = self.lightning_module
        assert module is not None
        try:
            return module.get_submodule(self.network_name)
        except AttributeError as error:
            parts = [name for name, _ in module.named_children()]
            raise ValueError(
                f"SynchronisedFSDP2Strategy(network={self.network_name!r}): {type(module).__name__} has no such part; "
                f"name the one to divide, of {parts}"
            ) from error

    def setup_environment(self) -> None:
        """Join the process group; all ranks divide the data, none a layer."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        join_attempt(self, self._timeout)
        super().setup_environment()
        leave_at_exit()

    def setup(self, trainer: Trainer) -> None:
        """Divide the network among the ranks, in a fit; an evaluation after it finds it divided."""
        assert self.model is not None and self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        if trainer.state.fn == TrainerFn.FITTING:
            refuse_callbacks(trainer, "FSDP2")
            refuse_where_weights_are_divided(trainer, "FSDP2", "leave trainer.strategy out, for DDP")
            self._divide()
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        self.barrier()

    def _divide(self) -> None:
        network, mesh = self._network, self.device_mesh["data_parallel"]
        make_contiguous(network)
        for part in network.children():
            if next(part.parameters(), None) is not None:
                fully_shard(part, mesh=mesh)
        fully_shard(network, mesh=mesh)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Weights and buffers, whole, on the CPU. A collective in a fit."""
        assert self.lightning_module is not None
        return {name: _whole(value) for name, value in self.lightning_module.state_dict().items()}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read one file."""
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load whole weights into the network, divided or not."""
        assert self.lightning_module is not None
        if not self.gathers_weights:
            self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)
            return
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.lightning_module, dict(checkpoint["state_dict"]), options=options)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state_dict of the optimiser, whole, on the CPU. A collective."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        return apply_to_collection(optimizer.state_dict(), Tensor, _whole)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the optimiser's state from whole tensors."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                place: {key: _divided(value, parameters[place]) for key, value in values.items()}
                for place, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def _whole(value: Tensor) -> Tensor:
    tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return tensor.detach().cpu()


def _divided(value: Any, like: Tensor) -> Any:
    """A whole tensor of a parameter's shape, divided as the parameter is; anything else as it is."""
    if not isinstance(value, Tensor) or not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device, torch.float32), like.device_mesh, like.placements)
