"""What unlucky moments and lacks did to the cluster tier: each was found by an attack on it.

Each order is forced here. All but what needs a Cluster is against one real Valkey.
"""

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from support import PATIENCE
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
