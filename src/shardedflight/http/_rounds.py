"""Which requests wait for which execution, and what the answers have taught about a key.

A flight says who leads and who follows. What HTTP adds is kept here, beside it:

- A `Round` is one execution for one key (and one variant of it) with the number of those who wait
  for it. Its name is the flight's key. It ends with a verdict: an answer for all whom it fits, or a
  refusal, which releases everyone at once.
- A `Caller` is one request on its way through rounds: released, sent on to the round of its
  variant, or, after `follower_timeout`, to a replacement. It goes on counting on the rounds that
  it left: an answer that has come there in the meantime is good for it as well, so that an
  application which always takes longer than the timeout still answers everybody.
- What was learned of a key lasts for `pass_through_time`: that its answers are not shareable
  (Varnish's hit-for-miss), or which fields they vary by.

Nothing here waits or does I/O. All of it may be used from any number of threads.
"""

import itertools
import logging
import os
import time
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, TypeVar, Unpack

from shardedflight import DeadlockError, ShardedFlight
from shardedflight._lock import SteadyLock

from ._rules import Options, Pass, Refusal, Request, Rules, Shared, Verdict, Where, names

__all__ = ["Adapter", "Caller", "HttpStats", "Round", "Rounds"]

logger = logging.getLogger("shardedflight.http")

AppT = TypeVar("AppT")

#: Keys of which something is remembered; the oldest goes first. Bounds what clients can make us
#: keep by asking for ever new addresses.
_REMEMBERED = 10_000

#: One count for the process: adapters may share a flight.
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class HttpStats:
    """A snapshot of an adapter's running totals. How often it ran, its flight's stats say.

    Attributes:
        passed: Requests that ran by themselves, by the reason.
        collapsed: Requests that got another request's answer.
        released: Requests that waited for an answer which turned out not to be shareable. They are
            in `passed` as well.
        replaced: Executions that were replaced because followers had waited too long.
        unshareable: Executions whose answer was not shared, by the reason.
        errors: Requests that passed through because something went wrong in the adapter.
    """

    passed: Mapping[str, int]
    collapsed: int
    released: int
    replaced: int
    unshareable: Mapping[str, int]
    errors: int


class Round:
    """One execution and those who wait for it. `Rounds` changes it, under its lock."""

    __slots__ = (
        "bell",
        "closed",
        "failed",
        "followers",
        "key",
        "led",
        "name",
        "successors",
        "verdict",
        "waits",
    )

    def __init__(self, key: Hashable, address: str) -> None:
        #: The request's key and variant.
        self.key = key
        #: The flight's key: a text, so that any hash and key builder can work with it.
        self.name = f"{address} #{next(_numbers)}"
        #: Where those who waited here have gone on to, by key. Its answer is good for all of them,
        #: also for those who come later than it: they were there already when it began.
        self.successors: dict[Hashable, Round] = {}
        #: Callers that are not the leader.
        self.followers = 0
        #: The application runs, and the leader's own request is still there.
        self.led = False
        #: What it came to. Stays once set, for those who have joined.
        self.verdict: Verdict | None = None
        #: The application raised, and followers get that: the flight has it.
        self.failed = False
        #: The application may have been told that nobody wants its answer: what it says from then
        #: on, to end somehow, is no answer to anybody.
        self.closed = False
        #: Called when `followers` falls to 0, or at the end.
        self.bell: Callable[[], None] | None = None
        #: The rounds that code inside its application waits for; one of them twice, if two do.
        self.waits: list[Round] = []

    def waits_for(self, other: "Round") -> bool:
        """Whether it is `other`, or can not end before that has."""
        seen: set[Round] = {self}
        stack: list[Round] = [self]
        while stack:
            found = stack.pop()
            if found is other:
                return True
            new = [further for further in found.waits if further not in seen]
            seen.update(new)
            stack += new
        return False


class Rounds:
    """The rounds that can be joined, by key, and what was learned."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._lock = SteadyLock()
        self._open: dict[Hashable, Round] = {}
        #: Key to: when it is forgotten, why it passes through if it does, the fields of Vary.
        self._learned: dict[Hashable, tuple[float, Refusal | None, tuple[str, ...]]] = {}
        self._passed = dict.fromkeys(Pass, 0)
        self._unshareable = dict.fromkeys(Refusal, 0)
        self._collapsed = self._released = self._replaced = self._errors = 0
        self._logged: set[type[BaseException]] = set()
        _all_rounds.add(self)

    # -- joining and leaving ----------------------------------------------------------------------

    def join(
        self,
        request: Request,
        fields: tuple[str, ...],
        before: Round | None,
        inside: Round | None,
    ) -> Round | Pass:
        """Makes a request a follower of its round, which it will lead if it is the first.

        Args:
            request: The request.
            fields: What it was told that answers vary by.
            before: The round that it has waited for before. What the others from there have joined
                may have a verdict already.
            inside: The round in whose application the request is made.

        Raises:
            DeadlockError: Its round waits for the one that it is made in.
        """
        with self._lock:
            _, refusal, learned = self._known(request.key)
            if refusal is not None:
                return Pass.LEARNED
            key = (request.key, request.variant((*fields, *learned)))
            found = None if before is None else before.successors.get(key)
            if found is None or found.closed or found.failed:
                found = self._open.get(key)
            if found is None:
                found = self._open[key] = Round(key, request.address)
            elif found.followers >= self.rules.max_waiters:
                return Pass.WAITERS
            if inside is not None:
                if found.waits_for(inside):
                    raise DeadlockError(
                        f"{inside.name!r} asks for {found.name!r}, which waits for it",
                        (inside.name, found.name),
                    )
                inside.waits.append(found)
            if before is not None:
                before.successors[key] = found
            found.followers += 1
            return found

    def lead(self, round_: Round) -> None:
        """A follower's application runs now: it is the leader."""
        with self._lock:
            round_.followers -= 1
            round_.led = True

    def leave(self, round_: Round, inside: Round | None, *, leader: bool) -> None:
        """A caller is through with a round, and what it is made in with waiting for that."""
        with self._lock:
            if inside is not None:
                inside.waits.remove(round_)
            if leader:
                round_.led = False
            else:
                round_.followers -= 1
            if round_.followers:
                return
            if not round_.led:
                self._unlink(round_)
            bell = round_.bell
        if bell is not None:
            bell()

    def close(self, round_: Round, bell: Callable[[], None] | None = None) -> bool:
        """Nobody joins any more, unless there are followers: then `bell` rings when they leave.

        Returns:
            Whether it is closed.
        """
        with self._lock:
            if round_.followers:
                round_.bell = bell
                return False
            self._close(round_)
            return True

    def abandon(self, round_: Round) -> None:
        """The application is told that nobody wants its answer."""
        with self._lock:
            self._close(round_)

    def _close(self, round_: Round) -> None:
        self._unlink(round_)
        if round_.verdict is None:
            round_.closed = True

    def replace(self, rounds: Sequence[Round]) -> Verdict | None:
        """A follower has waited for the last of `rounds` too long: whoever joins gets a new one.

        Returns:
            What one of the rounds, or of those that replaced them, has come to. Nothing is replaced
            then.
        """
        with self._lock:
            for round_ in rounds:
                late: Round | None = round_
                while late is not None:
                    if late.verdict is not None and not late.closed:
                        return late.verdict
                    late = late.successors.get(late.key)
            if self._open.get(rounds[-1].key) is rounds[-1]:
                self._unlink(rounds[-1])
                self._replaced += 1
            return None

    def _unlink(self, round_: Round) -> None:
        if self._open.get(round_.key) is round_:
            del self._open[round_.key]

    # -- ends -------------------------------------------------------------------------------------

    def finish(self, round_: Round, request: Request, verdict: Verdict) -> None:
        """An execution has come to something. Before the flight is told: nobody joins it then."""
        with self._lock:
            self._unlink(round_)
            round_.verdict = verdict
            if not round_.closed:
                self._learn_from(request.key, verdict)
            bell = round_.bell
        if bell is not None:
            bell()

    def fail(self, round_: Round) -> None:
        """The application raised, and the flight takes that to everyone."""
        with self._lock:
            self._unlink(round_)
            round_.failed = True
            bell = round_.bell
        if bell is not None:
            bell()

    # -- what is learned --------------------------------------------------------------------------

    def _learn_from(self, key: Hashable, verdict: Verdict) -> None:
        if isinstance(verdict, Shared):
            self._learn(key, None, tuple(field for field, _ in verdict.variant))
            return
        self._unshareable[verdict] += 1
        if verdict is not Refusal.BROKEN:  # that was no answer
            self._learn(key, verdict, ())

    def _learn(self, key: Hashable, refusal: Refusal | None, fields: tuple[str, ...]) -> None:
        self._learned.pop(key, None)
        lifetime = self.rules.pass_through_time
        if lifetime and (refusal is not None or fields):
            if len(self._learned) >= _REMEMBERED:
                del self._learned[next(iter(self._learned))]
            self._learned[key] = (time.monotonic() + lifetime, refusal, fields)

    def _known(self, key: Hashable) -> tuple[float, Refusal | None, tuple[str, ...]]:
        known = self._learned.get(key)
        if known is None:
            return _NOTHING_LEARNED
        if known[0] <= time.monotonic():
            del self._learned[key]
            return _NOTHING_LEARNED
        return known

    def passes(self, request: Request) -> bool:
        """Whether it passes through at once because of what was learned, which is counted."""
        known = self._learned.get(request.key)  # without the lock: a dict is read in one step
        if known is None or known[1] is None or known[0] <= time.monotonic():
            return False
        with self._lock:
            self._passed[Pass.LEARNED] += 1
        return True

    def reconsider(self, request: Request, code: int, headers: Mapping[str, str]) -> None:
        """A request that passed through gets this answer: the key is good again if that is."""
        if self.rules.judge(request, code, headers) is not None:
            return
        with self._lock:
            _, reason, _ = self._known(request.key)
            # A head does not tell that a body is short enough now, unless it has a length; nor
            # that the application hands none to the server.
            unknown = reason is Refusal.EXTENSION or (
                reason is Refusal.SIZE and "content-length" not in headers
            )
            if reason is not None and not unknown:
                self._learn(request.key, None, tuple(names(headers.get("vary", ""))))

    # -- counting ---------------------------------------------------------------------------------

    def count_passed(self, reason: Pass) -> None:
        """A request runs by itself."""
        with self._lock:
            self._passed[reason] += 1
            if reason is Pass.RELEASED:
                self._released += 1

    def count_collapsed(self) -> None:
        """A request gets another's answer."""
        with self._lock:
            self._collapsed += 1

    def count_error(self, error: BaseException, *, passed: bool = True) -> None:
        """Something went wrong in the adapter. Each type of error is logged once."""
        with self._lock:
            self._errors += 1
            if passed:
                self._passed[Pass.ERROR] += 1
            new = type(error) not in self._logged
            self._logged.add(type(error))
        if new:
            logger.error("Collapsing failed; the request passes through", exc_info=error)

    def stats(self) -> HttpStats:
        """The totals."""
        with self._lock:
            return HttpStats(
                passed=_counted(self._passed),
                collapsed=self._collapsed,
                released=self._released,
                replaced=self._replaced,
                unshareable=_counted(self._unshareable),
                errors=self._errors,
            )

    def after_fork_in_child(self) -> None:
        """The threads that waited, or held the lock, are the parent's."""
        self._lock = SteadyLock()
        self._open = {}


def _counted(totals: Mapping[Any, int]) -> Mapping[str, int]:
    return MappingProxyType({reason.value: total for reason, total in totals.items() if total})


_NOTHING_LEARNED: tuple[float, Refusal | None, tuple[str, ...]] = (0.0, None, ())

_all_rounds: "weakref.WeakSet[Rounds]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for rounds in tuple(_all_rounds):
        rounds.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class Caller:
    """One request on its way: `join`, wait, `leave`, `judge`, until there is an answer or a pass.

    For one thread or task at a time.
    """

    def __init__(self, rounds: Rounds, request: Request) -> None:
        self.request = request
        #: The round in whose application it is made, where that is known.
        self.inside: Round | None = None
        self._rounds = rounds
        self._round: Round | None = None
        #: Rounds of the same variant that it has waited for too long.
        self._earlier: list[Round] = []
        #: The fields that it was told to look at besides the learned ones.
        self._fields: tuple[str, ...] = ()
        self._released = False
        self._leads = False

    def join(self) -> Round | None:
        """The round to wait for; None if the request passes through, which is counted."""
        reason = Pass.RELEASED
        if not self._released:
            joined = self._rounds.join(self.request, self._fields, self._round, self.inside)
            if isinstance(joined, Round):
                self._round = joined
                return joined
            if joined is not Pass.LEARNED or not self._earlier:
                reason = joined
        self._rounds.count_passed(reason)
        return None

    def lead(self) -> None:
        """Its application runs now, for the round it has joined."""
        assert self._round is not None
        self._leads = True
        self._rounds.lead(self._round)

    def leave(self) -> None:
        """The wait for the round is over, however that came about."""
        assert self._round is not None
        self._rounds.leave(self._round, self.inside, leader=self._leads)

    def judge(self, verdict: Verdict | None) -> Shared | None:
        """What a follower gets; None if it has to `join` again.

        Args:
            verdict: What the round came to, None if it took too long.
        """
        assert self._round is not None
        if verdict is None:
            self._earlier.append(self._round)
            verdict = self._rounds.replace(self._earlier)
            if verdict is None:
                return None
        if not isinstance(verdict, Shared):
            self._released = True
        elif verdict.fits(self.request):
            self._rounds.count_collapsed()
            return verdict
        else:
            self._earlier.clear()
            fields = tuple(field for field, _ in verdict.variant)
            self._fields = tuple({*self._fields, *fields})
        return None


class Adapter(Generic[AppT]):
    """What the adapters share: an application, a flight, the rules, and how it went.

    Args:
        app: The application, or the transport that sends.
        routes: What may be collapsed: path prefixes, or a function of what the framework calls a
            request.
        shareable: What may be shared without Cache-Control, in the same form.
        flight: Where the executions are in flight. By default one of its own.
        **options: See `Options`.

    Raises:
        TypeError: An option is of the wrong type.
        ValueError: An option is out of its range.
    """

    #: Whether all requests are one client's: see `Rules`.
    _one_client = False

    def __init__(
        self,
        app: AppT,
        *,
        routes: Where,
        shareable: Where = (),
        flight: ShardedFlight | None = None,
        **options: Unpack[Options],
    ) -> None:
        self._check(app)
        if flight is not None and not isinstance(flight, ShardedFlight):
            raise TypeError(f"flight must be a ShardedFlight or None, not {flight!r}")
        if flight is not None and flight._tier is not None:
            # Rounds are numbered in each process, and answers are not made to be encoded.
            raise ValueError(f"flight must have no backend: each process collapses, not {flight!r}")
        rules = Rules(routes, shareable, one_client=self._one_client, **options)
        self._app = app
        self._flight = ShardedFlight(name="http") if flight is None else flight
        self._rules = rules
        self._rounds = Rounds(rules)
        self._prepare()

    def _check(self, app: Any) -> None:
        """Raises TypeError if `app` is of the wrong kind."""
        raise NotImplementedError

    def _prepare(self) -> None:
        """Makes what the adapter needs besides, when the options are known to be right."""

    @property
    def flight(self) -> ShardedFlight:
        """The flight that the executions are in."""
        return self._flight

    def stats(self) -> HttpStats:
        """A snapshot of the totals. On any thread."""
        return self._rounds.stats()

    def _examine(self, native: Any) -> Request | None:
        """The request, if it may be collapsed; else None, and it is counted why. Never raises."""
        try:
            examined = self._read(native)
        except Exception as error:  # noqa: BLE001 - a request is served, whatever goes wrong here
            self._rounds.count_error(error)
            return None
        if isinstance(examined, Pass):
            self._rounds.count_passed(examined)
            return None
        return examined

    def _read(self, native: Any) -> Request | Pass:
        raise NotImplementedError
