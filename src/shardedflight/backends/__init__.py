"""Backends: where the flights of several processes meet.

`host.HostBackend` joins the processes of one machine, `redis.RedisBackend` those of many. Each is
imported from its own module, with what its extra installs.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Protocol, runtime_checkable

from shardedflight._tier import Lead as Lead
from shardedflight._tier import Outcome as Outcome
from shardedflight._tier import Sealed as Sealed
from shardedflight._tier import Turn as Turn
from shardedflight._tier import token as _token

from ._protocol import Codec as Codec
from ._protocol import MessagePack as MessagePack

__all__ = [
    "Backend",
    "Codec",
    "Lead",
    "MessagePack",
    "Outcome",
    "Sealed",
    "Turn",
    "fencing_token",
]


@runtime_checkable
class Backend(Protocol):
    """What a flight asks of a backend. All methods may be called on any thread.

    It promises efficiency, not mutual exclusion: under faults a function may run more than once,
    but every call is answered. Of those with `here`: if it is true, the calling thread may do the
    I/O and block meanwhile; if not, the backend's threads do it. What it can not do fails with
    `BackendError`, within the backend's timeout.
    """

    def name(self, flight: str | None, parts: tuple[Any, ...]) -> bytes:
        """What the key with these parts is called, of flights of this name. No two have one name.

        Raises:
            TypeError: The key can not leave the process.
        """
        ...

    def join(self, wanted: Sequence[tuple[bytes, int]], here: bool) -> Sequence[Turn]:
        """Leads or follows the execution of each name.

        Args:
            wanted: Names, each with the token of an outcome that is not wanted, for it could not
                be read; or 0.
            here: See above.

        Returns:
            A turn for each. Cancelling one leaves the execution.
        """
        ...

    def seal(self, outcome: Outcome) -> bytes:
        """Makes bytes of an outcome.

        Raises:
            TypeError: The value would come back changed.
        """
        ...

    def open(self, sealed: Sealed) -> Outcome:
        """Reads an outcome.

        Raises:
            ValueError: The bytes are not what `seal` has made, here or elsewhere.
        """
        ...

    def finish(self, ended: Sequence[tuple[Lead, bytes]], here: bool) -> "Sequence[Future[int]]":
        """Ends leads with their outcomes.

        Returns:
            For each how many other processes are served; -1 if a newer leader has taken its place,
            so that nobody is.
        """
        ...

    def give_up(self, lead: Lead) -> None:
        """Hands a lead over to another process, at once. Does not block."""
        ...

    def forget(self, name: bytes, lead: Lead | None = None) -> "Future[None]":
        """Makes the execution of a name unjoinable, in all processes. Does not block.

        Args:
            name: The name.
            lead: If given, only the execution of this lead is meant, none that has replaced it.
        """
        ...


def fencing_token() -> int | None:
    """The fencing token of the execution in whose function this is called.

    It is greater than those of all executions that were begun before for the same key, in any
    process. A resource that refuses writes with a smaller token than the greatest it has seen is
    safe from a leader that was replaced and does not know.

    Returns:
        The token; None outside of an execution, if it runs for its own process alone, or for
        several keys, of which each has its own.
    """
    return _token.get()
