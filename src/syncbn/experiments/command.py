"""The verb ``syncbn paper``: the paper's experiments, run anew."""

from syncbn.experiments.ideas import ideas

COMMANDS = {"ideas": ideas}
