"""What is told of the results: tables to read, the same as Markdown, and JSON."""

import importlib.metadata
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shardedflight.bench import peers
from shardedflight.bench.basics import FORM
from shardedflight.bench.measure import Result, Subject, Unit
from shardedflight.bench.model import Fit, fit
from shardedflight.bench.scaling import TABLED, Grid, Point, Workload
from shardedflight.bench.targets import GIL

#: How many times as fast as one thread two are that have nothing in common, on two free cores.
_FREE = 1.8

#: Characters of the longest bar.
_BAR = 9


def surroundings() -> dict[str, Any]:
    """Returns what the figures depend on: the versions and the machine, by kind, not by name."""
    try:
        version = importlib.metadata.version("shardedflight")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    return {
        "shardedflight": version,
        "form": FORM,
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "free_threaded": bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
        "gil_enabled": getattr(sys, "_is_gil_enabled", lambda: True)(),
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "peers": peers.versions(),
    }


def _processor() -> str:
    """Returns the processor's name as the system gives it, which `platform` rarely knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def in_words(around: Mapping[str, Any]) -> str:
    """Says in one line where the figures were measured."""
    build = ", free-threaded" if around["free_threaded"] else ""
    if around["free_threaded"] and around["gil_enabled"]:
        build += " with its GIL switched on"
    return (
        f"{around['implementation']} {around['python']}{build}, {around['system']} "
        f"{around['machine']}, {around['cores']} cores of {around['processor']}, "
        f"shardedflight {around['shardedflight']} ({around['form']})"
    )


# One figure.


def amount(value: float, unit: Unit) -> str:
    """Writes what one side took."""
    match unit:
        case Unit.BYTES:
            return f"{value:,.0f} B"
        case Unit.CALLS_PER_SECOND:
            thousands = value < 1e5
            return (
                f"{value / 1e3:.1f} k/s"
                if thousands
                else f"{value / 1e6:.{2 if value < 1e7 else 1}f} M/s"
            )
        case Unit.COUNT:
            return f"{value:g}"
        case Unit.SECONDS:
            return f"{value:.3f} s" if value >= 0.1 else f"{value * 1e3:.2f} ms"
        case Unit.NANOSECONDS if value < 1e4:
            return f"{value:,.0f} ns"
        case Unit.NANOSECONDS if value < 1e7:
            return f"{value / 1e3:,.0f} µs"
        case Unit.NANOSECONDS:
            return f"{value / 1e6:,.0f} ms"


def compared(value: float, unit: Unit) -> str:
    """Writes a figure: a ratio, or what has a unit."""
    return f"{_digits(value)}x" if unit.compared_by == "ratio" else amount(value, unit)


def _without_unit(unit: Unit, beside: float, value: float) -> str:
    """Writes a quartile: its unit is that of the figure beside which it stands."""
    match unit:
        case Unit.BYTES:
            return f"{value:,.0f}"
        case Unit.SECONDS:
            return f"{value:.3f}" if beside >= 0.1 else f"{value * 1e3:.2f}"
        case Unit.COUNT:
            return f"{value:g}"
        case _:
            return _digits(value)


def _digits(value: float) -> str:
    """Writes a ratio with as many digits as mean something."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def target_in_words(result: Result) -> str:
    """Writes the target."""
    if result.target is None:
        return ""
    sign = "≥" if result.target.at_least else "≤"
    return f"{sign} {compared(result.target.value, result.unit)}"


def by_whom(result: Result) -> str:
    """Names the contender and its point."""
    return f"{result.who}, {result.point}" if result.point else result.who


def cells(result: Result) -> list[str]:
    """Writes what was measured: both sides, the figure, its quartiles, the target, whether met."""
    met = {True: "yes", False: "no", None: ""}[result.met]
    unit = result.unit
    if result.figures is None:
        return ["", "", result.absent, "", target_in_words(result), met]
    figures = result.figures
    digits = partial(_without_unit, unit, figures.figure)
    return [
        amount(figures.ours, unit),
        amount(figures.floor, unit),
        compared(figures.figure, unit),
        f"{digits(figures.lower_quartile)} to {digits(figures.upper_quartile)}",
        target_in_words(result),
        met,
    ]


def groups(results: Sequence[Result]) -> Iterator[tuple[Subject, list[Result]]]:
    """Goes through the results of one subject after the other."""
    for subject, members in groupby(results, key=lambda result: result.subject):
        yield subject, list(members)


# For the terminal.


def as_table(results: Sequence[Result], *, quick: bool) -> Group:
    """Returns a table with a bar for each figure, and what each benchmark is blind to."""
    parts: list[RenderableType] = [
        Text("A flight against the floor under it", "italic"),
        _columns([["by", "took", "floor", "figure", "quartiles", "target", ""]], "bold"),
    ]
    for subject, members in groups(results):
        parts.append(
            Text.assemble(
                (f"\n{subject.name}: {subject.what}", "bold"),
                f"\nagainst {subject.against}",
                (f"\nblind to: {subject.blind_to}", "dim"),
            )
        )
        parts.append(_columns([_line(result, longest(members, result.unit)) for result in members]))
    notes = [in_words(surroundings())]
    notes.append(
        "Medians over rounds; times and rates are compared by their ratio, memory by the "
        "difference; what is in seconds, or counted, is not compared. Green reaches the target, "
        "red does not; in a bar, ┃ is the target."
    )
    if FORM == "plain":
        notes.append("This installation is plain Python: the compiled form is not measured.")
    if quick:
        notes.append("A quick run: its figures mean little.")
    parts.append(Text("\n" + "\n".join(notes) + "\n", "italic"))
    return Group(*parts)


def _columns(lines: Sequence[Sequence[str | Text]], style: str = "") -> Table:
    """Returns a part of the table whose columns are as wide as all other parts'."""
    table = Table(box=None, show_header=False, padding=(0, 0, 0, 2), expand=True, style=style)
    table.add_column(ratio=1)
    for width in (8, 8, 8, 16, 10):
        table.add_column(justify="right", width=width, no_wrap=True)
    table.add_column(width=_BAR, no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def _line(result: Result, scale: float) -> list[str | Text]:
    took, floor, figure, quartiles, target, _ = cells(result)
    if result.figures is None:
        return [f"{by_whom(result)}: {result.absent}"]
    colour = {True: "green", False: "red", None: "blue"}[result.met]
    return [
        by_whom(result),
        took,
        floor,
        Text(figure, "bold"),
        quartiles,
        Text(target, colour),
        Text(bar(result, scale), colour),
    ]


def longest(results: Sequence[Result], unit: Unit) -> float:
    """Returns the figure or target that takes a whole bar, of those in a unit."""
    of_unit = [result for result in results if result.unit is unit]
    figures = [result.figures.figure for result in of_unit if result.figures is not None]
    targets = [result.target.value for result in of_unit if result.target is not None]
    return max([*figures, *targets], default=0.0)


def bar(result: Result, scale: float) -> str:
    """Draws a figure and its target, if `scale` is as long as a bar can be."""
    if result.figures is None or scale <= 0:
        return ""
    length = max(0, round(result.figures.figure / scale * _BAR))
    drawn = list("█" * length + " " * (_BAR - length))
    if result.target is not None:
        drawn[max(0, min(_BAR - 1, round(result.target.value / scale * _BAR) - 1))] = "┃"
    return "".join(drawn).rstrip()


def scaling_table(grid: Grid) -> Table:
    """Returns the table of thread scaling."""
    headings, rows = _scaling(grid)
    table = Table(title="Calls per second of all threads together", box=box.SIMPLE, padding=(0, 1))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    table.caption = in_all(grid)
    return table


def _scaling(grid: Grid) -> tuple[list[str], list[list[str]]]:
    """Returns the headings and the rows of the table of thread scaling."""
    headings = [f"{grid.seconds:g} s a point"]
    for workload in TABLED:
        headings += [f"{workload.value}, {threads} threads" for threads in grid.threads]
    return [heading.replace(", 1 threads", ", 1 thread") for heading in headings], [
        [grid.label(shards)]
        + [
            amount(grid.median(Point(workload, shards, threads)), Unit.CALLS_PER_SECOND)
            for workload in TABLED
            for threads in grid.threads
        ]
        for shards in grid.shards()
    ]


def fitted(grid: Grid, workload: Workload, shards: int | None) -> Fit:
    """Fits the universal scalability law to one line of the grid."""
    return fit({threads: grid.rates[Point(workload, shards, threads)] for threads in grid.threads})


def in_all(grid: Grid, *, gil: bool = GIL) -> str:
    """Says whether the machine was free, and what the model says."""
    two, one = (grid.median(Point(Workload.BARE_LOOP, None, threads)) for threads in (2, 1))
    busy = (
        f"The machine was not free: two threads with nothing in common were {two / one:.2f}x as "
        "fast as one, and the figures of two threads are of that. "
        if not gil and two < _FREE * one
        else ""
    )
    return busy + in_model(grid)


def in_model(grid: Grid) -> str:
    """Says what the universal scalability law makes of the default shards."""
    law = fitted(grid, Workload.MANY_KEYS, None)
    most = grid.threads[-1]
    beyond = [f"{most * times} threads {_between(law, most * times)}" for times in (2, 4, 8)]
    how = (
        ""
        if law.decided
        else " Two numbers of threads cannot tell contention from coherency: the first figure "
        "takes all loss for coherency, the second for contention."
    )
    return (
        f"A model, not a measurement: the universal scalability law, fitted to "
        f"{Workload.MANY_KEYS.value} and default shards (sigma {law.contention.sigma:.3f}, "
        f"kappa {law.coherency.kappa:.3f}), gives {', '.join(beyond)} of one thread.{how}"
    )


def _between(law: Fit, threads: int) -> str:
    low, high = law.coherency.speed_up(threads), law.contention.speed_up(threads)
    return f"{high:.1f}x" if law.decided else f"{low:.1f}x to {high:.1f}x"


# Markdown and JSON.


def as_markdown(results: Sequence[Result], grid: Grid | None, command: str) -> str:
    """Returns Markdown tables, marked with the command, the machine and the version."""
    headings = ["measured", "against", "by", "took", "floor", "figure", "quartiles", "target"]
    lines = [
        f"`{command}` on {in_words(surroundings())}:",
        "",
        f"| {' | '.join([*headings, 'met'])} |",
        "|---|---|---|--:|--:|--:|--:|--:|---|",
    ]
    lines += [
        f"| {' | '.join([one.subject.what, one.subject.against, by_whom(one), *cells(one)])} |"
        for one in results
    ]
    if grid is not None:
        names, rows = _scaling(grid)
        lines += ["", f"| {' | '.join(names)} |", f"|---{'|--:' * (len(names) - 1)}|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines += ["", in_all(grid)]
    return "\n".join(lines) + "\n"


def as_json(results: Sequence[Result], grid: Grid | None, command: str) -> dict[str, Any]:
    """Returns everything that was measured, as JSON would have it."""
    return {
        "command": command,
        "surroundings": surroundings(),
        "rows": [_row_as_json(result) for result in results],
        "scaling": None if grid is None else _grid_as_json(grid),
    }


def _row_as_json(result: Result) -> dict[str, Any]:
    subject, figures, target = result.subject, result.figures, result.target
    row: dict[str, Any] = {
        "name": subject.name,
        "what": subject.what,
        "against": subject.against,
        "by": result.who,
        "point": result.point,
        "blind_to": subject.blind_to,
        "unit": result.unit.value,
        "compared_by": result.unit.compared_by,
        "operations": result.operations,
        "target": None if target is None else target.value,
        "target_is": None if target is None else "at least" if target.at_least else "at most",
        "met": result.met,
        "absent": result.absent,
    }
    if figures is not None:
        row |= {
            "rounds": figures.rounds,
            "ours": figures.ours,
            "floor": figures.floor,
            "figure": figures.figure,
            "quartiles": [figures.lower_quartile, figures.upper_quartile],
        }
    return row


def _grid_as_json(grid: Grid) -> dict[str, Any]:
    return {
        "default_shards": grid.default_shards,
        "seconds_per_point": grid.seconds,
        "points": [
            {
                "workload": point.workload.value,
                "shards": point.shards,
                "threads": point.threads,
                "calls_per_second": list(rates),
            }
            for point, rates in grid.rates.items()
        ],
        "model": {
            "law": "universal scalability law: a model fitted to the points, not a measurement",
            "decided": fitted(grid, Workload.MANY_KEYS, None).decided,
            "fits": [
                {
                    "workload": workload.value,
                    "shards": shards,
                    "sigma": law.contention.sigma,
                    "kappa": law.coherency.kappa,
                }
                for workload in TABLED
                for shards in grid.shards()
                for law in [fitted(grid, workload, shards)]
            ],
        },
    }
