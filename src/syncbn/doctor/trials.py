"""What the ranks try together: one file seen by all, their clocks, a process group, its sums, a layer, the speed."""

import datetime
import json
import secrets
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.collectives.world import sum_over_world
from syncbn.doctor.facts import Facts, existing_part
from syncbn.doctor.meeting import Meeting
from syncbn.nn import SyncBatchNorm
from syncbn.ops import statistics_device

CHANNELS = 64
MESSAGE_LENGTH = 2 * CHANNELS + 1 + 2
"""Of a forward message of a layer of so many channels, in float64: sums, squares, the count, the layer's id twice."""

LARGE_MESSAGE_BYTES = 8 * 2**20
LATENCY_MESSAGES, LARGE_MESSAGES, WARM_UP = 50, 3, 5
CLOCK_ROUNDS = 5
FILE_WAIT_SECONDS = 5.0
"""How long a network file system may take to show a new file."""


@dataclass
class Trials:
    """How one rank fared; None for what it did not reach.

    Attributes:
        stage: What it began last.
        finished: Whether it went through all of them.
        error: What went wrong.
        sees_run_folder: Whether it sees a file that rank 0 has just written where the run folder goes.
        clock_offset: Seconds that this rank's clock is ahead of rank 0's.
        clock_uncertainty: Half the time a question to rank 0 took.
        sum_is_exact: Whether a sum over all ranks came out right to the last bit of float64.
        layer_error: Largest error of a synchronised layer's output against the whole batch in float64.
        latency: Seconds of an all-reduce of a layer's message, median.
        bandwidth: Bytes a second that a rank sends in an all-reduce of 8 MiB, median.
    """

    stage: str = ""
    finished: bool = False
    error: str | None = None
    sees_run_folder: bool | None = None
    clock_offset: float | None = None
    clock_uncertainty: float | None = None
    sum_is_exact: bool | None = None
    layer_error: float | None = None
    latency: float | None = None
    bandwidth: float | None = None

    def to_json(self) -> str:
        """As text for the store."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Trials":
        """What `to_json` wrote."""
        return Trials(**json.loads(text))


def take_part(meeting: Meeting, facts: Facts) -> None:
    """Go through the trials; tells the store how far this rank has come, so that nothing is lost if it hangs.

    Args:
        meeting: Of its own, since a wait in one blocks its other users.
        facts: Of this rank.
    """
    trials = Trials()

    def begin(stage: str) -> None:
        trials.stage = stage
        meeting.tell("trials", trials.to_json())

    try:
        begin("looking for a file of rank 0")
        trials.sees_run_folder = sees_common_file(meeting, facts.configuration.runs_folder)
        begin("comparing clocks")
        trials.clock_offset, trials.clock_uncertainty = compare_clocks(meeting)
        if facts.configuration.backend is not None:
            begin("joining the process group")
            device = join_process_group(meeting, facts)
            begin("adding up numbers")
            trials.sum_is_exact = sum_is_exact(device)
            begin("normalising together")
            trials.layer_error = error_of_layer(device)
            begin("timing messages")
            trials.latency, trials.bandwidth = time_messages(device)
        trials.finished = True
    except Exception as error:
        trials.error = " ".join(str(error).split()) or type(error).__name__
    meeting.tell("trials", trials.to_json())
    meeting.tell("end of trials", "")


def sees_common_file(meeting: Meeting, runs_folder: str | None) -> bool | None:
    """Whether this rank sees what rank 0 writes where the run folder goes; None where that is not known.

    Raises:
        OSError: Rank 0 cannot write there.
    """
    if runs_folder is None:
        return None
    if meeting.rank > 0:
        path = Path(meeting.hear("file", 0))
        seen = wait_for_file(path)
        meeting.tell("file", str(seen))
        return seen
    path = existing_part(Path(runs_folder)) / f".syncbn-doctor-{secrets.token_hex(4)}"
    path.write_text("written by syncbn doctor, which removes it\n")
    try:
        meeting.tell("file", str(path))
        for rank in range(1, meeting.world_size):
            meeting.hear("file", rank)
    finally:
        path.unlink()
    return True


def wait_for_file(path: Path) -> bool:
    """Whether a file appears."""
    deadline = time.monotonic() + FILE_WAIT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def compare_clocks(meeting: Meeting, clock: Callable[[], float] = time.time) -> tuple[float, float]:
    """How far this rank's clock is ahead of rank 0's, and how sure that is, in seconds.

    Rank 0 answers questions with its time, one rank after another; of several rounds the quickest counts.
    """
    if meeting.rank == 0:
        for rank in range(1, meeting.world_size):
            meeting.tell(f"clock turn of {rank}", "")
            for number in range(CLOCK_ROUNDS):
                meeting.hear(f"clock question {number}", rank)
                meeting.tell(f"clock answer {number} for {rank}", repr(clock()))
        return 0.0, 0.0
    meeting.hear(f"clock turn of {meeting.rank}", 0)
    rounds = []
    for number in range(CLOCK_ROUNDS):
        asked = clock()
        meeting.tell(f"clock question {number}", "")
        answer = float(meeting.hear(f"clock answer {number} for {meeting.rank}", 0))
        answered = clock()
        rounds.append(((answered - asked) / 2, (asked + answered) / 2 - answer))
    uncertainty, offset = min(rounds)
    return offset, uncertainty


def join_process_group(meeting: Meeting, facts: Facts) -> torch.device:
    """Initialise torch.distributed as the trainer would; returns the device of this rank."""
    assert facts.configuration.device is not None
    device = torch.device(facts.configuration.device)
    if facts.own_device is not None:
        device = torch.device("cuda", facts.own_device)
        torch.cuda.set_device(device)
    if meeting.world_size > 1:
        dist.init_process_group(
            facts.configuration.backend,
            store=dist.PrefixStore("process group", meeting.store),
            rank=meeting.rank,
            world_size=meeting.world_size,
            # The doctor gives up before: NCCL would end the process with its own message.
            timeout=datetime.timedelta(seconds=2 * meeting.seconds_left),
        )
    return device


def sum_is_exact(device: torch.device) -> bool:
    """Whether numbers that need float64 are added up exactly over all ranks."""
    rank, world_size = _rank_and_size()
    fine = 2.0**-30  # beside whole numbers, below the resolution of float32
    message = torch.full((MESSAGE_LENGTH,), rank + fine, dtype=torch.float64, device=statistics_device(device))
    sums = sum_over_world(message)
    return bool((sums == world_size * (world_size - 1) / 2 + world_size * fine).all())


def error_of_layer(device: torch.device) -> float:
    """Largest error of SyncBatchNorm's output on this rank, for batches of unequal size.

    Every rank can make the batches of all ranks, and so the truth.
    """
    rank, world_size = _rank_and_size()
    batches = [_batch_of(other) for other in range(world_size)]
    whole = torch.cat(batches).double()
    mean, var = whole.mean((0, 2, 3), keepdim=True), whole.var((0, 2, 3), correction=0, keepdim=True)
    layer = SyncBatchNorm(CHANNELS).to(device)
    expected = (batches[rank].double() - mean) / (var + layer.eps).sqrt()
    with torch.no_grad():
        return float((layer(batches[rank].to(device)).cpu().double() - expected).abs().max())


def _batch_of(rank: int) -> Tensor:
    noise = torch.randn(1 + rank % 3, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(rank))
    return 2 * noise + 3 + rank % 5


def time_messages(device: torch.device) -> tuple[float, float]:
    """Seconds of a layer's message, and bytes a second that a rank sends of a large one (2 (P - 1) / P of its size)."""
    _, world_size = _rank_and_size()
    small = torch.zeros(MESSAGE_LENGTH, dtype=torch.float64, device=statistics_device(device))
    large = torch.zeros(LARGE_MESSAGE_BYTES // 4, device=device)
    latency = statistics.median(_seconds(small, LATENCY_MESSAGES))
    seconds = statistics.median(_seconds(large, LARGE_MESSAGES))
    return latency, 2 * (world_size - 1) / world_size * LARGE_MESSAGE_BYTES / seconds


def _seconds(message: Tensor, times: int) -> list[float]:
    taken = []
    for number in range(WARM_UP + times):
        start = time.perf_counter()
        sum_over_world(message)
        if message.is_cuda:
            torch.cuda.synchronize(message.device)
        if number >= min(WARM_UP, times):
            taken.append(time.perf_counter() - start)
    return taken


def _rank_and_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
