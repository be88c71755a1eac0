"""Contract, section 1: shards, keys, hashes; and what the constructor refuses."""

import asyncio
import gc
import sys
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import pytest
from support import PATIENCE, spawn
from test_leading import HeldExecutor

from shardedflight import FlightError, InvalidShardsError, ShardedFlight
from shardedflight.keys import concat_key, fnv1a_64, join_key


def meet(one: tuple[Any, ...], other: tuple[Any, ...], **options: Any) -> bool:
    """Whether a call with the parts `other` joins a running execution with the parts `one`."""
    executor = HeldExecutor()
    flight = ShardedFlight(executor=executor, **options)
    first = flight.do_future(object, *one)
    second = flight.do_future(object, *other)
    joined = len(executor.held) == 1
    assert flight.in_flight() == (1 if joined else 2)
    executor.run_all()
    assert (first.result(PATIENCE)[0] is second.result(PATIENCE)[0]) is joined
    assert flight.in_flight() == 0
    return joined


class Point(NamedTuple):
    x: object
    y: object


def gil() -> bool:
    return getattr(sys, "_is_gil_enabled", lambda: True)()


# --- shards ---


@pytest.mark.parametrize("shards", [1, 2, 4, 8, 16, 256, 1024, 2**16])
def test_shards_is_a_power_of_two(shards: int) -> None:
    """1: "An explicit `shards` is a power of two, at least 1"."""
    flight = ShardedFlight(shards)
    assert flight.shards == shards
    assert flight.stats().per_shard == (0,) * shards
    assert flight.do(lambda: "v", "k") == ("v", False)


@pytest.mark.parametrize(
    "shards",
    [0, -1, -8, 3, 5, 6, 12, 2**20 + 1, True, False, "8", b"8", 1.0, 2.0, float("nan"), 8j, [8]],
    ids=repr,
)
def test_any_other_shards_is_refused_by_name(shards: Any) -> None:
    """1: "anything else (0, negative, 3, `True`, `"8"`, 2.0) raises `InvalidShardsError` naming
    the value"; it is a `ValueError`."""
    for make in (lambda: ShardedFlight(shards), lambda: ShardedFlight(shards=shards)):
        with pytest.raises(InvalidShardsError) as caught:
            make()
        assert repr(shards) in str(caught.value)
        assert isinstance(caught.value, ValueError)
        assert isinstance(caught.value, FlightError)


def test_shards_left_out_is_chosen_for_the_interpreter() -> None:
    """1: "Left out, it is chosen for the interpreter: 1 where the GIL serialises callers anyway,
    otherwise the power of two that measurement shows"."""
    chosen = ShardedFlight().shards
    assert chosen > 0
    assert chosen & (chosen - 1) == 0
    if gil():
        assert chosen == 1
    else:
        assert chosen > 1


def test_shards_cannot_be_set_later() -> None:
    """`flight.shards` says how many there are; there is no changing it."""
    flight = ShardedFlight(4)
    with pytest.raises(AttributeError):
        flight.shards = 8  # type: ignore[misc]


# --- the default key ---


def test_one_part_is_its_own_key() -> None:
    """1: "One part is its own key", "free of copying": the hash sees the caller's own object."""
    seen: list[object] = []

    def spy(key: object) -> int:
        seen.append(key)
        return 0

    flight = ShardedFlight(hash=spy)
    for part in (object(), "text", 10**30, frozenset({1}), None):
        seen.clear()
        flight.do(lambda: None, part)
        assert seen
        assert all(key is part for key in seen)


@pytest.mark.parametrize("part", [("a", "b"), ("a",), (), Point(1, 2)], ids=repr)
def test_one_part_that_is_a_tuple_is_its_own_key(part: tuple[Any, ...]) -> None:
    """1: "One part is its own key": a tuple too, as far as a `hash` hook can see."""
    seen: list[object] = []

    def spy(key: object) -> int:
        seen.append(key)
        return 0

    flight = ShardedFlight(hash=spy)
    flight.do(lambda: None, part)
    flight.forget(part)
    assert seen
    assert all(key is part for key in seen)


def test_several_parts_are_a_tuple() -> None:
    """1: "several parts are a tuple", of the very objects that the caller gave."""
    seen: list[Any] = []

    def spy(key: Any) -> int:
        seen.append(key)
        return 0

    parts = (object(), object(), object())
    ShardedFlight(hash=spy).do(lambda: None, *parts)
    assert seen
    for key in seen:
        assert isinstance(key, tuple)
        assert len(key) == 3
        assert all(mine is given for mine, given in zip(key, parts, strict=True))


def test_equality_of_keys_decides_sameness() -> None:
    """1: keys meet when they are equal, as in a `dict`; being the same object is not needed."""
    assert meet(("ab" * 50,), ("".join(["ab"] * 50),))
    assert meet((1,), (True,))
    assert meet((1,), (1.0,))
    assert meet(("a", 1), ("a", 1.0))
    nan = float("nan")
    assert meet((nan,), (nan,))


@pytest.mark.parametrize("options", [{}, {"shards": 1}, {"shards": 16}, {"hash": lambda key: 0}])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ab", "c"), ("a", "bc")),
        ((("a", "b"),), ("a", "b")),
        ((Point("a", "b"),), ("a", "b")),
        (((("a", "b"),),), (("a", "b"),)),
        (((("a", "b"),),), ("a", "b")),
        ((("a",),), ("a",)),
        (((),), ()),
        (((),), ((), ())),
        ((None,), ()),
        (("",), ()),
        (("a", None), ("a",)),
        (("a", ""), ("a",)),
        ((("a", "b"), "c"), ("a", "b", "c")),
        ((("a", "b"), "c"), (("a", "b", "c"),)),
        (("a", ("b", "c")), (("a", "b"), "c")),
        ((-1,), (-2,)),
        ((0,), (2**61 - 1,)),
        (("1",), (1,)),
        ((b"a",), ("a",)),
    ],
    ids=repr,
)
def test_different_parts_never_meet(
    one: tuple[Any, ...], other: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """1: "`("ab", "c")` and `("a", "bc")` never meet; nor do `do(fn, ("a", "b"))` and
    `do(fn, "a", "b")`"; each meets itself."""
    assert not meet(one, other, **options)
    assert not meet(other, one, **options)
    assert meet(one, one, **options)
    assert meet(other, other, **options)


def test_no_part_at_all_is_one_valid_key() -> None:
    """1: "No part at all is one valid key": led, joined, and forgotten as any other."""
    assert meet((), ())
    executor = HeldExecutor()
    flight = ShardedFlight(executor=executor)
    flight.do_future(object)
    flight.forget()
    assert flight.stats().forgotten == 1
    assert flight.do(lambda: "v") == ("v", False)
    executor.run_all()
    assert flight.in_flight() == 0


def test_a_tuple_is_forgotten_as_itself() -> None:
    """1: "nor do `do(fn, ("a", "b"))` and `do(fn, "a", "b")`": `forget` tells them apart too."""
    executor = HeldExecutor()
    flight = ShardedFlight(executor=executor)
    flight.do_future(object, ("a", "b"))
    flight.forget("a", "b")
    assert flight.stats().forgotten == 0
    flight.forget(("a", "b"))
    assert flight.stats().forgotten == 1
    executor.run_all()


# --- build_key ---


@pytest.mark.parametrize("key", ["text", 7, None, (), ("a", "b"), frozenset({1}), object()])
def test_build_key_may_return_any_hashable(key: object) -> None:
    """1: "`build_key(*parts)` may return any hashable": it gets the parts, and its key decides."""
    seen: list[tuple[Any, ...]] = []

    def build_key(*parts: Any) -> object:
        seen.append(parts)
        return key

    parts = ("a", 1, [2])
    assert meet(parts, ("quite", "other"), build_key=build_key)
    assert parts in seen
    assert ("quite", "other") in seen
    assert meet((), parts, build_key=build_key)


def test_build_key_serves_every_method() -> None:
    """1: `build_key` is asked by `do`, `do_async`, `do_future` and `forget` alike."""
    executor = HeldExecutor()
    flight = ShardedFlight(executor=executor, build_key=lambda *parts: len(parts))
    led = flight.do_future(lambda: "v", "a", "b")

    async def follow() -> Any:
        follower = asyncio.create_task(flight.do_async(None, "c", "d"))  # type: ignore[arg-type]
        while flight.stats().waiting < 1:
            await asyncio.sleep(0)
        executor.run_all()
        return await follower

    assert asyncio.run(follow()) == led.result(PATIENCE) == ("v", True)
    flight.do_future(lambda: "v", "a", "b")
    flight.forget("e", "f")
    assert flight.stats().forgotten == 1
    assert flight.do(lambda: "own", "g", "h") == ("own", False)
    executor.run_all()


def test_concat_key_joins_without_a_separator_and_says_so() -> None:
    """1: "`concat_key` (Go's default, documented as colliding)"."""
    assert concat_key() == ""
    assert concat_key("test") == "test"
    assert concat_key("hello", "world") == "helloworld"
    assert concat_key("a", "b", "c") == "abc"
    assert meet(("ab", "c"), ("a", "bc"), build_key=concat_key)
    assert not meet(("ab", "c"), ("ab", "d"), build_key=concat_key)
    assert "colli" in (concat_key.__doc__ or "").lower()


@pytest.mark.parametrize("separator", [None, b"/", 1])
def test_a_separator_is_a_str(separator: Any) -> None:
    with pytest.raises(TypeError, match="separator must be a str"):
        join_key(separator)


def test_join_key_joins_with_its_separator() -> None:
    """1: "Shipped in `shardedflight.keys`: ... and `join_key(separator)`"."""
    by_colon = join_key(":")
    assert by_colon() == ""
    assert by_colon("test") == "test"
    assert by_colon("hello", "world") == "hello:world"
    assert by_colon("a", "b", "c") == "a:b:c"
    assert join_key("")("a", "b") == "ab"
    assert join_key("--")("a", "b") == "a--b"
    assert not meet(("ab", "c"), ("a", "bc"), build_key=by_colon)
    assert meet(("ab", "c"), ("ab", "c"), build_key=by_colon)
    assert meet(("a:b", "c"), ("a", "b:c"), build_key=by_colon)


# --- hash ---


@pytest.mark.parametrize("shards", [1, 2, 16])
@pytest.mark.parametrize(
    "value",
    [0, 1, -1, -2, 15, 2**31, 2**63 - 1, 2**63, -(2**63), 2**64, 2**64 + 1, 2**200, -(2**200)],
)
def test_hash_may_return_any_int(value: int, shards: int) -> None:
    """1: "`hash(key)` may return any int (negative or wider than 64 bits too)".

    Keys of one hash sit in one shard and are told apart by their equality.
    """
    executor = HeldExecutor()
    flight = ShardedFlight(shards, hash=lambda key: value, executor=executor)
    futures = [flight.do_future(lambda n=n: n, n) for n in range(10)]
    assert max(flight.stats().per_shard) == 10
    followed = [flight.do_future(lambda: "own", n) for n in range(10)]
    assert len(executor.held) == 10
    executor.run_all()
    assert [future.result(PATIENCE) for future in futures] == [(n, True) for n in range(10)]
    assert [future.result(PATIENCE) for future in followed] == [(n, True) for n in range(10)]
    assert flight.in_flight() == 0


def in_shards(flight: ShardedFlight, executor: HeldExecutor, keys: Iterator[Any]) -> list[int]:
    """How many executions of these keys each shard holds at once."""
    for key in keys:
        flight.do_future(int, key)
    per_shard = list(flight.stats().per_shard)
    executor.run_all()
    return per_shard


@pytest.mark.parametrize("shards", [2, 16, 64])
def test_keys_in_steps_of_a_power_of_two_spread_over_all_shards(shards: int) -> None:
    """1: the default hash is "mixed so that keys in steps of 2^k still spread over all shards"."""
    executor = HeldExecutor()
    flight = ShardedFlight(shards, executor=executor)
    each = 16
    for k in range(61):
        per_shard = in_shards(flight, executor, (n << k for n in range(shards * each)))
        assert sum(per_shard) == shards * each
        assert min(per_shard) > 0, f"steps of 2**{k} leave shards empty: {per_shard}"
        assert max(per_shard) <= 4 * each, f"steps of 2**{k} crowd a shard: {per_shard}"


@pytest.mark.parametrize("sign", [1, -1])
def test_pairs_in_steps_of_a_power_of_two_spread_over_all_shards(sign: int) -> None:
    """1: as above for keys of two parts, and for negative numbers."""
    executor = HeldExecutor()
    flight = ShardedFlight(16, executor=executor)
    each = 32
    for k in range(0, 61, 3):
        pairs = (("item", sign * n << k) for n in range(16 * each))
        for pair in pairs:
            flight.do_future(int, *pair)
        per_shard = flight.stats().per_shard
        executor.run_all()
        assert min(per_shard) > 0, f"steps of 2**{k} leave shards empty: {per_shard}"
        assert max(per_shard) <= 4 * each, f"steps of 2**{k} crowd a shard: {per_shard}"


@pytest.mark.parametrize(
    "keys",
    [
        [f"item:{n}" for n in range(512)],
        [object() for _ in range(512)],
        [float(n) for n in range(512)],
        [n / 512 for n in range(512)],
        [1 << n for n in range(512)],
    ],
    ids=["text", "objects", "floats", "fractions", "powers of two"],
)
def test_other_keys_spread_over_all_shards(keys: list[Any]) -> None:
    """1: the default is "Python's own keyed `hash`", whatever the keys are."""
    executor = HeldExecutor()
    per_shard = in_shards(ShardedFlight(8, executor=executor), executor, iter(keys))
    assert min(per_shard) > 0


# The vectors are those of the FNV authors' own public-domain test suite, test_fnv.c.
FNV1A_64 = [
    (b"", 0xCBF29CE484222325),
    (b"a", 0xAF63DC4C8601EC8C),
    (b"b", 0xAF63DF4C8601F1A5),
    (b"c", 0xAF63DE4C8601EFF2),
    (b"d", 0xAF63D94C8601E773),
    (b"e", 0xAF63D84C8601E5C0),
    (b"f", 0xAF63DB4C8601EAD9),
    (b"fo", 0x08985907B541D342),
    (b"foo", 0xDCB27518FED9D577),
    (b"foob", 0xDD120E790C2512AF),
    (b"fooba", 0xCAC165AFA2FEF40A),
    (b"foobar", 0x85944171F73967E8),
    (b"ch", 0x08A25607B54A22AE),
    (b"cho", 0xF5FAF0190CF90DF3),
    (b"chon", 0xF27397910B3221C7),
    (b"chong", 0x2C8C2B76062F22E0),
    (b"chongo", 0xE150688C8217B8FD),
    (b"chongo was here!\n", 0x46810940EFF5F915),
    (b"ch\x00", 0xF5FADD190CF8EDAA),
    (b"chongo was here!\x00", 0x46810F40EFF60347),
    (b"feedfacedeadbeef", 0xCAC54572BB1A6FC8),
    (b"http://www.isthe.com/chongo/bio.html", 0x8C7609B4A9F10907),
]


@pytest.mark.parametrize(("data", "expected"), FNV1A_64)
def test_fnv1a_64_equals_the_published_vectors(data: bytes, expected: int) -> None:
    """1: "`fnv1a_64` for `str` and `bytes`, equal to the published FNV-1a test vectors"."""
    assert fnv1a_64(data) == expected
    assert fnv1a_64(data.decode("ascii")) == expected


def test_fnv1a_64_of_text_is_that_of_its_utf8() -> None:
    """1: "`fnv1a_64` for `str` and `bytes`": text beyond ASCII as UTF-8, as in Go."""
    for text in ("é", "ключ", "鍵", "🔑", "a\x00b"):
        assert fnv1a_64(text) == fnv1a_64(text.encode())
        assert 0 <= fnv1a_64(text) < 2**64


@pytest.mark.parametrize("key", [1, None, ("a", "b")], ids=repr)
def test_fnv1a_64_refuses_other_keys(key: Any) -> None:
    """1: "`fnv1a_64` for `str` and `bytes`": for other keys the caller is told."""
    with pytest.raises(TypeError):
        fnv1a_64(key)
    flight = ShardedFlight(hash=fnv1a_64)
    with pytest.raises(TypeError):
        flight.do(lambda: None, key)
    assert flight.in_flight() == 0


@pytest.mark.parametrize(
    "function",
    [fnv1a_64, lambda text: zlib.crc32(text.encode()), lambda text: -zlib.adler32(text.encode())],
    ids=["fnv1a_64", "crc32", "negative adler32"],
)
def test_a_hash_of_text_plugs_in(function: Callable[[str], int]) -> None:
    """1: "Any `str -> int` such as `zlib.crc32` wrapped for text ... plugs in"."""
    options: dict[str, Any] = {"hash": function, "build_key": join_key("/"), "shards": 16}
    assert meet(("a", "b"), ("a", "b"), **options)
    assert not meet(("a", "b"), ("a", "c"), **options)
    executor = HeldExecutor()
    flight = ShardedFlight(16, hash=function, executor=executor)
    per_shard = in_shards(flight, executor, (f"item:{n}" for n in range(1024)))
    assert min(per_shard) > 0


def test_the_hash_only_picks_the_shard() -> None:
    """1: a hash that changes its mind while a key is in flight leaves nothing behind."""
    answers = iter(range(1000))
    executor = HeldExecutor()
    flight = ShardedFlight(16, hash=lambda key: next(answers), executor=executor)
    futures = [flight.do_future(object, "k") for _ in range(50)]
    executor.run_all()
    for future in futures:
        future.result(PATIENCE)
    assert flight.in_flight() == 0
    assert flight.stats().per_shard == (0,) * 16


# --- keys and hooks that fail ---


def by_do(flight: ShardedFlight, function: Callable[[], Any], *parts: Any) -> Any:
    return flight.do(function, *parts)


def by_do_async(flight: ShardedFlight, function: Callable[[], Any], *parts: Any) -> Any:
    async def call() -> Any:
        async def coroutine() -> Any:
            return function()

        return await flight.do_async(coroutine, *parts)

    return asyncio.run(call())


def by_do_future(flight: ShardedFlight, function: Callable[[], Any], *parts: Any) -> Any:
    return flight.do_future(function, *parts).result(PATIENCE)


METHODS = {"do": by_do, "do_async": by_do_async, "do_future": by_do_future}
each_method = pytest.mark.parametrize("method", METHODS)


def assert_untouched(flight: ShardedFlight, method: str, *good: Any) -> None:
    """Nothing was registered, and the next call works."""
    stats = flight.stats()
    assert (flight.in_flight(), stats.executions, stats.waiting) == (0, 0, 0)
    assert METHODS[method](flight, lambda: "next", *good) == ("next", False)
    assert flight.in_flight() == 0


@each_method
@pytest.mark.parametrize("hook", [None, lambda key: 0])
@pytest.mark.parametrize("shards", [1, 16])
@pytest.mark.parametrize("parts", [([],), ({},), ("a", []), ("a", ("b", {1}))], ids=repr)
def test_an_unhashable_key(method: str, shards: int, parts: tuple[Any, ...], hook: Any) -> None:
    """1: "An unhashable key ...: the caller gets that error, nothing is registered"; also where a
    `hash` would have an answer."""
    flight = ShardedFlight(shards, hash=hook)
    with pytest.raises(TypeError, match="unhashable"):
        METHODS[method](flight, lambda: pytest.fail("the function ran"), *parts)
    with pytest.raises(TypeError, match="unhashable"):
        flight.forget(*parts)
    assert_untouched(flight, method, "a", ("b", 1))


@each_method
@pytest.mark.parametrize("shards", [1, 16])
@pytest.mark.parametrize("answer", ["8", None, 1.0, b"1", (1,)], ids=repr)
def test_a_hash_that_does_not_return_an_int(method: str, shards: int, answer: Any) -> None:
    """1: "a `hash` that does not return an int ...: the caller gets that error"."""
    flight = ShardedFlight(shards, hash=lambda key: answer if key == "bad" else 0)
    with pytest.raises(TypeError):
        METHODS[method](flight, lambda: pytest.fail("the function ran"), "bad")
    with pytest.raises(TypeError):
        flight.forget("bad")
    assert_untouched(flight, method, "good")


@each_method
@pytest.mark.parametrize("kind", [LookupError, KeyboardInterrupt])
@pytest.mark.parametrize("hook", ["build_key", "hash"])
@pytest.mark.parametrize("shards", [1, 16])
def test_a_hook_that_raises(method: str, kind: type[BaseException], hook: str, shards: int) -> None:
    """1: "or either hook raising: the caller gets that error", the very object."""
    error = kind("of the hook")

    def build_key(part: str) -> str:
        if part == "bad":
            raise error
        return part

    def hash_hook(key: str) -> int:
        if key == "bad":
            raise error
        return 0

    hooks: dict[str, Any] = {"build_key": build_key, "hash": hash_hook}
    flight = ShardedFlight(shards, **{hook: hooks[hook]})
    with pytest.raises(kind) as caught:
        METHODS[method](flight, lambda: pytest.fail("the function ran"), "bad")
    assert caught.value is error
    with pytest.raises(kind) as caught:
        flight.forget("bad")
    assert caught.value is error
    assert_untouched(flight, method, "good")


@each_method
def test_a_build_key_that_returns_an_unhashable(method: str) -> None:
    """1: "An unhashable key": the builder's no less than the caller's."""
    flight = ShardedFlight(build_key=lambda part: part)
    with pytest.raises(TypeError, match="unhashable"):
        METHODS[method](flight, lambda: pytest.fail("the function ran"), [])
    assert_untouched(flight, method, "good")


class Part:
    """A key's part of which the hash fails."""

    def __hash__(self) -> int:
        raise LookupError("no hash")


def test_a_key_that_fails_is_not_kept() -> None:
    """1: "nothing leaks": after the error the key and the function are gone."""
    flight = ShardedFlight(8)

    def attempt() -> list["weakref.ref[Any]"]:
        part, function = Part(), lambda: None
        for call in (flight.do, flight.do_future):
            with pytest.raises(LookupError, match="no hash"):
                outcome = call(function, part)
                if isinstance(outcome, Future):
                    outcome.result(PATIENCE)
        with pytest.raises(LookupError, match="no hash"):
            flight.forget(part)
        return [weakref.ref(part), weakref.ref(function)]

    kept = attempt()
    gc.collect()
    assert [ref() for ref in kept] == [None, None]


# --- keys whose __eq__ and __hash__ are Python code ---


class Meddler:
    """A key, all of one hash, that does `meddle` whenever it is compared or hashed."""

    def __init__(self, name: str, meddle: Callable[[], object]) -> None:
        self.name = name
        self.meddle = meddle
        self.busy = threading.local()

    def _meddle(self) -> None:
        if not getattr(self.busy, "now", False):
            self.busy.now = True
            try:
                self.meddle()
            finally:
                self.busy.now = False

    def __hash__(self) -> int:
        self._meddle()
        return 1

    def __eq__(self, other: object) -> bool:
        self._meddle()
        return isinstance(other, Meddler) and self.name == other.name


@pytest.mark.parametrize("same", [True, False])
def test_a_key_that_calls_the_flight_when_compared(same: bool) -> None:
    """1: a key's own code may use the flight: no lock is held while it runs."""
    executor = HeldExecutor()
    flight = ShardedFlight(1, executor=executor)
    meddled = 0

    def meddle() -> None:
        nonlocal meddled
        meddled += 1
        assert flight.do(lambda: "inner", "elsewhere") == ("inner", False)
        flight.forget("elsewhere")
        assert flight.in_flight() == flight.stats().in_flight

    def body() -> None:
        one = Meddler("one", meddle)
        other = Meddler("one" if same else "other", meddle)
        first = flight.do_future(object, one)
        second = flight.do_future(object, other)
        assert len(executor.held) == (1 if same else 2)
        executor.run_all()
        assert (first.result(PATIENCE)[0] is second.result(PATIENCE)[0]) is same

    spawn(body).result(PATIENCE)
    assert meddled > 0
    assert flight.in_flight() == 0


def test_a_key_that_changes_the_table_while_it_is_looked_up() -> None:
    """1: keys that end, forget and start executions of their own shard while being compared."""
    executor = HeldExecutor()
    flight = ShardedFlight(1, executor=executor)
    keys: list[Meddler] = []
    futures: list[Future[Any]] = []

    def meddle() -> None:
        flight.forget(keys[0])
        if executor.held:
            executor.run_next()
        futures.extend(flight.do_future(object, n) for n in range(40))

    def body() -> None:
        keys.append(Meddler("one", lambda: None))
        futures.append(flight.do_future(object, keys[0]))
        futures.append(flight.do_future(object, keys[0]))
        keys.append(Meddler("one", meddle))
        futures.append(flight.do_future(object, keys[1]))
        keys.append(Meddler("other", meddle))
        futures.append(flight.do_future(object, keys[2]))
        while executor.held:
            executor.run_next()

    spawn(body).result(PATIENCE)
    for future in futures:
        future.result(PATIENCE)
    assert flight.in_flight() == 0
    assert flight.do(lambda: "v", Meddler("one", lambda: None)) == ("v", False)


class Compared:
    """A key equal to all of its kind, that calls `compared` when that is found out."""

    @staticmethod
    def compared() -> None:
        pass

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        Compared.compared()
        return isinstance(other, Compared)


@each_method
@pytest.mark.parametrize("shards", [1, 16])
@pytest.mark.parametrize("followers", [0, 2])
@pytest.mark.parametrize("happens", ["ends", "is forgotten", "is forgotten and ends"])
def test_an_execution_that_ends_while_its_key_is_compared(
    method: str, shards: int, followers: int, happens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2: "at most one execution is joinable": one that has ended, or was forgotten, is not, however
    late that comes to pass. The caller that was about to join it runs its own function."""
    executor = HeldExecutor()
    flight = ShardedFlight(shards, executor=executor)
    led = flight.do_future(lambda: "first", Compared())
    followed = [flight.do_future(lambda: "own", Compared()) for _ in range(followers)]
    assert len(executor.held) == 1
    happened: list[str] = []

    def compared() -> None:
        if not happened:
            happened.append(happens)
            if "forgotten" in happens:
                flight.forget(Compared())
            if "ends" in happens:
                executor.run_next()

    monkeypatch.setattr(Compared, "compared", staticmethod(compared))
    if method == "do_future":
        future = flight.do_future(lambda: "own", Compared())
        executor.run_next(-1)
        assert future.result(PATIENCE) == ("own", False)
    else:
        assert METHODS[method](flight, lambda: "own", Compared()) == ("own", False)
    assert happened
    executor.run_all()
    assert led.result(PATIENCE) == ("first", followers > 0)
    assert [future.result(PATIENCE) for future in followed] == [("first", True)] * followers
    stats = flight.stats()
    assert (stats.executions, stats.shared, stats.waiting) == (2, followers, 0)
    assert flight.in_flight() == 0


def test_keys_that_deadlock_nobody_from_two_threads() -> None:
    """1: as above from several threads at once, the keys calling across two shards."""
    flight = ShardedFlight(2, hash=lambda key: key.name if isinstance(key, Cross) else int(key))
    barrier = threading.Barrier(4)

    class Cross:
        def __init__(self, name: int) -> None:
            self.name = name

        def __hash__(self) -> int:
            return 1

        def __eq__(self, other: object) -> bool:
            flight.do(lambda: None, 1 - self.name)
            return isinstance(other, Cross) and self.name == other.name

    def body(name: int) -> None:
        barrier.wait(PATIENCE)
        for _ in range(200):
            flight.do(lambda: None, Cross(name))

    for outcome in [spawn(body, n % 2) for n in range(4)]:
        outcome.result(PATIENCE)
    assert flight.in_flight() == 0


class Touchy:
    """A key, all of one hash, whose comparison raises on demand."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        if Touchy.error is not None:
            raise Touchy.error
        return isinstance(other, Touchy) and self.name == other.name

    error: BaseException | None = None


@pytest.fixture
def touchy() -> Iterator[type[Touchy]]:
    yield Touchy
    Touchy.error = None


@each_method
def test_a_key_whose_comparison_raises(method: str, touchy: type[Touchy]) -> None:
    """1: the caller whose key cannot be compared gets that error; the running one is unharmed."""
    executor = HeldExecutor()
    flight = ShardedFlight(1, executor=executor)
    led = flight.do_future(lambda: "v", touchy("one"))
    touchy.error = LookupError("no comparison")
    with pytest.raises(LookupError) as caught:
        METHODS[method](flight, lambda: pytest.fail("the function ran"), touchy("one"))
    assert caught.value is touchy.error
    touchy.error = None
    assert flight.in_flight() == 1
    followed = flight.do_future(lambda: "own", touchy("one"))
    executor.run_all()
    assert led.result(PATIENCE) == followed.result(PATIENCE) == ("v", True)
    assert flight.in_flight() == 0


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_comparison_that_raises_while_an_execution_ends(
    order: tuple[int, int], touchy: type[Touchy]
) -> None:
    """4 and 1: "No key is ever stuck": two keys of one hash, comparing fails when they end."""
    executor = HeldExecutor()
    flight = ShardedFlight(1, executor=executor)
    led = [flight.do_future(lambda n=n: n, touchy(str(n))) for n in range(2)]
    followed = [flight.do_future(lambda: "own", touchy(str(n))) for n in range(2)]
    assert len(executor.held) == 2
    touchy.error = LookupError("no comparison")
    executor.run_next(order[0])
    executor.run_next(0)
    touchy.error = None
    assert [future.result(PATIENCE) for future in led] == [(0, True), (1, True)]
    assert [future.result(PATIENCE) for future in followed] == [(0, True), (1, True)]
    assert flight.in_flight() == 0
    for n in range(2):
        assert flight.do(lambda: "next", touchy(str(n))) == ("next", False)


class Box:
    """A key that changes its hash and its equality with its value."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __hash__(self) -> int:
        return hash(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Box) and self.value == other.value


@pytest.mark.parametrize("shards", [1, 16])
@pytest.mark.parametrize("error", [None, LookupError("of the function")], ids=["value", "error"])
def test_a_key_that_changes_while_in_flight(shards: int, error: Exception | None) -> None:
    """4 and 1: "No key is ever stuck": neither under the key's old value nor under its new one."""
    flight = ShardedFlight(shards)
    box = Box(1)

    def change(value: int) -> int:
        box.value = value
        if error is not None:
            raise error
        return value

    for value in (2, 3, 1, 1, 4):
        before = box.value
        if error is None:
            assert flight.do(lambda value=value: change(value), box) == (value, False)
        else:
            with pytest.raises(LookupError):
                flight.do(lambda value=value: change(value), box)
        assert flight.in_flight() == 0
        assert flight.stats().per_shard == (0,) * shards
        for key in (box, Box(before), Box(value)):
            assert flight.do(lambda: "next", key) == ("next", False)


@pytest.mark.parametrize("shards", [1, 16])
def test_changed_keys_of_several_executions(shards: int) -> None:
    """4 and 1: a changed key that equals another in flight takes nothing from that one."""
    executor = HeldExecutor()
    flight = ShardedFlight(shards, executor=executor)
    boxes = [Box(n) for n in range(20)]
    futures = [flight.do_future(lambda n=n: n, box) for n, box in enumerate(boxes)]
    for box in boxes:
        box.value = 7
    followed = flight.do_future(lambda: "own", boxes[7])
    while executor.held:
        executor.run_next(len(executor.held) // 2)
    assert [future.result(PATIENCE)[0] for future in futures] == list(range(20))
    assert followed.result(PATIENCE)[0] in (7, "own")
    assert flight.in_flight() == 0
    for n in range(20):
        assert flight.do(lambda: "next", Box(n)) == ("next", False)


# --- what the constructor refuses ---


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("build_key", "join"),
        ("build_key", 7),
        ("hash", "fnv1a"),
        ("hash", 7),
        ("executor", "pool"),
        ("executor", object),
        ("executor", 7),
        ("on_abandon", "stop"),
        ("on_abandon", ""),
        ("on_abandon", None),
        ("on_abandon", True),
        ("on_abandon", ["cancel"]),
        ("name", 7),
        ("name", b"name"),
        ("name", ["name"]),
    ],
)
def test_the_constructor_names_what_it_refuses(option: str, value: Any) -> None:
    """A wrong option is a `TypeError` or `ValueError` with the option and the value in it."""
    with pytest.raises((TypeError, ValueError)) as caught:
        ShardedFlight(**{option: value})
    assert option in str(caught.value)
    assert repr(value) in str(caught.value)


def test_the_constructor_takes_one_argument_by_position() -> None:
    """`ShardedFlight(shards=16, *, build_key=None, ...)`: the others go by their names."""
    with pytest.raises(TypeError):
        ShardedFlight(1, concat_key)  # type: ignore[misc]
    with pytest.raises(TypeError):
        ShardedFlight(unknown=1)  # type: ignore[call-arg]


def test_the_constructor_takes_none_as_left_out() -> None:
    """`build_key=None, hash=None, executor=None, name=None` and both words of `on_abandon`."""
    for on_abandon in ("cancel", "finish"):
        flight = ShardedFlight(
            None, build_key=None, hash=None, executor=None, on_abandon=on_abandon, name=None
        )
        assert flight.shards == ShardedFlight().shards
        assert flight.do_future(lambda: "v", "k").result(PATIENCE) == ("v", False)
