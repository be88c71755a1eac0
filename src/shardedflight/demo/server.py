"""The HTTP API, in a process of its own: `/direct/{item}` queries, `/flight/{item}` shares.

`/tier/{item}` shares with the other server processes, if there is a backend to meet on. All routes
run the same query on the same pool of threads; only what stands between the request and the query
differs. `/control` tells what went on.

`/middleware/{item}` is `/direct` behind the middleware, for whoever asks it while the demo runs:
the load does not. `/metrics` and `/debug/flights/` show all flights of the process.
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
from contextlib import asynccontextmanager
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
from shardedflight.demo import tier
from shardedflight.demo.database import Database, Sales
from shardedflight.demo.tier import Meeting
from shardedflight.http.asgi import CoalesceMiddleware
from shardedflight.observe.page import FlightsPage
from shardedflight.observe.prometheus import FlightMetrics

RouteName = Literal["direct", "flight", "tier"]

#: Threads that query, for all routes; as many as Starlette has for routes that are no coroutines.
THREADS = 40

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
    #: What the flight of /tier meets others on; None: there is no such route.
    meeting: Meeting | None

    def write(self) -> str:
        """The settings as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def read(cls, text: str) -> "Settings":
        """The settings that `write` has written."""
        found = json.loads(text)
        meeting = found.pop("meeting")
        return cls(**found, meeting=None if meeting is None else Meeting(**meeting))


class Meter:
    """What one route does to the database, at monotonic times."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: When each query started, and when each ended. Appended to by worker threads, under the
        #: lock.
        self.starts: list[float] = []
        self.ends: list[float] = []
        #: Executions: runs of the query, from the call for it to its answer. Written on the event
        #: loop's thread only.
        self.in_flight = 0
        #: Times, and executions in flight then. Written by the sampling thread only; lists grow
        #: atomically.
        self.samples: list[tuple[float, int]] = []

    def __enter__(self) -> None:
        with self._lock:
            self.starts.append(time.monotonic())

    def __exit__(self, *exc_info: object) -> None:
        with self._lock:
            self.ends.append(time.monotonic())


class Api:
    """The routes and what they share."""

    def __init__(self, settings: Settings) -> None:
        shards = settings.shards
        self._flights: dict[RouteName, ShardedFlight] = {
            "flight": ShardedFlight(shards, name="demo")
        }
        if settings.meeting is not None:
            backend = tier.make(settings.meeting)
            self._flights["tier"] = ShardedFlight(shards, backend=backend, name="tier")
        self._middleware_flight = ShardedFlight(shards, name="middleware")
        flights = (*self._flights.values(), self._middleware_flight)
        self._registry = CollectorRegistry()
        FlightMetrics(*flights, registry=self._registry)
        self._page = FlightsPage(*flights)
        self._database = Database(Path(settings.database))
        self._threads = ThreadPoolExecutor(THREADS)
        routes: tuple[RouteName, ...] = ("direct", *self._flights)
        self._meters = {route: Meter() for route in routes}

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
                Route("/control/{route}", self.activity),
                *(
                    [Route("/tier/{item:int}", self.shared_by_all)]
                    if "tier" in self._flights
                    else []
                ),
            ],
            exception_handlers={Exception: self.failed},
            lifespan=self._lifespan,
        )

    async def direct(self, request: Request) -> Response:
        """Every request runs the query."""
        sales = await self._query(self._meters["direct"], request.path_params["item"])
        return JSONResponse(sales)

    async def shared(self, request: Request) -> Response:
        """Requests for an item whose query is in flight share that query."""
        return await self._by_flight("flight", request)

    async def shared_by_all(self, request: Request) -> Response:
        """The same, whichever process the requests have come to."""
        return await self._by_flight("tier", request)

    async def _by_flight(self, route: RouteName, request: Request) -> Response:
        item = request.path_params["item"]
        meter = self._meters[route]
        flight = self._flights[route]
        sales, _ = await flight.do_async(lambda: self._query(meter, item), "item", item)
        return JSONResponse(sales)

    async def collapsed(self, request: Request) -> Response:
        """Every request that comes through the middleware runs the query."""
        return JSONResponse(await self._query(Meter(), request.path_params["item"]))

    async def metrics(self, request: Request) -> Response:
        """What Prometheus scrapes."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def _query(self, meter: Meter, item: int) -> Sales:
        def work() -> Sales:
            with meter:
                return self._database.sales_of(item)

        meter.in_flight += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            meter.in_flight -= 1

    async def failed(self, request: Request, error: Exception) -> Response:
        """Tells the client why; the whole traceback goes to the log."""
        return PlainTextResponse(repr(error), status_code=500)

    async def control(self, request: Request) -> Response:
        """Counters for the live display."""
        return JSONResponse(
            {
                route: {"queries": len(meter.starts), "in_flight": meter.in_flight}
                for route, meter in self._meters.items()
            }
        )

    async def activity(self, request: Request) -> Response:
        """All that one route did."""
        meter = self._meters[request.path_params["route"]]
        return JSONResponse(
            {"starts": meter.starts, "ends": meter.ends, "in_flight": meter.samples}
        )

    async def stats(self, request: Request) -> Response:
        """What the flights say of themselves."""
        return JSONResponse({route: _stats(flight) for route, flight in self._flights.items()})

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncGenerator[None]:
        threading.Thread(target=self._sample, daemon=True).start()
        yield
        self._threads.shutdown()
        self._database.close()

    def _sample(self) -> None:
        # A thread, since a busy event loop would come to it late, just when it matters.
        while True:
            now = time.monotonic()
            for meter in self._meters.values():
                meter.samples.append((now, meter.in_flight))
            time.sleep(SAMPLE_INTERVAL)


def _stats(flight: ShardedFlight) -> dict[str, int]:
    stats = dataclasses.asdict(flight.stats())
    # One number for each of possibly thousands of shards.
    del stats["per_shard"]
    return {"shards": flight.shards, **stats}


def _end_with_parent() -> None:
    """Ends the process when the other end of standard input closes, however that came about."""
    sys.stdin.buffer.read()
    # At once: the database is only read and all clients are gone with the parent.
    os._exit(0)


def main() -> None:
    """Serves until the parent lets go."""
    settings = Settings.read(sys.argv[1])
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
