"""A mix of calls that meet: what `proof.sanitize` runs under its instruments.

Threads call every method for a few keys of a few flights that come and go: keys that are equal,
keys that only have the same hash, more leaders than a line has slots, functions that return, raise,
are lost, and call for further keys; followers that leave; tasks that are cancelled. Each answer is
checked, and that nothing is in flight at the end.
"""

import argparse
import asyncio
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import shardedflight
from shardedflight import FlightError, FlightErrorGroup, FlightTimeout, ShardedFlight


class Failed(Exception):
    """Fails an execution."""


class Lost(BaseException):
    """Loses a leader."""


class Same:
    """Keys of which all have one hash, and not all are equal."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __hash__(self) -> int:
        return 7

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.number == self.number


#: Keys that are the same object for all threads, and of each kind that the core tells apart.
KEYS: tuple[tuple[Any, ...], ...] = (
    *((number,) for number in range(4)),
    *(("row", number) for number in range(3)),
    *((Same(number),) for number in range(3)),
    (),
    ("a", "b", "c"),
)


def flights() -> list[ShardedFlight]:
    """One of each kind that the core tells apart."""
    return [
        ShardedFlight(1),
        ShardedFlight(16),
        ShardedFlight(2, hash=lambda _: 1),
        ShardedFlight(4, build_key=lambda *parts: parts),
    ]


class Churn:
    """The calls of all threads, for some seconds."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.deadline = 0.0
        self.flights = flights()
        self.done: Counter[str] = Counter()
        self.wrong: list[BaseException] = []
        self._lock = threading.Lock()
        self._local = threading.local()

    def run(self, seconds: float, threads: int) -> None:
        """Calls until the time is over; what went wrong is in `wrong`."""
        self.deadline = time.monotonic() + seconds
        running = [threading.Thread(target=self._thread, args=(n,)) for n in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        for flight in self.flights:
            self._check_idle(flight)

    def _check_idle(self, flight: ShardedFlight) -> None:
        # A future's execution ends on its pool's thread, maybe after all have their answers.
        patience = time.monotonic() + 30
        while flight.in_flight() and time.monotonic() < patience:
            time.sleep(0.01)
        if flight.in_flight():
            self.wrong.append(AssertionError(f"{flight!r} has executions that nobody leads"))

    def _thread(self, number: int) -> None:
        draw = random.Random(self.seed * 1000 + number)
        ways = list(WAYS.items())
        done: Counter[str] = Counter()
        try:
            # One for all the time: CPython 3.14.6t may crash when one is closed, which looks at the
            # tasks of all threads (https://github.com/python/cpython/issues/153809).
            with asyncio.Runner() as self._local.runner:
                while time.monotonic() < self.deadline and not self.wrong:
                    name, way = draw.choice(ways)
                    way(self, draw.choice(self.flights), draw)
                    done[name] += 1
        except BaseException as error:
            self.wrong.append(error)
        with self._lock:
            self.done += done

    # -- the ways to call --------------------------------------------------------------------------

    def value(self, flight: ShardedFlight, draw: random.Random) -> None:
        """Leads or follows, and has the value."""
        parts = draw.choice(KEYS)
        expect(parts, flight.do, function(parts, draw), *parts)

    def timeout(self, flight: ShardedFlight, draw: random.Random) -> None:
        """Follows for no time, or a short one."""
        parts = draw.choice(KEYS)
        with suppress(FlightTimeout):
            expect(
                parts, flight.do, function(parts, draw), *parts, timeout=draw.choice([0, 0.0005])
            )

    def failure(self, flight: ShardedFlight, draw: random.Random) -> None:
        """Leads and fails, or follows."""
        parts = draw.choice(KEYS)
        expect(parts, flight.do, raising(Failed), *parts)

    def loss(self, flight: ShardedFlight, draw: random.Random) -> None:
        """Leads and is lost, or follows."""
        parts = draw.choice(KEYS)
        with suppress(Lost):
            expect(parts, flight.do, raising(Lost), *parts)

    def nested(self, flight: ShardedFlight, draw: random.Random) -> None:
        """Leads, or follows for, many keys at once: more than a line has slots."""
        last = draw.randrange(2, 24)

        def lead(depth: int) -> Any:
            if depth == last:
                return ("value", ("nested", depth))
            with suppress(Failed):
                expect(
                    ("nested", depth + 1), flight.do, lambda: lead(depth + 1), "nested", depth + 1
                )
            return ("value", ("nested", depth))

        expect(("nested", 0), flight.do, lambda: lead(0), "nested", 0)

    def future(self, flight: ShardedFlight, draw: random.Random) -> None:
        """By a future, which may be cancelled."""
        parts = draw.choice(KEYS)
        future = flight.do_future(function(parts, draw), *parts)
        if draw.random() < 0.3:
            future.cancel()
        else:
            expect(parts, future.result, 30)

    def many(self, flight: ShardedFlight, draw: random.Random) -> None:
        """Several keys with one function; at times more than the smaller of a line's tables has."""
        if draw.random() < 0.05:
            first = draw.randrange(4)
            keys = list(range(first, first + draw.randrange(150)))
        else:
            keys = [draw.randrange(4) for _ in range(draw.randrange(5))]

        def find(missing: list[int]) -> dict[int, Any]:
            return {key: ("value", (key,)) for key in missing}

        try:
            found = flight.do_many(find, keys)
        except FlightErrorGroup as group:
            found = group.found
        for key, (value, _) in found.items():
            assert value == ("value", (key,))

    def tasks(self, flight: ShardedFlight, draw: random.Random) -> None:
        """Tasks of a loop of this thread's own, of which some are cancelled."""

        async def run() -> None:
            tasks: list[Any] = []
            running: list[asyncio.Event] = []
            for _ in range(4):
                parts = draw.choice(KEYS)
                wait = draw.choice([0, 0.0005])

                async def answer(parts: Any = parts, wait: float = wait) -> Any:
                    ended = asyncio.Event()
                    running.append(ended)
                    try:
                        await asyncio.sleep(wait)
                    finally:
                        ended.set()
                    return ("value", parts)

                tasks.append(asyncio.ensure_future(flight.do_async(answer, *parts)))
            await asyncio.sleep(0)
            if draw.random() < 0.5:
                tasks[0].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for ended in running:  # maybe for another thread: this one's loop is suspended then
                await ended.wait()

        self._local.runner.run(run())

    def forget(self, flight: ShardedFlight, draw: random.Random) -> None:
        """Lets the next caller begin anew."""
        flight.forget(*draw.choice(KEYS))

    def watch(self, flight: ShardedFlight, _: random.Random) -> None:
        """Looks at all there is to see."""
        stats = flight.stats()
        assert stats.executions >= stats.errors
        assert flight.in_flight() >= 0
        assert repr(flight)

    def replace(self, _: ShardedFlight, draw: random.Random) -> None:
        """Lets go of a flight, which may be in use, and makes another."""
        if draw.random() < 0.1:
            number = draw.randrange(len(self.flights))
            self.flights[number] = flights()[number]


WAYS: dict[str, Callable[[Churn, ShardedFlight, random.Random], None]] = {
    name: getattr(Churn, name)
    for name in (
        *("value", "timeout", "failure", "loss", "nested"),
        *("future", "many", "tasks", "forget", "watch", "replace"),
    )
}


def function(parts: tuple[Any, ...], draw: random.Random) -> Callable[[], Any]:
    """Takes no time, or a little: others get a chance to follow."""
    wait = draw.choice([None, 0, 0.0003])

    def run() -> Any:
        if wait is not None:
            time.sleep(wait)
        return ("value", parts)

    return run


def raising(error: type[BaseException]) -> Callable[[], Any]:
    """Takes a moment and raises."""

    def run() -> Any:
        time.sleep(0)
        raise error

    return run


def expect(parts: tuple[Any, ...], call: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Calls, and looks whether the answer is the key's; a failure may be the leader's."""
    try:
        value, shared = call(*args, **options)
    except Failed:
        return
    except FlightTimeout:
        raise
    except FlightError as error:
        raise AssertionError("no call of these waits in a circle") from error
    assert value == ("value", parts), (value, parts)
    assert isinstance(shared, bool)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m proof.churn", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long (5)")
    parser.add_argument("--threads", type=int, default=4, help="how many threads call (4)")
    parser.add_argument("--seed", type=int, default=1, help="of what is drawn (1)")
    options = parser.parse_args()
    churn = Churn(options.seed)
    churn.run(options.seconds, options.threads)
    core = "compiled" if shardedflight.__compiled__ else "plain"
    print(f"{sum(churn.done.values())} calls on the {core} core:", dict(churn.done))
    for error in churn.wrong:
        print(f"WRONG: {error!r}", file=sys.stderr)
    return 1 if churn.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
