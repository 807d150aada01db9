"""Batch normalization as a differentiable function.

Three implementations, `fused`, `composed` and `compiled`, and `dispatch`, which chooses among them.
"""
