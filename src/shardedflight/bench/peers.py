"""Other libraries that let callers share one execution, each by its own fastest documented way.

`singleflight`, `oneflight` and `coalescer` forget a key when its function has returned, as a flight
does. The others are caches: there, each leader's call is followed by the removal of what it has
stored, since a second call would not run anything. Their options are those that prevent a stampede
at the least cost; each `Peer` says where they are documented.

Packages are imported by name when they are needed: one that is not installed, or does not work
here, is a row that says so.
"""

import asyncio
import importlib.metadata
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import repeat
from typing import Any

from shardedflight.bench.basics import clock, constant, constant_async, expect
from shardedflight.bench.following import await_futures, follow, wake, wake_by_locks
from shardedflight.bench.leading import bare_loop
from shardedflight.bench.measure import Contender, Pair, Prepare

_KEY = "item"


@dataclass(frozen=True)
class Way:
    """How a library is asked.

    Attributes:
        call: What callers call.
        arguments: What they pass: the key and the function, in the library's order, or the key
            alone where the function has been decorated.
        forget: Removes what a cache has stored for a key; None for what is no cache.
    """

    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    forget: Callable[[str], object] | None = None


@dataclass(frozen=True)
class Peer:
    """A package on PyPI.

    Attributes:
        package: Its name there.
        documented: Where its way is documented, and which one it is.
        threads: Makes the way by which threads share a function; None if they cannot.
        coroutines: The same for coroutines.
    """

    package: str
    documented: str
    threads: Callable[[Callable[[], int]], Way] | None
    coroutines: Callable[[Callable[[], Coroutine[Any, Any, int]]], Way] | None


def _coalescer(module: str, fn: Callable[[], Any]) -> Way:
    return Way(import_module(module).Coalescer().do, (_KEY, fn))


def _oneflight(kind: str, fn: Callable[[], Any]) -> Way:
    return Way(getattr(import_module("oneflight"), kind)().do, (_KEY, fn))


def _singleflight(module: str, kind: str, fn: Callable[[], Any]) -> Way:
    return Way(getattr(import_module(module), kind)().call, (fn, _KEY))


def _async_lru(fn: Callable[[], Coroutine[Any, Any, int]]) -> Way:
    async def load(key: str) -> int:
        return await fn()

    cached = import_module("async_lru").alru_cache(maxsize=None)(load)
    return Way(cached, (_KEY,), cached.cache_invalidate)


def _same(key: str) -> str:
    return key


def _cachebox(fn: Callable[[], int]) -> Way:
    cachebox = import_module("cachebox")

    def load(key: str) -> int:
        return fn()

    cache = cachebox.Cache(0)
    return Way(
        cachebox.cached(cache, key_maker=_same, postprocess=None)(load), (_KEY,), cache.__delitem__
    )


def _cachebox_async(fn: Callable[[], Coroutine[Any, Any, int]]) -> Way:
    cachebox = import_module("cachebox")

    async def load(key: str) -> int:
        return await fn()

    cache = cachebox.Cache(0)
    return Way(
        cachebox.cached(cache, key_maker=_same, postprocess=None)(load), (_KEY,), cache.__delitem__
    )


def _cachetools(fn: Callable[[], int]) -> Way:
    def load(key: str) -> int:
        return fn()

    cache: dict[str, int] = {}
    cached = import_module("cachetools").cached(cache, key=_same, condition=threading.Condition())
    return Way(cached(load), (_KEY,), cache.__delitem__)


def _dogpile(fn: Callable[[], int]) -> Way:
    region = import_module("dogpile.cache").make_region().configure("dogpile.cache.memory")
    return Way(region.get_or_create, (_KEY, fn), region.delete)


PEERS = (
    Peer(
        "coalescer",
        "README, 'Synchronous threads' and 'Without the decorator': `Coalescer().do(key, fn)`, "
        "which spares the decorator's layer and its key",
        partial(_coalescer, "coalescer.sync"),
        partial(_coalescer, "coalescer"),
    ),
    Peer(
        "oneflight",
        "README, 'Quickstart': `do(key, fn)`, which spares the decorator's layer and its key",
        partial(_oneflight, "SingleFlight"),
        partial(_oneflight, "AsyncSingleFlight"),
    ),
    Peer(
        "singleflight",
        "README, 'Usage': `SingleFlight().call(fn, key)` and the same of `SingleFlightAsync`",
        partial(_singleflight, "singleflight.basic", "SingleFlight"),
        partial(_singleflight, "singleflight.asynchronous", "SingleFlightAsync"),
    ),
    Peer(
        "async-lru",
        "README, 'Usage': `alru_cache`, unbounded so that nothing is evicted, and "
        "`cache_invalidate`",
        None,
        _async_lru,
    ),
    Peer(
        "cachebox",
        "docstring of `cached`: `lock` is on unless told otherwise, `key_maker` and "
        "`postprocess=None` spare what a key of one part and an int do not need; `Cache` is "
        "the one without an eviction policy; `del cache[key]` as of a dict",
        _cachebox,
        _cachebox_async,
    ),
    Peer(
        "cachetools",
        "documentation of `cached`: any mapping, and `condition` so that a key's other callers "
        "wait for its function; `del cache[key]`",
        _cachetools,
        None,
    ),
    Peer(
        "dogpile.cache",
        "docstrings of `CacheRegion.get_or_create`, which waits for the key's creator, of "
        "`CacheRegion.delete` and of the memory backend",
        _dogpile,
        None,
    ),
)


def versions() -> dict[str, str]:
    """Returns the versions of those that are installed."""
    found: dict[str, str] = {}
    for peer in PEERS:
        try:
            found[peer.package] = importlib.metadata.version(peer.package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def why_absent(package: str, error: Exception) -> str:
    """Says in a few words why a package cannot be measured."""
    if isinstance(error, ModuleNotFoundError) and package not in versions():
        return "not installed"
    return f"does not work here: {type(error).__name__}: {error}"


# Threads.


def lead(way: Way, calls: int) -> float:
    """Leads over and over, in the form that costs the way's own call and nothing else."""
    call, forget = way.call, way.forget
    if forget is None:
        first, second = way.arguments
        start = clock()
        for _ in repeat(None, calls):
            call(first, second)
    elif len(way.arguments) == 1:
        start = clock()
        for _ in repeat(None, calls):
            call(_KEY)
            forget(_KEY)
    else:
        first, second = way.arguments
        start = clock()
        for _ in repeat(None, calls):
            call(first, second)
            forget(_KEY)
    return (clock() - start) / calls


@contextmanager
def leading(calls: int) -> Iterator[Sequence[Contender]]:
    """Prepares those that threads can use for the benchmark of `do`."""
    contenders: list[Contender] = []
    for peer in PEERS:
        if peer.threads is None:
            continue
        executions = 0

        def counted() -> int:
            nonlocal executions
            executions += 1
            return 1

        try:
            lead(peer.threads(counted), calls)
            way = peer.threads(constant)
        except Exception as error:  # noqa: BLE001 - whatever stops a peer is its row.
            contenders.append(Contender(peer.package, None, absent=why_absent(peer.package, error)))
            continue
        expect(executions, calls, f"executions of {peer.package}")
        pair = Pair(partial(lead, way, calls), partial(bare_loop, calls))
        contenders.append(Contender(peer.package, pair))
    yield contenders


@contextmanager
def following_threads(followers: int) -> Iterator[Sequence[Contender]]:
    """Prepares those that threads can use for the benchmark of threads that follow."""
    contenders: list[Contender] = []
    for peer in PEERS:
        if peer.threads is None:
            continue
        ask = partial(_asking, peer.threads)
        try:
            wake(ask, followers)
        except Exception as error:  # noqa: BLE001 - whatever stops a peer is its row.
            contenders.append(Contender(peer.package, None, absent=why_absent(peer.package, error)))
            continue
        pair = Pair(partial(wake, ask, followers), partial(wake_by_locks, followers))
        contenders.append(Contender(peer.package, pair))
    yield contenders


def _asking(make: Callable[[Callable[[], int]], Way], fn: Callable[[], int]) -> Callable[[], Any]:
    """Makes threads call a way."""
    way = make(fn)
    return partial(way.call, *way.arguments)


# Coroutines.


async def lead_async(way: Way, calls: int) -> float:
    """As `lead`, from one coroutine."""
    call, forget = way.call, way.forget
    if forget is None:
        first, second = way.arguments
        start = clock()
        for _ in repeat(None, calls):
            await call(first, second)
    else:
        start = clock()
        for _ in repeat(None, calls):
            await call(_KEY)
            forget(_KEY)
    return (clock() - start) / calls


def leading_async(
    fn: Callable[[], Coroutine[Any, Any, int]], floor: Callable[[int], Coroutine[Any, Any, float]]
) -> Prepare:
    """Makes the preparation of a benchmark about coroutines that lead with `fn`."""

    @contextmanager
    def prepare(calls: int) -> Iterator[Sequence[Contender]]:
        contenders: list[Contender] = []
        with asyncio.Runner() as runner:
            for peer in PEERS:
                if peer.coroutines is None:
                    continue
                executions = 0

                async def counted() -> int:
                    nonlocal executions
                    executions += 1
                    return await constant_async()

                try:
                    runner.run(lead_async(peer.coroutines(counted), calls))
                    way = peer.coroutines(fn)
                except Exception as error:  # noqa: BLE001 - whatever stops a peer is its row.
                    absent = why_absent(peer.package, error)
                    contenders.append(Contender(peer.package, None, absent=absent))
                    continue
                expect(executions, calls, f"executions of {peer.package}")
                pair = Pair(
                    partial(_run, runner, partial(lead_async, way, calls)),
                    partial(_run, runner, partial(floor, calls)),
                )
                contenders.append(Contender(peer.package, pair))
            yield contenders

    return prepare


@contextmanager
def following(followers: int) -> Iterator[Sequence[Contender]]:
    """Prepares those that coroutines can use for the benchmark of coroutines that follow."""
    contenders: list[Contender] = []
    with asyncio.Runner() as runner:
        for peer in PEERS:
            if peer.coroutines is None:
                continue
            ask = partial(_asking_async, peer.coroutines)
            try:
                runner.run(follow(ask, followers))
            except Exception as error:  # noqa: BLE001 - whatever stops a peer is its row.
                absent = why_absent(peer.package, error)
                contenders.append(Contender(peer.package, None, absent=absent))
                continue
            pair = Pair(
                partial(_run, runner, partial(follow, ask, followers)),
                partial(_run, runner, partial(await_futures, followers)),
            )
            contenders.append(Contender(peer.package, pair))
        yield contenders


def _asking_async(
    make: Callable[[Callable[[], Coroutine[Any, Any, int]]], Way],
    fn: Callable[[], Coroutine[Any, Any, int]],
) -> Callable[[], Coroutine[Any, Any, Any]]:
    """Makes coroutines call a way."""
    way = make(fn)
    call = way.call
    if len(way.arguments) == 1:

        async def request() -> Any:
            return await call(_KEY)
    else:
        first, second = way.arguments

        async def request() -> Any:
            return await call(first, second)

    return request


def _run(runner: asyncio.Runner, side: Callable[[], Coroutine[Any, Any, float]]) -> float:
    return runner.run(side())
