"""What both type checkers have to refuse. Checked, never executed.

Each `type: ignore` is itself checked: it is an error as soon as mypy or pyright accepts its line.
"""

from concurrent.futures import Future

from shardedflight import ShardedFlight, coalesce, keys


def fetch() -> int:
    return 1


def fetch_number(number: int) -> int:
    return number


async def fetch_async() -> int:
    return 1


def fetch_rows(numbers: list[int]) -> dict[int, str]:
    return {number: str(number) for number in numbers}


async def fetch_rows_async(numbers: list[int]) -> dict[int, str]:
    return fetch_rows(numbers)


def making() -> None:
    ShardedFlight("8")  # type: ignore[arg-type]
    ShardedFlight(8, keys.concat_key)  # type: ignore[call-arg]
    ShardedFlight(hash=lambda key: str(key))  # type: ignore[arg-type,return-value]
    ShardedFlight(on_abandon="drop")  # type: ignore[arg-type]
    ShardedFlight(timeout=1.0)  # type: ignore[call-arg]


def threads(flight: ShardedFlight) -> None:
    flight.do()  # type: ignore[call-arg]
    flight.do("k", fetch)  # type: ignore[arg-type]
    flight.do(fetch_number, "k")  # type: ignore[arg-type]
    flight.do(fetch(), "k")  # type: ignore[arg-type]
    flight.do(fetch, "k", timeout="2")  # type: ignore[arg-type]
    value: str = flight.do(fetch, "k")[0]  # type: ignore[assignment]
    only: int = flight.do(fetch, "k")  # type: ignore[assignment]
    print(value, only)


async def coroutines(flight: ShardedFlight) -> None:
    await flight.do_async(fetch, "k")  # type: ignore[arg-type]
    await flight.do_async(fetch_async(), "k")  # type: ignore[arg-type]
    await flight.do_async(fetch_async, "k", timeout=2.0)  # type: ignore[call-arg]
    answer: tuple[int, bool] = flight.do_async(fetch_async, "k")  # type: ignore[assignment]
    print(answer)
    flight.do_async(fetch_async, "k")  # type: ignore[unused-coroutine]


def futures(flight: ShardedFlight) -> None:
    flight.do_future(fetch_number, "k")  # type: ignore[arg-type]
    flight.do_future(fetch, "k", timeout=2.0)  # type: ignore[call-arg]
    future: Future[int] = flight.do_future(fetch, "k")  # type: ignore[assignment]
    print(future)


async def many(flight: ShardedFlight) -> None:
    flight.do_many(fetch, [1])  # type: ignore[arg-type]
    flight.do_many(fetch_rows, ["a"])  # type: ignore[arg-type]
    flight.do_many(fetch_rows, 1)  # type: ignore[arg-type]
    flight.do_many(fetch_rows_async, [1])  # type: ignore[arg-type]
    await flight.do_many_async(fetch_rows, [1])  # type: ignore[arg-type]
    await flight.do_many_async(fetch_rows_async, ["a"])  # type: ignore[arg-type]


def watching(flight: ShardedFlight) -> None:
    flight.shards = 8  # type: ignore[misc]
    flight.stats().executions = 0  # type: ignore[misc]
    print(flight.stats().hits)  # type: ignore[attr-defined]


def watched(flight: ShardedFlight) -> None:
    flight.add_observer(print)  # type: ignore[arg-type]
    flight.observer_errors = 0  # type: ignore[misc]


def shipped_keys() -> None:
    keys.join_key(1)  # type: ignore[arg-type]
    keys.fnv1a_64(1)  # type: ignore[arg-type]


@coalesce
def load(number: int, *, deep: bool = False) -> str:
    return str(number)


@coalesce(cache={})
async def load_async(number: int) -> str:
    return str(number)


class Repository:
    @coalesce
    def row(self, number: int) -> str:
        return str(number)


async def decorated(repository: Repository) -> None:
    coalesce(1)  # type: ignore[call-overload]
    coalesce(ShardedFlight())  # type: ignore[call-overload]
    coalesce(flight=8)  # type: ignore[call-overload]
    coalesce(cache=8)  # type: ignore[call-overload]
    coalesce(key="k")  # type: ignore[call-overload]
    coalesce(fetch, timeout=2.0)  # type: ignore[call-overload]
    load("1")  # type: ignore[arg-type]
    load(1, True)  # type: ignore[call-arg]
    load.forget()  # type: ignore[call-arg]
    number: int = load(1)  # type: ignore[assignment]
    text: str = load_async(1)  # type: ignore[assignment]
    repository.row(repository, 1)  # type: ignore[call-arg,arg-type]
    repository.row("1")  # type: ignore[arg-type]
    repository.row.forget("1")  # type: ignore[arg-type]
    print(number, text)
