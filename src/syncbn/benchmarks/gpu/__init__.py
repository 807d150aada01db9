"""``syncbn benchmark --section gpu``: every figure that needs a GPU, beside its target and its prediction.

`command` runs the parts: one layer (`layer`), the max pools (`pool`), a training step (`step`). `timing` is the GPU's
clock, `targets` what each part is to reach.
"""
