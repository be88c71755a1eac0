"""How two ways of doing the same are compared.

Times of one machine mean little on another, and little even on the same machine an hour later.
So no time is judged here. A row measures a pair, this library and a floor under it, in rounds
that alternate between the two and swap their order each time; every round gives one ratio, and
the row's figure is the median of those. A slow phase of the machine falls on both.

The collector is off while a side runs, and collects before it.
"""

import gc
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

#: Runs one side of a pair once and returns what one operation took, in the unit of its row.
Side: TypeAlias = Callable[[], float]

#: Called with the number of operations of a side; yields the pair, this library first.
Prepare: TypeAlias = Callable[[int], AbstractContextManager[tuple[Side, Side]]]


class Unit(Enum):
    """What a row measures; it decides how the two sides of a pair are compared."""

    NANOSECONDS = "ns"  # per operation: by their ratio
    BYTES = "B"  # per execution or waiting caller: by their difference


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: What `--only` calls it.
        what: What is measured of this library.
        against: The floor under it.
        aim: The figure is to be at most this; None where none is set.
        blind_to: What the figure does not tell.
        unit: What one operation is measured in.
        operations: How many operations one side does per round.
        rounds: How many rounds.
        prepare: Makes the pair. It checks that what is measured is what the row claims.
    """

    name: str
    what: str
    against: str
    aim: float | None
    blind_to: str
    unit: Unit
    operations: int
    rounds: int
    prepare: Prepare


@dataclass(frozen=True)
class Result:
    """What was measured for one row, with the number of operations and rounds that it took.

    `figure` is the median over the rounds of ratio or difference, between its quartiles;
    `ours` and `floor` are the medians of the two sides.
    """

    row: Row
    operations: int
    rounds: int
    ours: float
    floor: float
    figure: float
    lower_quartile: float
    upper_quartile: float

    @property
    def met(self) -> bool | None:
        """Whether the figure is within the aim; None where there is no aim."""
        return None if self.row.aim is None else self.figure <= self.row.aim


def rounds_of(row: Row, *, quick: bool) -> int:
    """Returns how many rounds a run gives the row."""
    return 3 if quick else row.rounds


def operations_of(row: Row, *, quick: bool) -> int:
    """Returns how many operations one round of a side does."""
    return max(20, row.operations // 50) if quick else row.operations


def measure(row: Row, *, quick: bool, on_round: Callable[[], object]) -> Result:
    """Measures one row, calling `on_round` after each round."""
    operations = operations_of(row, quick=quick)
    rounds = rounds_of(row, quick=quick)
    pairs: list[tuple[float, float]] = []
    with row.prepare(operations) as (ours, floor):
        _undisturbed(ours)
        _undisturbed(floor)
        for number in range(rounds):
            if number % 2 == 0:
                cost = _undisturbed(ours)
                pairs.append((cost, _undisturbed(floor)))
            else:
                cost = _undisturbed(floor)
                pairs.append((_undisturbed(ours), cost))
            on_round()
    if row.unit is Unit.NANOSECONDS:
        figures = [ours_cost / floor_cost for ours_cost, floor_cost in pairs]
    else:
        figures = [ours_cost - floor_cost for ours_cost, floor_cost in pairs]
    lower, middle, upper = statistics.quantiles(figures, n=4, method="inclusive")
    return Result(
        row=row,
        operations=operations,
        rounds=rounds,
        ours=statistics.median(ours_cost for ours_cost, _ in pairs),
        floor=statistics.median(floor_cost for _, floor_cost in pairs),
        figure=middle,
        lower_quartile=lower,
        upper_quartile=upper,
    )


def _undisturbed(side: Side) -> float:
    """Runs one side with the collector off."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        return side()
    finally:
        if enabled:
            gc.enable()
