"""DeepSpeed's launcher over two hosts: it starts the ranks through ssh, and they train as one."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hosts import Network, network

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
pytest.importorskip("deepspeed", reason="needs the extra syncbn[deepspeed]")

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"
WORDS = (
    *("fit", "--config", str(CONFIGS / "fashion_mnist.yaml")),
    *("--config", str(CONFIGS / "strategy" / "deepspeed_zero2.yaml")),
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


def test_two_hosts_train_as_one(net: Network, tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    variables = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")]),
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    (tmp_path / "variables").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    ssh = f"-i {tmp_path / 'user'} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    environment = os.environ | variables
    environment |= {"PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": ssh, "DS_ENV_FILE": str(tmp_path / "variables")}
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    process = net["node1"].start(
        *(sys.executable, launcher, "--hostfile", str(hostfile), "--no_ssh_check", "--no_local_rank"),
        *("--master_addr", net["node1"].address, "--master_port", "29700", "--module", "syncbn", *WORDS),
        *("--trainer.devices=1", "--trainer.num_nodes=2"),
        log=tmp_path / "log",
        folder=tmp_path,
        env=environment,
    )
    assert process.wait(1500) == 0, (tmp_path / "log").read_text()
    printed = (tmp_path / "log").read_text()
    assert "global batch 32 = 2 ranks x 16 images" in printed and "test accuracy" in printed
    [last] = tmp_path.glob("runs/fashion_mnist/version_0/checkpoints/last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 4
