"""Keys whose own code is hostile: it raises, lies, blocks, or calls the flight.

`tests/test_keys.py` has these by example, one at a time; here they come in any order. What holds:
no call hangs, each ends with its own key's value or an error of its own key's, no lock is held
while a key's code runs, and once all are over nothing is left, however the keys have lied.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

from hypothesis import strategies as st

from proof.fuzz.target import PATIENCE, Held, Target, spawn
from shardedflight import ShardedFlight

__all__ = ["TARGETS"]


class Own(Exception):
    """What a key raises."""


class Lost(BaseException):
    """What a key raises that is no Exception."""


class _NoTruth:
    """What a comparison returns that is neither true nor false."""

    def __bool__(self) -> bool:
        raise Own


class World:
    """One flight, its keys' script, and who has called it."""

    def __init__(self, shards: int, acts: list[str], hash_: Any) -> None:
        self.held = Held()
        self.flight = ShardedFlight(shards, executor=self.held, hash=hash_)
        self.acts = list(acts)
        #: The calls, and the numbers of their keys, which are the values of these.
        self.called: list[tuple[Future[Any], int]] = []
        self.busy = threading.local()
        self.lied = False

    def act(self) -> str:
        """What a key does next. Nothing, while it is at it."""
        if getattr(self.busy, "now", False) or not self.acts:
            return "pass"
        try:
            act = self.acts.pop(0)
        except IndexError:  # another thread was faster
            return "pass"
        self.busy.now = True
        try:
            self._do(act)
        finally:
            self.busy.now = False
        return act

    def _do(self, act: str) -> None:
        match act:
            case "raise":
                raise Own
            case "lose":
                raise Lost
            case "join":
                self.called.append((self.flight.do_future(lambda: 0, Key(self, 0)), 0))
            case "forget":
                self.flight.forget(Key(self, 0))
            case "end":
                self.held.run_next()
            case "block":  # until another thread has been everywhere in the flight
                spawn(self._look).result(PATIENCE)
            case _:
                pass

    def _look(self) -> None:
        self.busy.now = True
        assert self.flight.stats().in_flight >= 0
        self.flight.forget("elsewhere")
        assert self.flight.do(lambda: "there", "elsewhere")[0] == "there"

    def call(self, how: str, number: int) -> None:
        """One step of the outer world."""
        key = Key(self, number)
        if how == "do":
            self.called.append((spawn(lambda: self.flight.do(lambda: number, key)), number))
        elif how == "future":
            self.guarded(
                lambda: self.called.append((self.flight.do_future(lambda: number, key), number))
            )
        elif how == "many":
            many = partial(self.flight.do_many, lambda keys: dict.fromkeys(keys, number), [key])
            self.called.append((spawn(many), number))
        elif how == "forget":
            self.guarded(lambda: self.flight.forget(key))
        else:
            self.guarded(self.held.run_next)

    def guarded(self, step: Callable[[], object]) -> None:
        """Runs a step that may fail as the script says."""
        try:
            step()
        except (Own, Lost):
            pass

    def settle(self) -> None:
        """All calls end, with an outcome that they may have."""
        self.acts.clear()
        deadline = time.monotonic() + PATIENCE
        for future, number in self.called:
            while not future.done():
                assert time.monotonic() < deadline, "a call hangs"
                self.held.run_next()
                wait([future], 0.001)
            error = future.exception()
            # Who lies about its hash may not be found in its caller's own mapping.
            own = (Own, Lost, KeyError, type(None)) if self.lied else (Own, Lost, type(None))
            for found in error.exceptions if isinstance(error, BaseExceptionGroup) else [error]:
                if not isinstance(found, own):
                    raise found
            if error is None and not self.lied:
                result = future.result()
                values = result.values() if isinstance(result, dict) else [result]
                assert [value for value, _ in values] == [number]
        while self.held.held:
            self.held.run_next()


class Key:
    """A key that follows the script."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number

    def __hash__(self) -> int:
        act = self.world.act()
        if act == "lie":
            self.world.lied = True
            return 99
        return 1

    def __eq__(self, other: object) -> Any:
        act = self.world.act()
        same = isinstance(other, Key) and other.number == self.number
        if act == "lie":
            self.world.lied = True
            return not same
        if act == "odd":
            return "yes" if same else []
        if act == "neither":
            return _NoTruth()
        if act == "pass on":
            self.world.lied = self.world.lied or same
            return NotImplemented
        return same


def _one(_: Any) -> int:
    return 1


_ACTS = [
    *("pass", "pass", "raise", "join", "forget", "end", "block", "lie", "odd", "neither"),
    *("pass on", "lose"),
]
_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["do", "future", "future", "future", "many", "forget", "end"]),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=10,
)


def _check(case: Any) -> None:
    acts, steps, shards, hash_ = case
    world = World(shards, acts, hash_)
    for how, number in steps:
        world.call(how, number)
    world.settle()
    flight = world.flight
    stats = flight.stats()
    assert (flight.in_flight(), stats.waiting) == (0, 0), stats
    for number in range(3):
        outcome = spawn(lambda number=number: flight.do(lambda: number, Key(world, number)))  # type: ignore[misc]
        assert outcome.result(PATIENCE) == (number, False)


TARGETS = [
    Target(
        "hostile",
        "keys whose __eq__ and __hash__ raise, lie, block or re-enter hang nobody",
        st.tuples(
            st.lists(st.sampled_from(_ACTS), max_size=16),
            _STEPS,
            st.sampled_from([1, 4]),
            st.sampled_from([None, None, _one]),
        ),
        _check,
    )
]
