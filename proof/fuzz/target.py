"""A target: cases, and what has to hold of each."""

import functools
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any, cast

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

__all__ = ["PATIENCE", "Held", "Target", "bare", "spawn"]

#: Seconds after which a call hangs. Nothing else depends on it.
PATIENCE = 20.0


@dataclass(frozen=True)
class Target:
    """What is fuzzed.

    Attributes:
        name: What it is called on the command line.
        about: What has to hold, in a line.
        cases: Makes cases.
        check: Raises if something does not hold of a case.
        weight: Cases to run of it, where others run 100.
    """

    name: str
    about: str
    cases: SearchStrategy[Any]
    check: Callable[[Any], None]
    weight: int = 100
    _count: list[int] = field(default_factory=lambda: [0])

    def counted(self) -> int:
        """How many cases have been checked, those that shrink a failing one included."""
        return self._count[0]

    def bound(
        self, hundred: int, start: int | None = None, *, shrink: bool = True
    ) -> Callable[[], None]:
        """A function that checks some cases, and raises if one fails.

        Args:
            hundred: How many cases to run where others run 100.
            start: The seed; without one the cases are always the same.
            shrink: Look for the smallest case that fails.
        """
        count, check = self._count, self.check

        def run(case: Any) -> None:
            count[0] += 1
            check(case)

        checked = settings(
            max_examples=max(1, self.weight * hundred // 100),
            database=None,
            deadline=None,
            derandomize=start is None,
            phases=[Phase.generate, Phase.shrink, Phase.explain] if shrink else [Phase.generate],
            report_multiple_bugs=False,
            suppress_health_check=cast("list[HealthCheck]", [*HealthCheck]),
        )(given(case=self.cases)(run))
        return checked if start is None else seed(start)(checked)


class Held(Executor):
    """Holds what it is given until it is told to run it, on the thread that tells."""

    def __init__(self) -> None:
        self.held: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """See `Executor`."""
        future: Future[Any] = Future()
        self.held.append((future, functools.partial(fn, *args, **kwargs)))
        return future

    def run_next(self) -> None:
        """Runs what has waited longest, if anything has."""
        if not self.held:
            return
        future, function = self.held.pop(0)
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)


def spawn(function: Callable[[], Any]) -> "Future[Any]":
    """Runs it on a daemon thread of its own; the future has what comes out."""
    outcome: Future[Any] = Future()

    def body() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=body, daemon=True).start()
    return outcome


def bare(error: BaseException | None) -> BaseException | None:
    """The error without what keeps frames alive."""
    return None if error is None else error.with_traceback(None)
