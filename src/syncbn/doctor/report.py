"""The table that rank 0 prints, and the same as JSON."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from syncbn.doctor import device_checks, launch_checks, node_checks, trial_checks
from syncbn.doctor.findings import Finding, World

COLOURS = {"ok": "green", "warning": "yellow", "wrong": "bold red"}
CHECKS = (*launch_checks.CHECKS, *node_checks.CHECKS, *device_checks.CHECKS, *trial_checks.CHECKS)
NARROWEST = 100


def judge(world: World) -> list[Finding]:
    """The findings of all checks."""
    return [finding_of(check, world) for check in CHECKS]


def finding_of(check: Callable[[World], Finding], world: World) -> Finding:
    """What a check found; an error of the check itself is a finding, too, as all ranks wait for the report."""
    try:
        return check(world)
    except Exception as error:
        seen = f"this check failed: {type(error).__name__}: {error}"
        remedy = "mend the value that it names; else report it, with this table"
        return Finding(check.__name__.removeprefix("check_").replace("_", " "), "wrong", seen, remedy)


def print_report(findings: Sequence[Finding], console: Console | None = None) -> None:
    """The table, and the verdict in a line."""
    console = console or Console()
    if not console.is_terminal:  # a log of a job: rich would take it for 80 columns
        console = Console(width=max(NARROWEST, console.width), file=console.file)
    table = Table(title="syncbn doctor", title_justify="left", show_lines=True)
    for column in ("check", "verdict", "seen", "how to mend it"):
        table.add_column(column, no_wrap=column in ("check", "verdict"))
    for finding in findings:
        colour = COLOURS[finding.verdict]
        table.add_row(finding.check, f"[{colour}]{finding.verdict}[/]", escape(finding.seen), escape(finding.remedy))
    console.print(table)
    counts = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in COLOURS}
    console.print(f"{counts['ok']} ok, {counts['warning']} warnings, {counts['wrong']} wrong", highlight=False)


def write_json(findings: Sequence[Finding], path: Path) -> None:
    """The findings as a list of objects."""
    path.write_text(json.dumps([finding._asdict() for finding in findings], indent=2) + "\n")
