"""The metrics for Prometheus: what a scrape says is what the flights have counted."""

import contextlib
import gc
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from support import PATIENCE, eventually, spawn

from shardedflight import FlightTimeout, ShardedFlight

prometheus_client = pytest.importorskip(
    "prometheus_client", reason="the extra `prometheus` is not installed"
)
from prometheus_client import CollectorRegistry, generate_latest  # noqa: E402

from shardedflight.observe.prometheus import FlightMetrics  # noqa: E402


def registered(*flights: ShardedFlight, **options: Any) -> tuple[CollectorRegistry, FlightMetrics]:
    registry = CollectorRegistry()
    return registry, FlightMetrics(*flights, registry=registry, **options)


def samples(registry: CollectorRegistry) -> dict[tuple[str, str, str], float]:
    """Name, flight and further label of each sample, without buckets and times of creation."""
    return {
        (sample.name, sample.labels["flight"], sample.labels.get("role", "")): sample.value
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


def stampede(flight: ShardedFlight, followers: int) -> None:
    """One execution with so many followers."""
    entered, opened = threading.Event(), threading.Event()

    def fn() -> str:
        entered.set()
        assert opened.wait(PATIENCE)
        return "value"

    leader = spawn(flight.do, fn, "key")
    assert entered.wait(PATIENCE)
    others = [spawn(flight.do, fn, "key") for _ in range(followers)]
    eventually(lambda: flight.stats().waiting == followers)
    opened.set()
    for caller in (leader, *others):
        assert caller.result(PATIENCE)[0] == "value"


def test_all_of_stats_is_there() -> None:
    flight = ShardedFlight(name="prices", shards=4)
    registry, _ = registered(flight)
    entered, opened = threading.Event(), threading.Event()

    def fn() -> None:
        entered.set()
        assert opened.wait(PATIENCE)
        raise KeyboardInterrupt

    leader = spawn(flight.do, fn, "key")
    assert entered.wait(PATIENCE)
    with pytest.raises(FlightTimeout):
        flight.do(int, "key", timeout=0)
    follower = spawn(flight.do, lambda: "heir", "key")
    eventually(lambda: flight.stats().waiting == 1)
    during = samples(registry)
    assert during["shardedflight_executions_in_flight", "prices", ""] == 1
    assert during["shardedflight_waiters", "prices", ""] == 1
    assert during["shardedflight_busiest_shard_executions", "prices", ""] == 1
    flight.forget("key")
    opened.set()
    with pytest.raises(KeyboardInterrupt):
        leader.result(PATIENCE)
    assert follower.result(PATIENCE) == ("heir", False)
    with pytest.raises(ZeroDivisionError):
        flight.do(lambda: 1 / 0, "other")
    stampede(flight, 3)
    assert samples(registry) == {
        ("shardedflight_calls_total", "prices", "leader"): 4,
        ("shardedflight_calls_total", "prices", "follower"): 3,
        ("shardedflight_executions_in_flight", "prices", ""): 0,
        ("shardedflight_waiters", "prices", ""): 0,
        ("shardedflight_shards", "prices", ""): 4,
        ("shardedflight_busiest_shard_executions", "prices", ""): 0,
        ("shardedflight_errors_total", "prices", ""): 1,
        ("shardedflight_promotions_total", "prices", ""): 1,
        ("shardedflight_timeouts_total", "prices", ""): 1,
        ("shardedflight_abandoned_total", "prices", ""): 0,
        ("shardedflight_forgotten_total", "prices", ""): 1,
        ("shardedflight_deadlocks_total", "prices", ""): 0,
        ("shardedflight_observer_errors_total", "prices", ""): 0,
        ("shardedflight_execution_seconds_count", "prices", ""): 4,
        ("shardedflight_execution_seconds_sum", "prices", ""): pytest.approx(0, abs=PATIENCE),
        ("shardedflight_wait_seconds_count", "prices", ""): 5,
        ("shardedflight_wait_seconds_sum", "prices", ""): pytest.approx(0, abs=2 * PATIENCE),
    }


def test_executions_from_before_are_in_the_totals() -> None:
    flight = ShardedFlight(name="prices")
    flight.do(int, "key")
    registry, _ = registered(flight)
    found = samples(registry)
    assert found["shardedflight_calls_total", "prices", "leader"] == 1
    assert found["shardedflight_execution_seconds_count", "prices", ""] == 0


def test_there_is_no_label_for_a_key() -> None:
    flight = ShardedFlight(name="prices")
    registry, _ = registered(flight)
    before = len(generate_latest(registry).splitlines())
    for number in range(50):
        flight.do(int, f"secret {number}")
    text = generate_latest(registry)
    assert len(text.splitlines()) == before
    assert b"secret" not in text


def test_buckets_are_the_users() -> None:
    flight = ShardedFlight(name="prices")
    registry, _ = registered(flight, buckets=(1.0, 2.0))
    text = generate_latest(registry).decode()
    assert re.findall(r'execution_seconds_bucket{flight="prices",le="(.*?)"}', text) == [
        "1.0",
        "2.0",
        "+Inf",
    ]


def test_two_flights_in_one_registry() -> None:
    one, two = ShardedFlight(name="one"), ShardedFlight()
    registry, metrics = registered(one)
    metrics.add(two, name="two")
    stampede(one, 2)
    two.do(int, "key")
    found = samples(registry)
    assert found["shardedflight_calls_total", "one", "follower"] == 2
    assert found["shardedflight_calls_total", "two", "follower"] == 0
    assert found["shardedflight_execution_seconds_count", "two", ""] == 1
    metrics.remove(one)
    one.do(int, "key")
    assert {flight for _, flight, _ in samples(registry)} == {"two"}


def test_a_flight_that_is_gone_leaves_the_metrics() -> None:
    registry, metrics = registered(ShardedFlight(name="first"))
    kept = ShardedFlight(name="kept")
    metrics.add(kept)
    gc.collect()
    assert {flight for _, flight, _ in samples(registry)} == {"kept"}
    again = ShardedFlight(name="first")
    metrics.add(again)
    again.do(int, "key")
    assert samples(registry)["shardedflight_execution_seconds_count", "first", ""] == 1


def test_its_name_is_free_for_another_one_without_a_scrape_between() -> None:
    registry, metrics = registered()
    flight = ShardedFlight(name="prices")
    metrics.add(flight)
    flight.do(int, "key")
    del flight
    gc.collect()
    successor = ShardedFlight(name="prices")
    metrics.add(successor)
    assert samples(registry)["shardedflight_execution_seconds_count", "prices", ""] == 0


@pytest.mark.parametrize(
    ("flights", "options", "error", "message"),
    [
        ([object()], {}, TypeError, "a ShardedFlight is watched, not <object"),
        ([ShardedFlight()], {}, ValueError, "needs a name"),
        ([ShardedFlight(name="")], {}, ValueError, "needs a name"),
        ([ShardedFlight(name="a"), ShardedFlight(name="a")], {}, ValueError, "another flight"),
        ([], {"registry": "default"}, TypeError, "registry must be a CollectorRegistry"),
        ([], {"buckets": (2, 1)}, ValueError, "sorted"),
        ([], {"buckets": ("many",)}, ValueError, "many"),
    ],
)
def test_a_wrong_option_is_an_error_at_once(
    flights: list[Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    registry = CollectorRegistry()
    everything: dict[str, Any] = {"registry": registry, **options}
    with pytest.raises(error, match=message):
        FlightMetrics(*flights, **everything)
    FlightMetrics(registry=registry)  # nothing was left in it


def test_a_flight_is_added_once() -> None:
    flight = ShardedFlight(name="prices")
    _, metrics = registered(flight)
    with pytest.raises(ValueError, match="watched already, as 'prices'"):
        metrics.add(flight, name="other")
    metrics.remove(flight)
    with pytest.raises(ValueError, match="is not watched"):
        metrics.remove(flight)
    with pytest.raises(TypeError, match="name must be a str"):
        metrics.add(flight, name=3)  # type: ignore[arg-type]
    metrics.add(flight)


def test_a_registry_has_one_of_them() -> None:
    registry, _ = registered()
    with pytest.raises(ValueError, match="add further flights to that one"):
        FlightMetrics(registry=registry)


def test_scraping_while_flights_come_and_go() -> None:
    registry, metrics = registered()
    done = threading.Event()

    def scrape() -> int:
        count = 0
        while not done.is_set():
            samples(registry)
            count += 1
        return count

    def come_and_go(name: str) -> None:
        for _ in range(50):
            flight = ShardedFlight(name=name)
            metrics.add(flight)
            flight.do(int, "key")
            metrics.remove(flight)

    scraper = spawn(scrape)
    for caller in [spawn(come_and_go, f"flight {number}") for number in range(3)]:
        caller.result(PATIENCE)
    done.set()
    assert scraper.result(PATIENCE)
    assert samples(registry) == {}


# -- more than one process ------------------------------------------------------------------------


def process(code: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )


WORKER = """
    import asyncio, sys, threading
    from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
    from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
    from support import PATIENCE, eventually, spawn
    from shardedflight import FlightTimeout, ShardedFlight
    from shardedflight.observe.prometheus import FlightMetrics

    flight = ShardedFlight(name="prices")
    metrics = FlightMetrics(flight)

    class Gate:
        def __init__(self, error=None):
            self.entered, self.opened, self.error = threading.Event(), threading.Event(), error
        def __call__(self):
            self.entered.set()
            assert self.opened.wait(PATIENCE)
            if self.error is not None:
                raise self.error

    # One leader is lost, a follower takes over, another one is served, a third is out of time.
    gate = Gate(KeyboardInterrupt())
    heir = Gate()
    leader = spawn(flight.do, gate, "key")
    assert gate.entered.wait(PATIENCE)
    first = spawn(flight.do, heir, "key")
    eventually(lambda: flight.stats().waiting == 1)
    second = flight.do_future(int, "key")
    try:
        flight.do(int, "key", timeout=0)
    except FlightTimeout:
        pass
    gate.opened.set()
    assert heir.entered.wait(PATIENCE)
    heir.opened.set()
    first.result(PATIENCE), second.result(PATIENCE)

    # One that fails, one that is abandoned.
    try:
        flight.do(lambda: 1 / 0, "fails")
    except ZeroDivisionError:
        pass

    async def abandon():
        task = asyncio.ensure_future(flight.do_async(asyncio.Event().wait, "abandoned"))
        while not flight.in_flight():
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            pass
        while flight.in_flight():
            await asyncio.sleep(0)
    asyncio.run(abandon())

    # And one that runs while it is looked at, with a follower.
    last = Gate()
    running = spawn(flight.do, last, "runs")
    assert last.entered.wait(PATIENCE)
    waiting = flight.do_future(int, "runs")
    print("ready", flush=True)
    for line in sys.stdin:
        if line == "end\\n":
            last.opened.set()
            running.result(PATIENCE), waiting.result(PATIENCE)
            print("ended", flush=True)
        elif line.startswith("dead "):
            mark_process_dead(int(line.split()[1]))
            print("marked", flush=True)
        else:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
            for line in generate_latest(registry).decode().splitlines():
                if not line.startswith("#") and "_bucket" not in line and "_sum" not in line:
                    print(line)
            print("scraped", flush=True)
"""


def ask(worker: "subprocess.Popen[str]", what: str, until: str) -> list[str]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    if what:
        worker.stdin.write(what + "\n")
        worker.stdin.flush()
    lines: list[str] = []
    for line in worker.stdout:
        if line.strip() == until:
            return lines
        lines.append(line.strip())
    raise AssertionError(f"the worker ended with {worker.wait(PATIENCE)}: {lines}")


def scraped(worker: "subprocess.Popen[str]") -> dict[str, float]:
    lines = (line.rsplit(" ", 1) for line in ask(worker, "scrape", "scraped"))
    return {name.replace('flight="prices"', ""): float(value) for name, value in lines}


def test_many_processes(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        workers: list[subprocess.Popen[str]] = []
        for _ in range(2):
            worker = process(WORKER, PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
            stack.callback(worker.wait, PATIENCE)
            assert worker.stdin is not None
            assert worker.stdout is not None
            stack.callback(worker.stdout.close)
            stack.callback(worker.stdin.close)
            workers.append(worker)
        one, two = workers
        for worker in workers:
            ask(worker, "", "ready")
        assert scraped(one) == {
            'shardedflight_calls_total{,role="leader"}': 2 * 5,
            'shardedflight_calls_total{,role="follower"}': 2 * 1,
            "shardedflight_executions_in_flight{}": 2 * 1,
            "shardedflight_waiters{}": 2 * 1,
            "shardedflight_errors_total{}": 2 * 1,
            "shardedflight_promotions_total{}": 2 * 1,
            "shardedflight_timeouts_total{}": 2 * 1,
            "shardedflight_abandoned_total{}": 2 * 1,
            "shardedflight_execution_seconds_count{}": 2 * 4,
            "shardedflight_wait_seconds_count{}": 2 * 3,
        }
        ask(one, "end", "ended")
        after = scraped(two)
        assert after["shardedflight_executions_in_flight{}"] == 1
        assert after["shardedflight_waiters{}"] == 1
        assert after['shardedflight_calls_total{,role="follower"}'] == 3
        assert two.stdin is not None
        two.stdin.close()
        assert two.wait(PATIENCE) == 0
        ask(one, f"dead {two.pid}", "marked")
        alone = scraped(one)
        assert alone["shardedflight_executions_in_flight{}"] == 0
        assert alone['shardedflight_calls_total{,role="leader"}'] == 10


# -- the dashboard --------------------------------------------------------------------------------


def dashboard() -> Any:
    text = resources.files("shardedflight.observe").joinpath("grafana.json").read_text("utf-8")
    return json.loads(text)


QUERIES = [
    pytest.param(target["expr"], id=f"{panel['title']}: {target['legendFormat']}")
    for panel in dashboard()["panels"]
    for target in panel["targets"]
]


def test_the_dashboard_shows_every_metric() -> None:
    registry, _ = registered()
    names = {family.name for family in registry.collect()}
    queries = " ".join(str(query.values[0]) for query in QUERIES)
    assert {name for name in names if name not in queries} == set()
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(ids) == len(set(ids))


#: A flight with calls of every kind, until its standard input ends.
SERVED = """
    import sys, threading, time
    from concurrent.futures import ThreadPoolExecutor
    from prometheus_client import start_http_server
    from shardedflight import FlightTimeout, ShardedFlight
    from shardedflight.observe.prometheus import FlightMetrics

    flights = [ShardedFlight(name=name) for name in ("prices", "articles")]
    FlightMetrics(*flights)
    server, _ = start_http_server(0, addr="127.0.0.1")
    done = threading.Event()

    def fn():
        done.wait(0.01)

    def call():
        while not done.is_set():
            for flight in flights:
                try:
                    flight.do(fn, "key", timeout=0.001)
                except FlightTimeout:
                    pass

    with ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            pool.submit(call)
        print(server.server_port, flush=True)
        sys.stdin.read()
        done.set()
    server.shutdown()
    server.server_close()
"""


def get(port: int, path: str, **parameters: str) -> Any:
    url = f"http://127.0.0.1:{port}{path}?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
        return json.load(answer)


def answered(port: int, path: str, **parameters: str) -> Any:
    """The result of a query, or nothing as long as there is none."""
    try:
        answer = get(port, path, **parameters)
    except urllib.error.URLError as error:
        if isinstance(error, urllib.error.HTTPError):
            with error:
                if error.code < 500:  # it does not understand the question
                    raise AssertionError(error.read().decode()) from error
        return []
    assert answer["status"] == "success"
    return answer["data"]["result"] if "result" in answer["data"] else answer["data"]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a Prometheus that scrapes a process with two flights."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("there is no program `prometheus` here: Debian's package of that name has it")
    folder = tmp_path_factory.mktemp("prometheus")
    served = process(SERVED)
    assert served.stdin is not None
    assert served.stdout is not None
    server = None
    try:
        targets = [f"127.0.0.1:{int(served.stdout.readline())}"]
        settings = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
            "scrape_configs": [{"job_name": "served", "static_configs": [{"targets": targets}]}],
        }
        (folder / "prometheus.yml").write_text(json.dumps(settings))  # JSON is YAML
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            own_port = free.getsockname()[1]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [
                    program,
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{own_port}",
                ],
                stdout=log,
                stderr=log,
            )
        # Two scrapes make a rate.
        enough = "count(count_over_time(shardedflight_waiters[1m]) > 1) == 2"
        eventually(
            lambda: server.poll() is not None or answered(own_port, "/api/v1/query", query=enough),
            "what was scraped",
        )
        assert server.poll() is None, (folder / "log").read_text()
        yield own_port
    finally:
        if server is not None:
            server.terminate()
            server.wait(PATIENCE)
        served.stdin.close()
        served.wait(PATIENCE)
        served.stdout.close()


def test_a_flight_may_take_the_name_of_one_whose_end_is_just_noticed() -> None:
    """A scrape drops what is gone, while another thread adds a flight of that name."""
    registry = CollectorRegistry()
    old = ShardedFlight(name="x")
    metrics = FlightMetrics(old, registry=registry)
    del old
    gc.collect()
    new = ShardedFlight(name="x")
    drop = metrics._drop
    adding: list[Any] = []

    def slow(name: str) -> None:
        metrics._drop = drop  # type: ignore[method-assign]
        adding.append(spawn(metrics.add, new))
        with contextlib.suppress(TimeoutError):  # it has to wait: that is the point
            adding[0].result(0.05)
        drop(name)

    metrics._drop = slow  # type: ignore[method-assign]
    generate_latest(registry)
    adding[0].result(PATIENCE)
    new.do(lambda: 1, "k")
    text = generate_latest(registry).decode()
    assert 'shardedflight_execution_seconds_count{flight="x"} 1.0' in text


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_of_the_dashboard_is_answered(prometheus: int, query: str) -> None:
    query = query.replace("$flight", ".*").replace("$__rate_interval", "1m")
    assert "$" not in query
    result = answered(prometheus, "/api/v1/query", query=query)
    assert result, query
    for series in result:
        assert float(series["value"][1]) >= 0, series  # not NaN either


def test_the_dashboards_variable_lists_the_flights(prometheus: int) -> None:
    (variable,) = [v for v in dashboard()["templating"]["list"] if v["name"] == "flight"]
    match = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"])
    assert match is not None
    values = answered(prometheus, f"/api/v1/label/{match[2]}/values", **{"match[]": match[1]})
    assert values == ["articles", "prices"]
