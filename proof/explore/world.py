"""What the callers of one run do and see, compared with the contract.

A scenario makes its flight and its callers here. Each call keeps when it began and ended and what
came of it; each function that runs keeps the same. While the run goes on, and when it is over, that
is held against the contract: see `World.step` and `World.check`.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import shardedflight._core as core
import shardedflight._deadlock as deadlock
from shardedflight import DeadlockError, FlightTimeout, ShardedFlight
from shardedflight.exceptions import FlightErrorGroup

from .primitives import Loop, Pool
from .scheduler import Actor, Scheduler

__all__ = ["Call", "Lost", "Run", "World"]


class Lost(BaseException):
    """Loses a leader."""


class Failed(Exception):
    """A function's failure; its argument is the run."""


class Key:
    """A key; all of them have one hash."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and other.name == self.name

    def __hash__(self) -> int:
        return 1


class Wrong(Exception):
    """The run is against the contract."""


@dataclass(eq=False)
class Call:
    """A caller's call for one key."""

    key: Any
    begin: int
    timeout: float | None = None
    #: Somebody may cancel it.
    cancelled: bool = False
    end: int | None = None
    value: Any = None
    shared: bool | None = None
    error: BaseException | None = None
    runs: "list[Run]" = field(default_factory=list)


@dataclass(eq=False)
class Run:
    """A function that runs for a call; also the value that it returns."""

    key: Any
    call: Call
    begin: int
    thread: int = field(default_factory=get_ident)
    end: int | None = None
    how: str = ""


@dataclass
class Forget:
    """A call of `forget`."""

    key: Any
    begin: int
    end: int | None = None


Inside = Callable[[], object] | None


class World:
    """One run of a scenario."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.calls: list[Call] = []
        self.runs: list[Run] = []
        self.forgets: list[Forget] = []
        self.flight: ShardedFlight = ShardedFlight(1, executor=Pool())
        self._shard = self.flight._shard_at(0)
        self._time = 0
        #: How many functions have begun, by key and (None) in all; and how many calls have ended.
        self._begun: Counter[Any] = Counter()
        self._ended = 0
        #: Calls may raise DeadlockError here; how many of them the flight has to have found.
        self.deadlocks: tuple[int, int] | None = None
        #: What else has to be true at the end.
        self.finally_: list[Callable[[], None]] = []
        scheduler.check = self.step
        scheduler.check_quiet = self.quiet

    def _tick(self) -> int:
        self._time += 1
        return self._time

    # -- what a scenario is made of -----------------------------------------------------------

    def thread(self, *bodies: Callable[[], object], name: str = "caller") -> Actor:
        """A thread that does these things, one after another."""

        def body() -> None:
            for do in bodies:
                do()

        return self.scheduler.start(body, name)

    def loop(self, *mains: Callable[[], Coroutine[Any, Any, Any]], name: str = "loop") -> Actor:
        """A thread with an event loop that runs these coroutines at once."""

        async def main() -> None:
            await asyncio.gather(*[main() for main in mains], return_exceptions=True)

        return self.scheduler.start(lambda: self.run(main), name)

    def run(self, main: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """The actor runs an event loop until this coroutine is through."""
        loop = Loop()
        loop.set_exception_handler(lambda *_: None)  # tasks that are pending when it is closed
        try:
            loop.run_until_complete(main())
        finally:
            loop.close()

    def until(self, condition: Callable[[], bool]) -> None:
        """The actor waits until that is true."""
        if not self.scheduler.aside(condition):
            self.scheduler.block(condition, "the scenario's own condition")

    def begun(self, number: int = 1, key: Any = None) -> None:
        """The actor waits until so many functions have been begun."""
        self.until(lambda: self._begun[key] >= number)

    def ended(self, number: int = 1) -> None:
        """The actor waits until so many calls have ended."""
        self.until(lambda: self._ended >= number)

    def waiting(self, number: int = 1) -> None:
        """The actor waits until so many callers wait for another one, or have come and gone."""
        self.until(lambda: self._waiting() + self._ended >= number)

    def _waiting(self) -> int:
        # As `Shard.waiting`, which is slower: it is traced.
        return sum([len(r.waiters) for r in self._shard.met.values() if r.end is None])

    @property
    def forgotten(self) -> bool:
        """Whether a key has been forgotten."""
        return any(forget.end is not None for forget in self.forgets)

    @property
    def busy(self) -> bool:
        """Whether anything is in flight."""
        return bool(self._shard.table or self._shard.overflow)

    # -- calls --------------------------------------------------------------------------------

    def do(
        self,
        key: Any,
        *,
        inside: Inside = None,
        error: type[BaseException] | None = None,
        timeout: float | None = None,
    ) -> Call:
        """`do`, on this thread. Its function does `inside` and then raises, if that is given."""
        call = self._call(key, timeout)
        return self._outcome(
            call, lambda: self.flight.do(self._fn(call, inside, error), key, timeout=timeout)
        )

    def many(self, *keys: Any, inside: Inside = None) -> list[Call]:
        """`do_many`: a call for each key."""
        calls = {key: self._call(key, None) for key in keys}

        def fn(asked: list[Any]) -> dict[Any, Any]:
            begun = [self._begin(calls[key]) for key in asked]
            self.scheduler.step()
            if inside is not None:
                inside()
            for run in begun:
                self._end(run, "value")
            return {run.key: run for run in begun}

        try:
            found: dict[Any, Any] = self.flight.do_many(fn, keys)
            failed: dict[Any, Any] = {}
        except FlightErrorGroup as group:
            found, failed = dict(group.found), {}
            for call in calls.values():
                call.error = None if call.key in found else group
        except BaseException as raised:
            found, failed = {}, dict.fromkeys(keys, raised)
        for key, call in calls.items():
            if key in found:
                call.value, call.shared = found[key]
            call.error = failed.get(key, call.error)
            self._over(call)
        return list(calls.values())

    async def do_async(
        self,
        key: Any,
        *,
        inside: Callable[[], Coroutine[Any, Any, Any]] | None = None,
        error: type[BaseException] | None = None,
        may_be_cancelled: bool = False,
    ) -> Call:
        """`do_async`, in this task."""
        call = self._call(key, None)
        call.cancelled = may_be_cancelled

        async def fn() -> Run:
            run = self._begin(call)
            how = "lost"
            try:
                self.scheduler.step()
                if inside is not None:
                    await inside()
                if error is not None:
                    how = "error" if issubclass(error, Exception) else how
                    raise error(run)
                how = "value"
                return run
            finally:
                self._end(run, how)

        try:
            call.value, call.shared = await self.flight.do_async(fn, key)
        except BaseException as raised:
            call.error = raised
            if isinstance(raised, asyncio.CancelledError):
                raise
        finally:
            self._over(call)
        return call

    def future(
        self, key: Any, *, inside: Inside = None, error: type[BaseException] | None = None
    ) -> "tuple[Call, Future[Any]]":
        """`do_future`. See `result`."""
        call = self._call(key, None)
        return call, self.flight.do_future(self._fn(call, inside, error), key)

    def result(self, call: Call, future: "Future[Any]") -> Call:
        """Waits for what `future` has made."""
        return self._outcome(call, future.result)

    def forget(self, key: Any) -> None:
        """`forget`."""
        forget = Forget(key, self._tick())
        self.forgets.append(forget)
        self.flight.forget(key)
        forget.end = self._tick()

    def _call(self, key: Any, timeout: float | None) -> Call:
        call = Call(key, self._tick(), timeout)
        self.calls.append(call)
        return call

    def _over(self, call: Call) -> None:
        call.end = self._tick()
        self._ended += 1

    def _outcome(self, call: Call, ask: Callable[[], Any]) -> Call:
        try:
            call.value, call.shared = ask()
        except BaseException as raised:
            call.error = raised
        self._over(call)
        return call

    def _fn(
        self, call: Call, inside: Inside, error: type[BaseException] | None
    ) -> Callable[[], Any]:
        def fn() -> Run:
            run = self._begin(call)
            how = "lost"
            try:
                self.scheduler.step()
                if inside is not None:
                    inside()
                if error is not None:
                    raise error(run)
                how = "value"
                return run
            except Exception:
                how = "error"
                raise
            finally:
                self._end(run, how)

        return fn

    # -- what is wrong ------------------------------------------------------------------------

    def _begin(self, call: Call) -> Run:
        """2: "at most one execution is joinable at any time": others must have been given up."""
        run = Run(call.key, call, self._tick())
        call.runs.append(run)
        self._begun[None] += 1
        self._begun[run.key] += 1
        self.runs.append(run)
        active = [other for other in self.runs if other.key == run.key and other.end is None]
        if sum(not self._given_up(other) for other in active) > 1:
            self.scheduler.fail(f"{len(active)} functions run for {run.key!r} at once")
        return run

    def _given_up(self, run: Run) -> bool:
        """Whether its execution may be one that was forgotten, or abandoned."""
        # Not `run.begin`: it may have taken over from one that was forgotten with its followers.
        # And `forget` may find what has begun while it looked.
        return any(
            forget.key == run.key and (forget.end is None or forget.end > run.call.begin)
            for forget in self.forgets
        ) or any(call.key == run.key and call.cancelled for call in self.calls)

    def _end(self, run: Run, how: str) -> None:
        run.end = self._tick()
        run.how = how

    def step(self) -> None:
        """At every step: of the executions of one key whose functions run one can be joined."""
        overflow = self._shard.overflow
        if not overflow:  # two of one key have one hash, and the table has one place for each
            return
        active = {id(run.call) for run in self.runs if run.end is None}
        if len(active) < 2:
            return
        joinable: list[Any] = []
        for _, seat in self._shard.executions():
            record = self._shard.met.get(id(seat))
            if (record is None or record.joinable) and self._leads(seat, record):
                joinable.append(seat[0])
        for key in joinable:
            if joinable.count(key) > 1:
                self.scheduler.fail(f"two executions of {key!r} can be joined")

    def _leads(self, seat: Any, record: Any) -> bool:
        """Whether its function runs: before, a seat may be taken back."""
        leader = seat[1] if record is None else record.leader
        thread = leader if isinstance(leader, int) else getattr(leader, "thread", None)
        return any(
            run.end is None and run.key == seat[0] and run.thread == thread for run in self.runs
        )

    def quiet(self) -> None:
        """Only those go on whose time is up: nobody of them may wait for what has ended."""
        if not self._shard.table and not self._shard.overflow:
            self.scheduler.fail("somebody waits, and nothing is in flight")

    def check(self) -> None:
        """At the end: every call has an outcome that the contract allows, and nothing is left.

        Raises:
            Wrong: What is not so.
        """
        for call in self.calls:
            self._check_call(call)
        self._check_shared()
        self._check_left()
        self._check_stats()
        for check in self.finally_:
            check()

    def _check_call(self, call: Call) -> None:
        if call.end is None:
            raise Wrong(f"a call for {call.key!r} has not ended")
        if len(call.runs) > 1:
            raise Wrong(f"the function of one call for {call.key!r} has run {len(call.runs)} times")
        error = call.error
        if error is None:
            if not isinstance(call.value, Run) or not isinstance(call.shared, bool):
                raise Wrong(f"{call.value!r}, {call.shared!r} is no outcome")
            self._check_source(call, call.value, "value")
        elif isinstance(error, Failed):
            self._check_source(call, error.args[0], "error")
        elif isinstance(error, Lost):
            self._check_own(call, error.args[0])
        elif isinstance(error, FlightTimeout):
            if call.timeout is None or call.runs:
                raise Wrong(f"{error!r} of a call that is not to time out")
        elif isinstance(error, (asyncio.CancelledError, CancelledError)):
            if not call.cancelled:
                raise Wrong("CancelledError, and nobody has cancelled the call")
        elif not isinstance(error, DeadlockError) or self.deadlocks is None:
            raise Wrong(f"a call for {call.key!r} ended with {error!r}") from error

    def _check_own(self, call: Call, run: Run) -> None:
        if run not in call.runs:
            raise Wrong("the loss of a leader has come to another caller")

    def _check_source(self, call: Call, run: Run, how: str) -> None:
        """Its outcome comes from a run that it could join."""
        if run.key != call.key or run.how != how:
            raise Wrong(f"the call for {call.key!r} has got the {how} of {run!r}")
        if call.runs and run not in call.runs:
            raise Wrong(f"the call for {call.key!r} has run its function and has another's {how}")
        if run.call.end is not None and run.call.end < call.begin and not run.call.cancelled:
            raise Wrong(f"the call for {call.key!r} has got an outcome from before it began")
        for forget in self.forgets:
            if (
                forget.key == call.key
                and run.begin < forget.begin
                and forget.end is not None
                and forget.end < call.begin
            ):
                raise Wrong(f"the call for {call.key!r} has joined what was forgotten")

    def _check_shared(self) -> None:
        for run in self.runs:
            served = [call for call in self.calls if call.value is run]
            # One that leaves as the execution ends may have been counted.
            unsure = self.deadlocks is not None or any(call.cancelled for call in self.calls)
            for call in served:
                if call.shared is not (len(served) > 1) and not (call.shared and unsure):
                    raise Wrong(f"shared is {call.shared} of an outcome for {len(served)} callers")

    def _check_left(self) -> None:
        shard = self._shard
        for name in ("table", "met", "overflow", "any_met", "any_beside"):
            left = getattr(shard, name)
            if left:
                raise Wrong(f"{name} is {left!r} at the end")
        if any(deadlock._blocked) or core.late:
            raise Wrong(f"there is still {deadlock._blocked!r}, {core.late!r}")

    def _check_stats(self) -> None:
        stats = self.flight.stats()
        errors = [call.error for call in self.calls]
        runs = len(self.runs)
        served = sum(
            bool(call.end) and not call.runs and (call.value is not None or _is_failure(call.error))
            for call in self.calls
        )
        expected: dict[str, Iterable[int]] = {
            "in_flight": [0],
            "waiting": [0],
            "executions": [runs],
            "shared": [served],
            "errors": [sum(run.how == "error" for run in self.runs)],
            "timeouts": [sum(isinstance(error, FlightTimeout) for error in errors)],
            "forgotten": range(len(self.forgets) + 1),
        }
        if any(call.cancelled for call in self.calls):
            # A caller may have been served and cancelled before it heard of it; and a run that was
            # abandoned before its first step is an execution without a function.
            expected["shared"] = range(served, len(self.calls))
            expected["executions"] = range(runs, len(self.calls) + 1)
            del expected["errors"]
        if self.deadlocks is not None:
            low, high = self.deadlocks
            expected["deadlocks"] = range(low, high + 1)
            del expected["errors"], expected["shared"]
        for name, allowed in expected.items():
            if getattr(stats, name) not in allowed:
                raise Wrong(f"stats().{name} is {getattr(stats, name)}, not {list(allowed)}")


def _is_failure(error: BaseException | None) -> bool:
    return isinstance(error, (Failed, FlightErrorGroup))
