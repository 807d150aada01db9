"""Whether every rank has a GPU of its own, all of a kind and free."""

from syncbn.doctor.facts import Device, Facts
from syncbn.doctor.findings import Finding, World, gibibytes, listed

USED_MEMORY = 0.05
"""Share of a GPU's memory that its driver and this program's own context may have taken."""


def check_devices(world: World) -> Finding:
    """Whether every rank has a GPU of its own, where the trainer wants GPUs."""
    wanting = _on_gpus(world)
    if not wanting:
        idle = world.where(lambda facts: facts.devices)
        if idle:
            seen = f"there are GPUs on {idle}, but the trainer uses the CPU"
            return Finding("GPUs", "warning", seen, "--trainer.accelerator gpu")
        return Finding("GPUs", "ok", "none, and none wanted")
    without = [f"rank {facts.placement.rank} on {facts.placement.host}" for facts in wanting if not _own(facts)]
    if without:
        remedy = "request a GPU for each rank; look at CUDA_VISIBLE_DEVICES"
        return Finding("GPUs", "wrong", f"no GPU for {listed(without)}", remedy)
    if len({device.uuid for facts in wanting for device in _own(facts)}) < len(wanting):
        remedy = "let every rank see the GPUs of its node, or give each one of its own"
        return Finding("GPUs", "wrong", "several ranks have the same GPU", remedy)
    unused = [
        f"{len(members)} of {visible} on {host}"
        for host, members in world.by_host.items()
        if (visible := len({device.uuid for facts in members for device in facts.devices})) > len(members)
    ]
    if unused:
        return Finding(
            "GPUs", "warning", f"used are {listed(unused)}", "raise --trainer.devices and the number of tasks"
        )
    return Finding("GPUs", "ok", f"{len(wanting)}, one for each rank")


def check_state_of_devices(world: World) -> Finding:
    """Whether the GPUs can be opened and are all of a kind, with their memory free."""
    own = {facts.placement.rank: device for facts in _on_gpus(world) for device in _own(facts)}
    if not own:
        return Finding("state of GPUs", "ok", "none looked at")
    closed = [f"rank {rank} on {world.hosts[rank]}: {device.error}" for rank, device in own.items() if device.error]
    if closed:
        remedy = "end what holds the GPU (nvidia-smi): in compute mode EXCLUSIVE_PROCESS it takes one program"
        return Finding("state of GPUs", "wrong", f"cannot be opened: {listed(closed)}", remedy)
    taken = [
        f"rank {rank}: {gibibytes(device.used)} of {gibibytes(device.memory)}"
        for rank, device in own.items()
        if device.used is not None and device.used > USED_MEMORY * device.memory
    ]
    if taken:
        seen = f"memory taken by other programs: {listed(taken)}"
        return Finding("state of GPUs", "warning", seen, "look with nvidia-smi, and end what should not be there")
    same, kinds = world.values(
        lambda facts: tuple((device.name, device.memory) for device in _own(facts)),
        lambda kinds: listed([f"{name} with {gibibytes(memory)}" for name, memory in kinds]) or "none",
    )
    if not same:
        remedy = "all ranks wait for the slowest GPU: use nodes of one kind"
        return Finding("state of GPUs", "warning", kinds, remedy)
    return Finding("state of GPUs", "ok", kinds)


def _on_gpus(world: World) -> list[Facts]:
    return [facts for facts in world.facts.values() if facts.configuration.device == "cuda"]


def _own(facts: Facts) -> tuple[Device, ...]:
    """The GPU that a rank trains on, if it has one."""
    return () if facts.own_device is None else (facts.devices[facts.own_device],)


CHECKS = (check_devices, check_state_of_devices)
