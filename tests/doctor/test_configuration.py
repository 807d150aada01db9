"""What the words of a fit come to."""

import pytest
from torch import nn

from syncbn.doctor.configuration import FitConfiguration, checkpoint_bytes


def test_a_checkpoint_holds_weights_momenta_and_their_average():
    assert checkpoint_bytes(nn.Linear(9, 10)) == 3 * 4 * 100


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonargparse, about LightningCLI
def test_the_world_is_known_without_the_data(tmp_path):
    plan = FitConfiguration(
        ["--config", "configs/fashion_mnist.yaml", "--data", str(tmp_path / "missing"), "--trainer.devices", "1"]
    )
    assert "no data at" in str(plan.error) and plan.data is None and plan.model is None
    found = plan.configuration(reads_data=True)
    assert (found.devices, found.world_size, found.image_bytes) == (1, 1, None)
