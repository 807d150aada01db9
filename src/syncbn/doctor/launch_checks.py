"""Whether the scheduler, the launcher and the configuration mean the same world."""

from typing import NamedTuple

from syncbn.doctor.findings import Finding, World, listed
from syncbn.training.batch_arithmetic import BatchArithmetic, count_ranks

JOB_VARIABLES = ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES", "SLURM_STEP_NUM_TASKS")


def check_arrival(world: World) -> Finding:
    """Whether every rank came and reported."""
    missing = [rank for rank in range(world.world_size) if rank not in world.hosts]
    silent = [rank for rank in world.hosts if rank not in world.facts]
    came = f"{len(world.hosts)} of {count_ranks(world.world_size)} on {listed(sorted(set(world.hosts.values())))}"
    if not missing and not silent:
        return Finding("ranks", "ok", came)
    seen, remedy = [came], []
    if missing:
        seen.append(f"missing: {_ranks(missing)}")
        present = {_short(host) for host in world.hosts.values()}
        absent = [node for node in world.nodes if _short(node) not in present]
        if absent:
            seen.append(f"no rank came from {listed(absent)}")
        remedy.append(
            "look at the logs of the missing ranks; start one process for every rank, and let every node reach"
            " MASTER_ADDR:MASTER_PORT"
        )
    if silent:
        seen.append("came, but said nothing: " + listed([f"rank {rank} on {world.hosts[rank]}" for rank in silent]))
        remedy.append(
            "their data folder may hang, or their start takes longer: --doctor.timeout SECONDS, or for a script of"
            " launch/ SYNCBN_DOCTOR_TIMEOUT=SECONDS in the environment"
        )
    return Finding("ranks", "wrong", "; ".join(seen), "; ".join(remedy))


def check_scheduler(world: World) -> Finding:
    """Whether SLURM's numbers agree with each other and with what was started."""
    environment, launcher = world.facts[0].environment, world.facts[0].placement.launcher
    if "SLURM_JOB_ID" not in environment and "SLURM_NTASKS" not in environment:
        return Finding("scheduler", "ok", f"none; started by {launcher}")
    tasks, per_node, nodes, started = (_number(environment, name) for name in JOB_VARIABLES)
    job = Job(tasks or 1, per_node, nodes, started)
    if launcher == "slurm":
        problems = _problems_of_srun(job, world.world_size, _number(environment, "WORLD_SIZE"))
    elif launcher == "torchrun":
        problems = _problems_of_torchrun(job)
    else:
        problems = _problems_without_launcher(job)
    seen = ", ".join(f"{name}={environment[name]}" for name in JOB_VARIABLES if name in environment)
    seen = f"{seen}; started by {launcher}"
    return _finding("scheduler", [seen], [problem for problem, _ in problems], [remedy for _, remedy in problems])


class Job(NamedTuple):
    """What SLURM says of a job, None where it does not.

    Attributes:
        tasks: Of the job.
        per_node: Tasks on each node, where that was asked for.
        nodes: Of the job.
        started: Tasks that srun started.
    """

    tasks: int
    per_node: int | None
    nodes: int | None
    started: int | None


def _problems_of_srun(job: Job, world_size: int, declared: int | None) -> list[tuple[str, str]]:
    """Of ranks that srun started: each problem, and how to mend it."""
    problems = []
    if job.per_node is not None and job.nodes is not None and job.tasks != job.per_node * job.nodes:
        problem = f"{job.tasks} tasks are not {job.nodes} nodes x {job.per_node} tasks per node"
        problems.append((problem, "give --nodes and --ntasks-per-node, and leave --ntasks out"))
    if job.per_node is None and job.tasks > 1:
        remedy = "Lightning needs --ntasks-per-node beside --nodes, in the place of --ntasks"
        problems.append((f"{job.tasks} tasks without --ntasks-per-node", remedy))
    if job.started is None and job.tasks > 1:
        problem = f"a job of {job.tasks} tasks, of which this is the batch script alone"
        problems.append((problem, "put srun before the command"))
    elif job.started is not None and job.started != job.tasks:
        problem = f"srun started {job.started} tasks, SLURM_NTASKS is {job.tasks}"
        problems.append((problem, "give srun no --ntasks of its own"))
    if declared is not None and declared != world_size:
        problem = f"WORLD_SIZE={declared} is set besides SLURM's {count_ranks(world_size)}"
        problems.append((problem, "unset WORLD_SIZE, RANK and LOCAL_RANK where srun starts the ranks"))
    return problems


def _problems_of_torchrun(job: Job) -> list[tuple[str, str]]:
    """Of ranks that torchrun started within a job, once on a node."""
    if job.started is None or job.nodes is None or job.started == job.nodes:
        return []
    problem = f"srun started torchrun {job.started} times on {job.nodes} nodes"
    return [(problem, "start one torchrun on a node: srun --ntasks-per-node=1")]


def _problems_without_launcher(job: Job) -> list[tuple[str, str]]:
    """Of ranks that Lightning started within a job, on one node."""
    if job.tasks == 1:
        return []
    problem = f"a job of {job.tasks} tasks, but neither srun nor torchrun started this process"
    return [(problem, "start it by srun, and let the job have a name other than bash or interactive")]


def check_world(world: World) -> Finding:
    """Whether the trainer's devices and nodes are the processes there are."""
    configuration = world.facts[0].configuration
    devices, nodes = configuration.devices, configuration.num_nodes
    if devices is None or nodes is None:
        return Finding("world", "warning", "not compared: there is no trainer", "mend the configuration first")
    size = world.world_size
    problems, remedies = [], []
    per_host = {host: len(members) for host, members in world.by_host.items()}
    fitting = max(per_host.values())
    if devices * nodes != size:
        problems.append(f"trainer.devices={devices} x trainer.num_nodes={nodes} are not the {size} processes started")
        remedies.append(f"--trainer.devices {fitting} --trainer.num_nodes {len(per_host)}, or start {devices * nodes}")
    elif len(world.facts) == size and any(count != devices for count in per_host.values()):
        uneven = ", ".join(f"{count} on {host}" for host, count in per_host.items())
        problems.append(f"trainer.devices={devices} on each of {nodes} nodes, but there are {uneven}")
        remedies.append("start the same number of processes on each node")
    problems += _misplaced(world)
    if len(problems) > len(remedies):
        remedies.append("set RANK, WORLD_SIZE and NODE_RANK as the launcher numbers the processes, or use torchrun")
    seen = f"{devices} devices x {nodes} nodes, {configuration.strategy} on {configuration.device}"
    return _finding("world", [seen], problems, remedies)


def _misplaced(world: World) -> list[str]:
    """Ranks that Lightning takes for others than the launcher does, or that differ about the size of the world."""
    problems = []
    for rank, facts in world.facts.items():
        understood = facts.configuration.rank, facts.configuration.world_size
        given = facts.placement.rank, facts.placement.world_size
        if facts.configuration.rank is not None and understood != given:
            problems.append(
                f"rank {rank} of {given[1]} on {facts.placement.host} is rank {understood[0]} of {understood[1]}"
                " for Lightning"
            )
        if facts.placement.world_size != world.world_size:
            problems.append(f"rank {rank} is in a world of {facts.placement.world_size}, rank 0 of {world.world_size}")
    return problems[:3]


def check_configuration(world: World) -> Finding:
    """Whether the words make a fit, and the same one everywhere."""
    errors = {host: [f for f in members if f.configuration.error] for host, members in world.by_host.items()}
    failed = {host: members[0].configuration.error for host, members in errors.items() if members}
    if failed:
        same = len(set(failed.values())) == 1 and len(failed) == len(world.by_host)
        said = next(iter(failed.values())) if same else "; ".join(f"{host}: {error}" for host, error in failed.items())
        return Finding("configuration", "wrong", str(said), "syncbn fit would stop with this message: see there")
    names = ("strategy", "device", "devices", "num_nodes", "global_batch_size", "accumulate_grad_batches", "data")
    for name in names:
        same, values = world.values(lambda facts, name=name: getattr(facts.configuration, name))  # type: ignore[misc]
        if not same:
            return Finding(
                "configuration", "wrong", f"{name}: {values}", "give every rank the same command line and config files"
            )
    return Finding("configuration", "ok", "the same on all ranks")


def check_batch(world: World) -> Finding:
    """Whether the global batch divides among the ranks."""
    configuration = world.facts[0].configuration
    if configuration.global_batch_size is None:
        return Finding("global batch", "warning", "not known", "mend the configuration first")
    try:
        arithmetic = BatchArithmetic(
            configuration.global_batch_size,
            world.world_size,
            configuration.accumulate_grad_batches,
            configuration.learning_rate_per_32_images,
            configuration.normalization_batch_size,
        )
    except ValueError as error:
        return Finding("global batch", "wrong", str(error), "change --global_batch_size or the number of ranks")
    return Finding("global batch", "ok", arithmetic.describe().splitlines()[0])


def _finding(check: str, seen: list[str], problems: list[str], remedies: list[str]) -> Finding:
    return Finding(check, "wrong" if problems else "ok", "; ".join(problems or seen), "; ".join(remedies))


def _number(environment: dict[str, str], name: str) -> int | None:
    value = environment.get(name, "")
    return int(value) if value.isdecimal() else None


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + listed(ranks)


def _short(host: str) -> str:
    return host.partition(".")[0]


CHECKS = (check_arrival, check_scheduler, check_world, check_configuration, check_batch)
