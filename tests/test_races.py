"""Races: many callers of every kind on few keys, started at once, ended in every way.

Each test is bounded by the number of its operations, and seeded: what a caller does is decided by
its seed, what comes of it by the scheduler. The invariants must hold whatever that is.
"""

import asyncio
import collections
import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import PATIENCE, eventually, eventually_async, spawn, spawn_loop

import shardedflight
from shardedflight import FlightTimeout, ShardedFlight


class Lost(BaseException):
    """Loses the leader."""


@pytest.fixture(autouse=True)
def busy_switching() -> Iterator[None]:
    """Threads change places often, so that few calls make many overlaps."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


class Book:
    """Keeps account of every run and every answer, and checks them against each other."""

    def __init__(self, *, overlaps: bool) -> None:
        self._overlaps = overlaps
        self._lock = threading.Lock()
        self._runs = 0
        self._running: collections.Counter[int] = collections.Counter()
        self.calls = 0
        self.left = 0
        self.fates: collections.Counter[str] = collections.Counter()
        self.answers: dict[int, list[bool]] = {}

    def _begin(self, key: int) -> int:
        with self._lock:
            self._runs += 1
            self._running[key] += 1
            assert self._overlaps or self._running[key] == 1, f"two runs for the key {key} at once"
            return self._runs

    def _end(self, key: int, run: int, fate: str) -> tuple[int, int]:
        with self._lock:
            self._running[key] -= 1
            self.fates[fate] += 1
        if fate == "error":
            raise LookupError(key, run)
        if fate == "lost":
            raise Lost
        return key, run

    def plain(self, key: int, fate: str) -> Callable[[], tuple[int, int]]:
        def function() -> tuple[int, int]:
            run = self._begin(key)
            time.sleep(0)
            return self._end(key, run, fate)

        return function

    def coroutine(
        self, key: int, fate: str, turns: int
    ) -> Callable[[], Coroutine[Any, Any, tuple[int, int]]]:
        async def function() -> tuple[int, int]:
            run = self._begin(key)
            try:
                for _ in range(turns):
                    await asyncio.sleep(0)
            except BaseException:
                self._end(key, run, "cancelled")
                raise
            return self._end(key, run, fate)

        return function

    def note(self, key: int, outcome: Any) -> None:
        """Checks and counts what one caller got: a result, an exception, or "left"."""
        with self._lock:
            self.calls += 1
            if isinstance(outcome, (FlightTimeout, CancelledError, asyncio.CancelledError)):
                self.left += 1
            elif isinstance(outcome, LookupError):
                assert outcome.args[0] == key
            elif isinstance(outcome, BaseException):
                if not isinstance(outcome, Lost):
                    raise outcome
            else:
                (answered, run), shared = outcome
                assert answered == key
                self.answers.setdefault(run, []).append(shared)

    def check_shared(self) -> None:
        """The answer of one run says to all who got it whether they were several."""
        for run, shared in self.answers.items():
            assert shared == [len(shared) > 1] * len(shared), f"run {run} was shared {shared}"

    @property
    def runs(self) -> int:
        return self._runs


def assert_idle(flight: ShardedFlight, keys: range) -> None:
    """Nothing is left in flight, nobody waits, and every key works."""
    eventually(lambda: flight.in_flight() == 0, "nothing in flight")
    eventually(lambda: flight.stats().waiting == 0, "nobody waiting")
    assert not any(flight.stats().per_shard)
    for key in keys:
        assert spawn(flight.do, lambda: "again", key).result(PATIENCE) == ("again", False)


def outcome_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of the call, or the exception itself."""
    try:
        return call(*args, **kwargs)
    except BaseException as error:
        return error


FATES = ["value"] * 5 + ["error", "lost"]


@pytest.mark.parametrize("shards", [1, 8])
@pytest.mark.parametrize("seed", range(3))
def test_one_run_at_a_time_and_an_answer_for_everybody(seed: int, shards: int) -> None:
    """Sections 2, 4 and 10, where nobody leaves: no overlap, exact `shared`, exact totals."""
    keys = range(3)
    book = Book(overlaps=False)
    start = threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        flight = ShardedFlight(shards, executor=pool)

        def by_thread(seed: int) -> None:
            chance = random.Random(seed)
            start.wait(PATIENCE)
            for _ in range(150):
                key, fate = chance.choice(keys), chance.choice(FATES)
                book.note(key, outcome_of(flight.do, book.plain(key, fate), key))

        def by_future(seed: int) -> None:
            chance = random.Random(seed)
            start.wait(PATIENCE)
            for _ in range(30):
                chosen = [(chance.choice(keys), chance.choice(FATES)) for _ in range(5)]
                futures = [flight.do_future(book.plain(*each), each[0]) for each in chosen]
                for (key, _), future in zip(chosen, futures, strict=True):
                    book.note(key, outcome_of(future.result, PATIENCE))

        async def by_task(seed: int) -> None:
            chance = random.Random(seed)
            start.wait(PATIENCE)

            async def one() -> None:
                key, fate, turns = chance.choice(keys), chance.choice(FATES), chance.randrange(3)
                try:
                    outcome: Any = await flight.do_async(book.coroutine(key, fate, turns), key)
                except BaseException as error:
                    outcome = error
                book.note(key, outcome)

            for _ in range(15):
                await asyncio.gather(*(one() for _ in range(10)))

        seeds = range(seed * 100, seed * 100 + 8)
        callers = [spawn(by_thread, each) for each in seeds[:4]]
        callers += [spawn(by_future, each) for each in seeds[4:6]]
        callers += [spawn_loop(partial(by_task, each)) for each in seeds[6:]]
        for caller in callers:
            caller.result(PATIENCE)
        eventually(lambda: flight.in_flight() == 0)
        stats = flight.stats()
        assert book.calls == 8 * 150
        assert book.left == 0
        book.check_shared()
        assert stats.executions == book.runs
        assert stats.executions + stats.shared == book.calls
        assert stats.errors == book.fates["error"]
        assert 0 < stats.promotions <= book.fates["lost"]
        assert stats.shared > 0
        assert stats.deadlocks == stats.abandoned == stats.timeouts == stats.forgotten == 0
        assert_idle(flight, keys)


@pytest.mark.parametrize("shards", [1, 8])
@pytest.mark.parametrize("seed", range(2))
def test_timeouts_race_with_answers_and_losses(seed: int, shards: int) -> None:
    """Sections 4, 5 and 10: a thread that times out has left, or has been served: never both."""
    keys = range(2)
    book = Book(overlaps=False)
    start = threading.Barrier(8)
    flight = ShardedFlight(shards)

    def by_thread(seed: int) -> None:
        chance = random.Random(seed)
        start.wait(PATIENCE)
        for _ in range(150):
            key, fate = chance.choice(keys), chance.choice(FATES)
            timeout = chance.choice([None, 0.0, 1e-5, 1e-4, 1e-3])
            function = book.plain(key, fate)
            book.note(key, outcome_of(flight.do, function, key, timeout=timeout))

    callers = [spawn(by_thread, seed * 100 + n) for n in range(8)]
    for caller in callers:
        caller.result(PATIENCE)
    stats = flight.stats()
    assert book.calls == 8 * 150
    assert stats.timeouts == book.left
    book.check_shared()
    assert stats.executions == book.runs
    assert stats.executions + stats.shared + stats.timeouts == book.calls
    assert stats.errors == book.fates["error"]
    assert_idle(flight, keys)


@pytest.mark.parametrize("on_abandon", ["cancel", "finish"])
@pytest.mark.parametrize("seed", range(3))
def test_everything_at_once(seed: int, on_abandon: Any) -> None:
    """Sections 2 to 6: cancellations, timeouts, forgets, losses and errors of every caller."""
    keys = range(3)
    book = Book(overlaps=True)
    start = threading.Barrier(9)
    with ThreadPoolExecutor(8) as pool:
        flight = ShardedFlight(4, executor=pool, on_abandon=on_abandon)

        def by_thread(seed: int) -> None:
            chance = random.Random(seed)
            start.wait(PATIENCE)
            for _ in range(150):
                key, fate = chance.choice(keys), chance.choice(FATES)
                timeout = chance.choice([None, 0.0, 1e-4])
                function = book.plain(key, fate)
                book.note(key, outcome_of(flight.do, function, key, timeout=timeout))

        def by_future(seed: int) -> None:
            chance = random.Random(seed)
            start.wait(PATIENCE)
            for _ in range(30):
                chosen = [(chance.choice(keys), chance.choice(FATES)) for _ in range(5)]
                futures = [flight.do_future(book.plain(*each), each[0]) for each in chosen]
                for (key, _), future in zip(chosen, futures, strict=True):
                    if chance.random() < 0.4:
                        future.cancel()
                    book.note(key, outcome_of(future.result, PATIENCE))

        async def by_task(seed: int) -> None:
            chance = random.Random(seed)
            start.wait(PATIENCE)

            async def one() -> None:
                key, fate, turns = chance.choice(keys), chance.choice(FATES), chance.randrange(4)
                task = asyncio.create_task(flight.do_async(book.coroutine(key, fate, turns), key))
                if chance.random() < 0.5:
                    for _ in range(chance.randrange(6)):
                        await asyncio.sleep(0)
                    task.cancel()
                await asyncio.wait([task])
                error = asyncio.CancelledError() if task.cancelled() else task.exception()
                book.note(key, error or task.result())

            for _ in range(15):
                await asyncio.gather(*(one() for _ in range(10)))
            await eventually_async(lambda: len(asyncio.all_tasks()) == 1, "no task is left")

        def by_forgetter(seed: int) -> None:
            chance = random.Random(seed)
            start.wait(PATIENCE)
            for _ in range(300):
                flight.forget(chance.choice(keys))
                flight.stats()
                time.sleep(0)

        seeds = range(seed * 100, seed * 100 + 9)
        callers = [spawn(by_thread, each) for each in seeds[:4]]
        callers += [spawn(by_future, each) for each in seeds[4:6]]
        callers += [spawn_loop(partial(by_task, each)) for each in seeds[6:8]]
        callers.append(spawn(by_forgetter, seeds[8]))
        for caller in callers:
            caller.result(PATIENCE)
        eventually(lambda: flight.in_flight() == 0)
        stats = flight.stats()
        assert book.calls == 8 * 150
        assert stats.errors <= book.fates["error"]
        assert stats.executions >= book.runs
        assert stats.deadlocks == 0
        assert on_abandon == "cancel" or stats.abandoned == 0
        # Followers that left are in no total but `timeouts`; leaders that left were executions.
        assert book.calls - book.left <= stats.executions + stats.shared <= book.calls
        assert_idle(flight, keys)


@pytest.mark.parametrize("fate", ["value", "error", "lost"])
@pytest.mark.parametrize("leading", ["thread", "future", "task"])
def test_followers_that_join_in_the_instant_of_the_end_have_an_end(leading: str, fate: str) -> None:
    """Sections 2 and 4: no wake-up is lost between joining and waiting, and nobody is forgotten."""
    rounds = 150
    start, ended = threading.Barrier(3), threading.Barrier(3)
    with ThreadPoolExecutor(1) as pool:
        flight = ShardedFlight(executor=pool)

        def end(n: int) -> tuple[str, int]:
            if fate == "error":
                raise LookupError
            if fate == "lost":
                raise Lost
            return "leader", n

        def function(n: int) -> tuple[str, int]:
            start.wait(PATIENCE)
            for _ in range(n % 4):
                time.sleep(0)
            return end(n)

        async def coroutine(n: int) -> tuple[str, int]:
            start.wait(PATIENCE)
            for _ in range(n % 4):
                await asyncio.sleep(0)
            return end(n)

        def check(outcome: Any, n: int, *, leads: bool) -> None:
            if isinstance(outcome, LookupError):
                assert fate == "error"
            elif isinstance(outcome, Lost):
                assert fate == "lost"
                assert leads
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                assert outcome[0] in [("leader", n), ("follower", n)]

        def leader() -> None:
            for n in range(rounds):
                call = partial(function, n)
                if leading == "thread":
                    outcome = outcome_of(flight.do, call, "k")
                else:
                    outcome = outcome_of(flight.do_future(call, "k").result, PATIENCE)
                check(outcome, n, leads=True)
                ended.wait(PATIENCE)

        async def leader_async() -> None:
            for n in range(rounds):
                outcome: Any
                try:
                    outcome = await flight.do_async(partial(coroutine, n), "k")
                except BaseException as error:
                    outcome = error
                check(outcome, n, leads=True)
                ended.wait(PATIENCE)

        def follower() -> None:
            for n in range(rounds):
                own = ("follower", n)
                start.wait(PATIENCE)
                check(outcome_of(flight.do, lambda own=own: own, "k"), n, leads=False)
                ended.wait(PATIENCE)

        callers = [spawn_loop(leader_async) if leading == "task" else spawn(leader)]
        callers += [spawn(follower), spawn(follower)]
        for caller in callers:
            caller.result(PATIENCE)
        stats = flight.stats()
        assert stats.executions + stats.shared == 3 * rounds
        assert stats.deadlocks == 0
        assert stats.shared > 0
        assert stats.promotions > 0 or fate != "lost"
        assert_idle(flight, range(0))


@pytest.mark.parametrize("leaving", ["thread", "future", "task"])
def test_a_follower_that_leaves_in_the_instant_of_its_promotion(leaving: str) -> None:
    """Sections 4 and 5: it has left or it leads; in both cases the key is free in the end."""
    rounds = 150
    start, ended = threading.Barrier(2), threading.Barrier(2)
    with ThreadPoolExecutor(1) as pool:
        flight = ShardedFlight(executor=pool)

        def lost(n: int) -> None:
            start.wait(PATIENCE)
            for _ in range(n % 4):
                time.sleep(0)
            raise Lost

        def leader() -> None:
            for n in range(rounds):
                with pytest.raises(Lost):
                    flight.do(partial(lost, n), "k")
                ended.wait(PATIENCE)

        def check(outcome: Any) -> None:
            if isinstance(outcome, BaseException):
                assert isinstance(
                    outcome, (FlightTimeout, CancelledError, asyncio.CancelledError)
                ), repr(outcome)
            else:
                assert outcome == ("own", False)

        def by_thread() -> Any:
            start.wait(PATIENCE)
            return outcome_of(flight.do, lambda: "own", "k", timeout=1e-5)

        def by_future() -> Any:
            future = flight.do_future(lambda: "own", "k")
            start.wait(PATIENCE)
            future.cancel()
            return outcome_of(future.result, PATIENCE)

        async def own() -> str:
            await asyncio.sleep(0)
            return "own"

        async def by_task() -> Any:
            task = asyncio.create_task(flight.do_async(own, "k"))
            await eventually_async(lambda: flight.stats().waiting == 1)
            start.wait(PATIENCE)
            task.cancel()
            await asyncio.wait([task])
            return asyncio.CancelledError() if task.cancelled() else task.result()

        led = spawn(leader)
        for _ in range(rounds):
            eventually(lambda: flight.in_flight() == 1)
            if leaving == "task":
                check(spawn_loop(by_task).result(PATIENCE))
            else:
                check(by_thread() if leaving == "thread" else by_future())
            eventually(lambda: flight.in_flight() == 0, "nothing in flight")
            ended.wait(PATIENCE)
        led.result(PATIENCE)
        assert_idle(flight, range(0))


def test_futures_that_are_all_cancelled_while_they_are_handed_over() -> None:
    """Sections 4 and 5: each of ten leads, is chosen, or is gone, at the moment of its cancel."""
    with ThreadPoolExecutor(2) as pool:
        flight = ShardedFlight(executor=pool)

        def lost() -> None:
            raise Lost

        for n in range(1500):
            futures = [flight.do_future(lost, n) for _ in range(10)]
            for future in futures:
                future.cancel()
            for future in futures:
                error = outcome_of(future.result, PATIENCE)
                assert isinstance(error, (Lost, CancelledError))
        assert_idle(flight, range(2))


def test_threads_that_are_the_first_in_a_flight_at_the_same_time_are_all_counted() -> None:
    # What a shard needs is made by the first who comes there, and there may be several of them.
    threads, shards = 4, 4096
    for _ in range(50):
        flight = ShardedFlight(shards)
        together = threading.Barrier(threads)

        def body(
            number: int, flight: ShardedFlight = flight, together: threading.Barrier = together
        ) -> None:
            together.wait(PATIENCE)
            for step in range(200):
                assert flight.do(lambda: step, number, step) == (step, False)  # noqa: B023

        for outcome in [spawn(body, number) for number in range(threads)]:
            outcome.result(PATIENCE)
        stats = flight.stats()
        assert stats.executions == threads * 200
        assert (stats.in_flight, stats.waiting, stats.errors) == (0, 0, 0)


def test_many_loops_come_and_go_while_they_share_executions() -> None:
    """Sections 2 and 4: `asyncio.run` ends under leaders and followers, again and again."""
    flight = ShardedFlight(2)
    book = Book(overlaps=True)
    keys = range(2)
    start = threading.Barrier(5)

    async def main(seed: int) -> None:
        chance = random.Random(seed)
        tasks = [
            asyncio.create_task(
                flight.do_async(book.coroutine(key, "value", chance.randrange(5)), key)
            )
            for key in [*keys, *keys]
        ]
        for _ in range(chance.randrange(8)):
            await asyncio.sleep(0)
        if chance.random() < 0.5:
            await tasks[0]

    def by_loops(seed: int) -> None:
        start.wait(PATIENCE)
        for n in range(30):
            asyncio.run(main(seed * 1000 + n))

    def by_thread(seed: int) -> None:
        chance = random.Random(seed)
        start.wait(PATIENCE)
        for _ in range(100):
            key = chance.choice(keys)
            (answered, _), _ = flight.do(book.plain(key, "value"), key, timeout=PATIENCE)
            assert answered == key

    callers = [spawn(by_loops, n) for n in range(3)] + [spawn(by_thread, n) for n in range(2)]
    for caller in callers:
        caller.result(PATIENCE)
    assert_idle(flight, keys)


@pytest.mark.parametrize("round_", range(20))
def test_an_executor_is_shut_down_while_it_comes_to_a_leader_with_followers(round_: int) -> None:
    """Section 4: the shutdown races with the start of the leader, and nobody hangs."""
    pool = ThreadPoolExecutor(1)
    flight = ShardedFlight(executor=pool)
    start = threading.Barrier(3)
    blocker = threading.Event()
    pool.submit(blocker.wait, PATIENCE)
    leader = flight.do_future(lambda: "leader's", "k")

    def shut_down() -> None:
        start.wait(PATIENCE)
        pool.shutdown(wait=False, cancel_futures=True)

    def follow() -> Any:
        start.wait(PATIENCE)
        return flight.do(lambda: "follower's", "k", timeout=PATIENCE)

    def release() -> None:
        start.wait(PATIENCE)
        if round_ % 2:
            time.sleep(0)
        blocker.set()

    shutter, follower, releaser = spawn(shut_down), spawn(follow), spawn(release)
    assert follower.result(PATIENCE)[0] in {"leader's", "follower's"}
    shutter.result(PATIENCE)
    releaser.result(PATIENCE)
    outcome = outcome_of(leader.result, PATIENCE)
    assert isinstance(outcome, BaseException) or outcome[0] == "leader's"
    assert_idle(flight, range(0))


# An exception out of a signal handler, at any point of the main thread's calls.

STORM = """
import faulthandler, random, signal, sys, threading, time
from shardedflight import FlightTimeout, ShardedFlight

shards, seed, rounds, way = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
faulthandler.dump_traceback_later(25, exit=True)
sys.setswitchinterval(1e-4)
chance = random.Random(seed)
flight = ShardedFlight(shards)
keys = range(2)
stop = threading.Event()
armed = False
hits = 0


class Interrupt(BaseException):
    pass


def handler(number, frame):
    global armed, hits
    if armed:
        armed = False
        hits += 1
        raise Interrupt


def work():
    time.sleep(0)
    return "value"


def rows(wanted):
    time.sleep(0)
    return dict.fromkeys(wanted, "value")


def follower(seed):
    chance = random.Random(seed)
    while not stop.is_set():
        value, shared = flight.do(work, chance.choice(keys))
        assert value == "value", value
        time.sleep(0)


def call():
    if way == "many":
        flight.do_many(rows, keys)
    elif way == "timeout":
        flight.do(work, chance.choice(keys), timeout=0.0001)
    elif way == "nested":
        flight.do(lambda: flight.do(work, 1), 0)
    else:
        flight.do(work, chance.choice(keys))


signal.signal(signal.SIGALRM, handler)
threads = [threading.Thread(target=follower, args=(n,)) for n in range(3 if way != "nested" else 0)]
for thread in threads:
    thread.start()
for _ in range(rounds):
    try:
        armed = True
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 2e-4))
        call()
        armed = False
    except Interrupt:
        pass
    except FlightTimeout:
        armed = False
armed = False
signal.setitimer(signal.ITIMER_REAL, 0)
stop.set()
for thread in threads:
    thread.join(20)
    assert not thread.is_alive(), "a follower hangs"
stats = flight.stats()
assert hits > rounds / 20, hits
assert flight.in_flight() == stats.in_flight == stats.waiting == 0, stats
assert not any(stats.per_shard), stats
for key in keys:
    assert flight.do(lambda: "again", key) == ("again", False)
    assert flight.do(lambda: "again", key, timeout=5) == ("again", False)
faulthandler.cancel_dump_traceback_later()
"""


@pytest.mark.untraced
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
@pytest.mark.parametrize("way", ["plain", "timeout", "nested", "many"])
@pytest.mark.parametrize("shards", [1, 4])
def test_an_interrupt_at_any_point_of_a_call_leaves_no_key_stuck(shards: int, way: str) -> None:
    """Section 4: thousands of interrupts of the main thread, as a leader and as a follower."""
    package = Path(shardedflight.__file__).parent.parent
    path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STORM), str(shards), "1", "3000", way],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-5000:]


# Memory.


class Grown(Exception):
    """Carries a list, so that what is kept of it shows."""

    def __init__(self) -> None:
        super().__init__("grown")
        self.rows = [object() for _ in range(10)]


def alone(flight: ShardedFlight, count: int) -> None:
    """Calls without company, with every outcome."""

    def error() -> None:
        raise Grown

    def lost() -> None:
        raise Lost

    def forgotten() -> None:
        flight.forget(n)

    def recursion() -> None:
        flight.do(error, n)

    functions = [lambda: None, error, lost, forgotten, recursion]
    for n in range(count):
        try:
            flight.do(functions[n % 5], n)
        except (Exception, Lost):
            pass


def in_company(flight: ShardedFlight, count: int) -> None:
    """Two threads on one key: values, errors, losses and timeouts that others share."""
    start = threading.Barrier(2)

    def error() -> None:
        time.sleep(0)
        raise Grown

    def lost() -> None:
        time.sleep(0)
        raise Lost

    functions = [lambda: time.sleep(0), error, lost]

    def body() -> None:
        start.wait(PATIENCE)
        for n in range(count // 2):
            try:
                flight.do(functions[n % 3], "k", timeout=1e-4 if n % 7 == 0 else None)
            except (Exception, Lost):
                pass

    for caller in [spawn(body), spawn(body)]:
        caller.result(PATIENCE)


def on_a_loop(flight: ShardedFlight, count: int) -> None:
    """Tasks in groups: values, errors, losses and cancellations that others share."""

    async def value() -> None:
        await asyncio.sleep(0)

    async def error() -> None:
        await asyncio.sleep(0)
        raise Grown

    async def lost() -> None:
        await asyncio.sleep(0)
        raise Lost

    functions = [value, error, lost, value]

    async def main() -> None:
        for n in range(count // 10):
            function = functions[n % 4]
            tasks = [asyncio.create_task(flight.do_async(function, n)) for _ in range(10)]
            await asyncio.sleep(0)
            for task in tasks[: n % 11]:
                task.cancel()
            await asyncio.wait(tasks)
            for task in tasks:
                if not task.cancelled():
                    task.exception()
        await eventually_async(lambda: flight.in_flight() == 0)

    asyncio.run(main())


def on_the_pool(flight: ShardedFlight, count: int) -> None:
    """Futures in groups: values, errors, losses and cancellations that others share."""

    def error() -> None:
        raise Grown

    def lost() -> None:
        raise Lost

    functions = [lambda: None, error, lost]
    for n in range(count // 10):
        futures = [flight.do_future(functions[n % 3], n) for _ in range(10)]
        for future in futures[: n % 11]:
            future.cancel()
        for future in futures:
            outcome_of(future.exception, PATIENCE)
    eventually(lambda: flight.in_flight() == 0)


def of_many(flight: ShardedFlight, count: int) -> None:
    """Calls for ten keys each: values, missing keys, errors and losses."""

    def rows(keys: list[int]) -> dict[int, int]:
        if keys[0] % 4 == 1:
            raise Grown
        if keys[0] % 4 == 2:
            raise Lost
        return dict.fromkeys(keys[:5], 0)

    for n in range(count // 10):
        try:
            flight.do_many(rows, range(n, n + 10))
        except (Grown, Lost):
            pass


Use = Callable[[ShardedFlight, int], None]
CALLS: dict[Use, int] = {
    alone: 60_000,
    in_company: 6_000,
    on_a_loop: 20_000,
    on_the_pool: 4_000,
    of_many: 10_000,
}


@pytest.mark.parametrize("use", CALLS, ids=lambda use: use.__name__)
def test_calls_leave_no_memory_behind(use: Use) -> None:
    """Sections 1 and 3: "nothing leaks": 100,000 calls in all, with every outcome."""
    with ThreadPoolExecutor(2) as pool:
        flight = ShardedFlight(4, executor=pool)

        def measure() -> int:
            gc.collect()
            gc.collect()
            return sys.getallocatedblocks()

        use(flight, CALLS[use] // 5)
        before = measure()
        use(flight, CALLS[use])
        grown = measure() - before
    # What a thread, a loop or a cache of the interpreter keeps does not depend on the calls.
    assert grown < CALLS[use] / 20, f"{grown} blocks more after {CALLS[use]} calls"
    assert_idle(flight, range(2))
