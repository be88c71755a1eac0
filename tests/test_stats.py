"""Section 10 of the contract: every field of `stats()`, in every scenario that moves it."""

import asyncio
import dataclasses
import gc
import random
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from support import PATIENCE, eventually, eventually_async, spawn, spawn_loop

from shardedflight import DeadlockError, FlightTimeout, ShardedFlight, Stats

TOTALS = (
    "executions",
    "shared",
    "errors",
    "promotions",
    "timeouts",
    "abandoned",
    "forgotten",
    "deadlocks",
)
GAUGES = ("in_flight", "waiting")
#: What test_tiers is about; all of it is 0 here.
REMOTE = ("remote_leads", "remote_follows", "takeovers", "fenced", "fallbacks", "misses")


class Lost(BaseException):
    """Loses the leader."""


class Held:
    """A function that runs until its gate is opened, plain and as a coroutine."""

    def __init__(self, end: Any = "value") -> None:
        self.end = end
        self.gate = threading.Event()
        self.started = threading.Event()

    def _finish(self) -> Any:
        if isinstance(self.end, BaseException):
            raise self.end
        return self.end

    def plain(self) -> Any:
        self.started.set()
        eventually(self.gate.is_set, "the gate")
        return self._finish()

    async def coroutine(self) -> Any:
        self.started.set()
        await eventually_async(self.gate.is_set, "the gate")
        return self._finish()

    def by(self, kind: str, flight: ShardedFlight, *parts: Any) -> "Future[Any]":
        if kind == "thread":
            return spawn(flight.do, self.plain, *parts)
        if kind == "task":
            return spawn_loop(lambda: flight.do_async(self.coroutine, *parts))
        return flight.do_future(self.plain, *parts)

    def lead(self, kind: str, flight: ShardedFlight, *parts: Any) -> "Future[Any]":
        caller = self.by(kind, flight, *parts)
        assert self.started.wait(PATIENCE)
        return caller


KINDS = ("thread", "task", "future")
of_every_kind = pytest.mark.parametrize("kind", KINDS)


def follow(kind: str, flight: ShardedFlight, *parts: Any, end: Any = "own") -> "Future[Any]":
    """Starts one more follower, which would end at once if it ran; returns when it waits."""
    held = Held(end)
    held.gate.set()
    waiting = flight.stats().waiting
    caller = held.by(kind, flight, *parts)
    eventually(lambda: flight.stats().waiting == waiting + 1, "one more follower")
    return caller


def assert_counts(flight: ShardedFlight, **expected: int) -> None:
    """Every field is as expected; those that are not named are 0."""
    fields = dict.fromkeys((*TOTALS, *GAUGES), 0) | expected

    def as_expected() -> bool:
        stats = flight.stats()
        return {name: getattr(stats, name) for name in fields} == fields

    try:
        eventually(as_expected)
    except AssertionError:
        stats = flight.stats()
        assert {name: getattr(stats, name) for name in fields} == fields
    assert sum(flight.stats().per_shard) == fields["in_flight"] == flight.in_flight()


# "`stats()` -> frozen dataclass with running totals and gauges".


def test_stats_is_a_frozen_dataclass_with_exactly_these_fields() -> None:
    """Section 10, sentence 1: names, kinds and order of use."""
    stats = ShardedFlight(4).stats()
    assert type(stats) is Stats
    assert dataclasses.is_dataclass(stats)
    assert {field.name for field in dataclasses.fields(stats)} == {
        *TOTALS,
        *GAUGES,
        "per_shard",
        *REMOTE,
    }
    assert all(type(getattr(stats, name)) is int for name in (*TOTALS, *GAUGES))
    assert stats.per_shard == (0, 0, 0, 0)
    assert type(stats.per_shard) is tuple


@pytest.mark.parametrize("name", [*TOTALS, *GAUGES, "per_shard", "something else"])
def test_a_snapshot_is_frozen(name: str) -> None:
    """Section 10, sentence 1: "frozen"."""
    stats = ShardedFlight().stats()
    with pytest.raises((dataclasses.FrozenInstanceError, TypeError)):
        setattr(stats, name, 1)


@pytest.mark.parametrize("shards", [None, 1, 4096])
def test_a_flight_in_which_nothing_has_been_called_is_small(shards: int | None) -> None:
    ShardedFlight(shards)
    gc.collect()
    tracemalloc.start()
    try:
        flight = ShardedFlight(shards)
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size < 64 * 1024
    assert len(flight.stats().per_shard) == flight.shards


def test_a_snapshot_does_not_follow_the_flight() -> None:
    """Section 10, sentence 1: a snapshot; and equal ones are equal."""
    flight = ShardedFlight()
    before = flight.stats()
    assert before == flight.stats()
    flight.do(lambda: 1, "k")
    assert before.executions == 0
    assert before != flight.stats()


@pytest.mark.parametrize("shards", [1, 2, 64])
def test_a_new_flight_counts_nothing(shards: int) -> None:
    """Section 10, sentence 1: every field starts at 0, and `per_shard` has one for each shard."""
    flight = ShardedFlight(shards)
    assert_counts(flight)
    assert len(flight.stats().per_shard) == flight.shards == shards


# `executions`, `shared`, `in_flight`, `waiting`.


@of_every_kind
def test_a_call_alone_is_one_execution(kind: str) -> None:
    """Section 10: `executions` counts runs, `in_flight` those running, `shared` nobody."""
    flight = ShardedFlight()
    held = Held()
    caller = held.lead(kind, flight, "k")
    assert_counts(flight, executions=1, in_flight=1)
    held.gate.set()
    assert caller.result(PATIENCE) == ("value", False)
    assert_counts(flight, executions=1)


@pytest.mark.parametrize("following", KINDS)
@of_every_kind
def test_followers_are_waiting_and_then_shared(kind: str, following: str) -> None:
    """Section 10: `shared` counts "callers served by somebody else's execution", not the leader."""
    flight = ShardedFlight()
    held = Held()
    leader = held.lead(kind, flight, "k")
    followers = [follow(following, flight, "k") for _ in range(3)]
    assert_counts(flight, executions=1, in_flight=1, waiting=3)
    held.gate.set()
    for caller in (leader, *followers):
        assert caller.result(PATIENCE) == ("value", True)
    assert_counts(flight, executions=1, shared=3)


@of_every_kind
def test_totals_run_on(kind: str) -> None:
    """Section 10: "running totals", over one execution after another."""
    flight = ShardedFlight()
    for n in range(1, 4):
        held = Held()
        leader = held.lead(kind, flight, "k")
        follower = follow("thread", flight, "k")
        held.gate.set()
        assert leader.result(PATIENCE) == follower.result(PATIENCE) == ("value", True)
        assert_counts(flight, executions=n, shared=n)


# `errors`.


@of_every_kind
def test_an_exception_is_one_error_however_many_get_it(kind: str) -> None:
    """Section 10: `errors` counts executions; who got the error was served like any other."""
    flight = ShardedFlight()
    held = Held(LookupError())
    leader = held.lead(kind, flight, "k")
    followers = [follow("thread", flight, "k") for _ in range(2)]
    held.gate.set()
    for caller in (leader, *followers):
        assert isinstance(caller.exception(PATIENCE), LookupError)
    assert_counts(flight, executions=1, errors=1, shared=2)


def test_an_error_before_the_call_begins_counts_nothing() -> None:
    """Section 10 with 1: "nothing is registered" for a key that is no key."""
    flight = ShardedFlight()
    unhashable: Any = []
    with pytest.raises(TypeError):
        flight.do(lambda: 1, unhashable)
    assert_counts(flight)


# `promotions`.


@pytest.mark.parametrize("following", KINDS)
@of_every_kind
def test_a_lost_leader_is_a_promotion_and_one_more_execution(kind: str, following: str) -> None:
    """Section 10: `promotions`; the promoted run is an execution, and the loss is no error."""
    flight = ShardedFlight()
    held = Held(Lost())
    leader = held.lead(kind, flight, "k")
    followers = [follow(following, flight, "k") for _ in range(3)]
    held.gate.set()
    assert isinstance(leader.exception(PATIENCE), Lost)
    for follower in followers:
        assert follower.result(PATIENCE) == ("own", True)
    assert_counts(flight, executions=2, promotions=1, shared=2)


@of_every_kind
def test_a_leader_lost_without_followers_promotes_nobody(kind: str) -> None:
    """Section 10: `promotions` counts hand-overs, not losses."""
    flight = ShardedFlight()
    held = Held(Lost())
    leader = held.lead(kind, flight, "k")
    held.gate.set()
    assert isinstance(leader.exception(PATIENCE), Lost)
    assert_counts(flight, executions=1)


# `timeouts`.


@of_every_kind
def test_a_timeout_is_counted_and_the_follower_waits_no_more(kind: str) -> None:
    """Section 10: `timeouts` counts followers that left, who are not `shared`."""
    flight = ShardedFlight()
    held = Held()
    leader = held.lead(kind, flight, "k")
    for _ in range(2):
        with pytest.raises(FlightTimeout):
            flight.do(lambda: "own", "k", timeout=0.005)
    assert_counts(flight, executions=1, in_flight=1, timeouts=2)
    held.gate.set()
    assert leader.result(PATIENCE) == ("value", False)
    assert_counts(flight, executions=1, timeouts=2)


def test_a_timeout_that_the_function_raised_is_an_error() -> None:
    """Section 10: `timeouts` are the flight's own, whatever a function may raise."""
    flight = ShardedFlight()

    def function() -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        flight.do(function, "k", timeout=PATIENCE)
    assert_counts(flight, executions=1, errors=1)


# `abandoned`.


def test_a_task_that_everybody_left_is_abandoned() -> None:
    """Section 10: `abandoned` counts executions that their last caller's departure ended."""
    flight = ShardedFlight()

    async def main() -> None:
        callers = [
            asyncio.create_task(flight.do_async(asyncio.Event().wait, "k")) for _ in range(3)
        ]
        await eventually_async(lambda: flight.stats().waiting == 2)
        for n, caller in enumerate(callers, 1):
            assert flight.stats().abandoned == 0
            caller.cancel()
            await asyncio.wait([caller])
            await eventually_async(lambda n=n: flight.stats().abandoned == (n == 3))
        await eventually_async(lambda: flight.in_flight() == 0)

    spawn_loop(main).result(PATIENCE)
    assert_counts(flight, executions=1, abandoned=1)


def test_an_abandoned_execution_counts_as_in_flight_until_it_has_ended() -> None:
    """Section 10 with 5: `in_flight` are executions running now, wanted or not."""
    flight = ShardedFlight()
    gate = threading.Event()

    async def dies_slowly() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await eventually_async(gate.is_set)

    async def main() -> None:
        caller = asyncio.create_task(flight.do_async(dies_slowly, "k"))
        await eventually_async(lambda: flight.in_flight() == 1)
        await asyncio.sleep(0)
        caller.cancel()
        await asyncio.wait([caller])
        await eventually_async(lambda: flight.stats().abandoned == 1)
        assert flight.in_flight() == 1
        gate.set()
        await eventually_async(lambda: flight.in_flight() == 0)

    spawn_loop(main).result(PATIENCE)
    assert_counts(flight, executions=1, abandoned=1)


def test_with_finish_nothing_is_abandoned() -> None:
    """Section 10 with 5: `on_abandon="finish"` lets the execution run to its end."""
    flight = ShardedFlight(on_abandon="finish")
    held = Held()

    async def main() -> None:
        caller = asyncio.create_task(flight.do_async(held.coroutine, "k"))
        await eventually_async(held.started.is_set)
        caller.cancel()
        await asyncio.wait([caller])
        assert flight.in_flight() == 1
        held.gate.set()
        await eventually_async(lambda: flight.in_flight() == 0)

    spawn_loop(main).result(PATIENCE)
    assert_counts(flight, executions=1)


@pytest.mark.parametrize("following", ["task", "future"])
def test_a_follower_that_is_cancelled_waits_no_more_and_is_no_total(following: str) -> None:
    """Section 10: a cancelled follower leaves `waiting` and is not `shared`."""
    flight = ShardedFlight()
    held = Held()
    leader = held.lead("thread", flight, "k")
    if following == "future":
        follower = follow("future", flight, "k")
        assert follower.cancel()
    else:

        async def main() -> None:
            caller = asyncio.create_task(flight.do_async(Held().coroutine, "k"))
            await eventually_async(lambda: flight.stats().waiting == 1)
            caller.cancel()
            await asyncio.wait([caller])

        spawn_loop(main).result(PATIENCE)
    assert_counts(flight, executions=1, in_flight=1)
    held.gate.set()
    assert leader.result(PATIENCE) == ("value", False)
    assert_counts(flight, executions=1)


# `forgotten`.


@of_every_kind
def test_forget_is_counted_and_the_execution_stays_in_flight(kind: str) -> None:
    """Section 10 with 6: `forgotten` counts executions; `in_flight` has them until they end."""
    flight = ShardedFlight()
    old, new = Held("old"), Held("new")
    old_leader = old.lead(kind, flight, "k")
    follower = follow("thread", flight, "k")
    flight.forget("k")
    assert_counts(flight, executions=1, in_flight=1, waiting=1, forgotten=1)
    new_leader = new.lead(kind, flight, "k")
    assert_counts(flight, executions=2, in_flight=2, waiting=1, forgotten=1)
    flight.forget("k")
    assert_counts(flight, executions=2, in_flight=2, waiting=1, forgotten=2)
    old.gate.set()
    assert old_leader.result(PATIENCE) == follower.result(PATIENCE) == ("old", True)
    assert_counts(flight, executions=2, shared=1, in_flight=1, forgotten=2)
    new.gate.set()
    assert new_leader.result(PATIENCE) == ("new", False)
    assert_counts(flight, executions=2, shared=1, forgotten=2)


def test_forgetting_what_is_not_there_counts_nothing() -> None:
    """Section 10 with 6: "Forgetting an idle key is a no-op", and so is doing it twice."""
    flight = ShardedFlight()
    flight.forget("k")
    held = Held()
    leader = held.lead("thread", flight, "k")
    flight.forget("another")
    flight.forget("k")
    flight.forget("k")
    assert_counts(flight, executions=1, in_flight=1, forgotten=1)
    held.gate.set()
    leader.result(PATIENCE)
    flight.forget("k")
    assert_counts(flight, executions=1, forgotten=1)


# `deadlocks`.


def test_a_deadlock_is_counted_for_the_call_that_raised_it() -> None:
    """Section 10 with 7: `deadlocks`; the function that passed it on ended by an exception."""
    flight = ShardedFlight()

    def recursion() -> Any:
        return flight.do(lambda: "own", "k")

    async def recursion_async() -> Any:
        return await flight.do_async(Held().coroutine, "k")

    assert isinstance(spawn(flight.do, recursion, "k").exception(PATIENCE), DeadlockError)
    assert_counts(flight, executions=1, errors=1, deadlocks=1)
    loop = spawn_loop(lambda: flight.do_async(recursion_async, "k"))
    assert isinstance(loop.exception(PATIENCE), DeadlockError)
    assert_counts(flight, executions=2, errors=2, deadlocks=2)


# Many keys.


@pytest.mark.parametrize("kind", ["do_many", "do_many_async"])
def test_each_key_of_many_counts_as_one_execution(kind: str) -> None:
    """Section 10 with 8: an execution is a run for a key, though one call runs it for many."""
    flight = ShardedFlight(4)
    gate = threading.Event()

    def plain(keys: list[str]) -> dict[str, str]:
        eventually(gate.is_set)
        return dict.fromkeys(keys, "row")

    async def coroutine(keys: list[str]) -> dict[str, str]:
        await eventually_async(gate.is_set)
        return dict.fromkeys(keys, "row")

    caller = (
        spawn(flight.do_many, plain, "abc")
        if kind == "do_many"
        else spawn_loop(lambda: flight.do_many_async(coroutine, "abc"))
    )
    eventually(lambda: flight.in_flight() == 3)
    follower = follow("thread", flight, "b")
    assert_counts(flight, executions=3, in_flight=3, waiting=1)
    gate.set()
    assert follower.result(PATIENCE) == ("row", True)
    assert caller.result(PATIENCE)["b"] == ("row", True)
    assert_counts(flight, executions=3, shared=1)


# `per_shard`.


def test_per_shard_tells_where_executions_are() -> None:
    """Section 10: "`per_shard` (executions in flight in each shard)", by the low bits of `hash`."""
    flight = ShardedFlight(8, hash=lambda key: key)
    held = [Held() for _ in range(5)]
    keys = [3, 3 + 8, 5, 7, 7 + 80]
    callers = [each.lead("thread", flight, key) for each, key in zip(held, keys, strict=True)]
    assert flight.stats().per_shard == (0, 0, 0, 2, 0, 1, 0, 2)
    flight.forget(5)
    assert flight.stats().per_shard == (0, 0, 0, 2, 0, 1, 0, 2)
    for each in held:
        each.gate.set()
    for caller in callers:
        caller.result(PATIENCE)
    assert flight.stats().per_shard == (0,) * 8


# "Totals never go backwards and never miss a call".


@pytest.fixture
def busy_switching() -> Iterator[None]:
    """Threads change places often, so that few calls make many overlaps."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


class Watcher:
    """Reads `stats()` for as long as the body runs; remembers what went wrong."""

    def __init__(self, *flights: ShardedFlight) -> None:
        self._flights = flights
        self._stop = threading.Event()
        self.read = 0

    def _watch(self) -> None:
        before = {flight: flight.stats() for flight in self._flights}
        while not self._stop.is_set():
            for flight in self._flights:
                stats = flight.stats()
                for name in TOTALS:
                    was, now = getattr(before[flight], name), getattr(stats, name)
                    assert now >= was, f"{name} went backwards, from {was} to {now}"
                assert min(stats.in_flight, stats.waiting, *stats.per_shard) >= 0
                assert sum(stats.per_shard) == stats.in_flight
                before[flight] = stats
                self.read += 1

    def __enter__(self) -> "Watcher":
        self._watching = spawn(self._watch)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._watching.result(PATIENCE)


@pytest.mark.parametrize("shards", [1, 16])
@pytest.mark.usefixtures("busy_switching")
def test_totals_are_exact_under_eight_threads_and_two_flights(shards: int) -> None:
    """Section 10, sentence 2: calls == executions + shared, where nobody leaves."""
    flights = [ShardedFlight(shards), ShardedFlight(shards)]
    start = threading.Barrier(8)
    calls, failures = 600, 0.2

    def worker(seed: int) -> tuple[list[int], int]:
        chance = random.Random(seed)
        runs = 0
        called = [0, 0]

        def function() -> None:
            nonlocal runs
            runs += 1
            if chance.random() < failures:
                raise LookupError

        start.wait(PATIENCE)
        for _ in range(calls):
            n = chance.randrange(2)
            called[n] += 1
            try:
                flights[n].do(function, chance.randrange(3))
            except LookupError:
                pass
        return called, runs

    with Watcher(*flights) as watcher:
        outcomes = [each.result(PATIENCE) for each in [spawn(worker, seed) for seed in range(8)]]
    assert watcher.read > 0
    stats = [flight.stats() for flight in flights]
    for n in range(2):
        called = sum(called[n] for called, _ in outcomes)
        assert stats[n].executions + stats[n].shared == called
    assert sum(each.executions for each in stats) == sum(runs for _, runs in outcomes)
    assert sum(each.errors for each in stats) > 0
    for n, flight in enumerate(flights):
        expected = {"executions": stats[n].executions, "shared": stats[n].shared}
        assert_counts(flight, **expected, errors=stats[n].errors)


@pytest.mark.usefixtures("busy_switching")
def test_totals_are_exact_with_every_kind_of_caller() -> None:
    """Section 10, sentence 2: threads, tasks and futures, errors and losses, counted exactly."""
    flight = ShardedFlight(4)
    start = threading.Barrier(6)
    runs: list[str] = []  # list.append never misses one

    def run(chance: random.Random) -> Callable[[], str]:
        fate = chance.choice(["value"] * 6 + ["error", "lost"])

        def function() -> str:
            runs.append(fate)
            if fate == "error":
                raise LookupError
            if fate == "lost":
                raise Lost
            return fate

        return function

    def by_thread(seed: int) -> int:
        chance = random.Random(seed)
        start.wait(PATIENCE)
        for _ in range(300):
            try:
                flight.do(run(chance), chance.randrange(3))
            except (LookupError, Lost):
                pass
        return 300

    def by_future(seed: int) -> int:
        chance = random.Random(seed)
        start.wait(PATIENCE)
        for _ in range(60):
            futures = [flight.do_future(run(chance), chance.randrange(3)) for _ in range(5)]
            for future in futures:
                assert isinstance(future.exception(PATIENCE), LookupError | Lost | None)
        return 300

    async def by_task(seed: int) -> int:
        chance = random.Random(seed)
        start.wait(PATIENCE)

        async def coroutine(function: Callable[[], str]) -> str:
            await asyncio.sleep(0)
            return function()

        async def one() -> None:
            function = run(chance)
            try:
                await flight.do_async(lambda: coroutine(function), chance.randrange(3))
            except (LookupError, Lost):
                pass

        for _ in range(30):
            await asyncio.gather(*(one() for _ in range(10)))
        return 300

    with Watcher(flight):
        callers = [spawn(by_thread, 1), spawn(by_thread, 2), spawn(by_future, 3)]
        callers += [spawn(by_future, 4), spawn_loop(lambda: by_task(5))]
        callers.append(spawn_loop(lambda: by_task(6)))
        called = sum(caller.result(PATIENCE) for caller in callers)
    eventually(lambda: flight.in_flight() == 0)
    stats = flight.stats()
    assert stats.executions + stats.shared == called
    assert stats.executions == len(runs)
    assert stats.errors == runs.count("error")
    assert stats.promotions <= runs.count("lost")
    assert (stats.timeouts, stats.abandoned, stats.forgotten, stats.deadlocks) == (0, 0, 0, 0)
    assert (stats.in_flight, stats.waiting, sum(stats.per_shard)) == (0, 0, 0)


def test_nothing_is_counted_at_a_place_that_all_shards_share() -> None:
    """10: "counting adds no contention point shared by all shards": another one's is taken."""
    flight = ShardedFlight(2)
    shards = {key: flight._place((key,))[2] for key in range(100)}
    mine = 0
    other = next(key for key in shards if shards[key] is not shards[mine])

    def fails() -> None:
        raise LookupError

    def calls() -> None:
        assert flight.do(lambda: "value", mine) == ("value", False)
        with pytest.raises(LookupError):
            flight.do(fails, mine)
        with pytest.raises(DeadlockError):
            flight.do(lambda: flight.do(int, mine), mine)
        held = Held()
        leader = spawn(flight.do, held.plain, mine)
        assert held.started.wait(PATIENCE)
        with pytest.raises(FlightTimeout):
            flight.do(int, mine, timeout=0)
        follower = spawn(flight.do, int, mine)
        eventually(lambda: shards[mine].waiting() == 1)
        flight.forget(mine)
        held.gate.set()
        assert leader.result(PATIENCE) == follower.result(PATIENCE) == ("value", True)

    with shards[other].lock:
        spawn(calls).result(PATIENCE)
    stats = flight.stats()
    assert [getattr(stats, total) for total in TOTALS] == [4, 1, 2, 0, 1, 0, 1, 1]
