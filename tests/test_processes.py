"""Section 9 of the contract: fork, the interpreter's exit, and the object among objects.

A forked child runs one function and ends with `os._exit`, so that nothing of pytest runs in it. A
child that hangs is made to tell where, then killed, and fails the test.
"""

import asyncio
import copy
import faulthandler
import gc
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, NoReturn

import pytest
from support import PATIENCE, eventually, eventually_async, spawn, spawn_loop

import shardedflight
from shardedflight import ShardedFlight
from shardedflight._lock import SteadyLock
from shardedflight.backends.host import HostBackend

#: What Python 3.12 and later say about what these tests are for.
forks = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork"),
    pytest.mark.filterwarnings(
        r"ignore:.*use of fork\(\) may lead to deadlocks:DeprecationWarning"
    ),
]


def need_fork(test: Callable[..., None]) -> Callable[..., None]:
    for mark in forks:
        test = mark(test)
    return test


def _run_child(body: Callable[[], None], report: int) -> NoReturn:
    """In the child: runs `body`, writes a traceback to `report` if it fails, and ends."""
    status = 1
    try:
        faulthandler.enable(report, all_threads=False)
        body()
        status = 0
    except BaseException:
        os.write(report, traceback.format_exc().encode())
    finally:
        os._exit(status)


def _wait_for_child(pid: int, report: int) -> None:
    """In the parent: fails unless the child ends well within its time."""
    deadline = time.monotonic() + PATIENCE
    stages = [signal.SIGABRT, signal.SIGKILL]  # the first has faulthandler write the stack
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            os.kill(pid, stages.pop(0))
            deadline += 5
        time.sleep(0.0005)
    with open(report, "rb") as pipe:
        said = pipe.read().decode()
    assert os.waitstatus_to_exitcode(status) == 0, said or "the child said nothing"


def in_child(body: Callable[[], None]) -> None:
    """Forks a child that runs `body`; fails with the child's traceback, or where it hung."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _run_child(body, write)
    os.close(write)
    _wait_for_child(pid, read)


async def answer_async(value: str) -> str:
    await asyncio.sleep(0)
    return value


def assert_works(flight: ShardedFlight, key: Any = "k") -> None:
    """Nothing is in flight, nothing was counted, and every method answers for `key`."""
    stats = flight.stats()
    assert flight.in_flight() == stats.in_flight == stats.waiting == 0
    assert stats.per_shard == (0,) * flight.shards
    assert (stats.executions, stats.shared, stats.errors, stats.promotions) == (0, 0, 0, 0)
    assert flight.do(lambda: "do", key) == ("do", False)
    assert asyncio.run(flight.do_async(lambda: answer_async("do_async"), key)) == (
        "do_async",
        False,
    )
    assert flight.do_future(lambda: "do_future", key).result(PATIENCE) == ("do_future", False)
    assert flight.do_many(lambda keys: dict.fromkeys(keys, "many"), [key]) == {key: ("many", False)}
    flight.forget(key)
    assert flight.stats().executions == 4
    assert flight.in_flight() == 0


# "After `fork` the child starts with nothing in flight and no lock held, however busy the parent
# was."


@need_fork
@pytest.mark.parametrize("shards", [1, 16])
def test_the_child_of_an_idle_parent_works(shards: int) -> None:
    """Section 9, sentence 1, after calls of every kind have used the flight."""
    flight = ShardedFlight(shards)
    flight.do(lambda: 1, "k")
    asyncio.run(flight.do_async(lambda: answer_async("1"), "k"))
    flight.do_future(lambda: 1, "k").result(PATIENCE)
    in_child(lambda: assert_works(flight))
    assert flight.stats().executions == 3


@need_fork
@pytest.mark.parametrize("shards", [1, 16])
@pytest.mark.parametrize("leading", ["thread", "task", "future"])
def test_the_child_has_nothing_in_flight(leading: str, shards: int) -> None:
    """Section 9, sentence 1: "nothing in flight", with leaders and followers of every kind."""
    flight = ShardedFlight(shards)
    gate, started = threading.Event(), threading.Event()

    def function() -> str:
        started.set()
        eventually(gate.is_set)
        return "value"

    async def coroutine() -> str:
        started.set()
        await eventually_async(gate.is_set)
        return "value"

    def call(kind: str) -> "Future[Any]":
        if kind == "thread":
            return spawn(flight.do, function, "k")
        if kind == "task":
            return spawn_loop(lambda: flight.do_async(coroutine, "k"))
        return flight.do_future(function, "k")

    callers = [call(leading)]
    assert started.wait(PATIENCE)
    callers += [call(kind) for kind in ("thread", "task", "future")]
    eventually(lambda: flight.stats().waiting == 3)

    in_child(lambda: assert_works(flight))
    assert (flight.in_flight(), flight.stats().waiting) == (1, 3)
    gate.set()
    assert [caller.result(PATIENCE) for caller in callers] == [("value", True)] * 4
    assert flight.in_flight() == 0


@need_fork
def test_the_page_of_a_child_shows_nothing_of_its_parents_threads() -> None:
    """What the page is told of would never end in the child."""
    page_of = pytest.importorskip("shardedflight.observe.page")
    flight = ShardedFlight(name="prices")
    page = page_of.FlightsPage(flight)
    gate = threading.Event()
    leader = spawn(flight.do, lambda: eventually(gate.is_set), "k")
    eventually(lambda: flight.in_flight() == 1)
    follower = spawn(flight.do, int, "k")
    eventually(lambda: flight.stats().waiting == 1)

    def executions() -> list[Any]:
        (shown,) = page.data()["flights"]
        return list(shown["executions"])

    def child() -> None:
        assert executions() == []
        seen: list[int] = []
        flight.do(lambda: seen.append(len(executions())), "own")
        assert seen == [1]
        assert executions() == []

    in_child(child)
    assert [each["followers"] for each in executions()] == [1]
    gate.set()
    leader.result(PATIENCE)
    follower.result(PATIENCE)
    assert executions() == []


@need_fork
def test_metrics_of_a_child_that_was_forked_amid_a_change_of_flights() -> None:
    """Another thread was adding a flight: its lock would be held in the child for good."""
    prometheus_client = pytest.importorskip("prometheus_client")
    from shardedflight.observe.prometheus import FlightMetrics

    flight = ShardedFlight(name="prices")
    registry = prometheus_client.CollectorRegistry()
    metrics = FlightMetrics(flight, registry=registry)
    held, gate = threading.Event(), threading.Event()

    def change() -> None:
        with metrics._flights.lock:
            held.set()
            gate.wait(PATIENCE)

    changing = spawn(change)
    assert held.wait(PATIENCE)

    def child() -> None:
        flight.do(int, "k")
        calls = {"flight": "prices", "role": "leader"}
        assert registry.get_sample_value("shardedflight_calls_total", calls) == 1
        metrics.remove(flight)

    in_child(child)
    gate.set()
    changing.result(PATIENCE)


@need_fork
def test_the_child_has_no_forgotten_or_colliding_execution() -> None:
    """Section 9, sentence 1: "nothing in flight" that hides from newcomers, either."""
    flight = ShardedFlight(4)
    gate = threading.Event()
    callers = []
    for n in range(3):
        callers.append(spawn(flight.do, lambda: eventually(gate.is_set), "k"))
        eventually(lambda n=n: flight.in_flight() == n + 1)
        flight.forget("k")
    callers.append(spawn(flight.do, lambda: eventually(gate.is_set), "k"))
    eventually(lambda: flight.in_flight() == 4)
    in_child(lambda: assert_works(flight))
    gate.set()
    for caller in callers:
        assert caller.result(PATIENCE) == (None, False)
    assert flight.in_flight() == 0


#: What is done first when this process forks.
before_fork: list[Callable[[], object]] = []

if hasattr(os, "register_at_fork"):
    # The last one that is registered is called first.
    os.register_at_fork(before=lambda: [act() for act in before_fork])


@need_fork
def test_nobody_is_in_the_middle_of_changing_a_shard_when_the_process_forks() -> None:
    """Section 9, sentence 1: "no lock held", a free-threaded object's own among them."""
    flight = ShardedFlight(1)
    flight.do(lambda: None, "k")
    (shard,) = flight._made_shards()
    changing, forking = threading.Event(), threading.Event()
    changed: list[str] = []

    def change() -> None:
        with shard.lock:
            changing.set()
            forking.wait(PATIENCE)
            time.sleep(0.05)  # in which a fork that did not wait would be over
            changed.append("changed")

    changer = spawn(change)
    assert changing.wait(PATIENCE)
    before_fork.append(forking.set)
    try:
        in_child(lambda: assert_works_after(changed, flight))
    finally:
        before_fork.clear()
    changer.result(PATIENCE)
    assert flight.do(lambda: "parent", "k") == ("parent", False)


def assert_works_after(changed: list[str], flight: ShardedFlight) -> None:
    assert changed == ["changed"]
    assert_works(flight)


@pytest.mark.around
@pytest.mark.untraced
@need_fork
def test_a_hundred_forks_of_a_parent_that_never_rests() -> None:
    """Section 9, sentence 1: "no lock held, however busy the parent was"."""
    flight = ShardedFlight(2)
    keys = "abc"
    stop = threading.Event()
    interval = sys.getswitchinterval()

    def by_thread() -> None:
        while not stop.is_set():
            for key in keys:
                flight.do(lambda: time.sleep(0), key)

    def by_future() -> None:
        while not stop.is_set():
            for future in [flight.do_future(lambda: time.sleep(0), key) for key in keys]:
                future.result(PATIENCE)

    def by_many() -> None:
        while not stop.is_set():
            flight.do_many(lambda wanted: dict.fromkeys(wanted), keys)
            flight.forget("a")
            flight.stats()

    async def by_task() -> None:
        while not stop.is_set():
            await asyncio.gather(
                *(flight.do_async(lambda: answer_async("value"), key) for key in keys * 2)
            )

    def child() -> None:
        for key in keys:
            assert flight.do(lambda key=key: f"child's {key}", key) == (f"child's {key}", False)
        assert flight.in_flight() == 0
        assert flight.stats().executions == len(keys)

    def child_in_full() -> None:
        assert_works(flight, "a")

    sys.setswitchinterval(1e-5)
    try:
        callers = [spawn(work) for work in (by_thread, by_thread, by_future, by_many)]
        callers.append(spawn_loop(by_task))
        eventually(lambda: flight.stats().shared > 0)
        for n in range(100):
            in_child(child_in_full if n % 10 == 0 else child)
    finally:
        sys.setswitchinterval(interval)
        stop.set()
    for caller in callers:
        caller.result(PATIENCE)
    eventually(lambda: flight.in_flight() == 0)


@need_fork
@pytest.mark.parametrize("shards", [1, 16])
def test_a_fork_while_another_thread_holds_every_lock(shards: int) -> None:
    """Section 9, sentence 1: "no lock held", whichever it was that the parent held."""
    flight = ShardedFlight(shards)
    for key in range(64):
        flight.do(lambda: 1, key)
    modules = [module for name, module in sys.modules.items() if name.startswith("shardedflight")]
    named = [value for module in modules for value in vars(module).values()]
    locks: list[Any] = [value for value in named if isinstance(value, SteadyLock)]
    assert len(locks) >= 4
    locks += [shard.lock for shard in flight._made_shards()]
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        for lock in locks:
            lock.acquire()
        held.set()
        release.wait(PATIENCE)
        for lock in locks:
            lock.release()

    holder = spawn(hold)
    assert held.wait(PATIENCE)
    try:
        in_child(lambda: assert_works(flight) or assert_works(ShardedFlight(shards)))
    finally:
        release.set()
        holder.result(PATIENCE)


@need_fork
def test_a_fork_inside_the_leaders_own_function() -> None:
    """Section 9, sentence 1: the child comes back through the parent's `do`, normally."""
    flight = ShardedFlight()
    read, write = os.pipe()
    followers: list[Future[Any]] = []

    def function() -> int:
        followers.extend(spawn(flight.do, lambda: -1, "k") for _ in range(2))
        eventually(lambda: flight.stats().waiting == 2)
        return os.fork()

    pid, shared = flight.do(function, "k")
    if pid == 0:
        os.close(read)
        _run_child(lambda: assert_works(flight), write)
    os.close(write)
    _wait_for_child(pid, read)
    assert shared is True
    assert [follower.result(PATIENCE) for follower in followers] == [(pid, True)] * 2
    assert flight.in_flight() == 0


@need_fork
@pytest.mark.parametrize("end", [LookupError, KeyboardInterrupt])
def test_a_fork_inside_a_leaders_function_that_raises(end: type[BaseException]) -> None:
    """Section 9, sentence 1: an error or a loss ends the child's copy of the call, too."""
    flight = ShardedFlight()
    read, write = os.pipe()
    pids: list[int] = []

    def function() -> None:
        pids.append(os.fork())
        raise end

    with pytest.raises(end):
        flight.do(function, "k")
    if pids == [0]:
        os.close(read)
        _run_child(lambda: assert_works(flight), write)
    os.close(write)
    _wait_for_child(pids[0], read)
    assert flight.do(lambda: "again", "k") == ("again", False)


@need_fork
def test_a_child_that_calls_for_the_key_inside_the_forked_function() -> None:
    """Section 9, sentence 1: "nothing in flight", not even the execution that forked."""
    flight = ShardedFlight()
    read, write = os.pipe()

    def function() -> Any:
        pid = os.fork()
        if pid == 0:
            os.close(read)
            _run_child(lambda: assert_works(flight), write)
        return pid

    pid, _ = flight.do(function, "k")
    os.close(write)
    _wait_for_child(pid, read)


@need_fork
def test_a_fork_on_a_thread_that_leads_another_key() -> None:
    """Section 9, sentence 1, when the forking thread is in the middle of a nested call."""
    flight = ShardedFlight(1)
    read, write = os.pipe()
    pid, _ = flight.do(lambda: flight.do(os.fork, "inner")[0], "outer")
    if pid == 0:
        os.close(read)

        def child() -> None:
            assert_works(flight, "inner")
            assert flight.do(lambda: "outer", "outer") == ("outer", False)

        _run_child(child, write)
    os.close(write)
    _wait_for_child(pid, read)
    assert flight.in_flight() == 0


@need_fork
def test_a_child_does_not_drop_its_parents_pools(tmp_path: Path) -> None:
    # It would hang where a thread that is gone has the own lock of the pool's queue.
    backend = HostBackend(tmp_path)
    flight = ShardedFlight(backend=backend)
    assert flight.do_future(lambda: 1, "k").result(PATIENCE) == (1, False)

    async def call() -> Any:
        return await flight.do_async(answer, "k")

    async def answer() -> int:
        return 1

    assert spawn_loop(call).result(PATIENCE) == (1, False)
    pools = [weakref.ref(pool) for pool in (flight._pool, backend._pool) if pool is not None]
    assert len(pools) == 2

    def child() -> None:
        gc.collect()
        assert all(pool() is not None for pool in pools)
        assert flight.do_future(lambda: 2, "k").result(PATIENCE) == (2, False)

    in_child(child)


@need_fork
def test_a_child_of_a_child_works() -> None:
    """Section 9, sentence 1, for the child as a parent."""
    flight = ShardedFlight()
    gate = threading.Event()
    caller = spawn(flight.do, lambda: eventually(gate.is_set), "k")
    eventually(lambda: flight.in_flight() == 1)

    def child() -> None:
        own = spawn(flight.do, lambda: eventually(gate.is_set), "k")
        eventually(lambda: flight.in_flight() == 1)
        in_child(lambda: assert_works(flight))
        gate.set()
        assert own.result(PATIENCE) == (None, False)

    in_child(child)
    gate.set()
    assert caller.result(PATIENCE) == (None, False)


@need_fork
def test_the_parent_goes_on_counting_where_it_was() -> None:
    """Section 9, sentence 1 speaks of the child: the parent loses nothing."""
    flight = ShardedFlight()
    for _ in range(5):
        flight.do(lambda: 1, "k")
    in_child(lambda: assert_works(flight))
    flight.do(lambda: 1, "k")
    assert flight.stats().executions == 6


@need_fork
def test_deadlocks_are_found_in_a_child_and_none_is_inherited() -> None:
    """Section 9 with 7: the parent's waits are not the child's, though its ident may be."""
    flight = ShardedFlight()
    gate = threading.Event()

    def follow() -> Any:
        return flight.do(lambda: flight.do(lambda: -1, "B")[0], "A")

    leader = spawn(flight.do, lambda: eventually(gate.is_set), "B")
    eventually(lambda: flight.in_flight() == 1)
    follower = spawn(follow)
    eventually(lambda: flight.stats().waiting == 1)

    def child() -> None:
        assert flight.do(lambda: flight.do(lambda: "A", "A")[0], "B") == ("A", False)
        with pytest.raises(shardedflight.DeadlockError):
            flight.do(follow, "B")
        own = spawn(follow)
        assert own.result(PATIENCE) == (-1, False)

    in_child(child)
    gate.set()
    assert leader.result(PATIENCE)[0] is follower.result(PATIENCE)[0] is None


@need_fork
def test_flights_that_are_gone_do_not_disturb_a_fork() -> None:
    """Section 9, sentence 1: what a flight keeps for forks does not keep the flight."""
    flights = [ShardedFlight() for _ in range(100)]
    references = [weakref.ref(flight) for flight in flights]
    survivor = flights[50]
    flights.clear()
    gc.collect()
    assert sum(reference() is not None for reference in references) == 1
    in_child(lambda: assert_works(survivor))


# "Interpreter exit never hangs on an idle flight."


def run_python(script: str) -> "subprocess.CompletedProcess[str]":
    """Runs `script` in an interpreter of its own, which finds the package where this one did."""
    package = Path(shardedflight.__file__).parent.parent
    path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )


USES = {
    "nothing": "pass",
    "threads": """
        threads = [threading.Thread(target=flight.do, args=(slow, "k")) for _ in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    """,
    "do_future": """
        futures = [flight.do_future(slow, n % 2) for n in range(8)]
        for future in futures: future.result()
    """,
    "asyncio": """
        async def main():
            await asyncio.gather(*(flight.do_async(slow_async, n % 2) for n in range(8)))
        asyncio.run(main())
    """,
    "a loop and a thread": """
        async def main():
            future = flight.do_future(slow, "k")
            await flight.do_async(slow_async, "k")
            await asyncio.wrap_future(future)
        asyncio.run(main())
    """,
    "an abandoned task": """
        async def main():
            task = asyncio.create_task(flight.do_async(slow_async, "k"))
            await asyncio.sleep(0)
            task.cancel()
        asyncio.run(main())
    """,
    "a loop that was closed under its task": """
        loop = asyncio.new_event_loop()
        async def never(): await asyncio.Event().wait()
        task = loop.create_task(flight.do_async(never, "k"))
        logging.disable()  # asyncio tells of tasks that were pending
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()
        flight.do(lambda: 1, "k")
    """,
    "errors and losses": """
        for error in (LookupError, KeyboardInterrupt, SystemExit):
            def fail(): raise error
            for call in (flight.do, lambda *args: flight.do_future(*args).result()):
                try: call(fail, "k")
                except BaseException: pass
    """,
}


@pytest.mark.parametrize("use", USES)
def test_the_interpreter_ends_with_an_idle_flight(use: str) -> None:
    """Section 9, sentence 2, in a process of its own, with the flight still referenced."""
    script = f"""
import asyncio, logging, sys, threading, time
from shardedflight import ShardedFlight
flight = ShardedFlight()
def slow(): time.sleep(0.01)
async def slow_async(): await asyncio.sleep(0.01)
{textwrap.dedent(USES[use])}
flight.in_flight() == 0 or sys.exit("not idle")
"""
    ended = run_python(script)
    assert (ended.returncode, ended.stderr) == (0, "")


@need_fork
def test_a_child_that_ends_as_an_interpreter_does_ends_at_once() -> None:
    """Section 9, sentence 2, for a forked child: no join of threads that are not there."""
    ended = run_python(
        """
        import os, sys, threading, time, warnings
        from shardedflight import ShardedFlight
        warnings.simplefilter("ignore", DeprecationWarning)
        flight = ShardedFlight()
        gate = threading.Event()
        busy = flight.do_future(gate.wait, "k")
        pid = os.fork()
        if pid == 0:
            assert flight.do_future(lambda: "child", "k").result() == ("child", False)
            sys.exit(0)
        _, status = os.waitpid(pid, 0)
        gate.set()
        busy.result()
        sys.exit(os.waitstatus_to_exitcode(status))
        """
    )
    assert (ended.returncode, ended.stderr) == (0, "")


# "Weak-referenceable, subclassable, not picklable (a clear `TypeError`); `repr` shows name, shards
# and executions in flight."


def test_a_flight_can_be_weakly_referenced_and_goes_when_nobody_wants_it() -> None:
    """Section 9, sentence 3: "Weak-referenceable", without waiting for the collector."""
    flight = ShardedFlight()
    flight.do(lambda: 1, "k")
    asyncio.run(flight.do_async(lambda: answer_async("1"), "k"))
    reference = weakref.ref(flight)
    assert reference() is flight
    del flight
    gc.collect()
    assert reference() is None


def test_a_flight_with_its_own_pool_goes_and_takes_the_pool_with_it() -> None:
    """Section 9, sentence 3: idle pool threads neither keep the flight nor outlive it."""
    threads = set(threading.enumerate())
    flight = ShardedFlight()
    wait([flight.do_future(lambda: time.sleep(0), n) for n in range(20)], PATIENCE)
    reference = weakref.ref(flight)
    del flight

    def gone() -> bool:
        gc.collect()
        return reference() is None

    eventually(gone, "the flight is collected")
    eventually(lambda: set(threading.enumerate()) <= threads, "the pool's threads have ended")


def test_a_future_outlives_its_flight() -> None:
    """Section 9, sentence 3: dropping the flight does not drop what it still owes."""
    gate = threading.Event()
    flight = ShardedFlight()
    leader = flight.do_future(lambda: eventually(gate.is_set) or "value", "k")
    follower = flight.do_future(lambda: "own", "k")
    del flight
    gc.collect()
    gate.set()
    assert leader.result(PATIENCE) == follower.result(PATIENCE) == ("value", True)


class Named(ShardedFlight):
    """A subclass with attributes, arguments and a method of its own."""

    def __init__(self, label: str, **options: Any) -> None:
        super().__init__(**options)
        self.label = label
        self.asked: list[tuple[Any, ...]] = []

    def do(self, fn: Any, /, *parts: Any, timeout: float | None = None) -> Any:
        self.asked.append(parts)
        return super().do(fn, *parts, timeout=timeout)


def test_a_subclass_may_have_attributes_and_override_methods() -> None:
    """Section 9, sentence 3: "subclassable"."""
    flight = Named("a label", shards=2, name="named")
    assert flight.do(lambda: 1, "a", "b") == (1, False)
    assert asyncio.run(flight.do_async(lambda: answer_async("1"), "k")) == ("1", False)
    assert flight.asked[0] == ("a", "b")
    assert (flight.label, flight.shards) == ("a label", 2)
    assert "Named" in repr(flight)
    assert weakref.ref(flight)() is flight


@need_fork
def test_a_subclass_is_reset_by_a_fork_and_keeps_its_own_attributes() -> None:
    """Section 9, sentences 1 and 3 together."""
    flight = Named("a label")
    gate = threading.Event()
    caller = spawn(flight.do, lambda: eventually(gate.is_set), "k")
    eventually(lambda: flight.in_flight() == 1)

    def child() -> None:
        assert_works(flight)
        assert flight.label == "a label"

    in_child(child)
    gate.set()
    caller.result(PATIENCE)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_flight_is_not_picklable(protocol: int) -> None:
    """Section 9, sentence 3: "not picklable (a clear `TypeError`)", in every protocol."""
    for flight in (ShardedFlight(), Named("label")):
        with pytest.raises(TypeError, match=type(flight).__name__):
            pickle.dumps(flight, protocol)
        with pytest.raises(TypeError, match=type(flight).__name__):
            pickle.dumps({"in": [flight]}, protocol)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_a_flight_cannot_be_copied(duplicate: Callable[[Any], Any]) -> None:
    """Section 9, sentence 3: copies are made by pickling's protocol, and refused like it."""
    for flight in (ShardedFlight(), Named("label")):
        with pytest.raises(TypeError, match=type(flight).__name__):
            duplicate(flight)


@pytest.fixture
def in_flight_of_three() -> Iterator[ShardedFlight]:
    flight = ShardedFlight(64, name="catalogue")
    gate = threading.Event()
    callers = [spawn(flight.do, lambda: eventually(gate.is_set), n) for n in range(3)]
    eventually(lambda: flight.in_flight() == 3)
    yield flight
    gate.set()
    for caller in callers:
        caller.result(PATIENCE)


def test_repr_shows_name_shards_and_executions_in_flight(
    in_flight_of_three: ShardedFlight,
) -> None:
    """Section 9, sentence 3: "`repr` shows name, shards and executions in flight"."""
    shown = repr(in_flight_of_three)
    assert "ShardedFlight" in shown
    assert "catalogue" in shown
    assert re.findall(r"\d+", re.sub(r"0x[0-9a-f]+", "", shown)) == ["64", "3"]
    assert str(in_flight_of_three) == shown


def test_repr_of_a_flight_without_a_name() -> None:
    """Section 9, sentence 3: nothing in flight is shown as 0."""
    shown = repr(ShardedFlight(32))
    assert re.findall(r"\d+", re.sub(r"0x[0-9a-f]+", "", shown)) == ["32", "0"]
