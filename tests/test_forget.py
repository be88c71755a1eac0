"""Contract, section 6: forget."""

import threading
from typing import Any

import pytest
from support import PATIENCE, eventually, spawn
from test_leading import KINDS, HeldExecutor, Work, each_follower, each_leader, never, waiting

from shardedflight import ShardedFlight
from shardedflight.keys import concat_key


@each_leader
@each_follower
def test_the_running_execution_serves_those_who_joined(leader: str, follower: str) -> None:
    """6: "the running execution continues and serves those who already joined; the next caller
    starts a new one"."""
    flight = ShardedFlight()
    old, new = Work(value="old"), Work(value="new")
    led = KINDS[leader](flight, old, "a", 1)
    assert old.running.wait(PATIENCE)
    joined = KINDS[follower](flight, Work(), "a", 1)
    eventually(waiting(flight, 1))
    flight.forget("a", 1)
    next_led = KINDS[leader](flight, new, "a", 1)
    assert new.running.wait(PATIENCE)
    next_joined = KINDS[follower](flight, Work(), "a", 1)
    eventually(waiting(flight, 2))
    stats = flight.stats()
    assert (stats.in_flight, stats.executions, stats.forgotten) == (2, 2, 1)
    assert flight.in_flight() == sum(stats.per_shard) == 2
    old.go.set()
    assert led.result(PATIENCE) == joined.result(PATIENCE) == ("old", True)
    assert not next_led.done()
    new.go.set()
    assert next_led.result(PATIENCE) == next_joined.result(PATIENCE) == ("new", True)
    assert flight.in_flight() == 0
    assert (old.runs, new.runs) == (1, 1)


@each_leader
@pytest.mark.parametrize("newer_first", [True, False])
def test_a_late_end_leaves_the_newer_execution_alone(leader: str, newer_first: bool) -> None:
    """6 and 5: "A late end of an old execution never removes or settles a newer one", and the
    newer one's end does not end the old."""
    flight = ShardedFlight()
    old, new = Work(value="old"), Work(value="new")
    led_old = KINDS[leader](flight, old, "k")
    assert old.running.wait(PATIENCE)
    flight.forget("k")
    led_new = KINDS[leader](flight, new, "k")
    assert new.running.wait(PATIENCE)
    if newer_first:
        new.go.set()
        assert led_new.result(PATIENCE) == ("new", False)
        assert not led_old.done()
        assert flight.do(lambda: "fresh", "k") == ("fresh", False)
        old.go.set()
    else:
        old.go.set()
        assert led_old.result(PATIENCE) == ("old", False)
        late = flight.do_future(never, "k")
        assert not led_new.done()
        new.go.set()
        assert led_new.result(PATIENCE) == late.result(PATIENCE) == ("new", True)
    assert led_old.result(PATIENCE) == ("old", False)
    assert flight.in_flight() == 0


@each_leader
def test_forgetting_an_idle_key_is_a_no_op(leader: str) -> None:
    """6: "Forgetting an idle key is a no-op": a key never seen, one that has ended, one that is
    forgotten already; and it leaves the other keys alone."""
    flight = ShardedFlight()
    flight.forget("k")
    flight.forget("k", 1)
    flight.forget()
    assert flight.stats().forgotten == 0
    flight.do(lambda: None, "k")
    flight.forget("k")
    assert flight.stats().forgotten == 0
    work = Work(value="v")
    led = KINDS[leader](flight, work, "k")
    assert work.running.wait(PATIENCE)
    flight.forget("other")
    assert flight.stats().forgotten == 0
    joined = flight.do_future(never, "k")
    flight.forget("k")
    flight.forget("k")
    assert flight.stats().forgotten == 1
    work.go.set()
    assert led.result(PATIENCE) == joined.result(PATIENCE) == ("v", True)
    flight.forget("k")
    assert flight.stats().forgotten == 1


def test_many_executions_of_one_key_that_was_forgotten_each_time() -> None:
    """6: each forgotten execution goes on beside the others, with its own callers."""
    executor = HeldExecutor()
    flight = ShardedFlight(8, executor=executor)
    calls = []
    for n in range(10):
        led = flight.do_future(lambda n=n: n, "k")
        calls.append((led, [flight.do_future(never, "k") for _ in range(n)]))
        assert flight.in_flight() == n + 1
        flight.forget("k")
    assert sorted(flight.stats().per_shard) == [0] * 7 + [10]
    for left in range(10, 0, -1):
        assert flight.in_flight() == left
        executor.run_next(left // 2)
    for n, (led, joined) in enumerate(calls):
        assert led.result(PATIENCE) == (n, n > 0)
        assert [future.result(PATIENCE) for future in joined] == [(n, True)] * n
    assert flight.in_flight() == 0
    assert flight.stats().per_shard == (0,) * 8
    assert flight.stats().forgotten == 10


@each_follower
def test_a_forgotten_executions_error_reaches_those_who_joined(follower: str) -> None:
    """6 and 3: "serves those who already joined" with its error as well, and them alone."""
    flight = ShardedFlight()
    old, new = Work(error=LookupError("old")), Work(value="new")
    led = spawn(flight.do, old, "k")
    assert old.running.wait(PATIENCE)
    joined = KINDS[follower](flight, Work(), "k")
    eventually(waiting(flight, 1))
    flight.forget("k")
    next_led = spawn(flight.do, new, "k")
    assert new.running.wait(PATIENCE)
    old.go.set()
    for outcome in (led, joined):
        with pytest.raises(LookupError, match="old"):
            outcome.result(PATIENCE)
    new.go.set()
    assert next_led.result(PATIENCE) == ("new", False)


def test_forgetting_ones_own_key_from_inside() -> None:
    """6: "the next caller starts a new one", also when the next caller is the function itself."""
    flight = ShardedFlight()

    def work() -> Any:
        flight.forget("k")
        return flight.do(lambda: "inner", "k")

    assert flight.do(work, "k") == (("inner", False), False)
    assert flight.in_flight() == 0
    assert flight.stats().forgotten == 1


def test_forget_goes_by_the_flights_own_keys() -> None:
    """6: "`forget(*parts)`": the parts make the key that `build_key` makes of them."""
    executor = HeldExecutor()
    flight = ShardedFlight(16, build_key=concat_key, hash=len, executor=executor)
    flight.do_future(int, "ab", "c")
    flight.forget("ab", "d")
    assert flight.stats().forgotten == 0
    flight.forget("a", "bc")
    assert flight.stats().forgotten == 1
    executor.run_all()
    assert flight.in_flight() == 0


def test_forgetting_while_others_call() -> None:
    """6: forgetting from all sides at once: every call gets a whole outcome, nothing is left over.

    Each thread keeps calling and forgetting; an execution's value is its own number, and no caller
    may get the value of an execution that ended before the call began.
    """
    flight = ShardedFlight(2)
    threads, rounds = 4, 300
    barrier = threading.Barrier(threads)
    lock = threading.Lock()
    started = 0
    ended: set[int] = set()

    def work() -> int:
        nonlocal started
        with lock:
            started += 1
            return started

    def body(forgets: bool) -> None:
        barrier.wait(PATIENCE)
        for _ in range(rounds):
            with lock:
                over = frozenset(ended)
            value, _ = flight.do(work, "k")
            assert value not in over
            with lock:
                ended.add(value)
            if forgets:
                flight.forget("k")

    for outcome in [spawn(body, n % 2 == 0) for n in range(threads)]:
        outcome.result(PATIENCE)
    stats = flight.stats()
    assert stats.executions == started
    assert stats.executions + stats.shared == threads * rounds
    assert (stats.in_flight, stats.waiting, stats.per_shard) == (0, 0, (0, 0))
