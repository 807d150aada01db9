"""How far a long command is: a bar in a terminal, and in a log a line every so often."""

import sys
import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task, TaskID

SECONDS_BETWEEN_LINES = 10.0


def stamped(text: str) -> str:
    """A line of a log, after the time."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"


def left(seconds: float) -> str:
    """A time that something will take, as 1:02:03."""
    return f"{timedelta(seconds=round(seconds))} left"


def progress(*columns: ProgressColumn, console: Console | None = None, **options: Any) -> Progress:
    """Rich's bar; where the console is no terminal, lines."""
    console = console or Console()
    if console.is_terminal:
        return Progress(*columns, console=console, **options)
    return ProgressLines(console)


class ProgressLines(Progress):
    """Lines with the time, every `SECONDS_BETWEEN_LINES` and whenever what is done is called otherwise.

    Args:
        console: Where they go; without it, to the standard error.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console=console or Console(file=sys.stderr), disable=True)  # the bar
        self._described = ""
        self._said = time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """As Rich's."""
        super().update(task_id, **changes)
        self._say(self._tasks[task_id])

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """As Rich's."""
        super().advance(task_id, advance)
        self._say(self._tasks[task_id])

    def _say(self, task: Task) -> None:
        now = time.monotonic()
        self._described = self._described or task.description
        if task.description == self._described and now - self._said < SECONDS_BETWEEN_LINES:
            return
        self._described, self._said = task.description, now
        of = "" if task.total is None else f" of {task.total:,.0f}"
        rest = "" if task.time_remaining is None else f", {left(task.time_remaining)}"
        line = stamped(f"{task.description}: {task.completed:,.0f}{of}{rest}")
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
