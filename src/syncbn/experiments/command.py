"""The verb ``syncbn paper``: the paper's experiments, run anew."""

from syncbn.experiments.ablations import ablations
from syncbn.experiments.figure1 import figure1
from syncbn.experiments.ideas import ideas

COMMANDS = {"ablations": ablations, "figure1": figure1, "ideas": ideas}
