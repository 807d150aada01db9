"""Switches for speed: what each device gets by default, what is refused where, and that numbers stay the same."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from syncbn.data import ImageDataModule
from syncbn.models import InceptionBN
from syncbn.training import ImageClassifier
from syncbn.training.optimization.speed import (
    compile_network,
    default_benchmark,
    default_precision,
    use_fused_optimizer,
    use_recomputation,
)


def trainer_with(clip=None, precision="32-true"):
    return SimpleNamespace(gradient_clip_val=clip, precision=precision)


def on_cuda():
    return [SimpleNamespace(is_cuda=True, data=torch.zeros(1))]


def test_the_optimiser_is_fused_on_cuda_alone():
    assert use_fused_optimizer(None, on_cuda(), trainer_with()) is True
    assert use_fused_optimizer(None, [*on_cuda(), torch.zeros(1)], trainer_with()) is None
    assert use_fused_optimizer(True, [torch.zeros(1)], trainer_with()) is True
    assert use_fused_optimizer(False, on_cuda(), trainer_with()) is None


def test_the_optimiser_is_not_fused_where_gradients_are_clipped_under_autocast():
    assert use_fused_optimizer(None, on_cuda(), trainer_with(1.0, "bf16-mixed")) is None
    assert use_fused_optimizer(None, on_cuda(), trainer_with(1.0)) is True
    with pytest.raises(ValueError, match=r"fused_optimizer=true contradicts trainer.gradient_clip_val=1.0"):
        use_fused_optimizer(True, on_cuda(), trainer_with(1.0, "bf16-mixed"))


def test_activations_are_recomputed_on_cuda_alone():
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert [use_recomputation(wanted, cuda) for wanted in (None, True, False)] == [True, True, False]
    assert [use_recomputation(wanted, cpu) for wanted in (None, True, False)] == [False, True, False]


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_are_refused_on_a_cpu(mode):
    with pytest.raises(ValueError, match=f"model.compile={mode} replays CUDA graphs, and the device is a cpu"):
        compile_network(nn.Linear(1, 1), mode, torch.device("cpu"))


def test_kernels_take_their_memory_before_cuda_graphs_are_made(monkeypatch):
    done = []
    monkeypatch.setattr("syncbn.ops.prepare", lambda device: done.append(device))
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: done.append(options["mode"]))
    device = torch.device("cuda", 0)
    for mode in ("default", "reduce-overhead"):
        compile_network(nn.Linear(1, 1), mode, device)
    assert done == ["default", device, "reduce-overhead"]


@pytest.mark.parametrize(
    ("options", "cuda", "bf16", "expected"),
    [
        ({"precision": None, "accelerator": "auto"}, True, True, "bf16-mixed"),
        ({"precision": None, "accelerator": "gpu"}, True, True, "bf16-mixed"),
        ({"precision": None, "accelerator": "auto"}, True, False, None),
        ({"precision": None, "accelerator": "auto"}, False, True, None),
        ({"precision": None, "accelerator": "cpu"}, True, True, None),
        ({"precision": "32-true", "accelerator": "auto"}, True, True, "32-true"),
        ({"precision": None, "accelerator": "auto", "plugins": ["of the user's"]}, True, True, None),
    ],
)
def test_default_precision(options, cuda, bf16, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert default_precision(options) == expected


@pytest.mark.parametrize(
    ("options", "cuda", "expected"),
    [
        ({"accelerator": "auto"}, True, True),
        ({"accelerator": "auto"}, False, None),
        ({"accelerator": "cpu"}, True, None),
        ({"accelerator": "gpu", "benchmark": False}, True, False),
        ({"accelerator": "gpu", "deterministic": "warn"}, True, None),
    ],
)
def test_default_benchmark(options, cuda, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert default_benchmark(options) == expected


def trained(folder, **options):
    """Weights after two steps."""
    torch.manual_seed(0)
    data = ImageDataModule(8, image_size=8, validation_images=9950, seed=0)
    model = ImageClassifier(8, 10, 1, data.training_images, width_multiplier=0.125, stem="small", **options)
    run = Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        max_steps=2,
        limit_val_batches=0,
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(model, data)
    return model.state_dict()


def test_a_fused_optimiser_leaves_the_numbers_as_they_are(tmp_path):
    expected, found = trained(tmp_path, fused_optimizer=False), trained(tmp_path, fused_optimizer=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


def test_recomputed_activations_leave_the_numbers_as_they_are(tmp_path, monkeypatch):
    seen = []
    original = InceptionBN.forward_features
    monkeypatch.setattr(
        InceptionBN, "forward_features", lambda self, x: seen.append(self.recompute_activations) or original(self, x)
    )
    expected, found = trained(tmp_path), trained(tmp_path, recompute_activations=True)
    assert seen == [False] * 2 + [True] * 2
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_network_is_compiled_when_training_starts(tmp_path, monkeypatch):
    """What the graph computes is tested in tests/models/test_compile_network.py."""
    calls = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: calls.append((type(self), options)))
    trained(tmp_path)
    assert calls == []
    trained(tmp_path, compile="default")
    assert calls == [(InceptionBN, {"fullgraph": True, "mode": "default"})]


def test_the_command_refuses_cuda_graphs_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "syncbn", "fit", "--config", "configs/fashion_mnist.yaml"]
    words = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--model.compile", "reduce-overhead"]
    done = subprocess.run(
        [*command, *words, "--runs_folder", str(tmp_path)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1
    assert "model.compile=reduce-overhead replays CUDA graphs, and the device is a cpu" in done.stderr
