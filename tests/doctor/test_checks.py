"""Each check of the doctor's, on a sound world and on one with one thing wrong."""

import io
import json

import pytest
from made_up import (
    GIB,
    changed,
    facts_of,
    sound_world,
    started_by,
    with_device,
    with_environment,
    with_trials,
    without_device,
    without_ranks,
)
from rich.console import Console

from syncbn.doctor.facts import Facts
from syncbn.doctor.findings import Finding, World
from syncbn.doctor.report import CHECKS, judge, print_report, write_json


def test_nothing_is_wrong_with_a_sound_world():
    findings = judge(sound_world())
    assert [finding for finding in findings if finding.verdict != "ok"] == []
    assert len({finding.check for finding in findings}) == len(CHECKS)


def test_facts_survive_the_store():
    assert Facts.from_json(facts_of(3).to_json()) == facts_of(3)


two_hosts_two_tasks = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
WRONG = {
    "ranks that did not come": (without_ranks(2, 3), "ranks", "missing: ranks 2, 3; no rank came from node2"),
    "fewer tasks than nodes x tasks per node": (
        with_environment(**two_hosts_two_tasks),
        "scheduler",
        "2 tasks are not 2 nodes x 2 tasks per node",
    ),
    "tasks not per node": (with_environment(SLURM_NTASKS_PER_NODE=None), "scheduler", "without --ntasks-per-node"),
    "no srun": (with_environment(SLURM_STEP_NUM_TASKS=None), "scheduler", "the batch script alone"),
    "srun with a number of its own": (with_environment(SLURM_STEP_NUM_TASKS="8"), "scheduler", "srun started 8 tasks"),
    "torchrun's variables left over": (with_environment(WORLD_SIZE="8"), "scheduler", "WORLD_SIZE=8"),
    "two torchruns on a node": (started_by("torchrun"), "scheduler", "started torchrun 4 times on 2 nodes"),
    "neither srun nor torchrun": (started_by("lightning"), "scheduler", "neither srun nor torchrun"),
    "fewer devices than processes": (
        changed("configuration", devices=1),
        "world",
        "trainer.devices=1 x trainer.num_nodes=2 are not the 4 processes",
    ),
    "more nodes than there are": (changed("configuration", num_nodes=3), "world", "trainer.num_nodes=3"),
    "the right number, otherwise on the nodes": (
        changed("configuration", devices=4, num_nodes=1),
        "world",
        "2 on node1, 2 on node2",
    ),
    "a rank that Lightning takes for another": (
        changed("configuration", [3], rank=1),
        "world",
        "rank 3 of 4 on node2 is rank 1 of 4 for Lightning",
    ),
    "a rank in a world of its own": (changed("placement", [1], world_size=1), "world", "rank 1 is in a world of 1"),
    "words that make no fit": (changed("configuration", error="no data at x"), "configuration", "no data at x"),
    "the same on one node": (changed("configuration", [2], error="no data"), "configuration", "node2: no data"),
    "another command line": (
        changed("configuration", [2, 3], global_batch_size=128),
        "configuration",
        "global_batch_size: 256 on node1; 128 on node2",
    ),
    "a batch that does not divide": (changed("configuration", global_batch_size=254), "global batch", "254"),
    "other versions": (
        changed("machine", [2, 3], versions={"python": "3.11.7", "torch": "2.12.1", "syncbn revision": "8d79d126f3e9"}),
        "versions",
        "torch 2.13.0 on node1; 2.12.1 on node2",
    ),
    "other data": (changed("configuration", [2], data_digest="other"), "data", "content other on node2"),
    "data missing": (changed("configuration", [2], data_digest=None), "data", "could not be read on node2"),
    "no room for two checkpoints": (
        changed("machine", [0, 1], free_disk=GIB // 4),
        "disk",
        "0.2 GiB free at /shared/runs on node1 (rank 0): too little for 2 checkpoints of 136 MB",
    ),
    "too little shared memory": (changed("machine", [2, 3], shared_memory=GIB // 16), "shared memory", "on node2"),
    "an interface that does not exist": (with_environment(GLOO_SOCKET_IFNAME="eth7"), "network", "eth7"),
    "the same for NCCL": (with_environment(NCCL_SOCKET_IFNAME="=ib"), "network", "=ib names no interface"),
    "a master on the loopback": (changed("machine", [2], master_address="127.0.0.1"), "network", "MASTER_ADDR node1"),
    "a host name on the loopback, with gloo": (
        changed("configuration", world=changed("machine", own_address="127.0.1.1"), backend="gloo"),
        "network",
        "the host name of node1, node2",
    ),
    "a rank without a GPU": (without_device(3), "GPUs", "no GPU for rank 3 on node2"),
    "one GPU for two": (with_device(1, uuid="node1-0"), "GPUs", "the same GPU"),
    "a GPU that another program holds alone": (
        with_device(3, used=None, error="CUDA-capable device(s) is/are busy or unavailable"),
        "state of GPUs",
        "rank 3 on node2: CUDA-capable device(s) is/are busy",
    ),
    "a run folder of rank 0's node alone": (with_trials(2, sees_run_folder=False), "run folder", "node2 do not see"),
    "a collective that failed": (
        with_trials(1, error="refused", stage="joining the process group", finished=False),
        "messages",
        "rank 1 on node1, joining the process group: refused",
    ),
    "a collective that hangs": (
        with_trials(3, stage="adding up numbers", finished=False, sum_is_exact=None),
        "messages",
        "rank 3 on node2 is still adding up numbers",
    ),
    "sums that are wrong": (with_trials(0, sum_is_exact=False), "messages", "sums in float64 are wrong on ranks 0"),
    "a layer that is wrong": (with_trials(0, layer_error=float("nan")), "messages", "wrong by nan"),
}


def finding_of(world: World, check: str) -> Finding:
    [finding] = [finding for finding in judge(world) if finding.check == check]
    return finding


def test_what_could_not_be_looked_at_is_not_called_right():
    finding = finding_of(changed("configuration", [2], image_bytes=None), "shared memory")
    assert finding.verdict == "warning" and "not looked at" in finding.seen


@pytest.mark.parametrize(("world", "check", "seen"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_found_and_has_a_remedy(world, check, seen):
    finding = finding_of(world, check)
    assert finding.verdict == "wrong" and seen in finding.seen and finding.remedy, finding


WARNINGS = {
    "a disk that is filling": (
        changed("machine", free_disk=GIB),
        "disk",
        "1.0 GiB free at /shared/runs on node1 (rank 0)",
    ),
    "another node's full disk": (
        changed("machine", [3], free_disk=0),
        "disk",
        "0.0 GiB free at /shared/runs on node2 (rank 3)",
    ),
    "few open files": (changed("machine", [2], open_files=1024), "open files", "1024 on node2"),
    "too many threads": (with_environment(OMP_NUM_THREADS="16"), "threads", "2 ranks with OMP_NUM_THREADS=16 on 16"),
    "another kind of GPU": (with_device(3, name="A100"), "state of GPUs", "A100 with 80.0 GiB on node2"),
    "a GPU in use": (with_device(3, used=40 * GIB), "state of GPUs", "rank 3: 40.0 GiB of 80.0 GiB"),
    "GPUs without a rank": (with_device(0, uuid="node1-2"), "GPUs", "2 of 3 on node1"),
    "GPUs left idle": (
        changed("configuration", device="cpu", backend="gloo"),
        "GPUs",
        "the trainer uses the CPU",
    ),
    "a clock that is off": (with_trials(2, clock_offset=-3.0), "clocks", "node2 -3.000 s"),
    "a slow network": (with_trials(2, latency=0.02), "speed", "20.00 ms"),
    "no trials": (without_ranks(3), "run folder", "not tried"),
}


@pytest.mark.parametrize(("world", "check", "seen"), WARNINGS.values(), ids=WARNINGS.keys())
def test_what_is_doubtful_is_found_and_has_a_remedy(world, check, seen):
    finding = finding_of(world, check)
    assert finding.verdict == "warning" and seen in finding.seen and finding.remedy, finding


def test_ranks_that_came_and_fell_silent_are_named_with_their_hosts():
    world = without_ranks(2)
    world.hosts[2] = "node2"
    finding = judge(world)[0]
    assert finding.verdict == "wrong" and "rank 2 on node2" in finding.seen and "--doctor.timeout" in finding.remedy
    assert "SYNCBN_DOCTOR_TIMEOUT" in finding.remedy, "since a script takes no option of the doctor's"


def test_a_rank_whose_git_did_not_answer_does_not_stop_the_job():
    others = sound_world().facts[0].machine.versions
    without = changed("machine", [1, 3], versions=others | {"syncbn revision": "unknown"})
    assert finding_of(without, "versions").verdict == "ok"
    nowhere = changed("machine", versions=others | {"syncbn revision": "unknown"})
    assert finding_of(nowhere, "versions").verdict == "ok"
    differing = changed("machine", [2], without, versions=others | {"syncbn revision": "another"})
    assert finding_of(differing, "versions").verdict == "wrong"


def test_threads_for_nested_regions_count_by_the_first_number():
    assert finding_of(with_environment(OMP_NUM_THREADS="4,2"), "threads").verdict == "ok"
    assert finding_of(with_environment(OMP_NUM_THREADS="16,2"), "threads").verdict == "warning"


def test_a_check_that_fails_is_a_finding_beside_the_others():
    finding = finding_of(with_environment(OMP_NUM_THREADS="many"), "threads")
    assert finding.verdict == "wrong" and "ValueError" in finding.seen and "'many'" in finding.seen and finding.remedy
    assert len(judge(with_environment(OMP_NUM_THREADS="many"))) == len(CHECKS)


def test_loopback_names_do_not_matter_on_one_node():
    world = changed("machine", own_address="127.0.1.1", master_address="127.0.0.1")
    for rank in (2, 3):
        del world.facts[rank]
    assert finding_of(world, "network").verdict == "ok"


def test_the_table_has_a_row_for_each_check(tmp_path):
    text = io.StringIO()
    findings = judge(with_trials(2, clock_offset=-3.0))
    print_report(findings, Console(file=text))
    for finding in findings:
        assert finding.check in text.getvalue()
    assert f"{len(findings) - 1} ok, 1 warnings, 0 wrong" in text.getvalue() and "chrony" in text.getvalue()
    write_json(findings, tmp_path / "findings.json")
    assert [row["verdict"] for row in json.loads((tmp_path / "findings.json").read_text())].count("warning") == 1
