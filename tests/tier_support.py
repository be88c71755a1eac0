"""Worker processes for the tests of backends: see tier_worker.py."""

import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from support import PATIENCE

_WORKER = Path(__file__).with_name("tier_worker.py")


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
        self.process = subprocess.Popen(
            [sys.executable, str(_WORKER), module, name, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.calls: dict[int, Call] = {0: Call(self, 0)}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ready(self) -> "Worker":
        self.calls[0].expect("ready")
        return self

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = json.loads(line)
            self.calls[event["id"]].events.put(event)

    def tell(self, **order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

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
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.process.terminate()  # so that coverage.py can write what it has measured
            self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:  # what it was told and has not read
                pass
