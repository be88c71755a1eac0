"""What unlucky moments and lacks did to the cluster tier: each was found by an attack on it.

Each order is forced here. All but what needs a Cluster is against one real Valkey.
"""

import gc
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from support import PATIENCE, eventually
from valkey_support import Valkey

from shardedflight import ShardedFlight
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


# -- interrupts -----------------------------------------------------------------------------------


def test_a_lead_that_is_dropped_is_given_up(
    server: Valkey, flight: ShardedFlight, backend: RedisBackend
) -> None:
    """The interrupt strikes when the turn is on its way to the caller."""
    join = backend.join

    def interrupted(*args: Any) -> Any:
        join(*args)
        raise KeyboardInterrupt

    backend.join = interrupted  # type: ignore[method-assign]
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
