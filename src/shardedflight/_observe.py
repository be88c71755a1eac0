"""What a flight tells those who watch it: `Observer`, its events, and who tells them.

An execution is told from its beginning to its end to those who were observers when its caller
came. So each carries them: its seat is a `WatchedSeat`, made only while somebody watches, and a
plain tuple otherwise. Nothing is looked up and nothing has to be cleared away, and a flight that
nobody watches only asks, here and there, whether somebody does.

Observers run outside of every lock, on the thread where it happens:

- `execution_started` right before the function, `execution_ended` right after it, before anybody
  is woken: who has an outcome finds its execution told. Both run where the function runs: on its
  thread, and in its task's context; not so an end that comes from outside (an event loop closed
  under it, a coroutine dropped), which is told on another thread.
- `follower_joined` before the follower sleeps, `follower_left` before it returns.

The form, Protocols that take one frozen dataclass, is that of stamina's instrumentation hooks
(https://github.com/hynek/stamina).
"""

import contextlib
import enum
import logging
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ._core import End, Execution, Seat, Shard, public_key

if TYPE_CHECKING:
    from ._flight import ShardedFlight

__all__ = [
    "Departure",
    "Ended",
    "Joined",
    "Left",
    "ObservedExecution",
    "Observer",
    "Started",
    "Subscription",
    "WatchedSeat",
    "check_observer",
    "departure_from",
]

_log = logging.getLogger("shardedflight")


# -- what observers are told ----------------------------------------------------------------------


class Departure(enum.Enum):
    """The ways in which a follower can leave an execution."""

    SERVED = "served"  # with the value
    FAILED = "failed"  # with the execution's error, or a KeyError for a key that is missing
    TIMED_OUT = "timed out"  # with FlightTimeout
    CANCELLED = "cancelled"  # cancelled, interrupted, or refused with DeadlockError
    TOOK_OVER = "took over"  # it leads the execution from now on


class ObservedExecution:
    """Which execution an event is about: one object for its leader and all its followers.

    It is the same one when a leader is lost and a follower takes over. Compared and hashed by
    identity; can be referenced weakly.
    """

    __slots__ = ("__weakref__", "_key", "_subscriptions", "flight")

    def __init__(
        self, flight: "ShardedFlight", key: Any, subscriptions: "tuple[Subscription, ...]"
    ) -> None:
        #: The flight that it belongs to.
        self.flight = flight
        self._key = key
        self._subscriptions = subscriptions

    @property
    def key(self) -> Any:
        """What makes two calls the same call: one part, or the tuple of several."""
        return public_key(self._key)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.key!r}>"


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Started:
    """A leader's function is about to run.

    Attributes:
        execution: Of what.
        promoted: The leader was a follower, and has taken over from one that was lost.
        batch: All executions that this run of the function is for: several in `do_many`. Their
            starts are told in this order.
        time: When, in seconds by `time.monotonic`.
    """

    execution: ObservedExecution
    promoted: bool
    batch: tuple[ObservedExecution, ...]
    time: float


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Ended:
    """A leader's function has run.

    Attributes:
        started: The event of its start: the same object.
        end: How.
        error: What the function raised, if `end` is `End.ERROR`. It must not be kept: its
            traceback keeps the frames of those who raised it.
        time: When, in seconds by `time.monotonic`.
    """

    started: Started
    end: End
    error: Exception | None
    time: float

    @property
    def execution(self) -> ObservedExecution:
        """Of what."""
        return self.started.execution

    @property
    def seconds(self) -> float:
        """How long the function ran."""
        return self.time - self.started.time


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Joined:
    """A follower waits from now on.

    Attributes:
        execution: For what.
        time: When, in seconds by `time.monotonic`.
    """

    execution: ObservedExecution
    time: float


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Left:
    """A follower waits no more.

    Attributes:
        joined: The event of its coming: the same object.
        departure: How it leaves.
        time: When, in seconds by `time.monotonic`.
    """

    joined: Joined
    departure: Departure
    time: float

    @property
    def execution(self) -> ObservedExecution:
        """What it has waited for."""
        return self.joined.execution

    @property
    def seconds(self) -> float:
        """How long it has waited."""
        return self.time - self.joined.time


class Observer(Protocol):
    """Who is told what happens in a flight: see `ShardedFlight.add_observer`.

    A class derived from this one needs only those methods that it wants. They are called on
    whatever thread it happens, several at once, and hold it up as long as they take. An Exception
    that one raises is logged (the first of each observer) and counted, and reaches no caller.
    """

    # To type checkers a Protocol's method without a statement is abstract, hence the `return`.

    def execution_started(self, event: Started, /) -> None:
        """A leader's function is about to run, here."""
        return

    def execution_ended(self, event: Ended, /) -> None:
        """A leader's function has run; those who wait for it will be told next."""
        return

    def follower_joined(self, event: Joined, /) -> None:
        """A follower is about to wait."""
        return

    def follower_left(self, event: Left, /) -> None:
        """A follower has its outcome, takes over, or goes without one."""
        return


def check_observer(observer: object) -> None:
    """Raises TypeError unless `observer` has all methods of `Observer`."""
    for name in ("execution_started", "execution_ended", "follower_joined", "follower_left"):
        if isinstance(observer, type) or not callable(getattr(observer, name, None)):
            raise TypeError(f"an observer must have the methods of Observer: {observer!r}: {name}")


# -- telling them ---------------------------------------------------------------------------------

E = TypeVar("E", Started, Ended, Joined, Left)


class Subscription:
    """One observer of one flight."""

    __slots__ = (
        "_unlogged",
        "execution_ended",
        "execution_started",
        "follower_joined",
        "follower_left",
        "observer",
    )

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.execution_started = observer.execution_started
        self.execution_ended = observer.execution_ended
        self.follower_joined = observer.follower_joined
        self.follower_left = observer.follower_left
        #: Empty once an error of the observer's has been logged.
        self._unlogged = [True]

    def tell(self, method: Callable[[E], None], event: E) -> None:
        """Calls one of the observer's methods."""
        try:
            method(event)
        except Exception:
            event.execution.flight._count_observer_error()
            with contextlib.suppress(Exception):  # another thread was faster; or a log handler's
                self._unlogged.pop()
                _log.exception(
                    "An observer has raised an error; its further ones are only counted: %r",
                    self.observer,
                )


class WatchedSeat(tuple[Any, ...]):  # noqa: SLOT001 - a tuple can have no slots
    """A seat whose execution somebody watches: see `Seat`."""

    execution: ObservedExecution
    #: The run that its leader has begun. Written by the leader before its function runs.
    run: "_Run | None"
    #: The followers whose coming was told. Whoever takes one out tells that it leaves.
    followers: dict[Any, Joined]
    #: A follower has taken over, written before it begins.
    promoted: bool

    @classmethod
    def make(
        cls, flight: "ShardedFlight", subscriptions: tuple[Subscription, ...], seat: Seat
    ) -> "WatchedSeat":
        """The seat `seat`, watched."""
        watched = cls(seat)
        watched.execution = ObservedExecution(flight, seat[0], subscriptions)
        watched.run = None
        watched.followers = {}
        watched.promoted = False
        return watched

    def start(self, leader: Any, batch: tuple[ObservedExecution, ...] = ()) -> None:
        """Tells that the function of `leader` is about to run."""
        started = Started(self.execution, self.promoted, batch or (self.execution,), monotonic())
        self.run = _Run(leader, started)
        for subscription in self.execution._subscriptions:
            subscription.tell(subscription.execution_started, started)

    def end(self, shard: Shard, leader: Any, end: End, value: Any) -> None:
        """Tells that the function of `leader` has run; once, and only if its start was told."""
        run = self.run
        if run is None or run.leader != leader or not run.is_first_to_end():
            return
        record = shard.record(self)
        if record is not None and record.end is End.ABANDONED:
            end = End.ABANDONED
        error = value if end is End.ERROR else None
        ended = Ended(run.started, end, error, monotonic())
        try:
            for subscription in self.execution._subscriptions:
                subscription.tell(subscription.execution_ended, ended)
        finally:
            del value, error, ended  # a traceback that holds this frame may be the error's own

    def join(self, waiter: Any) -> None:
        """Tells that `waiter` waits from now on."""
        joined = Joined(self.execution, monotonic())
        try:
            for subscription in self.execution._subscriptions:
                subscription.tell(subscription.follower_joined, joined)
        finally:
            self.followers[waiter] = joined

    def leave(self, waiter: Any, departure: Departure) -> None:
        """Tells that `waiter` waits no more; once, and only if its coming was told."""
        if departure is Departure.TOOK_OVER:
            self.promoted = True
        joined = self.followers.pop(waiter, None)
        if joined is None:
            return
        left = Left(joined, departure, monotonic())
        for subscription in self.execution._subscriptions:
            subscription.tell(subscription.follower_left, left)


class _Run:
    """One run of a leader's function."""

    __slots__ = ("_open", "leader", "started")

    def __init__(self, leader: Any, started: Started) -> None:
        self.leader = leader
        self.started = started
        self._open = [True]

    def is_first_to_end(self) -> bool:
        """True once, whichever thread asks first."""
        try:
            return self._open.pop()
        except IndexError:
            return False


def departure_from(record: Execution, promoted: bool = False) -> Departure:
    """How a follower leaves that was woken: it leads by now, or there is an outcome."""
    if promoted:
        return Departure.TOOK_OVER
    return Departure.SERVED if record.end is End.VALUE else Departure.FAILED
