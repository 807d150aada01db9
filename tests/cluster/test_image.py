"""The image of docker/Dockerfile: built on a bare Debian without a container engine, and put to work."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
TOOLS = ("debootstrap", "buildah")


def why_no_image() -> str | None:
    """Why no image can be built here, or None where it can."""
    if os.geteuid() != 0:
        return "needs root, for debootstrap and overlay mounts"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"needs {', '.join(missing)} (Debian packages of the same names)" if missing else None


def bare_debian(tree: Path) -> None:
    """Install Debian 12 and nothing more into a folder; without a network the test is skipped."""
    command = ["debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    printed = done.stdout + done.stderr
    if "Failed getting release file" in printed:
        pytest.skip("needs a network, to install Debian from")
    assert done.returncode == 0, printed[-2000:]


def pip_settings(file: Path) -> list[str]:
    """Write this machine's settings of pip that the build needs into a file; what to mount for them.

    They reach the build as volumes, and so are in no layer of the image.
    """
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings = dict(re.findall(r"^(?:global|:env:)\.(cert|find-links|index-url|proxy)='(.*)'$", listed.stdout, re.M))
    file.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    folders = [settings[name] for name in ("cert", "find-links") if name in settings]
    mounts = [f"{path}:{path}:ro" for path in folders if Path(path).exists()]
    return [word for mount in [f"{file}:/etc/pip.conf:ro", *mounts] for word in ("--volume", mount)]


class Store:
    """A place of its own for images and containers, apart from the machine's."""

    image = "localhost/syncbn"

    def __init__(self, folder: Path) -> None:
        self.storage = [f"--root={folder}/images", f"--runroot={folder}/run", "--storage-driver=overlay"]

    def buildah(self, *words: str, timeout: float = 300) -> str:
        """What buildah prints; an error with its messages where it fails."""
        command = ["buildah", *self.storage, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    def import_base(self, tree: Path) -> str:
        """Make an image of a file tree, and return its name."""
        container = self.buildah("from", "scratch").strip()
        self.buildah("add", "--quiet", container, str(tree), timeout=1200)
        self.buildah("commit", "--quiet", "--rm", container, "localhost/base", timeout=1200)
        return "localhost/base"

    def build(self, base: str, settings: Sequence[str]) -> None:
        """Build the image."""
        options = ["--format=docker", "--isolation=chroot", "--pull-never", "--network=host", "--layers"]
        options += [f"--build-arg=BASE_IMAGE={base}", f"--tag={self.image}", "--file=docker/Dockerfile"]
        self.buildah("bud", *options, *settings, ".", timeout=3000)

    def run(self, *words: str, options: Sequence[str] = ()) -> str:
        """Run a command in a new container, as the image's user unless the options say otherwise."""
        container = self.buildah("from", "--pull-never", self.image).strip()
        try:
            return self.buildah("run", "--isolation=chroot", *options, container, "--", *words, timeout=1200)
        finally:
            self.buildah("rm", container)

    def configuration(self) -> dict[str, Any]:
        """The image's user, labels, health check and so on."""
        return json.loads(self.buildah("inspect", "--type=image", self.image))["Docker"]["config"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    reason = why_no_image()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("image")
    bare_debian(folder / "base")
    store = Store(folder)
    try:
        store.build(store.import_base(folder / "base"), pip_settings(folder / "pip.conf"))
        yield store
    finally:
        store.buildah("rmi", "--all", "--force")
        shutil.rmtree(folder)


TRAIN = ["syncbn", "fit", "--config", "configs/fashion_mnist.yaml", "--trainer.max_epochs", "1"]
TRAIN += ["--trainer.limit_train_batches", "5", "--trainer.limit_val_batches", "1"]


@pytest.mark.parametrize(("options", "user"), [([], 10001), (["--user=54321:54321"], 54321)])
def test_the_main_job_runs_as_a_user_who_is_not_root(
    store: Store, tmp_path: Path, options: list[str], user: int
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    os.chown(runs, user, user)
    printed = store.run(*TRAIN, options=[f"--volume={runs}:/workspace/runs", *options])
    assert "on 2,000 images with best" in printed
    assert printed.splitlines()[-1] == "runs/fashion_mnist/version_0"
    assert (runs / "fashion_mnist" / "version_0" / "checkpoints" / "last.ckpt").stat().st_uid == user


def test_health_check_passes_and_tells_a_broken_package(store: Store) -> None:
    check = store.configuration()["Healthcheck"]["Test"]
    assert check[0] == "CMD"
    store.run(*check[1:])
    broken = f"rm /opt/syncbn/lib/python3*/site-packages/syncbn/ops/_native*.so && {' '.join(check[1:])}"
    with pytest.raises(AssertionError, match="were not compiled"):
        store.run("sh", "-c", broken, options=["--user=0"])


def test_the_image_holds_what_runs_and_nothing_of_the_machine_that_built_it(store: Store) -> None:
    assert store.run("sh", "-c", "cat /etc/pip.conf; env | grep PIP_ || true") == ""
    assert store.run("sh", "-c", "command -v g++ || true") == ""
    store.run("gcc", "--version")  # for Triton
    assert "pip.conf" not in store.buildah("inspect", "--type=image", store.image)


def test_labels_and_user(store: Store) -> None:
    configuration = store.configuration()
    assert configuration["User"] == "10001:10001"
    labels = configuration["Labels"]
    assert labels["org.opencontainers.image.title"] == "syncbn"
    printed = store.run("python", "-c", "from importlib.metadata import version; print(version('syncbn'))")
    assert labels["org.opencontainers.image.version"] == printed.strip()
