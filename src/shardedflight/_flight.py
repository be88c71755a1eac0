"""`ShardedFlight`: one call for threads, coroutines and futures, on the state of `_core`."""

import asyncio
import dataclasses
import inspect
import os
import sys
from _thread import start_new_thread
from asyncio import Task, get_running_loop
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from threading import TIMEOUT_MAX
from time import monotonic
from types import CoroutineType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from . import _many
from ._core import (
    Core,
    End,
    Execution,
    OnAbandon,
    Run,
    Seat,
    Shard,
    after_fork_in_child,
    all_flights,
    gil_enabled,
    late,
    leader_here,
    not_awaitable,
    parts_of,
    refuse_coroutine,
    refuse_coroutine_function,
    register,
    settle_late,
)
from ._deadlock import (
    begin_loop,
    begin_run,
    begin_wait,
    closes_cycle,
    current_run,
    end_await,
    end_closed_loops,
    end_wait,
    held_up,
    leading_code,
    pause,
    roots,
)
from ._future import FlightFuture
from ._lock import ForkHold, SteadyLock
from ._observe import (
    Departure,
    Observer,
    Subscription,
    WatchedSeat,
    check_observer,
    departure_from,
)
from ._threads import pools_of_parents, without_context
from ._tier import Absent, CallersOwn, Tier, TierStats
from ._waiting import (
    TAKE_OVER,
    LoopRun,
    Sleeper,
    Waiter,
    future_makers,
    loop_of,
    offer,
    wake_all,
    watch_loop,
)
from .exceptions import BackendError, FlightTimeout, InvalidShardsError, shown

if TYPE_CHECKING:
    from .backends import Backend

__all__ = ["ShardedFlight", "Stats"]

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

#: Shards where threads really run at once, and where the GIL lets one run at a time.
_SHARDS_FREE_THREADED = 2048
_SHARDS_GIL = 1

#: Whether a task can run its coroutine's first step at once.
_EAGER = sys.version_info >= (3, 12)
_Task: Any = Task


@dataclasses.dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot of a flight: running totals and, from `in_flight` on, gauges.

    The figures are read one after another while the flight goes on: each is right, and together
    they are of one moment only if nothing happens meanwhile.

    Attributes:
        executions: Executions started: leaders, and followers that took over.
        shared: Callers served by somebody else's execution.
        errors: Executions that ended with an exception.
        promotions: Followers that took over from a lost leader.
        timeouts: Followers that left after their timeout.
        abandoned: Executions that were given up because their last caller had left.
        forgotten: Executions that `forget` made unjoinable.
        deadlocks: Calls that raised `DeadlockError`.
        in_flight: Executions running now, forgotten ones among them.
        waiting: Followers waiting now.
        per_shard: Executions running now in each shard.
        remote_leads: Executions that this process led for all processes. This and the next ones
            are 0 without a backend.
        remote_follows: Executions, counted above, whose outcome came from another process.
        takeovers: Remote leads that followed a leader that was lost in another process.
        fenced: Remote leads that had lost their place when they ended: their outcomes went to
            this process alone.
        fallbacks: Times that the backend could not be used, so that a function ran, or an outcome
            stayed, in this process alone.
        misses: Outcomes of other processes that could not be read.
    """

    executions: int
    shared: int
    errors: int
    promotions: int
    timeouts: int
    abandoned: int
    forgotten: int
    deadlocks: int
    in_flight: int
    waiting: int
    per_shard: tuple[int, ...]
    remote_leads: int = 0
    remote_follows: int = 0
    takeovers: int = 0
    fenced: int = 0
    fallbacks: int = 0
    misses: int = 0


class ShardedFlight(Core):
    """Runs a function once for all who want the same key at the same time.

    While a function runs for a key, further callers with that key wait and share its outcome. The
    calls of threads (`do`), coroutines (`do_async`) and futures (`do_future`) join each other. One
    object may be used from any number of threads and event loops, at once and one after another.

    Args:
        shards: The number of independent tables, a power of two. By default 1 where the GIL lets
            one thread run at a time, and 2048 on free-threaded builds.
        build_key: Makes a hashable key out of a call's parts. By default one part is its own key,
            and several are a tuple.
        hash: Maps a key to an int whose low bits pick the shard. By default Python's own hash,
            mixed. It does not decide which keys are the same.
        executor: Where `do_future` runs functions. By default a pool of threads, made when first
            needed.
        on_abandon: What happens when the last caller leaves an execution that runs in a task, or
            waits for a place in `executor`: "cancel" makes it unjoinable and cancels it, "finish"
            lets it run to its end.
        backend: Where the executions of several processes are joined: see
            `shardedflight.backends`.
        name: Shown by `repr` and to observers. On one backend, flights of one name meet.

    Raises:
        BackendError: `backend` is none.
        InvalidShardsError: `shards` is not a power of two.
        TypeError: An argument is of the wrong type.
        ValueError: `on_abandon` is neither of its two values.
    """

    def __init__(
        self,
        shards: int | None = None,
        *,
        build_key: Callable[..., Hashable] | None = None,
        hash: Callable[[Any], int] | None = None,
        executor: Executor | None = None,
        on_abandon: OnAbandon = "cancel",
        backend: "Backend | None" = None,
        name: str | None = None,
    ) -> None:
        if shards is None:
            shards = _SHARDS_GIL if gil_enabled() else _SHARDS_FREE_THREADED
        if type(shards) is not int or shards < 1 or shards & (shards - 1):
            raise InvalidShardsError(shards)
        for hook, what in ((build_key, "build_key"), (hash, "hash")):
            if hook is not None and not callable(hook):
                raise TypeError(f"{what} must be callable or None, not {hook!r}")
        if executor is not None:
            _check_executor(executor)
        if on_abandon not in ("cancel", "finish"):
            raise ValueError(f'on_abandon must be "cancel" or "finish", not {on_abandon!r}')
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be a str or None, not {name!r}")
        if backend is not None:
            _check_backend(backend)
        super().__init__(shards, build_key, hash)
        self._cancels = on_abandon == "cancel"
        self._name = name
        self._executor = executor
        #: The pool made here when it is first needed, under `_pool_lock`.
        self._pool: ThreadPoolExecutor | None = None
        #: Replaced, not changed, under `_observers_lock`.
        self._subscriptions: tuple[Subscription, ...] = ()
        #: There has been an observer: what runs now may be watched. Asked where each step counts.
        self._was_watched = False
        #: Written under `_observers_lock`.
        self._observer_errors = 0
        self._tier = None if backend is None else Tier(backend, name)
        self._wrap(backend is not None)
        register(self)

    # -- threads ----------------------------------------------------------------------------------

    def _do_wrapped(
        self, fn: Callable[[], T], part: Any, more: tuple[Any, ...], timeout: float | None
    ) -> tuple[T, bool]:
        key, h, shard = self._place(parts_of(part, more))
        if self._tier is not None:
            self._tier.check(shard, h, key)
        seat = self._seat(key, *leader_here())
        deadline = None if timeout is None else _after(timeout)
        try:
            if shard.claim(h, seat):
                return self._lead(shard, h, seat, seat[1], fn, deadline)
            return self._follow(shard, h, seat, fn, timeout)
        except BaseException as error:
            try:
                self._fail(shard, h, seat, seat[1], error)
            except RecursionError:  # see Core.do
                late.append((self._fail, (shard, h, seat, seat[1], error)))
                start_new_thread(settle_late, ())
            except BaseException:  # interrupted: see Core.do
                self._fail(shard, h, seat, seat[1], error)
                raise
            raise

    def _follow(
        self, shard: Shard, h: int, seat: Seat, fn: Callable[[], T], timeout: float | None
    ) -> tuple[T, bool]:
        sleeper = Sleeper()
        record: Execution | None = None
        led = seat
        promoted = False
        waits: tuple[Execution, ...] = ()
        deadline = None if timeout is None or self._tier is None else _after(timeout)
        try:
            refuse_coroutine_function(fn)
            record = shard.join(h, seat, sleeper, None)
            if record is not None:
                if isinstance(record.seat, WatchedSeat):
                    record.seat.join(sleeper)
                waits = (record,)
                begin_wait(shard, waits, leave=partial(self._leave, shard, record, sleeper))
                try:
                    if not sleeper.wait(timeout):
                        if self._leave(shard, record, sleeper):
                            shard.count_timeout()
                            if isinstance(record.seat, WatchedSeat):
                                record.seat.leave(sleeper, Departure.TIMED_OUT)
                            raise FlightTimeout(
                                f"waited {timeout} s for the execution of {shown(record.key)}"
                            )
                        sleeper.wait()
                finally:
                    end_wait(waits)
                promoted = sleeper.news[0][1]
                if isinstance(record.seat, WatchedSeat):
                    record.seat.leave(sleeper, departure_from(record, promoted))
                if not promoted:
                    return record.outcome()
                led = record.seat
                shard.adopt(led, sleeper, sleeper.thread)
            return self._lead(shard, h, led, sleeper.thread, fn, deadline)
        except BaseException:
            try:
                self._stop_following(shard, h, seat, sleeper, waits, record, promoted)
            except BaseException:  # interrupted: see Core.do
                self._stop_following(shard, h, seat, sleeper, waits, record, promoted)
                raise
            raise
        finally:
            del record, sleeper, seat, waits, led  # the traceback holds this frame: see Failure

    def _stop_following(
        self,
        shard: Shard,
        h: int,
        seat: Seat,
        sleeper: Sleeper,
        waits: tuple[Execution, ...],
        record: Execution | None,
        promoted: bool,
    ) -> None:
        end_wait(waits)  # that, too, may have been interrupted
        self._withdraw(shard, h, sleeper, record)
        if promoted and record is not None:  # it may lead by now, and not have begun
            self._conclude(shard, h, record.seat, sleeper.thread, End.LOST)
        # A key's __eq__ may have raised when `seat` was linked already: nobody else's error.
        self._conclude(shard, h, seat, seat[1], End.LOST)

    def _lead(
        self,
        shard: Shard,
        h: int,
        seat: Seat,
        leader: Any,
        fn: Callable[[], T],
        deadline: float | None = None,
    ) -> tuple[T, bool]:
        """Runs `fn` on this thread, for an execution that others may know of already.

        Until `deadline` it may be told that another process has run it: see `_tier`.
        """
        tier = self._tier
        try:
            if isinstance(seat, WatchedSeat):
                seat.start(leader)
            value = fn() if tier is None else tier.lead(shard, h, seat, fn, deadline)
            if type(value) is CoroutineType:
                self._conclude(shard, h, seat, leader, End.LOST)
                refuse_coroutine(value)
            if not isinstance(seat, WatchedSeat) and shard.release(h, seat):
                return value, False
            record = self._conclude(shard, h, seat, leader, End.VALUE, value)
            return value, record is not None and record.shared
        except BaseException as error:
            try:
                if isinstance(error, Absent):
                    self._conclude(shard, h, seat, leader, End.MISSING)
                self._fail(shard, h, seat, leader, error)  # does nothing after another end
            except RecursionError:  # see Core.do
                late.append((self._fail, (shard, h, seat, leader, error)))
                start_new_thread(settle_late, ())
            except BaseException:  # interrupted: see Core.do
                self._fail(shard, h, seat, leader, error)
                raise
            if isinstance(error, CallersOwn):
                if not isinstance(error, Absent):
                    shard.count_timeout()
                raise error.own from None
            raise
        finally:
            del seat, leader  # that may hold a future, and that the error

    # -- coroutines -------------------------------------------------------------------------------

    async def do_async(  # noqa: C901 - the hot path, written out
        self, fn: Callable[[], Awaitable[T]], /, *parts: Any
    ) -> tuple[T, bool]:
        """Awaits what `fn` returns, or the execution that already runs for this key.

        The awaitable runs in a task that the flight owns, on this event loop, with a copy of this
        caller's context. A caller that is cancelled leaves alone; with the last one the execution
        is abandoned (see `on_abandon`). Limit the wait with `asyncio.timeout`.

        Args:
            fn: Returns the awaitable to run, if nobody runs one for the key.
            *parts: What the key is made of.

        Returns:
            The value, and whether it went to more than one caller.

        Raises:
            Exception: Whatever the leader's function raised.
            DeadlockError: Waiting would never end.
            TypeError: The key is not hashable, a hook returned what it must not, or `fn` returned
                something that can not be awaited: use `do`.
        """
        key, h, shard, taken = self._look(parts)
        if self._tier is not None:
            self._tier.check(shard, h, key)
        loop = get_running_loop()
        seat: Seat | None = None
        record: Execution | None = None
        run: LoopRun | None = None
        waiter: asyncio.Future[Any] | None = None
        try:
            if taken:
                waiter = (future_makers.get(id(loop)) or self._watch(loop))()
                record = shard.follow(h, key, waiter, loop)
            if record is None:
                run = LoopRun(loop)
                seat = self._seat(key, run) if self._wraps else (key, run)
                if not shard.claim(h, seat):
                    waiter = waiter or (future_makers.get(id(loop)) or self._watch(loop))()
                    record = shard.join(h, seat, waiter, loop)
            if record is not None:
                assert waiter is not None
                if self._was_watched and isinstance(record.seat, WatchedSeat):
                    record.seat.join(waiter)
                if (
                    current_run.get() is not None
                    or (roots and id(loop) in roots)
                    # Else it can not be this thread's; asked here, for the call costs more.
                    or (type(record.leader) is not LoopRun and closes_cycle((record,)))
                ):
                    begin_wait(
                        shard, (record,), waiter, partial(self._leave, shard, record, waiter)
                    )
                    try:
                        answer = await waiter
                    finally:
                        end_await(waiter)
                else:
                    answer = await waiter
                if self._was_watched and isinstance(record.seat, WatchedSeat):
                    record.seat.leave(waiter, departure_from(record, answer is TAKE_OVER))
                if answer is not TAKE_OVER:
                    return record.outcome() if answer is None else answer
                run = LoopRun(loop)
                seat = record.seat
                if not shard.adopt(seat, waiter, run):
                    raise asyncio.CancelledError("the event loop was closed")
            assert run is not None
            assert seat is not None
            self._start(run, self._run(run, shard, h, seat, fn))
            if not run.done:
                bell = run.bell = (future_makers.get(id(loop)) or self._watch(loop))()
                if current_run.get() is not None or (roots and id(loop) in roots):
                    begin_wait(shard, shard.running_as(h, seat), bell)
                    try:
                        await bell
                    finally:
                        end_await(bell)
                else:
                    await bell
            if run.error is None:  # as outcome() does, without the call
                result, run.result = run.result, None
                assert result is not None
                return result
            return run.outcome()
        except GeneratorExit:
            # The coroutine is closed, perhaps by the garbage collector, at any point of any
            # thread: that may be one that holds the lock that leaving needs.
            self._on_a_thread(self._leave_async, shard, h, seat, record, waiter, run)
            raise
        except BaseException:
            self._leave_async(shard, h, seat, record, waiter, run)
            raise
        finally:
            # A traceback may hold this frame: see Failure.
            del record, seat, run, waiter

    def _start(self, run: LoopRun, coroutine: Coroutine[Any, Any, None]) -> None:
        """Runs `coroutine`, a run's, in a task; its first step at once where possible."""
        loop = run.loop
        if _EAGER and loop.get_task_factory() is None:
            _Task(coroutine, loop=loop, eager_start=True)
        else:
            # A task that is cancelled before its first step runs nothing, no `finally` either. So
            # the coroutine is brought into its `try` here.
            run.paused = True
            coroutine.send(None)
            task = loop.create_task(coroutine)
            if not run.done:  # as a task factory of the user's may have it
                run.task = task

    async def _run(
        self,
        run: LoopRun,
        shard: Shard,
        h: int,
        seat: Seat,
        fn: Callable[[], Awaitable[Any]],
    ) -> None:
        """The task of an execution. Raises only what tells its loop that it was cancelled."""
        try:
            if run.paused:
                await pause()
            begin_run(run)
            if self._was_watched and isinstance(seat, WatchedSeat):
                seat.start(run)
            awaitable: Any = (
                fn() if self._tier is None else self._tier.lead_async(shard, h, seat, fn)
            )
            if type(awaitable) is not CoroutineType and not inspect.isawaitable(awaitable):
                run.error = not_awaitable(awaitable)
                self._conclude(shard, h, seat, run, End.LOST)
                return
            value = await awaitable  # pyright: ignore[reportUnknownVariableType]
            if (self._was_watched and isinstance(seat, WatchedSeat)) or not shard.release(h, seat):
                record = self._conclude(shard, h, seat, run, End.VALUE, value)
                run.result = value, record is not None and record.shared
            else:
                run.result = value, False
        except BaseException as error:
            run.error = error.own if isinstance(error, CallersOwn) else error
            if isinstance(error, Absent):
                self._conclude(shard, h, seat, run, End.MISSING)
            if isinstance(error, GeneratorExit):  # see do_async
                self._on_a_thread(self._fail, shard, h, seat, run, error)
            elif isinstance(error, RecursionError):  # see Core.do
                late.append((self._fail, (shard, h, seat, run, error)))
                start_new_thread(settle_late, ())
            else:
                self._fail(shard, h, seat, run, error)
            if isinstance(error, (asyncio.CancelledError, KeyboardInterrupt, SystemExit)):
                raise
        finally:
            run.finish()
            del run, seat

    def _leave_async(
        self,
        shard: Shard,
        h: int,
        seat: Seat | None,
        record: Execution | None,
        waiter: "asyncio.Future[bool] | None",
        run: LoopRun | None,
    ) -> None:
        """A coroutine goes, at whatever point it was. What is over already is not disturbed."""
        if waiter is not None:
            self._withdraw(shard, h, waiter, record)
        if run is None:
            return
        run.leave()
        if run.done or seat is None:
            return
        if run.task is None:
            self._conclude(shard, h, seat, run, End.LOST)
        else:
            self._leave_leader(shard, h, seat, run)

    # -- futures ----------------------------------------------------------------------------------

    def do_future(self, fn: Callable[[], T], /, *parts: Any) -> "Future[tuple[T, bool]]":
        """Runs `fn` on the executor, or joins the execution that already runs for this key.

        Never blocks. A follower takes no thread of the executor. Cancelling the future leaves the
        flight: others are served, and an execution that nobody wants and that has not begun is
        abandoned. `result()` raises `DeadlockError` where it would wait forever.

        Args:
            fn: The function to run, if nobody runs one for the key.
            *parts: What the key is made of.

        Returns:
            A future of the value and whether it went to more than one caller.

        Raises:
            TypeError: The key is not hashable, a hook returned what it must not, or `fn` is a
                coroutine function: use `do_async`.
            RuntimeError: The executor takes no work any more.
        """
        refuse_coroutine_function(fn)
        key, h, shard = self._place(parts)
        if self._tier is not None:
            self._tier.check(shard, h, key)
        future = FlightFuture(self, fn, shard, h)
        seat = self._seat(key, future) if self._wraps else (key, future)
        record: Execution | None = None
        try:
            if not shard.claim(h, seat):
                record = shard.join(h, seat, future, None)
            if record is None:
                future.seat = seat
                future.submit()
            else:
                future.joined = record
                if isinstance(record.seat, WatchedSeat):
                    record.seat.join(future)
                    future.check_woken(record)
        except BaseException:
            self._withdraw(shard, h, future, record)
            self._conclude(shard, h, seat, future, End.LOST)
            future.seat = None
            raise
        return future

    def _submit(self, work: Callable[[], None]) -> "Future[None]":
        if self._executor is not None:
            return self._executor.submit(work)
        pool = self._pool
        if pool is None:
            with _pool_lock:
                if self._pool is None:
                    name = self._name if self._name is not None else f"{id(self):#x}"
                    self._pool = ThreadPoolExecutor(thread_name_prefix=f"shardedflight-{name}")
                pool = self._pool
        return without_context(pool.submit, work)

    # -- many keys --------------------------------------------------------------------------------

    def do_many(
        self, fn: Callable[[list[K]], Mapping[K, V]], /, keys: Iterable[K]
    ) -> dict[K, tuple[V, bool]]:
        """Joins the executions of those keys that are in flight, and runs `fn` once for the rest.

        Each key stands for the call `do(fn, key)`; other callers of such a key join. If the leader
        of a joined key is lost and this call takes over, `fn` runs once more, for that key.

        Args:
            fn: Takes the list of the keys to find and returns a mapping. It runs on this thread.
            keys: The keys. What occurs twice counts once.

        Returns:
            For each key its value and whether that went to more than one caller. Keys that the
            mapping lacks are absent (their other callers get `KeyError`).

        Raises:
            FlightErrorGroup: A joined key failed. Names each failed key; has `.found`.
            Exception: What `fn` raised, if no joined key failed.
            DeadlockError: Waiting would never end.
            TypeError: A key is not hashable, or `fn` returned no mapping.
        """
        return _many.do_many(self, fn, keys)

    async def do_many_async(
        self, fn: Callable[[list[K]], Awaitable[Mapping[K, V]]], /, keys: Iterable[K]
    ) -> dict[K, tuple[V, bool]]:
        """`do_many` for coroutines: `fn` returns an awaitable of the mapping.

        It is run as `do_async` runs a function: in a task that the flight owns. See `do_many` for
        arguments, returns and errors.
        """
        return await _many.do_many_async(self, fn, keys)

    # -- what all of them share -------------------------------------------------------------------

    def _conclude(
        self,
        shard: Shard,
        h: int,
        seat: Seat,
        leader: Any,
        end: End,
        value: Any = None,
        traceback: TracebackType | None = None,
    ) -> Execution | None:
        if isinstance(seat, WatchedSeat):
            seat.end(shard, leader, end, value)
        while True:
            record, heir = shard.settle(h, seat, leader, end, value, traceback)
            if record is None:
                return None
            if heir is None:
                if record.leader is None:
                    wake_all(record)
                    shard.dismiss(seat)
                return record
            heir = _announced(shard, record, heir)
            if heir is None:
                return record
            gone = partial(self._conclude, shard, h, seat, heir, End.LOST)
            if offer(record, heir, gone):
                return record
            leader, end = heir, End.LOST

    def _leave(self, shard: Shard, record: Execution, waiter: Any) -> bool:
        left, unwanted = shard.leave(record, waiter, self._cancels)
        if unwanted is not None:
            self._abandon(unwanted, record)
        return left

    def _leave_leader(self, shard: Shard, h: int, seat: Seat, leader: Run) -> None:
        unwanted = shard.leave_leader(h, seat, leader, self._cancels)
        if unwanted is not None:
            self._abandon(leader, unwanted)

    def _abandon(self, leader: Run, record: Execution) -> None:
        if self._tier is not None:
            self._tier.abandon(record.seat)
        leader.abandon(record)

    def _withdraw(self, shard: Shard, h: int, waiter: Any, joined: Execution | None) -> None:
        """A follower goes, even if it was to take over.

        Usually it had joined `joined`. If it was interrupted while it joined, nobody has told it
        what: it is looked for.
        """
        found = {shard.record(seat) for seat in shard.holders(h)}
        found.add(joined)
        for record in found:
            if record is None:
                continue
            # It may be chosen to take over, and be exchanged for another one, at any time.
            while not self._leave(shard, record, waiter):
                if record.leader is waiter:
                    self._conclude(shard, h, record.seat, waiter, End.LOST)
                elif record.end is not None or waiter not in record.waiters:
                    break
            if isinstance(record.seat, WatchedSeat):
                record.seat.leave(waiter, Departure.CANCELLED)

    def _seat(self, *seat: Any) -> Seat:
        """A seat, when something is done around the functions."""
        subscriptions = self._subscriptions
        return WatchedSeat.make(self, subscriptions, seat) if subscriptions else seat

    # -- watching ---------------------------------------------------------------------------------

    def add_observer(self, observer: Observer) -> None:
        """Has `observer` told of all executions that begin from now on.

        Args:
            observer: Has the methods of `shardedflight.observe.Observer`, which see.

        Raises:
            TypeError: It lacks a method.
            ValueError: It is an observer of this flight already.

        May be called from any thread.
        """
        check_observer(observer)
        with _observers_lock:
            if any(known.observer is observer for known in self._subscriptions):
                raise ValueError(f"it is an observer of this flight already: {observer!r}")
            self._was_watched = True
            self._subscriptions = (*self._subscriptions, Subscription(observer))
            self._wrap(True)

    def remove_observer(self, observer: Observer) -> None:
        """Has `observer` told of no execution that begins from now on.

        It is still told how those end, and who follows in them, that run now.

        Args:
            observer: One that was added.

        Raises:
            ValueError: It is no observer of this flight.

        May be called from any thread.
        """
        with _observers_lock:
            rest = tuple(known for known in self._subscriptions if known.observer is not observer)
            if len(rest) == len(self._subscriptions):
                raise ValueError(f"it is no observer of this flight: {observer!r}")
            self._subscriptions = rest
            self._wrap(bool(rest) or self._tier is not None)

    @property
    def observer_errors(self) -> int:
        """How many exceptions the observers have raised."""
        return self._observer_errors

    def _count_observer_error(self) -> None:
        with _observers_lock:
            self._observer_errors += 1

    @property
    def name(self) -> str | None:
        """As it was given."""
        return self._name

    @property
    def shards(self) -> int:
        """How many shards the flight has."""
        return len(self._shards)

    def forget(self, *parts: Any) -> None:
        """The next caller for this key starts a new execution.

        One that runs now serves those who have joined it. Without one, nothing happens. With a
        backend this holds in all its processes; it is told before this returns, unless an event
        loop runs on this thread, which is not held up.

        Args:
            *parts: What the key is made of.

        Raises:
            TypeError: The key is not hashable, or a hook returned what it must not.
        """
        key, h, shard = self._place(parts)
        shard.forget(h, key)  # first: who asks the backend now looks here when it has been answered
        if self._tier is not None:
            self._tier.forget(shard, h, key)

    def in_flight(self) -> int:
        """How many executions run now, those that were forgotten among them."""
        return sum(self._running())

    def stats(self) -> Stats:
        """A snapshot of the totals and gauges."""
        shards = self._made_shards()
        per_shard = self._running()
        tier = TierStats() if self._tier is None else self._tier.stats()
        totals = [
            sum(total)
            for total in zip((0,) * 7, *[shard.totals() for shard in shards], strict=True)
        ]
        shared, errors, promotions, timeouts, abandoned, forgotten, deadlocks = totals
        return Stats(
            executions=self._count_started(),
            shared=shared,
            errors=errors,
            promotions=promotions,
            timeouts=timeouts,
            abandoned=abandoned,
            forgotten=forgotten,
            deadlocks=deadlocks,
            in_flight=sum(per_shard),
            waiting=sum(shard.waiting() for shard in shards),
            per_shard=per_shard,
            remote_leads=tier.remote_leads,
            remote_follows=tier.remote_follows,
            takeovers=tier.takeovers,
            fenced=tier.fenced,
            fallbacks=tier.fallbacks,
            misses=tier.misses,
        )

    def __repr__(self) -> str:
        name = f" {self._name!r}" if self._name is not None else ""
        return f"<{type(self).__name__}{name}: {self.shards} shards, {self.in_flight()} in flight>"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} can not be pickled or copied: the functions in flight belong "
            "to this process; make one in each process"
        )

    def _loop_closed(self) -> None:
        """An event loop was closed: what it led is lost."""
        for shard, h, seat in self._executions():
            leader = shard.leader(seat)
            loop = loop_of(leader)
            if loop is not None and loop.is_closed():
                if self._tier is not None:
                    asked = self._tier.asked_for(seat)
                    # While it leads, nobody else's: another thread may have handed over by now.
                    if asked is not None and shard.leader(seat) is leader:
                        self._tier.lose(seat, asked)
                self._conclude(shard, h, seat, leader, End.LOST)

    def _watch(self, loop: asyncio.AbstractEventLoop) -> "Callable[[], asyncio.Future[Any]]":
        maker = future_makers.get(id(loop))
        if maker is None:
            begin_loop(loop)
            maker = watch_loop(loop, _loop_closed)
        return maker

    def _on_a_thread(self, function: Callable[..., None], *args: Any) -> None:
        try:
            start_new_thread(function, args)
        except RuntimeError:  # there are too many, or the interpreter is going down
            late.append((function, args))

    def _after_fork_in_child(self) -> None:
        self._orphan()
        if self._pool is not None:
            pools_of_parents.append(self._pool)
            self._pool = None
        if self._tier is not None:
            self._tier.restart()


# -- helpers --------------------------------------------------------------------------------------


def _announced(shard: Shard, record: Execution, heir: Any) -> Any:
    """Who takes over: another one if `heir` can not go on, maybe because of this."""
    while True:
        loop = other = None
        if held_up(heir):
            loop = None if isinstance(heir, Waiter) else heir.get_loop()
            able = (waiter for waiter in list(record.waiters) if not held_up(waiter))
            other = next(able, None)
        told = shard.announce(record, heir, loop, other)
        if told is None or told is not other:
            return told
        heir = other  # asked once more, now that it is the leader: see `held_up`


def _check_backend(backend: object) -> None:
    methods = ("name", "join", "seal", "open", "finish", "give_up", "forget")
    if isinstance(backend, type) or not all(callable(getattr(backend, m, None)) for m in methods):
        raise BackendError(
            f"backend must be one of shardedflight.backends or None, not {backend!r}"
        )


def _check_executor(executor: object) -> None:
    if not isinstance(executor, Executor) and not callable(getattr(executor, "submit", None)):
        raise TypeError(f"executor must be a concurrent.futures.Executor or None, not {executor!r}")
    processes = sys.modules.get("concurrent.futures.process")
    if processes is not None and isinstance(executor, processes.ProcessPoolExecutor):
        raise TypeError(
            f"executor must run functions in this process, not {executor!r}: use a "
            "ThreadPoolExecutor"
        )


_pool_lock = SteadyLock()
_observers_lock = SteadyLock()

leading_code.add(ShardedFlight._lead.__code__)


def _after(seconds: float) -> float:
    """When so many seconds have passed, by `time.monotonic`; they may be more than it can tell."""
    return monotonic() + min(seconds, TIMEOUT_MAX)


def _loop_closed() -> None:
    end_closed_loops()
    for flight in all_flights():
        flight._loop_closed()


#: The child has to find the shards whole, and able to be changed: free-threaded, each object has a
#: lock of its own, which is held while an attribute is set.
_fork_hold = ForkHold(
    lambda: [shard.lock for flight in all_flights() for shard in flight._made_shards()]
)


def _after_fork_in_child() -> None:
    global _pool_lock, _observers_lock
    _pool_lock = SteadyLock()
    _observers_lock = SteadyLock()
    _fork_hold.after_in_child()
    after_fork_in_child()
    for flight in all_flights():
        flight._after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_fork_hold.before,
        after_in_parent=_fork_hold.after_in_parent,
        after_in_child=_after_fork_in_child,
    )
