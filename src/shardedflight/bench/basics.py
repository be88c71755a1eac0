"""What the benchmarks have in common: the clock, the functions that are called, and checks."""

import asyncio
import sys
import threading
import time

import shardedflight

#: Which form of the library this process has: compiled by Cython, or plain Python.
FORM = "compiled" if getattr(shardedflight, "__compiled__", False) else "plain"

#: Where nothing waits for another thread, the clock is the processor time of the process: a machine
#: that is busy with other things would stretch the longer side of a pair more than the shorter one.
#: Windows counts processor time in steps that are longer than a round.
clock = time.perf_counter_ns if sys.platform == "win32" else time.process_time_ns


def constant() -> int:
    """The function of all rows that are about everything but the function."""
    return 1


async def constant_async() -> int:
    """As `constant`; it never suspends."""
    return 1


async def suspends_once() -> int:
    """Suspends the way that costs the loop least."""
    await asyncio.sleep(0)
    return 1


def keys_in_order(count: int, name: str = "item") -> list[str]:
    """Makes `count` keys that differ."""
    return [f"{name} {number}" for number in range(count)]


def await_all(arrived: threading.Semaphore, count: int) -> None:
    """Waits until `count` threads have arrived."""
    for _ in range(count):
        arrived.acquire()


def expect(found: object, expected: object, what: str) -> None:
    """Refuses to measure something else than what the row claims.

    Raises:
        RuntimeError: `found` is not `expected`.
    """
    if found != expected:
        raise RuntimeError(f"{what}: expected {expected!r}, found {found!r}")
