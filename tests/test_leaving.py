"""Contract, section 5: leaving, by timeout, cancellation, and a future's `cancel`."""

import asyncio
import contextvars
import gc
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from support import PATIENCE, eventually, eventually_async, spawn, spawn_loop
from test_leading import (
    KINDS,
    HeldExecutor,
    Work,
    call_by_task,
    each_follower,
    each_leader,
    never,
    never_async,
    waiting,
)

from shardedflight import FlightError, FlightTimeout, ShardedFlight
from shardedflight.observe import Observer

# --- callers that join, and leave again ---


def leave_by_thread(flight: ShardedFlight, *key: Any) -> None:
    with pytest.raises(FlightTimeout):
        flight.do(never, *key, timeout=0.01)


def leave_by_task(flight: ShardedFlight, *key: Any) -> None:
    async def main() -> None:
        before = flight.stats().waiting
        task = asyncio.create_task(flight.do_async(never_async, *key))
        await eventually_async(waiting(flight, before + 1))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def leave_by_future(flight: ShardedFlight, *key: Any) -> None:
    future = flight.do_future(never, *key)
    assert future.cancel()
    assert future.cancelled()


#: Each joins an execution of the key as a follower, and has left it on return.
LEAVE: dict[str, Callable[..., None]] = {
    "thread": leave_by_thread,
    "task": leave_by_task,
    "future": leave_by_future,
}


class TaskCaller:
    """A call of `do_async` in a task on a loop of its own, that can be cancelled from here."""

    loop: asyncio.AbstractEventLoop
    task: "asyncio.Task[Any]"

    def __init__(self, flight: ShardedFlight, function: Any, *key: Any) -> None:
        self.noise: list[dict[str, Any]] = []

        async def main() -> Any:
            self.loop = asyncio.get_running_loop()
            self.loop.set_exception_handler(lambda loop, context: self.noise.append(context))
            self.task = asyncio.create_task(flight.do_async(function, *key))
            self.started.set()
            try:
                return await self.task
            finally:
                await eventually_async(self.may_end.is_set)

        self.started = threading.Event()
        #: The loop runs on until this is set, so that what the flight owns on it can end.
        self.may_end = threading.Event()
        self.outcome = spawn_loop(main)
        assert self.started.wait(PATIENCE)

    def cancel(self) -> None:
        """Cancels the task and returns when it has ended."""
        self.loop.call_soon_threadsafe(self.task.cancel)
        eventually(lambda: self.task.done())
        assert self.task.cancelled()

    def end(self) -> None:
        self.may_end.set()
        with pytest.raises(asyncio.CancelledError):
            self.outcome.result(PATIENCE)
        assert self.noise == []


class Cancellable:
    """A coroutine function that runs until it is cancelled, and then takes its time to clean up."""

    def __init__(self, then: Callable[[], Any] | None = None) -> None:
        self.running = threading.Event()
        self.cancelled = threading.Event()
        self.may_clean_up = threading.Event()
        self.ended = threading.Event()
        #: Called at once where the cancellation arrives.
        self.at_cancellation: Callable[[], object] = lambda: None
        #: What the coroutine does in the end; None: it lets the cancellation pass.
        self.then = then

    async def __call__(self) -> Any:
        self.running.set()
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            self.at_cancellation()
            self.cancelled.set()
            await eventually_async(self.may_clean_up.is_set)
            if self.then is None:
                raise
            return self.then()
        finally:
            self.ended.set()


# --- timeout ---


@each_leader
@pytest.mark.parametrize("timeout", [0, 0.0, 0.01, 1e-9, 5e-324])
def test_a_follower_that_has_waited_leaves(leader: str, timeout: float) -> None:
    """5: "a follower that has waited `s` seconds leaves with `FlightTimeout` (a `TimeoutError`);
    the execution and everyone else go on"."""
    flight = ShardedFlight()
    work = Work(value="v")
    led = KINDS[leader](flight, work, "k")
    assert work.running.wait(PATIENCE)
    others = [kind(flight, Work(), "k") for kind in KINDS.values()]
    eventually(waiting(flight, 3))
    for count in range(1, 4):
        with pytest.raises(FlightTimeout) as caught:
            flight.do(never, "k", timeout=timeout)
        assert isinstance(caught.value, TimeoutError)
        assert isinstance(caught.value, FlightError)
        stats = flight.stats()
        assert (stats.timeouts, stats.waiting, stats.in_flight) == (count, 3, 1)
    assert not led.done()
    work.go.set()
    assert [outcome.result(PATIENCE) for outcome in [led, *others]] == [("v", True)] * 4
    assert work.runs == 1
    stats = flight.stats()
    assert (stats.shared, stats.waiting, stats.in_flight) == (3, 0, 0)


@pytest.mark.parametrize(
    "timeout",
    [PATIENCE, 10, 1e9, 1e300, float("inf"), threading.TIMEOUT_MAX, 2**63, 10**400, None],
    ids=lambda timeout: repr(timeout)[:20],
)
@each_leader
def test_a_follower_with_time_left_gets_the_value(leader: str, timeout: float | None) -> None:
    """5: "a follower that has waited `s` seconds": not before, however many seconds they are."""
    flight = ShardedFlight()
    work = Work(value="v")
    led = KINDS[leader](flight, work, "k")
    assert work.running.wait(PATIENCE)
    followed = spawn(flight.do, never, "k", timeout=timeout)
    eventually(waiting(flight, 1))
    work.go.set()
    assert followed.result(PATIENCE) == led.result(PATIENCE) == ("v", True)
    assert flight.stats().timeouts == 0


class Quiet(Observer):
    """Watches, and does nothing."""


@pytest.mark.parametrize("timeout", [2**63, 10**400, float("inf")], ids=["2**63", "10**400", "inf"])
def test_any_number_of_seconds_is_a_timeout_for_a_watched_flight_too(timeout: float) -> None:
    """5: "a follower that has waited `s` seconds", however many they are."""
    flight = ShardedFlight()
    flight.add_observer(Quiet())
    assert flight.do(lambda: "v", "k", timeout=timeout) == ("v", False)
    work = Work(value="v")
    led = KINDS["thread"](flight, work, "k")
    assert work.running.wait(PATIENCE)
    followed = spawn(flight.do, never, "k", timeout=timeout)
    eventually(waiting(flight, 1))
    work.go.set()
    assert followed.result(PATIENCE) == led.result(PATIENCE) == ("v", True)


@each_leader
def test_a_follower_leaves_when_its_seconds_have_passed_and_not_before(leader: str) -> None:
    """5: "has waited `s` seconds"."""
    flight = ShardedFlight()
    work = Work(value="v")
    led = KINDS[leader](flight, work, "k")
    assert work.running.wait(PATIENCE)
    for seconds in (0.05, 0.3):
        begun = time.monotonic()
        with pytest.raises(FlightTimeout):
            spawn(flight.do, never, "k", timeout=seconds).result(PATIENCE)
        # No upper bound but that of every test: what would be late is the machine's to say.
        assert time.monotonic() - begun >= seconds
    work.go.set()
    assert led.result(PATIENCE) == ("v", False)


@each_leader
def test_a_follower_with_time_left_gets_the_error(leader: str) -> None:
    """5: a timeout that is not reached changes nothing in the follower's outcome."""
    flight = ShardedFlight()
    work = Work(error=TimeoutError("of the function"))
    led = KINDS[leader](flight, work, "k")
    assert work.running.wait(PATIENCE)
    followed = spawn(flight.do, never, "k", timeout=PATIENCE)
    eventually(waiting(flight, 1))
    work.go.set()
    for outcome in (led, followed):
        error = outcome.exception(PATIENCE)
        assert type(error) is TimeoutError
        assert error.args == ("of the function",)
    assert flight.stats().timeouts == 0


@pytest.mark.parametrize("timeout", [0, 0.001])
def test_a_timeout_does_not_limit_a_leader(timeout: float) -> None:
    """5: "a *follower* that has waited": a leader runs its function as long as that takes."""
    flight = ShardedFlight()
    work = Work(value="v")
    led = spawn(flight.do, work, "k", timeout=timeout)
    assert work.running.wait(PATIENCE)
    with pytest.raises(FlightTimeout):
        flight.do(never, "k", timeout=timeout)
    assert not led.done()
    work.go.set()
    assert led.result(PATIENCE) == ("v", False)
    assert flight.stats().timeouts == 1


@pytest.mark.parametrize("led", [True, False])
@pytest.mark.parametrize(
    "timeout",
    [-1, -0.5, float("nan"), float("-inf"), -(10**400), True, False, "1", b"1", [1], 1j, object()],
    ids=lambda timeout: repr(timeout)[:20],
)
def test_a_timeout_that_is_none_is_refused_by_name(timeout: Any, led: bool) -> None:
    """5: `timeout` is a number of seconds: anything else is refused, leading or following."""
    executor = HeldExecutor()
    flight = ShardedFlight(executor=executor)
    if not led:
        flight.do_future(int, "k")
    with pytest.raises((TypeError, ValueError)) as caught:
        flight.do(never, "k", timeout=timeout)
    assert repr(timeout) in str(caught.value)
    stats = flight.stats()
    assert (stats.in_flight, stats.waiting) == (0 if led else 1, 0)
    executor.run_all()
    assert flight.do(lambda: "v", "k", timeout=1) == ("v", False)


def test_timing_out_against_settling() -> None:
    """5: a follower whose time is up while the execution ends has left, or has been served: one of
    the two, and counted as that. The first to leave has the function end under the others."""
    flight = ShardedFlight()
    left = served = 0
    for _ in range(50):
        work = Work(value="v")
        led = spawn(flight.do, work, "k")
        assert work.running.wait(PATIENCE)
        followers = [
            spawn(flight.do, lambda: "own", "k", timeout=0.001 + n * 0.0002) for n in range(5)
        ]
        for follower in followers:
            follower.add_done_callback(lambda _, work=work: work.go.set())
        for follower in followers:
            error = follower.exception(PATIENCE)
            if error is None:
                # One that came too late to join led an execution of its own.
                served += follower.result() == ("v", True)
            else:
                assert type(error) is FlightTimeout
                left += 1
        assert led.result(PATIENCE)[0] == "v"
    stats = flight.stats()
    assert stats.timeouts == left
    assert stats.executions + stats.shared + stats.timeouts == 50 * 6
    assert stats.shared >= served
    assert (stats.in_flight, stats.waiting) == (0, 0)


# --- everybody leaves for himself: the nine combinations ---


@each_leader
@each_follower
def test_a_follower_that_leaves_harms_nobody(leader: str, follower: str) -> None:
    """5: "... do the same for that caller alone. Cancelling a future from `do_future` leaves the
    flight": each combination of a leader's kind and a leaver's kind."""
    flight = ShardedFlight()
    work = Work(value=object())
    led = KINDS[leader](flight, work, "k")
    assert work.running.wait(PATIENCE)
    others = [kind(flight, Work(), "k") for kind in KINDS.values()]
    eventually(waiting(flight, 3))
    for _ in range(3):
        LEAVE[follower](flight, "k")
        eventually(waiting(flight, 3))
    assert flight.in_flight() == 1
    work.go.set()
    for outcome in [led, *others]:
        assert outcome.result(PATIENCE) == (work.value, True)
    stats = flight.stats()
    assert (work.runs, stats.executions, stats.shared, stats.abandoned) == (1, 1, 3, 0)
    assert (stats.in_flight, stats.waiting) == (0, 0)


@each_leader
@each_follower
def test_a_follower_that_left_does_not_count(leader: str, follower: str) -> None:
    """5 and Words: `shared` counts those whom the outcome reached; after the only follower has
    left the leader is alone, and goes on."""
    flight = ShardedFlight()
    work = Work(value="v")
    led = KINDS[leader](flight, work, "k")
    assert work.running.wait(PATIENCE)
    LEAVE[follower](flight, "k")
    eventually(waiting(flight, 0))
    assert flight.in_flight() == 1
    work.go.set()
    assert led.result(PATIENCE) == ("v", False)
    assert flight.stats().shared == 0


@each_leader
@each_follower
def test_a_follower_may_come_back(leader: str, follower: str) -> None:
    """5: "leaves": the execution is as joinable as before, for the one who left too."""
    flight = ShardedFlight()
    work = Work(value="v")
    led = KINDS[leader](flight, work, "k")
    assert work.running.wait(PATIENCE)
    LEAVE[follower](flight, "k")
    followed = KINDS[follower](flight, Work(), "k")
    eventually(waiting(flight, 1))
    work.go.set()
    assert followed.result(PATIENCE) == led.result(PATIENCE) == ("v", True)
    assert work.runs == 1


@each_leader
def test_asyncio_timeout_leaves(leader: str) -> None:
    """5: "In coroutines, `asyncio.timeout` ... do the same for that caller alone"."""
    flight = ShardedFlight()
    work = Work(value="v")
    led = KINDS[leader](flight, work, "k")
    assert work.running.wait(PATIENCE)

    async def main() -> Any:
        other = asyncio.create_task(flight.do_async(never_async, "k"))
        await eventually_async(waiting(flight, 1))
        task = asyncio.current_task()
        assert task is not None
        for seconds in (0, 0.01):
            with pytest.raises(TimeoutError) as caught:
                async with asyncio.timeout(seconds):
                    await flight.do_async(never_async, "k")
            assert not isinstance(caught.value, FlightTimeout)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(flight.do_async(never_async, "k"), seconds or 0.001)
            assert task.cancelling() == 0
        await eventually_async(waiting(flight, 1))
        async with asyncio.timeout(PATIENCE):
            work.go.set()
            return await other

    assert asyncio.run(main()) == ("v", True)
    assert led.result(PATIENCE) == ("v", True)
    assert flight.stats().timeouts == 0


@each_leader
@pytest.mark.parametrize("abruptly", [False, True])
def test_a_loop_that_ends_takes_its_followers_along(leader: str, abruptly: bool) -> None:
    """5: as a loop ends, `asyncio.run` cancels what is left on it; a loop that is just closed does
    not even do that. The execution and everyone else go on."""
    flight = ShardedFlight()
    work = Work(value="v")
    led = KINDS[leader](flight, work, "k")
    assert work.running.wait(PATIENCE)
    others = [kind(flight, Work(), "k") for kind in KINDS.values()]
    eventually(waiting(flight, 3))

    async def main() -> None:
        tasks.append(asyncio.create_task(flight.do_async(never_async, "k")))
        await eventually_async(waiting(flight, 4))

    tasks: list[asyncio.Task[Any]] = []
    if abruptly:
        loop = asyncio.new_event_loop()
        # The task, which will never end, complains to it when it is dropped.
        loop.set_exception_handler(lambda loop, context: None)
        loop.run_until_complete(main())
        loop.close()
    else:
        asyncio.run(main())
        assert tasks[0].cancelled()
        assert waiting(flight, 3)()
    late = flight.do_future(never, "k")
    work.go.set()
    for outcome in [led, *others, late]:
        assert outcome.result(PATIENCE) == ("v", True)
    eventually(waiting(flight, 0))
    assert flight.in_flight() == 0


# --- the leader's caller leaves ---


@each_follower
@pytest.mark.parametrize("followers", [1, 3])
@pytest.mark.parametrize("on_abandon", ["cancel", "finish"])
def test_the_leaders_caller_leaves_and_the_execution_goes_on(
    follower: str, followers: int, on_abandon: Any
) -> None:
    """5: cancellation is for "that caller alone": the task is the flight's own, and runs on for
    its followers. They are as many as wait for it: one alone shares with nobody."""
    flight = ShardedFlight(on_abandon=on_abandon)
    work = Work(value="v")
    caller = TaskCaller(flight, work.awaited, "k")
    assert work.running.wait(PATIENCE)
    followed = [KINDS[follower](flight, Work(), "k") for _ in range(followers)]
    eventually(waiting(flight, followers))
    caller.cancel()
    assert flight.in_flight() == 1
    late = KINDS[follower](flight, Work(), "k")
    eventually(waiting(flight, followers + 1))
    LEAVE[follower](flight, "k")
    work.go.set()
    for outcome in [*followed, late]:
        assert outcome.result(PATIENCE) == ("v", True)
    assert work.runs == 1
    stats = flight.stats()
    assert (stats.executions, stats.promotions, stats.abandoned) == (1, 0, 0)
    assert (stats.in_flight, stats.waiting) == (0, 0)
    caller.end()


@each_follower
def test_one_follower_left_alone_does_not_share(follower: str) -> None:
    """5 and Words: as above, the one follower is the only one whom the outcome reaches."""
    flight = ShardedFlight()
    work = Work(value="v")
    caller = TaskCaller(flight, work.awaited, "k")
    assert work.running.wait(PATIENCE)
    followed = KINDS[follower](flight, Work(), "k")
    eventually(waiting(flight, 1))
    caller.cancel()
    work.go.set()
    assert followed.result(PATIENCE) == ("v", False)
    caller.end()


@each_follower
def test_an_error_after_the_leaders_caller_has_left(follower: str) -> None:
    """5 and 3: the followers get the error; nobody is left to complain that it was not seen."""
    flight = ShardedFlight()
    work = Work(error=LookupError("late"))
    caller = TaskCaller(flight, work.awaited, "k")
    assert work.running.wait(PATIENCE)
    followed = KINDS[follower](flight, Work(), "k")
    eventually(waiting(flight, 1))
    caller.cancel()
    work.go.set()
    with pytest.raises(LookupError, match="late"):
        followed.result(PATIENCE)
    assert flight.in_flight() == 0
    caller.end()


# --- the last caller leaves an execution run by a task ---


def join_to_leave_last(last: str, flight: ShardedFlight, *key: Any) -> Callable[[], object]:
    """Joins as a follower of this kind; the function returned leaves."""
    if last == "thread":
        # Long enough to outstay the leader on any but the slowest machine; there it leaves first.
        leaving = spawn(flight.do, never, *key, timeout=0.2)
        eventually(lambda: waiting(flight, 1)() or leaving.done())
        return lambda: leaving.exception(PATIENCE)
    if last == "task":
        follower = TaskCaller(flight, never_async, *key)
        eventually(waiting(flight, 1))

        def leave() -> None:
            follower.cancel()
            follower.end()

        return leave
    if last == "future":
        return flight.do_future(never, *key).cancel
    return lambda: None


@pytest.mark.parametrize("last", ["leader", *LEAVE])
def test_the_last_caller_to_leave_unlinks_then_cancels(last: str) -> None:
    """5: "When the last caller of an execution run by a task has left, `on_abandon="cancel"` first
    unlinks the key, so that nobody joins a dying execution, then cancels it".

    Whoever is last, from whichever thread. When the cancellation arrives there is nothing left to
    forget.
    """
    flight = ShardedFlight()
    dying = Cancellable()
    forgotten: list[int] = []

    def forget() -> None:
        flight.forget("k")
        forgotten.append(flight.stats().forgotten)

    dying.at_cancellation = forget
    caller = TaskCaller(flight, dying, "k")
    assert dying.running.wait(PATIENCE)
    leave = join_to_leave_last(last, flight, "k")
    assert not dying.cancelled.is_set()
    caller.cancel()
    leave()
    assert dying.cancelled.wait(PATIENCE)
    assert forgotten == [0]
    assert flight.do(lambda: "fresh", "k") == ("fresh", False)
    assert flight.stats().abandoned == 1
    dying.may_clean_up.set()
    assert dying.ended.wait(PATIENCE)
    eventually(lambda: flight.in_flight() == 0)
    caller.end()


@each_follower
@pytest.mark.parametrize(
    "then", [None, lambda: "late value", lambda: 1 / 0], ids=["cancelled", "value", "error"]
)
def test_a_late_end_never_touches_a_newer_execution(
    follower: str, then: Callable[[], Any] | None
) -> None:
    """5: "A late end of an old execution never removes or settles a newer one."

    A caller that starts while the dying execution cleans up runs a function of its own; the old
    one's end, whatever it is, is not its end, and does not hide it from those who come later.
    """
    flight = ShardedFlight()
    dying = Cancellable(then)
    caller = TaskCaller(flight, dying, "k")
    assert dying.running.wait(PATIENCE)
    caller.cancel()
    assert dying.cancelled.wait(PATIENCE)

    fresh = Work(value="fresh")
    led = KINDS[follower](flight, fresh, "k")
    assert fresh.running.wait(PATIENCE)
    early = flight.do_future(never, "k")
    dying.may_clean_up.set()
    assert dying.ended.wait(PATIENCE)
    eventually(lambda: flight.in_flight() == 1)
    late = flight.do_future(never, "k")
    eventually(waiting(flight, 2))
    assert not led.done()
    assert not early.done()
    fresh.go.set()
    for outcome in (led, early, late):
        assert outcome.result(PATIENCE) == ("fresh", True)
    assert flight.in_flight() == 0
    assert flight.stats().abandoned == 1
    caller.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        caller.outcome.result(PATIENCE)


def test_a_dying_execution_may_call_for_its_own_key() -> None:
    """5: "first unlinks the key": the clean-up itself starts a new execution, not a deadlock."""
    flight = ShardedFlight()
    answers: list[Any] = []

    async def work() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            answers.append(await flight.do_async(clean_up, "k"))

    async def clean_up() -> str:
        await asyncio.sleep(0)
        return "cleaned up"

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await flight.do_async(work, "k")
        await eventually_async(lambda: flight.in_flight() == 0)

    asyncio.run(main())
    assert answers == [("cleaned up", False)]


def test_a_new_caller_on_the_dying_executions_loop() -> None:
    """5: "so that nobody joins a dying execution": the next task on the same loop, at once."""
    flight = ShardedFlight()
    dying = Cancellable()

    async def fresh() -> str:
        await asyncio.sleep(0)
        return "fresh"

    async def main() -> None:
        leader = asyncio.create_task(flight.do_async(dying, "k"))
        await eventually_async(dying.running.is_set)
        leader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leader
        assert await flight.do_async(fresh, "k") == ("fresh", False)
        dying.may_clean_up.set()
        await eventually_async(lambda: flight.in_flight() == 0)

    asyncio.run(main())


def test_a_follower_that_joins_before_the_cancelled_leader_has_left() -> None:
    """5: "When the last caller ... has left": a follower that came first keeps it alive."""
    flight = ShardedFlight()

    async def main() -> None:
        gate = asyncio.Event()

        async def work() -> str:
            await gate.wait()
            return "v"

        leader = asyncio.create_task(flight.do_async(work, "k"))
        await eventually_async(lambda: flight.in_flight() == 1)
        follower = asyncio.create_task(flight.do_async(never_async, "k"))
        leader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leader
        assert waiting(flight, 1)()
        gate.set()
        assert await follower == ("v", False)

    asyncio.run(main())
    assert flight.stats().abandoned == 0


@pytest.mark.parametrize("trips", [0, 1, 2, 3])
def test_a_leader_cancelled_early(trips: int) -> None:
    """5: "When the last caller ... has left": also before its function has taken a step."""
    flight = ShardedFlight()

    async def work() -> None:
        await asyncio.get_running_loop().create_future()

    async def main() -> None:
        leader = asyncio.create_task(flight.do_async(work, "k"))
        for _ in range(trips):
            await asyncio.sleep(0)
        leader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leader
        await eventually_async(lambda: flight.in_flight() == 0)
        assert flight.do(lambda: "next", "k") == ("next", False)

    asyncio.run(main())
    assert flight.stats().waiting == 0


def test_nobody_is_told_of_an_abandoned_executions_cancellation() -> None:
    """5: "then cancels it": the loop's exception handler hears nothing of it."""
    flight = ShardedFlight()
    noise: list[dict[str, Any]] = []

    async def work() -> None:
        await asyncio.get_running_loop().create_future()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: noise.append(context))
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await flight.do_async(work, "k")
            await eventually_async(lambda: flight.in_flight() == 0)

    asyncio.run(main())
    assert noise == []
    assert flight.stats().abandoned == 3


def test_all_callers_of_all_kinds_leave_at_once() -> None:
    """5: "When the last caller ... has left": many leaving together abandon it exactly once."""
    for _ in range(10):
        flight = ShardedFlight()
        dying = Cancellable()
        dying.may_clean_up.set()
        caller = TaskCaller(flight, dying, "k")
        assert dying.running.wait(PATIENCE)
        futures = [flight.do_future(never, "k") for _ in range(4)]
        barrier = threading.Barrier(5)

        def leave(future: "Future[Any]", barrier: threading.Barrier = barrier) -> bool:
            barrier.wait(PATIENCE)
            return future.cancel()

        leavers = [spawn(leave, future) for future in futures]
        barrier.wait(PATIENCE)
        caller.cancel()
        assert all(leaver.result(PATIENCE) for leaver in leavers)
        assert dying.ended.wait(PATIENCE)
        eventually(lambda flight=flight: flight.in_flight() == 0)
        stats = flight.stats()
        assert (stats.abandoned, stats.waiting, stats.executions) == (1, 0, 1)
        caller.end()


def test_joining_against_abandoning() -> None:
    """5: a caller that comes while the last one leaves either joins a living execution or runs its
    own function; it never gets the dying one's end."""
    flight = ShardedFlight()
    own = led = 0
    for _ in range(100):
        gate = threading.Event()
        barrier = threading.Barrier(2)
        running = threading.Event()

        async def work(gate: threading.Event = gate, running: threading.Event = running) -> str:
            running.set()
            await eventually_async(gate.is_set)
            return "leader's"

        def join(barrier: threading.Barrier = barrier) -> Any:
            barrier.wait(PATIENCE)
            return flight.do(lambda: "own", "k")

        async def main(
            running: threading.Event = running,
            barrier: threading.Barrier = barrier,
            gate: threading.Event = gate,
            work: Any = work,
            join: Any = join,
        ) -> Any:
            leader = asyncio.create_task(flight.do_async(work, "k"))
            await eventually_async(running.is_set)
            joiner = spawn(join)
            barrier.wait(PATIENCE)
            leader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leader
            await eventually_async(lambda: joiner.done() or flight.stats().waiting == 1)
            gate.set()
            await eventually_async(joiner.done)
            await eventually_async(lambda: flight.in_flight() == 0)
            return joiner.result()

        value, shared = asyncio.run(main())
        assert shared is False
        assert value in ("own", "leader's")
        own += value == "own"
        led += value == "leader's"
    assert own + led == 100
    assert flight.stats().abandoned == own


# --- on_abandon="finish" ---


@pytest.mark.parametrize("last", ["leader", *LEAVE])
def test_finish_lets_an_abandoned_execution_run_to_its_end(last: str) -> None:
    """5: "`"finish"` lets it run to its end", and whoever comes meanwhile joins it."""
    flight = ShardedFlight(on_abandon="finish")
    work = Work(value="v")
    caller = TaskCaller(flight, work.awaited, "k")
    assert work.running.wait(PATIENCE)
    leave = join_to_leave_last(last, flight, "k")
    caller.cancel()
    leave()
    assert flight.stats().waiting == 0
    assert flight.in_flight() == 1
    late = flight.do_future(never, "k")
    work.go.set()
    assert late.result(PATIENCE) == ("v", False)
    assert flight.in_flight() == 0
    assert flight.do(lambda: "next", "k") == ("next", False)
    caller.end()


@pytest.mark.parametrize("error", [None, LookupError("nobody's")], ids=["value", "error"])
def test_finish_with_nobody_left(error: Exception | None) -> None:
    """5: as above, its end reaching nobody: the key is free again, nothing is reported."""
    flight = ShardedFlight(on_abandon="finish")
    work = Work(error=error)
    caller = TaskCaller(flight, work.awaited, "k")
    assert work.running.wait(PATIENCE)
    caller.cancel()
    assert flight.in_flight() == 1
    work.go.set()
    eventually(lambda: flight.in_flight() == 0)
    assert flight.do(lambda: "next", "k") == ("next", False)
    assert flight.stats().executions == 2
    caller.end()


class Held(BaseException):
    """A value, or an end, that nobody takes."""


@pytest.mark.parametrize("method", ["do_async", "do_many_async"])
@pytest.mark.parametrize("fails", [False, True], ids=["value", "lost"])
def test_a_context_that_outlives_an_execution_keeps_no_outcome(method: str, fails: bool) -> None:
    """Free-threaded, threads inherit the context in which they are started; a pool's stay."""
    flight = ShardedFlight(on_abandon="finish")
    contexts: list[contextvars.Context] = []
    outcomes: list[weakref.ref[Held]] = []

    async def main() -> None:
        running, go = asyncio.Event(), asyncio.Event()

        async def work(*_: Any) -> Any:
            contexts.append(contextvars.copy_context())
            running.set()
            await go.wait()
            held = Held()
            outcomes.append(weakref.ref(held))
            if fails:
                raise held
            return held if method == "do_async" else {"k": held}

        key: Any = "k" if method == "do_async" else ["k"]
        caller = asyncio.create_task(getattr(flight, method)(work, key))
        await running.wait()
        caller.cancel()
        await asyncio.wait([caller])
        go.set()
        await eventually_async(lambda: flight.in_flight() == 0 and len(asyncio.all_tasks()) == 1)

    asyncio.run(main())
    gc.collect()
    assert len(contexts) == 1
    assert [outcome() for outcome in outcomes] == [None]


# --- futures ---


@each_leader
def test_cancelling_a_followers_future(leader: str) -> None:
    """5: "Cancelling a future from `do_future` leaves the flight": as for any waiting future."""
    flight = ShardedFlight()
    work = Work(value="v")
    led = KINDS[leader](flight, work, "k")
    assert work.running.wait(PATIENCE)
    first, second, third = (flight.do_future(never, "k") for _ in range(3))
    called: list[Future[Any]] = []
    second.add_done_callback(called.append)
    assert not second.running()
    assert second.cancel()
    assert second.cancel()
    assert second.cancelled()
    assert second.done()
    assert called == [second]
    assert flight.stats().waiting == 2
    work.go.set()
    for future in (led, first, third):
        assert future.result(PATIENCE) == ("v", True)
        assert not future.cancel()
        assert not future.cancelled()
    assert called == [second]


def test_a_future_that_is_settled_cannot_be_cancelled() -> None:
    """5: "Cancelling a future": too late when it has its result, as for any future."""
    flight = ShardedFlight()
    future = flight.do_future(lambda: "v", "k")
    assert future.result(PATIENCE) == ("v", False)
    assert not future.cancel()
    assert future.result() == ("v", False)


def test_cancelling_a_leaders_future_before_its_start() -> None:
    """5: "leaves the flight": nobody else wants it, so its function does not run."""
    executor = HeldExecutor()
    flight = ShardedFlight(executor=executor)
    future = flight.do_future(never, "k")
    assert future.cancel()
    assert future.cancelled()
    executor.run_all()
    assert future.cancelled()
    assert flight.in_flight() == 0
    assert flight.do(lambda: "next", "k") == ("next", False)


def test_a_new_caller_after_a_leader_that_never_started() -> None:
    """5: "no key is ever stuck": the next caller need not wait for the executor to come round."""
    executor = HeldExecutor()
    flight = ShardedFlight(executor=executor)
    future = flight.do_future(lambda: "first", "k")
    assert future.cancel()
    assert flight.do(lambda: "next", "k") == ("next", False)
    executor.run_all()
    assert flight.in_flight() == 0


@each_follower
def test_followers_of_a_leader_cancelled_before_its_start(follower: str) -> None:
    """5: "leaves the flight", alone: its followers get a value, by its function or their own."""
    executor = HeldExecutor()
    flight = ShardedFlight(executor=executor)
    future = flight.do_future(lambda: "v", "k")
    works = [Work(value="v") for _ in range(3)]
    for work in works:
        work.go.set()
    followed = [KINDS[follower](flight, work, "k") for work in works]
    eventually(waiting(flight, 3))
    assert future.cancel()
    eventually(lambda: bool(executor.held) or all(outcome.done() for outcome in followed))
    while not all(outcome.done() for outcome in followed):
        executor.run_all()
    for outcome in followed:
        assert outcome.result(PATIENCE)[0] == "v"
    executor.run_all()
    assert future.cancelled()
    assert (flight.in_flight(), flight.stats().waiting) == (0, 0)


@pytest.mark.parametrize("follower", [None, *KINDS])
def test_cancelling_a_leaders_future_while_it_runs(follower: str | None) -> None:
    """5: "leaves the flight" or, like any running future, is not cancelled: `cancel` tells which.

    Either way the execution, which is a thread's, goes on and serves the others.
    """
    flight = ShardedFlight()
    work = Work(value="v")
    future = flight.do_future(work, "k")
    assert work.running.wait(PATIENCE)
    followed = [] if follower is None else [KINDS[follower](flight, Work(), "k") for _ in range(2)]
    eventually(waiting(flight, len(followed)))
    cancelled = future.cancel()
    assert future.cancelled() is cancelled
    assert flight.in_flight() == 1
    work.go.set()
    for outcome in followed:
        assert outcome.result(PATIENCE) == ("v", True)
    eventually(lambda: flight.in_flight() == 0)
    assert future.cancelled() is cancelled
    if not cancelled:
        assert future.result(PATIENCE) == ("v", bool(followed))
    assert work.runs == 1
    assert flight.do(lambda: "next", "k") == ("next", False)


def test_a_cancelled_future_does_not_disturb_who_settles_it() -> None:
    """5: "leaves the flight": the leader and the callers behind it do not stumble over it."""
    flight = ShardedFlight()
    work = Work(value="v")
    led = spawn(flight.do, work, "k")
    assert work.running.wait(PATIENCE)
    futures = [flight.do_future(never, "k") for _ in range(10)]
    for future in futures[::2]:
        assert future.cancel()
    # As an executor's future that somebody else marked as taken up.
    assert futures[1].set_running_or_notify_cancel()
    work.go.set()
    assert led.result(PATIENCE) == ("v", True)
    for future in futures[1::2]:
        assert future.result(PATIENCE) == ("v", True)
    for future in futures[::2]:
        assert future.cancelled()


def test_a_future_that_is_cancelled_while_the_others_are_told() -> None:
    """5: "leaves the flight": one that goes at the very end disturbs nobody either."""
    flight = ShardedFlight()
    work = Work(value="v")
    led = spawn(flight.do, work, "k")
    assert work.running.wait(PATIENCE)
    futures = [flight.do_future(never, "k") for _ in range(4)]
    cancelled: list[bool] = []
    futures[0].add_done_callback(lambda _: cancelled.append(futures[2].cancel()))
    work.go.set()
    assert led.result(PATIENCE) == ("v", True)
    assert cancelled == [futures[2].cancelled()]
    for future in futures:
        if not future.cancelled():
            assert future.result(PATIENCE) == ("v", True)
    assert not any(future.cancelled() for future in (futures[0], futures[1], futures[3]))
    assert (flight.in_flight(), flight.stats().waiting) == (0, 0)


def test_a_callback_that_fails_does_not_disturb_who_settles_it() -> None:
    """5 and 2: what a follower hangs on its future is its own business."""
    flight = ShardedFlight()
    work = Work(value="v")
    led = spawn(flight.do, work, "k")
    assert work.running.wait(PATIENCE)
    called: list[Any] = []

    def callback(future: "Future[Any]") -> None:
        called.append(flight.do(lambda: "next", "k"))
        raise LookupError("of a callback")

    futures = [flight.do_future(never, "k") for _ in range(3)]
    for future in futures:
        future.add_done_callback(callback)
    work.go.set()
    assert led.result(PATIENCE) == ("v", True)
    assert [future.result(PATIENCE) for future in futures] == [("v", True)] * 3
    eventually(lambda: called == [("next", False)] * 3)


def test_cancelling_through_asyncio() -> None:
    """5: "Cancelling a future from `do_future` leaves the flight": by `asyncio.wrap_future` too."""
    with ThreadPoolExecutor(1) as pool:
        flight = ShardedFlight(executor=pool)
        work = Work(value="v")
        led = flight.do_future(work, "k")
        assert work.running.wait(PATIENCE)

        async def main() -> Any:
            future = flight.do_future(never, "k")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await asyncio.wrap_future(future)
            assert future.cancelled()
            assert flight.stats().waiting == 0
            other = asyncio.wrap_future(flight.do_future(never, "k"))
            work.go.set()
            return await other

        assert asyncio.run(main()) == ("v", True)
        assert led.result(PATIENCE) == ("v", True)


def test_cancelling_against_settling() -> None:
    """5: a future cancelled while its execution ends is one of the two, for good, and no more."""
    flight = ShardedFlight()
    for _ in range(100):
        work = Work(value="v")
        led = spawn(flight.do, work, "k")
        assert work.running.wait(PATIENCE)
        futures = [flight.do_future(never, "k") for _ in range(5)]
        barrier = threading.Barrier(2)

        def cancel(
            futures: "list[Future[Any]]" = futures, barrier: threading.Barrier = barrier
        ) -> list[bool]:
            barrier.wait(PATIENCE)
            return [future.cancel() for future in futures]

        cancelling = spawn(cancel)
        barrier.wait(PATIENCE)
        work.go.set()
        for future, cancelled in zip(futures, cancelling.result(PATIENCE), strict=True):
            if cancelled:
                assert future.cancelled()
            else:
                assert future.result(PATIENCE) == ("v", True)
        # Who cancels between the end and being told of it has been counted.
        value, shared = led.result(PATIENCE)
        assert value == "v"
        assert shared or all(future.cancelled() for future in futures)
    assert (flight.in_flight(), flight.stats().waiting) == (0, 0)


# --- a forgotten execution is left as any other ---


def test_leaving_a_forgotten_execution() -> None:
    """5 and 6: the last caller leaves an execution that was forgotten: it is cancelled, and the
    newer one is not touched."""
    flight = ShardedFlight()
    dying = Cancellable()
    caller = TaskCaller(flight, dying, "k")
    assert dying.running.wait(PATIENCE)
    flight.forget("k")
    fresh = Work(value="fresh")
    led = call_by_task(flight, fresh, "k")
    assert fresh.running.wait(PATIENCE)
    caller.cancel()
    assert dying.cancelled.wait(PATIENCE)
    followed = flight.do_future(never, "k")
    dying.may_clean_up.set()
    assert dying.ended.wait(PATIENCE)
    eventually(lambda: flight.in_flight() == 1)
    assert not led.done()
    fresh.go.set()
    assert led.result(PATIENCE) == followed.result(PATIENCE) == ("fresh", True)
    assert flight.stats().abandoned == 1
    caller.end()
