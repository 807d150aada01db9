"""Lightning around the network. `command` is ``syncbn fit``, `classifier` the module, `evaluation` its accuracies.

By folder: `configuration` (what is asked for), `optimization`, `finetuning`, `strategies`, `launch`, `monitoring`,
`checkpoints` and `run` (the run folder). Names are imported when they are first used: Lightning loads this package for
every Trainer (see `plugins`), and that should cost nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from syncbn.training.batch_arithmetic import BatchArithmetic
    from syncbn.training.classifier import ImageClassifier
    from syncbn.training.evaluation import Ensemble
    from syncbn.training.finetuning.retrieval import RecallAtK
    from syncbn.training.finetuning.unfreezing import GradualUnfreezing
    from syncbn.training.monitoring.covariate_shift import CovariateShift
    from syncbn.training.monitoring.finite import StopAtNonFinite
    from syncbn.training.monitoring.left_out import LeftOutImages
    from syncbn.training.monitoring.throughput import Throughput
    from syncbn.training.optimization.polyak import PolyakAveraging
    from syncbn.training.plugins import SyncBatchNormPlugin, SynchroniseBatchNorm
    from syncbn.training.run.class_report import ClassReport
    from syncbn.training.run.curves import CurvesPlot
    from syncbn.training.run.folder import RunRecord
    from syncbn.training.run.predictions import PredictionTable
    from syncbn.training.run.summary import RunSummary
    from syncbn.training.strategies.ddp import SynchronisedDDPStrategy
    from syncbn.training.strategies.deepspeed import SynchronisedDeepSpeedStrategy
    from syncbn.training.strategies.fsdp import SynchronisedFSDP2Strategy

MODULES = {
    "BatchArithmetic": "batch_arithmetic",
    "ClassReport": "run.class_report",
    "CovariateShift": "monitoring.covariate_shift",
    "CurvesPlot": "run.curves",
    "Ensemble": "evaluation",
    "GradualUnfreezing": "finetuning.unfreezing",
    "ImageClassifier": "classifier",
    "LeftOutImages": "monitoring.left_out",
    "PolyakAveraging": "optimization.polyak",
    "PredictionTable": "run.predictions",
    "RecallAtK": "finetuning.retrieval",
    "RunRecord": "run.folder",
    "RunSummary": "run.summary",
    "StopAtNonFinite": "monitoring.finite",
    "SyncBatchNormPlugin": "plugins",
    "SynchroniseBatchNorm": "plugins",
    "SynchronisedDDPStrategy": "strategies.ddp",
    "SynchronisedDeepSpeedStrategy": "strategies.deepspeed",
    "SynchronisedFSDP2Strategy": "strategies.fsdp",
    "Throughput": "monitoring.throughput",
}

__all__ = [
    "BatchArithmetic",
    "ClassReport",
    "CovariateShift",
    "CurvesPlot",
    "Ensemble",
    "GradualUnfreezing",
    "ImageClassifier",
    "LeftOutImages",
    "PolyakAveraging",
    "PredictionTable",
    "RecallAtK",
    "RunRecord",
    "RunSummary",
    "StopAtNonFinite",
    "SyncBatchNormPlugin",
    "SynchroniseBatchNorm",
    "SynchronisedDDPStrategy",
    "SynchronisedDeepSpeedStrategy",
    "SynchronisedFSDP2Strategy",
    "Throughput",
]


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
