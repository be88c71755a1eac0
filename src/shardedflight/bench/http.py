"""What a request costs that goes through the ASGI middleware and is not collapsed.

The aim is at most 10 % of the throughput for what passes through.

Two uvicorn processes serve the same application, one with the middleware around it. The same
clients, each on a connection of its own, ask both in rounds that alternate; a round's figure is the
ratio of the two throughputs. Run it with `python -m shardedflight.bench.http`.

Blind to: an application that does anything. This one answers at once, so that the share of the
middleware in a real request is smaller than here.
"""

import argparse
import contextlib
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import uvicorn

from shardedflight.http.asgi import CoalesceMiddleware

#: What the requests of a case begin with. `{}` is the number of the connection: where requests may
#: be collapsed, each connection asks for something of its own.
CASES = {
    "passes through: a route that is not named": "GET /other HTTP/1.1\r\n",
    "passes through: a cookie": "GET /item HTTP/1.1\r\nCookie: a=b\r\n",
    "passes through: a key known to be unshareable": "GET /item HTTP/1.1\r\n",
    "leads, and nobody follows (no aim)": "GET /public?{} HTTP/1.1\r\n",
}

#: As many fields as a browser sends.
FIELDS = "".join(
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
BODY = b"x" * 100


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answers at once, below /public for sharing."""
    headers = [(b"content-length", b"100"), (b"content-type", b"text/plain")]
    if scope["path"] == "/public":
        headers.append((b"cache-control", b"public"))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": BODY})


def serve(side: str) -> None:
    """Serves on a free port of the loopback interface, which is printed, until stdin is closed."""
    app: Any = application
    if side == "middleware":
        # A key stays unshareable for as long as the measurement may take.
        app = CoalesceMiddleware(application, routes=["/item", "/public"], pass_through_time=3600)
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="error", access_log=False, lifespan="off")
    )
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    server.run(sockets=[listener])


@contextlib.contextmanager
def served(side: str) -> Iterator[list[socket.socket]]:
    """Connections to a process that serves one side."""
    command = [sys.executable, "-m", "shardedflight.bench.http", "--serve", side]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            with contextlib.ExitStack() as stack:
                yield [
                    stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                    for _ in range(CONNECTIONS)
                ]
        finally:
            process.terminate()


def throughput(connections: Sequence[socket.socket], text: str, seconds: float) -> float:
    """Requests per second, one under way on each connection."""
    requests = [f"{text.format(number)}{FIELDS}\r\n".encode() for number in range(len(connections))]
    answered = 0
    begin = time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds or not answered:
        for connection, request in zip(connections, requests, strict=True):
            connection.sendall(request)
        for connection in connections:
            answer = b""
            while not answer.endswith(BODY):
                received = connection.recv(65536)
                if not received:
                    raise ConnectionError("the server has closed a connection")
                answer += received
        answered += len(connections)
    return answered / elapsed


def main(arguments: Sequence[str]) -> int:
    """Measures, prints one line for each case, and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m shardedflight.bench.http", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each case")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="seconds of each side of a round"
    )
    parser.add_argument("--serve", choices=["bare", "middleware"], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve)
        return 0
    with served("middleware") as ours, served("bare") as floor:
        sides = {"ours": ours, "floor": floor}
        for case, text in CASES.items():
            for connections in sides.values():
                throughput(connections, text, options.seconds)
            rounds: list[dict[str, float]] = []
            for number in range(options.rounds):
                order = list(sides) if number % 2 else list(sides)[::-1]
                rounds.append(
                    {side: throughput(sides[side], text, options.seconds) for side in order}
                )
            cost = 1 - statistics.median(one["ours"] / one["floor"] for one in rounds)
            ours_median, floor_median = (
                statistics.median(one[side] for one in rounds) for side in ("ours", "floor")
            )
            sys.stdout.write(
                f"{case}: {ours_median:,.0f} requests/s with the middleware, "
                f"{floor_median:,.0f} without: costs {cost:.1%} of the throughput\n"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
