"""What is compared with what. Every row is a pair of the smallest programs that do the same.

Each side is written out as a user would write it, without a layer shared by the two, since at
these sizes a layer would be most of what is measured.

Where nothing waits for another thread, the clock is the processor time of the process: a machine
that is busy with other things would stretch the longer side of a pair more than the shorter one.
"""

import asyncio
import sys
import threading
import tracemalloc
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from time import perf_counter_ns, process_time_ns
from typing import Any

from shardedflight import ShardedFlight
from shardedflight.bench.measure import Prepare, Row, Side, Unit

# Windows counts processor time in steps that are longer than a round.
clock = perf_counter_ns if sys.platform == "win32" else process_time_ns


def constant() -> int:
    """The function of the rows that are about everything but the function."""
    return 1


async def constant_async() -> int:
    """As `constant`; it never suspends."""
    return 1


async def suspends_once() -> int:
    """Suspends the way that costs the loop least."""
    await asyncio.sleep(0)
    return 1


def expect(found: object, expected: object, what: str) -> None:
    """Refuses to measure something else than what the row claims."""
    if found != expected:
        raise RuntimeError(f"{what}: expected {expected!r}, found {found!r}")


# The leader's path of `do`.


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
    """Makes the preparation of a row about `lead`."""

    @contextmanager
    def prepare(calls: int) -> Iterator[tuple[Side, Side]]:
        flight = make_flight()
        lead(flight, calls)
        expect(flight.stats().executions, calls, "executions")
        yield lambda: lead(flight, calls), lambda: bare_loop(calls)

    return prepare


# The leader's path of `do_async`.


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


async def bare_await(calls: int) -> float:
    """The floor under a leader whose function does not suspend."""
    table: dict[str, int] = {}
    fn = constant_async
    key = "item"
    start = clock()
    for _ in repeat(None, calls):
        table[key] = 1
        await fn()
        del table[key]
    return (clock() - start) / calls


def leading_async(
    fn: Callable[[], Coroutine[Any, Any, int]], floor: Callable[[int], Coroutine[Any, Any, float]]
) -> Prepare:
    """Makes the preparation of a row about a coroutine that leads with `fn`."""

    @contextmanager
    def prepare(calls: int) -> Iterator[tuple[Side, Side]]:
        flight = ShardedFlight()
        with asyncio.Runner() as runner:
            runner.run(lead_async(flight, fn, calls))
            expect(flight.stats().executions, calls, "executions")
            yield (
                lambda: runner.run(lead_async(flight, fn, calls)),
                lambda: runner.run(floor(calls)),
            )

    return prepare


# Followers.


async def follow(flight: ShardedFlight, followers: int) -> float:
    """Lets one task lead and `followers` tasks wait for it; counts the followers' time only."""
    gate: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    started = asyncio.Event()

    async def fn() -> int:
        started.set()
        return await gate

    async def request() -> int:
        value, _ = await flight.do_async(fn, "item")
        return value

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


@contextmanager
def following(followers: int) -> Iterator[tuple[Side, Side]]:
    """Prepares the row about coroutines that follow."""
    flight = ShardedFlight()
    with asyncio.Runner() as runner:
        runner.run(follow(flight, followers))
        stats = flight.stats()
        expect((stats.executions, stats.shared), (1, followers), "executions, callers served")
        yield (
            lambda: runner.run(follow(flight, followers)),
            lambda: runner.run(await_futures(followers)),
        )


# Futures.


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


@contextmanager
def submitting(calls: int) -> Iterator[tuple[Side, Side]]:
    """Prepares the row about futures; both sides share one pool of one thread."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        flight = ShardedFlight(executor=pool)
        submit_flight(flight, calls)
        expect(flight.stats().executions, calls, "executions")
        yield lambda: submit_flight(flight, calls), lambda: submit_pool(pool, calls)


# Memory, as `tracemalloc` sees it. Keys and functions are made before it looks.


@contextmanager
def traced() -> Iterator[Callable[[], int]]:
    """Yields a function that returns the bytes allocated since the block began."""
    tracemalloc.start(1)
    try:
        before, _ = tracemalloc.get_traced_memory()
        yield lambda: tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


def keys_in_order(count: int) -> list[str]:
    """Makes `count` keys that differ."""
    return [f"item {number}" for number in range(count)]


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


def await_all(arrived: threading.Semaphore, count: int) -> None:
    """Waits until `count` threads have arrived."""
    for _ in range(count):
        arrived.acquire()


def call_directly(fn: Callable[[], None], key: str) -> None:
    """The floor under an execution led by a thread."""
    fn()


@contextmanager
def leading_threads(count: int) -> Iterator[tuple[Side, Side]]:
    """Prepares the row about the memory of executions led by threads."""
    flight = ShardedFlight()
    keys = keys_in_order(count)
    yield (
        counted(flight, 2 * count, lambda: threads_inside(flight.do, keys)),
        lambda: threads_inside(call_directly, keys),
    )


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
def leading_tasks(count: int) -> Iterator[tuple[Side, Side]]:
    """Prepares the row about the memory of executions led by tasks."""
    flight = ShardedFlight()
    keys = keys_in_order(count)

    async def through_the_flight(fn: Callable[[], Awaitable[None]], key: str) -> None:
        await flight.do_async(fn, key)

    async def directly(fn: Callable[[], Awaitable[None]], key: str) -> None:
        await fn()

    with asyncio.Runner() as runner:
        yield (
            counted(flight, count, lambda: runner.run(tasks_inside(through_the_flight, keys))),
            lambda: runner.run(tasks_inside(directly, keys)),
        )


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
def leading_futures(count: int) -> Iterator[tuple[Side, Side]]:
    """Prepares the row about the memory of executions led by futures."""
    parking = Parking()
    flight = ShardedFlight(executor=parking)
    keys = keys_in_order(count)

    def directly(fn: Callable[[], int], key: str) -> tuple[Future[Any], Future[Any]]:
        return parking.submit(fn), Future()

    yield (
        counted(flight, count, lambda: futures_held(parking, flight.do_future, keys)),
        lambda: futures_held(parking, directly, keys),
    )


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
def waiting_tasks(count: int) -> Iterator[tuple[Side, Side]]:
    """Prepares the row about the memory of coroutines that follow."""
    flight = ShardedFlight()
    with asyncio.Runner() as runner:
        yield (
            lambda: runner.run(memory_of_followers(flight, count)),
            lambda: runner.run(memory_of_tasks(count)),
        )


LOOP = "`d[k] = 1; fn(); del d[k]` in a loop"

ROWS = (
    Row(
        name="do",
        what="`do`, leader, one `str` part",
        against=LOOP,
        aim=8.0,
        blind_to="contention; keys that are new, or cold in the processor's caches",
        unit=Unit.NANOSECONDS,
        operations=10_000,
        rounds=101,
        prepare=leading(lead_one_part, ShardedFlight),
    ),
    Row(
        name="do-two-parts",
        what="`do`, leader, two `str` parts",
        against=LOOP,
        aim=8.0,
        blind_to="as `do`; the floor's key has one part",
        unit=Unit.NANOSECONDS,
        operations=10_000,
        rounds=101,
        prepare=leading(lead_two_parts, ShardedFlight),
    ),
    Row(
        name="do-16-shards",
        what="`do`, leader, one `str` part, 16 shards",
        against=LOOP,
        aim=8.0,
        blind_to="as `do`; whether shards help threads that run at once",
        unit=Unit.NANOSECONDS,
        operations=10_000,
        rounds=101,
        prepare=leading(lead_one_part, lambda: ShardedFlight(16)),
    ),
    Row(
        name="do-async",
        what="`do_async`, leader, a coroutine that suspends once",
        against="`await asyncio.create_task(fn())`",
        aim=1.2,
        blind_to="a loop with other work: both sides pay for its empty rounds",
        unit=Unit.NANOSECONDS,
        operations=1_000,
        rounds=61,
        prepare=leading_async(suspends_once, bare_task),
    ),
    Row(
        name="do-async-inline",
        what="`do_async`, leader, a coroutine that does not suspend",
        against="`d[k] = 1; await fn(); del d[k]` in a loop",
        aim=None,
        blind_to="that the floor has no task, which any suspension would need",
        unit=Unit.NANOSECONDS,
        operations=2_000,
        rounds=61,
        prepare=leading_async(constant_async, bare_await),
    ),
    Row(
        name="followers",
        what="`do_async`, 1,000 followers of one key, each",
        against="1,000 tasks that each await a future of their own",
        aim=1.2,
        blind_to="followers on other threads or loops; both sides include making their tasks",
        unit=Unit.NANOSECONDS,
        operations=1_000,
        rounds=61,
        prepare=following,
    ),
    Row(
        name="do-future",
        what="`do_future(fn, k).result()`",
        against="`executor.submit(fn).result()` on the same warm pool of one thread",
        aim=1.2,
        blind_to="a busy pool; most of either side is two threads waking each other, which takes "
        "several times as long on two cores as on one",
        unit=Unit.NANOSECONDS,
        operations=500,
        rounds=61,
        prepare=submitting,
    ),
    Row(
        name="memory-do",
        what="an execution in flight, led by `do` on a thread of its own",
        against="the same threads inside the same function without a flight",
        aim=1024,
        blind_to="key, function, the thread's stack, and what a thread keeps after its first call",
        unit=Unit.BYTES,
        operations=500,
        rounds=7,
        prepare=leading_threads,
    ),
    Row(
        name="memory-do-async",
        what="an execution in flight, led by `do_async`, with the task that the flight owns",
        against="the same tasks inside the same coroutine function without a flight",
        aim=1024,
        blind_to="key, function, its coroutine, and the caller's own task",
        unit=Unit.BYTES,
        operations=5_000,
        rounds=7,
        prepare=leading_tasks,
    ),
    Row(
        name="memory-do-future",
        what="an execution in flight, led by `do_future`",
        against="`executor.submit(fn)` and one more `Future` for the caller",
        aim=1024,
        blind_to="key, function, and the two futures that no call of this kind can do without",
        unit=Unit.BYTES,
        operations=5_000,
        rounds=7,
        prepare=leading_futures,
    ),
    Row(
        name="memory-follower",
        what="a coroutine that follows, in a task of its own",
        against="a task that awaits one future shared by all",
        aim=1024,
        blind_to="the callback by which a future knows its task: both sides have one",
        unit=Unit.BYTES,
        operations=1_000,
        rounds=7,
        prepare=waiting_tasks,
    ),
)
