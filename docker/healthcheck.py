"""Whether a container of syncbn can work: the package is whole and computes, and the GPUs that were given answer.

The GPUs are asked through NVML, which takes none of their memory. Exits with 1 and one line that says what is wrong.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # else torch.cuda would start CUDA itself

import torch

import syncbn

if find_spec("syncbn.ops._native") is None:
    sys.exit("the CPU's passes were not compiled: see the log of the image's build")

x = torch.randn(8, 4, 3, 3, dtype=torch.float64)
expected = torch.nn.functional.batch_norm(x, None, None, training=True)
difference = (syncbn.SyncBatchNorm(4, dtype=torch.float64)(x) - expected).abs().max().item()
if not difference < 1e-9:  # nor NaN
    sys.exit(f"syncbn.SyncBatchNorm differs from torch's batch_norm by {difference}")

given = len(list(Path("/dev").glob("nvidia[0-9]*")))
if given and os.environ.get("CUDA_VISIBLE_DEVICES") != "" and torch.cuda.device_count() == 0:
    sys.exit(f"{given} GPUs were given to the container and none answers: see nvidia-smi on the host")
