"""``syncbn doctor`` on real processes, and what it does about ranks that are late, silent or gone."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from made_up import facts_of

from syncbn.cli import main
from syncbn.doctor import command
from syncbn.doctor.command import Examination
from syncbn.doctor.facts import Placement
from syncbn.doctor.meeting import Meeting
from syncbn.doctor.trials import compare_clocks, sees_common_file

FASHION_MNIST = Path(__file__).parents[2] / "configs" / "fashion_mnist.yaml"
SMALL = ["--model.width_multiplier=0.125", "--data.image_size=16"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def read_findings(path: Path) -> dict[str, dict[str, str]]:
    """The findings by the names of their checks."""
    return {row["check"]: row for row in json.loads(path.read_text())}


def test_two_processes_of_its_own(tmp_path):
    findings_file = tmp_path / "findings.json"
    words = [f"--config={FASHION_MNIST}", *SMALL, f"--doctor.json={findings_file}"]
    finished = subprocess.run(
        [sys.executable, "-m", "syncbn", "doctor", *words],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert finished.returncode == 0 and "Traceback" not in finished.stderr, finished.stderr
    findings = read_findings(findings_file)
    verdicts = {check: row["verdict"] for check, row in findings.items()}
    assert "wrong" not in verdicts.values() and verdicts["messages"] == verdicts["data"] == "ok", findings
    assert "2 of 2 ranks" in findings["ranks"]["seen"] and "ms" in findings["speed"]["seen"]
    assert [path.name for path in tmp_path.iterdir()] == ["findings.json"], "no run folder, no trace of the file tried"


@pytest.mark.usefixtures("own_folder")
def test_a_job_with_fewer_tasks_than_its_nodes_and_tasks_per_node_say(monkeypatch, tmp_path):
    """Lightning trains on one device then, and says nothing (Lightning issue 20391)."""
    slurm = {"JOB_ID": "1", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "NNODES": "1"}
    slurm |= {"NTASKS_PER_NODE": "2", "NTASKS": "1", "STEP_NUM_TASKS": "1"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    words = [f"--config={FASHION_MNIST}", *SMALL]
    assert Examination([*words, "--data.root=nowhere"], 60, Path("1.json")).run() == 1
    findings = read_findings(Path("1.json"))
    assert "1 tasks are not 1 nodes x 2 tasks per node" in findings["scheduler"]["seen"]
    assert "no data at 'nowhere'" in findings["configuration"]["seen"]
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    assert Examination(words, 60, Path("2.json")).run() == 1
    findings = read_findings(Path("2.json"))
    assert {name for name, row in findings.items() if row["verdict"] == "wrong"} == {"scheduler", "configuration"}
    assert "--ntasks=1 does not fit --ntasks-per-node=2" in findings["configuration"]["seen"]


@pytest.fixture
def examined(monkeypatch):
    """How long examinations were to wait, none of which takes place."""
    waits = []

    class NoExamination:
        def __init__(self, words: list[str], timeout: float, json: Path | None) -> None:
            waits.append(timeout)

        def run(self) -> int:
            return 0

    monkeypatch.setattr(command, "Examination", NoExamination)
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda *arguments, **options: None)
    monkeypatch.setattr("os._exit", lambda status: None)
    monkeypatch.setattr(sys, "argv", ["syncbn"])
    return waits


def test_the_time_to_wait_comes_from_the_option_else_from_the_environment(monkeypatch, examined):
    monkeypatch.delenv("SYNCBN_DOCTOR_TIMEOUT", raising=False)
    command.run([])
    monkeypatch.setenv("SYNCBN_DOCTOR_TIMEOUT", "300")
    command.run([])
    command.run(["--doctor.timeout=45.5"])
    assert examined == [120, 300, 45.5]


@pytest.mark.parametrize("bad", ["", "5 min", "0", "-1", "nan", "inf"])
def test_a_time_that_is_none_is_one_line(monkeypatch, examined, bad, capsys):
    monkeypatch.setenv("SYNCBN_DOCTOR_TIMEOUT", bad)
    with pytest.raises(SystemExit) as exited:
        main(["doctor"])
    [line] = capsys.readouterr().err.splitlines()
    assert exited.value.code == 1 and examined == []
    assert line.startswith(f"syncbn: error: the doctor cannot wait {bad!r} seconds") and "SYNCBN_DOCTOR_TIMEOUT" in line


# ---- ranks as threads of this process --------------------------------------------------------------


def meetings(seconds: float = 20) -> list[Meeting]:
    """Those of two ranks."""
    placements = [Placement("slurm", rank, 2, rank, f"node{rank}", "127.0.0.1", free_port()) for rank in range(2)]
    first = Meeting(placements[0], seconds)
    return [first, Meeting(Placement("slurm", 1, 2, 1, "node1", "127.0.0.1", first.tcp_store.port), seconds)]


def on_two_ranks(function: Callable[[int], Any]) -> list[Any]:
    results: list[Any] = [None, None]

    def keep(rank: int) -> None:
        results[rank] = function(rank)

    other = threading.Thread(target=keep, args=(1,), daemon=True)
    other.start()
    keep(0)
    other.join(30)
    assert not other.is_alive()
    return results


def test_clocks_that_differ():
    both = meetings()

    def compare(rank: int) -> tuple[float, float]:
        return compare_clocks(both[rank], lambda: time.time() + 5 * rank)

    [first, (offset, uncertainty)] = on_two_ranks(compare)
    assert first == (0.0, 0.0)
    assert abs(offset - 5) <= uncertainty + 0.01


def test_a_folder_that_only_one_node_sees(tmp_path):
    both = meetings()
    assert on_two_ranks(lambda rank: sees_common_file(both[rank], str(tmp_path / "runs"))) == [True, True]
    assert list(tmp_path.iterdir()) == []
    both = meetings()
    assert on_two_ranks(lambda rank: sees_common_file(both[rank], None)) == [None, None]


def test_a_rank_that_does_not_come_is_named_in_time():
    meeting = meetings(0.5)[0]
    meeting.tell("host", "node0")
    assert meeting.gather("host", [0, 1]) == {0: "node0"}
    with pytest.raises(TimeoutError, match="heard nothing of rank 1 about host"):
        meeting.hear("host", 1)


def test_without_rank_0_there_is_one_line(capfd):
    placement = Placement("slurm", 1, 2, 1, "node1", "127.0.0.1", free_port())
    with pytest.raises(OSError, match=r"rank 1 on node1 gets no answer within 0\.5 s from rank 0 at 127\.0\.0\.1"):
        Meeting(placement, 0.5)


def test_a_rank_that_hangs_in_the_trials_is_named(monkeypatch, tmp_path):
    never = threading.Event()

    def hang(meeting: Meeting, facts: Any) -> None:
        meeting.tell("trials", command.Trials(stage="adding up numbers").to_json())
        if facts.placement.rank == 0:
            meeting.tell("trials", command.Trials(stage="timing messages", finished=True).to_json())
            meeting.tell("end of trials", "")
            return
        never.wait()

    monkeypatch.setattr(command, "take_part", hang)
    monkeypatch.setattr(command, "nodes_of_job", lambda: [])
    both = meetings()
    statuses = on_two_ranks(lambda rank: lead_or_follow(both[rank], rank, tmp_path / "findings.json"))
    never.set()
    assert statuses == [1, 1] and not dist.is_initialized()
    findings = read_findings(tmp_path / "findings.json")
    assert findings["messages"]["verdict"] == "wrong"
    assert findings["messages"]["seen"] == "rank 1 on node1 is still adding up numbers"


def lead_or_follow(meeting: Meeting, rank: int, findings: Path) -> int:
    examination = Examination([], 2.0, findings)
    made_up = facts_of(rank)
    placement = Placement("slurm", rank, 2, rank, f"node{rank}", "127.0.0.1", meeting.tcp_store.port)
    facts = type(made_up)(placement, made_up.environment, made_up.configuration, made_up.machine)
    meeting.tell("host", placement.host)
    meeting.tell("facts", facts.to_json())
    return examination._lead(meeting, facts) if rank == 0 else examination._follow(meeting, facts)
