"""launch/torchrun_multi_node.sh on two hosts: to completion, through the loss of a host, and with the link cut."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hosts import Network, network
from runs import (
    EPOCH,
    STEPS,
    WORDS,
    check_finished,
    check_same_weights,
    checkout,
    environment,
    final_weights,
    run_folders,
    steps_so_far,
    timeout,
)
from slurm import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

SECONDS = 900.0  # for a run to end, on a busy machine
FAILED = "the all-reduce of a BatchNorm layer failed"


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Network]:
    with network(["node1", "node2"], tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by launch/torchrun_single_node.sh."""
    return run_on_one_machine(tmp_path_factory.mktemp("reference"))


def run_on_one_machine(folder: Path, *words: str) -> Path:
    """The folder of a run of two ranks that nothing disturbs."""
    folder = checkout(folder / "reference")
    done = subprocess.run(
        ["launch/torchrun_single_node.sh", *WORDS, *words],
        cwd=folder,
        env=environment() | {"RANKS_PER_NODE": "2"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return check_finished(folder, done.stdout)


class Launch:
    """The script on hosts of a network, from one checkout."""

    def __init__(
        self, net: Network, folder: Path, nodes: str, *words: str, join_timeout: int = 600, first: str = "node1"
    ) -> None:
        self.net, self.folder, self.words = net, checkout(folder / "checkout"), [*WORDS, *words]
        self.environment = environment() | {"FIRST_NODE": first, "NODES": nodes, "RANKS_PER_NODE": "1"}
        self.environment["JOIN_TIMEOUT"] = str(join_timeout)
        self.processes = {name: self.start(name) for name in net.hosts}

    def start(self, name: str, **variables: str) -> subprocess.Popen[bytes]:
        """Start the script on a host."""
        return self.net[name].start(
            "launch/torchrun_multi_node.sh",
            *self.words,
            log=self.folder / f"{name}.log",
            folder=self.folder,
            env=self.environment | variables,
        )

    def log(self, name: str) -> str:
        """What a host has printed."""
        return (self.folder / f"{name}.log").read_text()

    def wait_for_steps(self, number: int) -> None:
        """Until it has trained so far; fails where a host ends before."""

        def trained() -> bool:
            assert all(process.poll() is None for process in self.processes.values()), self.log("node1")
            return steps_so_far(self.folder) >= number

        wait_until(trained, SECONDS, f"step {number}")


def test_two_hosts_train_as_one_machine_with_two_ranks(net: Network, reference: Path, tmp_path: Path) -> None:
    launch = Launch(net, tmp_path, "2")
    for name, process in launch.processes.items():
        assert process.wait(SECONDS) == 0, launch.log(name)
    check_same_weights(check_finished(launch.folder, launch.log("node1")), reference)


def test_one_host_goes_on_alone_when_the_other_loses_power(net: Network, tmp_path: Path) -> None:
    double = "--trainer.precision=64-true"  # one rank adds up in another order than two, and training amplifies that
    launch = Launch(net, tmp_path, "1:2", *timeout(30), double)
    launch.wait_for_steps(EPOCH + 5)
    net["node2"].power_off()
    assert launch.processes["node1"].wait(SECONDS) == 0, launch.log("node1")
    assert "global batch 16 = 2 ranks" in launch.log("node1")
    assert "global batch 16 = 1 rank x 16" in launch.log("node1")
    found = final_weights(check_finished(launch.folder, launch.log("node1")))
    for name, value in final_weights(run_on_one_machine(tmp_path, double)).items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-7, msg=name)


def test_host_that_comes_back_joins_again(net: Network, reference: Path, tmp_path: Path) -> None:
    """Although it comes first by its name, it does not become rank 0, which would begin a new run."""
    launch = Launch(net, tmp_path, "2", *timeout(30), first="node2")
    launch.wait_for_steps(EPOCH + 5)
    net["node1"].power_off()
    wait_until(lambda: FAILED in launch.log("node2"), SECONDS, "node2 misses node1")
    net.power_on("node1")
    launch.processes["node1"] = launch.start("node1", REJOIN="1")
    for name, process in launch.processes.items():
        assert process.wait(SECONDS) == 0, launch.log(name)
    check_same_weights(check_finished(launch.folder, launch.log("node2")), reference)


@pytest.mark.parametrize("noticed_by", ["collective", "watchdog"])
def test_cut_link_is_an_error_within_the_timeout_on_both_sides(net: Network, tmp_path: Path, noticed_by: str) -> None:
    seconds = 30.0
    words, message, slack = {  # slack: for a busy machine, and the watchdog's half a minute to tell who hangs
        "collective": (timeout(seconds), FAILED, 30),
        "watchdog": (["--watchdog.timeout_seconds=30"], "(watchdog.timeout_seconds=30)", 60),
    }[noticed_by]
    launch = Launch(net, tmp_path, "2", *words, join_timeout=30)
    launch.wait_for_steps(3)
    net["node2"].cut_link()
    cut = time.monotonic()
    for name in net.hosts:
        left = cut + seconds + slack - time.monotonic()
        wait_until(lambda name=name: message in launch.log(name), left, f"{name} misses the other")
        assert time.monotonic() - cut > seconds / 2  # it was the timeout
    # torchrun, too, has lost its store: on node2 it waits until Linux gives the connection up, a quarter of an hour.
    net["node2"].run("sh", "-c", "echo 5 > /proc/sys/net/ipv4/tcp_retries2")
    for process in launch.processes.values():
        assert process.wait(SECONDS) != 0
    assert steps_so_far(launch.folder) < STEPS
    assert len(run_folders(launch.folder)) == 1
