"""The verb ``syncbn paper``: the paper's experiments, run anew."""

from syncbn.experiments.ablations import ablations
from syncbn.experiments.figure1 import figure1
from syncbn.experiments.figure2 import figure2
from syncbn.experiments.ideas import ideas
from syncbn.experiments.table4 import table4

COMMANDS = {"ablations": ablations, "figure1": figure1, "figure2": figure2, "ideas": ideas, "table4": table4}
