"""Section 4 of the contract: a leader that is lost.

Every combination of leader and follower is one of the three kinds of caller: a thread in `do`,
a task in `do_async` on an event loop and thread of its own, a future from `do_future`.
"""

import asyncio
import contextvars
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures.thread import BrokenThreadPool
from typing import Any

import pytest
from support import PATIENCE, eventually, eventually_async, spawn, spawn_loop

from shardedflight import DeadlockError, FlightTimeout, ShardedFlight, _flight, _waiting

KINDS = ("thread", "task", "future")


class Lost(BaseException):
    """No `Exception`, and nothing that the interpreter or asyncio treats specially."""


LOSSES: tuple[Callable[[], BaseException], ...] = (
    KeyboardInterrupt,
    SystemExit,
    GeneratorExit,
    asyncio.CancelledError,
    Lost,
    lambda: BaseExceptionGroup("several", [ValueError(), KeyboardInterrupt()]),
)
loss_of_any_sort = pytest.mark.parametrize(
    "loss", LOSSES, ids=[*(loss.__name__ for loss in LOSSES[:-1]), "BaseExceptionGroup"]
)
leader_of_any_kind = pytest.mark.parametrize("leading", KINDS)
follower_of_any_kind = pytest.mark.parametrize("following", KINDS)


class Work:
    """What one caller runs, plain or as a coroutine: waits for the gate, then ends as told."""

    def __init__(self, end: object, gate: threading.Event | None = None) -> None:
        self.end = end
        self.gate = gate
        self.runs = 0
        self.started = threading.Event()
        self.thread: threading.Thread | None = None
        self.loop: asyncio.AbstractEventLoop | None = None

    def _begin(self) -> None:
        self.runs += 1
        self.thread = threading.current_thread()
        self.started.set()

    def _finish(self) -> object:
        if isinstance(self.end, BaseException):
            raise self.end
        return self.end

    def plain(self) -> object:
        self._begin()
        if self.gate is not None:
            eventually(self.gate.is_set, "the gate")
        return self._finish()

    async def coroutine(self) -> object:
        self._begin()
        self.loop = asyncio.get_running_loop()
        if self.gate is not None:
            await eventually_async(self.gate.is_set, "the gate")
        return self._finish()


def call(kind: str, flight: ShardedFlight, work: Work, *parts: Any) -> "Future[Any]":
    """Starts one caller of `kind`; the future has what the caller got."""
    if kind == "thread":
        return spawn(flight.do, work.plain, *parts)
    if kind == "task":
        return spawn_loop(lambda: flight.do_async(work.coroutine, *parts))
    return flight.do_future(work.plain, *parts)


def lead(kind: str, flight: ShardedFlight, work: Work, *parts: Any) -> "Future[Any]":
    """As `call`, and returns when the caller's function runs."""
    caller = call(kind, flight, work, *parts)
    assert work.started.wait(PATIENCE)
    return caller


def follow(kind: str, flight: ShardedFlight, work: Work, *parts: Any) -> "Future[Any]":
    """As `call`, and returns when the caller waits as one more follower."""
    waiting = flight.stats().waiting
    caller = call(kind, flight, work, *parts)
    eventually(lambda: flight.stats().waiting == waiting + 1, "one more follower")
    return caller


def outcome(caller: "Future[Any]") -> Any:
    """The result, or the exception itself."""
    try:
        return caller.exception(PATIENCE) or caller.result()
    except CancelledError as error:
        return error


def assert_clean(flight: ShardedFlight, *parts: Any) -> None:
    """Nothing is left of the key: no execution, no follower, and the next call runs."""
    eventually(lambda: flight.in_flight() == 0, "nothing in flight")
    eventually(lambda: flight.stats().waiting == 0, "nobody waiting")
    again = spawn(flight.do, lambda: "again", *parts)
    assert again.result(PATIENCE) == ("again", False)


class LoopThread:
    """An event loop on a thread of its own that a test may stop and close with tasks pending."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._ended = spawn(self.loop.run_forever)

    def run(self, coroutine: Any) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def tasks(self) -> "set[asyncio.Task[Any]]":
        return asyncio.all_tasks(self.loop)

    def stop(self) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.loop.stop)
        self._ended.result(PATIENCE)

    def turn(self, times: int) -> None:
        """Returns when the loop has gone round at least that often."""

        async def turns() -> None:
            for _ in range(times):
                await asyncio.sleep(0)

        self.run(turns()).result(PATIENCE)

    def resume(self) -> None:
        self._ended = spawn(self.loop.run_forever)

    def close(self) -> None:
        """Closes the loop as it is: what was pending on it stays pending for ever."""
        self.stop()
        self.loop.close()


@pytest.fixture(scope="module", autouse=True)
def collected() -> Iterator[None]:
    """What closed loops left pending is collected, and logged by asyncio, while pytest captures."""
    yield
    gc.collect()


@pytest.fixture
def loop_thread() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.close()


# "KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError ... belong to the leader
# alone. One follower takes over and runs its own function; the rest go on waiting for it."


@loss_of_any_sort
@follower_of_any_kind
@leader_of_any_kind
def test_the_loss_is_the_leaders_alone_and_one_follower_runs_its_own_function(
    leading: str, following: str, loss: Callable[[], BaseException]
) -> None:
    """Section 4, sentences 1 and 2, for every pair of kinds and every sort of loss."""
    flight = ShardedFlight()
    gate = threading.Event()
    leader = lead(leading, flight, Work(loss(), gate), "k")
    works = [Work(f"own {n}") for n in range(3)]
    followers = [follow(following, flight, work, "k") for work in works]
    gate.set()
    assert type(leader.exception(PATIENCE)) is type(loss())
    answers = [follower.result(PATIENCE) for follower in followers]
    ran = [work.end for work in works if work.runs]
    assert len(ran) == 1
    assert sum(work.runs for work in works) == 1
    assert answers == [(ran[0], True)] * 3
    assert_clean(flight, "k")


@leader_of_any_kind
def test_one_follower_of_three_kinds_takes_over_and_serves_the_others(leading: str) -> None:
    """Section 4, sentence 2: "One follower takes over", whatever the others are."""
    for order in (KINDS, KINDS[1:] + KINDS[:1], KINDS[2:] + KINDS[:2]):
        flight = ShardedFlight()
        gate = threading.Event()
        leader = lead(leading, flight, Work(Lost(), gate), "k")
        works = {kind: Work(kind) for kind in order}
        followers = [follow(kind, flight, work, "k") for kind, work in works.items()]
        gate.set()
        assert isinstance(leader.exception(PATIENCE), Lost)
        answers = [follower.result(PATIENCE) for follower in followers]
        ran = [kind for kind, work in works.items() if work.runs]
        assert len(ran) == 1
        assert answers == [(ran[0], True)] * 3
        assert_clean(flight, "k")


@follower_of_any_kind
@leader_of_any_kind
def test_the_rest_go_on_waiting_for_the_one_that_took_over(leading: str, following: str) -> None:
    """Section 4, sentence 2: "the rest go on waiting for it", and newcomers join it."""
    flight = ShardedFlight()
    gate, second_gate = threading.Event(), threading.Event()
    leader = lead(leading, flight, Work(Lost(), gate), "k")
    works = [Work(n, second_gate) for n in range(3)]
    followers = [follow(following, flight, work, "k") for work in works]
    gate.set()
    assert isinstance(leader.exception(PATIENCE), Lost)
    eventually(lambda: sum(work.runs for work in works) == 1, "one follower runs")
    stats = flight.stats()
    assert (stats.in_flight, stats.waiting, stats.promotions) == (1, 2, 1)
    newcomer_work = Work("newcomer")
    newcomer = follow("thread", flight, newcomer_work, "k")
    assert not any(follower.done() for follower in followers)
    second_gate.set()
    answers = {follower.result(PATIENCE) for follower in (*followers, newcomer)}
    assert len(answers) == 1
    assert newcomer_work.runs == 0
    assert sum(work.runs for work in works) == 1
    assert_clean(flight, "k")


@follower_of_any_kind
@leader_of_any_kind
def test_the_only_follower_takes_over_and_shares_with_nobody(leading: str, following: str) -> None:
    """Section 4, sentence 2; `shared` tells how many callers the promoted run served."""
    flight = ShardedFlight()
    gate = threading.Event()
    leader = lead(leading, flight, Work(Lost(), gate), "k")
    follower = follow(following, flight, Work("own"), "k")
    gate.set()
    assert isinstance(leader.exception(PATIENCE), Lost)
    assert follower.result(PATIENCE) == ("own", False)
    assert_clean(flight, "k")


@loss_of_any_sort
@leader_of_any_kind
def test_a_leader_lost_without_followers_leaves_the_key_free(
    leading: str, loss: Callable[[], BaseException]
) -> None:
    """Section 4, sentence 3: "No key is ever stuck"."""
    flight = ShardedFlight()
    caller = call(leading, flight, Work(loss()), "k")
    assert type(caller.exception(PATIENCE)) is type(loss())
    assert_clean(flight, "k")
    assert flight.stats().promotions == 0


@follower_of_any_kind
@leader_of_any_kind
def test_the_error_of_the_one_that_took_over_reaches_the_rest(leading: str, following: str) -> None:
    """Section 4, sentence 2: the rest wait for the promoted run, and get its error as itself."""
    flight = ShardedFlight()
    gate = threading.Event()
    leader = lead(leading, flight, Work(Lost(), gate), "k")
    works = [Work(LookupError(n)) for n in range(3)]
    followers = [follow(following, flight, work, "k") for work in works]
    gate.set()
    assert isinstance(leader.exception(PATIENCE), Lost)
    errors = [follower.exception(PATIENCE) for follower in followers]
    ran = [work.end for work in works if work.runs]
    assert len(ran) == 1
    assert isinstance(ran[0], LookupError)
    assert all(type(error) is LookupError and error.args == ran[0].args for error in errors)
    assert_clean(flight, "k")


@leader_of_any_kind
def test_a_thread_that_takes_over_runs_its_function_on_its_own_thread(leading: str) -> None:
    """Section 4, sentence 2: "runs its own function", as a leader of its kind does: a thread."""
    flight = ShardedFlight()
    gate = threading.Event()
    lead(leading, flight, Work(Lost(), gate), "k")
    work = Work("own")
    thread_of_follower = spawn(lambda: (flight.do(work.plain, "k"), threading.current_thread()))
    eventually(lambda: flight.stats().waiting == 1)
    gate.set()
    answer, thread = thread_of_follower.result(PATIENCE)
    assert answer == ("own", False)
    assert work.thread is thread


@leader_of_any_kind
def test_a_task_that_takes_over_runs_its_function_on_its_loop_in_its_context(leading: str) -> None:
    """Section 4, sentence 2: "runs its own function", as a leader of its kind does: a task."""
    flight = ShardedFlight()
    gate = threading.Event()
    variable = contextvars.ContextVar("variable", default="nobody's")
    lead(leading, flight, Work(Lost(), gate), "k")

    async def own() -> object:
        return asyncio.get_running_loop(), variable.get()

    async def main() -> object:
        variable.set("the follower's")
        return asyncio.get_running_loop(), await flight.do_async(own, "k")

    follower = spawn_loop(main)
    eventually(lambda: flight.stats().waiting == 1)
    gate.set()
    loop, (answer, shared) = follower.result(PATIENCE)
    assert answer == (loop, "the follower's")
    assert shared is False


@leader_of_any_kind
def test_a_future_that_takes_over_runs_its_function_on_the_executor(leading: str) -> None:
    """Section 4, sentence 2: "runs its own function", as a leader of its kind does: a future."""
    with ThreadPoolExecutor(thread_name_prefix="the-executor") as pool:
        flight = ShardedFlight(executor=pool)
        gate = threading.Event()
        lead(leading, flight, Work(Lost(), gate), "k")
        work = Work("own")
        follower = follow("future", flight, work, "k")
        gate.set()
        assert follower.result(PATIENCE) == ("own", False)
        assert work.thread is not None
        assert work.thread.name.startswith("the-executor")


@leader_of_any_kind
@follower_of_any_kind
def test_a_chain_of_fifty_lost_leaders_ends_with_the_first_that_succeeds(
    leading: str, following: str
) -> None:
    """Section 4, sentences 2 and 3: the promoted one may be lost too, again and again."""
    with ThreadPoolExecutor(4) as pool:
        flight = ShardedFlight(executor=pool)
        gate = threading.Event()
        leader = lead(leading, flight, Work(Lost(), gate), "k")
        runs: list[int] = []  # appended to by one run at a time

        def end() -> str:
            runs.append(len(runs))
            if len(runs) <= 50:
                raise Lost
            return "last"

        async def end_async() -> str:
            return end()

        def one_of_fifty_three() -> "Future[Any]":
            if following == "thread":
                return spawn(flight.do, end, "k")
            if following == "future":
                return flight.do_future(end, "k")
            return asyncio.run_coroutine_threadsafe(flight.do_async(end_async, "k"), loop)

        loops = LoopThread()
        loop = loops.loop
        followers = [one_of_fifty_three() for _ in range(53)]
        eventually(lambda: flight.stats().waiting == 53)
        gate.set()
        assert isinstance(leader.exception(PATIENCE), Lost)
        outcomes = [outcome(follower) for follower in followers]
        assert sum(isinstance(each, Lost) for each in outcomes) == 50
        assert [each for each in outcomes if not isinstance(each, Lost)] == [("last", True)] * 3
        assert len(runs) == 51
        stats = flight.stats()
        assert (stats.promotions, stats.executions) == (51, 52)
        assert_clean(flight, "k")
        loops.close()


@pytest.mark.parametrize("following", ["task", "future"])
def test_a_chain_of_two_thousand_lost_leaders_needs_no_deeper_stack(following: str) -> None:
    """Section 4, sentence 3: "no follower hangs", however many were lost before it."""
    with ThreadPoolExecutor(2) as pool:
        flight = ShardedFlight(executor=pool)
        gate = threading.Event()
        leader = lead("thread", flight, Work(Lost(), gate), "k")

        def plain() -> object:
            raise Lost

        async def coroutine() -> object:
            raise Lost

        loops = LoopThread()

        async def many() -> list[object]:
            calls = (flight.do_async(coroutine, "k") for _ in range(2000))
            return await asyncio.gather(*calls, return_exceptions=True)

        if following == "task":
            followers = loops.run(many())
        else:
            futures = [flight.do_future(plain, "k") for _ in range(2000)]
            followers = spawn(lambda: [future.exception(PATIENCE) for future in futures])
        eventually(lambda: flight.stats().waiting == 2000)
        gate.set()
        assert isinstance(leader.exception(PATIENCE), Lost)
        assert all(isinstance(each, Lost) for each in followers.result(PATIENCE))
        assert flight.stats().promotions == 2000
        assert_clean(flight, "k")
        loops.close()


# "One follower (one that is still waiting)".


@pytest.mark.parametrize("staying", KINDS)
@pytest.mark.parametrize("leaving", KINDS)
@leader_of_any_kind
def test_a_follower_that_has_left_is_never_the_one(
    leading: str, leaving: str, staying: str
) -> None:
    """Section 4, sentence 2: "one that is still waiting", after a timeout or a cancellation."""
    flight = ShardedFlight()
    gate = threading.Event()
    leader = lead(leading, flight, Work(Lost(), gate), "k")
    gone, stays = Work("gone"), Work("stays")
    loop = LoopThread()
    if leaving == "thread":
        leaver = spawn(lambda: flight.do(gone.plain, "k", timeout=0.02))
        stayer = call(staying, flight, stays, "k")
        assert isinstance(leaver.exception(PATIENCE), FlightTimeout)
        eventually(lambda: flight.stats().waiting == 1)
    else:
        if leaving == "task":
            leaver = loop.run(flight.do_async(gone.coroutine, "k"))
            eventually(lambda: flight.stats().waiting == 1)
        else:
            leaver = follow("future", flight, gone, "k")
        stayer = follow(staying, flight, stays, "k")
        assert leaver.cancel()
        eventually(lambda: flight.stats().waiting == 1, "the follower has left")
    gate.set()
    assert isinstance(leader.exception(PATIENCE), Lost)
    assert stayer.result(PATIENCE) == ("stays", False)
    assert gone.runs == 0
    assert flight.stats().promotions == 1
    assert_clean(flight, "k")
    loop.close()


@pytest.mark.parametrize("leaving", KINDS)
@leader_of_any_kind
def test_nobody_takes_over_when_every_follower_has_left(leading: str, leaving: str) -> None:
    """Section 4, sentence 3: "No key is ever stuck", when nobody is left to take over."""
    flight = ShardedFlight()
    gate = threading.Event()
    leader = lead(leading, flight, Work(Lost(), gate), "k")
    gone = Work("gone")
    loop = LoopThread()
    if leaving == "thread":
        leaver = spawn(lambda: flight.do(gone.plain, "k", timeout=0.02))
        assert isinstance(leaver.exception(PATIENCE), FlightTimeout)
    else:
        leaver = (
            loop.run(flight.do_async(gone.coroutine, "k"))
            if leaving == "task"
            else flight.do_future(gone.plain, "k")
        )
        eventually(lambda: flight.stats().waiting == 1)
        assert leaver.cancel()
    eventually(lambda: flight.stats().waiting == 0)
    gate.set()
    assert isinstance(leader.exception(PATIENCE), Lost)
    assert gone.runs == 0
    assert_clean(flight, "k")
    assert flight.stats().promotions == 0
    loop.close()


@pytest.mark.parametrize("cancel_first", [True, False])
def test_a_follower_cancelled_in_the_tick_of_the_loss_is_passed_over(cancel_first: bool) -> None:
    """Section 4, sentence 2: a cancellation requested in the loss's own tick is a departure."""
    flight = ShardedFlight()

    async def main() -> None:
        end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        gone = Work("gone")

        async def lost() -> object:
            await end
            raise Lost

        leader = asyncio.create_task(flight.do_async(lost, "k"))
        await eventually_async(lambda: flight.in_flight() == 1)
        leaver = asyncio.create_task(flight.do_async(gone.coroutine, "k"))
        await eventually_async(lambda: flight.stats().waiting == 1)
        stayer = asyncio.create_task(flight.do_async(Work("stays").coroutine, "k"))
        await eventually_async(lambda: flight.stats().waiting == 2)
        if cancel_first:
            leaver.cancel()
        end.set_result(None)
        if not cancel_first:
            leaver.cancel()
        outcomes = await asyncio.gather(leader, leaver, stayer, return_exceptions=True)
        assert [type(each) for each in outcomes[:2]] == [Lost, asyncio.CancelledError]
        assert outcomes[2] == ("stays", False)
        assert gone.runs == 0

    spawn_loop(main).result(PATIENCE)
    assert_clean(flight, "k")


@pytest.mark.parametrize("ticks", range(9))
@leader_of_any_kind
def test_a_follower_cancelled_while_it_is_being_promoted_hands_on(leading: str, ticks: int) -> None:
    """Section 4, sentence 3: "no follower hangs", whichever tick the cancellation falls into."""
    flight = ShardedFlight()

    async def main() -> None:
        gate = threading.Event()
        end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def lost() -> object:
            await end
            raise Lost

        if leading == "task":
            leader: Any = asyncio.create_task(flight.do_async(lost, "k"))
        else:
            leader = asyncio.wrap_future(call(leading, flight, Work(Lost(), gate), "k"))
        await eventually_async(lambda: flight.in_flight() == 1)
        leaver = asyncio.create_task(flight.do_async(Work("leaver").coroutine, "k"))
        await eventually_async(lambda: flight.stats().waiting == 1)
        stayer = asyncio.create_task(flight.do_async(Work("stayer").coroutine, "k"))
        await eventually_async(lambda: flight.stats().waiting == 2)
        end.set_result(None)
        gate.set()
        if leading != "task":
            await eventually_async(lambda: flight.stats().promotions == 1 or leader.done())
        for _ in range(ticks):
            await asyncio.sleep(0)
        leaver.cancel()
        outcomes = await asyncio.gather(leader, leaver, stayer, return_exceptions=True)
        assert isinstance(outcomes[0], Lost)
        if isinstance(outcomes[1], asyncio.CancelledError):
            # ("leaver", True): the cancellation came after the end, which had counted both.
            assert outcomes[2] in [("stayer", False), ("leaver", False), ("leaver", True)]
        else:
            assert outcomes[1] == outcomes[2]

    spawn_loop(main).result(PATIENCE)
    assert_clean(flight, "k")


def test_an_interrupt_of_a_waiting_follower_is_a_departure() -> None:
    """Section 4, sentence 2: a follower that a signal took away is not "still waiting"."""
    flight = ShardedFlight()
    gate = threading.Event()
    leader = lead("thread", flight, Work(Lost(), gate), "k")
    interrupted, stays = Work("interrupted"), Work("stays")
    raised = threading.Event()

    def handler(*_: object) -> None:
        if not raised.is_set():
            raised.set()
            raise KeyboardInterrupt

    def interrupted_yet() -> bool:
        # CPython misses a signal that comes just before its lock goes to sleep: so until it works.
        os.kill(os.getpid(), signal.SIGINT)
        return raised.is_set()

    def interrupt() -> None:
        eventually(lambda: flight.stats().waiting == 1)
        eventually(interrupted_yet)

    before = signal.signal(signal.SIGINT, handler)
    try:
        kill = spawn(interrupt)
        with pytest.raises(KeyboardInterrupt):
            flight.do(interrupted.plain, "k")
        kill.result(PATIENCE)
    finally:
        signal.signal(signal.SIGINT, before)
    eventually(lambda: flight.stats().waiting == 0)
    follower = follow("thread", flight, stays, "k")
    gate.set()
    assert isinstance(leader.exception(PATIENCE), Lost)
    assert follower.result(PATIENCE) == ("stays", False)
    assert interrupted.runs == 0
    assert_clean(flight, "k")


def test_ctrl_c_in_the_leaders_function_hands_over() -> None:
    """Section 4, sentence 1: a real SIGINT on the main thread, not only a raised exception."""
    flight = ShardedFlight()
    followers: list[Future[Any]] = []

    def interrupted() -> None:
        followers.extend(follow("thread", flight, Work(n), "k") for n in range(2))
        signal.raise_signal(signal.SIGINT)

    # A shell starts its background jobs with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            flight.do(interrupted, "k")
    finally:
        signal.signal(signal.SIGINT, before)
    answers = [follower.result(PATIENCE) for follower in followers]
    assert answers[0] == answers[1]
    assert answers[0] in [(0, True), (1, True)]
    assert_clean(flight, "k")


# "a loop closed under its task".


@pytest.mark.parametrize("referenced", [True, False], ids=["referenced", "unreferenced"])
@follower_of_any_kind
def test_followers_take_over_when_the_leaders_loop_is_closed(
    following: str, referenced: bool, loop_thread: LoopThread
) -> None:
    """Section 4, sentence 1: "a loop closed under its task", also when the task lives on."""
    flight = ShardedFlight()
    work = Work("never", threading.Event())
    caller = loop_thread.run(flight.do_async(work.coroutine, "k"))
    assert work.started.wait(PATIENCE)
    kept = loop_thread.tasks() if referenced else set()
    works = [Work(n) for n in range(2)]
    followers = [follow(following, flight, each, "k") for each in works]
    loop_thread.close()
    answers = [follower.result(PATIENCE) for follower in followers]
    ran = [each.end for each in works if each.runs]
    assert len(ran) == 1
    assert answers == [(ran[0], True)] * 2
    assert not any(task.done() for task in kept)
    assert not caller.done()
    assert_clean(flight, "k")


@pytest.mark.parametrize("referenced", [True, False], ids=["referenced", "unreferenced"])
@pytest.mark.parametrize("coming", KINDS)
def test_a_newcomer_is_not_stuck_behind_a_closed_loop(
    coming: str, referenced: bool, loop_thread: LoopThread
) -> None:
    """Section 4, sentence 3: "No key is ever stuck", for callers that come after the close."""
    flight = ShardedFlight()
    work = Work("never", threading.Event())
    loop_thread.run(flight.do_async(work.coroutine, "k"))
    assert work.started.wait(PATIENCE)
    kept = loop_thread.tasks() if referenced else set()
    loop_thread.close()
    answer, _ = call(coming, flight, Work("own"), "k").result(PATIENCE)
    assert answer == "own"
    assert not any(task.done() for task in kept)
    assert_clean(flight, "k")


@pytest.mark.parametrize("referenced", [True, False], ids=["referenced", "unreferenced"])
def test_the_thread_that_closed_the_loop_is_not_stuck_behind_it(referenced: bool) -> None:
    """Section 4, sentence 3: "No key is ever stuck", at once after the close, on its thread."""
    flight = ShardedFlight()

    def body() -> object:
        loop = asyncio.new_event_loop()
        caller = loop.create_task(flight.do_async(asyncio.Event().wait, "k"))
        loop.run_until_complete(eventually_async(lambda: flight.in_flight() == 1))
        kept = asyncio.all_tasks(loop) if referenced else set()
        if not referenced:
            del caller
        loop.close()
        answer = flight.do(lambda: "own", "k")
        assert not any(task.done() for task in kept)
        return answer

    for _ in range(20):
        answer, _ = spawn(body).result(PATIENCE)
        assert answer == "own"
        assert_clean(flight, "k")


@follower_of_any_kind
def test_followers_take_over_when_asyncio_run_ends_under_the_leader(following: str) -> None:
    """Section 4, sentence 1: `asyncio.run` that returns cancels the task, for the leader alone."""
    flight = ShardedFlight()
    gate = threading.Event()
    work = Work("never", threading.Event())
    callers: list[asyncio.Task[Any]] = []

    async def main() -> str:
        callers.append(asyncio.create_task(flight.do_async(work.coroutine, "k")))
        await eventually_async(gate.is_set)
        return "main is done"

    loop = spawn_loop(main)
    assert work.started.wait(PATIENCE)
    works = [Work(n) for n in range(2)]
    followers = [follow(following, flight, each, "k") for each in works]
    gate.set()
    assert loop.result(PATIENCE) == "main is done"
    answers = [follower.result(PATIENCE) for follower in followers]
    ran = [each.end for each in works if each.runs]
    assert len(ran) == 1
    assert answers == [(ran[0], True)] * 2
    assert callers[0].cancelled()
    assert_clean(flight, "k")


@follower_of_any_kind
def test_followers_take_over_when_somebody_cancels_every_task_of_the_loop(following: str) -> None:
    """Section 4, sentence 1: the flight's own task can be cancelled by others."""
    flight = ShardedFlight()
    gate = threading.Event()
    work = Work("never", threading.Event())

    async def main() -> None:
        caller = asyncio.create_task(flight.do_async(work.coroutine, "k"))
        await eventually_async(gate.is_set)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller

    loop = spawn_loop(main)
    assert work.started.wait(PATIENCE)
    follower = follow(following, flight, Work("own"), "k")
    gate.set()
    loop.result(PATIENCE)
    assert follower.result(PATIENCE) == ("own", False)
    assert_clean(flight, "k")


def test_a_loop_that_pauses_is_not_lost(loop_thread: LoopThread) -> None:
    """Section 4, sentence 1: closed is lost; stopped and run again later is not."""
    flight = ShardedFlight()
    gate = threading.Event()
    work, own = Work("the leader's", gate), Work("own")
    caller = loop_thread.run(flight.do_async(work.coroutine, "k"))
    assert work.started.wait(PATIENCE)
    follower = follow("thread", flight, own, "k")
    loop_thread.stop()
    gate.set()
    assert not follower.done()
    loop_thread.resume()
    assert follower.result(PATIENCE) == ("the leader's", True)
    assert caller.result(PATIENCE) == ("the leader's", True)
    assert own.runs == 0
    assert_clean(flight, "k")


@follower_of_any_kind
@leader_of_any_kind
def test_a_follower_on_a_closed_loop_is_passed_over(
    leading: str, following: str, loop_thread: LoopThread
) -> None:
    """Section 4, sentence 2: on a closed loop nobody is "still waiting"."""
    flight = ShardedFlight()
    gate = threading.Event()
    leader = lead(leading, flight, Work(Lost(), gate), "k")
    dead = Work("dead")
    loop_thread.run(flight.do_async(dead.coroutine, "k"))
    eventually(lambda: flight.stats().waiting == 1)
    kept = loop_thread.tasks()
    alive = Work("alive")
    follower = follow(following, flight, alive, "k")
    loop_thread.close()
    gate.set()
    assert isinstance(leader.exception(PATIENCE), Lost)
    answer, _ = follower.result(PATIENCE)
    assert answer == "alive"
    assert (dead.runs, alive.runs) == (0, 1)
    assert not any(task.done() for task in kept)
    assert_clean(flight, "k")


@leader_of_any_kind
def test_a_lost_leader_with_followers_on_closed_loops_only_frees_the_key(
    leading: str, loop_thread: LoopThread
) -> None:
    """Section 4, sentence 3: "No key is ever stuck", when all who could take over are dead."""
    flight = ShardedFlight()
    gate = threading.Event()
    leader = lead(leading, flight, Work(Lost(), gate), "k")
    dead = Work("dead")
    loop_thread.run(flight.do_async(dead.coroutine, "k"))
    eventually(lambda: flight.stats().waiting == 1)
    kept = loop_thread.tasks()
    loop_thread.close()
    gate.set()
    assert isinstance(leader.exception(PATIENCE), Lost)
    assert_clean(flight, "k")
    assert dead.runs == 0
    assert not any(task.done() for task in kept)


@follower_of_any_kind
@leader_of_any_kind
def test_a_follower_whose_asyncio_run_ended_is_passed_over(leading: str, following: str) -> None:
    """Section 4, sentence 2: a task that its ending `asyncio.run` cancelled has left."""
    flight = ShardedFlight()
    gate, leave = threading.Event(), threading.Event()
    leader = lead(leading, flight, Work(Lost(), gate), "k")
    gone = Work("gone")

    async def main() -> "asyncio.Task[Any]":
        task = asyncio.create_task(flight.do_async(gone.coroutine, "k"))
        await eventually_async(leave.is_set)
        return task

    left = spawn_loop(main)
    eventually(lambda: flight.stats().waiting == 1)
    follower = follow(following, flight, Work("own"), "k")
    leave.set()
    assert left.result(PATIENCE).cancelled()
    gate.set()
    assert isinstance(leader.exception(PATIENCE), Lost)
    assert follower.result(PATIENCE) == ("own", False)
    assert gone.runs == 0
    assert_clean(flight, "k")


@pytest.mark.parametrize("end", ["value", LookupError("of the leader")], ids=["value", "error"])
@leader_of_any_kind
def test_a_follower_on_a_closed_loop_does_not_disturb_the_end(
    leading: str, end: object, loop_thread: LoopThread
) -> None:
    """Section 4, sentence 3: an end that cannot be told to a dead loop is told to the others."""
    flight = ShardedFlight()
    gate = threading.Event()
    leader = lead(leading, flight, Work(end, gate), "k")
    loop_thread.run(flight.do_async(Work("dead").coroutine, "k"))
    eventually(lambda: flight.stats().waiting == 1)
    followers = [follow(kind, flight, Work("own"), "k") for kind in KINDS]
    loop_thread.close()
    gate.set()
    for caller in (leader, *followers):
        got = outcome(caller)
        if isinstance(end, LookupError):
            assert (type(got), got.args) == (LookupError, end.args)
        else:
            assert got == (end, True)
    assert_clean(flight, "k")


@follower_of_any_kind
def test_a_promotion_that_its_loop_never_gets_to_is_handed_on(
    following: str, loop_thread: LoopThread
) -> None:
    """Section 4, sentence 3: "No key is ever stuck": the chosen loop closes before it runs."""
    flight = ShardedFlight()
    gate, blocked, release = threading.Event(), threading.Event(), threading.Event()
    leader = lead("thread", flight, Work(Lost(), gate), "k")
    chosen = Work("chosen")
    loop_thread.run(flight.do_async(chosen.coroutine, "k"))
    eventually(lambda: flight.stats().waiting == 1)
    follower = follow(following, flight, Work("own"), "k")

    def block() -> None:
        blocked.set()
        release.wait(PATIENCE)
        loop_thread.loop.stop()

    loop_thread.loop.call_soon_threadsafe(block)
    assert blocked.wait(PATIENCE)
    kept = loop_thread.tasks()
    gate.set()
    assert isinstance(leader.exception(PATIENCE), Lost)
    release.set()
    eventually(lambda: not loop_thread.loop.is_running())
    loop_thread.loop.close()
    answer, _ = follower.result(PATIENCE)
    assert answer == "own"
    assert chosen.runs == 0
    assert not any(task.done() for task in kept)
    assert_clean(flight, "k")


# "an executor shut down".


@pytest.mark.parametrize("following", ["thread", "task"])
def test_followers_take_over_when_the_executor_is_shut_down_under_a_queued_leader(
    following: str,
) -> None:
    """Section 4, sentence 1: "an executor shut down" before it came to the leader's function."""
    pool = ThreadPoolExecutor(1)
    flight = ShardedFlight(executor=pool)
    busy, release = threading.Event(), threading.Event()
    pool.submit(lambda: busy.set() or release.wait(PATIENCE))
    assert busy.wait(PATIENCE)
    queued = Work("queued")
    leader = flight.do_future(queued.plain, "k")
    works = [Work(n) for n in range(2)]
    followers = [follow(following, flight, each, "k") for each in works]
    spawn(pool.shutdown, wait=False, cancel_futures=True).result(PATIENCE)
    answers = [follower.result(PATIENCE) for follower in followers]
    ran = [each.end for each in works if each.runs]
    assert len(ran) == 1
    assert answers == [(ran[0], True)] * 2
    assert isinstance(outcome(leader), BaseException)
    release.set()
    assert queued.runs == 0
    assert_clean(flight, "k")


def test_futures_of_an_executor_that_is_shut_down_all_end() -> None:
    """Section 4, sentence 3: followers that could only run on the dead executor do not hang."""
    pool = ThreadPoolExecutor(1)
    flight = ShardedFlight(executor=pool)
    busy, release = threading.Event(), threading.Event()
    pool.submit(lambda: busy.set() or release.wait(PATIENCE))
    assert busy.wait(PATIENCE)
    works = [Work(n) for n in range(4)]
    futures = [flight.do_future(work.plain, "k") for work in works]
    spawn(pool.shutdown, wait=False, cancel_futures=True).result(PATIENCE)
    assert all(isinstance(outcome(future), BaseException) for future in futures)
    release.set()
    assert [work.runs for work in works] == [0] * 4
    assert_clean(flight, "k")


def test_a_mix_of_followers_survives_the_executor_of_a_queued_leader() -> None:
    """Section 4, sentences 1 and 3: those that can run do, and nobody gets `None`."""
    pool = ThreadPoolExecutor(1)
    flight = ShardedFlight(executor=pool)
    busy, release = threading.Event(), threading.Event()
    pool.submit(lambda: busy.set() or release.wait(PATIENCE))
    assert busy.wait(PATIENCE)
    leader = flight.do_future(Work("queued").plain, "k")
    future = follow("future", flight, Work("future"), "k")
    thread = follow("thread", flight, Work("thread"), "k")
    task = follow("task", flight, Work("task"), "k")
    spawn(pool.shutdown, wait=False, cancel_futures=True).result(PATIENCE)
    answers = {outcome(thread)[0], outcome(task)[0]}
    assert len(answers) == 1
    assert answers < {"thread", "task"}
    assert isinstance(outcome(leader), BaseException)
    last = outcome(future)
    assert isinstance(last, BaseException) or last[0] in answers
    release.set()
    assert_clean(flight, "k")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_followers_take_over_from_a_leader_whose_executor_can_not_start() -> None:
    """Section 4: an executor whose threads fail in their initializer runs nothing any more."""
    fail = threading.Event()

    def initialize() -> None:
        fail.wait(PATIENCE)
        raise ValueError("no connection for this thread")

    pool = ThreadPoolExecutor(1, initializer=initialize)
    flight = ShardedFlight(executor=pool)
    queued = Work("queued")
    leader = flight.do_future(queued.plain, "k")
    future = follow("future", flight, Work("future"), "k")
    thread = follow("thread", flight, Work("thread"), "k")
    fail.set()
    assert isinstance(leader.exception(PATIENCE), BrokenThreadPool)
    assert outcome(thread)[0] == "thread"
    last = outcome(future)
    assert isinstance(last, BrokenThreadPool) or last[0] == "thread"
    assert queued.runs == 0
    assert_clean(flight, "k")


@leader_of_any_kind
def test_a_future_that_cannot_take_over_hands_on(leading: str) -> None:
    """Section 4, sentence 3: "no follower hangs", when the chosen future's executor is gone."""
    pool = ThreadPoolExecutor(1)
    flight = ShardedFlight(executor=pool)
    gate = threading.Event()
    leader = lead(leading, flight, Work(Lost(), gate), "k")
    own = Work("future")
    future = follow("future", flight, own, "k")
    thread = follow("thread", flight, Work("thread"), "k")
    pool.shutdown(wait=False)
    gate.set()
    assert isinstance(leader.exception(PATIENCE), Lost)
    answer, _ = thread.result(PATIENCE)
    assert answer == "thread"
    last = outcome(future)
    assert isinstance(last, BaseException) or last[0] == "thread"
    assert own.runs == 0
    assert_clean(flight, "k")


class ExecutorOfOne(ThreadPoolExecutor):
    """Does something before it takes its second function."""

    def __init__(self, before_second: Callable[[], None]) -> None:
        super().__init__(1)
        self._before_second = before_second
        self._submitted = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        self._submitted += 1
        if self._submitted == 2:
            self._before_second()
        return super().submit(fn, *args, **kwargs)


@pytest.mark.parametrize("refuses", [True, False])
@pytest.mark.parametrize("staying", [None, *KINDS])
def test_a_future_that_is_cancelled_while_the_executor_takes_it_hands_on(
    staying: str | None, refuses: bool
) -> None:
    """Section 4, sentence 3: "No key is ever stuck", between the choice and the start."""
    leavers: list[Future[Any]] = []

    def leave() -> None:
        assert leavers[0].cancel()
        if refuses:
            raise RuntimeError("no more work")

    with ExecutorOfOne(leave) as pool:
        flight = ShardedFlight(executor=pool)
        gate = threading.Event()
        leader = lead("future", flight, Work(Lost(), gate), "k")
        gone = Work("gone")
        leavers.append(follow("future", flight, gone, "k"))
        stayer = None if staying is None else follow(staying, flight, Work("stays"), "k")
        gate.set()
        assert isinstance(leader.exception(PATIENCE), Lost)
        if stayer is not None:
            # As the leader that it was chosen to be, it may have been run for the one who stays.
            assert stayer.result(PATIENCE) == ("gone" if gone.runs else "stays", False)
        assert leavers[0].cancelled()
        assert gone.runs == 0 or not (refuses or staying is None)
        assert_clean(flight, "k")


def test_an_executor_that_is_already_shut_down_is_the_callers_error() -> None:
    """Section 4, sentence 1: "an executor shut down" when `do_future` is called."""
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    flight = ShardedFlight(executor=pool)
    own = Work("own")
    with pytest.raises(RuntimeError):
        flight.do_future(own.plain, "k").result(PATIENCE)
    assert own.runs == 0
    assert flight.in_flight() == 0
    assert_clean(flight, "k")


@pytest.mark.parametrize("leading", ["thread", "task"])
def test_a_following_future_needs_no_executor(leading: str) -> None:
    """Section 4, sentence 1: a dead executor hurts only those who need it to run."""
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    flight = ShardedFlight(executor=pool)
    gate = threading.Event()
    leader = lead(leading, flight, Work("value", gate), "k")
    follower = follow("future", flight, Work("own"), "k")
    gate.set()
    assert leader.result(PATIENCE) == follower.result(PATIENCE) == ("value", True)
    assert_clean(flight, "k")


def test_a_function_that_exits_on_the_pool_does_not_take_the_pool_with_it() -> None:
    """Section 4, sentence 1: `SystemExit` on a pool thread is the leader's, not the pool's."""
    with ThreadPoolExecutor(1) as pool:
        flight = ShardedFlight(executor=pool)
        error = flight.do_future(Work(SystemExit(3)).plain, "k").exception(PATIENCE)
        assert isinstance(error, SystemExit)
        assert error.code == 3
        assert flight.do_future(Work("next").plain, "k").result(PATIENCE) == ("next", False)
        assert_clean(flight, "k")


# The wrong sort of function: an error of that caller alone, as a loss is.


@follower_of_any_kind
@pytest.mark.parametrize("leading", ["thread", "future"])
def test_followers_take_over_from_a_coroutine_function_given_to_a_plain_method(
    leading: str, following: str
) -> None:
    """Section 4, sentence 2, for a leader whose `TypeError` is nobody else's."""
    flight = ShardedFlight()
    gate, started = threading.Event(), threading.Event()

    async def coroutine() -> None: ...

    def returns_a_coroutine() -> object:
        started.set()
        eventually(gate.is_set)
        return coroutine()

    leader: Future[Any] = (
        spawn(flight.do, returns_a_coroutine, "k")
        if leading == "thread"
        else flight.do_future(returns_a_coroutine, "k")
    )
    assert started.wait(PATIENCE)
    follower = follow(following, flight, Work("own"), "k")
    gate.set()
    assert isinstance(leader.exception(PATIENCE), TypeError)
    assert follower.result(PATIENCE) == ("own", False)
    assert_clean(flight, "k")


@follower_of_any_kind
def test_followers_take_over_from_a_plain_function_given_to_do_async(following: str) -> None:
    """Section 4, sentence 2, for a leader whose `TypeError` is nobody else's."""
    flight = ShardedFlight()
    gate, started = threading.Event(), threading.Event()

    def plain() -> Any:
        started.set()
        eventually(gate.is_set)
        return "not awaitable"

    leader = spawn_loop(lambda: flight.do_async(plain, "k"))
    assert started.wait(PATIENCE)
    follower = follow(following, flight, Work("own"), "k")
    gate.set()
    assert isinstance(leader.exception(PATIENCE), TypeError)
    assert follower.result(PATIENCE) == ("own", False)
    assert_clean(flight, "k")


# Losses together with what the other sections promise.


@follower_of_any_kind
@leader_of_any_kind
def test_a_forgotten_execution_hands_over_too(leading: str, following: str) -> None:
    """Section 4, sentence 2, and section 6: those who joined before `forget` are still served."""
    flight = ShardedFlight()
    gate, newer_gate = threading.Event(), threading.Event()
    leader = lead(leading, flight, Work(Lost(), gate), "k")
    works = [Work(n) for n in range(2)]
    followers = [follow(following, flight, work, "k") for work in works]
    flight.forget("k")
    newer = lead("thread", flight, Work("newer", newer_gate), "k")
    gate.set()
    assert isinstance(leader.exception(PATIENCE), Lost)
    answers = [follower.result(PATIENCE) for follower in followers]
    ran = [work.end for work in works if work.runs]
    assert len(ran) == 1
    assert answers == [(ran[0], True)] * 2
    assert flight.in_flight() == 1
    joined = follow("thread", flight, Work("joined"), "k")
    newer_gate.set()
    assert newer.result(PATIENCE) == joined.result(PATIENCE) == ("newer", True)
    assert_clean(flight, "k")


@leader_of_any_kind
def test_nobody_joins_a_forgotten_execution_after_its_hand_over(leading: str) -> None:
    """Section 6 outlives the hand-over: the promoted run of a forgotten execution is not joined."""
    flight = ShardedFlight()
    gate, second_gate = threading.Event(), threading.Event()
    leader = lead(leading, flight, Work(Lost(), gate), "k")
    own = Work("own", second_gate)
    follower = follow("thread", flight, own, "k")
    flight.forget("k")
    gate.set()
    assert isinstance(leader.exception(PATIENCE), Lost)
    assert own.started.wait(PATIENCE)
    newcomer = call("thread", flight, Work("newcomer"), "k")
    assert newcomer.result(PATIENCE) == ("newcomer", False)
    second_gate.set()
    assert follower.result(PATIENCE) == ("own", False)
    assert_clean(flight, "k")


@follower_of_any_kind
def test_an_execution_whose_first_caller_has_left_hands_over(following: str) -> None:
    """Section 4, sentence 2: the loss of a task that works on for its followers alone."""
    flight = ShardedFlight()
    gate = threading.Event()
    loop = LoopThread()
    work = Work(Lost(), gate)
    caller = loop.run(flight.do_async(work.coroutine, "k"))
    assert work.started.wait(PATIENCE)
    works = [Work(n) for n in range(2)]
    followers = [follow(following, flight, each, "k") for each in works]
    assert caller.cancel()
    loop.turn(3)
    assert flight.in_flight() == 1
    gate.set()
    answers = [follower.result(PATIENCE) for follower in followers]
    ran = [each.end for each in works if each.runs]
    assert len(ran) == 1
    assert answers == [(ran[0], True)] * 2
    assert_clean(flight, "k")
    loop.close()


@pytest.mark.parametrize("coming", KINDS)
def test_the_late_loss_of_an_abandoned_leader_is_nobodys(coming: str) -> None:
    """Section 4 and 5: a newcomer neither joins nor inherits a leader that was abandoned."""
    flight = ShardedFlight()
    cancelled, dying = threading.Event(), threading.Event()
    gate = threading.Event()
    loop = LoopThread()

    async def dies_slowly() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            await eventually_async(gate.is_set)
            dying.set()
            raise

    caller = loop.run(flight.do_async(dies_slowly, "k"))
    eventually(lambda: flight.in_flight() == 1)
    assert caller.cancel()
    assert cancelled.wait(PATIENCE)
    newer_gate = threading.Event()
    newer = lead(coming, flight, Work("newer", newer_gate), "k")
    follower = follow("thread", flight, Work("own"), "k")
    gate.set()
    assert dying.wait(PATIENCE)
    eventually(lambda: flight.in_flight() == 1, "the old execution has ended")
    assert flight.stats().waiting == 1
    newer_gate.set()
    assert newer.result(PATIENCE) == follower.result(PATIENCE) == ("newer", True)
    stats = flight.stats()
    assert (stats.promotions, stats.abandoned) == (0, 1)
    assert_clean(flight, "k")
    loop.close()


@leader_of_any_kind
def test_a_task_that_took_over_can_be_abandoned(leading: str) -> None:
    """Section 4 and 5: a promoted task whose last caller leaves is unlinked and cancelled."""
    flight = ShardedFlight()
    gate, cancelled = threading.Event(), threading.Event()
    running = threading.Event()
    leader = lead(leading, flight, Work(Lost(), gate), "k")
    loop = LoopThread()

    async def own() -> None:
        running.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    follower = loop.run(flight.do_async(own, "k"))
    eventually(lambda: flight.stats().waiting == 1)
    gate.set()
    assert isinstance(leader.exception(PATIENCE), Lost)
    assert running.wait(PATIENCE)
    assert follower.cancel()
    assert cancelled.wait(PATIENCE)
    assert_clean(flight, "k")
    loop.close()


def test_hand_over_leaves_other_keys_of_the_shard_alone() -> None:
    """Section 4, sentence 2: only followers of the lost execution are candidates."""
    flight = ShardedFlight(shards=1)
    gates = {key: threading.Event() for key in "abc"}
    leaders = {key: lead("thread", flight, Work(Lost(), gates[key]), key) for key in "abc"}
    works = {key: Work(f"own {key}") for key in "abc"}
    followers = {key: follow("thread", flight, works[key], key) for key in "abc"}
    gates["b"].set()
    assert isinstance(leaders["b"].exception(PATIENCE), Lost)
    assert followers["b"].result(PATIENCE) == ("own b", False)
    assert [works[key].runs for key in "abc"] == [0, 1, 0]
    assert flight.in_flight() == 2
    for key in "ac":
        gates[key].set()
        assert isinstance(leaders[key].exception(PATIENCE), Lost)
        assert followers[key].result(PATIENCE) == (f"own {key}", False)
    assert_clean(flight, "b")


# A follower that can not begin: its event loop's thread is blocked, by the flight itself.


def lose_when_told(flight: ShardedFlight, key: str) -> "tuple[threading.Event, Future[Any]]":
    """A thread that leads, and is lost once the event is set."""
    lose = threading.Event()
    leader = spawn(flight.do, Work(Lost(), lose).plain, key)
    eventually(lambda: flight.in_flight() == 1)
    return lose, leader


async def followed(flight: ShardedFlight, key: str, number: int = 1) -> "asyncio.Task[Any]":
    """A task that follows, as one of so many."""
    work = Work("of the task")
    assert work.gate is None
    task = asyncio.create_task(flight.do_async(work.coroutine, key))
    await eventually_async(lambda: flight.stats().waiting == number)
    return task


def test_a_coroutine_is_passed_over_whose_loop_is_blocked_by_the_same_execution() -> None:
    """Section 4: "no key is ever stuck": the blocked call itself takes over."""
    flight = ShardedFlight()
    lose, leader = lose_when_told(flight, "k")

    def lose_when_both_wait() -> None:
        eventually(lambda: flight.stats().waiting == 2)
        lose.set()

    async def main() -> Any:
        task = await followed(flight, "k")
        helper = spawn(lose_when_both_wait)
        blocking = flight.do(lambda: "of the blocked call", "k")
        helper.result(PATIENCE)
        return blocking, await task

    assert spawn_loop(main).result(PATIENCE) == (("of the blocked call", True),) * 2
    assert isinstance(leader.exception(PATIENCE), Lost)
    assert flight.stats().promotions == 1
    assert flight.in_flight() == flight.stats().waiting == 0


def test_a_coroutine_is_passed_over_whose_loop_is_blocked_by_way_of_another_key() -> None:
    """Section 4: a coroutine of another loop, without which the blocked one can not go on."""
    flight = ShardedFlight()
    lose, leader = lose_when_told(flight, "k")
    first = threading.Event()

    async def lead_another() -> Any:
        async def function() -> Any:
            await eventually_async(first.is_set)
            return await flight.do_async(Work("of the other loop").coroutine, "k")

        return await flight.do_async(function, "other")

    async def main() -> Any:
        other = spawn_loop(lead_another)
        task = await followed(flight, "k")
        first.set()
        await eventually_async(lambda: flight.stats().waiting == 2)
        helper = spawn(lambda: (eventually(lambda: flight.stats().waiting == 3), lose.set()))
        blocking = flight.do(lambda: "not run", "other")
        helper.result(PATIENCE)
        return blocking, await task, await asyncio.wrap_future(other)

    served = ("of the other loop", True)
    assert spawn_loop(main).result(PATIENCE) == ((served, True), served, (served, True))
    assert isinstance(leader.exception(PATIENCE), Lost)
    assert flight.in_flight() == flight.stats().waiting == 0


def test_a_blocking_call_for_what_a_coroutine_of_its_loop_is_about_to_lead() -> None:
    """Section 7: it would stop the event loop that the heir needs to begin."""
    flight = ShardedFlight()
    lose, leader = lose_when_told(flight, "k")

    async def main() -> Any:
        task = await followed(flight, "k")
        lose.set()
        leader.exception(PATIENCE)  # this loop stands still meanwhile, so the heir has not begun
        with pytest.raises(DeadlockError) as caught:
            flight.do(lambda: "not run", "k")
        assert caught.value.keys == ("k",)
        return await task

    assert spawn_loop(main).result(PATIENCE) == ("of the task", False)
    assert flight.stats().deadlocks == 1
    assert flight.in_flight() == flight.stats().waiting == 0


def test_what_runs_is_listed_while_the_collector_lets_others_change_it() -> None:
    """Section 4: who looks for what a closed loop has led shall not fail half-way."""
    flight = ShardedFlight(1)
    flight.do(lambda: None, "k")
    (shard,) = flight._made_shards()
    shard.overflow.update({number: [(f"k{number}", 1)] for number in range(5000)})

    def change(phase: str, info: Any) -> None:
        if phase == "start" and shard.overflow.pop(-1, None) is None:
            shard.overflow[-1] = [("more", 1)]

    threshold = gc.get_threshold()
    gc.callbacks.append(change)
    gc.set_threshold(1, 1_000_000)  # often, and only the young: tuples of two have a free list
    try:
        for _ in range(3):
            assert len(shard.executions()) >= 5000
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(change)
        shard.overflow.clear()


@pytest.mark.parametrize("what", ["executor", "loop"])
def test_what_no_thread_can_be_had_for_is_done_by_who_comes_next(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Section 4: as many threads as the machine allows, most of them followers."""
    pool = ThreadPoolExecutor(1)
    flight = ShardedFlight(executor=pool)
    busy = threading.Event()
    loop = asyncio.new_event_loop()
    if what == "executor":
        pool.submit(busy.wait, PATIENCE)
        flight.do_future(lambda: "never", "k")
    else:

        async def main() -> None:
            task = asyncio.ensure_future(flight.do_async(asyncio.Event().wait, "k"))
            await eventually_async(lambda: flight.in_flight() == 1)
            assert not task.done()

        loop.run_until_complete(main())
    follower = spawn(flight.do, lambda: "own", "k")
    eventually(lambda: flight.stats().waiting == 1)

    def refused(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(_flight, "start_new_thread", refused)
        patch.setattr(_waiting, "start_new_thread", refused)
        if what == "executor":
            pool.shutdown(wait=False, cancel_futures=True)
        else:
            loop.close()
            gc.collect()
    busy.set()
    newcomer = spawn(flight.do, lambda: "own", "k")
    assert newcomer.result(PATIENCE)[0] == follower.result(PATIENCE)[0] == "own"
    loop.close()
    pool.shutdown()
