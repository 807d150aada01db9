"""ZeRO and FSDP2 on two CPU ranks: the training that DDP does, saved as one file, and gone on with from it."""

from importlib.util import find_spec

import pytest
import torch
from lightning.pytorch import Trainer

from shard_cases import GLOBAL_BATCH_SIZE
from syncbn.data import ImageDataModule
from syncbn.training import (
    GradualUnfreezing,
    ImageClassifier,
    LeftOutImages,
    PolyakAveraging,
    SynchronisedDeepSpeedStrategy,
)
from syncbn.training.strategies.sharding import make_contiguous
from training.sharded_checks import check_file, check_gone_on_with, check_same, run_cases
from training.sharded_runs import Case

STRATEGIES = ("zero2", "zero3", "fsdp2")  # tests/cluster/test_sharded_training.py has more
CASES = [Case("ddp"), *map(Case, STRATEGIES), Case("zero3", resumed_from="zero3")]

pytestmark = [
    pytest.mark.timeout(900),  # the module's trainings all run before its first test
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra syncbn[deepspeed]"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def runs(folder):
    return run_cases(folder, CASES)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_trains_as_ddp_does(runs, folder, strategy):
    check_same(runs[Case(strategy)], runs[Case("ddp")])
    check_file(folder, strategy)
    assert runs[Case(strategy)].tested == pytest.approx(runs[Case("ddp")].tested, rel=1e-4)


def test_a_checkpoint_is_gone_on_with(runs):
    check_gone_on_with(runs[Case("zero3", resumed_from="zero3")], runs[Case("zero3")])


def test_a_stage_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"stage=4 of ZeRO must be 0, 1, 2 or 3"):
        SynchronisedDeepSpeedStrategy(stage=4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stage", "batch_norm", "callback", "message"),
    [
        (2, "train", PolyakAveraging(), r"^PolyakAveraging does not work under DeepSpeed, which .* leave trainer"),
        (0, "train", GradualUnfreezing({1: ["stem"]}), r"^GradualUnfreezing does not work under DeepSpeed"),
        (3, "estimate", LeftOutImages(), r"^model.batch_norm=estimate needs .* but ZeRO 3 divides them: take stage 2"),
    ],
)
def test_what_cannot_work_is_refused(stage, batch_norm, callback, message):
    data = ImageDataModule(GLOBAL_BATCH_SIZE, image_size=16)
    sizes = (data.num_classes, data.channels, data.training_images)
    model = ImageClassifier(GLOBAL_BATCH_SIZE, *sizes, width_multiplier=0.125, stem="small", batch_norm=batch_norm)
    strategy = SynchronisedDeepSpeedStrategy(stage=stage, timeout_seconds=60)
    options = {"max_epochs": 1, "enable_checkpointing": False, "logger": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", devices=1, strategy=strategy, callbacks=[callback], **options)
    with pytest.raises(ValueError, match=message):
        trainer.fit(model, data)


def test_convolutions_of_one_pixel_get_plain_strides_too():
    layer = torch.nn.Conv2d(8, 4, 1).to(memory_format=torch.channels_last)
    expected = layer.weight.detach().clone()
    make_contiguous(layer)
    assert layer.weight.stride() == (8, 1, 1, 1)
    torch.testing.assert_close(layer.weight.detach(), expected)
