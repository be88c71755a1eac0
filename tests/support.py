"""What the tests share: threads whose outcome can be asked for, and waiting for a state."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
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
