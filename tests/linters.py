"""Linters of what is not Python, which the dev extra installs beside Python itself."""

import os
import shutil
import sys
from pathlib import Path

import pytest


def installed(name: str) -> str:
    """The path of a linter; without it the test is skipped."""
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if path is None:
        pytest.skip(f"no {name}: the dev extra brings it")
    return path
