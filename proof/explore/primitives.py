"""What threads wait with, and what starts threads, as the scheduler has it.

`install` puts them in the place of the names that the flight's modules use.
"""

import asyncio
import concurrent.futures._base as futures_base
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from types import SimpleNamespace
from typing import Any

import shardedflight._core as core
import shardedflight._deadlock as deadlock
import shardedflight._flight as flight
import shardedflight._lock as lock
import shardedflight._waiting as waiting

from .scheduler import Actor, Scheduler, here, running

__all__ = ["Loop", "Pool", "install", "renew"]


class Lock:
    """In place of `SteadyLock`: a re-entrant lock."""

    def __init__(self) -> None:
        self._owner: Actor | None = None
        self._depth = 0

    def __enter__(self) -> bool:
        scheduler = running()
        me = scheduler.current
        if self._owner is not None and self._owner is not me:
            scheduler.block(lambda: self._owner is None, f"a lock of {self._owner.name}")
        self._owner = me
        self._depth += 1
        return True

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None


class Bell:
    """In place of the plain lock that a `_lock.Bell` is made of."""

    def __init__(self) -> None:
        self.taken = False

    def acquire(self, timeout: float = -1) -> bool:
        """As a lock's."""
        if self.taken and not running().block(lambda: not self.taken, "news", timeout >= 0):
            return False
        self.taken = True
        return True

    def locked(self) -> bool:
        """As a lock's."""
        return self.taken

    def release(self) -> None:
        """As a lock's."""
        if not self.taken:
            raise RuntimeError("release unlocked lock")
        self.taken = False


class Condition:
    """In place of a future's `threading.Condition`. Whoever is inside is not stopped there."""

    def __init__(self, _: object = None) -> None:
        self._rounds = 0

    def __enter__(self) -> bool:
        return True

    def __exit__(self, *_: object) -> None:
        pass

    def wait(self, timeout: float | None = None) -> bool:
        """As a condition's."""
        rounds = self._rounds
        return running().block(lambda: self._rounds != rounds, "a future", timeout is not None)

    def notify_all(self) -> None:
        """As a condition's."""
        self._rounds += 1


class Pool(Executor):
    """An executor with a thread for each function."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """As an executor's."""
        future: Future[Any] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        running().start(work, "pool")
        return future


class Loop(asyncio.BaseEventLoop):
    """An event loop that blocks in the scheduler and whose time is virtual.

    Its callbacks are not stopped by the scheduler but at steps inside of the flight.
    """

    def __init__(self) -> None:
        super().__init__()
        self._woken = False
        self._selector = SimpleNamespace(select=self._select)
        running().clocks.append(self._next_time)

    def time(self) -> float:
        """The time of the run."""
        return running().now

    def _next_time(self) -> float | None:
        times: list[Any] = [] if self.is_closed() else list(vars(self)["_scheduled"])
        # A timer of a day is none: see `watch_loop`.
        return min((t.when() for t in times if t.when() < self.time() + 3600), default=None)

    def _select(self, timeout: float | None) -> list[Any]:
        if timeout != 0:
            end = None if timeout is None else self.time() + timeout

            def ready() -> bool:
                return self._woken or (end is not None and self.time() >= end)

            running().block(ready, "events of its loop")
        self._woken = False
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        self._woken = True


def _start_new_thread(function: Callable[..., Any], args: tuple[Any, ...]) -> int:
    scheduler = here.scheduler
    if scheduler is not None and scheduler.current is not None:
        scheduler.start(lambda: function(*args), function.__name__)
    return 0


def install() -> None:
    """Has the flight's modules use these primitives for as long as this process lives."""
    futures_threading = SimpleNamespace(**{**vars(threading), "Condition": Condition})
    for module, name, value in (
        (core, "SteadyLock", Lock),
        (core, "start_new_thread", _start_new_thread),
        (flight, "start_new_thread", _start_new_thread),
        (lock, "allocate_lock", Bell),
        (waiting, "start_new_thread", _start_new_thread),
        (deadlock, "thread_time", lambda: 0.0),
        (futures_base, "threading", futures_threading),
    ):
        assert hasattr(module, name), f"{module.__name__} has no {name} any more"
        setattr(module, name, value)


def renew(scheduler: Scheduler) -> None:
    """The state of the flight's modules, new for the run of `scheduler`."""
    here.scheduler = scheduler
    core._making = Lock()  # type: ignore[assignment]
    flight._pool_lock = Lock()  # type: ignore[assignment]
    flight._observers_lock = Lock()  # type: ignore[assignment]
    deadlock._lock = Lock()  # type: ignore[assignment]
    for blocked in deadlock._blocked:
        blocked.clear()
    deadlock.roots.clear()
    core.late.clear()
    core._flights.clear()  # of flights that only the garbage collector can free
