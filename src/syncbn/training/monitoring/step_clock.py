"""Divides the time of training steps into parts that add up, on the host or on a GPU, without stalling either."""

import time
from collections import deque
from typing import Any, NamedTuple, Protocol

import torch

PARTS = ("data_wait", "forward", "backward", "optimizer", "collective_wait", "other")
"""What a step's time is divided into.

Attributes of a step: data_wait, for the loader; forward, with the loss; backward, with DDP's exchange of gradients;
optimizer; collective_wait, for the messages of synchronised layers; other, mostly Lightning's own and logging.
"""


class StepTime(NamedTuple):
    """One step.

    Attributes:
        seconds: Of each of PARTS; their sum is the duration of the step.
        images: Of the global batch.
    """

    seconds: dict[str, float]
    images: int

    @property
    def duration(self) -> float:
        """In seconds."""
        return sum(self.seconds.values())


class Lap(NamedTuple):
    """A stretch of time that belongs to a part, between two marks."""

    part: str
    begin: Any
    end: Any


class Marks(Protocol):
    """A source of points in time."""

    def take(self) -> Any:
        """A point in time: now, for whoever computes."""
        ...

    def passed(self, mark: Any) -> bool:
        """Whether a point can be read without waiting."""
        ...

    def seconds(self, earlier: Any, later: Any) -> float:
        """Between two points."""
        ...

    def recycle(self, mark: Any) -> None:
        """A point that is needed no more."""
        ...


class HostMarks:
    """The clock of the host, which on a CPU does the computing."""

    def take(self) -> float:
        """Now."""
        return time.perf_counter()

    def passed(self, mark: float) -> bool:
        """Always."""
        return True

    def seconds(self, earlier: float, later: float) -> float:
        """The difference."""
        return later - earlier

    def recycle(self, mark: float) -> None:
        """Nothing to do."""


class DeviceMarks:
    """CUDA events: when the GPU, which lags behind the host, comes to the place. Taking one stalls neither."""

    def __init__(self) -> None:
        self._free: list[torch.cuda.Event] = []

    def take(self) -> torch.cuda.Event:
        """An event in the current stream."""
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, mark: torch.cuda.Event) -> bool:
        """Whether the GPU has come there."""
        return mark.query()

    def seconds(self, earlier: torch.cuda.Event, later: torch.cuda.Event) -> float:
        """Of the GPU, idle time included."""
        return earlier.elapsed_time(later) / 1e3

    def recycle(self, mark: torch.cuda.Event) -> None:
        """Keep the event for later."""
        self._free.append(mark)


class StepClock:
    """Attributes every moment between `resume` and `pause` to one part of one step.

    Marks are read late, by `finished`, so that nobody waits for a GPU.

    Args:
        marks: Where points in time come from.
    """

    def __init__(self, marks: Marks) -> None:
        self.marks = marks
        self.part: str | None = None
        self._last: Any = None
        self._laps: list[Lap] = []
        self._steps: deque[tuple[list[Lap], int]] = deque()

    def resume(self) -> None:
        """Begin to count, with the part "other"."""
        self.part, self._last = "other", self.marks.take()

    def pause(self) -> None:
        """Stop counting: what follows is no part of a step."""
        if self.part is not None:
            self.switch(self.part)
            self.part = None

    def switch(self, part: str) -> None:
        """End the part under way and begin another; nothing during a pause."""
        if self.part is None:
            return
        now = self.marks.take()
        self._laps.append(Lap(self.part, self._last, now))
        self.part, self._last = part, now

    def end_step(self, images: int) -> None:
        """End the step under way, which was one on so many images; begin the next."""
        self.switch("other")
        self._steps.append((self._laps, images))
        self._laps = []

    def finished(self, wait: bool = False) -> list[StepTime]:
        """The steps that have ended since the last call and can be read without waiting.

        Args:
            wait: Read all steps, and wait for the device.
        """
        if wait and isinstance(self.marks, DeviceMarks):
            torch.cuda.synchronize()
        times = []
        while self._steps and self.marks.passed(self._steps[0][0][-1].end):
            times.append(self._read(*self._steps.popleft()))
        return times

    def _read(self, laps: list[Lap], images: int) -> StepTime:
        seconds = dict.fromkeys(PARTS, 0.0)
        for lap in laps:
            seconds[lap.part] += self.marks.seconds(lap.begin, lap.end)
            self.marks.recycle(lap.begin)
        return StepTime(seconds, images)
