"""The tools of the benchmarks: timing in turns, reports, plots, ranks on hosts apart, and the peers they measure."""
