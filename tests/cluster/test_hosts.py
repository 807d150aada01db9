"""The hosts that the other tests here rely on: names, addresses, a cut link, a cut power, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hosts import network

pytestmark = pytest.mark.cluster

HEAR = """
import socket, sys
server = socket.create_server(("0.0.0.0", 5000)); connection, _ = server.accept()
print(connection.recv(100).decode(), flush=True)
"""
SAY = """
import socket, time
for _ in range(100):
    try:
        connection = socket.create_connection(("{}", 5000), timeout=2); break
    except OSError:
        time.sleep(0.1)
connection.sendall(b"hello from " + socket.gethostname().encode())
"""

REFUSED = """
import socket
try:
    socket.create_connection(("10.77.0.11", 5000), 10)
except ConnectionRefusedError:
    print("refused")
"""


def test_hosts_have_names_and_reach_each_other_by_them(tmp_path: Path) -> None:
    with network(["a", "b"], tmp_path) as net:
        assert net["a"].run("hostname").strip() == "a"
        listener = net["a"].start(sys.executable, "-c", HEAR, log=tmp_path / "a.log")
        net["b"].run(sys.executable, "-c", SAY.format("a"), timeout=60)
        assert listener.wait(30) == 0
        assert (tmp_path / "a.log").read_text() == "hello from b\n"


def test_two_networks_side_by_side_do_not_see_each_other(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with network(["a"], tmp_path) as net, network(["x", "b"], tmp_path / "other") as other:
        net["a"].start(sys.executable, "-c", HEAR, log=tmp_path / "a.log")
        time.sleep(2)  # x of the other network has the address of a, and nobody listens there
        refused = other["b"].run(sys.executable, "-c", REFUSED)
        assert refused == "refused\n"


def test_cut_link_and_cut_power(tmp_path: Path) -> None:
    reach = [sys.executable, "-c", "import socket; socket.create_connection(('b', 5000), 2)"]
    listen = [sys.executable, "-c", HEAR.replace("connection.recv", "print('ok', flush=True) or connection.recv")]
    with network(["a", "b"], tmp_path) as net:
        listener = net["b"].start(*listen, log=tmp_path / "b.log")
        net["b"].cut_link()
        with pytest.raises(AssertionError, match=r"timed out|No route"):
            net["a"].run(*reach)
        assert listener.poll() is None
        net["b"].power_off()
        assert listener.wait(30) != 0
        net.power_on("b")
        net["b"].start(*listen, log=tmp_path / "b.log")
        net["a"].run(sys.executable, "-c", SAY.format("b"))


def test_nothing_outlives_a_test_process_that_is_killed(tmp_path: Path) -> None:
    script = f"""
import sys, time
from pathlib import Path
from hosts import network
with network(["a", "b"], Path({str(tmp_path)!r})) as net:
    net["a"].start("sleep", "98765", log=Path({str(tmp_path / "log")!r}))
    print("up", flush=True)
    time.sleep(600)
"""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    test = subprocess.Popen(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    )
    assert test.stdout is not None
    assert test.stdout.readline() == "up\n"
    test.send_signal(signal.SIGKILL)
    test.wait()
    test.stdout.close()
    deadline = time.monotonic() + 20
    while processes_with("98765") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_with("98765")


def processes_with(word: str) -> list[str]:
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if line.split()[-1:] == [word]]
