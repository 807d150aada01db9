"""Synchronised BatchNorm for people with a LightningModule of their own.

Lightning has a place for this, the LayerSync plugin, which DDP and FSDP call before training. Others
(DeepSpeedStrategy, ModelParallelStrategy; seen in Lightning 2.6) never call it, and say nothing. What a
plugin cannot see, a callback can: `LayerSyncGuard` is added to every Trainer through Lightning's entry point
for such callbacks (``lightning.pytorch.callbacks_factory``, in this package's metadata).
"""

from importlib.metadata import entry_points

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.layer_sync import LayerSync, TorchSyncBatchNorm
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, ParallelStrategy
from torch.distributed import ProcessGroup

from syncbn.nn import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.nn.convert import unsynchronised_layers

ENTRY_POINT_GROUP = "lightning.pytorch.callbacks_factory"

REMEDY = (
    "build the network with syncbn.SyncBatchNorm layers, or call syncbn.convert_sync_batchnorm(self) in the"
    " LightningModule's __init__ or configure_model, and leave the plugin out; or pass the callback"
    " syncbn.training.SynchroniseBatchNorm in its place"
)


class SyncBatchNormPlugin(LayerSync):
    """Makes the BatchNorm layers of any LightningModule normalise over all ranks while it is trained.

    Pass it as ``Trainer(plugins=[SyncBatchNormPlugin()])``. Under a strategy that does not call it, and
    together with ``Trainer(sync_batchnorm=True)``, it is refused. On a single device there is nothing to
    synchronise, and nothing happens.

    Args:
        process_group: Ranks that normalise together; None for all of them.

    Raises:
        RuntimeError: This package is used without being installed, so that Lightning does not find the guard.
    """

    def __init__(self, process_group: ProcessGroup | None = None) -> None:
        if not any(point.name == "syncbn" for point in entry_points(group=ENTRY_POINT_GROUP)):
            raise RuntimeError(
                "SyncBatchNormPlugin cannot make sure that Lightning calls it: the metadata of the package"
                f" syncbn lack the entry point {ENTRY_POINT_GROUP}; install the package with pip"
            )
        self.process_group = process_group
        self.applied = False

    def apply(self, model: torch.nn.Module) -> torch.nn.Module:
        """Convert the BatchNorm layers of ``model``."""
        self.applied = True
        return convert_sync_batchnorm(model, self.process_group)

    def revert(self, model: torch.nn.Module) -> torch.nn.Module:
        """Give ``model`` back the layers it had."""
        self.applied = False
        return revert_sync_batchnorm(model)


class SynchroniseBatchNorm(Callback):
    """Makes the BatchNorm layers of any LightningModule normalise over all ranks, under every strategy.

    Pass it as ``Trainer(callbacks=[SynchroniseBatchNorm()])``. It converts before the strategy sets up the module, also
    under DeepSpeed and FSDP2, which never call a plugin, and gives the layers back when the fit has ended.

    Args:
        process_group: Ranks that normalise together; None for all of them.
    """

    def __init__(self, process_group: ProcessGroup | None = None) -> None:
        self.process_group = process_group

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Convert, in place."""
        if stage == "fit":
            convert_sync_batchnorm(pl_module, self.process_group)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look whether all layers were there to convert.

        Raises:
            ValueError: Some were not: ``configure_model`` has made them afterwards.
        """
        late = [name for name, _ in unsynchronised_layers(pl_module)]
        if late:
            raise ValueError(
                f"SynchroniseBatchNorm came before configure_model made {late[0]!r} and {len(late) - 1} more:"
                " call syncbn.convert_sync_batchnorm(self) at its end, and leave the callback out"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module back the layers it had."""
        if stage == "fit":
            revert_sync_batchnorm(pl_module)


class CarefulTorchSyncBatchNorm(TorchSyncBatchNorm):
    """What ``Trainer(sync_batchnorm=True)`` does, unless it would destroy this package's layers."""

    def apply(self, model: torch.nn.Module) -> torch.nn.Module:
        """Convert to torch's synchronised layers.

        Raises:
            ValueError: ``model`` holds layers of this package. Torch's conversion takes every subclass of
                _BatchNorm for a plain one, and would replace them.
        """
        names = [name for name, layer in model.named_modules() if isinstance(layer, SyncBatchNorm)]
        if names:
            raise ValueError(
                f"Trainer(sync_batchnorm=True) would replace syncbn's layers by torch's ({names[0]!r} and"
                f" {len(names) - 1} more): leave sync_batchnorm out, the layers are synchronised already"
            )
        return super().apply(model)


class LayerSyncGuard(Callback):
    """Refuses a Trainer that would ignore a `SyncBatchNormPlugin` or destroy synchronised layers."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look at the plugin before the strategy sets up the model.

        Raises:
            ValueError: The strategy is known never to call the plugin.
        """
        plugin = trainer._accelerator_connector._layer_sync
        if stage != "fit" or plugin is None:
            return
        if isinstance(plugin, SyncBatchNormPlugin):
            plugin.applied = False
            if isinstance(trainer.strategy, (DeepSpeedStrategy, ModelParallelStrategy)):
                self._refuse(trainer)
        elif type(plugin) is TorchSyncBatchNorm and hasattr(trainer.strategy, "_layer_sync"):
            trainer.strategy._layer_sync = CarefulTorchSyncBatchNorm()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look whether the strategy, now set up, has called the plugin.

        Raises:
            ValueError: It has not, though it is one for several ranks.
        """
        plugin = trainer._accelerator_connector._layer_sync
        is_parallel = isinstance(trainer.strategy, ParallelStrategy)
        if isinstance(plugin, SyncBatchNormPlugin) and is_parallel and not plugin.applied:
            self._refuse(trainer)

    @staticmethod
    def _refuse(trainer: Trainer) -> None:
        raise ValueError(f"{type(trainer.strategy).__name__} ignores SyncBatchNormPlugin: {REMEDY}")


def guard_callbacks() -> list[Callback]:
    """What Lightning adds to every Trainer: see the top of the file."""
    return [LayerSyncGuard()]
