"""Faults in the protocol, planted in the model to see that the checker finds them.

Each is a server or a client that differs in one point, and the smallest scenario found to show it.
The last three were no inventions: the checker found them in the product, where they are mended.
"""

from dataclasses import dataclass, field

from .protocol import CRASH, KILL, LOSE, RESTART, STALL, Client, Scenario
from .server import Execution, Held, Message, Result, Server, Store

__all__ = ["PLANTED", "Planted"]


@dataclass(frozen=True)
class Planted:
    """A fault, and where it shows.

    Attributes:
        name: What is wrong with the protocol.
        scenario: In which it is found.
        server: With the fault, or as it should be.
        client: The same.
    """

    name: str
    scenario: Scenario
    server: Server = field(default_factory=Server)
    client: Client = field(default_factory=Client)


class _DoneUnfenced(Server):
    def done(self, store: Store, token: int, payload: int, hold: bool, large: bool) -> Result:
        mine = store.find(token) or store.f
        if mine is None:
            return super().done(store, token, payload, hold, large)
        return super().done(store, mine.token, payload, hold, large)


class _GiveUnfenced(Server):
    def give(self, store: Store, token: int) -> Result:
        mine = store.find(token) or store.f
        return super().give(store, token if mine is None else mine.token)


class _BeatUnfenced(Server):
    def beat(self, store: Store, token: int) -> Result:
        mine = store.find(token) or store.f
        return super().beat(store, token if mine is None else mine.token)


class _JoinForgetsFollower(Server):
    def register(self, store: Store, execution: Execution, inbox: int, number: int) -> Store:
        return store


class _JoinLeadsTwice(Server):
    def same(self, lead: Execution, inbox: int, number: int) -> bool:
        return False


class _LeaveTakesAll(Server):
    def leaves(self, entry: tuple[int, int], inbox: int, number: int) -> bool:
        return entry[0] == inbox


class _OldForAll(Server):
    def may_have(self, held: Held) -> bool:
        return True


class _TokensFromOne(Server):
    def next_token(self, store: Store) -> int:
        return store.last + 1


class _NothingKept(Server):
    def keep(self, store: Store, held: Held) -> Store:
        return store


class _ForgetKeepsOutcome(Server):
    def drop(self, store: Store) -> Store:
        return store


class _ForgetDeletes(Server):
    def put_aside(self, store: Store, lead: Execution) -> Store:
        return store._replace(f=None)


class _ForgetIsSilent(Server):
    def forget(self, store: Store, only: int = 0) -> Result:
        store, reply, _ = super().forget(store, only)
        return store, reply, ()


class _ForgetStaysJoinable(Server):
    def put_aside(self, store: Store, lead: Execution) -> Store:
        return store


class _GiveIsSilent(Server):
    def tell(
        self, execution: Execution, kind: str, token: int, payload: int
    ) -> tuple[Message, ...]:
        return () if kind == "l" else super().tell(execution, kind, token, payload)


def _client(**flags: bool) -> Client:
    client = Client()
    for name, value in flags.items():
        assert hasattr(client, name)
        setattr(client, name, value)
    return client


_PAIR, _TWO_AND_ONE = (0, 1), (0, 0, 1)

PLANTED: tuple[Planted, ...] = (
    Planted(
        "DONE does not look whose execution it ends",
        Scenario((0, 1, 2), faults=1, kinds=(STALL,)),
        _DoneUnfenced(),
    ),
    Planted(
        "GIVE does not look whose execution it gives up",
        Scenario((0, 1, 2), leaves=1),
        _GiveUnfenced(),
    ),
    Planted(
        "BEAT renews whatever lease there is",
        Scenario(_PAIR, faults=1, kinds=(STALL,), beats=True),
        _BeatUnfenced(),
    ),
    Planted("JOIN does not enter who follows", Scenario(_PAIR), _JoinForgetsFollower()),
    Planted(
        "JOIN does not know a leader that asks once more",
        Scenario(_PAIR, faults=1, kinds=(KILL,)),
        _JoinLeadsTwice(),
    ),
    Planted("JOIN hands old outcomes to new callers", Scenario((0, 1, 1)), _OldForAll()),
    Planted(
        "tokens begin at one after a restart",
        Scenario(_PAIR, faults=1, kinds=(RESTART,)),
        _TokensFromOne(),
    ),
    Planted(
        "DONE keeps nothing for those who miss the message",
        Scenario(_PAIR, faults=1, kinds=(LOSE,)),
        _NothingKept(),
    ),
    Planted(
        "FORGET leaves the outcome that is held",
        Scenario(_PAIR, forgets=1, hold=True),
        _ForgetKeepsOutcome(),
    ),
    Planted(
        "FORGET deletes what its followers wait for",
        Scenario(_PAIR, forgets=1),
        _ForgetDeletes(),
    ),
    Planted(
        "FORGET leaves the execution joinable", Scenario(_PAIR, forgets=1), _ForgetStaysJoinable()
    ),
    Planted("FORGET tells nobody", Scenario(_TWO_AND_ONE, forgets=1), _ForgetIsSilent()),
    Planted("GIVE tells nobody", Scenario(_PAIR, leaves=1), _GiveIsSilent()),
    Planted(
        "no watchdog, and a message is lost",
        Scenario(_PAIR, faults=1, kinds=(LOSE,)),
        client=_client(has_watchdog=False),
    ),
    Planted(
        "no watchdog, and a leader is killed",
        Scenario(_PAIR, faults=1, kinds=(CRASH,)),
        client=_client(has_watchdog=False),
    ),
    Planted(
        "a message that comes before its answer is passed over",
        Scenario(_PAIR),
        client=_client(keeps_early=False),
    ),
    Planted(
        "a process joins before its inbox is known",
        Scenario(_PAIR),
        client=_client(subscribes_first=False),
    ),
    Planted(
        "a follower takes an outcome of any token",
        Scenario((0, 0, 1), forgets=1),
        client=_client(compares_tokens=False),
    ),
    Planted(
        "who joins again does not say what it followed",
        Scenario(_PAIR, faults=1, kinds=(LOSE,)),
        client=_client(says_followed=False),
    ),
    Planted(
        "a leader that is lost keeps its lease",
        Scenario(_PAIR, leaves=1),
        client=_client(gives_up=False),
    ),
    Planted(
        "a lead that comes after its caller has left is kept",
        Scenario(_PAIR, leaves=1),
        client=_client(gives_back=False),
    ),
    Planted(
        "LEAVE does not look who has come since",
        Scenario(_TWO_AND_ONE, leaves=1),
        _LeaveTakesAll(),
    ),
    Planted(
        "a follower leaves and does not say so",
        Scenario(_PAIR, leaves=1),
        client=_client(says_left=False),
    ),
    Planted(
        "a follower that has left while it asked does not say so",
        Scenario(_PAIR, leaves=1),
        client=_client(says_left_late=False),
    ),
    Planted(
        "a process does not hear that others forget",
        Scenario(_TWO_AND_ONE, forgets=1),
        client=_client(hears_forget=False),
    ),
    Planted(
        "a leader that ends does not hear that others forget",
        Scenario(_TWO_AND_ONE, forgets=1),
        client=_client(hears_while_ending=False),
    ),
    Planted(
        "a follower that joins again does not hear that others forget",
        Scenario(_TWO_AND_ONE, forgets=1),
        client=_client(hears_while_opening=False),
    ),
    Planted(
        "a follower asks twice at once",
        Scenario(_PAIR, forgets=1, leaves=1),
        client=_client(asks_once=False),
    ),
)
