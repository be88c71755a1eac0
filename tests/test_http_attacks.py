"""Faults of the collapsing that were found by attacking it. Each test fails without its mend.

The middleware is called as a server calls it, for no server does these things on time.
"""

import asyncio
import gc
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.util import setup_testing_defaults

import httpx
import pytest
from support import PATIENCE, eventually, eventually_async, spawn, spawn_loop

from shardedflight import ShardedFlight
from shardedflight.http import asgi, wsgi
from shardedflight.http._rounds import Round
from shardedflight.http.httpx import CoalesceTransport

CACHED = [(b"cache-control", b"max-age=60")]
EMPTY = {"type": "http.request", "body": b"", "more_body": False}


class Exchange:
    """One request as a server has it. On its loop's thread."""

    def __init__(self, app: Any, headers: Iterable[tuple[bytes, bytes]] = (), **scope: Any) -> None:
        self.sent: list[dict[str, Any]] = []
        self.received: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.received.put_nowait(EMPTY)
        self.scope = {
            "type": "http",
            "method": "GET",
            "path": "/item",
            "query_string": b"",
            "headers": [*headers],
            **scope,
        }
        self.task = asyncio.ensure_future(app(self.scope, self.received.get, self.send))

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    def leave(self) -> None:
        self.received.put_nowait({"type": "http.disconnect"})


def ignored(*_: Any) -> Callable[[bytes], object]:
    """A `start_response`."""
    return lambda chunk: None


async def answer(send: Any, body: bytes, headers: Any = CACHED, status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Told:
    """An application that says, of its request, what `say` makes of the scope."""

    def __init__(self, say: Callable[[Any], bytes]) -> None:
        self.say = say
        self.runs = 0
        self.gate = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.runs += 1
        await self.gate.wait()
        await answer(send, self.say(scope))


# -- what belongs into the key ---------------------------------------------------------------------


def bodies_of(
    say: Callable[[Any], bytes], first: dict[str, Any], second: dict[str, Any]
) -> list[bytes]:
    """The answers to two requests at once."""

    async def main() -> list[bytes]:
        app = Told(say)
        middleware = asgi.CoalesceMiddleware(app, routes=["/"])
        both = [Exchange(middleware, **request) for request in (first, second)]
        await eventually_async(lambda: app.runs + middleware.flight.stats().waiting == 2)
        app.gate.set()
        await asyncio.wait([exchange.task for exchange in both], timeout=PATIENCE)
        return [exchange.body for exchange in both]

    found: list[bytes] = spawn_loop(main).result(PATIENCE)
    return found


def test_a_path_that_was_rewritten_around_us_is_the_applications() -> None:
    """A tenant's prefix is put into `path`, and the optional `raw_path` is left as it came."""
    first, second = (
        {"path": f"/{tenant}/item", "raw_path": b"/item"} for tenant in ("acme", "umbrella")
    )
    found = bodies_of(lambda scope: scope["path"].encode(), first, second)
    assert found == [b"/acme/item", b"/umbrella/item"]


def test_the_site_that_a_forwarded_field_tells_is_in_the_key() -> None:
    """RFC 7239's form of X-Forwarded-Host; for whom it was forwarded makes no difference."""

    def say(scope: Any) -> bytes:
        return dict(scope["headers"]).get(b"forwarded", b"")

    def request(value: bytes) -> dict[str, Any]:
        return {"headers": [(b"host", b"here"), (b"forwarded", value)]}

    evil, good = b"for=192.0.2.1;host=evil.example", b"for=192.0.2.2;host=here.example"
    assert bodies_of(say, request(evil), request(good)) == [evil, good]
    same = b'for="[2001:db8::1]";Host=evil.example;by=203.0.113.43'
    assert bodies_of(say, request(evil), request(same)) == [evil, evil]
    plain, proto = b"for=192.0.2.1", b"for=192.0.2.1, for=198.51.100.1;proto=https"
    assert bodies_of(say, request(plain), request(proto)) == [plain, proto]


@pytest.mark.parametrize("name", ["x-forwarded-ssl", "x-script-name", "x-scheme"])
def test_other_fields_that_tell_the_site_are_in_the_key(name: str) -> None:
    requests = [{"headers": [(name.encode(), value)]} for value in (b"one", b"two")]
    found = bodies_of(lambda scope: scope["headers"][0][1], *requests)
    assert found == [b"one", b"two"]


def test_without_a_host_the_servers_address_is_in_the_key() -> None:
    requests = [{"server": ("10.0.0.1", port)} for port in (80, 9000)]
    found = bodies_of(lambda scope: str(scope["server"][1]).encode(), *requests)
    assert found == [b"80", b"9000"]


@pytest.mark.parametrize(
    "differing",
    [
        {"HTTP_FORWARDED": "host=evil.example"},
        {"HTTP_HOST": "", "SERVER_PORT": "9000"},
        {"HTTPS_DN": "/CN=bob"},
        {"HTTPS_CC": "a certificate"},
    ],
    ids=lambda differing: next(iter(differing)),
)
def test_so_it_is_for_wsgi(differing: dict[str, str]) -> None:
    """And uWSGI's words for a client's certificate pass through."""
    runs: list[dict[str, Any]] = []
    gate = threading.Event()

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        runs.append(environ)
        assert gate.wait(PATIENCE)
        start_response("200 OK", [("Cache-Control", "max-age=60")])
        return [b"x"]

    middleware = wsgi.CoalesceMiddleware(app, routes=["/"])
    calls = []
    for environ in ({"HTTP_HOST": differing.get("HTTP_HOST", "here")}, differing):
        given: dict[str, Any] = {"HTTP_HOST": "here", "SERVER_PORT": "80", **environ}
        setup_testing_defaults(given)
        calls.append(spawn(middleware, given, ignored))
        eventually(lambda: len(runs) + middleware.flight.stats().waiting == len(calls))
    gate.set()
    for call in calls:
        assert b"".join(call.result(PATIENCE)) == b"x"
    assert len(runs) == 2


# -- what is refused at construction ---------------------------------------------------------------


@pytest.mark.parametrize("option", ["routes", "shareable"])
def test_a_coroutine_function_tells_nothing(option: str) -> None:
    """What it returns is true, whatever it would come to."""

    async def never(scope: Any) -> bool:
        return False

    class Never:
        async def __call__(self, scope: Any) -> bool:
            return False

    for function in (never, Never()):
        options: dict[str, Any] = {"routes": ["/"], option: function}
        with pytest.raises(TypeError, match=f"{option} must be no coroutine function"):
            asgi.CoalesceMiddleware(Told(lambda _: b""), **options)


@pytest.mark.parametrize("option", ["routes", "shareable"])
def test_what_returns_an_awaitable_lets_nothing_be_shared(option: str) -> None:
    async def never(scope: Any) -> bool:
        return False

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, b"private")

    async def main() -> Any:
        options: dict[str, Any] = {"routes": ["/"], option: lambda scope: never(scope)}
        middleware = asgi.CoalesceMiddleware(app, **options)
        await Exchange(middleware).task
        return middleware.stats()

    stats = spawn_loop(main).result(PATIENCE)
    assert (stats.errors, dict(stats.passed)) == (1, {"error": 1})


def test_a_flight_with_a_backend_is_refused(tmp_path: Any) -> None:
    """Rounds have numbers of their process: those of two processes would meet by number."""
    host = pytest.importorskip("shardedflight.backends.host")
    flight = ShardedFlight(name="http", backend=host.HostBackend(tmp_path / "flights"))
    with pytest.raises(ValueError, match="flight must have no backend"):
        asgi.CoalesceMiddleware(Told(lambda _: b""), routes=["/"], flight=flight)


# -- what an application says that has been told to give up ----------------------------------------


class Rows:
    """Streams rows, and stops when it is told, or sees, that its client has left."""

    def __init__(self, rows: int = 3) -> None:
        self.rows = rows
        self.runs = 0
        self.told: list[int] = []
        self.gate = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.runs += 1
        run = self.runs
        await receive()
        left = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": CACHED})
        try:
            for row in range(self.rows):
                part = {"type": "http.response.body", "body": b"%d" % row, "more_body": True}
                await send(part)
                waits = asyncio.ensure_future(self.gate.wait())
                await asyncio.wait([left, waits], return_when=asyncio.FIRST_COMPLETED)
                waits.cancel()
                if left.done():
                    self.told.append(run)
                    break
        finally:
            left.cancel()
            await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize("way", ["leaves", "is cancelled"])
def test_who_waited_for_an_execution_gets_nothing_of_what_it_said_when_told(way: str) -> None:
    """Followers time out to a replacement, and then the first leader's request ends."""

    async def main() -> Any:
        app = Rows()
        middleware = asgi.CoalesceMiddleware(app, routes=["/"], follower_timeout=0.3)
        leader = Exchange(middleware)
        await eventually_async(lambda: app.runs == 1)
        followers = [Exchange(middleware) for _ in range(2)]
        await eventually_async(lambda: app.runs >= 2)
        if way == "leaves":
            leader.leave()
        else:
            leader.task.cancel()
        await asyncio.wait([leader.task], timeout=PATIENCE)
        await eventually_async(lambda: way == "is cancelled" or app.told == [1])
        before = [exchange.body for exchange in followers]
        # Their next looks for what the rounds before have come to.
        await eventually_async(lambda: middleware.stats().replaced >= 2 or app.runs >= 3)
        app.gate.set()
        await asyncio.wait([exchange.task for exchange in followers], timeout=PATIENCE)
        return before, [exchange.body for exchange in followers]

    before, after = spawn_loop(main).result(PATIENCE)
    assert all(body in {b"", b"0"} for body in before)
    assert after == [b"012", b"012"]


def test_what_is_said_when_told_teaches_nothing() -> None:
    """A 499 for a client that has left is no reason to pass through for two minutes."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await receive()
        await answer(send, b"", [], 499)

    async def main() -> Any:
        middleware = asgi.CoalesceMiddleware(app, routes=["/"])
        for _ in range(2):
            exchange = Exchange(middleware)
            await eventually_async(lambda: middleware.flight.in_flight() == 1)
            exchange.leave()
            await exchange.task
        return middleware.stats()

    stats = spawn_loop(main).result(PATIENCE)
    assert dict(stats.passed) == dict(stats.unshareable) == {}


def test_a_replacement_that_has_failed_is_replaced() -> None:
    """Who comes late from the first round leads a new one; others may follow it."""
    runs: list[str] = []
    first, third = threading.Event(), threading.Event()

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        runs.append(environ["who"])
        run = len(runs)
        if run == 1:
            assert first.wait(PATIENCE)
        elif run == 2:
            raise LookupError("passing")
        elif run == 3:
            assert third.wait(PATIENCE)
        start_response("200 OK", [])
        return [b"fine"]

    middleware = wsgi.CoalesceMiddleware(
        app, routes=["/"], shareable=["/"], follower_timeout=0.5, pass_through_time=0
    )

    def ask(who: str) -> Any:
        environ: dict[str, Any] = {"who": who}
        setup_testing_defaults(environ)
        return spawn(lambda: b"".join(middleware(environ, ignored)))

    leader = ask("leader")
    eventually(lambda: runs == ["leader"])
    followers = []
    for count in (1, 2, 3):
        followers.append(ask(f"follower {count}"))
        eventually(lambda: middleware.flight.stats().waiting == len(followers) or len(runs) > 1)
    # The last follower replaces the third run, unless one has met the second before it failed.
    eventually(lambda: len(runs) >= 4 or sum(f.done() for f in followers) >= 2)
    third.set()
    first.set()
    assert leader.result(PATIENCE) == b"fine"
    ends = [follower.exception(PATIENCE) for follower in followers]
    assert {type(end) for end in ends} <= {LookupError, type(None)}
    assert ends.count(None) >= 1


# -- clients that are odd --------------------------------------------------------------------------


def test_a_receive_that_repeats_itself_is_asked_once() -> None:
    """As middleware that has read a body replays it: never suspending, it would stop the loop."""

    async def main() -> Any:
        app = Told(lambda _: b"x")
        middleware = asgi.CoalesceMiddleware(app, routes=["/"])
        asked = 0

        async def receive() -> Any:
            nonlocal asked
            asked += 1
            assert asked < 1000, "the event loop would stand still"
            return EMPTY

        leader = Exchange(middleware)
        await eventually_async(lambda: app.runs == 1)
        follower = Exchange(middleware)
        follower.task.cancel()
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        replayed = asyncio.ensure_future(middleware(follower.scope, receive, send))
        await eventually_async(lambda: middleware.flight.stats().waiting == 1)
        await eventually_async(lambda: asked == 2)
        for _ in range(10):
            await asyncio.sleep(0)
        count = asked
        app.gate.set()
        await asyncio.wait([leader.task, replayed], timeout=PATIENCE)
        return count, sent[-1]["body"]

    assert spawn_loop(main).result(PATIENCE) == (2, b"x")


def test_a_client_that_takes_not_even_the_head_holds_nobody_up() -> None:
    async def main() -> Any:
        middleware = asgi.CoalesceMiddleware(app := Told(lambda _: b"x"), routes=["/"])
        takes = asyncio.Event()

        async def stalled(message: Any) -> None:
            await takes.wait()

        first = Exchange(middleware)
        first.task.cancel()
        leader = asyncio.ensure_future(middleware(first.scope, first.received.get, stalled))
        await eventually_async(lambda: app.runs == 1)
        follower = Exchange(middleware)
        await eventually_async(lambda: middleware.flight.stats().waiting == 1)
        app.gate.set()
        await asyncio.wait_for(follower.task, PATIENCE)
        done = leader.done()
        takes.set()
        await leader
        return follower.body, done, middleware.stats()

    body, done, stats = spawn_loop(main).result(PATIENCE)
    assert (body, done) == (b"x", False)
    assert (stats.collapsed, stats.replaced) == (1, 0)


def test_all_that_listen_for_the_client_are_told() -> None:
    """Two `receive` at once, of an application whose client has left while others follow."""
    ends: list[bool] = []

    async def main() -> Any:
        gate = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            both = [asyncio.ensure_future(receive()) for _ in range(2)]
            await gate.wait()
            await answer(send, b"x")
            await asyncio.wait(both, timeout=PATIENCE)
            ends.extend(listener.done() for listener in both)

        middleware = asgi.CoalesceMiddleware(app, routes=["/"])
        leader = Exchange(middleware)
        await eventually_async(lambda: middleware.flight.in_flight() == 1)
        follower = Exchange(middleware)
        await eventually_async(lambda: middleware.flight.stats().waiting == 1)
        leader.leave()
        leader.leave()
        await eventually_async(lambda: leader.received.empty())
        gate.set()
        await asyncio.wait([leader.task, follower.task], timeout=PATIENCE)

    spawn_loop(main).result(PATIENCE)
    assert ends == [True, True]


# -- what is kept, and what is let go --------------------------------------------------------------


def test_a_task_that_an_application_leaves_behind_keeps_no_answer() -> None:
    async def main() -> int:
        tasks: list[asyncio.Task[Any]] = []
        end = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            tasks.append(asyncio.ensure_future(end.wait()))
            await answer(send, b"large")

        middleware = asgi.CoalesceMiddleware(app, routes=["/"])
        await Exchange(middleware).task
        gc.collect()
        kept = sum(type(found) is Round for found in gc.get_objects())
        end.set()
        await asyncio.wait(tasks)
        return kept

    assert spawn_loop(main).result(PATIENCE) == 0


@pytest.mark.parametrize("shareable", [[], ["/"]])
@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt])
def test_an_iterable_that_raises_at_once_is_closed(
    error: type[BaseException], shareable: list[str]
) -> None:
    closed: list[bool] = []

    class Body:
        def __iter__(self) -> Any:
            raise error

        def close(self) -> None:
            closed.append(True)

    middleware = wsgi.CoalesceMiddleware(
        lambda environ, start_response: Body(), routes=["/"], shareable=shareable
    )
    environ: dict[str, Any] = {}
    setup_testing_defaults(environ)
    with pytest.raises(error):
        middleware(environ, ignored)
    assert closed == [True]


def test_a_response_whose_body_is_interrupted_is_closed() -> None:
    closed: list[bool] = []

    class Body(httpx.SyncByteStream):
        def __iter__(self) -> Any:
            raise KeyboardInterrupt

        def close(self) -> None:
            closed.append(True)

    class Transport(httpx.BaseTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            return httpx.Response(200, headers={"Cache-Control": "max-age=60"}, stream=Body())

    transport = CoalesceTransport(Transport(), routes=["/"])
    with pytest.raises(KeyboardInterrupt):
        transport.handle_request(httpx.Request("GET", "http://127.0.0.1/"))
    assert closed == [True]


# -- what is learned, and judged -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["http.response.pathsend", "http.response.trailers"])
def test_an_answer_that_the_server_makes_is_learned_once(kind: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": CACHED})
        await send({"type": kind, "path": "/dev/null", "headers": []})

    async def main() -> Any:
        middleware = asgi.CoalesceMiddleware(app, routes=["/"])
        for _ in range(5):
            await Exchange(middleware).task
        return middleware.stats()

    stats = spawn_loop(main).result(PATIENCE)
    assert dict(stats.passed) == {"learned": 4}
    assert sum(stats.unshareable.values()) == 1


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"cache-control": "public", "expires": "Thu, 01 Jan 1970 00:00:00 GMT"}, "stale"),
        ({"cache-control": "public", "expires": "0"}, "stale"),
        ({"expires": "0"}, "stale"),
        (
            {
                "cache-control": "public",
                "date": "Mon, 30 Nov 2026 10:00:00 GMT",
                "expires": "Mon, 30 Nov 2026 10:00:00 GMT",
            },
            "stale",
        ),
        (
            {
                "cache-control": "public",
                "date": "Mon, 30 Nov 2020 10:00:00 GMT",
                "expires": "Mon, 30 Nov 2020 10:00:01 GMT",
            },
            None,
        ),
        ({"cache-control": "max-age=5", "expires": "0"}, None),  # RFC 9111 section 5.3
        ({"cache-control": "public", "expires": "Fri, 01 Jan 2300 00:00:00 GMT"}, None),
    ],
)
def test_an_answer_that_has_expired_is_stale(fields: dict[str, str], reason: str | None) -> None:
    """RFC 9111 section 4.2.1, as `max-age=0` is."""
    headers = [(name.encode(), value.encode()) for name, value in fields.items()]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, b"x", headers)

    async def main() -> Any:
        middleware = asgi.CoalesceMiddleware(app, routes=["/"], shareable=["/"])
        await Exchange(middleware).task
        return middleware.stats()

    expected = {} if reason is None else {reason: 1}
    assert dict(spawn_loop(main).result(PATIENCE).unshareable) == expected
