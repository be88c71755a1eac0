"""What each method answers, as inferred from the function it is given. Checked, never executed."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Mapping, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Literal, TypeVar, assert_type

from shardedflight import (
    BackendError,
    DeadlockError,
    FlightError,
    FlightErrorGroup,
    FlightTimeout,
    InvalidShardsError,
    RemoteError,
    ShardedFlight,
    Stats,
    coalesce,
    keys,
)
from shardedflight.observe import Departure, End, Ended, Left, ObservedExecution, Observer, Started

T = TypeVar("T")


@dataclass
class Item:
    number: int


class Query:
    def __call__(self) -> Item:
        return Item(1)

    def run(self) -> list[Item]:
        return [self()]

    async def run_async(self) -> list[Item]:
        return [self()]


def fetch() -> Item:
    return Item(1)


def fetch_or_none() -> Item | None:
    return None


def fetch_nothing() -> None:
    pass


def fetch_number(number: int) -> Item:
    return Item(number)


async def fetch_async() -> Item:
    return Item(1)


async def fetch_number_async(number: int) -> Item:
    return Item(number)


def fetch_future() -> "asyncio.Future[Item]":
    return asyncio.get_running_loop().create_future()


def fetch_awaitable() -> Awaitable[Item]:
    return fetch_async()


def fetch_rows(numbers: list[int]) -> dict[int, Item]:
    return {number: Item(number) for number in numbers}


def fetch_mapping(names: list[str]) -> Mapping[str, Item | None]:
    return dict.fromkeys(names)


async def fetch_rows_async(numbers: list[int]) -> dict[int, Item]:
    return fetch_rows(numbers)


def making() -> None:
    assert_type(ShardedFlight(), ShardedFlight)
    ShardedFlight(16)
    ShardedFlight(shards=None)
    ShardedFlight(build_key=keys.concat_key, hash=keys.fnv1a_64)
    ShardedFlight(build_key=keys.join_key(":"), hash=hash)
    ShardedFlight(build_key=lambda *parts: parts, hash=lambda key: len(key))
    ShardedFlight(executor=ThreadPoolExecutor(), on_abandon="cancel", name="rows")
    ShardedFlight(executor=None, on_abandon="finish", name=None)


def threads(flight: ShardedFlight, query: Query) -> None:
    value, shared = flight.do(fetch, "k")
    assert_type(value, Item)
    assert_type(shared, bool)

    assert_type(flight.do(fetch), tuple[Item, bool])
    assert_type(flight.do(fetch, "item", 1, None, ("a", b"b")), tuple[Item, bool])
    assert_type(flight.do(fetch, "k", timeout=2.0), tuple[Item, bool])
    assert_type(flight.do(fetch, "k", timeout=2), tuple[Item, bool])
    assert_type(flight.do(fetch, "k", timeout=None), tuple[Item, bool])
    assert_type(flight.do(fetch_or_none, "k"), tuple[Item | None, bool])
    assert_type(flight.do(fetch_nothing, "k"), tuple[None, bool])
    assert_type(flight.do(lambda: Item(1), "k"), tuple[Item, bool])
    assert_type(flight.do(lambda: fetch_number(7).number, "k"), tuple[int, bool])
    assert_type(flight.do(partial(fetch_number, 7), "k"), tuple[Item, bool])
    assert_type(flight.do(query, "k"), tuple[Item, bool])
    assert_type(flight.do(query.run, "k"), tuple[list[Item], bool])
    assert_type(flight.do(Query, "k"), tuple[Query, bool])


async def coroutines(flight: ShardedFlight, query: Query) -> None:
    value, shared = await flight.do_async(fetch_async, "k")
    assert_type(value, Item)
    assert_type(shared, bool)

    assert_type(await flight.do_async(fetch_async), tuple[Item, bool])
    assert_type(await flight.do_async(fetch_async, "item", 1, None), tuple[Item, bool])
    assert_type(await flight.do_async(fetch_future, "k"), tuple[Item, bool])
    assert_type(await flight.do_async(fetch_awaitable, "k"), tuple[Item, bool])
    assert_type(await flight.do_async(lambda: fetch_number_async(7), "k"), tuple[Item, bool])
    assert_type(await flight.do_async(partial(fetch_number_async, 7), "k"), tuple[Item, bool])
    assert_type(await flight.do_async(query.run_async, "k"), tuple[list[Item], bool])

    # What a task is made from and what `asyncio.gather` takes.
    task = asyncio.create_task(flight.do_async(fetch_async, "k"))
    assert_type(task, asyncio.Task[tuple[Item, bool]])
    async with asyncio.timeout(1), asyncio.TaskGroup() as group:
        assert_type(
            group.create_task(flight.do_async(fetch_async, "k")), asyncio.Task[tuple[Item, bool]]
        )
    assert_type(
        await asyncio.gather(flight.do_async(fetch_async, 1), flight.do_async(query.run_async, 2)),
        tuple[tuple[Item, bool], tuple[list[Item], bool]],
    )


async def futures(flight: ShardedFlight, query: Query) -> None:
    future = flight.do_future(fetch, "k")
    assert_type(future, Future[tuple[Item, bool]])
    value, shared = future.result()
    assert_type(value, Item)
    assert_type(shared, bool)

    assert_type(flight.do_future(fetch), Future[tuple[Item, bool]])
    assert_type(flight.do_future(fetch_or_none, "k"), Future[tuple[Item | None, bool]])
    assert_type(flight.do_future(lambda: Item(1), "item", 1), Future[tuple[Item, bool]])
    assert_type(flight.do_future(partial(fetch_number, 7), "k"), Future[tuple[Item, bool]])
    assert_type(flight.do_future(query.run, "k"), Future[tuple[list[Item], bool]])
    assert_type(await asyncio.wrap_future(future), tuple[Item, bool])


def many(flight: ShardedFlight) -> None:
    found = flight.do_many(fetch_rows, [1, 2, 3])
    assert_type(found, dict[int, tuple[Item, bool]])
    value, shared = found[1]
    assert_type(value, Item)
    assert_type(shared, bool)

    assert_type(flight.do_many(fetch_rows, (1, 2)), dict[int, tuple[Item, bool]])
    assert_type(flight.do_many(fetch_rows, {1, 2}), dict[int, tuple[Item, bool]])
    assert_type(flight.do_many(fetch_rows, range(3)), dict[int, tuple[Item, bool]])
    assert_type(
        flight.do_many(fetch_rows, (number for number in range(3))), dict[int, tuple[Item, bool]]
    )
    assert_type(flight.do_many(fetch_mapping, ["a", "b"]), dict[str, tuple[Item | None, bool]])
    assert_type(
        flight.do_many(lambda numbers: {n: str(n) for n in numbers}, [1, 2]),
        dict[int, tuple[str, bool]],
    )


async def many_coroutines(flight: ShardedFlight) -> None:
    found = await flight.do_many_async(fetch_rows_async, [1, 2, 3])
    assert_type(found, dict[int, tuple[Item, bool]])
    value, shared = found[1]
    assert_type(value, Item)
    assert_type(shared, bool)

    assert_type(
        await flight.do_many_async(lambda numbers: fetch_rows_async(numbers), range(3)),
        dict[int, tuple[Item, bool]],
    )
    assert_type(
        asyncio.create_task(flight.do_many_async(fetch_rows_async, {1, 2})),
        asyncio.Task[dict[int, tuple[Item, bool]]],
    )


def watching(flight: ShardedFlight) -> None:
    assert_type(flight.forget("item", 1), None)
    assert_type(flight.in_flight(), int)
    assert_type(flight.shards, int)
    stats = flight.stats()
    assert_type(stats, Stats)
    assert_type(stats.executions, int)
    assert_type(stats.shared, int)
    assert_type(stats.errors, int)
    assert_type(stats.promotions, int)
    assert_type(stats.timeouts, int)
    assert_type(stats.abandoned, int)
    assert_type(stats.forgotten, int)
    assert_type(stats.deadlocks, int)
    assert_type(stats.in_flight, int)
    assert_type(stats.waiting, int)
    assert_type(stats.per_shard, tuple[int, ...])


def shipped_keys() -> None:
    assert_type(keys.concat_key("item", 1), str)
    assert_type(keys.join_key(":")("item", 1), str)
    assert_type(keys.fnv1a_64("item"), int)
    assert_type(keys.fnv1a_64(b"item"), int)


def errors(flight: ShardedFlight) -> None:
    flight_errors: list[type[FlightError]] = [
        BackendError,
        DeadlockError,
        FlightTimeout,
        InvalidShardsError,
        RemoteError,
    ]
    value_error: type[ValueError] = InvalidShardsError
    timeout_error: type[TimeoutError] = FlightTimeout
    group: type[ExceptionGroup[Any]] = FlightErrorGroup
    contextlib.suppress(*flight_errors, value_error, timeout_error, group)
    try:
        flight.do_many(fetch_rows, [1])
    except DeadlockError as error:
        assert_type(error.keys, tuple[Hashable, ...])
    except RemoteError as error:
        assert_type((error.type_name, error.message, error.remote_traceback), tuple[str, str, str])


class Rows(ShardedFlight):
    """A subclass answers with the types of its base."""

    def row(self, number: int) -> Item:
        value, _ = self.do(partial(fetch_number, number), number)
        return value


def subclasses(rows: Rows) -> None:
    assert_type(Rows(8, name="rows"), Rows)
    assert_type(rows.do(fetch, "k"), tuple[Item, bool])
    assert_type(rows.do_future(fetch, "k"), Future[tuple[Item, bool]])
    assert_type(rows.do_many(fetch_rows, [1]), dict[int, tuple[Item, bool]])
    assert_type(rows.row(1), Item)


class Cache(Generic[T]):
    """The value's type may be the caller's own variable."""

    def __init__(self, load: Callable[[str], T], load_async: Callable[[str], Awaitable[T]]) -> None:
        self.load = load
        self.load_async = load_async
        self.flight = ShardedFlight()

    def get(self, name: str) -> T:
        value, _ = self.flight.do(lambda: self.load(name), name)
        return value

    async def get_async(self, name: str) -> T:
        value, _ = await self.flight.do_async(lambda: self.load_async(name), name)
        return value


def policy(name: Literal["cancel", "finish"]) -> ShardedFlight:
    return ShardedFlight(on_abandon=name)


def passed_on(flight: ShardedFlight) -> Coroutine[Any, Any, tuple[Item, bool]]:
    return flight.do_async(fetch_async, "k")


@coalesce
def load(number: int, /, name: str = "", *, deep: bool = False) -> Item:
    return Item(number)


@coalesce(flight=ShardedFlight(), cache={}, typed=True, timeout=2.0)
async def load_async(number: int) -> Item:
    return Item(number)


def key_of_items(items: list[int]) -> tuple[int, ...]:
    return tuple(items)


@coalesce(key=key_of_items)
def count(items: list[int]) -> int:
    return len(items)


@coalesce()
def load_any(what: T) -> list[T]:
    return [what]


class Repository:
    @coalesce
    def row(self, number: int, name: str = "") -> Item:
        return Item(number)

    @coalesce(cache=None)
    async def row_async(self, number: int) -> Item:
        return Item(number)

    @coalesce
    @staticmethod
    def static(number: int) -> Item:
        return Item(number)

    @coalesce(timeout=1)
    @classmethod
    def of_class(cls, number: int) -> Item:
        return Item(number)

    @staticmethod
    @coalesce
    def static_outside(number: int) -> Item:
        return Item(number)

    @classmethod
    @coalesce
    def of_class_outside(cls, number: int) -> Item:
        return Item(number)


async def decorated(repository: Repository) -> None:
    assert_type(load(1), Item)
    assert_type(load(1, "name", deep=True), Item)
    assert_type(load.forget(1, name="name"), None)
    assert_type(load.flight, ShardedFlight)
    assert_type(load.cache, MutableMapping[Any, Any] | None)
    assert_type(load.__wrapped__(1), Item)
    assert_type(count([1]), int)
    assert_type(load_any("item"), list[str])
    plain: Callable[[int], Item] = load
    print(plain)

    coroutine: Coroutine[Any, Any, Item] = load_async(1)
    assert_type(await coroutine, Item)
    assert_type(await load_async(number=1), Item)
    assert_type(await asyncio.gather(load_async(1), load_async(2)), tuple[Item, Item])

    assert_type(repository.row(1), Item)
    assert_type(repository.row(1, name="name"), Item)
    assert_type(Repository.row(repository, 1), Item)
    assert_type(repository.row.forget(1), None)
    assert_type(repository.row.flight, ShardedFlight)
    assert_type(await repository.row_async(1), Item)

    assert_type(repository.static(1), Item)
    assert_type(Repository.static(number=1), Item)
    assert_type(Repository.static.forget(1), None)
    assert_type(repository.of_class(1), Item)
    assert_type(Repository.of_class(number=1), Item)
    assert_type(Repository.of_class.forget(1), None)
    assert_type(repository.static_outside(1), Item)
    assert_type(Repository.static_outside(1), Item)
    assert_type(repository.of_class_outside(1), Item)
    assert_type(Repository.of_class_outside(1), Item)


class Watching(Observer):
    """Has those methods that it wants."""

    def execution_ended(self, event: Ended, /) -> None:
        assert_type(event.started, Started)
        assert_type(event.execution, ObservedExecution)
        assert_type(event.execution.flight, ShardedFlight)
        assert_type(event.end, End)
        assert_type(event.error, Exception | None)
        assert_type(event.seconds, float)

    def follower_left(self, event: Left, /) -> None:
        assert_type(event.departure, Departure)
        assert_type(event.joined.execution, ObservedExecution)


def watched(flight: ShardedFlight) -> None:
    flight.add_observer(Watching())
    flight.remove_observer(Watching())
    assert_type(flight.observer_errors, int)
    assert_type(flight.name, str | None)
