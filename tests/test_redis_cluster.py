"""The cluster tier on a real Cluster whose slots move and whose primaries fail."""

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import PATIENCE, eventually
from tier_support import Worker
from valkey_support import Valkey, ValkeyCluster

if os.name == "nt":
    pytest.skip("there is no Valkey for Windows", allow_module_level=True)

pytestmark = pytest.mark.around


@pytest.fixture
def cluster() -> Iterator[ValkeyCluster]:
    cluster = ValkeyCluster(replicas=True)
    yield cluster
    cluster.stop()


@pytest.fixture
def start(cluster: ValkeyCluster) -> Iterator[Callable[[int], list[Worker]]]:
    started: list[Worker] = []

    def start(count: int) -> list[Worker]:
        options = {"server": cluster.url, "cluster": True, "lease": 1.0, "timeout": 1.0}
        started.extend(Worker("redis", "RedisBackend", options) for _ in range(count))
        return [worker.ready() for worker in started[-count:]]

    yield start
    for worker in started:
        worker.stop()


def flight_of(cluster: ValkeyCluster) -> tuple[Valkey, bytes]:
    """The only execution's server and key."""
    (found,) = cluster.keys("*:f:*")
    return found


def following(cluster: ValkeyCluster) -> int:
    found: list[Any] = [server.do("HLEN", name) for server, name in cluster.keys("*:f:*")]
    return sum(max(0, number - 3) for number in found)


def migrate(server: Valkey, to: Valkey, key: bytes) -> None:
    """Moves the slot of `key`, with all its keys."""
    slot: Any = server.do("CLUSTER", "KEYSLOT", key)
    source, target = server.do("CLUSTER", "MYID"), to.do("CLUSTER", "MYID")
    to.do("CLUSTER", "SETSLOT", slot, "IMPORTING", source)
    server.do("CLUSTER", "SETSLOT", slot, "MIGRATING", target)
    names: Any = server.do("CLUSTER", "GETKEYSINSLOT", slot, 100)
    server.do("MIGRATE", "127.0.0.1", to.port, "", 0, 5000, "KEYS", *names)
    for node in (to, server):
        node.do("CLUSTER", "SETSLOT", slot, "NODE", target)


def end_all(calls: list[Any], value: str) -> tuple[int, list[Any]]:
    """Lets whichever functions run return `value`; how many did, and what the calls returned."""
    ran, ended = 0, {}
    deadline = time.monotonic() + PATIENCE
    while len(ended) < len(calls):
        assert time.monotonic() < deadline, ended
        for call in calls:
            if not call.events.empty():
                said = call.events.get()
                if said["event"] == "running":
                    ran += 1
                    call.let_return(value)
                else:
                    ended[call.number] = said.get("value")
        time.sleep(0.001)
    return ran, list(ended.values())


def test_a_slot_that_moves_during_an_execution(cluster: ValkeyCluster, start: Any) -> None:
    first, second, third = start(3)
    leader = first.call("do", "k")
    leader.runs()
    followers = [second.call("do", "k"), third.call("do_async", "k")]
    eventually(lambda: following(cluster) == 2)
    server, key = flight_of(cluster)
    migrate(server, next(other for other in cluster.primaries if other is not server), key)
    leader.let_return("value")
    ran, values = end_all([leader, *followers], "value")
    assert values == ["value"] * 3
    assert ran <= 2  # at most one more for each process
    again = first.call("do", "k")
    again.runs()
    other = second.call("do", "k")
    eventually(lambda: following(cluster) == 1)
    again.let_return("again")
    assert other.ends()["value"] == "again"


def test_a_primary_that_fails_over_during_an_execution(cluster: ValkeyCluster, start: Any) -> None:
    first, second, third = start(3)
    leader = first.call("do", "k")
    leader.runs()
    followers = [second.call("do", "k"), third.call("do_async", "k")]
    eventually(lambda: following(cluster) == 2)
    server, _ = flight_of(cluster)
    server.kill()
    leader.let_return("value")
    _, values = end_all([leader, *followers], "value")
    assert values == ["value"] * 3

    def joined_again() -> bool:
        one = first.call("do", "k")
        one.runs()
        before = second.stats()["remote_follows"]
        other = second.call("do", "k")
        deadline = time.monotonic() + 2.0
        while following(cluster) != 1 and other.events.empty() and time.monotonic() < deadline:
            time.sleep(0.01)
        one.let_return("again")
        end_all([one, other], "again")
        return second.stats()["remote_follows"] > before

    eventually(joined_again, "the use of the new primary")
