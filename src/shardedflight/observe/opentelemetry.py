"""Traces and metrics of flights for OpenTelemetry (extra `opentelemetry`).

Each execution is a span, current while the leader's function runs, so that the function's own spans
are its children. Each follower's wait is a span as well, where that follower is, with a link to the
span of the execution that it waits for. A leader on an executor's thread (`do_future`) has no
parent: threads do not inherit what is current.

Metrics are those of `stats()`, read when the reader collects, and two histograms. Neither they nor
the spans' names hold a key; spans have it as an attribute if that is asked for.
"""

import importlib.metadata
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar, Token
from typing import Any

from opentelemetry import context, metrics, trace
from opentelemetry.metrics import CallbackOptions, Histogram, MeterProvider, Observation
from opentelemetry.trace import Link, Span, SpanContext, Status, StatusCode, TracerProvider

from shardedflight import ShardedFlight, Stats
from shardedflight.observe import (
    Departure,
    End,
    Ended,
    Joined,
    Left,
    ObservedExecution,
    Observer,
    Started,
)

from ._buckets import BUCKETS
from ._flights import Flights

__all__ = ["FlightTelemetry"]

_FLIGHT = "shardedflight.flight"
_ROLE = "shardedflight.role"

#: Name, unit, description, and what it is in `Stats`.
_TOTALS: tuple[tuple[str, str, str, Callable[[Stats], int]], ...] = (
    ("errors", "{execution}", "Executions that ended with an exception.", lambda s: s.errors),
    (
        "promotions",
        "{call}",
        "Followers that took over from a lost leader.",
        lambda s: s.promotions,
    ),
    ("timeouts", "{call}", "Followers that left after their timeout.", lambda s: s.timeouts),
    (
        "abandoned",
        "{execution}",
        "Executions that were given up because their last caller had left.",
        lambda s: s.abandoned,
    ),
    (
        "forgotten",
        "{execution}",
        "Executions that were made unjoinable by forget.",
        lambda s: s.forgotten,
    ),
    (
        "deadlocks",
        "{call}",
        "Calls that were refused because they would never end.",
        lambda s: s.deadlocks,
    ),
)
_GAUGES: tuple[tuple[str, str, str, Callable[[Stats], int]], ...] = (
    ("executions.in_flight", "{execution}", "Executions running now.", lambda s: s.in_flight),
    ("waiters", "{call}", "Followers waiting now.", lambda s: s.waiting),
    ("shards", "{shard}", "Shards of the flight.", lambda s: len(s.per_shard)),
    (
        "busiest_shard.executions",
        "{execution}",
        "Executions running now in the shard that has most of them.",
        lambda s: max(s.per_shard),
    ),
)

#: The meter providers that have these instruments: a second set would be ignored by the SDK.
_instrumented: "weakref.WeakSet[MeterProvider]" = weakref.WeakSet()


class FlightTelemetry:
    """Spans and metrics of any number of flights.

    Flights are not kept alive, and one that is gone leaves the metrics. All methods may be called
    from any thread.

    Args:
        *flights: Those to watch from the start. Each has a name.
        tracer_provider: Makes the spans. By default the global one.
        meter_provider: Makes the metrics. By default the global one.
        key: Makes an attribute of the spans, `shardedflight.key`, out of a key, such as `repr`. By
            default spans have none: keys can be sensitive.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: The meter provider has such metrics already, or a flight has no name or that of
            another one.
    """

    def __init__(
        self,
        *flights: ShardedFlight,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        key: Callable[[Any], str] | None = None,
    ) -> None:
        for what, provider, kind in (
            ("tracer_provider", tracer_provider, TracerProvider),
            ("meter_provider", meter_provider, MeterProvider),
        ):
            if provider is not None and not isinstance(provider, kind):
                raise TypeError(f"{what} must be a {kind.__name__} or None, not {provider!r}")
        if key is not None and not callable(key):
            raise TypeError(f"key must be callable or None, not {key!r}")
        meters = meter_provider if meter_provider is not None else metrics.get_meter_provider()
        if meters in _instrumented:
            raise ValueError(
                "the meter provider has a FlightTelemetry already: add further flights to that one"
            )
        version = importlib.metadata.version("shardedflight")
        meter = metrics.get_meter("shardedflight", version, meter_provider)
        self._key = key
        self._tracer = trace.get_tracer("shardedflight", version, tracer_provider)
        self._executions = meter.create_histogram(
            "shardedflight.execution.duration",
            "s",
            "How long the leaders' functions ran.",
            # A view of the meter provider's can set others.
            explicit_bucket_boundaries_advisory=BUCKETS,
        )
        self._waits = meter.create_histogram(
            "shardedflight.wait.duration",
            "s",
            "How long followers waited, however that ended.",
            explicit_bucket_boundaries_advisory=BUCKETS,
        )
        self._flights = Flights()
        try:
            for flight in flights:
                self.add(flight)
        except BaseException:
            for _, flight in self._flights.alive():
                self.remove(flight)
            raise
        _instrumented.add(meters)
        meter.create_observable_counter(
            "shardedflight.calls",
            [self._observe_calls],
            "{call}",
            "Calls, by role. leader: whose own function ran, also by taking over. follower: served "
            "by somebody else's execution. One for many keys counts for each key.",
        )
        for name, unit, description, value in _TOTALS:
            meter.create_observable_counter(
                f"shardedflight.{name}", [self._observing(value)], unit, description
            )
        for name, unit, description, value in _GAUGES:
            meter.create_observable_up_down_counter(
                f"shardedflight.{name}", [self._observing(value)], unit, description
            )

    def add(self, flight: ShardedFlight, name: str | None = None) -> None:
        """Watches one more flight.

        Args:
            flight: Which.
            name: The attribute `shardedflight.flight` of what is told of it, and a part of its
                spans' names; by default its own name.

        Raises:
            TypeError: `flight` is no flight, or the name no str.
            ValueError: It has no name, or is watched already, or another one of that name is.
        """
        self._flights.add(flight, name, self._observer_of)

    def remove(self, flight: ShardedFlight) -> None:
        """Watches a flight no more.

        Raises:
            ValueError: It was not watched.
        """
        self._flights.remove(flight)

    def _observer_of(self, name: str) -> Observer:
        return _Telling(name, self._tracer, self._executions, self._waits, self._key)

    def _observe_calls(self, _: CallbackOptions) -> Iterable[Observation]:
        for name, flight in self._flights.alive():
            stats = flight.stats()
            yield Observation(stats.executions, {_FLIGHT: name, _ROLE: "leader"})
            yield Observation(stats.shared, {_FLIGHT: name, _ROLE: "follower"})

    def _observing(
        self, value: Callable[[Stats], int]
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            for name, flight in self._flights.alive():
                yield Observation(value(flight.stats()), {_FLIGHT: name})

        return observe


#: The start that was told in this context, as long as its end was not.
_here: ContextVar[Started | None] = ContextVar("shardedflight.started", default=None)


class _Run:
    """The span of an execution, and what its end has to put back if it is the current one."""

    __slots__ = ("_current", "_marked", "span")

    def __init__(self, span: Span) -> None:
        self.span = span
        self._current: Token[context.Context] | None = None
        self._marked: Token[Started | None] | None = None

    def enter(self, started: Started) -> None:
        """Makes the span the current one."""
        self._marked = _here.set(started)
        self._current = context.attach(trace.set_span_in_context(self.span))

    def leave(self, started: Started) -> None:
        """Puts back what was current, unless this is another thread or task."""
        if self._current is not None and self._marked is not None and _here.get() is started:
            context.detach(self._current)
            _here.reset(self._marked)


class _Telling(Observer):
    """Tells of one flight."""

    def __init__(
        self,
        name: str,
        tracer: trace.Tracer,
        executions: Histogram,
        waits: Histogram,
        key: Callable[[Any], str] | None,
    ) -> None:
        self._name = name
        self._attributes = {_FLIGHT: name}
        self._tracer = tracer
        self._executions = executions
        self._waits = waits
        self._key = key
        #: Each is put in by the event of a beginning and taken out by that of its end.
        self._runs: dict[Started, _Run] = {}
        self._visits: dict[Joined, tuple[Span, SpanContext | None]] = {}
        #: The span that leads each execution, or that led it last; followers ask for it.
        self._leading: weakref.WeakKeyDictionary[ObservedExecution, SpanContext] = (
            weakref.WeakKeyDictionary()
        )
        #: What was current before a batch of several executions, by the first of them.
        self._before: weakref.WeakKeyDictionary[ObservedExecution, context.Context] = (
            weakref.WeakKeyDictionary()
        )

    def _span(
        self,
        what: str,
        execution: ObservedExecution,
        role: str,
        parent: context.Context | None,
        links: Sequence[Link],
    ) -> Span:
        attributes = {_FLIGHT: self._name, _ROLE: role}
        if self._key is not None:
            attributes["shardedflight.key"] = self._key(execution.key)
        return self._tracer.start_span(
            f"{what} {self._name}", parent, attributes=attributes, links=links
        )

    def execution_started(self, event: Started, /) -> None:
        first = event.batch[0]
        leads = event.execution is first
        if leads and len(event.batch) > 1:
            self._before[first] = context.get_current()
        # All of a batch are siblings: the first is current by now.
        parent = None if leads else self._before.get(first)
        span = self._span("execution", event.execution, "leader", parent, ())
        span.set_attribute("shardedflight.promoted", event.promoted)
        self._leading[event.execution] = span.get_span_context()
        run = self._runs[event] = _Run(span)
        if leads:
            run.enter(event)

    def execution_ended(self, event: Ended, /) -> None:
        self._executions.record(event.seconds, self._attributes)
        run = self._runs.pop(event.started, None)
        if run is None:  # its start has raised an error
            return
        run.leave(event.started)
        span = run.span
        span.set_attribute("shardedflight.end", event.end.value)
        if event.end is End.ERROR and event.error is not None:
            span.record_exception(event.error)
            span.set_status(Status(StatusCode.ERROR, type(event.error).__qualname__))
        span.end()

    def follower_joined(self, event: Joined, /) -> None:
        # None: the function has not begun.
        leader = self._leading.get(event.execution)
        links = () if leader is None else (Link(leader),)
        span = self._span("wait", event.execution, "follower", None, links)
        self._visits[event] = (span, leader)

    def follower_left(self, event: Left, /) -> None:
        self._waits.record(event.seconds, self._attributes)
        span, linked = self._visits.pop(event.joined, (None, None))
        if span is None:  # its coming has raised an error
            return
        leader = self._leading.get(event.execution)
        if leader is not None and leader is not linked:  # it has begun since, or was taken over
            span.add_link(leader)
        span.set_attribute("shardedflight.departure", event.departure.value)
        if event.departure in (Departure.FAILED, Departure.TIMED_OUT):
            span.set_status(Status(StatusCode.ERROR, event.departure.value))
        span.end()
