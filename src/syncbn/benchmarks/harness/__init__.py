"""The tools of the benchmarks.

`measure` verifies and then times in turns, `report` and `plot` publish, `world` and `cable` run ranks, also on hosts
apart. `peers` are the synchronised BatchNorms of others; `messages` and `live_tensors` count bytes.
"""
