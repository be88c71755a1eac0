"""Who watches a flight is told of every execution: its beginning, its followers, its end."""

import asyncio
import gc
import inspect
import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import Any

import pytest
from conftest import FREE_THREADED
from support import PATIENCE, eventually, eventually_async, spawn, spawn_loop

from shardedflight import DeadlockError, FlightErrorGroup, FlightTimeout, ShardedFlight
from shardedflight.observe import Departure, End, Ended, Joined, Left, Observer, Started


class Recorder(Observer):
    """Keeps what it is told, in order, and on which thread."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, int]] = []

    def _keep(self, event: Any) -> None:
        self.told.append((event, threading.get_ident()))

    execution_started = execution_ended = follower_joined = follower_left = _keep

    def of(self, kind: type) -> list[Any]:
        return [event for event, _ in self.told if isinstance(event, kind)]

    def story(self) -> list[str]:
        """What happened, in order, in words."""
        return [in_words(event) for event, _ in self.told]


def in_words(event: Any) -> str:
    if isinstance(event, Started):
        return "promoted" if event.promoted else "started"
    if isinstance(event, Ended):
        return event.end.value
    if isinstance(event, Joined):
        return "joined"
    return event.departure.value


def watched(**options: Any) -> tuple[ShardedFlight, Recorder]:
    flight = ShardedFlight(**options)
    recorder = Recorder()
    flight.add_observer(recorder)
    return flight, recorder


class Gate:
    """A function that says when it runs, and waits until it is let go."""

    def __init__(self, value: Any = "value", error: BaseException | None = None) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()
        self.value = value
        self.error = error

    def __call__(self, *_: Any) -> Any:
        self.entered.set()
        assert self.opened.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        return self.value

    async def coroutine(self, *_: Any) -> Any:
        self.entered.set()
        await eventually_async(self.opened.is_set)
        if self.error is not None:
            raise self.error
        return self.value

    def lead(self, call: Callable[..., Any], *args: Any) -> Any:
        """The future of a call whose function runs by now."""
        outcome = spawn(call, *args)
        assert self.entered.wait(PATIENCE)
        return outcome


def waiting(flight: ShardedFlight, count: int) -> Callable[[], bool]:
    return lambda: flight.stats().waiting == count


# -- one caller -----------------------------------------------------------------------------------


def test_a_lone_caller_is_told_before_and_after_its_function() -> None:
    flight, recorder = watched(name="prices")
    during: list[str] = []

    def fn() -> int:
        during.extend(recorder.story())
        return 7

    assert flight.do(fn, "item", 1) == (7, False)
    assert during == ["started"]
    assert recorder.story() == ["started", "value"]
    (started, first), (ended, second) = recorder.told
    assert first == second == threading.get_ident()
    assert ended.started is started
    assert ended.execution is started.execution
    assert started.execution.flight is flight
    assert started.execution.flight.name == "prices"
    assert started.execution.key == ("item", 1)
    assert started.batch == (started.execution,)
    assert ended.error is None
    assert ended.seconds == ended.time - started.time >= 0


@pytest.mark.parametrize("parts", [(), ("one",), (("a", "tuple"),), ("two", "parts")])
def test_the_key_is_the_users(parts: tuple[Any, ...]) -> None:
    flight, recorder = watched()
    flight.do(int, *parts)
    (started,) = recorder.of(Started)
    assert started.execution.key == (parts[0] if len(parts) == 1 else parts)


def test_a_key_builder_is_asked_once() -> None:
    asked: list[Any] = []

    def build_key(*parts: Any) -> str:
        asked.append(parts)
        return "-".join(parts)

    flight, recorder = watched(build_key=build_key, hash=len, shards=4)
    assert flight.do(lambda: 1, "a", "b") == (1, False)
    assert asked == [("a", "b")]
    assert recorder.of(Started)[0].execution.key == "a-b"


def test_an_error_is_told_and_raised_as_it_was() -> None:
    flight, recorder = watched()
    error = ValueError("no")

    def fn() -> None:
        raise error

    with pytest.raises(ValueError, match="no") as raised:
        flight.do(fn, "key")
    assert raised.value is error
    assert recorder.story() == ["started", "error"]
    assert recorder.of(Ended)[0].error is error
    assert flight.stats().errors == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_leader_that_is_lost_alone(error: type[BaseException]) -> None:
    flight, recorder = watched()

    def fn() -> None:
        raise error

    with pytest.raises(error):
        flight.do(fn, "key")
    assert recorder.story() == ["started", "lost"]
    assert recorder.of(Ended)[0].error is None
    assert flight.in_flight() == 0


def test_two_calls_one_after_another_are_two_executions() -> None:
    flight, recorder = watched()
    flight.do(int, "key")
    flight.do(int, "key")
    first, second = recorder.of(Started)
    assert first.execution is not second.execution
    assert first.execution != second.execution


def test_events_and_executions_can_be_kept_weakly() -> None:
    flight, recorder = watched()
    flight.do(int, "key")
    for event, _ in recorder.told:
        assert weakref.ref(event)() is event
        assert weakref.ref(event.execution)() is event.execution
        assert {event: 1}[event] == 1


def test_a_call_that_is_refused_tells_nothing() -> None:
    flight, recorder = watched()

    with pytest.raises(TypeError, match="hash"):
        flight.do(int, [])
    with pytest.raises(ValueError, match="timeout"):
        flight.do(int, "key", timeout=-1)
    assert recorder.told == []
    assert flight.in_flight() == 0


def test_a_coroutine_from_a_plain_function_is_the_leaders_own_mistake() -> None:
    flight, recorder = watched()

    async def coroutine() -> None: ...

    for fn in (coroutine, lambda: coroutine()):
        with pytest.raises(TypeError, match="do_async"):
            flight.do(fn, "key")
    assert recorder.story() == ["started", "lost"] * 2


# -- threads that follow --------------------------------------------------------------------------


def test_a_follower_is_told_with_the_leaders_execution() -> None:
    flight, recorder = watched()
    gate = Gate()
    leader = gate.lead(flight.do, gate, "key")
    follower = spawn(flight.do, int, "key")
    eventually(lambda: "joined" in recorder.story())
    gate.opened.set()
    assert leader.result(PATIENCE) == follower.result(PATIENCE) == ("value", True)
    assert recorder.story() == ["started", "joined", "value", "served"]
    (started, leading), (joined, following), (ended, where), (left, there) = recorder.told
    assert started.execution is joined.execution is ended.execution is left.execution
    assert left.joined is joined
    assert left.seconds == left.time - joined.time >= 0
    assert leading == where
    assert following == there != leading


def test_followers_of_a_failure() -> None:
    flight, recorder = watched()
    gate = Gate(error=OSError(5, "gone"))
    leader = gate.lead(flight.do, gate, "key")
    followers = [spawn(flight.do, int, "key") for _ in range(3)]
    eventually(waiting(flight, 3))
    gate.opened.set()
    for caller in (leader, *followers):
        with pytest.raises(OSError, match="gone"):
            caller.result(PATIENCE)
    assert Counter(recorder.story()) == {"started": 1, "error": 1, "joined": 3, "failed": 3}


def test_a_follower_that_is_out_of_time() -> None:
    flight, recorder = watched()
    gate = Gate()
    leader = gate.lead(flight.do, gate, "key")
    with pytest.raises(FlightTimeout):
        flight.do(int, "key", timeout=0)
    assert recorder.story() == ["started", "joined", "timed out"]
    gate.opened.set()
    assert leader.result(PATIENCE) == ("value", False)
    assert recorder.story()[3:] == ["value"]


def test_a_follower_takes_over_the_same_execution() -> None:
    flight, recorder = watched()
    gate = Gate(error=KeyboardInterrupt())
    heir = Gate("from the heir")
    leader = gate.lead(flight.do, gate, "key")
    first = spawn(flight.do, heir, "key")
    eventually(waiting(flight, 1))
    second = spawn(flight.do, int, "key")
    eventually(lambda: recorder.story().count("joined") == 2)
    gate.opened.set()
    assert heir.entered.wait(PATIENCE)
    assert recorder.story()[3:] == ["lost", "took over", "promoted"]
    heir.opened.set()
    with pytest.raises(KeyboardInterrupt):
        leader.result(PATIENCE)
    assert first.result(PATIENCE) == second.result(PATIENCE) == ("from the heir", True)
    assert recorder.story()[6:] == ["value", "served"]
    assert len({event.execution for event, _ in recorder.told}) == 1
    lost, ended = recorder.of(Ended)
    one, two = recorder.of(Started)
    assert lost.started is one
    assert ended.started is two
    assert flight.stats().executions == 2


def test_a_call_that_would_wait_for_itself() -> None:
    flight, recorder = watched()

    def fn() -> None:
        flight.do(int, "key")

    with pytest.raises(DeadlockError, match="'key' -> 'key'"):
        flight.do(fn, "key")
    assert recorder.story() == ["started", "joined", "cancelled", "error"]


def test_keys_led_inside_each_other_are_named() -> None:
    flight, _ = watched()

    def outer() -> None:
        flight.do(inner, "inner")

    def inner() -> None:
        flight.do(int, "outer")

    with pytest.raises(DeadlockError) as raised:
        flight.do(outer, "outer")
    assert raised.value.keys == ("outer", "inner", "outer")


def test_keys_of_one_hash() -> None:
    flight, recorder = watched()
    gate = Gate()
    leader = gate.lead(flight.do, gate, -1)  # hash(-1) == hash(-2)
    other = Gate()
    beside = other.lead(flight.do, other, -2)
    follower = spawn(flight.do, int, -2)
    eventually(lambda: "joined" in recorder.story())
    gate.opened.set()
    other.opened.set()
    assert leader.result(PATIENCE) == ("value", False)
    assert beside.result(PATIENCE) == follower.result(PATIENCE) == ("value", True)
    assert [started.execution.key for started in recorder.of(Started)] == [-1, -2]
    assert recorder.of(Joined)[0].execution is recorder.of(Started)[1].execution
    assert flight.in_flight() == 0


def test_a_forgotten_execution_and_the_next_one() -> None:
    flight, recorder = watched()
    gate = Gate("old")
    leader = gate.lead(flight.do, gate, "key")
    follower = spawn(flight.do, int, "key")
    eventually(lambda: "joined" in recorder.story())
    flight.forget("key")
    assert flight.do(lambda: "new", "key") == ("new", False)
    gate.opened.set()
    assert leader.result(PATIENCE) == follower.result(PATIENCE) == ("old", True)
    assert recorder.story() == ["started", "joined", "started", "value", "value", "served"]
    old, new = recorder.of(Started)
    assert old.execution is not new.execution
    assert [ended.started for ended in recorder.of(Ended)] == [new, old]
    assert recorder.of(Left)[0].execution is old.execution


# -- coroutines -----------------------------------------------------------------------------------


def test_a_lone_coroutine() -> None:
    flight, recorder = watched()

    async def fn() -> str:
        assert recorder.story() == ["started"]
        await asyncio.sleep(0)
        return "value"

    assert asyncio.run(flight.do_async(fn, "key")) == ("value", False)
    assert recorder.story() == ["started", "value"]
    assert flight.in_flight() == 0


def test_a_coroutine_that_fails() -> None:
    flight, recorder = watched()

    async def fn() -> None:
        raise LookupError("no")

    with pytest.raises(LookupError, match="no"):
        asyncio.run(flight.do_async(fn, "key"))
    assert recorder.story() == ["started", "error"]


def test_a_plain_function_is_no_coroutine() -> None:
    flight, recorder = watched()

    async def main() -> None:
        with pytest.raises(TypeError, match="can not be awaited"):
            await flight.do_async(int, "key")  # type: ignore[arg-type]

    asyncio.run(main())
    assert recorder.story() == ["started", "lost"]


@pytest.mark.parametrize("error", [None, LookupError("no")])
def test_coroutines_that_follow(error: Exception | None) -> None:
    flight, recorder = watched()
    gate = Gate(error=error)

    async def main() -> list[Any]:
        calls = [asyncio.ensure_future(flight.do_async(gate.coroutine, "key"))]
        await eventually_async(gate.entered.is_set)
        calls += [asyncio.ensure_future(flight.do_async(gate.coroutine, "key")) for _ in range(3)]
        await eventually_async(waiting(flight, 3))
        gate.opened.set()
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(main())
    if error is None:
        assert answers == [("value", True)] * 4
        assert recorder.story() == ["started", *["joined"] * 3, "value", *["served"] * 3]
    else:
        assert [type(answer) for answer in answers] == [LookupError] * 4
        assert recorder.story() == ["started", *["joined"] * 3, "error", *["failed"] * 3]


def test_a_coroutine_that_follows_is_cancelled() -> None:
    flight, recorder = watched()
    gate = Gate()

    async def main() -> Any:
        leader = asyncio.ensure_future(flight.do_async(gate.coroutine, "key"))
        await eventually_async(gate.entered.is_set)
        follower = asyncio.ensure_future(flight.do_async(gate.coroutine, "key"))
        await eventually_async(waiting(flight, 1))
        follower.cancel()
        with pytest.raises(asyncio.CancelledError):
            await follower
        assert recorder.story() == ["started", "joined", "cancelled"]
        gate.opened.set()
        return await leader

    assert asyncio.run(main()) == ("value", False)
    assert recorder.story()[3:] == ["value"]


@pytest.mark.parametrize("on_abandon", ["cancel", "finish"])
def test_an_execution_that_nobody_wants(on_abandon: Any) -> None:
    flight, recorder = watched(on_abandon=on_abandon)
    gate = Gate()

    async def main() -> None:
        leader = asyncio.ensure_future(flight.do_async(gate.coroutine, "key"))
        await eventually_async(gate.entered.is_set)
        leader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leader
        gate.opened.set()
        await eventually_async(lambda: flight.in_flight() == 0)

    asyncio.run(main())
    assert recorder.story() == ["started", "abandoned" if on_abandon == "cancel" else "value"]


def test_a_coroutine_takes_over() -> None:
    flight, recorder = watched()
    gate = Gate()

    async def lost() -> None:
        gate.entered.set()
        await eventually_async(gate.opened.is_set)
        raise asyncio.CancelledError

    async def heir() -> str:
        assert recorder.story()[-2:] == ["took over", "promoted"]
        return "from the heir"

    async def main() -> Any:
        leader = asyncio.ensure_future(flight.do_async(lost, "key"))
        await eventually_async(gate.entered.is_set)
        follower = asyncio.ensure_future(flight.do_async(heir, "key"))
        await eventually_async(waiting(flight, 1))
        gate.opened.set()
        with pytest.raises(asyncio.CancelledError):
            await leader
        return await follower

    assert asyncio.run(main()) == ("from the heir", False)
    assert recorder.story() == ["started", "joined", "lost", "took over", "promoted", "value"]


def test_a_loop_that_is_closed_under_its_execution() -> None:
    flight, recorder = watched()
    loop = asyncio.new_event_loop()
    gate = Gate()
    task = loop.create_task(flight.do_async(gate.coroutine, "key"))
    while not gate.entered.is_set():
        loop.run_until_complete(asyncio.sleep(0))
    heir = spawn(flight.do, lambda: "from the heir", "key")
    eventually(waiting(flight, 1))
    for pending in asyncio.all_tasks(loop):
        pending._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    assert heir.result(PATIENCE) == ("from the heir", False)
    del task, pending  # pyright: ignore[reportPossiblyUnboundVariable]
    gc.collect()  # drops the coroutines, the flight's among them
    assert recorder.story() == ["started", "joined", "lost", "took over", "promoted", "value"]


def test_a_coroutine_that_follows_a_thread_and_is_dropped() -> None:
    flight, recorder = watched()
    gate = Gate()
    leader = gate.lead(flight.do, gate, "key")

    async def main() -> None:
        call = flight.do_async(gate.coroutine, "key")
        call.send(None)
        call.close()
        await eventually_async(lambda: "cancelled" in recorder.story())

    asyncio.run(main())
    gate.opened.set()
    assert leader.result(PATIENCE) == ("value", False)
    assert recorder.story() == ["started", "joined", "cancelled", "value"]


def test_threads_and_loops_follow_one_execution() -> None:
    flight, recorder = watched()
    gate = Gate()
    leader = spawn_loop(lambda: flight.do_async(gate.coroutine, "key"))
    assert gate.entered.wait(PATIENCE)
    others = [
        spawn(flight.do, int, "key"),
        spawn_loop(lambda: flight.do_async(gate.coroutine, "key")),
        flight.do_future(int, "key"),
    ]
    eventually(waiting(flight, 3))
    eventually(lambda: recorder.story().count("joined") == 3)
    gate.opened.set()
    for caller in (leader, *others):
        assert caller.result(PATIENCE) == ("value", True)
    assert Counter(recorder.story()) == {"started": 1, "value": 1, "joined": 3, "served": 3}


where = ContextVar("where", default="nowhere")


class InContext(Observer):
    """Sets a variable around each function."""

    def __init__(self) -> None:
        self.tokens: dict[Started, Any] = {}
        self.seen: list[str] = []

    def execution_started(self, event: Started, /) -> None:
        self.tokens[event] = where.set(event.execution.key)

    def execution_ended(self, event: Ended, /) -> None:
        self.seen.append(where.get())
        where.reset(self.tokens.pop(event.started))


@pytest.mark.parametrize("suspends", [False, True])
def test_the_start_is_told_in_the_functions_own_context(suspends: bool) -> None:
    flight = ShardedFlight()
    observer = InContext()
    flight.add_observer(observer)

    async def fn() -> str:
        await asyncio.sleep(0 if suspends else -1)
        return where.get()

    async def main() -> list[Any]:
        calls = [flight.do_async(fn, f"key {number}") for number in range(3)]
        answers = await asyncio.gather(*calls)
        assert where.get() == "nowhere"
        return answers

    assert asyncio.run(main()) == [(f"key {number}", False) for number in range(3)]
    assert flight.do(where.get, "thread") == ("thread", False)
    assert flight.do_future(where.get, "pool").result(PATIENCE) == ("pool", False)
    assert flight.do_many(lambda keys: {key: where.get() for key in keys}, ["many"]) == {
        "many": ("many", False)
    }
    assert where.get() == "nowhere"
    assert observer.seen == ["key 0", "key 1", "key 2", "thread", "pool", "many"]
    assert observer.tokens == {}
    assert flight.observer_errors == 0


# -- futures --------------------------------------------------------------------------------------


def test_a_lone_future() -> None:
    flight, recorder = watched()
    ident, shared = flight.do_future(threading.get_ident, "key").result(PATIENCE)
    assert not shared
    assert recorder.story() == ["started", "value"]
    assert {thread for _, thread in recorder.told} == {ident}


def test_futures_that_follow() -> None:
    flight, recorder = watched()
    gate = Gate()
    leader = flight.do_future(gate, "key")
    assert gate.entered.wait(PATIENCE)
    followers = [flight.do_future(int, "key") for _ in range(3)]
    assert recorder.story() == ["started", "joined", "joined", "joined"]
    assert followers[0].cancel()
    assert recorder.story()[4:] == ["cancelled"]
    gate.opened.set()
    for future in (leader, *followers[1:]):
        assert future.result(PATIENCE) == ("value", True)
    assert recorder.story()[5:] == ["value", "served", "served"]


def test_futures_of_a_failure() -> None:
    flight, recorder = watched()
    gate = Gate(error=LookupError("no"))
    leader = flight.do_future(gate, "key")
    follower = flight.do_future(int, "key")
    gate.opened.set()
    for future in (leader, follower):
        with pytest.raises(LookupError, match="no"):
            future.result(PATIENCE)
    assert Counter(recorder.story()) == {"started": 1, "error": 1, "joined": 1, "failed": 1}


def test_a_future_that_never_began_tells_nothing() -> None:
    with ThreadPoolExecutor(1) as pool:
        flight, recorder = watched(executor=pool)
        gate = Gate()
        busy = pool.submit(gate)
        assert gate.entered.wait(PATIENCE)
        future = flight.do_future(int, "key")
        assert future.cancel()
        gate.opened.set()
        assert busy.result(PATIENCE) == "value"
    assert recorder.told == []
    assert flight.stats().abandoned == 1


def test_a_future_takes_over() -> None:
    flight, recorder = watched()
    gate = Gate(error=KeyboardInterrupt())
    leader = gate.lead(flight.do, gate, "key")
    follower = flight.do_future(lambda: "from the heir", "key")
    gate.opened.set()
    with pytest.raises(KeyboardInterrupt):
        leader.result(PATIENCE)
    assert follower.result(PATIENCE) == ("from the heir", False)
    assert recorder.story() == ["started", "joined", "lost", "took over", "promoted", "value"]


@pytest.mark.parametrize("end", ["value", "error", "lost", "cancelled"])
def test_a_future_that_is_woken_before_its_coming_is_told(end: str) -> None:
    errors: dict[str, BaseException] = {"error": LookupError("no"), "lost": KeyboardInterrupt()}
    gate = Gate(error=errors.get(end))

    class Slow(Recorder):
        """Is still told of the coming when the outcome arrives."""

        def follower_joined(self, event: Joined, /) -> None:
            self._keep(event)
            if end == "cancelled":
                (record,) = flight._made_shards()[0].met.values()
                (waiter,) = record.waiters
                assert waiter.cancel()
                return
            gate.opened.set()
            leader.exception(PATIENCE)
            eventually(lambda: flight.in_flight() == 0)

    flight = ShardedFlight(shards=1)
    recorder = Slow()
    flight.add_observer(recorder)
    leader = gate.lead(flight.do, gate, "key")
    flight.do_future(int, "key")
    gate.opened.set()
    expected = {"value": "served", "error": "failed", "lost": "took over", "cancelled": "cancelled"}
    assert recorder.story().count("joined") == 1
    assert [in_words(left) for left in recorder.of(Left)] == [expected[end]]
    assert ("promoted" in recorder.story()) is (end == "lost")
    assert flight.observer_errors == 0
    eventually(lambda: flight.in_flight() == 0)


# -- many keys ------------------------------------------------------------------------------------


def many_async(
    flight: ShardedFlight,
) -> Callable[[Callable[[list[Any]], dict[Any, Any]], list[Any]], Any]:
    """`do_many_async` of an event loop of its own, as if it were `do_many`."""

    def do_many(fn: Callable[[list[Any]], dict[Any, Any]], keys: list[Any]) -> Any:
        async def found(keys: list[Any]) -> dict[Any, Any]:
            await asyncio.sleep(0)
            answer = await asyncio.to_thread(fn, keys) if isinstance(fn, Gate) else fn(keys)
            assert not inspect.isawaitable(answer)
            return answer

        return asyncio.run(flight.do_many_async(found, keys))

    return do_many


ALL_MANY = pytest.mark.parametrize(
    "many", [lambda flight: flight.do_many, many_async], ids=["threads", "coroutines"]
)


@ALL_MANY
def test_many_keys_are_one_batch(many: Any) -> None:
    flight, recorder = watched()
    found = many(flight)(lambda keys: {1: "one", 2: "two"}, [1, 2, 3])
    assert found == {1: ("one", False), 2: ("two", False)}
    assert recorder.story() == ["started"] * 3 + ["value", "value", "missing"]
    started = recorder.of(Started)
    assert [event.execution.key for event in started] == [1, 2, 3]
    for event in started:
        assert event.batch == tuple(e.execution for e in started)
    assert [ended.started for ended in recorder.of(Ended)] == started


@ALL_MANY
def test_many_keys_that_fail(many: Any) -> None:
    flight, recorder = watched()

    def fn(keys: list[int]) -> dict[int, int]:
        raise LookupError("no")

    with pytest.raises(LookupError, match="no"):
        many(flight)(fn, [1, 2])
    assert recorder.story() == ["started", "started", "error", "error"]


@ALL_MANY
def test_many_keys_of_which_one_is_joined(many: Any) -> None:
    flight, recorder = watched()
    gate = Gate("joined")
    leader = gate.lead(flight.do, gate, 1)
    call = spawn(many(flight), lambda keys: dict.fromkeys(keys, "led"), [1, 2])
    eventually(lambda: len(recorder.told) == 4)
    assert recorder.story() == ["started", "joined", "started", "value"]
    gate.opened.set()
    assert leader.result(PATIENCE) == ("joined", True)
    assert call.result(PATIENCE) == {1: ("joined", True), 2: ("led", False)}
    assert recorder.story()[4:] == ["value", "served"]
    assert recorder.of(Left)[0].execution is recorder.of(Started)[0].execution


@ALL_MANY
def test_many_keys_of_which_one_fails_elsewhere(many: Any) -> None:
    flight, recorder = watched()
    gate = Gate(error=LookupError("no"))
    gate.lead(flight.do, gate, 1)
    call = spawn(many(flight), lambda keys: dict.fromkeys(keys, "led"), [1, 2])
    eventually(lambda: len(recorder.told) == 4)
    gate.opened.set()
    with pytest.raises(FlightErrorGroup):
        call.result(PATIENCE)
    assert recorder.story()[4:] == ["error", "failed"]


@ALL_MANY
def test_many_keys_take_over(many: Any) -> None:
    flight, recorder = watched()
    gate = Gate(error=KeyboardInterrupt())
    leader = gate.lead(flight.do, gate, 1)
    call = spawn(many(flight), lambda keys: dict.fromkeys(keys, "led"), [1])
    eventually(lambda: "joined" in recorder.story())
    gate.opened.set()
    with pytest.raises(KeyboardInterrupt):
        leader.result(PATIENCE)
    assert call.result(PATIENCE) == {1: ("led", False)}
    assert recorder.story() == ["started", "joined", "lost", "took over", "promoted", "value"]


@ALL_MANY
def test_others_follow_one_of_many_keys(many: Any) -> None:
    flight, recorder = watched()
    gate = Gate({1: "one"})
    call = gate.lead(many(flight), gate, [1, 2])
    followers = [spawn(flight.do, int, key) for key in (1, 2)]
    eventually(lambda: recorder.story().count("joined") == 2)
    gate.opened.set()
    assert call.result(PATIENCE) == {1: ("one", True)}
    assert followers[0].result(PATIENCE) == ("one", True)
    with pytest.raises(KeyError):
        followers[1].result(PATIENCE)
    assert Counter(recorder.story()[4:]) == {"value": 1, "missing": 1, "served": 1, "failed": 1}


def test_many_keys_whose_call_is_cancelled() -> None:
    flight, recorder = watched()
    gate = Gate("joined")
    leader = gate.lead(flight.do, gate, 1)
    own = Gate()

    async def main() -> None:
        call = asyncio.ensure_future(flight.do_many_async(own.coroutine, [1, 2]))
        await eventually_async(own.entered.is_set)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await eventually_async(lambda: "abandoned" in recorder.story())

    asyncio.run(main())
    assert Counter(recorder.story()) == {"started": 2, "joined": 1, "cancelled": 1, "abandoned": 1}
    gate.opened.set()
    assert leader.result(PATIENCE) == ("joined", False)


# -- observers that come, go and fail -------------------------------------------------------------


def test_an_observer_needs_only_what_it_wants() -> None:
    class Counting(Observer):
        count = 0

        def execution_ended(self, event: Ended, /) -> None:
            self.count += 1

    flight = ShardedFlight()
    observer = Counting()
    flight.add_observer(observer)
    flight.do(int, "key")
    assert observer.count == 1
    assert flight.observer_errors == 0


@pytest.mark.parametrize("observer", [None, object(), print, Recorder], ids=repr)
def test_what_is_no_observer(observer: Any) -> None:
    with pytest.raises(TypeError, match="methods of Observer"):
        ShardedFlight().add_observer(observer)


def test_an_observer_is_added_once_and_removed_once() -> None:
    flight, recorder = watched()
    with pytest.raises(ValueError, match="already"):
        flight.add_observer(recorder)
    flight.remove_observer(recorder)
    with pytest.raises(ValueError, match="no observer"):
        flight.remove_observer(recorder)
    flight.do(int, "key")
    assert recorder.told == []
    flight.add_observer(recorder)
    flight.do(int, "key")
    assert recorder.story() == ["started", "value"]


def test_all_observers_are_told() -> None:
    flight, first = watched()
    second = Recorder()
    flight.add_observer(second)
    flight.do(int, "key")
    flight.remove_observer(first)
    flight.do(int, "key")
    assert first.story() == ["started", "value"]
    assert second.story() == ["started", "value"] * 2
    assert first.told[0][0] is second.told[0][0]


@pytest.mark.parametrize("lost", [False, True])
def test_an_observer_that_comes_during_an_execution(lost: bool) -> None:
    flight = ShardedFlight()
    gate = Gate(error=KeyboardInterrupt() if lost else None)
    leader = gate.lead(flight.do, gate, "key")
    recorder = Recorder()
    flight.add_observer(recorder)
    followers = [
        spawn(flight.do, lambda: "heir", "key"),
        spawn_loop(lambda: flight.do_async(partial(asyncio.sleep, 0, "heir"), "key")),
        flight.do_future(lambda: "heir", "key"),
        spawn(flight.do_many, lambda keys: dict.fromkeys(keys, "heir"), ["key"]),
    ]
    eventually(waiting(flight, len(followers)))
    assert flight.do(int, "other") == (0, False)
    gate.opened.set()
    for follower in followers:
        assert follower.exception(PATIENCE) is None
    if not lost:
        assert leader.result(PATIENCE) == ("value", True)
    assert {event.execution.key for event, _ in recorder.told} == {"other"}


def test_an_observer_that_goes_during_an_execution() -> None:
    flight, recorder = watched()
    gate = Gate()
    leader = gate.lead(flight.do, gate, "key")
    flight.remove_observer(recorder)
    follower = spawn(flight.do, int, "key")
    eventually(waiting(flight, 1))
    assert flight.do(int, "other") == (0, False)
    gate.opened.set()
    assert leader.result(PATIENCE) == follower.result(PATIENCE) == ("value", True)
    assert recorder.story() == ["started", "joined", "value", "served"]


class Raising(Observer):
    """Raises at everything that it is told."""

    def __init__(self, error: type[BaseException] = ZeroDivisionError) -> None:
        self.error = error

    def _fail(self, event: Any) -> None:
        raise self.error

    execution_started = execution_ended = follower_joined = follower_left = _fail


def test_an_observer_that_raises_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    flight = ShardedFlight()
    flight.add_observer(Raising())
    recorder = Recorder()
    flight.add_observer(recorder)
    gate = Gate()
    with caplog.at_level(logging.ERROR, logger="shardedflight"):
        leader = gate.lead(flight.do, gate, "key")
        followers = [spawn(flight.do, int, "key"), flight.do_future(int, "key")]
        eventually(lambda: recorder.story().count("joined") == 2)
        gate.opened.set()
        for caller in (leader, *followers):
            assert caller.result(PATIENCE) == ("value", True)
        assert asyncio.run(flight.do_async(gate.coroutine, "other")) == ("value", False)
    assert len(recorder.told) == 8
    assert flight.observer_errors == 8
    assert len(caplog.records) == 1
    assert caplog.records[0].exc_info is not None
    assert caplog.records[0].exc_info[0] is ZeroDivisionError
    assert "Raising" in caplog.text


class _BadHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError("the log is broken")


def test_a_log_that_raises_harms_nobody() -> None:
    flight = ShardedFlight()
    flight.add_observer(Raising())
    logger = logging.getLogger("shardedflight")
    handler = _BadHandler()
    logger.addHandler(handler)
    try:
        assert flight.do(lambda: "value", "key") == ("value", False)
    finally:
        logger.removeHandler(handler)
    assert flight.observer_errors == 2


@pytest.mark.parametrize("method", ["execution_started", "execution_ended"])
@pytest.mark.parametrize("function_fails", [False, True])
def test_an_interrupt_while_the_leaders_observer_is_told(method: str, function_fails: bool) -> None:
    flight = ShardedFlight()
    observer = Recorder()
    setattr(observer, method, Raising(KeyboardInterrupt)._fail)
    flight.add_observer(observer)

    def fn() -> None:
        if function_fails:
            raise LookupError

    for call in (
        lambda: flight.do(fn, "key"),
        lambda: flight.do_many(lambda keys: dict.fromkeys(keys, fn()), ["key", "other"]),
    ):
        with pytest.raises(KeyboardInterrupt):
            call()
        assert flight.in_flight() == 0
    assert flight.observer_errors == 0


@pytest.mark.parametrize("method", ["follower_joined", "follower_left"])
def test_an_interrupt_while_the_followers_observer_is_told(method: str) -> None:
    flight = ShardedFlight()
    observer = Recorder()
    setattr(observer, method, Raising(KeyboardInterrupt)._fail)
    flight.add_observer(observer)
    gate = Gate()
    leader = gate.lead(flight.do, gate, "key")
    follower = spawn(flight.do, int, "key")
    if method == "follower_left":
        eventually(waiting(flight, 1))
        gate.opened.set()
    with pytest.raises(KeyboardInterrupt):
        follower.result(PATIENCE)
    gate.opened.set()
    assert leader.result(PATIENCE)[0] == "value"
    assert flight.stats().waiting == flight.in_flight() == 0


def test_observers_run_outside_of_every_lock() -> None:
    looked: list[str] = []

    class Looking(Recorder):
        def _keep(self, event: Any) -> None:
            # On a thread of its own: what this thread holds would not stop this thread.
            def look() -> str:
                flight.stats()
                flight.forget("nothing")
                flight.do(int, "another", in_words(event))
                return in_words(event)

            if event.execution.key == "key":
                looked.append(spawn(look).result(PATIENCE))

        execution_started = execution_ended = follower_joined = follower_left = _keep

    flight = ShardedFlight(shards=1)
    flight.add_observer(Looking())
    gate = Gate(error=KeyboardInterrupt())
    leader = gate.lead(flight.do, gate, "key")
    followers = [spawn(flight.do, lambda: "heir", "key"), flight.do_future(lambda: "heir", "key")]
    eventually(lambda: looked.count("joined") == 2)
    gate.opened.set()
    with pytest.raises(KeyboardInterrupt):
        leader.result(PATIENCE)
    for follower in followers:
        assert follower.result(PATIENCE)[0] == "heir"
    assert flight.observer_errors == 0
    assert {"started", "joined", "lost", "took over", "promoted", "value"} <= set(looked)


def test_an_observer_may_call_the_flight_for_another_key() -> None:
    class Calling(Recorder):
        def execution_started(self, event: Started, /) -> None:
            self._keep(event)
            if event.execution.key == "key":
                assert flight.do(lambda: "inner", "inner") == ("inner", False)

    flight = ShardedFlight()
    recorder = Calling()
    flight.add_observer(recorder)
    assert flight.do(lambda: "value", "key") == ("value", False)
    assert recorder.story() == ["started", "started", "value", "value"]
    assert flight.observer_errors == 0


@pytest.mark.skipif(FREE_THREADED, reason="the collector frees a flight there")
def test_a_watched_flight_is_freed_without_the_collector() -> None:
    flight, recorder = watched()

    def fn() -> None:
        raise LookupError

    gc.collect()
    gc.disable()
    try:
        flight.do(int, "key")
        with pytest.raises(LookupError):
            flight.do(fn, "key")
        flight.do_future(int, "key").result(PATIENCE)
        asyncio.run(flight.do_async(lambda: asyncio.sleep(0), "key"))
        gone = weakref.ref(flight)
        recorder.told.clear()
        del flight
        eventually(lambda: gone() is None)
    finally:
        gc.enable()


def test_what_is_told_is_what_is_counted() -> None:
    """A stampede while a second observer comes and goes: nothing is told in halves."""
    flight, recorder = watched(shards=4)
    other = Recorder()
    threads, rounds, keys = 6, 60, 3
    barrier = threading.Barrier(threads + 1)
    never = threading.Event()

    def call(number: int) -> None:
        barrier.wait(PATIENCE)
        for turn in range(rounds):
            key = (number + turn) % keys

            def fn(turn: int = turn) -> int:
                never.wait(0.001)  # others may join meanwhile
                if turn % 5 == 0:
                    raise LookupError
                if turn % 7 == 0:
                    raise KeyboardInterrupt
                return turn

            try:
                if number % 3 == 0:
                    flight.do(fn, key)
                elif number % 3 == 1:
                    flight.do_future(fn, key).result(PATIENCE)
                else:
                    flight.do_many(lambda ks, fn=fn: dict.fromkeys(ks, fn()), range(keys))
            except (LookupError, KeyboardInterrupt, FlightErrorGroup, DeadlockError):
                pass

    callers = [spawn(call, number) for number in range(threads)]
    barrier.wait(PATIENCE)
    while not all(caller.done() for caller in callers):
        flight.add_observer(other)
        flight.remove_observer(other)
    for caller in callers:
        caller.result(PATIENCE)
    eventually(lambda: flight.in_flight() == 0)
    stats = flight.stats()
    for each in (recorder, other):
        started = Counter(each.of(Started))
        assert Counter(ended.started for ended in each.of(Ended)) == started
        assert set(started.values()) <= {1}
        joined = Counter(each.of(Joined))
        assert Counter(left.joined for left in each.of(Left)) == joined
        assert set(joined.values()) <= {1}
    assert len(recorder.of(Started)) == stats.executions
    assert sum(started.promoted for started in recorder.of(Started)) == stats.promotions
    departures = Counter(left.departure for left in recorder.of(Left))
    # Counted are also those that were served in the moment in which they were cancelled.
    told = departures[Departure.SERVED] + departures[Departure.FAILED]
    assert told <= stats.shared <= told + departures[Departure.CANCELLED]
    assert departures[Departure.TOOK_OVER] == stats.promotions
    ends = Counter(ended.end for ended in recorder.of(Ended))
    assert ends[End.ERROR] == stats.errors
    assert flight.observer_errors == 0
