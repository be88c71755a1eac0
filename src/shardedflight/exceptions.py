"""The errors that this package raises of its own. A function's own error is never wrapped."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

__all__ = [
    "BackendError",
    "DeadlockError",
    "FlightError",
    "FlightErrorGroup",
    "FlightTimeout",
    "InvalidShardsError",
    "RemoteError",
]


def shown(key: object) -> str:
    """The `repr` of a key, in an error's message that its failure must not replace."""
    try:
        return repr(key)
    except Exception:  # noqa: BLE001 - the key's own, and none of the caller's
        return f"<{type(key).__name__} whose repr raises>"


class FlightError(Exception):
    """Base of the errors of this package."""


class InvalidShardsError(FlightError, ValueError):
    """The number of shards is not a power of two of at least 1."""

    def __init__(self, shards: object) -> None:
        super().__init__(
            f"shards must be a power of two, at least 1 (1, 2, 4, 8, ...), not {shards!r}"
        )
        self.shards = shards


class DeadlockError(FlightError):
    """Waiting would never have ended.

    Attributes:
        keys: The keys in the order in which each one's function waits for the next. In a cycle
            the first one stands at the end again. Where a blocking call would have stopped the
            event loop that an execution needs, they are the keys from the wanted one to that
            execution's.
    """

    def __init__(self, message: str, keys: tuple[Hashable, ...]) -> None:
        super().__init__(message)
        self.keys = keys


class FlightTimeout(FlightError, TimeoutError):
    """A follower has waited for its `timeout` seconds and has left. The execution goes on."""


class BackendError(FlightError):
    """A backend could not do what it was asked to."""


class RemoteError(FlightError):
    """A function has failed in another process. Its exception itself stays there.

    The other process's traceback is a note of this exception, so that it is printed with it.

    Attributes:
        type_name: The type of the exception, with its module.
        message: What it says.
        remote_traceback: Its traceback, as text.
    """

    def __init__(self, type_name: str, message: str, remote_traceback: str) -> None:
        super().__init__(f"{type_name}: {message}" if message else type_name)
        self.type_name = type_name
        self.message = message
        self.remote_traceback = remote_traceback
        if remote_traceback:
            self.add_note(remote_traceback)


class FlightErrorGroup(FlightError, ExceptionGroup[Exception]):
    """Some keys of a `do_many` failed. The exceptions in the group are one for each failed key.

    Attributes:
        failed: The failed keys, each with its exception, in the order in which they were asked.
        found: The keys that succeeded, each with its `(value, shared)`.
    """

    failed: Mapping[Any, Exception]
    found: Mapping[Any, tuple[Any, bool]]

    def __new__(
        cls, failed: Mapping[Any, Exception], found: Mapping[Any, tuple[Any, bool]]
    ) -> "FlightErrorGroup":
        """Makes a group of the failed keys' exceptions."""
        names = ", ".join(map(shown, failed))
        message = f"{len(failed)} of {len(failed) + len(found)} keys failed: {names}"
        group = super().__new__(cls, message, list(failed.values()))
        group.failed = failed
        group.found = found
        return group

    def __init__(
        self, failed: Mapping[Any, Exception], found: Mapping[Any, tuple[Any, bool]]
    ) -> None:
        """Makes a group of the failed keys' exceptions."""
        super().__init__(self.message, self.exceptions)  # what the base takes, not what we take

    def derive(self, excs: Sequence[Any], /) -> "ExceptionGroup[Any]":
        """The part of this group that `except*` or `split` picks, with the same `found`."""
        chosen = {id(error) for error in excs}
        failed = {key: error for key, error in self.failed.items() if id(error) in chosen}
        if len(failed) != len(excs):  # somebody nests what was not ours: keep what was asked for
            return super().derive(excs)
        return FlightErrorGroup(failed, self.found)
