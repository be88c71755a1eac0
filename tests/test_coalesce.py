"""Issue 4, item 1: `@coalesce`, sentence by sentence, in threads and in coroutines."""

import abc
import asyncio
import contextlib
import copy
import dataclasses
import functools
import gc
import inspect
import pickle
import signal
import sys
import threading
import types
import typing
import weakref
from collections import UserDict, defaultdict
from collections.abc import Callable, Iterator, MutableMapping
from concurrent.futures import Future
from typing import Any

import pytest
from cachetools import LRUCache, TTLCache
from support import PATIENCE, eventually, eventually_async, spawn, spawn_loop
from test_processes import in_child, need_fork

import shardedflight
from shardedflight import (
    DeadlockError,
    FlightTimeout,
    ShardedFlight,
    _coalesce,
    _lock,
    coalesce,
)
from shardedflight.keys import concat_key, fnv1a_64

#: What a decorated function may be.
KINDS = ["function", "coroutine"]
each_kind = pytest.mark.parametrize("kind", KINDS)


class Load:
    """A function in the test's hands, decorated: each run is counted, and ends when `go` is set.

    Called with anything, in a thread or, for a coroutine function, in a loop of its own.
    """

    def __init__(self, kind: str = "function", **options: Any) -> None:
        self.kind = kind
        self.calls: list[Any] = []
        self.go = threading.Event()
        self.error: BaseException | None = None

        def load(key: Any = 1, /, *args: Any, **kwargs: Any) -> Any:
            self.calls.append(key)
            assert self.go.wait(PATIENCE)
            return self.end(key)

        async def load_async(key: Any = 1, /, *args: Any, **kwargs: Any) -> Any:
            self.calls.append(key)
            await eventually_async(self.go.is_set)
            return self.end(key)

        fn: Any = load if kind == "function" else load_async
        self.load: Any = coalesce(**options)(fn)
        self.flight: ShardedFlight = self.load.flight

    def end(self, key: Any) -> Any:
        if self.error is not None:
            raise self.error
        return ["value of", key, len(self.calls)]

    def call(self, *args: Any, **kwargs: Any) -> "Future[Any]":
        if self.kind == "function":
            return spawn(self.load, *args, **kwargs)
        return spawn_loop(lambda: self.load(*args, **kwargs))

    def lead(self, *args: Any, **kwargs: Any) -> "Future[Any]":
        """A call that runs the function."""
        before = len(self.calls)
        future = self.call(*args, **kwargs)
        eventually(lambda: len(self.calls) > before or future.done(), "the leader's run")
        return future

    def follow(self, *args: Any, **kwargs: Any) -> "Future[Any]":
        """A call that waits for another's run."""
        before = self.flight.stats().waiting
        future = self.call(*args, **kwargs)
        eventually(lambda: self.flight.stats().waiting > before or future.done(), "a follower")
        return future

    def now(self, *args: Any, **kwargs: Any) -> Any:
        """A call that nothing holds up."""
        self.go.set()
        return self.call(*args, **kwargs).result(PATIENCE)


def run(kind: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    """The value of a call, of a function of either kind."""
    if kind == "function":
        return function(*args, **kwargs)

    async def main() -> Any:
        return await function(*args, **kwargs)

    return asyncio.run(main())


def recorder(kind: str) -> tuple[Any, list[tuple[Any, ...]]]:
    """A function of any arguments that records them, and the record."""
    seen: list[tuple[Any, ...]] = []

    def record(*args: Any) -> int:
        seen.append(args)
        return len(seen)

    async def record_async(*args: Any) -> int:
        return record(*args)

    return (record if kind == "function" else record_async), seen


# "Concurrent calls with equal arguments run once and everybody gets the plain return
# value."


@each_kind
def test_concurrent_calls_with_equal_arguments_run_once(kind: str) -> None:
    work = Load(kind)
    calls = [work.lead(7), *(work.follow(7) for _ in range(5))]
    work.go.set()
    values = [call.result(PATIENCE) for call in calls]
    assert work.calls == [7]
    assert values[0] == ["value of", 7, 1]
    assert all(value is values[0] for value in values)


@each_kind
def test_calls_with_other_arguments_run_beside_them(kind: str) -> None:
    work = Load(kind)
    calls = [work.lead(key) for key in (1, 2, "1", None)]
    work.go.set()
    assert [call.result(PATIENCE)[1] for call in calls] == [1, 2, "1", None]
    assert work.calls == [1, 2, "1", None]


@each_kind
def test_without_a_cache_the_next_call_runs(kind: str) -> None:
    work = Load(kind)
    assert work.now(7) == ["value of", 7, 1]
    assert work.now(7) == ["value of", 7, 2]
    assert work.load.cache is None


@each_kind
def test_an_error_reaches_everybody_and_is_not_remembered(kind: str) -> None:
    work = Load(kind, cache={})
    work.error = LookupError("gone")
    calls = [work.lead(7), work.follow(7)]
    work.go.set()
    for call in calls:
        with pytest.raises(LookupError, match="gone"):
            call.result(PATIENCE)
    assert work.calls == [7]
    assert work.load.cache == {}
    work.error = None
    assert work.now(7) == ["value of", 7, 2]


# "bare or with arguments"


def test_bare_and_with_and_without_options() -> None:
    def load(x: int) -> int:
        return x + 1

    for decorated in (coalesce(load), coalesce()(load), coalesce(typed=True)(load)):
        assert decorated(1) == 2
        assert decorated.__wrapped__ is load


def test_one_decorator_for_two_functions() -> None:
    cache: dict[Any, Any] = {}
    decorate = coalesce(cache=cache)
    plus = decorate(lambda x: x + 1)
    minus = decorate(lambda x: x - 1)
    assert (plus(1), minus(1), plus(1), minus(1)) == (2, 0, 2, 0)
    assert len(cache) == 2
    assert plus.flight is not minus.flight


# "Without `key`, arguments are bound to the signature, so `f(1)`, `f(x=1)` and defaults are one
# call" - a cache tells which calls are one.


@each_kind
def test_one_call_however_its_arguments_are_given(kind: str) -> None:
    record, seen = recorder(kind)

    def load_now(x: int, y: int = 2, *, z: int = 3) -> Any:
        return record(x, y, z)

    async def load_async(x: int, y: int = 2, *, z: int = 3) -> Any:
        return await record(x, y, z)

    fn: Any = load_now if kind == "function" else load_async
    load = coalesce(cache={})(fn)
    for args, kwargs in (
        ((1,), {}),
        ((), {"x": 1}),
        ((1, 2), {}),
        ((1,), {"z": 3}),
        ((), {"z": 3, "y": 2, "x": 1}),
        ((1,), {"y": 2, "z": 3}),
    ):
        assert run(kind, load, *args, **kwargs) == 1
    assert seen == [(1, 2, 3)]
    assert run(kind, load, 1, z=4) == 2
    assert run(kind, load, 2, 1) == 3


def test_positional_only_and_variable_arguments() -> None:
    seen: list[Any] = []

    @coalesce(cache={})
    def load(a: Any, /, b: Any = 0, *rest: Any, c: Any = 0, **more: Any) -> int:
        seen.append((a, b, rest, c, more))
        return len(seen)

    different: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((1,), {}),
        ((1, 2), {}),
        ((1, 2, 3), {}),
        ((1, 2, (3,)), {}),
        ((1, 2, 3, 4), {}),
        ((1,), {"c": 2}),
        ((1,), {"a": 2}),
        ((1,), {"d": 2}),
        ((1,), {"d": 2, "e": 3}),
        ((1,), {"self": 2, "key": 3, "fn": 4, "args": 5, "kwargs": 6}),
        ((1, ("d", 2)), {}),
        ((1, 0, ("d", 2)), {}),
    ]
    for number, (args, kwargs) in enumerate(different, 1):
        assert load(*args, **kwargs) == number
        assert load(*args, **dict(reversed(kwargs.items()))) == number
    assert load(1, b=0, c=0) == 1
    assert load(1, e=3, d=2) == load(1, d=2, e=3)
    assert len(seen) == len(different)
    assert seen[9] == (1, 0, (), 0, {"self": 2, "key": 3, "fn": 4, "args": 5, "kwargs": 6})


def test_names_that_could_be_mistaken_for_helpers() -> None:
    @coalesce(typed=True, cache={})
    def load(_type: Any, _: Any, __: Any, types: Any = 0, **items: Any) -> tuple[Any, ...]:
        return _type, _, __, types, items

    assert load(1, 2, __=3, x=4) == (1, 2, 3, 0, {"x": 4})


@each_kind
def test_arguments_that_do_not_fit_raise_what_the_function_would(kind: str) -> None:
    def load(x: int, *, y: int) -> int:
        raise AssertionError("not run")

    async def load_async(x: int, *, y: int) -> int:
        raise AssertionError("not run")

    fn: Any = load if kind == "function" else load_async
    for args, kwargs in (((), {}), ((1, 2), {"y": 1}), ((1,), {}), ((1,), {"y": 1, "z": 2})):
        with pytest.raises(TypeError) as original:
            fn(*args, **kwargs)
        with pytest.raises(TypeError) as called:
            run(kind, coalesce(fn), *args, **kwargs)
        with pytest.raises(TypeError) as forgotten:
            coalesce(fn).forget(*args, **kwargs)
        assert str(called.value) == str(forgotten.value) == str(original.value)


def test_a_signature_is_that_of_the_wrapped_function() -> None:
    def load(x: int = 1) -> int:
        return x

    @functools.wraps(load)
    def outer(*args: Any, **kwargs: Any) -> int:
        return load(*args, **kwargs) + len(seen.append(args) or seen)

    seen: list[Any] = []
    decorated = coalesce(cache={})(outer)
    assert decorated() == decorated(1) == decorated(x=1)
    assert len(seen) == 1


def test_annotations_are_not_evaluated() -> None:
    """A class may be named before it exists (deferred annotations, Python 3.14)."""
    code = "@coalesce\ndef load(x: Later = 1) -> Later: return x\nclass Later: ...\n"
    if sys.version_info < (3, 14):
        code = "from __future__ import annotations\n" + code
    names: dict[str, Any] = {"coalesce": coalesce, "__name__": __name__}
    exec(compile(code, "later", "exec", dont_inherit=True), names)
    load: Any = names["load"]
    assert load(2) == 2
    assert typing.get_type_hints(load, names) == {"x": names["Later"], "return": names["Later"]}


# "two functions on one flight never meet"


@each_kind
def test_two_functions_on_one_flight_never_meet(kind: str) -> None:
    flight = ShardedFlight()
    one, two = Load(kind, flight=flight), Load(kind, flight=flight, key=lambda *_: 7)
    calls = [one.lead(7), two.lead(7)]
    assert one.load.flight is two.load.flight is flight
    assert flight.in_flight() == 2
    outsider = spawn(flight.do, lambda: "not theirs", 7)
    assert outsider.result(PATIENCE) == ("not theirs", False)
    one.go.set()
    two.go.set()
    for call in calls:
        assert call.result(PATIENCE)[1] == 7
    assert (one.calls, two.calls) == ([7], [7])


def test_closures_of_one_name_never_meet() -> None:
    flight, cache = ShardedFlight(), dict[Any, Any]()

    def make(number: int) -> Callable[[], int]:
        @coalesce(flight=flight, cache=cache)
        def load() -> int:
            return number

        return load

    assert [make(number)() for number in range(3)] == [0, 1, 2]


# "nor two instances"


@dataclasses.dataclass(frozen=True)
class Equal:
    """Instances that are equal to each other, and hash alike."""

    name: str = dataclasses.field(default="", compare=False)

    @coalesce
    def load(self, held: "Load", x: int = 1) -> str:
        held.calls.append(x)
        assert held.go.wait(PATIENCE)
        return self.name

    @coalesce(cache={})
    def cached(self, x: int = 1) -> str:
        return f"{self.name} {x}"

    @coalesce(cache={})
    async def cached_async(self, x: int = 1) -> str:
        return f"{self.name} {x}"


def test_two_instances_never_meet() -> None:
    held = Load()
    one, two = Equal("one"), Equal("two")
    assert one == two
    assert hash(one) == hash(two)
    first = spawn(one.load, held)
    second = spawn(two.load, held)
    eventually(lambda: len(held.calls) == 2, "both run")
    third = spawn(Equal.load, one, held, x=1)
    eventually(lambda: Equal.load.flight.stats().waiting == 1, "a follower of the first")
    held.go.set()
    assert [call.result(PATIENCE) for call in (first, second, third)] == ["one", "two", "one"]


def test_two_instances_never_meet_in_a_cache() -> None:
    one, two = Equal("one"), Equal("two")
    assert (one.cached(), two.cached(), one.cached(2)) == ("one 1", "two 1", "one 2")
    assert (one.cached(x=1), Equal.cached(two), Equal.cached(self=one)) == (
        "one 1",
        "two 1",
        "one 1",
    )
    assert asyncio.run(one.cached_async()) == "one 1"
    assert asyncio.run(two.cached_async()) == "two 1"
    before = len(Equal.cached.cache or ())
    assert one.cached() == "one 1"
    assert len(Equal.cached.cache or ()) == before


def test_an_instance_is_not_kept_alive_and_its_id_may_come_again() -> None:
    class Query:
        @coalesce(cache={})
        def row(self, x: int) -> int:
            runs.append(x)
            return len(runs)

    runs: list[int] = []
    ids: set[int] = set()
    for number in range(1, 101):
        query = Query()
        ids.add(id(query))
        assert query.row(1) == number
        assert query.row(1) == number
        gone = weakref.ref(query)
        del query
        gc.collect(0)
        if gone() is not None:
            gc.collect()
        assert gone() is None
    assert len(ids) < 100, "no id came again: this test tests nothing here"
    assert len(runs) == 100


def test_what_is_remembered_of_instances_goes_with_them() -> None:
    from shardedflight import _coalesce

    instances = [Equal() for _ in range(10)]
    gc.collect()
    before = len(_coalesce._instances)
    assert {instance.cached() for instance in instances} == {" 1"}
    assert len(_coalesce._instances) == before + 10
    del instances
    gc.collect()
    assert len(_coalesce._instances) == before


def test_an_entry_that_was_left_behind_is_not_taken_for_another_instances() -> None:
    """As when a signal handler raised in the middle of its removal."""
    from shardedflight import _coalesce

    one = Equal("one")
    stale = _coalesce.Instance(gone := Equal("gone"))
    del gone
    assert stale() is None
    _coalesce._instances[id(one)] = stale
    assert one.cached() == "one 1"
    assert _coalesce._instances[id(one)]() is one
    assert one.cached() == "one 1"


def test_an_instance_may_be_unhashable() -> None:
    class Rows(UserDict[str, int]):
        @coalesce
        def total(self) -> int:
            return sum(self.values())

        @coalesce(cache={})
        def cached(self) -> int:
            return sum(self.values())

    with pytest.raises(TypeError, match="unhashable"):
        hash(Rows())
    one, two = Rows(a=1), Rows(a=2)
    assert (one.total(), two.total(), one.cached(), two.cached()) == (1, 2, 1, 2)


def test_an_instance_without_weak_references_works_unless_something_is_cached() -> None:
    @dataclasses.dataclass(slots=True)
    class Point:
        x: int

        @coalesce
        def twice(self) -> int:
            return 2 * self.x

        @coalesce(cache={})
        def cached(self) -> int:
            raise AssertionError("not run")

        @coalesce(cache={}, key=lambda self: self.x)
        def keyed(self) -> int:
            return 2 * self.x

    assert (Point(1).twice(), Point(2).twice()) == (2, 4)
    with pytest.raises(TypeError, match=r"Point can not be weakly referenced.*__weakref__.*key="):
        Point(1).cached()
    assert (Point(1).keyed(), Point(2).keyed(), Point(1).keyed()) == (2, 4, 2)


def test_a_method_may_take_its_instance_by_a_star() -> None:
    class Loose:
        @coalesce(cache={})
        def load(*args: Any) -> Any:
            return args

    one, two = Loose(), Loose()
    assert one.load(1) == (one, 1)
    assert two.load(1) == (two, 1)
    assert Loose.load(one, 1) is one.load(1)


def test_a_function_from_elsewhere_stays_one_in_a_class() -> None:
    """A class attribute, such as a dataclass's default, is no method defined in that class."""

    @coalesce(cache={})
    def load(url: str) -> list[str]:
        return [url]

    class Client:
        fetch = load

    first = load("url 1")
    assert Client.fetch(f"url {len(first)}") is first, "told apart by identity"
    assert load(f"url {len(first)}") is first


def test_what_has_no_name_may_stand_in_a_class() -> None:
    def add(number: int, self: Any, x: int) -> int:
        return number + x

    class Adding:
        seven: Any = coalesce(functools.partial(add, 7))

    assert Adding().seven(1) == 8


def test_a_function_put_into_a_class_later_tells_instances_apart() -> None:
    def name(self: Any) -> str:
        return self.name

    class Named(Equal):
        pass

    Named.later = coalesce(cache={})(name)  # type: ignore[attr-defined]
    one, two = Named("one"), Named("two")
    assert [one.later(), two.later(), one.later()] == ["one", "two", "one"]  # type: ignore[attr-defined]


# "on functions, coroutine functions, methods, class and static methods"


class Base:
    @coalesce(cache={})
    @classmethod
    def above_class(cls, x: int = 1) -> Any:
        return cls, x, object()

    @classmethod
    @coalesce(cache={})
    def below_class(cls, x: int = 1) -> Any:
        return cls, x, object()

    @coalesce(cache={})
    @staticmethod
    def above_static(x: int = 1) -> Any:
        return x, object()

    @staticmethod
    @coalesce(cache={})
    def below_static(x: int = 1) -> Any:
        return x, object()

    @coalesce
    @classmethod
    async def above_class_async(cls, x: int = 1) -> Any:
        return cls, x

    @classmethod
    @coalesce
    async def below_class_async(cls, x: int = 1) -> Any:
        return cls, x

    @coalesce
    @staticmethod
    async def above_static_async(x: int = 1) -> Any:
        return x

    @staticmethod
    @coalesce
    async def below_static_async(x: int = 1) -> Any:
        return x

    @coalesce(cache={})
    def method(self, x: int = 1) -> Any:
        return self, x, object()

    @coalesce
    async def method_async(self, x: int = 1) -> Any:
        return self, x


class Derived(Base):
    def method(self, x: int = 1) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("derived", super().method(x))


@pytest.mark.parametrize("name", ["above_class", "below_class"])
def test_class_methods_in_either_order(name: str) -> None:
    def ask(target: Any) -> Any:
        return getattr(target, name)

    first = ask(Base)(1)
    assert first[:2] == (Base, 1)
    assert ask(Base)(x=1) is ask(Base)() is ask(Base())(1) is first
    assert ask(Derived)(1)[:2] == (Derived, 1)
    assert ask(Derived())() is ask(Derived)(1)
    assert asyncio.run(getattr(Derived, name + "_async")(2)) == (Derived, 2)
    assert str(inspect.signature(ask(Base))) == "(x: int = 1) -> Any"


@pytest.mark.parametrize("name", ["above_static", "below_static"])
def test_static_methods_in_either_order(name: str) -> None:
    def ask(target: Any) -> Any:
        return getattr(target, name)

    first = ask(Base)(1)
    assert first[0] == 1
    assert ask(Base()) is ask(Base)
    assert ask(Base())(x=1) is ask(Derived)() is ask(Derived())(1) is first
    ask(Base()).forget(1)
    assert ask(Base)(1) is not first
    assert asyncio.run(getattr(Derived(), name + "_async")(2)) == 2


def test_methods_through_super_and_the_class() -> None:
    derived = Derived()
    kind, first = derived.method()
    assert kind == "derived"
    assert first[:2] == (derived, 1)
    assert Base.method(derived, 1) is first
    assert Base.method(self=derived) is first
    assert asyncio.run(derived.method_async(2)) == (derived, 2)


def test_a_bound_method_is_like_a_bound_method() -> None:
    one, two = Base(), Base()
    assert one.method == one.method
    assert hash(one.method) == hash(one.method)
    assert one.method != two.method
    assert one.method != Base.method
    assert one.method.__self__ is one  # type: ignore[attr-defined]
    assert one.method.__name__ == "method"
    assert one.method.__wrapped__(2)[:2] == (one, 2)
    assert "bound method Base.method" in repr(one.method)
    reference = weakref.WeakMethod(one.method)  # type: ignore[arg-type]
    again: Any = reference()
    assert again() is one.method()
    keep: Any = one.method
    Base.kept = keep  # type: ignore[attr-defined]
    assert two.kept() is one.method()  # type: ignore[attr-defined]


def test_abstract_methods_stay_abstract() -> None:
    class Abstract(abc.ABC):
        @coalesce
        @abc.abstractmethod
        def load(self) -> int: ...

    with pytest.raises(TypeError, match="abstract"):
        Abstract()  # type: ignore[abstract]


# Unhashable arguments: "a clear `TypeError` that suggests `key=`".


@each_kind
@pytest.mark.parametrize("cache", [None, {}])
def test_unhashable_arguments_suggest_a_key(kind: str, cache: Any) -> None:
    work = Load(kind, cache=cache)
    for args, kwargs in ((([1],), {}), ((1, {}), {}), ((1,), {"more": set[int]()})):
        with pytest.raises(TypeError, match=r"load.*unhashable type: .*key="):
            work.now(*args, **kwargs)
        with pytest.raises(TypeError, match=r"load.*unhashable type: .*key="):
            work.load.forget(*args, **kwargs)
    assert work.calls == []
    assert work.flight.in_flight() == 0


@each_kind
@pytest.mark.parametrize("cache", [None, {}])
def test_a_type_error_of_the_function_is_its_own(kind: str, cache: Any) -> None:
    work = Load(kind, cache=cache)
    work.error = TypeError("the function's own")
    with pytest.raises(TypeError, match=r"^the function's own$") as raised:
        work.now(1)
    assert raised.value is work.error
    assert raised.value.__context__ is None


# `key=`


@each_kind
def test_key_alone_says_what_is_one_call(kind: str) -> None:
    record, seen = recorder(kind)
    load: Any = coalesce(key=lambda items, deep=False: tuple(items), cache={})(record)
    assert run(kind, load, [1, 2]) == 1
    assert run(kind, load, (1, 2), True) == 1
    assert run(kind, load, [2]) == 2
    assert seen == [([1, 2],), ([2],)]
    load.forget([1, 2])
    assert run(kind, load, [1, 2]) == 3


def test_what_a_key_raises_or_returns_comes_out() -> None:
    def key(x: Any) -> Any:
        return 1 // x if isinstance(x, int) else x

    load = coalesce(key=key)(lambda x: x)
    with pytest.raises(ZeroDivisionError):
        load(0)
    with pytest.raises(TypeError, match="key="):
        load([])
    assert load.flight.in_flight() == 0


def test_a_key_makes_functions_without_a_signature_usable() -> None:
    with pytest.raises(ValueError, match="signature"):
        inspect.signature(dict.pop)
    with pytest.raises(TypeError, match="key="):
        coalesce(dict.pop)
    assert coalesce(key=lambda *_: 1)(dict.pop)({1: 2}, 1) == 2


def test_with_a_key_instances_may_meet_and_the_cache_is_keyed_by_it() -> None:
    cache: dict[str, str] = {}

    class Repository:
        def __init__(self, place: str) -> None:
            self.place = place

        @coalesce(key=lambda self, x: f"{self.place}/{x}", cache=cache)
        def load(self, x: int) -> str:
            return f"from {self.place}"

    assert Repository("a").load(1) == Repository("a").load(1) == "from a"
    assert Repository("b").load(1) == "from b"
    assert cache == {"a/1": "from a", "b/1": "from b"}


# Typed, "as in `functools.lru_cache`".


@pytest.mark.parametrize("typed", [False, True])
def test_typed(typed: bool) -> None:
    def load(x: Any = 1, *args: Any, y: Any = 1, **kwargs: Any) -> object:
        return object()

    ours: Any = coalesce(typed=typed, cache={})(load)
    theirs: Any = functools.lru_cache(typed=typed)(load)
    pairs: list[tuple[Any, Any]] = [
        (((1, 5), {}), ((1.0, 5), {})),
        (((1, 1), {}), ((1, True), {})),
        (((1,), {"y": 2}), ((1,), {"y": 2.0})),
        (((1,), {"z": 2}), ((1,), {"z": 2.0})),
        (((1, (1,)), {}), ((1, (1.0,)), {})),
    ]
    for (args, kwargs), (other_args, other_kwargs) in pairs:
        same = [
            load(*args, **kwargs) is load(*other_args, **other_kwargs) for load in (ours, theirs)
        ]
        assert same[0] == same[1], (args, kwargs)
        assert ours(*args, **kwargs) is ours(*args, **kwargs)


# "The wrapper keeps name, docstring, signature and types (ParamSpec), is a coroutine function where
# the original is one, and has `.flight`, `.forget(*args, **kwargs)`, `.cache`, `.__wrapped__`."


@each_kind
def test_the_wrapper_keeps_what_the_function_has(kind: str) -> None:
    def load(x: int, /, y: str = "a", *rest: int, z: bool, **more: int) -> str:
        """Loads."""
        return y

    async def load_async(x: int, /, y: str = "a", *rest: int, z: bool, **more: int) -> str:
        """Loads."""
        return y

    fn: Any = load if kind == "function" else load_async
    fn.extra = "kept"
    wrapper = coalesce(cache={})(fn)
    for name in ("__name__", "__qualname__", "__doc__", "__module__", "__annotations__", "extra"):
        assert getattr(wrapper, name) == getattr(fn, name)
    assert wrapper.__wrapped__ is fn
    assert inspect.signature(wrapper) == inspect.signature(fn)
    assert inspect.getdoc(wrapper) == "Loads."
    assert typing.get_type_hints(wrapper) == typing.get_type_hints(fn)
    assert inspect.iscoroutinefunction(wrapper) == (kind == "coroutine")
    assert isinstance(wrapper.flight, ShardedFlight)
    assert fn.__qualname__ in repr(wrapper)
    assert fn.__qualname__ in repr(wrapper.flight)
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        wrapper.missing  # noqa: B018


def test_a_coroutine_bears_the_functions_name() -> None:
    coroutine = Base().method_async()
    assert coroutine.__qualname__ == "Base.method_async"
    coroutine.close()


def test_bound_coroutine_methods_are_coroutine_functions() -> None:
    for method in (
        Base().method_async,
        Base.method_async,
        Base.above_class_async,
        Base.below_class_async,
        Base.above_static_async,
        Base.below_static_async,
    ):
        assert inspect.iscoroutinefunction(method)
    assert not inspect.iscoroutinefunction(Base().method)
    assert str(inspect.signature(Base().method)) == "(x: int = 1) -> Any"
    assert str(inspect.signature(Base.method)) == "(self, x: int = 1) -> Any"


def test_other_callables() -> None:
    class Loader:
        def __call__(self, x: int) -> int:
            return x + 1

    class AsyncLoader:
        async def __call__(self, x: int) -> int:
            return x + 1

    assert coalesce(Loader())(1) == 2
    assert inspect.iscoroutinefunction(coalesce(AsyncLoader()))
    assert asyncio.run(coalesce(AsyncLoader())(1)) == 2
    power: Any = coalesce(functools.partial(pow, 2))
    assert (power(3), power(3, 5)) == (8, 3)
    assert coalesce(Base().method.__wrapped__)(3)[1] == 3
    assert coalesce(coalesce(lambda x: x + 1))(1) == 2


@coalesce
def module_level(x: int) -> int:
    return x


class Picklable:
    @coalesce
    def method(self) -> str:
        return type(self).__name__


def test_a_decorated_function_is_pickled_and_copied_as_a_function() -> None:
    assert copy.copy(module_level) is module_level
    assert copy.deepcopy([module_level])[0] is module_level
    assert pickle.loads(pickle.dumps(module_level)) is module_level
    assert pickle.loads(pickle.dumps(Picklable().method))() == "Picklable"


def test_bad_input_is_an_error_at_decoration() -> None:
    def load(x: int) -> int:
        raise AssertionError("not run")

    async def key(x: int) -> int:
        raise AssertionError("not run")

    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"flight": object()}, TypeError, "flight must be a ShardedFlight"),
        ({"flight": ShardedFlight}, TypeError, "flight must be a ShardedFlight"),
        ({"flight": ShardedFlight(build_key=concat_key)}, ValueError, "build_key that could let"),
        (
            {"flight": ShardedFlight(build_key=lambda *p: p[0])},
            ValueError,
            "build_key that could let",
        ),
        (
            {"flight": ShardedFlight(build_key=lambda *p: p[1])},
            ValueError,
            "build_key that could let",
        ),
        ({"flight": ShardedFlight(build_key=lambda x: x)}, TypeError, "flight must take the keys"),
        ({"flight": ShardedFlight(hash=fnv1a_64)}, TypeError, "flight must take the keys"),
        ({"key": "x"}, TypeError, "key must be a function"),
        ({"key": key}, TypeError, "key must be a function that returns a hashable"),
        ({"cache": []}, TypeError, "cache must be a MutableMapping"),
        ({"cache": 128}, TypeError, "cache must be a MutableMapping"),
        ({"cache": dict}, TypeError, "cache must be a MutableMapping"),
        ({"typed": 1}, TypeError, "typed must be True or False"),
        ({"typed": True, "key": len}, ValueError, "typed= has no meaning beside key="),
        ({"timeout": "1"}, TypeError, "timeout must be a number"),
        ({"timeout": True}, TypeError, "timeout must be a number"),
        ({"timeout": -1}, ValueError, "timeout must be 0 seconds or more"),
        ({"timeout": float("nan")}, ValueError, "timeout must be 0 seconds or more"),
    ]
    for options, error, message in wrong:
        with pytest.raises(error, match=message):
            coalesce(**options)
        with pytest.raises(error, match=message):
            coalesce(load, **options)  # type: ignore[call-overload]
    for name in ("ttl", "maxsize", "lock"):
        with pytest.raises(TypeError, match=name):
            coalesce(**dict[str, Any]({name: 1}))


def test_only_functions_are_decorated() -> None:
    def generate() -> Iterator[int]:
        yield 1

    async def generate_async() -> Any:
        yield 1

    class Generating:
        def __call__(self) -> Iterator[int]:
            yield 1

    for fn in (generate, generate_async, Generating(), functools.partial(generate)):
        with pytest.raises(TypeError, match=r"generator function.*list"):
            coalesce(fn)
        with pytest.raises(TypeError, match=r"generator function.*list"):
            coalesce(cache={})(staticmethod(fn))
    for nothing in (8, "load", Base, ShardedFlight(), {}, property(lambda self: 1)):
        with pytest.raises(TypeError, match="coalesce decorates a function"):
            coalesce(nothing)  # type: ignore[call-overload]
        with pytest.raises(TypeError, match="coalesce decorates a function"):
            coalesce(typed=False)(nothing)  # type: ignore[arg-type]


def test_a_flights_build_key_may_add_to_the_decorators_keys() -> None:
    flight = ShardedFlight(build_key=lambda *parts: ("namespace", *parts))
    one, two = Load(flight=flight), Load(flight=flight)
    calls = [one.lead(1), two.lead(1), one.lead(2)]
    for work in (one, two):
        work.go.set()
    assert [call.result(PATIENCE)[1] for call in calls] == [1, 1, 2]


def test_a_flights_hash_gets_the_decorators_keys() -> None:
    seen: list[Any] = []

    def hook(key: Any) -> int:
        seen.append(key)
        return 0

    @coalesce(flight=ShardedFlight(4, hash=hook))
    def load(x: int, y: int = 2) -> int:
        return x

    assert load(1) == 1
    function, arguments = seen[-1]
    assert arguments == (1, 2)
    assert repr(function).endswith("load")


# `timeout=`


@each_kind
@pytest.mark.parametrize("cached", [False, True])
def test_a_follower_leaves_after_its_timeout(kind: str, cached: bool) -> None:
    work = Load(kind, timeout=0.02, cache={} if cached else None)
    leader = work.lead(7)
    with pytest.raises(FlightTimeout, match=r"waited 0.02 s for .*load"):
        work.call(7).result(PATIENCE)
    assert not leader.done()
    work.go.set()
    assert leader.result(PATIENCE) == ["value of", 7, 1]
    assert work.calls == [7]
    assert work.flight.stats().waiting == 0


@pytest.mark.parametrize("timeout", [0, 1e-9])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_leader_in_a_loop_comes_before_the_shortest_timeout(loop: str, timeout: float) -> None:
    module: Any = asyncio if loop == "asyncio" else pytest.importorskip("uvloop")

    @coalesce(timeout=timeout)
    async def load() -> str:
        await asyncio.sleep(0.01)
        return "value"

    with asyncio.Runner(loop_factory=module.new_event_loop) as runner:
        for _ in range(20):
            assert runner.run(load()) == "value"


@each_kind
@pytest.mark.parametrize("timeout", [0, 1e-9, 1e-3])
def test_a_leader_is_not_limited(kind: str, timeout: float) -> None:
    work = Load(kind, timeout=timeout)
    leader = work.lead(7)
    with pytest.raises(FlightTimeout):
        work.call(7).result(PATIENCE)
    work.go.set()
    assert leader.result(PATIENCE) == ["value of", 7, 1]
    assert work.now(7) == ["value of", 7, 2]


def test_a_coroutine_that_is_cancelled_is_not_timed_out() -> None:
    work = Load("coroutine", timeout=PATIENCE)

    async def main() -> None:
        leader = asyncio.create_task(work.load(7))
        await eventually_async(lambda: work.calls == [7])
        follower = asyncio.create_task(work.load(7))
        await eventually_async(lambda: work.flight.stats().waiting == 1)
        follower.cancel()
        with pytest.raises(asyncio.CancelledError):
            await follower
        work.go.set()
        assert await leader == ["value of", 7, 1]

    asyncio.run(main())


@each_kind
def test_a_timeout_of_the_functions_own_is_no_flight_timeout(kind: str) -> None:
    work = Load(kind, timeout=PATIENCE)
    work.error = TimeoutError("the function's own")
    calls = [work.lead(7), work.follow(7)]
    work.go.set()
    for call in calls:
        with pytest.raises(TimeoutError) as raised:
            call.result(PATIENCE)
        assert type(raised.value) is TimeoutError
        assert raised.value.args == ("the function's own",)


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time the test can advance."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead


def test_a_follower_that_takes_over_is_not_limited_any_more() -> None:
    go = {"lost": threading.Event(), "heir": threading.Event()}
    runs: list[str] = []

    @coalesce(timeout=3600, key=lambda who: 1)
    async def load(who: str) -> str:
        runs.append(who)
        await eventually_async(go[who].is_set)
        if who == "lost":
            raise asyncio.CancelledError
        return who

    async def main() -> None:
        leader = asyncio.create_task(load("lost"))
        await eventually_async(lambda: runs == ["lost"])
        heir = asyncio.create_task(load("heir"))
        await eventually_async(lambda: load.flight.stats().waiting == 1)
        go["lost"].set()
        await eventually_async(lambda: runs == ["lost", "heir"])
        loop.ahead += 7200
        late = asyncio.create_task(load("late"))
        await eventually_async(lambda: load.flight.stats().waiting == 1)
        loop.ahead += 7200
        with pytest.raises(FlightTimeout):
            await late
        assert not heir.done()
        go["heir"].set()
        assert await heir == "heir"
        with pytest.raises(asyncio.CancelledError):
            await leader

    loop = Clock()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(main())


def test_a_follower_whose_time_ends_while_it_takes_over_harms_nobody() -> None:
    """It leaves; what it has begun to lead goes on for a caller on another loop."""
    go = threading.Event()
    runs: list[str] = []

    @coalesce(timeout=3600, key=lambda who, gate: 1)
    async def load(who: str, gate: "asyncio.Future[None] | None") -> str:
        runs.append(who)
        if gate is not None:
            await gate
            raise asyncio.CancelledError
        await eventually_async(go.is_set)
        return who

    async def main() -> None:
        gate: asyncio.Future[None] = loop.create_future()
        leader = asyncio.create_task(load("lost", gate))
        await eventually_async(lambda: runs == ["lost"])
        heir = asyncio.create_task(load("heir", None))
        await eventually_async(lambda: load.flight.stats().waiting == 1)
        other = spawn_loop(lambda: load("other", None))
        await eventually_async(lambda: load.flight.stats().waiting == 2)
        # In the next round of the loop the leader's step comes first, then the timer.
        gate.set_result(None)
        loop.ahead += 7200
        with pytest.raises(FlightTimeout):
            await heir
        with pytest.raises(asyncio.CancelledError):
            await leader
        go.set()
        await eventually_async(other.done)
        assert other.result() == "heir"
        assert runs == ["lost", "heir"]

    loop = Clock()
    loop.set_task_factory(lambda loop, coro, **options: asyncio.Task(coro, loop=loop, **options))
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(main())


def test_a_leader_that_leaves_before_its_task_has_begun_harms_nobody() -> None:
    """As a task factory can bring about, by tasks that begin late."""
    late = threading.Event()

    @types.coroutine
    def rest(coro: Any) -> Any:
        while not late.is_set():
            yield
        return (yield from coro)

    async def delayed(coro: Any) -> Any:
        return await rest(coro)

    def factory(loop: Any, coro: Any, **options: Any) -> Any:
        runs_it = getattr(coro, "__name__", "") == "_run"
        return asyncio.Task(delayed(coro) if runs_it else coro, loop=loop, **options)

    @coalesce(timeout=3600)
    async def load() -> str:
        return "value"

    async def main() -> None:
        leader = asyncio.create_task(load())
        await eventually_async(lambda: load.flight.in_flight() == 1)
        other = spawn_loop(load)
        await eventually_async(lambda: load.flight.stats().waiting == 1)
        leader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leader
        late.set()
        await eventually_async(other.done)
        assert other.result() == "value"

    async def run_main() -> None:
        asyncio.get_running_loop().set_task_factory(factory)
        await main()

    asyncio.run(run_main())


def test_no_timer_is_left_behind() -> None:
    complaints: list[Any] = []

    @coalesce(timeout=3600)
    async def load() -> str:
        await asyncio.sleep(0)
        return "value"

    async def main() -> None:
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        leader = asyncio.create_task(load())
        assert [await load(), await leader] == ["value"] * 2
        loop.ahead += 7200
        await asyncio.sleep(0.001)

    loop = Clock()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(main())
    assert complaints == []


def test_endless_and_whole_timeouts() -> None:
    for timeout in (float("inf"), 10**6, 3):
        work = Load("coroutine", timeout=timeout)
        calls = [work.lead(1), work.follow(1)]
        work.go.set()
        assert calls[0].result(PATIENCE) is calls[1].result(PATIENCE)


# "... takes any `MutableMapping`, such as those of `cachetools`"


class Slow(MutableMapping[Any, Any]):
    """A mapping that fails the test if two threads are in it, or if the function runs meanwhile."""

    def __init__(self) -> None:
        self.entries: dict[Any, Any] = {}
        self.inside = 0
        self.asked: list[str] = []

    def _enter(self, what: str) -> None:
        self.inside += 1
        assert self.inside == 1
        self.asked.append(what)
        threading.Event().wait(0.0001)  # lets another thread in, if nothing keeps it out
        assert self.inside == 1
        self.inside -= 1

    def __getitem__(self, key: Any) -> Any:
        self._enter("get")
        return self.entries[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._enter("set")
        self.entries[key] = value

    def __delitem__(self, key: Any) -> None:
        self._enter("del")
        del self.entries[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


@each_kind
@pytest.mark.parametrize(
    "make",
    [
        dict,
        lambda: LRUCache(8),
        lambda: TTLCache(8, 3600),
        lambda: UserDict[Any, Any](),
        lambda: defaultdict[Any, Any](list),
        Slow,
    ],
    ids=["dict", "LRUCache", "TTLCache", "UserDict", "defaultdict", "own"],
)
def test_any_mutable_mapping_caches(kind: str, make: Callable[[], Any]) -> None:
    cache = make()
    work = Load(kind, cache=cache)
    assert work.load.cache is cache
    first = work.now(7)
    assert work.now(7) is first
    assert work.now(8)[1] == 8
    assert len(cache) == 2
    assert work.calls == [7, 8]
    work.load.forget(7)
    assert len(cache) == 1
    work.load.forget(7)
    assert work.now(7) == ["value of", 7, 3]


@each_kind
@pytest.mark.parametrize("value", [None, False, 0, "", ()])
def test_falsy_values_are_cached(kind: str, value: Any) -> None:
    seen: list[Any] = []

    def load() -> Any:
        seen.append(1)
        return value

    async def load_async() -> Any:
        return load()

    cached = coalesce(cache={})(load if kind == "function" else load_async)
    assert run(kind, cached) is value
    assert run(kind, cached) is value
    assert seen == [1]


# "looked up first"


@each_kind
def test_a_hit_takes_no_flight(kind: str) -> None:
    work = Load(kind, cache={}, key=lambda x: x)
    assert work.load.cache is not None
    work.load.cache[7] = "from elsewhere"
    assert work.now(7) == "from elsewhere"
    assert work.flight.stats().executions == 0
    assert work.calls == []


@each_kind
def test_a_hit_while_a_run_is_in_flight(kind: str) -> None:
    work = Load(kind, cache={}, key=lambda x: x)
    leader = work.lead(7)
    work.load.cache[7] = "from elsewhere"
    assert work.call(7).result(PATIENCE) == "from elsewhere"
    work.go.set()
    leader.result(PATIENCE)


# "looked up once more by the new leader so that no gap re-runs a function that has just finished"


@each_kind
def test_a_leader_looks_once_more(kind: str) -> None:
    """One caller misses; before it reaches the flight, another runs the function to its end."""
    missed, go_on = threading.Event(), threading.Event()

    class Flight(ShardedFlight):
        """Holds the first caller on its way into the flight."""

        def do(self, fn: Any, /, *parts: Any, timeout: Any = None) -> Any:
            if not missed.is_set():
                missed.set()
                assert go_on.wait(PATIENCE)
            return super().do(fn, *parts, timeout=timeout)

        async def do_async(self, fn: Any, /, *parts: Any) -> Any:
            if not missed.is_set():
                missed.set()
                await eventually_async(go_on.is_set)
            return await super().do_async(fn, *parts)

    work = Load(kind, cache={}, flight=Flight())
    late = work.call(7)
    assert missed.wait(PATIENCE)
    early = work.now(7)
    go_on.set()
    assert late.result(PATIENCE) is early
    assert work.calls == [7]
    assert work.flight.stats().executions == 2, "the late one did not become a leader"


@each_kind
def test_a_value_is_written_before_its_execution_ends(kind: str) -> None:
    """Afterwards there would be a gap: nothing cached, and nobody to join."""

    class Watched(dict[Any, Any]):
        def __setitem__(self, key: Any, value: Any) -> None:
            in_flight.append(work.flight.in_flight())
            super().__setitem__(key, value)

    in_flight: list[int] = []
    work = Load(kind, cache=Watched())
    assert work.now(7) == ["value of", 7, 1]
    assert in_flight == [1]


@each_kind
def test_what_a_mapping_raises_for_a_value_reaches_all_who_waited(kind: str) -> None:
    class Full(dict[Any, Any]):
        def __setitem__(self, key: Any, value: Any) -> None:
            raise OSError("the disk is full")

    work = Load(kind, cache=Full())
    calls = [work.lead(7), work.follow(7)]
    work.go.set()
    for call in calls:
        with pytest.raises(OSError, match="the disk is full"):
            call.result(PATIENCE)
    assert work.calls == [7]


# "written on success only" - with `test_an_error_reaches_everybody_and_is_not_remembered`


@each_kind
def test_a_lost_leader_caches_nothing_and_its_heir_does(kind: str) -> None:
    lost = threading.Event()
    runs: list[str] = []

    def end(who: str) -> str:
        runs.append(who)
        if who == "lost":
            assert lost.wait(PATIENCE)
            raise SystemExit
        return who

    async def end_async(who: str) -> str:
        runs.append(who)
        if who == "lost":
            await eventually_async(lost.is_set)
            raise asyncio.CancelledError
        return who

    fn: Any = end if kind == "function" else end_async
    load = coalesce(cache={}, key=lambda who: 1)(fn)

    def call(who: str) -> "Future[Any]":
        return spawn(load, who) if kind == "function" else spawn_loop(lambda: load(who))

    leader = call("lost")
    eventually(lambda: runs == ["lost"])
    heir = call("heir")
    eventually(lambda: load.flight.stats().waiting == 1)
    lost.set()
    assert heir.result(PATIENCE) == "heir"
    with pytest.raises((SystemExit, asyncio.CancelledError)):
        leader.result(PATIENCE)
    assert load.cache == {1: "heir"}


# "always guarded, since those caches are not thread-safe"


@each_kind
def test_the_mapping_is_never_entered_twice_at_once(kind: str) -> None:
    """Two functions share it: they share the lock, too."""
    cache = Slow()
    functions = [Load(kind, cache=cache), Load(kind, cache=cache)]
    for work in functions:
        work.go.set()

    def call_many(work: Load, start: int) -> None:
        for key in range(start, start + 10):
            run(kind, work.load, key % 7)
            work.load.forget((key + 3) % 7)

    callers = [spawn(call_many, work, start) for start in range(4) for work in functions]
    for caller in callers:
        caller.result(PATIENCE)
    assert {"get", "set", "del"} <= set(cache.asked)


@each_kind
def test_no_lock_is_held_while_the_function_runs(kind: str) -> None:
    """Nor by the function itself: it may call itself and its relatives on the same cache."""
    cache: dict[Any, Any] = {}
    work = Load(kind, cache=cache)
    relative = Load(kind, cache=cache)
    leader = work.lead(7)
    assert relative.now(1) == ["value of", 1, 1]
    relative.load.forget(1)
    work.load.forget(8)
    assert not leader.done()
    work.go.set()
    leader.result(PATIENCE)


def test_a_function_may_call_itself() -> None:
    @coalesce(cache={})
    def fib(n: int) -> int:
        return n if n < 2 else fib(n - 1) + fib(n - 2)

    @coalesce(cache={})
    async def fib_async(n: int) -> int:
        return n if n < 2 else await fib_async(n - 1) + await fib_async(n - 2)

    assert fib(30) == asyncio.run(fib_async(30)) == 832040
    assert fib.flight.stats().executions == 31

    @coalesce
    def circle(n: int) -> int:
        return circle(n)

    with pytest.raises(DeadlockError, match="circle"):
        circle(1)


def test_a_keys_own_equality_may_call_the_function() -> None:
    """User code that the mapping runs, under the lock: it is reentrant."""

    @coalesce(cache={})
    def load(x: Any) -> Any:
        return "value"

    class Awkward:
        def __hash__(self) -> int:
            return 7

        def __eq__(self, other: object) -> bool:
            return load(1) == "value" and isinstance(other, Awkward)

    assert load(Awkward()) == "value"
    assert load(Awkward()) == "value"


# "A value too large for the cache, and a failure, are still computed once for all who wait"


@each_kind
def test_a_value_too_large_is_computed_once_for_all_who_wait(kind: str) -> None:
    cache: LRUCache[Any, Any] = LRUCache(1, getsizeof=len)
    work = Load(kind, cache=cache)
    calls = [work.lead(7), *(work.follow(7) for _ in range(3))]
    work.go.set()
    values = [call.result(PATIENCE) for call in calls]
    assert all(value is values[0] for value in values)
    assert work.calls == [7]
    assert len(cache) == 0


def test_what_else_a_mapping_raises_comes_out() -> None:
    class Broken(dict[Any, Any]):
        def __setitem__(self, key: Any, value: Any) -> None:
            raise OSError("the disk is full")

    load = coalesce(cache=Broken())(lambda x: x)
    with pytest.raises(OSError, match="the disk is full"):
        load(1)
    assert load.flight.in_flight() == 0


def test_a_mapping_whose_get_raises_for_what_has_just_expired() -> None:
    class Expiring(dict[Any, Any]):
        def get(self, key: Any, default: Any = None) -> Any:
            raise KeyError(key)

    assert coalesce(cache=Expiring())(lambda x: x + 1)(1) == 2


# `.forget(*args, **kwargs)`


@each_kind
def test_forget_starts_anew_and_serves_those_who_joined(kind: str) -> None:
    work = Load(kind)
    old = [work.lead(7), work.follow(7)]
    work.load.forget(7)
    new = work.lead(7)
    assert len(work.calls) == 2
    work.go.set()
    assert old[0].result(PATIENCE) is old[1].result(PATIENCE)
    assert new.result(PATIENCE) is not old[0].result(PATIENCE)
    work.load.forget("idle")


@each_kind
def test_a_forgotten_execution_does_not_write_the_cache(kind: str) -> None:
    """Its value was asked to be forgotten before it was there."""
    work = Load(kind, cache={}, key=lambda x: x)
    old = work.lead(7)
    work.load.forget(7)
    work.go.set()
    old.result(PATIENCE)
    assert work.load.cache == {}
    assert work.now(7) == ["value of", 7, 2]
    assert work.load.cache == {7: ["value of", 7, 2]}


@each_kind
def test_a_forgotten_execution_does_not_overwrite_the_newer_ones_value(kind: str) -> None:
    gates = {"old": threading.Event(), "new": threading.Event()}
    runs: list[str] = []

    def load(who: str) -> str:
        runs.append(who)
        assert gates[who].wait(PATIENCE)
        return who

    async def load_async(who: str) -> str:
        runs.append(who)
        await eventually_async(gates[who].is_set)
        return who

    fn: Any = load if kind == "function" else load_async
    decorated = coalesce(cache={}, key=lambda who: 1)(fn)

    def call(who: str) -> "Future[Any]":
        future = spawn(decorated, who) if kind == "function" else spawn_loop(lambda: decorated(who))
        eventually(lambda: who in runs)
        return future

    old = call("old")
    decorated.forget("old")
    new = call("new")
    for which in ("new", "old"):
        gates[which].set()
        (new if which == "new" else old).result(PATIENCE)
    assert decorated.cache == {1: "new"}


def test_forget_on_a_bound_method_binds_self() -> None:
    one, two = Base(), Base()
    first, second = one.method(1), two.method(1)
    one.method.forget()
    assert two.method(1) is second
    assert one.method(1) is not first
    Base.method.forget(two, x=1)
    assert two.method(1) is not second

    above = Base.above_class(1)
    Base().above_class.forget(1)
    Base.above_class.forget(x=1)
    assert Base.above_class(1) is not above


def test_forget_below_classmethod_takes_the_class() -> None:
    """There Python makes the bound method: it has the function's attributes, unbound."""
    first = Base.below_class(1)
    with pytest.raises(TypeError):
        Base.below_class.forget(Base, 1, 2)  # type: ignore[call-arg]
    Base.below_class.forget(Base, 1)  # type: ignore[call-arg, arg-type]
    assert Base.below_class(1) is not first


# Lifetimes


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Argument:
    pass


@pytest.mark.usefixtures("no_collector")
@each_kind
@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_arguments_and_instances_are_freed_at_once(kind: str, timeout: float | None) -> None:
    class Query:
        @coalesce(timeout=timeout)
        def load(self, x: Any) -> int:
            return 1

        @coalesce(timeout=timeout)
        async def load_async(self, x: Any) -> int:
            await asyncio.sleep(0)
            return 1

        @coalesce(cache={}, timeout=timeout)
        def fail(self, x: Any) -> int:
            raise LookupError

        @coalesce(timeout=timeout)
        async def fail_async(self, x: Any) -> int:
            raise LookupError

    query, argument = Query(), Argument()
    dead = [weakref.ref(query), weakref.ref(argument)]
    suffix = "" if kind == "function" else "_async"
    assert run(kind, getattr(query, "load" + suffix), argument) == 1
    del query
    assert dead[0]() is None
    del argument
    assert dead[1]() is None

    query = Query()
    dead = [weakref.ref(query)]

    async def attempt(fail: Any) -> None:  # asyncio.run itself makes a cycle of what it raises
        with contextlib.suppress(LookupError):
            await fail(1)

    if kind == "function":
        with contextlib.suppress(LookupError):
            query.fail(1)
    else:
        asyncio.run(attempt(query.fail_async))
    del query
    assert dead[0]() is None


@pytest.mark.usefixtures("no_collector")
def test_a_timed_out_coroutine_leaves_nothing_behind() -> None:
    work = Load("coroutine", timeout=0.01)
    leader = work.lead(7)

    async def main() -> None:
        try:
            await work.load(7)
        except FlightTimeout as error:
            assert error.__context__ is None
            dead.append(weakref.ref(error))

    dead: list[Any] = []
    asyncio.run(main())
    assert [reference() for reference in dead] == [None]
    work.go.set()
    leader.result(PATIENCE)


@pytest.mark.usefixtures("no_collector")
def test_a_decorated_function_is_freed() -> None:
    cache = UserDict[Any, Any]()
    load: Any = coalesce(cache=cache)(lambda x: x)
    assert load(1) == 1
    dead = [weakref.ref(load), weakref.ref(load.__wrapped__), weakref.ref(load.flight)]
    dead.append(weakref.ref(cache))
    del load, cache
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        gc.collect()  # compiled, only the collector counts a flight's references there
    assert [reference() for reference in dead] == [None] * 4


# Processes


@need_fork
def test_a_fork_while_another_thread_holds_the_cache() -> None:
    inside, go_on = threading.Event(), threading.Event()

    class Held(dict[Any, Any]):
        def get(self, key: Any, default: Any = None) -> Any:
            if threading.current_thread() is not threading.main_thread() and not inside.is_set():
                inside.set()
                assert go_on.wait(PATIENCE)
            return super().get(key, default)

    load = coalesce(cache=Held())(lambda x: x + 1)
    holder = spawn(load, 1)
    assert inside.wait(PATIENCE)

    def child() -> None:
        assert load(2) == 3
        load.forget(2)

    in_child(child)
    go_on.set()
    assert holder.result(PATIENCE) == 2


def test_a_signal_in_the_middle_of_the_caches_work_may_call_the_function() -> None:
    class Interrupted(dict[Any, Any]):
        def get(self, key: Any, default: Any = None) -> Any:
            if not seen:
                signal.raise_signal(signal.SIGINT)
            return super().get(key, default)

    def handler(*_: Any) -> None:
        seen.append(0)
        seen.append(load(2))

    seen: list[int] = []
    load = coalesce(cache=Interrupted())(lambda x: x + 1)
    before = signal.signal(signal.SIGINT, handler)
    try:
        assert load(1) == 2
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [0, 3]


class Dropping(MutableMapping[Any, Any]):
    """A mapping of the user's, whose entry expires between the two looks of the mix-in's `pop`."""

    def __init__(self) -> None:
        self.entries: dict[Any, Any] = {}
        self.expires = False

    def __getitem__(self, key: Any) -> Any:
        return self.entries[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def __delitem__(self, key: Any) -> None:
        if self.expires:
            self.entries.clear()
        del self.entries[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def test_forget_of_an_entry_that_expires_meanwhile() -> None:
    cache = Dropping()
    load = coalesce(cache=cache)(lambda x: x + 1)
    assert load(1) == 2
    cache.expires = True
    load.forget(1)
    assert len(cache) == 0


def test_forget_forgets_the_execution_when_the_cache_fails() -> None:
    class Failing(dict[Any, Any]):
        def pop(self, *_: Any) -> Any:
            raise LookupError("no cache")

    gate, started = threading.Event(), threading.Event()
    runs: list[int] = []

    @coalesce(cache=Failing())
    def load(x: int) -> int:
        runs.append(x)
        started.set()
        assert len(runs) > 1 or gate.wait(PATIENCE)
        return len(runs)

    first = spawn(load, 1)
    assert started.wait(PATIENCE)
    with pytest.raises(LookupError, match="no cache"):
        load.forget(1)
    second = spawn(load, 1)
    assert second.result(PATIENCE) == 2
    gate.set()
    first.result(PATIENCE)


@need_fork
def test_a_fork_waits_for_a_cache_that_is_being_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child finds the mapping whole."""
    monkeypatch.setattr(_lock.ForkHold, "WAITS", PATIENCE)
    forking, changing = threading.Event(), threading.Event()

    class Slow(dict[Any, Any]):
        half = False

        def __setitem__(self, key: Any, value: Any) -> None:
            self.half = True
            changing.set()
            assert forking.wait(PATIENCE)
            super().__setitem__(key, value)
            self.half = False

    cache = Slow()
    load = coalesce(cache=cache)(lambda x: x + 1)
    locks = _coalesce._fork_hold._locks

    def all_locks() -> Any:
        forking.set()
        return locks()

    monkeypatch.setattr(_coalesce._fork_hold, "_locks", all_locks)
    writer = spawn(load, 1)
    assert changing.wait(PATIENCE)

    def in_the_child() -> None:
        assert not cache.half
        assert load(1) == 2

    in_child(in_the_child)
    assert writer.result(PATIENCE) == 2


@need_fork
def test_a_fork_while_another_method_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """On 3.11 a cached_property has one lock for all, which the child would find taken."""
    binding, bound = threading.Event(), threading.Event()
    make = _coalesce.Function._make_methods

    class Shop:
        pass

    first, second = coalesce(lambda self: "first"), coalesce(lambda self: "second")

    def slow(self: Any) -> Any:
        if not binding.is_set():
            binding.set()
            assert bound.wait(PATIENCE)
        return make(self)

    monkeypatch.setattr(_coalesce.Function, "_make_methods", slow)
    Shop.first, Shop.second = first, second  # type: ignore[attr-defined]
    caller = spawn(lambda: Shop().first())  # type: ignore[attr-defined]
    assert binding.wait(PATIENCE)

    def in_the_child() -> None:
        assert Shop().second() == "second"  # type: ignore[attr-defined]

    in_child(in_the_child)
    bound.set()
    assert caller.result(PATIENCE) == "first"


def test_it_is_public() -> None:
    assert "coalesce" in shardedflight.__all__
