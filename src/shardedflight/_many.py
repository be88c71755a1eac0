"""Many keys in one call: some are in flight and are joined, one function finds all others.

Every key has an execution of its own, so all other calls meet it as they meet any other. What is
new here is that one caller leads and follows several at once. It runs what it leads before it waits
for what it has joined; so two calls with overlapping keys never wait for each other. While it
waits, any of the joined executions may end or may be handed over to it, in any order: it sleeps on
one waiter for all of them and reads its news.
"""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from threading import get_ident
from types import CoroutineType, TracebackType
from typing import TYPE_CHECKING, Any, cast

from ._core import End, Execution, Seat, Shard, leader_here, not_awaitable, refuse_coroutine
from ._deadlock import (
    begin_run,
    begin_wait,
    check_wait,
    closes_cycle,
    end_await,
    end_wait,
    leading_code,
    pause,
)
from ._observe import WatchedSeat, departure_from
from ._replica import Failure, traceback_of
from ._tier import Outcome, Party, token, wait, wait_async
from ._waiting import (
    Inbox,
    LoopRun,
    Sleeper,
    Waiter,
)
from .exceptions import FlightErrorGroup, shown

if TYPE_CHECKING:
    from ._flight import ShardedFlight

__all__ = ["do_many", "do_many_async"]


class _Item:
    """One key of a call."""

    __slots__ = ("error", "found", "h", "joined", "key", "led", "names", "seat", "shard")

    def __init__(self, key: Any, h: int, shard: Shard) -> None:
        #: What the caller calls it: more than one name if `build_key` makes one key of them.
        self.names: list[Any] = []
        self.h = h
        self.shard = shard
        self.key = key
        #: Which execution it is that this call leads, or was to lead.
        self.seat: Seat | None = None
        #: What it has joined.
        self.joined: Execution | None = None
        self.led = False
        #: The outcome: a value and whether it was shared, or an error, or neither: it is missing.
        self.found: tuple[Any, bool] | None = None
        self.error: Exception | None = None

    def running(self) -> tuple[Execution, ...]:
        """The record of the execution that the call leads for this key, as long as it runs."""
        return self.shard.running_as(self.h, cast("Seat", self.seat))

    def take_outcome(self) -> None:
        """Reads the outcome of the joined execution."""
        execution = cast("Execution", self.joined)
        if execution.end is End.VALUE:
            self.found = (execution.value, execution.shared)
        elif execution.end is not End.MISSING:
            self.error = cast("Exception", execution.error())


class _Batch:
    """The keys of one call, and all that does not depend on how the call waits."""

    def __init__(self, flight: "ShardedFlight", keys: Iterable[Hashable]) -> None:
        self.flight = flight
        self.items: list[_Item] = []
        #: The executions that were joined and whose outcome is not known.
        self.joined: dict[Execution, _Item] = {}
        #: What the call's own function raised.
        self.own_error: Exception | None = None
        by_key: dict[Any, _Item] = {}
        for name in keys:
            key, h, shard = flight._place((name,))
            if flight._tier is not None:
                flight._tier.check(shard, h, key)
            item = by_key.get(key)
            if item is None:
                item = by_key[key] = _Item(key, h, shard)
                self.items.append(item)
            item.names.append(name)

    def join(self, leader: tuple[Any, ...], waiter: Waiter) -> list[_Item]:
        """Joins or links all keys; returns those that the call leads.

        Args:
            leader: What follows the key in a seat.
            waiter: What the call sleeps on.
        """
        led: list[_Item] = []
        for item in self.items:
            seat = (item.key, *leader)
            item.seat = self.flight._seat(*seat) if self.flight._wraps else seat
            item.joined = item.shard.join(item.h, item.seat, waiter, None)
            item.led = item.joined is None
            if item.joined is None:
                led.append(item)
            else:
                self.joined[item.joined] = item
                if isinstance(item.joined.seat, WatchedSeat):
                    item.joined.seat.join(waiter)
        return led

    def hear(self, waiter: Sleeper | Inbox) -> list[_Item]:
        """Takes the news of joined executions; returns those that the call now leads."""
        promoted: list[_Item] = []
        while waiter.news:
            execution, leads = waiter.news.pop(0)
            item = self.joined.pop(execution, None)
            if item is None:
                continue  # told twice
            item.led = leads
            if leads:
                item.seat = execution.seat
                promoted.append(item)
            else:
                item.take_outcome()
            if isinstance(execution.seat, WatchedSeat):
                execution.seat.leave(waiter, departure_from(execution, leads))
        return promoted

    def check_wait(self, led: list[_Item], blocking: bool) -> None:
        """Raises DeadlockError if waiting for what was joined would never end."""
        if self.joined:
            first = [e for item in led for e in item.running()]
            check_wait(self.items[0].shard, tuple(self.joined), first, blocking)

    def end(self, items: list[_Item], leader: Any, found: object) -> None:
        """The function has returned: each of `items` ends with its value, or as missing."""
        answers = _answers(found, items)
        for item in items:
            name = item.names[0]
            if name in answers:
                record = self._conclude(item, leader, End.VALUE, answers[name])
                item.found = (answers[name], record is not None and record.shared)
            else:
                self._conclude(item, leader, End.MISSING)

    def take(self, leader: Any, item: _Item, outcome: Outcome) -> None:
        """Another process has found what `leader` led in this one; or a value is refused."""
        item.led = False
        if outcome.end is End.ERROR:
            item.error = outcome.value
            traceback = traceback_of(outcome.value)
            self._conclude(item, leader, End.ERROR, outcome.value, traceback)
            return
        self._conclude(item, leader, outcome.end, outcome.value)
        if outcome.end is End.VALUE:
            item.found = (outcome.value, True)

    def fail(self, items: list[_Item], leader: Any, error: BaseException) -> None:
        """The function has failed: so do all of `items`, or all are handed over."""
        if not isinstance(error, Exception):
            self.lose(items, leader)
            return
        traceback = traceback_of(error)
        if traceback is not None:
            traceback = traceback.tb_next
        for item in items:
            self._conclude(item, leader, End.ERROR, error, traceback)
            item.error = error
        self.own_error = error

    def lose(self, items: Iterable[_Item], leader: Any) -> None:
        """Hands over whatever `leader` still leads."""
        for item in items:
            self._conclude(item, leader, End.LOST)

    def _conclude(
        self,
        item: _Item,
        leader: Any,
        end: End,
        value: Any = None,
        traceback: TracebackType | None = None,
    ) -> Execution | None:
        if item.seat is None:  # interrupted before
            return None
        return self.flight._conclude(item.shard, item.h, item.seat, leader, end, value, traceback)

    def leave(self, waiter: Waiter) -> None:
        """The caller goes: leaves what it has joined, hands over what it was to lead."""
        for item in self.items:
            self.flight._withdraw(item.shard, item.h, waiter, item.joined)

    def answer(self) -> dict[Any, tuple[Any, bool]]:
        """The call's answer, once nothing is outstanding."""
        found = {n: item.found for item in self.items if item.found is not None for n in item.names}
        if any(item.error is not None and not item.led for item in self.items):
            raise FlightErrorGroup(self._failures(), found)
        if self.own_error is not None:
            raise self.own_error
        return found

    def _failures(self) -> dict[Any, Exception]:
        """One exception for each failed key. The own function's error is replicated for each."""
        failed: dict[Any, Exception] = {}
        for item in self.items:
            if item.error is None:
                continue
            for name in item.names:
                failure = Failure(item.error, traceback_of(item.error))
                error = cast("Exception", failure.replica())
                if error is not item.error:  # of a type that can not be replicated
                    error.add_note(f"key: {shown(name)}")
                failed[name] = error
        return failed

    def clear(self) -> None:
        """Drops what a traceback must not keep alive: see `Failure`."""
        for item in self.items:  # other lists have them, too
            item.error = None
        self.items.clear()
        self.joined.clear()
        self.own_error = None


def _answers(found: object, items: Sequence[_Item]) -> dict[Any, Any]:
    if not isinstance(found, Mapping):
        raise TypeError(f"the function must return a mapping of the found keys, not {found!r}")
    names = [item.names[0] for item in items]
    return {name: found[name] for name in names if name in found}


def _outcomes(items: Sequence[_Item], found: object) -> dict[_Item, Outcome]:
    """The outcomes as other processes may know them."""
    answers = _answers(found, items)
    return {
        item: Outcome(End.VALUE, answers[item.names[0]])
        if item.names[0] in answers
        else Outcome(End.MISSING)
        for item in items
    }


def _start(items: list[_Item], leader: Any) -> None:
    """Tells those who watch `items` that the function is about to run for them."""
    seats = [item.seat for item in items if isinstance(item.seat, WatchedSeat)]
    batch = tuple([seat.execution for seat in seats])
    for item in items:
        if isinstance(item.seat, WatchedSeat):
            item.seat.start(leader, batch)


def do_many(
    flight: "ShardedFlight",
    fn: Callable[[list[Any]], Mapping[Any, Any]],
    keys: Iterable[Any],
) -> dict[Any, tuple[Any, bool]]:
    batch = _Batch(flight, keys)
    sleeper = Sleeper()
    me = get_ident()
    waits: tuple[Execution, ...] = ()
    try:
        led = batch.join(leader_here(), sleeper)
        batch.check_wait(led, blocking=True)
        if led:
            sleeper.leads = led[0].seat
            _lead_all(batch, led, me, fn)
        while batch.joined:
            sleeper.leads = None
            waits = tuple(batch.joined)
            begin_wait(batch.items[0].shard, waits)
            try:
                sleeper.wait()
            finally:
                end_wait(waits)
            promoted = batch.hear(sleeper)
            for item in promoted:
                item.shard.adopt(cast("Seat", item.seat), sleeper, me)
            if promoted:
                sleeper.leads = promoted[0].seat
                _lead_all(batch, promoted, me, fn)
        return batch.answer()
    except BaseException:
        try:
            _stop(batch, sleeper, waits)
        except BaseException:  # interrupted: see Core.do
            _stop(batch, sleeper, waits)
            raise
        raise
    finally:
        batch.clear()
        waits = ()


def _stop(batch: _Batch, sleeper: Sleeper, waits: tuple[Execution, ...]) -> None:
    """The caller goes: leaves what it has joined, hands over what it leads."""
    end_wait(waits)  # that, too, may have been interrupted
    batch.leave(sleeper)
    batch.lose(batch.items, sleeper.thread)


def _lead_all(
    batch: _Batch,
    items: list[_Item],
    leader: Any,
    fn: Callable[[list[Any]], Mapping[Any, Any]],
) -> None:
    """Runs `fn` for `items`, but for those that another process finds."""
    tier = batch.flight._tier
    if tier is None:
        _lead(batch, items, leader, fn, None)
        return
    party = Party(tier, items, here=True)
    before = token.set(None)  # each key has its own
    try:
        while mine := wait(party.next(partial(batch.take, leader))):
            _lead(batch, mine, leader, fn, party)
    finally:
        token.reset(before)
        party.leave(items)


def _lead(
    batch: _Batch,
    items: list[_Item],
    leader: Any,
    fn: Callable[[list[Any]], Mapping[Any, Any]],
    party: Party | None,
) -> None:
    """Runs `fn` for `items`. Its exceptions are kept in the batch; what is none is raised."""
    try:
        _start(items, leader)
        found: Any = fn([item.names[0] for item in items])
        if type(found) is CoroutineType:
            batch.lose(items, leader)
            refuse_coroutine(found)
        if party is None:
            batch.end(items, leader, found)
            return
        refused = wait(party.finish(_outcomes(items, found)))
        _end_abroad(batch, items, leader, found, refused)
    except Exception as error:
        if not any(item.running() for item in items):
            raise  # not the function's: it was refused
        if party is not None:
            wait(party.finish(dict.fromkeys(items, Outcome(End.ERROR, error))))
        batch.fail(items, leader, error)


leading_code.add(_lead.__code__)


def _end_abroad(
    batch: _Batch,
    items: list[_Item],
    leader: Any,
    found: object,
    refused: dict[Any, Exception],
) -> None:
    """`batch.end`, when the other processes have been told; `refused` could not be told them."""
    for item, error in refused.items():
        batch.take(leader, item, Outcome(End.ERROR, error))
    batch.end([item for item in items if item not in refused], leader, found)


async def do_many_async(
    flight: "ShardedFlight",
    fn: Callable[[list[Any]], Awaitable[Mapping[Any, Any]]],
    keys: Iterable[Any],
) -> dict[Any, tuple[Any, bool]]:
    batch = _Batch(flight, keys)
    loop = asyncio.get_running_loop()
    flight._watch(loop)
    inbox = Inbox(loop)
    #: The runs of `fn`, each with what it leads, as long as their end has not been seen.
    runs: dict[LoopRun, list[_Item]] = {}
    run = LoopRun(loop)
    bell: asyncio.Future[None] | None = None
    try:
        led = batch.join((run,), inbox)
        looks = closes_cycle(batch.joined)
        if looks:
            batch.check_wait(led, blocking=False)
        if led:
            runs[run] = led
            flight._start(run, _run(batch, run, inbox, led, fn))
        while batch.joined or runs:
            bell = inbox.bell()
            if looks:
                running = [e for items in runs.values() for item in items for e in item.running()]
                begin_wait(batch.items[0].shard, (*batch.joined, *running), bell)
                try:
                    await bell
                finally:
                    end_await(bell)
            else:
                await bell
            promoted = batch.hear(inbox)
            for ended in [run for run in runs if run.done]:
                del runs[ended]
                ended.outcome()  # raises what is this caller's alone
            if promoted:
                run = LoopRun(loop)
                for item in promoted:
                    item.shard.adopt(cast("Seat", item.seat), inbox, run)
                runs[run] = promoted
                flight._start(run, _run(batch, run, inbox, promoted, fn))
        return batch.answer()
    except GeneratorExit:
        flight._on_a_thread(_leave, batch, inbox, run, runs)  # see ShardedFlight.do_async
        raise
    except BaseException:
        _leave(batch, inbox, run, runs)
        raise
    finally:
        if not runs:
            batch.clear()
        del bell, inbox  # a deadlock's error may be that of the future


async def _run(
    batch: _Batch,
    run: LoopRun,
    inbox: Inbox,
    items: list[_Item],
    fn: Callable[[list[Any]], Awaitable[Mapping[Any, Any]]],
) -> None:
    """The task of a run for many keys. What `fn` raises is kept in the batch."""
    run.pending = {id(item.seat) for item in items}
    tier = batch.flight._tier
    party = None if tier is None else Party(tier, items, here=False)
    mine = items
    try:
        if run.paused:
            await pause()
        begin_run(run)
        if party is not None:
            token.set(None)  # each key has its own
        while mine:
            if party is not None:
                mine = await wait_async(party.next(partial(batch.take, run)))
                if not mine:
                    return
            _start(mine, run)
            try:
                awaitable = fn([item.names[0] for item in mine])
                if not inspect.isawaitable(awaitable):
                    run.error = not_awaitable(awaitable)
                    batch.lose(items, run)
                    return
                found = await awaitable
                if party is None:
                    batch.end(mine, run, found)
                    return
                refused = await wait_async(party.finish(_outcomes(mine, found)))
                _end_abroad(batch, mine, run, found, refused)
            except Exception as error:
                if party is None:
                    raise
                await wait_async(party.finish(dict.fromkeys(mine, Outcome(End.ERROR, error))))
                batch.fail(mine, run, error)
    except BaseException as error:
        if isinstance(error, GeneratorExit):
            batch.flight._on_a_thread(batch.lose, items, run)
        else:
            batch.fail(items, run, error)
        if not isinstance(error, Exception):
            run.error = error
        if isinstance(error, (asyncio.CancelledError, KeyboardInterrupt, SystemExit)):
            raise
    finally:
        if party is not None:
            party.leave(items)
        run.finish()
        inbox.wake(run)
        del run, batch, items, mine, party  # the error's traceback holds this frame: see Failure


def _leave(batch: _Batch, inbox: Inbox, begun: LoopRun, runs: dict[LoopRun, list[_Item]]) -> None:
    """The caller goes. Its runs go on for those keys that somebody else still wants."""
    for run, items in runs.items():
        run.leave()
        for item in () if run.done else items:
            batch.flight._leave_leader(item.shard, item.h, cast("Seat", item.seat), run)
    batch.leave(inbox)
    if begun not in runs:  # or has been seen to end: then there is nothing left to lose
        batch.lose(batch.items, begun)
    runs.clear()
