"""The model of the Redis tier's protocol (proof/model): it holds, and it is no fairy tale.

Random sequences of the model's server steps are done beside the real scripts on a real Valkey, and
answers, messages and what is stored are compared; so are servers with planted faults, which must
differ. The spaces explored here are the small ones; `make model` explores the others.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from proof.model.checker import FAULT, STEP, TIME, check
from proof.model.planted import PLANTED, Planted
from proof.model.protocol import Protocol
from proof.model.server import EMPTY, Execution, Held, Message, Server, Store
from proof.model.spaces import SMALL

if os.name == "nt":
    pytest.skip("there is no Valkey for Windows", allow_module_level=True)

from valkey_support import Valkey

from shardedflight.backends import _scripts

# Nothing in here depends on the interpreter.
pytestmark = [pytest.mark.around, pytest.mark.once]

# -- the checker ----------------------------------------------------------------------------------


class Graph:
    """A model that is written down: from each state, where to and how."""

    def __init__(self, *steps: tuple[int, int, int], bad: int = -1, quiet: int = -1) -> None:
        self._steps, self._bad, self._quiet = steps, bad, quiet

    def first(self) -> int:
        return 0

    def steps(self, state: int) -> list[tuple[tuple[Any, ...], int, int]]:
        return [((f"{a}-{b}",), kind, b) for a, kind, b in self._steps if a == state]

    def wrong(self, state: int) -> str:
        return "bad" if state == self._bad else ""

    def quiet(self, state: int) -> bool:
        return state == self._quiet

    def patient(self, state: int) -> bool:
        return False

    def show(self, state: int) -> str:
        return str(state)


def test_the_checker_finds_the_shortest_way() -> None:
    graph = Graph((0, STEP, 1), (1, STEP, 2), (2, STEP, 4), (0, STEP, 3), (3, STEP, 4), bad=4)
    report = check(graph)
    assert report.fault == "bad"
    assert [label for label, _ in report.trace] == [("start",), ("0-3",), ("3-4",)]


@pytest.mark.parametrize(
    ("steps", "fault"),
    [
        ([(0, STEP, 1)], ""),
        ([(0, STEP, 1), (0, STEP, 2)], "never be answered"),  # nothing goes on
        ([(0, STEP, 1), (0, STEP, 2), (2, STEP, 3), (3, STEP, 2)], "never be answered"),  # a cycle
        ([(0, STEP, 1), (0, STEP, 2), (2, FAULT, 1)], "never be answered"),  # faults do not help
        ([(0, STEP, 1), (0, STEP, 2), (2, TIME, 1)], "by a timer"),
        ([(0, STEP, 1), (0, STEP, 2), (2, TIME, 1), (2, STEP, 0)], ""),
    ],
)
def test_the_checker_judges_progress(steps: list[tuple[int, int, int]], fault: str) -> None:
    report = check(Graph(*steps, quiet=1))
    assert report.complete
    assert fault in report.fault
    assert bool(fault) == bool(report.fault)


# -- the protocol ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_the_protocol_holds(name: str) -> None:
    """Every order of its steps; of the larger spaces, as much as there is time for."""
    report = check(Protocol(SMALL[name]), most=6_000)
    assert not report.fault, report.trace
    assert report.complete or report.states > 6_000


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name)
def test_planted_faults_are_found(planted: Planted) -> None:
    report = check(Protocol(planted.scenario, planted.server, planted.client), most=100_000)
    assert report.fault


# -- the scripts ----------------------------------------------------------------------------------

INBOXES = [f"{{m:0}}:i:{n}" for n in range(3)]
NAME = "n" * 20
LEASE = 100_000


class Real:
    """The real scripts, on keys of one name; tokens are numbered as they come."""

    def __init__(self, server: Valkey) -> None:
        self._client = server.client()
        self._listener = server.client().connection_pool.get_connection()
        for inbox in INBOXES:
            self._listener.send_command("SSUBSCRIBE", inbox)
            self._listener.read_response()
        names = ("JOIN", "DONE", "GIVE", "LEAVE", "BEAT", "FORGET")
        self._scripts = {n: self._client.register_script(getattr(_scripts, n)) for n in names}
        self.f, self.r, self.t, self.g = (f"{{m:0}}:{kind}" for kind in "frtg")
        self._tokens: list[int] = []

    def close(self) -> None:
        self._listener.disconnect()
        self._client.close()

    def clear(self) -> None:
        self._client.flushall()
        self._tokens = []
        for _ in self._published():
            pass

    def _run(self, name: str, keys: list[str], *args: Any) -> Any:
        return self._scripts[name](keys=keys, args=args)

    def _real(self, token: int) -> int:
        """Unknown tokens are later than all."""
        return self._tokens[token - 1] if 0 < token <= len(self._tokens) else token and 1 << 52

    def _number(self, token: bytes | int) -> int:
        if int(token) not in self._tokens:
            assert int(token) > max(self._tokens, default=0)
            self._tokens.append(int(token))
        return self._tokens.index(int(token)) + 1

    def _g(self, token: int) -> str:
        return f"{self.g}:{self._real(token)}"

    def join(self, inbox: int, number: int, followed: int, reject: int) -> tuple[int, ...]:
        kind, token, *rest = self._run(
            "JOIN",
            [self.f, self.r, self.t, f"{self.g}:"],
            *(INBOXES[inbox], number, LEASE, self._real(followed), self._real(reject)),
        )
        if kind == 1:
            assert 0 < rest[0] <= LEASE
        return (kind, self._number(token), *(int(p) for p in rest if kind == 2))

    def done(self, token: int, payload: int, hold: bool, large: bool) -> tuple[int, ...]:
        args = (self._real(token), NAME, payload, LEASE * hold, 3 * LEASE, 0 if large else 100)
        return (self._run("DONE", [self.f, self._g(token), self.r], *args),)

    def give(self, token: int) -> tuple[int, ...]:
        return (self._run("GIVE", [self.f, self._g(token)], self._real(token), NAME),)

    def leave(self, token: int, inbox: int, number: int) -> tuple[int, ...]:
        keys = [self.f, self._g(token)]
        return (self._run("LEAVE", keys, self._real(token), INBOXES[inbox], number),)

    def beat(self, token: int) -> tuple[int, ...]:
        return (self._run("BEAT", [self.f, self._g(token)], LEASE, self._real(token)),)

    def forget(self, only: int) -> tuple[int, ...]:
        return (self._run("FORGET", [self.f, self.r, f"{self.g}:"], NAME, self._real(only)),)

    def tick(self, token: int) -> None:
        """Half of the lease, or the rest."""
        f: Any = self._client.hget(self.f, "t")
        key = self.f if f is not None and int(f) == self._real(token) else self._g(token)
        left: Any = self._client.pttl(key)
        if left > LEASE // 2:
            self._client.pexpire(key, LEASE // 2)
        else:
            self._client.delete(key)

    def restart(self) -> None:
        self._client.flushall()

    def grow_old(self) -> None:
        self._client.hset(self.r, "u", "0")

    def _published(self) -> Iterator[tuple[bytes, bytes]]:
        """Whatever came before the answer to a PING."""
        self._listener.send_command("PING")
        while (reply := self._listener.read_response())[0] != b"pong":
            yield reply[1], reply[2]

    def messages(self) -> tuple[Message, ...]:
        """What has been published."""
        found: list[Message] = []
        for inbox, content in self._published():
            assert content[1:21] == NAME.encode()
            token, _, payload = content[21:].partition(b":")
            to = INBOXES.index(inbox.decode())
            found.append(Message(to, chr(content[0]), self._number(token), int(payload or b"0")))
        return tuple(found)

    def _execution(self, key: str) -> Execution:
        fields: Any = self._client.hgetall(key)
        left: Any = self._client.pttl(key)
        assert left > 0
        followers = frozenset(
            (n, int(fields[inbox.encode()]))
            for n, inbox in enumerate(INBOXES)
            if inbox.encode() in fields
        )
        assert len(fields) == 3 + len(followers)
        return Execution(
            self._number(fields[b"t"]),
            int(fields[b"n"]),
            INBOXES.index(fields[b"i"].decode()),
            followers,
            left <= LEASE // 2,
        )

    def store(self) -> Store:
        names: Any = self._client.keys("*")
        g = sorted(name.decode() for name in names if name.decode().startswith(f"{self.g}:"))
        r: Any = self._client.hgetall(self.r)
        last: Any = self._client.get(self.t)
        time: Any = self._client.time()
        held = None
        if r:
            assert 0 < int(self._client.pttl(self.r)) <= 3 * LEASE  # type: ignore[arg-type]
            fresh = int(r[b"u"]) > time[0] * 1_000_000 + time[1]
            held = Held(self._number(r[b"t"]), fresh, int(r[b"p"]))
        return Store(
            self._execution(self.f) if self.f.encode() in names else None,
            tuple(sorted(self._execution(key) for key in g)),
            held,
            self._number(last) if last else 0,
            len(self._tokens),
        )


PROCESS, TOKEN = st.integers(0, 2), st.integers(0, 4)
#: What is done: its name, and the arguments of the model's method besides the store.
DEED = st.one_of(
    # Numbers that come again are requests that do.
    st.tuples(st.just("join"), PROCESS, st.integers(1, 4), TOKEN, st.sampled_from([0, 0, 0, 1, 2])),
    st.tuples(st.just("done"), TOKEN, st.integers(1, 9), st.booleans(), st.booleans()),
    st.tuples(st.just("give"), TOKEN),
    st.tuples(st.just("leave"), TOKEN, PROCESS, st.integers(1, 4)),
    st.tuples(st.just("beat"), TOKEN),
    st.tuples(st.just("forget"), TOKEN),
    st.tuples(st.just("tick"), TOKEN),
    st.tuples(st.just("grow_old")),
    st.tuples(st.just("restart")),
)
DEEDS = st.lists(DEED, max_size=14)


@pytest.fixture(scope="module")
def real() -> Iterator[Real]:
    server = Valkey()
    real = Real(server)
    yield real
    real.close()
    server.stop()


def differs(model: Server, real: Real, deeds: list[tuple[Any, ...]]) -> str:
    """Does the same with both. The first difference; empty if there is none."""
    real.clear()
    store = EMPTY
    for name, *arguments in deeds:
        if name == "tick" and store.find(arguments[0]) is None:
            continue
        if name == "grow_old" and store.r is None:
            continue
        told: Any = getattr(real, name)(*arguments)
        if name == "grow_old":
            assert store.r is not None
            store = store._replace(r=store.r._replace(fresh=False))
        elif name in ("tick", "restart"):
            store = getattr(model, name)(store, *arguments)
        else:
            store, reply, messages = getattr(model, name)(store, *arguments)
            if reply != told:
                return f"{name} {arguments}: {reply} of the model, {told} in truth"
            # To several inboxes the server publishes in the order of their fields.
            if sorted(messages) != sorted(found := real.messages()):
                return f"{name} {arguments}: {messages} of the model, {found} in truth"
        if store != (truth := real.store()):
            return f"{name} {arguments}: {store} of the model, {truth} in truth"
    return ""


UNTIL_FOUND = settings(
    max_examples=3000,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@settings(UNTIL_FOUND, max_examples=250)
@given(deeds=DEEDS)
def test_the_model_of_the_server_does_what_the_scripts_do(
    real: Real, deeds: list[tuple[Any, ...]]
) -> None:
    assert differs(Server(), real, deeds) == ""


@pytest.mark.parametrize(
    "planted",
    [planted for planted in PLANTED if type(planted.server) is not Server],
    ids=lambda planted: planted.name,
)
def test_the_comparison_sees_what_is_wrong_with_a_model(real: Real, planted: Planted) -> None:
    try:
        find(
            DEEDS,
            lambda deeds: differs(planted.server, real, deeds) != "",
            settings=settings(UNTIL_FOUND, phases=[Phase.generate]),
        )
    except NoSuchExample:
        pytest.fail("no difference was found")
