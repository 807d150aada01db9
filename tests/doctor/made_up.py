"""Facts of a sound world: two nodes with two ranks each, started by SLURM."""

from dataclasses import replace
from typing import Any

from syncbn.doctor.facts import Configuration, Device, Facts, Machine, Placement
from syncbn.doctor.findings import World
from syncbn.doctor.trials import Trials

RANKS, PER_NODE = 4, 2
HOSTS = ["node1", "node2"]
GIB = 2**30

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "OMP_NUM_THREADS": "2",
}


def facts_of(rank: int) -> Facts:
    host = HOSTS[rank // PER_NODE]
    return Facts(
        Placement("slurm", rank, RANKS, rank % PER_NODE, host, "node1", 15007),
        dict(SLURM),
        Configuration(
            devices=PER_NODE,
            num_nodes=2,
            strategy="SynchronisedDDPStrategy",
            device="cuda",
            backend="nccl",
            rank=rank,
            world_size=RANKS,
            global_batch_size=256,
            learning_rate_per_32_images=0.045,
            num_workers=4,
            image_bytes=4 * 3 * 224 * 224,
            data="/data/shards",
            data_digest="0123456789ab" if rank % PER_NODE == 0 else None,
            runs_folder="/shared/runs",
            checkpoint_bytes=136_000_000,
        ),
        Machine(
            versions={"python": "3.11.7", "torch": "2.13.0", "syncbn revision": "8d79d126f3e9"},
            cores=16,
            open_files=65536,
            shared_memory=8 * GIB,
            free_disk=500 * GIB,
            interfaces=["lo", "eth0", "ib0"],
            own_address=f"10.0.0.{1 + rank // PER_NODE}",
            master_address="10.0.0.1",
        ),
        [Device("H100", f"{host}-{index}", 80 * GIB, GIB) for index in range(PER_NODE)],
        rank % PER_NODE,
    )


def trials_of_a_sound_rank() -> Trials:
    return Trials("timing messages", True, None, True, 0.001, 0.0005, True, 3e-7, 5e-5, 2e10)


def sound_world() -> World:
    facts = {rank: facts_of(rank) for rank in range(RANKS)}
    hosts = {rank: HOSTS[rank // PER_NODE] for rank in range(RANKS)}
    return World(RANKS, facts, hosts, HOSTS, {rank: trials_of_a_sound_rank() for rank in range(RANKS)})


def changed(part: str, ranks: Any = range(RANKS), world: World | None = None, **values: Any) -> World:
    """A world, else the sound one, with other values in one part ("machine", ...) of the facts of some ranks."""
    world = world or sound_world()
    for rank in ranks:
        facts = world.facts[rank]
        world.facts[rank] = replace(facts, **{part: replace(getattr(facts, part), **values)})
    return world


def with_environment(**values: str | None) -> World:
    """The sound world with other environment variables; None for none."""
    world = sound_world()
    for facts in world.facts.values():
        facts.environment.update({name: value for name, value in values.items() if value is not None})
        for name in [name for name, value in values.items() if value is None]:
            del facts.environment[name]
    return world


def with_trials(rank: int, **values: Any) -> World:
    """The sound world, one rank of which fared otherwise."""
    world = sound_world()
    world.trials[rank] = replace(world.trials[rank], **values)
    return world


def without_ranks(*ranks: int) -> World:
    """The sound world, where some ranks have not come."""
    world = sound_world()
    for rank in ranks:
        del world.facts[rank], world.hosts[rank]
    return world._replace(trials={})


def started_by(launcher: str, **environment: str | None) -> World:
    """The sound world, started otherwise."""
    world = with_environment(**environment)
    for rank, facts in world.facts.items():
        world.facts[rank] = replace(facts, placement=replace(facts.placement, launcher=launcher))
    return world


def with_device(rank: int, **values: Any) -> World:
    """The sound world, where one rank's GPU is another."""
    world = sound_world()
    facts = world.facts[rank]
    devices = list(facts.devices)
    devices[rank % PER_NODE] = replace(devices[rank % PER_NODE], **values)
    world.facts[rank] = replace(facts, devices=devices)
    return world


def without_device(rank: int) -> World:
    """The sound world, where one rank sees no GPU."""
    world = sound_world()
    world.facts[rank] = replace(world.facts[rank], devices=[], own_device=None)
    return world
