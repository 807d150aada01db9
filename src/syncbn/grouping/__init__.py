"""Which BatchNorm layers of a network may share a message, and a forward in which they do.

In the order of the work: `tracing` records the network's graph, `scheduling` orders it, `programs` writes the order as
a function, `network` puts that in the place of the forward, `drawing` shows it.
"""

from syncbn.grouping.network import group_messages

__all__ = ["group_messages"]
