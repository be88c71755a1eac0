"""What a process has: threads, descriptors, memory. And what is left in a flight's tables."""

import gc
import os
import resource
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

from shardedflight import ShardedFlight, _core, _deadlock

__all__ = ["census", "left_behind"]

_DESCRIPTORS = Path("/proc/self/fd")
_MEMORY = Path("/proc/self/statm")


def census() -> dict[str, int]:
    """How much of everything this process has now, after a collection of garbage."""
    for _ in range(3):
        gc.collect()
    found = {
        "threads": threading.active_count(),
        "blocks": sys.getallocatedblocks(),
        "kilobytes": _resident(),
    }
    if _DESCRIPTORS.exists():
        found["descriptors"] = len(os.listdir(_DESCRIPTORS))  # noqa: PTH208 - one call
    if tracemalloc.is_tracing():
        found["traced"] = tracemalloc.get_traced_memory()[0] // 1024
    return found


def _resident() -> int:
    """Resident memory; where the system does not tell, the most there ever was."""
    if _MEMORY.exists():
        return int(_MEMORY.read_text().split()[1]) * resource.getpagesize() // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def left_behind(flight: ShardedFlight, patience: float = 0.0) -> list[str]:
    """What a quiet flight must not have any more, as text.

    Args:
        flight: That nobody calls any more.
        patience: Seconds for those who are still about it. An execution is not in flight any more
            before its record is dropped, and the end of a closed loop's is told on a thread that
            nobody waits for.
    """
    deadline = time.monotonic() + patience
    while (found := _left(flight)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def _left(flight: ShardedFlight) -> list[str]:
    found: list[tuple[str, Any]] = [
        ("executions", flight._executions()),
        ("late ends", _core.late),
        *(("blocked threads", blocked) for blocked in _deadlock._blocked),
        ("backend's calls", {} if flight._tier is None else flight._tier._abroad),
    ]
    for shard in flight._made_shards():
        found += [("records", shard.met), ("overflow", shard.overflow)]
    return [f"{flight!r} has {what} left: {things!r}" for what, things in found if things]
