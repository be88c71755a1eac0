"""Worker processes for the tests of backends: see tier_worker.py."""

import contextlib
import itertools
import multiprocessing
import os
import queue
import signal
import threading
from typing import Any

import tier_worker
from support import PATIENCE

#: Processes that are forked from one that has nothing but its imports: those take a second.
_context: Any = multiprocessing.get_context(None if os.name == "nt" else "forkserver")
_context.set_forkserver_preload(
    ["tier_worker", "shardedflight.backends.host", "shardedflight.backends.redis"]
)


class Call:
    """A call that a worker was told to make."""

    def __init__(self, worker: "Worker", number: int) -> None:
        self.worker = worker
        self.number = number
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()

    def expect(self, event: str, within: float = PATIENCE) -> dict[str, Any]:
        """The next thing that the worker says of the call: it has to be `event`."""
        try:
            said = self.events.get(timeout=within)
        except queue.Empty:
            raise AssertionError(f"no {event!r} within {within} s") from None
        assert said["event"] == event, said
        return said

    def runs(self) -> dict[str, Any]:
        return self.expect("running")

    def ends(self) -> dict[str, Any]:
        return self.expect("done")

    def order(self, order: str, **details: Any) -> None:
        self.worker.tell(id=self.number, order=order, **details)

    def let_return(self, value: Any) -> None:
        self.order("return", value=value)

    def let_raise(self, message: str) -> None:
        self.order("raise", message=message)


class Worker:
    """A process with one flight on a backend."""

    _numbers = itertools.count(1)

    def __init__(self, module: str, name: str, options: dict[str, Any]) -> None:
        self._connection, its_own = _context.Pipe()
        self.process = _context.Process(
            target=tier_worker.main, args=(its_own, module, name, options), daemon=True
        )
        self.process.start()
        its_own.close()
        self.calls: dict[int, Call] = {0: Call(self, 0)}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ready(self) -> "Worker":
        self.calls[0].expect("ready")
        return self

    def _read(self) -> None:
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                event = self._connection.recv()
                self.calls[event["id"]].events.put(event)

    def tell(self, **order: Any) -> None:
        self._connection.send(order)

    def new_call(self) -> Call:
        number = next(self._numbers)
        call = self.calls[number] = Call(self, number)
        return call

    def call(self, how: str, *parts: Any, timeout: float | None = None) -> Call:
        call = self.new_call()
        call.order("call", how=how, parts=parts, timeout=timeout)
        return call

    def forget(self, *parts: Any) -> None:
        call = self.new_call()
        call.order("forget", parts=parts)
        call.expect("forgotten")

    def stats(self) -> dict[str, Any]:
        call = self.new_call()
        call.order("stats")
        return call.expect("stats")

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def stop(self) -> None:
        if self.process.is_alive():
            # One that was killed may be gone, and its parent, the fork server, not have told yet.
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGCONT)
            self.process.terminate()  # so that coverage.py can write what it has measured
            self.process.join()
        self._reader.join()
        self._connection.close()
        self.process.close()
