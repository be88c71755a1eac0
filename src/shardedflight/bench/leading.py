"""What leading costs: `do`, `do_async` and `do_future` whose function is next to nothing.

Each side is written out as a user would write it, without a layer shared by the two, since at
these sizes a layer would be most of what is measured.
"""

import asyncio
import gc
import sys
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import repeat
from time import perf_counter_ns
from typing import Any

from shardedflight import ShardedFlight
from shardedflight.bench.basics import (
    FORM,
    clock,
    constant,
    constant_async,
    expect,
    keys_in_order,
    suspends_once,
)
from shardedflight.bench.measure import Contender, Pair, Prepare

#: What is measured beside this library: what the standard library has for leaving a task, and parts
#: of what a call here does, alone.
SHIELD = "`asyncio.shield` alone"
ONE_TASK = "a task alone"
SECOND_FUTURE = "a second future alone"

# `do`.


def bare_loop(calls: int) -> float:
    """The floor under every leader: an entry made, the function called, the entry removed."""
    table: dict[str, int] = {}
    fn = constant
    key = "item"
    start = clock()
    for _ in repeat(None, calls):
        table[key] = 1
        fn()
        del table[key]
    return (clock() - start) / calls


def lead_one_part(flight: ShardedFlight, calls: int) -> float:
    """Leads over and over with a key of one part."""
    fn = constant
    start = clock()
    for _ in repeat(None, calls):
        flight.do(fn, "item")
    return (clock() - start) / calls


def lead_two_parts(flight: ShardedFlight, calls: int) -> float:
    """Leads over and over with a key of two parts."""
    fn = constant
    start = clock()
    for _ in repeat(None, calls):
        flight.do(fn, "item", "7")
    return (clock() - start) / calls


def leading(
    lead: Callable[[ShardedFlight, int], float], make_flight: Callable[[], ShardedFlight]
) -> Prepare:
    """Makes the preparation of a benchmark about `lead`."""

    @contextmanager
    def prepare(calls: int) -> Iterator[Sequence[Contender]]:
        flight = make_flight()
        lead(flight, calls)
        expect(flight.stats().executions, calls, "executions")
        yield [Contender(FORM, Pair(lambda: lead(flight, calls), lambda: bare_loop(calls)))]

    return prepare


# `do_async`.


async def lead_async(
    flight: ShardedFlight, fn: Callable[[], Coroutine[Any, Any, int]], calls: int
) -> float:
    """Leads over and over from one coroutine."""
    start = clock()
    for _ in repeat(None, calls):
        await flight.do_async(fn, "item")
    return (clock() - start) / calls


async def bare_task(calls: int) -> float:
    """The floor under a leader whose function suspends: a task that the caller awaits."""
    fn = suspends_once
    start = clock()
    for _ in repeat(None, calls):
        await asyncio.create_task(fn())
    return (clock() - start) / calls


async def minimal_leader(
    table: dict[str, int], fn: Callable[[], Coroutine[Any, Any, int]], key: str
) -> int:
    """Awaits `fn()` inline, between one insertion and one removal."""
    table[key] = 1
    try:
        return await fn()
    finally:
        del table[key]


async def bare_leader(calls: int) -> float:
    """The floor under a leader whose function does not suspend."""
    table: dict[str, int] = {}
    fn = constant_async
    start = clock()
    for _ in repeat(None, calls):
        await minimal_leader(table, fn, "item")
    return (clock() - start) / calls


async def shielded_task(calls: int) -> float:
    """The standard library's way to await a task that its caller may leave. It is no bound."""
    fn = suspends_once
    start = clock()
    for _ in repeat(None, calls):
        await asyncio.shield(asyncio.create_task(fn()))
    return (clock() - start) / calls


async def task_leader(fn: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Runs `fn()` in a task of its own, at once where that is possible, and shares nothing."""
    if sys.version_info >= (3, 12):
        task = asyncio.Task(fn(), loop=asyncio.get_running_loop(), eager_start=True)
        if task.done():
            return task.result()
        return await task
    return await asyncio.create_task(fn())


async def one_task_each(calls: int) -> float:
    """A part of what a leader does: its function runs in a task."""
    fn = constant_async
    start = clock()
    for _ in repeat(None, calls):
        await task_leader(fn)
    return (clock() - start) / calls


def leading_async(
    fn: Callable[[], Coroutine[Any, Any, int]],
    floor: Callable[[int], Coroutine[Any, Any, float]],
    beside: tuple[str, Callable[[int], Coroutine[Any, Any, float]]],
) -> Prepare:
    """Makes the preparation of a benchmark about a coroutine that leads with `fn`.

    Args:
        fn: What it leads with.
        floor: The floor under it.
        beside: What is measured beside it, and its name.
    """

    @contextmanager
    def prepare(calls: int) -> Iterator[Sequence[Contender]]:
        flight = ShardedFlight()
        with asyncio.Runner() as runner:
            runner.run(lead_async(flight, fn, calls))
            expect(flight.stats().executions, calls, "executions")
            name, side = beside
            yield [
                Contender(who, Pair(ours, lambda: runner.run(floor(calls))))
                for who, ours in (
                    (FORM, lambda: runner.run(lead_async(flight, fn, calls))),
                    (name, lambda: runner.run(side(calls))),
                )
            ]

    return prepare


# `do_future`.


def submit_flight(flight: ShardedFlight, calls: int) -> float:
    """Asks for one future after the other."""
    fn = constant
    start = perf_counter_ns()
    for _ in repeat(None, calls):
        flight.do_future(fn, "item").result()
    return (perf_counter_ns() - start) / calls


def submit_pool(pool: Executor, calls: int) -> float:
    """The floor under `do_future`: the pool itself."""
    fn = constant
    start = perf_counter_ns()
    for _ in repeat(None, calls):
        pool.submit(fn).result()
    return (perf_counter_ns() - start) / calls


def submit_for_another(pool: Executor, calls: int) -> float:
    """A part of what `do_future` does: a future that can be left, beside the executor's own."""
    fn = constant
    start = perf_counter_ns()
    for _ in repeat(None, calls):
        future: Future[int] = Future()
        pool.submit(partial(settle, future, fn))
        future.result()
    return (perf_counter_ns() - start) / calls


def settle(future: "Future[int]", fn: Callable[[], int]) -> None:
    """Runs `fn` for a future."""
    future.set_result(fn())


@contextmanager
def submitting(calls: int) -> Iterator[Sequence[Contender]]:
    """Prepares the benchmark of futures; both sides share one pool of one thread."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        flight = ShardedFlight(executor=pool)
        submit_flight(flight, calls)
        expect(flight.stats().executions, calls, "executions")
        yield [
            Contender(who, Pair(ours, lambda: submit_pool(pool, calls)))
            for who, ours in (
                (FORM, lambda: submit_flight(flight, calls)),
                (SECOND_FUTURE, lambda: submit_for_another(pool, calls)),
            )
        ]


# The number of keys in flight.


@contextmanager
def in_flight(flight: ShardedFlight, count: int) -> Iterator[None]:
    """Keeps `count` keys in flight, led by one call of `do_many` on a thread of its own."""
    inside = threading.Event()
    end = threading.Event()

    def fn(keys: Iterable[str]) -> dict[str, int]:
        inside.set()
        end.wait()
        return dict.fromkeys(keys, 1)

    thread = threading.Thread(
        target=lambda: flight.do_many(fn, keys_in_order(count, "in flight")), daemon=True
    )
    thread.start()
    try:
        inside.wait()
        expect(flight.in_flight(), count, "executions in flight")
        yield
    finally:
        end.set()
        thread.join()


def lead_over(flight: ShardedFlight, keys: Sequence[str], calls: int) -> float:
    """Leads with one key after the other."""
    fn = constant
    start = clock()
    for _ in repeat(None, calls // len(keys)):
        for key in keys:
            flight.do(fn, key)
    return (clock() - start) / calls


def bare_loop_over(table: dict[str, int], keys: Sequence[str], calls: int) -> float:
    """The same without a flight: what the table alone costs."""
    fn = constant
    start = clock()
    for _ in repeat(None, calls // len(keys)):
        for key in keys:
            table[key] = 1
            fn()
            del table[key]
    return (clock() - start) / calls


def among(counts: Sequence[int]) -> Prepare:
    """Makes the preparation of the benchmark of calls among many others' keys in flight.

    The first of `counts` is the floor under all; compared with itself it shows the noise. The last
    is also measured of a bare dict with as many keys.
    """

    @contextmanager
    def prepare(calls: int) -> Iterator[Sequence[Contender]]:
        flights = [ShardedFlight() for _ in counts]
        keys = keys_in_order(min(calls, 100_000))
        with ExitStack() as stack:
            # It would look for garbage among the executions again and again.
            gc.disable()
            try:
                for flight, count in zip(flights, counts, strict=True):
                    stack.enter_context(in_flight(flight, count))
            finally:
                gc.enable()
            floor = flights[0]
            contenders = [
                Contender(
                    FORM,
                    Pair(
                        partial(lead_over, flight, keys, calls),
                        partial(lead_over, floor, keys, calls),
                    ),
                    point=f"{count:,} keys",
                )
                for flight, count in zip(flights, counts, strict=True)
            ]
            few, many = (
                dict.fromkeys(keys_in_order(count, "in flight"), 1)
                for count in (counts[0], counts[-1])
            )
            bare = Pair(
                partial(bare_loop_over, many, keys, calls),
                partial(bare_loop_over, few, keys, calls),
            )
            yield [*contenders, Contender("bare loop", bare, point=f"{counts[-1]:,} keys")]

    return prepare
