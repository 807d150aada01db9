"""Every collective of the package: groups of ranks, the one all-reduce of a message, and the check that ranks agree.

A message is a flat float64 tensor: the payload (sums, and in the forward the count), then the id of the layers it
belongs to, then its square. After the sum over P ranks, `id_sum == P * id` and `square_sum == P * id^2` hold together
only where all ranks sent the same id, and both sums are exact: so each message proves, at no extra collective, that
the ranks were in the same layer.
"""

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.agreement import Agreement, Message

ID_LENGTH = 2
_ID_BITS = 20  # P * id^2 stays an exact float64 up to P = 8192

_agreements: dict[dist.ProcessGroup, Agreement] = {}


def new_group(size: int) -> dist.ProcessGroup:
    """Split the world into groups of `size` consecutive ranks that normalise together; returns this rank's group.

    The paper's normalisation batch of 32 can so be kept at any global batch: 8 images a GPU, `new_group(4)`.
    Every rank must call it, as with `torch.distributed.new_group`.

    Raises:
        RuntimeError: no process group has been initialised.
        ValueError: `size` does not divide the world size.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            f"new_group({size}) needs a process group: call torch.distributed.init_process_group first (torchrun, "
            "Lightning and DeepSpeed do)"
        )
    world = dist.get_world_size()
    if not isinstance(size, int) or size < 1 or world % size:
        fitting = [d for d in range(1, world + 1) if world % d == 0]
        raise ValueError(f"new_group: size {size} does not divide the {world} ranks; sizes that do: {fitting}")
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


class Label(NamedTuple):
    """Who sends a message: `id` for the check within it, `text` for people."""

    id: int
    text: str

    @property
    def signature(self) -> tuple[int, int]:
        """What a message ends with."""
        return self.id, self.id**2


def label(names: Sequence[str], direction: str) -> Label:
    """The label of a message of the layers `names`, going "forward" or "backward"."""
    text = f"{direction} of {', '.join(names)}"
    return Label(_id(text), text)


class Reduction:
    """One all-reduce under way.

    Args:
        message: flat float64, summed up in place; ends with `sender.signature`.
        group: the ranks to add up.
        sender: label of the layers that the message belongs to.

    Raises:
        LayerMismatch: the peers are about to send another layer's message.
    """

    def __init__(self, message: Tensor, group: dist.ProcessGroup, sender: Label) -> None:
        self.group, self.sender, self.message = group, sender, message
        self.number = _agreement(group).announce(Message(sender.text, message.numel()), self._probe)
        self.work = dist.all_reduce(message, group=group, async_op=True)

    def wait(self) -> Tensor:
        """The message summed over all ranks.

        Raises:
            LayerMismatch: the ranks sent different layers' messages (on a CPU; elsewhere the sums turn into NaN,
                since reading them would stall the device).
            RuntimeError: the collective failed.
        """
        try:
            if self.work is not None:  # some backends return none
                self.work.wait()
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {dist.get_rank()}: the all-reduce of {self.sender.text} failed: a rank died, hangs, or did not "
                f"come here within the process group's timeout ({error})"
            ) from error
        if dist.get_backend(self.group) != "fake":  # which adds nothing up
            self._check()
        return self.message

    def _probe(self, number: int, length: int) -> None:
        """Take this rank's id through the collective of `length` that its peers may be in."""
        sums = self.message.new_zeros(length)
        sums[-ID_LENGTH:] = self.message[-ID_LENGTH:]
        dist.all_reduce(sums, group=self.group)
        if sums[-ID_LENGTH:].tolist() != self._expected():
            _agreement(self.group).fail(number, self.sender.text)

    def _check(self) -> None:
        expected = self._expected()
        if self.message.device.type == "cpu":
            if self.message[-ID_LENGTH:].tolist() != expected:
                _agreement(self.group).fail(self.number, self.sender.text)
        else:
            agree = (self.message[-2] == expected[0]) & (self.message[-1] == expected[1])
            self.message.masked_fill_(~agree, float("nan"))

    def _expected(self) -> list[int]:
        return [self.group.size() * number for number in self.sender.signature]


def all_ranks(condition: bool, device: torch.device) -> bool:
    """Whether `condition` holds on every rank of the world. A collective where there are several."""
    return bool(sum_over_world(torch.tensor([float(not condition)], device=device))[0] == 0)


def sum_over_world(values: Tensor) -> Tensor:
    """The sum of `values` over all ranks; `values` itself in one process."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def all_reduce_differentiable(message: Tensor, group: dist.ProcessGroup, sender: Label) -> Tensor:
    """`message`, which ends with `sender.signature`, summed over the group: traceable, differentiable at any order.

    NaN where the ranks were in different layers.
    """
    totals = _AllReduce.apply(message, group.group_name)
    if dist.get_backend(group) == "fake":
        return totals
    id, square = sender.signature
    agree = (totals[-2] == group.size() * id) & (totals[-1] == group.size() * square)
    return torch.where(agree, totals, float("nan"))


class _AllReduce(torch.autograd.Function):
    """Sum over ranks. Every rank's output depends on every rank's input, so the gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, message: Tensor, group_name: str) -> Tensor:
        ctx.group_name = group_name
        reduced = torch.ops._c10d_functional.all_reduce(message.contiguous(), "sum", group_name)
        return torch.ops._c10d_functional.wait_tensor(reduced)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _AllReduce.apply(gradient, ctx.group_name), None


@torch.compiler.assume_constant_result
def _id(text: str) -> int:
    return zlib.crc32(text.encode()) >> (32 - _ID_BITS)


def _agreement(group: dist.ProcessGroup) -> Agreement:
    if group not in _agreements:
        for gone in [g for g in _agreements if g not in dist.distributed_c10d._world.pg_map]:
            del _agreements[gone]
        _agreements[group] = Agreement(group)
    return _agreements[group]
