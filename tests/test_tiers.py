"""What all backends do alike: ../shared/tiers.md, over real processes."""

import asyncio
import atexit
import contextlib
import gc
import importlib
import itertools
import os
import sys
import tempfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from contextvars import Context, ContextVar
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support import PATIENCE, eventually, spawn
from test_processes import in_child, need_fork
from tier_support import Worker
from valkey_support import Valkey, ValkeyCluster

from shardedflight import ShardedFlight
from shardedflight.backends import fencing_token

pytestmark = [
    pytest.mark.around,
    pytest.mark.skipif(os.name == "nt", reason="the backends' tests are for POSIX"),
]

HOWS = ["do", "do_async", "do_future", "do_many", "do_many_async"]


def marks(directory: Path) -> int:
    """How many followers there are in a directory of the host tier."""
    total = 0
    for file in directory.glob("?" * 40):
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            written = file.read_bytes()
            times = Counter(written[at : at + 8] for at in range(0, len(written), 8))
            total += sum(number % 2 for number in times.values())
    return total


class Tier:
    """A backend, as the tests see it from outside."""

    #: The module and the class of the backend, and its arguments.
    spec: tuple[str, str, dict[str, Any]]

    def backend(self) -> Any:
        """One in this process."""
        module, name, options = self.spec
        return getattr(importlib.import_module(f"shardedflight.backends.{module}"), name)(**options)


class Host(Tier):
    """The host tier, as the tests see it from outside."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.spec = (
            "host",
            "HostBackend",
            {"directory": str(directory)},
        )

    def leads(self) -> int:
        """How many executions run, of all keys."""
        return len(list(self.directory.glob("?" * 40)))

    def followers(self) -> int:
        """How many processes follow, of all keys."""
        return marks(self.directory)

    def follows(self, turn: Any) -> bool:
        """Whether it has come to follow."""
        return turn.watch is not None

    def close(self) -> None:
        pass


def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "flights")


class Cluster(Tier):
    """What the cluster tier has in common, on one server and on many."""

    def follows(self, turn: Any) -> bool:
        """Whether it has come to follow."""
        return turn.token > 0


class OneServer(Cluster):
    """The cluster tier on a single server."""

    def __init__(self) -> None:
        self.server = Valkey()
        self.client = self.server.client()
        options = {"server": self.server.url, "lease": 1.0, "timeout": 5.0}
        self.spec = ("redis", "RedisBackend", options)

    def leads(self) -> int:
        """How many executions run, of all keys."""
        names: Any = self.client.keys("*:f:*")
        return len(names)

    def followers(self) -> int:
        """How many processes follow, of all keys."""
        names: Any = self.client.keys("*:f:*")
        fields: Any = [self.client.hlen(name) for name in names]
        return sum(max(0, number - 3) for number in fields)

    def close(self) -> None:
        self.client.close()
        self.server.stop()


class ClusterOfThree(Cluster):
    """The cluster tier on a Cluster, the same for all tests."""

    _cluster: ValkeyCluster | None = None
    _namespaces = itertools.count()

    def __init__(self) -> None:
        if ClusterOfThree._cluster is None:
            ClusterOfThree._cluster = ValkeyCluster()
            atexit.register(ClusterOfThree._cluster.stop)
        self.namespace = f"test{next(self._namespaces)}"
        options = {
            "server": ClusterOfThree._cluster.url,
            "cluster": True,
            "namespace": self.namespace,
            "lease": 1.0,
            "timeout": 5.0,
        }
        self.spec = ("redis", "RedisBackend", options)

    def leads(self) -> int:
        """How many executions run, of all keys."""
        assert self._cluster is not None
        return len(self._cluster.keys(f"{{{self.namespace}:*:f:*"))

    def followers(self) -> int:
        """How many processes follow, of all keys."""
        assert self._cluster is not None
        found = self._cluster.keys(f"{{{self.namespace}:*:f:*")
        fields: list[Any] = [server.do("HLEN", name) for server, name in found]
        return sum(max(0, number - 3) for number in fields)

    def close(self) -> None:
        pass


def cluster(_: Path) -> ClusterOfThree:
    return ClusterOfThree()


def one_server(_: Path) -> OneServer:
    return OneServer()


TIERS: dict[str, Callable[[Path], Any]] = {"host": host, "redis": one_server, "cluster": cluster}


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    tier = TIERS[request.param](tmp_path)
    yield tier
    tier.close()


@pytest.fixture
def start(tier: Any) -> Iterator[Callable[[int], list[Worker]]]:
    started: list[Worker] = []

    def start(count: int) -> list[Worker]:
        new = [Worker(*tier.spec) for _ in range(count)]
        started.extend(new)
        return [worker.ready() for worker in new]

    yield start
    for worker in started:
        worker.stop()


def values(ended: dict[str, Any], key: Any = "k") -> tuple[Any, Any]:
    """The value and whether it was shared, of a call for one key of whatever kind."""
    assert "error" not in ended, ended
    if ended["shared"] is None:
        ((name, value, shared),) = ended["value"]
        assert name == key
        return value, shared
    return ended["value"], ended["shared"]


def answer(how: str, value: Any, key: Any = "k") -> Any:
    """What a function of such a call is to return for that."""
    return [[key, value]] if "many" in how else value


@pytest.mark.parametrize(("leads", "follows"), [*zip(HOWS, HOWS[1:] + HOWS[:1], strict=True)])
def test_one_execution_for_all_processes(tier: Any, start: Any, leads: str, follows: str) -> None:
    first, second, third = start(3)
    leader = first.call(leads, "k")
    leader.runs()
    followers = [second.call(follows, "k"), third.call(leads, "k")]
    eventually(lambda: tier.followers() == 2)
    leader.let_return(answer(leads, {"a": [1, 2.5, None, "x"]}))
    ends = [call.ends() for call in (leader, *followers)]
    assert [values(end) for end in ends] == [({"a": [1, 2.5, None, "x"]}, True)] * 3
    assert first.stats()["remote_leads"] == 1
    assert second.stats()["remote_follows"] == third.stats()["remote_follows"] == 1


def test_a_decorated_function_is_one_in_all_processes(tier: Any, start: Any) -> None:
    first, second = start(2)
    leader = first.call("coalesce", "k", 1)
    leader.runs()
    follower = second.call("coalesce", "k", 1)
    eventually(lambda: tier.followers() == 1)
    other = second.call("coalesce", "k", 2)
    other.runs()
    for call in (other, leader):
        call.let_return(call.number)
    assert follower.ends()["value"] == leader.number
    assert (leader.ends()["value"], other.ends()["value"]) == (leader.number, other.number)


@pytest.mark.parametrize("how", HOWS)
def test_a_lone_call_is_not_shared_and_leaves_nothing(tier: Any, start: Any, how: str) -> None:
    (worker,) = start(1)
    for _ in range(2):
        call = worker.call(how, "k")
        call.runs()
        call.let_return(answer(how, 1))
        assert values(call.ends()) == (1, False)
    stats = worker.stats()
    assert (stats["remote_leads"], stats["in_flight"], stats["fallbacks"]) == (2, 0, 0)


@pytest.mark.parametrize("how", HOWS)
def test_a_failure_is_everybodys(tier: Any, start: Any, how: str) -> None:
    first, second = start(2)
    leader = first.call(how, "k")
    leader.runs()
    follower = second.call(how, "k")
    eventually(lambda: tier.followers() == 1)
    leader.let_raise("no such row")
    assert leader.ends()["error"] == "ValueError"
    ended = follower.ends()
    if "many" in how:
        assert ended["failed"] == {"k": "ValueError: no such row"}
    else:
        assert (ended["error"], ended["message"]) == ("RemoteError", "ValueError: no such row")
        assert "Traceback" in ended["notes"][0]
        assert "tier_worker.py" in ended["notes"][0]
    assert second.stats()["errors"] == 1


def test_a_key_that_many_do_not_find_is_missing_everywhere(tier: Any, start: Any) -> None:
    first, second, third = start(3)
    leader = first.call("do_many", "k", "l")
    leader.runs()
    missing = second.call("do", "k")
    also = third.call("do_many", "k", "l")
    eventually(lambda: tier.followers() == 3)
    leader.let_return([["l", 1]])
    assert leader.ends()["value"] == [["l", 1, True]]
    assert also.ends()["value"] == [["l", 1, True]]
    assert missing.ends()["error"] == "KeyError"


@pytest.mark.parametrize("how", ["do", "do_async", "do_future"])
def test_a_missing_key_is_absent_for_many_that_joined_a_caller_of_their_process(
    tier: Any, start: Any, how: str
) -> None:
    """Section 8: their answer lacks it, and it is no error, whoever asked the other process."""
    first, second = start(2)
    leader = first.call("do_many", "k")
    leader.runs()
    asks = second.call(how, "k")
    eventually(lambda: tier.followers() == 1)
    many = second.call("do_many", "k")
    eventually(lambda: second.stats()["waiting"] == 1)
    leader.let_return([])
    assert asks.ends()["error"] == "KeyError"
    assert many.ends()["value"] == []
    assert second.stats()["errors"] == 0


@pytest.mark.parametrize("how", ["do_many", "do_many_async"])
def test_many_run_their_function_once_for_what_nobody_leads(
    tier: Any, start: Any, how: str
) -> None:
    first, second = start(2)
    one = first.call("do", "a")
    one.runs()
    many = second.call(how, "a", "b", "c")
    assert sorted(many.runs()["keys"]) == ["b", "c"]
    many.let_return([["b", 2], ["c", 3]])
    one.let_return(1)
    assert values(one.ends()) == (1, True)
    assert sorted(many.ends()["value"]) == [["a", 1, True], ["b", 2, False], ["c", 3, False]]


@pytest.mark.parametrize("how", ["do_many", "do_many_async"])
def test_many_keep_what_they_found_when_another_process_fails(
    tier: Any, start: Any, how: str
) -> None:
    first, second = start(2)
    one = first.call("do", "a")
    one.runs()
    many = second.call(how, "a", "b")
    many.runs()
    many.let_return([["b", 2]])
    eventually(lambda: tier.followers() == 1)
    one.let_raise("broken")
    ended = many.ends()
    assert ended["failed"] == {"a": "ValueError: broken"}
    assert ended["found"] == [["b", 2, False]]


def test_many_for_each_others_keys_do_not_wait_for_each_other(tier: Any, start: Any) -> None:
    first, second = start(2)
    one, two = first.call("do_many", "a"), second.call("do_many", "b")
    one.runs()
    two.runs()
    both = first.call("do_many", "b", "c"), second.call("do_many", "a", "d")
    assert [call.runs()["keys"] for call in both] == [["c"], ["d"]]
    both[0].let_return([["c", 3]])
    both[1].let_return([["d", 4]])
    eventually(lambda: tier.followers() == 2)
    one.let_return([["a", 1]])
    two.let_return([["b", 2]])
    assert sorted(both[0].ends()["value"]) == [["b", 2, True], ["c", 3, False]]
    assert sorted(both[1].ends()["value"]) == [["a", 1, True], ["d", 4, False]]


def test_the_process_tier_comes_first(tier: Any, start: Any) -> None:
    first, second = start(2)
    leader = first.call("do", "k")
    leader.runs()
    calls = [second.call(how, "k") for how in HOWS for _ in range(3)]
    eventually(lambda: second.stats()["waiting"] == len(calls) - 1)
    eventually(lambda: tier.followers() >= 1)
    assert tier.followers() == 1
    leader.let_return(7)
    assert [values(call.ends()) for call in calls] == [(7, True)] * len(calls)
    assert second.stats()["remote_follows"] == 1


def test_different_keys_do_not_meet(tier: Any, start: Any) -> None:
    (first, second) = start(2)
    calls = [
        first.call("do", "ab", "c"),
        second.call("do", "a", "bc"),
        second.call("do", ["a", "bc"]),
    ]
    for number, call in enumerate(calls):
        call.runs()
        call.let_return(number)
    assert [values(call.ends()) for call in calls] == [(0, False), (1, False), (2, False)]


def test_tokens_grow_from_lead_to_lead(tier: Any, start: Any) -> None:
    workers = start(2)
    tokens: list[int] = []
    for worker in itertools.islice(itertools.cycle(workers), 10):
        call = worker.call("do", "k")
        tokens.append(call.runs()["token"])
        call.let_return(None)
        call.ends()
    assert all(a < b for a, b in itertools.pairwise(tokens)), tokens


def test_threads_have_no_callers_context(tier: Any) -> None:
    """Free-threaded, a thread inherits the context in which it is started, and these stay: so would
    the fencing token, for functions that lead nothing, and all that the first caller had."""
    variable: ContextVar[Any] = ContextVar("variable")

    class Request:
        pass

    with closing(tier.backend()) as backend:
        flight, alone = ShardedFlight(backend=backend), ShardedFlight()

        async def function() -> Any:
            assert fencing_token() is not None
            return [*alone.do_future(fencing_token, "k").result(PATIENCE)]

        def caller() -> Any:
            request = Request()
            variable.set(request)
            assert asyncio.run(flight.do_async(function, "k")) == ([None, False], False)
            return weakref.ref(request)

        request = Context().run(caller)
        gc.collect()
        assert request() is None


@pytest.mark.parametrize("how", ["do_async", "do_many_async"])
def test_a_cancelled_leader_hands_over_at_once(tier: Any, start: Any, how: str) -> None:
    first, second, third = start(3)
    leader = first.call(how, "k")
    leader.runs()
    followers = [second.call("do", "k"), third.call("do_async", "k")]
    eventually(lambda: tier.followers() == 2)
    leader.order("cancel")
    assert leader.ends()["error"] == "CancelledError"
    heir = _who_runs(followers)
    eventually(lambda: tier.followers() >= 1)
    heir.let_return("second")
    assert [values(call.ends()) for call in followers] == [("second", True)] * 2
    assert second.stats()["takeovers"] + third.stats()["takeovers"] == 1


def _who_runs(calls: list[Any]) -> Any:
    eventually(lambda: any(not call.events.empty() for call in calls), "a new leader")
    (heir,) = [call for call in calls if not call.events.empty()]
    heir.runs()
    return heir


def test_a_killed_leader_is_replaced_once(tier: Any, start: Any) -> None:
    first, *others = start(5)
    leader = first.call("do", "k")
    leader.runs()
    followers = [worker.call("do", "k") for worker in others]
    eventually(lambda: tier.followers() == 4)
    first.kill()
    heir = _who_runs(followers)
    eventually(lambda: tier.followers() >= 3)
    heir.let_return("new")
    assert [values(call.ends()) for call in followers] == [("new", True)] * 4
    assert sum(worker.stats()["takeovers"] for worker in others) == 1


def test_a_killed_follower_is_nobodys_loss(tier: Any, start: Any) -> None:
    first, second, third = start(3)
    leader = first.call("do", "k")
    leader.runs()
    second.call("do", "k")
    third_call = third.call("do", "k")
    eventually(lambda: tier.followers() == 2)
    second.kill()
    leader.let_return(1)
    assert values(leader.ends()) == values(third_call.ends()) == (1, True)


def test_a_follower_leaves_after_its_timeout_alone(tier: Any, start: Any) -> None:
    first, second = start(2)
    leader = first.call("do", "k")
    leader.runs()
    impatient = second.call("do", "k", timeout=0.2)
    # It has come, and may have left: on a busy machine 0.2 s pass between two looks.
    eventually(lambda: (seen := second.stats())["in_flight"] + seen["timeouts"] > 0)
    patient, third = second.call("do", "k"), start(1)[0].call("do", "k")
    assert impatient.ends()["error"] == "FlightTimeout"
    eventually(lambda: tier.followers() == 2)
    leader.let_return(1)
    assert values(leader.ends()) == values(third.ends()) == (1, True)
    # It took over from the one that left, and whether that was in time, nobody can see.
    if patient.events.get(timeout=PATIENCE)["event"] == "running":
        patient.let_return(1)
        patient.ends()
    stats = second.stats()
    assert (stats["timeouts"], stats["errors"], stats["in_flight"]) == (1, 0, 0)


def test_a_cancelled_follower_leaves_alone(tier: Any, start: Any) -> None:
    first, second, third = start(3)
    leader = first.call("do", "k")
    leader.runs()
    follower, other = second.call("do_async", "k"), third.call("do_async", "k")
    eventually(lambda: tier.followers() == 2)
    follower.order("cancel")
    assert follower.ends()["error"] == "CancelledError"
    leader.let_return(1)
    assert values(leader.ends()) == values(other.ends()) == (1, True)
    eventually(lambda: second.stats()["in_flight"] == 0)


@pytest.mark.parametrize("how", ["do", "do_async", "do_many_async"])
def test_who_has_left_does_not_share(tier: Any, start: Any, how: str) -> None:
    first, second = start(2)
    for comes_again in (False, True):
        leader = first.call("do", "k")
        leader.runs()
        follower = second.call(how, "k", timeout=0.2 if how == "do" else None)
        eventually(lambda: tier.followers() == 1)
        if how != "do":
            follower.order("cancel")
        assert "error" in follower.ends()
        eventually(lambda: tier.followers() == 0)
        if comes_again:
            follower = second.call(how, "k")
            eventually(lambda: tier.followers() == 1)
        leader.let_return(1)
        assert values(leader.ends()) == (1, comes_again)
        if comes_again:
            assert values(follower.ends()) == (1, True)


@pytest.fixture
def backends(tier: Any) -> Iterator[list[Any]]:
    """As of two processes, in this one."""
    with closing(tier.backend()) as first, closing(tier.backend()) as second:
        yield [first, second]


@pytest.mark.parametrize("leaves", [[], [0], [1], [0, 1], [1, 0]])
def test_a_process_follows_until_the_last_of_its_turns_has_left(
    tier: Any, backends: list[Any], leaves: list[int]
) -> None:
    first, second = backends
    name = first.name(None, ("k",))
    (leads,) = first.join([(name, 0)], True)
    lead = leads.result(PATIENCE)
    follow: list[Any] = []
    for _ in range(2):
        follow += second.join([(name, 0)], True)
        eventually(partial(tier.follows, follow[-1]))
    for number in leaves:
        assert follow[number].cancel()
    served = [turn for number, turn in enumerate(follow) if number not in leaves]
    if not served:
        eventually(lambda: tier.followers() == 0)
    told = first.finish([(lead, b"outcome")], True)[0].result(PATIENCE)
    assert told == (1 if served else 0)
    assert [turn.result(PATIENCE).payload for turn in served] == [b"outcome"] * len(served)


@need_fork
def test_a_forked_child_does_not_leave_for_its_parent(tier: Any, backends: list[Any]) -> None:
    """Its parent's descriptors may be other files' there."""
    first, second = backends
    name = first.name(None, ("k",))
    (leads,) = first.join([(name, 0)], True)
    (follows,) = second.join([(name, 0)], True)
    eventually(lambda: tier.follows(follows))

    def child() -> None:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(50)]
            assert follows.cancel()
            if isinstance(tier, Host):
                second._leave(follows)
            assert [os.fstat(file.fileno()).st_size for file in files] == [0] * len(files)
            assert threading.active_count() == 1

    in_child(child)
    assert tier.followers() == 1
    done = first.finish([(leads.result(PATIENCE), b"outcome")], True)
    assert done[0].result(PATIENCE) == 1
    assert follows.result(PATIENCE).payload == b"outcome"


def test_forget_reaches_every_process(tier: Any, start: Any) -> None:
    first, second, third = start(3)
    old = first.call("do", "k")
    old.runs()
    served = second.call("do", "k")
    eventually(lambda: tier.followers() == 1)
    third.forget("k")
    # Both the leader's process and the follower's have to notice, the one that has forgotten at
    # once, the others when they hear of it.
    new = [_leads_anew(first)]
    late: list[Any] = []

    def noticed() -> bool:
        late.append(second.call("do", "k"))
        in_flight: int = second.stats()["in_flight"]
        return in_flight == 2

    eventually(noticed)
    # All that join now share one execution, and it is not forgotten for the old one's sake.
    assert second.stats()["forgotten"] == 1
    new += [second.call("do", "k"), third.call("do", "k")]
    eventually(lambda: tier.followers() == 2)
    # Of the second process's calls, two lead there.
    eventually(lambda: second.stats()["waiting"] == len(late))
    assert served.events.empty()
    old.let_return("old")
    assert values(old.ends()) == values(served.ends()) == ("old", True)
    new[0].let_return("new")
    assert [values(call.ends()) for call in new] == [("new", True)] * 3
    assert {values(call.ends()) for call in late} <= {("old", True), ("new", True)}


@pytest.mark.parametrize("how", ["do", "do_async", "do_many", "do_many_async"])
def test_what_is_forgotten_while_the_backend_is_asked_is_not_joined_by_its_own_function(
    tier: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = tier.backend()
    flight = ShardedFlight(backend=backend)
    join = backend.join
    asked: list[object] = []

    def forget_and_join(wanted: Any, here: bool) -> Any:
        if not asked:
            flight.forget("k")
        asked.append(wanted)
        return join(wanted, here)

    async def inner() -> str:
        return "inner"

    async def outer_async() -> str:
        return (await flight.do_async(inner, "k"))[0]

    async def outer_many_async(keys: list[str]) -> dict[str, str]:
        return {key: await outer_async() for key in keys}

    def outer() -> str:
        return flight.do(lambda: "inner", "k")[0]

    monkeypatch.setattr(backend, "join", forget_and_join)
    call: Callable[[], Any] = {
        "do": lambda: flight.do(outer, "k"),
        "do_async": lambda: asyncio.run(flight.do_async(outer_async, "k")),
        "do_many": lambda: flight.do_many(lambda keys: {k: outer() for k in keys}, ["k"])["k"],
        "do_many_async": lambda: asyncio.run(flight.do_many_async(outer_many_async, ["k"]))["k"],
    }[how]
    assert spawn(call).result(PATIENCE) == ("inner", False)
    assert len(asked) == 2
    backend.close()


def test_who_was_forgotten_while_it_asked_forgets_nobody_else(tier: Any, start: Any) -> None:
    """Section 6: a forget is for the execution that ran. By the time that one begins there may be
    a newer one, in another process."""
    (other,) = start(1)
    backend = tier.backend()
    flight = ShardedFlight(backend=backend, name="workers")
    newer: list[Any] = []
    real = backend.join

    def join_and_forget(wanted: Any, here: bool) -> Any:
        turns = real(wanted, here)
        if not newer:
            turns[0].result(PATIENCE)
            flight.forget("k")
            newer.append(other.call("do", "k"))
            newer[0].runs()
        return turns

    backend.join = join_and_forget
    assert flight.do(lambda: "old", "k") == ("old", False)
    follower = spawn(flight.do, lambda: "not run", "k")
    eventually(lambda: tier.followers() == 1)
    newer[0].let_return("new")
    assert values(newer[0].ends()) == ("new", True)
    assert follower.result(PATIENCE) == ("new", True)
    backend.close()


def test_who_had_followed_what_was_forgotten_is_joined_once_it_leads(tier: Any, start: Any) -> None:
    """Found by the soak: the forgotten leader was lost. What its follower led instead was forgotten
    as well, though no forget was about that; and so on, from one process to the next."""
    first, second, third = start(3)
    old = first.call("do", "k")
    old.runs()
    follower = second.call("do", "k")
    eventually(lambda: tier.followers() == 1)
    third.forget("k")
    late: list[Any] = []

    def noticed() -> bool:
        late.append(second.call("do", "k"))
        eventually(lambda: sum(map(second.stats().get, ("in_flight", "waiting"))) == 1 + len(late))
        in_flight: int = second.stats()["in_flight"]
        return in_flight == 2

    eventually(noticed)
    late[-1].runs()
    late[-1].let_return("between")
    assert values(late[-1].ends())[0] == "between"
    first.kill()
    follower.runs()
    others = [third.call("do", "k"), second.call("do", "k")]
    eventually(lambda: tier.followers() == 1)
    eventually(lambda: second.stats()["waiting"] == len(late))
    follower.let_return("new")
    assert values(follower.ends()) == ("new", True)
    assert [values(call.ends()) for call in others] == [("new", True)] * 2


def test_the_garbage_collector_may_end_a_lead_at_any_point_of_another_call(tier: Any) -> None:
    """A task that is dropped gives up its lead where it is collected: amid any call's own steps."""
    backend = tier.backend()
    flight = ShardedFlight(backend=backend)
    names = [b"%020d" % number for number in range(2000)]
    leads: list[Any] = [
        turn.result(PATIENCE) for turn in backend.join([(n, 0) for n in names], True)
    ]
    amid = False

    def collect(frame: FrameType, *_: Any) -> None:
        nonlocal amid
        # Not amid those of the event loop and of redis-py, which are too many; and whoever sends
        # requests sends those that come of this, too.
        ours = frame.f_globals["__name__"].startswith(("shardedflight", "threading"))
        if ours and leads and not amid:
            amid = True
            backend.give_up(leads.pop())
            amid = False

    async def value() -> str:
        return "value"

    async def call() -> Any:
        sys.setprofile(collect)
        try:
            flight.forget("k")
            found = [await flight.do_async(value, "k"), flight.do(lambda: "value", "k")]
        finally:
            sys.setprofile(None)
        return found

    assert spawn(asyncio.run, call()).result(PATIENCE) == [("value", False)] * 2
    assert len(leads) < 1900
    backend.close()


def test_what_was_forgotten_serves_those_who_joined_however_long_it_runs(
    tier: Any, start: Any
) -> None:
    """Section 6. On a server a follower asks anew when a lease is over: it shall find its own."""
    first, second = start(2)
    old = first.call("do", "k")
    old.runs()
    served = second.call("do", "k")
    eventually(lambda: tier.followers() == 1)
    second.forget("k")
    new = _leads_anew(first)
    time.sleep(1.5)  # more than a lease
    old.let_return("old")
    assert values(old.ends()) == values(served.ends()) == ("old", True)
    new.let_return("new")
    assert values(new.ends())[0] == "new"


def _leads_anew(worker: Worker) -> Any:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        call = worker.call("do", "k", timeout=0.05)
        if call.events.get(timeout=PATIENCE)["event"] == "running":
            return call
    raise AssertionError("the old execution is still joined")


# -- fork -----------------------------------------------------------------------------------------


@need_fork
def test_a_forked_child_meets_its_parent(tier: Any) -> None:
    with closing(tier.backend()) as backend:
        flight = ShardedFlight(backend=backend)
        running, go = threading.Event(), threading.Event()

        def run() -> str:
            running.set()
            assert go.wait(PATIENCE)
            return "parent's"

        leader = spawn(flight.do, run, "k")
        assert running.wait(PATIENCE)

        def body() -> None:
            assert flight.stats().remote_leads == 0
            assert flight.do(lambda: "child's", "l") == ("child's", False)
            assert flight.stats().remote_leads == 1
            follower = spawn(flight.do, lambda: "child's", "k")
            assert follower.result(PATIENCE) == ("parent's", True)

        def let_go() -> None:
            eventually(lambda: tier.followers() == 1)
            go.set()

        watcher = spawn(let_go)
        in_child(body)
        watcher.result(PATIENCE)
        assert leader.result(PATIENCE) == ("parent's", True)
        assert flight.do(lambda: 1, "m") == (1, False)


@need_fork
def test_a_fork_inside_a_leaders_function_ends_it_once(tier: Any) -> None:
    with closing(tier.backend()) as backend:
        flight = ShardedFlight(backend=backend)

        def run() -> str:
            pid = os.fork()
            if pid:
                _, status = os.waitpid(pid, 0)
                assert status == 0
                assert tier.leads() == 1, "the child has ended what its parent leads"
                return "parent's"
            return "child's"

        pid = os.getpid()
        value = flight.do(run, "k")
        if os.getpid() != pid:
            os._exit(0 if value[0] == "child's" else 1)
        assert value == ("parent's", False)
        assert tier.leads() == 0
