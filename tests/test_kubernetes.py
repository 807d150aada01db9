"""launch/kubernetes/trainjob.yaml: it is what Kubeflow accepts, and its pods run what they should."""

import copy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from linters import installed

MANIFEST = Path(__file__).parents[1] / "launch" / "kubernetes" / "trainjob.yaml"
RUNTIME, JOB = yaml.safe_load_all(MANIFEST.read_text())


def pod(runtime: dict[str, Any]) -> dict[str, Any]:
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]["template"]["spec"]


def container(runtime: dict[str, Any]) -> dict[str, Any]:
    return pod(runtime)["containers"][0]


def validate(document: dict[str, Any]) -> None:
    """Read it as Kubeflow's own models do, which are generated from its schema, and nothing may get lost."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    model = {"TrainingRuntime": models.TrainerV1alpha1TrainingRuntime, "TrainJob": models.TrainerV1alpha1TrainJob}
    if model[document["kind"]].from_dict(document).to_dict() != document:
        raise ValueError("Kubeflow would read something else")


@pytest.mark.parametrize("document", [RUNTIME, JOB], ids=lambda document: document["kind"])
def test_kubeflow_accepts_it(document: dict[str, Any]) -> None:
    assert document["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    validate(document)


def test_job_names_its_runtime() -> None:
    reference = JOB["spec"]["runtimeRef"]
    assert (reference["kind"], reference["name"]) == (RUNTIME["kind"], RUNTIME["metadata"]["name"])


@pytest.mark.parametrize(
    ("breaks", "says"),
    [
        (lambda runtime: container(runtime).update(imagePulPolicy="Always"), "something else"),
        (lambda runtime: container(runtime).pop("name"), "something else"),
        (lambda runtime: pod(runtime).update(terminationGracePeriodSeconds="90"), "terminationGracePeriodSeconds"),
        (lambda runtime: pod(runtime)["volumes"][2]["emptyDir"].update(medium=1), "medium"),
        (lambda runtime: runtime["spec"]["template"]["spec"].update(maxRestarts=3), "something else"),
    ],
)
def test_a_broken_manifest_is_refused(breaks: Any, says: str) -> None:
    runtime = copy.deepcopy(RUNTIME)
    breaks(runtime)
    with pytest.raises(ValueError, match=says):
        validate(runtime)


def test_volumes_are_mounted_under_their_names() -> None:
    volumes = [volume["name"] for volume in pod(RUNTIME)["volumes"]]
    assert volumes == [mount["name"] for mount in container(RUNTIME)["volumeMounts"]]
    shared = next(volume for volume in pod(RUNTIME)["volumes"] if volume["name"] == "shared-memory")
    assert shared["emptyDir"]["medium"] == "Memory"


def run_pod(folder: Path, restarts: int, doctor_status: int = 0) -> tuple[int, list[str]]:
    """Run the pod's command where torchrun only writes down its words; its exit status and the lines written."""
    written = folder / "written"
    written.unlink(missing_ok=True)
    torchrun = folder / "bin" / "torchrun"
    torchrun.parent.mkdir(exist_ok=True)
    torchrun.write_text(f'#!/bin/bash\necho "$*" >> {written}\n[[ "$*" != *doctor* ]] || exit {doctor_status}\n')
    torchrun.chmod(0o755)
    environment = {
        "PATH": f"{torchrun.parent}:/usr/bin:/bin",
        "RUNS": str(folder / "runs"),
        "RUN_NAME": "job",
        "RESTARTS": str(restarts),
        "PET_MASTER_PORT": "29500",
    }
    command = [*container(RUNTIME)["command"], "--config", "a config.yaml"]
    status = subprocess.run(command, env=environment, timeout=60).returncode
    return status, written.read_text().splitlines()


WORDS = "--config a config.yaml --runs_folder {}/runs --name job"


def test_doctor_runs_first_then_fit_with_the_same_words(tmp_path: Path) -> None:
    words = WORDS.format(tmp_path)
    assert run_pod(tmp_path, restarts=0) == (
        0,
        [f"--master-port 29501 -m syncbn doctor {words}", f"-m syncbn fit {words}"],
    )


def test_fit_does_not_start_where_doctor_fails(tmp_path: Path) -> None:
    status, written = run_pod(tmp_path, restarts=0, doctor_status=3)
    assert status == 3
    assert len(written) == 1


def test_a_restart_goes_on_in_the_newest_folder_with_a_checkpoint(tmp_path: Path) -> None:
    words = WORDS.format(tmp_path)
    runs = tmp_path / "runs" / "job"
    assert run_pod(tmp_path, restarts=1)[1][1] == f"-m syncbn fit {words}"  # died before the first checkpoint
    for version, checkpoint in [(2, "step=9.ckpt"), (9, "step=7.ckpt"), (10, "step=8.ckpt.part")]:
        (runs / f"version_{version}" / "checkpoints").mkdir(parents=True)
        (runs / f"version_{version}" / "checkpoints" / checkpoint).touch()
    assert run_pod(tmp_path, restarts=1)[1][1] == f"-m syncbn fit {words} --resume {runs}/version_9"
    (runs / "version_10" / "checkpoints" / "step=8.ckpt").touch()
    assert run_pod(tmp_path, restarts=2)[1][1] == f"-m syncbn fit {words} --resume {runs}/version_10"
    assert run_pod(tmp_path, restarts=0)[1][1] == f"-m syncbn fit {words}"


def test_shellcheck_passes(tmp_path: Path) -> None:
    script = tmp_path / "command.sh"
    script.write_text("#!/bin/bash\n" + container(RUNTIME)["command"][4])
    subprocess.run([installed("shellcheck"), script], check=True, timeout=60)
