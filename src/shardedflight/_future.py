"""What `do_future` returns.

The executor has a future of its own for what it runs. It is not the one to return: it can not be
cancelled once the function runs, and a follower has none. The one returned is settled by the
flight, whichever way its outcome comes.
"""

from concurrent.futures import Future, InvalidStateError
from threading import get_ident
from typing import TYPE_CHECKING, Any, cast

from ._core import End, Execution, Run, Seat, Shard, public_key
from ._deadlock import begin_wait, end_wait
from ._observe import Departure, WatchedSeat, departure_from
from ._waiting import Waiter

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._flight import ShardedFlight

__all__ = ["FlightFuture"]


class FlightFuture(Future[Any], Run, Waiter):
    """The caller of a function on the executor, or a follower."""

    def __init__(
        self, flight: "ShardedFlight", fn: "Callable[[], Any]", shard: Shard, h: int
    ) -> None:
        super().__init__()
        self._flight = flight
        self._fn = fn
        self._work: Future[None] | None = None
        self._shard = shard
        self._hash = h
        #: Which execution it leads, until that has ended: seat and future hold each other.
        self.seat: Seat | None = None
        #: What it has joined. Written by the thread that makes it.
        self.joined: Execution | None = None
        #: The executor's thread that runs `fn`; written before the function is adopted.
        self.thread: int | None = None
        #: The value and whether it was shared, written before the future is done.
        self._outcome: tuple[Any, bool] | None = None

    def _end(self, outcome: tuple[Any, bool] | None, error: BaseException | None) -> None:
        try:
            if error is not None:
                self.set_exception(error)
            else:
                self._outcome = outcome
                self.set_result(outcome)
        except InvalidStateError:
            pass  # it was cancelled, or is told twice

    # As a leader's caller.

    def submit(self) -> None:
        """Has `fn` run by the executor, to lead."""
        job = _Job(self)
        self._work = work = self._flight._submit(job)
        work.add_done_callback(job)

    def dropped(self, error: BaseException | None) -> None:
        """The executor will not run the function; it may say why."""
        if error is None:
            super().cancel()
            self._tell_waiters()
        else:
            self._end(None, error)
        # By whoever shuts the executor down, with its lock held: another thread has to hand over,
        # for that may mean to submit.
        self._flight._on_a_thread(self.lose)

    def lead(self) -> None:
        """Runs the function on this thread of the executor; once, though it was told twice."""
        if not self._is_first("_begun"):
            return
        flight, shard, h = self._flight, self._shard, self._hash
        seat = cast("Seat", self.seat)
        # First: one that runs on a thread is not abandoned any more.
        self.thread = get_ident()
        try:
            if not shard.adopt(seat, self, self):  # abandoned
                self.lose()
                return
            try:
                outcome = flight._lead(shard, h, seat, self, self._fn)
            except BaseException as error:
                # Before callbacks are called, which may wait: none of its function's waits.
                self.thread = None
                flight._conclude(shard, h, seat, self, End.LOST)  # if it has not even begun
                self._end(None, error)
            else:
                self.thread = None
                self._end(outcome, None)
        finally:
            self.thread = None
            self.seat = None
            del self, seat  # the error's traceback holds this frame, and self the error

    def stoppable(self) -> bool:
        return self.thread is None

    def abandoned(self) -> bool:
        """Whether the execution that it was to lead has been given up."""
        record = self._shard.record(self.seat) if self.seat is not None else None
        return record is not None and record.end is not None

    def abandon(self, execution: Execution) -> None:
        work = self._work
        if work is not None and work.cancel():
            self.lose()

    def lose(self) -> None:
        """Ends or hands over what it leads."""
        seat = self.seat
        if seat is not None:
            self._flight._conclude(self._shard, self._hash, seat, self, End.LOST)
            self.seat = None

    # As a follower.

    def check_woken(self, joined: Execution) -> None:
        """Its coming has been told just now, and it may have been woken before that."""
        if self.cancelled():
            self._tell_left(joined, Departure.CANCELLED)
        elif self._work is not None:
            self._tell_left(joined, Departure.TOOK_OVER)
        elif self.done():
            self._tell_left(joined, departure_from(joined))

    def _tell_left(self, joined: Execution, departure: Departure) -> None:
        if isinstance(joined.seat, WatchedSeat):
            joined.seat.leave(self, departure)

    def wake(self, execution: Execution) -> None:
        departure = departure_from(execution)
        self._tell_left(execution, departure)
        if execution.end is End.VALUE:
            self._end((execution.value, execution.shared), None)
        else:
            self._end(None, execution.error())
        self._tell_left(execution, departure)  # if its coming was told only now

    def take_over(self, execution: Execution) -> bool:
        if self.cancelled():
            return False
        if self._work is not None:
            return True  # told twice
        self.seat = execution.seat
        self._tell_left(execution, Departure.TOOK_OVER)
        try:
            self.submit()
        except Exception as error:  # no thread for it: its own loss, as for a leader
            self._end(None, error)
            return False
        self._tell_left(execution, Departure.TOOK_OVER)  # as in wake
        return True

    # As a future.

    def cancel(self) -> bool:
        """Leaves the flight. False if the outcome is there already."""
        if not super().cancel():
            return False
        if self.joined is not None:
            self._tell_left(self.joined, Departure.CANCELLED)
        self._tell_waiters()
        # A follower leaves what it has joined; a leader, or one that has taken over, what it leads.
        flight, shard, seat = self._flight, self._shard, self.seat
        if self.joined is not None and flight._leave(shard, self.joined, self):
            return True
        if self.joined is not None:
            seat = self.joined.seat
        if seat is not None:
            flight._leave_leader(shard, self._hash, seat, self)
        return True

    def _tell_waiters(self) -> None:
        # What an executor does when it meets a cancelled future; concurrent.futures.wait waits for
        # that. Once: the base takes a second time for a mistake.
        if self._is_first("_told"):
            self.set_running_or_notify_cancel()

    def _is_first(self, what: str) -> bool:
        """True once for each `what`, whichever thread asks first."""
        mine = object()
        return self.__dict__.setdefault(what, mine) is mine

    def result(self, timeout: float | None = None) -> Any:
        """As `concurrent.futures.Future.result`; also raises `DeadlockError`."""
        try:
            # Not the base's result: it asks an exception for its truth.
            error = self.exception(timeout)
            if error is not None:
                raise error
            return self._outcome
        finally:
            error = None
            del self  # as the base does: the error's traceback holds this frame

    def _not_done(self) -> bool:
        return not self.done()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As `concurrent.futures.Future.exception`; also raises `DeadlockError`."""
        seat: Seat | None = None
        waits: tuple[Any, ...] = ()
        try:
            if self.done():
                return super().exception(timeout)
            seat = self.seat
            if self.joined is not None:
                waits = (self.joined,)
            elif seat is not None:
                waits = (_Lead(self, seat),)
            begin_wait(self._shard, waits, leave=self._not_done)
            try:
                return super().exception(timeout)
            finally:
                end_wait(waits)
        except BaseException:
            end_wait(waits)  # that, too, may have been interrupted
            raise
        finally:
            # A deadlock's traceback holds this frame, and self may come to hold that.
            del self, seat, waits


class _Lead:
    """What a future leads and nobody else has met: for `begin_wait`, as an `Execution` is."""

    __slots__ = ("leader", "seat")

    def __init__(self, future: FlightFuture, seat: Seat) -> None:
        self.leader = future
        self.seat = seat

    @property
    def key(self) -> Any:
        """As that of `Execution`."""
        return public_key(self.seat[0])


class _Job:
    """What the executor is given: an envelope, which is empty once it has been opened.

    The executor's frames and futures keep it, and the traceback of a function's error keeps those
    frames, and is kept by the error, and that by the future. It is also what the executor's future
    calls when it is done, for a method that is bound to it would be one object more.
    """

    __slots__ = ("_content",)

    def __init__(self, future: FlightFuture) -> None:
        self._content: FlightFuture | None = future

    def __call__(self, work: "Future[None] | None" = None) -> None:
        future, self._content = self._content, None
        try:
            if work is None:
                assert future is not None
                future.lead()
            elif future is not None and not future.abandoned():
                future.dropped(None if work.cancelled() else work.exception())
        finally:
            del future
