"""What a config that names the DDP strategy by its class passes on: jsonargparse fills in every option of DDP."""

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch.strategies import Strategy

from syncbn.training import SynchronisedDDPStrategy
from syncbn.training.strategies.ddp import BUFFER_OPTION

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # jsonargparse has a new name for instantiate_classes


def options_of(*words):
    """Of `DistributedDataParallel`, as the strategy built from these words passes them on."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--strategy", type=Strategy)
    words = ["--strategy", "syncbn.training.SynchronisedDDPStrategy", *words]
    return parser.instantiate_classes(parser.parse_args(words)).strategy._ddp_kwargs


def test_named_in_a_config_it_broadcasts_no_buffers():
    options = options_of("--strategy.timeout_seconds", "30")
    assert options[BUFFER_OPTION] is False
    assert options["gradient_as_bucket_view"] is True
    given = SynchronisedDDPStrategy()._ddp_kwargs
    assert {name: options[name] for name in given} == given


@pytest.mark.parametrize("name", ["broadcast_buffers", BUFFER_OPTION])
def test_who_wants_the_broadcast_gets_it(name):
    options = options_of(f"--strategy.{name}", "true", "--strategy.gradient_as_bucket_view", "false")
    assert options[BUFFER_OPTION] is True
    assert options["gradient_as_bucket_view"] is False
    assert SynchronisedDDPStrategy(**{name: True})._ddp_kwargs[BUFFER_OPTION] is True
