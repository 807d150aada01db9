"""Real images, which lie outside the repository: the environment variable SYNCBN_TEST_DATA names their folder."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("SYNCBN_TEST_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))


def real_data(name: str) -> Path:
    """A folder of DATA ("mnist", "ilsvrc2012-mini", "imagenet-originals"); without it the test is skipped."""
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set SYNCBN_TEST_DATA to the folder that holds {name}")
    return folder.resolve()
