"""What a request costs that goes through a middleware and is not collapsed.

Two processes serve the same application, one with the middleware around it. The same client asks
both, with a request under way on each of its connections. What is measured is the processor time of
the server for each request: the throughput of a server that is busy is its inverse.
"""

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from shardedflight.bench.basics import FORM, expect
from shardedflight.bench.measure import Contender, Pair


@dataclass(frozen=True)
class Case:
    """A kind of request.

    Attributes:
        point: Its name on the dashboard.
        text: What the request begins with. `{}` is the number of the connection: where requests
            may be collapsed, each connection asks for something of its own.
        way: What the middleware counts it as.
    """

    point: str
    text: str
    way: str


CASES = (
    Case("a route that is not named", "GET /other HTTP/1.1\r\n", "route"),
    Case("a cookie", "GET /item HTTP/1.1\r\nCookie: a=b\r\n", "cookie"),
    Case("a key known to be unshareable", "GET /item HTTP/1.1\r\n", "learned"),
    Case("a leader that nobody follows", "GET /public?{} HTTP/1.1\r\n", "led"),
)

#: As many fields as a browser sends.
_FIELDS = "".join(
    f"{name}: {value}\r\n"
    for name, value in (
        ("Host", "127.0.0.1"),
        ("User-Agent", "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"),
        ("Accept", "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"),
        ("Accept-Language", "en-US,en;q=0.5"),
        ("Accept-Encoding", "gzip, deflate, br, zstd"),
        ("Connection", "keep-alive"),
        ("Upgrade-Insecure-Requests", "1"),
        ("Sec-Fetch-Dest", "document"),
        ("Sec-Fetch-Mode", "navigate"),
        ("Sec-Fetch-Site", "none"),
        ("Priority", "u=0, i"),
    )
)

CONNECTIONS = 16

#: Bytes of the body of each answer.
_LENGTH = 250


class Client:
    """Connections to a process that serves one side."""

    def __init__(self, connections: Sequence[socket.socket]) -> None:
        self._connections = connections

    def ask(self, text: str, times: int = 1) -> bytes:
        """Sends a request on each connection, so many times. Returns the last body."""
        requests = [
            f"{text.format(number)}{_FIELDS}\r\n".encode()
            for number in range(len(self._connections))
        ]
        body = b""
        for _ in range(times):
            for connection, request in zip(self._connections, requests, strict=True):
                connection.sendall(request)
            for connection in self._connections:
                body = _body(connection)
        return body

    def cost(self, case: Case, requests: int) -> float:
        """Returns the server's nanoseconds for each of so many requests, or some more."""
        times = -(-requests // len(self._connections))
        begin, before = self._taken()
        self.ask(case.text, times)
        end, after = self._taken()
        if after:
            asked = times * len(self._connections)
            expect(
                after.get(case.way, 0) - before.get(case.way, 0), asked, f"requests: {case.point}"
            )
        return (end - begin) / (times * len(self._connections))

    def _taken(self) -> tuple[int, dict[str, int]]:
        """The server's clock, and how many requests went which way."""
        clock, counts = json.loads(Client(self._connections[:1]).ask("GET /clock HTTP/1.1\r\n"))
        return clock, counts


def _body(connection: socket.socket) -> bytes:
    received = b""
    while True:
        more = connection.recv(65536)
        if not more:
            raise ConnectionError("the server has closed a connection")
        received += more
        _, end, body = received.partition(b"\r\n\r\n")
        if end and len(body) >= _LENGTH:
            return body


@contextlib.contextmanager
def served(interface: str, side: str) -> Iterator[Client]:
    """Connections to a process that serves one side of one interface."""
    command = [sys.executable, "-m", "shardedflight.bench.http_server", interface, side]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            with contextlib.ExitStack() as stack:
                yield Client(
                    [
                        stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                        for _ in range(CONNECTIONS)
                    ]
                )
        finally:
            process.terminate()


@contextlib.contextmanager
def passing(requests: int) -> Iterator[Sequence[Contender]]:
    """Prepares the benchmark of requests that are not collapsed."""
    with contextlib.ExitStack() as stack:
        contenders: list[Contender] = []
        for interface in ("asgi", "wsgi"):
            ours = stack.enter_context(served(interface, "middleware"))
            floor = stack.enter_context(served(interface, "bare"))
            for case in CASES:
                ours.ask(case.text)  # the middleware learns, if there is anything to learn
                pair = Pair(partial(ours.cost, case, requests), partial(floor.cost, case, requests))
                contenders.append(Contender(FORM, pair, f"{interface.upper()}, {case.point}"))
        yield contenders
