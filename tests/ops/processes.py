"""Runs what needs a process of its own: Triton reads whether to interpret when it is imported."""

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def interpreter_fails():
    """Triton's before 3.7 takes arrays for numbers, which numpy 2.4 refuses and earlier ones deprecate."""
    return version("triton").startswith(("3.5.", "3.6.")) and np.lib.NumpyVersion(np.__version__) >= "2.4.0"


def run_in_process_of_its_own(*command, **variables):
    path = os.pathsep.join([str(HERE.parent), str(HERE), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=HERE.parents[1]
    )
    assert done.returncode == 0, done.stdout + done.stderr


def interpret(file):
    """Run the tests in a file of this folder under Triton's interpreter."""
    if interpreter_fails():
        pytest.skip("this Triton's interpreter needs numpy<2.4")
    ignored = ("-W", "ignore:Conversion of an array with ndim:DeprecationWarning")
    command = ("-m", "pytest", "-p", "no:cacheprovider", *ignored, str(HERE / file))
    run_in_process_of_its_own(*command, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


def compile_kernels_of(file, cache):
    """Run a file of this folder that compiles kernels for a GPU."""
    run_in_process_of_its_own(str(HERE / file), TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(cache))
