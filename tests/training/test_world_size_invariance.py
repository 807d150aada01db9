"""The promise that everything serves: the same training run on any number of ranks."""

from pathlib import Path

import pytest

from training.conftest import result_of_worker

WORKER = Path(__file__).with_name("invariance_worker.py")
TOLERANCE = {"64-true": 1e-10, "32-true": 2e-3}
"""Relative. A step multiplies a rounding error, as small variances early in training do: six steps have made 1e-4 of
single precision. Normalising by the images of one rank alone would change losses by 5e-3 and statistics by 5e-2."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The results of the worker on 1, 2 and 4 ranks, one after another: the machine may have two cores."""
    folder = tmp_path_factory.mktemp("runs")
    return {ranks: result_of_worker(WORKER, ranks, folder) for ranks in (1, 2, 4)}


@pytest.mark.parametrize("precision", ["64-true", "32-true"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_training_run_does_not_depend_on_the_number_of_ranks(runs, ranks, precision):
    alone, together = runs[1][precision], runs[ranks][precision]
    tolerance = TOLERANCE[precision]
    assert len(alone["losses"]) == 6
    assert together["losses"] == pytest.approx(alone["losses"], rel=tolerance)
    for name in ("parameters", "running_statistics"):
        assert together[name] == pytest.approx(alone[name], rel=tolerance, abs=tolerance), name
    assert together["validation"].keys() == alone["validation"].keys()
    for name, value in alone["validation"].items():  # means in single precision, over the same samples
        if precision == "64-true" or name in ("val_images", "val_loss"):  # a class may turn on a rounding
            assert together["validation"][name] == pytest.approx(value, rel=max(tolerance, 1e-6)), name


def test_precision_makes_the_difference_it_should(runs):
    double, single = (runs[1][precision]["losses"] for precision in ("64-true", "32-true"))
    assert single == pytest.approx(double, rel=TOLERANCE["32-true"]) and single != double
