"""The plots of the report, as SVG to stand inside an HTML page.

Text stays text and colours become the page's own, so that both follow its font and its light or
dark scheme. Each plot is drawn twice: wide, and narrow for a phone.
"""

# Matplotlib annotates its functions in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import re
from collections.abc import Callable, Sequence
from io import StringIO
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    MultipleLocator,
    NullLocator,
    StrMethodFormatter,
)

from shardedflight.demo.figures import Figures, RouteFigures
from shardedflight.demo.server import RouteName

# Drawn in these, which occur nowhere else, and then replaced.
_INK = "#000001"
_FAINT = "#000002"
_COLOURS: dict[RouteName, str] = {"direct": "#000003", "flight": "#000004", "tier": "#000005"}
_VARIABLES = {
    _INK: "var(--ink)",
    _FAINT: "var(--faint)",
    **{colour: f"var(--{route})" for route, colour in _COLOURS.items()},
}

_STYLE: dict[Any, str | float | bool] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "grid.color": _FAINT,
    "grid.linewidth": 0.4,
    "text.color": _INK,
    "xtick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.color": _FAINT,
    "ytick.labelcolor": _INK,
}

#: Inches; the page's style sheet shows one or the other.
_WIDTHS = {"wide": 7.6, "narrow": 4.0}

#: Points of a curve; more cannot be told apart.
_POINTS = 1_000


def latencies(figures: Figures) -> str:
    """How many requests were answered within which time."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for name, route in figures.routes.items():
            number = len(route.latencies)
            step = max(1, number // _POINTS)
            # Backwards, so that the slowest is among them.
            places = range(number - 1, -1, -step)
            axes.plot(
                [route.latencies[place] * 1000 for place in places],
                [(place + 1) / number * 100 for place in places],
                color=_COLOURS[name],
                linewidth=2,
            )
        axes.set_xscale("log")
        labels = (1, 2, 5) if figure.get_figwidth() == _WIDTHS["wide"] else (1, 3)
        axes.xaxis.set_major_locator(LogLocator(subs=labels))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(_duration))
        axes.set_ylim(0, 101)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g} %"))
        axes.yaxis.set_major_locator(MultipleLocator(25))
        axes.grid(visible=True)
        axes.set_xlabel("latency")
        axes.set_title("requests answered within")

    return _both_widths(draw, "Distribution of the latency of the routes", height=3.2)


def in_flight(figures: Figures) -> str:
    """Executions in flight over time."""

    def draw(figure: Figure) -> None:
        routes = figures.routes
        every = figure.subplots(len(routes), sharex=True, sharey=True)
        for axes, (name, route) in zip(every, routes.items(), strict=True):
            _draw_in_flight(axes, route, f"/{name}", _COLOURS[name])
        lowest = every[-1]
        lowest.set_xlabel("seconds since the load began")
        lowest.set_xlim(0, max(route.seconds for route in routes.values()))
        lowest.set_ylim(bottom=0)

    height = 2.1 * len(figures.routes)
    return _both_widths(draw, "Executions in flight over time on the routes", height=height)


def stampede(figures: Figures) -> str:
    """Executions in flight from the stampede's beginning until all have their answers."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for name, route in figures.routes.items():
            colour = _COLOURS[name]
            began, ended = route.stampede.began, route.stampede.ended
            points = [(0.0, 0)]
            points += [
                ((at - began) * 1000, number)
                for at, number in route.in_flight
                if began <= at <= ended
            ]
            end = route.stampede.seconds * 1000
            _fill(axes, [*points, (end, 0)], colour)
            axes.axvline(end, color=colour, linewidth=1.2, linestyle=(0, (3, 2)))
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.grid(visible=True)
        axes.set_xlabel("milliseconds since the stampede began")
        axes.set_title("executions in flight")

    return _both_widths(draw, "Executions in flight in the stampede on the routes", height=2.8)


def _draw_in_flight(axes: Axes, route: RouteFigures, name: str, colour: str) -> None:
    axes.axvspan(route.stampede.began, route.stampede.ended, color=_FAINT, alpha=0.35, linewidth=0)
    axes.annotate(
        "stampede",
        ((route.stampede.began + route.stampede.ended) / 2, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 4),
        textcoords="offset points",
        horizontalalignment="center",
    )
    _fill(axes, _thinned(route.in_flight), colour)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.grid(visible=True)
    axes.set_title(name, color=colour)


def _fill(axes: Axes, points: Sequence[tuple[float, int]], colour: str) -> None:
    at = [point[0] for point in points]
    number = [point[1] for point in points]
    axes.fill_between(at, number, step="post", color=colour, alpha=0.25, linewidth=0)
    axes.step(at, number, where="post", color=colour, linewidth=1.2)


def _thinned(samples: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """Keeps the lowest and the highest of each stretch of samples, in order."""
    step = max(1, 2 * len(samples) // _POINTS)
    stretches = (samples[start : start + step] for start in range(0, len(samples), step))
    return [
        sample
        for stretch in stretches
        for sample in sorted(
            {min(stretch, key=lambda one: one[1]), max(stretch, key=lambda one: one[1])}
        )
    ]


def _duration(milliseconds: float, _: int | None) -> str:
    return f"{milliseconds / 1000:g} s" if milliseconds >= 1000 else f"{milliseconds:g} ms"


def _both_widths(draw: Callable[[Figure], None], name: str, *, height: float) -> str:
    return "\n".join(
        _svg(draw, name, css_class, width, height) for css_class, width in _WIDTHS.items()
    )


def _svg(
    draw: Callable[[Figure], None], name: str, css_class: str, width: float, height: float
) -> str:
    with rc_context({**_STYLE, "svg.hashsalt": f"{name} {css_class}"}):
        figure = Figure((width, height), layout="constrained")
        draw(figure)
        buffer = StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Inside HTML neither is needed, and the names look like references to the network.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    # Only definitions are referred to; other names would occur once in each plot.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    view_box = re.search(r'viewBox="[^"]*"', svg)
    if view_box is None:
        raise ValueError("matplotlib has drawn no SVG that this module knows")
    start = f'<svg class="{css_class}" role="img" aria-label="{name}" {view_box[0]}>'
    return start + svg[svg.index(">") + 1 :]
