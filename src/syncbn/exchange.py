"""Where layers that were pickled whole before `functional` became a folder look for a class."""

from syncbn.functional.memory import Memory

__all__ = ["Memory"]
