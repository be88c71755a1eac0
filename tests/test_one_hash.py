"""Different keys with one hash, and the moments in which one takes another's place.

The place in a table goes by the hash, so these keys share one. Comparing them runs the keys' own
`__eq__`, which lets a test act at exactly that moment.
"""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from support import PATIENCE, eventually, spawn

from shardedflight import ShardedFlight


class Key:
    """All of them have one hash. `when_compared` runs, once, before the first comparison."""

    def __init__(self, name: str, when_compared: Callable[[], Any] = lambda: None) -> None:
        self.name = name
        self.when_compared = when_compared

    def __hash__(self) -> int:
        return 7

    def __eq__(self, other: object) -> bool:
        act, self.when_compared = self.when_compared, lambda: None
        act()
        return isinstance(other, Key) and self.name == other.name


class Leader:
    """A thread that leads for a key until it is told to end."""

    def __init__(self, flight: ShardedFlight, key: object, value: str) -> None:
        self._running = threading.Event()
        self._end = threading.Event()
        self._value = value
        self.outcome = spawn(flight.do, self, key)
        assert self._running.wait(PATIENCE)

    def __call__(self) -> str:
        self._running.set()
        assert self._end.wait(PATIENCE)
        return self._value

    def end(self) -> tuple[str, bool]:
        self._end.set()
        answer: tuple[str, bool] = self.outcome.result(PATIENCE)
        return answer


@pytest.mark.parametrize("times", [2, 5])
def test_keys_with_one_hash_run_side_by_side(times: int) -> None:
    flight = ShardedFlight()
    leaders = [Leader(flight, Key(str(n)), str(n)) for n in range(times)]
    assert flight.in_flight() == times
    followers = [spawn(flight.do, lambda: "own", Key(str(n))) for n in range(times)]
    eventually(lambda: flight.stats().waiting == times)
    for n, leader in enumerate(leaders):
        assert leader.end() == followers[n].result(PATIENCE) == (str(n), True)
    assert flight.in_flight() == 0
    assert flight.stats().executions == times


def test_the_holder_of_the_place_ends_while_it_is_compared() -> None:
    """The newcomer was on its way beside it, finds the place free, and leads alone."""
    flight = ShardedFlight()
    first = Leader(flight, Key("first", lambda: first.end()), "first")
    assert flight.do(lambda: "second", Key("second")) == ("second", False)
    assert first.outcome.result(PATIENCE) == ("first", False)
    stats = flight.stats()
    assert (stats.executions, stats.shared, stats.in_flight) == (2, 0, 0)


def test_another_caller_of_the_key_takes_the_place_while_the_old_holder_is_compared() -> None:
    """Then the key is in flight, and who was on its way beside joins it: it never runs twice."""
    flight = ShardedFlight()
    rivals: list[Leader] = []

    def replace() -> None:
        first.end()
        rivals.append(Leader(flight, Key("second"), "rival"))

    first = Leader(flight, Key("first", replace), "first")
    caller = spawn(flight.do, lambda: "own", Key("second"))
    eventually(lambda: flight.stats().waiting == 1)
    assert flight.in_flight() == 1
    assert rivals[0].end() == caller.result(PATIENCE) == ("rival", True)
    assert flight.stats().executions == 2


def test_the_execution_to_join_ends_while_it_is_compared() -> None:
    """Nobody joins what has ended: the caller runs its own function."""
    flight = ShardedFlight()
    first = Leader(flight, Key("k", lambda: first.end()), "first")
    assert flight.do(lambda: "own", Key("k")) == ("own", False)
    assert first.outcome.result(PATIENCE) == ("first", False)


def test_a_key_beside_another_is_found_there_after_the_place_became_free() -> None:
    """The place is free, but the key is in flight beside it: its callers join."""
    flight = ShardedFlight()
    first, second = Leader(flight, Key("first"), "first"), Leader(flight, Key("second"), "second")
    assert first.end() == ("first", False)
    follower = spawn(flight.do, lambda: "own", Key("second"))
    eventually(lambda: flight.stats().waiting == 1)
    assert flight.do(lambda: "third", Key("third")) == ("third", False)
    assert second.end() == follower.result(PATIENCE) == ("second", True)
    assert flight.stats().executions == 3


def test_forgotten_executions_of_one_key_run_side_by_side_and_only_the_last_is_joined() -> None:
    flight = ShardedFlight()
    leaders = []
    for n in range(4):
        leaders.append(Leader(flight, "k", str(n)))
        if n < 3:
            flight.forget("k")
    assert flight.in_flight() == 4
    follower = spawn(flight.do, lambda: "own", "k")
    eventually(lambda: flight.stats().waiting == 1)
    for n in (1, 0, 2):
        assert leaders[n].end() == (str(n), False)
    assert leaders[3].end() == follower.result(PATIENCE) == ("3", True)
    assert flight.in_flight() == 0
