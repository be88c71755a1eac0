"""The model of the Redis tier's protocol: small scenarios whole, and that planted faults show.

And that its server does what the real scripts do on a real server.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from proof.model.checker import check
from proof.model.planted import PLANTED, Planted
from proof.model.protocol import CRASH, LOSE, RESTART, STALL, Protocol, Scenario
from proof.model.server import EMPTY, Message, Server
from support import PATIENCE

from shardedflight.backends import _scripts

pytestmark = pytest.mark.once

SMALL = [
    Scenario((0, 1), leaves=1),
    Scenario((0, 1), forgets=1, hold=True),
    Scenario((0, 1), faults=1, kinds=(CRASH,)),
    Scenario((0, 1), faults=1, kinds=(STALL,), beats=True),
    Scenario((0, 1), faults=1, kinds=(LOSE,)),
    Scenario((0, 1), faults=1, kinds=(RESTART,)),
]


@pytest.mark.parametrize("scenario", SMALL, ids=str)
def test_the_protocol_has_no_fault_in_any_state_of_a_small_scenario(scenario: Scenario) -> None:
    report = check(Protocol(scenario))
    assert report.complete
    assert not report.fault, report.trace


#: Those that are found within a second or two.
QUICK = [planted for planted in PLANTED if len(planted.scenario.callers) == 2]


@pytest.mark.parametrize("planted", QUICK, ids=lambda planted: planted.name)
def test_a_planted_fault_is_found(planted: Planted) -> None:
    report = check(Protocol(planted.scenario, planted.server, planted.client))
    assert report.fault
    assert len(report.trace) > 1


# -- the model's server beside the real one -------------------------------------------------------

valkey_support = pytest.importorskip("valkey_support", reason="there is no Valkey to start here")

INBOXES = (b"in0", b"in1", b"in2")
#: Milliseconds: nothing runs out while a test runs.
LONG = 600_000
LARGE, SMALL_OUTCOME = b"l" * 40, b"s"

tokens = st.integers(0, 3)
inboxes = st.integers(0, 2)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("join"), inboxes, st.integers(1, 4), tokens, tokens),
        st.tuples(st.just("done"), tokens, st.booleans(), st.booleans()),
        st.tuples(st.just("give"), tokens),
        st.tuples(st.just("beat"), tokens),
        st.tuples(st.just("forget")),
    ),
    max_size=25,
)


class Real:
    """The scripts on a real server, in the words of the model."""

    def __init__(self, server: Any) -> None:
        self.client = server.client()
        self.inbox = self.client.pubsub()
        self.inbox.ssubscribe(*INBOXES)
        for _ in INBOXES:
            assert self.inbox.get_message(timeout=PATIENCE)["type"] == "ssubscribe"

    def begin(self) -> None:
        self.client.flushall()
        #: What the model calls a token, by the real one.
        self.known = {b"0": 0}

    def real(self, token: int) -> bytes:
        return next((real for real, known in self.known.items() if known == token), b"1")

    def run(self, script: str, keys: tuple[str, ...], *args: Any) -> Any:
        return self.client.eval(script, len(keys), *keys, *args)

    def join(self, inbox: int, number: int, followed: int, reject: int) -> tuple[int, ...]:
        answer = self.run(
            _scripts.JOIN,
            ("f", "r", "t", "g:"),
            *(INBOXES[inbox], number, LONG, self.real(followed), self.real(reject)),
        )
        kind, token = answer[:2]
        if token not in self.known:
            self.known[token] = max(self.known.values()) + 1
        rest = (int(answer[2] == LARGE),) if kind == 2 else ()
        return (kind, self.known[token], *rest)

    def done(self, token: int, hold: bool, large: bool) -> tuple[int, ...]:
        keys = ("f", f"g:{self.real(token).decode()}", "r")
        outcome = LARGE if large else SMALL_OUTCOME
        args = (self.real(token), "name", outcome, LONG if hold else 0, LONG, 20)
        return (self.run(_scripts.DONE, keys, *args),)

    def give(self, token: int) -> tuple[int, ...]:
        keys = ("f", f"g:{self.real(token).decode()}")
        return (self.run(_scripts.GIVE, keys, self.real(token), "name"),)

    def beat(self, token: int) -> tuple[int, ...]:
        keys = ("f", f"g:{self.real(token).decode()}")
        return (self.run(_scripts.BEAT, keys, LONG, self.real(token)),)

    def forget(self) -> tuple[int, ...]:
        return (self.run(_scripts.FORGET, ("f", "r", "g:"), "name"),)

    def heard(self, count: int) -> list[Message]:
        """So many messages, and that there is no other before one that comes last."""
        heard: list[Message] = []
        self.client.spublish(INBOXES[0], "last")
        while (message := self.inbox.get_message(timeout=PATIENCE))["data"] != b"last":
            head, _, payload = message["data"].partition(b":")
            kind, token = head[:1].decode(), self.known[head[len(b"dname") :]]
            to = INBOXES.index(message["channel"])
            heard.append(Message(to, kind, token, int(payload == LARGE)))
        assert len(heard) == count
        return sorted(heard)

    def stored(self) -> dict[str, Any]:
        """What is in the server, as `as_stored` writes what is in the model."""
        found: dict[str, Any] = {}
        for key in self.client.keys("*"):
            if key == b"t":
                found["t"] = self.known[self.client.get(key)]
                continue
            fields = self.client.hgetall(key)
            token = self.known[fields.pop(b"t")]
            if key == b"r":
                found["r"] = (token, fields[b"u"] != b"0", int(fields[b"p"] == LARGE))
                continue
            number, leader = int(fields.pop(b"n")), INBOXES.index(fields.pop(b"i"))
            name = "f" if key == b"f" else f"g{self.known[key.removeprefix(b'g:')]}"
            found[name] = (token, number, leader, {INBOXES.index(field) for field in fields})
        return found


def as_stored(store: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if store.last:
        found["t"] = store.last
    if store.r is not None:
        found["r"] = (store.r.token, store.r.fresh, store.r.payload)
    for execution in store.executions():
        name = "f" if execution == store.f else f"g{execution.token}"
        found[name] = (execution.token, execution.number, execution.leader, {*execution.followers})
    return found


@pytest.fixture(scope="module")
def real() -> Iterator[Real]:
    server = valkey_support.Valkey()
    try:
        yield Real(server)
    finally:
        server.stop()


@settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps)
def test_the_model_of_the_server_does_what_the_scripts_do(
    real: Real, steps: list[tuple[Any, ...]]
) -> None:
    model, store = Server(), EMPTY
    real.begin()
    for name, *args in steps:
        answer = getattr(real, name)(*args)
        if name == "done":
            token, hold, large = args
            store, reply, messages = model.done(store, token, int(large), hold, large)
        else:
            store, reply, messages = getattr(model, name)(store, *args)
        assert answer == reply
        assert real.heard(len(messages)) == sorted(messages)
        assert real.stored() == as_stored(store)
