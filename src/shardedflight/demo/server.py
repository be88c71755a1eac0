"""The HTTP API, in a process of its own: `/direct/{item}` queries, `/flight/{item}` shares.

All routes run the same query on the same pool of threads; only what stands between the request
and the query differs. `/control` tells what went on.

`/middleware/{item}` is `/direct` behind the middleware, for whoever asks it while the demo runs:
the load does not. `/metrics` and `/debug/flights/` show both flights.
"""

import asyncio
import dataclasses
import json
import os
import socket
import sys
import threading
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Literal

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route

from shardedflight import ShardedFlight
from shardedflight.demo.database import Database, Sales
from shardedflight.http.asgi import CoalesceMiddleware
from shardedflight.observe.page import FlightsPage
from shardedflight.observe.prometheus import FlightMetrics

RouteName = Literal["direct", "flight"]
ROUTES: tuple[RouteName, ...] = ("direct", "flight")

#: Threads that query, for both routes; as many as Starlette has for routes that are no coroutines.
WORKERS = 40

#: Where the page that shows the flights is mounted.
PAGE = "/debug/flights"

#: Seconds between two samples of the executions in flight.
SAMPLE_INTERVAL = 0.01


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the server process is told, as JSON on its command line."""

    #: File descriptor of the listening socket, inherited.
    socket: int
    database: str
    shards: int | None


class Meter:
    """What one route does to the database. Worker threads write it, under its lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queries = 0
        self._running = 0
        self._peak = 0

    def __enter__(self) -> None:
        with self._lock:
            self._queries += 1
            self._running += 1
            self._peak = max(self._peak, self._running)

    def __exit__(self, *exc_info: object) -> None:
        with self._lock:
            self._running -= 1

    @property
    def queries(self) -> int:
        """Queries started so far."""
        return self._queries

    def lap(self) -> dict[str, int]:
        """Queries so far, and the most at once since the last lap."""
        with self._lock:
            peak, self._peak = self._peak, self._running
            return {"queries": self._queries, "queries_at_once": peak}


class Api:
    """The routes and what they share."""

    def __init__(self, settings: Settings) -> None:
        self.flight = ShardedFlight(settings.shards, name="demo")
        self._middleware_flight = ShardedFlight(settings.shards, name="middleware")
        self._registry = CollectorRegistry()
        FlightMetrics(self.flight, self._middleware_flight, registry=self._registry)
        self._page = FlightsPage(self.flight, self._middleware_flight)
        self._database = Database(Path(settings.database))
        self._workers = ThreadPoolExecutor(WORKERS)
        self._meters = {route: Meter() for route in ROUTES}
        # Written on the event loop's thread only. Without a flight each request is an execution.
        self._direct_in_flight = 0
        # Written by the sampling thread only; lists grow atomically.
        self._samples: dict[RouteName, list[tuple[float, int]]] = {route: [] for route in ROUTES}

    def app(self) -> Starlette:
        """The ASGI application."""
        collapsing = Middleware(
            CoalesceMiddleware,
            routes=["/middleware/"],
            shareable=["/middleware/"],
            flight=self._middleware_flight,
        )
        return Starlette(
            routes=[
                Route("/direct/{item:int}", self.direct),
                Route("/flight/{item:int}", self.shared),
                Route("/middleware/{item:int}", self.collapsed, middleware=[collapsing]),
                Route("/metrics", self.metrics),
                Mount(PAGE, self._page),
                Route("/control", self.control),
                Route("/control/stats", self.stats),
                Route("/control/{route}/lap", self.lap, methods=["POST"]),
                Route("/control/{route}/samples", self.samples),
            ],
            exception_handlers={Exception: self.failed},
            lifespan=self._lifespan,
        )

    async def direct(self, request: Request) -> Response:
        """Every request runs the query."""
        self._direct_in_flight += 1
        try:
            sales = await self._query(self._meters["direct"], request.path_params["item"])
        finally:
            self._direct_in_flight -= 1
        return JSONResponse(sales)

    async def shared(self, request: Request) -> Response:
        """Requests for an item whose query is in flight share that query."""
        item = request.path_params["item"]
        meter = self._meters["flight"]
        sales, _ = await self.flight.do_async(lambda: self._query(meter, item), "item", item)
        return JSONResponse(sales)

    async def collapsed(self, request: Request) -> Response:
        """Every request that comes through the middleware runs the query."""
        return JSONResponse(await self._query(nullcontext(), request.path_params["item"]))

    async def metrics(self, request: Request) -> Response:
        """What Prometheus scrapes."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def _query(self, meter: AbstractContextManager[None], item: int) -> Sales:
        def work() -> Sales:
            with meter:
                return self._database.sales_of(item)

        return await asyncio.get_running_loop().run_in_executor(self._workers, work)

    async def failed(self, request: Request, error: Exception) -> Response:
        """Tells the client why; the whole traceback goes to the log."""
        return PlainTextResponse(repr(error), status_code=500)

    async def control(self, request: Request) -> Response:
        """Counters for the live display."""
        in_flight = self._in_flight()
        return JSONResponse(
            {
                route: {"queries": self._meters[route].queries, "in_flight": in_flight[route]}
                for route in ROUTES
            }
        )

    async def stats(self, request: Request) -> Response:
        """What the flight says of itself."""
        stats = dataclasses.asdict(self.flight.stats())
        # One number for each of possibly thousands of shards.
        del stats["per_shard"]
        return JSONResponse({"shards": self.flight.shards, **stats})

    async def lap(self, request: Request) -> Response:
        """Ends a stretch of the measurement of one route."""
        return JSONResponse(self._meters[request.path_params["route"]].lap())

    async def samples(self, request: Request) -> Response:
        """Executions in flight over time: pairs of a monotonic time and a number."""
        return JSONResponse(self._samples[request.path_params["route"]])

    def _in_flight(self) -> dict[RouteName, int]:
        return {"direct": self._direct_in_flight, "flight": self.flight.in_flight()}

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncGenerator[None]:
        threading.Thread(target=self._sample, daemon=True).start()
        yield
        self._workers.shutdown()
        self._database.close()

    def _sample(self) -> None:
        # A thread, since a busy event loop would come to it late, just when it matters.
        while True:
            now = time.monotonic()
            for route, number in self._in_flight().items():
                self._samples[route].append((now, number))
            time.sleep(SAMPLE_INTERVAL)


def _end_with_parent() -> None:
    """Ends the process when the other end of standard input closes, however that came about."""
    sys.stdin.buffer.read()
    # At once: the database is only read and all clients are gone with the parent.
    os._exit(0)


def main() -> None:
    """Serves until the parent lets go."""
    settings = Settings(**json.loads(sys.argv[1]))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    config = uvicorn.Config(
        Api(settings).app(),
        # Named, so that figures do not depend on what else is installed.
        loop="asyncio",
        http="h11",
        log_level="warning",
        # Clients stay connected however long they have to wait for one another.
        timeout_keep_alive=3600,
    )
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=settings.socket)])


if __name__ == "__main__":
    main()
