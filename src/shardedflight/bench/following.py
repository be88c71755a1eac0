"""What following costs: coroutines and threads that wait for another's execution."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter_ns, sleep
from typing import Any, TypeAlias

from shardedflight import ShardedFlight
from shardedflight.bench.basics import FORM, await_all, clock, expect
from shardedflight.bench.measure import Contender, Pair, Prepare

#: Given the function to be shared, returns what each caller runs.
Ask: TypeAlias = Callable[[Callable[[], int]], Callable[[], object]]
AskAsync: TypeAlias = Callable[
    [Callable[[], Coroutine[Any, Any, int]]], Callable[[], Coroutine[Any, Any, object]]
]

#: What is measured beside this library: parts of what followers do, alone.
A_LIST = "a list of futures alone"
AN_OUTCOME = "being told one outcome alone"

#: Seconds in which threads that are about to sleep fall asleep.
_SETTLED = 0.01

#: How often threads are woken before it is said that they do not share.
_TRIES = 5


async def follow(ask: AskAsync, followers: int) -> float:
    """Lets one task lead and `followers` tasks wait for it; counts the followers' time only."""
    gate: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    started = asyncio.Event()
    executions = 0

    async def fn() -> int:
        nonlocal executions
        executions += 1
        started.set()
        return await gate

    request = ask(fn)
    leader = asyncio.create_task(request())
    await started.wait()
    start = clock()
    tasks = [asyncio.create_task(request()) for _ in range(followers)]
    await asyncio.sleep(0)
    gate.set_result(1)
    for task in tasks:
        await task
    cost = (clock() - start) / followers
    await leader
    expect(executions, 1, "executions")
    return cost


async def await_futures(tasks_wanted: int) -> float:
    """The floor under a follower: a task that awaits a future of its own."""
    loop = asyncio.get_running_loop()

    async def request(future: asyncio.Future[int]) -> int:
        return await future

    start = clock()
    futures: list[asyncio.Future[int]] = [loop.create_future() for _ in range(tasks_wanted)]
    tasks = [asyncio.create_task(request(future)) for future in futures]
    await asyncio.sleep(0)
    for future in futures:
        future.set_result(1)
    for task in tasks:
        await task
    return (clock() - start) / tasks_wanted


def asking_async(flight: ShardedFlight) -> AskAsync:
    """Makes coroutines call `do_async`."""

    def ask(fn: Callable[[], Coroutine[Any, Any, int]]) -> Callable[[], Coroutine[Any, Any, int]]:
        async def request() -> int:
            value, _ = await flight.do_async(fn, "item")
            return value

        return request

    return ask


def asking_a_list() -> AskAsync:
    """A part of what followers do: each finds its key, and waits in a list. None may leave."""
    waiting: dict[str, list[asyncio.Future[int]]] = {}

    async def share(fn: Callable[[], Coroutine[Any, Any, int]], key: str) -> tuple[int, bool]:
        if key in waiting:
            future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            waiting[key].append(future)
            return await future, True
        waiting[key] = []
        value = await fn()
        futures = waiting.pop(key)
        for future in futures:
            future.set_result(value)
        return value, bool(futures)

    def ask(fn: Callable[[], Coroutine[Any, Any, int]]) -> Callable[[], Coroutine[Any, Any, int]]:
        async def request() -> int:
            value, _ = await share(fn, "item")
            return value

        return request

    return ask


def following(points: Sequence[int] = ()) -> Prepare:
    """Makes the preparation of a benchmark of coroutines that follow.

    Args:
        points: Numbers of followers. Without any, the benchmark's operations are the followers.
    """

    @contextmanager
    def prepare(operations: int) -> Iterator[Sequence[Contender]]:
        flight = ShardedFlight()
        ask = asking_async(flight)
        with asyncio.Runner() as runner:
            runner.run(follow(ask, operations))
            stats = flight.stats()
            expect((stats.executions, stats.shared), (1, operations), "executions, callers served")

            def pair(followers: int, ask: AskAsync = ask) -> Pair:
                times = max(1, operations // followers)
                return Pair(
                    lambda: _mean(runner, lambda: follow(ask, followers), times),
                    lambda: _mean(runner, lambda: await_futures(followers), times),
                )

            if points:
                yield [
                    Contender(FORM, pair(point), f"{point:,} follower{'s' * (point > 1)}")
                    for point in points
                ]
            else:
                yield [
                    Contender(FORM, pair(operations)),
                    Contender(A_LIST, pair(operations, asking_a_list())),
                ]

    return prepare


def _mean(
    runner: asyncio.Runner, side: Callable[[], Coroutine[Any, Any, float]], times: int
) -> float:
    """Runs a side so often that its cost can be told from the clock's."""
    return sum(runner.run(side()) for _ in range(times)) / times


# Threads.


def wake(ask: Ask, followers: int, asleep: Callable[[], bool] = lambda: True) -> float:
    """Returns the nanoseconds from the first to the last of `followers` threads being awake.

    Args:
        ask: Makes the call by which one thread leads and the others follow.
        followers: How many threads wait.
        asleep: Tells whether all do.
    """
    executions: list[None] = []
    for _ in range(_TRIES):
        executions.clear()
        inside, end = threading.Event(), threading.Event()

        def fn(inside: threading.Event = inside, end: threading.Event = end) -> int:
            executions.append(None)
            inside.set()
            end.wait()
            return 1

        call = ask(fn)
        leader = threading.Thread(target=call)
        leader.start()
        inside.wait()
        span = _span([call] * followers, end.set, asleep)
        leader.join()
        # A thread that the system kept from its call until the others' was over leads once more.
        if len(executions) == 1:
            return span
    raise RuntimeError(f"executions: expected 1, found {len(executions)}")


def wake_by_locks(threads_wanted: int) -> float:
    """The floor under threads that follow: a lock for each, released in a loop."""
    locks = [threading.Lock() for _ in range(threads_wanted)]
    for lock in locks:
        lock.acquire()

    def release() -> None:
        for lock in locks:
            lock.release()

    return _span([lock.acquire for lock in locks], release, lambda: True)


def wake_and_tell(threads_wanted: int) -> float:
    """The same, and each thread is handed the same object, and looks into it."""
    told: list[list[tuple[int, bool]]] = [[] for _ in range(threads_wanted)]
    locks = [threading.Lock() for _ in told]
    for lock in locks:
        lock.acquire()
    outcome = (1, threads_wanted > 1)

    def waiting(lock: threading.Lock, news: list[tuple[int, bool]]) -> Callable[[], object]:
        def wait() -> object:
            lock.acquire()
            value, shared = news[0]
            return value, shared

        return wait

    def release() -> None:
        for lock, news in zip(locks, told, strict=True):
            news.append(outcome)
            lock.release()

    return _span(list(map(waiting, locks, told)), release, lambda: True)


def _span(
    waits: Sequence[Callable[[], object]], release: Callable[[], None], asleep: Callable[[], bool]
) -> float:
    """Lets one thread wait in each of `waits` until `release()`; returns first to last awake."""
    arrived = threading.Semaphore(0)
    awake: list[int] = []
    all_awake = threading.Event()
    leave = threading.Lock()

    def body(wait: Callable[[], object]) -> None:
        arrived.release()
        try:
            wait()
        finally:
            awake.append(perf_counter_ns())
            if len(awake) == len(waits):
                all_awake.set()
            # To end costs a thread more than to wake, and would be in the others' way.
            with leave:
                pass

    threads = [threading.Thread(target=body, args=(wait,)) for wait in waits]
    with leave:
        for thread in threads:
            thread.start()
        await_all(arrived, len(threads))
        sleep(_SETTLED)
        while not asleep():
            sleep(_SETTLED)
        release()
        all_awake.wait()
    for thread in threads:
        thread.join()
    return max(awake) - min(awake)


@contextmanager
def following_threads(followers: int) -> Iterator[Sequence[Contender]]:
    """Prepares the benchmark of threads that follow."""
    flight = ShardedFlight()

    def ask(fn: Callable[[], int]) -> Callable[[], object]:
        return lambda: flight.do(fn, "item")

    def asleep() -> bool:
        return flight.stats().waiting == followers

    def floor() -> float:
        return wake_by_locks(followers)

    yield [
        Contender(FORM, Pair(lambda: wake(ask, followers, asleep), floor)),
        Contender(AN_OUTCOME, Pair(lambda: wake_and_tell(followers), floor)),
    ]
