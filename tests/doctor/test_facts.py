"""What a rank finds out about itself."""

from types import SimpleNamespace

import pytest
import torch

from syncbn.doctor import facts
from syncbn.doctor.facts import Configuration, Facts, Placement

RANK_2 = Placement("torchrun", 2, 8, 2, "localhost", "127.0.0.1", 29500)
GIB = 2**30


def test_the_revision_is_that_of_syncbn_not_of_the_checkout_it_is_installed_in(monkeypatch):
    monkeypatch.setattr(facts, "source_revision", lambda: "that of the package")
    assert facts.software_versions()["syncbn revision"] == "that of the package"


# ---- GPUs, of which there are eight here -----------------------------------------------------------


@pytest.fixture
def opened(monkeypatch):
    """The GPUs that were opened, and eight of them without nvidia-ml-py."""
    opened = []

    def open_device(index: int) -> tuple[int, int]:
        opened.append(index)
        return 77 * GIB, 80 * GIB

    def without_nvml(index: int) -> int:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(name="H100", uuid=i, total_memory=80 * GIB)
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", open_device)
    monkeypatch.setattr(torch.cuda, "device_memory_used", without_nvml)
    return opened


def facts_for(device: str) -> Facts:
    return facts.collect_facts(RANK_2, Configuration(device=device))


def test_a_rank_opens_its_own_gpu_alone(opened):
    devices = facts_for("cuda").devices
    assert opened == [2] and len({device.uuid for device in devices}) == 8
    assert [device.used for device in devices] == [None, None, 3 * GIB, None, None, None, None, None]


def test_nvml_opens_no_gpu(opened, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda index: index * GIB)
    assert facts_for("cuda").devices[2].used == 2 * GIB and opened == []


def test_a_trainer_on_the_cpu_opens_no_gpu(opened):
    assert len(facts_for("cpu").devices) == 8 and opened == []


def test_a_gpu_that_cannot_be_opened_is_a_fact(opened, monkeypatch):
    def busy(index: int) -> tuple[int, int]:
        raise RuntimeError("CUDA error: busy or unavailable\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "mem_get_info", busy)
    device = facts_for("cuda").devices[2]
    assert device.used is None and device.error == "CUDA error: busy or unavailable Compile with ..."
