"""The lock of everything that is decided in more than one step, and what a thread sleeps on.

Both can be used by a signal handler, or by a destructor that the garbage collector calls, in the
midst of their own use by the same thread. Locks, events and conditions of `threading` can not.
"""

import contextlib
import threading
from _thread import RLock, allocate_lock
from collections.abc import Callable, Iterable
from threading import get_ident
from time import monotonic
from typing import Any, cast

__all__ = ["Bell", "ForkHold", "SteadyLock"]


class Bell:
    """Any thread may ring it, for one that waits, or will.

    It is a lock that is held while it is silent.
    """

    __slots__ = ("_silent",)

    def __init__(self) -> None:
        self._silent = allocate_lock()
        self._silent.acquire()

    def ring(self) -> None:
        """Whoever waits goes on. To ring twice before that is to ring once."""
        if self._silent.locked():
            with contextlib.suppress(RuntimeError):  # another one has rung meanwhile
                self._silent.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Returns when it has rung, and silences it; False if `timeout` seconds have passed."""
        if timeout is None:
            return self._silent.acquire()
        return self._silent.acquire(timeout=min(timeout, threading.TIMEOUT_MAX))


# typeshed has RLock final; CPython has not.
class SteadyLock(RLock):  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]
    """A lock that a signal handler's exception can not leave taken.

    CPython 3.14 runs signal handlers between the taking of a lock and the first line of the `with`
    block, and what they raise there would leave it taken for good. An RLock, so that a handler (or
    a destructor) that calls the flight itself does not wait for the thread it has interrupted.

    Never compiled: it is because `__enter__` has a Python frame that the handlers run inside of it.
    """

    def __enter__(self) -> bool:  # type: ignore[override]
        try:
            return self.acquire()
        except BaseException:
            if cast("Any", self)._is_owned():  # as threading.Condition asks
                self.release()
            raise


class ForkHold:
    """Waits before a fork for those who hold locks, and holds them until the parent has forked.

    A thread that is gone in the child would hold them there for good, or have left what they guard
    half changed. To change it takes microseconds; for what takes longer, as under a debugger, a
    fork does not wait.
    """

    #: Seconds that a fork waits for all locks, at the most.
    WAITS = 0.5

    def __init__(self, locks: Callable[[], Iterable[Any]]) -> None:
        self._locks = locks
        #: By the ident of who forks.
        self._held: dict[int, list[Any]] = {}

    def before(self) -> None:
        """In the parent."""
        held = self._held[get_ident()] = []
        deadline = monotonic() + self.WAITS
        for lock in self._locks():
            held.append(lock)  # first: a signal handler may raise after `acquire`
            lock.acquire(timeout=max(0.0, deadline - monotonic()))

    def after_in_parent(self) -> None:
        """Lets them go."""
        for lock in self._held.pop(get_ident(), ()):
            if lock._is_owned():
                lock.release()

    def after_in_child(self) -> None:
        """Whoever made the locks makes new ones."""
        self._held = {}
