"""What a run folder holds: its config, logs, curves, tables and summary. Nothing here acts on the training."""
