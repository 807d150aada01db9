"""Hosts on one machine, made of Linux namespaces, that unmodified cluster programs take for real ones.

A host has a network, a name, an /etc/hosts and processes of its own; the file system is shared, as a cluster's is. Its
link can be cut and its power too. A network leaves nothing behind, however the test ends: no namespace has a name in
the system, each lives as long as its first process, and that one reads a pipe which closes with the test's process.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

TOOLS = ("ip", "nsenter", "unshare", "hostname")


def why_no_hosts() -> str | None:
    """Why hosts cannot be made here, or None where they can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian packages iproute2, util-linux, hostname)"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return None if tried.returncode == 0 else f"namespaces are not permitted here: {tried.stderr.decode().strip()}"


class Host:
    """One host of a network.

    Args:
        name: Which the other hosts know it by.
        address: IPv4, in a network of 24 bits.
        hosts_file: What it has for /etc/hosts.
    """

    def __init__(self, name: str, address: str, hosts_file: Path) -> None:
        self.name, self.address, self.hosts_file = name, address, hosts_file
        self.first_process: subprocess.Popen[str] | None = None
        self.pid = 0  # of the first process of the host's own
        self.started: list[subprocess.Popen[bytes]] = []

    def power_on(self) -> None:
        """Boot without a network; `Network.plug` connects it."""
        assert self.first_process is None, f"{self.name} is on"
        boot = 'hostname "$0"; mount --bind "$1" /etc/hosts; ip link set lo up; echo ready; read'
        namespaces = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
        self.first_process = subprocess.Popen(  # bash, since process 1 of a host has to collect orphans
            ["unshare", *namespaces, "bash", "-c", boot, self.name, str(self.hosts_file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.first_process.stdout is not None
        assert self.first_process.stdout.readline() == "ready\n", f"{self.name} does not boot"
        children = Path(f"/proc/{self.first_process.pid}/task/{self.first_process.pid}/children").read_text()
        self.pid = int(children.split()[0])

    def power_off(self) -> None:
        """Cut the power: the others hear nothing more of it, not even that its connections have closed."""
        if self.first_process is None:
            return
        if self.first_process.poll() is None:
            subprocess.run(self.words("ip", "link", "set", "eth0", "down"), capture_output=True)
        self.first_process.kill()  # all processes of the host end with it
        self.first_process.wait()
        for pipe in (self.first_process.stdin, self.first_process.stdout):
            assert pipe is not None
            pipe.close()
        self.first_process = None
        for process in self.started:
            process.wait(timeout=60)
        self.started.clear()

    def cut_link(self) -> None:
        """Cut the link to the others; its processes go on."""
        self.run("ip", "link", "set", "eth0", "down")

    def mend_link(self) -> None:
        """Undo `cut_link`."""
        self.run("ip", "link", "set", "eth0", "up")

    def words(self, *command: str, folder: Path | None = None) -> list[str]:
        """The words that run a command as on this host, in a folder (by default the present one)."""
        assert self.first_process is not None, f"{self.name} is off"
        enter = ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--pid", "--"]
        return [*enter, "env", f"--chdir={folder or Path.cwd()}", *command]

    def run(self, *command: str, folder: Path | None = None, timeout: float = 60, **options: Any) -> str:
        """What a command on this host prints.

        Raises:
            AssertionError: It failed; the message holds what it printed.
        """
        done = subprocess.run(
            self.words(*command, folder=folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            **options,
        )
        assert done.returncode == 0, f"{' '.join(command)} on {self.name}: status {done.returncode}\n{done.stdout}"
        return done.stdout

    def start(self, *command: str, log: Path, folder: Path | None = None, **options: Any) -> subprocess.Popen[bytes]:
        """Start a command on this host, which ends with it at the latest; what it prints goes to a log."""
        with log.open("wb") as output:
            process = subprocess.Popen(
                self.words(*command, folder=folder), stdout=output, stderr=subprocess.STDOUT, **options
            )
        self.started.append(process)
        return process


class Network:
    """A switch and the hosts plugged into it. `network[name]` is a host."""

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, start=11)}
        hosts_file = folder / "hosts"
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        hosts_file.write_text("\n".join(lines) + "\n")
        self.hosts = {name: Host(name, address, hosts_file) for name, address in addresses.items()}
        self.switch = Host("switch", "", hosts_file)

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def power_on(self, *names: str) -> None:
        """Boot hosts, by default all, and plug them in."""
        if self.switch.first_process is None:
            self.switch.power_on()
            self.switch.run("ip", "link", "add", "bridge", "type", "bridge")
            self.switch.run("ip", "link", "set", "bridge", "up")
        for name in names or self.hosts:
            self.hosts[name].power_on()
            self.plug(self.hosts[name])

    def plug(self, host: Host) -> None:
        """Connect a host that has booted with the others."""
        port = f"to-{host.address.rpartition('.')[2]}"
        # Of a host that was switched off the kernel takes a while to remove its end, and with it this one.
        subprocess.run(self.switch.words("ip", "link", "delete", port), capture_output=True)
        with_peer = ["type", "veth", "peer", "name", "eth0", "netns", str(host.pid)]
        subprocess.run(  # from outside, where the number of the host's process means something
            ["nsenter", f"--target={self.switch.pid}", "--net", "ip", "link", "add", port, *with_peer], check=True
        )
        self.switch.run("ip", "link", "set", port, "master", "bridge", "up")
        host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")

    def power_off(self) -> None:
        """Cut the power of everything."""
        for host in [*self.hosts.values(), self.switch]:
            host.power_off()


@contextmanager
def network(names: Sequence[str], folder: Path) -> Iterator[Network]:
    """A network of hosts of these names; several exist side by side, as none has a name in the system.

    Where hosts cannot be made, the test is skipped with the reason.

    Args:
        names: Of the hosts, at most 200. The addresses are 10.77.0.11, 10.77.0.12, ...
        folder: For its files, the test's own.
    """
    reason = why_no_hosts()
    if reason:
        pytest.skip(reason)
    made = Network(names, folder)
    try:
        made.power_on()
        yield made
    finally:
        made.power_off()
