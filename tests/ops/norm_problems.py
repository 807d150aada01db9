"""Activations to normalise, and how results are compared with the reference."""

import pytest
import torch

from exactness import TOLERANCE, allowed
from syncbn.ops import reference

ROWS = pytest.mark.parametrize("rows", [False, True], ids=["planes", "rows"])


def laid_out(x, rows):
    """X as rows in memory, whatever its dimensions, or as planes."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if rows else x.contiguous()


def problem(shape, dtype, rows, mean=0.3, std=1.5, device="cpu"):
    """X, dy, residual like it, weight and bias (C)."""
    generator = torch.Generator().manual_seed(0)
    x, dy, residual = (
        laid_out(torch.randn(shape, generator=generator, dtype=torch.float64), rows) * std for _ in range(3)
    )
    weight, bias = torch.rand(shape[1], generator=generator) + 0.5, torch.randn(shape[1], generator=generator)
    return tuple(t.to(device) for t in ((x + mean).to(dtype), dy.to(dtype), residual.to(dtype), weight, bias))


def error_of(found, expected):
    """The largest error, of the largest expected magnitude."""
    assert found.shape == expected.shape
    return ((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3)).item()


def assert_near(found, expected, tolerance):
    error = error_of(found, expected)
    assert error <= tolerance, f"off by {error:.2e}, of {tolerance:.2e}"


def stock_errors(x, dy, weight, bias, activation=None):
    """Of torch's batch norm in the same dtype, by name; moments are what its moving averages take."""
    leaf, weight, bias = (t.detach().clone().requires_grad_() for t in (x, weight, bias))
    mean, var = torch.zeros_like(weight), torch.ones_like(weight)
    y = torch.nn.functional.batch_norm(leaf, mean, var, weight, bias, training=True, momentum=1.0)
    y = y.relu() if activation == "relu" else y
    dx, dweight, dbias = torch.autograd.grad(y, (leaf, weight, bias), dy)
    truth = reference.batch_norm(x, weight.detach(), bias.detach(), activation=activation)
    true = reference.batch_norm_gradients(dy, x, weight.detach(), bias.detach(), activation=activation)
    M = x.numel() // x.shape[1]
    return {
        "y": error_of(y.detach(), truth.y),
        "mean": error_of(mean, truth.mean),
        "var": error_of(var.double() * ((M - 1) / M), truth.var),
        "dx": error_of(dx, true.x),
        "dweight": error_of(dweight, true.gamma),
        "dbias": error_of(dbias, true.beta),
    }


def limits_of_float32_sums(x, dy, weight, bias, activation=None):
    """What passes that sum in float32 may be off, by name; moments of half precision are as exact as its numbers."""
    limits = {name: allowed(error) for name, error in stock_errors(x, dy, weight, bias, activation).items()}
    limits["sums"] = limits["mean"] + limits["var"]
    if x.dtype not in (torch.float32, torch.float64):
        limits |= {"mean": TOLERANCE[x.dtype], "var": TOLERANCE[x.dtype]}
    return limits
