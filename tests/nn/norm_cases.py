"""Cases for the layer, and its errors against the float64 oracle; the same code in one process and on P ranks.

Letters: N batch, C channels, M elements per channel over all ranks, P ranks.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from exactness import TOLERANCE, allowed
from syncbn import SyncBatchNorm
from syncbn.ops import native, reference


@dataclass(frozen=True)
class Case:
    """One layer, one step. `tail` is (C, ...); `sizes` the images of each rank."""

    tail: tuple[int, ...]
    sizes: tuple[int, ...] = (4,)
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    dy_layout: str = "contiguous"
    affine: bool = True
    residual: bool = False
    activation: str | None = None
    momentum: float | None = 0.1
    eps: float = 1e-5
    mean: float = 0.3
    std: float = 1.7
    dy_mean: float = 0.0
    seed: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(self.sizes), *self.tail)


def spread(case: Case, sizes: tuple[int, ...]) -> Case:
    return replace(case, sizes=sizes)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values as x at other strides."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":  # at any number of dimensions
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "batch_second":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced_channels":
        big = x.new_full((x.shape[0], x.shape[1] + 3, *x.shape[2:]), float("nan"))
        big[:, 1:-2] = x
        return big[:, 1:-2]
    if layout == "sliced_last":
        big = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
        big[..., ::2] = x
        return big[..., ::2]
    if layout == "sliced_batch":
        big = x.new_full((2 * x.shape[0] + 1, *x.shape[1:]), float("nan"))
        big[1::2] = x
        return big[1::2]
    if layout == "swapped_last":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    raise ValueError(layout)


def is_laid_out(x: Tensor, layout: str) -> bool:
    if layout == "channels_last":
        return x.movedim(1, -1).is_contiguous()
    return layout != "contiguous" or x.is_contiguous()


@dataclass
class Batch:
    """The whole batch of all ranks, the same on each of them."""

    x: Tensor
    dy: Tensor
    residual: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None


def whole_batch(case: Case) -> Batch:
    generator = torch.Generator().manual_seed(case.seed)
    C = case.tail[0]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = (case.mean + case.std * normal(*case.shape)).to(case.dtype)
    dy = (case.dy_mean + normal(*case.shape)).to(case.dtype)
    residual = normal(*case.shape).to(case.dtype) if case.residual else None
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    gamma = (1 + 0.5 * normal(C)).to(wide) if case.affine else None
    beta = (0.5 * normal(C)).to(wide) if case.affine else None
    return Batch(x, dy, residual, gamma, beta)


def share(t: Tensor, sizes: tuple[int, ...], rank: int) -> Tensor:
    """This rank's rows of the whole batch."""
    begin = sum(sizes[:rank])
    return t[begin : begin + sizes[rank]]


def make_layer(case: Case, **arguments) -> SyncBatchNorm:
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    layer = SyncBatchNorm(
        case.tail[0], case.eps, case.momentum, case.affine, activation=case.activation, dtype=wide, **arguments
    )
    if wide == torch.float64:
        layer.double()
    return layer


def set_parameters(layer: torch.nn.Module, batch: Batch) -> None:
    if batch.gamma is not None:
        with torch.no_grad():
            layer.weight.copy_(batch.gamma)
            layer.bias.copy_(batch.beta)


def relative(found: Tensor, expected: Tensor, least_scale: float = 1e-30) -> float:
    """Largest error over largest magnitude; NaN counts as infinite."""
    expected = expected.double()
    if found.shape != expected.shape:
        raise AssertionError(f"shape {list(found.shape)}, expected {list(expected.shape)}")
    if expected.numel() == 0:
        return 0.0
    error = (found.double() - expected).abs().max() / expected.abs().max().clamp(min=least_scale)
    return error.nan_to_num(float("inf"), float("inf")).item()


def sum_over_ranks(t: Tensor) -> Tensor:
    t = t.detach().double().clone()
    if dist.is_initialized():
        dist.all_reduce(t)
    return t


def step(case: Case, layer: torch.nn.Module, batch: Batch, rank: int = 0):
    """Forward and backward of this rank's share. Returns x, residual (leaves with gradients) and y."""
    x = lay_out(share(batch.x, case.sizes, rank), case.layout).detach().requires_grad_()
    dy = lay_out(share(batch.dy, case.sizes, rank), case.dy_layout)
    residual = None
    if batch.residual is not None:
        residual = lay_out(share(batch.residual, case.sizes, rank), case.dy_layout).detach().requires_grad_()
    y = layer(x) if residual is None else layer(x, residual)
    y.backward(dy)
    return x, residual, y


def errors(case: Case, rank: int = 0, layer: SyncBatchNorm | None = None) -> dict[str, float]:
    """Relative errors of output, gradients and running statistics of one step; raises where a format is lost."""
    batch, layer = whole_batch(case), layer or make_layer(case)
    set_parameters(layer, batch)
    x, residual, y = step(case, layer, batch, rank)
    assert y.dtype == x.dtype
    assert x.grad.dtype == x.dtype
    if case.layout in ("contiguous", "channels_last"):
        assert is_laid_out(y, case.layout), f"output strides {y.stride()} for input strides {x.stride()}"
    return errors_of_step(case, layer, batch, x, residual, y, rank)


class StockBatchNorm(_BatchNorm):
    """nn.BatchNorm of any number of dimensions; residual and activation as operators of their own."""

    activation = None

    def _check_input_dim(self, input):
        pass

    def forward(self, x, residual=None):
        y = super().forward(x)
        y = y if residual is None else y + residual
        return y.relu() if self.activation == "relu" else y


def stock_errors(case: Case) -> dict[str, float]:
    """What a stock layer has for `errors` on the whole batch, in the same dtype."""
    case = replace(case, sizes=(sum(case.sizes),))
    batch, layer = whole_batch(case), StockBatchNorm(case.tail[0], case.eps, case.momentum, case.affine)
    layer.activation = case.activation
    set_parameters(layer, batch)
    return errors_of_step(case, layer, batch, *step(case, layer, batch))


def errors_of_step(case, layer, batch, x, residual, y, rank=0) -> dict[str, float]:
    more = {"eps": case.eps, "residual": batch.residual, "activation": case.activation}
    oracle = reference.batch_norm(batch.x, batch.gamma, batch.beta, **more)
    gradients = reference.batch_norm_gradients(batch.dy, batch.x, batch.gamma, batch.beta, **more)
    found = {
        "y": relative(y, share(oracle.y, case.sizes, rank)),
        "dx": relative(x.grad, share(gradients.x, case.sizes, rank)),
    }
    if residual is not None:
        found["dresidual"] = relative(residual.grad, share(gradients.residual, case.sizes, rank))
    if case.affine:
        # A sum of M random terms may happen to be near 0: its error is measured against the size such a sum has.
        gamma_size, beta_size = sizes_of_sums(batch, gradients)
        found["dgamma"] = relative(sum_over_ranks(layer.weight.grad), gradients.gamma, gamma_size)
        found["dbeta"] = relative(sum_over_ranks(layer.bias.grad), gradients.beta, beta_size)
    found |= running_errors(case, layer, oracle, batch)
    return found


def sizes_of_sums(batch: Batch, gradients: reference.Gradients) -> tuple[float, float]:
    """Root of the sum of squared terms of dgamma and dbeta, in their largest channel."""
    dims = [d for d in range(batch.x.dim()) if d != 1]
    xhat = reference.batch_norm(batch.x).y
    dgamma = (gradients.residual * xhat).square().sum(dims).sqrt().max().item()
    return max(dgamma, 1e-30), max(gradients.residual.square().sum(dims).sqrt().max().item(), 1e-30)


def running_errors(case: Case, layer: torch.nn.Module, oracle: reference.Forward, batch: Batch) -> dict[str, float]:
    """After one step from mean 0, variance 1."""
    C = case.tail[0]
    count = batch.x.numel() // C
    momentum = 1.0 if case.momentum is None else case.momentum
    running_mean, running_var = reference.running_statistics(
        oracle.mean, oracle.var, count, torch.zeros(C), torch.ones(C), momentum
    )
    assert layer.num_batches_tracked.item() == 1
    return {
        # A mean near 0 has no digits of its own: what counts is its error against the deviation.
        "running_mean": relative(layer.running_mean, running_mean, 0.1 * momentum * case.std + 1e-30),
        "running_var": relative(layer.running_var, running_var),
    }


def failures(case: Case, found: dict[str, float], tolerance: float | None = None) -> list[str]:
    """What is off by more than `tolerance`, without which it follows from the dtype.

    Where there was no compiler, ATen's operators sum in float32: as well as in a stock layer on the same numbers about
    0, where that loses no digits.
    """
    limits = dict.fromkeys(found, TOLERANCE[case.dtype] if tolerance is None else tolerance)
    if case.dtype == torch.float32 and tolerance is None and not native._functions:
        stock = stock_errors(replace(case, mean=0.0))
        limits = {name: allowed(stock[name]) for name in found}
    return [f"{case}: {name} off by {error:.1e}" for name, error in found.items() if not error < limits[name]]


def buffer_bytes(layer: torch.nn.Module) -> bytes:
    """The running statistics bit by bit, for comparison across ranks."""
    return b"".join(b.numpy().tobytes() for b in layer.buffers())
