"""The control routes of the server, seen from the client."""

import asyncio
from typing import Any, TypedDict

import aiohttp

from shardedflight.demo.errors import DemoError
from shardedflight.demo.load import REQUEST_TIMEOUT
from shardedflight.demo.server import RouteName

#: Seconds between two looks at counters that are to reach something.
_POLL_INTERVAL = 0.05


class Counters(TypedDict):
    """Where a route stands."""

    queries: int
    in_flight: int


class Lap(TypedDict):
    """What a route did to the database up to the end of a stretch."""

    #: Since the server's start.
    queries: int
    #: Within the stretch.
    queries_at_once: int


async def answering(address: str) -> None:
    """Returns when the server is up. Until then a connection waits in the listening socket."""
    patience = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT)
    async with aiohttp.ClientSession(address, timeout=patience) as session:
        await Control(session).counters()


class Control:
    """Asks the server what it counted."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def counters(self) -> dict[RouteName, Counters]:
        """Returns where each route stands."""
        counters: dict[RouteName, Counters] = await self._ask("GET", "/control")
        return counters

    async def idle(self) -> None:
        """Returns when nothing is in flight."""
        while any(route["in_flight"] for route in (await self.counters()).values()):  # noqa: ASYNC110
            await asyncio.sleep(_POLL_INTERVAL)

    async def lap(self, route: RouteName) -> Lap:
        """Ends a stretch of the route's measurement and begins the next."""
        lap: Lap = await self._ask("POST", f"/control/{route}/lap")
        return lap

    async def samples(self, route: RouteName) -> list[tuple[float, int]]:
        """Returns monotonic times and how many executions of the route were in flight at each."""
        return [(at, number) for at, number in await self._ask("GET", f"/control/{route}/samples")]

    async def stats(self) -> dict[str, int]:
        """Returns the flight's shards and `stats()`."""
        stats: dict[str, int] = await self._ask("GET", "/control/stats")
        return stats

    async def _ask(self, method: str, path: str) -> Any:
        try:
            async with self._session.request(method, path, raise_for_status=True) as response:
                return await response.json()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise DemoError(f"the server does not answer {path} ({error!r})") from error
