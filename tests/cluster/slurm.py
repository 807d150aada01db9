"""SLURM on hosts of `hosts.py`: a controller and nodes that pretend to have GPUs."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from hosts import Host, Network, network

PROGRAMS = ("slurmctld", "slurmd", "munged", "srun")
NODES = ("node1", "node2")
GPUS = 2  # of a node

CONFIGURATION = """
ClusterName=test
SlurmctldHost=ctl({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
ReturnToService=2
JobRequeue=1
SlurmdTimeout=10
SlurmctldTimeout=15
TCPTimeout=2
MessageTimeout=10
InactiveLimit=0
KillWait=60
MinJobAge=3600
SlurmdParameters=config_overrides
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


def why_no_slurm() -> str | None:
    """Why there is no SLURM here, or None where there is."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    return f"needs {', '.join(missing)} (Debian packages slurmctld, slurmd, slurm-client, munge)" if missing else None


class Slurm:
    """A controller on host "ctl" and a daemon on each of the nodes.

    Args:
        net: Of the hosts.
        folder: For its files.
    """

    def __init__(self, net: Network, folder: Path) -> None:
        self.net, self.folder = net, folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self.environment["PATH"] += ":/usr/sbin"
        for name in ("state", "spool", "munge", "dev", "log"):
            (folder / name).mkdir()
        configuration = [CONFIGURATION.format(folder=folder, controller=net["ctl"].address)]
        for name in NODES:
            resources = f"CPUs=4 RealMemory=4000 Gres=gpu:{GPUS}"
            configuration.append(f"NodeName={name} NodeAddr={net[name].address} {resources} State=UNKNOWN\n")
        (folder / "slurm.conf").write_text("".join(configuration))
        for number in range(GPUS):  # SLURM counts only what is a device: here null's
            subprocess.run(["mknod", str(folder / f"dev/gpu{number}"), "c", "1", "3"], check=True)
        devices = f"{folder}/dev/gpu[0-{GPUS - 1}]"
        (folder / "gres.conf").write_text(f"NodeName={','.join(NODES)} Name=gpu File={devices}\n")

    def start(self) -> None:
        """Start the daemons and wait until the nodes take jobs."""
        munge = self.folder / "munge"
        key = munge / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        files = {"key-file": key, "socket": munge / "socket", "pid-file": munge / "pid", "seed-file": munge / "seed"}
        options = [f"--{name}={path}" for name, path in files.items()]
        options += ["--foreground", "--force", f"--log-file={munge}/log"]  # force: the folder may be root's alone
        self._start(self.net["ctl"], "munged", *options)
        wait_until((munge / "socket").exists, 30, "munged answers")
        self._start(self.net["ctl"], "slurmctld", "-D", "-c")
        for name in NODES:
            self.start_node(name)
        wait_until(lambda: self.states_of_nodes() == ["idle"] * len(NODES), 60, "the nodes are idle")

    def start_node(self, name: str) -> None:
        """Start the daemon of a node that has booted."""
        self._start(self.net[name], "slurmd", "-D", "-N", name)

    def _start(self, host: Host, *command: str) -> None:
        log = self.folder / "log" / f"{host.name}.{command[0]}.log"
        host.start(*command, log=log, folder=self.folder, env=self.environment)

    def run(self, *command: str, folder: Path | None = None) -> str:
        """What a command of SLURM's prints on the controller."""
        return self.net["ctl"].run(*command, folder=folder or self.folder, env=self.environment)

    def states_of_nodes(self) -> list[str]:
        """Of each node: idle, allocated, down ..."""
        question = ("sinfo", "--noheader", "--Node", "--partition=gpu", "--format=%T")
        asked = self.net["ctl"].words(*question, folder=self.folder)
        return subprocess.run(asked, env=self.environment, capture_output=True, text=True).stdout.split()

    def submit(self, script: Path, *words: str, options: tuple[str, ...] = (), folder: Path) -> str:
        """Number of the job that sbatch makes of a script, submitted from a folder."""
        return self.run("sbatch", "--parsable", *options, str(script), *words, folder=folder).strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job: JobState, Restarts, ExitCode ..."""
        shown = self.run("scontrol", "show", "job", "--oneliner", number)
        return dict(field.partition("=")[::2] for field in shown.split() if "=" in field)

    def wait_for(self, number: str, seconds: float) -> dict[str, str]:
        """The job once it has ended for good."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        wait_until(lambda: self.job(number)["JobState"] in ended, seconds, f"job {number} has ended")
        return self.job(number)


def edited(script: Path, edits: Mapping[str, str | None]) -> str:
    """The text of a launch script for this cluster: only values on its lines marked EDIT change.

    Args:
        script: Of the folder `launch`.
        edits: From what an edited line starts with, up to and including "=", to the new value; None deletes the line.

    Raises:
        AssertionError: An edit fits no line, several, or one that the script does not mark.
    """
    lines = script.read_text().splitlines()
    for start, value in edits.items():
        (place,) = (number for number, line in enumerate(lines) if line.startswith(start))
        assert "# EDIT" in lines[place] or "# EDIT" in lines[place - 1], f"{lines[place]} is not marked EDIT"
        lines[place] = "" if value is None else f"{start}{value}  # EDIT"
    return "\n".join(lines) + "\n"


def wait_until(happened: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for something to happen.

    Raises:
        AssertionError: It has not within so many seconds.
    """
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"{seconds:g} s passed before {what}"
        time.sleep(0.2)


def words_after(pattern: str, text: str) -> str:
    """The group of a pattern in a text.

    Raises:
        AssertionError: It is not there.
    """
    found = re.search(pattern, text)
    assert found, f"no {pattern} in:\n{text}"
    return found.group(1)


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """A cluster of two nodes, up and idle; where SLURM is not installed, the test is skipped."""
    reason = why_no_slurm()
    if reason:
        pytest.skip(reason)
    with network(["ctl", *NODES], folder) as net:
        cluster = Slurm(net, folder)
        cluster.start()
        yield cluster
