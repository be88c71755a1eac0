"""Who waits for whom: a wait that would never end is found when it begins.

Before a caller waits, `begin_wait` enters an edge "this thread, or this task, waits for these
executions", and looks whether a chain of edges leads back to the caller: an execution needs whoever
runs its function, and that one needs what it waits for. Leaders enter nothing. The search is that
of CPython's import locks (`importlib._bootstrap._ModuleLock.has_deadlock`), with tasks added:

- The task of a run needs the tasks that it awaits, directly or by what asyncio has for that
  (`gather`, `TaskGroup`, `wait`, `wait_for`, `shield`), and what they wait for.
- It needs the thread of its event loop, too: who blocks that thread is on the chain.

Whatever a run's function starts inherits its context. So `current_run` tells all other coroutines
that no chain can lead back to them and that there is nothing to look for; and a run's own waits are
entered in the run.
"""

import asyncio
import os
import sys
import types
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextvars import ContextVar
from threading import get_ident
from typing import Any

from ._core import (
    Core,
    Execution,
    Run,
    Seat,
    Shard,
    all_flights,
    compiled,
    gil_enabled,
    public_key,
)
from ._lock import SteadyLock
from ._waiting import LoopRun
from .exceptions import DeadlockError

__all__ = [
    "begin_run",
    "begin_wait",
    "check_wait",
    "current_run",
    "end_wait",
    "leading_code",
    "pause",
]

#: The innermost run in whose function this code runs, or whose function has started it.
current_run: ContextVar[LoopRun | None] = ContextVar("shardedflight.current_run", default=None)

#: The functions of ours below which a leader's function runs on its caller's stack. Each has the
#: local variables `seat`, `shard` and `h`, or `items` that have them. Compiled ones have no frame.
leading_code: set[types.CodeType] = set() if compiled else {Core.do.__code__}

#: Held while somebody enters an edge and looks, so that of a cycle exactly one caller finds it.
_lock = SteadyLock()
#: What a blocked thread waits for, by its ident.
_blocked: dict[int | None, Sequence[Any]] = {}


@types.coroutine
def pause() -> Generator[None, None, None]:
    """Suspends a run's coroutine that has been begun before its task: see `_start` in `_flight`."""
    yield


def begin_run(run: LoopRun) -> None:
    """The first thing that the task of `run` does, in its own context."""
    if run.task is None:  # the first step runs before its maker has the task
        run.task = asyncio.current_task(run.loop)
    current_run.set(run)


def begin_wait(
    shard: Shard, executions: Sequence[Any], future: "asyncio.Future[Any] | None" = None
) -> None:
    """From now on this thread waits for `executions`, or this task by awaiting `future`.

    Args:
        shard: Where a deadlock is counted.
        executions: What is waited for; all of them. Records, or what has `leader`, `seat` and `key`
            as they have.
        future: What the task awaits. None: the thread blocks.

    Raises:
        DeadlockError: They wait for this thread or task, directly or not. Nothing is entered then.
    """
    try:
        if future is None:
            task = None
            me = get_ident()
            _blocked[me] = executions
            _blocked.pop(None, None)  # writes take the dict's lock: see _core on fences
            # Whoever closes a cycle later sees the entry: now only a leader that waits can.
            if len(executions) == 1:
                leader = executions[0].leader
                if not isinstance(leader, LoopRun):
                    thread = _thread_of(leader)
                    if thread != me and thread not in _blocked:
                        return
        else:
            task = asyncio.current_task()
        with _lock:
            if future is not None:
                run = current_run.get()
                if run is not None:
                    if run.waits is None:
                        run.waits = {}
                    run.waits[future] = (task, executions)
                    # A child may begin to wait before its parent begins to await it.
                    future.get_loop().call_soon(_look_again, shard, executions, future, task)
            error = _find_cycle(executions, task, ())
        if error is not None:
            shard.count_deadlock()
            try:
                raise error
            finally:
                # The error's traceback holds this frame, and all of these hold the error or may.
                leader = run = None
                del error, executions, task
    except BaseException:
        end_wait(future)
        raise


def _look_again(
    shard: Shard,
    executions: Sequence[Execution],
    future: "asyncio.Future[Any]",
    task: "asyncio.Task[Any] | None",
) -> None:
    """One round of the loop after `task` began to wait: it is told by the future."""
    if future.done():
        return
    with _lock:
        error = _find_cycle(executions, task, ())
    if error is not None:
        shard.count_deadlock()
        future.set_exception(error)
        future.exception()  # who awaits it may be cancelled first: asyncio need not complain


def check_wait(
    shard: Shard, executions: Sequence[Execution], first: Sequence[Execution], blocking: bool
) -> None:
    """Raises what `begin_wait` would raise, were the caller to wait when it has ended `first`.

    Args:
        shard: Where a deadlock is counted.
        executions: What the caller will wait for.
        first: What the caller leads, and will have ended before.
        blocking: Whether the thread will block, or the task will await.
    """
    task = None if blocking else asyncio.current_task()
    with _lock:
        error = _find_cycle(executions, task, first)
    if error is not None:
        shard.count_deadlock()
        try:
            raise error
        finally:
            del error, executions, first, task  # see begin_wait


def _find_cycle(
    executions: Sequence[Execution], task: "asyncio.Task[Any] | None", first: Sequence[Execution]
) -> DeadlockError | None:
    path = _path_back(executions, task, first)
    # Nobody begins to wait meanwhile, but somebody may cease to: a real cycle is still there.
    if path and path == _path_back(executions, task, first):
        return _error(path, task, [execution.seat for execution in first])
    return None


def end_wait(future: "asyncio.Future[Any] | None" = None) -> None:
    """Ends what `begin_wait` began."""
    if future is None:
        _blocked.pop(get_ident(), None)
    else:
        run = current_run.get()
        if run is not None and run.waits is not None:
            run.waits.pop(future, None)


def _path_back(
    executions: Sequence[Execution],
    task: "asyncio.Task[Any] | None",
    first: Iterable[Execution],
) -> list[Execution] | None:
    """The chain from one of `executions` to one that the caller holds up, `first` left aside.

    The caller is this thread, and `task` if it only awaits.
    """
    thread = get_ident()
    if len(executions) == 1:  # the usual case, quickly: a leader that waits for nothing
        leader = executions[0].leader
        if not isinstance(leader, LoopRun):
            leader = _thread_of(leader)
            if leader != thread and leader not in _blocked:
                return None
    own_run = current_run.get() if task is not None else None
    seen = set(first)
    # Depth first, without recursion: each entry is an execution and the chain before it.
    stack: list[tuple[Execution, tuple[Any, ...]]] = [(e, ()) for e in executions]
    while stack:
        execution, before = stack.pop()
        if execution in seen:
            continue
        seen.add(execution)
        chain = (execution, before)
        leader = execution.leader
        leading_thread = _thread_of(leader)
        if leading_thread is not None:
            if leading_thread == thread:  # its function is on this stack, maybe below an event loop
                return _unchained(chain)
            needed = _blocked.get(leading_thread, ())
        elif isinstance(leader, LoopRun) and not leader.loop.is_closed():
            loop_thread = leader.needed_thread()
            if task is None and loop_thread == thread:
                return _unchained(chain)
            if leader is own_run and _awaits(leader, task):
                return _unchained(chain)
            needed = [*_blocked.get(loop_thread, ()), *_waits(leader)]
        else:
            continue  # it is about to begin, or to be replaced: it waits for nothing
        stack += [(e, chain) for e in needed]
    return None


def _thread_of(leader: Any) -> int | None:
    """The thread on whose stack the leader's function runs now."""
    if isinstance(leader, int):
        return leader
    if isinstance(leader, Run) and not isinstance(leader, LoopRun):
        thread: int | None = getattr(leader, "thread", None)  # that of a future's run
        return thread
    return None


def _unchained(chain: tuple[Any, ...]) -> list[Execution]:
    path: list[Execution] = []
    while chain:
        execution, chain = chain
        path.append(execution)
    return path[::-1]


def _waits(run: LoopRun) -> Iterator[Execution]:
    """What the task of `run` waits for, itself or by a task that it awaits."""
    waits = list((run.waits or {}).values())
    if not waits:
        return
    needed = _needed(run)
    for task, executions in waits:
        if task in needed if needed is not None else _awaits(run, task):
            yield from executions


# -- what a task awaits ---------------------------------------------------------------------------


def _awaits(run: LoopRun, task: "asyncio.Future[Any] | None") -> bool:
    """Whether the task of `run` is `task`, or can not go on before `task` has ended."""
    if run.task is None or task is None:
        return False
    needed = _needed(run)
    if needed is not None:
        return task in needed
    # Since 3.14 asyncio itself keeps who awaits a future, and may be asked on any thread.
    return run.task in _reachable(task, _awaiters)


def _needed(run: LoopRun) -> set[Any] | None:
    """The task of `run` and all that it awaits. None if that can not be looked into from here."""
    if run.task is None:
        return set()
    # A coroutine's frames may only be read where they can not go meanwhile.
    if asyncio._get_running_loop() is run.loop or gil_enabled():
        return _reachable(run.task, _awaited_by_task)
    return None


def _reachable(start: Any, further: Callable[[Any], Iterable[Any]]) -> set[Any]:
    seen = {start}
    stack = [start]
    while stack:
        new = [future for future in further(stack.pop()) if future not in seen]
        seen.update(new)
        stack += new
    return seen


def _awaiters(future: "asyncio.Future[Any]") -> Iterable[Any]:
    return getattr(future, "_asyncio_awaited_by", None) or ()


def _awaited_by_task(future: "asyncio.Future[Any]") -> "Iterator[asyncio.Future[Any]]":
    """The futures that `future`, often a task, needs. These are asyncio's own names for them."""
    awaited = getattr(future, "_fut_waiter", None)
    if awaited is not None:
        yield awaited
        if isinstance(future, asyncio.Task):
            yield from _awaited_in_coroutine(future.get_coro())
    yield from tuple(getattr(future, "_children", ()))  # of what gather returns
    for callback, *_ in getattr(future, "_callbacks", None) or ():
        code = getattr(callback, "__code__", None)
        if code is not None and code.co_qualname.startswith("shield.<locals>"):
            cells = dict(zip(code.co_freevars, callback.__closure__, strict=True))
            if "inner" in cells:
                yield cells["inner"].cell_contents


_WAITING_CODE = frozenset(
    function.__code__ for function in (asyncio.TaskGroup.__aexit__, asyncio.wait, asyncio.wait_for)
)


def _awaited_in_coroutine(coroutine: Any) -> "Iterator[asyncio.Future[Any]]":
    """The tasks for which asyncio's functions wait by awaiting a future of their own."""
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None)
        if frame is not None and frame.f_code in _WAITING_CODE:
            names = frame.f_locals
            if frame.f_code is asyncio.TaskGroup.__aexit__.__code__:
                yield from tuple(names["self"]._tasks)  # another thread may change it
            elif frame.f_code is asyncio.wait.__code__:
                if names["return_when"] == asyncio.ALL_COMPLETED:
                    yield from tuple(names["fs"])
            elif isinstance(names.get("fut"), asyncio.Future):  # wait_for, before 3.12
                yield names["fut"]
        coroutine = getattr(coroutine, "cr_await", None)


# -- naming the cycle -----------------------------------------------------------------------------


def _error(
    path: list[Execution], task: "asyncio.Task[Any] | None", first: Sequence[Seat]
) -> DeadlockError:
    if task is None and isinstance(path[-1].leader, LoopRun):
        keys = tuple(execution.key for execution in path)
        names = " -> ".join(map(repr, keys))
        return DeadlockError(
            f"waiting for {names} on this thread would stop the event loop that it needs", keys
        )
    in_order: list[Seat] = []
    for execution in (path[-1], *path[:-1]):
        inside = _led_inside(execution)
        # What is led, but will have ended before the wait, has no part in it.
        in_order += [execution.seat, *(s for s in inside if not any(s is f for f in first))]
    in_order.append(path[-1].seat)
    keys = tuple(public_key(seat[0]) for seat in in_order)
    return DeadlockError("these wait for each other: " + " -> ".join(map(repr, keys)), keys)


def _led_inside(execution: Execution) -> list[Seat]:
    """What the thread that leads `execution` leads in calls further in, outermost first.

    Nobody keeps that: it would cost every leader.
    """
    thread = _thread_of(execution.leader)
    if thread is None:
        return []
    led = _led_by(thread)
    for place, seat in enumerate(led):
        if seat is execution.seat:
            return led[place + 1 :]
    return []


def _led_by(thread: int) -> list[Seat]:
    """What a thread leads, outermost first; of several led by one function, one."""
    if compiled:
        by_serial: dict[int, Seat] = {}
        for flight in all_flights():
            for shard, _, seat in flight._executions():
                if _thread_of(shard.leader(seat)) == thread:
                    by_serial.setdefault(shard.serial(seat), seat)
        return [by_serial[serial] for serial in sorted(by_serial)]
    led: list[Seat] = []
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code in leading_code:
            names = frame.f_locals
            if "items" in names:
                led += [item.seat for item in names["items"][:1]]
            # Not the seat of a follower, which was never linked. `do` that only passes on has none.
            elif "seat" in names and any(
                seat is names["seat"] for seat in names["shard"].holders(names["h"])
            ):
                led.append(names["seat"])
        frame = frame.f_back
    return led[::-1]


def _after_fork_in_child() -> None:
    global _lock
    _lock = SteadyLock()
    _blocked.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
