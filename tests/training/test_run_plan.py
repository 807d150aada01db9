"""What a fit will do, known before it begins."""

import math
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint

from syncbn.training.checkpoints.callback import BestCheckpoint
from syncbn.training.configuration.run_plan import (
    RunPlan,
    check_monitors,
    check_names_of_checkpoints,
    reason_of_early_end,
)

LOGGED = ["train_loss", "val_loss", "val_top1"]


def plan(**changes):
    """Ten steps an epoch, three epochs."""
    options = {"steps_of_data": 10, "accumulate": 2, "limit": 1.0, "max_epochs": 3, "max_steps": -1}
    return RunPlan(**options | changes)


def trainer(*callbacks, **attributes):
    return SimpleNamespace(callbacks=callbacks, checkpoint_callbacks=callbacks, limit_val_batches=0, **attributes)


def test_steps_of_an_epoch_and_of_the_run():
    assert (plan().passes, plan().steps_of_epoch, plan().last_step) == (20, 10, 30)
    assert (plan(limit=4).steps_of_epoch, plan(limit=0.5).steps_of_epoch, plan(limit=99).steps_of_epoch) == (2, 5, 10)
    assert plan(max_steps=7).last_step == 7 and plan(max_epochs=-1).last_step == math.inf
    with pytest.raises(ValueError, match=r"limit_train_batches=3 .* after 3 of 20 batches, within a global batch"):
        plan(limit=3)


@pytest.mark.parametrize(
    ("changes", "validates"),
    [
        ({}, True),
        ({"max_steps": 9}, False),
        ({"max_steps": 10}, True),
        ({"max_steps": 5, "validation_interval": 0.5}, True),
        ({"max_steps": 4, "validation_interval": 0.5}, False),
        ({"max_steps": 3, "validation_interval": 6}, True),
        ({"has_validation": False}, False),
        ({"limit": 0}, False),
        ({"every_n_epochs": 4}, False),
        ({"every_n_epochs": 2, "begun_at": 20}, False),
        ({"every_n_epochs": 3, "begun_at": 20}, True),
        ({"every_n_epochs": None, "validation_interval": 50}, True),
        ({"every_n_epochs": None, "validation_interval": 50, "begun_at": 25}, False),
    ],
    ids=str,
)
def test_whether_a_run_validates(changes, validates):
    assert plan(**changes).validates == validates


def test_a_monitor_that_will_not_come_is_named_at_the_start():
    none, stop = plan(has_validation=False), EarlyStopping("val_loss")
    with pytest.raises(ValueError, match=r"^EarlyStopping.monitor=val_loss: .*limit_val_batches=0\).*strict: false"):
        check_monitors(none, trainer(stop), LOGGED)
    lenient, best = EarlyStopping("val_loss", strict=False), BestCheckpoint(monitor="val_top1")
    remarks = check_monitors(none, trainer(lenient, best), LOGGED)
    assert remarks[0].endswith("it does not stop early")
    assert remarks[1].startswith("checkpoint.monitor=val_top1: ") and remarks[1].endswith("no checkpoint is kept by it")
    assert check_monitors(plan(), trainer(stop, best, ModelCheckpoint()), LOGGED) == []


def test_a_monitor_that_nobody_logs_is_refused_unless_a_callback_of_the_users_own_may_log_it():
    keeper = ModelCheckpoint(monitor="my_score")
    with pytest.raises(ValueError, match=r"ModelCheckpoint.monitor=my_score is logged by nobody: there are train_loss"):
        check_monitors(plan(), trainer(keeper), LOGGED)

    class Mine(LearningRateMonitor):
        pass

    assert check_monitors(plan(), trainer(keeper, Mine()), LOGGED) == []
    assert check_monitors(plan(), trainer(ModelCheckpoint(monitor="lr-SGD"), LearningRateMonitor()), LOGGED) == []


@pytest.mark.parametrize(("filename", "refused"), [("last", True), ("{step}", True), ("{epoch}", False), (None, False)])
def test_another_keeper_may_not_write_the_files_of_the_runs_own(filename, refused):
    keeper = trainer(ModelCheckpoint(filename=filename), BestCheckpoint(filename="last"))
    if refused:
        with pytest.raises(ValueError, match="as the run's own checkpoints are called"):
            check_names_of_checkpoints(keeper)
    else:
        check_names_of_checkpoints(keeper)


def test_why_a_run_ended_early():
    stop = EarlyStopping("val_loss")
    stop.stopping_reason_message = "it did not improve"
    assert reason_of_early_end(plan(), trainer(stop, global_step=30)) == ""
    assert reason_of_early_end(plan(), trainer(stop, global_step=9)) == "EarlyStopping: it did not improve"
    assert reason_of_early_end(plan(), trainer(global_step=9)) == "a callback asked for it"
    assert "leaves nothing to train on" in reason_of_early_end(plan(limit=0, max_steps=3), trainer(global_step=0))
    assert reason_of_early_end(plan(begun_at=30), trainer(global_step=30)) == "there was nothing left to train"
