"""Section 8 of the contract: many keys in one call.

Both methods are asked through `Many`: `do_many` on a thread of its own, `do_many_async` on an
event loop and thread of its own.
"""

import asyncio
import gc
import random
import re
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from types import MappingProxyType
from typing import Any

import pytest
from support import PATIENCE, eventually, eventually_async, spawn, spawn_loop

from shardedflight import DeadlockError, FlightErrorGroup, FlightTimeout, ShardedFlight


class Lost(BaseException):
    """Loses the leader."""


class Rows:
    """The function of a call for many keys: remembers what it was asked for, waits, answers."""

    def __init__(
        self, end: Any = None, *, gate: threading.Event | None = None, tag: str = "row"
    ) -> None:
        self.end = end
        self.gate = gate
        self.tag = tag
        self.asked: list[list[Any]] = []
        self.started = threading.Event()

    def _begin(self, keys: list[Any]) -> None:
        assert type(keys) is list
        self.asked.append(list(keys))
        self.started.set()

    def _finish(self, keys: list[Any]) -> Any:
        if isinstance(self.end, BaseException):
            raise self.end
        if callable(self.end):
            return self.end(keys)
        return {key: f"{self.tag} {key}" for key in keys}

    def plain(self, keys: list[Any]) -> Any:
        self._begin(keys)
        if self.gate is not None:
            eventually(self.gate.is_set, "the gate")
        return self._finish(keys)

    async def coroutine(self, keys: list[Any]) -> Any:
        self._begin(keys)
        if self.gate is not None:
            await eventually_async(self.gate.is_set, "the gate")
        return self._finish(keys)


def ask_many(kind: str, flight: ShardedFlight, rows: Rows, keys: Iterable[Any]) -> "Future[Any]":
    """Starts one call for many keys; the future has what the caller got."""
    if kind == "do_many":
        return spawn(flight.do_many, rows.plain, keys)
    return spawn_loop(lambda: flight.do_many_async(rows.coroutine, keys))


def lead_many(kind: str, flight: ShardedFlight, rows: Rows, keys: Iterable[Any]) -> "Future[Any]":
    """As `ask_many`, and returns when the function runs."""
    caller = ask_many(kind, flight, rows, keys)
    assert rows.started.wait(PATIENCE)
    return caller


class One:
    """A caller of one key: its function waits for a gate and then returns or raises `end`."""

    def __init__(self, flight: ShardedFlight, key: Any, end: Any, *, held: bool = True) -> None:
        self.gate = threading.Event()
        self.started = threading.Event()
        self.end = end
        if not held:
            self.gate.set()
        self.caller = spawn(flight.do, self.function, key)

    def function(self) -> Any:
        self.started.set()
        eventually(self.gate.is_set, "the gate")
        if isinstance(self.end, BaseException):
            raise self.end
        return self.end


def leads(flight: ShardedFlight, key: Any, end: Any) -> One:
    """A caller whose function runs, until its gate is opened."""
    one = One(flight, key, end)
    assert one.started.wait(PATIENCE)
    return one


def follows(flight: ShardedFlight, key: Any, end: Any = "own") -> One:
    """A caller that waits as one more follower of the key."""
    waiting = flight.stats().waiting
    one = One(flight, key, end, held=False)
    eventually(lambda: flight.stats().waiting == waiting + 1, "one more follower")
    return one


def assert_clean(flight: ShardedFlight, *keys: Any) -> None:
    """Nothing is left of the keys: no execution, no follower, and the next calls run."""
    eventually(lambda: flight.in_flight() == 0, "nothing in flight")
    eventually(lambda: flight.stats().waiting == 0, "nobody waiting")
    for key in keys:
        again = spawn(flight.do, lambda: "again", key)
        assert again.result(PATIENCE) == ("again", False)


in_both_ways = pytest.mark.parametrize("kind", ["do_many", "do_many_async"])


# Here, "fn(list_of_the_rest) is called once for all others, not per shard, and returns a
# mapping."


@in_both_ways
@pytest.mark.parametrize("shards", [1, 64])
def test_the_function_is_called_once_for_all_keys(kind: str, shards: int) -> None:
    """Section 8: "called once for all others, not per shard", in the order they were given."""
    flight = ShardedFlight(shards)
    rows = Rows()
    keys = list(range(200, 0, -1))
    found = ask_many(kind, flight, rows, keys).result(PATIENCE)
    assert rows.asked == [keys]
    assert found == {key: (f"row {key}", False) for key in keys}
    assert_clean(flight, 1)


@in_both_ways
def test_the_answer_is_a_dict_of_value_and_shared(kind: str) -> None:
    """Section 8, and the names of the contract: `{key: (value, shared)}`."""
    flight = ShardedFlight()
    value = object()
    rows = Rows(lambda keys: dict.fromkeys(keys, value))
    found = ask_many(kind, flight, rows, ["a"]).result(PATIENCE)
    assert type(found) is dict
    assert type(found["a"]) is tuple
    assert found["a"][0] is value
    assert found["a"][1] is False


@in_both_ways
def test_any_mapping_will_do(kind: str) -> None:
    """Section 8: "returns a mapping", not only a dict."""
    flight = ShardedFlight()
    rows = Rows(lambda keys: MappingProxyType({key: key for key in keys}))
    found = ask_many(kind, flight, rows, ["a", "b"]).result(PATIENCE)
    assert found == {"a": ("a", False), "b": ("b", False)}


@in_both_ways
def test_no_keys_at_all_call_nothing(kind: str) -> None:
    """Section 8: nothing is left to call for when there are no keys."""
    flight = ShardedFlight()
    rows = Rows()
    assert ask_many(kind, flight, rows, []).result(PATIENCE) == {}
    assert rows.asked == []
    assert flight.stats().executions == 0


@in_both_ways
def test_a_generator_of_keys_is_read_once(kind: str) -> None:
    """Section 8: `keys` is any iterable."""
    flight = ShardedFlight()
    rows = Rows()
    found = ask_many(kind, flight, rows, (key for key in "abc")).result(PATIENCE)
    assert rows.asked == [["a", "b", "c"]]
    assert set(found) == {"a", "b", "c"}
    assert_clean(flight, "a")


@in_both_ways
def test_keys_that_raise_while_they_are_read_register_nothing(kind: str) -> None:
    """Section 1 for many keys: an error before the call begins leaves nothing behind."""
    flight = ShardedFlight()
    rows = Rows()

    def keys() -> Iterator[str]:
        yield "a"
        raise LookupError("no more keys")

    with pytest.raises(LookupError, match="no more keys"):
        ask_many(kind, flight, rows, keys()).result(PATIENCE)
    assert rows.asked == []
    assert_clean(flight, "a")


@in_both_ways
def test_a_value_may_be_none_or_false(kind: str) -> None:
    """Section 8: a key that the mapping has is in the answer, whatever its value."""
    flight = ShardedFlight()
    rows = Rows(lambda keys: dict(zip(keys, [None, 0, False], strict=True)))
    found = ask_many(kind, flight, rows, "abc").result(PATIENCE)
    assert found == {"a": (None, False), "b": (0, False), "c": (False, False)}


# "Duplicates in `keys` count once."


@in_both_ways
def test_duplicates_count_once(kind: str) -> None:
    """Section 8, sentence "Duplicates in `keys` count once", by equality of keys."""
    flight = ShardedFlight()
    rows = Rows()
    found = ask_many(kind, flight, rows, ["a", 1, "a", 1.0, True, "b", "a"]).result(PATIENCE)
    assert rows.asked == [["a", 1, "b"]]
    assert found == {"a": ("row a", False), 1: ("row 1", False), "b": ("row b", False)}
    assert flight.stats().executions == 3
    assert_clean(flight, "a")


@in_both_ways
def test_duplicates_of_a_joined_key_count_once(kind: str) -> None:
    """Section 8, sentence "Duplicates in `keys` count once", for joined keys too."""
    flight = ShardedFlight()
    one = leads(flight, "a", "joined")
    rows = Rows()
    caller = ask_many(kind, flight, rows, ["a", "a", "a"])
    eventually(lambda: flight.stats().waiting == 1)
    one.gate.set()
    assert caller.result(PATIENCE) == {"a": ("joined", True)}
    assert rows.asked == []
    assert flight.stats().shared == 1
    assert_clean(flight, "a")


# "keys already in flight are joined".


@in_both_ways
def test_keys_already_in_flight_are_joined(kind: str) -> None:
    """Section 8, sentence 1: joined keys are not asked for, and their values are shared."""
    flight = ShardedFlight()
    ones = [leads(flight, key, f"joined {key}") for key in "bd"]
    rows = Rows()
    caller = lead_many(kind, flight, rows, "abcde")
    assert rows.asked == [["a", "c", "e"]]
    for one in ones:
        one.gate.set()
    assert caller.result(PATIENCE) == {
        "a": ("row a", False),
        "b": ("joined b", True),
        "c": ("row c", False),
        "d": ("joined d", True),
        "e": ("row e", False),
    }
    assert [one.caller.result(PATIENCE) for one in ones] == [("joined b", True), ("joined d", True)]
    stats = flight.stats()
    assert (stats.executions, stats.shared) == (5, 2)
    assert_clean(flight, *"abcde")


@in_both_ways
def test_nothing_is_called_when_every_key_is_joined(kind: str) -> None:
    """Section 8, sentence 1: there is no rest to call the function for."""
    flight = ShardedFlight()
    ones = [leads(flight, key, key) for key in "ab"]
    rows = Rows()
    caller = ask_many(kind, flight, rows, "ab")
    eventually(lambda: flight.stats().waiting == 2)
    for one in ones:
        one.gate.set()
    assert caller.result(PATIENCE) == {"a": ("a", True), "b": ("b", True)}
    assert rows.asked == []
    assert_clean(flight, *"ab")


@in_both_ways
def test_the_answer_has_the_order_of_the_keys(kind: str) -> None:
    """Section 8: the answer reads like the question, whoever answered which key."""
    flight = ShardedFlight()
    one = leads(flight, "b", "joined")
    caller = lead_many(kind, flight, Rows(), ["c", "b", "a"])
    one.gate.set()
    assert list(caller.result(PATIENCE)) == ["c", "b", "a"]


@in_both_ways
def test_the_rest_is_called_while_the_joined_keys_are_still_running(kind: str) -> None:
    """Section 8, sentence 1: the call does not wait for joined keys before it runs its own."""
    flight = ShardedFlight()
    one = leads(flight, "a", "joined")
    caller = lead_many(kind, flight, Rows(), "ab")
    newcomer = spawn(flight.do, lambda: "newcomer", "b")
    assert newcomer.result(PATIENCE)[0] in {"newcomer", "row b"}
    assert not caller.done()
    one.gate.set()
    assert caller.result(PATIENCE)["a"] == ("joined", True)
    assert_clean(flight, *"ab")


@in_both_ways
@pytest.mark.parametrize("other", ["do_many", "do_many_async"])
def test_two_overlapping_calls_share_what_they_have_in_common(kind: str, other: str) -> None:
    """Section 8: a call for many keys joins another one for exactly the keys in common."""
    flight = ShardedFlight()
    gate = threading.Event()
    first_rows, second_rows = Rows(gate=gate, tag="first"), Rows(tag="second")
    first = lead_many(other, flight, first_rows, "abc")
    second = lead_many(kind, flight, second_rows, "bcd")
    gate.set()
    assert first.result(PATIENCE) == {
        "a": ("first a", False),
        "b": ("first b", True),
        "c": ("first c", True),
    }
    assert second.result(PATIENCE) == {
        "b": ("first b", True),
        "c": ("first c", True),
        "d": ("second d", False),
    }
    assert (first_rows.asked, second_rows.asked) == ([["a", "b", "c"]], [["d"]])
    assert_clean(flight, *"abcd")


# "Other callers of one of those keys join it."


@in_both_ways
def test_other_callers_join_single_keys_of_the_call(kind: str) -> None:
    """Section 8, sentence "Other callers of one of those keys join it", of every kind."""
    flight = ShardedFlight()
    gate = threading.Event()
    caller = lead_many(kind, flight, Rows(gate=gate), "abcd")

    async def own() -> str:
        return "own"

    thread = spawn(flight.do, lambda: "own", "a")
    task = spawn_loop(lambda: flight.do_async(own, "b"))
    future = flight.do_future(lambda: "own", "c")
    eventually(lambda: flight.stats().waiting == 3)
    assert flight.in_flight() == 4
    gate.set()
    assert thread.result(PATIENCE) == ("row a", True)
    assert task.result(PATIENCE) == ("row b", True)
    assert future.result(PATIENCE) == ("row c", True)
    assert caller.result(PATIENCE) == {
        "a": ("row a", True),
        "b": ("row b", True),
        "c": ("row c", True),
        "d": ("row d", False),
    }
    assert_clean(flight, *"abcd")


@in_both_ways
def test_a_key_of_many_is_the_key_of_one_part(kind: str) -> None:
    """Section 8 with 1: each of `keys` is one part, so a tuple among them is one part too."""
    flight = ShardedFlight()
    gate = threading.Event()
    caller = lead_many(kind, flight, Rows(gate=gate), [("a", "b")])
    joined = follows(flight, ("a", "b"))
    apart = spawn(flight.do, lambda: "apart", "a", "b")
    assert apart.result(PATIENCE) == ("apart", False)
    gate.set()
    assert joined.caller.result(PATIENCE) == ("row ('a', 'b')", True)
    assert caller.result(PATIENCE) == {("a", "b"): ("row ('a', 'b')", True)}


@in_both_ways
def test_build_key_is_applied_to_each_key(kind: str) -> None:
    """Section 1 for many keys: the hook makes the key, the caller keeps its own word for it."""
    flight = ShardedFlight(build_key=lambda *parts: tuple(map(str.lower, parts)))
    gate = threading.Event()
    rows = Rows(gate=gate)
    caller = lead_many(kind, flight, rows, ["A", "b"])
    joined = follows(flight, "a")
    gate.set()
    assert rows.asked == [["A", "b"]]
    assert caller.result(PATIENCE) == {"A": ("row A", True), "b": ("row b", False)}
    assert joined.caller.result(PATIENCE) == ("row A", True)
    assert_clean(flight, "A", "B")


@in_both_ways
def test_two_names_for_one_key_are_both_answered(kind: str) -> None:
    """Section 8: what the hook makes one key counts once, and the answer has what was asked."""
    flight = ShardedFlight(build_key=str.lower)
    rows = Rows()
    found = ask_many(kind, flight, rows, ["A", "b", "a"]).result(PATIENCE)
    assert rows.asked == [["A", "b"]]
    assert found == {"A": ("row A", False), "a": ("row A", False), "b": ("row b", False)}
    assert flight.stats().executions == 2
    assert_clean(flight, "A", "b")


@in_both_ways
def test_forget_drops_single_keys_of_the_call(kind: str) -> None:
    """Section 6 for many keys: the call serves its own, and newcomers start anew."""
    flight = ShardedFlight()
    gate = threading.Event()
    caller = lead_many(kind, flight, Rows(gate=gate), "ab")
    joined = follows(flight, "a")
    flight.forget("a")
    assert spawn(flight.do, lambda: "newer", "a").result(PATIENCE) == ("newer", False)
    gate.set()
    assert caller.result(PATIENCE) == {"a": ("row a", True), "b": ("row b", False)}
    assert joined.caller.result(PATIENCE) == ("row a", True)
    assert_clean(flight, *"ab")


# "A key that the mapping lacks is absent from the answer (its other callers get `KeyError`); keys
# that were not asked for are ignored."


@in_both_ways
def test_a_key_that_the_mapping_lacks_is_absent_and_a_key_error_for_others(kind: str) -> None:
    """Section 8, sentence "A key that the mapping lacks ...", for the call and for others."""
    flight = ShardedFlight()
    gate = threading.Event()
    caller = lead_many(kind, flight, Rows(lambda keys: {"b": "row b"}, gate=gate), "abc")
    thread = follows(flight, "a")

    async def own() -> str:
        return "own"

    task = spawn_loop(lambda: flight.do_async(own, "c"))
    future = flight.do_future(lambda: "own", "a")
    eventually(lambda: flight.stats().waiting == 3)
    gate.set()
    assert caller.result(PATIENCE) == {"b": ("row b", False)}
    for other, key in ((thread.caller, "a"), (task, "c"), (future, "a")):
        error = other.exception(PATIENCE)
        assert isinstance(error, KeyError)
        assert error.args == (key,)
    assert_clean(flight, *"abc")


@in_both_ways
@pytest.mark.parametrize("other", ["do_many", "do_many_async"])
def test_a_key_that_the_mapping_lacks_is_absent_for_every_call_for_many(
    kind: str, other: str
) -> None:
    """Section 8, sentence "A key that the mapping lacks ...": absent where it was joined too."""
    flight = ShardedFlight()
    gate = threading.Event()
    leading = lead_many(other, flight, Rows(lambda keys: {"b": "row b"}, gate=gate), "ab")
    joining = lead_many(kind, flight, Rows(tag="own"), "abc")
    gate.set()
    assert leading.result(PATIENCE) == {"b": ("row b", True)}
    assert joining.result(PATIENCE) == {"b": ("row b", True), "c": ("own c", False)}
    assert_clean(flight, *"abc")


@in_both_ways
def test_a_key_error_that_a_joined_function_raised_is_a_failure(kind: str) -> None:
    """Section 8: only the lack of a key means absent, not any `KeyError`."""
    flight = ShardedFlight()
    one = leads(flight, "a", KeyError("a"))
    caller = lead_many(kind, flight, Rows(), "ab")
    one.gate.set()
    error = caller.exception(PATIENCE)
    assert isinstance(error, FlightErrorGroup)
    assert type(error.failed["a"]) is KeyError
    assert error.found == {"b": ("row b", False)}
    assert_clean(flight, *"ab")


@in_both_ways
def test_a_key_that_was_missing_further_in_is_a_failure_further_out(kind: str) -> None:
    """Section 8: who asked for a missing key got a `KeyError`; that is how his own call fails."""
    flight = ShardedFlight()
    gate = threading.Event()
    lacking = lead_many("do_many", flight, Rows(lambda keys: {}, gate=gate), ["inner"])
    outer = spawn(flight.do, lambda: flight.do(lambda: "own", "inner"), "outer")
    eventually(lambda: flight.stats().waiting == 1)
    caller = lead_many(kind, flight, Rows(), ["outer", "a"])
    gate.set()
    assert lacking.result(PATIENCE) == {}
    assert isinstance(outer.exception(PATIENCE), KeyError)
    error = caller.exception(PATIENCE)
    assert isinstance(error, FlightErrorGroup)
    assert isinstance(error.failed["outer"], KeyError)
    assert error.found == {"a": ("row a", False)}
    assert_clean(flight, "inner", "outer", "a")


@in_both_ways
def test_keys_that_were_not_asked_for_are_ignored(kind: str) -> None:
    """Section 8, sentence "keys that were not asked for are ignored", hashable or in flight."""
    flight = ShardedFlight()
    one = leads(flight, "other", "its own")
    rows = Rows(lambda keys: {**dict.fromkeys(keys, "row"), "other": "row", "more": "row"})
    assert ask_many(kind, flight, rows, "ab").result(PATIENCE) == {
        "a": ("row", False),
        "b": ("row", False),
    }
    one.gate.set()
    assert one.caller.result(PATIENCE) == ("its own", False)
    assert_clean(flight, "a", "more", "other")


@in_both_ways
@pytest.mark.parametrize("answer", [None, ["row"], "row", {"a"}, 7, [("a", "row")]], ids=repr)
def test_a_function_that_returns_no_mapping_is_a_clear_type_error(kind: str, answer: Any) -> None:
    """Section 8: "returns a mapping", or a `TypeError` that says so and shows what came."""
    flight = ShardedFlight()
    with pytest.raises(TypeError, match=f"(?i)mapping.*{re.escape(repr(answer))}"):
        ask_many(kind, flight, Rows(lambda keys: answer), "ab").result(PATIENCE)
    assert_clean(flight, *"ab")


@in_both_ways
def test_followers_of_a_function_that_returns_no_mapping_have_an_end(kind: str) -> None:
    """Section 8 with 4: nobody hangs on the wrong sort of function, nor gets `None`."""
    flight = ShardedFlight()
    gate = threading.Event()
    caller = lead_many(kind, flight, Rows(lambda keys: None, gate=gate), "ab")
    follower = follows(flight, "a")
    gate.set()
    assert isinstance(caller.exception(PATIENCE), TypeError)
    error = follower.caller.exception(PATIENCE)
    assert isinstance(error, TypeError) or follower.caller.result() == ("own", False)
    assert_clean(flight, *"ab")


def test_a_coroutine_function_given_to_do_many_is_a_type_error() -> None:
    """Section 2 for many keys: the wrong sort of function says which method to use."""
    flight = ShardedFlight()

    async def coroutine(keys: list[str]) -> dict[str, str]:
        return dict.fromkeys(keys, "row")

    with pytest.raises(TypeError, match="do_many_async"):
        spawn(flight.do_many, coroutine, "ab").result(PATIENCE)
    assert_clean(flight, *"ab")


def test_a_plain_function_given_to_do_many_async_is_a_type_error() -> None:
    """Section 2 for many keys: the wrong sort of function says which method to use."""
    flight = ShardedFlight()
    function: Any = Rows().plain
    with pytest.raises(TypeError, match="do_many"):
        spawn_loop(lambda: flight.do_many_async(function, "ab")).result(PATIENCE)
    assert_clean(flight, *"ab")


# "If `fn` raises, every key it led fails with that error".


@in_both_ways
def test_an_error_of_the_function_is_raised_as_itself(kind: str) -> None:
    """Section 8, sentence "If `fn` raises ...": the call's own error, where nothing else failed."""
    flight = ShardedFlight()
    error = LookupError("no rows")
    raised = ask_many(kind, flight, Rows(error), "ab").exception(PATIENCE)
    assert raised is error
    assert_clean(flight, *"ab")


@in_both_ways
def test_an_error_of_the_function_reaches_the_callers_of_every_key_it_led(kind: str) -> None:
    """Section 8, sentence "If `fn` raises ...": "every key it led fails with that error"."""
    flight = ShardedFlight()
    gate = threading.Event()
    error = OSError(28, "no space", "a file")
    joined = leads(flight, "z", "joined")
    caller = lead_many(kind, flight, Rows(error, gate=gate), "abz")
    followers = [follows(flight, key) for key in "ab"]
    gate.set()
    joined.gate.set()
    for each in (caller, *(follower.caller for follower in followers)):
        raised = each.exception(PATIENCE)
        assert type(raised) is OSError
        assert (raised.errno, raised.filename) == (28, "a file")
    assert joined.caller.result(PATIENCE)[0] == "joined"
    assert flight.stats().errors == 2
    assert_clean(flight, *"abz")


# "if any joined key failed, an `ExceptionGroup` names each failed key, and the keys that succeeded
# are not lost (`.found` on the group)."


@in_both_ways
def test_joined_keys_that_failed_are_named_and_the_others_are_not_lost(kind: str) -> None:
    """Section 8, last sentence: the group has one exception per key, `.failed` and `.found`."""
    flight = ShardedFlight()
    errors = {"b": LookupError("b failed"), "d": ValueError("d failed")}
    ones = [leads(flight, key, error) for key, error in errors.items()]
    good = leads(flight, "e", "joined e")
    caller = lead_many(kind, flight, Rows(lambda keys: {"a": "row a"}), "abcde")
    for one in (*ones, good):
        one.gate.set()
    group = caller.exception(PATIENCE)
    assert isinstance(group, FlightErrorGroup)
    assert isinstance(group, ExceptionGroup)
    assert list(group.failed) == ["b", "d"]
    for key, error in errors.items():
        assert type(group.failed[key]) is type(error)
        assert group.failed[key].args == error.args
        assert repr(key) in str(group)
    assert len(group.exceptions) == 2
    assert {id(each) for each in group.exceptions} == {id(each) for each in group.failed.values()}
    assert group.found == {"a": ("row a", False), "e": ("joined e", True)}
    assert_clean(flight, *"abcde")


@in_both_ways
def test_the_group_names_the_functions_own_keys_too_when_both_failed(kind: str) -> None:
    """Section 8, last sentence: "names each failed key", with `fn` and a joined key failing."""
    flight = ShardedFlight()
    one = leads(flight, "b", LookupError("b failed"))
    good = leads(flight, "d", "joined d")
    caller = lead_many(kind, flight, Rows(ValueError("fn failed")), "abcd")
    one.gate.set()
    good.gate.set()
    group = caller.exception(PATIENCE)
    assert isinstance(group, FlightErrorGroup)
    assert {key: type(error) for key, error in group.failed.items()} == {
        "a": ValueError,
        "b": LookupError,
        "c": ValueError,
    }
    assert len(group.exceptions) == 3
    assert group.found == {"d": ("joined d", True)}
    assert_clean(flight, *"abcd")


@in_both_ways
def test_the_group_can_be_taken_apart(kind: str) -> None:
    """Section 8, last sentence: an `ExceptionGroup` like any other, for `except*` and `split`."""
    flight = ShardedFlight()
    ones = [leads(flight, "a", LookupError("a")), leads(flight, "b", ValueError("b"))]
    caller = lead_many(kind, flight, Rows(), "abc")
    for one in ones:
        one.gate.set()
    handled: list[str] = []
    try:
        caller.result(PATIENCE)
    except* LookupError as group:
        assert [error.args for error in group.exceptions] == [("a",)]
        handled.append("lookup")
    except* ValueError as group:
        assert [error.args for error in group.exceptions] == [("b",)]
        handled.append("value")
    assert handled == ["lookup", "value"]
    error = caller.exception()
    assert isinstance(error, FlightErrorGroup)
    match, rest = error.split(LookupError)
    assert match is not None
    assert rest is not None
    assert isinstance(match, ExceptionGroup)


@in_both_ways
def test_the_failure_of_one_joined_key_does_not_cut_the_wait_for_another_short(kind: str) -> None:
    """Section 8, last sentence: "the keys that succeeded are not lost", also the slow ones."""
    flight = ShardedFlight()
    bad, good = leads(flight, "a", LookupError()), leads(flight, "b", "slow")
    caller = lead_many(kind, flight, Rows(), "abc")
    bad.gate.set()
    assert isinstance(bad.caller.exception(PATIENCE), LookupError)
    eventually(lambda: flight.in_flight() == 1)
    assert not caller.done()
    good.gate.set()
    group = caller.exception(PATIENCE)
    assert isinstance(group, FlightErrorGroup)
    assert group.found == {"b": ("slow", True), "c": ("row c", False)}
    assert_clean(flight, *"abc")


# "No reference cycle keeps frames alive after the callers are done (checked with the collector
# switched off)", in section 3.


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Failed(Exception):
    """Can be weakly referenced, as built-in ones can not."""


@in_both_ways
@pytest.mark.parametrize("joined_fails", [False, True])
@pytest.mark.usefixtures("no_collector")
def test_an_error_for_many_keys_goes_when_it_is_dropped(kind: str, joined_fails: bool) -> None:
    """Section 3 for many keys: no cycle keeps the error, or the frames that it passed."""
    flight = ShardedFlight()
    ones = [leads(flight, "b", LookupError("b failed"))] if joined_fails else []
    opened: list[bool] = []

    def end(keys: list[str]) -> Any:
        for one in ones:
            one.gate.set()
        opened.append(True)
        raise Failed

    rows = Rows(end)
    gone: list[weakref.ref[BaseException]] = []

    def call() -> None:
        try:
            flight.do_many(rows.plain, "abc")
        except (Failed, FlightErrorGroup) as error:
            gone.append(weakref.ref(error))

    async def call_async() -> None:
        try:
            await flight.do_many_async(rows.coroutine, "abc")
        except (Failed, FlightErrorGroup) as error:
            gone.append(weakref.ref(error))
        await eventually_async(lambda: gone[0]() is None, "the error freed")

    if kind == "do_many":
        spawn(call).result(PATIENCE)
    else:
        spawn_loop(call_async).result(PATIENCE)
    assert opened
    eventually(lambda: gone[0]() is None, "the error freed")


# Section 4 for many keys.


@in_both_ways
@pytest.mark.parametrize("loss", [KeyboardInterrupt, asyncio.CancelledError, Lost])
def test_each_key_of_a_lost_call_is_handed_over_by_itself(
    kind: str, loss: type[BaseException]
) -> None:
    """Section 4 for many keys: per key, one follower runs its own function."""
    flight = ShardedFlight()
    gate = threading.Event()
    caller = lead_many(kind, flight, Rows(loss(), gate=gate), "abcd")
    thread = follows(flight, "a", "own a")
    others = [follows(flight, "b", f"own b{n}") for n in range(2)]

    async def own() -> str:
        return "own c"

    task = spawn_loop(lambda: flight.do_async(own, "c"))
    eventually(lambda: flight.stats().waiting == 4)
    gate.set()
    assert isinstance(caller.exception(PATIENCE), loss)
    assert thread.caller.result(PATIENCE) == ("own a", False)
    answers = {other.caller.result(PATIENCE) for other in others}
    assert len(answers) == 1
    assert answers < {("own b0", True), ("own b1", True)}
    assert task.result(PATIENCE) == ("own c", False)
    assert flight.stats().promotions == 3
    assert_clean(flight, *"abcd")


@in_both_ways
def test_a_call_for_many_takes_over_exactly_the_lost_key(kind: str) -> None:
    """Section 4 for many keys: it runs its own function for the key it took over, at once."""
    flight = ShardedFlight()
    lost, slow = leads(flight, "a", Lost()), leads(flight, "b", "slow")
    rows = Rows(tag="own")
    caller = lead_many(kind, flight, rows, "abc")
    eventually(lambda: flight.in_flight() == 2, "its own key has ended")
    lost.gate.set()
    eventually(lambda: len(rows.asked) == 2, "the function runs for the key it took over")
    assert rows.asked == [["c"], ["a"]]
    assert not caller.done()
    assert slow.caller.running() is False
    # The newcomer may still find it running, and join.
    newcomer, joined = spawn(flight.do, lambda: "newcomer", "a").result(PATIENCE)
    assert (newcomer, joined) in {("own a", True), ("newcomer", False)}
    slow.gate.set()
    assert caller.result(PATIENCE) == {
        "a": ("own a", joined),
        "b": ("slow", True),
        "c": ("own c", False),
    }
    assert_clean(flight, *"abc")


@in_both_ways
def test_followers_of_a_key_that_a_call_for_many_took_over_do_not_wait_for_its_others(
    kind: str,
) -> None:
    """Section 4 for many keys: the promoted key is answered while another joined key runs."""
    flight = ShardedFlight()
    lost, slow = leads(flight, "a", Lost()), leads(flight, "b", "slow")
    rows = Rows(tag="own")
    caller = ask_many(kind, flight, rows, "ab")
    eventually(lambda: flight.stats().waiting == 2)
    follower = spawn(flight.do, lambda: "follower's", "a")
    eventually(lambda: flight.stats().waiting == 3)
    lost.gate.set()
    answer, shared = follower.result(PATIENCE)
    assert not caller.done()
    slow.gate.set()
    found = caller.result(PATIENCE)
    assert found == {"a": (answer, shared), "b": ("slow", True)}
    assert shared is True
    assert rows.asked == ([["a"]] if answer == "own a" else [])
    assert_clean(flight, *"ab")


@in_both_ways
@pytest.mark.parametrize("other", ["do_many", "do_many_async"])
def test_a_call_for_many_takes_over_from_another(kind: str, other: str) -> None:
    """Section 4 for many keys: all the keys in common are lost at once, and all are answered."""
    flight = ShardedFlight()
    gate = threading.Event()
    leading = lead_many(other, flight, Rows(Lost(), gate=gate), "abc")
    rows = Rows(tag="own")
    following = lead_many(kind, flight, rows, "bcd")
    follower = follows(flight, "a", "own")
    gate.set()
    assert isinstance(leading.exception(PATIENCE), Lost)
    assert following.result(PATIENCE) == {key: (f"own {key}", False) for key in "bcd"}
    assert follower.caller.result(PATIENCE) == ("own", False)
    asked = [key for keys in rows.asked for key in keys]
    assert asked[0] == "d"
    assert sorted(asked[1:]) == ["b", "c"]
    assert flight.stats().promotions == 3
    assert_clean(flight, *"abcd")


@in_both_ways
def test_a_call_for_many_that_took_over_fails_for_that_key(kind: str) -> None:
    """Section 8 with 4: an error of its own function, in the second run, keeps what was found."""
    flight = ShardedFlight()
    lost = leads(flight, "a", Lost())
    good = leads(flight, "b", "joined b")

    def end(keys: list[str]) -> dict[str, str]:
        if keys == ["a"]:
            raise LookupError("for a")
        return dict.fromkeys(keys, "row")

    rows = Rows(end)
    caller = lead_many(kind, flight, rows, "abc")
    eventually(lambda: flight.in_flight() == 2)
    lost.gate.set()
    eventually(lambda: len(rows.asked) == 2)
    good.gate.set()
    error = caller.exception(PATIENCE)
    if isinstance(error, FlightErrorGroup):
        assert list(error.failed) == ["a"]
        assert error.found == {"b": ("joined b", True), "c": ("row", False)}
        error = error.failed["a"]
    assert isinstance(error, LookupError)
    assert_clean(flight, *"abc")


@in_both_ways
def test_a_call_for_many_that_took_over_is_lost_in_turn(kind: str) -> None:
    """Section 4 for many keys: the second loss hands over again, and its other keys are free."""
    flight = ShardedFlight()
    lost = leads(flight, "a", Lost())
    slow = leads(flight, "b", "slow")

    def end(keys: list[str]) -> dict[str, str]:
        if keys == ["a"]:
            eventually(lambda: flight.stats().waiting >= 1 and follower.is_set())
            raise Lost
        return dict.fromkeys(keys, "row")

    follower = threading.Event()
    rows = Rows(end)
    caller = lead_many(kind, flight, rows, "abc")
    eventually(lambda: flight.in_flight() == 2)
    lost.gate.set()
    eventually(lambda: len(rows.asked) == 2)
    waiting = flight.stats().waiting
    last = spawn(flight.do, lambda: "last", "a")
    eventually(lambda: flight.stats().waiting == waiting + 1)
    follower.set()
    assert last.result(PATIENCE) == ("last", False)
    slow.gate.set()
    assert isinstance(caller.exception(PATIENCE), Lost)
    assert slow.caller.result(PATIENCE)[0] == "slow"
    assert_clean(flight, *"abc")


async def for_ever(keys: Any = None) -> Any:
    await asyncio.Event().wait()


def closed_under(flight: ShardedFlight, keys: str, waiting: int) -> "asyncio.Task[Any]":
    """A call for many keys that went with its loop, which nobody told; its task."""
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda loop, context: None)
    task = loop.create_task(flight.do_many_async(for_ever, keys))
    begun = eventually_async(
        lambda: flight.in_flight() == len(keys) and flight.stats().waiting == waiting
    )
    loop.run_until_complete(begun)
    loop.close()
    return task


@pytest.mark.parametrize("other", ["do_many", "do_many_async"])
def test_each_key_is_handed_over_when_the_loop_is_closed(other: str) -> None:
    """Section 4 for many keys: "a loop closed under its task"."""
    flight = ShardedFlight()
    task = closed_under(flight, "ab", 0)
    rows = Rows(tag="own")
    found = ask_many(other, flight, rows, "ab").result(PATIENCE)
    assert {key: value for key, (value, _) in found.items()} == {"a": "own a", "b": "own b"}
    assert not task.done()
    assert_clean(flight, *"ab")


def test_a_call_for_many_on_a_closed_loop_is_passed_over() -> None:
    """Section 4 for many keys: on a closed loop nobody is "still waiting"."""
    flight = ShardedFlight()
    lost = leads(flight, "a", Lost())
    task = closed_under(flight, "a", 1)
    follower = follows(flight, "a")
    lost.gate.set()
    assert isinstance(lost.caller.exception(PATIENCE), Lost)
    assert follower.caller.result(PATIENCE)[0] == "own"
    assert not task.done()
    assert_clean(flight, "a")


# Section 5 for many keys.


def test_a_cancelled_call_leaves_the_keys_it_follows() -> None:
    """Section 5 for many keys: the caller alone leaves, and is not promoted afterwards."""
    flight = ShardedFlight()
    ones = [leads(flight, "a", Lost()), leads(flight, "b", "b")]
    rows = Rows()

    async def main() -> None:
        task = asyncio.create_task(flight.do_many_async(rows.coroutine, "abc"))
        await eventually_async(lambda: rows.started.is_set() and flight.in_flight() == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    spawn_loop(main).result(PATIENCE)
    eventually(lambda: flight.stats().waiting == 0)
    for one in ones:
        one.gate.set()
    assert isinstance(ones[0].caller.exception(PATIENCE), Lost)
    assert ones[1].caller.result(PATIENCE) == ("b", False)
    assert rows.asked == [["c"]]
    assert_clean(flight, *"abc")


@pytest.mark.parametrize("on_abandon", ["cancel", "finish"])
def test_a_cancelled_call_goes_on_for_the_keys_that_have_followers(on_abandon: Any) -> None:
    """Section 5 for many keys: the execution works on while anybody waits for one of its keys."""
    flight = ShardedFlight(on_abandon=on_abandon)
    gate = threading.Event()
    rows = Rows(gate=gate)

    async def main() -> None:
        task = asyncio.create_task(flight.do_many_async(rows.coroutine, "abc"))
        await eventually_async(lambda: flight.stats().waiting == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        left.set()
        await eventually_async(lambda: flight.in_flight() == 0)

    left = threading.Event()
    loop = spawn_loop(main)
    assert rows.started.wait(PATIENCE)
    followers = [follows(flight, key) for key in "ab"]
    assert left.wait(PATIENCE)
    newcomer = spawn(flight.do, lambda: "newcomer", "c")
    gate.set()
    for follower, key in zip(followers, "ab", strict=True):
        assert follower.caller.result(PATIENCE)[0] == f"row {key}"
    assert newcomer.result(PATIENCE)[0] in {"newcomer", "row c"}
    loop.result(PATIENCE)
    assert rows.asked == [["a", "b", "c"]]
    assert_clean(flight, *"abc")


def test_a_call_whose_every_caller_has_left_is_cancelled() -> None:
    """Section 5 for many keys: the last departure unlinks the keys, then cancels the task."""
    flight = ShardedFlight()
    cancelled: list[bool] = []
    started = threading.Event()

    async def rows(keys: list[str]) -> dict[str, str]:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return {}

    async def main() -> None:
        task = asyncio.create_task(flight.do_many_async(rows, "ab"))
        await eventually_async(started.is_set)

        async def own() -> str:
            return "own"

        follower = asyncio.create_task(flight.do_async(own, "a"))
        await eventually_async(lambda: flight.stats().waiting == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not cancelled
        follower.cancel()
        with pytest.raises(asyncio.CancelledError):
            await follower
        newer = await asyncio.gather(*(flight.do_async(own, key) for key in "ab"))
        assert newer == [("own", False)] * 2
        await eventually_async(lambda: bool(cancelled))

    spawn_loop(main).result(PATIENCE)
    assert_clean(flight, *"ab")


def test_a_cancelled_call_whose_keys_nobody_else_wants_is_cancelled() -> None:
    """Section 5 for many keys: the only caller leaves."""
    flight = ShardedFlight()
    cancelled = threading.Event()
    started = threading.Event()

    async def rows(keys: list[str]) -> dict[str, str]:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return {}

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as scope:
                task = flight.do_many_async(rows, "ab")
                asyncio.get_running_loop().call_later(0.01, scope.reschedule, 0)
                await task
        await eventually_async(cancelled.is_set)

    spawn_loop(main).result(PATIENCE)
    assert started.is_set()
    assert_clean(flight, *"ab")


# Section 1 and 7 for many keys.


@in_both_ways
def test_an_unhashable_key_registers_nothing(kind: str) -> None:
    """Section 1 for many keys: the caller gets the error, "nothing is registered"."""
    flight = ShardedFlight()
    rows = Rows()
    keys: list[Any] = ["a", "b", [], "c"]
    with pytest.raises(TypeError, match="unhashable"):
        ask_many(kind, flight, rows, keys).result(PATIENCE)
    assert rows.asked == []
    assert flight.stats().executions == 0
    assert_clean(flight, *"abc")


@in_both_ways
def test_a_key_whose_hook_fails_registers_nothing_and_leaves_joined_keys(kind: str) -> None:
    """Section 1 for many keys: "either hook raising", after other keys were looked at."""

    def hook(key: str) -> int:
        if key == "bad":
            raise LookupError("bad key")
        return hash(key)

    flight = ShardedFlight(8, hash=hook)
    one = leads(flight, "a", "a")
    rows = Rows()
    with pytest.raises(LookupError, match="bad key"):
        ask_many(kind, flight, rows, ["a", "b", "bad", "c"]).result(PATIENCE)
    assert rows.asked == []
    assert flight.stats().waiting == 0
    assert flight.in_flight() == 1
    one.gate.set()
    assert one.caller.result(PATIENCE) == ("a", False)
    assert_clean(flight, *"abc")


@in_both_ways
def test_a_function_that_asks_for_a_key_of_its_own_call_is_a_deadlock(kind: str) -> None:
    """Section 7 for many keys: any of the keys it leads."""
    flight = ShardedFlight()
    if kind == "do_many":
        caller = spawn(flight.do_many, lambda _: flight.do(lambda: 1, "b"), "abc")
    else:

        async def one() -> int:
            return 1

        async def rows(_: list[str]) -> Any:
            return await flight.do_async(one, "b")

        caller = spawn_loop(lambda: flight.do_many_async(rows, "abc"))
    error = caller.exception(PATIENCE)
    assert isinstance(error, DeadlockError)
    assert error.keys == ("b", "b")
    assert_clean(flight, *"abc")


@in_both_ways
def test_two_calls_with_the_same_keys_in_opposite_orders_are_no_deadlock(kind: str) -> None:
    """Section 7 for many keys: each runs its own keys before it waits for the other's."""
    flight = ShardedFlight()
    start = threading.Barrier(2)

    def keys(given: str) -> Iterator[str]:
        start.wait(PATIENCE)
        yield from given

    for _ in range(50):
        callers = [ask_many(kind, flight, Rows(), keys(given)) for given in ("abcd", "dcba")]
        for caller in callers:
            found = caller.result(PATIENCE)
            assert {key: value for key, (value, _) in found.items()} == {
                key: f"row {key}" for key in "abcd"
            }
    assert flight.stats().deadlocks == 0
    assert_clean(flight, *"abcd")


@pytest.fixture
def busy_switching() -> Iterator[None]:
    """Threads change places often, so that few calls make many overlaps."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("busy_switching")
def test_overlapping_calls_never_deadlock_and_never_lose_a_key(seed: int) -> None:
    """Section 8 for random subsets: many calls for many keys, and calls for one, at once."""
    flight = ShardedFlight(4)
    start = threading.Barrier(6)

    def check(found: Mapping[str, tuple[str, bool]], wanted: Iterable[str]) -> None:
        assert {key: value for key, (value, _) in found.items()} == {
            key: f"row {key}" for key in wanted
        }

    def subsets(seed: int, count: int) -> Iterator[list[str]]:
        chance = random.Random(seed)
        for _ in range(count):
            yield chance.sample("abcdefgh", chance.randrange(1, 8))

    def plain(keys: list[str]) -> dict[str, str]:
        return {key: f"row {key}" for key in keys}

    async def coroutine(keys: list[str]) -> dict[str, str]:
        await asyncio.sleep(0)
        return plain(keys)

    def by_thread(seed: int) -> None:
        start.wait(PATIENCE)
        for wanted in subsets(seed, 150):
            check(flight.do_many(plain, wanted), wanted)

    def one_by_one(seed: int) -> None:
        start.wait(PATIENCE)
        for wanted in subsets(seed, 100):
            for key in wanted:
                assert flight.do(lambda key=key: f"row {key}", key)[0] == f"row {key}"

    async def by_tasks(seed: int) -> None:
        start.wait(PATIENCE)

        async def one(wanted: list[str]) -> None:
            check(await flight.do_many_async(coroutine, wanted), wanted)

        for _ in range(10):
            seed += 100
            await asyncio.gather(*(one(wanted) for wanted in subsets(seed, 10)))

    callers = [spawn(by_thread, seed * 10 + n) for n in range(3)]
    callers.append(spawn(one_by_one, seed * 10 + 3))
    callers += [spawn_loop(lambda n=n: by_tasks(seed * 10 + n)) for n in (4, 5)]
    for caller in callers:
        caller.result(PATIENCE)
    stats = flight.stats()
    assert (stats.deadlocks, stats.errors, stats.promotions) == (0, 0, 0)
    assert stats.shared > 0, "no call has joined: the test shows nothing"
    assert_clean(flight, *"abcdefgh")


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.usefixtures("busy_switching")
def test_overlapping_calls_with_losses_and_errors_answer_every_key(seed: int) -> None:
    """Section 8 with 4: whatever is lost or fails, each call accounts for each of its keys."""
    flight = ShardedFlight(4)
    start = threading.Barrier(4)

    def by_thread(seed: int) -> None:
        chance = random.Random(seed)

        def rows(keys: list[str]) -> dict[str, str]:
            fate = chance.random()
            if fate < 0.15:
                raise Lost
            if fate < 0.3:
                raise LookupError
            return {key: f"row {key}" for key in keys}

        start.wait(PATIENCE)
        for _ in range(150):
            wanted = chance.sample("abcdef", chance.randrange(1, 6))
            try:
                found = flight.do_many(rows, wanted)
            except Lost:
                continue
            except FlightErrorGroup as group:
                assert set(group.failed) | set(group.found) == set(wanted)
                assert not set(group.failed) & set(group.found)
                assert all(isinstance(error, LookupError) for error in group.exceptions)
            except LookupError:
                continue
            else:
                assert list(found) == wanted
                assert all(value == f"row {key}" for key, (value, _) in found.items())

    callers = [spawn(by_thread, seed * 10 + n) for n in range(4)]
    for caller in callers:
        caller.result(PATIENCE)
    assert flight.stats().deadlocks == 0
    assert_clean(flight, *"abcdef")


class Veiled(Exception):
    """Answers for its own traceback."""

    @property
    def __traceback__(self) -> Any:  # type: ignore[override]
        raise ZeroDivisionError


class Unprintable:
    """A key."""

    def __repr__(self) -> str:
        raise ZeroDivisionError


@in_both_ways
def test_an_error_that_answers_for_its_own_traceback(kind: str) -> None:
    """Section 3 for many keys: "as itself", for those who joined as well."""
    flight = ShardedFlight()
    gate = threading.Event()
    leader = lead_many(kind, flight, Rows(Veiled("mine"), gate=gate), "a")
    follower = follows(flight, "a")
    gate.set()
    assert type(leader.exception(PATIENCE)) is Veiled
    assert type(follower.caller.exception(PATIENCE)) is Veiled
    assert_clean(flight, "a")


def test_failed_keys_whose_repr_raises() -> None:
    """Section 8: "Names each failed key; has `.found`", and 5: a timeout is one."""
    flight = ShardedFlight()
    key = Unprintable()
    joined = leads(flight, key, LookupError("lost row"))
    with pytest.raises(FlightTimeout, match="Unprintable whose repr raises"):
        flight.do(lambda: None, key, timeout=0)
    caller = spawn(flight.do_many, lambda keys: dict.fromkeys(keys, "row"), [key, "b"])
    eventually(lambda: flight.stats().waiting == 1)
    joined.gate.set()
    error = caller.exception(PATIENCE)
    assert isinstance(error, FlightErrorGroup)
    assert error.found == {"b": ("row", False)}
    assert [*error.failed] == [key]
