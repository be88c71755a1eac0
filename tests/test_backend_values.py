"""What goes from process to process: names of keys, values, errors, and what is no outcome."""

import dataclasses
import enum
import math
import pickle
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from proof.fuzz.payloads import PLAIN_VALUES

from shardedflight import BackendError, RemoteError
from shardedflight._core import End
from shardedflight._tier import TooLargeError
from shardedflight.backends import Outcome, Sealed
from shardedflight.backends._protocol import MessagePack, Wire, name_of

parts = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(), max_size=5)
    | st.binary(max_size=5)
    | st.uuids(),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)
keys = st.lists(parts, max_size=3).map(tuple)


@given(keys, keys)
def test_keys_have_one_name_if_and_only_if_they_are_equal(one: Any, other: Any) -> None:
    assert (name_of("n", None, one) == name_of("n", None, other)) is (one == other)


@given(st.integers(-(2**70), 2**70))
def test_numbers_that_are_equal_have_one_name(number: int) -> None:
    equal = [float(number)] if float(number) == number else []
    equal += [bool(number)] if number in (0, 1) else []
    assert {name_of("n", None, (n,)) for n in [number, *equal]} == {name_of("n", None, (number,))}
    assert name_of("n", None, (0.0,)) == name_of("n", None, (-0.0,))


def test_neither_namespaces_nor_flights_nor_the_number_of_parts_meet() -> None:
    names = {
        name_of("n", None, ("a", "b")),
        name_of("n", None, (("a", "b"),)),
        name_of("n", None, ("ab",)),
        name_of("n", None, ()),
        name_of("n", None, ((),)),
        name_of("n", "", ()),
        name_of("n", "f", ()),
        name_of("nf", None, ()),
        name_of("n", None, (b"ab",)),
        name_of("n", None, ("a\0b",)),
    }
    assert len(names) == 10


class Color(enum.StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    "part", [object(), math.nan, frozenset(), Color.RED, (1, object()), datetime.now(UTC), len]
)
def test_a_key_that_can_not_leave_the_process_is_refused(part: Any) -> None:
    with pytest.raises(TypeError, match="build_key="):
        name_of("n", None, ("x", part))


@dataclasses.dataclass
class Point:
    x: float
    tags: tuple[str, ...] = ()


class Row(msgspec.Struct):
    id: int
    name: str


def back(codec: MessagePack, value: Any) -> Any:
    wire = Wire("n", codec, 1 << 20)
    return wire.open(Sealed(1, wire.seal(Outcome(End.VALUE, value)))).value


@given(PLAIN_VALUES)
def test_plain_values_come_back_as_they_are(value: Any) -> None:
    assert repr(back(MessagePack(), value)) == repr(value)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Point, Point(1.5, ("a",))),
        (list[Row], [Row(1, "a"), Row(2, "b")]),
        (tuple[int, str], (1, "x")),
        (set[int], {1, 2}),
        (dict[str, uuid.UUID], {"a": uuid.uuid4()}),
        (datetime, datetime(2026, 1, 2, 3, tzinfo=UTC)),
    ],
)
def test_with_a_type_its_values_come_back_as_they_are(kind: Any, value: Any) -> None:
    assert back(MessagePack(kind), value) == value


@pytest.mark.parametrize(
    ("kind", "value", "named"),
    [
        (Any, (1, 2), "tuple"),
        (Any, {"a": [1, (2,)]}, "tuple"),
        (Any, Point(1.0), "Point"),
        (Any, {1, 2}, "set"),
        (Any, bytearray(b"x"), "bytearray"),
        (Any, Color.RED, "Color"),
        (Any, 2**70, "int"),
        (Any, object(), "object"),
        (Any, datetime(2026, 1, 2, tzinfo=UTC).replace(tzinfo=None), "datetime"),
        (Point, Point(1), "int"),  # pyright: ignore[reportArgumentType]
        (Point, {"x": 1.0}, "dict"),
        (datetime, datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=1), "CET")), "CET"),
        (int, "1", "str"),
    ],
)
def test_a_value_that_would_come_back_changed_is_refused(kind: Any, value: Any, named: str) -> None:
    with pytest.raises(TypeError, match=named) as caught:
        back(MessagePack(kind), value)
    assert "codec" in str(caught.value)


class Pickled:
    """A codec of a user's own."""

    name = "pickle"
    encode = staticmethod(pickle.dumps)
    decode = staticmethod(pickle.loads)


def test_another_codec_takes_other_values() -> None:
    wire = Wire("n", Pickled(), 1 << 20)
    assert wire.open(Sealed(1, wire.seal(Outcome(End.VALUE, (1, {2}))))).value == (1, {2})


class Odd(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def sealed_error(error: Exception) -> RemoteError:
    wire = Wire("n", None, 1 << 20)
    try:
        raise error
    except Exception as raised:
        opened = wire.open(Sealed(1, wire.seal(Outcome(End.ERROR, raised))))
    assert isinstance(opened.value, RemoteError)
    return opened.value


def test_an_error_crosses_as_type_message_and_traceback() -> None:
    error = sealed_error(ValueError("näh \ud800"))
    assert (error.type_name, error.message) == ("ValueError", "näh \ud800")
    assert str(error) == "ValueError: näh \ud800"
    assert "sealed_error" in error.remote_traceback
    assert error.__notes__ == [error.remote_traceback]
    assert sealed_error(RemoteError("a.B", "c", "d")).type_name == "a.B"
    long = sealed_error(ValueError("x" * 100_000))
    assert len(long.message) + len(long.remote_traceback) < 25_000
    assert "str" in sealed_error(Odd()).message


def reduced() -> Any:
    raise AssertionError("a pickle was loaded")


class Bomb:
    def __reduce__(self) -> Any:
        return reduced, ()


def damages() -> list[Callable[[bytes], bytes]]:
    return [
        lambda whole: b"",
        lambda whole: whole[:-1],
        lambda whole: whole[:10],
        lambda whole: whole + b"x",
        lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]),
        lambda whole: b"SF\x02" + whole[3:],
        lambda whole: whole[:3] + b"E" + whole[4:],
        lambda whole: whole[:3] + b"?" + whole[4:],
        lambda whole: pickle.dumps(Bomb()),
        lambda whole: whole[:20] + pickle.dumps(Bomb()),
        lambda whole: b"\xdd\xff\xff\xff\xff" * 1000,
    ]


@pytest.mark.parametrize("damage", damages())
def test_what_is_no_outcome_is_not_opened(damage: Callable[[bytes], bytes]) -> None:
    wire = Wire("n", None, 1 << 20)
    whole = wire.seal(Outcome(End.VALUE, ["value"]))
    with pytest.raises(ValueError, match="outcome"):
        wire.open(Sealed(1, damage(whole)))


def test_another_codecs_outcome_is_not_opened() -> None:
    whole = Wire("n", MessagePack(Point), 1 << 20).seal(Outcome(End.VALUE, Point(1.0)))
    with pytest.raises(ValueError, match="codec"):
        Wire("n", None, 1 << 20).open(Sealed(1, whole))


def test_a_body_that_the_codec_refuses_is_not_opened() -> None:
    class Lying:
        name = MessagePack().name
        encode = staticmethod(lambda value: b"\xdd\xff\xff\xff\xff")  # an array of 2^32 items
        decode = staticmethod(MessagePack().decode)

    whole = Wire("n", Lying(), 1 << 20).seal(Outcome(End.VALUE, None))
    with pytest.raises(ValueError, match="can not be read"):
        Wire("n", None, 1 << 20).open(Sealed(1, whole))


@pytest.mark.parametrize(
    "body", [b"[]", b"1", b"null", b'["a","b"]', b"[1,2,3]", b"[null,[],{}]", b"[" * 5000, b"\xff"]
)
def test_an_error_that_is_no_three_texts_is_not_opened(body: bytes) -> None:
    wire = Wire("n", None, 1 << 20)
    payload = b"".join((b"SF\x01E", wire._digest(b"E", body), body))
    with pytest.raises(ValueError, match="can not be read"):
        wire.open(Sealed(1, payload))


def test_what_is_too_large_is_not_sent() -> None:
    wire = Wire("n", None, 100)
    with pytest.raises(TooLargeError, match="100"):
        wire.seal(Outcome(End.VALUE, "x" * 101))
    assert wire.open(Sealed(1, wire.seal(Outcome(End.LOST)))).end is End.LOST


@pytest.mark.parametrize(
    "arguments",
    [("", None, 100), (1, None, 100), ("n", object(), 100), ("n", None, 0), ("n", None, True)],
)
def test_bad_arguments_are_refused(arguments: Any) -> None:
    with pytest.raises(BackendError):
        Wire(*arguments)
