"""What every strategy must do as DDP does."""

from pathlib import Path

import pytest
import torch

from ranks import run_ranks
from shard_cases import make_shards
from training.sharded_runs import SAVED_AFTER, STEPS, TIMEOUT, Case, Outcome, checkpoint_of, train_on_rank

LOSS_TOLERANCE = 1e-5  # relative
TOLERANCE = 1e-4  # of weights, statistics and momentum: gradients are added up in another order


def run_cases(folder: Path, cases: list[Case], seconds: float = 850) -> dict[Case, Outcome]:
    """Train them all on two ranks; of the one validation image rank 1 has none."""
    make_shards(folder / "shards", val=(1,))
    found = run_ranks(train_on_rank, 2, cases, folder, timeout=seconds, group_timeout=TIMEOUT)[0]
    return {
        case: Outcome(losses, {name: torch.from_numpy(value) for name, value in weights.items()}, *rest)
        for case, (losses, weights, *rest) in found.items()
    }


def check_same(found: Outcome, expected: Outcome, first: int = 0) -> None:
    """The same losses, weights, statistics and validation from a step on."""
    assert len(found.losses) == STEPS - first
    assert found.losses == pytest.approx(expected.losses[first:], rel=LOSS_TOLERANCE)
    assert found.weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        torch.testing.assert_close(found.weights[name], value, rtol=TOLERANCE, atol=TOLERANCE, msg=name)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-4)


def check_gone_on_with(resumed: Outcome, undisturbed: Outcome) -> None:
    """Under one strategy: the same bits."""
    assert resumed.losses == undisturbed.losses[SAVED_AFTER:]
    assert resumed.metrics == undisturbed.metrics
    assert resumed.weights.keys() == undisturbed.weights.keys()
    assert all(torch.equal(resumed.weights[name], value) for name, value in undisturbed.weights.items())


def check_bfloat16(found: Outcome, full: Outcome, of_weights: torch.dtype) -> None:
    """Operations in bfloat16, statistics and what is saved in float32, and a loss near that of float32."""
    assert found.dtypes == (of_weights, torch.float32)
    assert {value.dtype for value in found.weights.values()} == {torch.float32, torch.int64}
    assert found.losses == pytest.approx(full.losses, rel=0.1) and found.losses != full.losses


def check_file(folder: Path, strategy: str) -> None:
    """The checkpoint is the one file that DDP writes, key by key, and holds the same."""
    own, ddp = (
        torch.load(checkpoint_of(folder, name, "32-true"), weights_only=True, map_location="cpu")
        for name in (strategy, "ddp")
    )
    assert own["global_step"] == SAVED_AFTER
    assert own["state_dict"].keys() == ddp["state_dict"].keys()
    for name, value in ddp["state_dict"].items():
        torch.testing.assert_close(own["state_dict"][name], value, rtol=TOLERANCE, atol=TOLERANCE, msg=name)
    [own_state], [ddp_state] = own["optimizer_states"], ddp["optimizer_states"]
    for found, expected in zip(own_state["param_groups"], ddp_state["param_groups"], strict=True):
        assert found.keys() >= expected.keys()
        assert {key: found[key] for key in expected} == expected
    assert own_state["state"].keys() == ddp_state["state"].keys()
    for place, values in ddp_state["state"].items():
        found = own_state["state"][place]["momentum_buffer"]
        torch.testing.assert_close(found, values["momentum_buffer"], rtol=TOLERANCE, atol=TOLERANCE)
