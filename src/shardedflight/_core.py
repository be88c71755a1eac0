"""Who leads, who follows, and who is settled, handed over, forgotten or abandoned.

Nothing here sleeps, wakes, or knows an event loop. State is decided here, in short steps, and each
step returns what is to be done about it; waking and user code happen in the modules above, outside
of every lock.

**Seats and records.** A caller that leads takes a *seat*, the tuple of its key and of who runs the
function. One that nobody meets needs no more than that. The first who meets it, to follow or to
forget, makes its *record*, an `Execution`: who waits, who leads by now, and at last the outcome.
The seat stays the execution's identity all along. It ends in one of the ways of `End`. When its
leader is lost and somebody still waits, it does not end: one waiter becomes the leader, the others
go on waiting for the same record.

**The table and the uncontended path.** A shard's table maps the *hash* of a key (an int) to the
seat that holds this place. A call that meets nobody does two operations on it and takes no lock:

- `setdefault(h, seat)` links it, or finds who is there,
- `del table[h]` unlinks it. Only the execution's own end removes its seat, so a late end can not
  remove a successor. To forget an execution is to mark it unjoinable; it keeps its place until it
  ends.

With ints as the table's keys, no `__eq__` or `__hash__` of a user's runs inside these operations.
Each is atomic, and operations on one table are ordered among all threads, by the GIL or by a lock
of the table's own (for a dict, the "Thread safety guarantees" of CPython's documentation). All else
is decided under `Shard.lock`.

**Meeting** races with that lock-free end. Who meets a leader writes the record into `Shard.met`
first and then looks into the table again; the leader unlinks first and looks into `met` then.
Whichever of the two operations on the table comes second sees what the other side wrote before its
own: either the newcomer finds the seat still linked, and the leader will find the record, or it
finds it gone, and takes the record back (Dekker's argument, with the table as fence). From then on
the record is changed under the lock alone.

**Two keys with one hash**, or a key whose last execution was forgotten and still runs: the place is
taken, so the newcomer goes to `overflow`, a dict that is read and changed under the lock. It is put
there before `setdefault` is tried once more. So whoever later finds the place free, links itself
and then looks into `overflow`, sees it there. Keys are compared (user code) with no lock held, on a
snapshot that is checked again under the lock.

**Compiled**, the table is not a dict but a line of memory for each shard, see `_core.pxd`; all else
is the same code. `COMPILED` tells the two apart.

The shape of it, one record per running key, is that of Go's `singleflight.go`
(https://pkg.go.dev/golang.org/x/sync/singleflight); sharding by a masked hash is ShardedFlight's.
"""
# What is used behind `if COMPILED` is set behind it; and the functions of C have no types here.
# mypy: disable-error-code="possibly-undefined, no-any-return"
# pyright: reportPossiblyUnboundVariable=false, reportOptionalSubscript=false
# pyright: reportArgumentType=false, reportUnknownArgumentType=false

import enum
import itertools
import sys
import weakref
from _thread import RLock, start_new_thread
from collections.abc import Callable, Hashable, Iterator
from inspect import CO_COROUTINE
from types import CoroutineType, TracebackType
from typing import Any, Literal, NoReturn, TypeVar, cast

from . import _uncompiled as cython
from ._lock import SteadyLock
from ._replica import Failure, traceback_of

if False:  # Cython reads this all the same, and compiles its own names instead of the stand-in's.
    import cython  # type: ignore[import-untyped, no-redef]

if not cython.compiled:  # otherwise _core.pxd has these names, as C
    from ._uncompiled import (
        COMPILED,
        FULL,
        TAKEN,
        blocks_in,
        borrow,
        call,
        check_self,
        defer,
        get_ident,
        hash_of,
        hash_of_call,
        index_of,
        is_line,
        line_at,
        line_claim,
        line_claim_more,
        line_count,
        line_get,
        line_in,
        line_leave,
        line_link,
        line_mark,
        line_pass,
        line_release,
        line_seat,
        line_seats,
        line_taken,
        line_unlink,
        lines_idle,
        lines_orphan,
        lines_running,
        lines_started,
        make_lines,
        mixed,
        next_serial,
        nothing,
        peek,
        slots_of,
        stride_of,
        take,
    )

__all__ = ["Core", "End", "Execution", "Run", "Shard", "check_timeout", "compiled", "public_key"]

T = TypeVar("T")

OnAbandon = Literal["cancel", "finish"]

#: The key of a call and who runs its function: the ident of a thread, or a `Run`. Compiled, also
#: which of its thread's leads it is. Seats are told apart by identity; to compare or to hash one
#: would run the key's own code.
Seat = tuple[Any, ...]

#: Whether this is the compiled form, for other modules: COMPILED is a constant of C's.
compiled = cython.compiled

#: A key that no table has: a hash is never so wide.
_FENCE = 1 << 100


class End(enum.Enum):
    """The ways in which a leader's run can end."""

    VALUE = "value"
    ERROR = "error"  # the function raised an Exception: everybody's outcome
    MISSING = "missing"  # a function for many keys found nothing for this one: a KeyError for all
    LOST = "lost"  # anything else: the leader's alone, a waiter takes over
    ABANDONED = "abandoned"  # the last caller had left


class Run:
    """A leader that does not run on its caller's own stack, so that the caller can leave it."""

    __slots__ = ()

    def stoppable(self) -> bool:
        """Whether it can be stopped: a function that runs on a thread can not."""
        raise NotImplementedError

    def abandon(self, execution: "Execution") -> None:
        """Nobody wants `execution` any more, and nobody can join it: stop if that is possible."""
        raise NotImplementedError


class Execution:
    """The record of one execution, made by the first who meets its leader.

    All fields but the first are changed under the shard's lock; `waiters`, once it has ended, by
    who wakes them.
    """

    __slots__ = (
        "abroad",
        "announced",
        "attended",
        "end",
        "failure",
        "inherited",
        "joinable",
        "leader",
        "linked",
        "passed_over",
        "predecessor",
        "seat",
        "serial",
        "shared",
        "value",
        "waiters",
    )

    def __init__(self, seat: Seat) -> None:
        #: Which execution it is. Never changes.
        self.seat = seat
        #: Who runs the function: as in the seat, or the waiter that takes over. None after the
        #: end. It is the fence: an end is accepted from the leader alone, so the late end of a
        #: former leader does nothing.
        self.leader = seat[1]
        #: It was found linked when its record could be seen: its end will look for the record.
        self.linked = False
        #: Who waits, in order of arrival; and the loop of one that is a plain `asyncio.Future`.
        self.waiters: dict[Any, Any] = {}
        #: False once forgotten, abandoned or ended; and while it is passed over.
        self.joinable = True
        #: It is not joinable, but would be if its leader did not wait for another process, or
        #: waited for another one: see `Shard.pass_over`.
        self.passed_over = False
        #: The leader's own caller still wants the outcome.
        self.attended = True
        #: The outcome goes to other processes, or comes from one.
        self.abroad = False
        #: The leader was lost and its heir has not begun; and who that leader was.
        self.inherited = False
        self.predecessor: Any = None
        #: The heir has been told, or is being told.
        self.announced = False
        #: Compiled, the place of the lead among those of its thread.
        self.serial: int = seat[2] if len(seat) > 2 else 0
        #: How it ended; None while it runs. From then on nobody joins or leaves; who wakes the
        #: waiters drops them.
        self.end: End | None = None
        #: The outcome, written with the end; followers read it after they have been woken.
        self.value: Any = None
        self.failure: Failure | None = None
        self.shared = False

    @property
    def key(self) -> Any:
        """What makes two calls the same call, as its user knows it."""
        return public_key(self.seat[0])

    def outcome(self) -> tuple[Any, bool]:
        """A follower's outcome, once woken.

        Returns:
            `(value, shared)`.

        Raises:
            Exception: A replica of the leader's error.
        """
        if self.end is End.VALUE:
            return self.value, self.shared
        error = self.error()
        try:
            raise error
        finally:
            del error  # or this frame and the error would keep each other alive

    def error(self) -> BaseException:
        """A follower's own exception, if the end was not a value."""
        if self.end is End.MISSING:
            return KeyError(self.key)
        return cast("Failure", self.failure).replica()


def make_lock() -> Any:
    """A lock for this module. Only plain Python is interrupted by signal handlers in between."""
    if COMPILED:
        return RLock()
    return SteadyLock()


class Shard:
    """One of the independent tables, with all that is decided under its lock."""

    __slots__ = (
        "_line",
        "_memory",
        "_started_reads",
        "abandoned",
        "any_beside",
        "any_met",
        "deadlocks",
        "errors",
        "forgotten",
        "lock",
        "met",
        "overflow",
        "overflow_changes",
        "promotions",
        "shared",
        "started",
        "table",
        "timeouts",
    )

    def __init__(self, memory: object, index: int) -> None:
        self.lock = make_lock()
        #: The records, by the id of the seat that each of them keeps alive. Read without the lock.
        self.met: dict[int, Execution] = {}
        self.overflow: dict[int, list[Seat]] = {}
        #: How often `overflow` has changed.
        self.overflow_changes = 0
        self.shared = self.errors = self.promotions = self.timeouts = 0
        self.abandoned = self.forgotten = self.deadlocks = 0
        if COMPILED:
            self._memory = memory
            self._line = line_at(memory, index)
        else:
            self.table: dict[int, Seat] = {}
            #: Whether `met` and `overflow` have anything: see `_mark`.
            self.any_met = self.any_beside = False
            #: Counts executions: `next` is atomic, where `+= 1` on an attribute would lose some.
            self.started = itertools.count()
            self._started_reads = 0

    # -- the table: the only part that differs when compiled --------------------------------------

    def get(self, h: int) -> Seat | None:
        """The seat that holds the place `h`."""
        if COMPILED:
            return line_get(self._line, h)
        return self.table.get(h)

    def link(self, h: int, seat: Seat) -> Seat:
        """Links `seat` if the place is free. Returns the seat that holds it then."""
        if COMPILED:
            return line_link(self._line, h, seat)
        return self.table.setdefault(h, seat)

    def unlink(self, h: int, seat: Seat) -> bool:
        """Unlinks `seat`; False if it does not hold the place."""
        if COMPILED:
            return line_unlink(self._line, h, seat)
        if self.table.get(h) is not seat:
            return False
        del self.table[h]
        return True

    def seats(self) -> list[tuple[int, Seat]]:
        """All seats in the table, with the hashes of their keys."""
        if COMPILED:
            return line_seats(self._line)
        # A copy is made in one step. A list of pairs is not: each pair may start the collector.
        return list(self.table.copy().items())

    def count(self) -> None:
        """One more execution has started."""
        if COMPILED:
            line_count(self._line)
        else:
            next(self.started)

    def count_started(self) -> int:
        """How many executions were ever started here, by leaders and by those who took over."""
        with self.lock:
            # A count can only be read by counting: take the readings off.
            number = next(self.started)
            self._started_reads += 1
            return number + 1 - self._started_reads + self.promotions

    def totals(self) -> tuple[int, int, int, int, int, int, int]:
        """Shared, errors, promotions, timeouts, abandoned, forgotten, deadlocks.

        Under the lock, to read: free-threaded, a number that another thread made may be read under
        the object's own lock, which a child that is forked then would find held for good.
        """
        with self.lock:
            return (
                self.shared,
                self.errors,
                self.promotions,
                self.timeouts,
                self.abandoned,
                self.forgotten,
                self.deadlocks,
            )

    def count_error(self) -> None:
        """An execution that nobody has met has ended with an exception."""
        with self.lock:
            self.errors += 1

    def count_timeout(self) -> None:
        """A follower has left after its timeout."""
        with self.lock:
            self.timeouts += 1

    def count_deadlock(self) -> None:
        """A wait was refused, since it would never end."""
        with self.lock:
            self.deadlocks += 1

    def _mark(self) -> None:
        """Shows to the leaders' path whether `met` and `overflow` have anything. Under the lock."""
        if COMPILED:
            line_mark(self._line, bool(self.met), bool(self.overflow))
        else:
            self.any_met = bool(self.met)
            self.any_beside = bool(self.overflow)

    def _fence(self) -> None:
        """Orders what was written before it against all operations on the table."""
        # Compiled, every operation takes the line's lock; a dict's `get` alone does not.
        if not COMPILED:
            self.table.pop(_FENCE, None)

    # -- what others ask --------------------------------------------------------------------------

    def claim(self, h: int, seat: Seat) -> bool:
        """The leader's first step: links `seat` if that is all there is to do, and counts it."""
        if self.link(h, seat) is not seat or (self.overflow and h in self.overflow):
            return False
        self.count()
        return True

    def release(self, h: int, seat: Seat) -> bool:
        """The leader's last step: unlinks `seat`. False if it must be settled as well."""
        return self.unlink(h, seat) and not (self.met and id(seat) in self.met)

    def taken(self, h: int) -> bool:
        """Whether anybody leads for a key with this hash; for a start."""
        if COMPILED:
            return line_taken(self._line, h)
        return h in self.table or bool(self.overflow)

    def record(self, seat: Seat) -> Execution | None:
        """The record of an execution that somebody has met, until it ends."""
        return peek(self.met, id(seat))

    def leader(self, seat: Seat) -> Any:
        """Who leads by now."""
        record = peek(self.met, id(seat))
        return seat[1] if record is None else record.leader

    def serial(self, seat: Seat) -> int:
        """Compiled: the place of the lead among those of its thread."""
        record = peek(self.met, id(seat))
        if record is not None:
            return record.serial
        return seat[2] if len(seat) > 2 else 0

    def holders(self, h: int) -> list[Seat]:
        """All seats with this hash, those in overflow first."""
        head = self.get(h)
        found = [] if head is None else [head]
        if self.overflow:
            found[:0] = peek(self.overflow, h) or ()
        return found

    def executions(self) -> list[tuple[int, Seat]]:
        """Those that run now, with the hashes of their keys."""
        found = self.seats()
        for h, group in self.overflow.copy().items():
            found += [(h, seat) for seat in group]
        return found

    def waiting(self) -> int:
        """How many followers wait now. Counted when asked: nobody has to keep a count right."""
        return sum(len(record.waiters) for record in list(self.met.values()) if record.end is None)

    def orphan(self) -> None:
        """After a fork, in the child: the threads that knew this shard are gone.

        The one that called fork may be inside a leader's function, and will end its execution
        here. It shall find a lock that nobody holds, and nobody to wake.
        """
        self.lock = make_lock()
        # Not looked into: free-threaded, a thread that is gone may hold a dict's own lock.
        self.met = {}
        self.overflow = {}

    # -- joining ----------------------------------------------------------------------------------

    def join(self, h: int, seat: Seat, waiter: Any, loop: Any) -> Execution | None:
        """Makes `waiter` a follower for the key of `seat`, or else makes `seat` lead.

        Args:
            h: The hash of the key.
            seat: A new one. It may be linked already.
            waiter: Who is to be woken.
            loop: Its event loop, if it is a plain `asyncio.Future`.

        Returns:
            What `waiter` has joined. None: `seat` leads.

        Raises:
            Exception: What `__eq__` of a key raised; the caller ends `seat`.
        """
        while not self._lead(h, seat):
            joined = self.follow(h, seat[0], waiter, loop)
            if joined is not None:
                return joined
        return None

    def follow(self, h: int, key: Any, waiter: Any, loop: Any) -> Execution | None:
        """Makes `waiter` a follower of the joinable execution for `key`.

        Returns:
            The execution, or None if there is none.
        """
        if late:
            settle_late()
        while True:
            seat = self._match(h, key, self.get(h), None)
            if seat is None:
                return None
            with self.lock:
                record = self._meet(h, seat)
                if record is not None and record.joinable:
                    record.waiters[waiter] = loop
                    return record

    def _meet(self, h: int, seat: Seat) -> Execution | None:
        """The record of `seat`, made now if need be; None if it has ended. Under the lock."""
        number = id(seat)
        record = self.met.get(number)
        if record is not None and record.linked:
            return record
        # One that is not linked is being met further out on this stack, which a signal handler or a
        # destructor has interrupted.
        record = record or Execution(seat)
        self.met[number] = record
        try:
            self._mark()
            self._fence()
            if self.get(h) is seat:
                record.linked = True
        finally:
            if not record.linked:
                self.met.pop(number, None)
        if not record.linked:
            self._mark()
            return None
        return record

    def _lead(self, h: int, seat: Seat) -> bool:
        """Links `seat`; False, with `seat` not linked, if another one may be joinable."""
        changes = self.overflow_changes
        head = self.link(h, seat)
        match = self._match(h, seat[0], head, seat)
        if match is not None and head is not seat:
            return False
        with self.lock:
            if head is seat:
                # Those who have met it in the meantime may follow: it has to lead. If there is a
                # match beside it, then it was forgotten since.
                if id(seat) not in self.met and (
                    match is not None or changes != self.overflow_changes
                ):
                    self.unlink(h, seat)
                    return False
            elif changes != self.overflow_changes or not self._link_beside(h, seat, head):
                return False
            self.count()
            return True

    def _match(self, h: int, key: Any, head: Seat | None, mine: Seat | None) -> Seat | None:
        """The joinable execution for `key` among those that hold its hash. Runs user code."""
        if self.overflow:
            for seat in peek(self.overflow, h) or ():
                if seat is not mine and self._matches(seat, key):
                    return seat
        if head is None or head is mine or not self._matches(head, key):
            return None
        return head

    def _matches(self, seat: Seat, key: Any) -> bool:
        record = peek(self.met, id(seat))
        if record is not None and not record.joinable:
            return False
        return seat[0] is key or bool(seat[0] == key)

    def _link_beside(self, h: int, seat: Seat, head: Seat) -> bool:
        """Links `seat` in overflow as long as `head` has its place. Under the lock.

        Returns:
            False, with `seat` not linked, if the place has another holder: it may be of this key.
        """
        self.met[id(seat)] = record = Execution(seat)
        record.linked = True  # in overflow, where it is from its record's first moment on
        self._change_overflow(h, [*self.overflow.get(h, ()), seat])
        holder = self.link(h, seat)
        if holder is head:
            return True
        self._remove_from_overflow(h, seat)
        del self.met[id(seat)]
        self._mark()
        return holder is seat

    def _remove_from_overflow(self, h: int, seat: Seat) -> None:
        if h in self.overflow:
            self._change_overflow(h, [other for other in self.overflow[h] if other is not seat])

    def _change_overflow(self, h: int, group: list[Seat]) -> None:
        # Others iterate over a group without the lock: it is replaced, not changed.
        if group:
            self.overflow[h] = group
        else:
            del self.overflow[h]
        self.overflow_changes += 1
        self._mark()

    # -- leaving ----------------------------------------------------------------------------------

    def leave(self, record: Execution, waiter: Any, cancel: bool) -> tuple[bool, Run | None]:
        """A follower goes.

        Args:
            record: What it had joined.
            waiter: The follower.
            cancel: Whether an execution that nobody wants any more is to be abandoned.

        Returns:
            Whether it has left: False if it has been woken, or is about to be. And the run that
            nobody wants any more, to be abandoned by the caller.
        """
        with self.lock:
            if record.end is not None or waiter not in record.waiters:
                return False, None
            del record.waiters[waiter]
            return True, self._deserted(record) if cancel else None

    def leave_leader(self, h: int, seat: Seat, leader: Run, cancel: bool) -> Execution | None:
        """The own caller of a leader goes.

        Returns:
            What nobody wants any more, if so: its leader is to abandon it.
        """
        with self.lock:
            record = self._meet(h, seat)
            if record is None or record.leader is not leader:
                return None
            record.attended = False
            return record if cancel and self._deserted(record) is not None else None

    def _deserted(self, record: Execution) -> Run | None:
        if record.waiters or record.attended or record.end is not None:
            return None
        leader = record.leader
        if not isinstance(leader, Run) or not leader.stoppable():
            return None
        record.joinable = False
        record.end = End.ABANDONED
        self.abandoned += 1
        return leader

    def forget(self, h: int, key: Hashable) -> None:
        """Makes the key's execution, if there is one, unjoinable."""
        seat = self._match(h, key, self.get(h), None)
        if seat is not None:
            self.forget_seat(h, seat)

    def forget_seat(self, h: int, seat: Seat) -> None:
        """Makes this execution unjoinable, if it runs and is not so already."""
        with self.lock:
            record = self._meet(h, seat)
            if record is None:
                return
            record.passed_over = False
            if record.joinable:
                record.joinable = False
                self.forgotten += 1

    def pass_over(self, h: int, seat: Seat, forgotten: bool) -> None:
        """Makes this execution unjoinable until its leader leads in all processes.

        Args:
            h: The hash of its key.
            seat: What its leader leads in this process.
            forgotten: Whether what it waits for was forgotten, which is counted.
        """
        with self.lock:
            record = self._meet(h, seat)
            if record is not None and record.joinable:
                record.joinable = False
                record.passed_over = True
                if forgotten:
                    self.forgotten += 1

    def readmit(self, seat: Seat) -> bool:
        """Makes an execution joinable that was passed over. False if it was not, or has ended."""
        with self.lock:
            record = self.met.get(id(seat))
            if record is None or not record.passed_over or record.end is not None:
                return False
            record.passed_over = False
            record.joinable = True
            return True

    # -- ending -----------------------------------------------------------------------------------

    def share(self, h: int, seat: Seat) -> None:
        """The outcome of an execution is shared with other processes. By its leader."""
        with self.lock:
            record = self._meet(h, seat)
            if record is not None:
                record.abroad = True

    def running_as(self, h: int, seat: Seat) -> tuple[Execution, ...]:
        """The record of an execution that its own caller waits for; empty if it has ended."""
        with self.lock:
            record = self._meet(h, seat)
            return () if record is None or record.leader is None else (record,)

    def adopt(self, seat: Seat, heir: Any, leader: Any) -> bool:
        """`heir`, who was to take over or to start, does so as `leader`. False if it is too late.

        Too late: it was lost in the meantime, or everybody has left.
        """
        with self.lock:
            record = self.met.get(id(seat))
            if record is None:  # nobody has met it, so nobody has ended it
                return seat[1] is heir
            if record.leader is not heir or record.end is not None:
                return False
            record.leader = leader
            if COMPILED:
                record.serial = next_serial()
            if record.inherited:
                record.inherited = False
                record.predecessor = None
                self.promotions += 1
            return True

    def settle(
        self,
        h: int,
        seat: Seat,
        leader: Any,
        end: End,
        value: Any = None,
        traceback: TracebackType | None = None,
    ) -> tuple[Execution | None, Any]:
        """The leader's run has ended: so has the execution, or a waiter leads it from now on.

        Args:
            h: The hash of its key.
            seat: What `leader` leads. An end that comes from anybody else changes nothing.
            leader: Whose run has ended.
            end: How.
            value: The value, or the exception.
            traceback: Where the exception was raised.

        Returns:
            The record, if somebody has met it, and the waiter that takes over and has to be told.
            That it may have left in the meantime is for it to say: only who is told can end what
            nobody leads yet.
        """
        with self.lock:
            record = self.met.get(id(seat))
            if record is None:  # nobody has met it; or it has ended before
                if self.unlink(h, seat) and end is End.ERROR:
                    self.errors += 1
                return None, None
            if record.leader is None or record.leader != leader:
                # Done a second time, after an interruption: the heir may not have been told.
                told_twice = record.inherited and record.predecessor == leader
                return record, record.leader if told_twice else None
            waiters = record.waiters
            # All calls come first: a signal handler's exception strikes at calls only, and what
            # is assigned after the last of them is assigned as a whole.
            if end is End.LOST and waiters:
                heir = next(iter(waiters))
                del waiters[heir]
                record.attended = True
                record.inherited = True
                record.announced = False
                record.predecessor = leader
                record.leader = heir
                return record, heir
            served = count_served(waiters)
            failure = Failure(value, traceback) if end is End.ERROR and waiters else None
            if not self.unlink(h, seat):
                self._remove_from_overflow(h, seat)
            record.leader = None
            if record.end is None:
                record.shared = served + record.attended + record.abroad > 1
                record.failure = failure
                if end is End.VALUE:
                    record.value = value
                elif end is End.ERROR:
                    self.errors += 1
                self.shared += served
                record.joinable = False
                record.end = end
            return record, None

    def announce(self, record: Execution, heir: Any, loop: Any, other: Any) -> Any:
        """Who takes over, or is asked next whether it can.

        Args:
            record: What has lost its leader.
            heir: Who was chosen, by `settle` or by this.
            loop: Its event loop, as for `join`.
            other: One of those who wait, that is to be asked instead while `heir` waits again; or
                None.

        Returns:
            The waiter. Nobody else can be chosen from now on, unless it is `other`: that one is the
            leader, but can still be exchanged. None if somebody else has told the waiter, and it
            leads already.
        """
        with self.lock:
            if record.leader is not heir or record.announced:
                return record.leader if record.inherited else None
            if other in record.waiters:
                del record.waiters[other]
                record.waiters[heir] = loop
                record.leader = other
                return other
            record.announced = True
            return heir

    def dismiss(self, seat: Seat) -> None:
        """Drops the record of an execution that has ended, once all have been woken.

        Not before: an end that is interrupted on its way to the waiters is done again.
        """
        with self.lock:
            self.met.pop(id(seat), None)
            self._mark()


def count_served(waiters: dict[Any, Any]) -> int:
    """How many of them will have the outcome: one may be cancelled that has not left yet.

    A function, for it is called under a lock: of a loop below `with`, CPython 3.14 leaves out the
    jump behind an `if` from what `with` covers, and it runs signal handlers there.
    """
    served = 0
    for waiter in list(waiters):  # a signal handler may cancel one of them meanwhile
        if not waiter.cancelled():
            served += 1
    return served


class _Mark:
    """A part that no caller has."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


#: The key of a call with one part is that part. That of several is `(SEVERAL, part, more)`, so that
#: it is not taken for a lone part that is a tuple; that of none is NO_PART.
NO_PART: Any = _Mark("<no part>")
SEVERAL: Any = _Mark("<several parts>")
#: Compiled: further parts of which there are none.
NONE_MORE = ()


def public_key(key: Any) -> Any:
    """The key as its user knows it: one part, or the tuple of several."""
    if key is NO_PART:
        return ()
    if type(key) is tuple:
        several: tuple[Any, ...] = key  # pyright: ignore[reportUnknownVariableType]
        if len(several) == 3 and several[0] is SEVERAL:
            return (several[1], *several[2])
    return key  # pyright: ignore[reportUnknownVariableType]


def key_of(parts: tuple[Any, ...]) -> Any:
    """The key of a call with these parts."""
    if len(parts) == 1:
        return parts[0]
    return (SEVERAL, parts[0], parts[1:]) if parts else NO_PART


def parts_of(part: Any, more: tuple[Any, ...]) -> tuple[Any, ...]:
    """The parts that `do` was called with."""
    return () if part is NO_PART else (part, *more)


def leader_here() -> tuple[Any, ...]:
    """What follows the key in the seats of a function that this thread runs."""
    if COMPILED:
        return get_ident(), next_serial()
    return (get_ident(),)


#: Ends for which there was no room left on the stack: functions and their arguments. Usually a new
#: thread settles them at once, or, if there was no room to start one, the next who waits or looks.
late: list[tuple[Callable[..., None], tuple[Any, ...]]] = []


def settle_late() -> None:
    """Settles what is in `late`."""
    while late:
        try:
            entry = late.pop()
        except IndexError:  # somebody else was faster
            return
        try:
            entry[0](*entry[1])
        except RecursionError:
            late.append(entry)
            return


def end_badly(
    core: "Core", index: int, h: int, seat: Seat | None, led: bool, error: BaseException
) -> None:
    """As the end of `do` when something was raised, compiled.

    No signal handler interrupts there. It is a function because `do` then needs less of a stack.

    Args:
        core: The flight.
        index: Of the shard. To make one may fail, and is tried again.
        h: The hash of the key.
        seat: What the call leads, or was to lead. None if nobody has met it.
        led: Whether it has begun to lead, in this process.
        error: What was raised.
    """
    try:
        settle_badly(core, index, h, seat, led, error)
    except RecursionError:  # no room left on this stack
        late.append((settle_badly, (core, index, h, seat, led, error)))
        start_new_thread(settle_late, ())


def settle_badly(
    core: "Core", index: int, h: int, seat: Seat | None, led: bool, error: BaseException
) -> None:
    """What `end_badly` does where there is room for it."""
    shard = core._shard_at(index)
    if seat is not None:
        core._fail(shard, h, seat, seat[1], error)
    elif led and issubclass(type(error), Exception):
        shard.count_error()


_making = SteadyLock()

#: All flights, by id, for what concerns the whole process. A plain dict: it can be read in one step
#: while others make and drop flights.
_flights: "dict[int, weakref.ref[Any]]" = {}


def after_fork_in_child() -> None:
    """Whoever was making a shard is gone, and shall not hold up the child."""
    global _making
    _making = SteadyLock()


def register(flight: "Core") -> None:
    """Has the flight found by `all_flights` as long as it lives."""
    me = id(flight)
    _flights[me] = weakref.ref(flight, lambda _: _flights.pop(me, None))


def all_flights() -> "Iterator[Any]":
    """The flights of this process."""
    for reference in list(_flights.values()):
        flight = reference()
        if flight is not None:
            yield flight


class Core:
    """The synchronous path: keys, shards, and `do` as long as nobody else wants the key."""

    def __init__(
        self,
        shards: int,
        build_key: Callable[..., Hashable] | None,
        hash: Callable[[Any], int] | None,
    ) -> None:
        if COMPILED:
            # Free-threaded, all threads would count their references to it in one place. So the
            # collector does, and it is that which frees a flight there.
            defer(self)
        self._build_key = build_key
        self._hash = hash
        #: Whether `do` goes by `_do_wrapped`: something is done around the functions.
        self._wraps = False
        #: That, or there is a builder of keys: `do` asks for both at once.
        self._indirect = build_key is not None
        self._mask = shards - 1
        #: By how much a mixed hash is shifted to be an index; one bit less, for a shift by all of
        #: an int's bits is not defined in C.
        self._shift = 63 - self._mask.bit_length()
        self._make_shards()

    def _wrap(self, wraps: bool) -> None:
        """From now on something is done around the functions, or nothing is."""
        self._wraps = wraps
        self._indirect = wraps or self._build_key is not None

    def _make_shards(self) -> None:
        if COMPILED:
            # Those that run now end in the memory in which they have begun: in a forked child, or
            # when a subclass calls __init__ again.
            self._old_memory: Any = (self._memory, self._old_memory)
            self._memory: Any = make_lines(self._mask + 1)
            self._blocks = blocks_in(self._memory)
            self._stride = stride_of(slots_of(self._mask + 1))
        #: Made when they are first needed, under `_making`.
        self._shards: list[Shard | None] = [None] * (self._mask + 1)
        #: The only shard, where there is only one and no hook to be asked.
        self._single = self._shard_at(0) if self._mask == 0 and self._hash is None else None

    def _place(self, parts: tuple[Any, ...]) -> tuple[Any, int, Shard]:
        """The key of a call with these parts, what places it in the tables, and its shard."""
        key = key_of(parts) if self._build_key is None else self._build_key(*parts)
        h = hash_of(key)
        return key, h, self._shard_of(key, h)

    def _look(self, parts: tuple[Any, ...]) -> tuple[Any, int, Shard, bool]:
        """The same, and whether anybody leads for a key with this hash."""
        key, h, shard = self._place(parts)
        return key, h, shard, shard.taken(h)

    def _shard_of(self, key: Any, h: int) -> Shard:
        return self._single or self._shard_at(self._index(key, h))

    def _index(self, key: Any, h: int) -> int:
        hook = self._hash
        if hook is None:
            # Fibonacci hashing (Knuth, TAOCP 3, 6.4): the product's top bits depend on all bits
            # of h, so ints, which hash to themselves, spread whatever their step.
            if COMPILED:
                return mixed(h, self._shift)
            return (h * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF) >> 1 >> self._shift
        key = public_key(key)
        index = hook(key)
        if not isinstance(index, int):
            raise TypeError(f"hash must return an int, and returned {index!r} for the key {key!r}")
        return int.__and__(index, int(self._mask))  # whatever a subclass makes of &

    def _shard_at(self, index: int) -> Shard:
        shard = self._shards[index]
        if shard is None:
            with _making:
                shard = self._shards[index]
                if shard is None:
                    made = Shard(self._memory if COMPILED else None, index)
                    shard = self._shards[index]  # a signal handler may have been faster
                    if shard is None:
                        shard = self._shards[index] = made
        return shard

    def _made_shards(self) -> list[Shard]:
        return [shard for shard in self._shards if shard is not None]

    def do(  # noqa: C901 - the hot path in both its forms, written out
        self, fn: Callable[[], T], part: Any = NO_PART, /, *more: Any, timeout: float | None = None
    ) -> tuple[T, bool]:
        """Runs `fn`, or waits for the caller that already runs it for this key.

        Args:
            fn: The function to run, on this thread, if nobody runs one for the key.
            part: What the key is made of,
            *more: of one part or several.
            timeout: Seconds to wait, at the most, as a follower. A leader is not limited.

        Returns:
            The value, and whether it went to more than one caller.

        Raises:
            Exception: Whatever the leader's function raised.
            DeadlockError: Waiting would never end.
            FlightTimeout: A follower waited for `timeout` seconds.
            TypeError: The key is not hashable, a hook returned what it must not, or `fn` is a
                coroutine function: use `do_async`.

        May be called from any thread. On a thread with a running event loop it stops that loop for
        as long as it takes.
        """
        if timeout is not None:
            check_timeout(timeout)
        if COMPILED:
            check_self(self)
            # The seat is a slot in the line. Key and seat are made only if somebody meets it.
            if not self._indirect:
                first, rest = borrow(part), borrow(more)
            else:
                if self._wraps:
                    return self._do_wrapped(fn, part, more, timeout)
                key = self._built(part, more)
                first, rest = borrow(key), borrow(NONE_MORE)
            h = hash_of_call(first, rest)
            index = index_of(self, h, first, rest)
            line = line_in(self, index)
            slot = line_claim(line, h, first, rest)
            result = nothing()
            if slot >= 0:
                result = call(fn)
                if line_pass(line, slot, result):
                    return take(result), False
            # Until here no step could fail or be interrupted but the function itself.
            seat: Any = None
            try:
                if slot == FULL:
                    seat = line_seat(line, slot, first, rest)
                    slot = line_claim_more(line, h, seat)
                    if slot >= 0:
                        result = call(fn)
                if slot >= 0:
                    value = take(result)
                    if type(value) is CoroutineType:
                        seat = seat or line_seat(line, slot, first, rest)
                        self._refuse(self._shard_at(index), h, seat, value)
                    seat = line_release(line, slot, h, seat)
                    slot = TAKEN
                    if seat is None:
                        return value, False
                    return self._serve(self._shard_at(index), h, seat, value)
                if seat is None:
                    seat = line_seat(line, slot, first, rest)
                return self._follow(self._shard_at(index), h, seat, fn, timeout)
            except BaseException as error:
                led = slot >= 0 and is_line(self, index, line)
                if seat is None:
                    seat = line_leave(line, slot)
                end_badly(self, index, h, seat, led, error)
                raise
        if not self._indirect:  # the same as key_of(parts), without the call
            key = (SEVERAL, part, more) if more else part
        else:
            if self._wraps:
                return self._do_wrapped(fn, part, more, timeout)
            key = self._built(part, more)
        h = hash(key)
        seat = (key, get_ident())
        shard = self._single
        if shard is None:
            index = self._index(key, h)
            shard = self._shards[index] or self._shard_at(index)
        # CPython runs signal handlers at calls, and what they raise can strike at every call below.
        # So all of them, from the link on, are inside of one try, and the clean-up is made of steps
        # that may be done twice, and is done again when it is itself interrupted.
        try:
            if shard.table.setdefault(h, seat) is seat and (
                not shard.any_beside or h not in shard.overflow
            ):
                next(shard.started)
                value = fn()
                if type(value) is CoroutineType:
                    self._refuse(shard, h, seat, value)
                del shard.table[h]
                if not shard.any_met:
                    return value, False
                return self._serve(shard, h, seat, value)
            return self._follow(shard, h, seat, fn, timeout)
        except BaseException as error:
            try:
                self._fail(shard, h, seat, seat[1], error)
            except RecursionError:  # no room left on this stack
                late.append((self._fail, (shard, h, seat, seat[1], error)))
                start_new_thread(settle_late, ())
            except BaseException:
                self._fail(shard, h, seat, seat[1], error)
                raise
            raise

    def _built(self, part: Any, more: tuple[Any, ...]) -> Any:
        """The key by the user's own builder."""
        return cast("Callable[..., Hashable]", self._build_key)(*parts_of(part, more))

    def _serve(self, shard: Shard, h: int, seat: Seat, value: T) -> tuple[T, bool]:
        """Ends the leader's run with a value that others may want."""
        record = self._conclude(shard, h, seat, seat[1], End.VALUE, value)
        return value, record is not None and record.shared

    def _refuse(self, shard: Shard, h: int, seat: Seat, value: Any) -> NoReturn:
        """Ends the leader's run, which is its own mistake: its function has made a coroutine."""
        self._conclude(shard, h, seat, seat[1], End.LOST)
        refuse_coroutine(value)

    def _fail(self, shard: Shard, h: int, seat: Seat, leader: Any, error: BaseException) -> None:
        """Ends the leader's run with what its function raised, as seen from the caller's frame."""
        if issubclass(type(error), Exception):
            traceback = traceback_of(error)
            if traceback is not None:  # without the frame of ours that caught it
                traceback = traceback.tb_next
            self._conclude(shard, h, seat, leader, End.ERROR, error, traceback)
        else:
            self._conclude(shard, h, seat, leader, End.LOST)

    def _conclude(
        self,
        shard: Shard,
        h: int,
        seat: Seat,
        leader: Any,
        end: End,
        value: Any = None,
        traceback: TracebackType | None = None,
    ) -> Execution | None:
        """Settles the leader's run and wakes whom that concerns. Returns the record, if any."""
        raise NotImplementedError

    def _follow(
        self, shard: Shard, h: int, seat: Seat, fn: Callable[[], T], timeout: float | None
    ) -> tuple[T, bool]:
        """`do`, when its place in the table is taken, or somebody with this hash is beside it."""
        raise NotImplementedError

    def _do_wrapped(
        self, fn: Callable[[], T], part: Any, more: tuple[Any, ...], timeout: float | None
    ) -> tuple[T, bool]:
        """`do`, when something is done around the functions."""
        raise NotImplementedError

    # -- watching ---------------------------------------------------------------------------------

    def _executions(self) -> list[tuple[Shard, int, Seat]]:
        """Those that run now, with their shards and the hashes of their keys."""
        # All flights are asked, however many have nothing in flight.
        if COMPILED and lines_idle(self._memory):
            return []
        return [
            (shard, h, seat)
            for index, count in enumerate(self._running())
            if count
            for shard in (self._shard_at(index),)
            for h, seat in shard.executions()
        ]

    def _count_started(self) -> int:
        """How many executions were ever started."""
        if COMPILED:
            started = lines_started(self._memory)
            return int(started + sum([shard.totals()[2] for shard in self._made_shards()]))
        return sum([shard.count_started() for shard in self._made_shards()])

    def _running(self) -> tuple[int, ...]:
        """How many executions run now in each shard."""
        if late:
            settle_late()
        running = lines_running(self._memory) if COMPILED else [0] * len(self._shards)
        for index, shard in enumerate(self._shards):
            if shard is not None:
                if not COMPILED:
                    running[index] = len(shard.table)
                if shard.overflow:
                    running[index] += sum([len(group) for group in list(shard.overflow.values())])
        return tuple(running)

    def _orphan(self) -> None:
        """After a fork, in the child: starts anew with nothing in flight and no lock held."""
        for shard in self._made_shards():
            shard.orphan()
        if COMPILED:  # the one that called fork may be inside a leader's function
            lines_orphan(self._memory)
        self._make_shards()


if cython.compiled:
    # All threads take the method from the class for each call.
    defer(vars(Core)["do"])


def gil_enabled() -> bool:
    """Whether the interpreter runs one thread at a time."""
    ask = getattr(sys, "_is_gil_enabled", None)  # CPython 3.13 and later
    return True if ask is None else bool(ask())


def refuse_coroutine_function(fn: Any) -> None:
    """Raises TypeError if a synchronous method was plainly given a coroutine function.

    What hides one (a lambda, a partial) shows when it is called: see `refuse_coroutine`.
    """
    code = getattr(fn, "__code__", None)
    if code is not None and code.co_flags & CO_COROUTINE:
        raise TypeError(f"{fn!r} is a coroutine function: use do_async or do_many_async")


def refuse_coroutine(value: Any) -> NoReturn:
    """Raises TypeError: a function turned out to return a coroutine to a synchronous method."""
    value.close()
    raise TypeError(
        f"the function returned a coroutine ({value.__qualname__}): use do_async or do_many_async"
    )


def not_awaitable(value: object) -> TypeError:
    """The error of a coroutines' method that was given a plain function."""
    return TypeError(
        f"the function returned {value!r}, which can not be awaited: use do, do_future or do_many"
    )


def check_timeout(timeout: object) -> None:
    """Raises TypeError or ValueError unless `timeout` is a number of seconds, 0 or more."""
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout must be a number of seconds or None, not {timeout!r}")
    if not timeout >= 0:  # NaN is neither
        raise ValueError(f"timeout must be 0 seconds or more, not {timeout!r}")
