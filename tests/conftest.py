"""Shared by all tests: one thread, so that ranks do not fight for cores."""

import torch

torch.set_num_threads(1)
