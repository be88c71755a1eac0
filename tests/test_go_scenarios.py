"""The scenarios of Go's `singleflight_test.go` and of ShardedFlight's own, in this language.

Each test names the Go test whose situation it builds. A panic is a `BaseException` here, and
`runtime.Goexit` a `SystemExit` in a thread: the leader alone gets it, where Go lets a panic reach
every caller, and one of those who waited runs its own function.
"""

import itertools
import threading
from concurrent.futures import Future
from typing import Any

import pytest
from support import PATIENCE, eventually, spawn
from test_leading import Work, never, waiting

from shardedflight import InvalidShardsError, ShardedFlight
from shardedflight.keys import concat_key


class Panic(BaseException):
    """What is raised where Go panics."""


def test_do() -> None:
    """Go: TestDo, TestNewDo."""
    flight = ShardedFlight(4)
    assert flight.do(lambda: "bar", "key") == ("bar", False)
    assert flight.in_flight() == 0


def test_do_err() -> None:
    """Go: TestDoErr: the very error, and no value."""
    flight = ShardedFlight()
    some_error = LookupError("some error")

    def fails() -> str:
        raise some_error

    with pytest.raises(LookupError) as caught:
        flight.do(fails, "key")
    assert caught.value is some_error
    assert flight.in_flight() == 0


def test_do_duplicate_suppression() -> None:
    """Go: TestDoDupSuppress, with all ten callers known to have joined: exactly one call."""
    flight = ShardedFlight()
    work = Work(value="bar")
    leader = spawn(flight.do, work, "key")
    assert work.running.wait(PATIENCE)
    followers = [spawn(flight.do, work, "key") for _ in range(9)]
    eventually(waiting(flight, 9))
    work.go.set()
    assert [caller.result(PATIENCE) for caller in [leader, *followers]] == [("bar", True)] * 10
    assert work.runs == 1


def test_do_duplicate_suppression_started_together() -> None:
    """Go: TestDoDupSuppress, TestDo_Concurrent, as the callers come: one execution at a time."""
    flight = ShardedFlight(1)
    for _ in range(20):
        barrier = threading.Barrier(10)
        work = Work(value="bar")

        def call(barrier: threading.Barrier = barrier, work: Work = work) -> Any:
            barrier.wait(PATIENCE)
            return flight.do(work, "key")

        callers = [spawn(call) for _ in range(10)]
        eventually(waiting(flight, 9))
        work.go.set()
        assert [caller.result(PATIENCE) for caller in callers] == [("bar", True)] * 10
        assert work.runs == 1
    assert flight.in_flight() == 0


def test_do_different_keys() -> None:
    """Go: TestDo_DifferentKeys: ten callers for each of four keys, one call of each."""
    flight = ShardedFlight(4)
    works = {key: Work(value=key) for key in ("key1", "key2", "key3", "key4")}
    callers = [(key, spawn(flight.do, works[key], key)) for key in works for _ in range(10)]
    eventually(waiting(flight, 36))
    assert flight.in_flight() == 4
    for work in works.values():
        work.go.set()
    for key, caller in callers:
        assert caller.result(PATIENCE) == (key, True)
    assert [work.runs for work in works.values()] == [1, 1, 1, 1]


def test_do_deduplicates_within_a_shard() -> None:
    """Go: TestDo_ShardDeduplication: three keys in each of four shards, ten callers for each."""
    flight = ShardedFlight(4, hash=lambda key: int(key.split("-")[1]))
    works = {
        key: Work(value=key)
        for key in (f"shard-{shard}-key-{n}" for shard in range(4) for n in range(3))
    }
    callers = [(key, spawn(flight.do, works[key], key)) for key in works for _ in range(10)]
    eventually(waiting(flight, 108))
    assert flight.stats().per_shard == (3, 3, 3, 3)
    for work in works.values():
        work.go.set()
    for key, caller in callers:
        assert caller.result(PATIENCE) == (key, True)
    assert {work.runs for work in works.values()} == {1}


def test_forget() -> None:
    """Go: TestForget: the third call shares the second one's, the first being forgotten."""
    flight = ShardedFlight()
    first, second = Work(), Work(value=2)
    first_call = spawn(flight.do, first, "key")
    assert first.running.wait(PATIENCE)
    flight.forget("key")
    second_call = flight.do_future(second, "key")
    assert second.running.wait(PATIENCE)
    first.go.set()
    assert first_call.result(PATIENCE) == (None, False)
    third_call = flight.do_future(never, "key")
    second.go.set()
    assert second_call.result(PATIENCE) == (2, True)
    assert third_call.result(PATIENCE) == (2, True)


def test_forget_unshared() -> None:
    """Go: TestForgetUnshared: what is forgotten once and led again is shared, whenever the first
    one ends."""
    flight = ShardedFlight()
    first, second = Work(), Work(value=2)
    first_call = spawn(flight.do, first, "key")
    assert first.running.wait(PATIENCE)
    flight.forget("key")
    second_call = spawn(flight.do, second, "key")
    assert second.running.wait(PATIENCE)
    third_call = flight.do_future(never, "key")
    first.go.set()
    assert first_call.result(PATIENCE) == (None, False)
    fourth_call = flight.do_future(never, "key")
    second.go.set()
    for call in (second_call, third_call, fourth_call):
        assert call.result(PATIENCE) == (2, True)
    assert flight.stats().executions == 2


def test_do_and_forget_race() -> None:
    """Go: TestDoAndForgetUnsharedRace: many callers that forget what they shared."""
    flight = ShardedFlight()
    calls = itertools.count(1)
    barrier = threading.Barrier(16)

    def body() -> list[int]:
        barrier.wait(PATIENCE)
        values = []
        for _ in range(100):
            values.append(flight.do(lambda: next(calls), "key")[0])
            flight.forget("key")
        return values

    values = [value for caller in [spawn(body) for _ in range(16)] for value in caller.result(30)]
    stats = flight.stats()
    assert set(values) == set(range(1, stats.executions + 1))
    assert stats.executions + stats.shared == 1600
    assert (stats.in_flight, stats.waiting) == (0, 0)


def test_do_chan() -> None:
    """Go: TestDoChan, TestNewDoChan: value, error, and nothing in flight afterwards."""
    flight = ShardedFlight(4)
    assert flight.do_future(lambda: "bar", "key").result(PATIENCE) == ("bar", False)
    assert flight.in_flight() == 0
    error = LookupError("test error")

    def fails() -> str:
        raise error

    future = flight.do_future(fails, "key")
    assert future.exception(PATIENCE) is error
    assert flight.in_flight() == 0


def test_do_chan_concurrent() -> None:
    """Go: TestDoChan_Concurrent: a hundred calls for one key from ten threads."""
    flight = ShardedFlight(1)
    work = Work(value="result")
    barrier = threading.Barrier(10)

    def body() -> "list[Future[Any]]":
        barrier.wait(PATIENCE)
        return [flight.do_future(work, "key") for _ in range(10)]

    threads = [spawn(body) for _ in range(10)]
    futures = [future for thread in threads for future in thread.result(PATIENCE)]
    assert flight.in_flight() == 1
    work.go.set()
    assert [future.result(PATIENCE) for future in futures] == [("result", True)] * 100
    assert work.runs == 1
    assert flight.in_flight() == 0


def run_with_panic(panic: BaseException) -> None:
    """Five callers of one key, each of whose functions panics: each gets its own panic."""
    flight = ShardedFlight()
    works = [Work(error=panic) for _ in range(5)]
    callers = [spawn(flight.do, work, "key") for work in works]
    eventually(waiting(flight, 4))
    for work in works:
        work.go.set()
    for caller in callers:
        assert caller.exception(PATIENCE) is panic
    assert [work.runs for work in works] == [1] * 5
    stats = flight.stats()
    assert (stats.executions, stats.promotions, stats.errors) == (5, 4, 0)
    assert (stats.in_flight, stats.waiting) == (0, 0)
    assert flight.do(lambda: "next", "key") == ("next", False)


def test_panic_do() -> None:
    """Go: TestPanicDo: no caller hangs, and as each one's function panics, five panics are seen."""
    run_with_panic(Panic("invalid memory address or nil pointer dereference"))


def test_goexit_do() -> None:
    """Go: TestGoexitDo: leaving the thread from inside; no caller hangs or gets an empty value."""
    run_with_panic(SystemExit())


@pytest.mark.parametrize("panic", [Panic(), SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_panic_do_with_others_waiting(panic: BaseException) -> None:
    """Go: TestPanicDo: the panic is the leader's alone; one of those who waited takes over."""
    flight = ShardedFlight()
    panicking = Work(error=panic)
    leader = spawn(flight.do, panicking, "key")
    assert panicking.running.wait(PATIENCE)
    works = [Work(value="own") for _ in range(4)]
    followers = [spawn(flight.do, work, "key") for work in works]
    eventually(waiting(flight, 4))
    panicking.go.set()
    assert leader.exception(PATIENCE) is panic
    eventually(waiting(flight, 3))
    assert sum(work.running.is_set() for work in works) <= 1
    for work in works:
        work.go.set()
    assert [follower.result(PATIENCE) for follower in followers] == [("own", True)] * 4
    assert sum(work.runs for work in works) == 1
    assert flight.in_flight() == 0


def test_panic_do_chan() -> None:
    """Go: TestPanicDoChan: there the process ends; here the future has the panic."""
    flight = ShardedFlight()
    panic = Panic("Panicking in DoChan")

    def panics() -> str:
        raise panic

    future = flight.do_future(panics, "")
    assert future.exception(PATIENCE) is panic
    assert flight.in_flight() == 0
    assert flight.do_future(lambda: "next", "").result(PATIENCE) == ("next", False)


def test_panic_do_shared_by_do_chan() -> None:
    """Go: TestPanicDoSharedByDoChan: there the process ends; here the future's own function runs,
    without a thread waiting for it."""
    flight = ShardedFlight()
    panicking = Work(error=Panic("Panicking in Do"))
    leader = spawn(flight.do, panicking, "")
    assert panicking.running.wait(PATIENCE)
    future = flight.do_future(lambda: "own", "")
    panicking.go.set()
    assert leader.exception(PATIENCE) is panicking.error
    assert future.result(PATIENCE) == ("own", False)
    assert flight.in_flight() == 0


@pytest.mark.parametrize(
    ("shards", "valid"),
    [*[(n, True) for n in (1, 2, 4, 16, 256)], *[(n, False) for n in (0, 3, 5, 6)]],
)
def test_new(shards: int, valid: bool) -> None:
    """Go: TestNew."""
    if valid:
        assert ShardedFlight(shards).shards == shards
    else:
        with pytest.raises(InvalidShardsError):
            ShardedFlight(shards)


def test_new_with_custom_functions() -> None:
    """Go: TestNew_CustomFunctions: one key for everything, in one shard."""
    flight = ShardedFlight(4, build_key=lambda *parts: "custom", hash=lambda key: 42)
    work = Work(value="v")
    leader = flight.do_future(work, "one", "key")
    follower = flight.do_future(never, "another")
    assert sorted(flight.stats().per_shard) == [0, 0, 0, 1]
    work.go.set()
    assert leader.result(PATIENCE) == follower.result(PATIENCE) == ("v", True)


def test_default_builder() -> None:
    """Go: TestDefaultBuilder: `concat_key` is what Go does by default."""
    assert concat_key() == ""
    assert concat_key("test") == "test"
    assert concat_key("hello", "world") == "helloworld"
    assert concat_key("a", "b", "c") == "abc"


def test_in_flight() -> None:
    """Go: TestInFlight."""
    flight = ShardedFlight(4)
    assert flight.in_flight() == 0
    work = Work(value="done")
    call = spawn(flight.do, work, "test-key")
    assert work.running.wait(PATIENCE)
    assert flight.in_flight() == 1
    work.go.set()
    assert call.result(PATIENCE) == ("done", False)
    assert flight.in_flight() == 0


def test_in_flight_of_several_calls() -> None:
    """Go: TestInFlight_MultipleCalls: ten keys, ended one by one."""
    flight = ShardedFlight(4)
    works = [Work(value=n) for n in range(10)]
    calls = [spawn(flight.do, work, f"key-{n}") for n, work in enumerate(works)]
    for work in works:
        assert work.running.wait(PATIENCE)
    assert flight.in_flight() == 10
    for left in range(9, -1, -1):
        works[left].go.set()
        assert calls[left].result(PATIENCE) == (left, False)
        assert flight.in_flight() == left
