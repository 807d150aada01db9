"""What a run folder holds: its config (`folder`), logs (`logs`), curves, tables and summary.

Nothing here acts on the training. Checkpoints, which also lie in the run folder, are in `checkpoints`.
"""
