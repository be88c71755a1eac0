"""How two ways of doing the same are compared.

Times of one machine mean little on another, and little even on the same machine an hour later.
So no time is judged here. A benchmark has a pair for each contender: the contender, and the floor
under it. Rounds go through all pairs, and swap the order within each pair every time; a round gives
one ratio for each contender, and its figure is the median of those. A slow phase of the machine
falls on both sides of a pair.

The collector is off while a side runs, and collects before it.
"""

import gc
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, TypeAlias

from shardedflight.bench.targets import Target, target_of

#: Runs one side of a pair once and returns what it took, in the unit of its benchmark.
Side: TypeAlias = Callable[[], float]


class Unit(Enum):
    """What a benchmark measures; it decides how the two sides of a pair are compared."""

    NANOSECONDS = "ns"  # by their ratio
    CALLS_PER_SECOND = "/s"  # by their ratio
    BYTES = "B"  # by their difference
    SECONDS = "s"  # not at all: the figure is what the contender took, the floor stands beside it
    COUNT = "count"  # as seconds

    @property
    def compared_by(self) -> str:
        """What the figure is: "ratio", "difference"; "nothing": it is the contender's alone."""
        match self:
            case Unit.BYTES:
                return "difference"
            case Unit.SECONDS | Unit.COUNT:
                return "nothing"
            case _:
                return "ratio"


class Pair(NamedTuple):
    """What is compared in each round."""

    ours: Side
    floor: Side


@dataclass(frozen=True)
class Contender:
    """Who is measured.

    Attributes:
        who: This library's form, "compiled" or "plain", or the name of another package.
        pair: The contender and its floor; None if it cannot be measured here.
        point: Which point of the benchmark, where it has several.
        absent: Why there is no pair.
        unit: What is measured, if it is not what the benchmark says.
    """

    who: str
    pair: Pair | None
    point: str = ""
    absent: str = ""
    unit: Unit | None = None


#: Called with the number of operations of a side; yields who is compared. It checks that what is
#: measured is what the benchmark claims.
Prepare: TypeAlias = Callable[[int], AbstractContextManager[Sequence[Contender]]]


@dataclass(frozen=True)
class Subject:
    """What a benchmark is about.

    Attributes:
        name: What `--only` calls it.
        what: What is measured of each contender.
        against: The floor under it.
        blind_to: What the figures do not tell.
        unit: What is measured.
    """

    name: str
    what: str
    against: str
    blind_to: str
    unit: Unit


@dataclass(frozen=True)
class Benchmark(Subject):
    """A subject and how it is measured.

    Attributes:
        operations: How many operations one side does per round.
        rounds: How many rounds.
        prepare: Makes the pairs of this library.
        prepare_peers: Makes the pairs of other libraries.
        both_forms: Whether the plain form is measured beside the compiled one.
    """

    operations: int
    rounds: int
    prepare: Prepare
    prepare_peers: Prepare | None = None
    both_forms: bool = True


@dataclass(frozen=True)
class Figures:
    """What the rounds gave: `figure` is the median of what was compared, between its quartiles.

    `ours` and `floor` are the medians of the two sides.
    """

    rounds: int
    ours: float
    floor: float
    figure: float
    lower_quartile: float
    upper_quartile: float


@dataclass(frozen=True)
class Result:
    """One line of the dashboard: the figures of one contender, or why there are none."""

    subject: Subject
    who: str
    point: str
    operations: int
    target: Target | None
    figures: Figures | None
    unit: Unit
    absent: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the figure reaches the target; None if either is missing."""
        if self.target is None or self.figures is None:
            return None
        return self.target.met_by(self.figures.figure)


def measure(
    benchmark: Benchmark, contenders: Sequence[Contender], on_round: Callable[[], object]
) -> list[Result]:
    """Measures all contenders of a benchmark, calling `on_round` after each round."""
    with unwatched():
        costs = _costs(benchmark, contenders, on_round)
    return [
        Result(
            subject=benchmark,
            who=contender.who,
            point=contender.point,
            operations=benchmark.operations,
            # What other libraries reach is theirs.
            target=target_of(benchmark.name, contender.point, contender.who)
            if contender.who in {"compiled", "plain"}
            else None,
            figures=None if contender.pair is None else figures_of(costs[contender.pair], unit),
            unit=unit,
            absent=contender.absent,
        )
        for contender in contenders
        for unit in [contender.unit or benchmark.unit]
    ]


def _costs(
    benchmark: Benchmark, contenders: Sequence[Contender], on_round: Callable[[], object]
) -> dict[Pair, list[tuple[float, float]]]:
    """Returns what both sides of each pair took in each round."""
    pairs = [contender.pair for contender in contenders if contender.pair is not None]
    costs: dict[Pair, list[tuple[float, float]]] = {pair: [] for pair in pairs}
    for pair in pairs:
        undisturbed(pair.ours)
        undisturbed(pair.floor)
    for number in range(benchmark.rounds):
        for pair in pairs:
            if number % 2 == 0:
                ours = undisturbed(pair.ours)
                floor = undisturbed(pair.floor)
            else:
                floor = undisturbed(pair.floor)
                ours = undisturbed(pair.ours)
            costs[pair].append((ours, floor))
        on_round()
    return costs


def figures_of(costs: Iterable[tuple[float, float]], unit: Unit) -> Figures:
    """Compares the two sides of each round, and takes the medians."""
    ours, floor = zip(*costs, strict=True)
    match unit.compared_by:
        case "difference":
            compared = [mine - other for mine, other in zip(ours, floor, strict=True)]
        case "ratio":
            compared = [mine / other for mine, other in zip(ours, floor, strict=True)]
        case _:
            compared = list(ours)
    lower, middle, upper = (
        statistics.quantiles(compared, n=4, method="inclusive")
        if len(compared) > 1
        else compared * 3
    )
    return Figures(
        rounds=len(compared),
        ours=statistics.median(ours),
        floor=statistics.median(floor),
        figure=middle,
        lower_quartile=lower,
        upper_quartile=upper,
    )


@contextmanager
def unwatched() -> Iterator[None]:
    """Keeps all that there is from the collector, which runs before each side."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def undisturbed(side: Side) -> float:
    """Runs one side with the collector off."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        return side()
    finally:
        if enabled:
            gc.enable()
