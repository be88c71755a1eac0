"""Hooks: a caller's own code that raises, or calls the flight again, whatever asks for it.

Key builder, hash, function, observers, a cache of `coalesce` and a codec follow one script: what
the next of them to be called does. Every call ends, with its value or an error of the script's, and
nothing is left in flight.
"""

import asyncio
import logging
import tempfile
from collections.abc import Callable, MutableMapping
from typing import Any

from hypothesis import strategies as st

from proof.fuzz.target import PATIENCE, Held, Target, bare, spawn
from shardedflight import DeadlockError, ShardedFlight, coalesce
from shardedflight.backends import MessagePack
from shardedflight.observe import Observer

__all__ = ["TARGETS"]


class Own(Exception):
    """What a hook raises."""


class Lost(BaseException):
    """What a hook raises that is no Exception."""


class Script:
    """What hooks do, one after the other; nothing once it is over."""

    def __init__(self, acts: list[str]) -> None:
        self._acts = list(acts)
        self._depth = 0
        self.flight: Any = None
        self.over = False

    def act(self) -> None:
        """Does what comes next."""
        if self.over or self._depth > 2 or not self._acts:
            return
        act = self._acts.pop(0)
        self._depth += 1
        try:
            self._do(act)
        finally:
            self._depth -= 1

    def _do(self, act: str) -> None:
        flight = self.flight
        match act:
            case "raise":
                raise Own
            case "lose":
                raise Lost
            case "same":
                flight.do_future(lambda: "inner", "k")
            case "recurse":  # a DeadlockError inside of the same key's function
                flight.do(lambda: "inner", "k")
            case "other":
                flight.do(lambda: "inner", "other")
            case "forget":
                flight.forget("k")
            case "look":
                assert "ShardedFlight" in repr(flight)
                assert flight.stats().in_flight >= 0
            case _:
                pass


_ACTS = ["pass", "pass", "raise", "same", "recurse", "recurse", "other", "forget", "look"]
_GENTLE = st.lists(st.sampled_from(_ACTS), max_size=12)
_ANY = st.lists(st.sampled_from([*_ACTS, "lose"]), max_size=12)
_WAYS = st.lists(
    st.sampled_from(["do", "do_async", "do_future", "do_many"]), min_size=1, max_size=4
)


def _ways(script: Script, flight: ShardedFlight) -> dict[str, Callable[[], Any]]:
    """The ways to call, of which each returns "value"."""

    def function() -> str:
        script.act()
        return "value"

    async def function_async() -> str:
        script.act()
        await asyncio.sleep(0)
        return "value"

    async def main() -> Any:
        return (await flight.do_async(function_async, "k"))[0]

    def many(keys: list[str]) -> dict[str, str]:
        script.act()
        return dict.fromkeys(keys, "value")

    return {
        "do": lambda: flight.do(function, "k")[0],
        "do_async": lambda: asyncio.run(main()),
        "do_future": lambda: flight.do_future(function, "k").result(PATIENCE)[0],
        "do_many": lambda: flight.do_many(many, ["k", "l"])["k"][0],
    }


def _called(call: Callable[[], Any]) -> BaseException | None:
    """The error of a call on a thread of its own; it has to be one of the script's."""
    error = spawn(call).exception(PATIENCE)
    for found in error.exceptions if isinstance(error, BaseExceptionGroup) else [error]:
        if not isinstance(found, (Own, Lost, DeadlockError, type(None))):
            raise found
    return bare(error)


def _settled(flight: ShardedFlight) -> None:
    """Nothing is left, and the next call is like the first."""
    call = spawn(lambda: flight.do(lambda: "next", "k"))
    assert call.result(PATIENCE) == ("next", False)
    stats = flight.stats()
    assert (flight.in_flight(), stats.waiting, sum(stats.per_shard)) == (0, 0, 0), stats


class _Inline(Held):
    """Runs at once what it is given."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """See `Executor`."""
        future = super().submit(fn, *args, **kwargs)
        self.run_next()
        return future


def _check_flight(case: Any) -> None:
    acts, ways, hooked, shards = case
    script = Script(acts)

    def build_key(*parts: Any) -> Any:
        script.act()
        return parts

    def hash_(key: Any) -> int:
        script.act()
        return hash(key)

    flight = ShardedFlight(
        shards,
        executor=_Inline(),
        build_key=build_key if "key" in hooked else None,
        hash=hash_ if "hash" in hooked else None,
    )
    script.flight = flight
    for way in ways:
        _called(_ways(script, flight)[way])
    script.over = True
    _settled(flight)


class _Watching(Observer):
    def __init__(self, script: Script) -> None:
        self._script = script

    def execution_started(self, event: Any, /) -> None:
        self._script.act()

    def execution_ended(self, event: Any, /) -> None:
        self._script.act()

    def follower_joined(self, event: Any, /) -> None:
        self._script.act()

    def follower_left(self, event: Any, /) -> None:
        self._script.act()


def _check_observers(case: Any) -> None:
    """What an observer raises reaches no caller; what it calls works."""
    acts, ways, shards = case
    script = Script(acts)
    executor = _Inline()
    flight = ShardedFlight(shards, executor=executor)
    script.flight = flight
    flight.add_observer(_Watching(script))
    quiet = ShardedFlight(shards, executor=_Inline())
    for way in ways:
        call = _ways(Script([]), flight)[way]
        assert spawn(call).result(PATIENCE) == spawn(_ways(Script([]), quiet)[way]).result(PATIENCE)
    held = Held()
    joined = ShardedFlight(shards, executor=held)
    joined.add_observer(_Watching(script))
    futures = [joined.do_future(lambda: "value", "k") for _ in range(3)]
    while held.held:
        held.run_next()
    assert {future.result(PATIENCE) for future in futures} <= {("value", True), ("value", False)}
    script.over = True
    while held.held:  # what the observer has begun
        held.run_next()
    _settled(flight)
    assert (joined.in_flight(), joined.stats().waiting) == (0, 0)


class _Cache(MutableMapping[Any, Any]):
    """A mapping of which each step follows the script."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._entries: dict[Any, Any] = {}

    def __getitem__(self, key: Any) -> Any:
        self._script.act()
        return self._entries[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._script.act()
        self._entries[key] = value
        self._script.act()

    def __delitem__(self, key: Any) -> None:
        self._script.act()
        del self._entries[key]

    def __iter__(self) -> Any:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _check_cache(case: Any) -> None:
    """A cache that fails is an error of who calls, and of those who wait for it."""
    acts, calls, shards = case
    script = Script(acts)
    flight = ShardedFlight(shards, executor=_Inline())
    script.flight = flight
    cache = _Cache(script)

    @coalesce(flight=flight, cache=cache)
    def function(number: int) -> int:
        script.act()
        return number * 2

    @coalesce(flight=flight, cache=cache)
    async def function_async(number: int) -> int:
        script.act()
        await asyncio.sleep(0)
        return number * 2

    async def main(number: int) -> int:
        return await function_async(number)

    for way, number in calls:
        found: list[int] = []
        match way:
            case "sync":
                _called(lambda number=number, found=found: found.append(function(number)))  # type: ignore[misc]
            case "async":
                _called(
                    lambda number=number, found=found: found.append(asyncio.run(main(number)))  # type: ignore[misc]
                )
            case _:
                _called(lambda number=number: function.forget(number))  # type: ignore[misc]
        assert found in ([], [number * 2])
    script.over = True
    assert spawn(lambda: function(7)).result(PATIENCE) == 14
    _settled(flight)


class _Codec:
    """MessagePack, after the script."""

    name = "fuzz"

    def __init__(self, script: Script) -> None:
        self._script = script
        self._codec = MessagePack()

    def encode(self, value: Any, /) -> bytes:
        self._script.act()
        return self._codec.encode(value)

    def decode(self, payload: bytes, /) -> Any:
        self._script.act()
        return self._codec.decode(payload)


def _check_codec(case: Any) -> None:
    """A codec that raises, or calls the flight, leaves no lock, no file and no key behind."""
    from pathlib import Path  # noqa: PLC0415

    from shardedflight.backends.host import HostBackend  # noqa: PLC0415 - not on Windows

    acts, ways = case
    script = Script(acts)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
        backend = HostBackend(directory, codec=_Codec(script))
        flight = ShardedFlight(backend=backend)
        script.flight = flight
        for way in ways:
            _called(_ways(script, flight)[way])
        script.over = True
        assert spawn(lambda: flight.do(lambda: "next", "k")).result(PATIENCE)[0] in (
            "next",
            "inner",
        )
        assert spawn(lambda: flight.do(lambda: "next", "k")).result(PATIENCE) == ("next", False)
        backend.close()
        assert (flight.in_flight(), flight.stats().waiting) == (0, 0)
        assert [entry.name for entry in Path(directory).iterdir()] == ["token"]


class _Quiet:
    """Runs a check without what the flight logs of observers and backends that fail."""

    def __init__(self, check: Callable[[Any], None]) -> None:
        self._check = check

    def __call__(self, case: Any) -> None:
        log = logging.getLogger("shardedflight")
        before, log.disabled = log.disabled, True
        try:
            self._check(case)
        finally:
            log.disabled = before


_SHARDS = st.sampled_from([1, 4])
TARGETS = [
    Target(
        "hooks",
        "a key builder, hash or function that raises or re-enters leaves nothing in flight",
        st.tuples(
            _ANY, _WAYS, st.sampled_from([("key",), ("hash",), ("key", "hash"), ()]), _SHARDS
        ),
        _check_flight,
        60,
    ),
    Target(
        "observers",
        "what an observer raises reaches no caller",
        st.tuples(_GENTLE, _WAYS, _SHARDS),
        _Quiet(_check_observers),
        40,
    ),
    Target(
        "cache",
        "a cache of coalesce that raises or re-enters leaves nothing in flight",
        st.tuples(
            _ANY,
            st.lists(st.tuples(st.sampled_from(["sync", "async", "forget"]), st.integers(0, 2))),
            _SHARDS,
        ),
        _check_cache,
        40,
    ),
    Target(
        "codec",
        "a codec that raises or re-enters leaves nothing in flight and nothing in the directory",
        st.tuples(_GENTLE, _WAYS),
        _Quiet(_check_codec),
        20,
    ),
]
