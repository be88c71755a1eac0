"""The report: one HTML file that needs nothing else, in light and dark, on screens of any width."""

import os
import tempfile
from collections.abc import Callable, Sequence
from datetime import datetime
from html import escape
from inspect import cleandoc
from pathlib import Path

from shardedflight.demo import plots, summary
from shardedflight.demo.command import Options
from shardedflight.demo.database import QUERY
from shardedflight.demo.errors import DemoError
from shardedflight.demo.figures import Figures, RouteFigures
from shardedflight.demo.load import ZIPF_EXPONENT
from shardedflight.demo.server import SAMPLE_INTERVAL, THREADS, RouteName
from shardedflight.demo.tier import without_password

_CSS = """
:root {
  color-scheme: light dark;
  --ground: #fbfaf8; --card: #fff; --ink: #1f2328; --quiet: #5b6370; --faint: #b9bec7;
  --line: #e4e2dd; --direct: #c2500a; --flight: #1764ab;
  --tier: #2a7f3f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14161a; --card: #1c1f25; --ink: #e6e8eb; --quiet: #9aa3af; --faint: #565e6b;
    --line: #2b3038; --direct: #f0883e; --flight: #58a6f0;
    --tier: #56c271;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 54rem; padding: 2rem 1rem 4rem; background: var(--ground);
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", sans-serif;
}
h1 { margin: 0 0 .5rem; font-size: 1.75rem; line-height: 1.2; text-wrap: balance; }
h2 { margin: 2.75rem 0 .25rem; font-size: 1.2rem; }
p { margin: .4rem 0; max-width: 42rem; }
.quiet, footer { color: var(--quiet); font-size: .9rem; }
.direct { color: var(--direct); } .flight { color: var(--flight); } .tier { color: var(--tier); }
.tiles { display: grid; gap: .75rem; margin: 1.75rem 0 0; padding: 0;
  grid-template-columns: repeat(auto-fit, minmax(13.5rem, 1fr)); }
.tiles div, .card {
  background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem 1rem;
}
.tiles dt { color: var(--quiet); font-size: .85rem; }
.tiles dd { margin: .15rem 0 0; font-size: 1.2rem; font-weight: 650; white-space: nowrap; }
.tiles i { color: var(--quiet); font-style: normal; font-weight: 400; }
.card { margin: .9rem 0 0; overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .25rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child { text-align: left; font-weight: 400; }
thead th { font-weight: 650; }
td, thead th { white-space: nowrap; }
td { padding-left: .9rem; }
tr:last-child > * { border-bottom: 0; }
tr.part th { padding-top: 1.1rem; font-weight: 650; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
svg.narrow { display: none; }
@media (max-width: 36rem) {
  .card { padding: .6rem .7rem; }
  table { font-size: .92rem; }
  svg.wide { display: none; }
  svg.narrow { display: block; }
}
.legend { display: flex; gap: 1.25rem; font-weight: 650; font-size: .9rem; }
.legend span::before { content: ""; display: inline-block; width: 1.1rem; height: .28rem;
  margin-right: .45rem; border-radius: .2rem; vertical-align: .22rem; background: currentColor; }
pre { margin: 0; font: .85rem/1.5 ui-monospace, monospace; }
code { font: .92em ui-monospace, monospace; }
.pairs { display: grid; gap: .2rem 1.5rem; margin: 0;
  grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
.pairs div { display: flex; justify-content: space-between; gap: 1rem;
  border-bottom: 1px dotted var(--line); }
.pairs dt { color: var(--quiet); } .pairs dd { margin: 0; text-align: right; }
"""

#: How the routes are spoken of in the headline, where servers are several and where there is one.
_SEVERAL: dict[RouteName, str] = {
    "direct": "without a flight",
    "flight": "with one in each process",
    "tier": "with one that they share",
}
_ONE: dict[RouteName, str] = {**_SEVERAL, "flight": "with one"}


def destination(path: Path) -> Path:
    """Returns where the report will be; raises if it could not be written there."""
    try:
        path = path.resolve()
        replaceable = path.is_file() or not path.exists()
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise DemoError(
            f"the report {path} cannot be written ({error.strerror}): "
            "choose another place with --report"
        ) from None
    if not replaceable:
        raise DemoError(f"the report cannot replace {path}, which is no file: choose with --report")
    return path


def save(page: str, path: Path) -> None:
    """Writes the page all at once or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise DemoError(f"the report cannot be written to {path} ({error.strerror})") from None
    finally:
        unfinished.unlink(missing_ok=True)


def page(figures: Figures, options: Options, addresses: Sequence[str]) -> str:
    """Returns the report."""
    now = datetime.now().astimezone()
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ShardedFlight demo: a stampede, without and with a flight</title>
<style>{_CSS}</style>
</head>
<body>
<h1>{_headline(figures, options)}</h1>
<p>One HTTP API, one database, the same load on each route: first on <b class="direct">/direct</b>,
where every request runs its query, then on <b class="flight">/flight</b>, where requests for a key
whose query is already running wait for that one{_on_tier(figures, options)}.</p>
<dl class="tiles">{_tiles(figures)}</dl>
{_failures(figures)}
<h2>The figures</h2>
<div class="card">{_table(figures)}</div>

<h2>The stampede</h2>
<p class="quiet">Executions in flight when, half-way through the load, all {options.clients:,}
clients fall silent and then ask for the same item at once. A dashed line marks when the last of
them has its answer.</p>
<div class="card">{_legend(figures)}{plots.stampede(figures)}</div>

<h2>The whole load</h2>
<p class="quiet">Executions in flight over time. An execution is one run of the query, from the
call for it to its answer; it may have to wait for one of the {THREADS} threads of its process.
Sampled in each server process every {SAMPLE_INTERVAL * 1000:g} ms, or as soon as it gets round to
it, and added up.</p>
<div class="card">{plots.in_flight(figures)}</div>

<h2>Latency</h2>
<p class="quiet">The share of requests that were answered within a time, on a logarithmic axis:
further left is faster.</p>
<div class="card">{_legend(figures)}{plots.latencies(figures)}</div>

<h2>How it was measured</h2>
<p class="quiet">{_servers(options)} (Starlette on uvicorn) over a SQLite file. A client asks, waits
for the answer and asks again at once, each on a connection of its own. Item number n is asked for
in proportion to 1&#8239;/&#8239;n<sup>{ZIPF_EXPONENT:g}</sup> (Zipf's law). Nothing is cached and
nothing sleeps: each query reads every row. Clients and server share the machine.</p>
<div class="card"><pre>{escape(cleandoc(QUERY))}</pre></div>
<div class="card"><dl class="pairs">{_pairs(_parameters(options, figures, addresses))}</dl></div>

<h2>What the flights say</h2>
<p class="quiet"><code>flight.stats()</code> in the end{_summed(options)}: <i>shared</i> counts
callers that were served by somebody else's execution.</p>
{_stats(figures)}
<footer><p>Measured on <time datetime="{now.isoformat(timespec="seconds")}">{now:%d %B %Y, %H:%M}
</time> by <code>shardedflight demo</code>.</p></footer>
</body>
</html>
"""


def _headline(figures: Figures, options: Options) -> str:
    said = _ONE if options.workers == 1 else _SEVERAL
    requests = next(iter(figures.routes.values())).stampede.requests
    over = "" if options.workers == 1 else f" over {options.workers} processes"
    return f"{requests:,} requests for one key{over}:\n" + ",\n".join(
        f'<span class="{name}">{_queries(route.stampede.queries)}</span> {said[name]}'
        for name, route in figures.routes.items()
    )


def _queries(number: int) -> str:
    return f"{number:,} {'query' if number == 1 else 'queries'}"


def _on_tier(figures: Figures, options: Options) -> str:
    if "tier" not in figures.routes:
        return ""
    return (
        ' if that is in the same process, then on <b class="tier">/tier</b>, where it may be in any'
        f" of the server processes: their flights meet on {_backend(options)}"
    )


def _backend(options: Options) -> str:
    match options.backend:
        case "host":
            return "the host tier, in a directory"
        case "valkey":
            return "a Valkey server that the demo has started"
        case url:
            return "" if url is None else f"the server {escape(without_password(url))}"


def _servers(options: Options) -> str:
    if options.workers == 1:
        return "A server process"
    return (
        f"{options.workers} server processes, over which the clients are spread evenly, as a load "
        "balancer does it"
    )


def _summed(options: Options) -> str:
    return "" if options.workers == 1 else ", the sum over the processes"


def _legend(figures: Figures) -> str:
    names = "".join(f'<span class="{name}">/{name}</span>' for name in figures.routes)
    return f'<p class="legend">{names}</p>'


def _tiles(figures: Figures) -> str:
    cells: dict[str, Callable[[RouteFigures], str]] = {
        "Queries per 1,000 requests": lambda one: f"{1000 * one.queries / one.requests:,.0f}",
        "Requests per second": lambda one: f"{one.per_second:,.0f}",
        "Latency, p99": lambda one: summary.milliseconds(one.percentile(99)),
    }
    return "".join(
        f"<div><dt>{title}</dt><dd>"
        + " <i>&rarr;</i> ".join(
            f'<span class="{name}">{cell(route)}</span>' for name, route in figures.routes.items()
        )
        + "</dd></div>"
        for title, cell in cells.items()
    )


def _failures(figures: Figures) -> str:
    return f"<p><strong>{escape(summary.failures(figures))}.</strong></p>" if figures.failed else ""


def _table(figures: Figures) -> str:
    def lines(rows: list[summary.Row]) -> str:
        return "".join(
            f'<tr><th scope="row">{row.name}</th>'
            + "".join(f"<td>{cell}</td>" for cell in row.cells)
            + "</tr>"
            for row in rows
        )

    heads = "".join(f'<th scope="col" class="{name}">/{name}</th>' for name in figures.routes)
    return (
        f"<table><thead><tr><th></th>{heads}</tr></thead>"
        f"<tbody>{lines(summary.rows_of_run(figures))}"
        f'<tr class="part"><th colspan="{1 + len(figures.routes)}">In the stampede</th></tr>'
        f"{lines(summary.rows_of_stampede(figures))}</tbody></table>"
    )


def _parameters(options: Options, figures: Figures, addresses: Sequence[str]) -> dict[str, str]:
    machine = summary.machine()
    backend = {} if options.backend is None else {"Backend": without_password(options.backend)}
    return {
        "Load on each route": f"{options.duration:g} s",
        "Clients": f"{options.clients:,}",
        "Items": f"{options.keys:,}",
        "Rows": f"{options.rows:,}",
        "Seed": str(options.seed),
        "Shards": f"{figures.stats['flight']['shards']:,}",
        "Server processes": str(options.workers),
        **backend,
        "Threads of each": str(THREADS),
        "Address" if len(addresses) == 1 else "Addresses": " ".join(addresses),
        "Python": str(machine["python"]),
        "System": str(machine["system"]),
        "Processors": str(machine["processors"]),
    }


def _stats(figures: Figures) -> str:
    return "".join(
        f'<div class="card"><p class="legend"><span class="{route}">/{route}</span></p>'
        f'<dl class="pairs">{_pairs(_spelt_out(stats))}</dl></div>\n'
        for route, stats in figures.stats.items()
    )


def _spelt_out(stats: dict[str, int]) -> dict[str, str]:
    return {name.replace("_", " "): f"{number:,}" for name, number in stats.items()}


def _pairs(pairs: dict[str, str]) -> str:
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in pairs.items()
    )
