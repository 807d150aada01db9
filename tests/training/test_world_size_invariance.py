"""The promise that everything serves: the same training run on any number of ranks."""

from pathlib import Path

import pytest

from training.conftest import result_of_worker

WORKER = Path(__file__).with_name("invariance_worker.py")
LOSS_TOLERANCE = {"64-true": 1e-10, "32-true": 1e-4}
STATE_TOLERANCE = {"64-true": 1e-10, "32-true": 1e-3}
"""Relative. A step multiplies a rounding error several times, as small variances early in training do: after six
steps single and double precision themselves differ by 1e-4."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The results of the worker on 1, 2 and 4 ranks, one after another: the machine may have two cores."""
    folder = tmp_path_factory.mktemp("runs")
    return {ranks: result_of_worker(WORKER, ranks, folder) for ranks in (1, 2, 4)}


@pytest.mark.parametrize("precision", ["64-true", "32-true"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_training_run_does_not_depend_on_the_number_of_ranks(runs, ranks, precision):
    alone, together = runs[1][precision], runs[ranks][precision]
    assert len(alone["losses"]) == 6
    assert together["losses"] == pytest.approx(alone["losses"], rel=LOSS_TOLERANCE[precision])
    tolerance = STATE_TOLERANCE[precision]
    for name in ("parameters", "running_statistics"):
        assert together[name] == pytest.approx(alone[name], rel=tolerance, abs=tolerance), name
    # Counted and averaged in single precision by torchmetrics, but over the same samples.
    assert together["validation"] == pytest.approx(alone["validation"], rel=1e-4)


def test_precision_makes_the_difference_it_should(runs):
    double, single = (runs[1][precision]["losses"] for precision in ("64-true", "32-true"))
    assert single == pytest.approx(double, rel=1e-3) and single != double
