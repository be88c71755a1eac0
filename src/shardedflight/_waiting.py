"""How callers wait for an execution, and how they are woken.

**Waiters.** A follower that has something to sleep on is in `Execution.waiters`. Three kinds: a
thread's `Sleeper`; a coroutine's plain `asyncio.Future` (the lightest thing a loop can wake); and
whatever derives from `Waiter`, such as the future that `do_future` returned. All are woken by
`wake_all`, which may run on any thread, and each wake-up may come twice without harm, so that it
can be repeated when a signal handler has interrupted it.
"""

import asyncio
import contextlib
import threading
from _thread import allocate_lock, start_new_thread
from collections.abc import Callable
from threading import get_ident
from typing import Any, Final

from ._core import End, Execution, Run

__all__ = [
    "TAKE_OVER",
    "Inbox",
    "LoopRun",
    "Sleeper",
    "Waiter",
    "loop_of",
    "offer",
    "wake_all",
    "watch_loop",
    "watched_loops",
]

# -- sleeping and waking --------------------------------------------------------------------------

#: What a coroutine's future is told if its caller is to lead.
TAKE_OVER: Final = object()


class Waiter:
    """A follower with its own way of being woken. Both methods may be called on any thread."""

    __slots__ = ()

    def wake(self, execution: Execution) -> None:
        """`execution` has ended. May be called twice."""
        raise NotImplementedError

    def take_over(self, execution: Execution) -> bool:
        """The waiter leads `execution` from now on. False if it can not."""
        raise NotImplementedError


class Sleeper(Waiter):
    """A thread that waits for one execution or more.

    The lock is a bell: held while there is no news. Whoever has news appends it and releases.
    """

    __slots__ = ("_bell", "news", "thread")

    def __init__(self) -> None:
        self.thread = get_ident()
        #: What has happened: the executions, and whether they are now led by this thread.
        self.news: list[tuple[Execution, bool]] = []
        self._bell = allocate_lock()
        self._bell.acquire()

    def wake(self, execution: Execution) -> None:
        self.news.append((execution, False))
        self._ring()

    def take_over(self, execution: Execution) -> bool:
        self.news.append((execution, True))
        self._ring()
        return True

    def _ring(self) -> None:
        # Two that ring at once: the second finds the bell free, and its news is read anyway.
        with contextlib.suppress(RuntimeError):
            self._bell.release()

    def sleep(self, timeout: float | None = None) -> bool:
        """Returns when there may be news; False if `timeout` seconds have passed before."""
        if timeout is None:
            return self._bell.acquire()
        return self._bell.acquire(timeout=min(timeout, threading.TIMEOUT_MAX))


class Inbox(Waiter):
    """A coroutine that waits for many executions: `Sleeper` for one loop."""

    __slots__ = ("_bell", "loop", "news")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.news: list[tuple[Any, bool]] = []
        self._bell: asyncio.Future[None] = loop.create_future()

    def wake(self, execution: Any) -> None:
        self.news.append((execution, False))
        _call_in(self.loop, self._ring)

    def take_over(self, execution: Execution) -> bool:
        self.news.append((execution, True))
        return _call_in(self.loop, self._ring)

    def _ring(self) -> None:
        if not self._bell.done():
            self._bell.set_result(None)

    def bell(self) -> "asyncio.Future[None]":
        """What to await for news. On the loop's thread."""
        if self._bell.done() and not self.news:
            self._bell = self.loop.create_future()
        return self._bell


def _call_in(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: Any) -> bool:
    """Calls back in `loop`: at once if this is its thread. False if the loop is closed."""
    if asyncio._get_running_loop() is loop:
        callback(*args)
        return True
    try:
        loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:
        return False
    return True


def wake_all(execution: Execution) -> None:
    """Wakes all who wait for an execution that has ended; one call for each foreign loop."""
    here = asyncio._get_running_loop()
    elsewhere: dict[asyncio.AbstractEventLoop, list[asyncio.Future[Any]]] = {}
    first_error: BaseException | None = None
    failed: list[Any] = []
    # One tuple for all coroutines; None: each makes its own exception.
    answer = (execution.value, execution.shared) if execution.end is End.VALUE else None
    for waiter, loop in (execution.waiters or {}).items():
        try:
            if loop is None:
                waiter.wake(execution)
            elif loop is here:
                waiter.set_result(answer)
            else:
                elsewhere.setdefault(loop, []).append(waiter)
        except asyncio.InvalidStateError:
            pass  # its caller was cancelled, or it is told twice
        except BaseException as error:  # a callback's of a future, or a signal handler's
            failed.append(waiter)
            if first_error is None:
                first_error = error
    for loop, futures in elsewhere.items():
        _call_in(loop, _wake_futures, futures, answer)
    # A callback is not called twice, and a signal handler seldom interrupts twice.
    for waiter in failed:
        if isinstance(waiter, Waiter):
            waiter.wake(execution)
        else:
            _call_in(waiter.get_loop(), _wake_futures, [waiter], answer)
    execution.waiters = {}  # they hold the execution, too
    if first_error is not None:
        raise first_error


def _wake_futures(futures: "list[asyncio.Future[Any]]", answer: tuple[Any, bool] | None) -> None:
    for future in futures:
        if not future.done():
            future.set_result(answer)


def offer(execution: Execution, heir: Any, refused: Callable[[], object]) -> bool:
    """Tells `heir` that it leads `execution` now.

    Args:
        execution: What has lost its leader.
        heir: The waiter that was chosen.
        refused: Called later, on another thread, if the heir turns out to have left.

    Returns:
        False if the heir can not take over.
    """
    if isinstance(heir, Waiter):
        return heir.take_over(execution)
    if asyncio._get_running_loop() is heir.get_loop():
        return _promote(heir)
    return _call_in(heir.get_loop(), _promote_or, heir, refused)


def _promote(future: "asyncio.Future[Any]") -> bool:
    if not future.done():
        future.set_result(TAKE_OVER)
    return not future.cancelled()


def _promote_or(future: "asyncio.Future[Any]", refused: Callable[[], object]) -> None:
    if not _promote(future):
        refused()


# -- runs on an event loop ------------------------------------------------------------------------


class LoopRun(Run):
    """A function's awaitable in a task that the flight owns.

    All fields are written on the loop's thread.
    """

    __slots__ = (
        "bell",
        "done",
        "error",
        "loop",
        "paused",
        "pending",
        "shared",
        "task",
        "thread",
        "value",
        "watch",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.thread = get_ident()
        #: The flight's task; while it runs, and from its first step on.
        self.task: asyncio.Task[None] | None = None
        #: The coroutine has been begun before its task: see `ShardedFlight._start`.
        self.paused = False
        #: What the leader's own caller sleeps on; made only if the task suspends.
        self.bell: asyncio.Future[None] | None = None
        #: The outcome, for the leader's own caller.
        self.done = False
        self.value: Any = None
        self.shared = False
        self.error: BaseException | None = None
        #: Of a run for many keys: the executions that somebody still wants, by their seats' ids.
        self.pending: set[int] | None = None
        #: What the tasks in its context wait for: the `Watch` of `_deadlock`, once there is one.
        self.watch: Any = None

    def needed_thread(self) -> int:
        """The thread that runs the loop, or that has run it and may do so again."""
        # asyncio's own name for it; a loop may be run by one thread after another.
        return getattr(self.loop, "_thread_id", None) or self.thread

    def finish(self) -> None:
        """The task is through; the outcome is set."""
        self.done = True
        self.task = None  # its context holds this run
        bell = self.bell
        if bell is not None and not bell.done():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is to be woken
                bell.set_result(None)

    def outcome(self) -> tuple[Any, bool]:
        """The outcome for the leader's own caller: the original exception, not a replica."""
        # Contexts that outlive the task may hold this run: it keeps nothing for them.
        value, self.value = self.value, None
        error, self.error = self.error, None
        if error is None:
            return value, self.shared
        try:
            raise error
        finally:
            del error

    def stoppable(self) -> bool:
        return True

    def abandon(self, execution: Execution) -> None:
        if self.pending is not None:
            self.pending.discard(id(execution.seat))
            if self.pending:
                return
        _call_in(self.loop, self._cancel)

    def _cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()


def loop_of(leader: Any) -> asyncio.AbstractEventLoop | None:
    """The event loop without which `leader` can not go on."""
    if isinstance(leader, (LoopRun, Inbox)):
        return leader.loop
    if isinstance(leader, asyncio.Future):
        return leader.get_loop()
    return None


#: The ids of the loops that are watched; a loop's id is taken out when it is closed or dropped.
watched_loops: set[int] = set()


def watch_loop(loop: asyncio.AbstractEventLoop, closed: Callable[[], None]) -> None:
    """Has `closed` called, once and on a thread of its own, when `loop` is closed or dropped.

    A loop that is closed under its tasks tells nobody. But it drops what was scheduled; so a timer
    that never fires holds the one reference to an object whose end is the news. On a thread of its
    own, because an object's end can come at any point of any thread, under a lock as well.
    """
    if id(loop) not in watched_loops:
        watched_loops.add(id(loop))
        _Canary(id(loop), closed).sit(loop)


class _Canary:
    __slots__ = ("_closed", "_loop_id")

    def __init__(self, loop_id: int, closed: Callable[[], None]) -> None:
        self._loop_id = loop_id
        self._closed = closed

    def sit(self, loop: asyncio.AbstractEventLoop) -> None:
        # A day is the longest that asyncio's selectors sleep in any case.
        loop.call_later(86_400.0, self.sit, loop)

    def __del__(self) -> None:
        watched_loops.discard(self._loop_id)
        with contextlib.suppress(RuntimeError):  # the interpreter is going down
            start_new_thread(self._closed, ())
