"""What every rank of the world is asked, by the trainer and the experiments."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.collectives.communicator import carries, check_carries
from syncbn.collectives.groups import world_group


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
    sums = values if carries(world_group(), values.device) else values.cpu()
    check_carries(world_group(), sums.device)
    dist.all_reduce(sums)
    return sums.to(values.device)


def gather_objects(mine: Any) -> list[Any]:
    """What each rank of the world gave, on every rank."""
    if not dist.is_available() or not dist.is_initialized():
        return [mine]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return gathered
