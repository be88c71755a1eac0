"""A page that shows flights at work: `FlightsPage`, a small ASGI application to mount.

It needs nothing but the flights: no other site, no build step, no framework. Nothing is served
unless it is mounted somewhere, and who may see it is for whoever mounts it to decide: keys can be
sensitive, and `keys=False` leaves them out.
"""

import base64
import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from importlib.resources import files
from time import monotonic
from typing import Any
from urllib.parse import quote

from shardedflight import ShardedFlight
from shardedflight.observe import Ended, Joined, Left, ObservedExecution, Observer, Started

from ._flights import Flights
from ._forks import renew_in_forked_child

__all__ = ["FlightsPage"]

#: Cells of the heat map. A flight with more shards has several in each.
_CELLS = 512

_PAGE = files("shardedflight.observe").joinpath("page.html").read_text("utf-8")


def _policy() -> str:
    """Lets the page run its own script and ask where it comes from, and nothing else."""
    hashes = {}
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", _PAGE, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[tag] = f"'sha256-{digest}'"
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


_HEADERS = [
    (b"cache-control", b"no-store"),
    (b"content-security-policy", _policy().encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


class FlightsPage:
    """An ASGI application: a page, and beside it the data that it asks for every second.

    It knows of executions that began after it was made, and holds no more than what is in flight.
    Flights are not kept alive, and one that is gone leaves the page. All methods may be called from
    any thread.

    Args:
        *flights: What to show. Each needs a name of its own.
        keys: Whether to show what the keys are. They can be sensitive.
        key_length: How many characters of a key's `repr` are shown, at the most.
        limit: How many executions of a flight are listed, at the most: the oldest ones.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A flight has no name, two have the same, or a number is less than 1.
    """

    def __init__(
        self, *flights: ShardedFlight, keys: bool = True, key_length: int = 60, limit: int = 100
    ) -> None:
        if not isinstance(keys, bool):
            raise TypeError(f"keys must be True or False, not {keys!r}")
        for name, number in (("key_length", key_length), ("limit", limit)):
            if type(number) is not int:
                raise TypeError(f"{name} must be an int, not {number!r}")
            if number < 1:
                raise ValueError(f"{name} must be 1 or more, not {number!r}")
        self._keys = keys
        self._key_length = key_length
        self._limit = limit
        self._flights = Flights()
        #: By the names of their flights. Changed under the lock of the flights.
        self._watchers: dict[str, _Watcher] = {}
        try:
            for flight in flights:
                self.add(flight)
        except BaseException:
            self.close()
            raise

    def add(self, flight: ShardedFlight, name: str | None = None) -> None:
        """Shows a flight.

        Args:
            flight: Which.
            name: What it is called here. None: as it calls itself.

        Raises:
            TypeError: `flight` is no flight, or the name no str.
            ValueError: It has no name, another flight has it, or the flight is shown already.
        """

        def watcher(name: str) -> Observer:
            made = self._watchers[name] = _Watcher()
            return made

        with self._flights.lock:
            self._flights.add(flight, name, watcher)

    def remove(self, flight: ShardedFlight) -> None:
        """Shows a flight no more.

        Raises:
            ValueError: It was not shown.
        """
        with self._flights.lock:
            self._watchers.pop(self._flights.remove(flight), None)

    def close(self) -> None:
        """Shows no flight any more, and watches none."""
        for _, flight in self._flights.alive():
            self.remove(flight)

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        """Answers one request."""
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":  # by its specification, what tells a server: not supported
            raise RuntimeError(f"there is no {scope['type']} here")
        status, kind, body, more = self._answer(scope["method"], scope["path"])
        headers = [*_HEADERS, *more, (b"content-type", kind.encode())]
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        shown = b"" if scope["method"] == "HEAD" else body
        await send({"type": "http.response.body", "body": shown})

    def _answer(self, method: str, path: str) -> tuple[int, str, bytes, list[tuple[bytes, bytes]]]:
        text = "text/plain; charset=utf-8"
        if method not in ("GET", "HEAD"):
            return 405, text, b"GET or HEAD\n", [(b"allow", b"GET, HEAD")]
        if path.endswith("/data"):
            return 200, "application/json", json.dumps(self.data()).encode(), []
        if path.endswith("/"):
            return 200, "text/html; charset=utf-8", _PAGE.encode(), []
        # What the page asks for is relative to its own address.
        last = quote(path.rsplit("/", 1)[1]) + "/"
        return 307, text, b"", [(b"location", last.encode())]

    def data(self) -> dict[str, Any]:
        """What the page shows, as it is sent: made of dicts, lists, strings and numbers."""
        with self._flights.lock:
            for name in self._flights.take_gone():
                self._watchers.pop(name, None)
        return {"flights": [self._data_of(name, flight) for name, flight in self._flights.alive()]}

    def _data_of(self, name: str, flight: ShardedFlight) -> dict[str, Any]:
        stats = dataclasses.asdict(flight.stats())
        per_shard: tuple[int, ...] = stats.pop("per_shard")
        together = -(-len(per_shard) // _CELLS)
        calls = stats["executions"] + stats["shared"]
        watcher = self._watchers.get(name)
        running = [] if watcher is None else watcher.running()
        now = monotonic()
        return {
            "name": name,
            "stats": stats,
            "saved": stats["shared"] / calls if calls else 0.0,
            "shards_per_cell": together,
            "occupancy": [
                sum(per_shard[first : first + together])
                for first in range(0, len(per_shard), together)
            ],
            "executions": [
                {
                    "key": self._shown(started.execution.key) if self._keys else None,
                    "age": now - started.time,
                    "followers": followers,
                }
                for started, followers in running[: self._limit]
            ],
            "more": max(0, len(running) - self._limit),
        }

    def _shown(self, key: Any) -> str:
        try:
            text = repr(key)
        except Exception:  # noqa: BLE001 - a user's __repr__ may raise anything
            text = f"<{type(key).__name__} whose repr raises>"
        if len(text) > self._key_length:
            text = text[: self._key_length - 1] + "…"
        # A lone surrogate is no UTF-8.
        return text.encode("utf-8", "replace").decode("utf-8")


class _Watcher(Observer):
    """What runs now in one flight."""

    def __init__(self) -> None:
        self.renew()
        renew_in_forked_child(self)

    def renew(self) -> None:
        """In a forked child nothing runs that its parent's threads have begun."""
        # No lock: each event is one step on one of these. A signal handler may call the flight
        # amid any of them, and so may another thread.
        self._running: dict[ObservedExecution, Started] = {}
        self._following: dict[Joined, None] = {}

    def execution_started(self, event: Started, /) -> None:
        self._running[event.execution] = event

    def execution_ended(self, event: Ended, /) -> None:
        self._running.pop(event.execution, None)

    def follower_joined(self, event: Joined, /) -> None:
        self._following[event] = None

    def follower_left(self, event: Left, /) -> None:
        self._following.pop(event.joined, None)

    def running(self) -> list[tuple[Started, int]]:
        """Executions whose function runs, each with its followers, the oldest first."""
        followers = Counter(joined.execution for joined in self._following.copy())
        found = [
            (started, followers[execution]) for execution, started in self._running.copy().items()
        ]
        return sorted(found, key=lambda pair: pair[0].time)
