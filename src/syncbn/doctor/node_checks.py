"""Whether the nodes have what a run needs, and have the same."""

from collections.abc import Callable

from syncbn.doctor.facts import Facts
from syncbn.doctor.findings import Finding, World, gibibytes, listed

FREE_DISK = 5 * 2**30
"""Bytes for checkpoints: one of the full network, with momenta and averaged weights, has about 140 MB."""

CHECKPOINTS = 2
"""That must fit: the last one stays until the next is written."""

OPEN_FILES = 4096
"""Descriptors that loaders with several workers may want."""

PREFETCHED_BATCHES = 2
"""Of each worker: the default of torch's DataLoader."""


def check_versions(world: World) -> Finding:
    """Whether all ranks run the same software."""
    names = sorted({name for facts in world.facts.values() for name in facts.machine.versions})
    differing: list[str] = []
    common: list[str] = []
    for name in names:
        # A node without git, or where git took too long, does not run other software for that.
        known = {rank: facts for rank, facts in world.facts.items() if facts.machine.versions.get(name) != "unknown"}
        comparable = world._replace(facts=known or world.facts)
        same, values = comparable.values(lambda facts, name=name: facts.machine.versions.get(name, "none"))  # type: ignore[misc]
        (common if same else differing).append(f"{name} {values[:12] if same else values}")
    if differing:
        return Finding("versions", "wrong", "; ".join(differing), "install the same environment on every node")
    return Finding("versions", "ok", ", ".join(common))


def check_data(world: World) -> Finding:
    """Whether every node reads the same images."""
    readers = [facts for facts in world.facts.values() if facts.configuration.data_digest is not None]
    name = world.facts[0].configuration.data
    digests: dict[str, list[str]] = {}
    for facts in readers:
        digests.setdefault(str(facts.configuration.data_digest), []).append(facts.placement.host)
    unread = [host for host in world.by_host if not any(host in hosts for hosts in digests.values())]
    if unread:
        return Finding(
            "data",
            "wrong",
            f"{name} could not be read on {listed(unread)}",
            "put the data there under the same path, or on a file system that all nodes share",
        )
    if len(digests) > 1:
        seen = "; ".join(f"content {digest} on {listed(hosts)}" for digest, hosts in digests.items())
        return Finding("data", "wrong", f"{name} differs: {seen}", "copy the same data to every node")
    return Finding("data", "ok", f"{name}, content {next(iter(digests))} on every node")


def check_disk(world: World) -> Finding:
    """Whether rank 0 has room for checkpoints where the run folder goes, and the other nodes for what they leave."""
    configuration = world.facts[0].configuration
    folder, size = configuration.runs_folder, configuration.checkpoint_bytes or 0
    known = [facts for facts in world.facts.values() if facts.machine.free_disk is not None]
    if world.facts[0] not in known:
        return Finding("disk", "warning", "the runs folder is not known", "mend the configuration first")
    remedy = f"make room for checkpoints, or choose another --runs_folder than {folder}"
    writing, fullest = world.facts[0], min(known, key=_free_disk)  # rank 0 alone writes checkpoints
    if _free_disk(writing) < CHECKPOINTS * size:
        seen = f"{_room(writing)}: too little for {CHECKPOINTS} checkpoints of {size / 1e6:,.0f} MB"
        return Finding("disk", "wrong", seen, remedy)
    if _free_disk(fullest) < FREE_DISK:
        return Finding("disk", "warning", _room(fullest), remedy)
    return Finding("disk", "ok", _room(fullest))


def _free_disk(facts: Facts) -> int:
    return facts.machine.free_disk or 0


def _room(facts: Facts) -> str:
    where = f"{facts.configuration.runs_folder} on {facts.placement.host} (rank {facts.placement.rank})"
    return f"{gibibytes(_free_disk(facts))} free at {where}"


def check_shared_memory(world: World) -> Finding:
    """Whether the batches that workers prepare fit into /dev/shm."""
    short, seen = [], ""
    if any(
        facts.configuration.image_bytes is None and facts.configuration.num_workers for facts in world.facts.values()
    ):
        return Finding(
            "shared memory", "warning", "not looked at: the data is not known", "mend the configuration first"
        )
    for host, members in world.by_host.items():
        needed, free = sum(map(_shared_bytes, members)), members[0].machine.shared_memory
        if needed and free is not None:
            seen = seen or f"{gibibytes(free)} free for {gibibytes(needed)} of batches"
            if needed > free:
                short.append(f"{gibibytes(free)} free on {host} for {gibibytes(needed)} of batches")
    if short:
        remedy = "run the container with --ipc=host or a larger --shm-size, or lower --data.num_workers"
        return Finding("shared memory", "wrong", "; ".join(short), remedy)
    return Finding("shared memory", "ok", seen or "not needed: no workers")


def _shared_bytes(facts: Facts) -> int:
    configuration = facts.configuration
    passes = facts.placement.world_size * configuration.accumulate_grad_batches
    images = (configuration.global_batch_size or 0) // passes + 1
    return PREFETCHED_BATCHES * configuration.num_workers * images * (configuration.image_bytes or 0)


def check_open_files(world: World) -> Finding:
    """Whether the limit on open files is a generous one."""
    _, seen = world.values(lambda facts: facts.machine.open_files)
    low = world.where(lambda facts: facts.machine.open_files < OPEN_FILES and facts.configuration.num_workers)
    if low:
        return Finding("open files", "warning", f"limit {seen}", f"ulimit -n {OPEN_FILES} before the start")
    return Finding("open files", "ok", f"limit {seen}")


def check_threads(world: World) -> Finding:
    """Whether ranks and their workers do not fight for the cores."""
    crowded = []
    for host, members in world.by_host.items():
        cores = max(facts.machine.cores for facts in members)
        workers = sum(facts.configuration.num_workers for facts in members)
        given = listed(sorted({facts.environment.get("OMP_NUM_THREADS", "unset") for facts in members}))
        threads = sum(map(_threads, members))
        if threads > cores:
            crowded.append(f"{len(members)} ranks with OMP_NUM_THREADS={given} on {cores} cores of {host}")
        elif len(members) + workers > 2 * cores:
            crowded.append(f"{len(members)} ranks with {workers} workers on {cores} cores of {host}")
    if crowded:
        remedy = "give each rank its share of the cores (OMP_NUM_THREADS, --cpus-per-task), fewer --data.num_workers"
        return Finding("threads", "warning", "; ".join(crowded), remedy)
    _, seen = world.values(lambda facts: facts.environment.get("OMP_NUM_THREADS", "unset"))
    _, cores_seen = world.values(lambda facts: facts.machine.cores)
    return Finding("threads", "ok", f"OMP_NUM_THREADS {seen}, cores {cores_seen}")


def _threads(facts: Facts) -> int:
    """Of a rank; OpenMP allows a list, with a number for each level of nested regions."""
    return int((facts.environment.get("OMP_NUM_THREADS") or "1").partition(",")[0])


def check_network(world: World) -> Finding:
    """Whether host names resolve, and the interfaces named for gloo and NCCL exist."""
    several = len(world.by_host) > 1
    problems, remedies = [], []
    for variable, backend in (("GLOO_SOCKET_IFNAME", "gloo"), ("NCCL_SOCKET_IFNAME", "nccl")):
        absent = world.where(lambda facts, variable=variable: not _interface_exists(facts, variable))  # type: ignore[misc]
        if absent:
            problems.append(f"{variable}={world.facts[0].environment.get(variable)} names no interface of {absent}")
            remedies.append(f"unset {variable}, or name one of: {listed(world.facts[0].machine.interfaces)}")
        unused = world.where(lambda f, v=variable, b=backend: f.configuration.backend == b and v not in f.environment)  # type: ignore[misc]
        if several and backend == "gloo" and unused:
            lost = world.where(lambda facts: _is_loopback(facts.machine.own_address))
            if lost:
                problems.append(f"the host name of {lost} does not resolve to an address that others reach")
                remedies.append("set GLOO_SOCKET_IFNAME to the interface between the nodes, or mend /etc/hosts")
    if several and world.where(lambda facts: _is_loopback(facts.machine.master_address)):
        problems.append(f"MASTER_ADDR {world.facts[0].placement.address} is no address that other nodes reach")
        remedies.append("set MASTER_ADDR to the name of the first node")
    if problems:
        return Finding("network", "wrong", "; ".join(problems), "; ".join(remedies))
    placement = world.facts[0].placement
    return Finding("network", "ok", f"rank 0 at {placement.address}:{placement.port}")


def _is_loopback(address: str | None) -> bool:
    return address is None or address.startswith("127.") or address == "::1"


def _interface_exists(facts: Facts, variable: str) -> bool:
    """By the rules of gloo (names) and NCCL (beginnings of names; "=" exact names, "^" all others)."""
    value = facts.environment.get(variable)
    if not value or value.startswith("^"):
        return True
    names = value.lstrip("=").split(",")
    if variable.startswith("NCCL") and not value.startswith("="):
        return any(interface.startswith(name) for name in names for interface in facts.machine.interfaces)
    return all(name in facts.machine.interfaces for name in names)


CHECKS: tuple[Callable[[World], Finding], ...] = (
    check_versions,
    check_data,
    check_disk,
    check_shared_memory,
    check_open_files,
    check_threads,
    check_network,
)
