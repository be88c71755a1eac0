"""Contract, section 3: errors."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import gc
import io
import json
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import traceback
import types
import urllib.error
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError
from support import PATIENCE, eventually, eventually_async, spawn, spawn_loop
from test_leading import KINDS, Work, each_follower, each_leader, never, never_async, waiting

from shardedflight import FlightErrorGroup, ShardedFlight

# --- callers that catch in a frame of a known name ---


def follow_by_thread(flight: ShardedFlight, *key: Any) -> "Future[Any]":
    def waits_here() -> BaseException:
        try:
            flight.do(never, *key)
        except Exception as error:
            return error
        raise AssertionError("no error")

    return spawn(waits_here)


def follow_by_task(flight: ShardedFlight, *key: Any) -> "Future[Any]":
    async def waits_here() -> BaseException:
        try:
            await flight.do_async(never_async, *key)
        except Exception as error:
            return error
        raise AssertionError("no error")

    return spawn_loop(waits_here)


def follow_by_future(flight: ShardedFlight, *key: Any) -> "Future[Any]":
    future = flight.do_future(never, *key)

    def waits_here() -> BaseException:
        try:
            future.result(PATIENCE)
        except Exception as error:
            return error
        raise AssertionError("no error")

    return spawn(waits_here)


#: Each joins an execution of the key and gives a future of the exception that it caught.
FOLLOW: dict[str, Callable[..., "Future[Any]"]] = {
    "thread": follow_by_thread,
    "task": follow_by_task,
    "future": follow_by_future,
}


def frames(error: BaseException) -> list[str]:
    """The names of the functions in the traceback, the catching one first."""
    return [frame.name for frame in traceback.extract_tb(error.__traceback__)]


def fail(leader: str, error: BaseException, followers: Sequence[str]) -> list[BaseException]:
    """One execution that fails with `error`: what its leader and its followers caught."""
    flight = ShardedFlight()
    work = Work(error=error)
    led = KINDS[leader](flight, work, "k")
    assert work.running.wait(PATIENCE)
    followed = []
    for count, follower in enumerate(followers, 1):
        followed.append(FOLLOW[follower](flight, "k"))
        eventually(waiting(flight, count))
    work.go.set()
    caught = led.exception(PATIENCE)
    assert caught is not None
    errors = [caught, *(outcome.result(PATIENCE) for outcome in followed)]
    assert flight.in_flight() == 0
    assert flight.stats().waiting == 0
    return errors


MISSING = object()
#: What an exception has for being caught, rather than for what it says.
OF_THE_CATCHER = {"__dict__", "__weakref__", "__traceback__", "__context__", "__cause__"}


def state(error: BaseException | None) -> Any:
    """All that an exception says: its type, arguments, attributes, C state, cause and context."""
    if error is None:
        return None
    found: dict[str, Any] = {
        "type": type(error),
        "args": error.args,
        "attributes": dict(BaseException.__dict__["__dict__"].__get__(error)),
        "cause": state(error.__cause__),
        "context": state(error.__context__),
    }
    if type(error).__module__ == "builtins":  # others may have code of their own to say it
        found["text"] = str(error)
    notes = found["attributes"].get("__notes__")
    if type(notes) is list:
        found["attributes"]["__notes__"] = notes.copy()
    for kind in type(error).__mro__:
        for name, member in vars(kind).items():
            slot = isinstance(member, types.MemberDescriptorType | types.GetSetDescriptorType)
            if slot and name not in OF_THE_CATCHER:
                try:
                    found[f"{kind.__name__}.{name}"] = member.__get__(error)
                except AttributeError:
                    found[f"{kind.__name__}.{name}"] = MISSING
    if isinstance(error, BaseExceptionGroup):
        members = [state(member) for member in error.exceptions]
        found["BaseExceptionGroup.exceptions"] = members
        found["args"] = (error.message, members)
        found["attributes"].pop("_exceptions", None)
    return found


# --- "reaches every caller as itself" ---


class Plain(Exception):
    pass


@each_leader
@each_follower
def test_an_exception_reaches_every_caller_as_itself(leader: str, follower: str) -> None:
    """3: "An `Exception` ... reaches every caller as itself: same type, arguments and attributes,
    not wrapped"; each combination of a leader's kind and a follower's kind."""
    error = Plain("message", 7, None)
    error.code = 42  # type: ignore[attr-defined]
    error.add_note("a note of the function's own")
    before = state(error)
    led, followed = fail(leader, error, [follower])
    assert state(led) == before
    assert state(followed) == before
    assert followed.__cause__ is None
    assert followed.__context__ is None


def test_the_leader_catches_the_very_exception() -> None:
    """3: "as itself": the leader's own is the object that its function raised, as in a call."""
    error = Plain("message")
    led, _ = fail("thread", error, ["thread"])
    assert led is error
    led, _ = fail("future", error, ["thread"])
    assert led is error
    led, _ = fail("task", error, ["thread"])
    assert led is error


@each_leader
@each_follower
def test_cause_and_context_arrive(leader: str, follower: str) -> None:
    """3: "as itself ... attributes": what the function raised its error from is part of it."""
    flight = ShardedFlight()

    def chained() -> Any:
        try:
            raise KeyError("inner")
        except KeyError as inner:
            raise Plain("outer") from inner

    def unchained() -> Any:
        try:
            raise KeyError("inner")
        except KeyError:
            raise Plain("outer")  # noqa: B904 (the context is what is tested)

    def silenced() -> Any:
        try:
            raise KeyError("inner")
        except KeyError:
            raise Plain("outer") from None

    ways = ((chained, True, True), (unchained, False, False), (silenced, False, True))
    for end, cause, suppressed in ways:
        work = Work()
        work.end = end
        led = KINDS[leader](flight, work, "k")
        assert work.running.wait(PATIENCE)
        outcome = FOLLOW[follower](flight, "k")
        eventually(waiting(flight, 1))
        work.go.set()
        for error in (led.exception(PATIENCE), outcome.result(PATIENCE)):
            assert type(error) is Plain
            assert type(error.__context__) is KeyError
            assert error.__context__.args == ("inner",)
            assert (error.__cause__ is not None) is cause
            if cause:
                assert type(error.__cause__) is KeyError
            assert error.__suppress_context__ is suppressed


# --- tracebacks ---


def failing_function() -> Any:
    raise Plain("of the function")


@each_leader
@each_follower
def test_a_traceback_shows_both_ends(leader: str, follower: str) -> None:
    """3: "A follower's traceback shows where the leader failed and where the follower waited"."""
    flight = ShardedFlight()
    work = Work()
    work.end = failing_function
    led = KINDS[leader](flight, work, "k")
    assert work.running.wait(PATIENCE)
    outcome = FOLLOW[follower](flight, "k")
    eventually(waiting(flight, 1))
    work.go.set()
    followed = outcome.result(PATIENCE)
    names = frames(followed)
    assert names[0] == "waits_here"
    assert names[-1] == "failing_function"
    assert names.count("waits_here") == names.count("failing_function") == 1
    text = "".join(traceback.format_exception(followed))
    assert 'raise Plain("of the function")' in text
    assert text.rstrip().endswith("Plain: of the function")
    error = led.exception(PATIENCE)
    assert error is not None
    assert frames(error)[-1] == "failing_function"
    assert "waits_here" not in frames(error)


@each_leader
def test_a_future_that_is_only_asked_for_its_exception(leader: str) -> None:
    """3: "shows where the leader failed": before anybody raised it, too."""
    flight = ShardedFlight()
    work = Work()
    work.end = failing_function
    led = KINDS[leader](flight, work, "k")
    assert work.running.wait(PATIENCE)
    futures = [flight.do_future(never, "k") for _ in range(3)]
    work.go.set()
    errors = [future.exception(PATIENCE) for future in futures]
    assert led.exception(PATIENCE) is not None
    for error in errors:
        assert type(error) is Plain
        assert frames(error)[-1] == "failing_function"
    assert len({id(error) for error in errors}) == 3


def test_a_thousand_coroutines_catch_one_failure() -> None:
    """3: "as short for the thousandth follower as for the first", and nobody's grows."""
    flight = ShardedFlight()
    work = Work()
    work.end = failing_function

    async def waits_here(function: Callable[[], Any]) -> BaseException:
        try:
            await flight.do_async(function, "k")
        except Plain as error:
            return error
        raise AssertionError("no error")

    async def main(followers: int) -> list[BaseException]:
        work.go.clear()
        calls = [waits_here(work.awaited)] + [waits_here(never_async) for _ in range(followers)]
        tasks = [asyncio.create_task(call) for call in calls]
        await eventually_async(waiting(flight, followers))
        work.go.set()
        return await asyncio.gather(*tasks)

    leader_alone = asyncio.run(main(0))[0]
    leader, *followers = asyncio.run(main(1000))
    assert frames(leader) == frames(leader_alone)
    shape = frames(followers[0])
    assert shape[0] == "waits_here"
    assert shape[-1] == "failing_function"
    assert len(shape) <= 12
    assert all(frames(error) == shape for error in followers)


@pytest.mark.parametrize("leader", ["thread", "future", "task"])
def test_many_threads_and_futures_catch_one_failure(leader: str) -> None:
    """3: as above for a hundred threads and a thousand futures, whoever leads."""

    def shapes(threads: int, futures: int) -> tuple[list[str], set[str], set[str]]:
        flight = ShardedFlight()
        work = Work()
        work.end = failing_function
        led = KINDS[leader](flight, work, "k")
        assert work.running.wait(PATIENCE)
        by_thread = [follow_by_thread(flight, "k") for _ in range(threads)]
        by_future = [flight.do_future(never, "k") for _ in range(futures)]
        eventually(waiting(flight, threads + futures))
        work.go.set()
        error = led.exception(PATIENCE)
        assert error is not None
        in_threads = {" ".join(frames(outcome.result(PATIENCE))) for outcome in by_thread}
        in_futures = set()
        for future in by_future:
            caught = future.exception(PATIENCE)
            assert caught is not None
            in_futures.add(" ".join(frames(caught)))
        return frames(error), in_threads, in_futures

    alone, _, _ = shapes(0, 0)
    led, in_threads, in_futures = shapes(100, 1000)
    assert led == alone
    assert len(in_threads) == len(in_futures) == 1
    for names in (*in_threads, *in_futures):
        assert names.split()[-1] == "failing_function"
        assert len(names.split()) <= 12


@each_leader
def test_a_leaders_traceback_does_not_depend_on_its_followers(leader: str) -> None:
    """3: "Nobody's `__traceback__` ... grow because others caught the same failure"."""
    alone = fail(leader, Plain("alone"), [])[0]
    followed = fail(leader, Plain("followed"), ["thread", "task", "future"] * 3)[0]
    assert frames(followed) == frames(alone)
    assert frames(followed)[-1] == "end"


@each_follower
def test_followers_may_raise_theirs_again_and_again(follower: str) -> None:
    """3: what a follower does with its exception shows in no other's."""
    errors = fail("thread", Plain("message"), [follower] * 3)
    before = [frames(error) for error in errors]
    for _ in range(50):
        try:
            try:
                raise LookupError("in between")
            except LookupError:
                raise errors[1]  # noqa: B904 (the context is what is tested)
        except Plain:
            pass
    assert len(frames(errors[1])) >= 50
    assert frames(errors[0]) == before[0]
    assert frames(errors[2]) == before[2]
    assert frames(errors[3]) == before[3]
    assert type(errors[1].__context__) is LookupError
    assert errors[0].__context__ is errors[2].__context__ is errors[3].__context__ is None


# --- notes, context, cause: nobody sees the marks of others ---


def mark(error: BaseException, name: str) -> None:
    """What a caller may do to an exception that it caught, and that is its own business."""
    error.add_note(f"note of {name}")
    error.mark = name  # type: ignore[attr-defined]
    error.args = (*error.args, name)
    error.__context__ = LookupError(f"context of {name}")
    error.__cause__ = LookupError(f"cause of {name}")
    error.__traceback__ = None


@each_leader
@each_follower
def test_marks_of_one_are_not_seen_by_others(leader: str, follower: str) -> None:
    """3: "Nobody's `__traceback__`, `__context__` or notes grow": each marks its own."""
    error = Plain("message")
    error.add_note("of the function")
    before = state(error)
    errors = fail(leader, error, [follower, follower, follower])
    assert len({id(error) for error in errors}) == 4
    for number, error in enumerate(errors):
        shape = frames(error)
        for other in errors[number:]:
            assert state(other) == before
        mark(error, str(number))
        assert error.__notes__ == ["of the function", f"note of {number}"]
        assert shape
        for other in errors[number + 1 :]:
            assert frames(other)[-1] == "end"


def test_what_the_leader_adds_before_a_follower_wakes_is_not_seen() -> None:
    """3: as above, when the follower's loop is held up until the leader has marked its own."""
    flight = ShardedFlight()
    error = Plain("message")
    error.add_note("of the function")
    before = state(error)
    work = Work(error=error)
    joined, marked = threading.Event(), threading.Event()

    def lead() -> None:
        try:
            flight.do(work, "k")
        except Plain as caught:
            mark(caught, "the leader")
        marked.set()

    async def waits_here() -> BaseException:
        try:
            await flight.do_async(never_async, "k")
        except Plain as caught:
            return caught
        raise AssertionError("no error")

    async def main() -> BaseException:
        follower = asyncio.create_task(waits_here())
        await eventually_async(waiting(flight, 1))
        joined.set()
        assert marked.wait(PATIENCE)
        return await follower

    leading = spawn(lead)
    assert work.running.wait(PATIENCE)
    following = spawn_loop(main)
    assert joined.wait(PATIENCE)
    work.go.set()
    leading.result(PATIENCE)
    followed = following.result(PATIENCE)
    assert state(followed) == before
    assert frames(followed)[0] == "waits_here"
    assert frames(followed)[-1] == "end"


@each_leader
def test_what_the_leader_adds_before_a_future_is_asked_is_not_seen(leader: str) -> None:
    """3: as above, for a future whose exception is asked for late."""
    flight = ShardedFlight()
    error = Plain("message")
    before = state(error)
    work = Work(error=error)
    led = KINDS[leader](flight, work, "k")
    assert work.running.wait(PATIENCE)
    futures = [flight.do_future(never, "k") for _ in range(2)]
    work.go.set()
    caught = led.exception(PATIENCE)
    assert caught is not None
    mark(caught, "the leader")
    first = futures[0].exception(PATIENCE)
    assert first is not None
    assert state(first) == before
    mark(first, "the first follower")
    second = futures[1].exception(PATIENCE)
    assert second is not None
    assert state(second) == before


@each_follower
def test_a_context_of_a_followers_own_is_its_own(follower: str) -> None:
    """3: "Nobody's `__context__`": a follower that called while handling another error."""
    flight = ShardedFlight()
    work = Work(error=Plain("message"))
    led = spawn(flight.do, work, "k")
    assert work.running.wait(PATIENCE)

    def in_thread() -> BaseException:
        try:
            raise LookupError("being handled")
        except LookupError:
            try:
                flight.do(never, "k")
            except Plain as error:
                return error
        raise AssertionError("no error")

    async def in_task() -> BaseException:
        try:
            raise LookupError("being handled")
        except LookupError:
            try:
                await flight.do_async(never_async, "k")
            except Plain as error:
                return error
        raise AssertionError("no error")

    def in_future() -> BaseException:
        try:
            raise LookupError("being handled")
        except LookupError:
            try:
                flight.do_future(never, "k").result(PATIENCE)
            except Plain as error:
                return error
        raise AssertionError("no error")

    handling = {
        "thread": lambda: spawn(in_thread),
        "task": lambda: spawn_loop(in_task),
        "future": lambda: spawn(in_future),
    }[follower]()
    eventually(waiting(flight, 1))
    others = [FOLLOW[kind](flight, "k") for kind in FOLLOW]
    eventually(waiting(flight, 4))
    work.go.set()
    assert type(handling.result(PATIENCE).__context__) is LookupError
    for outcome in others:
        assert outcome.result(PATIENCE).__context__ is None
    caught = led.exception(PATIENCE)
    assert caught is not None
    assert caught.__context__ is None


# --- exceptions of all sorts ---


class Falsy(Exception):
    def __bool__(self) -> bool:
        return False


class Empty(Exception):
    def __len__(self) -> int:
        return 0


class EqualToAll(Exception):
    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = Exception.__hash__


class Unhashable(Exception):
    __hash__ = None  # type: ignore[assignment]


class Incomparable(Exception):
    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared")

    def __bool__(self) -> bool:
        raise AssertionError("asked for its truth")

    def __len__(self) -> int:
        raise AssertionError("asked for its length")

    __hash__ = None  # type: ignore[assignment]


class Unprintable(Exception):
    def __str__(self) -> str:
        raise AssertionError("printed")

    __repr__ = __str__


class NeedsTwo(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)
        self.second = second


class KeywordOnly(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


class ArgsOfItsOwn(Exception):
    def __init__(self, code: int) -> None:
        self.code = code
        self.args = ("not", "the", "arguments")


class NoSuperInit(Exception):
    def __init__(self, code: int) -> None:
        self.code = code


class NewWithArguments(Exception):
    def __new__(cls, code: int, /, *, hint: str) -> "NewWithArguments":
        made = super().__new__(cls, code)
        made.hint = hint
        return made

    hint: str

    def __init__(self, code: int, /, *, hint: str) -> None:
        super().__init__("args", code)


class Once(Exception):
    """Made once: its `__init__` refuses any later call."""

    made = False

    def __init__(self, code: int) -> None:
        if type(self).made:
            raise RuntimeError("__init__ called again")
        type(self).made = True
        super().__init__(code)
        self.code = code


class NewOnce(Exception):
    made = False

    def __new__(cls, *args: Any) -> "NewOnce":
        if cls.made:
            raise RuntimeError("__new__ called again")
        cls.made = True
        return super().__new__(cls, *args)


class Uncopyable(Exception):
    def __refuse(self, *args: Any) -> Any:
        raise RuntimeError("copied by protocol")

    __reduce__ = __reduce_ex__ = __copy__ = __deepcopy__ = __getstate__ = __setstate__ = __refuse


class CopyIsItself(Exception):
    def __copy__(self) -> "CopyIsItself":
        return self

    def __deepcopy__(self, memo: Any) -> "CopyIsItself":
        return self

    def __reduce__(self) -> Any:
        return Plain, ("a liar",)


class Frozen(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(code)
        object.__setattr__(self, "code", code)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name} is frozen")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{name} is frozen")


@dataclasses.dataclass(frozen=True)
class FrozenData(Exception):
    code: int
    reason: str


@dataclasses.dataclass
class Data(Exception):
    code: int
    reasons: list[str]


class Slotted(Exception):
    __slots__ = ("__secret", "code", "unset")

    def __init__(self, code: int) -> None:
        super().__init__("slotted")
        self.code = code
        self.__secret = code + 1


class MoreSlots(Slotted):
    __slots__ = "one"  # noqa: PLC0205 (Python allows it)

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.one = code + 2
        self.other = code + 3


class Delegating(Exception):
    """Passes what it lacks to `inner`: asked before that is there, it would never end."""

    def __init__(self, inner: Any) -> None:
        super().__init__("delegating")
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Veiled(Exception):
    """Answers every attribute in its own way."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__class__", "__dict__"):
            return super().__getattribute__(name)
        return f"veiled {name}"


class NoTraceback(Exception):
    def with_traceback(self, tb: Any) -> Any:
        raise RuntimeError("with_traceback called")

    def add_note(self, note: str) -> None:
        raise RuntimeError("add_note called")


class Meta(type):
    def __call__(cls, *args: Any) -> Any:
        raise RuntimeError("made by its maker only")

    def make(cls, *args: Any) -> Any:
        return super().__call__(*args)


class MadeElsewhere(Exception, metaclass=Meta):
    pass


class OddOSError(OSError):
    def __init__(self, code: int, *, hint: str) -> None:
        super().__init__(code, "strerror", "file", None, "file2")
        self.hint = hint


class BareOSError(OSError):
    def __init__(self, hint: str) -> None:
        self.hint = hint


class TwoBases(NeedsTwo, LookupError):
    pass


class OSAndValue(io.UnsupportedOperation):
    pass


class WithDescriptor(Exception):
    def __init__(self) -> None:
        super().__init__("with a property")
        self._code = 3

    @property
    def code(self) -> int:
        return self._code


class TaggedGroup(ExceptionGroup[Exception]):
    """A group with arguments and attributes of its own, that derives its own kind."""

    code: int

    def __new__(cls, errors: Sequence[Exception], *, code: int) -> "TaggedGroup":
        made = super().__new__(cls, f"code {code}", errors)
        made.code = code
        return made

    def __init__(self, errors: Sequence[Exception], *, code: int) -> None:
        self.extra = ["extra"]

    def derive(self, errors: Sequence[Any], /) -> Any:
        return TaggedGroup(errors, code=self.code)


class DerivesNothing(ExceptionGroup[Exception]):
    def derive(self, errors: Sequence[Any], /) -> Any:
        raise RuntimeError("derived")


def altered(error: BaseException, **attributes: Any) -> Any:
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


def noted(error: BaseException, *notes: str) -> Any:
    for note in notes:
        error.add_note(note)
    return error


def raised(error: BaseException) -> Any:
    """`error` with a traceback, as the members of a group have."""
    try:
        raise error
    except BaseException as caught:
        return caught


def http_error() -> BaseException:
    headers: Any = {"h": "v"}
    return urllib.error.HTTPError("http://127.0.0.1/", 404, "gone", headers, io.BytesIO(b"body"))


def close(error: BaseException) -> None:
    """An `HTTPError` is a file as well, and complains if nobody closes it."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()


def sqlite_error() -> BaseException:
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        try:
            connection.execute("select * from nowhere")
        except sqlite3.Error as error:
            return error.with_traceback(None)
    raise AssertionError


def validation_error() -> BaseException:
    try:
        TypeAdapter(list[int]).validate_python(["one", 2, None])
    except ValidationError as error:
        return error.with_traceback(None)
    raise AssertionError("what is no int was taken for one")


def json_error() -> BaseException:
    try:
        json.loads("{]")
    except ValueError as error:
        return error.with_traceback(None)
    raise AssertionError


ERRORS: dict[str, Callable[[], BaseException]] = {
    # falsy, or odd to compare and to look at
    "falsy": lambda: Falsy("falsy"),
    "empty": lambda: Empty("empty"),
    "equal to all": lambda: EqualToAll("equal"),
    "unhashable": lambda: Unhashable("unhashable"),
    "incomparable": lambda: Incomparable("incomparable"),
    "unprintable": lambda: Unprintable("unprintable"),
    # an odd __init__ or __new__
    "needs two": lambda: NeedsTwo("first", "second"),
    "keyword only": lambda: KeywordOnly(code=4),
    "args of its own": lambda: ArgsOfItsOwn(5),
    "no super init": lambda: NoSuperInit(6),
    "new with arguments": lambda: NewWithArguments(7, hint="hint"),
    "init once": lambda: altered(type("Once", (Once,), {})(8), late="late"),
    "new once": lambda: altered(type("NewOnce", (NewOnce,), {})(8), late="late"),
    "two bases": lambda: TwoBases("first", "second"),
    "made elsewhere": lambda: MadeElsewhere.make("made"),
    # refuses to be copied or set
    "uncopyable": lambda: Uncopyable("uncopyable"),
    "copy is itself": lambda: CopyIsItself("one"),
    "frozen": lambda: Frozen(9),
    "frozen data": lambda: FrozenData(10, "reason"),
    "data": lambda: Data(10, ["reason"]),
    "slots": lambda: Slotted(11),
    "more slots": lambda: MoreSlots(12),
    "delegating": lambda: Delegating(Plain("inner")),
    "veiled": lambda: Veiled("veiled"),
    "no traceback": lambda: NoTraceback("none"),
    "property": lambda: WithDescriptor(),
    # C state
    "OSError": lambda: OSError(2, "strerror", "file", None, "file2"),
    "OSError of one argument": lambda: OSError("one"),
    "OSError altered": lambda: altered(OSError(2, "gone", "f"), filename="g", errno=3, args=(1,)),
    "FileNotFoundError": lambda: FileNotFoundError(2, "strerror", "file"),
    "BlockingIOError": lambda: BlockingIOError(11, "again", 5),
    "odd OSError": lambda: OddOSError(13, hint="hint"),
    "bare OSError": lambda: BareOSError("hint"),
    "OSError and ValueError": lambda: OSAndValue(5, "both"),
    "UnicodeDecodeError": lambda: UnicodeDecodeError("utf-8", b"a\xffb", 1, 2, "invalid"),
    "UnicodeDecodeError altered": lambda: altered(
        UnicodeDecodeError("utf-8", b"a\xffb", 1, 2, "invalid"), start=0, reason="other"
    ),
    "UnicodeEncodeError": lambda: UnicodeEncodeError("ascii", "aé", 1, 2, "invalid"),
    "UnicodeTranslateError": lambda: UnicodeTranslateError("aé", 1, 2, "invalid"),
    "SyntaxError": lambda: SyntaxError("bad", ("file", 3, 4, "text", 5, 6)),
    "SyntaxError altered": lambda: altered(SyntaxError("bad"), lineno=7, msg="worse"),
    "IndentationError": lambda: IndentationError("bad", ("file", 3, 4, "text")),
    "ImportError": lambda: ImportError("no", name="module", path="/path"),
    "ModuleNotFoundError": lambda: ModuleNotFoundError("no", name="module"),
    "AttributeError": lambda: AttributeError("no", name="name", obj=ERRORS),
    "NameError": lambda: NameError("no", name="name"),
    "KeyError": lambda: KeyError(("a", "key")),
    "StopAsyncIteration": lambda: StopAsyncIteration("value"),
    "IndexError without arguments": lambda: IndexError(),
    # the standard library's
    "HTTPError": http_error,
    "sqlite3": sqlite_error,
    "json": json_error,
    "CalledProcessError": lambda: subprocess.CalledProcessError(3, ["cmd"], b"out", b"err"),
    "TimeoutExpired": lambda: subprocess.TimeoutExpired("cmd", 1.5),
    "SSLError": lambda: altered(ssl.SSLError(1, "ssl"), reason="R", library="L"),
    "SSLCertVerificationError": lambda: altered(
        ssl.SSLCertVerificationError(1, "ssl"), verify_code=9
    ),
    "gaierror": lambda: socket.gaierror(-2, "unknown"),
    "IncompleteReadError": lambda: asyncio.IncompleteReadError(b"part", 9),
    "QueueEmpty": lambda: asyncio.QueueEmpty(),
    "InvalidStateError": lambda: asyncio.InvalidStateError("state"),
    "TimeoutError": lambda: TimeoutError("of the function"),
    # extension types of which none is empty
    "pydantic": validation_error,
    "pydantic of the user's own": lambda: PydanticCustomError("sort", "no {what}", {"what": "x"}),
    # those that machinery around futures takes for its own
    "futures.CancelledError": lambda: concurrent.futures.CancelledError("of the function"),
    "futures.InvalidStateError": lambda: concurrent.futures.InvalidStateError("of the function"),
    "futures.BrokenExecutor": lambda: concurrent.futures.BrokenExecutor("of the function"),
    # notes
    "noted": lambda: noted(Plain("noted"), "one", "two"),
    "notes that are none": lambda: altered(Plain("odd notes"), __notes__=7),
    # groups
    "group": lambda: ExceptionGroup(
        "group", [ValueError(1), ExceptionGroup("inner", [KeyError("k"), OSError(2, "two")])]
    ),
    "group with tracebacks": lambda: ExceptionGroup(
        "group", [raised(NeedsTwo("a", "b")), raised(Slotted(1)), noted(Plain("noted"), "note")]
    ),
    "group of one class": lambda: type("Group", (ExceptionGroup,), {})("group", [Plain("one")]),
    "base group of exceptions": lambda: BaseExceptionGroup("group", [Plain("one")]),
    "tagged group": lambda: noted(TaggedGroup([Plain("one"), KeyError("two")], code=3), "note"),
    "group that derives nothing": lambda: DerivesNothing("group", [Plain("one")]),
}


@each_follower
@pytest.mark.parametrize("sort", ERRORS)
def test_exceptions_of_all_sorts_arrive_intact(sort: str, follower: str) -> None:
    """3: "Exceptions that are falsy, have an odd `__init__`, `__slots__` or C state ..., and
    exception groups all arrive intact"; for a real follower in another thread."""
    error = ERRORS[sort]()
    before = state(error)
    led, first, second = fail("thread", error, [follower, follower])
    assert led is error
    for caught in (led, first, second):
        assert state(caught) == before
        assert type.mro(type(caught)) == type.mro(type(error))
    for caught in (first, second):
        trace = BaseException.__traceback__.__get__(caught)  # type: ignore[attr-defined]
        names = [frame.name for frame in traceback.extract_tb(trace)]
        assert names[0] == "waits_here"
        assert names[-1] == "end"
        assert names.count("waits_here") == 1
    close(error)


@pytest.mark.parametrize("leader", ["task", "future"])
@pytest.mark.parametrize("sort", ERRORS)
def test_exceptions_of_all_sorts_leave_all_leaders(sort: str, leader: str) -> None:
    """3: as above, from a coroutine's execution and from a pool's."""
    error = ERRORS[sort]()
    before = state(error)
    led, by_thread, by_task, by_future = fail(leader, error, ["thread", "task", "future"])
    for caught in (led, by_thread, by_task, by_future):
        assert state(caught) == before
    close(error)


@each_follower
@pytest.mark.parametrize("sort", ["pydantic", "pydantic of the user's own", "needs two"])
def test_everybody_has_an_exception_of_their_own(sort: str, follower: str) -> None:
    """3: "Nobody's `__traceback__`, `__context__` or notes grow because others caught the same"."""
    caught = fail("thread", ERRORS[sort](), [follower] * 3)
    assert len({id(error) for error in caught}) == 4
    lengths = [len(traceback.extract_tb(error.__traceback__)) for error in caught[1:]]
    assert len(set(lengths)) == 1
    for number, error in enumerate(caught):
        assert not hasattr(error, "__notes__")
        assert str(error) == str(caught[0])
        error.add_note(str(number))


class Refuses(PydanticCustomError):
    """Is neither made empty nor copied."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise LookupError("no copies")


def test_an_exception_that_can_not_be_replicated_arrives_all_the_same() -> None:
    """3: "as itself": the object is shared then, and nothing of ours is written to it."""
    error = Refuses("sort", "no copies")
    flight = ShardedFlight()
    work = Work(error=error)
    led = KINDS["thread"](flight, work, "k")
    assert work.running.wait(PATIENCE)
    followed = [spawn(flight.do_many, never, ["k"]) for _ in range(2)]
    eventually(waiting(flight, 2))
    work.go.set()
    assert led.exception(PATIENCE) is error
    for outcome in followed:
        group = outcome.exception(PATIENCE)
        assert isinstance(group, FlightErrorGroup)
        assert group.failed == {"k": error}
    assert not hasattr(error, "__notes__")


def test_attributes_are_the_very_objects() -> None:
    """3: "same type, arguments and attributes": nothing is copied deep."""
    inner = object()
    error = altered(Plain(inner), payload=inner)
    for caught in fail("thread", error, ["thread", "task", "future"]):
        assert caught.args[0] is inner
        assert caught.payload is inner  # type: ignore[attr-defined]


def test_an_http_error_can_still_be_read() -> None:
    """3: an exception that is also a file arrives as one."""
    led, followed = fail("thread", http_error(), ["thread"])
    for caught in (led, followed):
        assert isinstance(caught, urllib.error.HTTPError)
        assert (caught.code, caught.reason, caught.url) == (404, "gone", "http://127.0.0.1/")
        assert not caught.closed
        assert caught.read() == (b"body" if caught is led else b"")
    close(led)


@each_leader
@each_follower
def test_a_group_can_be_split_by_every_caller(leader: str, follower: str) -> None:
    """3: "exception groups all arrive intact": `except*` works, and its marks are one's own."""
    members = [raised(ValueError(1)), raised(KeyError("k")), raised(ValueError(2))]
    group = TaggedGroup(members, code=3)
    errors = fail(leader, group, [follower, follower])
    before = [[frames(member) for member in error.exceptions] for error in errors]  # type: ignore[attr-defined]
    assert before[0] == before[1] == before[2] == [["raised"]] * 3
    for error in errors:
        values: list[Any] = []
        keys: list[Any] = []
        try:
            raise error
        except* ValueError as caught:
            values.append(caught)
        except* KeyError as caught:
            keys.append(caught)
        assert [member.args for member in values[0].exceptions] == [(1,), (2,)]
        assert [member.args for member in keys[0].exceptions] == [("k",)]
        assert type(values[0]) is type(keys[0]) is TaggedGroup
        assert values[0].code == 3
    after = [[frames(member) for member in error.exceptions] for error in errors]  # type: ignore[attr-defined]
    assert after == before


@each_follower
def test_members_of_a_group_belong_to_their_caller(follower: str) -> None:
    """3: "Nobody's `__traceback__` ... grow": not those of a group's members either."""
    group = ExceptionGroup("group", [raised(Plain("one"))])
    errors = fail("thread", group, [follower, follower])
    for _ in range(10):
        try:
            raise errors[1].exceptions[0]  # type: ignore[attr-defined]
        except Plain as member:
            member.add_note("of the first follower")
    for index in (0, 2):
        member = errors[index].exceptions[0]  # type: ignore[attr-defined]
        assert frames(member) == ["raised"]
        assert not hasattr(member, "__notes__")


# --- StopIteration, which coroutines cannot raise ---


@pytest.mark.parametrize("leader", ["thread", "future"])
@pytest.mark.parametrize("follower", ["thread", "future"])
def test_stop_iteration_arrives_with_its_value(leader: str, follower: str) -> None:
    """3: "reaches every caller as itself": `StopIteration` and its value too."""
    for caught in fail(leader, StopIteration("value"), [follower, follower]):
        assert type(caught) is StopIteration
        assert caught.value == "value"


@pytest.mark.parametrize("leader", ["thread", "future"])
def test_stop_iteration_in_a_coroutine_is_a_runtime_error(leader: str) -> None:
    """3: Python lets no coroutine raise `StopIteration`: the follower gets the `RuntimeError` that
    Python makes of it, with the error as its cause, rather than a hang."""
    _, caught, other = fail(leader, StopIteration("value"), ["task", "task"])
    for error in (caught, other):
        assert type(error) is RuntimeError
        assert type(error.__cause__) is StopIteration
        assert error.__cause__.value == "value"


@each_follower
def test_stop_iteration_from_a_coroutine(follower: str) -> None:
    """3: a coroutine that raises `StopIteration` fails with Python's `RuntimeError`, for all."""
    for error in fail("task", StopIteration("value"), [follower, follower]):
        assert type(error) is RuntimeError
        assert type(error.__cause__) is StopIteration
        assert error.__cause__.value == "value"


# --- failures are not remembered ---


@each_leader
def test_failures_are_not_remembered(leader: str) -> None:
    """3: "Failures are not remembered: the next call runs"."""
    flight = ShardedFlight()
    for number in range(3):
        error = Plain(number)
        work = Work(error=error)
        led = KINDS[leader](flight, work, "k")
        assert work.running.wait(PATIENCE)
        outcome = follow_by_thread(flight, "k")
        eventually(waiting(flight, 1))
        work.go.set()
        caught = led.exception(PATIENCE)
        assert caught is not None
        assert caught.args == outcome.result(PATIENCE).args == (number,)
        assert flight.in_flight() == 0
    work = Work(value="v")
    work.go.set()
    assert KINDS[leader](flight, work, "k").result(PATIENCE) == ("v", False)
    assert flight.stats().errors == 3
    assert flight.stats().executions == 4


def test_one_exception_raised_by_many_executions() -> None:
    """3: an exception kept and raised again by a function grows as in plain calls, not faster."""

    def plain(error: Exception, calls: int) -> int:
        for _ in range(calls):
            try:
                raise error
            except Plain:
                pass
        return len(frames(error))

    def flown(error: Exception, calls: int) -> int:
        flight = ShardedFlight()

        def function() -> Any:
            raise error

        for _ in range(calls):
            try:
                flight.do(function, "k")
            except Plain:
                pass
        return len(frames(error))

    def per_call(count: Callable[[Exception, int], int]) -> float:
        return (count(Plain(), 40) - count(Plain(), 20)) / 20

    assert per_call(plain) == 1
    assert per_call(flown) <= 4


# --- nothing is kept alive ---


class Token:
    """Something that a frame holds, and that can be seen to have gone."""


class FailsWithToken(Work):
    """Fails, a token in a local variable of the frame that fails."""

    def end(self) -> Any:
        token = Token()
        self.token = weakref.ref(token)
        raise Plain("with a token in its frame")


class ReturnsToken(Work):
    def end(self) -> Any:
        value = Token()
        self.token = weakref.ref(value)
        return value


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def discard_by_thread(flight: ShardedFlight, function: Any, *key: Any) -> "Future[Any]":
    """Calls, and forgets the outcome: only its kind is told.

    The frames here hold nothing that holds the exception: a cycle would be this test's own.
    """

    def call() -> str:
        try:
            flight.do(function, *key)
        except Plain:
            return "error"
        return "value"

    return spawn(call)


def discard_by_task(flight: ShardedFlight, function: Any, *key: Any) -> "Future[Any]":
    async def call() -> str:
        try:
            await flight.do_async(getattr(function, "awaited", function), *key)
        except Plain:
            return "error"
        return "value"

    return spawn_loop(call)


def discard_by_future(flight: ShardedFlight, function: Any, *key: Any) -> "Future[Any]":
    held = [flight.do_future(function, *key)]

    def call() -> str:
        error = held.pop().exception(PATIENCE)
        return "value" if error is None else "error"

    return spawn(call)


DISCARD: dict[str, Callable[..., "Future[Any]"]] = {
    "thread": discard_by_thread,
    "task": discard_by_task,
    "future": discard_by_future,
}


@each_leader
@pytest.mark.parametrize("follower", [None, *KINDS])
@pytest.mark.parametrize("work_kind", [FailsWithToken, ReturnsToken])
@pytest.mark.usefixtures("no_collector")
def test_nothing_keeps_frames_or_values_alive(
    leader: str, follower: str | None, work_kind: type[Work]
) -> None:
    """3: "No reference cycle keeps frames alive after the callers are done (checked with the
    collector switched off)": an error's frames, a value, the function and the key."""
    with ThreadPoolExecutor(1) as pool:
        flight = ShardedFlight(executor=pool)
        work: Any = work_kind()
        key: Any = Token()
        outcomes = [DISCARD[leader](flight, work, key)]
        assert work.running.wait(PATIENCE)
        if follower is not None:
            function = never_async if follower == "task" else never
            outcomes += [DISCARD[follower](flight, function, key) for _ in range(3)]
            eventually(waiting(flight, 3))
        work.go.set()
        expected = "error" if work_kind is FailsWithToken else "value"
        assert [outcome.result(PATIENCE) for outcome in outcomes] == [expected] * len(outcomes)
        assert flight.in_flight() == 0

        def freed(*tokens: Any) -> bool:
            # Without the GIL, what a thread made and others let go of goes when that thread runs.
            pool.submit(int).result(PATIENCE)
            return all(token() is None for token in tokens)

        token = work.token
        eventually(lambda: freed(token), "the token of the frame freed")
        kept = [weakref.ref(work), weakref.ref(key)]
        del work, key, outcomes
        eventually(lambda: freed(*kept), "function and key freed")


@pytest.mark.usefixtures("no_collector")
def test_a_caught_error_is_freed_when_it_is_dropped() -> None:
    """3: as above in one thread, at once: with the exception its frames go."""
    flight = ShardedFlight()
    work: Any = FailsWithToken()
    work.go.set()
    gone: list[weakref.ref[Plain]] = []
    try:
        flight.do(work, "k")
    except Plain as error:
        assert work.token() is not None
        gone.append(weakref.ref(error))
    assert work.token() is gone[0]() is None

    async def main() -> None:
        for _ in range(2):
            gone: list[weakref.ref[Plain]] = []
            try:
                await flight.do_async(work.awaited, "k")
            except Plain as error:
                assert work.token() is not None
                gone.append(weakref.ref(error))
            await eventually_async(lambda gone=gone: work.token() is gone[0]() is None)

    asyncio.run(main())


@pytest.mark.usefixtures("no_collector")
def test_a_coroutine_that_fails_at_once_leaves_no_cycle() -> None:
    """3: as above for a coroutine that never suspends, and for one with followers on its loop."""
    flight = ShardedFlight()
    tokens: list[Any] = []

    async def fails() -> None:
        token = Token()
        tokens.append(weakref.ref(token))
        raise Plain("at once")

    async def fails_later() -> None:
        token = Token()
        tokens.append(weakref.ref(token))
        await eventually_async(waiting(flight, 5))
        raise Plain("later")

    async def call(function: Any) -> None:
        try:
            await flight.do_async(function, "k")
        except Plain:
            pass

    async def main() -> None:
        await call(fails)
        await asyncio.gather(call(fails_later), *[call(never_async) for _ in range(5)])
        await eventually_async(lambda: [token() for token in tokens] == [None, None])

    asyncio.run(main())


@pytest.mark.usefixtures("no_collector")
def test_a_flight_in_use_does_not_grow() -> None:
    """3: a thousand failures and values over a thousand keys leave no object behind."""
    flight = ShardedFlight(4)

    def fails() -> None:
        raise Plain

    def round_of_calls() -> None:
        for n in range(1000):
            flight.do(int, n)
            try:
                flight.do(fails, n)
            except Plain:
                pass

    round_of_calls()
    before = len(gc.get_objects())
    round_of_calls()
    assert len(gc.get_objects()) - before < 100


@pytest.mark.usefixtures("no_collector")
def test_a_flight_itself_is_freed() -> None:
    """3: a flight that was used and dropped is no cycle of its own, its pool neither."""

    async def work() -> None:
        await asyncio.sleep(0)

    async def main(flight: ShardedFlight) -> None:
        await flight.do_async(work, "k")

    def use() -> "weakref.ref[ShardedFlight]":
        flight = ShardedFlight()
        flight.do(int, "k")
        flight.do_future(int, "k").result(PATIENCE)
        asyncio.run(main(flight))
        return weakref.ref(flight)

    gone = use()

    def freed() -> bool:
        if not getattr(sys, "_is_gil_enabled", lambda: True)():
            gc.collect()  # compiled, only the collector counts a flight's references there
        return gone() is None

    eventually(freed, "the flight freed")
