"""What ranks need, imported once by the server that forks them, where each would else take seconds of its own.

Frozen, so that neither the garbage collector of a rank nor its search for the names of layers reads, and by their
reference counts copies, all of it.
"""

import gc

import pytest  # noqa: F401
import torch._inductor.compile_fx  # noqa: F401

import syncbn.training.classifier  # noqa: F401

gc.collect()
gc.freeze()
