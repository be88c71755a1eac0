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


@flights
@pytest.mark.parametrize("where", ["adopt", "_lead"])
def test_an_interrupt_before_an_heir_begins(
    where: str, make: Callable[[], ShardedFlight], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Section 4: it is lost in turn, to the next who waits; it was told, and leads already."""
    flight = make()
    lose = threading.Event()

    def lost() -> None:
        assert lose.wait(PATIENCE)
        raise SystemExit

    leader = spawn(flight.do, lost, "k")
    eventually(lambda: flight.in_flight() == 1)
    heirs = []
    for count in (1, 2):
        heirs.append(spawn(flight.do, lambda: "own", "k"))
        eventually(lambda count=count: flight.stats().waiting == count)
    owner = _core.Shard if where == "adopt" else ShardedFlight
    called = once(monkeypatch, owner, where, KeyboardInterrupt())
    lose.set()
    assert isinstance(leader.exception(PATIENCE), SystemExit)
    assert isinstance(heirs[0].exception(PATIENCE), KeyboardInterrupt)
    assert heirs[1].result(PATIENCE) == ("own", False)
    assert called() == 2
    assert flight.in_flight() == 0
    assert flight.do(lambda: "next", "k") == ("next", False)


def test_a_futures_function_that_is_interrupted_before_it_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As by an exception that another thread has sent to the pool's: the key is free."""
    flight = ShardedFlight()
    once(monkeypatch, ShardedFlight, "_lead", KeyboardInterrupt())
    assert isinstance(flight.do_future(int, "k").exception(PATIENCE), KeyboardInterrupt)
    assert flight.in_flight() == 0
    assert flight.do(lambda: "next", "k") == ("next", False)


def test_a_follower_that_a_handler_cancels_while_all_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The value goes to all the others, and to the leader."""
    flight = ShardedFlight()
    go, leader = led(flight)
    futures = [flight.do_future(lambda: "own", "k") for _ in range(3)]
    kind = type(futures[0])
    cancelled = kind.cancelled
    cancelling: list[bool] = []

    def cancels_one(self: Any) -> bool:
        if not cancelling:
            cancelling.append(True)
            futures[1].cancel()
        return cancelled(self)

    monkeypatch.setattr(kind, "cancelled", cancels_one)
    go.set()
    assert leader.result(PATIENCE) == ("value", True)
    assert futures[0].result(PATIENCE) == futures[2].result(PATIENCE) == ("value", True)
    monkeypatch.undo()
    assert futures[1].cancelled()
    assert flight.in_flight() == 0


def test_a_handler_joins_what_its_thread_is_about_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has found the execution in flight: so it is woken, though that ends meanwhile."""
    flight = ShardedFlight(1)
    go, leader = led(flight)
    shard = flight._shard_at(0)
    fence = _core.Shard._fence
    calls: list[None] = []
    futures: list[Any] = []

    def handled(self: _core.Shard) -> None:
        calls.append(None)
        if len(calls) == 1:
            futures.append(flight.do_future(lambda: "own", "k"))
            go.set()
            eventually(lambda: not shard.table, "the leader has unlinked its seat")
        fence(self)

    monkeypatch.setattr(_core.Shard, "_fence", handled)
    answer = flight.do(lambda: "main's own", "k")
    assert leader.result(PATIENCE) == answer == ("value", True)
    assert futures[0].result(PATIENCE) == ("value", True)
    assert flight.in_flight() == flight.stats().waiting == 0


def test_a_handler_makes_the_shard_that_its_thread_is_making(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A shard is made once: a second one would not know what runs in the first."""
    flight = ShardedFlight(4)
    gate = threading.Event()
    futures: list[Any] = []
    kind = _core.Shard

    def shard(*args: Any) -> _core.Shard:
        if not futures:
            futures.append(None)
            futures[0] = flight.do_future(lambda: gate.wait(PATIENCE), "k")
        return kind(*args)

    monkeypatch.setattr(_core, "Shard", shard)
    caller = spawn(flight.do, lambda: "own", "k")
    eventually(lambda: flight.stats().waiting == 1 or caller.done())
    assert flight.in_flight() == 1
    gate.set()
    assert caller.result(PATIENCE) == (True, True)
    assert futures[0].result(PATIENCE) == (True, True)
    assert flight.stats().executions == 1
