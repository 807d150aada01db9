"""Activations to normalise, and how results are compared with the reference."""

import pytest
import torch

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


def assert_near(found, expected, tolerance):
    """The largest error, of the largest expected magnitude."""
    assert found.shape == expected.shape
    error = (found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
    assert error <= tolerance, f"off by {error:.2e}"
