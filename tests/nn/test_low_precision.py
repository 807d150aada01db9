"""fp16 and bf16: judged against the error that nn.BatchNorm of the same dtype makes to the float64 oracle."""

import copy

import pytest
import torch
from norm_cases import Case, StockBatchNorm, lay_out, relative, set_parameters, step, whole_batch
from torch import nn

from exactness import TOLERANCE
from syncbn import SyncBatchNorm
from syncbn.ops import reference

FLOAT32 = TOLERANCE[torch.float32]
HALVES = [torch.float16, torch.bfloat16]


def error_of(found, expected):
    """Largest and root mean square error, relative."""
    rms = (found.double() - expected).square().mean().sqrt() / expected.double().square().mean().sqrt()
    return relative(found, expected), rms.item()


def all_errors(case, layer, batch):
    x, residual, y = step(case, layer, batch)
    more = {"eps": case.eps, "residual": batch.residual, "activation": case.activation}
    gamma, beta = (None, None) if layer.weight is None else (layer.weight.detach(), layer.bias.detach())
    oracle = reference.batch_norm(batch.x, gamma, beta, **more)
    gradients = reference.batch_norm_gradients(batch.dy, batch.x, gamma, beta, **more)
    found = {"y": error_of(y.detach(), oracle.y), "dx": error_of(x.grad, gradients.x)}
    if residual is not None:
        found["dresidual"] = error_of(residual.grad, gradients.residual)
    if layer.weight is not None:
        found["dgamma"] = error_of(layer.weight.grad, gradients.gamma)
        found["dbeta"] = error_of(layer.bias.grad, gradients.beta)
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
    ours, stock = (kind(tail[0]) for kind in (SyncBatchNorm, StockBatchNorm))
    ours.activation = stock.activation = case.activation
    for layer in (ours, stock):
        set_parameters(layer, batch)
        layer.to(torch.float32 if wide else dtype)
    theirs, found = all_errors(case, stock, batch), all_errors(case, ours, batch)
    assert ours.weight.grad.dtype == ours.weight.dtype
    too_large = {
        name: (mine, theirs[name])
        for name, mine in found.items()
        if any(a > 2 * b + FLOAT32 for a, b in zip(mine, theirs[name], strict=True))
    }
    assert too_large == {}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_float16_statistics_of_values_whose_squares_overflow(dtype):
    x = (500 + 200 * torch.randn(64, 3, 5, generator=torch.Generator().manual_seed(0))).to(dtype)
    layer = SyncBatchNorm(3)
    y = layer(x)
    assert relative(y.detach(), reference.batch_norm(x).y) < TOLERANCE[dtype]
    assert relative(layer.running_var, 0.9 + 0.1 * x.double().var((0, 2))) < FLOAT32


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_counts_above_65504(dtype):
    """2*256*256 = 131,072 elements: 'inf' as a float16 count."""
    x = torch.randn(2, 2, 256, 256, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    layer = getattr(SyncBatchNorm(2), "half" if dtype == torch.float16 else "bfloat16")()
    y = layer(x)
    oracle = reference.batch_norm(x.detach())
    assert relative(y.detach(), oracle.y) < TOLERANCE[dtype]
    assert relative(layer.running_var, 0.9 + 0.1 * oracle.var * 131072 / 131071) < FLOAT32
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y.backward(dy)
    assert relative(x.grad, reference.batch_norm_gradients(dy, x.detach()).x) < TOLERANCE[dtype]


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
        expected = reference.batch_norm(x.detach(), residual=r.detach(), activation="relu").y
        assert relative(y.detach(), expected) < TOLERANCE[x_dtype]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("cache", [True, False])
def test_autocast(dtype, cache):
    """conv -> bn -> relu under autocast, as nn.BatchNorm2d: the same dtypes, and at most twice its errors."""
    torch.manual_seed(0)
    conv, x, dy = nn.Conv2d(3, 4, 3), torch.randn(4, 3, 8, 8), torch.randn(4, 4, 6, 6)

    def results(norm, wide=False):
        net, images = nn.Sequential(copy.deepcopy(conv), norm, nn.ReLU()), x
        if wide:
            net, images = net.double(), x.double()
        with torch.autocast("cpu", dtype, cache_enabled=cache, enabled=not wide):
            y = net(images)
        y.backward(dy.to(y.dtype))
        return [y.detach(), net[0].weight.grad, norm.weight.grad, norm.running_var]

    truth = results(nn.BatchNorm2d(4), wide=True)
    for ours, theirs, true in zip(results(SyncBatchNorm(4)), results(nn.BatchNorm2d(4)), truth, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative(ours, true) <= 2 * relative(theirs, true) + FLOAT32


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_eval_in_half_precision(layout):
    torch.manual_seed(0)
    for dtype in HALVES:
        plain, ours = nn.BatchNorm2d(3).double().eval(), SyncBatchNorm(3, activation="relu").eval()
        for gamma_dtype in (torch.float32, dtype):
            ours.to(gamma_dtype)
            x = lay_out(torch.randn(4, 3, 5, 6), layout).to(dtype)
            y = ours(x)
            assert (y.dtype, y.stride()) == (dtype, x.stride())
            assert relative(y.detach(), plain(x.double()).detach().relu()) < TOLERANCE[dtype]
