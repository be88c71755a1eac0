"""Who leads, who follows, and who is settled, handed over, forgotten or abandoned.

Nothing here sleeps, wakes, or knows an event loop. State is decided here, in short steps, and each
step returns what is to be done about it; waking and user code happen in the modules above, outside
of every lock.

One `Execution` is the record of one joinable run for one key. It ends in one of the ways of `End`.
When its leader is lost and somebody still waits, it does not end: one waiter becomes the leader,
the others go on waiting for the same record.

**The table and the uncontended path.** A shard's `table` maps the *hash* of a key (an int) to the
execution that holds this hash. A call that meets nobody does two dict operations and takes no lock:

- `table.setdefault(h, mine)` links it, or finds who is there,
- `del table[h]` unlinks it. Only the execution's own end removes an entry, so there is nothing to
  compare and a late end can not remove a successor. To forget an execution is to mark it
  unjoinable; it keeps its place until it ends.

With ints as the dict's keys, no `__eq__` or `__hash__` of a user's runs inside these operations.
Each is atomic, and operations on one dict are ordered among all threads, by the GIL or by the
dict's own lock (the "Thread safety guarantees" of CPython's documentation). All else is decided
under `Shard.lock`.

**Joining** races with that lock-free end. The follower writes itself into `execution.waiters`
first and then looks into the table again; the leader unlinks first and reads `waiters` then.
Whichever of the two dict operations comes second sees what the other side wrote before its own:
either the follower finds the execution still linked, and the leader will find it among the waiters,
or the follower finds it gone, and takes its name back (Dekker's argument, with the dict as fence).

**Two keys with one hash**, or a key whose last execution was forgotten and still runs: the place is
taken, so the newcomer goes to `overflow`, a dict that is read and changed under the lock. It is put
there before `setdefault` is tried once more. So whoever later finds the place free, links itself
and then looks into `overflow`, sees it there. Keys are compared (user code) with no lock held, on a
snapshot that is checked again under the lock.

The shape of it, one record per running key, is that of Go's `singleflight.go`
(https://pkg.go.dev/golang.org/x/sync/singleflight); sharding by a masked hash is ShardedFlight's.
"""

import enum
import itertools
import sys
from _thread import RLock, start_new_thread
from collections.abc import Callable, Hashable
from inspect import CO_COROUTINE
from threading import get_ident
from types import CoroutineType, TracebackType
from typing import Any, Literal, NoReturn, TypeVar, cast

from . import _uncompiled as cython
from ._replica import Failure, traceback_of

if False:  # Cython reads this all the same, and compiles its own names instead of the stand-in's.
    import cython  # type: ignore[import-untyped, no-redef]

__all__ = ["Core", "End", "Execution", "Run", "Shard", "check_timeout", "public_key"]

T = TypeVar("T")

OnAbandon = Literal["cancel", "finish"]

#: Whether this is the compiled form.
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

    def abandon(self, execution: "Execution") -> None:
        """Nobody wants `execution` any more, and nobody can join it: stop if that is possible."""
        raise NotImplementedError


class Execution:
    """The record of one execution.

    The leader's thread writes the first group before it links the record. The second group is
    unset until somebody but the leader touches the record: what nobody needs is not made.
    """

    __slots__ = (
        "attended",
        "end",
        "failure",
        "inherited",
        "joinable",
        "key",
        "leader",
        "predecessor",
        "shared",
        "value",
        "waiters",
    )

    #: What makes two calls the same call. Never changes.
    key: Any
    #: Who runs the function: the ident of a thread, a `Run`, or the waiter that takes over. None
    #: after the end. Changed under the lock. It is the fence: an end is accepted from the leader
    #: alone, so the late end of a former leader does nothing.
    leader: Any
    #: Who waits, in order of arrival (a dict serves as an ordered set). None until the record is
    #: touched, and set last then: who sees it set may read the group below. Under the lock.
    waiters: dict[Any, None] | None

    #: False once forgotten or abandoned. Under the lock.
    joinable: bool
    #: The leader's own caller still wants the outcome. Under the lock.
    attended: bool
    #: The leader was lost and its heir has not begun; and who that leader was. Under the lock.
    inherited: bool
    predecessor: Any
    #: How it ended; None while it runs. From then on nobody joins or leaves; who wakes the waiters
    #: drops them. Under the lock.
    end: End | None
    #: The outcome, written with the end; followers read it after they have been woken.
    value: Any
    failure: Failure | None
    shared: bool

    def matches(self, key: Any) -> bool:
        """Whether a call with `key` may join. Runs the keys' `__eq__`."""
        if self.waiters is not None and not self.joinable:
            return False
        return self.key is key or bool(self.key == key)

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
            return KeyError(public_key(self.key))
        return cast("Failure", self.failure).replica()


# typeshed has RLock final; CPython has not.
class SteadyLock(RLock):  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]
    """A lock that a signal handler's exception can not leave taken.

    CPython 3.14 runs signal handlers between the taking of a lock and the first line of the `with`
    block, and what they raise there would leave it taken for good. An RLock, so that a handler (or
    a destructor) that calls the flight itself does not wait for the thread it has interrupted.
    """

    def __enter__(self) -> bool:  # type: ignore[override]
        try:
            return self.acquire()
        except BaseException:
            if cast("Any", self)._is_owned():  # as threading.Condition asks
                self.release()
            raise


class Shard:
    """One of the independent tables. `table` and `started` need no lock, all else does."""

    __slots__ = (
        "_started_reads",
        "abandoned",
        "deadlocks",
        "errors",
        "forgotten",
        "lock",
        "overflow",
        "overflow_changes",
        "promotions",
        "shared",
        "started",
        "table",
        "timeouts",
    )

    def __init__(self) -> None:
        self.lock = SteadyLock()
        self.table: dict[int, Execution] = {}
        self.overflow: dict[int, list[Execution]] = {}
        #: How often `overflow` has changed.
        self.overflow_changes = 0
        #: Counts executions: `next` is atomic, where `+= 1` on an attribute would be lost updates.
        self.started = itertools.count()
        self._started_reads = 0
        self.shared = self.errors = self.promotions = self.timeouts = 0
        self.abandoned = self.forgotten = self.deadlocks = 0

    def orphan(self) -> None:
        """After a fork, in the child: the threads that knew this shard are gone.

        The one that called fork may be inside a leader's function, and will end its execution
        here. It shall find a lock that nobody holds, and nobody to wake.
        """
        self.lock = SteadyLock()
        for _, execution in self.executions():
            if execution.waiters:
                execution.waiters = {}

    # -- reading ----------------------------------------------------------------------------------

    def running(self) -> int:
        """How many executions run now, those that were forgotten or abandoned among them."""
        return len(self.table) + sum(map(len, list(self.overflow.values())))

    def executions(self) -> list[tuple[int, Execution]]:
        """Those that run now, with the hashes of their keys."""
        found = list(self.table.items())
        for h, group in list(self.overflow.items()):
            found += [(h, execution) for execution in tuple(group)]
        return found

    def waiting(self) -> int:
        """How many followers wait now. Counted when asked: nobody has to keep a count right."""
        found = 0
        for _, execution in self.executions():
            waiters = execution.waiters
            if waiters is not None and execution.end is None:
                found += len(waiters)
        return found

    def count_started(self) -> int:
        """How many executions were ever started here, by leaders and by those who took over."""
        with self.lock:
            # A count can only be read by counting: take the readings off.
            number = next(self.started)
            self._started_reads += 1
            return number + 1 - self._started_reads + self.promotions

    def holders(self, h: int) -> list[Execution]:
        """All executions with this hash, those in overflow first."""
        head = self.table.get(h)
        found = [] if head is None else [head]
        if self.overflow:
            found[:0] = self.overflow.get(h, ())
        return found

    # -- joining ----------------------------------------------------------------------------------

    def join(self, h: int, mine: Execution, waiter: Any) -> Execution:
        """Makes `waiter` a follower for the key of `mine`, or else makes `mine` lead.

        Args:
            h: The hash of the key.
            mine: A new record. It may be linked in `table` already.
            waiter: Who is to be woken.

        Returns:
            `mine` if it leads now, otherwise the execution that `waiter` has joined.

        Raises:
            Exception: What `__eq__` of a key raised; the caller ends `mine` if it is linked.
        """
        while not self._lead(h, mine):
            joined = self.follow(h, mine.key, waiter)
            if joined is not None:
                return joined
        return mine

    def follow(self, h: int, key: Any, waiter: Any) -> Execution | None:
        """Makes `waiter` a follower of the joinable execution for `key`.

        Returns:
            The execution, or None if there is none.
        """
        table = self.table
        while True:
            changes = self.overflow_changes
            head = table.get(h)
            # What _match finds where nothing is special, without the calls.
            if (
                head is not None
                and (head.waiters is None or head.joinable)
                and (head.key is key or head.key == key)
                and not self.overflow
            ):
                match = head
            else:
                found = self._match(h, key, head)
                if found is None:
                    return None
                match = found
            with self.lock:
                if match.waiters is None:
                    self.touch(match)
                elif not match.joinable:
                    continue
                waiters = cast("dict[Any, None]", match.waiters)
                waiters[waiter] = None
                if match is head:
                    # The dict's own lock is the fence, and `get` alone does not take it.
                    table.pop(_FENCE, None)
                    if table.get(h) is head:
                        return match
                elif changes == self.overflow_changes:
                    return match
                del waiters[waiter]

    def _lead(self, h: int, mine: Execution) -> bool:
        """Links `mine`; False, with `mine` not linked, if another one may be joinable."""
        changes = self.overflow_changes
        head = self.table.setdefault(h, mine)
        match = self._match(h, mine.key, head, mine)
        if match is not None and head is not mine:
            return False
        with self.lock:
            if head is mine:
                # What others have touched in the meantime may have followers: it has to lead. If
                # there is a match beside it, then it was forgotten since.
                if mine.waiters is None and (match is not None or changes != self.overflow_changes):
                    del self.table[h]
                    return False
            elif changes != self.overflow_changes or not self._link_beside(h, mine, head):
                return False
            next(self.started)
            return True

    def _match(
        self, h: int, key: Any, head: Execution | None, mine: Execution | None = None
    ) -> Execution | None:
        """The joinable execution for `key` among those that hold its hash. Runs user code."""
        if self.overflow:
            for other in tuple(self.overflow.get(h, ())):
                if other is not mine and other.matches(key):
                    return other
        if head is None or head is mine or not head.matches(key):
            return None
        return head

    def _link_beside(self, h: int, mine: Execution, head: Execution) -> bool:
        """Links `mine` in overflow as long as `head` has its place. Under the lock.

        Returns:
            False, with `mine` not linked, if the place has another holder: it may be of this key.
        """
        self.touch(mine)
        self.overflow.setdefault(h, []).append(mine)
        self.overflow_changes += 1
        holder = self.table.setdefault(h, mine)
        if holder is head:
            return True
        self._remove_from_overflow(mine, h)
        mine.waiters = None
        return holder is mine

    def _remove_from_overflow(self, execution: Execution, h: int) -> None:
        group = self.overflow.get(h, [])
        if execution in group:
            group.remove(execution)
            self.overflow_changes += 1
            if not group:
                del self.overflow[h]

    def touch(self, execution: Execution) -> None:
        """Sets the second group of fields, once. Under the lock."""
        if execution.waiters is None:
            execution.joinable = True
            execution.attended = True
            execution.end = None
            execution.failure = None
            execution.shared = False
            execution.inherited = False
            execution.predecessor = None
            execution.waiters = {}

    # -- leaving ----------------------------------------------------------------------------------

    def leave(self, execution: Execution, waiter: Any, cancel: bool) -> tuple[bool, Run | None]:
        """A follower goes.

        Args:
            execution: What it had joined.
            waiter: The follower.
            cancel: Whether an execution that nobody wants any more is to be abandoned.

        Returns:
            Whether it has left: False if it has been woken, or is about to be. And the run that
            nobody wants any more, to be abandoned by the caller.
        """
        with self.lock:
            waiters = execution.waiters
            if waiters is None or execution.end is not None or waiter not in waiters:
                return False, None
            del waiters[waiter]
            return True, self._deserted(execution) if cancel else None

    def leave_leader(
        self, execution: Execution, leaders: tuple[Any, ...], cancel: bool
    ) -> Run | None:
        """The own caller of a leader, one of `leaders`, goes. Returns a run as `leave` does."""
        with self.lock:
            if execution.leader not in leaders:
                return None
            self.touch(execution)
            execution.attended = False
            return self._deserted(execution) if cancel else None

    def _deserted(self, execution: Execution) -> Run | None:
        if execution.waiters or execution.attended or execution.end is not None:
            return None
        if not isinstance(execution.leader, Run):
            return None  # it runs on a thread, which can not be stopped
        execution.joinable = False
        execution.end = End.ABANDONED
        self.abandoned += 1
        return execution.leader

    def forget(self, h: int, key: Hashable) -> None:
        """Makes the key's execution, if there is one, unjoinable."""
        while True:
            changes = self.overflow_changes
            match = self._match(h, key, self.table.get(h))
            with self.lock:
                if changes != self.overflow_changes:
                    continue
                if match is not None and (match.waiters is None or match.joinable):
                    self.touch(match)
                    match.joinable = False
                    self.forgotten += 1
                return

    # -- ending -----------------------------------------------------------------------------------

    def adopt(self, execution: Execution, heir: Any, leader: Any) -> bool:
        """`heir`, who was to take over or to start, does so as `leader`. False if it is too late.

        Too late: it was lost in the meantime, or everybody has left.
        """
        with self.lock:
            if execution.leader is not heir:
                return False
            if execution.waiters is not None and execution.end is not None:
                return False
            execution.leader = leader
            if execution.waiters is not None and execution.inherited:
                execution.inherited = False
                execution.predecessor = None
                self.promotions += 1
            return True

    def settle(
        self,
        execution: Execution,
        h: int,
        leader: Any,
        end: End,
        value: Any = None,
        traceback: TracebackType | None = None,
    ) -> None:
        """The leader's run has ended: so has the execution, or a waiter leads it from now on.

        Args:
            execution: What `leader` leads. An end that comes from anybody else changes nothing.
            h: The hash of its key.
            leader: Whose run has ended.
            end: How.
            value: The value, or the exception.
            traceback: Where the exception was raised.
        """
        with self.lock:
            self.touch(execution)
            if execution.leader is None or execution.leader != leader:
                return
            waiters = cast("dict[Any, None]", execution.waiters)
            # All calls come first: a signal handler's exception strikes at calls only, and what
            # is assigned after the last of them is assigned as a whole.
            if end is End.LOST and waiters:
                heir = next(iter(waiters))
                del waiters[heir]
                execution.attended = True
                execution.inherited = True
                execution.predecessor = leader
                execution.leader = heir
                return
            # A follower that was cancelled in the same moment has not left yet.
            served = sum(not is_cancelled(waiter) for waiter in waiters)
            failure = Failure(value, traceback) if end is End.ERROR and waiters else None
            self._unlink(execution, h)
            execution.leader = None
            if execution.end is None:
                execution.shared = served + execution.attended > 1
                execution.failure = failure
                if end is End.VALUE:
                    execution.value = value
                elif end is End.ERROR:
                    self.errors += 1
                self.shared += served
                execution.joinable = False
                execution.end = end

    def _unlink(self, execution: Execution, h: int) -> None:
        if self.table.get(h) is execution:
            del self.table[h]
        else:
            self._remove_from_overflow(execution, h)


def is_cancelled(waiter: Any) -> bool:
    """Whether a waiter that can be cancelled has been."""
    cancelled = getattr(waiter, "cancelled", None)
    return cancelled is not None and bool(cancelled())


class LonePart(tuple[Any]):
    """The key of a call with one part that is a tuple: that part, wrapped.

    Several parts, or none, are the tuple of themselves, never of length 1: so the two never meet.
    """

    __slots__ = ()


def public_key(key: Any) -> Any:
    """The key as its user knows it."""
    return key[0] if type(key) is LonePart else key


class Core:
    """The synchronous path: keys, shards, and `do` as long as nobody else wants the key."""

    def __init__(
        self,
        shards: int,
        build_key: Callable[..., Hashable] | None,
        hash: Callable[[Any], int] | None,
    ) -> None:
        self._build_key = build_key
        self._hash = hash
        self._shift = 64 - (shards - 1).bit_length()
        self._make_shards(shards)

    def _make_shards(self, shards: int) -> None:
        self._shards = tuple(Shard() for _ in range(shards))
        #: The only shard, where there is only one and no hook to be asked.
        self._single = self._shards[0] if shards == 1 and self._hash is None else None

    @property
    def shards(self) -> int:
        """How many shards the flight has."""
        return len(self._shards)

    def _key(self, parts: tuple[Any, ...]) -> Any:
        if self._build_key is not None:
            return self._build_key(*parts)
        if len(parts) != 1:
            return parts
        return LonePart(parts) if isinstance(parts[0], tuple) else parts[0]

    def _shard_of(self, key: Any, h: int) -> Shard:
        if self._single is not None:
            return self._single
        hook = self._hash
        if hook is None:
            # Fibonacci hashing (Knuth, TAOCP 3, 6.4): the product's top bits depend on all bits
            # of h, so ints, which hash to themselves, spread whatever their step.
            return self._shards[(h * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF) >> self._shift]
        key = public_key(key)
        index = hook(key)
        if not isinstance(index, int):
            raise TypeError(f"hash must return an int, and returned {index!r} for the key {key!r}")
        return self._shards[index & (len(self._shards) - 1)]

    def do(
        self, fn: Callable[[], T], /, *parts: Any, timeout: float | None = None
    ) -> tuple[T, bool]:
        """Runs `fn`, or waits for the caller that already runs it for this key.

        Args:
            fn: The function to run, on this thread, if nobody runs one for the key.
            *parts: What the key is made of.
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
        # The same as self._key(parts), without the call.
        if self._build_key is not None:
            key = self._build_key(*parts)
        elif len(parts) == 1:
            key = parts[0]
            if type(key) is not str and isinstance(key, tuple):
                key = LonePart(parts)
        else:
            key = parts
        h = hash(key)
        shard = self._single
        if shard is None:
            shard = self._shard_of(key, h)
        execution = Execution()
        execution.key = key
        me = execution.leader = get_ident()
        execution.waiters = None
        table = shard.table
        # CPython runs signal handlers at calls, and what they raise can strike at every call below.
        # So all of them, from the link on, are inside of one try, and the clean-up is made of steps
        # that may be done twice, and is done again when it is itself interrupted.
        try:
            if table.setdefault(h, execution) is execution and not shard.overflow:
                next(shard.started)
                value = fn()
                if type(value) is CoroutineType:
                    self._conclude(execution, shard, h, me, End.LOST)
                    refuse_coroutine(value)
                del table[h]
                if execution.waiters is None:
                    return value, False
                self._conclude(execution, shard, h, me, End.VALUE, value)
                return value, execution.shared
            return self._follow(shard, h, execution, fn, timeout)
        except BaseException as error:
            try:
                if table.get(h) is execution or execution.waiters is not None:
                    self._fail(execution, shard, h, me, error)
            except RecursionError:  # no room left on this stack
                start_new_thread(self._fail, (execution, shard, h, me, error))
            except BaseException:
                self._fail(execution, shard, h, me, error)
                raise
            finally:
                del execution  # the traceback holds this frame: see Failure
            raise

    def _fail(
        self, execution: Execution, shard: Shard, h: int, leader: Any, error: BaseException
    ) -> None:
        """Ends the leader's run with what its function raised, as seen from the caller's frame."""
        if issubclass(type(error), Exception):
            traceback = traceback_of(error)
            if traceback is not None:  # without the frame of ours that caught it
                traceback = traceback.tb_next
            self._conclude(execution, shard, h, leader, End.ERROR, error, traceback)
        else:
            self._conclude(execution, shard, h, leader, End.LOST)

    def _conclude(
        self,
        execution: Execution,
        shard: Shard,
        h: int,
        leader: Any,
        end: End,
        value: Any = None,
        traceback: TracebackType | None = None,
    ) -> None:
        """Settles the leader's run and wakes whom that concerns."""
        raise NotImplementedError

    def _follow(
        self,
        shard: Shard,
        h: int,
        mine: Execution,
        fn: Callable[[], T],
        timeout: float | None,
    ) -> tuple[T, bool]:
        """`do`, when the key or its place in the table is taken."""
        raise NotImplementedError


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
