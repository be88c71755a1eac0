"""How callers wait for an execution, and how they are woken.

**Waiters.** A follower that has something to sleep on is in `Execution.waiters`. Three kinds: a
thread's `Sleeper`; a coroutine's plain `asyncio.Future` (the lightest thing a loop can wake); and
whatever derives from `Waiter`, such as the future that `do_future` returned. All are woken by
`wake_all`, which may run on any thread, and each wake-up may come twice without harm, so that it
can be repeated when a signal handler has interrupted it.
"""

import asyncio
from _thread import start_new_thread
from collections.abc import Callable, Iterator
from contextvars import Context
from threading import get_ident
from typing import Any, Final, cast

from ._core import End, Execution, Run, Seat, late
from ._lock import Bell

__all__ = [
    "TAKE_OVER",
    "Inbox",
    "LoopRun",
    "Sleeper",
    "Waiter",
    "future_makers",
    "loop_of",
    "offer",
    "wake_all",
    "watch_loop",
]

# -- sleeping and waking --------------------------------------------------------------------------

#: What a coroutine's future is told if its caller is to lead.
TAKE_OVER: Final = object()


class Waiter:
    """A follower with its own way of being woken. Its methods may be called on any thread."""

    __slots__ = ()

    def cancelled(self) -> bool:
        """Whether it was cancelled, as `asyncio.Future.cancelled`; it may not have left yet."""
        return False

    def wake(self, execution: Execution) -> None:
        """`execution` has ended. May be called twice."""
        raise NotImplementedError

    def take_over(self, execution: Execution) -> bool:
        """The waiter leads `execution` from now on. False if it can not."""
        raise NotImplementedError


class Sleeper(Bell, Waiter):
    """A thread that waits for one execution or more. Whoever has news appends it, and rings."""

    __slots__ = ("leads", "news", "thread")

    def __init__(self) -> None:
        Bell.__init__(self)
        self.thread = get_ident()
        #: The seat of what its thread leads at the moment, or is about to: it hears no news before
        #: that has ended. Written by the thread.
        self.leads: Seat | None = None
        #: What has happened: the executions, and whether they are now led by this thread.
        self.news: list[tuple[Execution, bool]] = []

    def wake(self, execution: Execution) -> None:
        self.news.append((execution, False))
        self.ring()

    def take_over(self, execution: Execution) -> bool:
        self.news.append((execution, True))
        self.ring()
        return True


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


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: Any) -> bool:
    """Calls back in `loop`, later. False if it is closed."""
    here = asyncio._get_running_loop() is loop
    try:
        (loop.call_soon if here else loop.call_soon_threadsafe)(callback, *args)
    except RuntimeError:
        return False
    return True


def _call_in(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: Any) -> bool:
    """Calls back in `loop`: at once if this is its thread. False if the loop is closed."""
    if asyncio._get_running_loop() is loop:
        callback(*args)
        return True
    return _call_soon(loop, callback, *args)


def wake_all(execution: Execution) -> None:
    """Wakes all who wait for an execution that has ended; one call in each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[Any]]] = {}
    loop: asyncio.AbstractEventLoop | None = None
    futures: list[asyncio.Future[Any]] = []
    first_error: BaseException | None = None
    failed: list[Waiter] = []
    for waiter, its_loop in (execution.waiters or {}).items():
        if its_loop is not None:
            if its_loop is not loop:
                loop = its_loop
                futures = by_loop.setdefault(its_loop, [])
            futures.append(waiter)
            continue
        try:
            waiter.wake(execution)
        except BaseException as error:  # a callback's of a future, or a signal handler's
            failed.append(waiter)
            if first_error is None:
                first_error = error
    # One tuple for all coroutines; None: each makes its own exception.
    answer = (execution.value, execution.shared) if execution.end is End.VALUE else None
    for loop, futures in by_loop.items():
        _call_soon(loop, _wake_futures, iter(futures), answer)
    # A callback is not called twice, and a signal handler seldom interrupts twice.
    for waiter in failed:
        waiter.wake(execution)
    execution.waiters = {}  # they hold the execution, too
    if first_error is not None:
        raise first_error


def _wake_futures(
    futures: "Iterator[asyncio.Future[Any]]", answer: tuple[Any, bool] | None
) -> None:
    """Wakes coroutines, in a callback of their loop: what waits for a future is called here.

    A future's own way is one callback in the loop for each who waits, which costs more than all
    else about a follower.
    """
    for future in futures:
        if future.done():  # its caller was cancelled, or it is told twice
            continue
        # asyncio's own name for those who wait, each with its context: here the caller's task.
        waiting = getattr(future, "_callbacks", None)
        if waiting is None or len(waiting) != 1:
            future.set_result(answer)
            continue
        ((callback, context),) = waiting
        future.remove_done_callback(callback)
        future.set_result(answer)
        try:
            context.run(callback, future)
        except BaseException:  # KeyboardInterrupt, which a task lets through: see asyncio.Handle
            future.get_loop().call_soon(_wake_futures, futures, answer)
            raise


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
        "left",
        "loop",
        "paused",
        "pending",
        "result",
        "task",
        "thread",
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
        #: The outcome for the leader's own caller: value and whether it was shared, or an error.
        self.done = False
        self.result: tuple[Any, bool] | None = None
        self.error: BaseException | None = None
        #: That caller has left: nobody takes it. It is set before `done` is read, and `done` before
        #: this, for a coroutine may be closed on any thread.
        self.left = False
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
        if self.left:
            self._drop()
        self.task = None  # its context holds this run
        bell = self.bell
        if bell is not None and not bell.done():
            # Not contextlib.suppress: it runs Python of its own, for each leader that suspends.
            try:
                bell.set_result(None)
            except RuntimeError:  # the loop is closed: nobody is to be woken
                pass

    def leave(self) -> None:
        """The leader's own caller goes."""
        self.left = True
        if self.done:
            self._drop()

    def _drop(self) -> None:
        """Contexts that outlive the task may hold this run: it keeps nothing for them."""
        self.result = self.error = None

    def outcome(self) -> tuple[Any, bool]:
        """The outcome for the leader's own caller: the original exception, not a replica."""
        result, self.result = self.result, None
        error, self.error = self.error, None
        if error is None:
            return cast("tuple[Any, bool]", result)
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


#: What makes a future of each loop in whose present run a coroutine has waited, by the loop's id.
#: Taken out when the loop's root task has ended, if that is known; when it is closed; and dropped.
future_makers: "dict[int, Callable[[], asyncio.Future[Any]]]" = {}

#: The ids of the loops that have a canary.
_watched: set[int] = set()


def watch_loop(
    loop: asyncio.AbstractEventLoop, closed: Callable[[], None]
) -> "Callable[[], asyncio.Future[Any]]":
    """Has `closed` called, once and on a thread of its own, when `loop` is closed or dropped.

    A loop that is closed under its tasks tells nobody. But it drops what was scheduled; so a timer
    that never fires holds the one reference to an object whose end is the news. On a thread of its
    own, because an object's end can come at any point of any thread, under a lock as well.

    Returns:
        What makes a future of the running loop, if that is `loop`.
    """
    maker = future_makers.get(id(loop))
    if maker is None:
        # The class finds the running loop by itself, in less time than the loop's method takes.
        plain = type(loop).create_future is asyncio.BaseEventLoop.create_future
        maker = future_makers[id(loop)] = asyncio.Future if plain else _make_future
        if id(loop) not in _watched:
            _watched.add(id(loop))
            _Canary(id(loop), closed).sit(loop)
    return maker


def _make_future() -> "asyncio.Future[Any]":
    return asyncio.get_running_loop().create_future()


class _Canary:
    __slots__ = ("_closed", "_loop_id")

    def __init__(self, loop_id: int, closed: Callable[[], None]) -> None:
        self._loop_id = loop_id
        self._closed = closed

    def sit(self, loop: asyncio.AbstractEventLoop) -> None:
        # A day is the longest that asyncio's selectors sleep in any case. In no caller's context,
        # which the timer would keep.
        loop.call_later(86_400.0, self.sit, loop, context=Context())

    def __del__(self) -> None:
        _watched.discard(self._loop_id)
        future_makers.pop(self._loop_id, None)
        try:
            start_new_thread(self._closed, ())
        except RuntimeError:  # there are too many, or the interpreter is going down
            late.append((self._closed, ()))
