"""The lock of everything that is decided in more than one step, and what a thread sleeps on.

Both can be used by a signal handler, or by a destructor that the garbage collector calls, in the
midst of their own use by the same thread. Locks, events and conditions of `threading` can not.
"""

import contextlib
import threading
from _thread import RLock, allocate_lock
from typing import Any, cast

__all__ = ["Bell", "SteadyLock"]


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
