"""The GPU section: its code runs dry on a CPU; on a GPU its step is captured and never waits for the device."""

import csv
import subprocess
import sys
import weakref
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from syncbn.benchmarks.gpu import command as gpu_command
from syncbn.benchmarks.gpu import layer as gpu_layer
from syncbn.benchmarks.gpu import pool as gpu_pool
from syncbn.benchmarks.gpu import targets as gpu_targets
from syncbn.benchmarks.gpu.step import GRAPH, StepSetting, TrainingStep, build, verify
from syncbn.benchmarks.gpu.timing import Replay, captured
from syncbn.benchmarks.harness import measure, report
from syncbn.benchmarks.harness.measure import Measurement
from syncbn.benchmarks.harness.peers import stock_inception
from syncbn.models import inception_bn

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def section(*arguments):
    command = [sys.executable, "-m", "syncbn", "benchmark", "--section", "gpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=850)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_is_refused_without_a_gpu():
    done = section()
    assert done.returncode == 1
    assert "needs an NVIDIA GPU" in done.stderr
    assert done.stderr.count("\n") == 1


def rows_of(folder):
    (path,) = folder.glob("*.csv")
    assert path.with_suffix(".png").exists()
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.timeout(900)
def test_dry_run(tmp_path):
    done = section("--gpu.device", "cpu", "--gpu.dtype", "float32", "--quick", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path)
    assert {row["section"] for row in rows} == {"step", "forward", "backward", "pool forward", "pool backward"}
    assert {"syncbn", GRAPH, "nn.BatchNorm2d", "F.max_pool2d", "floor"} <= {row["contender"] for row in rows}
    assert {row["unit"] for row in rows} == {"ms", "images/s", "MiB at most"}
    assert "Targets" in done.stdout


def test_the_compiled_layer_is_timed_beside_ours(group_of_one, monkeypatch):
    """Without the compiler, which would take longer than all else here."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, dynamic: None)
    options = gpu_layer.TimingOptions("cpu", torch.float32, False, rounds=2, warmup=0, bandwidth=1e9)
    rows = gpu_layer.measure_shape((4, 8, 6, 6), "channels_last", options, compiled=True)
    assert [(row.section, row.contender) for row in rows] == [
        ("forward", "nn.BatchNorm2d, compiled"),
        ("backward", "nn.BatchNorm2d, compiled"),
    ]


def test_the_pools_are_the_networks():
    network, called = inception_bn(2).eval(), []

    def recorded(x, kernel, stride, padding, ceil_mode=False):
        y = F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode)
        called.append((x.shape, kernel, stride, y.shape))
        return y

    for module in network.modules():
        if hasattr(module, "max_pool"):
            module.max_pool = recorded
    with torch.no_grad():
        network(torch.zeros(1, 3, 224, 224))
    networks = called.copy()
    called.clear()
    for pool in gpu_pool.pools(1):
        pool.of(recorded, torch.empty(1, pool.C, pool.side, pool.side, device="meta"))
    assert called == networks
    assert len(called) == 5


def test_stock_networks_have_torchs_pools():
    network = stock_inception(StepSetting(2, 32, 0.125, "cpu").network())
    pools = [module.max_pool for module in network.modules() if hasattr(module, "max_pool")]
    assert len(pools) == 11  # of the stem and each module, used or not
    assert set(pools) == {F.max_pool2d}


def test_a_wrong_pool_is_refused():
    x = torch.arange(36.0).view(1, 1, 6, 6).requires_grad_()
    contenders = {"syncbn": lambda x, *_, **__: F.avg_pool2d(x, 3, 2, ceil_mode=True)}
    with pytest.raises(measure.WrongContender, match="'syncbn' is off the float64 oracle"):
        gpu_pool.verify(gpu_pool.Pool(1, 1, 6, 2), x, torch.ones(1, 1, 3, 3), contenders)


@needs_gpu
@pytest.mark.parametrize("graphs", ["true", "false"])
def test_on_a_gpu(tmp_path, graphs):
    done = section("--quick", "--gpu.graphs", graphs, "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"nn.SyncBatchNorm", "syncbn, group of one"} <= {row["contender"] for row in rows_of(tmp_path)}


def test_a_failure_costs_no_other_figure(tmp_path):
    def fails():
        raise RuntimeError("out of luck")

    row = Measurement("step", "step, 2 x 32 px", "channels_last", 1, "syncbn", 1.0, 1.0, 1.0, 1.0)
    session = gpu_command.Session(tmp_path / "partial.csv", 60, report.console())
    session.measure("first", lambda: [row])
    session.measure("second", fails)
    session.measure("third", lambda: [row])
    session.measure("fourth", lambda: [row], needs=100)
    assert session.failed == ["second (RuntimeError: out of luck)"]
    assert session.left_out == ["fourth"]
    assert len((tmp_path / "partial.csv").read_text().splitlines()) == 3


def test_every_target_is_found_in_the_results():
    """Made-up times: syncbn takes 2 ms, each contender as many times as long as its place in the list says."""
    factors = {"syncbn": 1, GRAPH: 0.5, "nn.SyncBatchNorm": 4, "nn.BatchNorm2d": 2, "nn.BatchNorm2d, Cadene layout": 3}
    rows = []
    for name, factor in factors.items():
        for batch in (256, 32):
            for unit, value in (("images/s", 100 / factor), ("MiB at most", 10 * factor)):
                rows.append(
                    Measurement("step", f"step, {batch} x 224 px", "", 1, name, value, value, value, 1 / factor, unit)
                )
        for direction in ("forward", "backward"):
            rows.append(Measurement(direction, "256x64x112x112", "", 1, name, 2 * factor, 1, 1, 1 / factor))
            rows.append(Measurement(direction, "32x8x7x7", "", 1, name, 2 * factor, 1, 1, 1 / factor))
    for direction, over in (("forward", 1.1), ("backward", 1.2)):
        rows.append(Measurement(direction, "256x64x112x112", "", 1, "floor", 1, 1, 1, over))
        rows.append(Measurement(direction, "32x8x7x7", "", 1, "floor", 1, 1, 1, 9.0))  # too small to count
    found = [target.found(rows) for target in gpu_targets.TARGETS]
    assert found == pytest.approx([1.1, 1.2, 4, 2, 200, 8, 6, 8, 0.25])
    assert [target.found([]) for target in gpu_targets.TARGETS] == [None] * len(found)


@pytest.fixture
def group_of_one():
    with gpu_command.group_of_one("cuda" if torch.cuda.is_available() else "cpu"):
        yield dist.group.WORLD


def test_the_networks_are_verified(group_of_one, monkeypatch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = StepSetting(2, 32, 0.125, device)
    network = setting.network()
    network.stem.conv2.bn.eps = 0.1
    monkeypatch.setattr(
        "syncbn.benchmarks.gpu.step.makers", lambda setting: {"syncbn": lambda: network.requires_grad_()}
    )
    with pytest.raises(measure.WrongContender, match="'syncbn' is off the float64 oracle"):
        verify(setting)


def test_a_captured_step_trains_as_the_step(group_of_one):
    """On a CPU there is no graph: `captured` is the step itself, after the same calls that warm a graph up."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = StepSetting(4, 32, 0.125, device)
    networks = [setting.network() for _ in range(2)]
    images, labels = setting.data()
    eager, other = (TrainingStep(network, images, labels, fused=device == "cuda") for network in networks)
    replay = captured(other, device)
    for _ in range(4):  # as many as warmed the other up
        eager()
    for _ in range(3):
        eager()
        replay()
    for one, two in zip(networks[0].state_dict().values(), networks[1].state_dict().values(), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-2, atol=1e-3)


def test_a_replay_keeps_what_its_graph_reads():
    """A graph keeps no tensor alive: were a step's labels gone, a replay would read another's numbers for them."""
    step = mock.Mock()
    alive = weakref.ref(step)
    graph = mock.Mock()
    replay = Replay(graph, step)
    del step
    replay()
    assert alive() is not None
    graph.replay.assert_called_once_with()


def test_the_forward_of_a_backward_to_be_captured_runs_where_graphs_are_captured(monkeypatch):
    """Autograd runs a backward on its forward's stream: on another, nothing is captured, or the capture fails."""
    entered, forwards = [], []

    @contextmanager
    def recorded(device):
        entered.append(device)
        yield
        entered.pop()

    backward_of = gpu_layer.backward_of
    monkeypatch.setattr(gpu_layer, "on_capture_stream", recorded)
    monkeypatch.setattr(gpu_layer, "backward_of", lambda *args: forwards.append(list(entered)) or backward_of(*args))
    with gpu_command.group_of_one("cpu"):
        for graphs in (False, True):
            forwards.clear()
            options = gpu_layer.TimingOptions("cpu", torch.float32, graphs, rounds=1, warmup=0, bandwidth=1e9)
            gpu_layer.measure_shape((4, 8, 6, 6), "channels_last", options, compiled=False)
            assert forwards == [["cpu"] if graphs else []] * 3


@needs_gpu
@pytest.mark.parametrize("name", ["syncbn", "syncbn, group of one"])
def test_a_whole_step_never_waits_for_the_device(group_of_one, name):
    step = build(name, StepSetting(8, 64, 0.25, "cuda"))
    for _ in range(4):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
