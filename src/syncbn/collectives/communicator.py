"""A communicator for the layers' messages alone, beside the one of the process group that the user gave.

A process group carries whatever the program sends. A rank that leaves the layers (it calls `eval()`, its data ends)
sends something else there, and the messages of its peers meet that: over gloo two lengths that meet abort the process,
over NCCL they hang or add garbage up. On a communicator of their own, messages meet nothing but messages.

It has the backend and the ranks of the group. PyTorch's registry of groups does not know it, since the
names of later groups depend on how many there are (`new_group(use_local_synchronization=True)`).
"""

import datetime
import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

SHARE = "SYNCBN_SHARE_COMMUNICATOR"
_NCCL_BLOCKS = 2  # a message is a few KB; NCCL's buffers grow with the thread blocks that it may use


def may_have_own(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether `own_communicator` makes one for messages on this device: the backend is known, and the user lets it."""
    if os.environ.get(SHARE, "0") not in ("", "0"):
        return False
    return backend_name(group, device) in _MAKERS and isinstance(_backend(group, device), _own_types())


def own_communicator(
    group: dist.ProcessGroup, device: torch.device, store: dist.Store, timeout: datetime.timedelta
) -> dist.ProcessGroup:
    """A communicator of the ranks of `group` that nothing else uses. All of them must come here.

    Args:
        group: the ranks; `may_have_own`.
        device: where messages lie.
        store: in which the ranks find each other; nobody else may use the connection or the keys.
        timeout: of a message.

    Raises:
        RuntimeError: some ranks do not come within the timeout, or the system has no room for more sockets.
    """
    name = backend_name(group, device)
    kind = getattr(dist.ProcessGroup.BackendType, name.upper())
    found = dist.ProcessGroup(store, group.rank(), group.size())
    found._set_default_backend(kind)
    backend = _MAKERS[name](group, store, timeout)
    for device_type in {device.type, *(d.type for d in group._device_types if backend_name(group, d) == name)}:
        found._register_backend(torch.device(device_type), kind, backend)
    found._set_group_name(_name(group, name))
    found._set_group_desc("messages of BatchNorm layers")
    return found


def carries(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether the group itself sums tensors on this device."""
    return _backend(group, device) is not None


def check_carries(group: dist.ProcessGroup, device: torch.device) -> None:
    """Refuse a group that sums nothing on this device.

    Raises:
        ValueError: it has no backend for the device.
    """
    if not carries(group, device):
        raise ValueError(
            f"the process group's backend, {dist.get_backend_config(group)}, sums nothing on {device.type}, where the "
            "sums of BatchNorm layers are that are there or, if it is cpu, on a device without float64: name a backend "
            f'for it, as in init_process_group("cpu:gloo,cuda:nccl"), and leave {SHARE} unset'
        )


def backend_name(group: dist.ProcessGroup, device: torch.device) -> str:
    """What carries messages on this device between the ranks of a group: "gloo", "nccl", ...; "" where that is unknown.

    On the host it is gloo where the group has nothing for it.
    """
    config = dist.distributed_c10d._world.pg_backend_config.get(group, "")
    names = dict(pair.split(":") for pair in config.split(",") if ":" in pair)
    return names.get(device.type, "gloo" if device.type == "cpu" and names else "")


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> datetime.timedelta:
    """How long a collective of the group may take."""
    for one in (device, *group._device_types):
        options = getattr(_backend(group, one), "options", None)
        if options is not None:
            return options._timeout
    return dist.distributed_c10d.default_pg_timeout


def when_destroyed(group: dist.ProcessGroup, callback: Callable[..., Any], *arguments: Any) -> None:
    """Call back as soon as `destroy_process_group` destroys the group, or all groups.

    PyTorch tells nobody, but forgets what it kept about the group: here that is a string of a kind whose end is noted.

    Raises:
        ValueError: it has been destroyed.
    """
    configs = dist.distributed_c10d._world.pg_backend_config
    if group not in configs:
        raise ValueError(
            f"a BatchNorm layer is to synchronise over a process group of {group.size()} ranks that was destroyed: set "
            "layer.process_group to one that is not, or to None"
        )
    configs[group] = watched = _Watched(configs[group])
    weakref.finalize(watched, callback, *arguments).atexit = False


class _Watched(str):
    """A string that can be referred to weakly."""


def _backend(group: dist.ProcessGroup, device: torch.device) -> Any:
    """What the group has for this device, without the wrapper of TORCH_DISTRIBUTED_DEBUG; None for nothing."""
    try:
        backend = group._get_backend(device)
    except RuntimeError:
        return None
    return getattr(backend, "wrapped_pg", backend)


def _own_types() -> tuple[type, ...]:
    """Of backends beside which another can be made; None is none for the host."""
    known = (getattr(dist, name, None) for name in ("ProcessGroupGloo", "ProcessGroupNCCL"))
    return (type(None), *(kind for kind in known if kind is not None))


def _name(group: dist.ProcessGroup, backend: str) -> Any:
    return f"syncbn/{group.group_name}/{backend}"


def _gloo(group: dist.ProcessGroup, store: dist.Store, timeout: datetime.timedelta) -> Any:
    return dist.ProcessGroupGloo(store, group.rank(), group.size(), timeout=timeout)


def _nccl(group: dist.ProcessGroup, store: dist.Store, timeout: datetime.timedelta) -> Any:
    """On a stream of high priority: a layer waits for its message, and nobody yet for the gradients on their way."""
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout
    options.config.max_ctas = _NCCL_BLOCKS
    options.group_name = _name(group, "nccl")
    options.global_ranks_in_group = dist.get_process_group_ranks(group)
    return dist.ProcessGroupNCCL(store, group.rank(), group.size(), options)


_MAKERS: dict[str, Callable[[dist.ProcessGroup, dist.Store, datetime.timedelta], Any]] = {"gloo": _gloo, "nccl": _nccl}
