"""``syncbn benchmark --section gpu``: every figure that needs a GPU, beside its target and its prediction."""
