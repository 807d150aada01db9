"""The cable with a delay, and the benchmark on it. Needs root, since it makes network namespaces."""

import csv
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from syncbn.benchmarks import latency
from syncbn.benchmarks.harness import cable
from syncbn.benchmarks.harness.world import run_ranks
from syncbn.benchmarks.latency import TimedReduction, WaitingReduction, Watched

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not cable.may_exist(), reason="not root, or no /dev/net/tun"),
]
DELAY_MS = 30.0


def sums_and_seconds(rank):
    """The sum over the ranks of a long message, and the shortest time of a barrier."""
    numbers = torch.full((20_000,), rank + 1.0)
    dist.all_reduce(numbers)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        dist.barrier()
        times.append(time.perf_counter() - start)
    yield numbers.unique().tolist(), min(times)


def test_messages_arrive_whole_and_late():
    with cable.delayed_cable(DELAY_MS) as hosts:
        (result,) = run_ranks(sums_and_seconds, 2, hosts=hosts, silence=120)
    sums, seconds = result
    assert sums == [3.0]
    assert seconds > DELAY_MS * 1e-3
    (result,) = run_ranks(sums_and_seconds, 2, silence=120)
    assert result[1] < seconds


def module_on_rank(rank):
    """Messages in the order of events: sent, waited for; and how long was waited, both ways."""
    module, x = latency.ModuleSetting("3b", 1).build(rank)
    forward = {kind: Watched(lambda: module(x), kind) for kind in (TimedReduction, WaitingReduction)}
    for watched in forward.values():
        watched()
        watched()
    yield [watched.waited[-1] for watched in forward.values()]


def test_waiting_at_once_waits_for_three_messages():
    with cable.delayed_cable(DELAY_MS) as hosts:
        ((computing, waiting),) = run_ranks(module_on_rank, 2, hosts=hosts, silence=120)
    assert waiting > 3 * DELAY_MS
    assert computing > 0


@pytest.mark.timeout(900)
def test_section(tmp_path):
    command = [sys.executable, "-m", "syncbn", "benchmark", "--section", "latency", "--quick"]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (path,) = tmp_path.glob("*.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["section"] for row in rows} == {"step", "module, forward", "module, backward"}
    assert {"syncbn", "syncbn, waiting", "per layer", "all gather, plain"} == {row["contender"] for row in rows}
    assert {row["unit"] for row in rows} == {"ms", "ms waited"}


def test_without_the_right_to_make_namespaces_it_says_so():
    command = [sys.executable, "-m", "syncbn", "benchmark", "--section", "latency"]
    nobody = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]  # root, in name only
    done = subprocess.run([*nobody, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "two network namespaces need Linux, root" in done.stderr


def test_an_unknown_module_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match=r"--latency.module 9z: it is one of \['3a',"):
        latency.run(module="9z")
