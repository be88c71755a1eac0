"""Threads of our own that outlive whoever has them started."""

from collections.abc import Callable
from contextvars import Context
from typing import ParamSpec, TypeVar

__all__ = ["pools_of_parents", "without_context"]

P = ParamSpec("P")
R = TypeVar("R")

#: Pools of threads, as a forked child has found them; it keeps them for good. An executor that is
#: dropped tells its threads so by a queue. Free-threaded, the queue has a lock of its own, and one
#: of those threads, that are gone, may hold it.
pools_of_parents: list[object] = []


def without_context(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Calls a function that may start threads, in an empty context.

    Free-threaded, a thread inherits the context in which it is started, unless it is told not to
    (`sys.flags.thread_inherit_context`, CPython 3.14): what the first caller had would be there for
    all functions that the thread ever runs, and be kept as long as it lives.
    """
    return Context().run(function, *args, **kwargs)
