"""Properties of keys and hashes, and a flight of do, forget and cancel against a simple model."""

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support import PATIENCE, eventually, spawn
from test_keys import in_shards, meet
from test_leading import HeldExecutor, Work, never

from shardedflight import DeadlockError, FlightTimeout, ShardedFlight
from shardedflight.keys import concat_key, fnv1a_64, join_key

# --- keys and hashes ---

atoms = (
    st.text(max_size=3)
    | st.integers(-3, 3)
    | st.sampled_from([2**61 - 1, -(2**61), 2**64])
    | st.booleans()
    | st.none()
    | st.binary(max_size=2)
    | st.floats(allow_nan=False)
)
part = st.recursive(atoms, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)
parts = st.lists(part, max_size=3).map(tuple)


@given(one=parts, other=parts, shards=st.sampled_from([1, 4]))
@example(one=(("a", "b"),), other=("a", "b"), shards=1)
@example(one=((),), other=(), shards=1)
@example(one=("ab", "c"), other=("a", "bc"), shards=4)
def test_calls_meet_if_and_only_if_their_parts_are_equal(
    one: tuple[Any, ...], other: tuple[Any, ...], shards: int
) -> None:
    """1: "Default key: collision-free": parts meet when they are equal, one by one."""
    assert meet(one, other, shards=shards) is (one == other)
    assert meet(one, tuple(one), shards=shards)


@given(parts=parts)
@example(parts=())
def test_a_tuple_never_meets_its_elements(parts: tuple[Any, ...]) -> None:
    """1: "nor do `do(fn, ("a", "b"))` and `do(fn, "a", "b")`", whatever the tuple, however deep."""
    as_tuple: Any = parts
    for _ in range(3):
        as_tuple = (as_tuple,)
        assert not meet(as_tuple, parts)
        assert not meet((as_tuple,), as_tuple)


@given(value=st.integers(-(2**300), 2**300), shards=st.sampled_from([1, 2, 64]))
def test_any_int_is_a_hash(value: int, shards: int) -> None:
    """1: "`hash(key)` may return any int (negative or wider than 64 bits too)"."""
    assert meet(("k",), ("k",), hash=lambda key: value, shards=shards)
    assert not meet(("k",), ("l",), hash=lambda key: value, shards=shards)


@given(start=st.integers(-(2**70), 2**70), k=st.integers(0, 60))
@settings(max_examples=30)
def test_steps_of_a_power_of_two_spread_from_any_start(start: int, k: int) -> None:
    """1: "keys in steps of 2^k still spread over all shards"."""
    executor = HeldExecutor()
    flight = ShardedFlight(8, executor=executor)
    per_shard = in_shards(flight, executor, (start + (n << k) for n in range(256)))
    assert min(per_shard) > 0


@given(data=st.binary(max_size=40), byte=st.integers(0, 255))
def test_fnv1a_64_folds_one_byte_at_a_time(data: bytes, byte: int) -> None:
    """1: `fnv1a_64` is what its authors define: exclusive or with the byte, then the prime."""
    folded = (fnv1a_64(data) ^ byte) * 0x100000001B3 % 2**64
    assert fnv1a_64(data + bytes([byte])) == folded


@given(text=st.text())
def test_fnv1a_64_takes_text_as_utf8(text: str) -> None:
    """1: "`fnv1a_64` for `str` and `bytes`"."""
    assert fnv1a_64(text) == fnv1a_64(text.encode())


@given(parts=st.lists(st.text()), separator=st.text())
def test_built_keys_are_joined_parts(parts: list[str], separator: str) -> None:
    """1: `concat_key` and `join_key(separator)`."""
    assert concat_key(*parts) == "".join(parts)
    assert join_key(separator)(*parts) == separator.join(parts)


@given(one=st.lists(st.text("ab", max_size=3)), other=st.lists(st.text("ab", max_size=3)))
def test_join_key_keeps_parts_without_the_separator_apart(one: list[str], other: list[str]) -> None:
    """1: `join_key` collides only for parts that contain the separator (or are none)."""
    build_key = join_key("/")
    if one and other:
        assert (build_key(*one) == build_key(*other)) is (one == other)


# --- the table of a shard ---


@given(
    base=st.sampled_from([0, 1 << 32, -(2**61)]),
    step=st.sampled_from([1, 8, 1 << 11, 1 << 32, 0x9E3779B1]),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 299)), max_size=200),
    shards=st.sampled_from([1, 2048]),
)
def test_a_table_is_what_a_dict_would_be(
    base: int, step: int, steps: list[tuple[bool, int]], shards: int
) -> None:
    """Seats are found, and no others, however many there are and wherever their hashes fall.

    Each step links or unlinks the seats of a run of hashes, so that the compiled table grows and
    shrinks, and has gaps closed in the midst of what was probed for past each other. After each, a
    leader comes and goes, which takes a slot from one of them.
    """
    flight = ShardedFlight(shards, hash=lambda key: 0)
    shard = flight._place(("key",))[2]
    model: dict[int, tuple[Any, ...]] = {}
    run = [base + step * i for i in range(300)]
    for links, start in [*steps, (True, 0), (False, 7)]:
        for h in run[start::3]:
            seat = ("key", h, 0)
            if links:
                expected = model.setdefault(h, seat)
                assert shard.link(h, seat) is expected
            else:
                held = model.pop(h, None)
                assert not shard.unlink(h, seat)
                if held is not None:
                    assert shard.unlink(h, held)
        assert dict(shard.seats()) == model
        for h in run:
            assert shard.get(h) is model.get(h)
            assert shard.taken(h) is (h in model)
        for key in run[start::100]:
            if hash(key) not in model:  # wide ones have another hash than themselves
                found, _ = flight.do(lambda: dict(shard.seats()), key)
                assert found.pop(hash(key))[0] == key
                assert found == model
    for h, seat in model.items():
        assert shard.unlink(h, seat)
    assert shard.seats() == []


# --- do, do_future, forget and cancel ---


class Failure(Exception):
    """What a function fails with in the machines below."""


#: Some meet only as equals, some have one hash (-1 and -2, 0 and 2**61 - 1), some look alike.
KEYS: list[tuple[Any, ...]] = [("k",), (-1,), (-2,), (0,), (2**61 - 1,), ("a", "b"), (("a", "b"),)]
keys = st.sampled_from(KEYS)
outcomes = st.sampled_from(["value", "error"])
picks = st.integers(0, 1000)


@dataclasses.dataclass(eq=False)
class Flown:
    """What the model knows of an execution."""

    key: tuple[Any, ...]
    #: Runs or releases the function, which then ends as `ends` says.
    end: Callable[[], object]
    #: Who waits for the outcome: the leader's own caller, as long as it is there, and followers.
    callers: "list[Future[Any]]"
    attended: bool = True
    running: bool = False
    ends: str = "value"

    @property
    def outcome(self) -> tuple[str, int]:
        return ("of", id(self))


class Totals(RuleBasedStateMachine):
    """The counters that all machines compare with `stats()`."""

    flight: ShardedFlight

    def __init__(self) -> None:
        super().__init__()
        self.flown: list[Flown] = []
        self.linked: dict[tuple[Any, ...], Flown] = {}
        self.executions = self.shared = self.errors = self.timeouts = 0
        self.abandoned = self.forgotten = self.deadlocks = 0

    def unlink(self, flown: Flown) -> None:
        if self.linked.get(flown.key) is flown:
            del self.linked[flown.key]

    def count_end(self, flown: Flown) -> None:
        self.flown.remove(flown)
        self.unlink(flown)
        self.shared += len(flown.callers) - flown.attended
        self.errors += flown.ends == "error"

    @rule(key=keys)
    def forget(self, key: tuple[Any, ...]) -> None:
        self.flight.forget(*key)
        self.forgotten += self.linked.pop(key, None) is not None

    @invariant()
    def the_flight_counts_as_the_model(self) -> None:
        stats = self.flight.stats()
        assert stats.executions == self.executions
        assert stats.shared == self.shared
        assert stats.errors == self.errors
        assert stats.promotions == 0
        assert stats.timeouts == self.timeouts
        assert stats.abandoned == self.abandoned
        assert stats.forgotten == self.forgotten
        assert stats.deadlocks == self.deadlocks
        assert stats.in_flight == self.flight.in_flight() == len(self.flown)
        assert stats.in_flight == sum(stats.per_shard)
        assert stats.waiting == sum(len(f.callers) - f.attended for f in self.flown)


class Calls(Totals):
    """Threads and futures, the executor in the machine's hands: one thing happens at a time."""

    @initialize(shards=st.sampled_from([1, 4]), on_abandon=st.sampled_from(["cancel", "finish"]))
    def begin(self, shards: int, on_abandon: Any) -> None:
        self.executor = HeldExecutor()
        self.flight = ShardedFlight(shards, executor=self.executor, on_abandon=on_abandon)
        self.cancels = on_abandon == "cancel"

    def function(self, flown: Flown) -> Any:
        if flown.ends == "error":
            raise Failure(flown.outcome)
        return flown.outcome

    def pick(self, pick: int) -> "tuple[Flown, Future[Any]] | None":
        """One of the futures that wait."""
        waiting = [
            (flown, caller)
            for flown in self.flown
            for caller in flown.callers
            if not getattr(caller, "of_a_thread", False)
        ]
        return waiting[pick % len(waiting)] if waiting else None

    @rule(key=keys)
    def do_future(self, key: tuple[Any, ...]) -> None:
        flown = self.linked.get(key)
        if flown is not None:
            flown.callers.append(self.flight.do_future(never, *key))
            return
        led = Flown(key, lambda: None, [])
        led.callers.append(self.flight.do_future(lambda: self.function(led), *key))
        work = self.executor.held[-1][0]

        def end() -> None:
            held = [future for future, _ in self.executor.held]
            self.executor.run_next(held.index(work))

        led.end = end
        self.add(led)

    def add(self, led: Flown) -> None:
        self.flown.append(led)
        self.linked[led.key] = led
        self.executions += 1

    @precondition(lambda self: len(self.flown) < 12)
    @rule(key=keys)
    def do_in_a_thread(self, key: tuple[Any, ...]) -> None:
        flown = self.linked.get(key)
        if flown is not None:
            before = self.flight.stats().waiting
            caller = spawn(self.flight.do, never, *key)
            flown.callers.append(caller)
            eventually(lambda: self.flight.stats().waiting == before + 1)
        else:
            work = Work()
            led = Flown(key, work.go.set, [], running=True)
            work.end = lambda: self.function(led)
            caller = spawn(self.flight.do, work, *key)
            led.callers.append(caller)
            assert work.running.wait(PATIENCE)
            self.add(led)
        caller.of_a_thread = True  # type: ignore[attr-defined]

    @rule(key=keys, ends=outcomes)
    def do_and_end(self, key: tuple[Any, ...], ends: str) -> None:
        """A `do` that leads is over at once; one that follows has no time."""
        flown = self.linked.get(key)
        if flown is not None:
            with pytest.raises(FlightTimeout):
                self.flight.do(never, *key, timeout=0)
            self.timeouts += 1
            return
        self.executions += 1
        led = Flown(key, lambda: None, [], ends=ends)
        if ends == "error":
            self.errors += 1
            with pytest.raises(Failure):
                self.flight.do(lambda: self.function(led), *key)
        else:
            assert self.flight.do(lambda: self.function(led), *key) == (led.outcome, False)

    @rule(key=keys, ends=outcomes)
    def do_from_inside(self, key: tuple[Any, ...], ends: str) -> None:
        """The function of a `do` forgets, joins, and calls for its own key again."""
        if key in self.linked:
            return
        led = Flown(key, lambda: None, [], running=True, ends=ends)

        def work() -> Any:
            self.add(led)
            led.callers.append(Future())
            self.the_flight_counts_as_the_model()
            with pytest.raises(DeadlockError):
                self.flight.do(never, *key)
            self.deadlocks += 1
            self.do_future(key)
            follower = led.callers[-1]
            self.do_future(key)
            assert follower.cancel()
            led.callers.remove(follower)
            self.forget(key)
            self.do_and_end(key, "value")
            self.do_future(key)
            self.the_flight_counts_as_the_model()
            return self.function(led)

        if ends == "error":
            with pytest.raises(Failure):
                self.flight.do(work, *key)
        else:
            assert self.flight.do(work, *key) == (led.outcome, True)
        self.assert_served(led, led.callers[1:])
        self.count_end(led)

    @rule(pick=picks, ends=outcomes)
    def end(self, pick: int, ends: str) -> None:
        if not self.flown:
            return
        flown = self.flown[pick % len(self.flown)]
        flown.ends = ends
        flown.end()
        self.assert_served(flown, flown.callers)
        self.count_end(flown)

    def assert_served(self, flown: Flown, callers: "list[Future[Any]]") -> None:
        for caller in callers:
            if flown.ends == "error":
                error = caller.exception(PATIENCE)
                assert type(error) is Failure
                assert error.args == (flown.outcome,)
            else:
                assert caller.result(PATIENCE) == (flown.outcome, len(flown.callers) > 1)

    @rule(pick=picks)
    def cancel(self, pick: int) -> None:
        picked = self.pick(pick)
        if picked is None:
            return
        flown, caller = picked
        leads = flown.attended and caller is flown.callers[0]
        assert caller.cancel()
        flown.callers.remove(caller)
        if leads:
            flown.attended = False
        if not flown.callers and not flown.running and self.cancels:
            self.flown.remove(flown)
            self.unlink(flown)
            self.abandoned += 1

    def teardown(self) -> None:
        for flown in list(self.flown):
            flown.end()
            self.assert_served(flown, flown.callers)
            self.count_end(flown)
        if hasattr(self, "flight"):
            self.executor.run_all()
            self.the_flight_counts_as_the_model()


# --- do_async, forget and cancel ---


class Tasks(Totals):
    """Tasks of one event loop, which turns only inside the rules."""

    @initialize(shards=st.sampled_from([1, 4]), on_abandon=st.sampled_from(["cancel", "finish"]))
    def begin(self, shards: int, on_abandon: Any) -> None:
        self.flight = ShardedFlight(shards, on_abandon=on_abandon)
        self.cancels = on_abandon == "cancel"
        self.loop = asyncio.new_event_loop()
        #: Executions that nobody waits for any more, and that take their time to end.
        self.dying: dict[Flown, asyncio.Future[None]] = {}

    def turn(self) -> None:
        async def turns() -> None:
            for _ in range(12):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.create_task(coroutine)

    @rule(key=keys)
    def do_async(self, key: tuple[Any, ...]) -> None:
        flown = self.linked.get(key)
        if flown is not None:

            async def never_async() -> Any:
                return never()

            flown.callers.append(self.call(self.flight.do_async(never_async, *key)))
            self.turn()
            return
        gate = self.loop.create_future()
        led = Flown(key, lambda: gate.set_result(None), [])

        async def function() -> Any:
            try:
                await gate
            except asyncio.CancelledError:
                await self.dying[led]
                if led.ends == "error":
                    raise Failure(led.outcome) from None
                raise
            if led.ends == "error":
                raise Failure(led.outcome)
            return led.outcome

        led.callers.append(self.call(self.flight.do_async(function, *key)))
        self.flown.append(led)
        self.linked[key] = led
        self.executions += 1
        self.turn()

    @rule(key=keys, ends=outcomes)
    def do_async_and_end(self, key: tuple[Any, ...], ends: str) -> None:
        """A coroutine that does not suspend."""
        if key in self.linked:
            return
        led = Flown(key, lambda: None, [], ends=ends)

        async def function() -> Any:
            if ends == "error":
                raise Failure(led.outcome)
            return led.outcome

        self.executions += 1
        self.errors += ends == "error"
        task = self.call(self.flight.do_async(function, *key))
        self.turn()
        if ends == "error":
            assert type(task.exception()) is Failure
        else:
            assert task.result() == (led.outcome, False)

    def living(self) -> list[Flown]:
        return [flown for flown in self.flown if flown not in self.dying]

    @rule(pick=picks, ends=outcomes)
    def end(self, pick: int, ends: str) -> None:
        living = self.living()
        if living:
            self.let_end(living[pick % len(living)], ends)

    def let_end(self, flown: Flown, ends: str) -> None:
        flown.ends = ends
        flown.end()
        self.turn()
        for caller in flown.callers:
            if ends == "error":
                error = caller.exception()
                assert type(error) is Failure
                assert error.args == (flown.outcome,)
            else:
                assert caller.result() == (flown.outcome, len(flown.callers) > 1)
        self.count_end(flown)

    @rule(pick=picks)
    def cancel(self, pick: int) -> None:
        waiting = [(flown, caller) for flown in self.flown for caller in flown.callers]
        if not waiting:
            return
        flown, caller = waiting[pick % len(waiting)]
        leads = flown.attended and caller is flown.callers[0]
        flown.callers.remove(caller)
        flown.attended &= not leads
        if not flown.callers and self.cancels:
            self.dying[flown] = self.loop.create_future()
            self.unlink(flown)
            self.abandoned += 1
        caller.cancel()
        self.turn()
        assert caller.cancelled()

    @rule(pick=picks, ends=outcomes)
    def end_dying(self, pick: int, ends: str) -> None:
        """The late end of an abandoned execution, which is nobody's outcome: not even an error."""
        if not self.dying:
            return
        flown = list(self.dying)[pick % len(self.dying)]
        flown.ends = ends
        self.dying.pop(flown).set_result(None)
        self.turn()
        self.flown.remove(flown)

    def teardown(self) -> None:
        if not hasattr(self, "flight"):
            return
        for flown in self.living():
            self.let_end(flown, "value")
        for _ in list(self.dying):
            self.end_dying(0, "value")
        self.the_flight_counts_as_the_model()
        self.loop.close()


# Each step of `Calls` may wait for a thread to be scheduled; those of `Tasks` wait for nothing.
@pytest.mark.parametrize(("machine", "examples"), [(Calls, 50), (Tasks, 200)])
def test_a_flight_behaves_as_its_model(machine: type[Totals], examples: int) -> None:
    """2, 3, 5, 6, 10: any order of calls, ends, cancellations and `forget`, on keys some of which
    have one hash: every caller gets its execution's outcome, and the totals miss nothing."""
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples, stateful_step_count=30, deadline=None)
    )
