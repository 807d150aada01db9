"""How many processes torchrun, srun or DeepSpeed's launcher started: a run's devices and num_nodes follow from it."""

from collections.abc import Mapping, MutableMapping, Sequence

ATTEMPT = "TORCHELASTIC_RESTART_COUNT"
"""Environment variable: how often torchrun has started the ranks again."""

INTERACTIVE_JOBS = ("bash", "interactive")
"""Names of SLURM jobs within which Lightning, too, starts the processes itself."""


def agent_keeps_store(environment: Mapping[str, str]) -> bool:
    """Whether torchrun's agent keeps the key-value store of the ranks, and no rank does."""
    return environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def attempt_of(environment: Mapping[str, str]) -> str:
    """The number of this attempt of torchrun, whose store may outlive its workers; "0" under other launchers."""
    return environment.get(ATTEMPT, "0")


def launched_processes(environment: MutableMapping[str, str]) -> dict[str, int]:
    """The trainer's ``devices`` (processes on a node) and ``num_nodes``, as the launcher has decided them.

    Args:
        environment: Variables of the process. DeepSpeed's launcher calls the number of the node by a name of its own;
            it is added under the one that Lightning reads.

    Returns:
        Nothing where no launcher started this process.

    Raises:
        ValueError: The nodes have different numbers of processes, so that some of them would be left out of the run.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        return _devices_and_nodes(int(environment["WORLD_SIZE"]), int(environment["LOCAL_WORLD_SIZE"]), "torchrun")
    if "CROSS_RANK" in environment and "LOCAL_SIZE" in environment:
        environment.setdefault("NODE_RANK", environment["CROSS_RANK"])
        return _devices_and_nodes(int(environment["WORLD_SIZE"]), int(environment["LOCAL_SIZE"]), "deepspeed")
    if "SLURM_NTASKS" in environment and environment.get("SLURM_JOB_NAME") not in INTERACTIVE_JOBS:
        return _slurm_tasks(environment)
    return {}


def _slurm_tasks(environment: Mapping[str, str]) -> dict[str, int]:
    tasks, nodes = int(environment["SLURM_NTASKS"]), int(environment["SLURM_NNODES"])
    if "SLURM_STEP_ID" not in environment and tasks > 1:
        raise ValueError(f"this is one process, where SLURM has a place for {tasks} tasks: start it by srun")
    if "SLURM_NTASKS_PER_NODE" not in environment and tasks > 1:
        raise ValueError(
            f"SLURM started {tasks} tasks on {nodes} nodes without --ntasks-per-node: ask for"
            f" --ntasks-per-node={max(1, tasks // nodes)} instead of --ntasks"
        )
    devices = int(environment.get("SLURM_NTASKS_PER_NODE", "1"))
    if tasks != devices * nodes:
        raise ValueError(
            f"SLURM started {tasks} tasks on {nodes} nodes, not {devices} on each: --ntasks={tasks} does not fit"
            f" --ntasks-per-node={devices}; leave --ntasks out"
        )
    return {"devices": devices, "num_nodes": nodes}


def _devices_and_nodes(world_size: int, here: int, launcher: str) -> dict[str, int]:
    if world_size % here:
        raise ValueError(
            f"{launcher} started {world_size} processes, {here} of them on this node: start as many on each node"
        )
    return {"devices": here, "num_nodes": world_size // here}


def follow_launcher(words: Sequence[str], environment: MutableMapping[str, str]) -> dict[str, int]:
    """What replaces ``devices`` and ``num_nodes`` of a config file.

    Args:
        words: Of the command line. What they say of either is left as it is, for Lightning to compare with the
            launcher.
        environment: Variables of the process.

    Returns:
        As `launched_processes`, without what the words say.

    Raises:
        ValueError: As `launched_processes`.
    """
    said = {word.partition("=")[0] for word in words}
    launched = launched_processes(environment)
    return {name: number for name, number in launched.items() if f"--trainer.{name}" not in said}
