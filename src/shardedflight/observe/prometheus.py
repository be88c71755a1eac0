"""Metrics of flights for Prometheus, by `prometheus_client` (extra `prometheus`).

Totals and gauges are those of `stats()`, read when somebody scrapes; only the histograms are fed as
it happens. No metric has a label for keys: `flight` is the flight's name, and that is all but for
`role`.

In the multiprocess mode of `prometheus_client` whoever scrapes one process reads what all of them
have written into files. There is no asking `stats()` of the others then, so all is counted as it
happens, by observing. Nobody tells an observer of what is forgotten or refused as a deadlock, nor
of an execution that is abandoned before it began: there those are missing.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, values
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shardedflight import ShardedFlight
from shardedflight.observe import Departure, End, Ended, Joined, Left, Observer, Started

from ._buckets import BUCKETS
from ._flights import Flights

if TYPE_CHECKING:
    from shardedflight import Stats

__all__ = ["FlightMetrics"]

_CALLS = (
    "shardedflight_calls",
    """Calls, by role. leader: whose own function ran, also by taking over. follower: served by \
somebody else's execution. One for many keys counts for each key.""",
)
_IN_FLIGHT = ("shardedflight_executions_in_flight", "Executions running now.")
_WAITERS = ("shardedflight_waiters", "Followers waiting now.")
_SHARDS = ("shardedflight_shards", "Shards of the flight.")
_BUSIEST = (
    "shardedflight_busiest_shard_executions",
    "Executions running now in the shard that has most of them.",
)
_ERRORS = ("shardedflight_errors", "Executions that ended with an exception.")
_PROMOTIONS = ("shardedflight_promotions", "Followers that took over from a lost leader.")
_TIMEOUTS = ("shardedflight_timeouts", "Followers that left after their timeout.")
_ABANDONED = (
    "shardedflight_abandoned",
    "Executions that were given up because their last caller had left.",
)
_FORGOTTEN = ("shardedflight_forgotten", "Executions that were made unjoinable by forget.")
_DEADLOCKS = ("shardedflight_deadlocks", "Calls that were refused because they would never end.")
_OBSERVER_ERRORS = ("shardedflight_observer_errors", "Exceptions that observers have raised.")
_EXECUTION = ("shardedflight_execution_seconds", "How long the leaders' functions ran.")
_WAIT = ("shardedflight_wait_seconds", "How long followers waited, however that ended.")


class FlightMetrics(Collector):
    """The metrics of any number of flights in one registry of `prometheus_client`.

    Flights are not kept alive, and one that is gone leaves the metrics (in multiprocess mode, as
    everything there, it does not). All methods may be called from any thread.

    Args:
        *flights: Those to watch from the start. Each has a name.
        registry: Where the metrics are registered.
        buckets: Upper bounds of the histograms' buckets, in seconds, ascending.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: The registry has such metrics already, a flight has no name or that of another
            one, or the buckets do not ascend.
    """

    def __init__(
        self,
        *flights: ShardedFlight,
        registry: CollectorRegistry = REGISTRY,
        buckets: Sequence[float] = BUCKETS,
    ) -> None:
        if not isinstance(registry, CollectorRegistry):
            raise TypeError(f"registry must be a CollectorRegistry, not {registry!r}")
        self._flights = Flights()
        # As prometheus_client has chosen when it was imported.
        self._many_processes: bool = values.ValueClass._multiprocess
        target = registry if self._many_processes else None
        try:
            self._executions = Histogram(*_EXECUTION, ["flight"], registry=target, buckets=buckets)
            self._waits = Histogram(*_WAIT, ["flight"], registry=target, buckets=buckets)
            if self._many_processes:
                self._counted = _Counted(registry)
            else:
                registry.register(self)
        except ValueError as error:
            if "Duplicated" not in str(error):
                raise
            raise ValueError(
                "the registry has a FlightMetrics already: add further flights to that one"
            ) from error
        try:
            for flight in flights:
                self.add(flight)
        except BaseException:
            if not self._many_processes:
                registry.unregister(self)
            for _, flight in self._flights.alive():
                self._flights.remove(flight)
            raise

    def add(self, flight: ShardedFlight, name: str | None = None) -> None:
        """Watches one more flight.

        Args:
            flight: Which.
            name: The label `flight` of its metrics; by default its own name.

        Raises:
            TypeError: `flight` is no flight, or the name no str.
            ValueError: It has no name, or is watched already, or another one of that name is.
        """
        with self._flights.lock:
            self._drop_gone()
            self._flights.add(flight, name, self._observer_of)

    def remove(self, flight: ShardedFlight) -> None:
        """Watches a flight no more, and takes it out of the metrics.

        Raises:
            ValueError: It was not watched.
        """
        with self._flights.lock:
            self._drop(self._flights.remove(flight))

    def _observer_of(self, name: str) -> Observer:
        execution, wait = self._executions.labels(name), self._waits.labels(name)
        if self._many_processes:
            return _Counting(execution, wait, self._counted, name)
        return _Timing(execution, wait)

    def _drop_gone(self) -> None:
        with self._flights.lock:
            for name in self._flights.take_gone():
                self._drop(name)

    def _drop(self, name: str) -> None:
        if not self._many_processes:  # there nothing can be taken out again
            self._executions.remove(name)
            self._waits.remove(name)

    # -- what a registry calls --------------------------------------------------------------------

    def describe(self) -> Iterator[Metric]:
        """The metrics, empty: for the registry, which refuses what it has already."""
        yield from _families([])
        yield from self._executions.describe()
        yield from self._waits.describe()

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now."""
        self._drop_gone()
        yield from _families(self._flights.alive())
        yield from self._executions.collect()
        yield from self._waits.collect()


def _families(flights: list[tuple[str, ShardedFlight]]) -> list[Metric]:
    """What `stats()` says of each flight."""
    calls = CounterMetricFamily(*_CALLS, labels=["flight", "role"])
    in_flight, waiters, shards, busiest = gauges = [
        GaugeMetricFamily(*names, labels=["flight"])
        for names in (_IN_FLIGHT, _WAITERS, _SHARDS, _BUSIEST)
    ]
    errors, promotions, timeouts, abandoned, forgotten, deadlocks, observers = counters = [
        CounterMetricFamily(*names, labels=["flight"])
        for names in (
            _ERRORS,
            _PROMOTIONS,
            _TIMEOUTS,
            _ABANDONED,
            _FORGOTTEN,
            _DEADLOCKS,
            _OBSERVER_ERRORS,
        )
    ]
    for name, flight in flights:
        stats: Stats = flight.stats()
        calls.add_metric([name, "leader"], stats.executions)
        calls.add_metric([name, "follower"], stats.shared)
        in_flight.add_metric([name], stats.in_flight)
        waiters.add_metric([name], stats.waiting)
        shards.add_metric([name], len(stats.per_shard))
        busiest.add_metric([name], max(stats.per_shard))
        errors.add_metric([name], stats.errors)
        promotions.add_metric([name], stats.promotions)
        timeouts.add_metric([name], stats.timeouts)
        abandoned.add_metric([name], stats.abandoned)
        forgotten.add_metric([name], stats.forgotten)
        deadlocks.add_metric([name], stats.deadlocks)
        observers.add_metric([name], flight.observer_errors)
    return [calls, *gauges, *counters]


class _Timing(Observer):
    """Feeds the histograms of one flight."""

    def __init__(self, execution: Histogram, wait: Histogram) -> None:
        self._execution = execution
        self._wait = wait

    def execution_ended(self, event: Ended, /) -> None:
        self._execution.observe(event.seconds)

    def follower_left(self, event: Left, /) -> None:
        self._wait.observe(event.seconds)


class _Counted:
    """In multiprocess mode: the metrics that are otherwise read from `stats()`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels: Any = {"labelnames": ["flight"], "registry": registry}
        self.calls = Counter(*_CALLS, ["flight", "role"], registry=registry)
        self.in_flight = Gauge(*_IN_FLIGHT, **labels, multiprocess_mode="livesum")
        self.waiters = Gauge(*_WAITERS, **labels, multiprocess_mode="livesum")
        self.errors = Counter(*_ERRORS, **labels)
        self.promotions = Counter(*_PROMOTIONS, **labels)
        self.timeouts = Counter(*_TIMEOUTS, **labels)
        self.abandoned = Counter(*_ABANDONED, **labels)


class _Counting(_Timing):
    """In multiprocess mode: counts what happens in one flight."""

    def __init__(self, execution: Histogram, wait: Histogram, counted: _Counted, name: str) -> None:
        super().__init__(execution, wait)
        self._led = counted.calls.labels(name, "leader")
        self._followed = counted.calls.labels(name, "follower")
        self._in_flight = counted.in_flight.labels(name)
        self._waiters = counted.waiters.labels(name)
        self._promotions = counted.promotions.labels(name)
        self._timeouts = counted.timeouts.labels(name)
        self._ends = {
            End.ERROR: counted.errors.labels(name),
            End.ABANDONED: counted.abandoned.labels(name),
        }

    def execution_started(self, event: Started, /) -> None:
        self._led.inc()
        self._in_flight.inc()
        if event.promoted:
            self._promotions.inc()

    def execution_ended(self, event: Ended, /) -> None:
        super().execution_ended(event)
        self._in_flight.dec()
        if event.end in self._ends:
            self._ends[event.end].inc()

    def follower_joined(self, event: Joined, /) -> None:
        self._waiters.inc()

    def follower_left(self, event: Left, /) -> None:
        super().follower_left(event)
        self._waiters.dec()
        if event.departure in (Departure.SERVED, Departure.FAILED):
            self._followed.inc()
        elif event.departure is Departure.TIMED_OUT:
            self._timeouts.inc()
