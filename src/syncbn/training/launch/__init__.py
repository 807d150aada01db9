"""Processes and signals: who started the ranks, how they meet again and how they stop.

`launchers` knows torchrun, srun and DeepSpeed's, `attempts` forms the process group of a restart, `processes` are the
ranks that rank 0 started itself, and `stopping` notes signals.
"""
