"""Every collective of the package: groups of ranks, the one all-reduce of a message, and what others need."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from syncbn.channel import ID_LENGTH, Ticket
from syncbn.communicator import carries, check_carries
from syncbn.ops import Signature, has_memory


def new_group(size: int) -> dist.ProcessGroup:
    """Split the world into groups of `size` consecutive ranks that normalise together; returns this rank's group.

    The paper's normalisation batch of 32 can so be kept at any global batch: 8 images a GPU, `new_group(4)`.
    Every rank must call it, as with `torch.distributed.new_group`.

    Raises:
        ValueError: no process group has been initialised, or `size` does not divide the world size.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"new_group({size}) needs a process group: call torch.distributed.init_process_group first (torchrun, "
            "Lightning and DeepSpeed do)"
        )
    world = dist.get_world_size()
    if not isinstance(size, int) or size < 1 or world % size:
        fitting = [d for d in range(1, world + 1) if world % d == 0]
        raise ValueError(f"new_group: size {size!r} does not divide the {world} ranks; sizes that do: {fitting}")
    if size == world:
        return _world()
    return dist.new_subgroups(group_size=size)[0]


def check_member(group: dist.ProcessGroup | None) -> None:
    """Refuse what cannot be a process group of this rank.

    Raises:
        ValueError: this rank is not in `group`, or it is no process group.
    """
    if group is None:
        return
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"process_group: this rank ({dist.get_rank()}) is not in it; give each rank the group that it is in "
            "(syncbn.new_group does)"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"process_group: expected a torch.distributed.ProcessGroup or None, got {group!r}")


def active_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group to synchronise over now, the world where `group` is None; None if that is this rank alone.

    Raises:
        ValueError: `group` was given but is not, or no longer, initialised.
    """
    if not dist.is_available() or not dist.is_initialized():
        if group is not None:
            raise ValueError(
                "process_group was given but torch.distributed is not initialised: call init_process_group first, or "
                "leave process_group=None"
            )
        return None
    group = group or _world()
    return group if group.size() > 1 else None


def group_ranks(group: dist.ProcessGroup | None) -> list[int] | None:
    """The global ranks of a group, None for None."""
    return None if group is None else dist.get_process_group_ranks(group)


def find_group(ranks: Sequence[int]) -> dist.ProcessGroup | None:
    """This process's group of exactly these global ranks, if it has one."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    known = dist.distributed_c10d._world.pg_group_ranks
    return next((group for group, members in known.items() if sorted(members) == sorted(ranks)), None)


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


class Reduction:
    """One all-reduce under way.

    Args:
        message: flat float64, summed up in place; ends with the ticket's signature.
        ticket: the ranks' agreement to send it.
    """

    def __init__(self, message: Tensor, ticket: Ticket) -> None:
        self.message, self.ticket = message, ticket
        self.work = ticket.channel.send(message)
        ticket.channel.agreement.depart(ticket.number, ticket.description)

    def wait(self) -> tuple[Tensor, Signature | None]:
        """The message summed over all ranks, and its signature where that is still to be checked.

        On a CPU it has been. Elsewhere reading it would stall the device: whoever uses the sums has to make them NaN
        where the ranks disagree.

        Raises:
            LayerMismatch: the ranks sent different layers' messages.
            RuntimeError: the collective failed.
        """
        channel, description, number, _ = self.ticket
        observer = _wait_observer
        if self.message.is_cuda and torch.cuda.is_current_stream_capturing():
            observer = None
        if observer is not None:
            observer.begin()
        channel.wait(self.work, number, description)
        if observer is not None:
            observer.end()
        if self.message.is_cpu and has_memory(self.message):
            self.message = _taken_from(self.message)
        if not channel.adds_up:
            return self.message, None
        id_sum, square_sum = (channel.size * part for part in self.ticket.signature)
        found = self.message[-ID_LENGTH:]
        if not may_be_read(found):
            return self.message, Signature(found, (id_sum, square_sum))
        if found.tolist() != [id_sum, square_sum]:
            channel.agreement.fail(number, description)
        channel.agreement.arrived(number, description)
        return self.message, None


_NOTHING = torch.empty(0, dtype=torch.float64)


def _taken_from(message: Tensor) -> Tensor:
    """The sums, and no memory left in `message`, which the works hold that the channel keeps."""
    sums = message.detach()
    message.data = _NOTHING
    return sums


class WaitObserver(Protocol):
    """Told when a layer begins to wait for its message, and when it goes on: on a GPU in the order of its stream."""

    def begin(self) -> None:
        """The wait begins."""

    def end(self) -> None:
        """The message is there."""


_wait_observer: WaitObserver | None = None


def observe_waits(observer: WaitObserver | None) -> None:
    """Tell `observer` of every wait for a message from now on, in place of another; None tells nobody."""
    global _wait_observer
    _wait_observer = observer


def may_be_read(numbers: Tensor) -> bool:
    """Whether the host may look at them: on another device it would stall, tracers and transforms have none."""
    return numbers.is_cpu and has_memory(numbers)


def all_ranks(condition: bool, device: torch.device) -> bool:
    """Whether `condition` holds on every rank of the world. A collective where there are several."""
    return bool(sum_over_world(torch.tensor([float(not condition)]).to(device))[0] == 0)


def sum_over_world(values: Tensor) -> Tensor:
    """The sum of `values` over all ranks; `values` itself in one process.

    Through the host where the world sums nothing on their device.

    Raises:
        ValueError: it sums nothing on the host either.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    sums = values if carries(_world(), values.device) else values.cpu()
    check_carries(_world(), sums.device)
    dist.all_reduce(sums)
    return sums.to(values.device)


def gather_objects(mine: Any) -> list[Any]:
    """What each rank of the world gave, on every rank."""
    if not dist.is_available() or not dist.is_initialized():
        return [mine]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return gathered


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
