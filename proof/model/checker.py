"""An explicit-state model checker: breadth first, so that the first fault has the shortest trace.

A model gives its first state, the steps from each, and what is wrong with a state. Its states are
tuples: hashed, compared, and made anew by each step, never changed. Checked are:

- **safety**: no state that can be reached is bad;
- **progress**: from every state that can be reached, there is a way to a quiet one, on which all
  who wait have been answered, by steps of the system alone, without further faults or callers. In a
  finite space, that is that all are answered in the end, whatever happened before, as long as no
  step is put off for ever. A state in which somebody waits and nothing goes on is a case of it, and
  so is a cycle out of which nothing leads;
- **waking**: the same without the passage of time, for those states in which nothing has happened
  that excuses a wait for it: whoever sleeps there is woken, and does not find out by a timer.

The method is that of Spin and TLC (Holzmann, "The Model Checker SPIN", 1997; Yu, Manolios, Lamport,
"Model Checking TLA+ Specifications", 1999): a table of the states seen, a parent for each.
Progress is decided backwards from the quiet states.
"""

import itertools
import time
from array import array
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["FAULT", "STEP", "TIME", "Model", "Report", "check"]

#: Kinds of steps: of the system; of the system when time passes; of callers and of the adversary.
STEP, TIME, FAULT = 0, 1, 2


class Model(Protocol):
    """What is checked."""

    def first(self) -> Hashable:
        """The state in which all begins."""
        ...

    def steps(self, state: Any, /) -> Iterable[tuple[tuple[Any, ...], int, Hashable]]:
        """What may happen: what it is, its kind, and the state it leads to."""
        ...

    def wrong(self, state: Any, /) -> str:
        """What is wrong with a state; empty if nothing is."""
        ...

    def quiet(self, state: Any, /) -> bool:
        """Whether nobody waits."""
        ...

    def patient(self, state: Any, /) -> bool:
        """Whether it is excused that somebody waits for time to pass."""
        ...

    def show(self, state: Any, /) -> str:
        """A state, for people."""
        ...


@dataclass
class Report:
    """What was found.

    Attributes:
        states: Different ones that were reached.
        transitions: Steps that were taken.
        depth: Steps of the longest of all shortest ways to a state.
        complete: There are no more.
        seconds: That it took.
        fault: What is wrong; empty if nothing was found.
        trace: The steps that lead to it, and a line for each state.
    """

    states: int = 0
    transitions: int = 0
    depth: int = 0
    complete: bool = False
    seconds: float = 0.0
    fault: str = ""
    trace: list[tuple[tuple[Any, ...], str]] = field(default_factory=list)


class _Space:
    """The states seen, numbered as they were found, and how they hang together."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.numbers: dict[Any, int] = {model.first(): 0}
        self.states: list[Any] = [model.first()]
        self.parents = array("l", [-1])
        #: Steps of the system, from and to; and whether time passes in it.
        self.sources, self.targets = array("l"), array("l")
        self.timed = bytearray()

    def trace(self, number: int) -> list[tuple[tuple[Any, ...], str]]:
        """The shortest way to a state. The steps are worked out once more: none is stored."""
        way: list[int] = []
        while number >= 0:
            way.append(number)
            number = self.parents[number]
        way.reverse()
        show = self.model.show
        told = [(("start",), show(self.states[way[0]]))]
        for before, after in itertools.pairwise(way):
            target = self.states[after]
            label = next(s[0] for s in self.model.steps(self.states[before]) if s[2] == target)
            told.append((label, show(target)))
        return told

    def stuck(self, quiet: bytearray, expanded: int, with_time: bool) -> bytearray:
        """Which states have no way to a quiet one: 0 is stuck."""
        count = len(self.states)
        first = array("l", bytes(array("l").itemsize * (count + 1)))
        for timed, target in zip(self.timed, self.targets, strict=True):
            if with_time or not timed:
                first[target + 1] += 1
        for number in range(count):
            first[number + 1] += first[number]
        place = first[:]
        before = array("l", bytes(array("l").itemsize * len(self.targets)))
        for timed, source, target in zip(self.timed, self.sources, self.targets, strict=True):
            if with_time or not timed:
                before[place[target]] = source
                place[target] += 1
        reached = bytearray(quiet)
        # What lies behind a state that was not expanded is not known: nothing is said of it.
        reached[expanded:] = b"\1" * (count - expanded)
        todo = [number for number in range(count) if reached[number]]
        while todo:
            number = todo.pop()
            for source in before[first[number] : first[number + 1]]:
                if not reached[source]:
                    reached[source] = 1
                    todo.append(source)
        return reached


def check(
    model: Model,
    *,
    seconds: float = float("inf"),
    most: int = 10_000_000,
    progress: Callable[[Report], None] | None = None,
) -> Report:
    """Explores a model until a fault is found, there is nothing more, or a limit is reached.

    Args:
        model: Whose states are explored.
        seconds: After which no further state is looked at; what was reached is still judged.
        most: States after which the same happens.
        progress: Is called every three seconds.
    """
    start = time.monotonic()
    report = Report()
    space = _Space(model)
    states, numbers = space.states, space.numbers
    wrong = model.wrong(states[0])
    level_end, said, current = 1, start, 0
    while current < len(states) and not wrong:
        if current == level_end:
            level_end = len(states)
            report.depth += 1
        if current & 255 == 0:
            now = time.monotonic()
            if now - start > seconds or len(states) > most:
                break
            if progress is not None and now - said >= 3:
                said = now
                report.states, report.seconds = len(states), now - start
                progress(report)
        for _, kind, after in model.steps(states[current]):
            report.transitions += 1
            number = numbers.get(after)
            if number is None:
                number = numbers[after] = len(states)
                states.append(after)
                space.parents.append(current)
                wrong = model.wrong(after)
                if wrong:
                    break
            if kind != FAULT:
                space.sources.append(current)
                space.targets.append(number)
                space.timed.append(kind == TIME)
        current += 1
    report.complete = current == len(states) and not wrong
    if wrong:
        report.fault, report.trace = wrong, space.trace(len(states) - 1)
    else:
        _judge_progress(space, current, report)
    report.states = len(states)
    report.seconds = time.monotonic() - start
    return report


def _judge_progress(space: _Space, expanded: int, report: Report) -> None:
    model, states = space.model, space.states
    quiet = bytearray(model.quiet(state) for state in states)
    reached = space.stuck(quiet, expanded, with_time=True)
    if (number := reached.find(0)) >= 0:
        report.fault = "somebody waits who will never be answered"
        report.trace = space.trace(number)
        return
    reached = space.stuck(quiet, expanded, with_time=False)
    number = -1
    while (number := reached.find(0, number + 1)) >= 0:
        if not model.patient(states[number]):
            report.fault = "somebody sleeps who is woken by a timer alone"
            report.trace = space.trace(number)
            return
