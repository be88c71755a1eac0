"""What an execution in flight and a waiting caller take, as `tracemalloc` sees it.

Keys and functions are made before it looks.
"""

import asyncio
import threading
import tracemalloc
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any

from shardedflight import ShardedFlight
from shardedflight.bench.basics import FORM, await_all, constant, expect, keys_in_order
from shardedflight.bench.measure import Contender, Pair, Side


@contextmanager
def traced() -> Iterator[Callable[[], int]]:
    """Yields a function that returns the bytes allocated since the block began."""
    tracemalloc.start(1)
    try:
        before, _ = tracemalloc.get_traced_memory()
        yield lambda: tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


def counted(flight: ShardedFlight, executions: int, side: Side) -> Side:
    """Makes `side` refuse to answer if it did not take as many executions."""

    def checked() -> float:
        before = flight.stats().executions
        cost = side()
        expect(flight.stats().executions - before, executions, "executions")
        return cost

    return checked


def threads_inside(call: Callable[[Callable[[], None], str], object], keys: list[str]) -> float:
    """Returns the bytes per thread while one thread per key is inside `call(fn, key)`.

    Each thread has made a first call before: what it keeps of that is not of the execution. A
    free-threaded Python, for one, has a copy of each function's bytecode for each thread.
    """
    start, end = threading.Lock(), threading.Lock()
    arrived = threading.Semaphore(0)

    def pass_by() -> None:
        pass

    def stay() -> None:
        arrived.release()
        with end:
            pass

    def body(key: str) -> None:
        call(pass_by, key)
        arrived.release()
        with start:
            pass
        call(stay, key)

    threads = [threading.Thread(target=body, args=(key,)) for key in keys]
    with end:
        with start:
            for thread in threads:
                thread.start()
            await_all(arrived, len(keys))
            tracemalloc.start(1)
        await_all(arrived, len(keys))
        found, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    for thread in threads:
        thread.join()
    return found / len(keys)


def call_directly(fn: Callable[[], None], key: str) -> None:
    """The floor under an execution led by a thread."""
    fn()


@contextmanager
def leading_threads(count: int) -> Iterator[Sequence[Contender]]:
    """Prepares the benchmark of the memory of executions led by threads."""
    flight = ShardedFlight()
    keys = keys_in_order(count)
    pair = Pair(
        counted(flight, 2 * count, lambda: threads_inside(flight.do, keys)),
        lambda: threads_inside(call_directly, keys),
    )
    yield [Contender(FORM, pair)]


async def tasks_inside(
    request: Callable[[Callable[[], Coroutine[Any, Any, None]], str], Coroutine[Any, Any, object]],
    keys: list[str],
) -> float:
    """Returns the bytes per task while one task per key is inside `request(fn, key)`."""
    gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    all_inside = asyncio.Event()
    inside = 0

    async def fn() -> None:
        nonlocal inside
        inside += 1
        if inside == len(keys):
            all_inside.set()
        await gate

    with traced() as allocated:
        tasks = [asyncio.create_task(request(fn, key)) for key in keys]
        await all_inside.wait()
        found = allocated()
    gate.set_result(None)
    for task in tasks:
        await task
    return found / len(keys)


@contextmanager
def leading_tasks(count: int) -> Iterator[Sequence[Contender]]:
    """Prepares the benchmark of the memory of executions led by tasks."""
    flight = ShardedFlight()
    keys = keys_in_order(count)

    async def through_the_flight(fn: Callable[[], Awaitable[None]], key: str) -> None:
        await flight.do_async(fn, key)

    async def directly(fn: Callable[[], Awaitable[None]], key: str) -> None:
        await fn()

    with asyncio.Runner() as runner:
        pair = Pair(
            counted(flight, count, lambda: runner.run(tasks_inside(through_the_flight, keys))),
            lambda: runner.run(tasks_inside(directly, keys)),
        )
        yield [Contender(FORM, pair)]


class Parking(Executor):
    """Takes what is submitted, and runs it when told: an executor without threads."""

    def __init__(self) -> None:
        self._parked: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Keeps the call for `run`."""
        future: Future[Any] = Future()
        call = (lambda: fn(*args, **kwargs)) if args or kwargs else fn
        self._parked.append((future, call))
        return future

    def run(self) -> None:
        """Runs what was submitted, on the caller's thread."""
        parked, self._parked = self._parked, []
        for future, call in parked:
            if future.set_running_or_notify_cancel():
                future.set_result(call())


def futures_held(
    parking: Parking, submit: Callable[[Callable[[], int], str], object], keys: list[str]
) -> float:
    """Returns the bytes per key while one future per key is under way."""
    with traced() as allocated:
        held = [submit(constant, key) for key in keys]
        found = allocated()
    parking.run()
    return found / len(held)


@contextmanager
def leading_futures(count: int) -> Iterator[Sequence[Contender]]:
    """Prepares the benchmark of the memory of executions led by futures."""
    parking = Parking()
    flight = ShardedFlight(executor=parking)
    keys = keys_in_order(count)

    def directly(fn: Callable[[], int], key: str) -> tuple[Future[Any], Future[Any]]:
        return parking.submit(fn), Future()

    pair = Pair(
        counted(flight, count, lambda: futures_held(parking, flight.do_future, keys)),
        lambda: futures_held(parking, directly, keys),
    )
    yield [Contender(FORM, pair)]


async def memory_of_followers(flight: ShardedFlight, followers: int) -> float:
    """Returns the bytes per task while `followers` tasks wait for one execution."""
    gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    started = asyncio.Event()

    async def fn() -> None:
        started.set()
        await gate

    async def request() -> None:
        await flight.do_async(fn, "item")

    leader = asyncio.create_task(request())
    await started.wait()
    with traced() as allocated:
        tasks = [asyncio.create_task(request()) for _ in range(followers)]
        await asyncio.sleep(0)
        found = allocated()
    expect(flight.stats().waiting, followers, "callers waiting")
    gate.set_result(None)
    for task in [leader, *tasks]:
        await task
    return found / followers


async def memory_of_tasks(count: int) -> float:
    """The floor under a waiting coroutine: a task that awaits what all others await, too."""
    gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def request() -> None:
        await gate

    with traced() as allocated:
        tasks = [asyncio.create_task(request()) for _ in range(count)]
        await asyncio.sleep(0)
        found = allocated()
    gate.set_result(None)
    for task in tasks:
        await task
    return found / count


@contextmanager
def waiting_tasks(count: int) -> Iterator[Sequence[Contender]]:
    """Prepares the benchmark of the memory of coroutines that follow."""
    flight = ShardedFlight()
    with asyncio.Runner() as runner:
        pair = Pair(
            lambda: runner.run(memory_of_followers(flight, count)),
            lambda: runner.run(memory_of_tasks(count)),
        )
        yield [Contender(FORM, pair)]


def empty_flight() -> float:
    """Returns the bytes of a flight in which nothing has been called."""
    with traced() as allocated:
        flight = ShardedFlight()
        found = allocated()
    expect(flight.in_flight(), 0, "executions in flight")
    return found


@contextmanager
def idling(_: int) -> Iterator[Sequence[Contender]]:
    """Prepares the benchmark of the memory of an empty flight."""
    yield [Contender(FORM, Pair(empty_flight, lambda: 0.0))]
