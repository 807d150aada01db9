"""What came of a job, on the screen."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from syncbn.data.datasets.image_folder import counts_by_suffix, in_words
from syncbn.data.datasets.shard_files import ShardIndex
from syncbn.data.preparation.job import REPORT_NAME, PreparationReport
from syncbn.data.preparation.plan import NO_IMAGE, SourceFinding

SHOWN_FINDINGS = 20


def print_findings(report: PreparationReport) -> None:
    """List what was dropped and what was repaired; long lists are cut, the file has them whole."""
    _print_list("Dropped or amiss", report.dropped)
    left_out = counts_by_suffix(finding.name for finding in report.dropped if finding.reason == NO_IMAGE)
    if left_out:
        print(f"Left out, by suffix: {in_words(left_out)}")
    _print_list("Repaired", report.repaired)


def _print_list(title: str, findings: Sequence[SourceFinding]) -> None:
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if findings:
        console.print(f"{title}:")
    for finding in findings[:SHOWN_FINDINGS]:
        console.print(f"  {finding.split} {finding.name}: {finding.reason}")
    if len(findings) > SHOWN_FINDINGS:
        console.print(f"  ... {len(findings) - SHOWN_FINDINGS} more in {REPORT_NAME}")


def print_summary(index: ShardIndex, report: PreparationReport, started: float) -> None:
    """A table of the splits, and the next command.

    Args:
        index: Of what was written.
        report: Of what was not.
        started: When, by ``time.monotonic()``.
    """
    table = Table(title=str(index.folder), title_justify="left")
    for column in ("split", "classes", "images", "shards", "size", "dropped", "repaired"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for name, split in index.splits.items():
        table.add_row(
            name,
            str(sum(count > 0 for count in split.per_class)),
            f"{split.samples:,}",
            f"{len(split.shards):,}",
            decimal(sum(shard.bytes for shard in split.shards)),
            f"{report.planned[name] - report.written[name]:,}",
            f"{sum(finding.split == name for finding in report.repaired):,}",
        )
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    following = f"syncbn fit --data {index.folder} --data.image_size 224"
    console.print(f"{time.monotonic() - started:.1f} s. Next: {following}", markup=False)
