"""The clients: many connections that ask, wait for the answer, and ask again."""

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence

import aiohttp

#: Item number n is asked for in proportion to 1 / n ** ZIPF_EXPONENT.
ZIPF_EXPONENT = 1.1

#: The item that everybody wants in the stampede; also the most wanted one otherwise.
HOT_ITEM = 1

#: Seconds after which a client gives up on an answer.
REQUEST_TIMEOUT = 60.0

#: Seconds that a client waits after a failure, as a client should.
_RETRY_PAUSE = 0.1


class Load:
    """The clients of one route. The same seed makes each client ask for the same items in turn.

    They are spread over the servers evenly, as a load balancer does it: each asks one of them.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        addresses: Sequence[str],
        route: str,
        *,
        clients: int,
        keys: int,
        seed: int,
    ) -> None:
        self._session = session
        self._urls = [f"{address}/{route}" for address in addresses]
        self._items = range(1, keys + 1)
        self._weights = list(itertools.accumulate(n**-ZIPF_EXPONENT for n in self._items))
        self._clients = [
            random.Random(f"{seed} {number}")  # noqa: S311 - what to ask for, no secrets
            for number in range(clients)
        ]
        #: Seconds that each good answer took.
        self.latencies: list[float] = []
        #: What went wrong, and how often.
        self.failures: Counter[str] = Counter()

    @property
    def requests(self) -> int:
        """Requests that have ended, well or not."""
        return len(self.latencies) + self.failures.total()

    async def ask(self, item: int, client: int = 0) -> None:
        """One client, of this number, asks for one item; the outcome is counted."""
        url = self._urls[client % len(self._urls)]
        began = time.perf_counter()
        try:
            async with self._session.get(f"{url}/{item}") as response:
                if response.status != 200:
                    failure = f"HTTP {response.status}, {await response.text()}"
                elif (await response.json())["item"] != item:
                    failure = "answer for another item"
                else:
                    self.latencies.append(time.perf_counter() - began)
                    return
        except TimeoutError:
            failure = f"no answer within {REQUEST_TIMEOUT:g} s"
        except aiohttp.ClientError as error:
            failure = type(error).__name__
        self.failures[failure] += 1
        await asyncio.sleep(_RETRY_PAUSE)

    async def ask_until(self, deadline: float) -> None:
        """All clients ask, one item after another, until the monotonic time; then all are idle."""

        async def client(number: int, draw: random.Random) -> None:
            while time.monotonic() < deadline:
                (item,) = draw.choices(self._items, cum_weights=self._weights)
                await self.ask(item, number)

        await self._all(client)

    async def stampede(self) -> None:
        """All clients ask for the hot item at once, each one time."""

        async def client(number: int, _: random.Random) -> None:
            await self.ask(HOT_ITEM, number)

        await self._all(client)

    async def _all(
        self, client: Callable[[int, random.Random], Coroutine[None, None, None]]
    ) -> None:
        async with asyncio.TaskGroup() as group:
            for number, draw in enumerate(self._clients):
                group.create_task(client(number, draw))
