"""What is told of the results: a table to read, the same as Markdown, and JSON."""

import importlib.metadata
import os
import platform
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from shardedflight.bench.measure import Result, Unit


def surroundings() -> dict[str, Any]:
    """Returns what the figures depend on: the versions and the machine, by kind, not by name."""
    try:
        version = importlib.metadata.version("shardedflight")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    return {
        "shardedflight": version,
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "free_threaded": bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
        "gil_enabled": getattr(sys, "_is_gil_enabled", lambda: True)(),
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
    }


def _processor() -> str:
    """Returns the processor's name as the system gives it, which `platform` rarely knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def in_words(around: dict[str, Any]) -> str:
    """Says in one line where the figures were measured."""
    build = ", free-threaded" if around["free_threaded"] else ""
    if around["free_threaded"] and around["gil_enabled"]:
        build += " with its GIL switched on"
    return (
        f"{around['implementation']} {around['python']}{build}, {around['system']} "
        f"{around['machine']}, {around['cores']} cores of {around['processor']}, "
        f"shardedflight {around['shardedflight']}"
    )


def amount(value: float, unit: Unit) -> str:
    """Writes what one operation took."""
    return f"{value:,.0f} {unit.value}"


def compared(value: float, unit: Unit) -> str:
    """Writes a ratio or a difference."""
    return f"{value:.2f}x" if unit is Unit.NANOSECONDS else amount(value, unit)


def cells(result: Result) -> list[str]:
    """Writes what was measured: both sides, the figure, its quartiles, the aim, whether met."""
    unit = result.row.unit
    digits = ".2f" if unit is Unit.NANOSECONDS else ",.0f"
    return [
        amount(result.ours, unit),
        amount(result.floor, unit),
        compared(result.figure, unit),
        f"{result.lower_quartile:{digits}} to {result.upper_quartile:{digits}}",
        "none" if result.row.aim is None else f"≤ {compared(result.row.aim, unit)}",
        {True: "yes", False: "no", None: ""}[result.met],
    ]


HEADINGS = ("this library", "floor", "figure", "quartiles", "aim", "met")


def as_table(results: Sequence[Result], *, quick: bool) -> Table:
    """Returns a table for the terminal, with what each row is blind to."""
    table = Table(title="A flight against the floor under it", show_lines=True)
    table.add_column("measured", ratio=1)
    for heading in ("this library\nfloor", "figure\nquartiles", "aim\nmet"):
        table.add_column(heading, justify="right", no_wrap=True)
    colours = {True: "green", False: "red", None: ""}
    for result in results:
        row = result.row
        ours, floor, figure, quartiles, aim, met = cells(result)
        what = Text.assemble(
            (f"{row.name}: {row.what}", "bold"),
            f"\nagainst {row.against}",
            (f"\nblind to: {row.blind_to}", "dim"),
        )
        table.add_row(
            what,
            f"{ours}\n{floor}",
            Text.assemble((figure, "bold"), f"\n{quartiles}"),
            Text.assemble(f"{aim}\n", (met, colours[result.met])),
        )
    note = "Medians over rounds; times are compared by their ratio, memory by the difference."
    if quick:
        note += " A quick run: its figures mean little."
    table.caption = f"{in_words(surroundings())}\n{note}"
    return table


def as_markdown(results: Sequence[Result], command: str) -> str:
    """Returns a Markdown table, marked with the command, the machine and the version."""
    lines = [
        f"`{command}` on {in_words(surroundings())}:",
        "",
        f"| {' | '.join(['measured', 'against', *HEADINGS])} |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    lines += [
        f"| {' | '.join([result.row.what, result.row.against, *cells(result)])} |"
        for result in results
    ]
    return "\n".join(lines) + "\n"


def as_json(results: Sequence[Result], command: str) -> dict[str, Any]:
    """Returns everything that was measured, as JSON would have it."""
    return {
        "command": command,
        "surroundings": surroundings(),
        "rows": [
            {
                "name": result.row.name,
                "what": result.row.what,
                "against": result.row.against,
                "unit": result.row.unit.value,
                "operations": result.operations,
                "rounds": result.rounds,
                "ours": result.ours,
                "floor": result.floor,
                "figure": result.figure,
                "compared_by": "ratio" if result.row.unit is Unit.NANOSECONDS else "difference",
                "quartiles": [result.lower_quartile, result.upper_quartile],
                "aim": result.row.aim,
                "met": result.met,
                "blind_to": result.row.blind_to,
            }
            for result in results
        ],
    }
