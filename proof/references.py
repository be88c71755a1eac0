"""Reference-leak hunting: every method with every outcome, over and over.

A scenario is one round of calls. It is run some times to fill what is kept for good, then many
times more, and then the reference counts of all that it was given must be what they were, and the
interpreter must have no more blocks of memory in use. A debug build of CPython has a count of all
references as well (`sys.gettotalrefcount`): where there is one, that must not have grown either.

Blind to: what is leaked once, or in fewer than one of some rounds; memory that is not the
interpreter's, which is for `proof.sanitize`.
"""

import argparse
import asyncio
import gc
import inspect
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import shardedflight
from shardedflight import DeadlockError, FlightErrorGroup, FlightTimeout, ShardedFlight

#: How many blocks or references more are no leak: caches that grow, and other threads.
SLACK = 500
#: Seconds for other threads to let go of what they have had.
PATIENCE = 10.0


class Key:
    """What a key is made of, the value too: an object whose references can be counted."""


class Failed(Exception):
    """Fails an execution."""


class Lost(BaseException):
    """Loses a leader."""


@dataclass
class Given:
    """What the calls of a scenario are made with."""

    flight: ShardedFlight
    key: Key = field(default_factory=Key)
    other: Key = field(default_factory=Key)
    result: Key = field(default_factory=Key)

    def value(self) -> Any:
        """A function that returns."""
        return self.result

    def failure(self) -> Any:
        """One that raises."""
        raise Failed

    def loss(self) -> Any:
        """One that loses its leader."""
        raise Lost

    async def suspended(self) -> Any:
        """One that returns after a turn of the loop."""
        await asyncio.sleep(0)
        return self.result

    async def at_once(self) -> Any:
        """One that never suspends."""
        return self.result

    async def fails(self) -> Any:
        """One that raises after a turn of the loop."""
        await asyncio.sleep(0)
        raise Failed

    async def forever(self) -> Any:
        """One that is to be cancelled."""
        await asyncio.Event().wait()

    def counts(self) -> list[int]:
        """The reference counts of all of it."""
        gc.collect()
        counted = (self.key, self.other, self.result, self.flight, type(self.flight).do)
        return [sys.getrefcount(one) for one in counted]


#: One round of each scenario, by its name; of some the flight is another.
ROUNDS: dict[str, Callable[[Given], Any]] = {}
FLIGHTS: dict[str, Callable[[], ShardedFlight]] = {}
#: Scenarios in which other threads have a part take longer, so there are fewer rounds of them.
SLOW: set[str] = set()


def scenario(
    name: str, flight: Callable[[], ShardedFlight] | None = None, slow: bool = False
) -> Callable[[Callable[[Given], Any]], Callable[[Given], Any]]:
    """Gives a round its name."""

    def register(body: Callable[[Given], Any]) -> Callable[[Given], Any]:
        ROUNDS[name] = body
        if flight is not None:
            FLIGHTS[name] = flight
        if slow:
            SLOW.add(name)
        return body

    return register


def refused(
    error: type[BaseException], call: Callable[..., Any], *args: Any, **options: Any
) -> None:
    """Calls, and expects that error."""
    try:
        call(*args, **options)
    except error:
        return
    raise AssertionError(f"{error.__name__} was expected")


async def refused_async(error: type[BaseException], waiting: Awaitable[Any]) -> None:
    """Awaits, and expects that error."""
    try:
        await waiting
    except error:
        return
    raise AssertionError(f"{error.__name__} was expected")


def follow(given: Given, leader: Callable[[], Any], ends: type[BaseException] | None) -> None:
    """This thread leads; another one follows and has the same outcome, or takes over."""
    joined: list[Any] = []

    def join() -> None:
        try:
            joined.append(given.flight.do(given.value, given.key))
        except BaseException as error:
            joined.append(type(error))

    def lead() -> Any:
        thread.start()
        while not given.flight.stats().waiting:
            time.sleep(0.0001)
        return leader()

    thread = threading.Thread(target=join)
    if ends is None:
        assert given.flight.do(lead, given.key) == (given.result, True)
    else:
        refused(ends, given.flight.do, lead, given.key)
    thread.join()
    assert joined == [(given.result, ends is None)] if ends is not Failed else [Failed]


# -- do --------------------------------------------------------------------------------------------


@scenario("do: a value")
def _(given: Given) -> None:
    given.flight.do(given.value, given.key)


@scenario("do: two parts, and none")
def _(given: Given) -> None:
    given.flight.do(given.value, given.key, given.other)
    given.flight.do(given.value)


@scenario("do: an error")
def _(given: Given) -> None:
    refused(Failed, given.flight.do, given.failure, given.key)


@scenario("do: a loss")
def _(given: Given) -> None:
    refused(Lost, given.flight.do, given.loss, given.key, given.other)


@scenario("do: bad input")
def _(given: Given) -> None:
    refused(TypeError, given.flight.do, given.value, given.key, [given.other])
    refused(TypeError, given.flight.do, given.suspended, given.key)
    refused(TypeError, given.flight.do, lambda: given.at_once(), given.key)  # noqa: PLW0108
    refused(ValueError, given.flight.do, given.value, given.key, timeout=-1)


@scenario("do: a deadlock")
def _(given: Given) -> None:
    def again() -> Any:
        return given.flight.do(given.value, given.key)

    refused(DeadlockError, given.flight.do, again, given.key)


@scenario("do: more leaders than slots")
def _(given: Given) -> None:
    def lead(depth: int) -> Any:
        if depth == 20:
            return given.result
        return given.flight.do(lambda: lead(depth + 1), given.key, depth)[0]

    assert lead(0) is given.result


def unhashable(_: Any) -> int:
    """A hook that raises."""
    raise Failed


@scenario("do: a hook that raises", lambda: ShardedFlight(4, hash=unhashable))
def _(given: Given) -> None:
    refused(Failed, given.flight.do, given.value, given.key)


@scenario("do: hooks", lambda: ShardedFlight(4, build_key=lambda *parts: parts, hash=lambda _: 3))
def _(given: Given) -> None:
    given.flight.do(given.value, given.key, given.other)
    refused(Failed, given.flight.do, given.failure, given.key)


class Same:
    """All have one hash."""

    def __hash__(self) -> int:
        return 7


@scenario("do: keys with one hash")
def _(given: Given) -> None:
    given.flight.do(lambda: given.flight.do(given.value, Same()), Same())


@scenario("do: follows, a value", slow=True)
def _(given: Given) -> None:
    follow(given, given.value, None)


@scenario("do: follows, an error", slow=True)
def _(given: Given) -> None:
    follow(given, given.failure, Failed)


@scenario("do: follows and takes over", slow=True)
def _(given: Given) -> None:
    follow(given, given.loss, Lost)


@scenario("do: follows and leaves", slow=True)
def _(given: Given) -> None:
    def leave() -> None:
        refused(FlightTimeout, given.flight.do, given.value, given.key, timeout=0)

    def lead() -> Any:
        thread = threading.Thread(target=leave)
        thread.start()
        thread.join()
        return given.result

    given.flight.do(lead, given.key)


# -- do_future -------------------------------------------------------------------------------------


@scenario("do_future: a value", slow=True)
def _(given: Given) -> None:
    assert given.flight.do_future(given.value, given.key).result() == (given.result, False)


@scenario("do_future: an error", slow=True)
def _(given: Given) -> None:
    refused(Failed, given.flight.do_future(given.failure, given.key).result)


@scenario("do_future: follows, and leaves", slow=True)
def _(given: Given) -> None:
    def lead() -> Any:
        joined = given.flight.do_future(given.value, given.key)
        left = given.flight.do_future(given.value, given.key)
        left.cancel()
        futures.append(joined)
        return given.result

    futures: list[Any] = []
    given.flight.do(lead, given.key)
    assert futures.pop().result() == (given.result, True)


@scenario("do_future: follows, an error", slow=True)
def _(given: Given) -> None:
    def lead() -> Any:
        futures.append(given.flight.do_future(given.value, given.key))
        raise Failed

    futures: list[Any] = []
    refused(Failed, given.flight.do, lead, given.key)
    refused(Failed, futures.pop().result)


@scenario("do_future: bad input")
def _(given: Given) -> None:
    refused(TypeError, given.flight.do_future, given.suspended, given.key)
    refused(TypeError, given.flight.do_future, given.value, [given.key])


# -- do_async --------------------------------------------------------------------------------------


@scenario("do_async: a value")
async def _(given: Given) -> None:
    assert await given.flight.do_async(given.suspended, given.key) == (given.result, False)
    assert await given.flight.do_async(given.at_once, given.key) == (given.result, False)


@scenario("do_async: an error")
async def _(given: Given) -> None:
    await refused_async(Failed, given.flight.do_async(given.fails, given.key))


@scenario("do_async: bad input")
async def _(given: Given) -> None:
    await refused_async(TypeError, given.flight.do_async(given.value, given.key))
    await refused_async(TypeError, given.flight.do_async(given.suspended, [given.key]))


@scenario("do_async: follows")
async def _(given: Given) -> None:
    calls = [given.flight.do_async(given.suspended, given.key) for _ in range(3)]
    assert await asyncio.gather(*calls) == [(given.result, True)] * 3


@scenario("do_async: follows, an error")
async def _(given: Given) -> None:
    calls = [given.flight.do_async(given.fails, given.key) for _ in range(3)]
    ends = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(end) for end in ends] == [Failed] * 3
    ends.clear()


@scenario("do_async: the leader's caller leaves")
async def _(given: Given) -> None:
    calls = [
        asyncio.ensure_future(given.flight.do_async(given.suspended, given.key)) for _ in range(2)
    ]
    await asyncio.sleep(0)
    calls[0].cancel()
    assert (await calls[1])[0] is given.result


@scenario("do_async: all leave")
async def _(given: Given) -> None:
    calls = [
        asyncio.ensure_future(given.flight.do_async(given.forever, given.key)) for _ in range(2)
    ]
    await asyncio.sleep(0)
    for one in calls:
        one.cancel()
    await asyncio.wait(calls)


@scenario("do_async: a deadlock")
async def _(given: Given) -> None:
    async def again() -> Any:
        return await given.flight.do_async(given.suspended, given.key)

    await refused_async(DeadlockError, given.flight.do_async(again, given.key))


# -- do_many ---------------------------------------------------------------------------------------


@scenario("do_many: values, duplicates, and one that is not found")
def _(given: Given) -> None:
    found = given.flight.do_many(
        lambda _: {given.key: given.result}, [given.key, given.other, given.key]
    )
    assert found == {given.key: (given.result, False)}


@scenario("do_many: an error")
def _(given: Given) -> None:
    def fail(_: Any) -> Any:
        raise Failed

    refused(Failed, given.flight.do_many, fail, [given.key, given.other])


@scenario("do_many: an error of one that is joined", slow=True)
def _(given: Given) -> None:
    ends: list[Any] = []

    def many() -> None:
        try:
            given.flight.do_many(
                lambda keys: dict.fromkeys(keys, given.result), [given.key, given.other]
            )
        except FlightErrorGroup as group:
            ends.append(dict(group.found))

    def lead() -> Any:
        thread.start()
        while not given.flight.stats().waiting:
            time.sleep(0.0001)
        raise Failed

    thread = threading.Thread(target=many)
    refused(Failed, given.flight.do, lead, given.key)
    thread.join()
    assert ends == [{given.other: (given.result, False)}]


@scenario("do_many_async: values")
async def _(given: Given) -> None:
    async def find(keys: Any) -> Any:
        await asyncio.sleep(0)
        return dict.fromkeys(keys, given.result)

    calls = [given.flight.do_many_async(find, [given.key, given.other]) for _ in range(2)]
    for found in await asyncio.gather(*calls):
        assert found == dict.fromkeys((given.key, given.other), (given.result, True))


@scenario("do_many_async: an error")
async def _(given: Given) -> None:
    async def fail(_: Any) -> Any:
        await asyncio.sleep(0)
        raise Failed

    await refused_async(Failed, given.flight.do_many_async(fail, [given.key, given.other]))


# -- forget, watching ------------------------------------------------------------------------------


@scenario("forget, and what is left of the old execution")
def _(given: Given) -> None:
    def lead() -> Any:
        given.flight.forget(given.key)
        return given.flight.do(given.value, given.key)[0]

    given.flight.forget(given.key)
    given.flight.do(lead, given.key)


@scenario("in_flight, stats, repr")
def _(given: Given) -> None:
    def look() -> Any:
        assert given.flight.in_flight() == 1
        assert given.flight.stats().in_flight == 1
        assert repr(given.flight)

    given.flight.do(look, given.key)


@scenario("flights that come and go")
def _(given: Given) -> None:
    assert ShardedFlight(16).do(given.value, given.key)[0] is given.result


# -- counting --------------------------------------------------------------------------------------


def repeat(body: Callable[[Given], Any], given: Given, times: int) -> None:
    """So many rounds."""
    if inspect.iscoroutinefunction(body):

        async def all_rounds() -> None:
            for _ in range(times):
                await body(given)

        asyncio.run(all_rounds())
    else:
        for _ in range(times):
            body(given)


def total() -> int:
    """All references there are, where the interpreter counts them.

    Without those to Cython's own types: a generator or an inner function of a compiled module keeps
    one to its type for good (Cython 3.3.1), which costs no memory.
    """
    ask = getattr(sys, "gettotalrefcount", None)
    if ask is None:
        return 0
    modules = [module for name, module in sys.modules.items() if name.startswith("_cython_")]
    types = [one for module in modules for one in vars(module).values() if isinstance(one, type)]
    return int(ask() - sum([sys.getrefcount(one) for one in types]))


def given_to(name: str, shards: int = 1) -> Given:
    """What a scenario is given."""
    return Given(FLIGHTS[name]() if name in FLIGHTS else ShardedFlight(shards))


def enough(name: str) -> int:
    """Rounds of a scenario after which a block or a reference lost in each of them is seen."""
    return 200 if name in SLOW else 2 * SLACK


def leaked(
    body: Callable[[Given], Any], given: Given, times: int, patience: float = PATIENCE
) -> str | None:
    """What has leaked in so many rounds of a scenario, or None."""
    repeat(body, given, 100)
    before = given.counts()
    references, blocks = total(), sys.getallocatedblocks()
    repeat(body, given, times)
    deadline = time.monotonic() + patience
    while given.counts() != before and time.monotonic() < deadline:
        time.sleep(0.01)
    after = given.counts()
    more = sys.getallocatedblocks() - blocks
    references = total() - references
    slack = min(SLACK, times // 2)
    if given.flight.in_flight():
        return f"{given.flight.in_flight()} executions are in flight"
    if after != before:
        return f"the counts were {before} and are {after}"
    if more >= slack or references >= slack:
        return f"{more} blocks and {references} references more"
    return None


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m proof.references",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--times", type=int, default=1_000_000, help="rounds (1,000,000)")
    parser.add_argument("--shards", type=int, default=1, help="of the flights (1)")
    parser.add_argument("--only", default="", help="scenarios with this in their name")
    options = parser.parse_args()
    core = "compiled" if shardedflight.__compiled__ else "plain"
    counted = "all references" if total() else "blocks and references"
    print(f"CPython {sys.version.split()[0]}, {core} core, {counted} counted")
    well = True
    for name, body in ROUNDS.items():
        if options.only not in name:
            continue
        times = max(options.times // 100 if name in SLOW else options.times, enough(name))
        started = time.monotonic()
        found = leaked(body, given_to(name, options.shards), times)
        took = time.monotonic() - started
        print(f"{name:<60}{times:>10}{took:>8.1f} s  {found or 'nothing'}", flush=True)
        well = well and found is None
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
