"""Who waits for whom: a wait that would never end is found when it begins.

Before a caller waits, `begin_wait` enters an edge "this thread, or this task, waits for these
executions", and looks whether a chain of edges leads back to the caller: an execution needs whoever
runs its function, and that one needs what it waits for. Leaders enter nothing. The search is that
of CPython's import locks (`importlib._bootstrap._ModuleLock.has_deadlock`), with tasks added:

- The task of a run needs the tasks that it awaits, directly or by what asyncio has for that
  (`gather`, `TaskGroup`, `wait`, `wait_for`, `shield`), and what they wait for. Who awaits a future
  is read from the future's callbacks, upwards, from the task that waits to that of the run.
- It needs the thread of its event loop, too: who blocks that thread is on the chain.
- A function on a thread may run an event loop of its own, as by `asyncio.run`. It needs the root
  task of that loop as a run needs its task.

Whatever a run's function starts inherits its context. So `current_run` tells all other coroutines
that no chain can lead back to them and that there is nothing to look for; and a run's own waits are
entered in the run. A thread that leads writes down nothing of the kind. So the first wait in each
run of a loop looks what its thread leads by then, below the loop; what `roots` has for the loop
stands for the run that those coroutines are in.

**Waits of children.** A child may begin to wait for a key long before its parent awaits it. Then
that await closes the cycle, and it is asyncio's own, which tells nobody. So as long as children of
a run wait, the run's `Watch` looks at them again: in the next round of the loop, a millisecond
later, and then at intervals that double up to a second. It looks at all of them together, for a
small part of the time at the most, and its one timer goes when no child waits any more.
"""

import asyncio
import os
import sys
import types
from asyncio import current_task
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextvars import Context, ContextVar
from functools import partial
from threading import get_ident
from time import thread_time
from typing import Any, NamedTuple, TypeAlias, cast

from ._core import (
    Core,
    Execution,
    Run,
    Seat,
    Shard,
    all_flights,
    compiled,
    public_key,
)
from ._lock import SteadyLock
from ._threads import current_frames
from ._waiting import LoopRun, Sleeper, future_makers, loop_of
from .exceptions import DeadlockError, shown

__all__ = [
    "begin_loop",
    "begin_run",
    "begin_wait",
    "check_wait",
    "closes_cycle",
    "current_run",
    "end_await",
    "end_closed_loops",
    "end_wait",
    "held_up",
    "leading_code",
    "pause",
    "roots",
]

#: The innermost run in whose function this code runs, or whose function has started it.
current_run: ContextVar[LoopRun | None] = ContextVar("shardedflight.current_run", default=None)


class Root(LoopRun):
    """What functions that run on this thread await by running an event loop: its root task."""

    __slots__ = ("seats",)

    def __init__(self, loop: asyncio.AbstractEventLoop, task: Any, seats: dict[int, Seat]) -> None:
        super().__init__(loop)
        self.task = task
        #: What the thread has led when the loop began, by the seats' ids.
        self.seats = seats

    def end(self, _task: object = None) -> None:
        """The root task has ended: what runs the loop next is another one."""
        self.task = None
        roots.pop(id(self.loop), None)
        future_makers.pop(id(self.loop), None)


#: By the ids of the loops: those that run below a leader's function. Coroutines of others, that are
#: in no run, nobody needs. Usually there is none.
roots: dict[int, Root] = {}

#: The functions that run a loop's root task, and the local variable that has it. The second is for
#: loops of C, whose own functions have no frames.
_ROOT_IN: dict[types.CodeType, str] = {
    asyncio.BaseEventLoop.run_until_complete.__code__: "future",
    asyncio.Runner.run.__code__: "task",
}

#: The functions of ours below which a leader's function runs on its caller's stack. Each has the
#: local variables `seat`, `shard` and `h`, or `items` that have them. Compiled ones have no frame.
leading_code: set[types.CodeType] = set() if compiled else {Core.do.__code__}

#: Held while somebody enters an edge and looks, so that of a cycle exactly one caller finds it.
_lock = SteadyLock()

#: What each blocked thread waits for, by its ident. In several dicts: free-threaded, a dict has a
#: lock, for which all the threads that an execution has just woken would queue.
_blocked: tuple[dict[int, Sequence[Any]], ...] = tuple({} for _ in range(61))
#: The event loops that such threads were running, by the same.
_held_up: dict[int, asyncio.AbstractEventLoop] = {}


@types.coroutine
def pause() -> Generator[None, None, None]:
    """Suspends a run's coroutine that has been begun before its task: see `_start` in `_flight`."""
    yield


def closes_cycle(executions: Iterable[Any]) -> bool:
    """Whether one of these may need the coroutine that is to await them: `begin_wait` will tell.

    It runs inside of a run's function, or on an event loop that a function runs on this thread.
    """
    if _run_here(asyncio.get_running_loop()) is not None:
        return True
    thread = get_ident()
    return any(_thread_of(execution.leader) == thread for execution in executions)


def begin_run(run: LoopRun) -> None:
    """The first thing that the task of `run` does, in its own context."""
    if run.task is None:  # the first step runs before its maker has the task
        run.task = current_task(run.loop)
    current_run.set(run)


def begin_loop(loop: asyncio.AbstractEventLoop) -> None:
    """A coroutine is about to wait, the first in this run of `loop`, on its thread."""
    task = _root_task()
    if task is None:
        return
    thread = get_ident()
    root = Root(
        loop,
        task,
        {
            id(seat): seat
            for flight in all_flights()
            for shard, _, seat in flight._executions()
            if _thread_of(shard.leader(seat)) == thread
        },
    )
    if root.seats:
        roots[id(loop)] = root
    # Also if there are none: the next run of the loop may be below a leader's function.
    task.add_done_callback(root.end, context=Context())


def _root_task() -> "asyncio.Future[Any] | None":
    """What the loop that runs on this thread runs until it is done, if it is known."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        name = _ROOT_IN.get(frame.f_code)
        if name is not None:
            return cast("asyncio.Future[Any] | None", frame.f_locals.get(name))
        frame = frame.f_back
    return None


def end_closed_loops() -> None:
    """An event loop was closed: if its root task has not ended, it never will."""
    for root in list(roots.copy().values()):
        if root.loop.is_closed():
            root.end()


def _run_here(loop: asyncio.AbstractEventLoop) -> LoopRun | None:
    """The run that this coroutine of `loop` is in."""
    run = current_run.get()
    if roots and (run is None or run.loop is not loop):
        run = roots.get(id(loop), run)
    return run


def begin_wait(
    shard: Shard,
    executions: Sequence[Any],
    future: "asyncio.Future[Any] | None" = None,
    leave: Callable[[], bool] = lambda: True,
) -> None:
    """From now on this thread waits for `executions`, or this task by awaiting `future`.

    Args:
        shard: Where a deadlock is counted.
        executions: What is waited for; all of them. Records, or what has `leader`, `seat` and `key`
            as they have.
        future: What the task awaits, until `end_await`. None: the thread blocks, until `end_wait`.
        leave: Has the caller leave before it is told of a deadlock. False: it can not, for it has
            been counted as served meanwhile or is to lead. Then its wait has an end.

    Raises:
        DeadlockError: They wait for this thread or task, directly or not. Nothing is entered then.
    """
    while True:
        cycle = _enter(shard, executions, future, leave)
        if cycle is None:
            return
        if leave():
            break
    shard.count_deadlock()
    try:
        raise _error(cycle)
    finally:
        # The error's traceback holds this frame, and these hold the error or may.
        del executions, leave


def _enter(
    shard: Shard,
    executions: Sequence[Any],
    future: "asyncio.Future[Any] | None",
    leave: Callable[[], bool],
) -> "Cycle | None":
    """Enters the wait and looks. What it returns is a deadlock: then nothing is entered."""
    try:
        left_to_watch = False
        if future is None:
            task = None
            me = get_ident()
            loop = asyncio._get_running_loop()
            if loop is not None:
                _held_up[me] = loop
            blocked = _blocked_with(me)
            outer = blocked.get(me)
            blocked[me] = executions if outer is None else _Nested(executions, outer)
            blocked.pop(0, None)  # writes take the dict's lock: see _core on fences
            # Whoever closes a cycle later sees the entry: now only a leader that waits can, or one
            # that is to take over on an event loop.
            if len(executions) == 1:
                leader = executions[0].leader
                if loop_of(leader) is None:
                    thread = _thread_of(leader)
                    if thread != me and _waited_for(thread) is None and not _roots_of(thread):
                        return None
        else:
            task = current_task()
        with _lock:
            run = None if future is None else _run_here(future.get_loop())
            if run is not None and run.task is not None:
                if run.watch is None:
                    run.watch = Watch()
                left_to_watch = run.watch.enter(run, future, task, executions, shard, leave)
            cycle = None if left_to_watch else _find_cycle(executions, task, run, set())
            if cycle is not None:
                _end(executions, future)  # or who looks next would find the same cycle
        return cycle
    except BaseException:
        _end(executions, future)
        raise


def _end(executions: Sequence[Any], future: "asyncio.Future[Any] | None") -> None:
    if future is None:
        end_wait(executions)
    else:
        end_await(future)


#: A task that waits, for what, where a deadlock is counted, and how the task leaves.
_Wait: TypeAlias = tuple[Any, Sequence[Any], Shard, Callable[[], bool]]


class Watch:
    """The waits inside of a run, and when those of its children are looked at again.

    Changed under the module's lock, or on the thread of the run's loop.
    """

    __slots__ = ("_cost", "_handle", "_pause", "_soon", "waits")

    def __init__(self) -> None:
        #: By the futures that are awaited.
        self.waits: dict[Any, _Wait] = {}
        #: The next look, while there is one to come.
        self._handle: asyncio.Handle | None = None
        #: It comes as soon as it may. Otherwise it comes `_pause` seconds after the last one.
        self._soon = False
        self._pause = 0.0
        #: How many seconds of its thread's time the last look took.
        self._cost = 0.0

    def enter(
        self,
        run: LoopRun,
        future: Any,
        task: Any,
        executions: Sequence[Any],
        shard: Shard,
        leave: Callable[[], bool],
    ) -> bool:
        """`task`, which is in the context of `run`, begins to wait by awaiting `future`.

        Returns:
            Whether it need not be looked at now: it will be soon, together with others.
        """
        self.waits[future] = (task, executions, shard, leave)
        if not self._watched(run, future, task):
            return False
        if self._soon:
            return True
        # In this order, for a signal handler may raise in between.
        later = self._handle
        self._call(run, self._cost / _SHARE if self._cost > _SHORT else 0.0)
        self._soon = True
        self._pause = _FIRST_PAUSE
        if later is not None:
            later.cancel()
        return False

    def leave(self, run: LoopRun, future: Any) -> None:
        """Ends what `enter` began."""
        entered = self.waits.pop(future, None)
        if entered is not None and not self.waits and future.get_loop() is run.loop:
            self.stop()

    def stop(self) -> None:
        """Does not look again until another child begins to wait."""
        handle, self._handle = self._handle, None
        self._soon = False
        if handle is not None:
            handle.cancel()

    def _watched(self, run: LoopRun, future: Any, task: Any) -> bool:
        # What runs on another loop can not be awaited by the run's task.
        return task is not run.task and future.get_loop() is run.loop

    def _call(self, run: LoopRun, delay: float) -> None:
        if delay:
            self._handle = run.loop.call_later(delay, self.look, run)
        else:
            self._handle = run.loop.call_soon(self.look, run)

    def look(self, run: LoopRun) -> None:
        """Tells the children whose waits are in a cycle by now, by what they await."""
        begun = thread_time()  # what others take of the machine meanwhile is none of its cost
        self._handle = None
        self._soon = False
        #: What is to be told, with what `waits` had of it.
        refused: dict[Any, tuple[_Wait, Cycle]] = {}
        again = True
        try:
            again = self._find(run, refused)
            while refused:
                future, (wait, cycle) = next(iter(refused.items()))
                _, _, shard, leave = wait
                if not leave():  # see begin_wait
                    self.waits[future] = wait
                elif not future.done():  # to leave may have cancelled it, with its run
                    shard.count_deadlock()
                    future.set_exception(_error(cycle))
                    future.exception()  # its task may be cancelled first: nobody need complain
                del refused[future]
        finally:
            # Also if a signal handler has raised.
            for future, (wait, _) in refused.items():
                self.waits[future] = wait
            if again:
                self._cost = thread_time() - begun
                self._call(run, max(self._pause, self._cost / _SHARE))
                self._pause = min(2 * self._pause, _LAST_PAUSE)

    def _find(self, run: LoopRun, refused: "dict[Any, tuple[_Wait, Cycle]]") -> bool:
        """Takes the waits that are in a cycle out, into `refused`. False: there is none at all."""
        with _lock:
            waits = [
                (future, wait)
                for future, wait in self.waits.copy().items()
                if self._watched(run, future, wait[0]) and not future.done()
            ]
            if run.task is None or not waits:
                return False
            # First those that hold up the run: what is harmless to them is so to the others.
            waits.sort(key=lambda entry: not _awaits(run, entry[1][0]))
            harmless: set[Any] = set()
            for future, wait in waits:
                task, executions, *_ = wait
                cycle = _find_cycle(executions, task, run, harmless)
                if cycle is not None:
                    refused[future] = wait, cycle
                    del self.waits[future]  # or others would see it in a cycle, too
        return True


#: Seconds between looks.
_FIRST_PAUSE, _LAST_PAUSE = 0.001, 1.0
#: The part of the time that a run's looks may take, if one takes longer than so many seconds.
_SHARE, _SHORT = 0.05, 0.0001


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
    task = None if blocking else current_task()
    with _lock:
        run = None if task is None else _run_here(task.get_loop())
        cycle = _find_cycle(executions, task, run, set(), first)
    if cycle is not None:
        shard.count_deadlock()
        try:
            raise _error(cycle)
        finally:
            del executions, first, run, task  # see begin_wait


def _find_cycle(
    executions: Sequence[Execution],
    task: "asyncio.Task[Any] | None",
    run: LoopRun | None,
    harmless: set[Any],
    first: Sequence[Execution] = (),
) -> "Cycle | None":
    path = _path_back(executions, task, run, harmless, first)
    while path:
        # Nobody begins to wait meanwhile, but somebody may cease to: a real cycle is still there.
        again = _path_back(executions, task, run, harmless, first)
        if again == path:
            return _cycle(path, task, [execution.seat for execution in first])
        path = again
    return None


class _Nested(list[Any]):
    """What a thread waits for in a signal handler, or a destructor, amid another wait of its own.

    That is both, the inner wait first.
    """

    __slots__ = ("inner", "outer")

    def __init__(self, inner: Sequence[Any], outer: Sequence[Any]) -> None:
        super().__init__((*inner, *outer))
        self.inner = inner
        self.outer = outer


def end_wait(executions: Sequence[Any]) -> None:
    """This thread waits no more for these very objects. To do it twice is to do it once."""
    me = get_ident()
    blocked = _blocked_with(me)
    entered = blocked.get(me)
    while isinstance(entered, _Nested):
        if entered.inner is executions:
            blocked[me] = entered.outer
            return
        entered = entered.outer
    if entered is executions:
        blocked.pop(me, None)
        if _held_up:
            _held_up.pop(me, None)


def end_await(future: "asyncio.Future[Any]") -> None:
    """This task waits no more by awaiting `future`."""
    run = _run_here(future.get_loop())
    if run is not None and run.watch is not None:
        run.watch.leave(run, future)


def _blocked_with(thread: int) -> dict[int, Sequence[Any]]:
    """The one of `_blocked` in which `thread` is."""
    # Most idents are addresses, at the same place of a page.
    return _blocked[thread // 4096 % len(_blocked)]


def _waited_for(thread: int | None) -> Sequence[Any] | None:
    """What `thread` is blocked for; None if it is not."""
    return None if thread is None else _blocked_with(thread).get(thread)


def held_up(waiter: Any) -> bool:
    """Whether `waiter` can not take over before its thread has done what it does now.

    It runs a function, or it is the thread of its event loop and waits itself. Asked after `waiter`
    was written down as the leader, as a thread asks for the leader after it was written down as
    blocked: so one of the two learns of the other.
    """
    if isinstance(waiter, Sleeper):
        return waiter.leads is not None
    if not _held_up:
        return False
    loop = loop_of(waiter)
    return loop is not None and loop in list(_held_up.values())


def _thread_running(loop: asyncio.AbstractEventLoop) -> int | None:
    """The thread that runs `loop`, if it is blocked."""
    for thread, held in _held_up.copy().items():
        if held is loop:
            return thread
    return None


def _path_back(
    executions: Sequence[Execution],
    task: "asyncio.Task[Any] | None",
    run: LoopRun | None,
    harmless: set[Any],
    first: Iterable[Execution],
) -> list[Execution] | None:
    """The chain from one of `executions` to one that the caller holds up, `first` left aside.

    The caller is this thread, and `task` of `run` if it only awaits. Of what is in `harmless` no
    chain leads to the caller; what is found to be so is added.
    """
    thread = get_ident()
    if len(executions) == 1:  # the usual case, quickly: a leader that waits for nothing
        leader = executions[0].leader
        if loop_of(leader) is None:
            leader = _thread_of(leader)
            if leader != thread and _waited_for(leader) is None and not _roots_of(leader):
                return None
    found: list[Execution] | None = None
    #: Executions, and who needs what whichever of them it is: threads, roots and runs.
    seen: set[Any] = set(first)

    def new(place: Any) -> bool:
        if place in seen or place in harmless:
            return False
        seen.add(place)
        return True

    # Depth first, without recursion: each entry is an execution and the chain before it.
    stack: list[tuple[Execution, tuple[Any, ...]]] = [(e, ()) for e in executions]
    while stack:
        execution, before = stack.pop()
        if not new(execution):
            continue
        chain = (execution, before)
        closes, needed = _look_at(execution, thread, task, run, new)
        if closes:
            if not needed:
                return _unchained(chain)
            found = found or _unchained(chain)
        stack += [(e, chain) for e in needed]
    if found is None:
        harmless |= seen
    return found


def _look_at(
    execution: Execution,
    thread: int,
    task: "asyncio.Task[Any] | None",
    run: LoopRun | None,
    new: Callable[[Any], bool],
) -> tuple[bool, Sequence[Execution]]:
    """Whether the caller holds up `execution`; and what else, that is `new`, is to be looked at."""
    leader = execution.leader
    leading_thread = _thread_of(leader)
    if leading_thread is not None:
        # The caller's: its function is on this stack, maybe below an event loop. If that has the
        # run that the caller is in, on to it: the keys in between are to be named.
        closes = leading_thread == thread
        complete = closes and (run is None or isinstance(run, Root))
        return closes, () if complete else _needed_on(leading_thread, execution, new)
    if isinstance(leader, LoopRun) and not leader.loop.is_closed():
        loop_thread = leader.needed_thread()
        if (task is None and loop_thread == thread) or (leader is run and _awaits(leader, task)):
            return True, ()
        if not new(leader):
            return False, ()
        return False, [*(_waited_for(loop_thread) or ()), *_waits(leader)]
    # It is about to begin, or to be replaced: it waits for nothing but its event loop.
    loop = loop_of(leader)
    blocked = None if loop is None else _thread_running(loop)
    if blocked is None:
        return False, ()
    if task is None and blocked == thread:
        return True, ()
    return False, _waited_for(blocked) or ()


def _needed_on(
    thread: int, execution: Execution, new: Callable[[Any], bool]
) -> Sequence[Execution]:
    """What a function that runs on `thread` waits for, as far as that is `new` to the search."""
    needed = list(_waited_for(thread) or ()) if new(thread) else []
    for root in _roots_of(thread):
        # What the thread leads further in, by calls on the loop, does not wait for the loop.
        if id(execution.seat) in root.seats and new(root):
            needed += _waits(root)
    return needed


def _roots_of(thread: int | None) -> list[Root]:
    """What functions on `thread` await by running event loops; one, if loops are not nested."""
    return [root for root in roots.copy().values() if root.thread == thread] if roots else []


def _thread_of(leader: Any) -> int | None:
    """The thread on whose stack the leader's function runs now; or another that it waits for."""
    if isinstance(leader, int):
        return leader
    if isinstance(leader, Sleeper):
        return None if leader.leads is None else leader.thread
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
    if run.watch is not None:
        for future, (task, executions, *_) in list(run.watch.waits.items()):
            if not future.done() and _awaits(run, task):
                yield from executions


# -- what a task awaits ---------------------------------------------------------------------------


def _awaits(run: LoopRun, task: "asyncio.Task[Any] | None") -> bool:
    """Whether the task of `run` is `task`, or can not go on before `task` has ended."""
    goal = run.task
    if goal is None or task is None:
        return False
    stack: list[Any] = [task]
    seen: set[Any] = set(stack)
    while stack:
        future = stack.pop()
        if future is goal:
            return True
        new = [further for further in _awaiting(future) if further not in seen]
        seen.update(new)
        stack += new
    return False


#: By whom asyncio has a future tell others: in which variable of which callback they are.
_TOLD = {
    "gather.<locals>._done_callback": "outer",
    "shield.<locals>._inner_done_callback": "outer",
    "_wait.<locals>._on_completion": "waiter",
}


def _awaiting(future: "asyncio.Future[Any]") -> "Iterator[asyncio.Future[Any]]":
    """The futures, often tasks, that need `future`. All names are asyncio's own.

    May be asked on any thread: callbacks come and go, and are not changed.
    """
    callbacks: Any = getattr(future, "_callbacks", None) or ()
    for callback, *_ in tuple(callbacks):
        owner: Any = getattr(callback, "__self__", None)
        if getattr(owner, "_fut_waiter", None) is future:  # a task, that will be woken
            yield owner
        elif isinstance(owner, asyncio.TaskGroup):
            needing = getattr(owner, "_on_completed_fut", None)
            if needing is not None:  # the parent has come to the end of the block
                yield needing
        elif isinstance(callback, partial):
            if callback.func is _release_waiter:  # wait_for, before 3.12
                yield callback.args[0]
        elif getattr(callback, "__module__", None) == "asyncio.tasks":
            needing = _told_by(callback)
            if needing is not None:
                yield needing


_release_waiter = getattr(asyncio.tasks, "_release_waiter", None)


def _told_by(callback: Any) -> Any:
    """The future that needs the one with this callback; None if it is not there yet or does not."""
    name = _TOLD.get(callback.__qualname__)
    if name is None:
        return None
    cells = dict(zip(callback.__code__.co_freevars, callback.__closure__, strict=True))
    if "return_when" in cells and cells["return_when"].cell_contents != asyncio.ALL_COMPLETED:
        return None
    return cells[name].cell_contents


# -- naming the cycle -----------------------------------------------------------------------------


class Cycle(NamedTuple):
    """What a `DeadlockError` tells.

    Attributes:
        keys: As the error's.
        stops_loop: It is a blocking call that would stop the event loop of the last of them.
    """

    keys: tuple[Any, ...]
    stops_loop: bool


def _cycle(path: list[Execution], task: "asyncio.Task[Any] | None", first: Sequence[Seat]) -> Cycle:
    if task is None and loop_of(path[-1].leader) is not None:
        return Cycle(tuple(execution.key for execution in path), True)
    in_order: list[Seat] = []
    for execution in (path[-1], *path[:-1]):
        inside = _led_inside(execution)
        # What is led, but will have ended before the wait, has no part in it.
        in_order += [execution.seat, *(s for s in inside if not any(s is f for f in first))]
    in_order.append(path[-1].seat)
    return Cycle(tuple(public_key(seat[0]) for seat in in_order), False)


def _error(cycle: Cycle) -> DeadlockError:
    """Not to be called under a lock: it asks the keys for their `repr`."""
    names = " -> ".join(map(shown, cycle.keys))
    if cycle.stops_loop:
        message = f"waiting for {names} on this thread would stop the event loop that it needs"
    else:
        message = f"these wait for each other: {names}"
    return DeadlockError(message, cycle.keys)


def _led_inside(execution: Execution) -> list[Seat]:
    """What the thread that leads `execution` leads in calls further in, outermost first.

    Nobody keeps that: it would cost every leader.
    """
    leader = execution.leader
    thread = _thread_of(leader)
    if thread is None:
        return []
    led = _led_by(thread)
    for place, seat in enumerate(led):
        if seat is execution.seat:
            return led[place + 1 :]
        if isinstance(leader, Sleeper) and seat is leader.leads:
            return led[place:]
    return []


def _led_by(thread: int) -> list[Seat]:
    """What a thread leads, outermost first; of several led by one function, one."""
    if compiled:
        by_serial: dict[int, Seat] = {}
        for flight in all_flights():
            for shard, _, seat in flight._executions():
                leader = shard.leader(seat)
                if not isinstance(leader, Sleeper) and _thread_of(leader) == thread:
                    by_serial.setdefault(shard.serial(seat), seat)
        return [by_serial[serial] for serial in sorted(by_serial)]
    led: list[Seat] = []
    names: Any
    frame = current_frames().get(thread)
    while frame is not None:
        if frame.f_code in leading_code:
            names = frame.f_locals
            if "items" in names:
                led += [item.seat for item in names["items"][:1]]
            # Not a follower's seat, never linked; nor one whose shard a hash hook still looks for.
            elif names.get("shard") is not None and any(
                seat is names.get("seat") for seat in names["shard"].holders(names["h"])
            ):
                led.append(names["seat"])
            # Before 3.13 it is a copy that the frame keeps, and with it whatever its function has
            # dropped since. A debugger that stands in the frame will write the copy back.
            if isinstance(names, dict) and frame.f_trace is None:
                names.clear()
            del names
        frame = frame.f_back
    return led[::-1]


def _after_fork_in_child() -> None:
    global _lock, _blocked, _held_up
    _lock = SteadyLock()
    # Not cleared: free-threaded, a thread that is gone may hold a dict's own lock.
    _blocked = tuple({} for _ in _blocked)
    _held_up = {}


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
