"""Waits that begin, end or are told of at an unlucky moment: sections 4, 5 and 7 of the contract.

All were found by reading, and each order is forced: without its mend the test hangs or fails.
"""

import asyncio
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any

import pytest
from support import PATIENCE, eventually, spawn, spawn_loop

from shardedflight import DeadlockError, ShardedFlight, _deadlock, _flight, _many


class Lost(BaseException):
    """Loses the leader."""


class Interrupted(Exception):
    """As a signal handler may raise it."""


class Held:
    """A function that runs until its gate is opened."""

    def __init__(self, end: Any = "value") -> None:
        self.end = end
        self.gate = threading.Event()
        self.started = threading.Event()

    def __call__(self) -> Any:
        self.started.set()
        assert self.gate.wait(PATIENCE)
        if isinstance(self.end, BaseException):
            raise self.end
        return self.end


def lead(flight: ShardedFlight, key: str, end: Any = "value") -> tuple[Held, "Future[Any]"]:
    held = Held(end)
    caller = spawn(flight.do, held, key)
    assert held.started.wait(PATIENCE)
    return held, caller


def waiting(flight: ShardedFlight, count: int) -> None:
    eventually(lambda: flight.stats().waiting == count, f"{count} waiting")


def assert_clean(flight: ShardedFlight) -> None:
    eventually(lambda: flight.in_flight() == 0, "nothing in flight")
    eventually(lambda: flight.stats().waiting == 0, "nobody waiting")
    assert not any(_deadlock._blocked)
    assert not _deadlock._held_up


def never() -> Any:
    raise AssertionError("this function must not run")


async def never_async() -> Any:
    raise AssertionError("this function must not run")


# -- who is to take over can not, for it runs a function of its own --------------------------------


def test_an_heir_that_runs_a_function_gives_way_to_one_that_sleeps() -> None:
    """4: `do_many` has joined x and runs its function for k, which follows x: it takes over."""
    flight = ShardedFlight()
    lost, caller = lead(flight, "x", Lost())

    def function(keys: Sequence[str]) -> dict[str, Any]:
        assert list(keys) == ["k"]
        inner = spawn(lost_when_two_wait)
        answer = flight.do(lambda: "own", "x")
        inner.result(PATIENCE)
        return dict.fromkeys(keys, answer)

    def lost_when_two_wait() -> None:
        waiting(flight, 2)
        eventually(lambda: any(_deadlock._blocked))
        lost.gate.set()

    many = spawn(flight.do_many, function, ["k", "x"])
    assert many.result(PATIENCE) == {"k": (("own", True), False), "x": ("own", True)}
    assert isinstance(caller.exception(PATIENCE), Lost)
    assert_clean(flight)


def test_the_key_that_a_running_function_has_to_take_over_is_a_deadlock_inside_of_it() -> None:
    """7: x is lost to the `do_many` whose function then asks for x."""
    flight = ShardedFlight()
    lost, caller = lead(flight, "x", Lost())

    def function(keys: Sequence[str]) -> dict[str, Any]:
        if list(keys) == ["x"]:  # taken over, when its function for k has failed
            return {"x": "many's"}
        lost.gate.set()
        assert isinstance(caller.exception(PATIENCE), Lost)
        return dict.fromkeys(keys, flight.do(never, "x"))

    error = spawn(flight.do_many, function, ["k", "x"]).exception(PATIENCE)
    assert isinstance(error, DeadlockError)
    assert error.keys == ("x", "k", "x")
    assert flight.stats().deadlocks == 1
    assert_clean(flight)


def test_an_heir_that_runs_a_function_which_waits_for_another_follower() -> None:
    """4 and 7: its function waits for z, whose function follows x: that one takes x over."""
    flight = ShardedFlight()
    lost, caller = lead(flight, "x", Lost())
    thread: list[Future[Any]] = []

    def function(keys: Sequence[str]) -> dict[str, Any]:
        thread.append(spawn(flight.do, lambda: flight.do(lambda: "other's", "x")[0], "z"))
        waiting(flight, 2)
        thread.append(spawn(lost_when_all_wait))
        return dict.fromkeys(keys, flight.do(never, "z")[0])

    def lost_when_all_wait() -> None:
        waiting(flight, 3)
        lost.gate.set()

    many = spawn(flight.do_many, function, ["k", "x"])
    assert many.result(PATIENCE) == {"k": ("other's", False), "x": ("other's", True)}
    assert isinstance(caller.exception(PATIENCE), Lost)
    wait(thread, PATIENCE)
    assert_clean(flight)


# -- who is to take over is exchanged, for its event loop is blocked -------------------------------


@pytest.fixture
def loops() -> Iterator[list[asyncio.AbstractEventLoop]]:
    """Two event loops that run, each on a thread of its own."""
    both = [asyncio.new_event_loop() for _ in range(2)]
    threads = [spawn(loop.run_forever) for loop in both]
    yield both
    for loop in both:
        loop.call_soon_threadsafe(loop.stop)
    wait(threads, PATIENCE)
    for loop in both:
        loop.close()


def follow_on(
    loops: Sequence[asyncio.AbstractEventLoop],
    flight: ShardedFlight,
    own: Callable[[], Coroutine[Any, Any, Any]],
) -> "list[Future[Any]]":
    """A coroutine on each loop follows x, in this order; then y blocks the first loop's thread."""
    heirs: list[Future[Any]] = []
    for count, loop in enumerate(loops, 1):
        heirs.append(asyncio.run_coroutine_threadsafe(flight.do_async(own, "x"), loop))
        waiting(flight, count)
    loops[0].call_soon_threadsafe(flight.do, never, "y")
    waiting(flight, len(loops) + 1)
    return heirs


def asked(monkeypatch: pytest.MonkeyPatch, then: dict[int, Callable[[], None]]) -> list[bool]:
    """What `held_up` has answered; `then` is done before its so-manieth answer is used."""
    answers: list[bool] = []
    real = _flight.held_up

    def held_up(waiter: Any) -> bool:
        answers.append(real(waiter))
        then.get(len(answers), lambda: None)()
        return answers[-1]

    monkeypatch.setattr(_flight, "held_up", held_up)
    return answers


def test_who_is_exchanged_is_asked_again(
    loops: list[asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """4: the loop of the second choice is blocked, for the key, before that is the leader."""
    flight = ShardedFlight()
    lost, caller = lead(flight, "x", Lost())
    slow, other = lead(flight, "y")

    async def own() -> str:
        return "a coroutine's"

    heirs = follow_on(loops, flight, own)
    blocking: Future[Any] = Future()

    def block() -> None:
        blocking.set_result(flight.do(lambda: "a thread's", "x"))

    def block_the_second() -> None:
        loops[1].call_soon_threadsafe(block)
        eventually(lambda: len(_deadlock._held_up) == 2, "both loops blocked")
        # The heir is not counted: the other coroutine, y's follower, and that thread.
        waiting(flight, 3)

    answers = asked(monkeypatch, {2: block_the_second})
    lost.gate.set()
    assert blocking.result(PATIENCE) == ("a thread's", True)
    assert answers[:2] == [True, False]
    slow.gate.set()
    assert [heir.result(PATIENCE) for heir in heirs] == [("a thread's", True)] * 2
    assert other.result(PATIENCE) == ("value", True)
    assert isinstance(caller.exception(PATIENCE), Lost)
    assert_clean(flight)


def test_who_leaves_while_it_is_exchanged_has_left(
    loops: list[asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """5: it finds itself chosen, is exchanged, and then is one of those who wait once more."""
    flight = ShardedFlight()
    lost, caller = lead(flight, "x", Lost())
    slow, other = lead(flight, "y")
    end = asyncio.Event()

    async def own() -> None:
        await end.wait()

    heirs = follow_on(loops, flight, own)
    chosen, exchanged = threading.Event(), threading.Event()
    real = ShardedFlight._leave

    def leave(self: ShardedFlight, shard: Any, record: Any, waiter: Any) -> bool:
        left = real(self, shard, record, waiter)
        if isinstance(waiter, asyncio.Future) and not left and not chosen.is_set():
            chosen.set()
            assert exchanged.wait(PATIENCE)
        return left

    def cancel_the_first() -> None:
        slow.gate.set()  # its loop goes on
        heirs[0].cancel()
        assert chosen.wait(PATIENCE)

    monkeypatch.setattr(ShardedFlight, "_leave", leave)
    asked(monkeypatch, {2: cancel_the_first, 3: exchanged.set})
    lost.gate.set()
    assert isinstance(caller.exception(PATIENCE), Lost)
    assert other.result(PATIENCE) == ("value", True)
    waiting(flight, 0)
    eventually(lambda: flight.stats().promotions == 1)
    heirs[1].cancel()
    eventually(lambda: flight.stats().abandoned == 1, "abandoned with its last caller")
    assert_clean(flight)


# -- a future's own wait ---------------------------------------------------------------------------


def test_a_callback_of_a_future_that_is_done_may_wait_for_who_waited_for_it() -> None:
    """7: no false alarm: the future's function has returned, and needs nothing."""
    flight = ShardedFlight()
    held = Held("inner")
    follower: Future[Any] = Future()
    follows = threading.Event()

    def follow(_: "Future[Any]") -> None:
        try:
            follower.set_result(flight.do(never, "k"))
        except BaseException as error:
            follower.set_exception(error)

    def function() -> Any:
        future = flight.do_future(held, "inner")
        future.add_done_callback(follow)
        spawn(let_go)
        answer = future.result(PATIENCE)
        assert follows.wait(PATIENCE)
        return answer

    def let_go() -> None:
        eventually(lambda: any(_deadlock._blocked), "the leader waits for the future")
        held.gate.set()

    leader = spawn(flight.do, function, "k")
    eventually(lambda: follower.done() or flight.stats().waiting == 1)
    follows.set()
    assert follower.result(PATIENCE) == (("inner", False), True)
    assert leader.result(PATIENCE) == (("inner", False), True)
    assert flight.stats().deadlocks == 0
    assert_clean(flight)


def test_a_future_that_ends_while_its_cycle_is_named_has_its_outcome(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """7: the cycle comes undone, for the wait of the future's function times out."""
    flight = ShardedFlight()
    futures: list[Future[Any]] = []
    real = _deadlock._find_cycle
    started = threading.Event()

    def find_cycle(*args: Any) -> Any:
        cycle = real(*args)
        if cycle is not None and not futures[0].done():
            wait(futures, PATIENCE)
        return cycle

    def function() -> Any:
        started.set()
        return flight.do(never, "k", timeout=0.5)

    def outer() -> Any:
        futures.append(flight.do_future(function, "z"))
        assert started.wait(PATIENCE)
        waiting(flight, 1)
        return futures[0].exception(PATIENCE)

    monkeypatch.setattr(_deadlock, "_find_cycle", find_cycle)
    error, _ = spawn(flight.do, outer, "k").result(PATIENCE)
    assert isinstance(error, TimeoutError)
    assert flight.stats().deadlocks == 0
    assert_clean(flight)


# -- children that are told later ------------------------------------------------------------------


class Unprintable:
    """A key."""

    def __repr__(self) -> str:
        assert not _deadlock._lock._is_owned()  # type: ignore[attr-defined]
        raise LookupError("no repr")


def test_a_key_whose_repr_fails_is_named_all_the_same() -> None:
    """7: "naming the keys": it is asked for its `repr` under no lock, and may raise."""
    key = Unprintable()
    flight = ShardedFlight()
    with pytest.raises(DeadlockError, match="Unprintable whose repr raises") as caught:
        flight.do(lambda: flight.do(never, key), key)
    assert caught.value.keys == (key, key)

    async def function() -> Any:
        child = asyncio.create_task(flight.do_async(never_async, key))
        await asyncio.sleep(0.01)
        return await child

    error = spawn_loop(lambda: flight.do_async(function, key)).exception(PATIENCE)
    assert isinstance(error, DeadlockError)
    assert error.keys == (key, key)
    assert flight.stats().deadlocks == 2
    assert_clean(flight)


def test_a_child_that_is_cancelled_by_its_own_leaving_is_told_nothing() -> None:
    """7: the run is abandoned with its last caller, the child, and cancels what that awaits."""
    flight = ShardedFlight()
    problems: list[dict[str, Any]] = []
    ends: list[BaseException] = []

    async def child() -> Any:
        try:
            return await flight.do_async(never_async, "k")
        except BaseException as error:
            ends.append(error)
            raise

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, it: problems.append(it))
        closed = asyncio.Event()

        async def function() -> Any:
            task = asyncio.create_task(child())
            while not flight.stats().waiting:
                await asyncio.sleep(0)
            caller.cancel()
            await closed.wait()
            return await task

        caller = asyncio.create_task(flight.do_async(function, "k"))
        await asyncio.wait([caller])
        closed.set()
        while flight.in_flight():
            await asyncio.sleep(0.001)

    spawn_loop(main).result(PATIENCE)
    assert [type(end) for end in ends] == [asyncio.CancelledError]
    assert problems == []
    stats = flight.stats()
    assert (stats.deadlocks, stats.abandoned) == (0, 1)
    assert_clean(flight)


def test_an_interrupted_look_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """7: a signal handler raises amid the look that is about to tell a child."""
    flight = ShardedFlight()
    problems: list[Any] = []
    real = ShardedFlight._leave

    def leave(self: ShardedFlight, *args: Any) -> bool:
        if sys._getframe(1).f_code is _deadlock.Watch.look.__code__ and not problems:
            raise Interrupted
        return real(self, *args)

    monkeypatch.setattr(ShardedFlight, "_leave", leave)

    async def main() -> Any:
        handler = lambda _, it: problems.append(type(it["exception"]))  # noqa: E731
        asyncio.get_running_loop().set_exception_handler(handler)

        async def function() -> Any:
            child = asyncio.create_task(flight.do_async(never_async, "k"))
            await asyncio.sleep(0.01)
            return await child

        return await flight.do_async(function, "k")

    assert isinstance(spawn_loop(main).exception(PATIENCE), DeadlockError)
    assert problems == [Interrupted]
    assert_clean(flight)


def test_looks_go_on_when_the_first_could_not_be_scheduled(monkeypatch: pytest.MonkeyPatch) -> None:
    """7: a signal handler raises as a child's wait is entered, while another one waits."""
    flight = ShardedFlight()
    real = _deadlock.Watch._call
    armed: list[bool] = []

    def call(self: Any, *args: Any) -> None:
        if armed:
            armed.clear()
            raise Interrupted
        real(self, *args)

    monkeypatch.setattr(_deadlock.Watch, "_call", call)

    async def main() -> Any:
        end = asyncio.Event()

        async def other() -> None:
            await end.wait()

        async def function() -> Any:
            waits = asyncio.create_task(flight.do_async(never_async, "other"))
            await asyncio.sleep(0.01)
            armed.append(True)
            with pytest.raises(Interrupted):
                await asyncio.create_task(flight.do_async(never_async, "other"))
            child = asyncio.create_task(flight.do_async(never_async, "k"))
            await asyncio.sleep(0.01)
            with pytest.raises(DeadlockError):
                await child
            end.set()
            await waits

        led = asyncio.create_task(flight.do_async(other, "other"))
        await asyncio.sleep(0)
        await flight.do_async(function, "k")
        await led

    spawn_loop(main).result(PATIENCE)
    assert_clean(flight)


# -- signal handlers -------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs pthread_kill")
def test_a_signal_handlers_own_wait_leaves_the_one_that_it_interrupts() -> None:
    """7: the main thread waits for x, a handler waits for y meanwhile; then x's function asks
    for the main thread's key."""
    flight = ShardedFlight()
    handled = threading.Event()
    slow, other = lead(flight, "y")
    answers: list[Any] = []

    def handler(*_: Any) -> None:
        answers.append(flight.do(never, "y"))
        handled.set()

    def function() -> Any:
        assert handled.wait(PATIENCE)
        with pytest.raises(DeadlockError) as caught:
            flight.do(never, "k")
        return caught.value.keys

    def interrupt() -> None:
        waiting(flight, 1)
        signal.pthread_kill(main, signal.SIGUSR1)
        waiting(flight, 2)
        slow.gate.set()

    main = threading.get_ident()
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        leader = spawn(flight.do, function, "x")
        eventually(lambda: flight.in_flight() == 2)
        interrupter = spawn(interrupt)
        (keys, _), _ = flight.do(lambda: flight.do(never, "x", timeout=PATIENCE), "k")
    finally:
        signal.signal(signal.SIGUSR1, before)
    interrupter.result(PATIENCE)
    assert set(keys) == {"k", "x"}
    assert answers == [("value", True)]
    assert leader.result(PATIENCE) == (keys, True)
    assert other.result(PATIENCE) == ("value", True)
    assert_clean(flight)


@pytest.mark.parametrize("method", ["do", "do_many", "do_future"])
def test_a_wait_whose_end_is_interrupted_has_ended(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7: no false alarm, for what is followed no more, though it still runs."""
    flight = ShardedFlight()
    held, leader = lead(flight, "x")
    future = flight.do_future(never, "x")
    where: Any = {
        "do": _flight,
        "do_many": _many,
        "do_future": sys.modules[type(future).__module__],
    }
    real = _deadlock.end_wait
    ends: list[Any] = []

    def end_wait(executions: Any) -> None:
        ends.append(executions)
        if len(ends) == 1:
            raise Interrupted
        real(executions)

    monkeypatch.setattr(where[method], "end_wait", end_wait)
    if method == "do":
        with pytest.raises(Interrupted):
            flight.do(never, "x", timeout=0)
    elif method == "do_future":
        with pytest.raises(Interrupted):
            future.result(0)
    else:

        def let_go() -> None:
            waiting(flight, 2)
            held.gate.set()

        def never_many(_: Sequence[str]) -> dict[str, Any]:
            raise AssertionError("this function must not run")

        letting_go = spawn(let_go)
        with pytest.raises(Interrupted):
            flight.do_many(never_many, ["x"])
        letting_go.result(PATIENCE)
    assert len(ends) == 2
    assert not any(_deadlock._blocked)
    held.gate.set()
    assert leader.result(PATIENCE)[0] == "value"
    assert future.result(PATIENCE)[0] == "value"
    assert_clean(flight)
