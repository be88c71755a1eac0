"""What goes from process to process, for all backends: names of keys, and sealed outcomes.

**Names.** A key is written down with a tag and a length before each of its parts, so that no two
keys are written alike, and hashed by BLAKE2b to 20 bytes. Keys that are equal have one name: 1, 1.0
and True are one key to Python, and to this.

**Outcomes** are sealed: some bytes that say what this is, a digest, and the body. The digest covers
the name of the codec, too. So what was cut off, overwritten, or written by another codec or version
is not opened; it is no protection from somebody who can write there on purpose, and for him nothing
in here runs code or makes other types than the codec was given. Values are MessagePack by default.
What an error says goes as JSON: its type, its message and its traceback, never the object.
"""

import dataclasses
import json
import struct
import traceback
import uuid
from datetime import datetime, time
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Protocol, runtime_checkable

from shardedflight._core import End
from shardedflight._tier import Outcome, Sealed, TooLargeError
from shardedflight.exceptions import BackendError, RemoteError

__all__ = ["Codec", "MessagePack", "Wire", "name_of"]

# -- names ----------------------------------------------------------------------------------------

_LENGTH = struct.Struct(">Q")
_FLOAT = struct.Struct(">d")


@lru_cache(maxsize=4096)  # a call asks twice; keys that are equal have one name
def name_of(namespace: str, flight: str | None, parts: tuple[Any, ...]) -> bytes:
    """The name of a key: 20 bytes.

    Args:
        namespace: Of the backend.
        flight: The flight's name.
        parts: What the key is made of.

    Raises:
        TypeError: It is made of something else than None, bool, int, float, str, bytes, UUID, and
            tuples of them; or of a NaN, which equals nothing.
    """
    written: list[bytes] = []
    _write((namespace, flight, parts), written)
    return blake2b(b"".join(written), digest_size=20).digest()


def _write(part: Any, written: list[bytes]) -> None:
    kind: Any = type(part)  # pyright: ignore[reportUnknownVariableType]
    if kind is float and part.is_integer():
        kind, part = int, int(part)
    if kind is str:
        _tag(b"s", part.encode("utf-8", "surrogatepass"), written)
    elif kind is int or kind is bool:
        _tag(b"i", int(part).to_bytes(part.bit_length() // 8 + 1, "big", signed=True), written)
    elif kind is bytes:
        _tag(b"b", part, written)
    elif kind is tuple:
        _write_all(b"t", part, written)
    elif part is None:
        _tag(b"n", b"", written)
    elif kind is float and part == part:
        _tag(b"f", _FLOAT.pack(part), written)
    elif kind is uuid.UUID:
        _tag(b"u", part.bytes, written)
    elif hasattr(kind, "__flight_key__"):
        _write_all(b"o", (part.__flight_key__(),), written)
    else:
        raise TypeError(
            f"{part!r} of type {kind.__qualname__} can not be part of a key in other processes: "
            "with a backend, keys are made of None, bool, int, float, str, bytes, UUID and tuples "
            "of them; build_key= can make such a key"
        )


def _tag(tag: bytes, content: bytes, written: list[bytes]) -> None:
    written += (tag, _LENGTH.pack(len(content)), content)


def _write_all(tag: bytes, parts: tuple[Any, ...], written: list[bytes]) -> None:
    written += (tag, _LENGTH.pack(len(parts)))
    for part in parts:
        _write(part, written)


# -- values ---------------------------------------------------------------------------------------


@runtime_checkable
class Codec(Protocol):
    """Makes bytes of values and values of bytes. Used by any number of threads at once.

    Attributes:
        name: Which codec it is: processes whose codecs have different names do not read each
            other's values.
    """

    name: str

    def encode(self, value: Any, /) -> bytes:
        """Bytes from which every process makes an equal value of the same type.

        Raises:
            TypeError: There are none.
        """
        ...

    def decode(self, payload: bytes, /) -> Any:
        """The value. Raises any Exception if the bytes are none of a value's."""
        ...


class MessagePack:
    """MessagePack, by `msgspec`: None, bool, int, float, str, bytes, lists and dicts of them.

    What would come back as something else, such as a tuple, which comes back as a list, is refused
    when it is sent. With a type, values of it come back as they are.

    Args:
        type: What values are: anything that `msgspec` decodes to, a dataclass or `tuple[int, str]`.

    Raises:
        BackendError: `msgspec` is not installed.
        TypeError: It can not decode to `type`.
    """

    def __init__(self, type: Any = Any) -> None:  # noqa: A002 - the contract's name
        try:
            import msgspec  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise BackendError(
                "values are encoded by msgspec, which is not installed: install "
                "shardedflight[host] or shardedflight[redis], or give codec="
            ) from error
        self._encode = msgspec.msgpack.encode
        self._decode = msgspec.msgpack.Decoder(type).decode
        self._struct = msgspec.Struct
        self._refusals = (msgspec.MsgspecError, TypeError, OverflowError, ValueError)
        # A spawned process has its parent's main module under another name.
        self.name = "msgpack " + repr(type).replace("__mp_main__", "__main__")

    def encode(self, value: Any, /) -> bytes:
        """The bytes of a value. Raises TypeError if it would come back changed."""
        try:
            payload = self._encode(value)
            back = self._decode(payload)
        except self._refusals as error:
            raise TypeError(
                f"a value of type {_type_name(value)} can not go to another process: {error}; "
                "return what MessagePack has, or give the backend another codec="
            ) from error
        changed = self._changed(value, back, "the value")
        if changed is not None:
            raise TypeError(
                f"{changed} in another process: give the backend codec=MessagePack(type=...) with "
                "the type of its values, or another codec"
            )
        return payload

    def decode(self, payload: bytes, /) -> Any:
        """The value."""
        return self._decode(payload)

    def _changed(self, value: Any, back: Any, where: str) -> str | None:
        """What has come back changed, if anything."""
        kind: Any = type(value)  # pyright: ignore[reportUnknownVariableType]
        if kind is not type(back):
            return f"{where}, of type {_type_name(value)}, would be of type {_type_name(back)}"
        if kind in (list, tuple):
            pairs = [(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(value, back))]  # noqa: B905
            equal = len(value) == len(back)
        elif kind is dict:
            pairs = [(a, b, f"a key of {where}") for a, b in zip(value, back)]  # noqa: B905
            pairs += [(value[k], back[k], f"{where}[{k!r}]") for k in value if k in back]
            equal = len(value) == len(back)
        elif dataclasses.is_dataclass(kind) or isinstance(value, self._struct):
            fields = getattr(kind, "__struct_fields__", None) or kind.__dataclass_fields__
            pairs = [
                (getattr(value, n, None), getattr(back, n, None), f"{where}.{n}") for n in fields
            ]
            equal = True
        elif isinstance(value, (datetime, time)):
            pairs = []
            equal = repr(value) == repr(back)  # with its time zone, which equality passes over
        else:
            pairs = []
            equal = value == back or (value != value and back != back)
        if not equal:
            return f"{where}, {value!r:.200}, would be {back!r:.200}"
        return next(filter(None, (self._changed(*pair) for pair in pairs)), None)


def _type_name(value: object) -> str:
    kind = type(value)
    return (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else (f"{kind.__module__}.{kind.__qualname__}")
    )


# -- outcomes -------------------------------------------------------------------------------------

#: What an outcome begins with: what this is, and of which version.
_MAGIC = b"SF\x01"
_KINDS = {End.VALUE: b"V", End.ERROR: b"E", End.MISSING: b"M", End.LOST: b"X"}
_ENDS = {kind: end for end, kind in _KINDS.items()}
_DIGEST = 16
_HEAD = len(_MAGIC) + 1 + _DIGEST

#: Of an error's message and traceback no more characters than this are sent: of the traceback the
#: last ones.
_MESSAGE, _TRACEBACK = 4_096, 16_384


class Wire:
    """The part of a backend that needs to know neither files nor servers. See `Backend`.

    Args:
        namespace: Processes with one namespace meet.
        codec: For values.
        limit: Bytes that a sealed outcome may have.
    """

    def __init__(self, namespace: str, codec: Codec | None, limit: int) -> None:
        if type(namespace) is not str or not namespace:
            raise BackendError(f"namespace must be a str that is not empty, not {namespace!r}")
        if codec is None:
            codec = MessagePack()
        elif not isinstance(codec, Codec):
            raise BackendError(
                f"codec must have a name, encode(value) and decode(bytes), unlike {codec!r}"
            )
        if type(limit) is not int or limit < _HEAD:
            raise BackendError(f"limit must be an int of at least {_HEAD}, not {limit!r}")
        self.namespace = namespace
        self._codec = codec
        self._limit = limit
        self._seal_key = blake2b(codec.name.encode(), digest_size=32).digest()

    def name(self, flight: str | None, parts: tuple[Any, ...]) -> bytes:
        """See `Backend.name`."""
        return name_of(self.namespace, flight, parts)

    def seal(self, outcome: Outcome) -> bytes:
        """See `Backend.seal`."""
        body = b""
        if outcome.end is End.VALUE:
            body = self._codec.encode(outcome.value)
        elif outcome.end is End.ERROR:
            body = json.dumps(_describe(outcome.value)).encode()
        if len(body) + _HEAD > self._limit:
            raise TooLargeError(
                f"an outcome of {len(body)} bytes is more than the limit of {self._limit}"
            )
        kind = _KINDS[outcome.end]
        return b"".join((_MAGIC, kind, self._digest(kind, body), body))

    def open(self, sealed: Sealed) -> Outcome:
        """See `Backend.open`."""
        payload = sealed.payload
        body = payload[_HEAD:]
        kind = payload[len(_MAGIC) : len(_MAGIC) + 1]
        digest = payload[len(_MAGIC) + 1 : _HEAD]
        if not payload.startswith(_MAGIC) or kind not in _ENDS or len(payload) > self._limit:
            raise ValueError("this is no outcome, or one of another version")
        if digest != self._digest(kind, body):
            raise ValueError("an outcome is corrupt, or was written by another codec")
        end = _ENDS[kind]
        try:
            if end is End.ERROR:
                told = json.loads(body)
                if [type(text) for text in told] != [str, str, str]:
                    raise TypeError("no error")
                return Outcome(end, RemoteError(*told))
            return Outcome(end, self._codec.decode(body) if end is End.VALUE else None)
        except Exception as error:
            raise ValueError(f"an outcome can not be read: {error}") from error

    def _digest(self, kind: bytes, body: bytes) -> bytes:
        return blake2b(kind + body, digest_size=_DIGEST, key=self._seal_key).digest()


def _describe(error: Exception) -> tuple[str, str, str]:
    """The type, the message and the traceback of an error, as text."""
    if isinstance(error, RemoteError):  # of a flight in a flight: told as it was told
        return error.type_name, error.message, error.remote_traceback
    try:
        message = str(error)
    except Exception:  # noqa: BLE001 - a user's __str__
        message = "<its __str__ has failed>"
    try:
        text = "".join(traceback.format_exception(error))
    except Exception:  # noqa: BLE001 - as above
        text = ""
    return _type_name(error), message[:_MESSAGE], text[-_TRACEBACK:]
