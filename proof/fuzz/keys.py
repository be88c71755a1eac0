"""Keys: which calls are the same call, against a dict; and what keys are called in other processes.

`tests/test_properties.py` compares two plain keys; here many of stranger kinds meet in one flight.
"""

import enum
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from decimal import Decimal
from fractions import Fraction
from typing import Any

from hypothesis import strategies as st

from proof.fuzz.target import PATIENCE, Held, Target
from shardedflight import ShardedFlight
from shardedflight.backends import _protocol
from shardedflight.keys import fnv1a_64

__all__ = ["TARGETS"]


class Size(enum.IntEnum):
    """Members that are equal to ints."""

    ONE = 1
    HUGE = 2**80


class Text(str):
    """A str that is equal to others, of another type."""

    __slots__ = ()


#: To Python 0 == -0.0 == False == Decimal(0) and so on; and a NaN is itself and nothing else.
_ALIKE = st.sampled_from(
    [
        *(0, 0.0, -0.0, False, Decimal(0), Fraction(0), 0j, ""),
        *(1, 1.0, True, Decimal("1.0"), Fraction(1), 1 + 0j, Size.ONE, "1", Text("1"), b"1"),
        *(2**80, float(2**80), Size.HUGE, Decimal(2**80), 2**61 - 1, -(2**61) + 1, -1, -2),
        *(float("nan"), float("nan"), float("inf"), Decimal("NaN"), complex("nan")),
        *("\ud800", "é", "e\u0301", "\0", "a", "ab", None, Ellipsis, NotImplemented, int, ()),
    ]
)
_ODD = (
    st.integers(-(2**600), 2**600)
    | st.floats()
    | st.text(st.characters(), max_size=3)
    | st.binary(max_size=3)
    | st.uuids()
    | st.decimals(allow_nan=True)
    | st.fractions()
    | st.complex_numbers()
)
_PARTS = st.recursive(
    _ALIKE | _ODD,
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple) | st.frozensets(_ALIKE, max_size=2) | st.lists(inner)
    ),
    max_leaves=4,
)
_POOL = st.lists(st.lists(_PARTS, max_size=3).map(tuple), min_size=1, max_size=6)
_STEPS = st.lists(st.tuples(st.sampled_from("ddddfr"), st.integers(0, 5)), max_size=16)


def _same_hash(_: Any) -> int:
    return 7


def _huge_hash(key: Any) -> int:
    return hash(key) << 70


def _text_hash(key: Any) -> int:
    """A hash of what a key is to `==`, not of how it is spelt."""
    return fnv1a_64(str(hash(key)))


_HASHES: list[Callable[[Any], int] | None] = [None, _same_hash, _huge_hash, _text_hash]


def _check_meeting(case: Any) -> None:
    """Calls meet as entries of a dict do, until they end or are forgotten."""
    pool, steps, shards, hash_ = case
    executor = Held()
    flight = ShardedFlight(shards, executor=executor, hash=hash_)
    open_: dict[Any, list[Future[Any]]] = {}
    waiting: list[tuple[Any, list[Future[Any]]]] = []
    for step, number in steps:
        parts = pool[number % len(pool)]
        if step == "r":
            executor.run_next()
            if waiting:
                ended, callers = waiting.pop(0)
                if open_.get(ended) is callers:
                    del open_[ended]
                value = callers[0].result(PATIENCE)[0]
                assert all(
                    future.result(PATIENCE) == (value, len(callers) > 1) for future in callers
                )
        elif not _hashable(parts):
            _refused(lambda parts=parts: flight.forget(*parts))  # type: ignore[misc]
            _refused(lambda parts=parts: flight.do_future(object, *parts).result(PATIENCE))  # type: ignore[misc]
        elif step == "f":
            flight.forget(*parts)
            open_.pop(parts, None)
        else:
            future = flight.do_future(object, *parts)
            if parts in open_:
                open_[parts].append(future)
            else:
                callers = open_[parts] = [future]
                waiting.append((parts, callers))
        assert len(executor.held) == flight.in_flight() == len(waiting)
    while executor.held:
        executor.run_next()
    assert flight.in_flight() == flight.stats().waiting == 0


def _hashable(parts: Any) -> bool:
    try:
        hash(parts)
    except TypeError:
        return False
    return True


def _refused(call: Callable[[], object]) -> None:
    try:
        call()
    except TypeError:
        return
    raise AssertionError("a key that has no hash was taken")


# -- names in other processes ---------------------------------------------------------------------

_PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(), max_size=4)
    | st.binary(max_size=4)
    | st.uuids()
    | st.sampled_from([uuid.UUID(int=0), 2**1024, -(2**1024), 1e300, -0.0, "\ud800"])
)
_NAMED = st.recursive(_PLAIN, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=8)
_FORGED = st.sampled_from(["as bytes", "as text", "in a tuple", "cut", "longer", "not at all"])


def _written(part: Any) -> bytes:
    """How a part is written down."""
    found: list[bytes] = []
    _protocol._write(part, found)
    return b"".join(found)


def _forge(part: Any, how: str, written: bytes) -> Any:
    """Something that could be taken for `part` by who does not look at tags and lengths."""
    match how:
        case "as bytes":
            return written
        case "as text":
            return written.decode("latin-1")
        case "in a tuple":
            return (part,)
        case "cut":
            return written[9:]
        case "longer":
            return (part, part)
        case _:
            return part


def _check_names(case: Any) -> None:
    """No key is written as another one, nor as the beginning of another one."""
    one, other, how = case
    if one != one or _holds_nan(one) or _holds_nan(other):
        for part in (one, other):
            if _holds_nan(part):
                _refused(lambda part=part: _protocol.name_of("n", None, (part,)))  # type: ignore[misc]
        return
    written = _written(one)
    for part in (other, _forge(one, how, written), (one, other)):
        there = _written(part)
        assert (written == there) is (one == part), (one, part)
        assert one == part or not (written.startswith(there) or there.startswith(written))
        names = [
            _protocol.name_of("n", flight, (p,)) for flight in (None, "f") for p in (one, part)
        ]
        assert len(set(names)) == (2 if one == part else 4)


def _holds_nan(part: Any) -> bool:
    if type(part) is tuple:
        return any(map(_holds_nan, part))
    return part != part


_DEPTHS = st.integers(1, 3000) | st.sampled_from([10, 100, 900, 1100, 10_000])


def _check_depth(case: Any) -> None:
    """A key nested too deeply is an error of its caller, and leaves nothing behind."""
    depth, shards = case
    key: Any = "end"
    for _ in range(depth):
        key = (key, 1)
    flight = ShardedFlight(shards)
    for _ in range(2):
        try:
            assert flight.do(lambda: 1, key) == (1, False)
            assert len(_protocol.name_of("n", None, (key,))) == 20
        except RecursionError:
            assert depth > 100
    assert flight.in_flight() == 0


TARGETS = [
    Target(
        "keys",
        "calls meet if and only if their keys are equal",
        st.tuples(_POOL, _STEPS, st.sampled_from([1, 2, 16]), st.sampled_from(_HASHES)),
        _check_meeting,
    ),
    Target(
        "names",
        "no two keys are written alike for other processes, nor one as the beginning of another",
        st.tuples(_NAMED, _NAMED, _FORGED),
        _check_names,
    ),
    Target(
        "depth",
        "a key of any depth is taken or refused",
        st.tuples(_DEPTHS, st.sampled_from([1, 16])),
        _check_depth,
        weight=20,
    ),
]
