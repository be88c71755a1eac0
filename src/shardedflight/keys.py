"""Ready-made key builders and hashes for `ShardedFlight(build_key=, hash=)`.

A flight needs neither: by default one part is its own key, several parts are a tuple, and Python's
own hash picks the shard. These are for those who come from Go, or share keys with other programs.
"""

from collections.abc import Callable
from typing import Any, Final

__all__ = ["concat_key", "fnv1a_64", "join_key"]

_FNV_OFFSET: Final = 0xCBF29CE484222325
_FNV_PRIME: Final = 0x100000001B3
_MASK_64: Final = 0xFFFFFFFFFFFFFFFF


def concat_key(*parts: Any) -> str:
    """Joins the parts' texts without a separator, as the default of Go's ShardedFlight does.

    It collides: `("ab", "c")` and `("a", "bc")` are one key. It is here for keys that must equal
    those of a Go program; prefer the flight's default.
    """
    return "".join(map(str, parts))


def join_key(separator: str) -> Callable[..., str]:
    """Makes a key builder that joins the parts' texts with `separator`.

    Parts that contain the separator can still collide: choose one that no part contains.

    Raises:
        TypeError: `separator` is not a `str`.
    """
    if not isinstance(separator, str):
        raise TypeError(f"separator must be a str, not {separator!r}")

    def build_key(*parts: Any) -> str:
        return separator.join(map(str, parts))

    return build_key


def fnv1a_64(data: str | bytes) -> int:
    """The 64-bit FNV-1a hash of `data`; text is hashed as its UTF-8 bytes.

    Constants and test vectors: http://www.isthe.com/chongo/tech/comp/fnv/. It is Go's default.
    In pure Python it takes far longer than Python's own hash, which is the flight's default.

    Returns:
        An int in [0, 2**64).

    Raises:
        TypeError: `data` is neither `str` nor `bytes`.
    """
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    elif not isinstance(data, bytes):
        raise TypeError(f"fnv1a_64 hashes str or bytes, not {data!r}")
    value = _FNV_OFFSET
    for byte in data:
        value = (value ^ byte) * _FNV_PRIME & _MASK_64
    return value
