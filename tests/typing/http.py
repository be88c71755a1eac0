"""What users' type checkers see of `shardedflight.http`. Checked, never run."""

from collections.abc import Mapping
from typing import assert_type

import httpx
from fastapi import FastAPI
from flask import Flask
from starlette.applications import Starlette

from shardedflight import ShardedFlight
from shardedflight.http import HttpStats, asgi, wsgi
from shardedflight.http.httpx import AsyncCoalesceTransport, CoalesceTransport

shop = FastAPI()
shop.add_middleware(asgi.CoalesceMiddleware, routes=["/items"], body_limit=1000)

app = asgi.CoalesceMiddleware(Starlette(), routes=lambda scope: scope["path"] == "/items")
assert_type(app.flight, ShardedFlight)
assert_type(app.stats(), HttpStats)
assert_type(app.stats().passed, Mapping[str, int])

flask = Flask("shop")
wrapped = wsgi.CoalesceMiddleware(
    flask.wsgi_app, routes=["/items"], shareable=["/items"], max_waiters=3
)

client = httpx.Client(transport=CoalesceTransport(httpx.HTTPTransport(), shareable=()))
async_client = httpx.AsyncClient(transport=AsyncCoalesceTransport(server_errors=False))

asgi.CoalesceMiddleware(Starlette(), routes=["/"], body_limit="1 MiB")  # type: ignore[arg-type]
asgi.CoalesceMiddleware(Starlette())  # type: ignore[call-arg]
wsgi.CoalesceMiddleware(flask, routes=["/"], patience=3)  # type: ignore[call-arg]
CoalesceTransport(httpx.AsyncHTTPTransport())  # type: ignore[arg-type]
