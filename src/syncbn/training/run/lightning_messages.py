"""Of what Lightning says, what a user has asked for or has to know."""

import logging
import re
import warnings

SAID_AT_EVERY_START = re.compile(
    "|".join(
        (
            r"(\[rank: \d+\] )?Seed set to",
            "Adding .* callbacks from entry point",
            "GPU available",
            "[TH]PU available",
            "💡 Tip",
            "You are using a CUDA device",
            "LOCAL_RANK: ",
            "Using (16bit|bfloat16|16-bit) Automatic Mixed Precision",
            "Initializing distributed",
            "initializing deepspeed distributed",
            "Enabling DeepSpeed",
            "Loading DeepSpeed config",
            r"-+\ndistributed_backend",
            "SLURM auto-requeueing enabled",
            "`weights_only` was not set",
            "Trainer already configured with model summary callbacks",
            "Your model can run with static graph optimizations",
            "Found current_model_state in the checkpoint",
            # Said by syncbn, too, or instead:
            "Restoring states from",
            "Restored all states",
            "Loaded model weights",
            "`Trainer.fit` stopped",
            r"(\[rank: \d+\] )?(Received|Bypassing) SIGTERM",
            "Handling auto-requeue signal",
            r"\n?Detected KeyboardInterrupt",
        )
    )
)
"""How the messages begin that nobody asked for. Reports of profilers, summaries and verbose callbacks are shown."""

WITHOUT_CONCERN = (
    ".*does not have many workers.*",  # said whatever the images cost to prepare
    ".*Grad strides do not match bucket view strides.*",  # of 1x1 convolutions: there they do not matter
    "Found .* in eval mode at the start of training.*",  # of frozen BatchNorm layers: as was asked for
    "The `srun` command is available on your system but is not used.*",  # syncbn doctor says where it is needed
    "Checkpoint directory .* exists and is not empty",  # of a run that is gone on with, or of a second callback
    ".*`isinstance.treespec, LeafSpec.` is deprecated.*",  # Lightning's own business with torch
    r"`ModelCheckpoint\(monitor=.*\)` could not find the monitored key",  # said at the start of the run
    "You're using the WeightAveraging callback, but loading a checkpoint outside the 'fit' stage",  # the average is
    # Of runs before the two keepers had names of their own, which then take their states:
    r"Be aware that when using `ckpt_path`.*callbacks: \[(([\"'])ModelCheckpoint\{[^}]*\}\2(, )?)+\]",
)
"""Warnings that do not apply here."""


class Unasked(logging.Filter):
    """Leaves out what Lightning says at every start."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is shown."""
        is_lightning = record.name.startswith("lightning.") and record.levelno < logging.WARNING
        return not (is_lightning and SAID_AT_EVERY_START.match(record.getMessage()))


def quieten() -> None:
    """Leave out what Lightning says at every start, and warnings that do not apply here."""
    root = ""  # where a program has set it up
    for name in ("lightning.pytorch", "lightning.fabric", "lightning", root):
        logger = logging.getLogger(name)
        if "." in name:
            logger.setLevel(logging.INFO)
        for handler in logger.handlers:
            if not any(isinstance(known, Unasked) for known in handler.filters):
                handler.addFilter(Unasked())
    for message in WITHOUT_CONCERN:
        warnings.filterwarnings("ignore", message)
