"""The ASGI application of test_prefork.py: its flight is made before the workers are forked."""

import asyncio
import importlib
import json
import os
from pathlib import Path
from typing import Any

from shardedflight import ShardedFlight

DIRECTORY = Path(os.environ["PREFORK_DIRECTORY"])
module, name, options = json.loads(os.environ["PREFORK_TIER"])
flight = ShardedFlight(
    backend=getattr(importlib.import_module(f"shardedflight.backends.{module}"), name)(**options),
    name="prefork",
)


def write(name: str) -> None:
    with (DIRECTORY / name).open("a") as file:
        file.write(f"{os.getpid()}\n")


async def query() -> str:
    write("runs")
    while not (DIRECTORY / "go").exists():
        await asyncio.sleep(0.005)
    return "rows"


async def app(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] == "http"
    write("arrived")
    value, shared = await flight.do_async(query, "hot")
    body = json.dumps([value, shared]).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})
