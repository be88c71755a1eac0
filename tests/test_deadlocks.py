"""Section 7 of the contract: deadlocks are errors, and nothing else is.

Every wait that could hang happens on a thread of its own, so that a deadlock that nobody noticed
fails one test and not the run.
"""

import asyncio
import contextvars
import gc
import itertools
import random
import subprocess
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from support import PATIENCE, eventually, eventually_async, spawn, spawn_loop

from shardedflight import DeadlockError, FlightTimeout, ShardedFlight, _deadlock
from shardedflight._deadlock import Cycle, Watch
from shardedflight._lock import Bell
from shardedflight._threads import current_frames

KINDS = ("thread", "task", "future")


def assert_names(error: DeadlockError, *cycle: Hashable) -> None:
    """The error names the keys of `cycle` in order, closed, whichever of them it starts with."""
    keys = error.keys
    assert keys[0] == keys[-1]
    rotations = {tuple(cycle[n:] + cycle[:n]) for n in range(len(cycle))}
    assert keys[:-1] in rotations
    rest = str(error)
    for key in keys:
        assert repr(key) in rest
        rest = rest.partition(repr(key))[2]


def assert_clean(*flights: ShardedFlight, key: Hashable = "k") -> None:
    """Nothing is in flight, nobody waits, and the flight works."""
    for flight in flights:
        eventually(lambda flight=flight: flight.in_flight() == 0, "nothing in flight")
        eventually(lambda flight=flight: flight.stats().waiting == 0, "nobody waiting")
        again = spawn(flight.do, lambda: "again", key)
        assert again.result(PATIENCE) == ("again", False)


def never() -> Any:
    raise AssertionError("this function must not run")


async def never_async() -> Any:
    raise AssertionError("this function must not run")


# "Calling `do` for a key from inside that key's own function, on the same thread or task".


def do_inside_do(flight: ShardedFlight) -> object:
    return flight.do(lambda: flight.do(never, "k"), "k")


def do_with_a_timeout_inside_do(flight: ShardedFlight) -> object:
    return flight.do(lambda: flight.do(never, "k", timeout=PATIENCE), "k")


def do_inside_do_future(flight: ShardedFlight) -> object:
    return flight.do_future(lambda: flight.do(never, "k"), "k").result(PATIENCE)


def result_of_do_future_inside_do(flight: ShardedFlight) -> object:
    return flight.do(lambda: flight.do_future(never, "k").result(PATIENCE), "k")


def result_of_do_future_inside_do_future(flight: ShardedFlight) -> object:
    def function() -> object:
        return flight.do_future(never, "k").result(PATIENCE)

    return flight.do_future(function, "k").result(PATIENCE)


def exception_of_do_future_inside_do(flight: ShardedFlight) -> object:
    def function() -> object:
        error = flight.do_future(never, "k").exception(PATIENCE)
        assert error is not None
        raise error

    return flight.do(function, "k")


def do_inside_do_many(flight: ShardedFlight) -> object:
    def rows(_: list[str]) -> Any:
        return flight.do(never, "k")

    return flight.do_many(rows, ["other", "k", "another"])


def do_many_inside_do(flight: ShardedFlight) -> object:
    return flight.do(lambda: flight.do_many(lambda keys: dict.fromkeys(keys), ["other", "k"]), "k")


def do_many_inside_do_many(flight: ShardedFlight) -> object:
    def rows(_: list[str]) -> Any:
        return flight.do_many(lambda keys: dict.fromkeys(keys), ["k", "b"])

    return flight.do_many(rows, ["a", "k"])


def do_async_inside_do_async(flight: ShardedFlight) -> object:
    async def outer() -> object:
        return await flight.do_async(never_async, "k")

    return asyncio.run(flight.do_async(outer, "k"))


def do_inside_do_async(flight: ShardedFlight) -> object:
    async def outer() -> object:
        return flight.do(never, "k")

    return asyncio.run(flight.do_async(outer, "k"))


def do_inside_do_async_after_a_suspension(flight: ShardedFlight) -> object:
    async def outer() -> object:
        await asyncio.sleep(0)
        return flight.do(never, "k")

    return asyncio.run(flight.do_async(outer, "k"))


def do_async_inside_do_async_after_a_suspension(flight: ShardedFlight) -> object:
    async def outer() -> object:
        await asyncio.sleep(0)
        return await flight.do_async(never_async, "k")

    return asyncio.run(flight.do_async(outer, "k"))


def do_async_on_a_loop_inside_do(flight: ShardedFlight) -> object:
    return flight.do(lambda: asyncio.run(flight.do_async(never_async, "k")), "k")


def do_async_on_a_loop_inside_do_future(flight: ShardedFlight) -> object:
    def function() -> object:
        return asyncio.run(flight.do_async(never_async, "k"))

    return flight.do_future(function, "k").result(PATIENCE)


def do_many_async_on_a_loop_inside_do(flight: ShardedFlight) -> object:
    async def rest(keys: Sequence[str]) -> Any:
        return dict.fromkeys(keys, 1)

    return flight.do(lambda: asyncio.run(flight.do_many_async(rest, ["a", "k", "b"])), "k")


def do_async_inside_do_many_async(flight: ShardedFlight) -> object:
    async def outer(_: Sequence[str]) -> Any:
        return await flight.do_async(never_async, "k")

    return asyncio.run(flight.do_many_async(outer, ["a", "k", "b"]))


def do_many_async_inside_do_async(flight: ShardedFlight) -> object:
    async def rest(keys: Sequence[str]) -> Any:
        return dict.fromkeys(keys)

    async def outer() -> Any:
        return await flight.do_many_async(rest, ["a", "k"])

    return asyncio.run(flight.do_async(outer, "k"))


def do_inside_a_forgotten_do(flight: ShardedFlight) -> object:
    """Joins the newer execution, whose function calls for the key once more."""

    def function() -> object:
        flight.forget("k")
        return flight.do(lambda: flight.do(never, "k"), "k")

    return flight.do(function, "k")


RECURSIONS = (
    do_inside_do,
    do_with_a_timeout_inside_do,
    do_inside_do_future,
    result_of_do_future_inside_do,
    result_of_do_future_inside_do_future,
    exception_of_do_future_inside_do,
    do_inside_do_many,
    do_many_inside_do,
    do_many_inside_do_many,
    do_async_inside_do_async,
    do_inside_do_async,
    do_inside_do_async_after_a_suspension,
    do_async_inside_do_async_after_a_suspension,
    do_async_on_a_loop_inside_do,
    do_async_on_a_loop_inside_do_future,
    do_many_async_on_a_loop_inside_do,
    do_async_inside_do_many_async,
    do_many_async_inside_do_async,
    do_inside_a_forgotten_do,
)


def deadlock_in(error: BaseException | None) -> DeadlockError:
    """The error itself, or the one in the group that `do_many` made of it."""
    if isinstance(error, ExceptionGroup):
        members = {id(member): member for member in error.exceptions}
        assert len(members) == 1
        return deadlock_in(next(iter(members.values())))
    assert isinstance(error, DeadlockError), repr(error)
    return error


@pytest.mark.parametrize("recursion", RECURSIONS, ids=lambda recursion: recursion.__name__)
def test_a_call_for_a_key_inside_its_own_function_is_an_error(
    recursion: Callable[[ShardedFlight], object],
) -> None:
    """Section 7, sentence 1: recursion, on the same thread or task, through every method."""
    flight = ShardedFlight()
    error = deadlock_in(spawn(recursion, flight).exception(PATIENCE))
    assert set(error.keys) == {"k"}
    assert "'k'" in str(error)
    assert flight.stats().deadlocks == 1
    assert_clean(flight)


@pytest.mark.parametrize("shards", [1, 16])
def test_the_keys_in_between_are_named_in_order(shards: int) -> None:
    """Section 7: "naming the keys in order": each one's function waits for the next."""
    flight = ShardedFlight(shards)

    def led_by_many(names: list[str]) -> dict[str, object]:
        return {names[0]: flight.do(lambda: flight.do(never, "a"), "d", "e")}

    def body() -> object:
        return flight.do(lambda: flight.do(lambda: flight.do_many(led_by_many, ["c"]), ("b",)), "a")

    error = deadlock_in(spawn(body).exception(PATIENCE))
    assert error.keys == ("a", ("b",), "c", ("d", "e"), "a")
    assert_clean(flight)


def test_what_an_heir_leads_is_named_in_order() -> None:
    """Section 7: also what it has taken over from another thread."""
    flight = ShardedFlight()
    lose = threading.Event()

    def lost() -> None:
        assert lose.wait(PATIENCE)
        raise Lost

    led = spawn(flight.do, lost, "b")
    eventually(lambda: flight.in_flight() == 1)
    own = spawn(
        flight.do,
        lambda: flight.do(lambda: flight.do(lambda: flight.do(never, "a"), "c"), "b"),
        "a",
    )
    eventually(lambda: flight.stats().waiting == 1)
    lose.set()
    assert isinstance(led.exception(PATIENCE), Lost)
    assert deadlock_in(own.exception(PATIENCE)).keys == ("a", "b", "c", "a")
    assert_clean(flight)


@pytest.mark.parametrize("shards", [1, 16])
@pytest.mark.parametrize("depth", [2, 3, 40])
def test_a_call_for_a_key_further_out_on_the_same_thread(depth: int, shards: int) -> None:
    """Section 7, sentence 1: "from inside that key's own function", at any depth.

    Which of the keys in between are named is left open: no call of theirs waits for a flight.
    """
    flight = ShardedFlight(shards)

    def level(n: int) -> Any:
        return flight.do(lambda: level((n + 1) % depth), n, "part")

    error = spawn(level, 0).exception(PATIENCE)
    assert isinstance(error, DeadlockError)
    assert error.keys[0] == error.keys[-1] == (0, "part")
    named: list[Any] = list(error.keys[:-1])
    assert named == sorted(named)
    assert_clean(flight, key=(0, "part"))


@pytest.mark.parametrize("depth", [2, 3, 40])
def test_a_call_for_a_key_further_out_in_one_chain_of_coroutines(depth: int) -> None:
    """Section 7, sentence 1: "naming the keys in order", on one task."""
    flight = ShardedFlight()

    async def level(n: int) -> Any:
        return await flight.do_async(lambda: level((n + 1) % depth), n)

    error = spawn_loop(lambda: level(0)).exception(PATIENCE)
    assert isinstance(error, DeadlockError)
    assert_names(error, *range(depth))
    assert_clean(flight)


def test_the_function_may_catch_the_error_and_go_on() -> None:
    """Section 7, sentence 1: "raise": an error of that one call, where it was made."""
    flight = ShardedFlight()

    def plain() -> str:
        with pytest.raises(DeadlockError):
            flight.do(never, "k")
        return "fallback"

    async def coroutine() -> str:
        with pytest.raises(DeadlockError):
            await flight.do_async(never_async, "k")
        return "fallback"

    assert spawn(flight.do, plain, "k").result(PATIENCE) == ("fallback", False)
    assert flight.do_future(plain, "k").result(PATIENCE) == ("fallback", False)
    loop = spawn_loop(lambda: flight.do_async(coroutine, "k"))
    assert loop.result(PATIENCE) == ("fallback", False)
    stats = flight.stats()
    assert (stats.deadlocks, stats.errors, stats.executions) == (3, 0, 3)
    assert_clean(flight)


def test_the_error_is_a_flight_error_with_the_keys_built_by_the_hook() -> None:
    """Section 7, sentence 1: "naming the keys": those that the flight compares."""
    flight = ShardedFlight(build_key=lambda *parts: "/".join(parts))
    error = spawn(flight.do, lambda: flight.do(never, "a", "b"), "a", "b").exception(PATIENCE)
    assert isinstance(error, DeadlockError)
    assert error.keys == ("a/b", "a/b")
    assert "'a/b'" in str(error)
    assert_clean(flight)


@pytest.mark.parametrize("kind", KINDS)
def test_followers_of_a_function_that_called_for_itself_get_its_error(kind: str) -> None:
    """Section 7 with 3: to others the deadlock is the function's error like any other."""
    flight = ShardedFlight()

    def plain() -> object:
        eventually(lambda: flight.stats().waiting == 1)
        return flight.do(never, "k")

    leader = spawn(flight.do, plain, "k")
    eventually(lambda: flight.in_flight() == 1)
    follower: Future[Any]
    if kind == "thread":
        follower = spawn(flight.do, never, "k")
    elif kind == "task":
        follower = spawn_loop(lambda: flight.do_async(never_async, "k"))
    else:
        follower = flight.do_future(never, "k")
    for caller in (leader, follower):
        error = caller.exception(PATIENCE)
        assert isinstance(error, DeadlockError)
        assert_names(error, "k")
    assert_clean(flight)


# "No reference cycle keeps frames alive after the callers are done (checked with the collector
# switched off)", in section 3: this is an error like any other.


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def do_inside_do_with_a_follower(flight: ShardedFlight) -> object:
    def function() -> object:
        flight.do_future(never, "k")
        return flight.do(never, "k")

    return flight.do(function, "k")


@pytest.mark.parametrize(
    "recursion",
    # asyncio.run makes a cycle of what it raises.
    [do_inside_do_with_a_follower, *(each for each in RECURSIONS if "async" not in each.__name__)],
    ids=lambda recursion: recursion.__name__,
)
@pytest.mark.untraced
@pytest.mark.usefixtures("no_collector")
def test_the_error_goes_when_it_is_dropped(recursion: Callable[[ShardedFlight], object]) -> None:
    """Section 3 for a deadlock: neither it nor a frame that it passed is kept by a cycle."""

    def dropped() -> "weakref.ref[BaseException]":
        try:
            recursion(flight)
        except Exception as error:
            return weakref.ref(error)
        raise AssertionError("no error")

    with ThreadPoolExecutor(1) as pool:
        flight = ShardedFlight(executor=pool)
        gone = spawn(dropped).result(PATIENCE)

        def freed() -> bool:
            # Without the GIL, what a thread made and others let go of goes when that thread runs.
            pool.submit(int).result(PATIENCE)
            return gone() is None

        eventually(freed, "the error freed")


async def ask_at_once(call: Callable[[], Awaitable[Any]]) -> Any:
    return await call()


async def ask_by_a_child(call: Any) -> Any:
    return await asyncio.create_task(call())


async def ask_by_a_child_that_waits_before_it_is_awaited(call: Any) -> Any:
    children = [asyncio.create_task(call())]
    await asyncio.sleep(0)
    return await children.pop()


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(
    "ask",
    [ask_at_once, ask_by_a_child, ask_by_a_child_that_waits_before_it_is_awaited],
    ids=lambda ask: ask.__name__,
)
@pytest.mark.usefixtures("no_collector")
def test_the_error_of_a_coroutine_goes_when_it_is_dropped(
    ask: Callable[[Any], Any], many: bool
) -> None:
    """Section 3 for a deadlock: as above, of tasks and their children."""
    flight = ShardedFlight()

    async def rest(keys: Sequence[str]) -> Any:
        return dict.fromkeys(keys)

    def again() -> Awaitable[Any]:
        if many:
            return flight.do_many_async(rest, ["k", "other"])
        return flight.do_async(never_async, "k")

    async def main() -> None:
        gone: list[weakref.ref[BaseException]] = []
        try:
            await flight.do_async(lambda: ask(again), "k")
        except DeadlockError as error:
            gone.append(weakref.ref(error))
        assert gone
        await eventually_async(lambda: gone[0]() is None, "the error freed")

    spawn_loop(main).result(PATIENCE)


# "any cycle of keys across threads and tasks (A's function waits for B while B's waits for A)".


class Ring:
    """Members that lead a key each, and then ask for the next one's key in turn.

    The last request closes the ring. `catch` tells whether its function answers all the same.
    """

    def __init__(self, flights: Sequence[ShardedFlight], keys: Sequence[str], catch: bool) -> None:
        self.flights = flights
        self.keys = keys
        self.catch = catch
        self.started = [threading.Event() for _ in keys]
        self.caught: list[DeadlockError] = []

    def _turn_of(self, n: int) -> bool:
        if not all(event.is_set() for event in self.started):
            return False
        return sum(flight.stats().waiting for flight in set(self.flights)) == n

    def _next(self, n: int) -> tuple[ShardedFlight, str]:
        after = (n + 1) % len(self.keys)
        return self.flights[after], self.keys[after]

    def plain(self, n: int) -> Any:
        self.started[n].set()
        eventually(lambda: self._turn_of(n))
        flight, key = self._next(n)
        try:
            return flight.do(never, key)[0]
        except DeadlockError as error:
            return self._closed(error)

    def future(self, n: int) -> Any:
        self.started[n].set()
        eventually(lambda: self._turn_of(n))
        flight, key = self._next(n)
        try:
            return flight.do_future(never, key).result(PATIENCE)[0]
        except DeadlockError as error:
            return self._closed(error)

    async def coroutine(self, n: int) -> Any:
        self.started[n].set()
        await eventually_async(lambda: self._turn_of(n))
        flight, key = self._next(n)
        try:
            return (await flight.do_async(never_async, key))[0]
        except DeadlockError as error:
            return self._closed(error)

    def _closed(self, error: DeadlockError) -> str:
        self.caught.append(error)
        if not self.catch:
            raise error
        return "fallback"

    def call(self, kind: str, n: int) -> "Future[Any]":
        flight, key = self.flights[n], self.keys[n]
        if kind == "thread":
            return spawn(flight.do, lambda: self.plain(n), key)
        if kind == "task":
            return spawn_loop(lambda: flight.do_async(lambda: self.coroutine(n), key))
        if kind == "loop":
            return spawn(flight.do, lambda: asyncio.run(self.coroutine(n)), key)
        return flight.do_future(lambda: self.future(n), key)


#: "loop": a function on a thread that runs an event loop of its own.
PAIRS = [*itertools.product((*KINDS, "loop"), repeat=2)]

RINGS = [
    *PAIRS,
    *itertools.product(("thread", "task"), repeat=3),
    ("loop", "task", "loop"),
    ("loop", "loop", "thread"),
    ("task", "loop", "loop"),
    ("future", "thread", "task"),
    ("task", "future", "future", "thread", "thread", "task"),
]


@pytest.mark.parametrize("kinds", RINGS, ids="-".join)
def test_a_cycle_is_an_error_of_the_wait_that_closes_it(kinds: tuple[str, ...]) -> None:
    """Section 7, sentence 1: cycles of two, three and six keys, on one flight object."""
    flight = ShardedFlight()
    keys = "ABCDEF"[: len(kinds)]
    ring = Ring([flight] * len(keys), keys, catch=True)
    callers = [ring.call(kind, n) for n, kind in enumerate(kinds)]
    assert all(caller.result(PATIENCE)[0] == "fallback" for caller in callers)
    assert len(ring.caught) == 1
    assert_names(ring.caught[0], *keys)
    assert flight.stats().deadlocks == 1
    assert_clean(flight)


@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
def test_a_cycle_may_lead_over_several_flights(kinds: tuple[str, ...]) -> None:
    """Section 7, sentence 1: "any cycle of keys", also of keys of different flight objects."""
    flights = [ShardedFlight(), ShardedFlight()]
    ring = Ring(flights, "AB", catch=True)
    callers = [ring.call(kind, n) for n, kind in enumerate(kinds)]
    assert all(caller.result(PATIENCE)[0] == "fallback" for caller in callers)
    assert len(ring.caught) == 1
    assert_names(ring.caught[0], "A", "B")
    assert sum(flight.stats().deadlocks for flight in flights) == 1
    assert_clean(*flights)


def test_recursion_by_way_of_the_same_key_of_another_flight() -> None:
    """Section 7, sentence 1: "k" of one flight and "k" of another are two keys."""
    first, second = ShardedFlight(), ShardedFlight()

    def function() -> object:
        return second.do(lambda: first.do(never, "k"), "k")

    error = spawn(first.do, function, "k").exception(PATIENCE)
    assert isinstance(error, DeadlockError)
    assert set(error.keys) == {"k"}
    assert_clean(first, second)


@pytest.mark.parametrize("kinds", RINGS, ids="-".join)
def test_a_cycle_whose_error_nobody_catches_ends_for_everybody(kinds: tuple[str, ...]) -> None:
    """Section 7, sentence 1: after the error everybody has an end and everything is clean."""
    flight = ShardedFlight()
    keys = "ABCDEF"[: len(kinds)]
    ring = Ring([flight] * len(keys), keys, catch=False)
    callers = [ring.call(kind, n) for n, kind in enumerate(kinds)]
    for caller in callers:
        error = caller.exception(PATIENCE)
        assert isinstance(error, DeadlockError)
        assert_names(error, *keys)
    assert flight.stats().deadlocks == 1
    assert_clean(flight)


def test_a_cycle_of_tasks_on_one_loop() -> None:
    """Section 7, sentence 1: "across ... tasks" of the same event loop."""
    flight = ShardedFlight()
    ring = Ring([flight] * 3, "ABC", catch=True)

    async def main() -> list[Any]:
        calls = (flight.do_async(lambda n=n: ring.coroutine(n), key) for n, key in enumerate("ABC"))
        return await asyncio.gather(*calls)

    answers = spawn_loop(main).result(PATIENCE)
    assert [answer for answer, _ in answers] == ["fallback"] * 3
    assert_names(ring.caught[0], "A", "B", "C")
    assert flight.stats().deadlocks == 1
    assert_clean(flight)


# Cycles that lead through tasks which the function waits for.

Wait = Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]]


async def by_gather(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return (await asyncio.gather(asyncio.sleep(0), coroutine))[1]


async def by_task_group(coroutine: Coroutine[Any, Any, Any]) -> Any:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(coroutine)
    return task.result()


async def by_task(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return await asyncio.create_task(coroutine)


async def by_wait_for(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return await asyncio.wait_for(coroutine, PATIENCE)


async def by_wait(coroutine: Coroutine[Any, Any, Any]) -> Any:
    done, _ = await asyncio.wait([asyncio.create_task(coroutine)])
    return done.pop().result()


async def by_shield(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return await asyncio.shield(coroutine)


async def by_timeout(coroutine: Coroutine[Any, Any, Any]) -> Any:
    async with asyncio.timeout(PATIENCE):
        return await coroutine


async def by_nested_tasks(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return await by_gather(by_task_group(by_task(coroutine)))


WAITS: tuple[Wait, ...] = (
    by_gather,
    by_task_group,
    by_task,
    by_wait_for,
    by_wait,
    by_shield,
    by_timeout,
    by_nested_tasks,
)


@pytest.mark.parametrize("wait", WAITS, ids=lambda wait: wait.__name__)
def test_recursion_through_tasks_that_the_function_waits_for(wait: Wait) -> None:
    """Section 7, sentence 1: a child that the function waits for is part of its cycle."""
    flight = ShardedFlight()
    caught: list[DeadlockError] = []

    async def ask() -> str:
        try:
            await flight.do_async(never_async, "k")
        except DeadlockError as error:
            caught.append(error)
        return "fallback"

    async def function() -> Any:
        return await wait(ask())

    answer = spawn_loop(lambda: flight.do_async(function, "k"))
    assert answer.result(PATIENCE) == ("fallback", False)
    assert_names(caught[0], "k")
    assert_clean(flight)


@pytest.mark.parametrize("wait", WAITS, ids=lambda wait: wait.__name__)
def test_a_cycle_of_two_keys_through_tasks_that_the_functions_wait_for(wait: Wait) -> None:
    """Section 7, sentence 1: both functions of the cycle wait by way of children."""
    flight = ShardedFlight()
    ring = Ring([flight] * 2, "AB", catch=True)

    async def main() -> list[Any]:
        calls = (
            flight.do_async(lambda n=n: wait(ring.coroutine(n)), key) for n, key in enumerate("AB")
        )
        return await asyncio.gather(*calls)

    answers = spawn_loop(main).result(PATIENCE)
    assert [answer for answer, _ in answers] == ["fallback"] * 2
    assert_names(ring.caught[0], "A", "B")
    assert_clean(flight)


@pytest.mark.parametrize("wait", WAITS, ids=lambda wait: wait.__name__)
def test_a_cycle_of_a_thread_and_a_child_task(wait: Wait) -> None:
    """Section 7, sentence 1: thread, task and child of a task, in one cycle."""
    for thread_first in (True, False):
        flight = ShardedFlight()
        ring = Ring([flight] * 2, "AB", catch=True)
        task, thread = (1, 0) if thread_first else (0, 1)

        def task_function(n: int, ring: Ring = ring) -> Awaitable[Any]:
            return wait(ring.coroutine(n))

        callers = [
            ring.call("thread", thread),
            spawn_loop(
                lambda flight=flight, task=task, function=task_function: flight.do_async(
                    lambda: function(task), "AB"[task]
                )
            ),
        ]
        assert all(caller.result(PATIENCE)[0] == "fallback" for caller in callers)
        assert_names(ring.caught[0], "A", "B")
        assert_clean(flight)


# Cycles that a function closes by an await of asyncio's, long after its child has begun to wait.

Begin = Callable[[Coroutine[Any, Any, Any], Callable[[], Awaitable[Any]]], Awaitable[Any]]


def late_by(wait: Callable[["asyncio.Task[Any]"], Awaitable[Any]]) -> Begin:
    """Starts the coroutine as a task, lets the other function pass the time, then waits."""

    async def begin(coroutine: Coroutine[Any, Any, Any], passing: Callable[..., Any]) -> Any:
        task = asyncio.create_task(coroutine)
        await passing()
        return await wait(task)

    return begin


async def late_by_task_group(
    coroutine: Coroutine[Any, Any, Any], passing: Callable[[], Awaitable[Any]]
) -> Any:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(coroutine)
        await passing()
    return task.result()


async def plainly(task: "asyncio.Task[Any]") -> Any:
    return await task


async def of_wait(task: "asyncio.Task[Any]") -> Any:
    await asyncio.wait([task, asyncio.create_task(asyncio.sleep(0))])
    return task.result()


async def of_a_nested_task(task: "asyncio.Task[Any]") -> Any:
    return await asyncio.create_task(by_shield(plainly(task)))


LATE: dict[str, Begin] = {
    "await": late_by(plainly),
    "gather": late_by(lambda task: by_gather(plainly(task))),
    "wait": late_by(of_wait),
    "wait_for": late_by(lambda task: asyncio.wait_for(task, PATIENCE)),
    "shield": late_by(lambda task: asyncio.shield(task)),
    "timeout": late_by(lambda task: by_timeout(plainly(task))),
    "nested": late_by(of_a_nested_task),
    "group": late_by_task_group,
}
in_every_late_way = pytest.mark.parametrize("begin", LATE.values(), ids=LATE)


def long_waiting(flight: ShardedFlight, waiting: int = 1) -> Callable[[], Awaitable[None]]:
    """Passes more than the round of the loop after as many have begun to wait."""

    async def passing() -> None:
        await eventually_async(lambda: flight.stats().waiting >= waiting)
        for _ in range(10):
            await asyncio.sleep(0.001)

    return passing


@in_every_late_way
def test_recursion_through_a_child_that_is_awaited_long_after_it_began_to_wait(
    begin: Begin,
) -> None:
    """Section 7, sentence 1: "any cycle of keys across threads and tasks"."""
    flight = ShardedFlight()
    ring = Ring([flight], "k", catch=True)

    async def function() -> Any:
        return await begin(ring.coroutine(0), long_waiting(flight))

    run = spawn(lambda: asyncio.run(flight.do_async(function, "k"), debug=True))
    assert run.result(PATIENCE) == ("fallback", False)
    assert_names(ring.caught[0], "k")
    assert flight.stats().deadlocks == 1
    assert_clean(flight)


def test_an_uncaught_error_of_a_child_that_is_awaited_late_is_that_of_the_await() -> None:
    """Section 7, sentence 1: "raise": out of the await that has closed the cycle."""
    flight = ShardedFlight()

    async def rest(keys: Sequence[str]) -> Any:
        return dict.fromkeys(keys)

    async def function(call: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        child = asyncio.create_task(call())
        await long_waiting(flight)()
        return await child

    calls = (
        lambda: flight.do_async(never_async, "k"),
        lambda: flight.do_many_async(rest, ["k", "other"]),
    )
    for call in calls:
        error = spawn_loop(
            lambda call=call: flight.do_async(lambda: function(call), "k")
        ).exception(PATIENCE)
        assert_names(deadlock_in(error), "k")
        assert_clean(flight)


@pytest.mark.parametrize("loops", [1, 2])
@pytest.mark.parametrize("count", [1, 2])
@in_every_late_way
def test_a_cycle_of_two_keys_through_children_that_are_awaited_late(
    begin: Begin, count: int, loops: int
) -> None:
    """Section 7, sentence 1: on one flight or two, on one event loop or two."""
    flights = [ShardedFlight() for _ in range(count)]
    ring = Ring(flights * (2 // count), "AB", catch=True)

    async def passing() -> None:
        await eventually_async(lambda: sum(flight.stats().waiting for flight in flights) == 2)
        await long_waiting(flights[0], waiting=0)()

    def call(n: int) -> Coroutine[Any, Any, Any]:
        return ring.flights[n].do_async(lambda: begin(ring.coroutine(n), passing), "AB"[n])

    async def main() -> list[Any]:
        return list(await asyncio.gather(call(0), call(1)))

    if loops == 1:
        answers = spawn_loop(main).result(PATIENCE)
    else:
        answers = [
            caller.result(PATIENCE)
            for caller in [spawn_loop(lambda n=n: call(n)) for n in range(2)]
        ]
    assert [answer for answer, _ in answers] == ["fallback"] * 2
    assert len(ring.caught) == 1
    assert_names(ring.caught[0], "A", "B")
    assert_clean(*flights)


def test_a_cycle_of_a_thread_and_a_child_that_is_awaited_late() -> None:
    """Section 7, sentence 1: the thread's wait is part of a cycle that begins after it."""
    flight = ShardedFlight()
    ring = Ring([flight] * 2, "AB", catch=True)

    async def function() -> Any:
        return await LATE["gather"](ring.coroutine(0), long_waiting(flight, 2))

    callers = [spawn_loop(lambda: flight.do_async(function, "A")), ring.call("thread", 1)]
    assert [caller.result(PATIENCE)[0] for caller in callers] == ["fallback"] * 2
    assert_names(ring.caught[0], "A", "B")
    assert flight.stats().deadlocks == 1
    assert_clean(flight)


def test_a_child_that_is_awaited_late_and_leads_what_waits_for_its_parent() -> None:
    """Section 7, sentence 1: the child waits for a run of its own, and that for the parent."""
    flight = ShardedFlight()

    async def inner() -> Any:
        return await flight.do_async(never_async, "outer")

    async def function() -> Any:
        child = asyncio.create_task(flight.do_async(inner, "inner"))
        await long_waiting(flight)()
        return await child

    error = spawn_loop(lambda: flight.do_async(function, "outer")).exception(PATIENCE)
    assert isinstance(error, DeadlockError)
    assert_names(error, "outer", "inner")
    assert flight.stats().deadlocks == 1
    assert_clean(flight)


def test_of_two_children_that_wait_long_only_the_one_that_is_awaited_is_refused() -> None:
    """Section 7, sentence 1: what is looked at together is told apart."""
    for first in (False, True):
        flight = ShardedFlight()
        children: list[asyncio.Task[Any]] = []

        async def function(first: bool, flight: ShardedFlight, children: list[Any]) -> str:
            children += [asyncio.create_task(flight.do_async(never_async, "k")) for _ in range(2)]
            await long_waiting(flight, 2)()
            with pytest.raises(DeadlockError):
                await children.pop(0 if first else 1)
            return "value"

        async def main(run: Any, children: list[Any] = children) -> Any:
            return await run, await children[0]

        run = flight.do_async(
            lambda first=first, flight=flight, children=children: function(first, flight, children),
            "k",
        )
        answers = spawn_loop(lambda run=run, main=main: main(run)).result(PATIENCE)
        assert answers == (("value", True), ("value", True))
        assert flight.stats().deadlocks == 1
        assert_clean(flight)


def looks(loop: asyncio.AbstractEventLoop) -> list[float]:
    """Has the delays of the timers with which a run watches its children listed."""
    delays: list[float] = []
    call_later = loop.call_later

    def listening(delay: float, callback: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(callback, "__func__", None) is Watch.look:
            delays.append(delay)
        return call_later(delay, callback, *args, **kwargs)

    loop.call_later = listening  # type: ignore[method-assign]
    return delays


def test_children_that_wait_long_are_looked_at_at_growing_intervals() -> None:
    """Section 7: a wait that is no deadlock keeps no loop busy."""
    flight = ShardedFlight()
    gate = threading.Event()

    async def function() -> Any:
        delays = looks(asyncio.get_running_loop())
        child = asyncio.create_task(flight.do_async(never_async, "other"))
        await eventually_async(lambda: len(delays) > 5)
        gate.set()
        await child
        return delays

    other = spawn(flight.do, lambda: gate.wait(PATIENCE), "other")
    eventually(lambda: flight.in_flight() == 1)
    delays, _ = spawn_loop(lambda: flight.do_async(function, "k")).result(PATIENCE)
    other.result(PATIENCE)
    # A look that took long puts off the next one: never does one come sooner.
    assert all(delay >= 0.001 * 2**n for n, delay in enumerate(delays[:5]))


def test_no_timer_is_left_when_no_child_waits() -> None:
    """Section 7: whether the children were served, were cancelled, or outlive the run."""
    flight = ShardedFlight()
    gates = [threading.Event() for _ in range(2)]
    children: list[asyncio.Task[Any]] = []

    def timers() -> int:
        scheduled = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
        return sum(
            not handle._cancelled and getattr(handle._callback, "__func__", None) is Watch.look
            for handle in scheduled
        )

    def ask(key: int) -> "asyncio.Task[Any]":
        return asyncio.create_task(flight.do_async(never_async, key))

    async def function() -> str:
        served, cancelled = ask(0), ask(1)
        await eventually_async(lambda: timers() == 1)
        gates[0].set()
        await served
        await eventually_async(lambda: timers() == 1)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        assert timers() == 0
        children.append(ask(1))
        await eventually_async(lambda: timers() == 1)
        return "value"

    async def main() -> None:
        assert await flight.do_async(function, "k") == ("value", False)
        await eventually_async(lambda: timers() == 0)
        assert not children[0].done()
        gates[1].set()
        await children[0]
        assert timers() == 0

    leaders = [spawn(flight.do, lambda n=n: gates[n].wait(PATIENCE), n) for n in range(2)]
    eventually(lambda: flight.in_flight() == 2)
    spawn(lambda: asyncio.run(main(), debug=True)).result(PATIENCE)
    assert [leader.result(PATIENCE) for leader in leaders] == [(True, True)] * 2
    assert_clean(flight)


@pytest.mark.parametrize("own", [False, True])
def test_many_children_that_wait_are_looked_at_together(own: bool) -> None:
    """Section 7 at a price: 2,000 waits of children are not 2,000 walks through all of them."""
    flight = ShardedFlight()
    gate = threading.Event()
    count = 2_000
    steps = 0

    def count_steps(*_: object) -> None:
        nonlocal steps
        steps += 1

    async def middle() -> Any:
        calls = [flight.do_async(never_async, "leaf") for _ in range(count)]
        return len(await asyncio.gather(*calls))

    async def function() -> Any:
        asked = "k" if own else "middle"
        children = [asyncio.create_task(flight.do_async(middle, asked)) for _ in range(count)]
        await long_waiting(flight, count)()
        gate.set()
        return len(await asyncio.gather(*children, return_exceptions=own))

    async def main() -> Any:
        sys.setprofile(count_steps)
        try:
            return await flight.do_async(function, "k")
        finally:
            sys.setprofile(None)

    leaf = spawn(flight.do, lambda: gate.wait(PATIENCE), "leaf")
    eventually(lambda: flight.in_flight() == 1)
    assert spawn_loop(main).result(PATIENCE) == (count, False)
    leaf.result(PATIENCE)
    assert flight.stats().deadlocks == (count if own else 0)
    assert steps < 1_000 * count


def test_a_wait_on_another_loop_in_the_context_of_a_run() -> None:
    """Section 7: `to_thread` copies the context; timers are set on a loop's own thread only."""
    flight = ShardedFlight()
    gate = threading.Event()

    async def elsewhere() -> Any:
        other = asyncio.create_task(flight.do_async(never_async, "other"))
        await long_waiting(flight)()
        gate.set()
        return (await other)[0]

    async def function() -> Any:
        return await asyncio.to_thread(lambda: asyncio.run(elsewhere(), debug=True))

    other = spawn(flight.do, lambda: gate.wait(PATIENCE), "other")
    eventually(lambda: flight.in_flight() == 1)
    run = spawn(lambda: asyncio.run(flight.do_async(function, "k"), debug=True))
    assert run.result(PATIENCE) == (True, False)
    other.result(PATIENCE)
    assert_clean(flight)


def test_a_wait_on_another_loop_is_not_taken_for_one_of_the_runs_own_thread() -> None:
    """Section 7: a thread started in a run's context waits for what leads on the run's thread."""
    flight = ShardedFlight()
    gate = threading.Event()
    children: list[Future[Any]] = []

    async def function() -> str:
        delays = looks(asyncio.get_running_loop())
        context = contextvars.copy_context()
        children.append(spawn(context.run, asyncio.run, flight.do_async(never_async, "outer")))
        await eventually_async(lambda: flight.stats().waiting == 1)
        child = asyncio.create_task(flight.do_async(never_async, "other"))
        await eventually_async(lambda: len(delays) > 3)
        gate.set()
        await child
        return "value"

    def outer() -> Any:
        return asyncio.run(flight.do_async(function, "k"))[0]

    other = spawn(flight.do, lambda: gate.wait(PATIENCE), "other")
    eventually(lambda: flight.in_flight() == 1)
    assert spawn(flight.do, outer, "outer").result(PATIENCE) == ("value", True)
    assert children[0].result(PATIENCE) == ("value", True)
    other.result(PATIENCE)
    assert flight.stats().deadlocks == 0
    assert_clean(flight)


def test_an_uncaught_deadlock_in_a_task_group_comes_out_of_the_group() -> None:
    """Section 7, sentence 1: the group's own rules for the error of a child hold."""
    flight = ShardedFlight()

    async def function() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(flight.do_async(never_async, "k"))

    error = spawn_loop(lambda: flight.do_async(function, "k")).exception(PATIENCE)
    assert isinstance(error, ExceptionGroup)
    assert_names(deadlock_in(error), "k")
    assert_clean(flight)


# "So does a blocking `do` on an event loop's thread that would wait for an execution needing that
# loop."


def blocking_do(flight: ShardedFlight, key: str) -> object:
    return flight.do(never, key)


def blocking_do_with_a_timeout(flight: ShardedFlight, key: str) -> object:
    return flight.do(never, key, timeout=PATIENCE)


def blocking_do_many(flight: ShardedFlight, key: str) -> object:
    return flight.do_many(lambda keys: dict.fromkeys(keys), ["other", key])


BLOCKING = (blocking_do, blocking_do_with_a_timeout, blocking_do_many)
in_every_blocking_way = pytest.mark.parametrize("block", BLOCKING, ids=lambda block: block.__name__)


@in_every_blocking_way
def test_a_blocking_call_for_an_execution_of_its_own_running_loop(
    block: Callable[[ShardedFlight, str], object],
) -> None:
    """Section 7, sentence 2, on the thread of the loop that the execution runs on."""
    flight = ShardedFlight()

    async def main() -> Any:
        end: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def function() -> str:
            return await end

        leader = asyncio.create_task(flight.do_async(function, "k"))
        await eventually_async(lambda: flight.in_flight() == 1)
        with pytest.raises((DeadlockError, ExceptionGroup)) as caught:
            block(flight, "k")
        assert "k" in deadlock_in(caught.value).keys
        end.set_result("value")
        return await leader

    assert spawn_loop(main).result(PATIENCE) == ("value", False)
    assert flight.stats().deadlocks == 1
    assert_clean(flight)


@in_every_blocking_way
def test_a_blocking_call_for_an_execution_of_a_loop_of_its_thread_that_does_not_run_now(
    block: Callable[[ShardedFlight, str], object],
) -> None:
    """Section 7, sentence 2: only this thread can run that loop again, and it would wait."""
    flight = ShardedFlight()

    def body() -> Any:
        loop = asyncio.new_event_loop()
        end: asyncio.Future[str] = loop.create_future()

        async def function() -> str:
            return await end

        leader = loop.create_task(flight.do_async(function, "k"))
        loop.run_until_complete(eventually_async(lambda: flight.in_flight() == 1))
        with pytest.raises((DeadlockError, ExceptionGroup)) as caught:
            block(flight, "k")
        assert "k" in deadlock_in(caught.value).keys
        end.set_result("value")
        answer = loop.run_until_complete(leader)
        loop.close()
        return answer

    assert spawn(body).result(PATIENCE) == ("value", False)
    assert_clean(flight)


def test_a_blocking_result_for_an_execution_of_its_own_running_loop() -> None:
    """Section 7, sentence 2, for a future of `do_future`, which may join."""
    flight = ShardedFlight()

    async def main() -> Any:
        end: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def function() -> str:
            return await end

        leader = asyncio.create_task(flight.do_async(function, "k"))
        await eventually_async(lambda: flight.in_flight() == 1)
        follower = flight.do_future(never, "k")
        for wait in (follower.result, follower.exception):
            with pytest.raises(DeadlockError) as caught:
                wait(PATIENCE)
            assert caught.value.keys == ("k",)
        end.set_result("value")
        return await leader, follower.result(PATIENCE)

    assert spawn_loop(main).result(PATIENCE) == (("value", True), ("value", True))
    assert flight.stats().deadlocks == 2
    assert_clean(flight)


def sleeps(flight: ShardedFlight) -> bool:
    """Whether one thread waits, and has looked for a cycle. It is counted before that."""
    frames = list(current_frames().values())
    asleep = any(frame.f_code is Bell.wait.__code__ for frame in frames)
    return asleep and flight.stats().waiting == 1


@in_every_blocking_way
def test_a_blocking_call_for_an_execution_that_waits_for_its_loop(
    block: Callable[[ShardedFlight, str], object],
) -> None:
    """Section 7, sentence 2: "needing that loop", at second hand: a thread waits for its task."""
    flight = ShardedFlight()

    async def main() -> Any:
        end: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def needs_the_loop() -> str:
            return await end

        task = asyncio.create_task(flight.do_async(needs_the_loop, "inner"))
        await eventually_async(lambda: flight.in_flight() == 1)
        thread = spawn(flight.do, lambda: flight.do(never, "inner")[0], "outer")
        await eventually_async(lambda: sleeps(flight))
        with pytest.raises((DeadlockError, ExceptionGroup)) as caught:
            block(flight, "outer")
        assert {"outer", "inner"} <= set(deadlock_in(caught.value).keys)
        end.set_result("value")
        return (await task)[0], (await asyncio.wrap_future(thread))[0]

    assert spawn_loop(main).result(PATIENCE) == ("value", "value")
    assert_clean(flight)


def test_a_thread_that_would_wait_for_the_loop_which_is_blocked_for_it() -> None:
    """Section 7, sentence 1, with the loop's thread in the cycle: here the thread closes it."""
    flight = ShardedFlight()
    caught: list[DeadlockError] = []
    blocking = threading.Event()

    def of_the_thread() -> str:
        assert blocking.wait(PATIENCE)
        eventually(lambda: sleeps(flight), "the loop is blocked")
        try:
            flight.do(never, "of the loop")
        except DeadlockError as error:
            caught.append(error)
        return "fallback"

    async def main() -> Any:
        end: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def of_the_loop() -> str:
            return await end

        task = asyncio.create_task(flight.do_async(of_the_loop, "of the loop"))
        await eventually_async(lambda: flight.in_flight() == 1)
        thread = spawn(flight.do, of_the_thread, "of the thread")
        await eventually_async(lambda: flight.in_flight() == 2)
        blocking.set()
        answer, _ = flight.do(never, "of the thread")
        end.set_result("value")
        return answer, (await task)[0], (await asyncio.wrap_future(thread))[0]

    assert spawn_loop(main).result(PATIENCE) == ("fallback", "value", "fallback")
    assert set(caught[0].keys) == {"of the loop", "of the thread"}
    assert_clean(flight)


def test_two_loops_whose_threads_would_wait_for_each_other() -> None:
    """Section 7, sentence 2: each execution needs a loop that the other's thread would block."""
    flight = ShardedFlight()
    outcomes: dict[str, object] = {}
    ends = {"A": threading.Event(), "B": threading.Event()}
    first_blocks = threading.Event()

    async def main(own: str, other: str) -> None:
        async def function() -> str:
            await eventually_async(ends[own].is_set)
            return own

        task = asyncio.create_task(flight.do_async(function, own))
        await eventually_async(lambda: flight.in_flight() == 2)
        if own == "B":
            await eventually_async(first_blocks.is_set)
            await eventually_async(lambda: sleeps(flight))
        else:
            first_blocks.set()
        try:
            outcomes[own] = flight.do(never, other)[0]
        except DeadlockError as error:
            outcomes[own] = error
        ends[own].set()
        ends[other].set()
        await task

    loops = [spawn_loop(lambda: main("A", "B")), spawn_loop(lambda: main("B", "A"))]
    for loop in loops:
        loop.result(PATIENCE)
    assert outcomes["A"] == "B"
    assert isinstance(outcomes["B"], DeadlockError)
    assert set(outcomes["B"].keys) == {"A", "B"}
    assert_clean(flight)


def test_a_task_that_would_wait_for_a_loop_which_is_blocked_for_it() -> None:
    """Section 7, sentences 1 and 2: a coroutine's wait can close a cycle over a blocked loop."""
    flight = ShardedFlight()
    blocking = threading.Event()
    caught: list[DeadlockError] = []

    async def of_the_second_loop() -> str:
        await eventually_async(blocking.is_set)
        await eventually_async(lambda: sleeps(flight))
        try:
            await flight.do_async(never_async, "first")
        except DeadlockError as error:
            caught.append(error)
        return "fallback"

    async def main() -> Any:
        end: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def of_this_loop() -> str:
            return await end

        task = asyncio.create_task(flight.do_async(of_this_loop, "first"))
        second = spawn_loop(lambda: flight.do_async(of_the_second_loop, "second"))
        await eventually_async(lambda: flight.in_flight() == 2)
        blocking.set()
        answer, _ = flight.do(never, "second")
        end.set_result("value")
        return answer, (await task)[0], (await asyncio.wrap_future(second))[0]

    assert spawn_loop(main).result(PATIENCE) == ("fallback", "value", "fallback")
    assert_names(caught[0], "first", "second")
    assert_clean(flight)


def test_an_error_on_the_loops_thread_is_immediate() -> None:
    """Section 7, sentence 1: "at once": before any wait, with a loop that never gets its turn."""
    flight = ShardedFlight()

    async def main() -> int:
        turns = 0

        async def function() -> None:
            await asyncio.Event().wait()

        leader = asyncio.create_task(flight.do_async(function, "k"))
        await eventually_async(lambda: flight.in_flight() == 1)

        def turn() -> None:
            nonlocal turns
            turns += 1

        asyncio.get_running_loop().call_soon(turn)
        with pytest.raises(DeadlockError):
            flight.do(never, "k")
        seen = turns
        leader.cancel()
        return seen

    assert spawn_loop(main).result(PATIENCE) == 0
    assert_clean(flight)


# No false alarms.


def test_a_blocking_call_on_a_loops_thread_for_an_execution_that_needs_no_loop() -> None:
    """Section 7, sentence 2 speaks of executions "needing that loop" only."""
    flight = ShardedFlight()

    def function() -> str:
        eventually(lambda: flight.stats().waiting == 1)
        return "value"

    async def main() -> Any:
        bystander = asyncio.create_task(flight.do_async(asyncio.Event().wait, "bystander"))
        leader = spawn(flight.do, function, "k")
        await eventually_async(lambda: flight.in_flight() == 2)
        answer = flight.do(never, "k")
        bystander.cancel()
        return answer, await asyncio.wrap_future(leader)

    assert spawn_loop(main).result(PATIENCE) == (("value", True), ("value", True))
    assert flight.stats().deadlocks == 0
    assert_clean(flight)


def test_a_blocking_call_on_a_loops_thread_for_an_execution_of_another_loop() -> None:
    """Section 7, sentence 2 speaks of executions needing "that" loop only."""
    flight = ShardedFlight()

    async def function() -> str:
        await eventually_async(lambda: flight.stats().waiting == 1)
        return "value"

    async def main() -> Any:
        other = spawn_loop(lambda: flight.do_async(function, "k"))
        await eventually_async(lambda: flight.in_flight() == 1)
        return flight.do(never, "k"), await asyncio.wrap_future(other)

    assert spawn_loop(main).result(PATIENCE) == (("value", True), ("value", True))
    assert flight.stats().deadlocks == 0
    assert_clean(flight)


def test_a_blocking_call_for_an_execution_of_a_loop_that_its_thread_once_ran() -> None:
    """Section 7, sentence 2: a loop that another thread runs now does not need this thread."""
    flight = ShardedFlight()
    loop = asyncio.new_event_loop()

    def body() -> Any:
        loop.run_until_complete(asyncio.sleep(0))
        end = threading.Event()

        async def function() -> str:
            await eventually_async(end.is_set)
            await eventually_async(lambda: flight.stats().waiting == 1)
            return "value"

        leader = loop.create_task(flight.do_async(function, "k"))
        loop.run_until_complete(eventually_async(lambda: flight.in_flight() == 1))
        runner = spawn(loop.run_until_complete, leader)
        eventually(loop.is_running)
        end.set()
        return flight.do(never, "k"), runner.result(PATIENCE)

    assert spawn(body).result(PATIENCE) == (("value", True), ("value", True))
    assert flight.stats().deadlocks == 0
    assert_clean(flight)
    loop.close()


def test_a_diamond_of_tasks_is_no_cycle() -> None:
    """Section 7, sentence 1 speaks of cycles: A waits for B and C, and both wait for D."""
    flight = ShardedFlight()

    async def d() -> str:
        await eventually_async(lambda: flight.stats().waiting == 1)
        return "d"

    async def side() -> Any:
        return (await flight.do_async(d, "D"))[0]

    async def a() -> list[Any]:
        answers = await asyncio.gather(flight.do_async(side, "B"), flight.do_async(side, "C"))
        return [answer for answer, _ in answers]

    loop = spawn_loop(lambda: flight.do_async(a, "A"))
    assert loop.result(PATIENCE) == (["d", "d"], False)
    assert flight.stats().deadlocks == 0
    assert_clean(flight)


def test_a_diamond_of_threads_is_no_cycle() -> None:
    """Section 7, sentence 1 speaks of cycles: two threads below one, and one below both."""
    flight = ShardedFlight()

    def d() -> str:
        eventually(lambda: flight.stats().waiting == 1)
        return "d"

    def side() -> Any:
        return flight.do(d, "D")[0]

    def a() -> list[Any]:
        sides = [spawn(flight.do, side, key) for key in "BC"]
        return [each.result(PATIENCE)[0] for each in sides]

    assert spawn(flight.do, a, "A").result(PATIENCE) == (["d", "d"], False)
    assert flight.stats().deadlocks == 0
    assert_clean(flight)


def test_a_child_task_that_nobody_waits_for_may_ask_for_the_key() -> None:
    """Section 7, sentence 1: "on the same thread or task": a fire-and-forget child just waits."""
    flight = ShardedFlight()
    children: list[asyncio.Task[Any]] = []

    async def function() -> str:
        children.append(asyncio.create_task(flight.do_async(never_async, "k")))
        await eventually_async(lambda: flight.stats().waiting == 1 or children[0].done())
        return "value"

    async def main() -> Any:
        return await flight.do_async(function, "k"), await children[0]

    assert spawn_loop(main).result(PATIENCE) == (("value", True), ("value", True))
    assert flight.stats().deadlocks == 0
    assert_clean(flight)


@pytest.mark.parametrize("wait", WAITS, ids=lambda wait: wait.__name__)
def test_a_child_nobody_waits_for_while_the_function_waits_for_another_child(wait: Wait) -> None:
    """Section 7, sentence 1: waiting for one child is not waiting for its sibling."""
    flight = ShardedFlight()
    children: list[asyncio.Task[Any]] = []

    async def sibling() -> str:
        await eventually_async(lambda: flight.stats().waiting == 1 or children[0].done())
        return "value"

    async def function() -> Any:
        children.append(asyncio.create_task(flight.do_async(never_async, "k")))
        return await wait(sibling())

    async def main() -> Any:
        return await flight.do_async(function, "k"), await children[0]

    assert spawn_loop(main).result(PATIENCE) == (("value", True), ("value", True))
    assert flight.stats().deadlocks == 0
    assert_clean(flight)


def test_a_thread_that_nobody_waits_for_may_ask_for_the_key() -> None:
    """Section 7, sentence 1: "on the same thread": other threads wait, whatever they inherit."""
    flight = ShardedFlight()
    children: list[Future[Any]] = []

    def function() -> str:
        context = contextvars.copy_context()
        children.append(spawn(context.run, flight.do, never, "k"))
        eventually(lambda: flight.stats().waiting == 1 or children[0].done())
        return "value"

    assert spawn(flight.do, function, "k").result(PATIENCE) == ("value", True)
    assert children[0].result(PATIENCE) == ("value", True)
    assert flight.stats().deadlocks == 0
    assert_clean(flight)


def test_a_thread_started_by_a_coroutine_may_ask_for_its_key() -> None:
    """Section 7, sentence 1: `to_thread` copies the task's context, and is not that task."""
    flight = ShardedFlight()
    children: list[asyncio.Task[Any]] = []

    async def function() -> str:
        call = asyncio.to_thread(flight.do, never, "k")
        children.append(asyncio.create_task(call))
        await eventually_async(lambda: flight.stats().waiting == 1 or children[0].done())
        return "value"

    async def main() -> Any:
        return await flight.do_async(function, "k"), await children[0]

    assert spawn_loop(main).result(PATIENCE) == (("value", True), ("value", True))
    assert flight.stats().deadlocks == 0
    assert_clean(flight)


@pytest.mark.parametrize("leading", ["thread", "future"])
def test_a_future_of_the_own_key_is_no_wait_until_somebody_waits_for_it(leading: str) -> None:
    """Section 7, sentence 1 speaks of waits: `do_future` "never blocks its caller"."""
    flight = ShardedFlight()
    later: list[Future[Any]] = []

    def function() -> str:
        later.append(flight.do_future(never, "k"))
        return "value"

    leader: Future[Any] = (
        spawn(flight.do, function, "k") if leading == "thread" else flight.do_future(function, "k")
    )
    assert leader.result(PATIENCE) == ("value", True)
    assert later[0].result(PATIENCE) == ("value", True)
    assert flight.stats().deadlocks == 0
    assert_clean(flight)


def test_a_child_may_outlive_the_execution_that_made_it_and_ask_again() -> None:
    """Section 7, sentence 1: what a task inherited from an ended execution proves nothing."""
    flight = ShardedFlight()
    children: list[asyncio.Task[Any]] = []
    ended = threading.Event()

    async def late() -> Any:
        await eventually_async(ended.is_set)
        return await flight.do_async(never_async, "k")

    async def first() -> str:
        children.append(asyncio.create_task(late()))
        return "first"

    async def second() -> str:
        ended.set()
        await eventually_async(lambda: flight.stats().waiting == 1 or children[0].done())
        return "second"

    async def main() -> Any:
        await flight.do_async(first, "k")
        return await flight.do_async(second, "k"), await children[0]

    assert spawn_loop(main).result(PATIENCE) == (("second", True), ("second", True))
    assert flight.stats().deadlocks == 0
    assert_clean(flight)


def test_a_child_nobody_waits_for_may_lead_a_key_that_waits_for_the_parents() -> None:
    """Section 7, sentence 1: B waits for A, but A does not wait for its child, who leads B."""
    flight = ShardedFlight()
    children: list[asyncio.Task[Any]] = []

    async def b() -> Any:
        return (await flight.do_async(never_async, "A"))[0]

    async def a() -> str:
        children.append(asyncio.create_task(flight.do_async(b, "B")))
        await eventually_async(lambda: flight.stats().waiting == 1 or children[0].done())
        return "a"

    async def main() -> Any:
        return await flight.do_async(a, "A"), await children[0]

    assert spawn_loop(main).result(PATIENCE) == (("a", True), ("a", False))
    assert flight.stats().deadlocks == 0
    assert_clean(flight)


def test_the_same_key_in_two_flights_is_no_recursion() -> None:
    """Section 7, sentence 1 speaks of "that key's own function": flights share no keys."""
    first, second = ShardedFlight(), ShardedFlight()
    answer = spawn(first.do, lambda: second.do(lambda: "inner", "k")[0], "k")
    assert answer.result(PATIENCE) == ("inner", False)

    async def outer() -> Any:
        async def inner() -> str:
            return "inner"

        return (await second.do_async(inner, "k"))[0]

    loop = spawn_loop(lambda: first.do_async(outer, "k"))
    assert loop.result(PATIENCE) == ("inner", False)
    assert_clean(first, second)


def test_a_call_for_the_own_key_after_forget_starts_anew() -> None:
    """Section 7 with 6: the newer execution is another one, and nobody waits for himself."""
    flight = ShardedFlight()

    def function() -> Any:
        flight.forget("k")
        return flight.do(lambda: "newer", "k")[0]

    assert spawn(flight.do, function, "k").result(PATIENCE) == ("newer", False)
    assert flight.stats().deadlocks == 0
    assert_clean(flight)


def test_a_wait_that_timed_out_is_no_part_of_a_cycle() -> None:
    """Section 7, sentence 1: A's function has given B up when B's asks for A."""
    flight = ShardedFlight()
    gave_up = threading.Event()

    def a() -> str:
        eventually(lambda: flight.in_flight() == 2)
        with pytest.raises(FlightTimeout):
            flight.do(never, "B", timeout=0.01)
        gave_up.set()
        eventually(lambda: flight.stats().waiting == 1)
        return "a"

    def b() -> Any:
        assert gave_up.wait(PATIENCE)
        return flight.do(never, "A")[0]

    callers = [spawn(flight.do, a, "A"), spawn(flight.do, b, "B")]
    assert [caller.result(PATIENCE) for caller in callers] == [("a", True), ("a", False)]
    assert flight.stats().deadlocks == 0
    assert_clean(flight)


def test_a_wait_that_was_cancelled_is_no_part_of_a_cycle() -> None:
    """Section 7, sentence 1: the same with `asyncio.timeout` around a coroutine's wait."""
    flight = ShardedFlight()
    gave_up = threading.Event()

    async def a() -> str:
        await eventually_async(lambda: flight.in_flight() == 2)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await flight.do_async(never_async, "B")
        gave_up.set()
        await eventually_async(lambda: flight.stats().waiting == 1)
        return "a"

    async def b() -> Any:
        await eventually_async(gave_up.is_set)
        return (await flight.do_async(never_async, "A"))[0]

    async def main() -> Any:
        return await asyncio.gather(flight.do_async(a, "A"), flight.do_async(b, "B"))

    assert spawn_loop(main).result(PATIENCE) == [("a", True), ("a", False)]
    assert flight.stats().deadlocks == 0
    assert_clean(flight)


class Lost(BaseException):
    """Loses the leader."""


def undone(monkeypatch: pytest.MonkeyPatch, undo: Callable[[], object]) -> list[Cycle]:
    """Has `undo` called whenever a cycle has been found, before anybody is told; lists them."""
    found: list[Cycle] = []
    find = _deadlock._find_cycle

    def find_and_undo(*args: Any) -> Cycle | None:
        cycle = find(*args)
        if cycle is not None:
            found.append(cycle)
            undo()
        return cycle

    monkeypatch.setattr(_deadlock, "_find_cycle", find_and_undo)
    return found


@pytest.mark.parametrize("end", ["value", "error", "lost"])
@pytest.mark.parametrize("refused", ["thread", "task", "child"])
def test_who_is_served_when_the_cycle_is_found_is_not_refused(
    refused: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Section 7, sentence 1, and section 9: A's function gives B up at that moment, and A ends."""
    flight = ShardedFlight(1)
    give_up: list[Callable[[], object]] = []
    entered = threading.Event()

    async def a() -> str:
        loop = asyncio.get_running_loop()
        await eventually_async(lambda: flight.in_flight() == 2)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as limit:
                give_up.append(lambda: loop.call_soon_threadsafe(limit.reschedule, loop.time()))
                loop.call_soon(entered.set)  # not before this task waits
                await flight.do_async(never_async, "B")
        if end == "lost":
            raise Lost
        if end == "error":
            raise ValueError("a")
        return "a"

    async def anew() -> str:
        return "anew"

    def b() -> Any:
        assert entered.wait(PATIENCE)
        return flight.do(lambda: "anew", "A")

    async def b_async() -> Any:
        await eventually_async(entered.is_set)
        if refused == "task":
            return await flight.do_async(anew, "A")
        child = asyncio.create_task(flight.do_async(anew, "A"))
        await eventually_async(lambda: flight.stats().waiting == 2)
        return await child

    first = spawn_loop(lambda: flight.do_async(a, "A"))

    def undo() -> None:
        give_up[0]()
        eventually(first.done, "the end of A")

    found = undone(monkeypatch, undo)
    if refused == "thread":
        second = spawn(flight.do, b, "B")
    else:
        second = spawn_loop(lambda: flight.do_async(b_async, "B"))
    if end == "error":
        with pytest.raises(ValueError, match="a"):
            second.result(PATIENCE)
    else:
        answer = ("a", True) if end == "value" else ("anew", False)
        assert second.result(PATIENCE) == (answer, False)
    assert len(found) == 1
    stats = flight.stats()
    assert (stats.deadlocks, stats.shared) == (0, 0 if end == "lost" else 1)
    assert stats.promotions == (1 if end == "lost" else 0)
    assert_clean(flight)


@pytest.mark.parametrize("follower", ["thread", "task"])
def test_after_a_hand_over_the_new_leader_is_the_one_who_is_waited_for(follower: str) -> None:
    """Section 7 with 4: the promoted caller takes the lost one's place in every cycle."""
    flight = ShardedFlight()
    gate = threading.Event()
    caught: list[DeadlockError] = []

    def lost() -> None:
        eventually(gate.is_set)
        raise Lost

    def own() -> Any:
        eventually(lambda: flight.stats().waiting == 1, "B waits for A")
        try:
            flight.do(never, "B")
        except DeadlockError as error:
            caught.append(error)
        return "a"

    async def own_async() -> Any:
        await eventually_async(lambda: flight.stats().waiting == 1, "B waits for A")
        try:
            await flight.do_async(never_async, "B")
        except DeadlockError as error:
            caught.append(error)
        return "a"

    def lose_and_come_back() -> Any:
        with pytest.raises(Lost):
            flight.do(lost, "A")
        return flight.do(lambda: flight.do(never, "A")[0], "B")

    leader = spawn(lose_and_come_back)
    eventually(lambda: flight.in_flight() == 1)
    taker = (
        spawn(flight.do, own, "A")
        if follower == "thread"
        else spawn_loop(lambda: flight.do_async(own_async, "A"))
    )
    eventually(lambda: flight.stats().waiting == 1)
    gate.set()
    assert taker.result(PATIENCE) == ("a", True)
    assert leader.result(PATIENCE) == ("a", False)
    assert_names(caught[0], "A", "B")
    assert flight.stats().deadlocks == 1
    assert_clean(flight)


# Random waits.


@pytest.fixture
def busy_switching() -> Iterator[None]:
    """Threads change places often, so that few calls make many overlaps."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


class Graph:
    """Keys whose functions ask for the keys that `needs` tells, one after another."""

    def __init__(self, needs: dict[int, list[int]], pool: ThreadPoolExecutor) -> None:
        self.needs = needs
        self.flight = ShardedFlight(shards=4, executor=pool)
        self._local = threading.local()
        self._runners: list[asyncio.Runner] = []

    def plain(self, key: int) -> int:
        return 1 + sum(self.ask(need) for need in self.needs[key])

    def ask(self, key: int) -> int:
        value: int = self.flight.do(lambda: self.plain(key), key)[0]
        return value

    def by_future(self, key: int) -> int:
        value: int = self.flight.do_future(lambda: self.plain(key), key).result(PATIENCE)[0]
        return value

    def by_loop(self, key: int) -> int:
        value: int = self.flight.do(lambda: self.runner().run(self.main(key)), key)[0]
        return value

    def by_new_loop(self, key: int) -> int:
        # What is left when the function fails, its end cancels: others may take over.
        value: int = self.flight.do(lambda: asyncio.run(self.main(key)), key)[0]
        return value

    def runner(self) -> asyncio.Runner:
        """One for each thread: CPython 3.14t may crash where threads make many loops."""
        runner: asyncio.Runner | None = getattr(self._local, "runner", None)
        if runner is None:
            runner = self._local.runner = asyncio.Runner()
            self._runners.append(runner)
        return runner

    def close(self) -> None:
        for runner in self._runners:
            runner.close()

    async def main(self, key: int) -> int:
        return await (self.coroutine(key) if key % 2 else self.together(key))

    async def coroutine(self, key: int) -> int:
        await asyncio.sleep(0)
        total = 1
        for need in self.needs[key]:
            total += await self.ask_async(need)
        return total

    async def ask_async(self, key: int) -> int:
        value: int = (await self.flight.do_async(lambda: self.coroutine(key), key))[0]
        return value

    async def together(self, key: int) -> int:
        await asyncio.sleep(0)
        answers = await asyncio.gather(*(self.ask_together(need) for need in self.needs[key]))
        return 1 + sum(answers)

    async def ask_together(self, key: int) -> int:
        value: int = (await self.flight.do_async(lambda: self.together(key), key))[0]
        return value

    def size(self, key: int) -> int:
        return 1 + sum(self.size(need) for need in self.needs[key])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.usefixtures("busy_switching")
def test_thousands_of_nested_waits_without_a_cycle_never_raise(seed: int) -> None:
    """Section 7, sentence 1: no false alarm, with threads, tasks, children and futures at once."""
    chance = random.Random(seed)
    keys = range(14)
    needs = {
        key: chance.sample(range(key + 1, 14), min(chance.randrange(3), 13 - key)) for key in keys
    }
    with ThreadPoolExecutor(64) as pool:
        graph = Graph(needs, pool)
        start = threading.Barrier(6)

        def by_thread(seed: int) -> None:
            chance = random.Random(seed)
            start.wait(PATIENCE)
            for _ in range(60):
                key = chance.choice(keys)
                ask = chance.choices((graph.by_future, graph.by_loop, graph.ask), (2, 3, 5))[0]
                assert ask(key) == graph.size(key)

        async def by_tasks(seed: int) -> None:
            chance = random.Random(seed)
            start.wait(PATIENCE)

            async def one(key: int, ask: Callable[[int], Awaitable[int]]) -> None:
                assert await ask(key) == graph.size(key)

            for _ in range(10):
                asks = [chance.choice((graph.ask_async, graph.ask_together)) for _ in range(12)]
                await asyncio.gather(*(one(chance.choice(keys), ask) for ask in asks))

        callers = [spawn(by_thread, seed * 10 + n) for n in range(4)]
        callers += [spawn_loop(lambda n=n: by_tasks(seed * 10 + n)) for n in (5, 6)]
        for caller in callers:
            caller.result(PATIENCE)
        stats = graph.flight.stats()
        assert stats.deadlocks == 0
        assert stats.shared > 0, "no call has waited: the test shows nothing"
        assert_clean(graph.flight)
        graph.close()


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.usefixtures("busy_switching")
def test_random_waits_with_cycles_end_for_everybody(seed: int) -> None:
    """Section 7, sentence 1: any cycle is an error of somebody, so that nobody waits for ever.

    Every key needs another one, so no function can ever return: everybody gets the error.
    """
    chance = random.Random(seed)
    keys = range(6)
    needs = {key: chance.sample(keys, chance.randrange(1, 3)) for key in keys}
    with ThreadPoolExecutor(32) as pool:
        graph = Graph(needs, pool)
        start = threading.Barrier(len(keys) + 2)

        def by_thread(ask: Callable[[int], int], key: int) -> None:
            start.wait(PATIENCE)
            with pytest.raises(DeadlockError):
                ask(key)

        async def by_tasks(ask: Callable[[int], Awaitable[int]]) -> None:
            start.wait(PATIENCE)
            answers = await asyncio.gather(*map(ask, keys), return_exceptions=True)
            assert {type(answer) for answer in answers} == {DeadlockError}

        asks = [chance.choice((graph.ask, graph.by_future, graph.by_new_loop)) for _ in keys]
        callers = [spawn(by_thread, ask, key) for ask, key in zip(asks, keys, strict=True)]
        callers.append(spawn_loop(lambda: by_tasks(graph.ask_async)))
        callers.append(spawn_loop(lambda: by_tasks(graph.ask_together)))
        for caller in callers:
            caller.result(PATIENCE)
        assert graph.flight.stats().deadlocks > 0
        assert_clean(graph.flight, key=0)


NAMES_CYCLES = """
import faulthandler, gc, threading, time
from shardedflight import DeadlockError, ShardedFlight

faulthandler.dump_traceback_later(60, exit=True)

class Garbage:
    def __init__(self):
        self.me = self
    def __del__(self):
        Garbage()  # so that each collection finds one
        time.sleep(0)

def start_threads():
    while True:
        threading.Thread(target=int).start()

def descend(depth):
    return descend(depth - 1) if depth else threading.Event().wait()

for target, args in ((start_threads, ()), (descend, (50,))):
    threading.Thread(target=target, args=args, daemon=True).start()
flight = ShardedFlight()
gc.set_threshold(1)
Garbage()
for _ in range(100):
    try:
        flight.do(lambda: flight.do(int, "k"), "k")
    except DeadlockError:
        pass
    else:
        raise AssertionError
    assert gc.isenabled()
gc.set_threshold(0)
import os
os._exit(0)
"""


def test_a_cycle_is_named_while_garbage_is_collected_and_threads_start() -> None:
    """Section 7, sentence 1: on 3.11 before 3.11.9 that can stop the whole process."""
    process = subprocess.run(
        [sys.executable, "-c", NAMES_CYCLES],
        capture_output=True,
        text=True,
        timeout=PATIENCE * 3,
        check=False,
    )
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("shards", [1, 4])
def test_recursion_inside_of_a_hook_is_found(shards: int) -> None:
    """7: the hash hook of another call, made inside the key's function, asks for the key."""
    found: list[DeadlockError] = []
    flight: ShardedFlight

    def hook(key: object) -> int:
        if key == "other" and not found:
            with pytest.raises(DeadlockError) as caught:
                flight.do(never, "k")
            found.append(caught.value)
        return hash(key)

    flight = ShardedFlight(shards, hash=hook)
    assert flight.do(lambda: flight.do(lambda: "inner", "other"), "k") == (("inner", False), False)
    assert [error.keys for error in found] == [("k", "k")]
    assert flight.in_flight() == 0
