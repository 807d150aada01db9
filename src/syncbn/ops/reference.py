"""The float64 oracle: Algorithm 1 of the paper, written as printed. Every test compares with it; nothing runs on it.

Letters: N batch, C channels, M reduced elements per channel (the paper's m, or m' = m*p*q for convolutions).
Source: Ioffe & Szegedy 2015, Algorithm 1 and the six gradient equations below it.
"""

from typing import NamedTuple

from torch import Tensor


class Forward(NamedTuple):
    """What Algorithm 1 computes: y like x; mean, biased variance (C)."""

    y: Tensor
    mean: Tensor
    var: Tensor


class Gradients(NamedTuple):
    """Of the loss with respect to x, gamma (C), beta (C) and, with a residual, to it."""

    x: Tensor
    gamma: Tensor
    beta: Tensor
    residual: Tensor


def _reduced(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.view(1, -1, *[1] * (x.dim() - 2))


def batch_norm(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Forward:
    """Algorithm 1 over the whole batch, in float64.

    Args:
        x: (N, C, ...) of any dtype: all ranks' mini-batches, concatenated along N.
        gamma: (C) scale, 1 where None.
        beta: (C) shift, 0 where None.
        eps: added to the variance.
        residual: like x, added before the activation.
        activation: None or "relu".
    """
    x = x.double()
    mean = x.mean(_reduced(x))
    var = (x - _per_channel(mean, x)).square().mean(_reduced(x))
    y = (x - _per_channel(mean, x)) / (_per_channel(var, x) + eps).sqrt()
    if gamma is not None:
        y = y * _per_channel(gamma.double(), x)
    if beta is not None:
        y = y + _per_channel(beta.double(), x)
    if residual is not None:
        y = y + residual.double()
    if activation == "relu":
        y = y.clamp(min=0)
    return Forward(y, mean, var)


def batch_norm_gradients(
    dy: Tensor,
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Gradients:
    """The six gradient equations of the paper, term by term, in float64. Arguments as in `batch_norm`; dy like x."""
    y, mu, var = batch_norm(x, gamma, beta, eps, residual, activation)
    x, dy = x.double(), dy.double()
    if activation == "relu":
        dy = dy * (y > 0)
    m = x.numel() // x.shape[1]
    dims = _reduced(x)
    centred = x - _per_channel(mu, x)
    std = (var + eps).sqrt()

    dxhat = dy if gamma is None else dy * _per_channel(gamma.double(), x)
    dvar = (dxhat * centred).sum(dims) * -0.5 * (var + eps) ** -1.5
    dmu = -dxhat.sum(dims) / std + dvar * (-2 * centred).sum(dims) / m
    dx = dxhat / _per_channel(std, x) + _per_channel(dvar, x) * 2 * centred / m + _per_channel(dmu, x) / m
    dgamma = (dy * centred / _per_channel(std, x)).sum(dims)
    return Gradients(dx, dgamma, dy.sum(dims), dy)


def running_statistics(
    mean: Tensor, var: Tensor, count: int, running_mean: Tensor, running_var: Tensor, momentum: float
) -> tuple[Tensor, Tensor]:
    """The moving averages after one step: the variance enters unbiased, times M/(M-1) (section 3.1 of the paper)."""
    unbiased = var * (count / (count - 1))
    return (
        (1 - momentum) * running_mean.double() + momentum * mean,
        (1 - momentum) * running_var.double() + momentum * unbiased,
    )
