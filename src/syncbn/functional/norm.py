"""What every implementation of the normalization shares: its arguments, its results, and the checks."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from syncbn import ops
from syncbn.collectives.agreement import LayerName

Fields = TypeVar("Fields", bound=Any)  # a named tuple


class Tensors(NamedTuple):
    """Of one normalization what autograd sees.

    x: (N, C, ...), floating point; weight, bias: (C) or None; residual: like x or None, added before the activation.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None


class Settings(NamedTuple):
    """Of one normalization what is no tensor, or none that autograd sees.

    activation: None or "relu"; running: moving averages to update in the same pass, or None. The composed form
    updates none. span: where x holds the channels of several layers, which are meant; such a normalization has no
    residual, and the composed form does not know it.
    """

    eps: float
    activation: str | None
    running: ops.Running | None = None
    span: ops.Span | None = None


class Norm(NamedTuple):
    """One activation to normalize."""

    tensors: Tensors
    settings: Settings


def flatten(rows: Iterable[tuple[Any, ...]]) -> list[Any]:
    """The fields of all rows in one list, as autograd takes and returns tensors; see `restore`."""
    return [field for row in rows for field in row]


def restore(kind: type[Fields], flat: Sequence[Any]) -> list[Fields]:
    """The rows of a list that `flatten` made: named tuples of one kind."""
    width = len(kind._fields)
    return [kind(*row) for row in zip(*[iter(flat)] * width, strict=True)]


def is_transformed() -> bool:
    """Whether torch.func's transforms or forward-mode AD are at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def only_operators(tensors: Iterable[Tensor | None] = ()) -> bool:
    """Whether `composed` is needed: under torch.export, torch.func's transforms, forward-mode AD, and for some tensors.

    Those are subclasses that are to see every operator.
    """
    return torch.compiler.is_compiling() or is_transformed() or ops.need_operators(tensors)


def id_of_widths(widths: Sequence[int]) -> int:
    """What a message of layers of these widths is known by where their names are out of a tracer's reach."""
    return 1 + sum(i * C for i, C in enumerate(widths, 1)) % 2**20


def cut_by_relu(dy: Tensor, y: Tensor) -> Tensor:
    """Dy where the ReLU let pass, else 0."""
    return torch.ops.aten.threshold_backward(dy, y, 0)


class Statistics(NamedTuple):
    """Of one activation: mean and biased variance (C), float64, and M."""

    mean: Tensor
    var: Tensor
    M: float | Tensor

    def detach(self) -> "Statistics":
        """The same without a gradient."""
        return Statistics(*(s.detach() if isinstance(s, Tensor) else s for s in self))  # type: ignore[arg-type]

    @property
    def unbiased_var(self) -> Tensor:
        """Var * M / (M - 1), (C)."""
        return self.var * (self.M / ops.at_least_one(self.M - 1))


class Route(NamedTuple):
    """Whom an exchange is with, which layers it is of, and how many layers their threads have built so far."""

    group: dist.ProcessGroup
    layers: tuple[LayerName, ...]
    layers_built: int


def refuse_single_value(M: float, shape: Sequence[int], P: int) -> None:
    """A variance needs two values; the same check on every rank, so that none is left waiting."""
    if M == 1:
        raise ValueError(
            f"expected more than 1 value per channel when training, got 1 over all ranks ({P}); this rank's input has "
            f"size {list(shape)}: give a larger batch"
        )
