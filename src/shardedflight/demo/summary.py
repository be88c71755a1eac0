"""The figures put into words: the table, its rows for the report, the document for machines."""

import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from shardedflight.demo.command import Options
from shardedflight.demo.figures import Figures, RouteFigures, Stampede
from shardedflight.demo.server import THREADS, RouteName
from shardedflight.demo.tier import without_password

#: How the routes are drawn on a terminal.
COLOURS: dict[RouteName, str] = {"direct": "yellow", "flight": "cyan", "tier": "green"}


class Row(NamedTuple):
    """A line of the table."""

    name: str
    #: One for each route.
    cells: list[str]


def rows_of_run(figures: Figures) -> list[Row]:
    """The whole load."""

    def row(name: str, cell: Callable[[RouteFigures], str]) -> Row:
        return Row(name, [cell(route) for route in figures.routes.values()])

    return [
        row("Requests", lambda route: f"{route.requests:,}"),
        row("Failed requests", lambda route: f"{route.failed:,}"),
        row("Database queries", lambda route: f"{route.queries:,}"),
        row("Requests per second (QPS)", lambda route: f"{route.per_second:,.0f}"),
        row("Latency, p50", lambda route: milliseconds(route.percentile(50))),
        row("Latency, p95", lambda route: milliseconds(route.percentile(95))),
        row("Latency, p99", lambda route: milliseconds(route.percentile(99))),
        row("Most queries at once", lambda route: f"{route.queries_at_once:,}"),
    ]


def rows_of_stampede(figures: Figures) -> list[Row]:
    """The stampede alone."""

    def row(name: str, cell: Callable[[Stampede], str]) -> Row:
        return Row(name, [cell(route.stampede) for route in figures.routes.values()])

    return [
        row("Requests, all for one key", lambda stampede: f"{stampede.requests:,}"),
        row("Database queries", lambda stampede: f"{stampede.queries:,}"),
        row("Most queries at once", lambda stampede: f"{stampede.queries_at_once:,}"),
        row("Everyone answered after", lambda stampede: milliseconds(stampede.seconds * 1000)),
    ]


def table(figures: Figures) -> Table:
    """The table that the demo ends with."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for route in figures.routes:
        table.add_column(f"/{route}", justify="right", style=COLOURS[route])
    for row in rows_of_run(figures):
        table.add_row(row.name, *row.cells)
    table.add_section()
    table.add_row("[bold]In the stampede")
    for row in rows_of_stampede(figures):
        table.add_row(row.name, *row.cells)
    return table


def as_json(figures: Figures, options: Options) -> dict[str, Any]:
    """The document for machines."""
    return {
        "parameters": {
            "duration": options.duration,
            "clients": options.clients,
            "keys": options.keys,
            "shards": figures.stats["flight"]["shards"],
            "rows": options.rows,
            "seed": options.seed,
            "workers": options.workers,
            "backend": None if options.backend is None else without_password(options.backend),
            "threads": THREADS,
        },
        "machine": machine(),
        "routes": {name: route.as_json() for name, route in figures.routes.items()},
        "stats": figures.stats,
    }


def machine() -> dict[str, str | int | None]:
    """What the figures were measured on."""
    gil = ", free-threaded" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}{gil}",
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processors": os.cpu_count(),
    }


def failures(figures: Figures) -> str:
    """What went wrong, in a sentence."""
    kinds: Counter[str] = Counter()
    for route in figures.routes.values():
        kinds.update(route.failures)
    told = ", ".join(f"{kind}: {number:,}" for kind, number in kinds.most_common())
    return f"{figures.failed:,} requests failed ({told})"


def milliseconds(value: float | None) -> str:
    """The number as people read it."""
    if value is None:
        return "-"
    return f"{value:,.1f} ms" if value < 10 else f"{value:,.0f} ms"
