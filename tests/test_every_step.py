"""Another thread acts at every line of the library that a caller passes.

A race that shows once in ten thousand runs is one line wide. So the caller's thread is traced, and
the test is repeated with the other thread's act before the first line, the second, and so on to the
last. The compiled core has no lines; what surrounds it has.
"""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support import PATIENCE, eventually, spawn

import shardedflight
from shardedflight import ShardedFlight

PACKAGE = str(Path(shardedflight.__file__).parent)


class Lost(BaseException):
    """Loses the leader."""


class Intruder:
    """Calls `act` on another thread before a line of the library, counted from `begin()` on.

    The line waits until that is done or, since it may need a lock that is held there, a moment.
    """

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self._left = step
        self._act = act
        self._acting: Future[Any] | None = None
        self._begun = False

    def begin(self) -> None:
        self._begun = True

    def outcome_of(self, call: Callable[[], object]) -> Any:
        """What `call` returns or raises, with the act in between."""
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            return call()
        except BaseException as error:
            return error
        finally:
            sys.settrace(before)  # of coverage.py's, say
            if self._acting is not None:
                self._acting.result(PATIENCE)

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and self._begun and self._acting is None:
            self._left -= 1
            if self._left < 0:
                done = threading.Event()
                self._acting = spawn(self._act)
                self._acting.add_done_callback(lambda _: done.set())
                done.wait(0.02)
        return self._trace

    @property
    def came(self) -> bool:
        return self._acting is not None


def each_step(scenario: Callable[[int], bool]) -> None:
    """Runs the scenario for step 0, 1, ... until it says that there is no such step."""
    step = 0
    while scenario(step):
        step += 1
    assert step > 5, "the act never came in between"


def outcome_of(future: "Future[Any]") -> Any:
    try:
        return future.result(PATIENCE)
    except BaseException as error:
        return error


def assert_idle(flight: ShardedFlight) -> None:
    eventually(lambda: flight.in_flight() == 0, "nothing in flight")
    assert flight.stats().waiting == 0
    assert flight.do(lambda: "again", "k") == ("again", False)


@pytest.mark.parametrize("followers", [1, 2])
@pytest.mark.parametrize("on_abandon", ["cancel", "finish"])
def test_the_heir_is_cancelled_while_it_is_handed_the_lead(followers: int, on_abandon: Any) -> None:
    """4: "no key is ever stuck", at whatever point of the hand-over the chosen follower leaves."""
    with ThreadPoolExecutor(1) as pool:

        def scenario(step: int) -> bool:
            flight = ShardedFlight(executor=pool, on_abandon=on_abandon)
            futures: list[Future[Any]] = []
            intruder = Intruder(step, lambda: futures[0].cancel())

            def lost() -> None:
                futures.extend(flight.do_future(lambda: "own", "k") for _ in range(followers))
                intruder.begin()
                raise Lost

            assert isinstance(intruder.outcome_of(lambda: flight.do(lost, "k")), Lost)
            for future in futures[1:]:
                assert future.result(PATIENCE)[0] == "own"
            assert isinstance(outcome_of(futures[0]), (tuple, CancelledError))
            assert_idle(flight)
            return intruder.came

        each_step(scenario)


@pytest.mark.parametrize("ends", ["value", "error", "lost"])
def test_a_follower_leaves_while_the_leader_ends(ends: str) -> None:
    """5: at whatever point it comes, the follower has left or has the outcome: one of the two."""

    def scenario(step: int) -> bool:
        flight = ShardedFlight()
        left: list[Future[Any]] = []
        stayed: list[Future[Any]] = []
        intruder = Intruder(step, lambda: left[0].cancel())

        def fn() -> str:
            left.append(flight.do_future(lambda: "own", "k"))
            stayed.append(spawn(flight.do, lambda: "own", "k", timeout=PATIENCE))
            eventually(lambda: flight.stats().waiting == 2)
            intruder.begin()
            if ends == "error":
                raise LookupError
            if ends == "lost":
                raise Lost
            return "led"

        outcome = intruder.outcome_of(lambda: flight.do(fn, "k"))
        follower = outcome_of(stayed[0])
        if ends == "value":
            assert (outcome, follower) == (("led", True), ("led", True))
        elif ends == "error":
            assert isinstance(outcome, LookupError)
            assert isinstance(follower, LookupError)
        else:
            assert isinstance(outcome, Lost)
            assert follower[0] == "own"
        assert isinstance(outcome_of(left[0]), (tuple, LookupError, CancelledError))
        assert_idle(flight)
        return intruder.came

    each_step(scenario)


@pytest.mark.skipif(shardedflight.__compiled__, reason="the compiled core lets nobody in between")
def test_a_newcomer_comes_while_the_leader_ends() -> None:
    """2: it joins and is served, or it leads: never both, never neither."""

    def scenario(step: int) -> bool:
        flight = ShardedFlight()
        newcomers: list[Future[Any]] = []
        intruder = Intruder(step, lambda: newcomers.append(spawn(flight.do, lambda: "own", "k")))
        intruder.begin()
        outcome = intruder.outcome_of(lambda: flight.do(lambda: "led", "k"))
        for newcomer in newcomers:
            answer = outcome_of(newcomer)
            assert answer in {("led", True), ("own", False), ("own", True)}
            assert answer[0] == "own" or outcome == ("led", True)
        stats = flight.stats()
        assert stats.executions + stats.shared == 1 + len(newcomers)
        assert_idle(flight)
        return intruder.came

    each_step(scenario)
