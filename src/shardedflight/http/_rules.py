"""Which requests may be collapsed, and whose answers may be shared.

An answer that reaches the wrong caller is a leak (Squid's CVE-2016-10003, where a collapsed request
got another client's answer), so whatever is not known to be harmless passes through. Everything
here is a decision on values: no I/O, no lock, and no clock but for an Expires without a Date. The
adapters read requests and answers and do what is decided here.

Sources, as the comments name them: RFC 9110 (HTTP semantics), RFC 9111 (caching), RFC 9211
(Cache-Status); Varnish's builtin.vcl; Squid's collapsed forwarding; "ours" where this project
chooses, each time the stricter way.
"""

import enum
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from inspect import isawaitable, iscoroutine, iscoroutinefunction
from typing import Any, AnyStr, NamedTuple, TypeAlias, TypedDict

__all__ = [
    "DECLARES",
    "FORWARDED",
    "JUDGED",
    "Options",
    "Pass",
    "Recording",
    "Refusal",
    "Request",
    "Rules",
    "Shared",
    "Verdict",
    "Where",
    "fold",
    "forwarded_site",
    "has",
]

#: Header fields in the order of the message. Text is Latin-1, as in PEP 3333.
Headers: TypeAlias = Sequence[tuple[str, str]]

#: Path prefixes, or a function of what the framework calls a request (scope, environ, Request).
Where: TypeAlias = Iterable[str] | Callable[[Any], bool]


class Pass(enum.StrEnum):
    """Why a request runs by itself."""

    ROUTE = "route"  # Squid: collapsing is off unless it is asked for
    METHOD = "method"  # builtin.vcl: all but GET and HEAD
    BODY = "body"  # builtin.vcl looks at no body; ours: its content would have to be in the key
    AUTHORIZATION = "authorization"  # builtin.vcl; RFC 9111 section 3.5
    COOKIE = "cookie"  # builtin.vcl
    CREDENTIALS = "credentials"  # ours: whatever else says who is asking
    RANGE = "range"  # Squid
    UPGRADE = "upgrade"  # ours
    NO_STORE = "no-store"  # Squid; RFC 9111 section 5.2.1.5
    LEARNED = "learned"  # Varnish's hit-for-miss: the last answer was not shareable
    WAITERS = "waiters"  # Varnish issue 3461: a list of waiters without a limit
    RELEASED = "released"  # it waited for an answer that turned out not to be shareable
    GONE = "gone"  # its client had left before it began
    ERROR = "error"  # something went wrong in here


class Refusal(enum.StrEnum):
    """Why an answer is its own caller's alone."""

    PRIVATE = "private"  # RFC 9111 section 5.2.2.7
    NO_STORE = "no-store"  # RFC 9111 section 5.2.2.5
    NO_CACHE = "no-cache"  # RFC 9111 section 5.2.2.4
    MALFORMED = "malformed"  # ours: a Cache-Control that can not be read may forbid anything
    SET_COOKIE = "set-cookie"  # builtin.vcl
    VARY = "vary"  # RFC 9111 section 4.1: `*` matches nobody
    STATUS = "status"  # RFC 9110 section 15.1 lists what is cacheable without being asked
    AUTHORIZATION = "authorization"  # RFC 9111 section 3.5
    STALE = "stale"  # RFC 9111 section 4.2: max-age=0 is over when it arrives
    UNDECLARED = "undeclared"  # ours: nobody said that it may be shared
    SIZE = "size"  # Squid
    STREAM = "stream"  # Squid: it has no end to wait for
    EXTENSION = "extension"  # ours: the server makes the body, or trailers follow it
    BROKEN = "broken"  # it ended before it was complete


#: RFC 9110 section 15.1, without 206, which answers a Range.
_STATUSES = frozenset({200, 203, 204, 300, 301, 308, 404, 405, 410, 414, 501})
#: Squid shares these with those who wait, and remembers none.
_SERVER_ERRORS = frozenset({500, 502, 503, 504})

#: RFC 9111 section 3.5: what lets a shared cache give an answer to a request with Authorization.
_FOR_EVERYBODY = frozenset({"public", "s-maxage", "must-revalidate"})
#: RFC 9111 section 3: what allows an answer to be stored, section 3.5 included.
_PERMISSIONS = _FOR_EVERYBODY | {"max-age"}

#: Fields that say who asks: API keys, certificates and users as proxies pass them on. Ours.
_CREDENTIALS = frozenset(
    {
        "api-key",
        "apikey",
        "cf-access-jwt-assertion",
        "client-cert",
        "client-cert-chain",
        "cookie2",
        "ocp-apim-subscription-key",
        "proxy-authorization",
        "remote-user",
        "ssl-client-cert",
        "x-access-token",
        "x-amz-security-token",
        "x-amzn-oidc-accesstoken",
        "x-amzn-oidc-data",
        "x-amzn-oidc-identity",
        "x-api-key",
        "x-api-token",
        "x-apikey",
        "x-auth",
        "x-auth-key",
        "x-auth-request-access-token",
        "x-auth-request-email",
        "x-auth-request-user",
        "x-auth-token",
        "x-client-cert",
        "x-csrf-token",
        "x-forwarded-access-token",
        "x-forwarded-client-cert",
        "x-forwarded-email",
        "x-forwarded-user",
        "x-goog-api-key",
        "x-goog-authenticated-user-email",
        "x-goog-iap-jwt-assertion",
        "x-ms-client-principal",
        "x-ms-client-principal-id",
        "x-remote-user",
        "x-session-token",
        "x-ssl-client-cert",
        "x-user",
        "x-user-id",
        "x-xsrf-token",
    }
)

#: Part of the key besides method, scheme, path and query. Ours: negotiated content, whom CORS
#: lets read it; what makes an answer conditional; and what proxies let an application mistake for
#: method, host or path, which else would let one client choose the links in everybody's answer.
_KEY_HEADERS = frozenset(
    {
        "accept",
        "accept-encoding",
        "accept-language",
        "host",
        "if-match",
        "if-modified-since",
        "if-none-match",
        "if-range",
        "if-unmodified-since",
        "origin",
        "x-forwarded-host",
        "x-forwarded-port",
        "x-forwarded-prefix",
        "x-forwarded-proto",
        "x-forwarded-protocol",
        "x-forwarded-scheme",
        "x-forwarded-server",
        "x-forwarded-ssl",
        "x-http-method",
        "x-http-method-override",
        "x-method-override",
        "x-original-url",
        "x-rewrite-url",
        "x-scheme",
        "x-script-name",
    }
)

#: RFC 7239: as the X-Forwarded fields of proxies, but it tells of the client, too. See
#: `forwarded_site`.
FORWARDED = "forwarded"

#: What keeps a request from being collapsed, whoever asks.
_CONDITIONS = frozenset(
    {"cache-control", "content-length", "range", "transfer-encoding", "upgrade"}
)
_IDENTITY = frozenset({"authorization", "cookie"})

#: RFC 9110 section 7.6.1: for one connection, not for whom the message is passed on to.
_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authentication-info",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)

#: RFC 9211 section 2: what a cache did. The answer came from no store, but from another's request.
_CACHE_STATUS = ("Cache-Status", "shardedflight; fwd=miss; collapsed")

#: The fields of an answer by which it is judged: adapters need not read the others for that.
JUDGED = frozenset(
    {
        "cache-control",
        "content-length",
        "content-type",
        "date",
        "expires",
        "set-cookie",
        "set-cookie2",
        "vary",
    }
)

_STREAMS = frozenset({"text/event-stream", "multipart/x-mixed-replace"})


# -- reading header fields ------------------------------------------------------------------------


def fold(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The fields by lower-case name; those of one name joined, as RFC 9110 section 5.3 allows."""
    headers = [*headers]
    simple = {name.lower(): value for name, value in headers}
    if len(simple) == len(headers):
        return simple
    found: dict[str, str] = {}
    for name, value in headers:
        key = name.lower()
        found[key] = f"{found[key]}, {value}" if key in found else value
    return found


def has(headers: Iterable[tuple[AnyStr, AnyStr]], name: AnyStr) -> bool:
    """Whether there is a field of that lower-case name: less work than to fold them all."""
    length = len(name)
    for field, _ in headers:  # noqa: SIM110 - `any` would take a frame for each field
        if len(field) == length and field.lower() == name:
            return True
    return False


_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_DIRECTIVE = re.compile(rf'[ \t]*({_WORD})(?:=(?:"((?:[^"\\]|\\.)*)"|({_WORD})))?[ \t]*(?:,|\Z)')
_NOTHING = re.compile(r"[ \t]*(?:,|\Z)")


def directives(value: str) -> dict[str, str]:
    """The directives of a Cache-Control field and their arguments, "" where there is none.

    Of two with one name the first counts, as RFC 9111 section 4.2.1 suggests. Written here because
    the parsers for it come with a framework each (Werkzeug, WebOb), and read what is malformed as
    something.

    Raises:
        ValueError: The field is malformed.
    """
    found: dict[str, str] = {}
    position = 0
    while position < len(value):
        match = _DIRECTIVE.match(value, position)
        if match is not None:
            found.setdefault(match[1].lower(), match[2] or match[3] or "")
        else:
            match = _NOTHING.match(value, position)
            if match is None:
                raise ValueError(f"no Cache-Control: {value!r}")
        position = match.end()
    return found


def names(value: str) -> list[str]:
    """The lower-case members of a field that is a list of field names, such as Vary."""
    return [name.strip().lower() for name in value.split(",") if name.strip()]


def forwarded_site(value: str) -> str:
    """What of a Forwarded field (RFC 7239) tells of host and scheme, and not of the client."""
    return ";".join(f"{m[1].lower()}={m[2].lower()}" for m in _SITE.finditer(value))


_SITE = re.compile(r'(?i)(?<![^;,\s])(host|proto)[ \t]*=[ \t]*("(?:[^"\\]|\\.)*"|[^;,\s]*)')


def _expired(headers: Mapping[str, str]) -> bool:
    """Whether Expires says so; what is no date is in the past (RFC 9111 section 5.3)."""
    if "expires" not in headers:
        return False
    try:
        expires = parsedate_to_datetime(headers["expires"])
        date = parsedate_to_datetime(headers["date"]) if "date" in headers else datetime.now(UTC)
        return expires <= date
    except (TypeError, ValueError, OverflowError):  # no date; or one without a zone
        return True


def _lasts(seconds: str) -> bool:
    """Whether it is a number above 0. RFC 9111 section 4.2.1 has what is none taken for stale."""
    return seconds.isascii() and seconds.isdecimal() and bool(seconds.strip("0"))


# -- values ---------------------------------------------------------------------------------------


#: Without this field an answer is as undeclared as the last one, unless its request is shareable.
DECLARES = "cache-control"


class Request(NamedTuple):
    """A request that may be collapsed. A tuple, because each routed request makes one.

    Attributes:
        key: What makes two requests the same one: the method, the scheme, path and query as they
            came, whatever else the adapter knows it by, and the fields that are `Rules.keyed`.
        path: The decoded path.
        headers: Reads all header fields, folded, as they were when the request came: it is called
            later, when the application may have changed what they came in.
        authorized: It has an Authorization field, of which the key has only that it is there. It
            gets what is for everybody, and must not wait for what may not be.
        shareable: Its route needs no Cache-Control.
    """

    key: tuple[Any, ...]
    path: str
    headers: Callable[[], Mapping[str, str]]
    authorized: bool
    shareable: bool

    @property
    def method(self) -> str:
        """GET or HEAD."""
        return str(self.key[0])

    @property
    def address(self) -> str:
        """Method and path, for people."""
        return f"{self.method} {self.path}"

    def variant(self, fields: Sequence[str]) -> tuple[tuple[str, str | None], ...]:
        """Its values for the fields that an answer varies by: RFC 9111 section 4.1."""
        if not fields:
            return ()
        headers = self.headers()
        return tuple([(field, headers.get(field)) for field in sorted(set(fields))])


class Shared:
    """A complete answer that others may have. Immutable, for any number of threads.

    Attributes:
        status: As the adapter was given it.
        body: The whole body.
        variant: The leader's values for the fields of Vary.
    """

    __slots__ = ("_copied", "_headers", "body", "status", "variant")

    def __init__(
        self,
        status: Any,
        headers: Callable[[], Headers],
        body: bytes,
        variant: tuple[tuple[str, str | None], ...],
    ) -> None:
        self.status = status
        self.body = body
        self.variant = variant
        self._headers = headers
        self._copied: Headers | None = None

    @property
    def headers(self) -> Headers:
        """The followers' header fields; made for the first of them: most answers have none."""
        copied = self._copied
        if copied is None:  # two threads may come here at once, and make the same
            copied = self._copied = _copied(self._headers())
        return copied

    def fits(self, request: Request) -> bool:
        """Whether it answers `request`, which has the leader's key."""
        return request.variant([field for field, _ in self.variant]) == self.variant


#: What an execution has come to.
Verdict: TypeAlias = Shared | Refusal


class Options(TypedDict, total=False):
    """The keyword arguments that all adapters have.

    Attributes:
        body_limit: Bytes of the longest body that is shared. 1 MiB.
        follower_timeout: Seconds after which followers turn to a replacement. 3.
        pass_through_time: Seconds for which a key passes through after an answer that is not
            shareable; 0 turns it off. 120.
        max_waiters: Followers of one execution; more pass through. 1,000.
        server_errors: Whether 500, 502, 503 and 504, and exceptions, may go to those who wait.
        authorization: Whether requests with Authorization are collapsed, each getting only answers
            that RFC 9111 section 3.5 gives to everybody.
        key_headers: Further request fields that belong to the key.
        private_headers: Further request fields that say who asks, so that the request passes
            through.
    """

    body_limit: int
    follower_timeout: float
    pass_through_time: float
    max_waiters: int
    server_errors: bool
    authorization: bool
    key_headers: Iterable[str]
    private_headers: Iterable[str]


# -- the rules ------------------------------------------------------------------------------------


class Rules:
    """The rules with the options of one adapter. Immutable, for any number of threads.

    Args:
        routes: What may be collapsed.
        shareable: What may be shared without Cache-Control.
        one_client: All requests are one client's, so that who asks is no secret among them: every
            header field is in the key, credentials included.
        body_limit: See `Options`, as for all that follow.
        follower_timeout: Seconds.
        pass_through_time: Seconds.
        max_waiters: A number of followers.
        server_errors: True or false.
        authorization: True or false.
        key_headers: Names of header fields.
        private_headers: Names of header fields.

    Raises:
        TypeError: An option is of the wrong type.
        ValueError: An option is out of its range.
    """

    def __init__(
        self,
        routes: Where,
        shareable: Where,
        *,
        one_client: bool = False,
        body_limit: int = 1 << 20,
        follower_timeout: float = 3.0,
        pass_through_time: float = 120.0,
        max_waiters: int = 1000,
        server_errors: bool = True,
        authorization: bool = False,
        key_headers: Iterable[str] = (),
        private_headers: Iterable[str] = (),
    ) -> None:
        self.body_limit = _number("body_limit", body_limit, whole=True)
        self.follower_timeout = _number("follower_timeout", follower_timeout, positive=True)
        self.pass_through_time = _number("pass_through_time", pass_through_time)
        self.max_waiters = _number("max_waiters", max_waiters, whole=True, positive=True)
        self._server_errors = _flag("server_errors", server_errors)
        self._authorization = _flag("authorization", authorization)
        self._credentials = _CREDENTIALS | set(_fields("private_headers", private_headers))
        self._routes = _matcher("routes", routes)
        #: Whether the route of a path, or of what a `Where` takes, needs no Cache-Control.
        self.shareable = _matcher("shareable", shareable)
        self._one_client = one_client
        #: The fields of a request that may keep it from being collapsed, and those in its key: all,
        #: with `one_client`.
        self.suspect = _CONDITIONS if one_client else _CONDITIONS | _IDENTITY | self._credentials
        self.keyed = _KEY_HEADERS.union(_fields("key_headers", key_headers))

    def admit(self, method: str, path: str, native: Any) -> Pass | None:
        """What can be said before the header fields are read.

        Args:
            method: The method.
            path: The decoded path.
            native: What a `Where` that is a function takes.
        """
        if not self._routes(path, native):
            return Pass.ROUTE
        return None if method in ("GET", "HEAD") else Pass.METHOD

    def refuse(self, suspect: Mapping[str, str], *, identified: bool = False) -> Pass | None:
        """Why a request that was admitted may not be collapsed; None if it may.

        Args:
            suspect: The folded header fields, those that are `suspect` or more.
            identified: The connection itself says who asks: a certificate, a login.
        """
        if suspect.get("content-length", "0") != "0" or "transfer-encoding" in suspect:
            return Pass.BODY
        if not self._one_client:
            if "authorization" in suspect and not self._authorization:
                return Pass.AUTHORIZATION
            if "cookie" in suspect:
                return Pass.COOKIE
            if identified or not self._credentials.isdisjoint(suspect):
                return Pass.CREDENTIALS
        if "range" in suspect:
            return Pass.RANGE
        if "upgrade" in suspect:
            return Pass.UPGRADE
        if "cache-control" in suspect and _forbids_storing(suspect["cache-control"]):
            return Pass.NO_STORE
        return None

    def judge(self, request: Request, status: int, headers: Mapping[str, str]) -> Refusal | None:
        """Why an answer to `request` with this head is not shared; None if it may be.

        Args:
            request: The request.
            status: The status code.
            headers: The folded header fields, those that are `JUDGED` or more.
        """
        if "set-cookie" in headers or "set-cookie2" in headers:
            return Refusal.SET_COOKIE
        if status not in _STATUSES and not (self._server_errors and status in _SERVER_ERRORS):
            return Refusal.STATUS
        refused = _refused_by_cache_control(request, headers)
        if refused is not None:
            return refused
        if "vary" in headers and "*" in names(headers["vary"]):
            return Refusal.VARY
        if headers.get("content-type", "").partition(";")[0].strip().lower() in _STREAMS:
            return Refusal.STREAM
        length = _length(request, headers)
        if length is not None and length > self.body_limit:
            return Refusal.SIZE
        return None

    def shares_failure(self, request: Request) -> bool:
        """Whether an exception instead of an answer goes to all: it is a 500 without a head."""
        return self._server_errors and request.shareable and not request.authorized


def _forbids_storing(value: str) -> bool:
    try:
        return "no-store" in directives(value)
    except ValueError:
        return True


def _refused_by_cache_control(request: Request, headers: Mapping[str, str]) -> Refusal | None:
    value = headers.get("cache-control")
    if value is None:
        if request.authorized:
            return Refusal.AUTHORIZATION
        if not request.shareable:
            return Refusal.UNDECLARED
        return Refusal.STALE if _expired(headers) else None
    try:
        found = directives(value)
    except ValueError:
        return Refusal.MALFORMED
    for refusal in (Refusal.PRIVATE, Refusal.NO_STORE, Refusal.NO_CACHE):
        if refusal in found:  # with an argument, which limits it to some fields, just the same
            return refusal
    if request.authorized and _FOR_EVERYBODY.isdisjoint(found):
        return Refusal.AUTHORIZATION
    lifetime = found.get("s-maxage", found.get("max-age"))  # RFC 9111 section 4.2.1
    if _expired(headers) if lifetime is None else not _lasts(lifetime):
        return Refusal.STALE
    if request.shareable or not _PERMISSIONS.isdisjoint(found):
        return None
    return Refusal.UNDECLARED


def _length(request: Request, headers: Mapping[str, str]) -> int | None:
    """How long the body will be, if the head of the answer says so."""
    length = headers.get("content-length", "")
    if length.isascii() and length.isdecimal() and request.method != "HEAD":
        return int(length.lstrip("0")[:20] or "0")  # `int` refuses thousands of digits
    return None


def _copied(headers: Headers) -> Headers:
    """The header fields of a follower's answer."""
    dropped = _HOP_BY_HOP.union(names(fold(headers).get("connection", "")))
    kept = [(name, value) for name, value in headers if name.lower() not in dropped]
    return (*kept, _CACHE_STATUS)


class Recording:
    """What the leader's application answers, as far as it is known. For one thread at a time.

    Attributes:
        verdict: What has come of it; None while that is open.
        begun: The head is known.
    """

    def __init__(self, rules: Rules, request: Request) -> None:
        self._rules = rules
        self._request = request
        self._chunks: list[bytes] = []
        self._size = 0
        self._expected: int | None = None
        self._status: Any = None
        self._headers: Callable[[], Headers]
        self._vary = ""
        self.begun = False
        self.verdict: Verdict | None = None

    def head(
        self,
        status: Any,
        code: int,
        judged: Mapping[str, str],
        headers: Callable[[], Headers],
    ) -> Verdict | None:
        """The head. A later one replaces it, as WSGI allows before the body begins.

        Args:
            status: What followers get.
            code: The status code.
            judged: The folded header fields, those that are `JUDGED` or more.
            headers: Reads all header fields. It is called later, when the application may have
                changed what it has sent them from.
        """
        self.begun = True
        self._status = status
        self._headers = headers
        self._vary = judged.get("vary", "")
        self._expected = _length(self._request, judged)
        self.verdict = self._rules.judge(self._request, code, judged)
        return self.verdict

    def body(self, chunk: bytes | bytearray | memoryview) -> Verdict | None:
        """A part of the body. The last one is recognised where Content-Length tells."""
        if self.verdict is None:
            self._chunks.append(bytes(chunk))
            self._size += len(self._chunks[-1])
            if self._size > self._rules.body_limit:
                self.refuse(Refusal.SIZE)
            elif self._size == self._expected:
                self.end()
        return self.verdict

    def end(self) -> Verdict:
        """The body is complete, or there is none."""
        if self.verdict is None:
            if not self.begun or self._expected not in (None, self._size):
                return self.refuse(Refusal.BROKEN)
            variant = self._request.variant(names(self._vary)) if self._vary else ()
            self.verdict = Shared(self._status, self._headers, b"".join(self._chunks), variant)
            self._chunks.clear()
        return self.verdict

    def refuse(self, refusal: Refusal) -> Verdict:
        """Nobody else gets it."""
        self._chunks.clear()
        self.verdict = refusal
        return refusal


# -- checking options -----------------------------------------------------------------------------


def _number(what: str, value: Any, *, whole: bool = False, positive: bool = False) -> Any:
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{what} must be {'an int' if whole else 'a number'}, not {value!r}")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{what} must be {'above' if positive else 'at least'} 0, not {value!r}")
    return value


def _flag(what: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{what} must be True or False, not {value!r}")
    return value


def _strings(what: str, values: Any) -> list[str]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{what} must be several str, such as [{values!r}], not {values!r}")
    found: list[Any] = [*values]
    for value in found:
        if not isinstance(value, str):
            raise TypeError(f"{what} must hold str, not {value!r}")
    return found


def _fields(what: str, values: Any) -> list[str]:
    found = [value.lower() for value in _strings(what, values)]
    for name in found:
        if not re.fullmatch(_WORD, name):
            raise ValueError(f"{what} must hold names of header fields, not {name!r}")
    return found


def _truth(what: str, answer: Any) -> bool:
    if isawaitable(answer):
        if iscoroutine(answer):
            answer.close()
        raise TypeError(f"{what} must tell at once, not by {answer!r}")
    return bool(answer)


def _matcher(what: str, where: Any) -> Callable[[str, Any], bool]:
    """Makes a test of a path, or of what the framework calls a request."""
    if callable(where):
        if iscoroutinefunction(where) or iscoroutinefunction(type(where).__call__):
            raise TypeError(f"{what} must be no coroutine function, for all it returns is true")
        return lambda _, native: _truth(what, where(native))
    prefixes = _strings(what, where)
    for prefix in prefixes:
        if not prefix.startswith("/"):
            raise ValueError(f"{what} must hold paths that begin with '/', not {prefix!r}")
    whole = frozenset(prefixes)
    # "/items" is "/items" and what is below it, not "/items-of-mine".
    below = tuple(prefix if prefix.endswith("/") else f"{prefix}/" for prefix in prefixes)
    return lambda path, _: path in whole or path.startswith(below)
