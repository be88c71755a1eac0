"""Faults that were found by attacking the compiled core. Each test fails without its mend.

What would crash the interpreter runs in one of its own.
"""

import contextlib
import gc
import subprocess
import sys
import textwrap
import threading
import weakref
from concurrent.futures import Executor, Future
from typing import Any

import pytest
from support import PATIENCE, eventually, spawn

import shardedflight
from shardedflight import ShardedFlight


def run(code: str) -> str:
    """What the code prints, in an interpreter that must not crash."""
    start = "import faulthandler, sys; faulthandler.enable(); from shardedflight import *\n"
    process = subprocess.run(
        [sys.executable, "-c", start + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=PATIENCE * 2,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.parametrize("power", [58, 63, 64, 65])
def test_more_shards_than_memory_can_have_are_an_error(power: int) -> None:
    """2**58 lines of 64 bytes are 0 bytes to who multiplies in 64 bits."""
    code = f"""
        try:
            ShardedFlight(2**{power})
        except (MemoryError, OverflowError):
            print("refused")
    """
    assert run(code) == "refused\n"


def test_a_flight_that_was_not_initialised_is_an_error() -> None:
    code = """
        class Forgetful(ShardedFlight):
            def __init__(self):
                pass
        try:
            Forgetful().do(int, "k")
        except (AttributeError, RuntimeError):
            print("refused")
    """
    assert run(code) == "refused\n"


@pytest.mark.parametrize("self", ["int", "42", "None", "object()"])
def test_do_on_what_is_no_flight_is_an_error(self: str) -> None:
    """Such as a call on the class: its function is taken for the flight."""
    code = f"""
        try:
            ShardedFlight.do({self}, int, "k")
        except (AttributeError, TypeError):
            print("refused")
    """
    assert run(code) == "refused\n"


def test_initialising_a_flight_again_lets_those_in_flight_end() -> None:
    code = """
        import gc
        flight = ShardedFlight(4096)
        def function():
            flight.__init__(4096)
            gc.collect()
            return [bytearray(1024) for _ in range(1000)]
        flight.do(function, "k")
        print(flight.in_flight(), flight.do(int, "k"))
    """
    assert run(code) == "0 (0, False)\n"


def test_a_hash_of_an_odd_int_stays_inside_of_the_table() -> None:
    """Section 1: "may return any int". A subclass may make of & what it likes."""
    code = """
        class Odd(int):
            def __and__(self, other):
                return 1 << 40
            __rand__ = __and__
        flight = ShardedFlight(4, hash=lambda key: Odd(3))
        print(flight.do(int, "k"), flight.do(lambda: flight.stats().per_shard, "k"))
    """
    assert run(code) == "(0, False) ((0, 0, 0, 1), False)\n"


@pytest.mark.parametrize("error", [None, ValueError("own"), SystemExit("own")])
@pytest.mark.parametrize("answers", [(0, 1, 2, 3), (0, ValueError("second"))])
def test_the_hash_hook_is_asked_once_for_each_call(answers: Any, error: Any) -> None:
    """Its later answers, or errors, leave no key stuck."""
    asked = iter(answers)

    def hook(key: object) -> Any:
        answer = next(asked)
        if isinstance(answer, Exception):
            raise answer
        return answer

    flight = ShardedFlight(4, hash=hook)

    def function() -> int:
        assert flight.stats().per_shard == (1, 0, 0, 0)
        if error is not None:
            raise error
        return 1

    if error is None:
        assert flight.do(function, "k") == (1, False)
    else:
        with pytest.raises(type(error)) as caught:
            flight.do(function, "k")
        assert caught.value is error
    assert flight.in_flight() == 0
    assert next(asked) == 1 or isinstance(answers[1], Exception)


def test_followers_are_served_where_the_hash_hook_answers_once() -> None:
    """The leader finds the record of its followers without asking again."""
    asked = iter([0, 0])
    flight = ShardedFlight(4, hash=lambda key: next(asked, 3))
    gate = threading.Event()
    leader = spawn(flight.do, lambda: gate.wait(PATIENCE), "k")
    eventually(lambda: flight.in_flight() == 1)
    follower = spawn(flight.do, int, "k")
    eventually(lambda: flight.stats().waiting == 1)
    gate.set()
    assert leader.result(PATIENCE) == follower.result(PATIENCE) == (True, True)


@pytest.mark.untraced
@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize("shards", [1, 4096])
def test_a_stack_without_room_leaves_no_key_in_any_shard(shards: int, shift: int) -> None:
    """To make a shard takes room on the stack as well. Each shift ends at another call."""
    flight = ShardedFlight(shards)

    def down(depth: int) -> Any:
        return flight.do(lambda: down(depth + 1), "several", depth)

    def begin(frames: int) -> Any:
        return begin(frames - 1) if frames else down(0)

    def body() -> None:
        with contextlib.suppress(RecursionError):
            begin(shift)

    spawn(body).result(PATIENCE)
    eventually(lambda: flight.in_flight() == 0)
    eventually(lambda: flight.stats().errors == flight.stats().executions)


@pytest.mark.untraced
def test_calls_without_a_python_frame_between_find_the_end_of_the_stack() -> None:
    code = """
        import os, threading, time
        from functools import partial
        flight = ShardedFlight()
        function = int
        for depth in range(20_000):
            function = partial(flight.do, function, depth)
        def body():
            try:
                function()
            except RecursionError:
                print("refused", flush=True)
        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        while flight.in_flight():
            time.sleep(0.001)
        os._exit(0)  # to free such a chain takes a deep stack, too
    """
    assert run(code) == "refused\n"


def test_what_is_beside_its_place_comes_and_goes_while_others_look() -> None:
    """Free-threaded: what is read of a dict without the lock may be gone before it is held."""
    code = """
        import threading
        class Same:
            def __hash__(self):
                return 7
        flight = ShardedFlight(1)
        over = threading.Event()
        def look():
            key = Same()
            while not over.is_set():
                flight.forget(key)
        def change():
            def nested():
                flight.do(lambda: flight.do(int, Same()), Same())
            try:
                for _ in range(3000):
                    flight.do(nested, Same())
            finally:
                over.set()
        threads = [threading.Thread(target=f) for f in (look, look, change, change)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(flight.in_flight())
    """
    assert run(code) == "0\n"


class Never(Executor):
    """Runs nothing, and is dropped with what it was given."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> "Future[Any]":
        self.kept = fn
        return Future()


@pytest.mark.xfail(
    shardedflight.__compiled__,
    strict=True,
    reason="the garbage collector does not see the seats that a line of memory holds",
)
def test_a_flight_is_collected_with_an_execution_that_will_never_run() -> None:
    """Flight, seat and future hold each other, and nobody else holds any of them."""
    flight = ShardedFlight(executor=Never())
    future = flight.do_future(int, "k")
    gone = [weakref.ref(flight), weakref.ref(future)]
    del flight, future
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
