"""One process of a stampede: it calls for a key whenever it is told to.

`python -m shardedflight.bench.tiers_worker CONTENDER URL DIRECTORY` speaks JSON, a line at a time:
`null` once it is ready; `["key", 0.5, false]` has it call for the key with a function that takes so
many seconds, and then raises or not; it answers when it was told to, when its function has ended,
if it ran, and when it had its answer, by the system's monotonic clock. Standard input that closes
ends it.
"""

import asyncio
import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

import redis

from shardedflight import ShardedFlight

PAYLOAD = "x" * 100

#: A call for a key: takes the key and the function.
Do = Callable[[str, Callable[[], str]], Any]


@contextlib.contextmanager
def on_redis(url: str, directory: str) -> Iterator[Do]:
    """ShardedFlight, over Valkey."""
    RedisBackend = importlib.import_module("shardedflight.backends.redis").RedisBackend  # noqa: N806
    backend = RedisBackend(url, lease=1.0)
    flight = ShardedFlight(backend=backend)
    yield lambda key, fn: flight.do(fn, key)
    backend.close()


@contextlib.contextmanager
def on_host(url: str, directory: str) -> Iterator[Do]:
    """ShardedFlight, in a directory."""
    HostBackend = importlib.import_module("shardedflight.backends.host").HostBackend  # noqa: N806
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
    cache: Any = Cache()
    cache.setup(url)
    called: list[Callable[[], str]] = []

    @cache(ttl=60, key="{key}", lock=True)  # type: ignore[untyped-decorator]
    async def fetch(key: str) -> str:
        return await asyncio.to_thread(called[-1])

    with asyncio.Runner() as runner:

        def do(key: str, fn: Callable[[], str]) -> Any:
            called.append(fn)
            return runner.run(fetch(key))

        yield do
        runner.run(cache.close())


CONTENDERS = {
    "redis": on_redis,
    "host": on_host,
    "dogpile.cache": dogpile,
    "redis-py Lock": lock,
    "cashews": cashews,
}


def serve(do: Do, requests: IO[str], answers: IO[str]) -> None:
    """Does what it is told until there is no more."""
    ended: list[float] = []

    def answer(value: object) -> None:
        print(json.dumps(value), file=answers, flush=True)

    do(f"warm {os.getpid()}", lambda: PAYLOAD)  # connections, scripts, imports
    answer(None)
    for line in requests:
        told = time.monotonic()
        key, seconds, fails = json.loads(line)

        def fn(seconds: float = seconds, fails: bool = fails) -> str:
            time.sleep(seconds)
            ended.append(time.monotonic())
            if fails:
                raise ValueError("no such row")
            return PAYLOAD

        ended.clear()
        with contextlib.suppress(Exception):  # all of them say it in a way of their own
            do(key, fn)
        answer([told, ended, time.monotonic()])


if __name__ == "__main__":
    contender, *where = sys.argv[1:]
    with CONTENDERS[contender](*where) as way:
        serve(way, sys.stdin, sys.stdout)
