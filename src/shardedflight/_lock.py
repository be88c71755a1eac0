"""The lock of everything that is decided in more than one step."""

from _thread import RLock
from typing import Any, cast

__all__ = ["SteadyLock"]


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
