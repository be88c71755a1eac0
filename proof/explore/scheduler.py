"""Threads of which exactly one runs, and a plan that says which.

Each actor has an OS thread of its own and a baton, a lock: who is given the baton runs, until it
gives one to another. It can do so at every *step* (see `tracing`), and it has to when it blocks.
Steps are numbered; so a plan is short: at this step, go on with that actor. Where a plan says
nothing the actor goes on that runs, or, if it blocks, the next in order. One plan always gives the
same run.

A timed wait may end at any moment: who is in one can always be chosen, and finds that its time is
up. It is never the next in order as long as anybody else can go on.
"""

import sys
import traceback
from _thread import allocate_lock, start_new_thread
from collections.abc import Callable
from dataclasses import dataclass
from threading import get_ident
from types import FrameType
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

#: Who goes on at which step.
Plan = tuple[tuple[int, int], ...]

#: No run of a scenario comes near it, unless somebody waits in a loop for what never happens.
MOST_STEPS = 5_000
#: Nor does any wait so many seconds, of virtual time, for another.
MOST_SECONDS = 60.0


@dataclass
class Fault:
    """What a run has shown, and where everybody was."""

    message: str
    stacks: str = ""


class Strategy(Protocol):
    """Chooses who goes on."""

    #: The next step at which it wants to be asked whether to switch.
    next_step: int

    def at_step(self, step: int, current: int, others: "Callable[[], list[int]]") -> int:
        """Who goes on, of `current` and `others`, who all can. Asked at `next_step` alone."""
        ...

    def at_stop(self, step: int, able: list[int]) -> int:
        """Who goes on, when the one that ran can not. The first of `able` is next in order."""
        ...


class Planned:
    """Follows a plan."""

    def __init__(self, plan: Plan) -> None:
        self._left = list(plan[::-1])
        self.next_step = plan[0][0] if plan else sys.maxsize

    def _take(self) -> int:
        actor = self._left.pop()[1]
        self.next_step = self._left[-1][0] if self._left else sys.maxsize
        return actor

    def at_step(self, step: int, current: int, others: Callable[[], list[int]]) -> int:
        """As planned."""
        return self._take()

    def at_stop(self, step: int, able: list[int]) -> int:
        """As planned, or who is next in order."""
        return self._take() if step == self.next_step else able[0]


@dataclass
class Actor:
    """A thread of the scenario, or one that the flight has started."""

    index: int
    name: str
    worker: "Worker"
    done: bool = False
    #: What it waits for, and whether that wait may end before.
    ready: Callable[[], bool] | None = None
    timed: bool = False
    what: str = ""

    def able(self) -> bool:
        """Whether it can go on, without its time being up."""
        return not self.done and (self.ready is None or self.ready())


class Worker:
    """An OS thread that lends itself to one actor after another: to start one takes long."""

    def __init__(self) -> None:
        self.baton = allocate_lock()
        self.baton.acquire()
        self.job: tuple[Scheduler, Callable[[], None]] | None = None
        self.ident = 0
        start_new_thread(self._work, ())

    def _work(self) -> None:
        self.ident = get_ident()
        # Once for all: to begin or to end it stops all threads, where there is no GIL.
        sys.settrace(_trace)
        while True:
            self.baton.acquire()
            assert self.job is not None
            scheduler, body = self.job
            try:
                body()
            except BaseException:
                scheduler.error = traceback.format_exc()
            # All that belongs to this run goes before anybody else does.
            self.job = None
            del body
            go_on = scheduler.end_of(self)
            del scheduler
            go_on()


#: Those that no run has.
_idle: list[Worker] = []


def _trace(frame: FrameType, event: str, arg: object) -> Any:
    scheduler = here.scheduler
    return None if scheduler is None else scheduler.trace(frame, event, arg)


class Scheduler:
    """One run."""

    def __init__(self, strategy: Strategy, trace: Any, record: str = "") -> None:
        self.strategy = strategy
        self.trace = trace
        self.actors: list[Actor] = []
        #: Who runs; None: the one that has started it all.
        self.current: Actor | None = None
        self.step_number = -1
        #: What was chosen otherwise than in order: the plan of this very run.
        self.chosen: list[tuple[int, int]] = []
        #: What `alternatives` is to have: "all", those where somebody had to be chosen ("stops"),
        #: or nothing. Each is a step, who else could have been chosen, and whether that is a
        #: switch that nothing forces.
        self.record = record
        self.alternatives: list[tuple[int, list[int], bool]] = []
        #: False if the plan wanted one to go on who could not: it is of another version.
        self.fits = True
        self.fault: Fault | None = None
        self.error = ""
        #: Is told of each step.
        self.trail: Callable[[str], None] | None = None
        #: Looks at the state at every step, and when only those go on whose time is up.
        self.check: Callable[[], None] = _nothing
        self.check_quiet: Callable[[], None] = _nothing
        #: When nobody goes on, time does: each of these tells to what time it would have it go.
        self.clocks: list[Callable[[], float | None]] = []
        self.now = 0.0
        #: Something is looked at meanwhile: there are no steps.
        self._aside = False
        self._over = allocate_lock()
        self._over.acquire()
        self._free: list[Worker] = []

    # -- what a scenario does -----------------------------------------------------------------

    def start(self, body: Callable[[], None], name: str) -> Actor:
        """A further actor. It can go on from now on."""
        worker = _idle.pop() if _idle else Worker()
        worker.job = (self, body)
        actor = Actor(len(self.actors), name, worker)
        self.actors.append(actor)
        return actor

    def run(self) -> None:
        """Runs the actors to their end, or to a fault. Those of a fault stay where they are."""
        self._go_on()
        self._over.acquire()
        self.current = None
        if self.error:
            self.fault = self.fault or Fault(f"a thread has died:\n{self.error}")
        if self.fault is None:
            _idle.extend(self._free)

    # -- what actors do -----------------------------------------------------------------------

    def step(self) -> None:
        """The actor that runs is at a point where another may go on instead."""
        if self._aside:
            return
        self.step_number = number = self.step_number + 1
        self._aside = True
        self.check()
        self._aside = False
        current = self.current
        assert current is not None
        if self.trail is not None:
            frame = sys._getframe(2)  # behind the tracer
            self.trail(f"{current.index} {frame.f_code.co_name}:{frame.f_lineno}")
        if self.record == "all":
            others = self._others(current)
            if others:
                self.alternatives.append((number, others, True))
        if number == self.strategy.next_step:
            chosen = self.strategy.at_step(number, current.index, lambda: self._others(current))
            if chosen != current.index:
                self._switch(current, chosen)
        elif number > MOST_STEPS:
            self.fail(f"after {MOST_STEPS} steps there is no end in sight")

    def block(self, ready: Callable[[], bool], what: str, timed: bool = False) -> bool:
        """The actor that runs can not go on before `ready()`; False: its time was up before."""
        actor = self.current
        assert actor is not None, f"outside of a run: {what}"
        actor.ready, actor.timed, actor.what = ready, timed, what
        chosen = self._choose()
        if chosen is not actor:
            self.current = chosen
            chosen.worker.baton.release()
            actor.worker.baton.acquire()
        in_time = self.aside(ready)
        actor.ready, actor.timed = None, False
        return in_time

    def aside(self, ask: Callable[[], T]) -> T:
        """What `ask()` returns. Nobody is stopped inside of it."""
        before, self._aside = self._aside, True
        try:
            return ask()
        finally:
            self._aside = before

    def fail(self, message: str) -> None:
        """The run has shown a fault. It ends here; this thread does not go on."""
        if self.current is None:
            raise RuntimeError(message)
        self._end(message)
        _stay()

    # -- the rest -----------------------------------------------------------------------------

    def _others(self, current: Actor) -> list[int]:
        self._aside = True
        others = [a.index for a in self.actors if a is not current and self._may_go_on(a)]
        self._aside = False
        return others

    def _may_go_on(self, actor: Actor) -> bool:
        return not actor.done and (actor.timed or actor.able())

    def _switch(self, current: Actor, index: int) -> None:
        chosen = self.actors[index] if index < len(self.actors) else current
        if chosen is current or not self.aside(lambda: self._may_go_on(chosen)):
            self.fits = False
            return
        self.chosen.append((self.step_number, index))
        self.current = chosen
        chosen.worker.baton.release()
        current.worker.baton.acquire()

    def _choose(self) -> Actor:
        """Who goes on when the current one can not. Does not return if nobody can."""
        able = self.aside(self._able)
        self.step_number = number = self.step_number + 1
        chosen = self.strategy.at_stop(number, able)
        if chosen not in able:
            self.fits = False
            chosen = able[0]
        if self.record and len(able) > 1:
            self.alternatives.append((number, able[1:], False))
        if chosen != able[0]:
            self.chosen.append((number, chosen))
        return self.actors[chosen]

    def _able(self) -> list[int]:
        """Those who can go on, the next in order first, those whose time is up last."""
        at = 0 if self.current is None else self.current.index + 1
        in_order = self.actors[at:] + self.actors[:at]
        able = [actor.index for actor in in_order if actor.able()]
        while not able:
            timed = [actor.index for actor in in_order if actor.timed and not actor.done]
            if timed:
                self.check_quiet()
                return timed
            times = [time for time in [clock() for clock in self.clocks] if time is not None]
            if not times or self.now > MOST_SECONDS:
                self.fail("deadlock: nobody can go on")
            self.now = max(self.now, min(times))
            able = [actor.index for actor in in_order if actor.able()]
        return able + [a.index for a in in_order if a.timed and not a.done and not a.able()]

    def _go_on(self) -> None:
        chosen = self._choose()
        self.current = chosen
        chosen.worker.baton.release()

    def end_of(self, worker: Worker) -> Callable[[], None]:
        """The current actor is through. Returns what lets the next one go on."""
        actor = self.current
        assert actor is not None
        actor.done = True
        self._free.append(worker)
        if self.error or all(other.done for other in self.actors):
            self.current = None
            return self._over.release
        chosen = self._choose()
        self.current = chosen
        return chosen.worker.baton.release

    def _end(self, message: str) -> None:
        if self.fault is None:
            self.fault = Fault(message, self.stacks())
            self._over.release()

    def stacks(self) -> str:
        """Where everybody is."""
        frames = sys._current_frames()
        lines: list[str] = []
        for actor in self.actors:
            if actor.done:
                lines.append(f"{actor.index} {actor.name}: ended")
                continue
            running = " runs" if actor is self.current else " could go on"
            state = f" waits for {actor.what}" if actor.ready is not None else running
            lines.append(f"{actor.index} {actor.name}:{state}")
            frame = frames.get(actor.worker.ident)
            for entry in traceback.extract_stack(frame) if frame is not None else ():
                if not entry.filename.endswith(("scheduler.py", "tracing.py", "primitives.py")):
                    where = entry.filename.rpartition("/")[2]
                    lines.append(f"    {where}:{entry.lineno} {entry.name}: {entry.line}")
        return "\n".join(lines)


def _stay() -> None:
    """This thread does not go on."""
    lock = allocate_lock()
    lock.acquire()
    lock.acquire()


def _nothing() -> None:
    pass


class _Here:
    scheduler: Scheduler | None = None


#: Has the run that is under way.
here = _Here()


def running() -> Scheduler:
    """The run that is under way."""
    assert here.scheduler is not None, "outside of a run"
    return here.scheduler
