"""What unlucky moments and lacks did to the cluster tier: each was found by an attack on it.

Each order is forced here. All but what needs a Cluster is against one real Valkey.
"""

import contextlib
import gc
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from redis.exceptions import RedisClusterException
from support import PATIENCE, eventually, spawn, spawn_loop
from test_redis_cluster import migrate
from valkey_support import Valkey, ValkeyCluster, free_port

from shardedflight import BackendError, ShardedFlight
from shardedflight._lock import SteadyLock
from shardedflight.backends import redis as tier
from shardedflight.backends.redis import RedisBackend

if os.name == "nt":
    pytest.skip("there is no Valkey for Windows", allow_module_level=True)

pytestmark = pytest.mark.around


@pytest.fixture(scope="module")
def server() -> Iterator[Valkey]:
    server = Valkey()
    yield server
    server.stop()


@pytest.fixture
def backend(server: Valkey, request: pytest.FixtureRequest) -> Iterator[RedisBackend]:
    backend = RedisBackend(server.url, namespace=request.node.name, lease=1.0, timeout=PATIENCE)
    yield backend
    backend.close()


@pytest.fixture
def flight(backend: RedisBackend) -> ShardedFlight:
    """Its backend has a connection, an inbox and a keeper."""
    flight = ShardedFlight(backend=backend)
    flight.do(lambda: "connects", "other")
    return flight


def only_node(backend: RedisBackend) -> Any:
    (node,) = backend._nodes.values()
    return node


def ping() -> Any:
    return tier._Request(None, 0, (), ())


async def row() -> str:
    return "row"


# -- the keeper -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("flight")
def test_callers_that_never_cease_do_not_keep_the_keeper_from_its_beat(
    backend: RedisBackend,
) -> None:
    node, exchange, beat = only_node(backend), tier._Node._exchange, backend._beat
    ceases, captured, beats = (threading.Event() for _ in range(3))

    def always_more(batch: list[Any], by_source: bool) -> Any:
        if threading.current_thread() is backend._keeper and not ceases.is_set():
            node.queue.append(ping())
            captured.set()
        return exchange(node, batch, by_source)

    def beat_now() -> None:
        beat()
        if captured.is_set():
            beats.set()

    backend._beat = beat_now  # type: ignore[method-assign]
    node._exchange = always_more
    try:
        node.queue.append(ping())
        backend.wake()
        assert captured.wait(PATIENCE)
        assert beats.wait(PATIENCE)
    finally:
        ceases.set()


@pytest.mark.usefixtures("flight")
def test_a_step_that_leads_to_the_next_does_not_keep_the_keeper_from_its_beat(
    backend: RedisBackend,
) -> None:
    """As when a slot has moved, and the Cluster does not know yet where to."""
    beat, captured, beats, ceases = backend._beat, *(threading.Event() for _ in range(3))

    def step() -> None:
        if not ceases.is_set():
            backend.wake_to(step)
            captured.set()

    def beat_now() -> None:
        beat()
        if captured.is_set():
            beats.set()

    backend._beat = beat_now  # type: ignore[method-assign]
    backend.wake_to(step)
    try:
        assert beats.wait(PATIENCE)
    finally:
        ceases.set()


@pytest.mark.usefixtures("flight")
def test_the_keeper_outlives_a_failure(
    backend: RedisBackend, caplog: pytest.LogCaptureFixture
) -> None:
    help_, fails = backend._help, [True]

    def fails_once(*rounds: float) -> None:
        if fails:
            fails.pop()
            raise LookupError("a bug")
        help_(*rounds)

    backend._help = fails_once  # type: ignore[method-assign]
    backend.wake()
    eventually(lambda: not fails, "the failure")
    goes_on = threading.Event()
    backend.wake_to(goes_on.set)
    assert goes_on.wait(PATIENCE)
    assert "a bug" in caplog.text


@pytest.mark.usefixtures("flight")
def test_the_keeper_outlives_a_cluster_that_is_gone(
    backend: RedisBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its slots can not be asked for; the server of before can be reached again."""

    def initialize() -> None:
        raise RedisClusterException("Redis Cluster cannot be connected")

    nodes = SimpleNamespace(initialize=initialize)
    node = only_node(backend)
    monkeypatch.setattr(backend, "_client", SimpleNamespace(nodes_manager=nodes))
    monkeypatch.setattr(backend, "_clustered", True)
    node.broken = OSError("gone")
    backend.wake()
    eventually(lambda: node.broken is None, "a probe")
    assert caplog.text == ""


def test_a_cluster_that_was_never_there() -> None:
    url = f"redis://127.0.0.1:{free_port()}"
    backend = RedisBackend(url, cluster=True, timeout=PATIENCE)
    flight = ShardedFlight(backend=backend)
    try:
        assert spawn(flight.do, lambda: "row", "k").result(PATIENCE) == ("row", False)
        called = spawn_loop(lambda: flight.do_async(row, "k"))
        assert called.result(PATIENCE) == ("row", False)
        spawn(flight.forget, "k").result(PATIENCE)
        assert flight.stats().fallbacks == 3
    finally:
        backend.close()


# -- threads that can not be started --------------------------------------------------------------


@pytest.mark.parametrize("thread", ["keeper", "inbox"])
def test_a_thread_that_can_not_be_started(
    backend: RedisBackend, thread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flight = ShardedFlight(backend=backend)
    start = threading.Thread.start

    def refuse(self: threading.Thread) -> None:
        if self.name == f"shardedflight-redis-{thread}":
            raise RuntimeError("can't start new thread")
        start(self)

    async def many(keys: list[str]) -> dict[str, str]:
        return dict.fromkeys(keys, "row")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert spawn(flight.do, lambda: "row", "k").result(PATIENCE) == ("row", False)
    called = spawn_loop(lambda: flight.do_async(row, "k"))
    assert called.result(PATIENCE) == ("row", False)
    called = spawn_loop(lambda: flight.do_many_async(many, ["j", "k"]))
    assert called.result(PATIENCE) == {"j": ("row", False), "k": ("row", False)}
    assert (flight.stats().remote_leads, flight.stats().fallbacks) == (0, 4)
    spawn(flight.forget, "k").result(PATIENCE)
    monkeypatch.undo()
    called = spawn_loop(lambda: flight.do_async(row, "k"))
    assert called.result(PATIENCE) == ("row", False)
    assert flight.do(lambda: "row", "k") == ("row", False)
    assert flight.stats().remote_leads == 2


def test_a_step_of_the_keeper_that_fails_hangs_nobody(
    flight: ShardedFlight, backend: RedisBackend
) -> None:
    def subscribed(shard: int) -> str:
        raise LookupError("a bug")

    backend._subscribed = subscribed  # type: ignore[method-assign]
    called = spawn_loop(lambda: flight.do_async(row, "k"))
    assert called.result(PATIENCE) == ("row", False)
    assert flight.stats().fallbacks == 1


# -- closing --------------------------------------------------------------------------------------


def test_what_is_queued_when_all_is_closed_fails(
    flight: ShardedFlight, backend: RedisBackend
) -> None:
    node_of, looked, closed = backend._node, threading.Event(), threading.Event()

    def paused(shard: int) -> Any:
        node = node_of(shard)
        looked.set()
        closed.wait(PATIENCE)
        return node

    backend._node = paused  # type: ignore[method-assign]
    forgets = spawn(flight.forget, "k")
    assert looked.wait(PATIENCE)
    backend.close()
    closed.set()
    forgets.result(PATIENCE)
    assert flight.stats().fallbacks == 1


@pytest.mark.usefixtures("flight")
def test_what_a_sender_has_left_to_the_keeper_fails_if_it_has_ended(backend: RedisBackend) -> None:
    node, keeper, request = only_node(backend), backend._keeper, ping()
    assert keeper is not None
    with node._sending:
        closes = spawn(backend.close)
        eventually(lambda: not keeper.is_alive(), "the keeper's end")
        node.queue.append(request)
    closes.result(PATIENCE)
    with pytest.raises(BackendError, match="closed"):
        request.result(PATIENCE)


# -- destructors and signal handlers --------------------------------------------------------------


def test_a_destructor_on_the_keepers_thread_forgets(
    flight: ShardedFlight, backend: RedisBackend
) -> None:
    done = threading.Event()
    backend.wake_to(lambda: flight.forget("k"))
    backend.wake_to(done.set)
    assert done.wait(PATIENCE)
    assert flight.stats().fallbacks == 0


@pytest.mark.parametrize("thread", ["keeper", "caller"])
def test_a_destructor_on_a_thread_that_sends_forgets(
    flight: ShardedFlight, backend: RedisBackend, thread: str
) -> None:
    """The server hears of it when that thread goes on."""
    node, goes_on = only_node(backend), held_up(backend)
    exchange, sent = node._exchange, [0]
    request = ping()

    def destroys(batch: list[Any], by_source: bool) -> Any:
        sent.append(sent.pop() + len(batch))
        if request in batch:
            flight.forget("k")
        return exchange(batch, by_source)

    node._exchange = destroys
    node.queue.append(request)
    if thread == "keeper":
        goes_on.set()
    else:
        spawn(node.help).result(PATIENCE)
        goes_on.set()
    assert request.result(PATIENCE) == b"PONG"
    eventually(lambda: sent[-1] >= 2, "the forget")
    assert flight.stats().fallbacks == 1


@pytest.mark.parametrize("held", ["backend", "listener"])
def test_a_destructor_on_a_thread_that_has_a_lock_forgets(
    flight: ShardedFlight, backend: RedisBackend, held: str
) -> None:
    """The keeper waits for it."""
    lock = backend._lock if held == "backend" else only_node(backend).listener._changed
    goes_on = held_up(backend)

    def needs_it() -> None:
        with lock:
            pass

    def destroys() -> None:
        with lock:
            backend.wake_to(needs_it)
            goes_on.set()
            flight.forget("k")

    spawn(destroys).result(PATIENCE)


# -- interrupts -----------------------------------------------------------------------------------


def test_a_lead_that_is_dropped_is_given_up(
    server: Valkey, flight: ShardedFlight, backend: RedisBackend
) -> None:
    """The interrupt strikes when the turn is on its way to the caller."""
    join = backend.join

    def interrupted(*args: Any) -> Any:
        join(*args)
        raise KeyboardInterrupt

    backend.join = interrupted  # type: ignore[assignment,method-assign]
    with pytest.raises(KeyboardInterrupt) as kept:
        flight.do(lambda: 1, "k")
    assert len(backend._leads) == 1
    del kept
    gc.collect()
    eventually(lambda: not backend._leads, "the end of the lead")
    eventually(lambda: server.do("KEYS", f"*{backend.namespace}*:f:*") == [], "the heirs' turn")


def test_an_interrupt_gives_up_what_the_server_has_granted(
    server: Valkey, flight: ShardedFlight, backend: RedisBackend
) -> None:
    """It strikes when the request was answered, and its thread is about to help others."""
    helps = backend._help

    def interrupted(rounds: float) -> None:
        helps(rounds)
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt

    backend._help = interrupted  # type: ignore[assignment,method-assign]
    with pytest.raises(KeyboardInterrupt) as kept:  # with the frames of those who had the turn
        flight.do(lambda: 1, "k")
    backend._help = helps  # type: ignore[method-assign]
    eventually(lambda: server.do("KEYS", f"*{backend.namespace}*:f:*") == [], "the heirs' turn")
    assert not backend._leads
    del kept


def held_up(backend: RedisBackend) -> threading.Event:
    """The keeper does nothing before this is set."""
    waits, goes_on = threading.Event(), threading.Event()

    def hold() -> None:
        waits.set()
        goes_on.wait(PATIENCE)

    backend.wake_to(hold)
    assert waits.wait(PATIENCE)
    return goes_on


@pytest.mark.usefixtures("flight")
def test_an_interrupt_of_who_sends_for_others_loses_nothing(backend: RedisBackend) -> None:
    """It strikes when their requests are out of the queue; one more comes meanwhile."""
    node, goes_on = only_node(backend), held_up(backend)
    taken, later = ping(), ping()
    send, wake, woken = node._send, backend.wake, threading.Event()

    def interrupted(_: list[Any]) -> None:
        node.queue.append(later)
        raise KeyboardInterrupt

    def wakes() -> None:
        woken.set()
        wake()

    node._send, backend.wake = interrupted, wakes  # type: ignore[method-assign]
    node.queue.append(taken)
    with pytest.raises(KeyboardInterrupt):
        node.help()
    node._send = send
    with pytest.raises(BackendError):
        taken.result(PATIENCE)
    assert woken.is_set()
    goes_on.set()
    assert later.result(PATIENCE) == b"PONG"


@pytest.mark.usefixtures("flight")
def test_an_interrupt_does_not_leave_a_server_to_nobody(backend: RedisBackend) -> None:
    """It strikes when the right to send was just taken."""

    class Interrupted(SteadyLock):
        armed = True

        def acquire(self, *args: Any, **kwargs: Any) -> bool:
            taken: bool = super().acquire(*args, **kwargs)
            if self.armed and threading.current_thread() is threading.main_thread():
                self.armed = False
                raise KeyboardInterrupt
            return taken

    node, goes_on, request = only_node(backend), held_up(backend), ping()
    node._sending = Interrupted()
    node.queue.append(request)
    with pytest.raises(KeyboardInterrupt):
        node.help()
    goes_on.set()
    assert request.result(PATIENCE) == b"PONG"


# -- memory ---------------------------------------------------------------------------------------


def test_an_outcome_is_not_kept_until_its_lease_would_have_ended(server: Valkey) -> None:
    options: Any = {"namespace": "outcome", "lease": 3600.0, "timeout": PATIENCE}
    backends = [RedisBackend(server.url, **options) for _ in range(2)]
    try:
        leader, follower = (ShardedFlight(backend=backend) for backend in backends)
        runs, goes_on = threading.Event(), threading.Event()

        def function() -> str:
            runs.set()
            goes_on.wait(PATIENCE)
            return "row"

        leads = spawn(leader.do, function, "k")
        assert runs.wait(PATIENCE)
        follows = spawn(follower.do, function, "k")
        known = backends[1]._follows
        eventually(lambda: any(turn.token for each in [*known.values()] for turn in each.turns))
        kept = weakref.ref(next(iter(known.values())).turns[0])
        goes_on.set()
        assert leads.result(PATIENCE) == follows.result(PATIENCE) == ("row", True)
        del leads, follows

        def gone() -> bool:
            gc.collect()
            return kept() is None

        eventually(gone, "the end of the turn")
    finally:
        for backend in backends:
            backend.close()


# -- a Cluster ------------------------------------------------------------------------------------


@pytest.fixture
def cluster() -> Iterator[ValkeyCluster]:
    cluster = ValkeyCluster()
    yield cluster
    cluster.stop()


def test_a_slot_that_moves_while_the_inbox_is_cut_off(
    cluster: ValkeyCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One inbox that the server refused had all others of that server cut off again, for good."""
    backend = RedisBackend(cluster.url, cluster=True, timeout=PATIENCE)
    cut, moved = threading.Event(), threading.Event()
    connect = tier._Listener._connect

    def connect_later(listener: Any) -> None:
        cut.set()
        moved.wait(PATIENCE)
        connect(listener)

    try:
        flight = ShardedFlight(backend=backend)
        keys: dict[int, str] = {}
        for number in range(1000):
            key = f"k{number}"
            keys.setdefault(backend._shard(backend.name(None, (key,))), key)
        node = backend._node(next(iter(keys)))
        goes, stays = [shard for shard in keys if backend._node(shard) is node][:2]
        for shard in (goes, stays):
            assert flight.do(lambda: "row", keys[shard]) == ("row", False)
        assert (flight.stats().remote_leads, flight.stats().fallbacks) == (2, 0)
        (address,) = [address for address, one in backend._nodes.items() if one is node]
        (source,) = [each for each in cluster.servers if address.endswith(f":{each.port}")]
        target = next(each for each in cluster.servers if each is not source)

        monkeypatch.setattr(tier._Listener, "_connect", connect_later)
        source.do("CLIENT", "KILL", "TYPE", "pubsub")
        assert cut.wait(PATIENCE)
        migrate(source, target, b"{%s:%d}" % (backend.namespace.encode(), goes))
        moved.set()
        inboxes: Any = node.listener
        eventually(lambda: inboxes._inboxes == {backend._inbox_of(stays): True}, "its inbox")

        def leads(shard: int) -> bool:
            before = flight.stats().remote_leads
            flight.do(lambda: "row", keys[shard])
            return flight.stats().remote_leads > before

        assert leads(stays)
        eventually(lambda: leads(goes), "a lead at the other server")
    finally:
        moved.set()
        backend.close()


def test_a_fork_while_the_slots_are_asked_for(cluster: ValkeyCluster) -> None:
    """A thread of the parent has the lock of redis-py for it, and is not there in the child."""
    backend = RedisBackend(cluster.url, cluster=True, timeout=PATIENCE)
    asks, forked = threading.Event(), threading.Event()
    try:
        flight = ShardedFlight(backend=backend)
        flight.do(lambda: "row", "k")
        nodes = backend._client.nodes_manager

        def ask() -> None:
            with nodes._initialization_lock, nodes._lock:
                asks.set()
                forked.wait(PATIENCE)

        asked = spawn(ask)
        assert asks.wait(PATIENCE)
        pid = os.fork()
        if not pid:
            signal.alarm(round(PATIENCE))  # ends it
            with contextlib.suppress(BaseException):
                backend.relocate()
                flight.do(lambda: "row", "k")
                backend.relocate()
                os._exit(42 if flight.stats().remote_leads == 1 else 1)
            os._exit(2)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 42
        forked.set()
        asked.result(PATIENCE)
    finally:
        forked.set()
        backend.close()
