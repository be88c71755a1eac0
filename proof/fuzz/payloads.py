"""Payloads: what comes from another process is an outcome or a miss, whoever has written it.

Bytes without meaning, bytes that were an outcome, and bodies with a valid digest, as somebody who
can write there on purpose can make them. The backends are given them where they read: a directory
whose files hold anything, and a server that answers anything.
"""

import contextlib
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from proof.fuzz.target import PATIENCE, Target, spawn
from shardedflight import BackendError, RemoteError, ShardedFlight
from shardedflight._core import End
from shardedflight.backends import MessagePack, Outcome, Sealed
from shardedflight.backends._protocol import _MAGIC, Wire
from shardedflight.backends.redis import RedisBackend

__all__ = ["PLAIN_VALUES", "TARGETS"]

#: Seconds after which a call hangs: many times the timeout of the backend below.
HANGS = 6.0

#: One pool for all flights: theirs would end whenever they are collected.
POOL = ThreadPoolExecutor(4, "fuzz")
WIRE = Wire("fuzz", None, 1 << 16)
_MADE_OF = (type(None), bool, int, float, str, bytes, list, dict)

#: What goes to other processes as it is.
PLAIN_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
#: Arrays, maps and strings of MessagePack that say to be huge, or begin one inside of another.
_BOMBS = st.builds(
    lambda head, times, tail: head * times + tail,
    st.sampled_from(
        [
            *(b"\x91", b"\x81", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff"),
            *(b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff\x01"),
            *(b"\xdd\x7f\xff\xff\xff\x91", b"[", b'{"a":', b"9", b"\xd4\x01", b"\xc7\x0c\xff"),
        ]
    ),
    st.sampled_from([1, 2, 10, 500, 2000, 10_000]),
    st.binary(max_size=8),
)
_ERRORS = st.sampled_from(
    [
        *(b"[]", b"{}", b'"abc"', b"null", b'["a","b"]', b'["a","b","c","d"]', b"[1,2,3]"),
        *(b"[null,[],{}]", b'["a",{"b":1},"c"]', b'["\\ud800","",""]', b"1e999", b"NaN"),
    ]
)
_BODIES = st.binary(max_size=40) | _BOMBS | _ERRORS


def _digest(kind: bytes, body: bytes) -> bytes:
    """What anybody who knows the codec's name can make."""
    key = blake2b(MessagePack().name.encode(), digest_size=32).digest()
    return blake2b(kind + body, digest_size=16, key=key).digest()


def _signed(kind: bytes, body: bytes) -> bytes:
    return b"".join((_MAGIC, kind, _digest(kind, body), body))


_SIGNED = st.builds(_signed, st.sampled_from([b"V", b"E", b"M", b"X", b"?", b"v"]), _BODIES)
_TRUE = PLAIN_VALUES.map(lambda value: WIRE.seal(Outcome(End.VALUE, value)))


@st.composite
def _damaged(draw: Any) -> bytes:
    whole = bytearray(draw(_TRUE | _SIGNED))
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.integers(0, max(0, len(whole) - 1)))
        match draw(st.sampled_from(["flip", "cut", "add", "drop"])):
            case "flip" if whole:
                whole[where] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del whole[where:]
            case "add":
                whole[where:where] = draw(st.binary(min_size=1, max_size=4))
            case _:
                del whole[where : where + 1]
    return bytes(whole)


_PAYLOADS = st.binary(max_size=64) | _BOMBS | _SIGNED | _TRUE | _damaged()


def _plain(value: Any) -> bool:
    """Whether it is made of what MessagePack has: times and extensions, which are bytes, too."""
    if isinstance(value, list):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(_plain(k) and _plain(v) for k, v in value.items())
    return type(value) in _MADE_OF or type(value).__module__ in ("datetime", "msgspec.msgpack")


def _genuine(payload: bytes) -> bool:
    """Whether it is what somebody with the codec's name has written."""
    kind, digest, body = payload[3:4], payload[4:20], payload[20:]
    return (
        payload[:3] == _MAGIC
        and kind in (b"V", b"E", b"M", b"X")
        and digest == _digest(kind, body)
        and len(payload) <= 1 << 16
    )


def _check_open(payload: bytes) -> None:
    """An outcome of plain values, or a ValueError; nothing else."""
    try:
        outcome = WIRE.open(Sealed(1, payload))
    except ValueError:
        return
    assert _genuine(payload)
    if outcome.end is End.ERROR:
        assert isinstance(outcome.value, RemoteError)
        assert outcome.value.type_name in str(outcome.value)
    elif outcome.end is End.VALUE:
        assert _plain(outcome.value), outcome
        assert repr(MessagePack().decode(payload[20:])) == repr(outcome.value)
    else:
        assert outcome.value is None


# -- a directory ----------------------------------------------------------------------------------

_FILES = st.fixed_dictionaries(
    {},
    optional={
        "token": st.binary(max_size=40)
        | st.sampled_from([b"9" * 32, b"-1", b"1_0", b" 7 ", b"\0"]),
        "key": st.binary(max_size=64) | _PAYLOADS,
        "left": st.binary(max_size=8),
    },
)
_STRANGE = st.sampled_from(["file", "file", "file", "directory", "link", "pipe", "read only"])


def _check_directory(case: Any) -> None:
    """A call runs its own function, whatever lies in the directory."""
    from shardedflight.backends.host import HostBackend  # noqa: PLC0415 - not on Windows

    files, kind, here = case
    directory = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        backend = HostBackend(directory, namespace="fuzz")
        for name, content in files.items():
            real = {"key": backend.name(None, ("k",)).hex(), "left": "0" * 40, "token": "token"}
            _put(directory / real[name], content, kind)
        flight = ShardedFlight(backend=backend, executor=POOL)
        call = flight.do if here else _by_future(flight)
        outcome = spawn(lambda: [call(lambda: "own", "k") for _ in range(2)])
        assert outcome.result(PATIENCE) == [("own", False)] * 2
        flight.forget("k")
        assert flight.in_flight() == 0
        with contextlib.suppress(BackendError):  # a new one may refuse the directory
            HostBackend(directory).close()
        backend.close()
    finally:
        shutil.rmtree(directory)


def _by_future(flight: ShardedFlight) -> Callable[..., Any]:
    return lambda fn, key: flight.do_future(fn, key).result(HANGS)


def _put(path: Path, content: bytes, kind: str) -> None:
    import os  # noqa: PLC0415 - mkfifo is not everywhere

    path.unlink(missing_ok=True)
    match kind:
        case "directory":
            path.mkdir()
        case "link":
            path.symlink_to("/dev/zero")
        case "pipe":
            os.mkfifo(path)
        case _:
            path.write_bytes(content)
            if kind == "read only":
                path.chmod(0o400)


# -- a server -------------------------------------------------------------------------------------


def _resp(value: Any) -> bytes:
    """A reply, as RESP2 writes it."""
    if isinstance(value, list):
        return b"*%d\r\n" % len(value) + b"".join(map(_resp, value))
    if isinstance(value, bytes):
        return b"$%d\r\n%b\r\n" % (len(value), value)
    return b"$-1\r\n" if value is None else b":%d\r\n" % value


_SCALARS = st.none() | st.integers(-1, 3) | st.integers() | st.binary(max_size=8) | _PAYLOADS
_REPLIES = st.recursive(_SCALARS, lambda inner: st.lists(inner, max_size=4), max_leaves=6)
_JOINED = st.tuples(
    st.sampled_from([0, 1, 2, 3]),
    st.sampled_from([b"1", b"2", b"x", b"inf", b"-1", None, 7]),
    st.sampled_from([0, 1, -1, None, b"x"]) | _PAYLOADS,
).map(list)
_RAW = st.binary(max_size=20) | st.sampled_from(
    [
        *(b":x\r\n", b"$x\r\n", b"*x\r\n", b"$-7\r\n", b"*-7\r\n", b"-\r\n", b"-MOVED\r\n"),
        *(b"-MOVED 1 x\r\n", b"-NOSCRIPT\r\n", b"-LOADING\r\n", b"-READONLY x\r\n", b"+OK\r\n"),
        *(b"*1\r\n" * 5000, b"HTTP/1.1 400 Bad Request\r\n\r\n", b":" + b"9" * 5000 + b"\r\n"),
        *(b"$99999999999\r\nabc", b"", b"-ASK 1 127.0.0.1:1\r\n", b"-CLUSTERDOWN x\r\n"),
    ]
)
_SAYS = _JOINED.map(_resp) | _REPLIES.map(_resp) | _RAW
_PUSHED = st.lists(
    st.binary(max_size=60).map(lambda content: _resp([b"smessage", b"x", content]))
    | st.just(_resp([b"ssubscribe", b"\xff", 1]))
    | st.just(_resp([b"ssubscribe", b"no inbox", 1]))
    | _SAYS,
    max_size=2,
)


class Server:
    """What takes itself for Redis: it answers scripts in turn with what it is given."""

    def __init__(self, replies: list[bytes], pushed: list[bytes]) -> None:
        self._replies = list(replies)
        self._pushed = pushed
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._connections: list[socket.socket] = []
        self.subscribed = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self._connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), connection.makefile("rb") as lines:
            while count := lines.readline():
                parts: list[bytes] = []
                for _ in range(int(count[1:])):
                    parts.append(lines.read(int(lines.readline()[1:])))
                    lines.readline()
                connection.sendall(self._answer(parts))

    def _answer(self, parts: list[bytes]) -> bytes:
        match parts[0].upper():
            case b"EVALSHA" | b"EVAL":
                return self._replies.pop(0) if self._replies else b"-ERR no more\r\n"
            case b"SSUBSCRIBE":
                self.subscribed += 1
                pushed = b"".join(self._pushed)
                return _resp([b"ssubscribe", parts[1], 1]) + pushed
            case b"PING":
                return b"+PONG\r\n"
            case _:
                return b"+OK\r\n"

    def close(self) -> None:
        """Ends all connections."""
        self._socket.close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


def _check_server(case: Any) -> None:
    """A call is answered in time, with its own value or one that an outcome holds."""
    replies, pushed, here = case
    failures: list[Any] = []
    hook, threading.excepthook = threading.excepthook, failures.append
    server = Server(replies, pushed)
    backend = RedisBackend(f"redis://127.0.0.1:{server.port}", timeout=0.2, lease=0.5)
    flight = ShardedFlight(backend=backend, executor=POOL)
    call = flight.do if here else _by_future(flight)
    try:
        for _ in range(2):
            outcome = spawn(lambda: call(lambda: "own", "k"))
            try:
                value, _shared = outcome.result(HANGS)
            except (RemoteError, KeyError):
                continue
            assert value == "own" or any(_signed_value(value, reply) for reply in replies)
        assert flight.in_flight() == 0
    finally:
        backend.close()
        server.close()
        threading.excepthook = hook
    assert not failures, failures[0].exc_value


def _signed_value(value: Any, reply: bytes) -> bool:
    """Whether the reply holds an outcome with this value."""
    start = reply.find(_MAGIC + b"V")
    if start < 0:
        return False
    with contextlib.suppress(Exception):
        return repr(MessagePack().decode(reply[start + 20 : -2])) == repr(value)
    return False


TARGETS = [
    Target(
        "payload",
        "bytes from elsewhere are an outcome or a ValueError",
        _PAYLOADS,
        _check_open,
        200,
    ),
    Target(
        "directory",
        "a call is answered, whatever lies in the host tier's directory",
        st.tuples(_FILES, _STRANGE, st.booleans()),
        _check_directory,
        20,
    ),
    Target(
        "server",
        "a call is answered, whatever the cluster tier's server says",
        st.tuples(st.lists(_SAYS, min_size=1, max_size=4), _PUSHED, st.booleans()),
        _check_server,
        10,
    ),
]
