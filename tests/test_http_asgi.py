"""What is particular to ASGI: clients that leave, tasks, messages.

Where a real server can not be made to do a thing on time, the middleware is called as a server
calls it.
"""

import asyncio
import contextvars
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from http_support import PUBLIC, Origin, Reply, Site, names, results, serve_asgi, site
from support import PATIENCE, eventually, eventually_async, spawn_loop

from shardedflight.http.asgi import CoalesceMiddleware

CACHED = [(b"cache-control", b"max-age=60")]


# -- clients that leave ---------------------------------------------------------------------------


class Tap:
    """Between server and middleware: tells which clients' leaving the middleware was told."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.gone: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def tapped() -> Any:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.gone.append(dict(scope["headers"])[b"x-caller"].decode())
            return message

        await self.app(scope, tapped, send)


@contextmanager
def tapped(**options: Any) -> Iterator[tuple[Site, Tap]]:
    origin = Origin()
    options.setdefault("follower_timeout", PATIENCE)
    middleware = CoalesceMiddleware(origin.asgi, routes=["/"], **options)
    tap = Tap(middleware)
    with serve_asgi(tap) as port:
        try:
            yield Site("asgi", origin, port, middleware), tap
        finally:
            origin.gate.set()
            origin.rest.set()


def test_the_application_does_not_see_its_client_leave_while_others_follow() -> None:
    with tapped() as (s, tap):
        leader = s.open("leader")
        eventually(lambda: s.origin.runs == ["leader"])
        follower = s.open("follower")
        eventually(lambda: s.waiting == 1)
        leader.drop()
        eventually(lambda: tap.gone == ["leader"])
        newcomer = s.follow(["newcomer"])
        assert s.origin.disconnects == []
        s.origin.gate.set()
        assert results(newcomer)["newcomer"].body == "leader"
        assert follower.answer().body == "leader"
        assert s.origin.runs == ["leader"]


def test_the_application_sees_it_when_the_last_follower_leaves() -> None:
    with tapped() as (s, tap):
        leader = s.open("leader")
        eventually(lambda: s.origin.runs == ["leader"])
        follower = s.open("follower")
        eventually(lambda: s.waiting == 1)
        leader.drop()
        eventually(lambda: tap.gone == ["leader"])
        follower.drop()
        eventually(lambda: s.origin.disconnects == ["leader"])
        assert s.waiting == 0
        # Nobody joins an execution that the application has been told to give up.
        newcomer = s.lead("newcomer")
        s.origin.gate.set()
        assert newcomer.result(PATIENCE).body == "newcomer"


def test_a_leader_without_followers_is_seen_to_leave() -> None:
    with tapped() as (s, _):
        leader = s.open("leader")
        eventually(lambda: s.origin.runs == ["leader"])
        leader.drop()
        eventually(lambda: s.origin.disconnects == ["leader"])


def test_a_follower_that_leaves_is_waited_for_no_more() -> None:
    with tapped(max_waiters=1) as (s, _):
        leader = s.lead()
        follower = s.open("follower")
        eventually(lambda: s.waiting == 1)
        follower.drop()
        eventually(lambda: s.waiting == 0)
        newcomer = s.follow(["newcomer"])  # there is a place again
        s.origin.gate.set()
        assert results(newcomer)["newcomer"].body == "leader"
        assert leader.result(PATIENCE).body == "leader"


def test_a_slow_client_does_not_hold_up_the_followers() -> None:
    """The leader reads nothing, so its connection takes no more than its buffers hold."""
    chunk = "x" * (1 << 20)
    origin = Origin(lambda _: Reply(chunks=["", *[chunk] * 32]))
    with site("asgi", origin, body_limit=1 << 26) as s:
        leader = socket.create_connection(("127.0.0.1", s.port))
        leader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        leader.sendall(b"GET /item HTTP/1.1\r\nHost: here\r\nX-Caller: leader\r\n\r\n")
        eventually(lambda: origin.runs == ["leader"])
        followers = s.follow(names("f", 3), headers=[("Host", "here")])
        origin.gate.set()
        origin.rest.set()
        for answer in results(followers).values():
            assert len(answer.body) == 32 << 20
        leader.close()
    assert origin.runs == ["leader"]


# -- called as a server calls it ------------------------------------------------------------------


def http_scope(**changes: Any) -> dict[str, Any]:
    return {
        "type": "http",
        "method": "GET",
        "scheme": "http",
        "path": "/item",
        "raw_path": b"/item",
        "query_string": b"",
        "headers": [(b"host", b"here")],
        **changes,
    }


class Exchange:
    """One request as a server has it."""

    def __init__(self, app: Any, first: dict[str, Any] | None = None, **changes: Any) -> None:
        self.sent: list[dict[str, Any]] = []
        self.messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.messages.put_nowait(first or {"type": "http.request", "body": b"", "more_body": False})
        self.refuses: Exception | None = None
        self.scope = http_scope(**changes)
        self.task = asyncio.ensure_future(app(self.scope, self.messages.get, self.send))

    async def send(self, message: dict[str, Any]) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    async def done(self) -> "Exchange":
        await asyncio.wait_for(self.task, PATIENCE)
        return self


def run(main: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), PATIENCE))  # type: ignore[arg-type]


class App:
    """Answers once `gate` is set, with the number of the run."""

    def __init__(self, headers: Any = CACHED) -> None:
        self.headers = headers
        self.runs = 0
        self.cancelled = 0
        self.gate = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.runs += 1
        me = b"%d" % self.runs
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        await send({"type": "http.response.start", "status": 200, "headers": self.headers})
        await send({"type": "http.response.body", "body": me})


async def waiting(middleware: CoalesceMiddleware, number: int) -> None:
    await eventually_async(lambda: middleware.flight.stats().waiting == number)


def test_lifespan_and_websocket_pass_untouched() -> None:
    seen: list[Any] = []

    async def app(*arguments: Any) -> None:
        seen.append(arguments)

    async def main() -> None:
        middleware = CoalesceMiddleware(app, routes=["/"])
        for kind in ("lifespan", "websocket", "something new"):
            arguments = ({"type": kind}, object(), object())
            await middleware(*arguments)  # type: ignore[arg-type]
            assert all(a is b for a, b in zip(seen.pop(), arguments, strict=True))
        assert middleware.stats().passed == {}

    run(main)


def test_a_request_that_passes_through_has_the_servers_own_callables() -> None:
    seen: list[Any] = []

    async def app(*arguments: Any) -> None:
        seen.append(arguments)

    async def main() -> None:
        middleware = CoalesceMiddleware(app, routes=["/other"])
        arguments = (http_scope(), object(), object())
        await middleware(*arguments)  # type: ignore[arg-type]
        assert all(a is b for a, b in zip(seen.pop(), arguments, strict=True))

    run(main)


@pytest.mark.parametrize(
    "first",
    [
        {"type": "http.request", "body": b"x", "more_body": False},
        {"type": "http.request", "body": b"", "more_body": True},
        {"type": "http.disconnect"},
    ],
    ids=["body", "more to come", "gone"],
)
def test_a_body_that_no_field_announces_passes_through(first: dict[str, Any]) -> None:
    """As HTTP/2 has it. The application gets the message that the middleware has looked at."""
    received: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        received.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": CACHED})
        await send({"type": "http.response.body", "body": b"mine"})

    async def main() -> None:
        middleware = CoalesceMiddleware(app, routes=["/"])
        exchange = await Exchange(middleware, first).done()
        assert exchange.body == b"mine"
        assert received == [first]
        reason = "gone" if first["type"] == "http.disconnect" else "body"
        assert middleware.stats().passed == {reason: 1}

    run(main)


@pytest.mark.parametrize("tls", [{"client_cert_name": "CN=me"}, {"client_cert_chain": ["-----"]}])
def test_a_client_certificate_passes_through(tls: dict[str, Any]) -> None:
    async def main() -> None:
        app = App()
        app.gate.set()
        middleware = CoalesceMiddleware(app, routes=["/"])
        await Exchange(middleware, extensions={"tls": tls}).done()
        assert middleware.stats().passed == {"credentials": 1}

    run(main)


@pytest.mark.parametrize(
    "messages",
    [
        [{"type": "http.response.start", "status": 200, "headers": CACHED, "trailers": True}],
        [
            {"type": "http.response.start", "status": 200, "headers": CACHED},
            {"type": "http.response.pathsend", "path": "/etc/hostname"},
        ],
        [
            {"type": "http.response.start", "status": 200, "headers": CACHED},
            {"type": "http.response.zerocopysend", "file": 1},
        ],
    ],
    ids=["trailers", "pathsend", "zerocopysend"],
)
def test_what_the_server_makes_itself_is_not_shared(messages: list[dict[str, Any]]) -> None:
    async def main() -> None:
        gate = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await gate.wait()
            for message in messages:
                await send(message)

        middleware = CoalesceMiddleware(app, routes=["/"])
        both = [Exchange(middleware), Exchange(middleware)]
        await waiting(middleware, 1)
        gate.set()
        for exchange in both:
            assert (await exchange.done()).sent == messages
        assert middleware.stats().unshareable == {"extension": 1}

    run(main)


def test_other_messages_go_to_the_leader_in_order() -> None:
    messages = [
        {"type": "http.response.early_hint", "links": []},
        {"type": "http.response.start", "status": 200, "headers": CACHED},
        {"type": "http.response.push", "path": "/x", "headers": []},
        {"type": "http.response.body", "body": b"a", "more_body": True},
        {"type": "http.response.body", "body": b"b"},
    ]

    async def main() -> None:
        gate = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await gate.wait()
            for message in messages:
                await send(message)

        middleware = CoalesceMiddleware(app, routes=["/"])
        leader = Exchange(middleware)
        follower = Exchange(middleware)
        await waiting(middleware, 1)
        gate.set()
        assert (await leader.done()).sent == messages
        assert [message["type"] for message in (await follower.done()).sent] == [
            "http.response.start",
            "http.response.body",
        ]
        assert follower.body == b"ab"

    run(main)


def test_a_cancelled_leader_leaves_its_followers_alone() -> None:
    async def main() -> None:
        app = App()
        middleware = CoalesceMiddleware(app, routes=["/"])
        leader = Exchange(middleware)
        follower = Exchange(middleware)
        await waiting(middleware, 1)
        leader.task.cancel()
        await asyncio.wait([leader.task])
        app.gate.set()
        assert (await follower.done()).body == b"1"
        assert leader.task.cancelled()
        assert leader.sent == []
        assert (app.runs, app.cancelled) == (1, 0)

    run(main)


@pytest.mark.parametrize("followers", [0, 2])
def test_with_the_last_caller_the_application_is_cancelled(followers: int) -> None:
    async def main() -> None:
        app = App()
        middleware = CoalesceMiddleware(app, routes=["/"])
        exchanges = [Exchange(middleware) for _ in range(1 + followers)]
        await eventually_async(lambda: app.runs == 1)
        await waiting(middleware, followers)
        for exchange in exchanges:
            assert app.cancelled == 0
            exchange.task.cancel()
            await asyncio.wait([exchange.task])
        await eventually_async(lambda: app.cancelled == 1)
        newcomer = Exchange(middleware)
        app.gate.set()
        assert (await newcomer.done()).body == b"2"
        assert middleware._tasks == set()

    run(main)


def test_a_cancelled_leader_of_a_stream_cancels_the_application() -> None:
    cancelled: list[bool] = []

    async def main() -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(True)
                raise

        middleware = CoalesceMiddleware(app, routes=["/"])
        leader = Exchange(middleware)
        await eventually_async(lambda: bool(leader.sent))
        leader.task.cancel()
        await asyncio.wait([leader.task])
        assert leader.task.cancelled()
        assert cancelled == [True]

    run(main)


def test_a_cancelled_leader_whose_answer_turns_out_unshareable_ends_there() -> None:
    """The followers are released; the rest of the answer is for nobody."""

    async def main() -> None:
        ended: list[bool] = []
        gate = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await gate.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            try:
                await send({"type": "http.response.body", "body": b"mine", "more_body": True})
                await send({"type": "http.response.body"})
            finally:
                ended.append(True)

        middleware = CoalesceMiddleware(app, routes=["/"])
        leader = Exchange(middleware)
        follower = Exchange(middleware)
        await waiting(middleware, 1)
        leader.task.cancel()
        await asyncio.wait([leader.task])
        gate.set()
        assert (await follower.done()).body == b"mine"
        assert leader.sent == []
        await eventually_async(lambda: len(ended) == 2)
        await eventually_async(lambda: middleware._tasks == set())

    run(main)


def test_an_application_that_is_cancelled_is_a_lost_leader() -> None:
    async def main() -> None:
        runs: list[int] = []
        gate = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            runs.append(1)
            await gate.wait()
            if len(runs) == 1:
                raise asyncio.CancelledError
            await send({"type": "http.response.start", "status": 200, "headers": CACHED})
            await send({"type": "http.response.body", "body": b"second"})

        middleware = CoalesceMiddleware(app, routes=["/"])
        leader, one, two = (Exchange(middleware) for _ in range(3))
        await waiting(middleware, 2)
        gate.set()
        assert (await one.done()).body == (await two.done()).body == b"second"
        await asyncio.wait([leader.task])
        assert leader.task.cancelled()
        assert len(runs) == 2
        assert middleware.flight.stats().promotions == 1

    run(main)


def test_a_leader_that_can_not_be_sent_to_goes_on_for_the_others() -> None:
    async def main() -> None:
        app = App()
        middleware = CoalesceMiddleware(app, routes=["/"])
        leader = Exchange(middleware)
        follower = Exchange(middleware)
        await waiting(middleware, 1)
        leader.refuses = OSError("the connection is closed")
        app.gate.set()
        assert (await follower.done()).body == b"1"
        with pytest.raises(OSError, match="the connection is closed"):
            await leader.done()

    run(main)


def test_what_runs_after_the_answer_runs_once_and_holds_up_nobody() -> None:
    async def main() -> None:
        after = asyncio.Event()
        ended: list[bool] = []
        app = App()

        async def with_background(scope: Any, receive: Any, send: Any) -> None:
            await app(scope, receive, send)
            await after.wait()
            ended.append(True)

        middleware = CoalesceMiddleware(with_background, routes=["/"])
        leader = Exchange(middleware)
        follower = Exchange(middleware)
        await waiting(middleware, 1)
        app.gate.set()
        assert (await follower.done()).body == b"1"
        assert not leader.task.done()
        assert leader.body == b"1"
        after.set()
        await leader.done()
        assert ended == [True]

    run(main)


def test_an_error_after_the_answer_is_the_leaders() -> None:
    """Starlette sends its 500 first and then raises, for the server to log."""

    async def main() -> None:
        gate = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await gate.wait()
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body", "body": b"sorry"})
            raise LookupError("on purpose")

        middleware = CoalesceMiddleware(app, routes=["/"], shareable=["/"])
        leader = Exchange(middleware)
        follower = Exchange(middleware)
        await waiting(middleware, 1)
        gate.set()
        assert (await follower.done()).body == b"sorry"
        with pytest.raises(LookupError, match="on purpose"):
            await leader.done()
        assert leader.body == b"sorry"

    run(main)


def test_an_application_that_says_nothing_releases_its_followers() -> None:
    async def main() -> None:
        gate = asyncio.Event()
        runs: list[int] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            runs.append(1)
            await gate.wait()

        middleware = CoalesceMiddleware(app, routes=["/"])
        both = [Exchange(middleware), Exchange(middleware)]
        await waiting(middleware, 1)
        gate.set()
        for exchange in both:
            assert (await exchange.done()).sent == []
        assert len(runs) == 2
        assert middleware.stats().unshareable == {"broken": 1}

    run(main)


def test_nonsense_from_the_application_reaches_the_server_as_it_is() -> None:
    """A follower can not be given a copy of it, so it runs by itself."""
    headers = [*CACHED, ("text", "no bytes")]
    message = {"type": "http.response.start", "status": 200, "headers": headers}
    body = {"type": "http.response.body", "body": b"nonsense"}

    async def main() -> None:
        gate = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await gate.wait()
            await send(message)
            await send(body)

        middleware = CoalesceMiddleware(app, routes=["/"])
        both = [Exchange(middleware), Exchange(middleware)]
        await waiting(middleware, 1)
        gate.set()
        for exchange in both:
            assert (await exchange.done()).sent == [message, body]
        assert middleware.stats().errors == 1
        assert middleware.stats().passed == {"error": 1}

    run(main)


def test_a_request_for_its_own_address_inside_the_application_passes_through() -> None:
    """It would wait for itself. The flight knows, and the middleware does without."""

    async def main() -> None:
        inner: list[bytes] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            body = b"inner"
            if "outer" in scope:
                exchange = Exchange(middleware)
                body = (await exchange.done()).body
                inner.append(body)
            await send({"type": "http.response.start", "status": 200, "headers": CACHED})
            await send({"type": "http.response.body", "body": body})

        middleware = CoalesceMiddleware(app, routes=["/"])
        assert (await Exchange(middleware, outer=True).done()).body == b"inner"
        assert inner == [b"inner"]
        assert middleware.stats().errors == 1

    run(main)


@pytest.mark.parametrize("cycle", [2, 3])
def test_keys_that_wait_for_each_other_inside_the_application_pass_through(cycle: int) -> None:
    """Each one's application asks for the next. The last would wait for all: it runs by itself."""

    async def main() -> None:
        runs: list[int] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            number = scope["number"]
            runs.append(number)
            body = b"%d" % number
            if len(runs) <= cycle:
                following = (number + 1) % cycle
                path = b"/%d" % following
                inner = Exchange(middleware, raw_path=path, number=following)
                body += (await inner.done()).body
            await send({"type": "http.response.start", "status": 200, "headers": CACHED})
            await send({"type": "http.response.body", "body": body})

        # Were it not noticed, the follower's timeout would come after the test's.
        middleware = CoalesceMiddleware(app, routes=["/"], follower_timeout=2 * PATIENCE)
        first = await Exchange(middleware, raw_path=b"/0", number=0).done()
        assert first.body == b"".join(b"%d" % n for n in (*range(cycle), 0))
        assert middleware.stats().errors == 1
        assert middleware.stats().passed == {"error": 1}
        assert middleware._rounds._open == {}

    run(main)


def test_headers_that_can_be_read_only_once_reach_server_and_followers() -> None:
    """ASGI allows any iterable of fields."""

    async def main() -> None:
        gate = asyncio.Event()
        fields = [(b"x-one", b"1")]

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await gate.wait()
            headers = iter([*fields, *CACHED[: scope["cached"]]])
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"mine"})

        middleware = CoalesceMiddleware(app, routes=["/"])
        both = [Exchange(middleware, cached=1), Exchange(middleware, cached=1)]
        await waiting(middleware, 1)
        gate.set()
        for exchange in both:
            assert (b"x-one", b"1") in list((await exchange.done()).sent[0]["headers"])
        for _ in range(2):  # leads, and then passes through
            other = await Exchange(middleware, raw_path=b"/other", cached=0).done()
            assert list(other.sent[0]["headers"]) == fields
        assert middleware.stats().passed == {"learned": 1}
        assert middleware.stats().errors == 0

    run(main)


def test_names_in_capitals_are_read_all_the_same() -> None:
    """No server sends them. If one did, a cookie must not be overlooked."""

    async def main() -> None:
        app = App([(b"Cache-Control", b"max-age=60"), (b"Set-Cookie", b"a=b")])
        app.gate.set()
        middleware = CoalesceMiddleware(app, routes=["/"])
        await Exchange(middleware, headers=[(b"host", b"here"), (b"COOKIE", b"a=b")]).done()
        await Exchange(middleware).done()
        assert middleware.stats().passed == {"cookie": 1}
        assert middleware.stats().unshareable == {"set-cookie": 1}

    run(main)


def test_a_field_that_comes_twice_is_in_the_key_twice() -> None:
    async def main() -> None:
        app = App()
        middleware = CoalesceMiddleware(app, routes=["/"])
        fields = [[(b"accept", b"a")], [(b"accept", b"a")] * 2, [(b"accept", b"a, a")]]
        exchanges = [Exchange(middleware, headers=headers) for headers in fields]
        await waiting(middleware, 1)
        app.gate.set()
        bodies = [(await exchange.done()).body for exchange in exchanges]
        assert bodies[0] != bodies[1] == bodies[2]

    run(main)


def test_what_makes_a_request_suspect_may_be_in_the_key_too() -> None:
    async def main() -> None:
        app = App()
        options: Any = {"key_headers": ["Cache-Control"], "follower_timeout": 2 * PATIENCE}
        middleware = CoalesceMiddleware(app, routes=["/"], **options)
        fields = [[(b"cache-control", value)] for value in (b"max-age=0", b"max-age=1")]
        exchanges = [Exchange(middleware, headers=headers) for headers in fields]
        await eventually_async(lambda: app.runs == 2)
        app.gate.set()
        assert [(await exchange.done()).body for exchange in exchanges] == [b"1", b"2"]

    run(main)


def test_the_key_is_what_came_whatever_the_application_makes_of_it() -> None:
    """An inner middleware changes the list of fields in place, before the answer says Vary."""

    async def main() -> None:
        gate = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            body = dict(scope["headers"])[b"x-a"]
            await gate.wait()
            scope["headers"][:] = [(b"x-a", b"changed")]
            headers = [*CACHED, (b"vary", b"x-a")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})

        middleware = CoalesceMiddleware(app, routes=["/"])
        values = [b"1", b"1", b"changed"]
        all_ = [Exchange(middleware, headers=[(b"x-a", value)]) for value in values]
        await waiting(middleware, 2)
        gate.set()
        assert [(await exchange.done()).body for exchange in all_] == values
        assert middleware.stats().collapsed == 1

    run(main)


def test_the_application_runs_in_the_leaders_context() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")

    async def main() -> None:
        seen: list[str] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            seen.append(variable.get())
            await send({"type": "http.response.start", "status": 200, "headers": CACHED})
            await send({"type": "http.response.body"})

        middleware = CoalesceMiddleware(app, routes=["/"])
        variable.set("of the request")
        await Exchange(middleware).done()
        assert seen == ["of the request"]

    run(main)


def test_event_loops_in_threads_join_one_execution() -> None:
    origin = Origin(lambda _: Reply(headers=[PUBLIC]))
    middleware = CoalesceMiddleware(origin.asgi, routes=["/"], follower_timeout=PATIENCE)

    async def ask(caller: bytes) -> bytes:
        headers = [(b"host", b"here"), (b"x-caller", caller)]
        return (await Exchange(middleware, headers=headers).done()).body

    leader = spawn_loop(lambda: ask(b"leader"))
    eventually(lambda: origin.runs == ["leader"])
    followers = [spawn_loop(lambda: ask(b"follower")) for _ in range(5)]
    eventually(lambda: middleware.flight.stats().waiting == 5)
    origin.gate.set()
    assert {future.result(PATIENCE) for future in (leader, *followers)} == {b"leader"}


def test_nothing_is_left_behind() -> None:
    async def main() -> None:
        app = App()
        app.gate.set()
        middleware = CoalesceMiddleware(app, routes=["/"])
        for number in range(50):
            await Exchange(middleware, raw_path=b"/%d" % number).done()
        rounds = middleware._rounds
        assert (rounds._open, rounds._learned, middleware._tasks) == ({}, {}, set())
        assert middleware.flight.in_flight() == 0

    run(main)
