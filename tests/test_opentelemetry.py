"""Spans and metrics for OpenTelemetry, by the real SDK and its exporters into memory."""

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from support import PATIENCE, eventually, eventually_async, spawn

from shardedflight import FlightTimeout, ShardedFlight

pytest.importorskip("opentelemetry.sdk", reason="the extra `test` is not installed")
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import (
    InMemorySpanExporter,
)
from opentelemetry.trace import StatusCode

from shardedflight.observe._buckets import BUCKETS
from shardedflight.observe.opentelemetry import FlightTelemetry


@dataclass(frozen=True)
class Collected:
    """Both providers of one test, and what they were told."""

    tracers: TracerProvider
    meters: MeterProvider
    exporter: InMemorySpanExporter
    reader: InMemoryMetricReader

    def watch(self, *flights: ShardedFlight, **options: Any) -> FlightTelemetry:
        return FlightTelemetry(
            *flights, tracer_provider=self.tracers, meter_provider=self.meters, **options
        )

    def tracer(self) -> trace.Tracer:
        return self.tracers.get_tracer("test")

    def spans(self, name: str) -> list[ReadableSpan]:
        """The spans of that name that have ended, in the order of their ends."""
        return [span for span in self.exporter.get_finished_spans() if span.name == name]

    def span(self, name: str) -> ReadableSpan:
        (span,) = self.spans(name)
        return span

    def points(self) -> dict[tuple[str, str, str], Any]:
        """The data point of each metric, flight and role."""
        found: dict[tuple[str, str, str], Any] = {}
        data = self.reader.get_metrics_data()
        for resource in data.resource_metrics if data is not None else ():
            for scope in resource.scope_metrics:
                assert scope.scope.name == "shardedflight"
                for metric in scope.metrics:
                    for point in metric.data.data_points:
                        attributes = dict(point.attributes or {})
                        flight = str(attributes.pop("shardedflight.flight"))
                        role = str(attributes.pop("shardedflight.role", ""))
                        assert attributes == {}
                        found[metric.name, flight, role] = point
        return found


@pytest.fixture
def collected() -> Iterator[Collected]:
    exporter = InMemorySpanExporter()
    tracers = TracerProvider(shutdown_on_exit=False)
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    reader = InMemoryMetricReader()
    meters = MeterProvider([reader], shutdown_on_exit=False)
    yield Collected(tracers, meters, exporter, reader)
    tracers.shutdown()
    meters.shutdown()


def parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.span_id


def links_of(span: ReadableSpan) -> list[int]:
    return [link.context.span_id for link in span.links]


class Gate:
    """A function with a span of its own, which waits until it is let go."""

    def __init__(self, collected: Collected, error: BaseException | None = None) -> None:
        self.tracer = collected.tracer()
        self.error = error
        self.entered = threading.Event()
        self.opened = threading.Event()

    def __call__(self) -> str:
        with self.tracer.start_as_current_span("query"):
            self.entered.set()
            assert self.opened.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        return "value"

    async def coroutine(self) -> str:
        with self.tracer.start_as_current_span("query"):
            self.entered.set()
            await eventually_async(self.opened.is_set)
        if self.error is not None:
            raise self.error
        return "value"


def within(collected: Collected, name: str, call: Callable[..., Any], *args: Any) -> Any:
    """A caller with a span of its own, on a thread of its own."""

    def body() -> Any:
        with collected.tracer().start_as_current_span(name):
            return call(*args)

    return spawn(body)


# -- spans ----------------------------------------------------------------------------------------


def test_an_execution_is_a_span_and_current_while_its_function_runs(collected: Collected) -> None:
    flight = ShardedFlight(name="prices")
    collected.watch(flight)
    gate = Gate(collected)
    gate.opened.set()
    with collected.tracer().start_as_current_span("request") as request:
        assert flight.do(gate, "key") == ("value", False)
        assert trace.get_current_span() is request
    execution = collected.span("execution prices")
    assert parent_of(execution) == id_of(collected.span("request"))
    assert parent_of(collected.span("query")) == id_of(execution)
    assert dict(execution.attributes or {}) == {
        "shardedflight.flight": "prices",
        "shardedflight.role": "leader",
        "shardedflight.promoted": False,
        "shardedflight.end": "value",
    }
    assert execution.status.status_code is StatusCode.UNSET


def test_a_follower_is_linked_to_the_leaders_span(collected: Collected) -> None:
    flight = ShardedFlight(name="prices")
    collected.watch(flight)
    gate = Gate(collected)
    leader = within(collected, "first request", flight.do, gate, "key")
    assert gate.entered.wait(PATIENCE)
    follower = within(collected, "second request", flight.do, gate, "key")
    eventually(lambda: flight.stats().waiting == 1)
    gate.opened.set()
    assert leader.result(PATIENCE) == follower.result(PATIENCE) == ("value", True)
    execution, wait = collected.span("execution prices"), collected.span("wait prices")
    assert parent_of(execution) == id_of(collected.span("first request"))
    assert parent_of(wait) == id_of(collected.span("second request"))
    assert links_of(wait) == [id_of(execution)]
    assert dict(wait.attributes or {}) == {
        "shardedflight.flight": "prices",
        "shardedflight.role": "follower",
        "shardedflight.departure": "served",
    }
    assert len(collected.spans("query")) == 1


def test_coroutines(collected: Collected) -> None:
    flight = ShardedFlight(name="prices")
    collected.watch(flight)
    gate = Gate(collected)

    async def request(name: str) -> Any:
        with collected.tracer().start_as_current_span(name) as span:
            answer = await flight.do_async(gate.coroutine, "key")
            assert trace.get_current_span() is span
            return answer

    async def main() -> list[Any]:
        first = asyncio.ensure_future(request("first request"))
        await eventually_async(gate.entered.is_set)
        second = asyncio.ensure_future(request("second request"))
        await eventually_async(lambda: flight.stats().waiting == 1)
        gate.opened.set()
        return [await first, await second]

    assert asyncio.run(main()) == [("value", True)] * 2
    execution, wait = collected.span("execution prices"), collected.span("wait prices")
    assert parent_of(execution) == id_of(collected.span("first request"))
    assert parent_of(collected.span("query")) == id_of(execution)
    assert parent_of(wait) == id_of(collected.span("second request"))
    assert links_of(wait) == [id_of(execution)]


def test_a_follower_that_came_before_the_function_began(collected: Collected) -> None:
    """Its leader waits for a place in the executor: the link is made in the end."""
    begun = threading.Event()

    class Late:
        def submit(self, work: Callable[[], None]) -> Any:
            return spawn(lambda: (begun.wait(PATIENCE), work())[1])

    flight = ShardedFlight(name="late", executor=Late())  # type: ignore[arg-type]
    collected.watch(flight)
    leader = flight.do_future(lambda: "value", "key")
    follower = within(collected, "request", flight.do, int, "key")
    eventually(lambda: flight.stats().waiting == 1)
    begun.set()
    assert leader.result(PATIENCE) == follower.result(PATIENCE) == ("value", True)
    execution = collected.span("execution late")
    assert parent_of(execution) is None
    assert links_of(collected.span("wait late")) == [id_of(execution)]


def test_futures(collected: Collected) -> None:
    flight = ShardedFlight(name="prices")
    collected.watch(flight)
    gate = Gate(collected)
    with collected.tracer().start_as_current_span("request"):
        leader = flight.do_future(gate, "key")
        assert gate.entered.wait(PATIENCE)
        follower = flight.do_future(gate, "key")
        gate.opened.set()
        assert leader.result(PATIENCE) == follower.result(PATIENCE) == ("value", True)
    execution, wait = collected.span("execution prices"), collected.span("wait prices")
    assert parent_of(collected.span("query")) == id_of(execution)
    assert parent_of(wait) == id_of(collected.span("request"))
    assert links_of(wait) == [id_of(execution)]


def test_an_error_is_in_the_span(collected: Collected) -> None:
    flight = ShardedFlight(name="prices")
    collected.watch(flight)
    gate = Gate(collected, LookupError("no such item"))
    leader = spawn(flight.do, gate, "key")
    assert gate.entered.wait(PATIENCE)
    follower = spawn(flight.do, gate, "key")
    eventually(lambda: flight.stats().waiting == 1)
    gate.opened.set()
    for caller in (leader, follower):
        with pytest.raises(LookupError):
            caller.result(PATIENCE)
    execution, wait = collected.span("execution prices"), collected.span("wait prices")
    assert execution.status.status_code is wait.status.status_code is StatusCode.ERROR
    assert execution.status.description == "LookupError"
    (event,) = execution.events
    assert event.name == "exception"
    assert (event.attributes or {})["exception.message"] == "no such item"
    assert (wait.attributes or {})["shardedflight.departure"] == "failed"


def test_a_follower_that_is_out_of_time(collected: Collected) -> None:
    flight = ShardedFlight(name="prices")
    collected.watch(flight)
    gate = Gate(collected)
    leader = spawn(flight.do, gate, "key")
    assert gate.entered.wait(PATIENCE)
    with pytest.raises(FlightTimeout):
        flight.do(gate, "key", timeout=0)
    wait = collected.span("wait prices")
    assert wait.status.status_code is StatusCode.ERROR
    assert (wait.attributes or {})["shardedflight.departure"] == "timed out"
    gate.opened.set()
    assert leader.result(PATIENCE) == ("value", False)
    assert links_of(wait) == [id_of(collected.span("execution prices"))]


def test_a_follower_that_takes_over_leads_a_span_of_its_own(collected: Collected) -> None:
    flight = ShardedFlight(name="prices")
    collected.watch(flight)
    gate, heirs = Gate(collected, KeyboardInterrupt()), Gate(collected)
    leader = within(collected, "first request", flight.do, gate, "key")
    assert gate.entered.wait(PATIENCE)
    heir = within(collected, "second request", flight.do, heirs, "key")
    eventually(lambda: flight.stats().waiting == 1)
    follower = within(collected, "third request", flight.do, heirs, "key")
    eventually(lambda: flight.stats().waiting == 2)
    gate.opened.set()
    heirs.opened.set()
    with pytest.raises(KeyboardInterrupt):
        leader.result(PATIENCE)
    assert heir.result(PATIENCE) == follower.result(PATIENCE) == ("value", True)
    lost, served = collected.spans("execution prices")
    assert parent_of(lost) == id_of(collected.span("first request"))
    assert parent_of(served) == id_of(collected.span("second request"))
    assert (lost.attributes or {})["shardedflight.end"] == "lost"
    assert (served.attributes or {})["shardedflight.promoted"] is True
    by_departure = {
        (span.attributes or {})["shardedflight.departure"]: span
        for span in collected.spans("wait prices")
    }
    assert links_of(by_departure["took over"]) == [id_of(lost)]
    assert links_of(by_departure["served"]) == [id_of(lost), id_of(served)]


def test_an_execution_that_nobody_wants(collected: Collected) -> None:
    flight = ShardedFlight(name="prices")
    collected.watch(flight)
    gate = Gate(collected)

    async def main() -> None:
        call = asyncio.ensure_future(flight.do_async(gate.coroutine, "key"))
        await eventually_async(gate.entered.is_set)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await eventually_async(lambda: flight.in_flight() == 0)

    asyncio.run(main())
    execution = collected.span("execution prices")
    assert (execution.attributes or {})["shardedflight.end"] == "abandoned"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_many_keys_are_siblings(collected: Collected, asynchronous: bool) -> None:
    flight = ShardedFlight(name="prices")
    collected.watch(flight, key=repr)

    def fn(keys: list[int]) -> dict[int, int]:
        with collected.tracer().start_as_current_span("query"):
            return dict.fromkeys(keys[:2], 0)

    async def fn_async(keys: list[int]) -> dict[int, int]:
        return fn(keys)

    async def main() -> Any:
        return await flight.do_many_async(fn_async, [1, 2, 3])

    with collected.tracer().start_as_current_span("request") as request:
        found = asyncio.run(main()) if asynchronous else flight.do_many(fn, [1, 2, 3])
        assert found == {1: (0, False), 2: (0, False)}
        assert trace.get_current_span() is request
    spans = {
        (span.attributes or {})["shardedflight.key"]: span
        for span in collected.spans("execution prices")
    }
    assert list(spans) == ["1", "2", "3"]
    for span in spans.values():
        assert parent_of(span) == id_of(collected.span("request"))
    assert parent_of(collected.span("query")) == id_of(spans["1"])
    ends = [(span.attributes or {})["shardedflight.end"] for span in spans.values()]
    assert ends == ["value", "value", "missing"]


def test_executions_inside_each_other(collected: Collected) -> None:
    one, two = ShardedFlight(name="one"), ShardedFlight(name="two")
    collected.watch(one, two)
    one.do(lambda: two.do(int, "key"), "key")
    assert parent_of(collected.span("execution two")) == id_of(collected.span("execution one"))
    assert not trace.get_current_span().get_span_context().is_valid


def test_a_loop_that_is_closed_under_its_execution(collected: Collected) -> None:
    flight = ShardedFlight(name="prices")
    collected.watch(flight)
    gate = Gate(collected)
    loop = asyncio.new_event_loop()
    task = loop.create_task(flight.do_async(gate.coroutine, "key"))
    while not gate.entered.is_set():
        loop.run_until_complete(asyncio.sleep(0))
    pending = [task, *asyncio.all_tasks(loop)]
    while pending:
        pending.pop()._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    # By the thread that closes the books of the loop, which has nothing current to put back.
    eventually(lambda: len(collected.spans("execution prices")) == 1)
    assert (collected.span("execution prices").attributes or {})["shardedflight.end"] == "lost"
    assert flight.observer_errors == 0
    # OpenTelemetry logs that the collector ends the span "query" in no context. Logged in a later
    # test, the record's traceback would keep that test's frames, and so its flights.
    del task, loop
    gc.collect()


def test_keys_are_shown_only_if_that_is_asked_for(collected: Collected) -> None:
    flight = ShardedFlight(name="prices")
    collected.watch(flight)
    flight.do(int, "secret")
    (span,) = collected.exporter.get_finished_spans()
    assert "secret" not in span.to_json()


def test_a_key_that_can_not_be_shown_harms_nobody(collected: Collected) -> None:
    flight = ShardedFlight(name="prices")
    collected.watch(flight, key=lambda key: 1 / key)  # type: ignore[arg-type]
    with collected.tracer().start_as_current_span("request") as request:
        assert flight.do(lambda: "value", 0) == ("value", False)
        assert trace.get_current_span() is request
    assert flight.observer_errors == 1


# -- metrics --------------------------------------------------------------------------------------


def test_all_of_stats_is_there(collected: Collected) -> None:
    flight = ShardedFlight(name="prices", shards=4)
    collected.watch(flight)
    gate = Gate(collected, KeyboardInterrupt())
    leader = spawn(flight.do, gate, "key")
    assert gate.entered.wait(PATIENCE)
    with pytest.raises(FlightTimeout):
        flight.do(int, "key", timeout=0)
    follower = spawn(flight.do, lambda: "heir", "key")
    eventually(lambda: flight.stats().waiting == 1)
    flight.forget("key")
    during = collected.points()
    assert during["shardedflight.executions.in_flight", "prices", ""].value == 1
    assert during["shardedflight.waiters", "prices", ""].value == 1
    assert during["shardedflight.busiest_shard.executions", "prices", ""].value == 1
    gate.opened.set()
    with pytest.raises(KeyboardInterrupt):
        leader.result(PATIENCE)
    assert follower.result(PATIENCE) == ("heir", False)
    with pytest.raises(ZeroDivisionError):
        flight.do(lambda: 1 / 0, "other")
    values = {
        key: point.count if isinstance(point, HistogramDataPoint) else point.value
        for key, point in collected.points().items()
    }
    assert values == {
        ("shardedflight.calls", "prices", "leader"): 3,
        ("shardedflight.calls", "prices", "follower"): 0,
        ("shardedflight.errors", "prices", ""): 1,
        ("shardedflight.promotions", "prices", ""): 1,
        ("shardedflight.timeouts", "prices", ""): 1,
        ("shardedflight.abandoned", "prices", ""): 0,
        ("shardedflight.forgotten", "prices", ""): 1,
        ("shardedflight.deadlocks", "prices", ""): 0,
        ("shardedflight.executions.in_flight", "prices", ""): 0,
        ("shardedflight.waiters", "prices", ""): 0,
        ("shardedflight.shards", "prices", ""): 4,
        ("shardedflight.busiest_shard.executions", "prices", ""): 0,
        ("shardedflight.execution.duration", "prices", ""): 3,
        ("shardedflight.wait.duration", "prices", ""): 2,
    }
    bounds = collected.points()["shardedflight.execution.duration", "prices", ""].explicit_bounds
    assert tuple(bounds) == BUCKETS


def test_flights_come_and_go(collected: Collected) -> None:
    one, two = ShardedFlight(name="one"), ShardedFlight()
    telemetry = collected.watch(one)
    telemetry.add(two, name="two")
    two.do(int, "key")
    points = collected.points()
    assert points["shardedflight.calls", "one", "leader"].value == 0
    assert points["shardedflight.calls", "two", "leader"].value == 1
    telemetry.remove(one)
    one.do(int, "key")
    assert collected.spans("execution one") == []
    del two
    gc.collect()
    with pytest.raises(ValueError, match="is not watched"):
        telemetry.remove(one)
    telemetry.add(ShardedFlight(name="two"))


@pytest.mark.parametrize(
    ("flights", "options", "error", "message"),
    [
        ([object()], {}, TypeError, "a ShardedFlight is watched, not <object"),
        ([ShardedFlight()], {}, ValueError, "needs a name"),
        ([ShardedFlight(name="a"), ShardedFlight(name="a")], {}, ValueError, "another flight"),
        ([], {"tracer_provider": "default"}, TypeError, "tracer_provider must be a TracerProvider"),
        ([], {"meter_provider": 1}, TypeError, "meter_provider must be a MeterProvider"),
        ([], {"key": True}, TypeError, "key must be callable"),
    ],
)
def test_a_wrong_option_is_an_error_at_once(
    collected: Collected,
    flights: list[Any],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    everything: dict[str, Any] = {
        "tracer_provider": collected.tracers,
        "meter_provider": collected.meters,
        **options,
    }
    with pytest.raises(error, match=message):
        FlightTelemetry(*flights, **everything)
    for flight in flights:
        if isinstance(flight, ShardedFlight):
            flight.do(int, "key")
    assert collected.exporter.get_finished_spans() == ()
    collected.watch()  # nothing was left in the provider


def test_a_meter_provider_has_one_of_them(collected: Collected) -> None:
    collected.watch()
    with pytest.raises(ValueError, match="add further flights to that one"):
        collected.watch()
