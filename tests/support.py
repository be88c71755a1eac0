"""What the tests share: threads whose outcome can be asked for, and waiting for a state."""

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

#: Seconds after which a wait inside a test is a failure. No test's outcome depends on its size.
PATIENCE = 30.0


def spawn(function: Callable[..., Any], *args: Any, **kwargs: Any) -> "Future[Any]":
    """Runs `function` on a daemon thread of its own; the future has its result or any exception."""
    outcome: Future[Any] = Future()

    def body() -> None:
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(result)

    threading.Thread(target=body, daemon=True).start()
    return outcome


def spawn_loop(main: Callable[[], Awaitable[Any]]) -> "Future[Any]":
    """Runs the coroutine that `main` makes by `asyncio.run` on a daemon thread of its own."""

    async def body() -> Any:
        return await main()

    return spawn(lambda: asyncio.run(body()))


def eventually(condition: Callable[[], bool], what: str = "the condition") -> None:
    """Returns as soon as `condition()` is true; fails the test after `PATIENCE` seconds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not become true within {PATIENCE} s")
        time.sleep(0.001)


async def eventually_async(condition: Callable[[], bool], what: str = "the condition") -> None:
    """As `eventually`, leaving the event loop free to run."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not become true within {PATIENCE} s")
        await asyncio.sleep(0.001)


class Program:
    """A program that is terminated as soon as it has started what it starts. On Linux.

    Args:
        command: Its command line.
        mark: What no other process has in its environment.
        directory: Where it runs; None: where the tests do.
    """

    def __init__(self, command: list[str], mark: str, directory: Path | None = None) -> None:
        self._mark = f"SHARDEDFLIGHT_TEST={mark}".encode()
        self._process = subprocess.Popen(
            command,
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "SHARDEDFLIGHT_TEST": mark},
        )

    def started(self, word: str) -> list[int]:
        """The processes that it or they have started with this word in their command lines."""
        found: list[int] = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if word.encode() in (process / "cmdline").read_bytes() and (
                    self._mark in (process / "environ").read_bytes()
                ):
                    found.append(int(process.name))
            except OSError:  # it has ended, or is another user's
                pass
        return found

    def terminated(self, word: str, number: int) -> tuple[int, str]:
        """What it returned and printed, terminated with so many of them; none of them is left."""
        with self._process:
            try:
                while len(self.started(word)) != number:  # no longer than a test may take
                    assert self._process.poll() is None, "it has ended by itself"
                    time.sleep(0.01)
                self._process.terminate()
                # Children that were told to end need not have done so when it has.
                eventually(lambda: self.started(word) == [], f"the end of {word}")
                said, _ = self._process.communicate(timeout=PATIENCE)
            finally:
                self._process.kill()
                for process in self.started(word):
                    os.kill(process, signal.SIGKILL)
        return self._process.returncode, said.decode()
