"""The control routes of the servers, seen from the client."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import aiohttp

from shardedflight.demo.errors import DemoError
from shardedflight.demo.load import REQUEST_TIMEOUT
from shardedflight.demo.series import summed
from shardedflight.demo.server import RouteName

#: Seconds between two looks at counters that are to reach something.
_POLL_INTERVAL = 0.05


class Counters(TypedDict):
    """Where a route stands."""

    queries: int
    in_flight: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """What a route did to the database since the start, at monotonic times."""

    #: When each query started, and when each ended; not in order.
    starts: list[float]
    ends: list[float]
    #: Times, and how many executions were in flight at each.
    in_flight: list[tuple[float, int]]


async def answering(addresses: Sequence[str]) -> None:
    """Returns when all servers are up. Until then connections wait in the listening sockets."""
    patience = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT)
    async with aiohttp.ClientSession(timeout=patience) as session:
        await Control(session, addresses).counters()


class Control:
    """Asks the servers what they counted, and adds it up."""

    def __init__(self, session: aiohttp.ClientSession, addresses: Sequence[str]) -> None:
        self._session = session
        self._addresses = addresses

    async def counters(self) -> dict[RouteName, Counters]:
        """Returns where each route stands."""
        of_servers: list[dict[RouteName, Counters]] = await self._ask("/control")
        return {
            route: {
                "queries": sum(counters[route]["queries"] for counters in of_servers),
                "in_flight": sum(counters[route]["in_flight"] for counters in of_servers),
            }
            for route in of_servers[0]
        }

    async def idle(self) -> None:
        """Returns when nothing is in flight."""
        while any(route["in_flight"] for route in (await self.counters()).values()):  # noqa: ASYNC110
            await asyncio.sleep(_POLL_INTERVAL)

    async def activity(self, route: RouteName) -> Activity:
        """Returns what the route did."""
        of_servers = await self._ask(f"/control/{route}")
        return Activity(
            starts=[at for one in of_servers for at in one["starts"]],
            ends=[at for one in of_servers for at in one["ends"]],
            in_flight=summed([one["in_flight"] for one in of_servers]),
        )

    async def stats(self) -> dict[RouteName, dict[str, int]]:
        """Returns the shards and the sum of `stats()` of the flights of each route that has any."""
        of_servers: list[dict[RouteName, dict[str, int]]] = await self._ask("/control/stats")
        stats: dict[RouteName, dict[str, int]] = {}
        for route in of_servers[0]:
            total: Counter[str] = Counter()
            for one in of_servers:
                total.update(one[route])
            stats[route] = {**total, "shards": of_servers[0][route]["shards"]}
        return stats

    async def _ask(self, path: str) -> list[Any]:
        """The answers of all servers."""
        return await asyncio.gather(*[self._ask_one(f"{at}{path}") for at in self._addresses])

    async def _ask_one(self, url: str) -> Any:
        try:
            async with self._session.get(url, raise_for_status=True) as response:
                return await response.json()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise DemoError(f"the server does not answer {url} ({error!r})") from error
