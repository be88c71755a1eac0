"""A worker process of the tests of backends: it does what it is told.

Its functions say that they run, and wait to be told how to end. So a test decides the order of
things across processes without guessing times.
"""

import asyncio
import importlib
import threading
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

from shardedflight import FlightErrorGroup, ShardedFlight, coalesce
from shardedflight.backends import fencing_token


def parts_of(parts: list[Any]) -> tuple[Any, ...]:
    return tuple(tuple(part) if isinstance(part, list) else part for part in parts)


def fetch(worker: "Worker", call: int, *key: Any) -> Any:
    return worker.run(call)


def only_the_key(worker: "Worker", call: int, *key: Any) -> Any:
    return key


class Worker:
    def __init__(
        self, connection: Connection, module: str, name: str, options: dict[str, Any]
    ) -> None:
        self._connection = connection
        self._saying = threading.Lock()
        make = getattr(importlib.import_module(f"shardedflight.backends.{module}"), name)
        self.backend = make(**options)
        self.flight = ShardedFlight(backend=self.backend, name="workers")
        self.fetch = coalesce(flight=self.flight, key=only_the_key)(fetch)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        #: How each call's function is to end.
        self.gates: dict[int, Future[Any]] = {}
        self.calls: dict[int, Any] = {}

    def say(self, **event: Any) -> None:
        with self._saying:
            self._connection.send(event)

    def gate(self, call: int, keys: Any) -> "Future[Any]":
        gate = self.gates[call] = Future()
        self.say(id=call, event="running", keys=keys, token=fencing_token())
        return gate

    def run(self, call: int, keys: Any = None) -> Any:
        return self.gate(call, keys).result()

    async def run_async(self, call: int, keys: Any = None) -> Any:
        return await asyncio.wrap_future(self.gate(call, keys))

    def many(self, call: int, keys: list[Any]) -> Any:
        return {key: value for key, value in self.run(call, keys) if key in keys}

    async def many_async(self, call: int, keys: list[Any]) -> Any:
        return {key: value for key, value in await self.run_async(call, keys) if key in keys}

    def call(self, call: int, how: str, parts: list[Any], timeout: float | None) -> None:
        key = parts_of(parts)
        flight = self.flight
        if how == "do":
            threading.Thread(
                target=self.report,
                args=(call, lambda: flight.do(lambda: self.run(call), *key, timeout=timeout)),
                daemon=True,
            ).start()
        elif how == "do_many":
            threading.Thread(
                target=self.report,
                args=(call, lambda: flight.do_many(lambda keys: self.many(call, keys), key)),
                daemon=True,
            ).start()
        elif how == "coalesce":
            threading.Thread(
                target=self.report,
                args=(call, lambda: (self.fetch(self, call, *key), None)),
                daemon=True,
            ).start()
        elif how == "do_future":
            future = self.calls[call] = flight.do_future(lambda: self.run(call), *key)
            future.add_done_callback(lambda done: self.report(call, done.result))
        else:

            async def body() -> Any:
                if how == "do_async":
                    return await flight.do_async(lambda: self.run_async(call), *key)
                return await flight.do_many_async(lambda keys: self.many_async(call, keys), key)

            future = self.calls[call] = asyncio.run_coroutine_threadsafe(body(), self.loop)
            future.add_done_callback(lambda done: self.report(call, done.result))

    def report(self, call: int, outcome: Any) -> None:
        try:
            value = outcome()
        except FlightErrorGroup as error:
            failed = {str(key): str(e) for key, e in error.failed.items()}
            found = [[key, *pair] for key, pair in error.found.items()]
            self.say(id=call, event="done", failed=failed, found=found, error="FlightErrorGroup")
        except BaseException as error:
            notes = getattr(error, "__notes__", [])
            kind = type(error).__name__
            self.say(id=call, event="done", error=kind, message=str(error), notes=notes)
        else:
            if isinstance(value, dict):
                value = [[[key, *pair] for key, pair in value.items()], None]
            self.say(id=call, event="done", value=value[0], shared=value[1])

    def obey(self, order: dict[str, Any]) -> None:
        call = order["id"]
        match order["order"]:
            case "call":
                self.call(call, order["how"], order["parts"], order.get("timeout"))
            case "return":
                self.gates.pop(call).set_result(order["value"])
            case "raise":
                self.gates.pop(call).set_exception(ValueError(order["message"]))
            case "cancel":
                self.calls[call].cancel()
            case "forget":
                self.flight.forget(*parts_of(order["parts"]))
                self.say(id=call, event="forgotten")
            case "stats":
                stats = self.flight.stats()
                names = ("remote_leads", "remote_follows", "takeovers", "fenced", "fallbacks")
                names += ("misses", "executions", "errors", "in_flight", "waiting", "timeouts")
                names += ("forgotten",)
                self.say(id=call, event="stats", **{name: getattr(stats, name) for name in names})
            case other:
                raise ValueError(other)


def main(connection: Connection, module: str, name: str, options: dict[str, Any]) -> None:
    worker = Worker(connection, module, name, options)
    worker.say(id=0, event="ready")
    while True:
        try:
            order = connection.recv()
        except EOFError:
            return
        worker.obey(order)
