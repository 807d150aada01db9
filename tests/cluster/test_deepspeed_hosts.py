"""launch/deepspeed.sh over two hosts: it starts the ranks through ssh, and they train as one."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hosts import Network, network
from runs import checkout, environment, run_folders

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
pytest.importorskip("deepspeed", reason="needs the extra syncbn[deepspeed]")

WORDS = (
    *("--config", "configs/fashion_mnist.yaml", "--config", "configs/strategy/deepspeed_zero2.yaml"),
    *("--global_batch_size=32", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"),
    *("--trainer.limit_train_batches=4", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1"),
)


def why_no_ssh() -> str | None:
    """Why hosts cannot call each other, or None where they can."""
    missing = [tool for tool in ("pdsh", "ssh", "ssh-keygen", "sshd") if shutil.which(tool) is None]
    return f"needs {', '.join(missing)} (Debian packages openssh-server, pdsh)" if missing else None


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Network]:
    reason = why_no_ssh()
    if reason:
        pytest.skip(reason)
    with network(["node1", "node2"], tmp_path) as made:
        serve_ssh(made, tmp_path)
        yield made


def serve_ssh(net: Network, folder: Path) -> None:
    """An ssh server on each host, which lets in the key of this test and no other."""
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd wants to leave its privileges
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copy(folder / "user.pub", folder / "allowed")
    config = folder / "sshd_config"
    config.write_text(
        f"HostKey {folder / 'host'}\nAuthorizedKeysFile {folder / 'allowed'}\nPidFile none\nStrictModes no\n"
        "PermitRootLogin prohibit-password\nUsePAM no\n"
    )
    sshd = shutil.which("sshd")
    assert sshd is not None
    for name, host in net.hosts.items():
        host.start(sshd, "-D", "-e", "-f", str(config), log=folder / f"{name}-sshd.log")


def ssh_of_the_test(folder: Path) -> Path:
    """A folder with an `ssh` that shows the key of this test, for DeepSpeed and pdsh to find first."""
    options = f"-i {folder / 'user'} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    command = folder / "bin" / "ssh"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {options} "$@"\n')
    command.chmod(0o755)
    return command.parent


def test_two_hosts_train_as_one(net: Network, tmp_path: Path) -> None:
    folder = checkout(tmp_path / "checkout")
    (folder / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    variables = environment() | {"PDSH_RCMD_TYPE": "ssh", "TMPDIR": str(tmp_path)}
    variables["PATH"] = f"{ssh_of_the_test(tmp_path)}:{variables['PATH']}"
    process = net["node1"].start("launch/deepspeed.sh", *WORDS, log=folder / "log", folder=folder, env=variables)
    status, printed = process.wait(1500), (folder / "log").read_text()
    assert status == 0, printed
    assert "global batch 32 = 2 ranks x 16 images" in printed and "test accuracy" in printed
    [run] = run_folders(folder)
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
