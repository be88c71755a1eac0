"""What was measured."""

import math
from dataclasses import dataclass
from typing import Any

from shardedflight.demo.server import RouteName


@dataclass(frozen=True, slots=True, kw_only=True)
class Stampede:
    """All clients at once asking for the hot item."""

    #: Seconds after the load's beginning.
    began: float
    ended: float
    requests: int
    queries: int
    queries_at_once: int

    @property
    def seconds(self) -> float:
        """Seconds until the last client had its answer."""
        return self.ended - self.began


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteFigures:
    """One route under load, the stampede included."""

    seconds: float
    #: All of them, failed ones too.
    requests: int
    #: What went wrong, and how often.
    failures: dict[str, int]
    queries: int
    queries_at_once: int
    #: Seconds that each good answer took, ascending.
    latencies: list[float]
    #: Seconds after the load's beginning, and executions in flight then.
    in_flight: list[tuple[float, int]]
    stampede: Stampede

    @property
    def failed(self) -> int:
        """How many requests failed."""
        return sum(self.failures.values())

    @property
    def per_second(self) -> float:
        """Good answers per second."""
        return len(self.latencies) / self.seconds

    def percentile(self, percent: float) -> float | None:
        """Milliseconds within which so many percent of the good answers came."""
        if not self.latencies:
            return None
        return self.latencies[math.ceil(len(self.latencies) * percent / 100) - 1] * 1000

    def as_json(self) -> dict[str, Any]:
        """The figures without the single latencies and samples."""
        return {
            "requests": self.requests,
            "failed": self.failed,
            "failures": self.failures,
            "queries": self.queries,
            "queries_at_once": self.queries_at_once,
            "seconds": round(self.seconds, 3),
            "qps": round(self.per_second, 1),
            "latency_ms": {
                f"p{percent}": None if value is None else round(value, 3)
                for percent in (50, 95, 99)
                for value in [self.percentile(percent)]
            },
            "stampede": {
                "requests": self.stampede.requests,
                "queries": self.stampede.queries,
                "queries_at_once": self.stampede.queries_at_once,
                "seconds": round(self.stampede.seconds, 3),
            },
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """All routes under the same load, in the order in which they were measured."""

    routes: dict[RouteName, RouteFigures]
    #: What the flights of a route said of themselves in the end: their shards, and `stats()`.
    stats: dict[RouteName, dict[str, int]]

    @property
    def failed(self) -> int:
        """How many requests failed on any route."""
        return sum(route.failed for route in self.routes.values())
