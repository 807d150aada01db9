"""The numbers behind the pictures of the paper's ideas."""

import numpy as np
import pytest
from matplotlib.image import imread

from syncbn.experiments.ideas import (
    descend,
    ideas,
    inputs_as_they_come,
    linear_share,
    mean_variance,
    outputs_of_one_input,
    spectrum_and_variances,
    train_bias,
)


def test_normalised_inputs_make_gradient_descent_converge_at_once():
    conditions, errors = [], []
    for x in inputs_as_they_come().values():
        path, condition = descend(x, x @ np.ones(2))
        conditions.append(condition)
        errors.append(np.abs(path[-1] - 1).max())
    assert conditions[0] > conditions[1] > conditions[2]
    assert conditions[2] == pytest.approx(1, abs=0.1)
    assert errors[0] > errors[1] > 100 * errors[2]


def test_a_gradient_that_ignores_the_mean_moves_a_bias_and_not_the_loss():
    biases, losses = train_bias(through_normalisation=False)
    assert np.diff(biases) == pytest.approx(0.2) and losses == pytest.approx([0.25] * len(losses))
    biases, losses = train_bias(through_normalisation=True)
    assert biases == pytest.approx([0] * len(biases)) and losses == pytest.approx([0.25] * len(losses))


def test_few_images_cannot_tell_many_directions():
    eigenvalues, variances = spectrum_and_variances(C=64, m=32)
    assert (eigenvalues > 1e-10).sum() == 31 and variances.min() > 0.2


def test_gamma_and_beta_leave_the_straight_part_of_a_sigmoid():
    assert linear_share(1, 0) == pytest.approx(0.984, abs=0.003)
    assert linear_share(4, 0) < 0.9 > linear_share(1, 3)


def test_outputs_depend_on_neighbours_in_training_only():
    few, few_inferred = outputs_of_one_input(4, batches=400)
    many, many_inferred = outputs_of_one_input(64, batches=400)
    assert few.std() > 2 * many.std() > 0
    assert few_inferred == pytest.approx(1, abs=0.1) and many_inferred == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("m", [2, 8])
def test_the_variance_of_a_mini_batch_is_too_small_by_what_algorithm_2_makes_up_for(m):
    assert m / (m - 1) * mean_variance(m) == pytest.approx(1, abs=0.02)


def test_pictures_are_drawn(tmp_path):
    ideas(tmp_path)
    for name in ("scaling", "whitening", "gamma_beta", "inference"):
        assert imread(tmp_path / f"{name}.png").std() > 0.05
