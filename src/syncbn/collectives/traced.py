"""The all-reduce of a message as operators that a tracer sees, differentiable at any order."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from syncbn.collectives.communicator import check_carries


def launch_traced(message: Tensor, group_name: str) -> Tensor:
    """Begin to sum `message` over the group, as operators that a tracer sees; `wait_traced` returns the sum."""
    return torch.ops._c10d_functional.all_reduce(message.contiguous(), "sum", group_name)


def wait_traced(reduced: Tensor) -> Tensor:
    """What `launch_traced` began."""
    return torch.ops._c10d_functional.wait_tensor(reduced)


def nan_where_ranks_disagree(totals: Tensor, group: dist.ProcessGroup, id: int) -> Tensor:
    """The sum of messages that end with id and its square; NaN where the ranks were in layers of other ids."""
    if dist.get_backend(group) == "fake":  # which adds nothing up
        return totals
    agree = (totals[-2] == group.size() * id) & (totals[-1] == group.size() * id**2)
    return torch.where(agree, totals, float("nan"))


def all_reduce_differentiable(message: Tensor, group: dist.ProcessGroup, id: int) -> Tensor:
    """`message`, which ends with id and its square, summed over the group: traceable, differentiable at any order.

    NaN where the ranks were in layers of other ids.

    Raises:
        ValueError: the group sums nothing where the message is.
    """
    if not torch.compiler.is_compiling():
        check_carries(group, message.device)
    return nan_where_ranks_disagree(_sum_over_ranks(message, group.group_name), group, id)


def _sum_over_ranks(message: Tensor, group_name: str) -> Tensor:
    if torch.compiler.is_compiling() or not (is_legacy_batchedtensor(message) or _is_functionalized()):
        return _AllReduce.apply(message, group_name)
    return _all_reduce(message, group_name)


def _is_functionalized() -> bool:
    """Whether torch.func.functionalize is the innermost transform."""
    transform = torch._C._functorch.peek_interpreter_stack()
    return transform is not None and transform.key() == torch._C._functorch.TransformType.Functionalize


class _AllReduce(torch.autograd.Function):
    """Sum over ranks. Every rank's output depends on every rank's input, so the gradients are summed too."""

    @staticmethod
    def forward(message: Tensor, group_name: str) -> Tensor:
        return wait_traced(launch_traced(message, group_name))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group_name = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _sum_over_ranks(gradient, ctx.group_name), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _AllReduce.apply(tangent, ctx.group_name)

    @staticmethod
    def vmap(
        _info: Any, in_dims: tuple[int | None, ...], message: Tensor, group_name: str
    ) -> tuple[Tensor, int | None]:
        return _AllReduce.apply(message, group_name), in_dims[0]


@torch.library.custom_op("syncbn::all_reduce", mutates_args=())
def _all_reduce(message: Tensor, group_name: str) -> Tensor:
    """`_AllReduce` as one operator, for what sees no further: torch's older vmap and torch.func.functionalize."""
    return wait_traced(launch_traced(message, group_name))


_all_reduce.register_autograd(_AllReduce.backward, setup_context=_AllReduce.setup_context)
