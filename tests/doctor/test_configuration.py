"""What the words of a fit come to."""

from torch import nn

from syncbn.doctor.configuration import checkpoint_bytes


def test_a_checkpoint_holds_weights_momenta_and_their_average():
    assert checkpoint_bytes(nn.Linear(9, 10)) == 3 * 4 * 100
