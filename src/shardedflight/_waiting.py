"""How callers wait for an execution, how they are woken, and who waits for whom.

**Waiters.** A follower that has something to sleep on is in `Execution.waiters`. Three kinds: a
thread's `Sleeper`; a coroutine's plain `asyncio.Future` (the lightest thing a loop can wake); and
whatever derives from `Waiter`, such as the future that `do_future` returned. All are woken by
`wake_all`, which may run on any thread, and each wake-up may come twice without harm, so that it
can be repeated when a signal handler has interrupted it.

**Who waits for whom.** Before a caller waits, `begin_wait` enters an edge "this thread (or task) waits
for these executions" and looks whether a chain of such edges leads back to itself: each execution
leads to whoever runs it, and that one to what it waits for. Leaders register nothing. The search is
CPython's for import locks (`importlib._bootstrap._ModuleLock.has_deadlock`), with tasks added:

- a task needs what it awaits, be it directly, by `gather` or in a `TaskGroup`,
- and the thread of its event loop, so a thread that blocks on a loop's work is on the chain, too.

A coroutine can only close a cycle from inside a function that a flight runs, and whatever such a
function starts inherits its context: so `inside_a_run` tells all others that there is nothing to
check.
"""

import asyncio
import contextlib
import os
import threading
from _thread import allocate_lock, start_new_thread
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from threading import get_ident
from typing import Any

from ._core import Execution, Run, Shard
from .exceptions import DeadlockError

__all__ = [
    "Inbox",
    "LoopRun",
    "Sleeper",
    "Waiter",
    "begin_wait",
    "end_wait",
    "inside_a_run",
    "loop_of",
    "offer",
    "wake_all",
    "watch_loop",
    "watched_loops",
]

inside_a_run: ContextVar[bool] = ContextVar("shardedflight.inside_a_run", default=False)


# -- sleeping and waking --------------------------------------------------------------------------


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
    elsewhere: dict[asyncio.AbstractEventLoop, list[asyncio.Future[bool]]] = {}
    for waiter in execution.waiters or ():
        if isinstance(waiter, Waiter):
            waiter.wake(execution)
        else:
            loop = waiter.get_loop()
            if loop is here:
                if not waiter.done():
                    waiter.set_result(False)
            else:
                elsewhere.setdefault(loop, []).append(waiter)
    for loop, futures in elsewhere.items():
        _call_in(loop, _wake_futures, futures)


def _wake_futures(futures: "list[asyncio.Future[bool]]") -> None:
    for future in futures:
        if not future.done():
            future.set_result(False)


def offer(execution: Execution, heir: Any, refused: Callable[[], None]) -> bool:
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


def _promote(future: "asyncio.Future[bool]") -> bool:
    if not future.done():
        future.set_result(True)
    return not future.cancelled()


def _promote_or(future: "asyncio.Future[bool]", refused: Callable[[], None]) -> None:
    if not _promote(future):
        refused()


# -- runs on an event loop ------------------------------------------------------------------------


class LoopRun(Run):
    """A function's awaitable in a task that the flight owns.

    All fields are written on the loop's thread.
    """

    __slots__ = ("bell", "done", "error", "loop", "pending", "shared", "task", "thread", "value")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.thread = get_ident()
        self.task: asyncio.Task[None] | None = None
        #: What the leader's own caller sleeps on; made only if the task suspends.
        self.bell: asyncio.Future[None] | None = None
        #: The outcome, for the leader's own caller.
        self.done = False
        self.value: Any = None
        self.shared = False
        self.error: BaseException | None = None
        #: Of a run for many keys: the executions that somebody still wants.
        self.pending: set[Execution] | None = None

    def finish(self) -> None:
        """The task is through; the outcome is set."""
        self.done = True
        bell = self.bell
        if bell is not None and not bell.done():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is to be woken
                bell.set_result(None)

    def outcome(self) -> tuple[Any, bool]:
        """The outcome for the leader's own caller: the original exception, not a replica."""
        error = self.error
        if error is None:
            return self.value, self.shared
        self.error = None
        try:
            raise error
        finally:
            del error

    def abandon(self, execution: Execution) -> None:
        if self.pending is not None:
            self.pending.discard(execution)
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


# -- who waits for whom ---------------------------------------------------------------------------

_graph_lock = threading.Lock()
#: What a blocked thread waits for, by its ident; what a task inside a run waits for, by the future
#: that it awaits. Entered under the lock, and taken out without.
_blocked: dict[int, Sequence[Execution]] = {}
_awaited: "dict[asyncio.Future[Any], Sequence[Execution]]" = {}


def begin_wait(
    shard: Shard, executions: Sequence[Execution], future: "asyncio.Future[Any] | None" = None
) -> None:
    """From now on this thread waits for `executions`, or this task by awaiting `future`.

    Args:
        shard: Where a deadlock is counted.
        executions: What is waited for; all of them.
        future: What the task awaits. None: the thread blocks.

    Raises:
        DeadlockError: They wait for this thread or task, directly or not. Nothing is entered then.
    """
    with _graph_lock:
        if future is None:
            me: Any = get_ident()
            _blocked[me] = executions
        else:
            me = asyncio.current_task()
            _awaited[future] = executions
        path = _path_back(executions, me)
        # Nobody begins to wait meanwhile, but somebody may cease to: a real cycle is still there.
        if not path or path != _path_back(executions, me):
            return
        error = _deadlock(path, me)
    end_wait(future)
    with shard.lock:
        shard.deadlocks += 1
    raise error


def end_wait(future: "asyncio.Future[Any] | None" = None) -> None:
    """Ends what `begin_wait` began."""
    if future is None:
        _blocked.pop(get_ident(), None)
    else:
        _awaited.pop(future, None)


def _deadlock(path: list[Execution], me: Any) -> DeadlockError:
    keys: tuple[Hashable, ...] = tuple(execution.key for execution in path)
    leader = path[-1].leader
    if isinstance(me, int) and isinstance(leader, LoopRun):
        names = " -> ".join(map(repr, keys))
        return DeadlockError(
            f"waiting for {names} on this thread would stop the event loop that it needs", keys
        )
    keys = (keys[-1], *keys)
    return DeadlockError("these wait for each other: " + " -> ".join(map(repr, keys)), keys)


def _path_back(executions: Iterable[Execution], me: Any) -> list[Execution] | None:
    """The chain from one of `executions` to one that `me`, a thread's ident or a task, holds up."""
    seen: set[Execution] = set()
    here = asyncio._get_running_loop()
    # Depth first, without recursion: each entry is an execution and the chain before it.
    stack: list[tuple[Execution, tuple[Any, ...]]] = [(e, ()) for e in executions]
    while stack:
        execution, before = stack.pop()
        if execution in seen:
            continue
        seen.add(execution)
        chain = (execution, before)
        leader = execution.leader
        thread = task = None
        if isinstance(leader, LoopRun):
            thread, task = leader.thread, leader.task
        elif isinstance(leader, Sleeper):
            thread = leader.thread
        elif isinstance(leader, int):
            thread = leader
        if me == thread and isinstance(me, int):
            return _unchained(chain)
        further = list(_blocked.get(thread, ())) if thread is not None else []
        for needed in _needs(task, here) if task is not None else ():
            if needed is me:
                return _unchained(chain)
            further += _awaited.get(needed, ())
        stack += [(e, chain) for e in further]
    return None


def _unchained(chain: tuple[Any, ...]) -> list[Execution]:
    path: list[Execution] = []
    while chain:
        execution, chain = chain
        path.append(execution)
    return path[::-1]


def _needs(
    task: "asyncio.Future[Any]", here: asyncio.AbstractEventLoop | None
) -> "Iterator[asyncio.Future[Any]]":
    """`task` and the futures and tasks that it awaits, and they in turn."""
    seen: set[asyncio.Future[Any]] = set()
    stack: list[asyncio.Future[Any]] = [task]
    while stack:
        future = stack.pop()
        if future in seen or future.done():
            continue
        seen.add(future)
        yield future
        awaited = getattr(future, "_fut_waiter", None)  # of a task: asyncio's own name for it
        if awaited is not None:
            stack.append(awaited)
            # A coroutine may only be looked into on the thread that runs it.
            if isinstance(future, asyncio.Task) and future.get_loop() is here:
                stack += _children_of_group(future)
        stack += getattr(future, "_children", ())  # of what gather returns


def _children_of_group(task: "asyncio.Task[Any]") -> "Iterable[asyncio.Task[Any]]":
    """The tasks for which `task` waits at the end of `async with TaskGroup()`."""
    coroutine: Any = task.get_coro()
    frame = None
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", frame)
        coroutine = getattr(coroutine, "cr_await", None)
    group = frame.f_locals.get("self") if frame is not None else None
    if isinstance(group, asyncio.TaskGroup):
        return tuple(group._tasks)  # type: ignore[attr-defined]
    return ()


def _after_fork_in_child() -> None:
    global _graph_lock
    _graph_lock = threading.Lock()
    _blocked.clear()
    _awaited.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
