"""A cable with a delay between two network namespaces, for a world of two hosts on one machine.

Stands in for tc's netem, which not every kernel has. One process holds both namespaces and an Ethernet device (TAP) in
each, and hands every frame that one of them sends to the other after the delay. When that process ends, they are gone:
nothing has a name, nothing is left behind. Needs Linux, root (CAP_NET_ADMIN, CAP_SYS_ADMIN) and the command `ip`.
"""

import contextlib
import ctypes
import fcntl
import multiprocessing as mp
import os
import select
import struct
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

DEVICE = "tap0"
NETWORK = "192.0.2"  # RFC 5737: for examples, used by nobody
MTU = 9000  # jumbo frames, as in clusters
LONGEST_FRAME = 65536
START_SECONDS = 30.0
CLONE_NEWNET = 0x40000000  # linux/sched.h
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000  # linux/if_tun.h

_libc = ctypes.CDLL(None, use_errno=True)


class Host(NamedTuple):
    """One end of the cable.

    Attributes:
        namespace: path of its network namespace.
        address: IPv4, there.
        device: the name of the network device there.
    """

    namespace: str
    address: str
    device: str

    def enter(self) -> None:
        """Move the calling thread, and threads and processes that it starts from now on, to this host.

        Raises:
            OSError: this process may not.
        """
        descriptor = os.open(self.namespace, os.O_RDONLY)
        _check(_libc.setns(descriptor, CLONE_NEWNET), f"cannot enter the network namespace {self.namespace}")
        os.close(descriptor)


@contextlib.contextmanager
def delayed_cable(delay_ms: float) -> Iterator[list[Host]]:
    """Two hosts, joined by a cable that delays frames.

    Args:
        delay_ms: one way, in milliseconds; a round trip takes twice as long.

    Raises:
        ValueError: this machine or user cannot make them; says what is missing.
    """
    context = mp.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=_hold, args=(delay_ms * 1e-3, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        answer = ours.recv() if ours.poll(START_SECONDS) else "it did not start"
        if isinstance(answer, str):
            raise ValueError(f"two network namespaces need Linux, root, /dev/net/tun and the command ip: {answer}")
        yield answer
    finally:
        ours.close()
        process.kill()
        process.join()


def _hold(delay: float, pipe: Connection) -> None:
    """Make both ends, say where they are, and relay frames until the pipe is closed."""
    try:
        namespaces, taps = zip(*(_make_end(f"{NETWORK}.{number}") for number in (1, 2)), strict=True)
    except (OSError, AttributeError, subprocess.CalledProcessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else ""
        pipe.send(f"{error} {said}".strip())
        return
    pipe.send(
        [
            Host(f"/proc/{os.getpid()}/fd/{namespace}", f"{NETWORK}.{number}", DEVICE)
            for number, namespace in enumerate(namespaces, 1)
        ]
    )
    relay(taps, delay, pipe.fileno())


def _make_end(address: str) -> tuple[int, int]:
    """Move to a new network namespace with a TAP device; returns their file descriptors."""
    _check(_libc.unshare(CLONE_NEWNET), "cannot make a network namespace")
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TAP | IFF_NO_PI))
    for words in (
        "link set lo up",
        f"address add {address}/24 dev {DEVICE}",
        f"link set {DEVICE} mtu {MTU} up",
    ):
        subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)
    return os.open("/proc/self/ns/net", os.O_RDONLY), tap


def relay(ends: tuple[int, ...], delay: float, stop: int) -> None:
    """Hand frames from each of two TAP devices to the other, each `delay` seconds late, until `stop` can be read.

    Args:
        ends: their file descriptors, not blocking.
        delay: in seconds.
        stop: a file descriptor.
    """
    under_way: deque[tuple[float, int, bytes]] = deque()  # in the order of their arrival, since all take as long
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        ready, _, _ = select.select([*ends, stop], [], [], wait)
        if stop in ready:
            return
        for end in ready:
            other = ends[1] if end == ends[0] else ends[0]
            with contextlib.suppress(BlockingIOError):
                while True:
                    frame = os.read(end, LONGEST_FRAME)
                    under_way.append((time.monotonic() + delay, other, frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _, other, frame = under_way.popleft()
            with contextlib.suppress(BlockingIOError):  # a full device drops frames, as any does
                os.write(other, frame)


def may_exist() -> bool:
    """Whether this machine and user could make the cable, as far as can be told without trying."""
    return os.geteuid() == 0 and Path("/dev/net/tun").exists()


def _check(status: int, what: str) -> None:
    if status:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
