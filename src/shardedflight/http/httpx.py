"""Collapsing of outgoing requests: transports for `httpx.Client` and `httpx.AsyncClient`.

Whoever uses one transport is taken for one client. So all header fields are in the key, credentials
and cookies among them, and by default all that is asked for may be shared without Cache-Control.
The other rules are those of the middlewares.

An answer that may be shared is read to its end, or to the body limit, before the leader gets it: a
transport's caller asks for the body only after the transport has returned. Needs the extra `httpx`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeVar, Unpack

import httpx

from shardedflight import ShardedFlight

from ._rounds import Adapter, Caller, Rounds
from ._rules import Options, Pass, Request, Shared, Verdict, Where, fold
from ._run import Run, TaskRun, ThreadRun

__all__ = ["AsyncCoalesceTransport", "CoalesceTransport"]

TransportT = TypeVar("TransportT")

#: What a request may bring besides its fields that makes a difference to how it is answered.
_EXTENSIONS = ("timeout", "sni_hostname", "target")


class _Transport(Adapter[TransportT]):
    """What the two transports share: everything may be collapsed, as one client's."""

    _one_client = True

    def __init__(
        self,
        transport: TransportT | None = None,
        *,
        routes: Where = ("/",),
        shareable: Where = ("/",),
        flight: ShardedFlight | None = None,
        **options: Unpack[Options],
    ) -> None:
        app = self._make() if transport is None else transport
        super().__init__(app, routes=routes, shareable=shareable, flight=flight, **options)

    def _make(self) -> TransportT:
        raise NotImplementedError

    def _read(self, native: httpx.Request) -> Request | Pass:
        rules = self._rules
        url = native.url
        refused = rules.admit(native.method, url.path, native)
        if refused is not None:
            return refused
        extensions = tuple([repr(native.extensions.get(name)) for name in _EXTENSIONS])
        fields = fold(_decoded(native.headers))
        refused = rules.refuse(fields)
        if refused is not None:
            return refused
        key = (
            native.method,
            url.scheme,
            url.raw_host,
            url.port,
            url.raw_path,
            extensions,
            frozenset(fields.items()),
        )
        shareable = rules.shareable(url.path, native)
        return Request(key, url.path, lambda: fields, authorized=False, shareable=shareable)


class CoalesceTransport(_Transport[httpx.BaseTransport], httpx.BaseTransport):
    """Equal GET and HEAD requests of one client at the same time go out once.

    For `httpx.Client(transport=CoalesceTransport())`. Any number of threads may use it.

    Args:
        transport: What sends. By default an `httpx.HTTPTransport()`.
        routes: What may be collapsed: prefixes of the path, or a function of the `httpx.Request`.
        shareable: What may be shared without Cache-Control, in the same form.
        flight: Where the executions are in flight. By default one of its own.
        **options: See `Options`. `authorization` and `private_headers` have nothing to decide.

    Raises:
        TypeError: An option is of the wrong type.
        ValueError: An option is out of its range.
    """

    def _check(self, app: Any) -> None:
        if not isinstance(app, httpx.BaseTransport):
            raise TypeError(f"transport must be an httpx.BaseTransport, not {app!r}")

    def _make(self) -> httpx.BaseTransport:
        return httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Sends one request, or waits for an equal one."""
        examined = self._examine(request)
        if examined is None:
            return self._app.handle_request(request)
        run = _ThreadRun(self, examined, request)
        try:
            answer = run.fly(self._flight)
        except Exception as error:
            if run.failed:
                raise
            self._rounds.count_error(error, passed=not run.answered)
            answer = None
        if run.answered:
            return run.response()
        if answer is not None:
            return _copy(answer)
        response = self._app.handle_request(request)
        _reconsider(self._rounds, examined, response)
        return response

    def close(self) -> None:
        """Closes the transport that sends."""
        self._app.close()


class AsyncCoalesceTransport(_Transport[httpx.AsyncBaseTransport], httpx.AsyncBaseTransport):
    """Equal GET and HEAD requests of one client at the same time go out once.

    For `httpx.AsyncClient(transport=AsyncCoalesceTransport())`, on asyncio.

    Args:
        transport: What sends. By default an `httpx.AsyncHTTPTransport()`.
        routes: What may be collapsed: prefixes of the path, or a function of the `httpx.Request`.
        shareable: What may be shared without Cache-Control, in the same form.
        flight: Where the executions are in flight. By default one of its own.
        **options: See `Options`. `authorization` and `private_headers` have nothing to decide.

    Raises:
        TypeError: An option is of the wrong type.
        ValueError: An option is out of its range.
    """

    def _check(self, app: Any) -> None:
        if not isinstance(app, httpx.AsyncBaseTransport):
            raise TypeError(f"transport must be an httpx.AsyncBaseTransport, not {app!r}")

    def _make(self) -> httpx.AsyncBaseTransport:
        return httpx.AsyncHTTPTransport()

    def _prepare(self) -> None:
        #: Closing of answers that nobody takes. A loop holds its tasks weakly.
        self._tasks: set[asyncio.Task[None]] = set()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Sends one request, or waits for an equal one."""
        examined = self._examine(request)
        if examined is None:
            return await self._app.handle_async_request(request)
        run = _TaskRun(self, examined, request)
        try:
            answer = await run.fly(self._flight)
        except Exception as error:
            if run.failed:
                raise
            self._rounds.count_error(error, passed=not run.answered)
            answer = None
        except BaseException:
            run.detach()
            raise
        if run.answered:
            return await run.response()
        if answer is not None:
            return _copy(answer)
        response = await self._app.handle_async_request(request)
        _reconsider(self._rounds, examined, response)
        return response

    async def aclose(self) -> None:
        """Closes the transport that sends."""
        await self._app.aclose()

    def _close_later(self, response: httpx.Response) -> None:
        task = asyncio.get_running_loop().create_task(response.aclose())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _decoded(headers: httpx.Headers) -> list[tuple[str, str]]:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers.raw]


def _reconsider(rounds: Rounds, request: Request, response: httpx.Response) -> None:
    try:
        rounds.reconsider(request, response.status_code, fold(_decoded(response.headers)))
    except Exception as error:  # noqa: BLE001 - the answer goes on as if nobody had looked
        rounds.count_error(error, passed=False)


def _head(run: Run, response: httpx.Response) -> Verdict | None:
    extensions = {
        name: response.extensions[name]
        for name in ("http_version", "reason_phrase")
        if name in response.extensions
    }
    status = (response.status_code, extensions)
    headers = _decoded(response.headers)
    return run.recording.head(status, response.status_code, fold(headers), lambda: headers)


def _copy(shared: Shared) -> httpx.Response:
    code, extensions = shared.status
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in shared.headers]
    return httpx.Response(
        code, headers=headers, stream=httpx.ByteStream(shared.body), extensions=dict(extensions)
    )


def _replaced(response: httpx.Response, stream: Any) -> httpx.Response:
    return httpx.Response(
        response.status_code,
        headers=response.headers,
        stream=stream,
        extensions=response.extensions,
    )


class _ThreadRun(ThreadRun):
    """One request, and sending it."""

    def __init__(
        self, transport: CoalesceTransport, examined: Request, request: httpx.Request
    ) -> None:
        super().__init__(transport._rounds, Caller(transport._rounds, examined))
        self._send = transport._app.handle_request
        self._request = request
        self._response: httpx.Response | None = None
        self._taken: list[bytes] = []
        self._iterator: Iterator[bytes] | None = None

    @property
    def answered(self) -> bool:
        """There is an answer to its own request, or the error that it has come to."""
        return self._response is not None or self.error is not None

    def record(self) -> Verdict:
        response = self._response = self._send(self._request)
        verdict = _head(self, response)
        if verdict is not None:
            return verdict
        assert isinstance(response.stream, httpx.SyncByteStream)
        try:
            self._iterator = iter(response.stream)
            for chunk in self._iterator:
                self._taken.append(chunk)
                verdict = self.recording.body(chunk)
                if verdict is not None:
                    return verdict
        except BaseException as error:
            if not isinstance(error, Exception):  # nobody will ask for the response
                response.close()
            raise
        return self.recording.end()

    def response(self) -> httpx.Response:
        """The leader's own answer."""
        if self.error is not None and self._response is not None:
            self._response.close()
        self.raise_error()
        response = self._response
        assert response is not None
        if self._iterator is None:
            return response
        return _replaced(response, _Rest(self._taken, self._iterator, response.close))


class _Rest(httpx.SyncByteStream):
    """What was read of a body, and what is still to be read."""

    def __init__(
        self, taken: list[bytes], iterator: Iterator[bytes], close: Callable[[], None]
    ) -> None:
        self._taken = taken
        self._iterator = iterator
        self._close = close

    def __iter__(self) -> Iterator[bytes]:
        yield from self._taken
        yield from self._iterator

    def close(self) -> None:
        self._close()


class _TaskRun(TaskRun):
    """One request, and sending it. On its loop's thread."""

    def __init__(
        self, transport: AsyncCoalesceTransport, examined: Request, request: httpx.Request
    ) -> None:
        super().__init__(transport._rounds, Caller(transport._rounds, examined))
        self._send = transport._app.handle_async_request
        self._close_later = transport._close_later
        self._request = request
        self._response: httpx.Response | None = None
        self._taken: list[bytes] = []
        self._iterator: AsyncIterator[bytes] | None = None
        #: The leader's caller has left: nobody takes its answer.
        self._detached = False

    @property
    def answered(self) -> bool:
        """There is an answer to its own request, or the error that it has come to."""
        return self._response is not None or self.error is not None

    async def lead(self) -> Verdict:
        try:
            verdict = await self._record()
        except Exception as error:
            self.error = error
            ended = self._finish_failed()
            if ended is None:
                self.error = None  # the flight takes it to everybody
                raise
            verdict = ended
        except BaseException:
            self._drop()
            raise
        else:
            self._finish(verdict)
        if self._detached:
            self._drop()
        return verdict

    async def _record(self) -> Verdict:
        response = self._response = await self._send(self._request)
        verdict = _head(self, response)
        if verdict is not None:
            return verdict
        assert isinstance(response.stream, httpx.AsyncByteStream)
        self._iterator = aiter(response.stream)
        async for chunk in self._iterator:
            self._taken.append(chunk)
            verdict = self.recording.body(chunk)
            if verdict is not None:
                return verdict
        return self.recording.end()

    def detach(self) -> None:
        """The leader's caller has left. What it would have got is closed, now or at the end."""
        self._detached = True
        if self.begun and self.round.verdict is not None:
            self._drop()

    def _drop(self) -> None:
        response, self._response = self._response, None
        if response is not None:
            self._close_later(response)

    async def response(self) -> httpx.Response:
        """The leader's own answer."""
        if self.error is not None and self._response is not None:
            await self._response.aclose()
        self.raise_error()
        response = self._response
        assert response is not None
        if self._iterator is None:
            return response
        return _replaced(response, _AsyncRest(self._taken, self._iterator, response.aclose))


class _AsyncRest(httpx.AsyncByteStream):
    """What was read of a body, and what is still to be read."""

    def __init__(
        self, taken: list[bytes], iterator: AsyncIterator[bytes], close: Callable[[], Any]
    ) -> None:
        self._taken = taken
        self._iterator = iterator
        self._close = close

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self._taken:
            yield chunk
        async for chunk in self._iterator:
            yield chunk

    async def aclose(self) -> None:
        await self._close()
