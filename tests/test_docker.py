"""docker/: what linters and a look at the files can tell. tests/cluster/test_image.py builds the image and runs it."""

import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import syncbn
from linters import installed

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "docker" / "Dockerfile"


def test_hadolint_passes() -> None:
    subprocess.run([installed("hadolint"), DOCKERFILE], check=True, timeout=60)


def test_base_is_pinned_by_tag_and_digest() -> None:
    (base,) = re.findall(r"^ARG BASE_IMAGE=(.*)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert re.fullmatch(r"nvidia/cuda:13\.0\.\d+-base-ubuntu24\.04@sha256:[0-9a-f]{64}", base)


def test_context_holds_what_is_copied_and_little_else() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copies = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    assert {name for line in copies for name in line.split()} == allowed
    assert all((ROOT / name).exists() for name in allowed)


def requirements(extras: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["requirements.py", extras])
    runpy.run_path(str(ROOT / "docker" / "requirements.py"))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the image's Python is 3.11 or newer: tomllib")
def test_requirements_are_those_of_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    requirements("imagenet,deepspeed", monkeypatch)
    with_extras = capsys.readouterr().out.splitlines()
    requirements("", monkeypatch)
    without = capsys.readouterr().out.splitlines()
    assert "torch>=2.9" in without
    assert [line.partition(">")[0] for line in with_extras if line not in without] == ["scipy", "deepspeed"]
    with pytest.raises(SystemExit, match=r"no extra imagnet: there are .*imagenet"):
        requirements("imagnet", monkeypatch)


def check_health(monkeypatch: pytest.MonkeyPatch, gpus: int = 0, compiled: bool = True) -> None:
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # which the script sets
    monkeypatch.setattr(Path, "glob", lambda path, pattern: [Path(f"/dev/nvidia{gpu}") for gpu in range(gpus)])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if compiled else None)
    runpy.run_path(str(ROOT / "docker" / "healthcheck.py"))


def test_health_check(monkeypatch: pytest.MonkeyPatch) -> None:
    check_health(monkeypatch)
    with pytest.raises(SystemExit, match="2 GPUs were given to the container and none answers"):
        check_health(monkeypatch, gpus=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_health(monkeypatch, gpus=2)
    with pytest.raises(SystemExit, match="were not compiled"):
        check_health(monkeypatch, compiled=False)
    monkeypatch.setattr(syncbn.SyncBatchNorm, "forward", lambda self, x: x * float("nan"))
    with pytest.raises(SystemExit, match="differs from torch's batch_norm by nan"):
        check_health(monkeypatch)
