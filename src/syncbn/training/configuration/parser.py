"""The parser of ``syncbn fit`` and its sisters: its help has our options first, and Lightning's on request."""

from argparse import Action, _ArgumentGroup, _HelpAction
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from syncbn.options import plain_text, with_suggestion
from syncbn.verbs import VERBS

TITLES = {
    "model": "network and optimiser",
    "data": "data",
    "": "run",
    "checkpoint": "the best checkpoint of the run (null for none)",
    "checkpointing": "checkpoints to resume from (null for none)",
    "watchdog": "what ends a run that hangs (null for nothing)",
    "trainer": "Lightning's Trainer",
}
"""Of each group of options, by the first part of their names, in the order of the help."""

OF_LIGHTNING = "trainer"


class TrainerParser(LightningArgumentParser):
    """Lightning's, with shorter help and suggestions for misspelt names."""

    shows_trainer = False

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """As jsonargparse's, with what was probably meant."""
        super().error(with_suggestion(message, self), ex)

    def describe(self, verb: str) -> None:
        """Say what a verb does and how it is used, rather than list all options twice."""
        [(purpose, example)] = [verbs[verb] for verbs in VERBS.values() if verb in verbs]
        self.usage = f"syncbn {verb} --config CONFIG [--OPTION VALUE ...]"
        self.description = f"{purpose.capitalize()}: {example}"
        self.add_argument(
            "--help.trainer", action=TrainerHelp, help="Show the options of Lightning's Trainer and exit."
        )

    def format_help(self, *arguments: Any) -> str:
        """The help without markup, and with the chosen groups of options in our order."""
        groups: Any = self._action_groups
        by_root: dict[str, list[Any]] = {root: [] for root in TITLES}
        for group in groups:
            by_root.get(root_of(group), []).append(group)
        shown = [root for root in TITLES if (root == OF_LIGHTNING) == self.shows_trainer]
        self._action_groups = [group for root in shown for group in titled(by_root[root], TITLES[root])]
        try:
            return plain_text(super().format_help(*arguments))
        finally:
            self._action_groups = groups


class TrainerHelp(_HelpAction):
    """Prints the help of Lightning's options."""

    def __call__(self, parser: Any, *_: Any) -> None:
        """Print and exit."""
        parser.shows_trainer = True
        parser.print_help()
        parser.exit()


def root_of(group: _ArgumentGroup) -> str:
    """The first part of the names of a group's options; "" where they have one part; "links" for what is no option."""
    actions: list[Action] = [action for action in group._group_actions if action.option_strings]
    if not actions:
        return "links"
    roots = {action.dest.partition(".")[0] for action in actions if "." in action.dest}
    return roots.pop() if len(roots) == 1 else ""


def titled(groups: list[Any], title: str) -> list[Any]:
    """Groups under one title."""
    for place, group in enumerate(groups):
        group.title = title if place == 0 else f"{title}, more"
    return groups
