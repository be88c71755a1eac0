"""The servers that `http` measures, each in a process of its own: uvicorn and cheroot.

`python -m shardedflight.bench.http_server asgi middleware` serves on a free port of the loopback
interface, prints the port, and ends when it is terminated. The application answers at once; on the
path `/clock`, which no middleware is around, it answers what the server has taken so far.
"""

import json
import socket
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import uvicorn
from cheroot import wsgi as cheroot

from shardedflight.bench.basics import clock
from shardedflight.http import asgi, wsgi

ROUTES = ("/item", "/public")
#: The path whose answers say that they may be shared.
SHARED = "/public"

#: Seconds for which a key stays unshareable and a connection open: longer than a measurement.
_LONG = 3600

#: The body of an answer; all are of one length.
BODY = b"x" * 250
_FIELDS = [("Content-Length", str(len(BODY))), ("Content-Type", "text/plain")]
_PUBLIC = [*_FIELDS, ("Cache-Control", "public")]
_RAW_FIELDS, _RAW_PUBLIC = (
    [(name.lower().encode(), value.encode()) for name, value in fields]
    for fields in (_FIELDS, _PUBLIC)
)


async def answer_asgi(scope: Any, receive: Any, send: Any) -> None:
    """The ASGI application."""
    headers = _RAW_PUBLIC if scope["path"] == SHARED else _RAW_FIELDS
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": BODY})


def answer_wsgi(environ: Any, start_response: Any) -> Iterable[bytes]:
    """The WSGI application."""
    start_response("200 OK", _PUBLIC if environ["PATH_INFO"] == SHARED else _FIELDS)
    return [BODY]


def _taken(middleware: Any) -> bytes:
    """The clock, and how many requests went which way; padded, as all answers are of one length."""
    counts = {}
    if middleware is not None:
        executions = middleware.flight.stats().executions
        counts = {"led": executions, **middleware.stats().passed}
    return json.dumps([clock(), counts]).encode().ljust(len(BODY))


def serve_asgi(middleware: asgi.CoalesceMiddleware | None) -> None:
    """Serves by uvicorn."""
    inner: Any = middleware or answer_asgi

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/clock":
            await send({"type": "http.response.start", "status": 200, "headers": _RAW_FIELDS})
            await send({"type": "http.response.body", "body": _taken(middleware)})
        else:
            await inner(scope, receive, send)

    config = uvicorn.Config(
        app, log_level="error", access_log=False, lifespan="off", timeout_keep_alive=_LONG
    )
    # asyncio switches Nagle's delay off only where the protocol is named, as it is where uvicorn
    # binds for itself. With it the client would wait for most answers, and the server be idle.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    _tell(listener.getsockname()[1])
    uvicorn.Server(config).run(sockets=[listener])


def serve_wsgi(middleware: wsgi.CoalesceMiddleware | None) -> None:
    """Serves by cheroot."""
    inner: Any = middleware or answer_wsgi

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/clock":
            start_response("200 OK", _FIELDS)
            return [_taken(middleware)]
        answered: Iterable[bytes] = inner(environ, start_response)
        return answered

    server: Any = cheroot.Server(("127.0.0.1", 0), app, timeout=_LONG)
    server.keep_alive_conn_limit = 100
    server.prepare()
    _tell(server.bind_addr[1])
    server.serve()


def _tell(port: int) -> None:
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()


def main(arguments: Sequence[str]) -> None:
    """Serves one of the four."""
    match arguments:
        case ["asgi", "bare"]:
            serve_asgi(None)
        case ["asgi", "middleware"]:
            serve_asgi(asgi.CoalesceMiddleware(answer_asgi, routes=ROUTES, pass_through_time=_LONG))
        case ["wsgi", "bare"]:
            serve_wsgi(None)
        case ["wsgi", "middleware"]:
            serve_wsgi(wsgi.CoalesceMiddleware(answer_wsgi, routes=ROUTES, pass_through_time=_LONG))
        case _:
            sys.exit("usage: http_server {asgi,wsgi} {bare,middleware}")


if __name__ == "__main__":
    main(sys.argv[1:])
