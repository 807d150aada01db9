"""DeepSpeed's ZeRO as this trainer uses it, on GPUs and, for tests and small networks, on CPUs."""

import os
import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ParallelStrategy
from lightning.pytorch.strategies.deepspeed import remove_module_hooks
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from syncbn.training.launch.attempts import join_attempt
from syncbn.training.strategies import deepspeed_state
from syncbn.training.strategies.ddp import TIMEOUT_SECONDS
from syncbn.training.strategies.sharding import (
    leave_at_exit,
    make_contiguous,
    refuse_callbacks,
    refuse_where_weights_are_divided,
)

SHARED_MEMORY_OP = "deepspeed_shm_comm"
"""DeepSpeed's collectives among the CPUs of one machine. Compiling them takes a minute; gloo does without."""

if (
    not torch.cuda.is_available()
):  # else DeepSpeed warns as it is imported, which jsonargparse does for Lightning's hints
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


class SynchronisedDeepSpeedStrategy(DeepSpeedStrategy):
    """ZeRO for networks whose BatchNorm is synchronised.

    Lightning never calls a LayerSync here: the network must be built of synchronised layers, as `ImageClassifier`'s is.
    A checkpoint is the one file that DDP writes, with whole tensors in float32: it goes on under any strategy and on
    any number of ranks, and `test` and `predict` take it as it is. Evaluation is DDP's, without ZeRO.

    Args:
        stage: What is divided among the ranks: 0 nothing; 1 the optimiser's state; 2 that and the gradients; 3 those
            and the weights.
        timeout_seconds: How long a rank waits for the others in a collective before it gives up.
        **options: Of Lightning's ``DeepSpeedStrategy``.

    Raises:
        ValueError: ``stage`` is no stage; in a fit, something is asked for that cannot be (docs/strategies.md).
    """

    def __init__(
        self, stage: Literal[0, 1, 2, 3] = 2, timeout_seconds: float = TIMEOUT_SECONDS, **options: Any
    ) -> None:
        if stage not in (0, 1, 2, 3):
            raise ValueError(f"stage={stage} of ZeRO must be 0, 1, 2 or 3")
        if options.get("logging_batch_size_per_gpu", "auto") == "auto":  # Lightning would ask the loader, in vain
            options["logging_batch_size_per_gpu"] = 1  # in DeepSpeed's log, nowhere else
        super().__init__(stage=stage, timeout=timedelta(seconds=timeout_seconds), **options)
        assert isinstance(self.config, dict)
        self.stage = stage
        self._groups: list[list[nn.Parameter]] = []

    @property
    def root_device(self) -> torch.device:
        """This rank's device, with the index that DeepSpeed asks for."""
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights are loaded before ZeRO divides them."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The checkpoint holds the optimiser's state."""
        return True

    @property
    def gathers_weights(self) -> bool:
        """Whether every rank has to take part in each forward pass, also without images."""
        return self.zero_stage_3 and self.model is not self.lightning_module

    @property
    def _network(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    # ---- start and end -------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Join the process group; unlike Lightning's, on CPUs too.

        Raises:
            ValueError: The accelerator is neither a CPU nor an NVIDIA GPU, or DeepSpeed has chosen another.
        """
        if not isinstance(self.accelerator, (CPUAccelerator, CUDAAccelerator)):
            name = type(self.accelerator).__name__
            raise ValueError(f"DeepSpeed runs on trainer.accelerator=gpu or cpu here, not on {name}")
        from deepspeed.accelerator import get_accelerator

        chosen, device = get_accelerator().device_name(), self.root_device.type
        if not chosen.startswith(device):
            raise ValueError(
                f"trainer.accelerator is {device}, but DeepSpeed has chosen {chosen} on this machine: set the"
                f" environment variable DS_ACCELERATOR={device}"
            )
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """Lightning's process group, which DeepSpeed then finds."""
        import deepspeed.ops

        # DeepSpeed calls collectives by names that torch deprecates, and would say so at every step
        warnings.filterwarnings(
            "ignore", r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated"
        )
        join_attempt(self, self._timeout)
        DDPStrategy.setup_distributed(self)
        leave_at_exit()
        deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OP] = False
        self._init_deepspeed_distributed()

    def setup(self, trainer: Trainer) -> None:
        """Hand the network to DeepSpeed in a fit; otherwise leave it whole."""
        assert self.model is not None and self.accelerator is not None
        if trainer.state.fn == TrainerFn.FITTING:
            refuse_callbacks(trainer, "DeepSpeed")
            if self.stage == 3:
                refuse_where_weights_are_divided(trainer, "ZeRO 3", "take stage 2")
            make_contiguous(self.model)
            super().setup(trainer)
            return
        self.accelerator.setup(trainer)
        self.model.to(self.root_device, self.precision_plugin._desired_dtype)  # type: ignore[attr-defined]
        self.setup_precision_plugin()
        self.barrier()

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> tuple[Any, Optimizer]:
        assert optimizer is not None
        self._groups = deepspeed_state.parameters_of_groups(optimizer)
        engine, wrapped = super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
        if self._is_unfused(wrapped):  # it made a step on gradients of zero, in which the weight decay counted
            wrapped.optimizer.state.clear()  # type: ignore[attr-defined]
            wrapped.refresh_fp32_params()  # type: ignore[attr-defined]
        return engine, wrapped

    def teardown(self) -> None:
        """Take the network back from DeepSpeed."""
        module, engine = self._network, self.model
        if isinstance(engine, nn.Module) and engine is not module and not module.trainer.interrupted:
            if self.stage == 3:
                deepspeed_state.make_whole(module)
            engine.destroy()  # type: ignore[operator]
            remove_module_hooks(module)
            self.model = module
        super().teardown()

    # ---- checkpoints ---------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        """Weights and buffers, whole. A collective in a fit."""
        if self.model is self.lightning_module:
            return super().lightning_module_state_dict()
        state = deepspeed_state.whole_weights(self._network)
        [optimizer] = self.optimizers
        if self._is_unfused(optimizer):
            masters = [master for group in optimizer.fp32_groups for master in group]  # type: ignore[attr-defined]
            names = {id(parameter): name for name, parameter in self._network.named_parameters()}
            parameters = [parameter for group in self._groups for parameter in group]
            state |= {names[id(p)]: m.detach().cpu() for p, m in zip(parameters, masters, strict=True)}
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state_dict of torch.optim.SGD, whole. A collective."""
        if self.stage > 0:
            return deepspeed_state.optimizer_state(optimizer, self._groups)
        return self._plain(optimizer).state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write one file, on rank 0."""
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read one file."""
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load whole weights into the network, which is not divided yet."""
        ParallelStrategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the optimiser's state and, where weights are in low precision, the float32 copies."""
        [optimizer], [saved] = self.optimizers, checkpoint["optimizer_states"]
        weights = checkpoint["state_dict"]
        names = {id(parameter): name for name, parameter in self._network.named_parameters()}
        parameters = [parameter for group in self._groups for parameter in group]
        if self.stage > 0:
            deepspeed_state.load_optimizer_state(optimizer, self._groups, saved)
            for parameter in parameters:
                deepspeed_state.set_whole(parameter, weights[names[id(parameter)]].float())
            return
        self._plain(optimizer).load_state_dict(saved)
        if self._is_unfused(optimizer):
            masters = [master for group in optimizer.fp32_groups for master in group]  # type: ignore[attr-defined]
            for parameter, master in zip(parameters, masters, strict=True):
                master.data.copy_(weights[names[id(parameter)]])

    def _plain(self, optimizer: Optimizer) -> Optimizer:
        """Stage 0's torch optimiser, which DeepSpeed wraps for low precision."""
        return optimizer.optimizer if self._is_unfused(optimizer) else optimizer  # type: ignore[attr-defined]

    @staticmethod
    def _is_unfused(optimizer: Any) -> bool:
        """Whether it is stage 0's in low precision, which keeps float32 copies of the weights."""
        from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

        return isinstance(optimizer, FP16_UnfusedOptimizer)
