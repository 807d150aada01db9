"""Lines that take the place of a bar where there is no terminal."""

import io
import re

from rich.console import Console
from rich.progress import Progress

from syncbn.progress import ProgressLines, progress


def test_lines_come_every_so_often_and_with_each_new_task(monkeypatch):
    log = io.StringIO()
    assert type(progress(console=Console(force_terminal=True))) is Progress
    with progress(console=Console(file=log)) as lines:
        assert isinstance(lines, ProgressLines)
        task = lines.add_task("run 1", total=3000)
        lines.advance(task)
        assert log.getvalue() == ""
        lines.update(task, description="run 2", completed=1000)
        monkeypatch.setattr("syncbn.progress.SECONDS_BETWEEN_LINES", 0.0)
        lines.advance(task, 500)
    first, second = log.getvalue().splitlines()
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d run 2: 1,000 of 3,000", first)
    assert re.search(r" run 2: 1,500 of 3,000, \d:\d\d:\d\d left$", second)
