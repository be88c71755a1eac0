"""What `stats()` has to say of a window, by what its callers saw.

Where nobody leaves, every total is known. A caller that is cancelled may have been counted as
served a moment before, and its function may have been counted as an execution though it had not
come to its first step: then a total lies between two numbers. All totals of a window are compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from proof.histories import SERVED, Call, End, Execution, History, Outcome
from shardedflight import Stats

from .mix import Mix

__all__ = ["Range", "compare", "expected"]

_LEFT = (Outcome.LEFT, Outcome.CLOSED)


@dataclass(frozen=True, slots=True)
class Range:
    """A total lies in it, both ends included."""

    least: int
    most: int

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least} to {self.most}"


def expected(mix: Mix, remote: int) -> dict[str, Range]:
    """The totals of a window.

    Args:
        mix: What has run.
        remote: How many executions had their outcome from another process.
    """
    history = mix.history
    calls = history.calls
    leaving = mix.mood.leaving
    runs = len(history.executions)
    followed = [call for call in calls if not call.led]
    left = sum(call.outcome in _LEFT for call in followed)
    timed_out = sum(call.outcome is Outcome.TIMED_OUT for call in calls)
    # With a backend it may have led its process and have waited for another one.
    unbegun = left + (timed_out if mix.mood.meets else 0)
    served = sum(call.outcome in SERVED or call.outcome is Outcome.UNTOLD for call in followed)
    lost = sum(e.end is not End.VALUE for e in history.executions.values())
    refused = sum(call.outcome is Outcome.REFUSED for call in calls)
    failed = list(_failed(history, leaving))
    cancelled = len(mix.cancelled)
    led_left = sum(call.outcome in _LEFT for call in calls if call.led)
    return {
        "executions": Range(runs + remote, runs + remote + unbegun),
        "shared": Range(served - remote, served - remote + left),
        "errors": Range(
            sum(told for _, told in failed),
            len(failed) + remote,
        ),
        "promotions": Range(0, lost + unbegun),
        "timeouts": Range(timed_out, timed_out),
        "abandoned": Range(cancelled, led_left + unbegun) if leaving else Range(0, 0),
        "forgotten": _forgotten(mix),
        "deadlocks": Range(refused, refused + (left if leaving else 0)),
    }


def _forgotten(mix: Mix) -> Range:
    if mix.mood.meets:  # forgotten by other processes, too
        return Range(0, len(mix.history.calls))
    if mix.mood.leaving:
        return Range(0, len(mix.history.forgets))
    return Range(len(mix.forgot_itself), len(mix.forgot_itself))


def _failed(history: History, leaving: bool) -> Iterator[tuple[Execution, bool]]:
    """Executions that failed, and whether that was certainly their end."""
    calls: dict[int, Call] = {call.number: call for call in history.calls}
    for execution in history.executions.values():
        if execution.end is End.ERROR:
            outcome = calls[execution.call].outcome
            yield execution, not leaving or outcome in (Outcome.ERROR, Outcome.UNTOLD)


def compare(mix: Mix, before: Stats, after: Stats) -> list[str]:
    """The totals that are not what they have to be, as text."""
    remote = after.remote_follows - before.remote_follows
    wrong: list[str] = []
    for name, allowed in expected(mix, remote).items():
        counted = getattr(after, name) - getattr(before, name)
        if not allowed.least <= counted <= allowed.most:
            wrong.append(f"stats().{name} counted {counted}, and the callers {allowed}")
    if after.in_flight or after.waiting or any(after.per_shard):
        wrong.append(f"not everything has ended: {after}")
    return wrong
