"""Threads of our own that outlive whoever has them started; and where all threads are."""

import gc
import sys
from collections.abc import Callable
from contextvars import Context
from types import FrameType
from typing import ParamSpec, TypeVar

__all__ = ["current_frames", "pools_of_parents", "without_context"]

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


def current_frames() -> dict[int, FrameType]:
    """The innermost frame of each thread, by its ident."""
    if sys.version_info >= (3, 12) or not gc.isenabled():
        return sys._current_frames()
    # Before 3.11.9 a collection in the midst of it can stop the whole process (CPython 106883): a
    # destructor lets another thread go on, and that one holds the GIL while it waits for the lock
    # of the list of threads.
    try:
        gc.disable()
        return sys._current_frames()
    finally:
        gc.enable()
