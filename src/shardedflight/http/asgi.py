"""Collapsing of requests to an ASGI application: Starlette, FastAPI, Django's ASGI handler.

Three tasks take part in an execution. The leader's own, in which the server called us, waits in the
flight. The flight's waits until it is known what the answer is worth, which can be long before it
is complete. The application runs in one of its own: it outlives the leader's request as long as
somebody wants its answer, and it goes on after the flight is over if only the leader wants it.
"""

import asyncio
import contextlib
import sys
from collections import deque
from collections.abc import (
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
)
from functools import partial
from typing import Any, TypeAlias

from ._rounds import Adapter, Caller, Rounds
from ._rules import (
    DECLARES,
    FORWARDED,
    JUDGED,
    Pass,
    Refusal,
    Request,
    Shared,
    Verdict,
    fold,
    forwarded_site,
    has,
)
from ._run import TaskRun

__all__ = ["CoalesceMiddleware"]

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Messages by which the server makes the body itself, or that follow it.
_EXTENSIONS = frozenset(
    {"http.response.pathsend", "http.response.zerocopysend", "http.response.trailers"}
)


# asyncio.Task can run a coroutine's first step at once since Python 3.12.
_EAGER: dict[str, Any] = {"eager_start": True} if sys.version_info >= (3, 12) else {}


class CoalesceMiddleware(Adapter[App]):
    """Equal GET and HEAD requests that arrive while one of them runs get its answer.

    An ASGI application around another one. Lifespan and WebSocket pass untouched. What may be
    collapsed and shared is in docs/http.md. Any number of event loops and threads may use it.

    Args:
        app: The application.
        routes: What may be collapsed: path prefixes, or a function of the scope.
        shareable: What may be shared without Cache-Control, in the same form.
        flight: Where the executions are in flight. By default one of its own.
        **options: See `Options`.

    Raises:
        TypeError: An option is of the wrong type.
        ValueError: An option is out of its range.
    """

    def _check(self, app: Any) -> None:
        if not callable(app):
            raise TypeError(f"app must be an ASGI application, not {app!r}")

    def _prepare(self) -> None:
        self._keyed = self._rules.keyed | {FORWARDED}
        self._watched = _by_raw_name(self._rules.suspect | self._keyed)
        #: What runs for nobody's request: a loop holds its tasks weakly. Sets change atomically.
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        request = self._examine(scope) if scope["type"] == "http" else None
        if request is None:
            await self._app(scope, receive, send)
            return
        if self._rounds.passes(request):
            await self._app(scope, receive, partial(_send_observed, self._rounds, request, send))
            return
        client = _Client(receive)
        if not await client.begin():
            self._rounds.count_passed(Pass.GONE if client.gone else Pass.BODY)
            await self._app(scope, client.receive, send)
            return
        run = _Run(self, Caller(self._rounds, request), scope, client, send)
        try:
            answer = await run.fly(self._flight)
            messages = () if answer is None else _messages(answer)
        except Exception as error:
            if run.failed:
                run.detach()
                raise
            self._rounds.count_error(error, passed=not run.begun)
            messages = ()
        except BaseException:
            run.detach()
            raise
        if run.begun:
            await run.finish()
        elif messages:
            for message in messages:
                await send(message)
        elif not run.gone:
            observed = partial(_send_observed, self._rounds, request, send)
            await self._app(scope, client.receive, observed)

    def _read(self, native: Scope) -> Request | Pass:
        method, path = native["method"], native["path"]
        rules = self._rules
        refused = rules.admit(method, path, native)
        if refused is not None:
            return refused
        headers = native["headers"]
        fields = _pick(headers, self._watched)
        identified = "extensions" in native and _identified(native)
        authorized = False
        if identified or not rules.suspect.isdisjoint(fields):
            suspect = {name: fields[name] for name in rules.suspect & fields.keys()}
            refused = rules.refuse(_text(suspect), identified=identified)
            if refused is not None:
                return refused
            authorized = "authorization" in fields
            fields = {name: fields[name] for name in self._keyed & fields.keys()}
        if FORWARDED in fields and FORWARDED not in rules.keyed:
            site = forwarded_site(str(fields.pop(FORWARDED), "latin-1"))
            if site:
                fields[FORWARDED] = site.encode("latin-1")
        key = (
            method,
            native.get("scheme", "http"),
            native.get("root_path", ""),
            path,  # what is around us may have changed only this
            native.get("raw_path"),
            native.get("query_string", b""),
            frozenset(fields.items()),  # their order makes no difference
            None if "host" in fields else str(native.get("server")),
            authorized,
        )
        read = partial(_all, [*headers])
        return Request(key, path, read, authorized, rules.shareable(path, native))

    def _keep(self, task: "asyncio.Task[None]") -> None:
        """Holds a task to its end."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _spawn(work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
    """A task for `work`, which begins at once where Python allows that."""
    loop = asyncio.get_running_loop()
    if _EAGER and loop.get_task_factory() is None:
        return asyncio.Task(work, loop=loop, **_EAGER)
    return loop.create_task(work)


def _identified(scope: Scope) -> bool:
    extensions: dict[str, Any] = scope.get("extensions") or {}
    tls: dict[str, Any] = extensions.get("tls") or {}
    return bool(tls.get("client_cert_chain") or tls.get("client_cert_name"))


# -- header fields --------------------------------------------------------------------------------


def _by_raw_name(names: Iterable[str]) -> dict[bytes, str]:
    return {name.encode("latin-1"): name for name in names}


_JUDGED = _by_raw_name(JUDGED)
_DECLARES = DECLARES.encode("latin-1")


def _pick(headers: Any, wanted: Mapping[bytes, str]) -> dict[str, bytes]:
    """The folded fields that are wanted. Most of a browser's fields decide nothing."""
    len(headers)  # an iterator has none, and is not used up
    found: dict[str, bytes] = {}
    get = wanted.get
    try:
        for raw, value in headers:
            name = get(raw.lower())
            if name is not None:
                if name in found:
                    break
                found[name] = value
        else:
            return found
    except TypeError:  # a name that is no bytes, but like them
        pass
    folded = _all(headers)
    return {name: folded[name].encode("latin-1") for name in wanted.values() if name in folded}


def _text(found: Mapping[str, bytes]) -> dict[str, str]:
    return {name: str(value, "latin-1") for name, value in found.items()}


def _all(headers: Any) -> Mapping[str, str]:
    return fold(_decoded(headers))


def _decoded(headers: Any) -> list[tuple[str, str]]:
    return [(str(name, "latin-1"), str(value, "latin-1")) for name, value in headers]


def _rereadable(message: Message) -> Message:
    """The message, with a list of its headers if they can be read only once: ASGI allows that."""
    headers = message.get("headers", ())
    if type(headers) is list or not isinstance(headers, Iterator):
        return message
    return {**message, "headers": [*headers]}


def _messages(shared: Shared) -> tuple[Message, ...]:
    """A follower's answer."""
    headers = [(n.lower().encode("latin-1"), v.encode("latin-1")) for n, v in shared.headers]
    return (
        {"type": "http.response.start", "status": shared.status, "headers": headers},
        {"type": "http.response.body", "body": shared.body},
    )


def _send_observed(
    rounds: Rounds, request: Request, send: Send, message: Message
) -> Awaitable[None]:
    # No coroutine of its own: every message of what passes through comes by.
    if message["type"] == "http.response.start":
        message = _rereadable(message)
        try:
            headers = message.get("headers", ())
            if request.shareable or has(headers, _DECLARES):
                judged = _pick(headers, _JUDGED)
                rounds.reconsider(request, message["status"], _text(judged))
        except Exception as error:  # noqa: BLE001 - the answer goes on as if nobody had looked
            rounds.count_error(error, passed=False)
    return send(message)


class _Client:
    """What one request's client sends. On its loop's thread."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        #: The request's first message, which the application has not had yet.
        self._first: Message | None = None
        self._watcher: asyncio.Task[None] | None = None
        self.gone = False

    async def begin(self) -> bool:
        """Takes the first message. False if the request has a body, or its client has left."""
        message = self._first = await self._receive()
        self.gone = message["type"] == "http.disconnect"
        return not self.gone and not message.get("body") and not message.get("more_body")

    async def receive(self) -> Message:
        """The application's `receive`."""
        message, self._first = self._first, None
        if message is not None:
            return message
        return {"type": "http.disconnect"} if self.gone else await self._receive()

    def watch(self, limit: asyncio.Timeout) -> None:
        """Has `limit` end the wait when the client leaves."""
        self._watcher = asyncio.get_running_loop().create_task(self._watch(limit))

    async def _watch(self, limit: asyncio.Timeout) -> None:
        with contextlib.suppress(Exception):  # the server's trouble, which a send will meet again
            # Once: a server says nothing before the client leaves, but what replays a request's
            # body around us may go on saying that it is empty.
            if (await self._receive())["type"] == "http.disconnect":
                self.gone = True
                limit.reschedule(asyncio.get_running_loop().time())

    def unwatch(self) -> None:
        """The application, or nobody, listens to the client from now on."""
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None


class _Outlet:
    """The way to the leader's client. On its loop's thread."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._posted: deque[Message] = deque()
        self._pump: asyncio.Task[None] | None = None
        #: Why nothing can be sent any more.
        self.error: Exception | None = None

    def send(self, message: Message) -> Awaitable[None]:
        """Sends after what was posted. As slow as the client is."""
        if self._pump is None and self.error is None:
            return self._send(message)
        return self._send_last(message)

    async def _send_last(self, message: Message) -> None:
        await self.flush()
        if self.error is not None:
            raise self.error
        await self._send(message)

    def post(self, message: Message) -> None:
        """Sends without making anybody wait for a slow client."""
        self._posted.append(message)
        if self._pump is None:
            self._pump = asyncio.get_running_loop().create_task(self._send_posted())

    async def _send_posted(self) -> None:
        try:
            while self._posted and self.error is None:
                await self._send(self._posted.popleft())
        except Exception as error:  # noqa: BLE001 - `send` raises it, where the application is
            self.error = error
        finally:
            self._pump = None

    async def flush(self) -> None:
        """Returns when all that was posted has been sent, or can not be."""
        while self._pump is not None:
            await asyncio.wait([self._pump])

    def close(self) -> None:
        """The leader's request is over: its client can not be sent anything any more."""
        self.error = self.error or ConnectionResetError("the client has left")
        if self._pump is not None:
            self._pump.cancel()


class _Run(TaskRun):
    """One request, and its run of the application. On its loop's thread."""

    def __init__(
        self,
        middleware: CoalesceMiddleware,
        caller: Caller,
        scope: Scope,
        client: _Client,
        send: Send,
    ) -> None:
        super().__init__(middleware._rounds, caller)
        self._app = middleware._app
        self._keep = middleware._keep
        self._scope = scope
        self._client = client
        self._outlet = _Outlet(send)
        self._task: asyncio.Task[None] | None = None
        #: It is known what the answer is worth, or that there is none.
        self._decided = False
        #: Where the flight waits for that.
        self._bell: asyncio.Future[None] | None = None
        #: Where the application waits to be told that its client has left.
        self._rung: asyncio.Future[None] | None = None
        #: The leader's request has ended before the application.
        self._detached = False

    async def lead(self) -> Verdict:
        task = self._task = _spawn(self._run_app())
        if self._detached:
            self._keep(task)
        if not self._decided:
            self._bell = asyncio.get_running_loop().create_future()
            try:
                await self._bell
            except asyncio.CancelledError:  # nobody is left
                self.rounds.abandon(self.round)
                task.cancel()
                raise
        verdict = self.round.verdict
        if verdict is None:
            await task  # raises what everybody gets, or what makes this leader a lost one
            raise AssertionError("an application that ends in silence has a verdict")
        if self._detached and isinstance(verdict, Refusal):
            task.cancel()
        return verdict

    def _decide(self) -> None:
        self._decided = True
        if self._bell is not None and not self._bell.done():
            self._bell.set_result(None)

    async def _run_app(self) -> None:
        try:
            await self._app(self._scope, self._receive, self._send)
        except Exception:
            if not self._decided:
                self._finish_failed()
            raise
        else:
            if not self._decided:
                self._finish(self.recording.refuse(Refusal.BROKEN))
        finally:
            if not self._decided:
                self._decide()

    async def _receive(self) -> Message:
        message = await self._client.receive()
        if message["type"] == "http.disconnect":
            self._client.gone = True
            await self._unwanted()
        return message

    async def _unwanted(self) -> None:
        """Returns when the leader's client is the only one that the execution is for."""
        loop = asyncio.get_running_loop()
        while not self._decided:
            if self._rung is None or self._rung.done():
                self._rung = loop.create_future()
            rung = self._rung  # one for all who wait here: a round has one bell
            if self.rounds.close(self.round, partial(_ring, loop, rung)):
                _settle(rung)
                return
            await asyncio.wait([rung])

    def _send(self, message: Message) -> Awaitable[None]:
        # No coroutine of its own where the server's will do.
        if not self._decided:
            if message["type"] == "http.response.start":
                message = _rereadable(message)
            self._record(message)
        if self._detached:
            return _nothing()
        return self._outlet.send(message) if self._decided else self._send_undecided(message)

    async def _send_undecided(self, message: Message) -> None:
        """The answer may be shared, and followers wait for the rest: no client slows it down."""
        outlet = self._outlet
        outlet.post(message)
        if outlet.error is not None and self.rounds.close(self.round):
            raise outlet.error

    def _record(self, message: Message) -> None:
        verdict: Verdict | None = None
        kind = message["type"]
        try:
            if kind == "http.response.start":
                headers = message.get("headers", ())
                status = message["status"]
                judged = _text(_pick(headers, _JUDGED))
                read = partial(_decoded, [*headers])
                verdict = self.recording.head(status, status, judged, read)
                if message.get("trailers"):
                    verdict = self.recording.refuse(Refusal.EXTENSION)
            elif kind == "http.response.body":
                verdict = self.recording.body(message.get("body", b""))
                if verdict is None and not message.get("more_body"):
                    verdict = self.recording.end()
            elif kind in _EXTENSIONS:
                verdict = self.recording.refuse(Refusal.EXTENSION)
        except Exception as error:  # noqa: BLE001 - the server will say what is wrong with it
            self.rounds.count_error(error, passed=False)
            verdict = self.recording.refuse(Refusal.BROKEN)
        if verdict is not None:
            self._finish(verdict)
            self._decide()

    def detach(self) -> None:
        """The leader's request ends here. The application goes on if others want its answer."""
        self._detached = True
        self._outlet.close()
        if self._task is not None and not self._task.done():
            if isinstance(self.round.verdict, Refusal):
                self._task.cancel()
            self._keep(self._task)

    async def finish(self) -> None:
        """Lets the leader's own answer come to its end."""
        assert self._task is not None
        try:
            await self._task
            await self._outlet.flush()
        finally:
            self._outlet.close()

    @property
    def gone(self) -> bool:  # type: ignore[override]
        """The client has left."""
        return self._client.gone

    def watch(self, limit: asyncio.Timeout) -> None:
        if self.round.led or self.round.followers > 1:
            self._client.watch(limit)

    def unwatch(self) -> None:
        self._client.unwatch()


def _ring(loop: asyncio.AbstractEventLoop, rung: "asyncio.Future[None]") -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
        loop.call_soon_threadsafe(_settle, rung)


def _settle(rung: "asyncio.Future[None]") -> None:
    if not rung.done():
        rung.set_result(None)


async def _nothing() -> None:
    pass
