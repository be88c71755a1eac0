"""How plans are chosen: all of them up to a number of switches, or by chance.

**All**, by iterative context bounding (CHESS: Musuvathi and Qadeer, "Iterative Context Bounding for
Systematic Testing of Multithreaded Programs", PLDI 2007): first every run in which threads switch
only where they have to, with every choice of who goes on then; next all with one further switch, at
any step; and so on. Faults need few switches as a rule, and the number of runs with a given number
of them grows with a power of the steps, not exponentially. Each plan is run exactly once: it is
extended behind its last choice only.

**By chance**, PCT (Burckhardt, Kothari, Musuvathi and Nagarakatte, "A Randomized Scheduler with
Probabilistic Guarantees of Finding Bugs", ASPLOS 2010): each thread has a random priority, the
highest that can goes on, and at d - 1 random steps the one that runs falls behind all others. A
fault that needs d ordering constraints is found by one run with at least the probability
1 / (n * k^(d-1)), for n threads and k steps.
"""

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from time import monotonic

from .primitives import install, renew
from .scenarios import Scenario
from .scheduler import Fault, Plan, Planned, Scheduler, Strategy, here
from .tracing import Trace, make_trace
from .world import World, Wrong

__all__ = ["Explorer", "Found", "Search", "format_plan", "parse_plan"]


@dataclass
class Outcome:
    """What came of one run."""

    scheduler: Scheduler
    plan: Plan
    fault: Fault | None


@dataclass
class Found:
    """A fault, and how to see it again."""

    scenario: str
    plan: Plan
    fault: Fault

    def __str__(self) -> str:
        plan = format_plan(self.plan)
        return f"{self.scenario}: {self.fault.message}\nplan {plan}\n{self.fault.stacks}"


def format_plan(plan: Plan) -> str:
    """As `--replay` reads it."""
    return ",".join(f"{step}>{actor}" for step, actor in plan) or "-"


def parse_plan(text: str) -> Plan:
    """What `format_plan` has written."""
    pairs = [] if text == "-" else [entry.split(">") for entry in text.split(",")]
    return tuple((int(step), int(actor)) for step, actor in pairs)


class ByChance(Strategy):
    """PCT."""

    def __init__(self, seed: str, length: int) -> None:
        random = Random(seed)
        self._random = random
        self._falls = {random.randrange(length) for _ in range(random.randrange(5))}
        self._priorities: dict[int, float] = {}
        self._lowest = 0.0
        self.next_step = 0

    def _best(self, able: list[int]) -> int:
        for actor in able:
            if actor not in self._priorities:
                self._priorities[actor] = self._random.random()
        return max(able, key=self._priorities.__getitem__)

    def at_step(self, step: int, current: int, others: Callable[[], list[int]]) -> int:
        """The highest priority."""
        self.next_step = step + 1
        if step in self._falls:
            self._lowest -= 1
            self._priorities[current] = self._lowest
        return self._best([current, *others()])

    def at_stop(self, step: int, able: list[int]) -> int:
        """The highest priority."""
        self.next_step = step + 1
        return self._best(able)


@dataclass
class Search:
    """What a search has come to."""

    scenario: Scenario
    runs: int = 0
    #: Most steps of a run.
    steps: int = 0
    #: All plans with so many switches were run; -1: not even those without.
    bound: int = -1
    #: How many runs it took to each bound; and how many were by chance.
    bounds: list[int] = field(default_factory=list)
    walks: int = 0
    #: Plans that did not fit, because the same run had other steps before.
    misfits: int = 0
    found: Found | None = None
    #: Plans of this number of switches: to be run, and run; and those with one less to be extended.
    todo: list[Plan] = field(default_factory=lambda: [()])
    done: list[Plan] = field(default_factory=list)
    parents: list[Plan] = field(default_factory=list)


def _extensions(plan: Plan, outcome: Outcome, forced: bool) -> list[Plan]:
    """The plans that are `plan` and one more choice, where somebody had to go on, or not."""
    begin = plan[-1][0] if plan else -1
    return [
        (*plan, (step, other))
        for step, others, costs in outcome.scheduler.alternatives
        if step > begin and costs is not forced
        for other in others
    ]


class Explorer:
    """Runs scenarios. One for a process: it has the flight's modules use other primitives."""

    def __init__(self, by_instruction: bool = False) -> None:
        install()
        gc.disable()  # what it frees, it would free at any step; so between runs
        self._by_instruction = by_instruction
        self._traces: dict[tuple[str, ...], Trace] = {}
        self._runs = 0

    def run(
        self,
        scenario: Scenario,
        strategy: Strategy,
        record: str = "",
        trail: Callable[[str], None] | None = None,
    ) -> Outcome:
        """One run. `trail` is told of each step: who was where."""
        trace = self._traces.get(scenario.only)
        if trace is None:
            trace = self._traces[scenario.only] = make_trace(self._by_instruction, scenario.only)
        scheduler = Scheduler(strategy, trace, record)
        scheduler.trail = trail
        renew(scheduler)
        world = World(scheduler)
        scenario.build(world)
        scheduler.run()
        if scheduler.fault is None:
            try:
                world.check()
            except Wrong as wrong:
                scheduler.fault = Fault(str(wrong))
        here.scheduler = None
        self._runs += 1
        if self._runs % 500 == 0:
            del world
            gc.collect()
        return Outcome(scheduler, tuple(scheduler.chosen), scheduler.fault)

    def plan(self, scenario: Scenario, plan: Plan, record: str = "") -> Outcome:
        """Runs a plan."""
        return self.run(scenario, Planned(plan), record)

    def exhaust(self, search: Search, bound: int, until: float, most: int = sys.maxsize) -> None:
        """Runs all plans with up to `bound` switches, or as many as there is time for.

        It goes on where it was. `most` is how many runs there may have been in all.
        """
        while search.bound < bound and search.found is None:
            if not search.todo:
                self._next(search)
            elif search.runs >= most or monotonic() > until:
                return
            else:
                plan = search.todo.pop()
                outcome = self.plan(search.scenario, plan, "stops")
                self._count(search, outcome)
                search.done.append(plan)
                search.todo += _extensions(plan, outcome, forced=True)

    def _next(self, search: Search) -> None:
        if search.parents:
            # It is run again, for what it has shown before is much to keep for so many.
            plan = search.parents.pop()
            search.todo = _extensions(plan, self.plan(search.scenario, plan, "all"), forced=False)
            return
        search.bound += 1
        search.bounds.append(search.runs)
        search.parents, search.done = search.done, []
        if not search.parents:
            search.bound = sys.maxsize

    def _count(self, search: Search, outcome: Outcome) -> None:
        search.runs += 1
        search.misfits += not outcome.scheduler.fits
        search.steps = max(search.steps, outcome.scheduler.step_number)
        if outcome.fault is not None:
            search.found = Found(search.scenario.name, outcome.plan, outcome.fault)

    def walk(self, search: Search, seed: str, until: float, most: int = sys.maxsize) -> None:
        """Runs by chance."""
        length = search.steps or self.plan(search.scenario, ()).scheduler.step_number
        for number in range(most):
            if monotonic() > until:
                return
            outcome = self.run(search.scenario, ByChance(f"{seed}:{number}", length))
            self._count(search, outcome)
            search.walks += 1
            if search.found is not None:
                return
