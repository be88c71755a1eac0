"""HTTP: an answer that is somebody's own reaches nobody else, whatever heads are sent.

Two clients ask while the first one's request runs. Each answer bears the name of the client that
the application ran for; so who has got whose answer is seen, and is compared with what `_Oracle`
allows: the table of rules, written down a second time, as plainly as it can be.
"""

import asyncio
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from proof.fuzz.target import PATIENCE, Target, spawn
from shardedflight.http import asgi, wsgi

__all__ = ["TARGETS"]

Headers = list[tuple[str, str]]


@dataclass(frozen=True)
class Ask:
    """What a client sends."""

    method: str
    path: str
    query: str
    headers: Headers
    body: bool = False


@dataclass(frozen=True)
class Say:
    """What the application answers."""

    status: int
    headers: Headers
    size: int
    fails: bool = False


@dataclass(frozen=True)
class Case:
    """Two requests, the answer to both, and the options."""

    asks: tuple[Ask, Ask]
    says: Say
    options: dict[str, Any]
    declared: bool


# -- the rules, a second time ---------------------------------------------------------------------


def _joined(headers: Headers, name: str) -> str | None:
    """The value of a field; RFC 9110 section 5.3 joins those of one name."""
    found = [value for field, value in headers if field.lower() == name]
    return ", ".join(found) if found else None


_TOKEN = set("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


def _control(value: str | None) -> dict[str, str] | None:
    """A Cache-Control, character by character; None if it is malformed."""
    found: dict[str, str] = {}
    rest = value or ""
    while rest:
        rest = rest.lstrip(" \t")
        name, rest = _take_token(rest)
        argument = ""
        if name and rest.startswith("="):
            if rest.startswith('="'):
                quoted = _take_quoted(rest[2:])
                if quoted is None:
                    return None
                argument, rest = quoted
            else:
                argument, rest = _take_token(rest[1:])
                if not argument:
                    return None
        rest = rest.lstrip(" \t")
        if rest and not rest.startswith(","):
            return None
        rest = rest[1:]
        if name and name.lower() not in found:
            found[name.lower()] = argument
    return found


def _take_token(text: str) -> tuple[str, str]:
    end = 0
    while end < len(text) and text[end] in _TOKEN:
        end += 1
    return text[:end], text[end:]


def _take_quoted(text: str) -> tuple[str, str] | None:
    end = 0
    while end < len(text) and text[end] != '"':
        end += 2 if text[end] == "\\" else 1
    return (text[:end], text[end + 1 :]) if end < len(text) else None


_IN_KEY = [
    *("accept", "accept-encoding", "accept-language", "host", "origin"),
    *("if-match", "if-modified-since", "if-none-match", "if-range", "if-unmodified-since"),
    *("x-forwarded-host", "x-forwarded-proto", "x-original-url", "x-http-method-override"),
]
_WHO = [
    *("cookie", "proxy-authorization", "x-api-key", "x-auth-token", "x-client-cert"),
    *("x-forwarded-user", "remote-user"),
]
_STATUSES = [200, 203, 204, 300, 301, 308, 404, 405, 410, 414, 501]
_SERVER_ERRORS = [500, 502, 503, 504]


class _Oracle:
    """What may, and what has to be shared."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._options = case.options

    def may_be_shared(self) -> bool:
        """Whether the second client may have the first one's answer."""
        case = self._case
        return (
            all(map(self._anonymous, case.asks))
            and self._is_one_request()
            and self._is_for_all(any(_joined(ask.headers, "authorization") for ask in case.asks))
            and (case.says.fails or self._varies_alike())  # who fails has said nothing
        )

    def _anonymous(self, ask: Ask) -> bool:
        names = {name.lower() for name, _ in ask.headers}
        control = _control(_joined(ask.headers, "cache-control"))
        return (
            ask.method in ("GET", "HEAD")
            and not ask.body
            and _joined(ask.headers, "content-length") in (None, "0")
            and not names & {"transfer-encoding", "range", "upgrade", *_WHO}
            and ("authorization" not in names or self._options["authorization"])
            and control is not None
            and "no-store" not in control
        )

    def _is_one_request(self) -> bool:
        one, other = self._case.asks
        return (one.method, one.path, one.query) == (other.method, other.path, other.query) and all(
            _joined(one.headers, name) == _joined(other.headers, name) for name in _IN_KEY
        )

    def _is_for_all(self, authorized: bool) -> bool:
        says = self._case.says
        control = _control(_joined(says.headers, "cache-control"))
        statuses = _STATUSES + (_SERVER_ERRORS if self._options["server_errors"] else [])
        kind = (_joined(says.headers, "content-type") or "").split(";")[0].strip().lower()
        if says.fails:
            return self._case.declared and self._options["server_errors"] and not authorized
        if control is None or _joined(says.headers, "set-cookie") is not None:
            return False
        if set(control) & {"private", "no-store", "no-cache"} or says.status not in statuses:
            return False
        if authorized and not set(control) & {"public", "s-maxage", "must-revalidate"}:
            return False
        lifetime = control.get("s-maxage", control.get("max-age"))
        if lifetime is not None and not (_is_number(lifetime) and lifetime.strip("0")):
            return False
        permitted = set(control) & {"public", "s-maxage", "must-revalidate", "max-age"}
        return (
            bool(permitted or self._case.declared)
            and kind not in ("text/event-stream", "multipart/x-mixed-replace")
            and says.size <= self._options["body_limit"]
            and self._length_is_right()
        )

    def _length_is_right(self) -> bool:
        says, ask = self._case.says, self._case.asks[0]
        length = _joined(says.headers, "content-length")
        if length is None or not _is_number(length) or ask.method == "HEAD":
            return True
        return length.lstrip("0") == (str(says.size) if says.size else "")

    def _varies_alike(self) -> bool:
        one, other = self._case.asks
        vary = _joined(self._case.says.headers, "vary") or ""
        fields = [field.strip().lower() for field in vary.split(",") if field.strip()]
        return "*" not in fields and all(
            _joined(one.headers, field) == _joined(other.headers, field) for field in fields
        )

    def has_to_be_shared(self) -> bool:
        """Whether the second client has to get the first one's answer."""
        one, other = self._case.asks
        authorized = [_joined(ask.headers, "authorization") is not None for ask in (one, other)]
        return self.may_be_shared() and authorized[0] == authorized[1]


def _is_number(text: str) -> bool:
    return bool(text) and all(character in "0123456789" for character in text)


# -- cases ----------------------------------------------------------------------------------------

_TEXT = st.text(st.characters(codec="latin-1"), max_size=6)
_VALUES = _TEXT | st.sampled_from(
    ["", "0", "a", "a, b", "*", "gzip", '"x"', "bytes=0-1", "00", "1"]
)
_DIRECTIVES = st.sampled_from(
    [
        *(
            "public",
            "private",
            "no-store",
            "no-cache",
            "must-revalidate",
            "max-age=60",
            "max-age=0",
        ),
        *(
            "s-maxage=1",
            "s-maxage=0",
            'private="x"',
            "PUBLIC",
            "Max-Age=5",
            "max-age=-1",
            "max-age",
        ),
        *('ext="a, private"', 'ext="a\\", no-store"', 'ext="', "a b", "", " ", "\t", "=", "é"),
        *("max-age=" + "9" * 5000, "s-maxage=" + "0" * 5000, 'max-age="3"', "public;private"),
    ]
)
_CONTROL = st.lists(_DIRECTIVES, max_size=4).map(", ".join) | st.lists(_DIRECTIVES).map(",".join)


def _spelt(names: Iterable[str]) -> Any:
    return st.sampled_from([spelt for name in names for spelt in (name, name.title())])


_OTHER = ["x-other", "accept-charset", "user-agent", "x", "x-region"]
_ASK_FIELD = (
    st.tuples(_spelt([*_IN_KEY, *_OTHER]), _VALUES)
    | st.tuples(_spelt(["cache-control"]), _CONTROL)
    | st.tuples(
        _spelt([*_WHO, "authorization", "range", "upgrade", "content-length", "transfer-encoding"]),
        _VALUES,
    )
    | st.tuples(_spelt(["authorization"]), st.just("Basic eA=="))
)
_NEGOTIATED = st.sampled_from([*["x-other"] * 8, *["origin"] * 3, *_IN_KEY])
_VARY = st.just("X-Other") | st.lists(
    st.sampled_from([*_IN_KEY, *_OTHER, "*", "", " ", "Cookie", "X-Other", "X-Region"]), max_size=3
).map(",".join)
_SAY_FIELD = (
    st.tuples(_spelt(["cache-control"]), _CONTROL)
    | st.tuples(_spelt(["cache-control"]), st.sampled_from(["public", "max-age=60"]))
    | st.tuples(_spelt(["vary"]), _VARY)
    | st.just(("Vary", "X-Other"))
    | st.tuples(_spelt(["set-cookie", "x-own", "connection", "etag", "trailer"]), _VALUES)
    | st.tuples(
        _spelt(["content-length"]), st.sampled_from(["0", "1", "64", "064", "9" * 5000, "a", ""])
    )
    | st.tuples(
        _spelt(["content-type"]),
        st.sampled_from(["text/html", "text/event-stream", "Multipart/X-Mixed-Replace; b=1", ";"]),
    )
)
_ODD_ASK = st.builds(
    Ask,
    st.sampled_from(["GET", "GET", "GET", "HEAD", "POST", "get", "OPTIONS", ""]),
    st.sampled_from(["/", "/a", "/a", "/%61", "/\xff", "//a", "/a/../b"]),
    st.sampled_from(["", "", "q=1", "q=\xff"]),
    st.lists(_ASK_FIELD, max_size=4),
    st.sampled_from([False, False, False, True]),
)
_PLAIN_ASK = st.builds(
    Ask, st.just("GET"), st.just("/a"), st.just(""), st.lists(_ASK_FIELD, max_size=1)
)
_ODD_SAY = st.builds(
    Say,
    st.sampled_from([200, 200, 200, 404, 500, 503, 206, 401, 302, 0, 999]),
    st.lists(_SAY_FIELD, max_size=4),
    st.sampled_from([1, 1, 1, 64, 65]),
    st.sampled_from([False] * 7 + [True]),
)
#: For everybody, but for one or two fields.
_PLAIN_SAY = st.builds(
    Say,
    st.just(200),
    st.lists(_SAY_FIELD, max_size=2).map(lambda fields: [("Cache-Control", "public"), *fields]),
    st.just(1),
)


@st.composite
def _cases(draw: Any) -> Case:
    # Most cases are near to what is shared: far from it nothing is to be seen.
    first = draw(st.sampled_from([_PLAIN_ASK, _PLAIN_ASK, _ODD_ASK]).flatmap(lambda asks: asks))
    how = draw(
        st.sampled_from(
            ["same", "same", "more", "differs", "differs", "fewer", "shuffled", "another"]
        )
    )
    second = first
    if how == "another":
        second = draw(_ODD_ASK)
    elif how == "differs":
        name = draw(_NEGOTIATED)
        values = draw(_VALUES), draw(_VALUES)
        first, second = (replace(first, headers=[*first.headers, (name, v)]) for v in values)
    elif how != "same":
        headers = {
            "more": lambda: [*first.headers, draw(_ASK_FIELD)],
            "fewer": lambda: first.headers[1:],
            "shuffled": lambda: draw(st.permutations(first.headers)),
        }[how]()
        second = replace(first, headers=headers)
    options = {
        "authorization": draw(st.booleans()),
        "server_errors": draw(st.booleans()),
        "body_limit": 64,
    }
    says = draw(st.sampled_from([_PLAIN_SAY, _PLAIN_SAY, _ODD_SAY]).flatmap(lambda says: says))
    return Case((first, second), says, options, draw(st.booleans()))


class Boom(Exception):
    """What the application raises."""


def _body(caller: int, says: Say) -> bytes:
    return str(caller).encode() * says.size


def _judge(case: Case, got: list[Any], runs: list[int], middleware: Any) -> None:
    """Whether the clients have got what they may."""
    oracle = _Oracle(case)
    for outcome in got:
        assert isinstance(outcome, (bytes, Boom)), outcome
        assert isinstance(outcome, Boom) is case.says.fails
    stats = middleware.stats()
    assert stats.errors == 0, stats
    assert middleware.flight.in_flight() == middleware.flight.stats().waiting == 0
    shared = runs == [0]
    if not case.says.fails:
        assert got[0] == _body(0, case.says)
        assert got[1] == _body(0 if shared else 1, case.says)
    if shared:
        assert oracle.may_be_shared(), "an answer was shared that is its client's own"
    else:
        assert runs == [0, 1]
        assert not oracle.has_to_be_shared(), "an answer was not shared that has to be"


# -- ASGI -----------------------------------------------------------------------------------------


class _Asgi:
    """The application, and what the server gives it. On one event loop."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.runs: list[int] = []
        self.gate = asyncio.Event()
        self.middleware = asgi.CoalesceMiddleware(
            self._app, routes=["/"], shareable=["/"] if case.declared else [], **case.options
        )

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        caller = scope["caller"]
        self.runs.append(caller)
        await self.gate.wait()
        says = self.case.says
        if says.fails:
            raise Boom
        headers = [(n.encode("latin-1"), v.encode("latin-1")) for n, v in says.headers]
        await send({"type": "http.response.start", "status": says.status, "headers": headers})
        await send({"type": "http.response.body", "body": _body(caller, says)})

    async def _ask(self, caller: int) -> Any:
        ask = self.case.asks[caller]
        first: Any = {"type": "http.request", "body": b"x" * ask.body, "more_body": False}
        received = iter([first])
        sent: list[bytes] = []

        async def receive() -> Any:
            message = next(received, None)
            return message or await asyncio.get_running_loop().create_future()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                sent.append(bytes(message.get("body", b"")))

        scope = {
            "type": "http",
            "caller": caller,
            "method": ask.method,
            "scheme": "http",
            "path": ask.path,
            "raw_path": ask.path.encode("latin-1"),
            "query_string": ask.query.encode("latin-1"),
            "headers": [(n.encode("latin-1"), v.encode("latin-1")) for n, v in ask.headers],
        }
        try:
            await self.middleware(scope, receive, send)
        except Exception as error:
            return error
        return b"".join(sent)

    async def exchange(self) -> list[Any]:
        """Both requests, and what their clients get."""
        tasks: list[asyncio.Task[Any]] = []
        for caller in (0, 1):
            tasks.append(asyncio.create_task(self._ask(caller)))
            for _ in range(20):  # as many steps as it takes to begin, or to follow
                await asyncio.sleep(0)
        self.gate.set()
        async with asyncio.timeout(PATIENCE):
            return await asyncio.gather(*tasks)


def _check_asgi(case: Case) -> None:
    async def main() -> None:
        site = _Asgi(case)
        _judge(case, await site.exchange(), site.runs, site.middleware)

    asyncio.run(main())


# -- WSGI -----------------------------------------------------------------------------------------


class _Wsgi:
    """The application, and what the server gives it. Each client has a thread."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.runs: list[int] = []
        self.gate = threading.Event()
        self.middleware = wsgi.CoalesceMiddleware(
            self._app, routes=["/"], shareable=["/"] if case.declared else [], **case.options
        )

    def _app(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        caller = environ["fuzz.caller"]
        self.runs.append(caller)
        assert self.gate.wait(PATIENCE)
        says = self.case.says
        if says.fails:
            raise Boom
        start_response(f"{says.status} Said", list(says.headers))
        return [_body(caller, says)]

    def _ask(self, caller: int) -> Any:
        ask = self.case.asks[caller]
        environ: dict[str, Any] = {
            "REQUEST_METHOD": ask.method,
            "SCRIPT_NAME": "",
            "PATH_INFO": ask.path,
            "QUERY_STRING": ask.query,
            "wsgi.url_scheme": "http",
            "fuzz.caller": caller,
        }
        for name in dict.fromkeys(name.lower() for name, _ in ask.headers):
            key = name.upper().replace("-", "_")
            bare = key in ("CONTENT_LENGTH", "CONTENT_TYPE")
            environ[key if bare else f"HTTP_{key}"] = _joined(ask.headers, name)
        if ask.body and "CONTENT_LENGTH" not in environ:
            environ["CONTENT_LENGTH"] = "1"
        written: list[bytes] = []
        try:
            answer = self.middleware(environ, lambda *_: written.append)
            return b"".join([*written, *answer])
        except Exception as error:
            return error

    def exchange(self) -> list[Any]:
        """Both requests, and what their clients get."""
        first = spawn(lambda: self._ask(0))
        self._await(lambda: bool(self.runs))
        second = spawn(lambda: self._ask(1))
        self._await(lambda: len(self.runs) > 1 or self.middleware.flight.stats().waiting == 1)
        self.gate.set()
        return [first.result(PATIENCE), second.result(PATIENCE)]

    def _await(self, reached: Any) -> None:
        deadline = time.monotonic() + PATIENCE
        while not reached():
            assert time.monotonic() < deadline, "it hangs"
            time.sleep(0.0002)


def _check_wsgi(case: Case) -> None:
    for ask in case.asks:
        length = _joined(ask.headers, "content-length")
        if length == "" or (length == "0" and ask.body):
            return  # to PEP 3333 the first is none; and a server has looked that bodies have theirs
    site = _Wsgi(case)
    _judge(case, site.exchange(), site.runs, site.middleware)


TARGETS = [
    Target("asgi", "no private answer is shared by the ASGI middleware", _cases(), _check_asgi),
    Target("wsgi", "no private answer is shared by the WSGI middleware", _cases(), _check_wsgi, 50),
]
