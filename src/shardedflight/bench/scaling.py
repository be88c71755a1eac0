"""Whether threads that lead at the same time are in each other's way: threads x shards.

A round goes through all points of the grid, and its ratios are between points of that round. Each
point runs long enough for the start of its threads not to matter. A thread makes its keys itself:
strings made by another thread cost a free-threaded Python more, wherever they are used.
"""

import os
import random
import statistics
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import product
from time import perf_counter_ns

from shardedflight import ShardedFlight
from shardedflight.bench.basics import FORM, constant, keys_in_order
from shardedflight.bench.measure import Result, Subject, Unit, figures_of, undisturbed, unwatched
from shardedflight.bench.targets import (
    FEW_KEYS,
    MANY_KEYS,
    ONE_SHARD,
    SAME_KEYS,
    SIXTEEN_SHARDS,
    SPEED_UP,
    target_of,
)

SUBJECT = Subject(
    name="scaling",
    what="`do`, leader, calls per second of all threads together",
    against="the second of the two points named, in the same round",
    blind_to="functions that take time, which leave the flight alone; threads that keep meeting on "
    "one key, which follow; more cores than there are here",
    unit=Unit.CALLS_PER_SECOND,
)

SHARDS = (1, 4, 16, 64, 256)
#: How many calls a thread makes between two looks at the clock.
_CALLS = 10_000
_FEW = 200
_ROUNDS = 9
_SECONDS = 0.5
_QUICK_SECONDS = 0.01


class Workload(Enum):
    """What the threads call."""

    FEW_KEYS = FEW_KEYS
    MANY_KEYS = MANY_KEYS
    SAME_KEYS = SAME_KEYS
    ONE_FUNCTION = f"{MANY_KEYS}, one function"
    BARE_LOOP = "bare loops, a dict for each thread"


#: Those that are measured with every number of shards.
TABLED = (Workload.FEW_KEYS, Workload.MANY_KEYS, Workload.SAME_KEYS)


@dataclass(frozen=True)
class Point:
    """One point of the grid; shards are None for the default, and where there is no flight."""

    workload: Workload
    shards: int | None
    threads: int


@dataclass(frozen=True)
class Grid:
    """Calls per second of each point, one for each round.

    Attributes:
        default_shards: How many shards a flight has that is not told.
        threads: The numbers of threads that were measured, in order.
        seconds: How long each point ran in each round.
        rates: The calls per second.
    """

    default_shards: int
    threads: tuple[int, ...]
    seconds: float
    rates: Mapping[Point, Sequence[float]]

    def shards(self) -> tuple[int | None, ...]:
        """Returns the numbers of shards that were measured, the default last."""
        return (*SHARDS, None)

    def median(self, point: Point) -> float:
        """Returns the median rate of a point."""
        return statistics.median(self.rates[point])

    def label(self, shards: int | None) -> str:
        """Names a number of shards."""
        if shards is None:
            return f"default ({self.default_shards})"
        return f"{shards} shard{'s' * (shards > 1)}"


def thread_counts() -> tuple[int, ...]:
    """Returns 1, 2, 4 and so on up to the number of cores; 2 even if there is one core."""
    cores = os.cpu_count() or 1
    counts = {1, 2, cores}
    step = 4
    while step < cores:
        counts.add(step)
        step *= 2
    return tuple(sorted(counts))


def points() -> Iterator[Point]:
    """Goes through the grid so that what is compared most is close together in time."""
    counts = thread_counts()
    for workload in TABLED:
        for shards, threads in product((1, None, 16, 4, 64, 256), counts):
            yield Point(workload, shards, threads)
    for workload in (Workload.ONE_FUNCTION, Workload.BARE_LOOP):
        for threads in counts:
            yield Point(workload, None, threads)


def steps(*, quick: bool) -> int:
    """Returns how often `measure_grid` says that it is further."""
    return _rounds(quick=quick) * len(list(points()))


def _rounds(*, quick: bool) -> int:
    return 1 if quick else _ROUNDS


def measure_grid(*, quick: bool, on_step: Callable[[], object]) -> Grid:
    """Measures all points in each round, calling `on_step` after each."""
    seconds = _QUICK_SECONDS if quick else _SECONDS
    flights = {shards: ShardedFlight(shards) for shards in (*SHARDS, None)}
    rates: dict[Point, list[float]] = {point: [] for point in points()}
    order = list(points())
    with unwatched():
        for number in range(_rounds(quick=quick)):
            for point in order if number % 2 == 0 else reversed(order):
                flight = flights[point.shards]
                rates[point].append(undisturbed(partial(_rate, point, flight, seconds)))
                on_step()
    return Grid(flights[None].shards, thread_counts(), seconds, rates)


def _rate(point: Point, flight: ShardedFlight, seconds: float) -> float:
    """Returns the calls per second of all threads of a point together."""
    together = threading.Barrier(point.threads)
    rates: list[float] = []

    def body(number: int) -> None:
        once = _pass_of(point.workload, flight, number)
        once()
        together.wait()
        calls = 0
        start = now = perf_counter_ns()
        end = start + round(seconds * 1e9)
        while not calls or now < end:  # one pass at least, however busy the machine is
            once()
            calls += _CALLS
            now = perf_counter_ns()
        rates.append(calls / (now - start) * 1e9)

    threads = [threading.Thread(target=body, args=(number,)) for number in range(point.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(rates)


def _pass_of(workload: Workload, flight: ShardedFlight, thread: int) -> Callable[[], None]:
    """Returns what a thread does over and over, with keys and a function that it made itself."""
    match workload:
        case Workload.SAME_KEYS:
            keys = keys_in_order(_CALLS)
            keys = random.Random(thread).choices(keys, k=_CALLS)  # noqa: S311 - not a secret.
        case Workload.FEW_KEYS:
            keys = keys_in_order(_FEW, f"thread {thread}") * (_CALLS // _FEW)
        case _:
            keys = keys_in_order(_CALLS, f"thread {thread}")

    def own() -> int:
        return 1

    fn = constant if workload is Workload.ONE_FUNCTION else own

    def through_the_flight() -> None:
        for key in keys:
            flight.do(fn, key)

    def bare() -> None:
        table: dict[str, int] = {}
        for key in keys:
            table[key] = 1
            fn()
            del table[key]

    return bare if workload is Workload.BARE_LOOP else through_the_flight


def results_of(grid: Grid) -> list[Result]:
    """Compares the points that say most."""
    same = Workload.SAME_KEYS
    most = grid.threads[-1]
    compared: dict[str, tuple[Point, Point]] = {}
    for own in (Workload.FEW_KEYS, Workload.MANY_KEYS):
        two = Point(own, None, 2)
        compared[f"{own.value}, {SPEED_UP}"] = two, Point(own, None, 1)
        compared[f"{own.value}, {ONE_SHARD}"] = two, Point(own, 1, 2)
        compared[f"{own.value}, {SIXTEEN_SHARDS}"] = Point(own, 16, 2), Point(own, 1, 2)
        if most > 2:
            compared[f"{own.value}, default shards, {most} threads / 1"] = (
                Point(own, None, most),
                Point(own, None, 1),
            )
    compared[f"{same.value}, {SPEED_UP}"] = Point(same, None, 2), Point(same, None, 1)
    compared[f"{Workload.ONE_FUNCTION.value} object, 2 threads / 1"] = (
        Point(Workload.ONE_FUNCTION, None, 2),
        Point(Workload.ONE_FUNCTION, None, 1),
    )
    compared["a dict for each thread, 2 threads / 1"] = (
        Point(Workload.BARE_LOOP, None, 2),
        Point(Workload.BARE_LOOP, None, 1),
    )
    return [
        Result(
            subject=SUBJECT,
            who=FORM if first.workload is not Workload.BARE_LOOP else "bare loop",
            point=point,
            operations=_CALLS,
            target=target_of(SUBJECT.name, point, FORM),
            figures=figures_of(
                zip(grid.rates[first], grid.rates[second], strict=True), SUBJECT.unit
            ),
            unit=SUBJECT.unit,
        )
        for point, (first, second) in compared.items()
    ]
