"""Contract, section 2: leading and following, with the words `leader`, `follower` and `shared`.

The callers of the three kinds, and the functions and executors in a test's hands, are made here
and serve the tests of sections 3, 5 and 6 too.
"""

import asyncio
import contextvars
import functools
import gc
import sys
import threading
import warnings
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed, wait
from typing import Any

import pytest
from support import PATIENCE, eventually, eventually_async, spawn, spawn_loop

from shardedflight import ShardedFlight


class Work:
    """A function in the test's hands: it tells that it runs, and ends when `go` is set."""

    def __init__(self, value: Any = None, error: BaseException | None = None) -> None:
        self.value = value
        self.error = error
        self.runs = 0
        self.running = threading.Event()
        self.go = threading.Event()

    def __call__(self) -> Any:
        self.runs += 1
        self.running.set()
        assert self.go.wait(PATIENCE)
        return self.end()

    async def awaited(self) -> Any:
        self.runs += 1
        self.running.set()
        await eventually_async(self.go.is_set)
        return self.end()

    def end(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


def call_by_thread(flight: ShardedFlight, work: Work, *key: Any) -> "Future[Any]":
    return spawn(flight.do, work, *key)


def call_by_task(flight: ShardedFlight, work: Work, *key: Any) -> "Future[Any]":
    return spawn_loop(lambda: flight.do_async(work.awaited, *key))


def call_by_future(flight: ShardedFlight, work: Work, *key: Any) -> "Future[Any]":
    return flight.do_future(work, *key)


#: The three kinds of caller; each gives a future of the call's outcome.
KINDS: dict[str, Callable[..., "Future[Any]"]] = {
    "thread": call_by_thread,
    "task": call_by_task,
    "future": call_by_future,
}
each_leader = pytest.mark.parametrize("leader", KINDS)
each_follower = pytest.mark.parametrize("follower", KINDS)


class HeldExecutor(Executor):
    """Holds what it is given until the test runs it, on the test's own thread."""

    def __init__(self) -> None:
        self.held: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        self.held.append((future, functools.partial(fn, *args, **kwargs)))
        return future

    def run_next(self, index: int = 0) -> None:
        future, function = self.held.pop(index)
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

    def run_all(self) -> None:
        while self.held:
            self.run_next()


class InlineExecutor(Executor):
    """Runs what it is given before `submit` returns."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


def never() -> Any:
    """The function of a caller that must find an execution to follow."""
    raise AssertionError("the function of a follower ran")


async def never_async() -> Any:
    return never()


def waiting(flight: ShardedFlight, followers: int) -> Callable[[], bool]:
    return lambda: flight.stats().waiting == followers


@each_leader
@each_follower
def test_all_three_join_each_other(leader: str, follower: str) -> None:
    """2: "All three join each other", and followers receive the same value object as the leader.

    Each combination of a leader's kind and a follower's kind; `shared` is true for both.
    """
    flight = ShardedFlight()
    work = Work(value=object())
    led = KINDS[leader](flight, work, "item", 1)
    assert work.running.wait(PATIENCE)
    other = Work(value="the follower's own")
    followed = KINDS[follower](flight, other, "item", 1)
    eventually(waiting(flight, 1))
    assert flight.in_flight() == 1
    work.go.set()
    assert led.result(PATIENCE) == (work.value, True)
    assert followed.result(PATIENCE) == (work.value, True)
    assert followed.result()[0] is led.result()[0] is work.value
    assert (work.runs, other.runs) == (1, 0)
    stats = flight.stats()
    assert (stats.executions, stats.shared, stats.errors) == (1, 1, 0)
    assert (stats.in_flight, stats.waiting, sum(stats.per_shard)) == (0, 0, 0)


@each_leader
def test_followers_of_all_kinds_at_once(leader: str) -> None:
    """2: "All three join each other": five followers of each kind on one execution."""
    flight = ShardedFlight()
    work = Work(value=object())
    led = KINDS[leader](flight, work, "k")
    assert work.running.wait(PATIENCE)
    followed = [kind(flight, Work(), "k") for kind in KINDS.values() for _ in range(5)]
    eventually(waiting(flight, 15))
    work.go.set()
    for outcome in [led, *followed]:
        value, shared = outcome.result(PATIENCE)
        assert value is work.value
        assert shared is True
    assert work.runs == 1
    assert flight.stats().shared == 15


@each_leader
def test_a_leader_alone_is_not_shared(leader: str) -> None:
    """`shared`: the outcome went to more than one caller."""
    flight = ShardedFlight()
    work = Work(value="v")
    work.go.set()
    assert KINDS[leader](flight, work, "k").result(PATIENCE) == ("v", False)
    stats = flight.stats()
    assert (stats.executions, stats.shared, stats.in_flight) == (1, 0, 0)


@each_leader
def test_the_result_is_a_plain_tuple(leader: str) -> None:
    """2: "The result is a plain `(value, shared)` tuple", for leader and follower."""
    flight = ShardedFlight()
    work = Work(value=[1])
    outcomes = [KINDS[leader](flight, work, "k")]
    assert work.running.wait(PATIENCE)
    outcomes += [kind(flight, Work(), "k") for kind in KINDS.values()]
    eventually(waiting(flight, 3))
    work.go.set()
    for outcome in outcomes:
        result = outcome.result(PATIENCE)
        assert type(result) is tuple
        assert len(result) == 2
        assert result[1] is True


class Contrary:
    """A value that may be handed on but not looked at."""

    def __bool__(self) -> bool:
        raise AssertionError("looked at the value")

    def __eq__(self, other: object) -> bool:
        raise AssertionError("looked at the value")

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    "value",
    [None, False, 0, (), ValueError("a value"), ValueError, NotImplemented, ..., (1, True)],
    ids=repr,
)
@each_leader
def test_any_object_is_a_value(leader: str, value: Any) -> None:
    """2: "Followers receive the same value object as the leader": falsy and odd ones as well."""
    flight = ShardedFlight()
    work = Work(value=value)
    outcomes = [KINDS[leader](flight, work, "k")]
    assert work.running.wait(PATIENCE)
    outcomes += [kind(flight, Work(), "k") for kind in KINDS.values()]
    eventually(waiting(flight, 3))
    work.go.set()
    for outcome in outcomes:
        assert outcome.result(PATIENCE)[0] is value


@each_leader
def test_a_value_is_handed_on_without_a_look(leader: str) -> None:
    """2: "Followers receive the same value object": nobody asks it for its truth or its equals."""
    flight = ShardedFlight()
    work = Work(value=Contrary())
    outcomes = [KINDS[leader](flight, work, "k")]
    assert work.running.wait(PATIENCE)
    outcomes += [kind(flight, Work(), "k") for kind in KINDS.values()]
    eventually(waiting(flight, 3))
    work.go.set()
    for outcome in outcomes:
        assert outcome.result(PATIENCE)[0] is work.value


def test_at_most_one_execution_of_a_key_at_a_time() -> None:
    """2: "For one key at most one execution is joinable at any time."

    Barrier-started threads of all kinds call one key over and over; the function counts how many
    of itself run. Every call is either an execution or served by one.
    """
    flight = ShardedFlight(4)
    lock = threading.Lock()
    now = most = runs = 0
    threads, rounds = 6, 150
    barrier = threading.Barrier(threads)

    def work() -> object:
        nonlocal now, most, runs
        with lock:
            now += 1
            runs += 1
            most = max(most, now)
        value = object()
        with lock:
            now -= 1
        return value

    async def work_async() -> object:
        return work()

    def by_do() -> None:
        for _ in range(rounds):
            barrier.wait(PATIENCE)
            flight.do(work, "k")

    def by_future() -> None:
        for _ in range(rounds):
            barrier.wait(PATIENCE)
            flight.do_future(work, "k").result(PATIENCE)

    async def by_task() -> None:
        for _ in range(rounds):
            barrier.wait(PATIENCE)
            await flight.do_async(work_async, "k")

    def body(call_over_and_over: Callable[[], Any]) -> None:
        try:
            call_over_and_over()
        except BaseException:
            barrier.abort()
            raise

    callers = [by_do, by_do, by_future, by_future]
    callers += [lambda: asyncio.run(by_task()), lambda: asyncio.run(by_task())]
    errors = [spawned.exception(PATIENCE) for spawned in [spawn(body, call) for call in callers]]
    # Where one fails, the others find the barrier broken.
    assert [e for e in errors if not isinstance(e, threading.BrokenBarrierError | None)] == []
    stats = flight.stats()
    assert most == 1
    assert stats.executions == runs
    assert stats.executions + stats.shared == threads * rounds
    assert (stats.in_flight, stats.waiting) == (0, 0)


@each_leader
def test_executions_of_different_keys_run_side_by_side(leader: str) -> None:
    """2: "For one key at most one": two keys do not wait for each other, in one shard either."""
    flight = ShardedFlight(1)
    first, second = Work(value=1), Work(value=2)
    one = KINDS[leader](flight, first, "one")
    two = KINDS[leader](flight, second, "two")
    assert first.running.wait(PATIENCE)
    assert second.running.wait(PATIENCE)
    assert flight.in_flight() == 2
    second.go.set()
    assert two.result(PATIENCE) == (2, False)
    assert flight.in_flight() == 1
    first.go.set()
    assert one.result(PATIENCE) == (1, False)
    assert flight.in_flight() == 0


def test_an_outcome_is_not_kept() -> None:
    """A single flight is no cache: a call after the end runs its own function."""
    flight = ShardedFlight()
    assert [flight.do(lambda n=n: n, "k")[0] for n in range(3)] == [0, 1, 2]
    assert flight.stats().executions == 3


def test_two_flights_share_nothing() -> None:
    """2: "For one key at most one" holds within one object."""
    one, other = ShardedFlight(), ShardedFlight()
    assert one.do(lambda: other.do(lambda: "inner", "k"), "k") == (("inner", False), False)


def test_do_runs_on_the_callers_own_thread() -> None:
    """2: "`do` runs `fn` on the caller's own thread"."""
    flight = ShardedFlight()
    assert flight.do(threading.get_ident, "k")[0] == threading.get_ident()
    before = set(threading.enumerate())
    flight.do(lambda: None, "k")
    assert set(threading.enumerate()) <= before


def test_do_gives_the_function_no_arguments_and_the_callers_context() -> None:
    """2: "`do` runs `fn` on the caller's own thread": as a plain call would, context included."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    flight = ShardedFlight()

    def work(*args: Any, **kwargs: Any) -> Any:
        assert args == ()
        assert kwargs == {}
        seen = variable.get()
        variable.set("by the function")
        return seen

    def caller() -> tuple[Any, str]:
        variable.set("by the caller")
        return flight.do(work, "k")[0], variable.get()

    assert contextvars.Context().run(caller) == ("by the caller", "by the function")


def test_the_default_pool_is_made_lazily() -> None:
    """2: "`do_future` runs it on `executor` (a lazily made thread pool by default)"."""
    before = set(threading.enumerate())
    flight = ShardedFlight()
    flight.do(lambda: None, "k")
    flight.stats()
    assert set(threading.enumerate()) <= before
    ran_on, shared = flight.do_future(threading.get_ident, "k").result(PATIENCE)
    assert ran_on != threading.get_ident()
    assert shared is False
    assert set(threading.enumerate()) - before


class Request:
    """What a caller has in its context."""


def test_the_default_pool_has_no_callers_context() -> None:
    """Free-threaded, a thread inherits the context in which it is started: that of the first caller
    would be there for all functions that the thread runs, and be kept as long as it lives."""
    variable: contextvars.ContextVar[Any] = contextvars.ContextVar("variable", default="unset")
    flight = ShardedFlight()

    def caller() -> Any:
        request = Request()
        variable.set(request)
        seen, _ = flight.do_future(variable.get, "k").result(PATIENCE)
        return seen, weakref.ref(request)

    seen, request = contextvars.Context().run(caller)
    assert seen == "unset"
    gc.collect()
    assert request() is None


def test_do_future_gives_a_concurrent_future() -> None:
    """`do_future` returns a `concurrent.futures.Future` of `(value, shared)`, to both kinds."""
    flight = ShardedFlight()
    work = Work(value="v")
    led = flight.do_future(work, "k")
    assert work.running.wait(PATIENCE)
    followed = flight.do_future(never, "k")
    called: list[Future[Any]] = []
    for future in (led, followed):
        assert isinstance(future, Future)
        assert not future.done()
        with pytest.raises(TimeoutError):
            future.result(0)
        with pytest.raises(TimeoutError):
            future.exception(0.001)
        future.add_done_callback(called.append)
    assert wait([led, followed], 0).not_done == {led, followed}
    work.go.set()
    assert wait([led, followed], PATIENCE).done == {led, followed}
    assert set(as_completed([led, followed])) == {led, followed}
    for future in (led, followed):
        assert future.result(PATIENCE) == ("v", True)
        assert future.exception() is None
    eventually(lambda: set(called) == {led, followed})


def test_do_future_runs_on_the_executor_given() -> None:
    """2: "`do_future` runs it on `executor`": by its `submit`, and nowhere else."""
    executor = HeldExecutor()
    flight = ShardedFlight(executor=executor)
    future = flight.do_future(threading.get_ident, "k")
    assert len(executor.held) == 1
    assert not future.done()
    assert flight.in_flight() == 1
    executor.run_all()
    assert future.result(PATIENCE) == (threading.get_ident(), False)
    assert flight.in_flight() == 0


def test_an_executor_is_anything_with_a_submit() -> None:
    """2: "`do_future` runs it on `executor`": its class does not matter."""

    class Submitter:
        submit = InlineExecutor.submit

    flight = ShardedFlight(executor=Submitter())  # type: ignore[arg-type]
    assert flight.do_future(lambda: "v", "k").result(PATIENCE) == ("v", False)


def test_an_executor_that_runs_inside_submit() -> None:
    """2: "`do_future` runs it on `executor`": one that runs at once finds no lock held."""
    flight = ShardedFlight(1, executor=InlineExecutor())

    def work() -> Any:
        assert flight.in_flight() == 1
        flight.forget("other")
        return flight.do_future(lambda: "inner", "other").result(PATIENCE)

    assert flight.do_future(work, "k").result(PATIENCE) == (("inner", False), False)

    def fail() -> Any:
        raise LookupError("at once")

    with pytest.raises(LookupError, match="at once"):
        flight.do_future(fail, "k").result(PATIENCE)
    assert flight.in_flight() == 0


def test_do_future_never_blocks_its_caller() -> None:
    """2: "... and never blocks its caller": not behind a full pool, not behind any leader."""
    with ThreadPoolExecutor(1) as pool:
        flight = ShardedFlight(executor=pool)
        first, second = Work(value=1), Work(value=2)
        one = flight.do_future(first, "one")
        two = flight.do_future(second, "two")
        three = flight.do_future(never, "two")
        assert first.running.wait(PATIENCE)
        assert not second.running.is_set()
        first.go.set()
        second.go.set()
        assert one.result(PATIENCE) == (1, False)
        assert two.result(PATIENCE) == three.result(PATIENCE) == (2, True)


@each_leader
def test_a_followers_future_takes_no_pool_thread(leader: str) -> None:
    """2: "a follower's future takes no pool thread": a hundred followers, no `submit` for them."""
    submitted = 0

    class Counting(ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal submitted
            submitted += 1
            return super().submit(*args, **kwargs)

    with Counting(1) as pool:
        flight = ShardedFlight(executor=pool)
        work = Work(value="v")
        led = KINDS[leader](flight, work, "k")
        assert work.running.wait(PATIENCE)
        threads = set(threading.enumerate())
        followed = [flight.do_future(never, "k") for _ in range(100)]
        assert flight.stats().waiting == 100
        assert set(threading.enumerate()) <= threads  # those of other tests may end
        work.go.set()
        assert [future.result(PATIENCE) for future in followed] == [("v", True)] * 100
        assert led.result(PATIENCE) == ("v", True)
        assert submitted == (1 if leader == "future" else 0)


def test_do_async_runs_in_a_task_of_the_flights_own() -> None:
    """2: "`do_async` runs the awaitable in a task that the flight owns, on the leader's loop".

    For a coroutine that suspends and for one that does not (which may run eagerly).
    """
    flight = ShardedFlight()

    async def where() -> tuple[Any, Any]:
        return asyncio.current_task(), asyncio.get_running_loop()

    async def where_later() -> tuple[Any, Any]:
        await asyncio.sleep(0)
        return await where()

    async def main() -> None:
        caller = asyncio.current_task()
        for function in (where, where_later):
            (task, loop), _ = await flight.do_async(function, "k")
            assert task is not None
            assert task is not caller
            assert loop is asyncio.get_running_loop()
            assert asyncio.current_task() is caller

    asyncio.run(main())


def test_do_async_runs_with_a_copy_of_the_leaders_context() -> None:
    """2: "... with a copy of the leader's `contextvars`": seen inside, changes not seen outside.

    The follower's context has no part in it.
    """
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    flight = ShardedFlight()

    async def work(suspend: bool) -> list[str]:
        seen = [variable.get()]
        variable.set("by the function")
        if suspend:
            await eventually_async(waiting(flight, 1))
        return [*seen, variable.get()]

    async def follow() -> Any:
        variable.set("by the follower")
        result = await flight.do_async(never_async, "k")
        return result, variable.get()

    async def main() -> None:
        variable.set("by the leader")
        value, _ = await flight.do_async(lambda: work(False), "k")
        assert value == ["by the leader", "by the function"]
        assert variable.get() == "by the leader"

        follower = asyncio.create_task(follow())
        value, shared = await flight.do_async(lambda: work(True), "k")
        assert value == ["by the leader", "by the function"]
        assert shared is True
        assert variable.get() == "by the leader"
        assert await follower == ((value, True), "by the follower")

    asyncio.run(main())


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
def test_a_coroutine_that_does_not_suspend_costs_no_trip_through_the_loop() -> None:
    """2: "a coroutine that finishes without suspending costs no trip through the loop" (3.12+)."""
    flight = ShardedFlight()
    trips: list[int] = []

    async def value() -> str:
        return "v"

    async def error() -> str:
        raise LookupError("at once")

    async def main() -> None:
        asyncio.get_running_loop().call_soon(trips.append, 1)
        assert await flight.do_async(value, "k") == ("v", False)
        with pytest.raises(LookupError):
            await flight.do_async(error, "k")
        assert trips == []
        await asyncio.sleep(0)
        assert trips == [1]

    asyncio.run(main())
    assert flight.in_flight() == 0


def test_a_coroutine_that_does_not_suspend_is_a_whole_task_all_the_same() -> None:
    """2: "a task that the flight owns": what needs a current task works inside, without a trip."""
    flight = ShardedFlight()

    async def work() -> str:
        async with asyncio.timeout(PATIENCE):
            async with asyncio.TaskGroup():
                pass
            return await nested()

    async def nested() -> str:
        return (await flight.do_async(inner, "inner"))[0]

    async def inner() -> str:
        return "v"

    async def main() -> None:
        assert await flight.do_async(work, "k") == ("v", False)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    asyncio.run(main())


def test_a_loop_keeps_no_callers_context() -> None:
    """A timer has the context in which it is set; one watches each loop as long as it is open."""
    variable: contextvars.ContextVar[Any] = contextvars.ContextVar("variable")
    flight = ShardedFlight()

    async def caller() -> Any:
        request = Request()
        variable.set(request)
        await flight.do_async(functools.partial(asyncio.sleep, 0), "k")
        return weakref.ref(request)

    with asyncio.Runner() as runner:
        request = runner.run(caller(), context=contextvars.Context())
        gc.collect()
        assert request() is None


def test_do_async_takes_any_awaitable() -> None:
    """2: "fn returns an awaitable": a future, a task, a gathering, an object with `__await__`."""
    flight = ShardedFlight()

    class Custom:
        def __await__(self) -> Any:
            yield from asyncio.sleep(0).__await__()
            return "custom"

    class CustomAtOnce:
        def __await__(self) -> Any:
            return "at once"
            yield

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def future() -> Awaitable[str]:
            made = loop.create_future()
            loop.call_soon(made.set_result, "future")
            return made

        async def coroutine() -> str:
            await asyncio.sleep(0)
            return "task"

        assert await flight.do_async(future, "k") == ("future", False)
        assert await flight.do_async(lambda: loop.create_task(coroutine()), "k") == ("task", False)
        assert await flight.do_async(Custom, "k") == ("custom", False)
        assert await flight.do_async(CustomAtOnce, "k") == ("at once", False)
        gathered = await flight.do_async(lambda: asyncio.gather(coroutine(), coroutine()), "k")
        assert gathered == (["task", "task"], False)

    asyncio.run(main())
    assert flight.in_flight() == 0


def test_do_async_of_a_function_that_fails_before_it_has_an_awaitable() -> None:
    """`do_async` calls `fn` first: what that call raises is the leader's error."""
    flight = ShardedFlight()

    def fails() -> Awaitable[Any]:
        raise LookupError("no awaitable")

    async def main() -> None:
        with pytest.raises(LookupError, match="no awaitable"):
            await flight.do_async(fails, "k")

    asyncio.run(main())
    assert flight.in_flight() == 0
    assert flight.do(lambda: "v", "k") == ("v", False)


@pytest.mark.parametrize("leader", ["thread", "future", "task"])
def test_a_coroutine_awaits_an_execution_elsewhere_without_blocking_its_loop(leader: str) -> None:
    """2: "a coroutine awaits a thread's without blocking its loop": the loop itself ends it."""
    flight = ShardedFlight()
    work = Work(value="v")
    led = KINDS[leader](flight, work, "k")
    assert work.running.wait(PATIENCE)

    async def main() -> Any:
        follower = asyncio.create_task(flight.do_async(never_async, "k"))
        await eventually_async(waiting(flight, 1))
        work.go.set()
        return await follower

    assert asyncio.run(main()) == ("v", True)
    assert led.result(PATIENCE) == ("v", True)


def test_a_thread_waits_for_a_coroutines_execution() -> None:
    """2: "A thread can wait for a coroutine's execution": one task-run execution, many threads."""
    flight = ShardedFlight()
    work = Work(value=object())
    led = call_by_task(flight, work, "k")
    assert work.running.wait(PATIENCE)
    followers = [spawn(flight.do, never, "k") for _ in range(8)]
    eventually(waiting(flight, 8))
    work.go.set()
    for outcome in [led, *followers]:
        assert outcome.result(PATIENCE) == (work.value, True)


@pytest.mark.parametrize("loops", [2, 3])
def test_tasks_on_several_loops_join_one_execution(loops: int) -> None:
    """2: "tasks on different event loops in different threads join one execution"."""
    flight = ShardedFlight()
    work = Work(value=object())
    each = 20

    async def leader_and_followers() -> list[Any]:
        tasks = [asyncio.create_task(flight.do_async(work.awaited, "k"))]
        await eventually_async(work.running.is_set)
        tasks += [asyncio.create_task(flight.do_async(never_async, "k")) for _ in range(each)]
        return await asyncio.gather(*tasks)

    async def followers() -> list[Any]:
        return await asyncio.gather(*[flight.do_async(never_async, "k") for _ in range(each)])

    outcomes = [spawn_loop(leader_and_followers)]
    assert work.running.wait(PATIENCE)
    outcomes += [spawn_loop(followers) for _ in range(loops - 1)]
    eventually(waiting(flight, each * loops))
    work.go.set()
    results = [result for outcome in outcomes for result in outcome.result(PATIENCE)]
    assert len(results) == each * loops + 1
    for value, shared in results:
        assert value is work.value
        assert shared is True
    assert work.runs == 1


def test_loops_in_debug_mode_find_nothing_to_complain_about() -> None:
    """2: "tasks on different event loops in different threads": each touches its own loop only,
    which asyncio checks in its debug mode."""
    flight = ShardedFlight()
    work = Work(value=object())

    async def call(function: Any) -> Any:
        asyncio.get_running_loop().set_debug(True)
        return await asyncio.gather(*[flight.do_async(function, "k") for _ in range(3)])

    outcomes = [spawn_loop(lambda: call(work.awaited))]
    assert work.running.wait(PATIENCE)
    outcomes += [spawn_loop(lambda: call(never_async)) for _ in range(2)]
    eventually(waiting(flight, 8))
    work.go.set()
    for outcome in outcomes:
        assert outcome.result(PATIENCE) == [(work.value, True)] * 3

    by_thread = Work(value=object())
    led = spawn(flight.do, by_thread, "k")
    assert by_thread.running.wait(PATIENCE)
    followed = spawn_loop(lambda: call(never_async))
    eventually(waiting(flight, 3))
    by_thread.go.set()
    assert followed.result(PATIENCE) == [(by_thread.value, True)] * 3
    assert led.result(PATIENCE) == (by_thread.value, True)


def plain_factory(loop: Any, coroutine: Any, **options: Any) -> "asyncio.Task[Any]":
    return asyncio.Task(coroutine, loop=loop, **options)


@pytest.mark.parametrize(
    "factory",
    [
        plain_factory,
        pytest.param(
            getattr(asyncio, "eager_task_factory", None),
            marks=pytest.mark.skipif(
                sys.version_info < (3, 12), reason="eager tasks came with Python 3.12"
            ),
            id="eager_task_factory",
        ),
    ],
)
def test_a_loop_with_a_task_factory_of_its_own(factory: Any) -> None:
    """2: "in a task that the flight owns, on the leader's event loop": as that loop makes them."""
    flight = ShardedFlight()

    async def at_once() -> str:
        return "at once"

    async def fails() -> None:
        raise LookupError("at once")

    async def later() -> Any:
        assert asyncio.current_task() is not caller
        await eventually_async(waiting(flight, 2))
        return "later"

    async def endless() -> None:
        await asyncio.get_running_loop().create_future()

    async def main() -> None:
        nonlocal caller
        caller = asyncio.current_task()
        asyncio.get_running_loop().set_task_factory(factory)
        assert await flight.do_async(at_once, "k") == ("at once", False)
        with pytest.raises(LookupError):
            await flight.do_async(fails, "k")
        calls = [asyncio.create_task(flight.do_async(later, "k")) for _ in range(3)]
        assert await asyncio.gather(*calls) == [("later", True)] * 3
        leaving = asyncio.create_task(flight.do_async(endless, "k"))
        await eventually_async(lambda: flight.in_flight() == 1)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        await eventually_async(lambda: flight.in_flight() == 0)
        assert asyncio.current_task() is caller

    caller: asyncio.Task[Any] | None = None
    asyncio.run(main())


def test_one_object_over_one_loop_after_another() -> None:
    """2: "One object may be used from any number of ... `asyncio.run` calls, one after another"."""
    flight = ShardedFlight()

    async def main(n: int) -> None:
        async def work() -> int:
            await eventually_async(waiting(flight, 2))
            return n

        calls = [flight.do_async(work, "k") for _ in range(3)]
        assert await asyncio.gather(*calls) == [(n, True)] * 3
        with pytest.raises(LookupError):
            await flight.do_async(fail, "k")

    async def fail() -> None:
        await asyncio.sleep(0)
        raise LookupError("of one loop")

    for n in range(5):
        asyncio.run(main(n))
        assert flight.do(lambda n=n: -n, "k") == (-n, False)
    assert flight.in_flight() == 0


def test_one_object_over_threads_and_loops_at_once() -> None:
    """2: "... or at once": threads and loops of their own, each joining whatever is running."""
    flight = ShardedFlight(2)
    barrier = threading.Barrier(5)

    async def by_tasks() -> list[Any]:
        async def work() -> int:
            await asyncio.sleep(0)
            return 7

        barrier.wait(PATIENCE)
        calls = [flight.do_async(work, "k", n % 3) for n in range(100)]
        return await asyncio.gather(*calls)

    def by_do() -> list[Any]:
        barrier.wait(PATIENCE)
        return [flight.do(lambda: 7, "k", n % 3) for n in range(100)]

    outcomes = [spawn_loop(by_tasks) for _ in range(3)] + [spawn(by_do) for _ in range(2)]
    for outcome in outcomes:
        assert {value for value, _ in outcome.result(PATIENCE)} == {7}
    stats = flight.stats()
    assert stats.executions + stats.shared == 500
    assert (stats.in_flight, stats.waiting) == (0, 0)


def test_a_thousand_coroutines_follow_one() -> None:
    """Followers receive the leader's value, however many; one execution, a thousand served."""
    flight = ShardedFlight()
    work = Work(value=object())

    async def main() -> list[Any]:
        calls = [asyncio.create_task(flight.do_async(work.awaited, "k")) for _ in range(1001)]
        await eventually_async(waiting(flight, 1000))
        work.go.set()
        return await asyncio.gather(*calls)

    results = asyncio.run(main())
    assert all(value is work.value and shared is True for value, shared in results)
    stats = flight.stats()
    assert (work.runs, stats.executions, stats.shared, stats.waiting) == (1, 1, 1000, 0)


def test_a_function_may_call_the_flight_for_other_keys() -> None:
    """Leading one key does not stop a function from leading or following others."""
    flight = ShardedFlight(1)

    def factorial(n: int) -> int:
        return 1 if n == 0 else n * flight.do(lambda: factorial(n - 1), n - 1)[0]

    assert flight.do(lambda: factorial(20), 20) == (2432902008176640000, False)
    assert flight.stats().executions == 21


async def coroutine_function() -> str:
    return "value"


class CallableCoroutine:
    async def __call__(self) -> str:
        return "value"


COROUTINE_FUNCTIONS: dict[str, Callable[[], Any]] = {
    "function": coroutine_function,
    "lambda": lambda: coroutine_function(),
    "partial": functools.partial(coroutine_function),
    "object": CallableCoroutine(),
}


@pytest.mark.parametrize("function", COROUTINE_FUNCTIONS)
@pytest.mark.parametrize("method", ["do", "do_future"])
def test_a_coroutine_function_is_not_for_do_and_do_future(method: str, function: str) -> None:
    """2: "Passing a coroutine function to `do`/`do_future` ... is a `TypeError` that says which".

    The coroutine it made is closed, not left to complain that nobody awaited it.
    """
    flight = ShardedFlight()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TypeError, match="do_async"):
            if method == "do":
                flight.do(COROUTINE_FUNCTIONS[function], "k")
            else:
                flight.do_future(COROUTINE_FUNCTIONS[function], "k").result(PATIENCE)
    assert flight.in_flight() == 0
    assert flight.do(lambda: "v", "k") == ("v", False)


@pytest.mark.parametrize("method", ["do", "do_future"])
def test_a_follower_with_a_coroutine_function_is_refused_at_once(method: str) -> None:
    """2: as above for a caller that would only have joined: the mistake does not hide."""
    flight = ShardedFlight()
    work = Work(value="v")
    led = spawn(flight.do, work, "k")
    assert work.running.wait(PATIENCE)
    with pytest.raises(TypeError, match="do_async"):
        if method == "do":
            flight.do(coroutine_function, "k", timeout=0)
        else:
            flight.do_future(coroutine_function, "k")
    assert flight.stats().waiting == 0
    work.go.set()
    assert led.result(PATIENCE) == ("v", False)


@pytest.mark.parametrize("value", ["value", None, 0, ()], ids=repr)
def test_a_plain_function_is_not_for_do_async(value: Any) -> None:
    """2: "or a plain function to `do_async`, is a `TypeError` that says which method to use"."""
    flight = ShardedFlight()

    async def main() -> None:
        with pytest.raises(TypeError, match=r"\bdo\b"):
            await flight.do_async(lambda: value, "k")
        assert flight.in_flight() == 0
        assert await flight.do_async(coroutine_function, "k") == ("value", False)

    asyncio.run(main())


@each_follower
def test_a_follower_of_a_coroutine_function_given_to_do_takes_over(follower: str) -> None:
    """The `TypeError` is for the caller who made the mistake: a follower runs its own function."""
    flight = ShardedFlight()
    work, own = Work(value="of the follower"), Work(value="of the follower")
    own.go.set()

    def mistaken() -> Any:
        work()
        return coroutine_function()

    led = spawn(flight.do, mistaken, "k")
    assert work.running.wait(PATIENCE)
    followed = KINDS[follower](flight, own, "k")
    eventually(waiting(flight, 1))
    work.go.set()
    with pytest.raises(TypeError, match="do_async"):
        led.result(PATIENCE)
    assert followed.result(PATIENCE) == ("of the follower", False)
    assert own.runs == 1
    assert flight.in_flight() == 0


@each_follower
def test_a_follower_of_a_plain_function_given_to_do_async_takes_over(follower: str) -> None:
    """As above, for a plain function given to `do_async`: it blocks its loop until it returns."""
    flight = ShardedFlight()
    work, own = Work(value="not an awaitable"), Work(value="of the follower")
    own.go.set()
    led = spawn_loop(lambda: flight.do_async(work, "k"))
    assert work.running.wait(PATIENCE)
    followed = KINDS[follower](flight, own, "k")
    eventually(waiting(flight, 1))
    work.go.set()
    with pytest.raises(TypeError, match=r"\bdo\b"):
        led.result(PATIENCE)
    assert followed.result(PATIENCE) == ("of the follower", False)
    assert flight.in_flight() == 0


@each_leader
def test_in_flight_counts_what_runs(leader: str) -> None:
    """`in_flight()`: executions running now, whoever runs them, and how many follow or not."""
    flight = ShardedFlight(8)
    works = [Work() for _ in range(5)]
    outcomes = [KINDS[leader](flight, work, n) for n, work in enumerate(works)]
    for work in works:
        assert work.running.wait(PATIENCE)
    followed = [flight.do_future(never, n) for n in range(5)]
    stats = flight.stats()
    assert flight.in_flight() == stats.in_flight == sum(stats.per_shard) == 5
    assert len(stats.per_shard) == flight.shards == 8
    for left, (work, outcome) in enumerate(zip(works, outcomes, strict=True), 1):
        work.go.set()
        outcome.result(PATIENCE)
        eventually(lambda left=left: flight.in_flight() == 5 - left)
    for future in followed:
        assert future.result(PATIENCE) == (None, True)
