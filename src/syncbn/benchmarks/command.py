"""``syncbn benchmark``: one option for the section, and each section's own options under its name."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from syncbn.benchmarks import collectives, inference, latency, layer, loader, memory, step
from syncbn.benchmarks.gpu import command as gpu_command
from syncbn.benchmarks.harness import measure
from syncbn.benchmarks.harness.cable import may_exist
from syncbn.paths import ExpandingParser

SECTIONS: dict[str, Any] = {
    "layer": layer,
    "step": step,
    "collectives": collectives,
    "latency": latency,
    "loader": loader,
    "inference": inference,
    "memory": memory,
    "gpu": gpu_command,
}
"""Each module has a function `run`, whose parameters are options, and KEEP_MEMORY (see `measure`)."""


def run(words: Sequence[str]) -> None:
    """Run the sections that the command line names.

    Args:
        words: after ``syncbn benchmark``.

    Raises:
        ValueError: a section cannot run as asked.
    """
    options = parser().parse_args(list(words))
    able = {"gpu": torch.cuda.is_available(), "latency": may_exist()}
    here = [name for name in SECTIONS if able.get(name, True)]
    sections = [options.section] if options.section != "all" else here
    for section in sections:
        if len(sections) == 1 and _memory_is_as_wanted(section):
            _run_section(section, options)
        else:
            _run_in_new_process(section, words)


def parser() -> ExpandingParser:
    """The options of `syncbn benchmark`."""
    parser = ExpandingParser(
        prog="syncbn benchmark", description="Verify, then time syncbn beside its peers.", exit_on_error=False
    )
    parser.add_argument(
        "--section", choices=["all", *SECTIONS], default="all", help="what to time; all: whatever can run here"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run: tiny sizes, figures without meaning")
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="folder for CSV files and figures")
    for name, module in SECTIONS.items():
        parser.add_function_arguments(module.run, name, skip={"quick", "output"})
    return parser


def _run_section(section: str, options: Namespace) -> None:
    own = parser().instantiate_classes(options)[section]
    try:
        SECTIONS[section].run(**vars(own), quick=options.quick, output=options.output)
    except measure.WrongContender as error:
        raise ValueError(f"nothing was timed: {error}") from error


def _memory_is_as_wanted(section: str) -> bool:
    return not SECTIONS[section].KEEP_MEMORY or os.environ.items() >= measure.KEEP_MEMORY.items()


def _run_in_new_process(section: str, words: Sequence[str]) -> None:
    """With a heap of its own; glibc reads how to treat it at the start only."""
    kept = measure.KEEP_MEMORY if SECTIONS[section].KEEP_MEMORY else {}
    command = [sys.executable, "-m", "syncbn", "benchmark", *words, "--section", section]
    status = subprocess.run(command, env={**os.environ, **kept}).returncode
    if status:
        sys.exit(status)
