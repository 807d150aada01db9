"""The benchmarks run, refuse contenders that are wrong, and compare round by round. Their times mean nothing here."""

import csv
import subprocess
import sys

import pytest
from torch import nn

from real_data import real_data
from syncbn.benchmarks import layer
from syncbn.benchmarks.harness import measure, peers, world


def benchmark(section, output, *arguments):
    command = [sys.executable, "-m", "syncbn", "benchmark", "--section", section, "--quick", "--output", str(output)]
    command += arguments
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert measure.SMOKE_RUN in " ".join(done.stdout.split())
    (path,) = output.glob("*.csv")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with path.open() as file:
        return list(csv.DictReader(file))


def test_layer_alone(tmp_path):
    rows = benchmark("layer", tmp_path, "--layer.part", "alone", "--layer.activation", "relu")
    assert list(rows[0]) == [
        *("date", "cpu", "cores", "threads", "memory", "torch", "python", "section", "shape", "memory_format", "ranks"),
        *("contender", "median", "p20", "p80", "ratio", "unit"),
    ]
    assert len(rows) == 2 * 2 * 2  # shapes, formats, contenders
    assert {row["contender"] for row in rows} == {"syncbn", "nn.BatchNorm2d, ReLU"}
    assert {row["memory"] for row in rows} == {"kept"}
    assert all(float(row["p20"]) <= float(row["median"]) <= float(row["p80"]) for row in rows)


def test_layer_on_ranks(tmp_path):
    rows = benchmark(
        *("layer", tmp_path, "--layer.part", "ranks", "--layer.ranks", "[2]", "--layer.formats", "[channels_last]")
    )
    assert len(rows) == 2 * 5
    assert {row["ranks"] for row in rows} == {"2"}


def test_step(tmp_path):
    rows = benchmark("step", tmp_path)
    counts = {row["contender"]: float(row["median"]) for row in rows if row["unit"] == "collectives forward"}
    assert counts.pop("syncbn") == 33
    assert set(counts.values()) == {69}
    assert len(counts) == 4


@pytest.mark.parametrize("real", [False, True])
def test_loader(tmp_path, real):
    photos = ["--loader.photos", str(real_data("imagenet-originals"))] if real else []
    rows = benchmark("loader", tmp_path, *photos, "--loader.part", "decode")
    assert {row["contender"] for row in rows} == {"syncbn", "OpenCV loop", "Pillow", "torchvision style"}
    assert all(float(row["median"]) > 0 for row in rows)


def test_inference(tmp_path):
    rows = benchmark("inference", tmp_path)
    contenders = {row["contender"] for row in rows if row["memory_format"] == "contiguous"}
    assert {"syncbn", "not folded", "not folded, nn.BatchNorm2d", "folded, TorchScript"} <= contenders
    assert all(float(row["median"]) > 0 for row in rows)


def test_memory(tmp_path):
    rows = benchmark("memory", tmp_path / "out")
    peaks = {row["contender"]: float(row["median"]) for row in rows if row["unit"] == "MiB at most"}
    assert peaks["syncbn"] < peaks["syncbn, activations kept"] < peaks["nn.BatchNorm2d"]
    assert {row["contender"] for row in rows if row["unit"] == "ms"} == set(peaks)


def test_shapes_are_those_of_the_network():
    shapes = layer.layer_shapes()
    assert sum(shapes.values()) == 69
    assert sum(C * n for (C, _), n in shapes.items()) == 10_016


class NoUnbiasedVariance(peers.PeerBatchNorm):
    """Right but for the running variance."""

    def forward(self, input):
        before = self.running_var.clone()
        y = super().forward(input)
        M = 2 * input.numel() // input.shape[1]
        self.running_var.sub_(0.9 * before).mul_((M - 1) / M).add_(0.9 * before)
        return y


def errors_of_wrong_contenders(rank):
    """What `prepare` says to a right contender and to three wrong ones."""
    right = peers.PeerBatchNorm(8, exchange="all_gather", arithmetic="passes")
    unsynchronised = nn.BatchNorm2d(8)
    biased = NoUnbiasedVariance(8, exchange="all_gather", arithmetic="plain")
    halved = peers.PeerBatchNorm(8, exchange="two_reduces", arithmetic="plain")
    halved.merge_gradient = lambda sums: sums  # this rank's alone
    problem = layer.Problem((8, 8, 6, 6), rank=rank, ranks=2)
    for wrong in (unsynchronised, biased, halved):
        try:
            layer.prepare({"right": right, "wrong": wrong}, problem)
            yield "nothing"
        except measure.WrongContender as error:
            yield str(error)
        right.reset_running_stats()


def test_wrong_contenders_are_refused():
    unsynchronised, biased, halved = world.run_ranks(errors_of_wrong_contenders, 2, silence=60)
    assert unsynchronised.startswith("'wrong' is off the float64 oracle")
    assert "y by" in unsynchronised
    assert "running_var by" in biased
    assert "y by" not in biased
    assert "dx by" in halved
    assert "dweight" not in halved


def test_a_wrong_layer_alone_is_refused():
    with pytest.raises(measure.WrongContender, match=r"'other eps' is off .* y by"):
        layer.prepare({"other eps": nn.BatchNorm2d(8, eps=0.1)}, layer.Problem((4, 8, 6, 6)))


def failing(rank):
    yield "first"
    if rank == 1:
        raise ValueError("rank 1 does not like it")
    yield "second"


def test_a_failing_rank_ends_the_benchmark():
    with pytest.raises(world.RankFailed, match="rank 1 does not like it"):
        list(world.run_ranks(failing, 2, silence=60))


def test_contenders_take_turns_and_are_compared_round_by_round():
    calls = []
    times = measure.time_in_turns(
        {"syncbn": lambda: calls.append("A"), "peer": lambda: calls.append("B")}, 3, warmup=1, least_ms=0
    )
    assert calls == ["A", "B"] * 6
    assert [len(t) for t in times.values()] == [3, 3]
    ours, theirs = measure.rows_of("s", "x", "contiguous", 1, {"syncbn": [1.0, 8.0, 2.0], "peer": [2.0, 9.0, 8.0]})
    assert (ours.ratio, theirs.ratio) == (1.0, 0.5)
    assert theirs.median == 8.0
