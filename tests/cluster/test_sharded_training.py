"""What tests/training leaves out: other precisions, and going on under another strategy."""

import pytest
import torch

from training.sharded_checks import check_bfloat16, check_file, check_gone_on_with, check_same, run_cases
from training.sharded_runs import SAVED_AFTER, Case

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
pytest.importorskip("deepspeed", reason="needs the extra syncbn[deepspeed]")

CASES = [
    Case("ddp"),
    *(Case(name) for name in ("zero0", "zero1", "zero2", "zero3", "fsdp2")),
    *(Case(name, resumed_from=name) for name in ("zero0", "zero1", "zero2", "fsdp2")),
    Case("ddp", resumed_from="zero3"),
    Case("ddp", resumed_from="fsdp2"),
    Case("zero3", resumed_from="ddp"),
    Case("fsdp2", resumed_from="zero1"),
    *(Case(name, "bf16-mixed") for name in ("zero0", "zero1", "zero2", "zero3", "fsdp2")),
    *(Case(name, "bf16-mixed", resumed_from=name) for name in ("zero0", "zero3", "fsdp2")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("strategies")


@pytest.fixture(scope="module")
def runs(folder):
    return run_cases(folder, CASES, seconds=1700)


@pytest.mark.parametrize("strategy", ["zero0", "zero1"])
def test_it_trains_as_ddp_does(runs, folder, strategy):
    check_same(runs[Case(strategy)], runs[Case("ddp")])
    check_file(folder, strategy)


@pytest.mark.parametrize("case", [case for case in CASES if case.resumed_from], ids=str)
def test_a_checkpoint_is_gone_on_with(runs, case):
    if case.resumed_from == case.strategy:
        check_gone_on_with(runs[case], runs[Case(case.strategy, case.precision)])
    else:
        check_same(runs[case], runs[Case("ddp")], first=SAVED_AFTER)


@pytest.mark.parametrize("strategy", ["zero0", "zero1", "zero2", "zero3", "fsdp2"])
def test_in_bfloat16_the_statistics_stay_wide(runs, strategy):
    of_weights = torch.float32 if strategy == "fsdp2" else torch.bfloat16
    check_bfloat16(runs[Case(strategy, "bf16-mixed")], runs[Case("ddp")], of_weights)
