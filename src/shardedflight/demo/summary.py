"""The figures put into words: the table, its rows for the report, the document for machines."""

import os
import platform
import sysconfig
from collections import Counter
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from shardedflight.demo.command import Options
from shardedflight.demo.figures import Figures
from shardedflight.demo.server import WORKERS


class Row(NamedTuple):
    """A line of the table."""

    name: str
    direct: str
    flight: str


def rows_of_run(figures: Figures) -> list[Row]:
    """The whole load."""
    direct, flight = figures.direct, figures.flight
    return [
        Row("Requests", f"{direct.requests:,}", f"{flight.requests:,}"),
        Row("Failed requests", f"{direct.failed:,}", f"{flight.failed:,}"),
        Row("Database queries", f"{direct.queries:,}", f"{flight.queries:,}"),
        Row("Requests per second (QPS)", f"{direct.per_second:,.0f}", f"{flight.per_second:,.0f}"),
        *(
            Row(
                f"Latency, p{percent}",
                milliseconds(direct.percentile(percent)),
                milliseconds(flight.percentile(percent)),
            )
            for percent in (50, 95, 99)
        ),
        Row("Most queries at once", f"{direct.queries_at_once:,}", f"{flight.queries_at_once:,}"),
    ]


def rows_of_stampede(figures: Figures) -> list[Row]:
    """The stampede alone."""
    direct, flight = figures.direct.stampede, figures.flight.stampede
    return [
        Row("Requests, all for one key", f"{direct.requests:,}", f"{flight.requests:,}"),
        Row("Database queries", f"{direct.queries:,}", f"{flight.queries:,}"),
        Row("Most queries at once", f"{direct.queries_at_once:,}", f"{flight.queries_at_once:,}"),
        Row(
            "Everyone answered after",
            milliseconds(direct.seconds * 1000),
            milliseconds(flight.seconds * 1000),
        ),
    ]


def table(figures: Figures) -> Table:
    """The table that the demo ends with."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("/direct", justify="right", style="yellow")
    table.add_column("/flight", justify="right", style="cyan")
    for row in rows_of_run(figures):
        table.add_row(*row)
    table.add_section()
    table.add_row("[bold]In the stampede")
    for row in rows_of_stampede(figures):
        table.add_row(*row)
    return table


def as_json(figures: Figures, options: Options) -> dict[str, Any]:
    """The document for machines."""
    return {
        "parameters": {
            "duration": options.duration,
            "clients": options.clients,
            "keys": options.keys,
            "shards": figures.stats["shards"],
            "rows": options.rows,
            "seed": options.seed,
            "workers": WORKERS,
        },
        "machine": machine(),
        "routes": {"direct": figures.direct.as_json(), "flight": figures.flight.as_json()},
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
    kinds = Counter(figures.direct.failures) + Counter(figures.flight.failures)
    told = ", ".join(f"{kind}: {number:,}" for kind, number in kinds.most_common())
    return f"{figures.failed:,} requests failed ({told})"


def milliseconds(value: float | None) -> str:
    """The number as people read it."""
    if value is None:
        return "-"
    return f"{value:,.1f} ms" if value < 10 else f"{value:,.0f} ms"
