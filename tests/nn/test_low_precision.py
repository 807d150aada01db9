"""fp16 and bf16: judged against the error that nn.BatchNorm of the same dtype makes to the float64 oracle."""

import copy

import pytest
import torch
from norm_cases import Case, lay_out, relative, set_parameters, step, whole_batch
from torch import nn

from syncbn import SyncBatchNorm
from syncbn.ops import reference

HALVES = [torch.float16, torch.bfloat16]
PLAIN = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}


class PlainThen(nn.Module):
    """nn.BatchNorm, then residual and activation as separate operators: what people write."""

    def __init__(self, norm, activation):
        super().__init__()
        self.norm, self.activation = norm, activation

    def forward(self, x, residual=None):
        y = self.norm(x)
        y = y if residual is None else y + residual
        return y.relu() if self.activation == "relu" else y


def error_of(found, expected):
    """Largest and root mean square error, relative."""
    rms = (found.double() - expected).square().mean().sqrt() / expected.double().square().mean().sqrt()
    return relative(found, expected), rms.item()


def all_errors(case, layer, norm, batch):
    x, residual, y = step(case, layer, batch)
    more = {"eps": case.eps, "residual": batch.residual, "activation": case.activation}
    gamma, beta = (None, None) if norm.weight is None else (norm.weight.detach(), norm.bias.detach())
    oracle = reference.batch_norm(batch.x, gamma, beta, **more)
    gradients = reference.batch_norm_gradients(batch.dy, batch.x, gamma, beta, **more)
    found = {"y": error_of(y.detach(), oracle.y), "dx": error_of(x.grad, gradients.x)}
    if residual is not None:
        found["dresidual"] = error_of(residual.grad, gradients.residual)
    if norm.weight is not None:
        found["dgamma"] = error_of(norm.weight.grad, gradients.gamma)
        found["dbeta"] = error_of(norm.bias.grad, gradients.beta)
    return found


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("wide", [True, False], ids=["gamma_fp32", "gamma_half"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("tail", [(6,), (6, 40), (6, 12, 10), (6, 4, 6, 5)], ids=str)
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"residual": True, "activation": "relu"}], ids=str)
@pytest.mark.parametrize("mean", [0.3, 20.0])
def test_at_most_twice_the_error_of_torch(tail, layout, options, wide, dtype, mean):
    case = Case(tail, (64,) if len(tail) == 1 else (8,), dtype, layout, layout, mean=mean, **options)
    batch = whole_batch(case)
    plain_norm = PLAIN[len(tail)](tail[0])
    set_parameters(plain_norm, batch)
    ours = SyncBatchNorm(tail[0], activation=case.activation)
    ours.load_state_dict(plain_norm.state_dict())
    if not wide:
        ours.to(dtype), plain_norm.to(dtype)
    plain = PlainThen(plain_norm, case.activation)
    theirs, found = all_errors(case, plain, plain_norm, batch), all_errors(case, ours, ours, batch)
    assert ours.weight.grad.dtype == ours.weight.dtype
    too_large = {
        name: (mine, theirs[name])
        for name, mine in found.items()
        if any(a > 2 * b + 1e-6 for a, b in zip(mine, theirs[name], strict=True))
    }
    assert too_large == {}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_float16_statistics_of_values_whose_squares_overflow(dtype):
    x = (500 + 200 * torch.randn(64, 3, 5, generator=torch.Generator().manual_seed(0))).to(dtype)
    layer = SyncBatchNorm(3)
    y = layer(x)
    assert relative(y.detach(), reference.batch_norm(x).y) < (2e-3 if dtype == torch.float16 else 1e-2)
    assert relative(layer.running_var, 0.9 + 0.1 * x.double().var((0, 2))) < 1e-6


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_counts_above_65504(dtype):
    """2*256*256 = 131,072 elements: 'inf' as a float16 count."""
    x = torch.randn(2, 2, 256, 256, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    layer = getattr(SyncBatchNorm(2), "half" if dtype == torch.float16 else "bfloat16")()
    y = layer(x)
    oracle = reference.batch_norm(x.detach())
    assert relative(y.detach(), oracle.y) < 1e-2
    assert relative(layer.running_var, 0.9 + 0.1 * oracle.var * 131072 / 131071) < 1e-6
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y.backward(dy)
    assert relative(x.grad, reference.batch_norm_gradients(dy, x.detach()).x) < 1e-2


@pytest.mark.parametrize("convert", ["half", "bfloat16", "to_half", "parent_half", "twice"])
def test_running_statistics_stay_float32(convert):
    layer = SyncBatchNorm(3)
    layer.running_mean.fill_(1 / 3), layer.running_var.fill_(1.0001)
    net = nn.Sequential(layer)
    actions = {
        "half": layer.half,
        "bfloat16": layer.bfloat16,
        "to_half": lambda: layer.to(torch.float16),
        "parent_half": net.half,
        "twice": lambda: net.bfloat16().float().half(),
    }
    actions[convert]()
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    assert layer.running_mean[0] == torch.tensor(1 / 3)
    assert layer.running_var[0] == torch.tensor(1.0001)
    assert layer.num_batches_tracked.dtype == torch.int64
    assert layer.weight.dtype in HALVES
    assert layer.running_mean is net[0].running_mean
    layer(torch.randn(4, 3).to(layer.weight.dtype)).sum().backward()
    assert layer.running_mean.dtype == torch.float32


def test_double_makes_all_of_it_float64():
    layer = SyncBatchNorm(3).half().double()
    assert {t.dtype for t in (*layer.parameters(), layer.running_mean, layer.running_var)} == {torch.float64}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_built_in_half_precision(dtype):
    layer = SyncBatchNorm(3, dtype=dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    copied = copy.deepcopy(layer)
    assert copied.running_var.dtype == torch.float32


def test_a_state_dict_of_half_precision_statistics_is_widened():
    layer = SyncBatchNorm(3)
    layer.load_state_dict(nn.BatchNorm2d(3).bfloat16().state_dict())
    assert layer.running_var.dtype == torch.float32


@pytest.mark.parametrize("x_dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gamma_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_mixtures_of_dtypes(x_dtype, residual_dtype, gamma_dtype, training):
    torch.manual_seed(0)
    layer = SyncBatchNorm(3, activation="relu", dtype=gamma_dtype).train(training)
    x = torch.randn(6, 3, 4).to(x_dtype).requires_grad_()
    r = torch.randn(6, 3, 4).to(residual_dtype).requires_grad_()
    y = layer(x, r)
    assert y.dtype == x_dtype
    y.backward(torch.ones_like(y))
    assert (x.grad.dtype, r.grad.dtype, layer.weight.grad.dtype) == (x_dtype, residual_dtype, gamma_dtype)
    if training:
        assert relative(y.detach(), reference.batch_norm(x.detach(), residual=r.detach(), activation="relu").y) < 1e-2


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("cache", [True, False])
def test_autocast(dtype, cache):
    """conv -> bn -> relu under autocast, as nn.BatchNorm2d: same dtypes, same numbers to rounding."""
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 4, 3), torch.randn(4, 3, 8, 8)
    found = []
    for norm in (nn.BatchNorm2d(4), SyncBatchNorm(4)):
        net = nn.Sequential(copy.deepcopy(conv), norm, nn.ReLU())
        with torch.autocast("cpu", dtype, cache_enabled=cache):
            y = net(x)
        y.float().square().sum().backward()
        found.append((y, net[0].weight.grad, norm.weight.grad, norm.running_var))
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_eval_in_half_precision(layout):
    torch.manual_seed(0)
    for dtype in HALVES:
        plain, ours = nn.BatchNorm2d(3).eval(), SyncBatchNorm(3, activation="relu").eval()
        for gamma_dtype in (torch.float32, dtype):
            ours.to(gamma_dtype)
            x = lay_out(torch.randn(4, 3, 5, 6), layout).to(dtype)
            y = ours(x)
            assert (y.dtype, y.stride()) == (dtype, x.stride())
            torch.testing.assert_close(y.float(), plain(x.float()).relu(), rtol=1e-2, atol=1e-2)
