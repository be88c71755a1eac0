"""The same load on one route after the other, and what came of it."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress

import aiohttp

from shardedflight.demo.command import Options
from shardedflight.demo.control import Control
from shardedflight.demo.errors import DemoError
from shardedflight.demo.figures import Figures, RouteFigures, Stampede
from shardedflight.demo.load import REQUEST_TIMEOUT, Load
from shardedflight.demo.progress import Display
from shardedflight.demo.series import most_at_once
from shardedflight.demo.server import RouteName

#: Seconds between two looks at the counters for the display.
_POLL_INTERVAL = 0.25


async def measure(addresses: Sequence[str], options: Options, display: Display) -> Figures:
    """Fires the load at the routes of the servers."""
    async with aiohttp.ClientSession(
        # As many connections as clients, kept open however long they wait for one another.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3600),
        timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT),
    ) as session:
        control = Control(session, addresses)
        routes: dict[RouteName, RouteFigures] = {}
        for route in await control.counters():
            load = Load(
                session,
                addresses,
                route,
                clients=options.clients,
                keys=options.keys,
                seed=options.seed,
            )
            routes[route] = await _measure_route(route, load, control, options, display)
        return Figures(routes=routes, stats=await control.stats())


async def _measure_route(
    route: RouteName, load: Load, control: Control, options: Options, display: Display
) -> RouteFigures:
    # Queries whose clients gave up may still be running.
    await control.idle()
    display.begin(f"Load on /{route}")
    watch = asyncio.create_task(_watch(route, load, control, options.duration, display))
    try:
        began = time.monotonic()
        await load.ask_until(began + options.duration / 2)
        stampede_began = time.monotonic()
        await load.stampede()
        stampede_ended = time.monotonic()
        await load.ask_until(began + options.duration)
        ended = time.monotonic()
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
    activity = await control.activity(route)
    starts, ends = activity.starts, activity.ends
    display.end(_note(load, ended - began, len(starts)))
    return RouteFigures(
        seconds=ended - began,
        requests=load.requests,
        failures=dict(load.failures),
        queries=len(starts),
        queries_at_once=most_at_once(starts, ends, began, ended),
        latencies=sorted(load.latencies),
        in_flight=[
            (at - began, number) for at, number in activity.in_flight if began <= at <= ended
        ],
        stampede=Stampede(
            began=stampede_began - began,
            ended=stampede_ended - began,
            requests=options.clients,
            queries=sum(stampede_began <= at <= stampede_ended for at in starts),
            queries_at_once=most_at_once(starts, ends, stampede_began, stampede_ended),
        ),
    )


async def _watch(
    route: RouteName, load: Load, control: Control, duration: float, display: Display
) -> None:
    began = time.monotonic()
    while True:
        # The measurement itself reports a server that does not answer.
        with suppress(DemoError):
            counters = (await control.counters())[route]
            elapsed = time.monotonic() - began
            note = _note(load, elapsed, counters["queries"])
            display.show(elapsed / duration, f"{note}, {counters['in_flight']:,} in flight")
        await asyncio.sleep(_POLL_INTERVAL)


def _note(load: Load, elapsed: float, queries: int) -> str:
    failed = load.failures.total()
    return f"{load.requests:,} requests, {load.requests / elapsed:,.0f}/s, {queries:,} queries" + (
        f", {failed:,} FAILED" if failed else ""
    )
