"""Lightning around the network: the module, its optimiser, callbacks, plugins and strategies.

Names are imported when they are first used: Lightning loads this package for every Trainer (see `plugins`),
and that should cost nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from syncbn.training.batch_arithmetic import BatchArithmetic
    from syncbn.training.class_report import ClassReport
    from syncbn.training.classifier import ImageClassifier
    from syncbn.training.covariate_shift import CovariateShift
    from syncbn.training.curves import CurvesPlot
    from syncbn.training.deepspeed_strategy import SynchronisedDeepSpeedStrategy
    from syncbn.training.evaluation import Ensemble
    from syncbn.training.finite import StopAtNonFinite
    from syncbn.training.fsdp_strategy import SynchronisedFSDP2Strategy
    from syncbn.training.left_out import LeftOutImages
    from syncbn.training.plugins import SyncBatchNormPlugin, SynchroniseBatchNorm
    from syncbn.training.polyak import PolyakAveraging
    from syncbn.training.predictions import PredictionTable
    from syncbn.training.retrieval import RecallAtK
    from syncbn.training.run_summary import RunSummary
    from syncbn.training.runs import RunRecord
    from syncbn.training.strategies import SynchronisedDDPStrategy
    from syncbn.training.throughput import Throughput
    from syncbn.training.unfreezing import GradualUnfreezing

MODULES = {
    "BatchArithmetic": "batch_arithmetic",
    "ClassReport": "class_report",
    "CovariateShift": "covariate_shift",
    "CurvesPlot": "curves",
    "Ensemble": "evaluation",
    "GradualUnfreezing": "unfreezing",
    "ImageClassifier": "classifier",
    "LeftOutImages": "left_out",
    "PolyakAveraging": "polyak",
    "PredictionTable": "predictions",
    "RecallAtK": "retrieval",
    "RunRecord": "runs",
    "RunSummary": "run_summary",
    "StopAtNonFinite": "finite",
    "SyncBatchNormPlugin": "plugins",
    "SynchroniseBatchNorm": "plugins",
    "SynchronisedDDPStrategy": "strategies",
    "SynchronisedDeepSpeedStrategy": "deepspeed_strategy",
    "SynchronisedFSDP2Strategy": "fsdp_strategy",
    "Throughput": "throughput",
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
