"""Times on a device, by its own clock; and CUDA graphs of what is timed. On a CPU a dry run of the same code."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch

from syncbn.benchmarks.harness import measure

COPY_BYTES = {"cuda": 2**30, "cpu": 2**20}
LEAST_MS = 2.0
MOST_REPEATS = 200
WARMUP_CALLS = 4  # until ranks have agreed, kernels are compiled, and the optimiser has its state


class Replay:
    """Replays a graph, and keeps `run`: the graph itself holds none of the tensors that it reads and writes.

    What `run` returns, and gradients that it makes anew, lie in the graph's memory and are overwritten by each replay.

    Args:
        graph: captured.
        run: what was captured.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, run: Callable[[], Any]) -> None:
        self.graph, self.run = graph, run

    def __call__(self) -> None:
        """All that `run` does on the device."""
        self.graph.replay()


def captured(run: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The same as a CUDA graph, which leaves out what the host needs to launch it; on a CPU `run` itself."""
    with on_capture_stream(device):
        for _ in range(WARMUP_CALLS):
            run()
    if device == "cpu":
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_capture_stream()):
        run()
    return Replay(graph, run)


@contextmanager
def on_capture_stream(device: str) -> Iterator[None]:
    """Run on the stream on which graphs are captured; on a CPU there is none.

    A backward runs on its forward's stream, so that the forward of one that is to be captured belongs here, too.
    """
    if device == "cpu":
        yield
        return
    stream = _capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@cache
def _capture_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def time_in_turns(
    runs: Mapping[str, Callable[[], Any]], rounds: int, warmup: int, device: str
) -> dict[str, list[float]]:
    """Milliseconds of each round, by contender: of the device, between two events around some calls."""
    timer = partial(milliseconds, device=device)
    return measure.time_in_turns(runs, rounds, warmup, LEAST_MS, timer, MOST_REPEATS)


def milliseconds(run: Callable[[], Any], repeats: int, device: str) -> float:
    """Of one call, on average over some."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) * 1e3 / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def copy_bandwidth(rounds: int, device: str) -> float:
    """Bytes a second, read and written, of a copy too large for any cache of a GPU."""
    source = torch.empty(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = time_in_turns({"copy": lambda: target.copy_(source)}, rounds, 2, device)["copy"]
    return 2 * source.nbytes / (measure.percentile(times, 0.5) * 1e-3)
