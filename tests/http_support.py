"""Real servers and clients over loopback, and an application whose every step the test decides."""

import asyncio
import contextlib
import gc
import http.client
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest
from support import PATIENCE, eventually, eventually_async, spawn

from shardedflight.http import HttpStats, asgi, wsgi

uvicorn = pytest.importorskip("uvicorn", reason="the extra `test` is not installed")
cheroot_wsgi = pytest.importorskip("cheroot.wsgi", reason="the extra `test` is not installed")

#: What lets an answer be shared on any route.
PUBLIC = ("Cache-Control", "public, max-age=60")

KINDS = ("asgi", "wsgi")


# -- servers --------------------------------------------------------------------------------------


@contextlib.contextmanager
def serve_asgi(app: Any, **settings: Any) -> Iterator[int]:
    """Serves `app` by uvicorn on a thread; gives the port."""
    config = uvicorn.Config(
        app,
        port=0,
        interface="asgi3",
        log_config=None,
        loop="asyncio",
        http="h11",
        backlog=1024,
        **settings,
    )
    server = uvicorn.Server(config)
    ended = spawn(server.run)
    try:
        eventually(lambda: server.started or ended.done(), "the server's start")
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        ended.result(PATIENCE)


@contextlib.contextmanager
def serve_wsgi(app: Any, threads: int = 64) -> Iterator[int]:
    """Serves `app` by cheroot with a thread for each connection; gives the port."""
    server = cheroot_wsgi.Server(
        ("127.0.0.1", 0), app, numthreads=threads, request_queue_size=1024, timeout=PATIENCE
    )
    server.expiration_interval = 0.02  # how often it looks whether it is to stop
    server.error_log = lambda *_, **__: None  # tests make applications fail on purpose
    server.prepare()
    ended = spawn(server.serve)
    with unsent_buffers_ignored():
        try:
            yield server.bind_addr[1]
        finally:
            with late_connections_ignored():
                server.stop()
                ended.result(PATIENCE)


@contextlib.contextmanager
def late_connections_ignored() -> Iterator[None]:
    """A thread of cheroot's that has just answered keeps its connection for the next request.

    It does so even where the server has closed what it would be kept in.
    """
    report = threading.excepthook

    def reported(args: Any) -> None:
        if not (isinstance(args.exc_value, ValueError) and "closed" in str(args.exc_value)):
            report(args)

    threading.excepthook = reported
    try:
        yield
    finally:
        threading.excepthook = report


@contextlib.contextmanager
def unsent_buffers_ignored() -> Iterator[None]:
    """cheroot keeps what a client that has left was to get, and sends it when it is collected."""
    report = sys.unraisablehook

    def reported(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, OSError):
            report(unraisable)

    sys.unraisablehook = reported
    try:
        yield
        gc.collect()
    finally:
        sys.unraisablehook = report


# -- clients --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: str

    def header(self, name: str) -> str | None:
        values = [value for key, value in self.headers if key.lower() == name.lower()]
        return ", ".join(values) if values else None

    @property
    def collapsed(self) -> bool:
        return self.header("Cache-Status") == "shardedflight; fwd=miss; collapsed"


class Connection(http.client.HTTPConnection):
    """A request that has been sent, on a connection of its own."""

    def __init__(
        self,
        port: int,
        path: str,
        caller: str,
        headers: Iterable[tuple[str, str]],
        method: str,
        body: bytes,
    ) -> None:
        super().__init__("127.0.0.1", port, timeout=PATIENCE)
        fields = [("X-Caller", caller), *headers]
        has_host = any(name.lower() == "host" for name, _ in fields)
        self.putrequest(method, path, skip_host=has_host, skip_accept_encoding=True)
        for name, value in fields:
            self.putheader(name, value)
        if body:
            self.putheader("Content-Length", str(len(body)))
        self.endheaders(body or None)

    def drop(self) -> None:
        """Leaves at once, without waiting for anything."""
        assert self.sock is not None
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.close()

    def answer(self) -> Answer:
        response = self.getresponse()
        try:
            return Answer(response.status, response.getheaders(), response.read().decode())
        finally:
            self.close()


# -- the application ------------------------------------------------------------------------------


@dataclass
class Reply:
    """What the application answers; each chunk after the first waits for `Origin.rest`."""

    status: int = 200
    headers: Sequence[tuple[str, str]] = (PUBLIC,)
    chunks: Sequence[str] | None = None  # by default who asked
    error: Exception | None = None


@dataclass
class Origin:
    """An application for both interfaces. It answers who asked: so a leak shows.

    Each run appends its caller to `runs`, waits for `gate` before the head (longer if its caller is
    `held`), and for `rest` before every chunk but the first.
    """

    reply: Callable[[str], Reply] = lambda caller: Reply()
    runs: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    rest: threading.Event = field(default_factory=threading.Event)
    held: Callable[[str], bool] = lambda caller: False
    disconnects: list[str] = field(default_factory=list)

    def _may_answer(self, caller: str) -> bool:
        return self.gate.is_set() and not self.held(caller)

    def _reply(self, caller: str) -> tuple[Reply, list[tuple[str, str]], list[bytes]]:
        reply = self.reply(caller)
        if reply.error is not None:
            raise reply.error
        chunks = [caller] if reply.chunks is None else reply.chunks
        return reply, [*reply.headers], [chunk.encode() for chunk in chunks]

    async def asgi(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        caller = dict(scope["headers"])[b"x-caller"].decode()
        self.runs.append(caller)
        await receive()
        left = asyncio.create_task(self._listen(receive, caller))
        try:
            await eventually_async(lambda: self._may_answer(caller))
            reply, headers, chunks = self._reply(caller)
            raw = [(name.lower().encode(), value.encode()) for name, value in headers]
            await send({"type": "http.response.start", "status": reply.status, "headers": raw})
            for number, chunk in enumerate(chunks):
                if number:
                    await eventually_async(self.rest.is_set)
                more = number + 1 < len(chunks)
                await send({"type": "http.response.body", "body": chunk, "more_body": more})
            if not chunks:
                await send({"type": "http.response.body"})
        finally:
            self.ended.append(caller)
            left.cancel()

    async def _listen(self, receive: Any, caller: str) -> None:
        if (await receive())["type"] == "http.disconnect":
            self.disconnects.append(caller)

    def wsgi(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        caller = environ["HTTP_X_CALLER"]
        self.runs.append(caller)
        try:
            eventually(lambda: self._may_answer(caller))
            reply, headers, chunks = self._reply(caller)
            start_response(f"{reply.status} {http.client.responses[reply.status]}", headers)
        except BaseException:
            self.ended.append(caller)
            raise
        return self._chunks(caller, chunks)

    def _chunks(self, caller: str, chunks: list[bytes]) -> Iterator[bytes]:
        try:
            for number, chunk in enumerate(chunks):
                if number:
                    eventually(self.rest.is_set)
                yield chunk
        finally:
            self.ended.append(caller)


# -- a site ---------------------------------------------------------------------------------------


class Site:
    """An origin behind a middleware behind a server."""

    def __init__(self, kind: str, origin: Origin, port: int, middleware: Any) -> None:
        self.kind = kind
        self.origin = origin
        self.port = port
        self.middleware = middleware

    @property
    def stats(self) -> HttpStats:
        return self.middleware.stats()

    def open(
        self,
        caller: str = "somebody",
        path: str = "/item",
        headers: Iterable[tuple[str, str]] = (),
        method: str = "GET",
        body: bytes = b"",
    ) -> Connection:
        return Connection(self.port, path, caller, headers, method, body)

    def ask(
        self, caller: str = "somebody", path: str = "/item", **request: Any
    ) -> "Future[Answer]":
        connection = self.open(caller, path, **request)
        return spawn(connection.answer)

    def ask_all(self, callers: Iterable[str], **request: Any) -> "dict[str, Future[Answer]]":
        return {caller: self.ask(caller, **request) for caller in callers}

    def lead(self, caller: str = "leader", **request: Any) -> "Future[Answer]":
        """Asks, and returns when the application runs for it."""
        before = len(self.origin.runs)
        future = self.ask(caller, **request)
        eventually(lambda: len(self.origin.runs) > before, "the leader's run")
        return future

    def follow(self, callers: Sequence[str], **request: Any) -> "dict[str, Future[Answer]]":
        """Asks, and returns when all of these wait for a leader."""
        before = self.waiting
        futures = self.ask_all(callers, **request)
        eventually(lambda: self.waiting == before + len(callers), "waiting followers")
        return futures

    @property
    def waiting(self) -> int:
        return self.middleware.flight.stats().waiting


def results(futures: "dict[str, Future[Answer]]") -> dict[str, Answer]:
    return {caller: future.result(PATIENCE) for caller, future in futures.items()}


def names(prefix: str, number: int) -> list[str]:
    return [f"{prefix}{n}" for n in range(number)]


@contextlib.contextmanager
def site(
    kind: str, origin: Origin | None = None, threads: int = 64, **options: Any
) -> Iterator[Site]:
    """Serves an origin with a middleware around it, everything collapsed."""
    origin = Origin() if origin is None else origin
    options.setdefault("routes", ["/"])
    options.setdefault("follower_timeout", PATIENCE)
    middleware: Any
    if kind == "asgi":
        middleware = asgi.CoalesceMiddleware(origin.asgi, **options)
        server = serve_asgi(middleware)
    else:
        middleware = wsgi.CoalesceMiddleware(origin.wsgi, **options)
        server = serve_wsgi(middleware, threads)
    with server as port:
        try:
            yield Site(kind, origin, port, middleware)
        finally:
            # Whatever a failed test has left waiting ends, so that the server can.
            origin.held = lambda _: False
            origin.gate.set()
            origin.rest.set()
