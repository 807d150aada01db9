"""The cost model against sums done by hand, the counted messages, and the section as a command."""

import csv
import subprocess
import sys

import pytest

from syncbn.benchmarks import collectives
from syncbn.benchmarks.collectives import ALGORITHMS, GATHERED, GROUPED, PER_LAYER, Constants
from syncbn.benchmarks.harness.messages import ALL_REDUCE, RecordedMessage
from syncbn.benchmarks.harness.peers import ALL_GATHER

CHANNELS, LAYERS = 10_016, 69  # of Inception-BN's norms, all together


def test_constants_are_found_again():
    sizes = [64, 1024, 65536, 2**20]
    times = [3e-5 + n * 2e-9 for n in sizes]
    constant, slope = collectives.fit_line(sizes, times)
    assert (constant, slope) == pytest.approx((3e-5, 2e-9))
    found = collectives.constants_of(ALL_REDUCE, sizes, times, P=4)
    assert found.alpha == pytest.approx({"ring": 3e-5 / 6, "tree": 3e-5 / 4})
    assert found.beta == pytest.approx(2e-9 / 1.5)  # each of four ranks sends 1.5 n


@pytest.mark.parametrize("times", [[2.0, 1.0, 0.5], [1e-6, 1.0, 2.2]])
def test_constants_are_never_negative(times):
    assert min(collectives.fit_line([1, 1000, 2000], times)) >= 0


@pytest.mark.parametrize(
    ("P", "algorithm", "reduced", "gathered"),
    [  # hops, bytes on the wire for a message of 80 bytes from each rank
        (2, "ring", (2, 80), (1, 80)),
        (2, "tree", (2, 80), (1, 80)),
        (8, "ring", (14, 140), (7, 560)),
        (8, "tree", (6, 140), (3, 560)),
        (1024, "tree", (20, 159.84375), (10, 81840)),
    ],
)
def test_cost_of_one_message(P, algorithm, reduced, gathered):
    (chosen,) = (a for a in ALGORITHMS if a.name == algorithm)
    alpha, beta = 10.0, 0.25
    constants = {c: Constants({"ring": alpha, "tree": alpha}, beta) for c in (ALL_REDUCE, ALL_GATHER)}
    for collective, (hops, sent) in ((ALL_REDUCE, reduced), (ALL_GATHER, gathered)):
        found = collectives.time_of([RecordedMessage(collective, 80, 0)], constants, chosen, P)
        assert found == pytest.approx(hops * alpha + sent * beta)


@pytest.mark.timeout(900)
def test_section(tmp_path):
    command = [sys.executable, "-m", "syncbn", "benchmark", "--section", "collectives", "--quick"]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (path,) = tmp_path.glob("*.csv")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    measured = [row for row in rows if row["section"] == "collective"]
    assert {row["contender"] for row in measured} == {"all-reduce", "all-gather"}
    assert all(float(row["median"]) > 0 for row in measured)
    assert sum(row["section"] == "messages of a step, sent" for row in rows) == 3
    found = {
        (int(row["ranks"]), row["contender"], row["unit"]): float(row["median"])
        for row in rows
        if row["section"] == "projected"
    }
    for P in (2, 1024):
        counts = {scheme: found[P, scheme, "messages"] for scheme in (GROUPED, PER_LAYER, GATHERED)}
        assert counts == {GROUPED: 2 * 33, PER_LAYER: 2 * LAYERS, GATHERED: 2 * LAYERS}
        # float64: two sums a channel each way; a count a layer forward; the id and its square with each message.
        received = 8 * (4 * CHANNELS + LAYERS + 2 * 2 * LAYERS)
        assert found[P, PER_LAYER, "receive memory, bytes"] == pytest.approx(received, rel=1e-4)
        assert found[P, GROUPED, "receive memory, bytes"] < received
        # float32: mean, variance, count of every rank; back two sums in float64, as our passes leave them.
        gathered = 4 * P * (2 * CHANNELS + LAYERS) + 8 * 2 * CHANNELS
        assert found[P, GATHERED, "receive memory, bytes"] == pytest.approx(gathered, rel=1e-4)


@pytest.mark.parametrize("options", [["--collectives.ranks", "1"], ["--collectives.projected", "[8,1]"]])
def test_a_world_without_messages_is_refused(options):
    command = [sys.executable, "-m", "syncbn", "benchmark", "--section", "collectives", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "a message needs two ranks" in done.stderr
