"""The server: what it holds for one name, and each Lua script of `_scripts` as one atomic step.

Each method of `Server` reads like the script of its name, line by line; tests/test_model.py runs
random sequences of them beside the real scripts on a real Valkey and compares answers, messages and
what is stored. Faults are planted by subclasses (`planted`), never in here.

What is abstract: processes, requests and payloads are small numbers. A lease is `due` or not, and
`Server.tick` makes it due or ends it. Time is the greatest token ever given, for the server's clock
in microseconds has always passed it, whatever was lost in a crash.
"""

from typing import NamedTuple

__all__ = ["EMPTY", "FENCED", "Execution", "Held", "Message", "Reply", "Server", "Store"]

#: What DONE and GIVE answer to who has been replaced.
FENCED = -1


class Execution(NamedTuple):
    """A hash `f`, or `g` and its token."""

    token: int
    #: `n`, of the request that became the leader.
    number: int
    #: `i`, the leader's process.
    leader: int
    #: The processes that have a field, each with the number in it.
    followers: frozenset[tuple[int, int]]
    #: Not renewed since time has passed; when it passes again, the lease ends.
    due: bool = False


class Held(NamedTuple):
    """The hash `r`."""

    token: int
    #: New callers may have it: `u` is not over.
    fresh: bool
    payload: int


class Store(NamedTuple):
    """All that a server holds for a name."""

    f: Execution | None = None
    #: What was forgotten and still runs, in the order of tokens.
    g: tuple[Execution, ...] = ()
    r: Held | None = None
    #: The key `t`.
    last: int = 0
    #: The greatest token ever given.
    clock: int = 0

    def find(self, token: int) -> Execution | None:
        """The execution of a token."""
        return next((e for e in self.executions() if e.token == token), None)

    def executions(self) -> tuple[Execution, ...]:
        """All of them."""
        return self.g if self.f is None else (self.f, *self.g)

    def put(self, old: Execution, new: Execution | None) -> "Store":
        """With `new` in the place of `old`; without it, if there is no new one."""
        if old == self.f:
            return self._replace(f=new)
        rest = tuple(e for e in self.g if e != old)
        return self._replace(g=rest if new is None else tuple(sorted((*rest, new))))


EMPTY = Store()


class Message(NamedTuple):
    """To the inbox of a process. The name and the colon are left out."""

    to: int
    kind: str
    token: int
    payload: int = 0


#: The answer of a script.
Reply = tuple[int, ...]
#: What a step leaves, answers, and publishes.
Result = tuple[Store, Reply, tuple[Message, ...]]


class Server:
    """The scripts."""

    def join(self, store: Store, inbox: int, number: int, followed: int, reject: int = 0) -> Result:
        """JOIN. Answers (0, token), (1, token) or (2, token, payload)."""
        if followed:
            forgotten = next((e for e in store.g if e.token == followed), None)
            if forgotten is not None:
                return self.register(store, forgotten, inbox, number), (1, followed), ()
        held = store.r
        if (
            held is not None
            and held.token != reject
            and ((followed and held.token >= followed) or self.may_have(held))
        ):
            return store, (2, held.token, held.payload), ()
        if store.f is not None:
            if self.same(store.f, inbox, number):
                return store, (0, store.f.token), ()
            return self.register(store, store.f, inbox, number), (1, store.f.token), ()
        token = self.next_token(store)
        lead = Execution(token, number, inbox, frozenset())
        store = store._replace(f=lead, last=token, clock=max(store.clock, token))
        return store, (0, token), ()

    def may_have(self, held: Held) -> bool:
        """Whether a new caller may have an outcome."""
        return held.fresh

    def same(self, lead: Execution, inbox: int, number: int) -> bool:
        """Whether the leader asks once more."""
        return (lead.leader, lead.number) == (inbox, number)

    def register(self, store: Store, execution: Execution, inbox: int, number: int) -> Store:
        """Enters a follower."""
        others = frozenset(entry for entry in execution.followers if entry[0] != inbox)
        return store.put(execution, execution._replace(followers=others | {(inbox, number)}))

    def next_token(self, store: Store) -> int:
        """`max(now(), last + 1)`."""
        return max(store.clock + 1, store.last + 1)

    def mine(self, store: Store, token: int) -> Execution | None:
        """_MINE: the execution, if the token is still known."""
        return store.find(token)

    def tell(
        self, execution: Execution, kind: str, token: int, payload: int
    ) -> tuple[Message, ...]:
        """A message to each follower."""
        return tuple(Message(to, kind, token, payload) for to, _ in sorted(execution.followers))

    def done(self, store: Store, token: int, payload: int, hold: bool, large: bool) -> Result:
        """DONE. Answers how many were told, or FENCED."""
        mine = self.mine(store, token)
        if mine is None:
            return store, (FENCED,), ()
        kept = mine == store.f
        if kept and large:
            messages = self.tell(mine, "x", token, 0)
        else:
            messages = self.tell(mine, "d", token, payload)
        store = store.put(mine, None)
        if kept and (messages or hold):
            store = self.keep(store, Held(token, hold, payload))
        return store, (len(messages),), messages

    def keep(self, store: Store, held: Held) -> Store:
        """Stores an outcome for those who miss the message."""
        return store._replace(r=held)

    def give(self, store: Store, token: int) -> Result:
        """GIVE. Answers how many were told, or FENCED."""
        mine = self.mine(store, token)
        if mine is None:
            return store, (FENCED,), ()
        messages = self.tell(mine, "l", token, 0)
        return store.put(mine, None), (len(messages),), messages

    def leave(self, store: Store, token: int, inbox: int, number: int) -> Result:
        """LEAVE. Answers whether it was done, or FENCED."""
        mine = self.mine(store, token)
        if mine is None:
            return store, (FENCED,), ()
        gone = frozenset(entry for entry in mine.followers if self.leaves(entry, inbox, number))
        store = store.put(mine, mine._replace(followers=mine.followers - gone))
        return store, (len(gone),), ()

    def leaves(self, entry: tuple[int, int], inbox: int, number: int) -> bool:
        """Whether it is this follower who goes."""
        return entry == (inbox, number)

    def beat(self, store: Store, token: int) -> Result:
        """BEAT, for one token. Answers how many go on."""
        mine = self.mine(store, token)
        if mine is None:
            return store, (0,), ()
        return store.put(mine, mine._replace(due=False)), (1,), ()

    def forget(self, store: Store, only: int = 0) -> Result:
        """FORGET, of any execution or of the one with a token. Answers whether there was one."""
        lead = store.f
        if only and (lead is None or lead.token != only):
            return store, (0,), ()
        store = self.drop(store)
        if lead is None:
            return store, (0,), ()
        followers = (to for to, _ in sorted(lead.followers))
        messages = tuple(Message(to, "f", lead.token) for to in (lead.leader, *followers))
        return self.put_aside(store, lead), (1,), messages

    def drop(self, store: Store) -> Store:
        """Nobody new has the outcome that is held."""
        return store._replace(r=None)

    def put_aside(self, store: Store, lead: Execution) -> Store:
        """From `f` to `g`."""
        return store._replace(f=None, g=tuple(sorted((*store.g, lead))))

    # What is no script, but happens.

    def tick(self, store: Store, token: int) -> Store:
        """Time passes for an execution: its lease is due, or has run out."""
        execution = store.find(token)
        assert execution is not None
        return store.put(execution, None if execution.due else execution._replace(due=True))

    def restart(self, store: Store) -> Store:
        """It was killed, and comes back empty. Its clock goes on."""
        return Store(clock=store.clock)
