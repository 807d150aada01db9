"""What one rank knows about itself: where it runs, on what machine, with which software."""

import json
import os
import platform
import resource
import shutil
import socket
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from syncbn.training.run.folder import source_revision

PREFIXES = ("SLURM_", "TORCHELASTIC_", "NCCL_", "GLOO_", "OMPI_COMM_WORLD_")
NAMES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"),
)
"""Environment variables, by prefix and by name, that a launcher sets or a collective reads."""

PACKAGES = ("syncbn", "torch", "lightning", "deepspeed")


@dataclass(frozen=True)
class Placement:
    """Where in the world a process is, by what its launcher told it.

    Attributes:
        launcher: "slurm", "torchrun" or "lightning" (which starts the processes of a node itself).
        rank: Of this process, from 0.
        world_size: Processes that the launcher started.
        local_rank: Of this process on its node.
        host: Name of the node.
        address: Where rank 0 is reached.
        port: Of the key-value store there.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    host: str
    address: str
    port: int


@dataclass(frozen=True)
class Configuration:
    """What the words of ``syncbn fit`` come to on one rank; None where that was not reached.

    Attributes:
        error: Why ``syncbn fit`` would not start.
        devices: Processes on a node, of the trainer.
        num_nodes: Of the trainer.
        strategy: Class of the trainer's strategy.
        device: Kind of device the trainer chose, "cpu" or "cuda".
        backend: Of the process group, "gloo" or "nccl".
        rank: Of this process, as Lightning understands the environment.
        world_size: The same.
        global_batch_size: Images of an optimiser step.
        accumulate_grad_batches: Passes of an optimiser step.
        learning_rate_per_32_images: Of the module.
        normalization_batch_size: Of the module.
        num_workers: Processes of each rank that prepare batches.
        image_bytes: Bytes of one prepared image; None where the data is not known.
        data: Where the images come from.
        data_digest: Of the names of the classes, the numbers of images and some of the images; on one rank of a node.
        runs_folder: Where run folders go, as an absolute path.
        checkpoint_bytes: Of a checkpoint, at most: the weights, their momenta and their average.
    """

    error: str | None = None
    devices: int | None = None
    num_nodes: int | None = None
    strategy: str | None = None
    device: str | None = None
    backend: str | None = None
    rank: int | None = None
    world_size: int | None = None
    global_batch_size: int | None = None
    accumulate_grad_batches: int = 1
    learning_rate_per_32_images: float = 0.0
    normalization_batch_size: int | None = None
    num_workers: int = 0
    image_bytes: int | None = None
    data: str | None = None
    data_digest: str | None = None
    runs_folder: str | None = None
    checkpoint_bytes: int | None = None


@dataclass(frozen=True)
class Machine:
    """The node of a rank.

    Attributes:
        versions: Of Python and the packages, and syncbn's git revision, "unknown" where git did not tell it.
        cores: Processor cores that this process may use.
        open_files: Limit on open files.
        shared_memory: Free bytes of /dev/shm; None where there is none.
        free_disk: Free bytes where the run folder goes.
        interfaces: Names of the network interfaces.
        own_address: What the host's name resolves to; None where it does not.
        master_address: What MASTER_ADDR resolves to; None where it does not.
    """

    versions: dict[str, str]
    cores: int
    open_files: int
    shared_memory: int | None
    free_disk: int | None
    interfaces: list[str]
    own_address: str | None
    master_address: str | None


@dataclass(frozen=True)
class Device:
    """A GPU that a rank sees.

    Attributes:
        name: Of its kind.
        uuid: Of the very device.
        memory: Its bytes.
        used: Bytes taken before this program took any; None of a GPU that the rank does not train on.
        error: Why the rank cannot use the GPU that it trains on; None if nothing is known against it.
    """

    name: str
    uuid: str
    memory: int
    used: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class Facts:
    """All that one rank knows. `own_device` is the place in `devices` of the one it trains on."""

    placement: Placement
    environment: dict[str, str]
    configuration: Configuration
    machine: Machine
    devices: list[Device] = field(default_factory=list)
    own_device: int | None = None

    def to_json(self) -> str:
        """As text for the store."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Facts":
        """What `to_json` wrote."""
        read = json.loads(text)
        return Facts(
            Placement(**read["placement"]),
            read["environment"],
            Configuration(**read["configuration"]),
            Machine(**read["machine"]),
            [Device(**device) for device in read["devices"]],
            read["own_device"],
        )


def collect_facts(placement: Placement, configuration: Configuration) -> Facts:
    """Look around on this rank. Takes no part in any communication."""
    environment = {
        name: value for name, value in sorted(os.environ.items()) if name in NAMES or name.startswith(PREFIXES)
    }
    has_own = configuration.device == "cuda" and placement.local_rank < torch.cuda.device_count()
    own = placement.local_rank if has_own else None
    devices = [look_at_device(index, index == own) for index in range(torch.cuda.device_count())]
    return Facts(placement, environment, configuration, look_at_machine(placement, configuration), devices, own)


def look_at_machine(placement: Placement, configuration: Configuration) -> Machine:
    """The node of this rank."""
    runs = existing_part(Path(configuration.runs_folder)) if configuration.runs_folder else None
    shared_memory = Path("/dev/shm")
    return Machine(
        versions=software_versions(),
        cores=usable_cores(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        shared_memory=shutil.disk_usage(shared_memory).free if shared_memory.is_dir() else None,
        free_disk=shutil.disk_usage(runs).free if runs else None,
        interfaces=[name for _, name in socket.if_nameindex()],
        own_address=resolved(placement.host),
        master_address=resolved(placement.address),
    )


def usable_cores() -> int:
    """Processor cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def software_versions() -> dict[str, str]:
    """Of everything that has to be the same on all ranks."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue  # deepspeed is an extra
    versions["syncbn revision"] = source_revision()
    if torch.version.cuda:
        versions["CUDA"] = torch.version.cuda
    if torch.cuda.is_available():
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return versions


def look_at_device(index: int, is_own: bool) -> Device:
    """A GPU of this process; of its own, what others have taken of the memory, too.

    Not of all GPUs, since asking may take memory itself, and each rank of the node would ask.
    """
    properties = torch.cuda.get_device_properties(index)
    device = Device(properties.name, str(properties.uuid), properties.total_memory)
    if not is_own:
        return device
    try:
        return replace(device, used=memory_used(index))
    except RuntimeError as error:
        return replace(device, error=" ".join(str(error).split()))


def memory_used(index: int) -> int:
    """Bytes taken of a GPU's memory.

    Raises:
        RuntimeError: The GPU cannot be opened.
    """
    try:
        return torch.cuda.device_memory_used(index)  # by NVML, without opening the GPU
    except Exception:  # nvidia-ml-py is not installed, or one of its own errors, which are plain Exceptions
        free, total = torch.cuda.mem_get_info(index)
        return total - free


def resolved(host: str) -> str | None:
    """The IPv4 or IPv6 address of a host name, None where it has none."""
    try:
        return str(socket.getaddrinfo(host, None)[0][4][0])
    except OSError:
        return None


def existing_part(path: Path) -> Path:
    """The longest beginning of a path that exists."""
    return next(part for part in (path, *path.parents) if part.exists())
