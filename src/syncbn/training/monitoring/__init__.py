"""What watches a run while it trains: callbacks, each of which may be left out.

Speed (`throughput`, `step_clock`), ranks that hang (`watchdog`), NaN and infinity (`finite`), images left out
(`left_out`), and the distributions of layers' inputs (`covariate_shift`).
"""
