"""One window of the soak: callers of all kinds on one flight at once, recorded as a history."""

import asyncio
import contextlib
import faulthandler
import gc
import os
import signal
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, wait
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Any

from proof.histories import Call, End, Execution, Forget, History, NamedError, Outcome
from shardedflight import (
    DeadlockError,
    FlightErrorGroup,
    FlightTimeout,
    RemoteError,
    ShardedFlight,
    coalesce,
)
from shardedflight._threads import current_frames

from .keys import KEYS, PLAIN_KEYS, Exit, Interrupt, Key, Lost, Plan

__all__ = ["PATIENCE", "HungError", "Mix", "Mood", "watch_forgets"]

#: Seconds after which a caller that has not come back is taken for hung.
PATIENCE = 60.0


@dataclass(frozen=True, slots=True)
class Mood:
    """What happens in a window.

    Attributes:
        name: As printed.
        leaving: Callers are cancelled, futures too; keys are forgotten by anybody; event loops are
            closed under their tasks. What `stats()` says of some of these calls can not be known
            from outside. Without it every total has to be equal.
        meets: The flight has a backend, where it meets those of the other processes.
        observed: An observer is told of everything.
    """

    name: str
    leaving: bool = False
    meets: bool = False
    observed: bool = False


class HungError(Exception):
    """Callers that do not come back. Says where everybody is."""


#: What is being forgotten.
_forgetting: ContextVar[Forget | None] = ContextVar("forgetting", default=None)


def watch_forgets(backend: Any) -> None:
    """Has the history know when the backend has forgotten: an event loop's thread does not wait."""
    forget = backend.forget

    def watched(name: bytes, lead: Any = None) -> "Future[None]":
        done: Future[None] = forget(name, lead)
        noted = _forgetting.get()
        if noted is not None:
            done.add_done_callback(lambda _: setattr(noted, "ended", time.monotonic_ns()))
        return done

    backend.forget = watched


#: Which call a function that `coalesce` runs belongs to: it runs in its caller's context.
_call: ContextVar[tuple[Call, Plan]] = ContextVar("call")


class Mix:
    """The callers of one window.

    Args:
        flight: What they call.
        history: Where they record.
        mood: What happens.
        seed: Of all random choices. Who is how fast is not among them.
        size: How many threads, and how many event loops; each loop has twice as many tasks.
        most: So many calls, about, are enough.
        forks: Whether to fork.
        quiet: Whether whoever else watches has heard everything.
    """

    def __init__(
        self,
        flight: ShardedFlight,
        history: History,
        mood: Mood,
        seed: str,
        *,
        size: int = 4,
        most: int = 20_000,
        forks: bool = True,
        quiet: Callable[[], bool] = lambda: True,
    ) -> None:
        self.flight = flight
        self.history = history
        self.mood = mood
        self.seed = seed
        self.size = size
        self.most = most
        self.forks = forks and hasattr(os, "fork")
        self.quiet = quiet
        self.keys = PLAIN_KEYS if mood.meets else KEYS
        self.singles = [key for key in self.keys if len(key.parts) == 1]
        self.stop = threading.Event()
        #: What must not happen at all, as text.
        self.faults: list[str] = []
        #: How many coroutines of functions were cancelled from outside.
        self.cancelled: list[Execution] = []
        #: How many executions have forgotten themselves.
        self.forgot_itself: list[Execution] = []
        #: How many children were forked and have ended well.
        self.children: list[int] = []
        self._loops: list[asyncio.AbstractEventLoop] = []
        self._coalesced = coalesce(flight=flight, timeout=30.0)(self._coalesced_body)
        self._coalesced_async = coalesce(flight=flight)(self._coalesced_async_body)

    # -- the window -------------------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        """Has everybody call for so many seconds, and waits until all is quiet.

        Raises:
            HungError: Somebody does not come back.
        """
        bodies: list[tuple[Callable[[Random], None], str]] = []
        bodies += [(self._thread, f"thread {n}") for n in range(self.size)]
        bodies += [(self._loop, f"loop {n}") for n in range(max(1, self.size // 2))]
        if self.mood.leaving:
            bodies.append((self._doomed_loops, "doomed loops"))
        if self.forks:
            bodies.append((self._forker, "forker"))
        threads = [
            threading.Thread(target=self._guarded, args=body, name=body[1], daemon=True)
            for body in bodies
        ]
        for thread in threads:
            thread.start()
        begun = time.monotonic()
        while time.monotonic() < begun + seconds and len(self.history.calls) < self.most:
            time.sleep(0.02)
        self.stop.set()
        deadline = time.monotonic() + PATIENCE
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise HungError(self._where(f"{thread.name} does not end"))
        # What is left of closed loops is collected, and its end told on other threads, unless a
        # traceback keeps it.
        for execution in list(self.history.executions.values()):
            if isinstance(execution.thing, BaseException):
                execution.thing.__traceback__ = None
        gc.collect()
        while self._busy():
            gc.collect()
            time.sleep(0.01)
            if time.monotonic() > deadline:
                raise HungError(self._where(f"not quiet: {self._busy()}"))

    def _busy(self) -> str:
        stats = self.flight.stats()
        open_calls = sum(call.outcome is None for call in self.history.calls)
        if open_calls or stats.in_flight or stats.waiting:
            return f"{open_calls} calls without outcome, {stats}"
        return "" if self.quiet() else "an observer has not heard of every end"

    def _where(self, what: str) -> str:
        lines = [what, f"window {self.seed}, {self.flight.stats()}"]
        lines += [str(call) for call in self.history.calls if call.outcome is None][:50]
        lines += [str(e) for e in self.history.executions.values() if e.end is None][:50]
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for ident, frame in current_frames().items():
            lines.append(f"thread {names.get(ident, ident)}:")
            lines += [line.rstrip() for line in traceback.format_stack(frame)]
        for loop in self._loops:
            for task in asyncio.all_tasks(loop) if not loop.is_closed() else ():
                lines.append(f"task {task!r}:")
                for frame in task.get_stack():
                    lines += [line.rstrip() for line in traceback.format_stack(frame)]
        return "\n".join(lines)

    def _guarded(self, body: Callable[[Random], None], name: str) -> None:
        try:
            body(Random(f"{self.seed} {name}"))
        except BaseException:
            self.faults.append(f"{name} of window {self.seed}: {traceback.format_exc()}")
            self.stop.set()

    # -- functions --------------------------------------------------------------------------------

    def _plan(self, random: Random, key: Key, *, coroutine: bool) -> Plan:
        plan = Plan.draw(random, self.keys, key, coroutine=coroutine)
        # Deadlocks across processes are not found, as docs/tiers.md says.
        return replace(plan, nested=None) if self.mood.meets else plan

    def _plain(self, call: Call, key: Key, plan: Plan, random: Random) -> Callable[[], Any]:
        """A function for `do` and `do_future`."""

        def function() -> Any:
            execution = self.history.begin(call)
            if plan.pause:
                time.sleep(plan.pause)
            if plan.forgets:
                self.forgot_itself.append(execution)
                self._forget(key)
            if plan.forks:
                self._fork()
            if plan.nested is not None:
                self._do(random, plan.nested, self._flat(random))
            return self._finish(execution, plan, random)

        return function

    def _finish(self, execution: Execution, plan: Plan, random: Random) -> Any:
        if plan.end == "value":
            return self.history.value(execution)
        if plan.end == "error":
            raise self.history.error(execution)
        self.history.end(execution, End.LOST)
        if plan.end == "wrong":
            return self._nothing()
        raise random.choice((Lost, Interrupt, Exit))(execution.number)

    async def _nothing(self) -> None:
        pass

    def _coroutine(
        self, call: Call, plan: Plan, key: Key, random: Random
    ) -> Callable[[], Awaitable[Any]]:
        """A function for `do_async`."""

        async def function() -> Any:
            execution = self.history.begin(call)
            return await self._awaited(execution, plan, key, random)

        def wrong() -> Any:
            self.history.end(self.history.begin(call), End.LOST)

        return wrong if plan.end == "wrong" else function

    async def _awaited(self, execution: Execution, plan: Plan, key: Key, random: Random) -> Any:
        try:
            if plan.pause:
                await asyncio.sleep(plan.pause)
            if plan.forgets:
                self.forgot_itself.append(execution)
                self._forget(key)
            if plan.nested is not None:
                await self._do_async(random, plan.nested, self._flat(random))
        except asyncio.CancelledError:
            self.cancelled.append(execution)
            self.history.end(execution, End.LOST)
            raise
        except GeneratorExit:  # its loop was closed
            self.history.end(execution, End.LOST)
            raise
        if plan.end == "value":
            return self.history.value(execution)
        if plan.end == "error":
            raise self.history.error(execution)
        self.history.end(execution, End.LOST)
        if plan.end == "cancel":
            raise asyncio.CancelledError
        raise Lost(execution.number)

    def _flat(self, random: Random) -> Plan:
        """What a function does that another function waits for."""
        return Plan(random.choice((0, 0.0005)), random.choice(("value", "value", "error")))

    # -- outcomes ---------------------------------------------------------------------------------

    def _failed(self, call: Call, key: Key, error: BaseException) -> None:
        """A call for one key has raised."""
        history = self.history
        if call.outcome is Outcome.CLOSED:
            return
        if isinstance(error, (NamedError, RemoteError)):
            history.raised(call, error)
        elif isinstance(error, Lost):
            history.gone(call, Outcome.OWN, error.args[0])
        elif isinstance(error, FlightTimeout):
            history.gone(call, Outcome.TIMED_OUT)
        elif isinstance(error, DeadlockError):
            history.gone(call, Outcome.REFUSED)
        elif isinstance(error, KeyError) and error.args[0] in (_public(key), key.parts):
            history.missed(call)
        elif isinstance(error, TypeError) and call.led and "the function returned" in str(error):
            history.gone(call, Outcome.OWN, call.led[0])
        elif isinstance(error, asyncio.CancelledError):
            own = call.leaving is None and call.led
            history.gone(call, Outcome.OWN if own else Outcome.LEFT, call.led[0] if own else None)
        elif isinstance(error, GeneratorExit):
            history.gone(call, Outcome.CLOSED)
        else:
            history.gone(call, Outcome.LEFT)
            self.faults.append(f"{call}: {''.join(traceback.format_exception(error))}")

    def _returned(self, call: Call, value: Any, shared: bool | None) -> None:
        if call.outcome is not Outcome.CLOSED:
            self.history.returned(call, value, shared)

    # -- calls of threads -------------------------------------------------------------------------

    def _thread(self, random: Random) -> None:
        futures: list[Future[Any]] = []
        while not self.stop.is_set():
            key = random.choice(self.keys)
            what = random.random()
            if what < 0.45:
                self._do(random, key, self._plan(random, key, coroutine=False))
            elif what < 0.65:
                futures.append(self._do_future(random, key))
            elif what < 0.8:
                self._do_many(random)
            elif what < 0.87 and not self.mood.meets:
                self._call_coalesced(random)
            elif what < 0.92 and self.mood.leaving:
                self._forget(key)
                time.sleep(random.uniform(0, 0.002))
            elif what < 0.97:
                self._look()
            elif self.mood.leaving and futures:
                self._cancel(random.choice(futures))
            if len(futures) > 8:
                done, _ = wait(futures[:4], timeout=random.uniform(0, 0.01))
                futures = [future for future in futures if future not in done]
                if len(futures) > 32:
                    wait(futures, timeout=PATIENCE)
        wait(futures, timeout=PATIENCE)

    def _do(self, random: Random, key: Key, plan: Plan) -> None:
        timeout = random.choice((None, None, None, 0, random.uniform(0, 0.002), 5))
        call = self.history.invoke(key.text, "do")
        try:
            value, shared = self.flight.do(
                self._plain(call, key, plan, random), *key.parts, timeout=timeout
            )
        except BaseException as error:
            self._failed(call, key, error)
        else:
            self._returned(call, value, shared)

    def _do_future(self, random: Random, key: Key) -> "Future[Any]":
        plan = self._plan(random, key, coroutine=False)
        # A thread of the pool that waited for a function that the pool has not begun would be a
        # deadlock that nobody sees.
        plan = Plan(plan.pause, plan.end, forgets=plan.forgets)
        call = self.history.invoke(key.text, "do_future")
        future = self.flight.do_future(self._plain(call, key, plan, random), *key.parts)
        future.call = call  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
        future.add_done_callback(partial(self._future_done, call, key))
        return future

    def _future_done(self, call: Call, key: Key, future: "Future[Any]") -> None:
        if future.cancelled():
            self.history.gone(call, Outcome.LEFT)
            return
        error = future.exception()
        if error is not None:
            self._failed(call, key, error)
        else:
            self._returned(call, *future.result())

    def _cancel(self, future: "Future[Any]") -> None:
        call: Call = future.call  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
        if call.leaving is None:
            call.leaving = time.monotonic_ns()
        if future.cancel():
            call.ended = time.monotonic_ns()  # its callbacks came before it had left

    def _call_coalesced(self, random: Random) -> None:
        name = random.choice("xyz")
        plan = self._plan(random, KEYS[0], coroutine=False)
        plan = Plan(plan.pause, plan.end)
        key = Key(f"coalesced {name}", ())
        call = self.history.invoke(key.text, "coalesce")
        token = _call.set((call, plan))
        try:
            value = self._coalesced(name)
        except BaseException as error:
            self._failed(call, key, error)
        else:
            self._returned(call, value, None)
        finally:
            _call.reset(token)

    def _coalesced_body(self, name: str) -> Any:
        call, plan = _call.get()
        execution = self.history.begin(call)
        if plan.pause:
            time.sleep(plan.pause)
        return self._finish(execution, plan, Random(name))

    def _forget(self, key: Key) -> None:
        # Other processes hear of it a moment later; and an event loop's thread does not wait.
        scope = "all"
        if self.mood.meets:
            scope = "process" if asyncio._get_running_loop() is None else "nobody"
        forget = self.history.forget(key.text, scope)
        before = _forgetting.set(forget)
        try:
            self.flight.forget(*key.parts)
        finally:
            _forgetting.reset(before)
        # Until it returns it forgets who asks the backend meanwhile, whenever that had been told.
        if scope != "nobody" or forget.ended is not None:
            forget.ended = time.monotonic_ns()

    def _look(self) -> None:
        """Totals never go backwards."""
        one, other = self.flight.stats(), self.flight.stats()
        for name in ("executions", "shared", "errors", "promotions", "timeouts", "abandoned"):
            if getattr(one, name) > getattr(other, name):
                self.faults.append(f"stats().{name} went backwards: {one} {other}")
        if self.flight.in_flight() < 0 or repr(self.flight) == "":
            self.faults.append("in_flight is negative")

    # -- many keys --------------------------------------------------------------------------------

    def _many_plan(self, random: Random) -> tuple[list[Key], Plan]:
        keys = random.sample(self.singles, random.randint(1, 3))
        ends = ("value", "value", "missing", "error", "lost" if self.mood.leaving else "value")
        return keys, Plan(random.choice((0, random.uniform(0, 0.003))), random.choice(ends))

    def _invoke_many(self, keys: list[Key], how: str) -> dict[Any, Call]:
        return {key.parts[0]: self.history.invoke(key.text, how) for key in keys}

    def _do_many(self, random: Random) -> None:
        keys, plan = self._many_plan(random)
        calls = self._invoke_many(keys, "do_many")

        def function(names: list[Any]) -> dict[Any, Any]:
            executions = {name: self.history.begin(calls[name]) for name in names}
            if plan.pause:
                time.sleep(plan.pause)
            return self._finish_many(executions, plan)

        try:
            found = self.flight.do_many(function, [*calls, *list(calls)[:1]])
        except BaseException as error:
            self._many_failed(calls, error)
        else:
            self._many_found(calls, found)

    def _finish_many(self, executions: dict[Any, Execution], plan: Plan) -> dict[Any, Any]:
        if plan.end == "error":
            raise self.history.error(*executions.values())
        if plan.end == "lost":
            for execution in executions.values():
                self.history.end(execution, End.LOST)
            raise Lost(*(execution.number for execution in executions.values()))
        found: dict[Any, Any] = {"nobody asked": "for this"}
        for number, (name, execution) in enumerate(executions.items()):
            if plan.end == "missing" and number == 0:
                self.history.end(execution, End.MISSING)
            else:
                found[name] = self.history.value(execution)
        return found

    def _many_found(self, calls: dict[Any, Call], found: dict[Any, tuple[Any, bool]]) -> None:
        for name, call in calls.items():
            if name in found:
                self._returned(call, *found[name])
            elif call.outcome is not Outcome.CLOSED:
                self.history.missed(call)

    def _many_failed(self, calls: dict[Any, Call], error: BaseException) -> None:
        history = self.history
        if isinstance(error, FlightErrorGroup):
            for name, call in calls.items():
                if name in error.failed:
                    failure = error.failed[name]
                    if isinstance(failure, (NamedError, RemoteError)):
                        history.raised(call, failure, replica=True)
                    else:
                        history.gone(call, Outcome.UNTOLD)
                        self.faults.append(f"{call}: {failure!r}")
                elif name in error.found:
                    history.returned(call, *error.found[name])
                else:
                    history.missed(call)
            return
        for call in calls.values():
            if call.outcome is Outcome.CLOSED:
                continue
            led = history.executions[call.led[0]] if call.led else None
            if isinstance(error, NamedError):
                if led is not None and led.thing is error:
                    history.raised(call, error)
                else:
                    history.gone(call, Outcome.UNTOLD)
            elif isinstance(error, Lost):
                own = led is not None and led.number in error.args
                if not own:  # with one run of its function lost, it leaves the others
                    lost = history.executions[error.args[0]]
                    call.leaving = call.leaving or lost.ended or call.begun
                history.gone(call, Outcome.OWN if own else Outcome.LEFT)
            elif isinstance(error, DeadlockError):
                call.leaving = call.leaving or call.begun
                history.gone(call, Outcome.LEFT)
            elif isinstance(error, asyncio.CancelledError):
                history.gone(call, Outcome.LEFT)
            elif isinstance(error, GeneratorExit):
                history.gone(call, Outcome.CLOSED)
            else:
                history.gone(call, Outcome.LEFT)
                self.faults.append(f"{call}: {''.join(traceback.format_exception(error))}")

    # -- calls of coroutines ----------------------------------------------------------------------

    def _loop(self, random: Random) -> None:
        async def main() -> None:
            self._loops.append(asyncio.get_running_loop())
            async with asyncio.TaskGroup() as group:
                for _ in range(2 * self.size):
                    group.create_task(self._task(Random(random.random())))
            # The flight's own, of those whom nobody on this loop waits for.
            while len(asyncio.all_tasks()) > 1:  # noqa: ASYNC110 - they are not ours to tell us
                await asyncio.sleep(0.001)

        asyncio.run(main())

    async def _task(self, random: Random) -> None:
        while not self.stop.is_set():
            key = random.choice(self.keys)
            what = random.random()
            if what < 0.55:
                plan = self._plan(random, key, coroutine=True)
                await self._leaving(random, self._do_async(random, key, plan))
            elif what < 0.7:
                await self._leaving(random, self._do_many_async(random))
            elif what < 0.8 and not self.mood.meets:
                await self._leaving(random, self._call_coalesced_async(random))
            elif what < 0.9:
                future = asyncio.wrap_future(self._do_future(random, key))
                with contextlib.suppress(Exception, asyncio.CancelledError, Lost):
                    await future
            elif what < 0.93 and not self.mood.meets:  # as _plan
                self._do(random, key, self._flat(random))
            await asyncio.sleep(random.choice((0, 0, random.uniform(0, 0.002))))

    async def _leaving(self, random: Random, caller: Any) -> None:
        """Awaits a caller, which may be told to leave."""
        if not self.mood.leaving or random.random() < 0.75:
            await caller
            return
        task = asyncio.create_task(caller)
        delay = random.choice((0, random.uniform(0, 0.004)))
        handle = asyncio.get_running_loop().call_later(delay, self._leave, task)
        await asyncio.wait([task])
        handle.cancel()
        if not task.cancelled():  # one that had not begun
            task.result()

    def _leave(self, task: "asyncio.Task[None]") -> None:
        for call in getattr(task, "calls", ()):
            call.leaving = time.monotonic_ns()
        task.cancel()

    def _may_leave(self, *calls: Call) -> None:
        """These are the calls of this task."""
        task: Any = asyncio.current_task()
        if current_nesting.get() == 0:
            task.calls = calls

    async def _do_async(self, random: Random, key: Key, plan: Plan) -> None:
        call = self.history.invoke(key.text, "do_async")
        self._may_leave(call)
        token = current_nesting.set(current_nesting.get() + 1)
        try:
            value, shared = await self.flight.do_async(
                self._coroutine(call, plan, key, random), *key.parts
            )
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and plan.end != "cancel":
                call.leaving = call.leaving or call.begun
            self._failed(call, key, error)
            if isinstance(error, GeneratorExit) or (
                isinstance(error, asyncio.CancelledError) and current_nesting.get() > 1
            ):
                raise
        else:
            self._returned(call, value, shared)
        finally:
            with contextlib.suppress(ValueError):  # closed from elsewhere
                current_nesting.reset(token)

    async def _do_many_async(self, random: Random) -> None:
        keys, plan = self._many_plan(random)
        calls = self._invoke_many(keys, "do_many_async")
        self._may_leave(*calls.values())

        async def function(names: list[Any]) -> dict[Any, Any]:
            executions = {name: self.history.begin(calls[name]) for name in names}
            try:
                if plan.pause:
                    await asyncio.sleep(plan.pause)
            except (asyncio.CancelledError, GeneratorExit) as error:
                if isinstance(error, asyncio.CancelledError):
                    self.cancelled.extend(executions.values())
                for execution in executions.values():
                    self.history.end(execution, End.LOST)
                raise
            return self._finish_many(executions, plan)

        try:
            found = await self.flight.do_many_async(function, list(calls))
        except BaseException as error:
            self._many_failed(calls, error)
            if isinstance(error, GeneratorExit):
                raise
        else:
            self._many_found(calls, found)

    async def _call_coalesced_async(self, random: Random) -> None:
        name = random.choice("xyz")
        plan = Plan(random.uniform(0, 0.003), random.choice(("value", "value", "error", "lost")))
        key = Key(f"coalesced async {name}", ())
        call = self.history.invoke(key.text, "coalesce async")
        self._may_leave(call)
        token = _call.set((call, plan))
        try:
            value = await self._coalesced_async(name)
        except BaseException as error:
            self._failed(call, key, error)
            if isinstance(error, GeneratorExit):
                raise
        else:
            self._returned(call, value, None)
        finally:
            with contextlib.suppress(ValueError):
                _call.reset(token)

    async def _coalesced_async_body(self, name: str) -> Any:
        call, plan = _call.get()
        return await self._awaited(self.history.begin(call), plan, KEYS[0], Random(name))

    # -- event loops that are closed under their tasks --------------------------------------------

    def _doomed_loops(self, random: Random) -> None:
        while not self.stop.is_set():
            self._doom(random)
            time.sleep(random.uniform(0, 0.05))

    def _doom(self, random: Random) -> None:
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)  # tasks that were pending
        mine: list[Call] = []

        async def caller(key: Key, plan: Plan) -> None:
            call = self.history.invoke(key.text, "do_async")
            mine.append(call)
            try:
                value, shared = await self.flight.do_async(
                    self._coroutine(call, plan, key, random), *key.parts
                )
            except BaseException as error:
                self._failed(call, key, error)
                raise
            else:
                self._returned(call, value, shared)

        tasks: set[Any] = set()

        async def main() -> None:
            for key in random.sample(self.keys, 3):
                plan = Plan(random.uniform(0.001, 0.02), "value")
                tasks.add(asyncio.create_task(caller(key, plan)))
            await asyncio.sleep(random.uniform(0.001, 0.01))

        loop.run_until_complete(main())
        for call in mine:
            if call.outcome is None:
                call.leaving = time.monotonic_ns()
                self.history.gone(call, Outcome.CLOSED)
                for number in call.led:
                    self.history.end(self.history.executions[number], End.LOST)
        loop.close()
        tasks.clear()

    # -- forks ------------------------------------------------------------------------------------

    def _forker(self, random: Random) -> None:
        while not self.stop.is_set():
            self.stop.wait(random.uniform(0.05, 0.4))
            if random.random() < 0.5:
                self._fork()
            else:
                key = random.choice(self.keys)
                self._do(random, key, Plan(0.001, random.choice(("value", "error")), forks=True))

    def _fork(self) -> None:
        pid = os.fork()
        if pid == 0:
            self._child()
        deadline = time.monotonic() + PATIENCE
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                break
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)  # it has said where it is
            time.sleep(0.002)
        if status:
            self.faults.append(f"a forked child ended with status {status}")
        self.children.append(pid)

    def _child(self) -> None:
        """In a forked child: nothing is in flight, and every method works."""
        code = 3
        try:
            faulthandler.dump_traceback_later(PATIENCE / 2, exit=True)
            flight = self.flight
            stats = flight.stats()
            assert stats.executions == stats.in_flight == stats.waiting == 0, stats
            # Not the keys for which other processes lead.
            parts = (os.getpid(),) if self.mood.meets else PLAIN_KEYS[0].parts
            assert flight.do(lambda: "child", *parts) == ("child", False)
            assert flight.do_future(lambda: "child", *parts).result() == ("child", False)
            many = [*parts, "own"] if not self.mood.meets else [parts[0]]
            assert set(flight.do_many(lambda names: dict.fromkeys(names, 1), many)) == set(many)

            async def answer() -> str:
                await asyncio.sleep(0)
                return "child"

            async def main() -> None:
                pair = await asyncio.gather(
                    flight.do_async(answer, *parts), flight.do_async(answer, *parts)
                )
                assert pair == [("child", True)] * 2, pair

            asyncio.run(main())
            stats = flight.stats()
            assert stats.executions == 3 + len(many), stats
            assert (stats.shared, stats.in_flight) == (1, 0), stats
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)


#: How many flight calls the task of a call is inside of.
current_nesting: ContextVar[int] = ContextVar("current_nesting", default=0)


def _public(key: Key) -> Any:
    return key.parts[0] if len(key.parts) == 1 else key.parts
