"""fold_batch_norm: the same outputs in eval, without the BatchNorm."""

import pytest
import torch
from norm_cases import relative
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn import SyncBatchNorm, fold_batch_norm


def settle(model):
    """Statistics and parameters away from their first values."""
    torch.manual_seed(0)
    for m in model.modules():
        if isinstance(m, _BatchNorm):
            if m.running_mean is not None:
                m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)
            for p in m.parameters():
                p.data.uniform_(0.5, 2)
    return model.double()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), SyncBatchNorm(3, activation="relu")
        self.second, self.second_norm = nn.Conv2d(3, 3, 1), SyncBatchNorm(3, activation="relu")

    def forward(self, x):
        return self.second_norm(self.second(self.norm(self.conv(x))), x)


class Shared(nn.Module):
    """One BatchNorm after two convolutions; one convolution read twice; a BatchNorm fed by a sum."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.norm, self.last, self.on_sum = SyncBatchNorm(3), nn.BatchNorm2d(3), SyncBatchNorm(3)

    def forward(self, x):
        y = self.norm(self.a(x)) + self.norm(self.b(x))
        z = self.c(x)
        return self.last(z) + z + self.on_sum(y + x)


class Branching(nn.Module):
    """Control flow that torch.fx cannot trace, around a block that it can."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), SyncBatchNorm(3))
        self.loose_conv, self.loose_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.block(x)
        return self.loose_norm(self.loose_conv(x)) if x.sum() > 0 else x


IMAGE = (2, 3, 6, 5)
MODELS = {
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), SyncBatchNorm(4)), IMAGE, 0),
    "no bias": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), SyncBatchNorm(4)), IMAGE, 0),
    "grouped convolution": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), SyncBatchNorm(6)), IMAGE, 0),
    "relu": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), SyncBatchNorm(4, activation="relu")), IMAGE, 0),
    "not affine": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), SyncBatchNorm(4, affine=False)), IMAGE, 0),
    "plain": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), IMAGE, 0),
    "linear": (lambda: nn.Sequential(nn.Linear(5, 4), SyncBatchNorm(4)), (6, 5), 0),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), SyncBatchNorm(4)), (2, 3, 7), 0),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(3, 4, 2), SyncBatchNorm(4)), (2, 3, 4, 4, 4), 0),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2), SyncBatchNorm(4)), IMAGE, None),
    "linear over positions": (lambda: nn.Sequential(nn.Linear(5, 4), SyncBatchNorm(3)), (2, 3, 5), None),
    "linear as wide as positions": (lambda: nn.Sequential(nn.Linear(5, 3), SyncBatchNorm(3)), (2, 3, 5), None),
    "first of all": (lambda: nn.Sequential(SyncBatchNorm(3), nn.Conv2d(3, 4, 3)), IMAGE, None),
    "activation between": (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), SyncBatchNorm(3)), IMAGE, None),
    "residual": (Residual, IMAGE, 0),
    "shared": (Shared, IMAGE, None),
    "branching": (Branching, IMAGE, None),
    "nested": (lambda: nn.Sequential(Residual(), nn.Sequential(Residual(), Shared())), IMAGE, None),
    "reflect padding": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), SyncBatchNorm(4)),
        IMAGE,
        None,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_eval(name):
    build, shape, left = MODELS[name]
    model = settle(build())
    for seed in range(2):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()
        state = {k: v.clone() for k, v in model.state_dict().items()}
        folded = fold_batch_norm(model)
        assert folded is not model
        assert relative(folded(x).detach(), model.eval()(x).detach()) < 1e-12
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    if left is not None:
        assert sum(isinstance(m, _BatchNorm) for m in folded.modules()) == left


def test_the_model_keeps_its_mode():
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), SyncBatchNorm(4))).train()
    folded = fold_batch_norm(model)
    assert all(m.training for m in model.modules())
    assert not any(m.training for m in folded.modules())
    assert not any(p is q for p in folded.parameters() for q in model.parameters())


def test_folds_what_has_dropout():
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), SyncBatchNorm(4), nn.Dropout(0.9))).train()
    x = torch.randn(IMAGE).double()
    assert torch.equal(fold_batch_norm(model)(x), fold_batch_norm(model)(x))


def test_without_running_statistics_it_is_refused_or_left():
    """In eval such a layer normalises by the batch: it cannot be a constant."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), SyncBatchNorm(4, track_running_stats=False)).double()
    x = torch.randn(IMAGE).double()
    try:
        folded = fold_batch_norm(model)
    except ValueError as error:
        assert "running statistics" in str(error)
        assert "\n" not in str(error)
    else:
        assert relative(folded(x).detach(), model.eval()(x).detach()) < 1e-12


def test_in_half_precision_folding_is_done_wide():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), SyncBatchNorm(8))
    settle(model).bfloat16()
    folded = fold_batch_norm(model)
    truth = fold_batch_norm(model.double())
    for found, true in zip(folded.parameters(), truth.parameters(), strict=True):
        assert found.dtype == torch.bfloat16
        assert relative(found.detach(), true.detach()) < 0.51 * torch.finfo(torch.bfloat16).eps, (
            "rounded more than once"
        )


def test_hooks_and_a_shared_block_stay_right():
    """A block called twice: its convolution and its norm are always together, or both are left."""
    block = nn.Sequential(nn.Conv2d(3, 3, 1), SyncBatchNorm(3))
    model = settle(nn.Sequential(block, nn.ReLU(), block))
    x = torch.randn(IMAGE).double()
    assert relative(fold_batch_norm(model)(x).detach(), model.eval()(x).detach()) < 1e-12


class Reused(nn.Module):
    """The weight is also read elsewhere: folding in place of it would change the other use."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), SyncBatchNorm(3)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv.weight.sum()


def test_a_weight_with_another_reader():
    model = settle(Reused())
    x = torch.randn(IMAGE).double()
    assert relative(fold_batch_norm(model)(x).detach(), model.eval()(x).detach()) < 1e-12


def test_tied_weights():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), SyncBatchNorm(3), nn.Conv2d(3, 3, 1))
    model[2].weight = model[0].weight
    settle(model)
    x = torch.randn(IMAGE).double()
    assert relative(fold_batch_norm(model)(x).detach(), model.eval()(x).detach()) < 1e-12
