"""Other projects' networks, where they are installed or the environment variable SYNCBN_TEST_PEERS names their folder.

``pip install --no-deps --target FOLDER timm torchvision ...`` makes one. It is not for PYTHONPATH: torchvision's
operators are compiled for one build of torch, and beside another its import fails, in torchmetrics too, as torch knows
none of them. To declare two of them, without a body, is enough for all that is no operator: models, losses, blocks.
"""

import importlib
import os
import sys
from types import ModuleType

import pytest
import torch

FOLDER = os.environ.get("SYNCBN_TEST_PEERS", "")
_declared: list[torch.library.Library] = []


def import_peer(name: str) -> ModuleType:
    """The package; or the test is skipped, with the reason."""
    before = list(sys.path)
    sys.path += [FOLDER] if FOLDER else []
    try:
        _import_torchvision()
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} does not import ({error}): SYNCBN_TEST_PEERS may name a folder that has it")
    finally:
        sys.path[:] = before


def _import_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)  # which undoes its declarations when it goes
