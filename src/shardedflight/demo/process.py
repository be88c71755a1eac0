"""The processes of the demo: started, watched and ended."""

import asyncio
import resource
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from shardedflight.demo.errors import DemoError

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


class Child:
    """A process that ends when its standard input closes."""

    def __init__(self, what: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self._what = what
        self._process = process
        self._log = log

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    async def line(self) -> str:
        """Returns the next line that it prints; of one that `answers`."""
        assert self._process.stdout is not None
        return (await self._process.stdout.readline()).decode()

    async def ended(self) -> None:
        """Raises `DemoError` when the process has ended."""
        raise DemoError(self._obituary(await self._process.wait()))

    def _obituary(self, status: int) -> str:
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        last_words = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return (
            f"the {self._what} process ended before its time ({how})"
            f"{last_words and ': '}{last_words}"
        )


async def while_they_run(children: Sequence[Child], work: Coroutine[Any, Any, T]) -> T:
    """Does the work; a process that ends meanwhile is a `DemoError`."""
    task = asyncio.ensure_future(work)
    ends = [asyncio.ensure_future(child.ended()) for child in children]
    try:
        await asyncio.wait({task, *ends}, return_when=asyncio.FIRST_COMPLETED)
        if ends and task.done() and task.exception() is not None:
            # Work that fails may be the first to notice that a process is gone.
            await asyncio.wait(ends, timeout=1, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            if end.done():
                end.result()
        return task.result()
    finally:
        for future in (task, *ends):
            future.cancel()
        await asyncio.gather(task, *ends, return_exceptions=True)


@asynccontextmanager
async def child(
    what: str,
    module: str,
    argument: str,
    *,
    log: Path,
    pass_fds: Sequence[int] = (),
    answers: bool = False,
) -> AsyncGenerator[Child]:
    """Starts a process and ends it afterwards.

    Args:
        what: What it is to users.
        module: Of this package.
        argument: Its only one.
        log: The file for its standard error.
        pass_fds: What it inherits.
        answers: Whether what it prints is read.
    """
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            f"shardedflight.demo.{module}",
            argument,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE if answers else asyncio.subprocess.DEVNULL,
            stderr=errors,
            pass_fds=pass_fds,
            # Ctrl-C is for the parent, which then ends the process.
            start_new_session=True,
        )
    try:
        yield Child(what, process, log)
    finally:
        await _end(process)


@asynccontextmanager
async def serving(
    listeners: Sequence[socket.socket], settings: Callable[[int], str], directory: Path
) -> AsyncGenerator[list[Child]]:
    """Starts a server on each listening socket, which it takes over, and ends it afterwards.

    Args:
        listeners: The sockets.
        settings: Called with the descriptor of a socket; what the server is told.
        directory: For logs.
    """
    async with AsyncExitStack() as stack:
        servers: list[Child] = []
        for number, listener in enumerate(listeners, 1):
            descriptor = listener.fileno()
            log = directory / f"server-{number}.log"
            server = child("server", "server", settings(descriptor), log=log, pass_fds=[descriptor])
            servers.append(await stack.enter_async_context(server))
            # With the last copy of the socket ends the waiting of whoever still connects to it.
            listener.close()
        yield servers


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
