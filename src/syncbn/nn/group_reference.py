"""A process group as a module's attribute: deepcopy shares it, pickle carries its ranks."""

from typing import Any

import torch.distributed as dist

from syncbn.collectives import groups


class GroupReference:
    """Holds a process group, which itself can be neither copied nor pickled.

    A pickled reference comes back bound to the group of the same ranks where there is one in the new process; else
    its use says what is missing.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        groups.check_member(group)
        self._group = group
        self._lost_ranks: list[int] | None = None

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group; None for the world."""
        if self._lost_ranks is not None:
            self._group = groups.find_group(self._lost_ranks)
            if self._group is None:
                raise ValueError(
                    f"this layer was pickled with a process group of ranks {self._lost_ranks}, and this process has no "
                    "such group: set layer.process_group"
                )
            self._lost_ranks = None
        return self._group

    def __deepcopy__(self, memo: Any) -> "GroupReference":
        return self

    def __getstate__(self) -> dict[str, Any]:
        ranks = self._lost_ranks or groups.group_ranks(self._group)
        return {"_group": None, "_lost_ranks": ranks}

    def __str__(self) -> str:
        ranks = self._lost_ranks or groups.group_ranks(self._group)
        return "world" if ranks is None else str(ranks)
