"""The clean-up of a call that is itself interrupted, or finds no room on the stack, step by step.

`test_races.py` interrupts calls at any point, by chance; here each point is chosen. Of the plain
core: in the compiled one nothing interrupts these steps.
"""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from support import PATIENCE, eventually, spawn
from test_leading import HeldExecutor

import shardedflight
from shardedflight import ShardedFlight, _core
from shardedflight.observe import Observer

pytestmark = pytest.mark.skipif(shardedflight.__compiled__, reason="of the plain core")


class Own(Exception):
    pass


def fail() -> Any:
    raise Own


def once(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, error: BaseException
) -> Callable[[], int]:
    """Has a method raise when it is first called. Returns how often it was called."""
    method = getattr(where, name)
    calls: list[None] = []

    def stricken(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 1:
            raise error
        return method(*args, **kwargs)

    monkeypatch.setattr(where, name, stricken)
    return lambda: len(calls)


class Quiet(Observer):
    pass


def watched(flight: ShardedFlight) -> ShardedFlight:
    flight.add_observer(Quiet())
    return flight


flights = pytest.mark.parametrize("make", [ShardedFlight, lambda: watched(ShardedFlight())])


@flights
def test_an_interrupt_while_a_failure_is_told(
    make: Callable[[], ShardedFlight], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupt comes out, and the key is free."""
    flight = make()
    called = once(monkeypatch, ShardedFlight, "_fail", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        flight.do(fail, "k")
    assert called() >= 2
    assert flight.in_flight() == 0
    assert flight.do(lambda: "next", "k") == ("next", False)


@flights
def test_no_room_on_the_stack_while_a_failure_is_told(
    make: Callable[[], ShardedFlight], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure comes out, and is told on another thread."""
    flight = make()
    called = once(monkeypatch, ShardedFlight, "_fail", RecursionError())
    with pytest.raises(Own):
        flight.do(fail, "k")
    eventually(lambda: called() >= 2 and flight.in_flight() == 0)
    assert flight.do(lambda: "next", "k") == ("next", False)


def led(flight: ShardedFlight) -> tuple[threading.Event, Any]:
    """A leader that runs until the event is set."""
    running, go = threading.Event(), threading.Event()

    def function() -> str:
        running.set()
        assert go.wait(PATIENCE)
        return "value"

    leader = spawn(flight.do, function, "k")
    assert running.wait(PATIENCE)
    return go, leader


def test_an_interrupt_while_a_follower_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves all the same."""
    flight = ShardedFlight()
    go, leader = led(flight)
    called = once(monkeypatch, ShardedFlight, "_stop_following", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        flight.do(lambda: "own", "k", timeout=0)
    assert called() == 2
    assert flight.stats().waiting == 0
    go.set()
    assert leader.result(PATIENCE)[0] == "value"
    assert flight.in_flight() == 0


def test_an_interrupt_while_an_execution_gets_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is as if the follower had not come."""
    flight = ShardedFlight(1)
    go, leader = led(flight)
    shard = flight._shard_at(0)
    monkeypatch.setattr(_core.Shard, "_fence", interrupted)
    with pytest.raises(KeyboardInterrupt):
        flight.do(lambda: "own", "k")
    monkeypatch.undo()
    assert shard.met == {}
    go.set()
    assert leader.result(PATIENCE) == ("value", False)
    assert flight.in_flight() == 0


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


# -- what had no room is settled by who has -------------------------------------------------------


def test_what_is_late_is_settled_by_who_joins() -> None:
    flight = ShardedFlight()
    go, leader = led(flight)
    settled: list[str] = []
    _core.late.append((settled.append, ("late",)))
    follower = spawn(flight.do, lambda: "own", "k")
    eventually(lambda: settled == ["late"])
    go.set()
    assert leader.result(PATIENCE)[0] == follower.result(PATIENCE)[0] == "value"


def test_what_is_late_waits_for_a_stack_with_room() -> None:
    settled: list[str] = []

    def settle(*room: bool) -> None:
        if len(_core.late) == 0 and not settled and not tried:
            tried.append(None)
            raise RecursionError
        settled.append("late")

    tried: list[None] = []
    _core.late.append((settle, ()))
    _core.settle_late()
    assert (settled, len(_core.late)) == ([], 1)
    _core.settle_late()
    assert (settled, _core.late) == (["late"], [])


def test_what_is_late_is_settled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whichever thread is faster."""

    class Emptied(list[Any]):
        def pop(self, index: Any = -1) -> Any:
            raise IndexError

    monkeypatch.setattr(_core, "late", Emptied([None]))
    _core.settle_late()


def test_an_outcome_that_has_ended_is_not_shared_any_more() -> None:
    flight = ShardedFlight(1)
    shard = flight._shard_at(0)
    shard.share(hash("k"), ("k", 0))
    assert shard.met == {}


def test_a_failure_without_a_traceback_is_told_without_one() -> None:
    """Such as one that comes from outside, and was never raised."""
    flight = ShardedFlight(1, executor=HeldExecutor())
    flight.do_future(lambda: "value", "k")
    follower = spawn(flight.do, lambda: "own", "k")
    eventually(lambda: flight.stats().waiting == 1)
    shard = flight._shard_at(0)
    ((h, seat),) = shard.seats()
    flight._fail(shard, h, seat, shard.leader(seat), Own())
    with pytest.raises(Own):
        follower.result(PATIENCE)
    assert flight.in_flight() == 0


def test_the_marks_of_keys_say_what_they_are() -> None:
    assert repr(_core.SEVERAL) == "<several parts>"
