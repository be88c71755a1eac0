"""How what several processes have counted adds up. Times are of the system's monotonic clock."""

from collections.abc import Sequence


def most_at_once(starts: Sequence[float], ends: Sequence[float], since: float, until: float) -> int:
    """Returns how many ran at once at the most, of all that started and ended at these times.

    Args:
        starts: When each started.
        ends: When each ended; those that still run have none.
        since: Only what starts from here on is looked at,
        until: and up to here.
    """
    changes = [(at, 1) for at in starts if at <= until] + [(at, -1) for at in ends if at <= until]
    running = most = 0
    for at, change in sorted(changes):
        running += change
        if at >= since:
            most = max(most, running)
    return most


def summed(series: Sequence[Sequence[tuple[float, int]]]) -> list[tuple[float, int]]:
    """Returns the sum of step functions: at each time of any of them, the latest values of all."""
    latest = [0] * len(series)
    steps = sorted((at, which, number) for which, one in enumerate(series) for at, number in one)
    total: list[tuple[float, int]] = []
    for at, which, number in steps:
        latest[which] = number
        total.append((at, sum(latest)))
    return total
