"""What a flight does when it has a backend: it asks the other processes before it runs a function.

The process tier comes first. Of all callers for one key in this process one leads, as ever, and
that one alone is here: it joins the key at the backend, and then either runs its function and
publishes the outcome, or has the outcome of another process. What the others of its own process
see of this is a leader that takes its time.

The steps are written once, in generators that yield what has to be waited for: futures of
`concurrent.futures`, which a backend settles on its threads. A thread waits for them, a coroutine
awaits them; `wait` and `wait_async`, and nothing else, know the difference.

A backend that is not to be had, or an outcome that can not be read, never stops a call: the caller
runs its function for its own process. That is counted, and said once in the log.
"""

import asyncio
import concurrent.futures
import inspect
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ._core import End, Seat, Shard, not_awaitable, public_key
from ._lock import SteadyLock
from .exceptions import BackendError, FlightTimeout

if TYPE_CHECKING:
    from .backends import Backend

__all__ = [
    "FENCED",
    "Absent",
    "CallersOwn",
    "Lead",
    "Outcome",
    "Party",
    "Sealed",
    "Tier",
    "TierStats",
    "TooLargeError",
    "Turn",
    "token",
    "wait",
    "wait_async",
]

R = TypeVar("R")

#: Futures of which at least one has to be done before a generator of steps is asked again.
Steps = Generator[Sequence["Future[Any]"], None, R]

log = logging.getLogger("shardedflight")

#: A call asks so often, if what it gets can not be read; then its function runs for its process.
ATTEMPTS = 3

#: What `finish` answers to a leader that has lost its place to a newer one.
FENCED = -1

#: The fencing token of the execution in whose function this code runs; None if its flight has no
#: lead at its backend.
token: ContextVar[int | None] = ContextVar("shardedflight.token", default=None)


class TooLargeError(Exception):
    """An outcome is larger than a backend carries."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an execution ended, as other processes may know it.

    Attributes:
        end: `End.VALUE`, `End.ERROR` or `End.MISSING`; `End.LOST` if there is an outcome that can
            not be handed to another process.
        value: The value, or the exception.
    """

    end: End
    value: Any = None


@dataclass(frozen=True, slots=True)
class Sealed:
    """An outcome as it came from another process: nobody has looked into it yet."""

    token: int
    payload: bytes


class Lead:
    """This process leads for a key, until its backend is told the end by `finish` or `give_up`.

    A backend keeps no reference to it: one that is dropped, as by a task whose loop was closed, is
    lost, and the backend hands it over.
    """

    __slots__ = ("__weakref__", "ended", "inherited", "token")

    def __init__(self, token: int, inherited: bool) -> None:
        #: Grows from one lead for a key to the next, in whichever process.
        self.token = token
        #: This process had followed, and that leader was lost.
        self.inherited = inherited
        #: Written by the flight, when the backend has taken the outcome or can not be told.
        self.ended = False


class Turn(Future["Lead | Sealed"]):
    """This process's part in an execution for a key: done once it leads, or there is an outcome.

    Fails with `BackendError` if the backend is not to be had.
    """

    #: Of a call for several keys, done once it is known of each whether it is led or followed.
    asked: "Future[None] | None" = None

    def __init__(self, backend: "Backend") -> None:
        super().__init__()
        self._backend = backend

    def joinable(self) -> bool:
        """Whether no process has forgotten the execution. Called on any thread; does not block."""
        raise NotImplementedError

    def was_forgotten(self) -> bool:
        """Of one that is not joinable: whether that is by a forget, which is counted."""
        return True

    def lead(self) -> Lead | None:
        """What this process leads by now."""
        if not self.done() or self.cancelled() or self.exception() is not None:
            return None
        won = self.result()
        return won if isinstance(won, Lead) else None

    def leave(self) -> None:
        """The caller goes; a lead that has come meanwhile is handed over."""
        lead = None if self.cancel() else self.lead()
        if lead is not None:
            self._backend.give_up(lead)

    def settle(self, won: "Lead | Sealed") -> bool:
        """Ends the wait. False if the caller has left: a lead is its maker's to give up then."""
        try:
            self.set_result(won)
        except concurrent.futures.InvalidStateError:
            return False
        return True

    def fail(self, error: BackendError) -> None:
        """Ends the wait: the caller is on its own."""
        try:
            self.set_exception(error)
        except concurrent.futures.InvalidStateError:
            pass  # it has left


class CallersOwn(BaseException):
    """What concerns one caller alone, so that a follower takes over. Carries what is raised to it.

    It is no Exception, for that would be everybody's.
    """

    def __init__(self, own: Exception) -> None:
        super().__init__(own)
        self.own = own


class Absent(CallersOwn):
    """Another process has found nothing for the key: the execution ends so for all its callers."""


@dataclass(frozen=True, slots=True)
class TierStats:
    """Running totals of what a flight did at its backend: `Stats` says what each is."""

    remote_leads: int = 0
    remote_follows: int = 0
    takeovers: int = 0
    fenced: int = 0
    fallbacks: int = 0
    misses: int = 0


class Tier:
    """One flight's side of a backend. Its methods may be called on any thread.

    Args:
        backend: Where the processes meet.
        name: The flight's name: flights of one name meet.
    """

    def __init__(self, backend: "Backend", name: str | None) -> None:
        self.backend = backend
        self._name = name
        self.restart()

    def restart(self) -> None:
        """Starts with nothing: at first, and in a forked child."""
        self._lock = SteadyLock()
        self._counts = dict.fromkeys(TierStats.__slots__, 0)
        #: What has been said in the log.
        self._said: set[str] = set()
        #: The names and the turns of those who lead here, by the ids of their seats. Entered before
        #: the backend is asked, with turns as they come, of which the last one counts. Each is
        #: written by who leads here, under the lock; read without it. Who takes over a seat enters
        #: it anew, maybe before its former leader has ended: the turns are taken out by identity.
        self._abroad: dict[int, tuple[bytes, list[Turn]]] = {}

    def stats(self) -> TierStats:
        """The totals."""
        with self._lock:
            return TierStats(**self._counts)

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1

    def complain(self, what: str, why: object) -> None:
        """Counts that the backend was of no use, and says so the first time."""
        kind = f"{what} {type(why).__name__ if isinstance(why, Exception) else why}"
        with self._lock:
            self._counts[what] += 1
            first = kind not in self._said
            self._said.add(kind)
        if first:
            log.warning("%r: %s; said once, see stats().%s", self.backend, why, what)

    def name(self, key: Any) -> bytes:
        """What a key is called at the backend.

        Raises:
            TypeError: The key can not leave the process.
        """
        public = public_key(key)  # several parts, or none, as a tuple; one part as it is
        return self.backend.name(self._name, (key,) if public is key else public)

    def check(self, shard: Shard, h: int, key: Any) -> None:
        """The first step of every call: what was forgotten elsewhere is not joined here.

        Raises:
            TypeError: The key can not leave the process.
        """
        name = self.name(key)
        for seat, turns in self._known(shard, h, name):
            if turns and not turns[-1].joinable():
                shard.pass_over(h, seat, forgotten=turns[-1].was_forgotten())

    def forget(self, shard: Shard, h: int, key: Any) -> None:
        """Forgets the key's execution in all processes. In this one it is forgotten already.

        Blocks until the backend has done it, for its own timeout at the most; on the thread of a
        running event loop it does not wait.
        """
        name = self.name(key)
        done = self.backend.forget(name)
        try:
            if done.done() or asyncio._get_running_loop() is None:
                done.result()
        except BackendError as error:
            self.complain("fallbacks", error)
        # Who came here meanwhile may follow what the backend has forgotten only now, or what ended
        # before it was found. Whoever comes to lead instead looks whether it was forgotten, and if
        # it has looked before, that is seen here.
        for seat, turns in self._known(shard, h, name):
            if _lead_of(turns) is None:
                shard.forget_seat(h, seat)
                lead = _lead_of(turns)
                if lead is not None:
                    self.backend.forget(name, lead)

    def _known(self, shard: Shard, h: int, name: bytes) -> list[tuple[Seat, list[Turn]]]:
        """The seats for a key that ask the backend, or have asked it, with their turns."""
        if not self._abroad:
            return []
        return [
            (seat, known[1])
            for seat in shard.holders(h)
            if (known := self._abroad.get(id(seat))) is not None and known[0] == name
        ]

    # -- one key ----------------------------------------------------------------------------------

    def lead(
        self, shard: Shard, h: int, seat: Seat, fn: Callable[[], R], deadline: float | None
    ) -> R:
        """Runs `fn`, or has the outcome of another process. On the leader's thread.

        Args:
            shard: Of the key.
            h: The hash of the key.
            seat: What the caller leads in its process.
            fn: The function.
            deadline: When a caller leaves that follows another process, by `time.monotonic`.

        Raises:
            Absent: Another process has found nothing.
            CallersOwn: The deadline has passed.
            Exception: What `fn` raised; `RemoteError` if it was raised in another process.
        """
        turn: Lead | Outcome | None = None
        asked: list[Turn] = []
        try:
            turn = wait(self._ask(seat, asked, here=True), deadline, seat)
            if isinstance(turn, Outcome):
                shard.share(h, seat)
                return _read(turn, seat)  # type: ignore[no-any-return]
            if turn is not None:
                self._lead(shard, h, seat, turn)
            before = token.set(None if turn is None else turn.token)
            try:
                value = fn()
            except Exception as error:
                if turn is not None:
                    wait(self._end(turn, Outcome(End.ERROR, error)))
                raise
            finally:
                token.reset(before)
            if turn is None or type(value) is CoroutineType:  # that is refused by who has called
                return value  # pyright: ignore[reportUnknownVariableType]
            if wait(self._end(turn, Outcome(End.VALUE, value), here=True)):
                shard.share(h, seat)
            return value
        finally:
            self._leave(seat, asked, turn)
            del seat, asked, turn

    async def lead_async(
        self, shard: Shard, h: int, seat: Seat, fn: Callable[[], Awaitable[R]]
    ) -> R:
        """`lead`, in the task of an execution.

        Raises:
            Absent: Another process has found nothing.
            CallersOwn: What `fn` returned can not be awaited.
            Exception: What the awaitable raised; `RemoteError` if that was in another process.
        """
        turn: Lead | Outcome | None = None
        asked: list[Turn] = []
        try:
            turn = await wait_async(self._ask(seat, asked, here=False))
            if isinstance(turn, Outcome):
                shard.share(h, seat)
                return _read(turn, seat)  # type: ignore[no-any-return]
            if turn is not None:
                self._lead(shard, h, seat, turn)
            token.set(None if turn is None else turn.token)
            try:
                awaitable = fn()
                if not inspect.isawaitable(awaitable):
                    raise CallersOwn(not_awaitable(awaitable))
                value = await awaitable
            except Exception as error:
                if turn is not None:
                    await wait_async(self._end(turn, Outcome(End.ERROR, error)))
                raise
            if turn is not None:
                followers = await wait_async(self._end(turn, Outcome(End.VALUE, value)))
                if followers:
                    shard.share(h, seat)
            return value
        finally:
            self._leave(seat, asked, turn)
            del seat, asked, turn

    def _ask(self, seat: Seat, asked: list[Turn], here: bool) -> "Steps[Lead | Outcome | None]":
        """Joins the key. None: the function is to run for this process alone.

        Args:
            seat: What the caller leads in its process.
            asked: Takes the turns.
            here: Whether the caller's thread may block.
        """
        name = self.name(seat[0])
        self._enter(seat, name, asked)
        reject = 0
        for _ in range(ATTEMPTS):
            (turn,) = self.backend.join([(name, reject)], here)
            asked.append(turn)
            yield [turn]
            if turn.cancelled():
                raise asyncio.CancelledError("the execution was abandoned")
            won = self._won(turn)
            if not isinstance(won, Sealed):
                return won
            reject = won.token  # it can not be read
        return None

    def _lead(self, shard: Shard, h: int, seat: Seat, lead: Lead) -> None:
        """This process leads for the key of `seat`, and it is about to run the function.

        If it was forgotten here while the backend was asked, then who comes now starts anew, and
        shall not find it at the backend: the function itself may come. By now another process may
        lead anew, which is not to be forgotten.

        If it was only passed over, for what it had followed, then nobody has forgotten what it
        leads now: it is joined again. Others of this process that wait are not, for they wait for
        this one, and its function would wait for itself.
        """
        record = shard.record(seat)
        if record is None or record.joinable:
            return
        name = self.name(seat[0])
        if shard.readmit(seat):
            for other, turns in self._known(shard, h, name):
                if other is not seat and _lead_of(turns) is None:
                    shard.pass_over(h, other, forgotten=False)
        elif record.end is None:
            self.backend.forget(name, lead)

    def _won(self, turn: Turn) -> Lead | Outcome | Sealed | None:
        """What has come of a turn. `Sealed`: it can not be read, and has to be asked for anew."""
        try:
            won = turn.result()
        except BackendError as error:
            self.complain("fallbacks", error)
            return None
        if isinstance(won, Lead):
            self._count("remote_leads")
            if won.inherited:
                self._count("takeovers")
            return won
        try:
            outcome = self.backend.open(won)
        except Exception as error:
            self.complain("misses", error)
            return won
        if outcome.end is End.LOST:
            self.complain("fallbacks", "the outcome of another process can not be handed over")
            return None
        self._count("remote_follows")
        return outcome

    def _end(self, lead: Lead, outcome: Outcome, here: bool = False) -> Steps[int]:
        """Publishes an outcome. Returns how many other processes have it.

        Raises:
            TypeError: The value can not leave the process as it is.
        """
        payload, refused = self._seal(outcome)
        done = self.backend.finish([(lead, payload)], here)
        yield done
        followers = self._ended(lead, done[0])
        if refused is not None:
            try:
                raise refused
            finally:
                del refused
        return followers

    def _seal(self, outcome: Outcome) -> tuple[bytes, Exception | None]:
        """Seals an outcome. Returns the error, too, if its value is refused."""
        try:
            return self._seal_or_keep(outcome), None
        except Exception as error:
            return self._seal_or_keep(Outcome(End.ERROR, error)), error

    def _seal_or_keep(self, outcome: Outcome) -> bytes:
        """Seals an outcome; of one that is too large, that it can not be handed over."""
        try:
            return self.backend.seal(outcome)
        except TooLargeError as error:
            self.complain("fallbacks", error)
            return self.backend.seal(Outcome(End.LOST))

    def _ended(self, lead: Lead, done: "Future[int]") -> int:
        lead.ended = True
        try:
            followers = done.result()
        except BackendError as error:
            self.complain("fallbacks", error)
            return 0
        if followers == FENCED:
            self._count("fenced")
            return 0
        return followers

    def asked_for(self, seat: Seat) -> list[Turn] | None:
        """The turns that the leader of `seat` has asked for."""
        known = self._abroad.get(id(seat))
        return None if known is None else known[1]

    def abandon(self, seat: Seat) -> None:
        """Nobody wants any more what the leader of `seat` asks for. It may go on, for other keys.

        At once: who comes next leads anew, and is not to be told that this one follows.
        """
        for turn in self.asked_for(seat) or ():
            turn.cancel()

    def lose(self, seat: Seat, asked: list[Turn]) -> None:
        """The leader of `seat` is lost, and does not know: its event loop was closed under it."""
        self._leave(seat, asked, None)
        for turn in asked:
            turn.leave()

    def _enter(self, seat: Seat, name: bytes, asked: list[Turn]) -> None:
        with self._lock:
            self._abroad[id(seat)] = (name, asked)

    def _leave(self, seat: Seat, asked: list[Turn], turn: Lead | Outcome | None) -> None:
        """A call is over here, whichever way; it had asked for these turns."""
        with self._lock:
            if self.asked_for(seat) is asked:
                del self._abroad[id(seat)]
        if isinstance(turn, Lead) and not turn.ended:
            turn.ended = True
            self.backend.give_up(turn)


def _lead_of(turns: Sequence[Turn]) -> Lead | None:
    return turns[-1].lead() if turns else None


def _read(outcome: Outcome, seat: Seat) -> Any:
    if outcome.end is End.VALUE:
        return outcome.value
    error = outcome.value if outcome.end is End.ERROR else Absent(KeyError(public_key(seat[0])))
    try:
        raise error
    finally:
        del error, outcome  # the traceback holds this frame


# -- waiting --------------------------------------------------------------------------------------


def wait(steps: Steps[R], deadline: float | None = None, seat: Seat | None = None) -> R:
    """Goes through `steps` on this thread.

    Args:
        steps: What is to be done.
        deadline: When the caller leaves if another process leads, by `time.monotonic`.
        seat: What its caller leads in this process.

    Raises:
        CallersOwn: The deadline has passed before a turn was done.
    """
    futures: Sequence[Future[Any]] = ()
    try:
        while True:
            futures = next(steps)
            if len(futures) == 1:
                try:
                    futures[0].exception(_until(deadline))
                except TimeoutError:
                    if not futures[0].done():
                        key = None if seat is None else public_key(seat[0])
                        raise CallersOwn(
                            FlightTimeout(f"waited in vain for {key!r}, which another process runs")
                        ) from None
            else:
                concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_COMPLETED)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    except BaseException:
        _desert(futures)
        raise
    finally:
        del futures, seat


def _until(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    return min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)


async def wait_async(steps: Steps[R]) -> R:
    """Goes through `steps` in this coroutine."""
    futures: Sequence[Future[Any]] = ()
    try:
        loop = asyncio.get_running_loop()
        bells = _bells(loop)
        while True:
            futures = next(steps)
            if any(future.done() for future in futures):
                continue
            bell: asyncio.Future[None] = loop.create_future()
            for future in futures:
                future.add_done_callback(partial(bells.ring, bell))
            await bell
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    except BaseException:
        _desert(futures)
        raise
    finally:
        del futures


class _Bells:
    """Futures of one event loop that other threads set: those set at once wake the loop once."""

    __slots__ = ("_called", "_ringing", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._ringing: deque[asyncio.Future[None]] = deque()
        #: The loop will look into `_ringing`. Set after something was put in, cleared before it
        #: looks.
        self._called = False

    def ring(self, bell: "asyncio.Future[None]", _: object = None) -> None:
        """Sets `bell`. On any thread."""
        self._ringing.append(bell)
        if not self._called:
            self._called = True
            try:
                self.loop.call_soon_threadsafe(self._ring)
            except RuntimeError:  # the loop is closed: nothing here may keep what had waited
                self._ringing.clear()

    def _ring(self) -> None:
        self._called = False
        while self._ringing:
            bell = self._ringing.popleft()
            if not bell.done():
                bell.set_result(None)


class _Here(threading.local):
    """Of the event loop that runs on this thread."""

    bells: _Bells | None = None


_here = _Here()


def _bells(loop: asyncio.AbstractEventLoop) -> _Bells:
    bells = _here.bells
    if bells is None or bells.loop is not loop:
        bells = _here.bells = _Bells(loop)
    return bells


def _desert(futures: Iterable["Future[Any]"]) -> None:
    """Nobody waits for them any more."""
    for future in futures:
        if isinstance(future, Turn):
            future.leave()


# -- many keys ------------------------------------------------------------------------------------


class Member(Protocol):
    """One key of a call for many."""

    h: int
    shard: Shard
    key: Any
    seat: Seat | None


class Party:
    """What one run for many keys does at the backend. Used by one caller.

    Args:
        tier: Of the flight.
        members: The keys that the caller leads in its process.
        here: Whether the caller's thread may block.
    """

    def __init__(self, tier: Tier, members: Sequence[Any], here: bool) -> None:
        self._tier = tier
        self._here = here
        self._members = members
        #: The keys that are not decided, with their turns.
        self._turns: dict[Any, Turn] = {}
        #: All turns of each.
        self._asked: dict[Any, list[Turn]] = {member: [] for member in members}
        #: What this process leads.
        self._leads: dict[Any, Lead] = {}

    def _join(self, members: Sequence[Any], rejected: Sequence[int]) -> None:
        tier = self._tier
        names = [tier.name(member.key) for member in members]
        for member, name in zip(members, names, strict=True):
            tier._enter(member.seat, name, self._asked[member])
        turns = tier.backend.join(list(zip(names, rejected, strict=True)), self._here)
        for member, turn in zip(members, turns, strict=True):
            self._turns[member] = turn
            self._asked[member].append(turn)
            record = member.shard.record(member.seat)
            if record is not None and record.end is End.ABANDONED:  # before it was asked for
                turn.cancel()

    def next(self, settle: Callable[[Any, Outcome], None]) -> Steps[list[Any]]:
        """Waits for the next keys for which the function is to run here; none: all are decided.

        Args:
            settle: Takes a key, and the outcome that another process has found for it; or
                `End.LOST`, if nobody wants it any more.
        """
        tier = self._tier
        if self._members:
            members, self._members = self._members, ()
            self._join(members, [0] * len(members))
            asked = self._turns[members[0]].asked
            if asked is not None:
                yield [asked]
        mine: list[Any] = []
        while self._turns and not mine:
            ready = [member for member, turn in self._turns.items() if turn.done()]
            if not ready:
                yield list(self._turns.values())
                continue
            for member in ready:
                turn = self._turns.pop(member)
                if turn.cancelled():  # abandoned
                    settle(member, Outcome(End.LOST))
                    continue
                won = tier._won(turn)
                if isinstance(won, Sealed) and len(self._asked[member]) < ATTEMPTS:
                    self._join([member], [won.token])
                elif isinstance(won, Outcome):
                    member.shard.share(member.h, member.seat)
                    settle(member, won)
                else:
                    mine.append(member)
                    if isinstance(won, Lead):
                        self._leads[member] = won
                        tier._lead(member.shard, member.h, member.seat, won)
        return mine

    def finish(self, outcomes: dict[Any, Outcome]) -> Steps[dict[Any, Exception]]:
        """Publishes the outcomes of keys that the function ran for.

        Returns:
            The keys whose values can not leave the process, with the errors that say why.
        """
        tier = self._tier
        refused: dict[Any, Exception] = {}
        ends: list[tuple[Lead, bytes]] = []
        led = [member for member in outcomes if member in self._leads]
        for member in led:
            payload, error = tier._seal(outcomes[member])
            ends.append((self._leads[member], payload))
            if error is not None:
                refused[member] = error
        if ends:
            done = tier.backend.finish(ends, self._here)
            for member, future in zip(led, done, strict=True):
                yield [future]
                if tier._ended(self._leads.pop(member), future):
                    member.shard.share(member.h, member.seat)
        return refused

    def leave(self, members: Iterable[Any]) -> None:
        """The run is over, whichever way: what it leads still is handed over."""
        for turn in self._turns.values():
            turn.leave()
        self._turns.clear()
        for member in members:
            self._tier._leave(member.seat, self._asked[member], self._leads.pop(member, None))
