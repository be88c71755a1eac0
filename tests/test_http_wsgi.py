"""What is particular to WSGI: iterables, `write`, `close`, servers' own words for who asks.

`wsgiref.validate` stands on both sides of the middleware, so each side keeps to PEP 3333.
"""

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
from support import PATIENCE, eventually, spawn

from shardedflight.http.wsgi import CoalesceMiddleware

CACHED = [("Content-Type", "text/plain"), ("Cache-Control", "max-age=60")]
UNSHAREABLE = [("Content-Type", "text/plain"), ("Cache-Control", "private")]


def environ_of(**changes: Any) -> dict[str, Any]:
    environ: dict[str, Any] = {"wsgi.errors": sys.stderr, "QUERY_STRING": ""}
    setup_testing_defaults(environ)
    environ["wsgi.input"] = io.BytesIO()
    environ.update(changes)
    return environ


class Exchange:
    """One request as a server has it."""

    def __init__(self, app: Any, **changes: Any) -> None:
        self.environ = environ_of(**changes)
        self.status: str | None = None
        self.headers: list[tuple[str, str]] = []
        self.written: list[bytes] = []
        self.iterable: Any = None
        self.closed = False
        self.refuses: Exception | None = None
        self.app = app

    def start_response(self, status: str, headers: Any, exc_info: Any = None) -> Any:
        if exc_info and self.written:
            raise exc_info[1]
        self.status, self.headers = status, headers
        return self.write

    def write(self, chunk: bytes) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.written.append(chunk)

    def serve(self) -> "Exchange":
        self.iterable = self.app(self.environ, self.start_response)
        try:
            for chunk in self.iterable:
                self.write(chunk)
        finally:
            if hasattr(self.iterable, "close"):
                self.iterable.close()
        return self

    @property
    def body(self) -> bytes:
        return b"".join(self.written)


class Body:
    """An iterable that knows whether it was closed."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.chunks = iter(chunks)
        self.closed = 0

    def __iter__(self) -> "Body":
        return self

    def __next__(self) -> bytes:
        return next(self.chunks)

    def close(self) -> None:
        self.closed += 1


class Scene:
    """A leader and a follower of one application, which waits for `gate` first."""

    def __init__(self, app: Callable[[Any, Any], Iterable[bytes]], **options: Any) -> None:
        self.gate = threading.Event()
        self.runs: list[dict[str, Any]] = []
        self.app = app
        options.setdefault("follower_timeout", PATIENCE)
        self.middleware = CoalesceMiddleware(self.run, routes=["/"], **options)

    def run(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        self.runs.append(environ)
        assert self.gate.wait(PATIENCE)
        return self.app(environ, start_response)

    def play(self, wrap: Callable[[Any], Any] = lambda app: app) -> tuple[Exchange, Exchange]:
        app = wrap(self.middleware)
        leader, follower = Exchange(app), Exchange(app)
        leads = spawn(leader.serve)
        eventually(lambda: len(self.runs) == 1)
        follows = spawn(follower.serve)
        eventually(lambda: self.middleware.flight.stats().waiting == 1)
        self.gate.set()
        follows.result(PATIENCE)
        leads.result(PATIENCE)
        return leader, follower


def chunked(environ: Any, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", CACHED)
    yield b""
    yield b"a"
    yield b"b"


def plain(environ: Any, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", CACHED)
    return [b"a", b"b"]


def measured(environ: Any, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*CACHED, ("Content-Length", "2")])
    return Body([b"a", b"b"])


def by_write(environ: Any, start_response: Any) -> Iterable[bytes]:
    write = start_response("200 OK", CACHED)
    write(b"a")
    return [b"b"]


def private(environ: Any, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", UNSHAREABLE)
    return iter([b"a", b"b"])


@pytest.mark.parametrize("app", [chunked, plain, measured, by_write, private])
@pytest.mark.filterwarnings("ignore::wsgiref.validate.WSGIWarning")
def test_both_sides_keep_to_pep_3333(app: Any) -> None:
    leader, follower = Scene(validator(app)).play(validator)
    assert leader.body == follower.body == b"ab"
    assert leader.status == follower.status == "200 OK"
    collapsed = ("Cache-Status", "shardedflight; fwd=miss; collapsed")
    assert (collapsed in follower.headers) == (app is not private)
    assert collapsed not in leader.headers


@pytest.mark.parametrize("headers", [CACHED, UNSHAREABLE, [*CACHED, ("Content-Length", "2")]])
def test_each_iterable_is_closed_once(headers: Any) -> None:
    bodies: list[Body] = []

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", headers)
        bodies.append(Body([b"a", b"b"]))
        return bodies[-1]

    Scene(app).play()
    assert {body.closed for body in bodies} == {1}
    assert len(bodies) == (2 if headers is UNSHAREABLE else 1)


def test_an_iterable_whose_answer_breaks_off_is_closed() -> None:
    bodies: list[Body] = []

    def broken() -> Iterable[bytes]:
        yield b"a"
        if len(bodies) == 1:
            raise LookupError("on purpose")

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", CACHED)
        bodies.append(Body(broken()))
        return bodies[-1]

    scene = Scene(app)
    with pytest.raises(LookupError, match="on purpose"):
        scene.play()
    assert [body.closed for body in bodies] == [1, 1]
    assert scene.middleware.stats().unshareable == {"broken": 1}


@pytest.mark.parametrize("headers", [CACHED, UNSHAREABLE])
def test_the_server_gets_the_applications_own_list(headers: Any) -> None:
    """One of one element tells it Content-Length; a wrapped file it can send by itself."""
    body = [b"a"]

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", headers)
        return body

    leader, _ = Scene(app).play()
    assert leader.iterable is body


def test_a_request_that_passes_through_has_the_servers_own_start_response() -> None:
    seen: list[Any] = []

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        seen.extend((environ, start_response))
        return seen

    middleware = CoalesceMiddleware(app, routes=["/other"])
    environ, start_response = environ_of(), object()
    assert middleware(environ, start_response) is seen  # type: ignore[arg-type]
    assert seen[0] is environ
    assert seen[1] is start_response


def test_a_head_may_be_replaced_before_the_body() -> None:
    """An error handler's way: PEP 3333. What was said first is not sent, and not shared."""

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", CACHED)
        try:
            raise LookupError("on purpose")
        except LookupError:
            start_response("403 Forbidden", UNSHAREABLE, sys.exc_info())
        return [b"sorry"]

    scene = Scene(app)
    leader, follower = scene.play()
    assert (leader.status, leader.body) == ("403 Forbidden", b"sorry")
    assert (follower.status, follower.body) == ("403 Forbidden", b"sorry")
    assert scene.middleware.stats().unshareable == {"status": 1}


def test_a_head_replaced_after_the_body_has_begun_is_the_servers_error() -> None:
    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", CACHED)
        yield b"a"
        try:
            raise LookupError("on purpose")
        except LookupError:
            start_response("500 Sorry", CACHED, sys.exc_info())

    scene = Scene(app)
    with pytest.raises(LookupError, match="on purpose"):
        scene.play()


def test_a_leader_that_can_not_be_sent_to_goes_on_for_the_others() -> None:
    scene = Scene(chunked)
    leader = Exchange(scene.middleware)
    leader.refuses = ConnectionResetError("the client has left")
    leads = spawn(leader.serve)
    eventually(lambda: len(scene.runs) == 1)
    follower = Exchange(scene.middleware)
    follows = spawn(follower.serve)
    eventually(lambda: scene.middleware.flight.stats().waiting == 1)
    scene.gate.set()
    follows.result(PATIENCE)
    assert follower.body == b"ab"
    assert len(scene.runs) == 1
    with pytest.raises(ConnectionResetError):
        leads.result(PATIENCE)


def test_a_leader_that_can_not_be_sent_to_stops_when_nobody_follows() -> None:
    taken: list[bytes] = []

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", CACHED)
        for chunk in (b"a", b"b", b"c"):
            taken.append(chunk)
            yield chunk

    scene = Scene(app)
    scene.gate.set()
    leader = Exchange(scene.middleware)
    leader.refuses = ConnectionResetError("the client has left")
    with pytest.raises(ConnectionResetError):
        leader.serve()
    assert taken == [b"a"]


@pytest.mark.parametrize(
    "changes",
    [
        {"REMOTE_USER": "me"},
        {"SSL_CLIENT_CERT": "-----BEGIN"},
        {"SSL_CLIENT_VERIFY": "SUCCESS"},
        {"SSL_CLIENT_S_DN": "CN=me"},
    ],
)
def test_a_client_that_the_server_knows_passes_through(changes: dict[str, str]) -> None:
    middleware = CoalesceMiddleware(plain, routes=["/"])
    Exchange(middleware, **changes).serve()
    assert middleware.stats().passed == {"credentials": 1}


def test_an_empty_length_is_no_body() -> None:
    """PEP 3333 allows it, and uWSGI does it."""
    middleware = CoalesceMiddleware(plain, routes=["/"])
    Exchange(middleware, CONTENT_LENGTH="", CONTENT_TYPE="").serve()
    assert middleware.stats().passed == {}


@pytest.mark.parametrize("field", ["HTTP_COOKIE", "HTTP_AUTHORIZATION", "HTTP_X_API_KEY"])
def test_a_field_that_says_who_asks_does_so_when_it_is_empty(field: str) -> None:
    middleware = CoalesceMiddleware(plain, routes=["/"])
    Exchange(middleware, **{field: ""}).serve()
    assert sum(middleware.stats().passed.values()) == 1


@pytest.mark.parametrize("verify", ["NONE"])
def test_a_server_that_says_it_knows_nobody_is_believed(verify: str) -> None:
    middleware = CoalesceMiddleware(plain, routes=["/"])
    Exchange(middleware, SSL_CLIENT_VERIFY=verify, REMOTE_USER="").serve()
    assert middleware.stats().passed == {}


def test_a_request_for_its_own_address_inside_the_application_passes_through() -> None:
    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        body = b"inner"
        if "outer" in environ:
            body = Exchange(middleware).serve().body + b", outer"
        start_response("200 OK", CACHED)
        return [body]

    middleware = CoalesceMiddleware(app, routes=["/"], follower_timeout=PATIENCE)
    assert Exchange(middleware, outer=True).serve().body == b"inner, outer"
    assert middleware.stats().errors == 1


def test_a_lost_leader_is_replaced_by_a_follower() -> None:
    """As when a server's worker is told to exit in the middle of a request."""
    exits: list[BaseException] = []

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        if len(scene.runs) == 1:
            raise SystemExit
        start_response("200 OK", CACHED)
        return [b"second"]

    scene = Scene(app)
    leader, follower = Exchange(scene.middleware), Exchange(scene.middleware)

    def lead() -> None:
        try:
            leader.serve()
        except SystemExit as error:
            exits.append(error)

    leads = spawn(lead)
    eventually(lambda: len(scene.runs) == 1)
    follows = spawn(follower.serve)
    eventually(lambda: scene.middleware.flight.stats().waiting == 1)
    scene.gate.set()
    follows.result(PATIENCE)
    leads.result(PATIENCE)
    assert follower.body == b"second"
    assert len(exits) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_waits_for_nobody() -> None:
    scene = Scene(plain)
    leads = spawn(Exchange(scene.middleware).serve)
    eventually(lambda: len(scene.runs) == 1)
    with scene.middleware._rounds._lock:
        child = os.fork()
        if child == 0:
            code = 1
            signal.alarm(int(PATIENCE))  # ends a child that hangs
            try:
                scene.gate.set()
                exchange = Exchange(scene.middleware).serve()
                if exchange.body == b"ab" and len(scene.runs) == 2:
                    code = 0
            finally:
                os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    scene.gate.set()
    leads.result(PATIENCE)
