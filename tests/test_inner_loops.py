"""Section 7 of the contract, for functions on a thread that run an event loop of their own.

What such a function needs is the root task of its loop, and what that awaits. `test_deadlocks` has
the rings of two and three keys; here is what is more than a ring.
"""

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

import pytest
from support import PATIENCE, eventually, eventually_async, spawn

from shardedflight import DeadlockError, ShardedFlight, _deadlock


def never() -> Any:
    raise AssertionError("this function must not run")


async def never_async() -> Any:
    raise AssertionError("this function must not run")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Any:
    """No loop that has ended is remembered."""
    yield
    assert not _deadlock.roots


def led(flight: ShardedFlight, key: str, main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """A thread that leads `key` by running an event loop."""
    return spawn(flight.do, lambda: asyncio.run(main()), key)


def waiting(flight: ShardedFlight, count: int) -> Callable[[], bool]:
    return lambda: flight.stats().waiting == count


def names(outcome: "Future[Any]") -> set[Any]:
    """The keys that the error names; the future must have one."""
    error = outcome.exception(PATIENCE)
    assert isinstance(error, DeadlockError)
    return set(error.keys)


class Crossing:
    """A child of `main`, on a loop of a's function, waits for b; then b's function waits for a."""

    def __init__(self, main: Callable[["Crossing"], Coroutine[Any, Any, Any]]) -> None:
        self.flight = ShardedFlight()
        self._other_waits = threading.Event()
        self.b = spawn(self.flight.do, self._other, "b")
        eventually(lambda: self.flight.in_flight() == 1)
        self.a = led(self.flight, "a", lambda: main(self))

    def _other(self) -> Any:
        self._other_waits.wait(PATIENCE)
        return self.flight.do(never, "a")[0]

    async def child(self) -> "asyncio.Task[Any]":
        """The child, once the wait of b's function has begun or the child has been told."""
        child = asyncio.create_task(self.flight.do_async(never_async, "b"))
        await eventually_async(waiting(self.flight, 1))
        self._other_waits.set()
        await eventually_async(lambda: self.flight.stats().waiting == 2 or child.done())
        return child


def test_a_child_that_the_root_task_awaits_later() -> None:
    """What closes the cycle is an await of asyncio's own: the child is told all the same."""

    async def main(crossing: Crossing) -> Any:
        child = await crossing.child()
        try:
            return await child
        except DeadlockError as error:
            return error.keys

    crossing = Crossing(main)
    keys, shared = crossing.a.result(PATIENCE)
    assert set(keys) == {"a", "b"}
    if shared:
        assert crossing.b.result(PATIENCE)[0] == keys
    else:  # the other one was told, for the await had come before its wait
        assert names(crossing.b) == {"a", "b"}
    assert crossing.flight.stats().deadlocks == 1


def test_a_child_that_nobody_awaits_holds_up_nobody() -> None:
    """Who waits for the function is not refused: the child is, which could never be served."""

    async def main(crossing: Crossing) -> Any:
        child = await crossing.child()
        await eventually_async(child.done)
        error = child.exception()
        assert isinstance(error, DeadlockError)
        return set(error.keys)

    crossing = Crossing(main)
    assert crossing.a.result(PATIENCE) == ({"a", "b"}, True)
    assert crossing.b.result(PATIENCE)[0] == {"a", "b"}
    assert crossing.flight.stats().deadlocks == 1


@pytest.mark.parametrize("last", ["thread", "loop"])
def test_what_the_loop_waits_for_is_led_by_a_run_on_it(last: str) -> None:
    """a's function awaits c's leader, on its own loop; that one waits for b, and b's for a."""
    flight = ShardedFlight()
    all_lead = threading.Barrier(2)
    before = {"thread": (0, 1), "loop": (1, 0)}[last]

    async def c() -> Any:
        await asyncio.sleep(0)  # until it is awaited: or nobody knows that the root task needs it
        all_lead.wait(PATIENCE)
        await eventually_async(waiting(flight, before[0]))
        return (await flight.do_async(never_async, "b"))[0]

    async def main() -> Any:
        return (await flight.do_async(c, "c"))[0]

    def b() -> Any:
        all_lead.wait(PATIENCE)
        eventually(waiting(flight, before[1]))
        return flight.do(never, "a")[0]

    threads = [led(flight, "a", main), spawn(flight.do, b, "b")]
    for thread in threads:
        assert names(thread) == {"a", "b", "c"}
    assert flight.stats().deadlocks == 1


def test_what_the_loop_waits_for_follows_a_run_on_it() -> None:
    """The root task follows c, which waits for b: the wait of b's function for a is refused."""
    flight = ShardedFlight()

    async def c() -> Any:
        return (await flight.do_async(never_async, "b"))[0]

    async def main() -> Any:
        leader = asyncio.create_task(flight.do_async(c, "c"))
        await eventually_async(waiting(flight, 1))
        try:
            return (await flight.do_async(never_async, "c"))[0]
        finally:
            await asyncio.wait([leader])

    def b() -> Any:
        eventually(waiting(flight, 2))
        return flight.do(never, "a")[0]

    second = spawn(flight.do, b, "b")
    eventually(lambda: flight.in_flight() == 1)
    first = led(flight, "a", main)
    assert names(second) == names(first) == {"a", "b", "c"}


@pytest.mark.parametrize("last", ["a", "b"])
def test_many_keys_of_coroutines_on_the_loop(last: str) -> None:
    """Section 8: `do_many_async` waits for all of its keys."""
    flight = ShardedFlight()
    both = threading.Barrier(2)

    async def found(keys: list[str]) -> dict[str, str]:
        return dict.fromkeys(keys, "found")

    async def main() -> Any:
        both.wait(PATIENCE)
        await eventually_async(waiting(flight, int(last == "a")))
        return await flight.do_many_async(found, ["x", "b"])

    def b() -> Any:
        both.wait(PATIENCE)
        eventually(waiting(flight, int(last == "b")))
        return flight.do(never, "a")[0]

    first, second = led(flight, "a", main), spawn(flight.do, b, "b")
    assert first.exception(PATIENCE) is not None
    assert second.exception(PATIENCE) is not None
    assert flight.stats().deadlocks == 1
    assert flight.in_flight() == 0


def test_a_function_of_a_future_that_runs_a_loop() -> None:
    """`do_future`: its function runs on a thread of the pool, and that thread runs the loop."""
    flight = ShardedFlight()
    both = threading.Barrier(2)

    async def ask(key: str) -> Any:
        both.wait(PATIENCE)
        return (await flight.do_async(never_async, key))[0]

    outcomes = [
        flight.do_future(lambda ask=ask: asyncio.run(ask("b")), "a"),
        flight.do_future(lambda ask=ask: asyncio.run(ask("a")), "b"),
    ]
    for outcome in outcomes:
        assert names(outcome) == {"a", "b"}
    assert flight.stats().deadlocks == 1


def test_a_loop_of_uvloop() -> None:
    """A loop of C, whose own functions have no frames: `Runner` has."""
    uvloop = pytest.importorskip("uvloop")
    flight = ShardedFlight()
    both = threading.Barrier(2)

    async def ask(key: str) -> Any:
        both.wait(PATIENCE)
        return (await flight.do_async(never_async, key))[0]

    def function(key: str) -> Any:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(ask(key))

    threads = [spawn(flight.do, lambda: function("b"), "a")]
    threads += [spawn(flight.do, lambda: function("a"), "b")]
    for outcome in threads:
        assert names(outcome) == {"a", "b"}


def test_who_took_over_runs_a_loop() -> None:
    """A follower leads after the leader was lost: its function's loop is seen as well."""
    flight = ShardedFlight()
    both = threading.Barrier(2)

    def loses() -> Any:
        eventually(waiting(flight, 1))
        raise KeyboardInterrupt

    async def ask(key: str) -> Any:
        both.wait(PATIENCE)
        return (await flight.do_async(never_async, key))[0]

    first = spawn(flight.do, loses, "a")
    eventually(lambda: flight.in_flight() == 1)
    heir = led(flight, "a", lambda: ask("b"))
    other = led(flight, "b", lambda: ask("a"))
    assert isinstance(first.exception(PATIENCE), KeyboardInterrupt)
    assert names(heir) == names(other) == {"a", "b"}


@pytest.mark.parametrize("before", ["used", "never used"])
def test_a_loop_that_has_run_outside_of_any_function_before(before: str) -> None:
    """One loop for a thread: what matters is who leads when it runs."""
    flight = ShardedFlight()
    both = threading.Barrier(2)

    async def value() -> str:
        await asyncio.sleep(0)
        return "value"

    async def ask(key: str) -> Any:
        both.wait(PATIENCE)
        return (await flight.do_async(never_async, key))[0]

    def thread(mine: str, other: str) -> Any:
        with asyncio.Runner() as runner:
            if before == "used":
                assert runner.run(flight.do_async(value, mine)) == ("value", False)
            try:
                return flight.do(lambda: runner.run(ask(other)), mine)
            finally:
                assert runner.run(flight.do_async(value, "after " + mine)) == ("value", False)

    threads = [spawn(thread, "a", "b"), spawn(thread, "b", "a")]
    for outcome in threads:
        assert names(outcome) == {"a", "b"}
    assert flight.stats().deadlocks == 1


def test_what_is_led_by_a_call_on_the_loop_does_not_need_the_loop() -> None:
    """A coroutine blocks its loop by leading z. Who waits for z waits for no other coroutine."""
    flight = ShardedFlight()
    asked = threading.Event()

    def z() -> str:
        asked.set()
        eventually(waiting(flight, 2))
        return "z"

    async def block() -> Any:
        await eventually_async(waiting(flight, 1))
        return flight.do(z, "z")[0]

    async def main() -> Any:
        asked_for, _ = await asyncio.gather(flight.do_async(never_async, "b"), block())
        return asked_for[0]

    def b() -> Any:
        asked.wait(PATIENCE)
        return flight.do(never, "z")[0]

    other = spawn(flight.do, b, "b")
    eventually(lambda: flight.in_flight() == 1)
    a = led(flight, "a", main)
    assert a.result(PATIENCE) == ("z", False)
    assert other.result(PATIENCE) == ("z", True)
    assert flight.stats().deadlocks == 0


def test_a_blocking_call_on_the_loop_for_what_waits_for_the_function() -> None:
    """A coroutine blocks its loop by following b, whose function waits for a."""
    flight = ShardedFlight()
    both = threading.Barrier(2)

    async def main() -> Any:
        both.wait(PATIENCE)
        return flight.do(never, "b")[0]

    def b() -> Any:
        both.wait(PATIENCE)
        return flight.do(never, "a")[0]

    first, second = led(flight, "a", main), spawn(flight.do, b, "b")
    assert names(first) == names(second) == {"a", "b"}


def test_the_loop_of_a_thread_that_leads_nothing_is_not_remembered() -> None:
    """What every call pays for is the exception: `roots` is empty."""
    flight = ShardedFlight()
    seen: list[int] = []

    async def value() -> str:
        await asyncio.sleep(0)
        seen.append(len(_deadlock.roots))
        return "value"

    assert asyncio.run(flight.do_async(value, "k")) == ("value", False)
    flight.do(lambda: asyncio.run(flight.do_async(value, "k")), "outer")
    assert seen == [0, 1]


def test_a_loop_that_is_closed_amid_its_root_task_is_forgotten() -> None:
    """`stop` leaves the root task as it is; nobody will ever end it."""
    flight = ShardedFlight()

    async def value() -> None:
        asyncio.get_running_loop().stop()
        await asyncio.sleep(PATIENCE)

    def function(loop: asyncio.AbstractEventLoop) -> None:
        root = loop.create_task(flight.do_async(value, "k"))
        with pytest.raises(RuntimeError, match="stopped before"):
            loop.run_until_complete(root)
        loop.close()
        root._log_destroy_pending = False  # type: ignore[attr-defined]

    def thread() -> "weakref.ref[asyncio.AbstractEventLoop]":
        loop = asyncio.new_event_loop()
        flight.do(lambda: function(loop), "outer")
        return weakref.ref(loop)

    gone = spawn(thread).result(PATIENCE)

    def collected() -> bool:
        gc.collect()
        return gone() is None and not _deadlock.roots

    eventually(collected, "the loop is gone")
