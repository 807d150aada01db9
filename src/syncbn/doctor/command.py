"""``syncbn doctor WORDS``: the words of a ``syncbn fit``, started by the launcher that would start it.

::

    syncbn doctor --config configs/fashion_mnist.yaml
    torchrun --nproc-per-node 8 -m syncbn doctor --config CONFIG
    srun syncbn doctor --config CONFIG --trainer.num_nodes 2 --trainer.devices 8

Rank 0 prints one table. The exit status is 1 on every rank where something is wrong, 0 otherwise.
"""

import argparse
import faulthandler
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from syncbn.doctor.configuration import FitConfiguration
from syncbn.doctor.facts import Facts, Placement, collect_facts
from syncbn.doctor.findings import World
from syncbn.doctor.launch import placement_by_environment, placement_by_lightning
from syncbn.doctor.meeting import Meeting
from syncbn.doctor.report import judge, print_report, write_json
from syncbn.doctor.trials import Trials, take_part
from syncbn.paths import expand_home

LEAVE_SECONDS = 10.0
"""For other ranks to read the verdict, and for processes to end."""

TIMEOUT = "SYNCBN_DOCTOR_TIMEOUT"
"""Environment variable for the option's value: the scripts in launch/ give the doctor the words of the fit alone."""

LONGEST_TIMEOUT = 86400.0
"""Seconds."""

PATIENCE = 6
"""Times the timeout, after which the doctor gives itself up."""


def run(words: Sequence[str]) -> None:
    """Examine the cluster; exits with 1 where something is wrong.

    Args:
        words: Those of ``syncbn fit``, and the doctor's own options.
    """
    parser = argparse.ArgumentParser(
        "syncbn doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--doctor.timeout",
        dest="timeout",
        default=os.environ.get(TIMEOUT, "120"),
        help=f"seconds to wait for the other ranks (default: {TIMEOUT}, else 120)",
    )
    parser.add_argument("--doctor.json", dest="json", type=Path, help="a file to write the findings to, besides")
    options, fit_words = parser.parse_known_args(words)
    timeout, findings = seconds(options.timeout), expand_home(options.json)
    # A file system that does not answer would hold up even the search for what is wrong.
    faulthandler.dump_traceback_later(PATIENCE * timeout, exit=True)
    status = Examination(fit_words, timeout, findings).run()
    sys.stdout.flush()
    os._exit(status)  # what a broken process group has left behind must not hold up the end


def seconds(text: str) -> float:
    """The time to wait for the other ranks.

    Raises:
        ValueError: The text is no number of seconds.
    """
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= LONGEST_TIMEOUT:
        raise ValueError(
            f"the doctor cannot wait {text!r} seconds: give --doctor.timeout or {TIMEOUT} a number above 0,"
            f" up to {LONGEST_TIMEOUT:g}"
        )
    return number


class Examination:
    """One rank's part in it.

    Args:
        words: Of ``syncbn fit``.
        timeout: Seconds to wait for other ranks, for each of the parts.
        json: Where rank 0 writes the findings, besides.
    """

    def __init__(self, words: Sequence[str], timeout: float, json: Path | None) -> None:
        self.words, self.timeout, self.json = words, timeout, json

    def run(self) -> int:
        """Returns the exit status."""
        placement, plan = placement_by_environment(), None
        processes: list[subprocess.Popen] = []
        if placement is None:
            plan = FitConfiguration(self.words)
            processes = start_other_ranks(plan.trainer)
            placement = placement_by_lightning(plan.trainer)
        try:
            return self._meet(placement, plan)
        finally:
            for process in processes:
                end(process)

    def _meet(self, placement: Placement, plan: FitConfiguration | None) -> int:
        meeting = Meeting(placement, self.timeout)
        placement = replace(placement, port=meeting.tcp_store.port)
        meeting.tell("host", placement.host)
        plan = plan or FitConfiguration(self.words)
        facts = collect_facts(placement, plan.configuration(reads_data=placement.local_rank == 0))
        meeting.tell("facts", facts.to_json())
        return self._lead(meeting, facts) if placement.rank == 0 else self._follow(meeting, facts)

    def _lead(self, meeting: Meeting, facts: Facts) -> int:
        everyone = list(range(meeting.world_size))
        reported = {rank: Facts.from_json(text) for rank, text in meeting.gather("facts", everyone).items()}
        hosts = {rank: host for rank in everyone if (host := meeting.said("host", rank)) is not None}
        all_here = len(reported) == len(everyone)
        meeting.tell("trials are held", "yes" if all_here else "no")
        trials = self._hold_trials(meeting, facts) if all_here else {}
        findings = judge(World(meeting.world_size, reported, hosts, nodes_of_job(), trials))
        print_report(findings)
        if self.json is not None:
            write_json(findings, self.json)
        status = int(any(finding.verdict == "wrong" for finding in findings))
        meeting.tell("verdict", str(status))
        meeting.extend(LEAVE_SECONDS)
        meeting.gather("left", [rank for rank in reported if rank > 0])  # the store goes with this process
        return status

    def _follow(self, meeting: Meeting, facts: Facts) -> int:
        meeting.extend(2 * self.timeout)  # rank 0 may wait for others
        if meeting.hear("trials are held", 0) == "yes":
            self._hold_trials(meeting, facts)
        meeting.extend(2 * self.timeout)
        status = int(meeting.hear("verdict", 0))
        meeting.tell("left", "")
        started_by_rank_0 = facts.placement.launcher == "lightning" and facts.placement.local_rank > 0
        return 0 if started_by_rank_0 else status

    def _hold_trials(self, meeting: Meeting, facts: Facts) -> dict[int, Trials]:
        """Take part in a thread, which may hang; what the ranks said of how they fared."""
        meeting.extend(self.timeout)
        own_meeting = Meeting(facts.placement, self.timeout, keeps_store=False)
        thread = threading.Thread(target=take_part, args=(own_meeting, facts), daemon=True)
        thread.start()
        waits_for = list(range(meeting.world_size)) if meeting.rank == 0 else [meeting.rank]
        meeting.gather("end of trials", waits_for)
        thread.join(1.0)
        told = {rank: meeting.said("trials", rank) for rank in waits_for}
        trials = {rank: Trials.from_json(text) if text else Trials() for rank, text in told.items()}
        if trials[meeting.rank].finished and dist.is_initialized():
            dist.destroy_process_group()
        return trials


def start_other_ranks(trainer: Trainer | None) -> list[subprocess.Popen]:
    """Have Lightning start the other processes of this node, as it does for a fit; returns them.

    Raises:
        ValueError: The strategy starts processes that do not run this command.
    """
    launcher = trainer.strategy.launcher if trainer else None
    if launcher is None:
        return []
    if not isinstance(launcher, _SubprocessScriptLauncher):
        assert trainer is not None
        raise ValueError(
            f"syncbn doctor cannot start the ranks of {type(trainer.strategy).__name__} by itself:"
            " start it by torchrun or srun"
        )
    if not launcher.cluster_environment.creates_processes_externally:
        # Not launch(), whose observer would kill this process if another died: its report is to be read.
        launcher._call_children_scripts()
    return launcher.procs


def end(process: subprocess.Popen) -> None:
    """Wait a little for a process to end by itself, then end it."""
    try:
        process.wait(LEAVE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def nodes_of_job() -> list[str]:
    """Names of the nodes of the SLURM job; none where there is no job."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        return []
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []
