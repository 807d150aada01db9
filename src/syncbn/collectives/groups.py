"""Groups of ranks that normalise together."""

from collections.abc import Sequence

import torch.distributed as dist


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
        return world_group()
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
    group = group or world_group()
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


def world_group() -> dist.ProcessGroup:
    """The group of all ranks."""
    world = dist.group.WORLD
    assert world is not None
    return world
