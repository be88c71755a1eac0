"""Faults that were found by attacking the implementation. Each test fails without its mend."""

import asyncio
import concurrent.futures
import contextlib
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from support import PATIENCE, eventually, spawn, spawn_loop

from shardedflight import DeadlockError, FlightTimeout, ShardedFlight


def test_a_deadlock_in_do_many_does_not_end_the_joined_execution_of_its_thread() -> None:
    """Section 8: only what a call leads is its own to hand over."""
    flight = ShardedFlight()

    def outer() -> int:
        with pytest.raises(DeadlockError):
            flight.do_many(lambda keys: dict.fromkeys(keys, 0), ["k"])
        return flight.in_flight()

    assert flight.do(outer, "k") == (1, False)
    assert flight.in_flight() == 0


class CountingExecutor(ThreadPoolExecutor):
    """Counts what it was given."""

    submitted = 0

    def submit(self, *args: Any, **kwargs: Any) -> "Future[Any]":
        self.submitted += 1
        return super().submit(*args, **kwargs)


def test_a_lost_do_many_does_not_start_a_strangers_queued_future() -> None:
    """Section 4: an end that is not the leader's own changes nothing."""
    gate = threading.Event()
    with CountingExecutor(1) as pool:
        flight = ShardedFlight(executor=pool)
        pool.submit(gate.wait, PATIENCE)
        queued = flight.do_future(lambda: "own", "k")
        lost = spawn(flight.do_many, lambda keys: sys.exit(), ["k", "z"])
        assert isinstance(lost.exception(PATIENCE), SystemExit)
        assert pool.submitted == 2
        gate.set()
        assert queued.result(PATIENCE) == ("own", False)
    assert flight.in_flight() == 0


@pytest.mark.untraced
def test_a_stack_without_room_leaves_no_key_in_flight() -> None:
    """Section 4: "No key is ever stuck": the clean-up then needs a stack of its own."""
    flight = ShardedFlight()

    def down(depth: int) -> Any:
        return flight.do(lambda: down(depth + 1), depth)

    def body() -> None:
        with contextlib.suppress(RecursionError):
            down(0)

    spawn(body).result(PATIENCE)
    eventually(lambda: flight.in_flight() == 0)


def test_a_callback_that_raises_what_is_no_exception_keeps_nobody_from_waking() -> None:
    """Section 4: "no follower hangs", whatever the callbacks of others do."""
    flight = ShardedFlight()
    gate = threading.Event()
    leader = spawn(flight.do, lambda: gate.wait(PATIENCE), "k")
    eventually(lambda: flight.in_flight() == 1)

    def callback(future: "Future[Any]") -> None:
        raise SystemExit("callback")

    futures = [flight.do_future(int, "k") for _ in range(5)]
    for future in futures:
        future.add_done_callback(callback)
    thread = spawn(flight.do, int, "k")
    eventually(lambda: flight.stats().waiting == 6)
    gate.set()
    assert thread.result(PATIENCE) == (True, True)
    assert [future.result(PATIENCE) for future in futures] == [(True, True)] * 5
    assert isinstance(leader.exception(PATIENCE), SystemExit)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
def test_recursion_is_found_where_all_tasks_are_eager() -> None:
    flight = ShardedFlight()

    async def function() -> Any:
        return await flight.do_async(function, "k")

    async def main() -> Any:
        factory = asyncio.eager_task_factory  # pyright: ignore[reportAttributeAccessIssue]
        asyncio.get_running_loop().set_task_factory(factory)
        return await flight.do_async(function, "k")

    assert isinstance(spawn_loop(main).exception(PATIENCE), DeadlockError)
    assert flight.in_flight() == 0


def test_recursion_is_found_where_the_child_waits_before_it_is_awaited() -> None:
    """Section 7: the wait that closes the cycle is none of the flight's own."""
    flight = ShardedFlight()

    async def function() -> Any:
        child = asyncio.create_task(flight.do_async(function, "k"))
        await asyncio.sleep(0)
        return await child

    error = spawn_loop(lambda: flight.do_async(function, "k")).exception(PATIENCE)
    assert isinstance(error, DeadlockError)
    assert (flight.in_flight(), flight.stats().deadlocks) == (0, 1)


def test_a_child_that_nobody_awaits_may_wait_for_its_parents_key() -> None:
    """Section 7 speaks of cycles: looking a second time raises no false alarm."""
    flight = ShardedFlight()
    children = []

    async def function() -> str:
        children.append(asyncio.create_task(flight.do_async(function, "k")))
        for _ in range(10):
            await asyncio.sleep(0)
        return "value"

    async def main() -> Any:
        return await flight.do_async(function, "k"), await children[0]

    assert spawn_loop(main).result(PATIENCE) == (("value", True), ("value", True))


def test_a_cancelled_future_is_done_for_those_who_wait_for_futures() -> None:
    """Section 5: it is a `concurrent.futures.Future` for `wait` and `as_completed`, too."""
    flight = ShardedFlight()
    gate = threading.Event()
    futures = [flight.do_future(lambda: gate.wait(PATIENCE), "k") for _ in range(2)]
    assert futures[1].cancel()
    assert futures[1].cancel()
    assert concurrent.futures.wait(futures[1:], PATIENCE).done == {futures[1]}
    assert futures[0].cancel()
    assert set(concurrent.futures.as_completed(futures, PATIENCE)) == set(futures)
    gate.set()
    eventually(lambda: flight.in_flight() == 0)


def test_a_follower_cancelled_in_the_tick_of_the_end_was_not_served() -> None:
    """`shared`: the outcome went to more than one caller."""
    flight = ShardedFlight()

    async def main() -> Any:
        end = asyncio.Event()

        async def function() -> str:
            await end.wait()
            return "value"

        leader = asyncio.create_task(flight.do_async(function, "k"))
        await asyncio.sleep(0)
        follower = asyncio.create_task(flight.do_async(function, "k"))
        while flight.stats().waiting < 1:
            await asyncio.sleep(0)
        end.set()
        follower.cancel()
        return await asyncio.gather(leader, follower, return_exceptions=True)

    answers = spawn_loop(main).result(PATIENCE)
    assert answers[0] == ("value", False)
    assert isinstance(answers[1], asyncio.CancelledError)
    assert flight.stats().shared == 0


def test_followers_cancelled_with_the_run_are_no_promotions() -> None:
    """Section 10: a promotion is a follower that has taken over."""
    flight = ShardedFlight()

    async def main() -> None:
        calls = [
            asyncio.create_task(flight.do_async(lambda: asyncio.sleep(3600), "k"))
            for _ in range(50)
        ]
        while flight.stats().waiting < 49:
            await asyncio.sleep(0)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.wait(calls)

    spawn_loop(main).result(PATIENCE)
    stats = flight.stats()
    assert (stats.executions, stats.promotions, stats.in_flight) == (1, 0, 0)


def test_an_error_of_a_keys_comparison_is_its_callers_alone() -> None:
    """Section 1: "the caller gets that error, nothing is registered", and no execution failed."""
    flight = ShardedFlight()

    class Odd:
        def __hash__(self) -> int:
            return 7

        def __eq__(self, other: object) -> bool:
            raise ValueError("compared")

    gate = threading.Event()
    leader = spawn(flight.do, lambda: gate.wait(PATIENCE), Odd())
    eventually(lambda: flight.in_flight() == 1)
    for _ in range(3):
        with pytest.raises(ValueError, match="compared"):
            flight.do(int, Odd())
    gate.set()
    assert leader.result(PATIENCE) == (True, False)
    stats = flight.stats()
    assert (stats.executions, stats.errors, stats.in_flight) == (1, 0, 0)


def test_joining_a_run_that_gathers_many_keys_takes_one_walk() -> None:
    """`timeout=` holds: 2,000 waits inside of a run are not 2,000 walks through all of them."""
    flight = ShardedFlight()
    started, end = threading.Event(), threading.Event()
    count = 2_000

    async def inner() -> None:
        while not end.is_set():
            await asyncio.sleep(0.01)

    async def outer() -> None:
        calls = [asyncio.create_task(flight.do_async(inner, n)) for n in range(count)]
        while flight.in_flight() < count + 1:
            await asyncio.sleep(0.01)
        started.set()
        await asyncio.gather(*calls)

    run = spawn_loop(lambda: flight.do_async(outer, "outer"))
    assert started.wait(PATIENCE)
    steps = 0

    def count_steps(*_: object) -> None:
        nonlocal steps
        steps += 1

    sys.setprofile(count_steps)
    try:
        with pytest.raises(FlightTimeout):
            flight.do(int, "outer", timeout=0)
    finally:
        sys.setprofile(None)
    end.set()
    run.result(PATIENCE)
    assert steps < 100 * count


def test_a_future_that_is_told_twice_to_take_over_runs_its_function_once() -> None:
    """Who hands over and who sweeps after a closed loop may tell one heir, at the same time."""
    told: list[str] = []
    runs: list[int] = []
    gate, one_has_ended = threading.Event(), threading.Event()

    class Telling(ThreadPoolExecutor):
        def submit(self, work: Any, *_: Any, **__: Any) -> "Future[Any]":
            if not told:
                told.append("again")
                heir.take_over(heir.joined)

            def job() -> None:
                try:
                    work()
                finally:
                    one_has_ended.set()

            return super().submit(job)

    def lost() -> int:
        gate.wait(PATIENCE)
        raise SystemExit

    def run() -> int:
        runs.append(1)
        if len(runs) == 1:
            one_has_ended.wait(PATIENCE)
        return len(runs)

    with Telling(2) as pool:
        flight = ShardedFlight(executor=pool)
        leader = spawn(flight.do, lost, "k")
        eventually(lambda: flight.in_flight() == 1)
        heir: Any = flight.do_future(run, "k")
        gate.set()
        assert heir.result(PATIENCE) == (1, False)
    assert isinstance(leader.exception(PATIENCE), SystemExit)
    assert (told, runs) == (["again"], [1])
    assert (flight.stats().executions, flight.stats().promotions) == (2, 1)


def test_a_follower_whose_task_stops_the_loop_keeps_nobody_from_waking() -> None:
    """Followers of one loop are woken in one callback, out of which KeyboardInterrupt comes."""
    flight = ShardedFlight()
    loop = asyncio.new_event_loop()
    gate = loop.create_future()
    served: list[int] = []

    async def fn() -> int:
        return await gate

    async def follow(number: int) -> None:
        await flight.do_async(fn, "k")
        served.append(number)
        if number == 1:
            raise KeyboardInterrupt

    async def ask() -> None:
        tasks.append(loop.create_task(flight.do_async(fn, "k")))
        await asyncio.sleep(0)
        tasks.extend(loop.create_task(follow(number)) for number in range(4))
        await asyncio.sleep(0)
        gate.set_result(7)

    tasks: list[asyncio.Task[Any]] = []
    loop.run_until_complete(ask())
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(asyncio.wait(tasks))
    assert served == [0, 1]
    loop.run_until_complete(asyncio.wait(tasks))
    assert served == [0, 1, 2, 3]
    assert isinstance(tasks[2].exception(), KeyboardInterrupt)
    loop.close()


def test_flights_may_come_and_go_while_a_loop_is_closed() -> None:
    """Section 4: "a loop closed under its task" hands over however busy the process is."""
    stop = threading.Event()

    def make_flights() -> None:
        while not stop.is_set():
            for _ in range(50):
                ShardedFlight(1)
            time.sleep(0)

    makers = [spawn(make_flights) for _ in range(2)]
    try:
        for _ in range(10):
            flight = ShardedFlight()
            loop = asyncio.new_event_loop()
            task = loop.create_task(flight.do_async(lambda: asyncio.sleep(3600), "k"))
            loop.run_until_complete(asyncio.sleep(0.001))
            follower = spawn(flight.do, lambda: "own", "k")
            eventually(lambda flight=flight: flight.stats().waiting == 1)
            loop.close()
            assert follower.result(PATIENCE) == ("own", False)
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            for pending in asyncio.all_tasks(loop):
                pending._log_destroy_pending = False  # type: ignore[attr-defined]
    finally:
        stop.set()
    for maker in makers:
        maker.result(PATIENCE)
