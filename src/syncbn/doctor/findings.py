"""What a check looks at and what it says."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from syncbn.doctor.facts import Facts
from syncbn.doctor.trials import Trials

Verdict = Literal["ok", "warning", "wrong"]


class Finding(NamedTuple):
    """The result of one check.

    Attributes:
        check: What was looked at.
        verdict: Whether training can go on.
        seen: The values.
        remedy: What to do about it.
    """

    check: str
    verdict: Verdict
    seen: str
    remedy: str = ""


class World(NamedTuple):
    """Everything that rank 0 knows.

    Attributes:
        world_size: Processes that were to come.
        facts: Of the ranks that reported, by rank.
        hosts: Of the ranks that came, by rank.
        nodes: Names of the scheduler's nodes; empty where there is no scheduler.
        trials: How ranks fared in the trials, by rank; empty where these were not held.
    """

    world_size: int
    facts: dict[int, Facts]
    hosts: dict[int, str]
    nodes: Sequence[str]
    trials: dict[int, Trials]

    @property
    def by_host(self) -> dict[str, list[Facts]]:
        """The facts of the ranks on each node."""
        hosts: dict[str, list[Facts]] = {}
        for facts in self.facts.values():
            hosts.setdefault(facts.placement.host, []).append(facts)
        return hosts

    def where(self, condition: Callable[[Facts], Any]) -> str:
        """The nodes with a rank of which something holds, in words; "" where there is none."""
        hosts = [host for host, members in self.by_host.items() if any(condition(facts) for facts in members)]
        return listed(hosts)

    def values(self, value: Callable[[Facts], Any], shown: Callable[[Any], str] = str) -> tuple[bool, str]:
        """Whether something is the same on all ranks; and what it is, node by node where it differs."""
        hosts: dict[Any, list[str]] = {}
        for facts in self.facts.values():
            known = hosts.setdefault(value(facts), [])
            if facts.placement.host not in known:
                known.append(facts.placement.host)
        if len(hosts) == 1:
            return True, shown(next(iter(hosts)))
        return False, "; ".join(f"{shown(key)} on {listed(names)}" for key, names in hosts.items())


def listed(names: Sequence[Any], most: int = 8) -> str:
    """Names in a row, the first few of many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def gibibytes(number: float) -> str:
    """A number of bytes in words."""
    return f"{number / 2**30:,.1f} GiB"
