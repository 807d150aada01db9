"""The oracle itself, against PyTorch's own batch normalisation in float64 and autograd: nothing of ours in between."""

import pytest
import torch
import torch.nn.functional as F

from syncbn.ops import reference

SHAPES = [(7, 3), (5, 4, 6), (3, 2, 5, 4), (2, 3, 3, 2, 4)]


def tensors(shape, affine, residual):
    torch.manual_seed(0)
    x = (2 + 3 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    gamma = (torch.rand(shape[1], dtype=torch.float64) - 0.3).requires_grad_() if affine else None
    beta = torch.randn(shape[1], dtype=torch.float64).requires_grad_() if affine else None
    extra = torch.randn(shape, dtype=torch.float64).requires_grad_() if residual else None
    return x, gamma, beta, extra, torch.randn(shape, dtype=torch.float64)


def torch_forward(x, gamma, beta, eps, residual, activation, running=(None, None), momentum=0.1):
    y = F.batch_norm(x, *running, gamma, beta, True, momentum, eps)
    y = y if residual is None else y + residual
    return y.relu() if activation == "relu" else y


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("residual", "activation"), [(False, None), (True, None), (False, "relu"), (True, "relu")])
def test_oracle_is_torch_in_float64(shape, affine, residual, activation):
    x, gamma, beta, extra, dy = tensors(shape, affine, residual)
    y = torch_forward(x, gamma, beta, 1e-3, extra, activation)
    leaves = [t for t in (x, gamma, beta, extra) if t is not None]
    expected = torch.autograd.grad(y, leaves, dy)
    with torch.no_grad():
        ours = reference.batch_norm(x, gamma, beta, 1e-3, extra, activation)
        gradients = reference.batch_norm_gradients(dy, x, gamma, beta, 1e-3, extra, activation)
    torch.testing.assert_close(ours.y, y.detach(), rtol=1e-12, atol=1e-12)
    wanted = [gradients.x, *([gradients.gamma, gradients.beta] if affine else []), *([gradients.residual] * residual)]
    for found, true in zip(wanted, expected, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-11, atol=1e-12)


def test_oracle_statistics_are_those_of_the_definition():
    x = torch.tensor([[1.0], [2.0], [6.0]])
    _, mean, var = reference.batch_norm(x)
    assert mean.item() == 3
    assert var.item() == pytest.approx((4 + 1 + 9) / 3, abs=1e-15)


def test_oracle_keeps_its_digits_at_a_large_mean():
    x = 3000 + torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    _, mean, var = reference.batch_norm(x)
    exact = x.double() - 3000
    torch.testing.assert_close(mean - 3000, exact.mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(var, exact.var(0, correction=0), rtol=1e-13, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_oracle_running_statistics_are_those_of_torch(momentum):
    x, *_ = tensors((5, 4, 6), False, False)
    running = [torch.full((4,), 0.5, dtype=torch.float64), torch.full((4,), 2.0, dtype=torch.float64)]
    _, mean, var = reference.batch_norm(x.detach())
    found = reference.running_statistics(mean, var, 30, *running, momentum)
    F.batch_norm(x.detach(), *running, training=True, momentum=momentum)
    for ours, true in zip(found, running, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_oracle_works_in_float64_whatever_comes_in(dtype):
    x, *_ = tensors((5, 4, 6), False, False)
    forward = reference.batch_norm(x.detach().to(dtype))
    assert {t.dtype for t in forward} == {torch.float64}
    torch.testing.assert_close(forward.mean, x.detach().to(dtype).double().mean((0, 2)), rtol=1e-13, atol=1e-14)
