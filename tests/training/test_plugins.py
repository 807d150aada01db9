"""The LayerSync plugin under real Trainers: called, or refused, never ignored."""

import sys
from importlib.util import find_spec
from unittest.mock import MagicMock

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from syncbn import SyncBatchNorm
from syncbn.training import SyncBatchNormPlugin, SynchroniseBatchNorm, SynchronisedFSDP2Strategy, plugins


class Users(LightningModule):
    """Somebody's own module; notes the type of its BatchNorm in training."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), layer, nn.Flatten(), nn.LazyLinear(2))
        self.body(torch.zeros(2, 1, 5, 5))
        self.type_in_training: type | None = None

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.type_in_training = type(self.body[1])
        return self.body(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_model(self) -> None:
        """Required by ModelParallelStrategy."""


class ForgetfulStrategy(DDPStrategy):
    """A strategy of somebody's that, like DeepSpeed's, does not know of LayerSync."""

    def setup(self, trainer: Trainer) -> None:
        self._layer_sync = None
        super().setup(trainer)


def fit(module: LightningModule, **options: object) -> Trainer:
    trainer = Trainer(accelerator="cpu", devices=1, barebones=True, max_steps=2, **options)
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(8, 1, 5, 5)), batch_size=4))
    return trainer


def test_under_ddp_layers_are_synchronised_in_training_and_given_back():
    module = Users(nn.BatchNorm2d(3))
    weight = module.body[1].weight
    fit(module, strategy="ddp", plugins=[SyncBatchNormPlugin()])
    assert module.type_in_training is SyncBatchNorm
    assert type(module.body[1]) is nn.BatchNorm2d and module.body[1].weight is weight


def test_on_a_single_device_there_is_nothing_to_do():
    module = Users(nn.BatchNorm2d(3))
    fit(module, plugins=[SyncBatchNormPlugin()])
    assert module.type_in_training is nn.BatchNorm2d


def test_a_strategy_that_forgets_the_plugin_is_refused():
    with pytest.raises(ValueError, match=r"ForgetfulStrategy ignores SyncBatchNormPlugin: build the network with"):
        fit(Users(nn.BatchNorm2d(3)), strategy=ForgetfulStrategy(), plugins=[SyncBatchNormPlugin()])


def test_model_parallel_is_refused():
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    with pytest.raises(ValueError, match=r"ModelParallelStrategy ignores SyncBatchNormPlugin: .* configure_model"):
        fit(Users(nn.BatchNorm2d(3)), strategy=strategy, plugins=[SyncBatchNormPlugin()])


def test_deepspeed_is_refused(monkeypatch):
    # Lightning's strategy refuses a machine without the package or without a GPU before it gets anywhere.
    if find_spec("deepspeed") is None:
        monkeypatch.setitem(sys.modules, "deepspeed", MagicMock())
    monkeypatch.setattr("lightning.pytorch.strategies.deepspeed._DEEPSPEED_AVAILABLE", True)
    monkeypatch.setattr("lightning.pytorch.strategies.deepspeed._DEEPSPEED_GREATER_EQUAL_0_16", True)
    monkeypatch.setattr(DeepSpeedStrategy, "setup_environment", DDPStrategy.setup_distributed)
    with pytest.raises(ValueError, match=r"DeepSpeedStrategy ignores SyncBatchNormPlugin"):
        fit(Users(nn.BatchNorm2d(3)), strategy=DeepSpeedStrategy(), plugins=[SyncBatchNormPlugin()])


def test_it_does_not_go_with_sync_batchnorm():
    with pytest.raises(MisconfigurationException, match=r"sync_batchnorm=True.*`SyncBatchNormPlugin`.*Choose one"):
        fit(Users(nn.BatchNorm2d(3)), strategy="ddp", sync_batchnorm=True, plugins=[SyncBatchNormPlugin()])


def test_sync_batchnorm_is_refused_where_it_would_replace_our_layers():
    with pytest.raises(ValueError, match=r"sync_batchnorm=True\) would replace syncbn's layers .*'body.1'"):
        fit(Users(SyncBatchNorm(3)), strategy="ddp", sync_batchnorm=True)
    module = Users(SyncBatchNorm(3))
    fit(module, sync_batchnorm=True)  # on a single device it does nothing
    assert module.type_in_training is SyncBatchNorm


def test_sync_batchnorm_still_does_what_it_did_without_our_layers(monkeypatch):
    converted = []
    monkeypatch.setattr(nn.SyncBatchNorm, "convert_sync_batchnorm", lambda module: converted.append(module) or module)
    fit(Users(nn.BatchNorm2d(3)), strategy="ddp", sync_batchnorm=True)
    assert len(converted) == 1


def test_without_the_entry_point_the_plugin_says_so(monkeypatch):
    monkeypatch.setattr(plugins, "entry_points", lambda group: [])
    with pytest.raises(RuntimeError, match="install the package with pip"):
        SyncBatchNormPlugin()


@pytest.mark.parametrize("strategy", ["ddp", ForgetfulStrategy(), "auto"])
def test_the_callback_synchronises_under_every_strategy_and_gives_the_layers_back(strategy):
    module = Users(nn.BatchNorm2d(3))
    weight = module.body[1].weight
    fit(module, strategy=strategy, callbacks=[SynchroniseBatchNorm()])
    assert module.type_in_training is SyncBatchNorm
    assert type(module.body[1]) is nn.BatchNorm2d and module.body[1].weight is weight


def test_the_callback_refuses_layers_that_are_made_after_it():
    class Late(Users):
        def configure_model(self) -> None:
            if isinstance(self.body[1], nn.Identity):
                self.body[1] = nn.BatchNorm2d(3)

    with pytest.raises(ValueError, match=r"came before configure_model made 'body.1' and 0 more"):
        fit(Late(nn.Identity()), callbacks=[SynchroniseBatchNorm()])


def test_fsdp2_divides_the_part_that_it_is_told():
    users = Users(nn.BatchNorm2d(3))
    for name, part in (("body", users.body), ("body.1", users.body[1])):
        strategy = SynchronisedFSDP2Strategy(network=name)
        strategy._lightning_module = users
        assert strategy._network is part
    strategy = SynchronisedFSDP2Strategy()
    strategy._lightning_module = users
    with pytest.raises(ValueError, match=r"network='network'.*Users has no such part.*\['body'\]"):
        strategy._network  # noqa: B018
