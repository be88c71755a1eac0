"""A million calls leave every reference count as it was, and no block of memory behind.

What the compiled core borrows, and what it owns for a moment, is counted by hand in `_core.pxd`.
"""

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
from proof.references import ROUNDS, SLACK, Given, enough, given_to, leaked

from shardedflight import ShardedFlight

pytestmark = pytest.mark.around

#: Of each outcome, with 1 shard and with 16: a million in all.
CALLS = 62_500


class Key:
    """A key whose references can be counted: interned text has none."""


class Lost(BaseException):
    """Loses the leader."""


class Failed(Exception):
    """Fails the execution."""


async def coroutine() -> None:
    """Is refused."""


def outcomes() -> dict[str, tuple[Callable[[], Any], tuple[Any, ...], type[BaseException] | None]]:
    """What is called, with which parts, and what it raises."""
    value = Key()

    def returns() -> Any:
        return value

    def fails() -> Any:
        raise Failed

    def is_lost() -> Any:
        raise Lost

    return {
        "a value": (returns, (Key(),), None),
        "a value, two parts": (returns, (Key(), Key()), None),
        "a value, three parts": (returns, (Key(), Key(), Key()), None),
        "a value, no part": (returns, (), None),
        "an error": (fails, (Key(),), Failed),
        "an error, two parts": (fails, (Key(), Key()), Failed),
        "a loss": (is_lost, (Key(),), Lost),
        "an unhashable key": (returns, (Key(), [value]), TypeError),
    }


@pytest.mark.parametrize("shards", [1, 16])
@pytest.mark.parametrize("outcome", outcomes())
def test_a_million_calls_leave_the_counts_as_they_were(outcome: str, shards: int) -> None:
    flight = ShardedFlight(shards)
    fn, parts, raised = outcomes()[outcome]

    def call(times: int) -> None:
        for _ in range(times):
            if raised is None:
                flight.do(fn, *parts)
            else:
                try:
                    flight.do(fn, *parts)
                except raised:
                    pass

    def counts() -> list[int]:
        gc.collect()
        counted = [fn, *parts, flight, type(flight).do]
        return [sys.getrefcount(one) for one in counted]

    call(100)
    before, blocks = counts(), sys.getallocatedblocks()
    call(CALLS)
    assert counts() == before
    assert sys.getallocatedblocks() - blocks < 500


@pytest.mark.parametrize("held", [3, 40])
def test_seats_beyond_the_slots_are_let_go(held: int) -> None:
    """So many leaders at once that some of them find no slot in the line."""
    flight = ShardedFlight(1)
    keys = [Key() for _ in range(held)]
    before = [sys.getrefcount(key) for key in keys]

    def nest(depth: int) -> int:
        if depth == held:
            assert flight.in_flight() == held
            assert flight.stats().per_shard == (held,)
            return 0
        value, shared = flight.do(lambda: nest(depth + 1), keys[depth])
        assert not shared
        return value + 1

    for _ in range(50):
        assert nest(0) == held
    gc.collect()
    assert [sys.getrefcount(key) for key in keys] == before
    assert flight.in_flight() == 0


@pytest.mark.parametrize("name", ROUNDS)
def test_no_outcome_of_any_method_leaves_anything_behind(name: str) -> None:
    """The short form of `python -m proof.references`."""
    assert leaked(ROUNDS[name], given_to(name), enough(name)) is None


def test_what_is_left_behind_is_found() -> None:
    kept: list[Any] = []
    given = Given(ShardedFlight(1))
    assert leaked(lambda given: kept.append(given.key), given, 2 * SLACK, 0) is not None
    assert leaked(lambda _: kept.append(object()), given, 2 * SLACK) is not None
    assert leaked(lambda given: given.flight.do(given.value, given.key), given, 2 * SLACK) is None
