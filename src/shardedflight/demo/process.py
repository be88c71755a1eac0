"""The server process: started, watched and ended."""

import asyncio
import dataclasses
import json
import resource
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from shardedflight.demo.errors import DemoError
from shardedflight.demo.server import Settings

T = TypeVar("T")

#: Where the server listens.
HOST = "127.0.0.1"

_PATIENCE = 5.0


def listen(port: int) -> socket.socket:
    """Takes the port, so that nobody else has it by the time the server starts."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        # Else a port stays taken for a while after the last run.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        raise DemoError(
            f"port {port} of {HOST} cannot be had ({error.strerror}): "
            "choose another with --port, or leave it out for a free one"
        ) from None
    return listener


def allow_open_files(number: int) -> None:
    """Sees to it that this process, and the server after it, may have so many files open."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and number > most:
        raise DemoError(
            f"{number} open files are needed and {most} allowed: "
            "ask for fewer --clients, or raise the limit with ulimit -Hn"
        )
    if allowed != resource.RLIM_INFINITY and number > allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, most))


class ServerProcess:
    """A running server."""

    def __init__(self, process: asyncio.subprocess.Process, address: str, log: Path) -> None:
        self._process = process
        self._log = log
        self.address = address

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    async def while_it_runs(self, work: Coroutine[Any, Any, T]) -> T:
        """Does the work; a server that ends meanwhile is a `DemoError`."""
        task = asyncio.ensure_future(work)
        ended = asyncio.ensure_future(self._process.wait())
        try:
            await asyncio.wait({task, ended}, return_when=asyncio.FIRST_COMPLETED)
            if task.done() and task.exception() is not None:
                # Work that fails may be the first to notice that the server is gone.
                await asyncio.wait({ended}, timeout=1)
            if ended.done():
                raise DemoError(self._obituary(ended.result()))
            return task.result()
        finally:
            task.cancel()
            ended.cancel()
            await asyncio.gather(task, ended, return_exceptions=True)

    def _obituary(self, status: int) -> str:
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        last_words = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"the server process ended before its time ({how}){last_words and ': '}{last_words}"


@asynccontextmanager
async def serving(
    listener: socket.socket, *, database: Path, shards: int | None, log: Path
) -> AsyncGenerator[ServerProcess]:
    """Starts the server on the listening socket, which it takes over, and ends it afterwards."""
    settings = Settings(socket=listener.fileno(), database=str(database), shards=shards)
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "shardedflight.demo.server",
            json.dumps(dataclasses.asdict(settings)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=errors,
            pass_fds=[listener.fileno()],
            # Ctrl-C is for the parent, which then ends the server.
            start_new_session=True,
        )
    try:
        host, port = listener.getsockname()
        # With the last copy of the socket ends the waiting of whoever still connects to it.
        listener.close()
        yield ServerProcess(process, f"http://{host}:{port}", log)
    finally:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    stdin = process.stdin
    if stdin is not None:
        stdin.close()
    try:
        await asyncio.wait_for(process.wait(), _PATIENCE)
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
