"""Collapsing of requests to a WSGI application: Flask, Django.

The leader's thread runs the application inside the flight, until it is known what the answer is
worth. What is left of an answer after that goes to the server as it came. While an answer that may
be shared is not complete, the leader's client gets it by the `write` function of PEP 3333: a server
asks for the parts of a body only after we have returned to it, which we do not before the followers
have their answer.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, TypeAlias

from ._rounds import Adapter, Caller, Rounds
from ._rules import (
    DECLARES,
    FORWARDED,
    Pass,
    Refusal,
    Request,
    Verdict,
    fold,
    forwarded_site,
    has,
)
from ._run import ThreadRun

__all__ = ["CoalesceMiddleware"]

Environ: TypeAlias = dict[str, Any]
Write: TypeAlias = Callable[[bytes], object]
ExcInfo: TypeAlias = (
    tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None]
)
#: Called with status, header fields and, sometimes, an error: a protocol with optional arguments.
StartResponse: TypeAlias = Callable[..., Write]
App: TypeAlias = Callable[[Environ, StartResponse], Iterable[bytes]]

#: What servers say of a client that they have authenticated.
_VERIFIED = "SSL_CLIENT_VERIFY"
_IDENTITIES = (
    "REMOTE_USER",
    "SSL_CLIENT_CERT",
    "SSL_CLIENT_S_DN",
    "SSL_CLIENT_M_SERIAL",
    "HTTPS_CC",  # uWSGI's
    "HTTPS_DN",
)


class CoalesceMiddleware(Adapter[App]):
    """Equal GET and HEAD requests that arrive while one of them runs get its answer.

    A WSGI application around another one. What may be collapsed and shared is in docs/http.md. Any
    number of threads may use it; each follower occupies one of the server's.

    Args:
        app: The application.
        routes: What may be collapsed: path prefixes, or a function of the environ.
        shareable: What may be shared without Cache-Control, in the same form.
        flight: Where the executions are in flight. By default one of its own.
        **options: See `Options`.

    Raises:
        TypeError: An option is of the wrong type.
        ValueError: An option is out of its range.
    """

    def _check(self, app: Any) -> None:
        if not callable(app):
            raise TypeError(f"app must be a WSGI application, not {app!r}")

    def _prepare(self) -> None:
        rules = self._rules
        self._suspect = {_key_of(name): name for name in rules.suspect}
        #: What makes a request worth a closer look. Most have none of it.
        self._watched = frozenset([*self._suspect, *_IDENTITIES, _VERIFIED])
        self._keyed = tuple(map(_key_of, rules.keyed))

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Answers one request."""
        request = self._examine(environ)
        if request is None:
            return self._app(environ, start_response)
        observed = partial(_start_observed, self._rounds, request, start_response)
        if self._rounds.passes(request):
            return self._app(environ, observed)
        run = _Run(self, Caller(self._rounds, request), environ, start_response)
        try:
            answer = run.fly(self._flight)
        except Exception as error:
            if run.failed:
                run.close()
                raise
            self._rounds.count_error(error, passed=not run.begun)
            answer = None
        except BaseException:
            run.close()
            raise
        if run.begun:
            return run.rest()
        if answer is None:
            return self._app(environ, observed)
        start_response(answer.status, list(answer.headers))
        return [answer.body] if answer.body else []

    def _read(self, native: Environ) -> Request | Pass:
        method = native["REQUEST_METHOD"]
        script, info = native.get("SCRIPT_NAME", ""), native.get("PATH_INFO", "")
        path = f"{script}{info}" or "/"
        rules = self._rules
        refused = rules.admit(method, path, native)
        if refused is not None:
            return refused
        # The path as it came, where the server tells: gunicorn, uWSGI and mod_wsgi do.
        raw = native.get("RAW_URI") or native.get("REQUEST_URI")
        authorized = False
        if not self._watched.isdisjoint(native):
            suspect = {
                self._suspect[key]: native[key]
                for key in self._suspect.keys() & native.keys()
                if native[key] or key not in _BARE
            }
            refused = rules.refuse(suspect, identified=_identified(native))
            if refused is not None:
                return refused
            authorized = "authorization" in suspect
        scheme = native.get("wsgi.url_scheme", "http")
        query = native.get("QUERY_STRING", "")
        fields = map(native.get, self._keyed)
        forwarded = native.get(_FORWARDED)
        site = forwarded_site(forwarded) if forwarded else ""
        server = None
        if not native.get("HTTP_HOST"):
            server = (native.get("SERVER_NAME"), native.get("SERVER_PORT"))
        key = (method, scheme, script, info, query, raw, *fields, site, server, authorized)
        read = partial(_all, native.copy())
        return Request(key, path, read, authorized, rules.shareable(path, native))


def _identified(environ: Environ) -> bool:
    if environ.get(_VERIFIED, "NONE") != "NONE":
        return True
    return any(map(environ.get, _IDENTITIES))


#: The header fields that are not called HTTP_ in the environ, where absent ones may be empty.
_BARE = ("CONTENT_LENGTH", "CONTENT_TYPE")


def _key_of(name: str) -> str:
    """Where the environ has a header field."""
    key = name.upper().replace("-", "_")
    return key if key in _BARE else f"HTTP_{key}"


_FORWARDED = _key_of(FORWARDED)


def _all(environ: Environ) -> dict[str, str]:
    """All header fields, folded: the server has done that."""
    found = {key: environ[key] for key in _BARE if environ.get(key)}
    found |= {key[5:]: value for key, value in environ.items() if key.startswith("HTTP_")}
    return {key.replace("_", "-").lower(): value for key, value in found.items()}


def _code(status: str) -> int:
    return int(status.partition(" ")[0])


def _start_observed(
    rounds: Rounds,
    request: Request,
    start_response: StartResponse,
    status: str,
    headers: Any,
    *exc_info: Any,
) -> Write:
    try:
        if request.shareable or has(headers, DECLARES):
            rounds.reconsider(request, _code(status), fold(headers))
    except Exception as error:  # noqa: BLE001 - the answer goes on as if nobody had looked
        rounds.count_error(error, passed=False)
    return start_response(status, headers, *exc_info)


class _Run(ThreadRun):
    """One request, and its run of the application. On its own thread."""

    def __init__(
        self,
        middleware: CoalesceMiddleware,
        caller: Caller,
        environ: Environ,
        start_response: StartResponse,
    ) -> None:
        super().__init__(middleware._rounds, caller)
        self._app = middleware._app
        self._environ = environ
        self._start_response = start_response
        #: What the application calls `start_response` with, until the server is.
        self._head: tuple[Any, ...] | None = None
        #: The server's `write`, once it has been given the head.
        self._write: Write | None = None
        self._iterable: Iterable[bytes] = ()
        self._iterator: Iterator[bytes] | None = None
        #: What was recorded and has not been sent.
        self._unsent: list[bytes] = []

    def record(self) -> Verdict:
        self._iterable = self._app(self._environ, self._start)
        if self.recording.verdict is not None:
            return self.recording.verdict
        if isinstance(self._iterable, (list, tuple)):
            for chunk in self._iterable:
                self.recording.body(chunk)
            return self.recording.end()
        self._iterator = iter(self._iterable)
        for chunk in self._iterator:
            self._unsent.append(chunk)
            verdict = self.recording.body(chunk)
            if verdict is not None:
                return verdict
            if chunk and self.recording.begun:
                # The next part may be long in coming: PEP 3333 forbids to hold this one back.
                self._unsent.clear()
                self._forward(chunk)
        return self.recording.end()

    def _start(self, status: str, headers: Any, exc_info: ExcInfo | None = None) -> Write:
        """The application's `start_response`."""
        if self._write is not None:  # only an error may come now, and the server raises it
            self._start_response(status, headers, exc_info)
        self._head = (status, list(headers), exc_info)
        try:
            given = self._head[1]
            self.recording.head(status, _code(status), fold(given), lambda: given)
        except Exception as error:  # noqa: BLE001 - the server will say what is wrong with it
            self.rounds.count_error(error, passed=False)
            self.recording.refuse(Refusal.BROKEN)
        return self._write_recorded

    def _write_recorded(self, chunk: bytes) -> None:
        """The application's `write`, which hardly one uses."""
        if self.recording.verdict is None:
            self.recording.body(chunk)
        self._forward(chunk)

    def _forward(self, chunk: bytes) -> None:
        """Sends to the leader's client. If that has left, the followers are still there."""
        if self.error is None:
            try:
                self._open()(chunk)
            except Exception as error:  # noqa: BLE001 - `rest` raises it
                self.error = error
        if self.error is not None and (
            self.recording.verdict is not None or self.rounds.close(self.round)
        ):
            raise self.error

    def _open(self) -> Write:
        """Gives the server the head, once."""
        if self._write is None:
            assert self._head is not None
            status, headers, exc_info = self._head
            extra = () if exc_info is None else (exc_info,)
            self._head = None
            self._write = self._start_response(status, headers, *extra)
        return self._write

    def rest(self) -> Iterable[bytes]:
        """What the server is still to send of the leader's own answer.

        Raises:
            Exception: The application's, or that of sending to the client.
        """
        if self.error is not None:
            self.close()
            self.raise_error()
        if self._write is None and self._head is not None:
            self._open()
        if self._iterator is None:
            return self._iterable
        return _Rest(self._unsent, self._iterator, self._iterable)

    def close(self) -> None:
        """The server will not be given the application's iterable, and so can not close it."""
        _close(self._iterable)


class _Rest:
    """What was taken from an application's iterable, and what is still in it."""

    def __init__(
        self, taken: list[bytes], iterator: Iterator[bytes], iterable: Iterable[bytes]
    ) -> None:
        self._taken = iter(taken)
        self._iterator = iterator
        self._iterable = iterable

    def __iter__(self) -> Iterator[bytes]:
        yield from self._taken
        yield from self._iterator

    def close(self) -> None:
        """The server is done: PEP 3333 has it call the application's `close`."""
        _close(self._iterable)


def _close(iterable: Any) -> None:
    close = getattr(iterable, "close", None)
    if close is not None:
        close()
