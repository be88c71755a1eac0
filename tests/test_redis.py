"""What is the cluster tier's own, on a real Valkey: leases, messages, and a server that fails.

The table of faults is that of issue 5. See test_tiers for what all tiers do alike.
"""

import asyncio
import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import redis
import redis.asyncio as asyncio_redis
from proof.fuzz.payloads import Server
from support import PATIENCE, eventually, spawn
from tier_support import Worker
from valkey_support import Valkey

from shardedflight import BackendError, ShardedFlight
from shardedflight.backends.redis import RedisBackend

if os.name == "nt":
    pytest.skip("there is no Valkey for Windows", allow_module_level=True)

pytestmark = pytest.mark.around

LEASE = 1.0


@pytest.fixture
def server() -> Iterator[Valkey]:
    server = Valkey()
    yield server
    server.stop()


@pytest.fixture
def start(server: Valkey) -> Iterator[Callable[..., list[Worker]]]:
    started: list[Worker] = []

    def start(count: int, **options: Any) -> list[Worker]:
        options = {"server": server.url, "lease": LEASE, "timeout": 5.0, **options}
        started.extend(Worker("redis", "RedisBackend", options) for _ in range(count))
        return [worker.ready() for worker in started[-count:]]

    yield start
    for worker in started:
        worker.stop()


@pytest.fixture
def backend(server: Valkey) -> Iterator[RedisBackend]:
    backend = RedisBackend(server.url, lease=LEASE, timeout=1.0)
    yield backend
    backend.close()


def followers(server: Valkey) -> int:
    with server.client() as client:
        names: Any = client.keys("*:f:*")
        fields: Any = [client.hlen(name) for name in names]
        return sum(max(0, number - 3) for number in fields)


def keys(server: Valkey, pattern: str) -> list[bytes]:
    found: Any = server.do("KEYS", pattern)
    return found


# -- leaders that are lost ------------------------------------------------------------------------


def test_a_killed_leader_is_replaced_within_its_lease_and_a_tenth(
    server: Valkey, start: Any
) -> None:
    """The best of some: the machine may be busy."""
    took: list[float] = []
    while not took or (min(took) > LEASE * 1.1 and len(took) < 5):
        first, second = start(2)
        leader = first.call("do", "k")
        leader.runs()
        follower = second.call("do", "k")
        eventually(lambda: followers(server) == 1)
        before = time.perf_counter()
        first.kill()
        follower.runs()
        took.append(time.perf_counter() - before)
        follower.let_return(1)
        follower.ends()
    assert min(took) <= LEASE * 1.1


def test_a_stopped_leader_is_replaced_and_fenced(server: Valkey, start: Any) -> None:
    first, second, third = start(3)
    leader = first.call("do", "k")
    old = leader.runs()["token"]
    followers_ = [second.call("do", "k"), third.call("do", "k")]
    eventually(lambda: followers(server) == 2)
    first.signal(signal.SIGSTOP)
    eventually(lambda: any(not call.events.empty() for call in followers_))
    (heir,) = [call for call in followers_ if not call.events.empty()]
    assert heir.runs()["token"] > old
    leader.let_return("old")
    first.signal(signal.SIGCONT)
    assert leader.ends()["value"] == "old"  # in its own process
    assert first.stats()["fenced"] == 1
    eventually(lambda: followers(server) >= 1)
    heir.let_return("new")
    assert [call.ends()["value"] for call in followers_] == ["new", "new"]


def test_a_function_of_more_than_three_leases_is_not_taken_over(server: Valkey, start: Any) -> None:
    first, second = start(2)  # a lease that a busy machine's scheduler does not outlast
    leader = first.call("do", "k")
    leader.runs()
    follower = second.call("do_async", "k")
    eventually(lambda: followers(server) == 1)
    time.sleep(3.5 * LEASE)  # the time itself is what is tested
    assert follower.events.empty()
    leader.let_return(1)
    assert (leader.ends()["value"], follower.ends()["value"]) == (1, 1)
    assert second.stats()["takeovers"] == 0


# -- messages that are lost -----------------------------------------------------------------------


def test_a_message_that_is_lost_is_made_up_for(server: Valkey, start: Any) -> None:
    """The ACL of the default user forbids the inboxes' channels while the leader ends."""
    first, second = start(2)
    leader = first.call("do", "k")
    leader.runs()
    follower = second.call("do", "k")
    eventually(lambda: followers(server) == 1)
    channels: Any = server.do("PUBSUB", "SHARDCHANNELS")
    (inbox,) = [name for name in channels if name.endswith(_inbox_of(server))]
    with server.client() as client:
        # The follower's inbox is renamed where the leader's end will look for it.
        (flight,) = keys(server, "*:f:*")
        client.hdel(flight.decode(), inbox.decode())
        client.hset(flight.decode(), inbox.decode() + "lost", "")
        leader.let_return([1, 2])
        assert leader.ends() == {
            "id": leader.number,
            "event": "done",
            "value": [1, 2],
            "shared": True,
        }
    assert follower.ends()["value"] == [1, 2]
    assert (second.stats()["remote_follows"], second.stats()["remote_leads"]) == (1, 0)


def _inbox_of(server: Valkey) -> bytes:
    """The end of the only follower's inbox."""
    (flight,) = keys(server, "*:f:*")
    fields: Any = server.do("HKEYS", flight)
    (inbox,) = [field for field in fields if len(field) > 1]
    return bytes(inbox)[-16:]


def test_a_cut_inbox_is_there_again_and_missed_nothing(server: Valkey, start: Any) -> None:
    first, second = start(2, lease=30.0)  # no watchdog will help
    leader = first.call("do", "k")
    leader.runs()
    follower = second.call("do", "k")
    eventually(lambda: followers(server) == 1)
    with server.client() as client:
        client.execute_command("CLIENT", "PAUSE", 300, "ALL")
    leader.let_return("value")
    server.do("CLIENT", "KILL", "TYPE", "pubsub")
    assert leader.ends()["value"] == follower.ends()["value"] == "value"
    again = second.call("do", "k")
    again.runs()
    server.do("CLIENT", "KILL", "TYPE", "pubsub")
    third = first.call("do", "k")
    eventually(lambda: followers(server) == 1)
    again.let_return(2)
    assert third.ends()["value"] == 2


def test_a_large_outcome_is_fetched(server: Valkey, start: Any) -> None:
    first, second = start(2, lease=30.0)
    leader = first.call("do", "k")
    leader.runs()
    follower = second.call("do", "k")
    eventually(lambda: followers(server) == 1)
    leader.let_return("x" * 200_000)
    assert follower.ends()["value"] == "x" * 200_000
    assert leader.ends()["shared"] is True


# -- a server that is lost ------------------------------------------------------------------------


def test_a_server_killed_and_restarted_empty(server: Valkey, start: Any) -> None:
    workers = start(4)
    calls = [worker.call("do", "k") for worker in workers]
    eventually(lambda: any(not call.events.empty() for call in calls))
    eventually(lambda: followers(server) == 3)
    server.kill()
    server.start()
    ran: set[int] = set()
    answered: dict[int, Any] = {}
    deadline = time.monotonic() + PATIENCE
    while len(answered) < 4 and time.monotonic() < deadline:
        for number, call in enumerate(calls):
            if not call.events.empty():
                said = call.events.get()
                if said["event"] == "running":
                    assert number not in ran
                    ran.add(number)
                    threading.Timer(0.3, call.let_return, [number]).start()
                else:
                    answered[number] = said["value"]
        time.sleep(0.001)
    assert len(answered) == 4, (ran, answered)
    assert all(value in ran for value in answered.values())


def use(flight: ShardedFlight) -> None:
    """Returns when the server has been used: a busy machine may miss the first calls."""

    def used() -> bool:
        flight.do(lambda: None, "k")
        return flight.stats().remote_leads > 0

    eventually(used, "the use of the server")


def assert_falls_back_and_returns(
    flight: ShardedFlight,
    caplog: pytest.LogCaptureFixture,
    heal: Callable[[], None],
    within: float = 10.0,
) -> None:
    """Calls are answered while the server is of no use, and use it when it is healed."""
    before = flight.stats()
    with caplog.at_level(logging.WARNING, "shardedflight"):
        start = time.monotonic()
        for number in range(5):
            assert flight.do(lambda n=number: n, "k") == (number, False)
        assert asyncio.run(flight.do_async(lambda: asyncio.sleep(0, "async"), "k")) == (
            "async",
            False,
        )
        assert flight.do_many(lambda ks: dict.fromkeys(ks, 1), ["a", "b"]) == {
            "a": (1, False),
            "b": (1, False),
        }
        assert time.monotonic() - start < within
    assert flight.stats().fallbacks >= before.fallbacks + 7
    assert 1 <= len(caplog.records) <= 2
    heal()

    def back() -> bool:
        leads = flight.stats().remote_leads
        flight.do(lambda: None, "k")
        return flight.stats().remote_leads > leads

    eventually(back, "the use of the server")


@pytest.mark.parametrize("used_before", [False, True])
def test_a_server_that_can_not_be_reached(
    server: Valkey, backend: RedisBackend, caplog: pytest.LogCaptureFixture, used_before: bool
) -> None:
    flight = ShardedFlight(backend=backend)
    if used_before:
        use(flight)
    server.kill()
    assert_falls_back_and_returns(flight, caplog, server.start)


@pytest.mark.parametrize("used_before", [False, True])
def test_a_server_that_does_not_answer(
    server: Valkey, backend: RedisBackend, caplog: pytest.LogCaptureFixture, used_before: bool
) -> None:
    flight = ShardedFlight(backend=backend)
    if used_before:
        use(flight)
    server.signal(signal.SIGSTOP)
    start = time.monotonic()
    assert flight.do(lambda: 1, "k") == (1, False)
    assert time.monotonic() - start < 3 * backend.timeout
    assert_falls_back_and_returns(flight, caplog, lambda: server.signal(signal.SIGCONT))


def test_callers_do_not_probe_a_server_that_does_not_answer(server: Valkey) -> None:
    """To look whether it is back takes `timeout`: that is for the backend's own thread to do."""
    keeper = "shardedflight-redis-keeper"
    connecting: list[str] = []
    holding, released = threading.Event(), threading.Event()

    class Recorded(redis.Connection):
        def connect(self) -> None:
            connecting.append(threading.current_thread().name)
            super().connect()

    def hold() -> None:
        holding.set()
        released.wait(PATIENCE)
        released.clear()

    pool = redis.ConnectionPool.from_url(server.url, connection_class=Recorded)
    backend = RedisBackend(redis.Redis(connection_pool=pool), timeout=0.2)
    try:
        flight = ShardedFlight(backend=backend)
        use(flight)
        before = flight.stats().fallbacks
        server.signal(signal.SIGSTOP)
        flight.do(lambda: None, "k")
        assert flight.stats().fallbacks == before + 1
        connecting.clear()

        def probed() -> bool:
            # A call in each round of the keeper, between its decision to probe and its probe.
            backend.wake_to(hold)
            assert holding.wait(PATIENCE)
            holding.clear()
            flight.do(lambda: None, "k")
            released.set()
            return connecting.count(keeper) >= 2

        eventually(probed, "the probes")
        assert {name for name in connecting if not name.startswith("shardedflight-redis-")} == set()
    finally:
        released.set()
        server.signal(signal.SIGCONT)
        backend.close()


def test_a_server_out_of_memory(
    server: Valkey, backend: RedisBackend, caplog: pytest.LogCaptureFixture
) -> None:
    flight = ShardedFlight(backend=backend)
    use(flight)
    server.do("CONFIG", "SET", "maxmemory", "1")
    assert_falls_back_and_returns(
        flight, caplog, lambda: server.do("CONFIG", "SET", "maxmemory", "0")
    )


def test_a_read_only_replica(
    server: Valkey, backend: RedisBackend, caplog: pytest.LogCaptureFixture
) -> None:
    flight = ShardedFlight(backend=backend)
    use(flight)
    server.do("REPLICAOF", "127.0.0.1", "1")
    assert_falls_back_and_returns(flight, caplog, lambda: server.do("REPLICAOF", "NO", "ONE"))


def test_a_wrong_password(
    server: Valkey, backend: RedisBackend, caplog: pytest.LogCaptureFixture
) -> None:
    server.do("CONFIG", "SET", "requirepass", "secret")
    flight = ShardedFlight(backend=backend)
    assert_falls_back_and_returns(
        flight,
        caplog,
        lambda: server.do("CONFIG", "SET", "requirepass", "", password="secret"),
    )


def test_a_user_who_may_not_subscribe(server: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    server.do("ACL", "SETUSER", "u", "on", ">p", "~*", "resetchannels", "+@all")
    backend = RedisBackend(f"redis://u:p@127.0.0.1:{server.port}", lease=LEASE, timeout=1.0)
    flight = ShardedFlight(backend=backend)
    assert_falls_back_and_returns(
        flight, caplog, lambda: server.do("ACL", "SETUSER", "u", "allchannels")
    )
    backend.close()


def test_scripts_that_vanish_are_sent_again(server: Valkey, backend: RedisBackend) -> None:
    flight = ShardedFlight(backend=backend)
    for _ in range(2):
        flight.do(lambda: 1, "k")
        server.do("SCRIPT", "FLUSH", "SYNC")
    assert (flight.stats().remote_leads, flight.stats().fallbacks) == (2, 0)


def test_an_idle_connection_that_was_closed_is_made_anew(
    server: Valkey, backend: RedisBackend
) -> None:
    flight = ShardedFlight(backend=backend)
    flight.do(lambda: 1, "k")
    server.do("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    flight.do(lambda: 1, "k")
    assert (flight.stats().remote_leads, flight.stats().fallbacks) == (2, 0)


def test_a_leader_whose_end_can_not_be_told_serves_its_process(
    server: Valkey, backend: RedisBackend
) -> None:
    flight = ShardedFlight(backend=backend)

    def run() -> str:
        server.kill()
        return "value"

    assert flight.do(run, "k") == ("value", False)
    assert flight.stats().fallbacks == 1


@pytest.mark.parametrize("payload", [b"", b"nonsense", b"SF\x01V" + b"x" * 40])
def test_an_outcome_that_can_not_be_read_is_a_miss(
    server: Valkey, start: Any, payload: bytes
) -> None:
    first, second = start(2, hold=30.0)
    leader = first.call("do", "k")
    leader.runs()
    leader.let_return("value")
    leader.ends()
    with server.client() as client:
        (held,) = keys(server, "*:r:*")
        client.hset(held.decode(), "p", payload)  # type: ignore[arg-type]
    call = second.call("do", "k")
    call.runs()
    call.let_return("own")
    assert call.ends()["value"] == "own"
    assert (second.stats()["misses"], second.stats()["remote_leads"]) == (1, 1)


@pytest.mark.parametrize(
    ("key", "fields"),
    [("r", {"t": "x", "u": "9" * 18, "p": "p"}), ("r", {"t": "inf", "u": "9" * 18, "p": "p"})]
    + [("f", {"t": t}) for t in ("x", "", "-1", "9" * 30)],
)
@pytest.mark.parametrize("method", ["do", "do_future"])
def test_what_somebody_else_has_written_hangs_nobody(
    server: Valkey, backend: RedisBackend, method: str, key: str, fields: dict[str, str]
) -> None:
    """Of the keys of the scripts: `_scripts.py` says what is in them."""
    name = backend.name(None, ("k",))
    with server.client() as client:
        client.hset(backend._keys(name, key)[0], mapping=fields)  # type: ignore[arg-type]
    flight = ShardedFlight(backend=backend)
    if method == "do":
        assert flight.do(lambda: "own", "k") == ("own", False)
    else:
        assert flight.do_future(lambda: "own", "k").result(PATIENCE) == ("own", False)
    assert flight.stats().fallbacks == 1


@pytest.mark.parametrize(
    "said", [b"-NOSCRIPT\r\n", b":x\r\n", b"*1\r\n" * 5000, b"+OK\r\n", b"*-1\r\n", b"*0\r\n"]
)
@pytest.mark.parametrize("method", ["do", "do_future"])
def test_what_is_no_answer_of_the_servers_hangs_nobody(method: str, said: bytes) -> None:
    """And leaves the keeper running, without which no lease is renewed."""
    other = Server([said] * 2, [])
    backend = RedisBackend(f"redis://127.0.0.1:{other.port}", timeout=PATIENCE)
    flight = ShardedFlight(backend=backend)
    try:
        if method == "do":
            assert flight.do(lambda: "own", "k") == ("own", False)
        else:
            assert flight.do_future(lambda: "own", "k").result(PATIENCE) == ("own", False)
        assert flight.stats().fallbacks == 1
        assert backend._keeper is None or backend._keeper.is_alive()
    finally:
        backend.close()
        other.close()


def test_a_message_that_can_not_be_read_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """And the listener goes on, on another connection."""
    message = b"*3\r\n$10\r\nssubscribe\r\n$1\r\nx\r\n:1\r\n"
    other = Server([b"*2\r\n:0\r\n$1\r\n1\r\n"], [message])
    backend = RedisBackend(f"redis://127.0.0.1:{other.port}", timeout=PATIENCE)
    flight = ShardedFlight(backend=backend)
    try:
        assert flight.do(lambda: "own", "k")[0] == "own"
        eventually(lambda: other.subscribed > 2, "another subscription")
        assert len([r for r in caplog.records if "can not be read" in r.message]) == 1
    finally:
        backend.close()
        other.close()


def test_strange_messages_are_passed_over(server: Valkey, start: Any) -> None:
    first, second = start(2)
    leader = first.call("do", "k")
    leader.runs()
    follower = second.call("do", "k")
    eventually(lambda: followers(server) == 1)
    channels: Any = server.do("PUBSUB", "SHARDCHANNELS")
    for inbox, message in itertools.product(
        channels, [b"", b"d", b"x" * 500, b"d" + b"n" * 20 + b"12:xx", b"\xff" * 30]
    ):
        server.do("SPUBLISH", inbox, message)
    leader.let_return(1)
    assert follower.ends()["value"] == 1
    assert second.stats()["misses"] == 0


# -- hold, and what is left -----------------------------------------------------------------------


def test_without_hold_a_later_call_runs(server: Valkey, start: Any) -> None:
    first, second = start(2)
    leader = first.call("do", "k")
    leader.runs()
    follower = second.call("do", "k")
    eventually(lambda: followers(server) == 1)
    leader.let_return(1)
    follower.ends()
    assert keys(server, "*:r:*")  # kept for those who miss the message
    later = second.call("do", "k")
    later.runs()
    later.let_return(2)
    assert later.ends()["value"] == 2
    eventually(lambda: len(keys(server, "*")) == 1, "that only the token is left")


def test_with_hold_a_later_call_is_served(server: Valkey, start: Any) -> None:
    first, second = start(2, hold=30.0)
    leader = first.call("do", "k")
    leader.runs()
    leader.let_return(1)
    leader.ends()
    later = second.call("do", "k")
    assert later.ends()["value"] == 1
    second.forget("k")
    later = second.call("do", "k")
    later.runs()
    later.let_return(2)
    assert later.ends()["value"] == 2


def test_a_leader_takes_two_round_trips_and_a_follower_one(server: Valkey, start: Any) -> None:
    first, second = start(2, lease=30.0)
    for worker in (first, second):  # connections, subscriptions, scripts
        call = worker.call("do", "warm")
        call.runs()
        call.let_return(1)
        call.ends()

    def scripts() -> int:
        info: Any = server.client().info("commandstats")
        return int(info["cmdstat_evalsha"]["calls"])

    before = scripts()
    leader = first.call("do", "k")
    leader.runs()
    follower = second.call("do", "k")
    eventually(lambda: followers(server) == 1)
    assert scripts() == before + 2
    leader.let_return(1)
    follower.ends()
    leader.ends()
    assert scripts() == before + 3


# -- what others forget meanwhile -----------------------------------------------------------------


@pytest.fixture
def two(server: Valkey) -> Iterator[list[RedisBackend]]:
    """As of two processes, in this one."""
    backends = [RedisBackend(server.url, lease=60.0, timeout=PATIENCE) for _ in range(2)]
    yield backends
    for backend in backends:
        backend.close()


def hears(backend: RedisBackend, kind: bytes) -> threading.Event:
    """Is set when it has heard a message of this kind."""
    heard, hear = threading.Event(), backend.hear

    def listen(content: bytes) -> None:
        hear(content)
        if content.startswith(kind):
            heard.set()

    backend.hear = listen  # type: ignore[method-assign]
    return heard


def comes_anew(flight: ShardedFlight) -> "Future[Any]":
    """A caller that has come: it leads, or has joined."""
    waiting, running = flight.stats().waiting, flight.in_flight()
    caller = spawn(flight.do, lambda: "new", "k")
    eventually(
        lambda: flight.stats().waiting > waiting or flight.in_flight() > running or caller.done()
    )
    return caller


def test_a_leader_that_ends_hears_that_others_have_forgotten(two: list[RedisBackend]) -> None:
    """Found by proof/model: until its end is published, its process joined it."""
    heard = hears(two[0], b"f")
    flight = ShardedFlight(backend=two[0])
    runs, goes_on = threading.Event(), threading.Event()

    def function() -> str:
        runs.set()
        goes_on.wait(PATIENCE)
        return "old"

    leader = spawn(flight.do, function, "k")
    assert runs.wait(PATIENCE)
    (node,) = two[0]._nodes.values()
    with node._sending:  # nothing goes to the server
        goes_on.set()
        eventually(lambda: len(node.queue) > 0, "the end")
        ShardedFlight(backend=two[1]).forget("k")
        assert heard.wait(PATIENCE)
        later = comes_anew(flight)
    two[0].wake()
    assert leader.result(PATIENCE) == ("old", False)
    assert later.result(PATIENCE) == ("new", False)


def test_a_follower_that_joins_again_hears_that_others_have_forgotten(
    two: list[RedisBackend],
) -> None:
    """Found by proof/model: what came between was passed over, for as long as the function ran."""
    first, second = (ShardedFlight(backend=backend) for backend in two)
    heard = hears(two[1], b"f")
    runs, goes_on = threading.Event(), threading.Event()

    def function() -> str:
        runs.set()
        goes_on.wait(PATIENCE)
        return "old"

    leader = spawn(first.do, function, "k")
    assert runs.wait(PATIENCE)
    follower = spawn(second.do, function, "k")
    eventually(lambda: any(turn.token for turn in turns(two[1])), "the follower")
    (turn,) = turns(two[1])
    asks, joins, subscribed = threading.Event(), threading.Event(), two[1]._subscribed

    def wait_for_inbox(shard: int) -> str:
        asks.set()
        joins.wait(PATIENCE)
        return subscribed(shard)

    two[1]._subscribed = wait_for_inbox  # type: ignore[method-assign]
    two[1].wake_to(lambda: two[1]._again(turn))
    assert asks.wait(PATIENCE)
    first.forget("k")
    assert heard.wait(PATIENCE)
    joins.set()
    eventually(lambda: turn.token > 0, "the follower's second request")
    later = comes_anew(second)
    goes_on.set()
    assert leader.result(PATIENCE) == ("old", True)
    assert follower.result(PATIENCE)[0] == "old"
    assert later.result(PATIENCE) == ("new", False)


def test_who_asks_is_not_made_to_ask_twice(two: list[RedisBackend]) -> None:
    """Found by proof/model: of two answers, the second made the first look as if not forgotten."""
    runs, goes_on = threading.Event(), threading.Event()

    def function() -> None:
        runs.set()
        goes_on.wait(PATIENCE)

    leader = spawn(ShardedFlight(backend=two[0]).do, function, "k")
    assert runs.wait(PATIENCE)
    follower = spawn(ShardedFlight(backend=two[1]).do, function, "k")
    eventually(lambda: any(turn.token for turn in turns(two[1])), "the follower")
    (turn,) = turns(two[1])
    (node,) = two[1]._nodes.values()
    with node._sending:
        for _ in range(2):  # as by a watchdog and by a message
            two[1]._again(turn)
        assert len(node.queue) == 1
    two[1].wake()
    eventually(lambda: turn.token > 0, "the answer")
    goes_on.set()
    leader.result(PATIENCE)
    follower.result(PATIENCE)


def test_a_forget_of_before_does_not_concern_who_asks_now(two: list[RedisBackend]) -> None:
    """Found by the soak: a message that came late let two functions run beside each other."""
    backend = two[0]
    flight = ShardedFlight(backend=backend)
    late, comes, hear = threading.Event(), threading.Event(), backend.hear

    def listen(content: bytes) -> None:
        if content.startswith(b"f"):
            late.wait(PATIENCE)
        hear(content)
        if content.startswith(b"f"):
            comes.set()

    backend.hear = listen  # type: ignore[method-assign]
    assert flight.do(lambda: flight.forget("k") or "old", "k") == ("old", False)
    (node,) = backend._nodes.values()
    with node._sending:  # nothing goes to the server
        first = spawn(flight.do, lambda: "new", "k")
        eventually(lambda: len(node.queue) > 0, "its request")
        late.set()
        assert comes.wait(PATIENCE)
        second = comes_anew(flight)
    backend.wake()
    assert first.result(PATIENCE) == second.result(PATIENCE) == ("new", True)
    assert flight.stats().executions == 2


def test_who_follows_a_lost_leader_is_joined_though_that_was_forgotten(
    two: list[RedisBackend],
) -> None:
    """Found by the soak: a newcomer began anew, and so did the follower; both functions ran."""
    first, second = (ShardedFlight(backend=backend) for backend in two)
    forgotten, lost = hears(two[1], b"f"), hears(two[1], b"l")
    runs, goes_on = threading.Event(), threading.Event()

    def function() -> None:
        runs.set()
        goes_on.wait(PATIENCE)
        raise SystemExit

    leader = spawn(first.do, function, "k")
    assert runs.wait(PATIENCE)
    follower = spawn(second.do, lambda: "the heir's", "k")
    eventually(lambda: any(turn.token for turn in turns(two[1])), "the follower")
    first.forget("k")
    assert forgotten.wait(PATIENCE)
    keeper = Keeper(two[1])  # it would have the follower ask again
    goes_on.set()
    assert lost.wait(PATIENCE)
    later = comes_anew(second)
    keeper.catch_up()
    assert follower.result(PATIENCE) == later.result(PATIENCE) == ("the heir's", True)
    with pytest.raises(SystemExit):
        leader.result(PATIENCE)


def turns(backend: RedisBackend) -> list[Any]:
    return [turn for follow in list(backend._follows.values()) for turn in follow.turns]


# -- callers that have left -----------------------------------------------------------------------


@pytest.fixture
def flight(backend: RedisBackend) -> ShardedFlight:
    """Its backend has a connection."""
    flight = ShardedFlight(backend=backend)
    flight.do(lambda: "connects", "other")
    return flight


async def comes_and_leaves(
    flight: ShardedFlight, caller: Coroutine[Any, Any, Any], comes: Callable[[], bool]
) -> None:
    """A coroutine's call, which is cancelled once it has come."""
    abandoned = flight.stats().abandoned
    task = asyncio.create_task(caller)
    while not comes():
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert flight.stats().abandoned == abandoned + 1


async def unreached(*_: Any) -> Any:
    raise AssertionError


class Keeper:
    """Holds up the keeper's thread."""

    def __init__(self, backend: RedisBackend) -> None:
        self._backend = backend
        self._goes_on = threading.Event()
        waits = threading.Event()

        def held_up() -> None:
            waits.set()
            self._goes_on.wait(PATIENCE)

        backend.wake_to(held_up)
        assert waits.wait(PATIENCE)

    def catch_up(self) -> None:
        """Has it do what it has to, up to now: what comes later is sent later."""
        asked = threading.Event()
        self._backend.wake_to(asked.set)
        self._goes_on.set()
        assert asked.wait(PATIENCE)


def test_who_has_left_before_the_leader_came_does_not_share(
    flight: ShardedFlight, backend: RedisBackend
) -> None:
    """Found by the soak: the keeper asked for it after the leader, which was told of a follower."""
    keeper = Keeper(backend)
    caller = flight.do_async(unreached, "k")
    asyncio.run(comes_and_leaves(flight, caller, lambda: len(backend._tasks) > 0))
    assert flight.do(lambda: keeper.catch_up() or "row", "k") == ("row", False)


def test_who_has_left_one_of_many_keys_does_not_share(
    flight: ShardedFlight, backend: RedisBackend
) -> None:
    """The run goes on for the other key, and asked for both."""

    async def many(keys: list[str]) -> dict[str, str]:
        assert keys == ["other"]
        return {"other": "many's"}

    async def main() -> None:
        keeper = Keeper(backend)
        follower: asyncio.Task[Any] | None = None

        def comes() -> bool:
            nonlocal follower
            if follower is None and flight.in_flight() == 2:
                follower = asyncio.create_task(flight.do_async(unreached, "other"))
            return flight.stats().waiting == 1

        await comes_and_leaves(flight, flight.do_many_async(many, ["k", "other"]), comes)
        row = await asyncio.to_thread(flight.do, lambda: keeper.catch_up() or "row", "k")
        assert row == ("row", False)
        assert follower is not None
        assert await follower == ("many's", False)

    asyncio.run(main())
    assert flight.in_flight() == 0


def test_who_leaves_before_the_request_is_sent_asks_for_nothing(
    server: Valkey, flight: ShardedFlight, backend: RedisBackend
) -> None:
    (last,) = keys(server, "*:t")
    token = server.do("GET", last)
    (node,) = backend._nodes.values()
    with node._sending:  # nothing goes to the server
        caller = flight.do_async(unreached, "k")
        asyncio.run(comes_and_leaves(flight, caller, lambda: len(node.queue) > 0))
    backend.wake()
    eventually(lambda: not turns(backend), "the end of its request")
    assert server.do("GET", last) == token
    assert flight.do(lambda: "row", "k") == ("row", False)


# -- construction ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "options"),
    [
        ("http://x", {}),
        (None, {}),
        (asyncio_redis.Redis(), {}),
        ("redis://x", {"lease": 0}),
        ("redis://x", {"lease": "1"}),
        ("redis://x", {"hold": -1}),
        ("redis://x", {"timeout": 0}),
        ("redis://x", {"timeout": float("nan")}),
        ("redis://x", {"namespace": "a{b"}),
        ("redis://x", {"namespace": ""}),
        ("redis://x", {"shards": 0}),
        ("redis://x", {"limit": -1}),
        ("redis://x", {"codec": 1}),
    ],
)
def test_bad_arguments_are_refused(server: Any, options: Any) -> None:
    with pytest.raises(BackendError):
        RedisBackend(server, **options)


@pytest.mark.parametrize("name", ["lease", "hold", "timeout"])
@pytest.mark.parametrize("seconds", [float("inf"), 86401, 10**400])
def test_times_that_can_not_be_waited_for_are_refused(name: str, seconds: float) -> None:
    RedisBackend("redis://x", **{name: 86400})  # type: ignore[arg-type]
    with pytest.raises(BackendError, match=f"{name} must be .* 86400, a day, not {seconds}"):
        RedisBackend("redis://x", **{name: seconds})  # type: ignore[arg-type]


def test_a_backend_is_checked() -> None:
    for wrong in (RedisBackend, object(), "redis://x"):
        with pytest.raises(BackendError, match="backend"):
            ShardedFlight(backend=wrong)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_a_client_of_the_users_own(server: Valkey) -> None:
    with server.client(decode_responses=True) as client:
        backend = RedisBackend(client)
        flight = ShardedFlight(backend=backend)
        assert flight.do(lambda: 1, "k") == (1, False)
        assert flight.stats().remote_leads == 1
        backend.close()
        assert client.ping()
    assert flight.do(lambda: 2, "k") == (2, False)
    assert asyncio.run(flight.do_async(lambda: asyncio.sleep(0, 3), "k")) == (3, False)
    assert flight.stats().fallbacks == 2
