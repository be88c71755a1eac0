"""The results as pictures: PNG files beside the JSON."""

# Matplotlib annotates its functions in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from shardedflight.bench.measure import Result, Unit
from shardedflight.bench.report import by_whom, compared, fitted, groups, in_words, surroundings
from shardedflight.bench.scaling import TABLED, Grid, Point, Workload

_STYLE: dict[Any, str | float | bool] = {
    "font.size": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
}
_MET = {True: "#2a8a3e", False: "#c0392b", None: "#7f8fa6"}
_DPI = 120


def pictures(results: Sequence[Result], grid: Grid | None) -> Iterator[tuple[str, Figure]]:
    """Draws what there is to draw; yields file names and figures."""
    with rc_context(_STYLE):
        measured = [one for one in results if one.figures]
        times = [one for one in measured if one.unit.compared_by == "ratio"]
        memory = [one for one in measured if one.unit is Unit.BYTES]
        processes = [one for one in measured if one.unit is Unit.SECONDS]
        curves = [one for one in times if one.subject.name in _CURVES and one.who in _FORMS]
        if times:
            yield "ratios.png", _bars(times, "times the floor, on a logarithmic scale", 0.1)
        if memory:
            yield "memory.png", _bars(memory, "bytes beyond the floor, on a logarithmic scale", 0.1)
        if processes:
            yield "tiers.png", _bars(processes, "seconds, on a logarithmic scale", 1e-5)
        if curves:
            yield "curves.png", _curves(curves)
        if grid is not None:
            yield "scaling.png", _scaling(grid)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG."""
    figure.savefig(path, format="png", dpi=_DPI)


def _bars(results: Sequence[Result], label: str, least: float) -> Figure:
    """One bar for each figure, of `least` at least, with its quartiles and its target."""
    lines = len(results) + 2.3 * len(list(groups(results)))
    figure = Figure((9, 1.2 + 0.2 * lines), layout="constrained")
    axes = figure.subplots()
    at = 0.0
    names: list[str] = []
    places: list[float] = []
    for subject, members in groups(results):
        axes.annotate(
            f"{subject.what}\nagainst {subject.against}".replace("`", ""),
            (0, at),
            xycoords=("axes fraction", "data"),
            verticalalignment="center",
            fontsize=8,
        )
        at += 1.3
        for result in members:
            figures = result.figures
            assert figures is not None
            # A logarithmic scale has no place for what is not above 0.
            value = max(figures.figure, least)
            axes.barh(at, value, color=_MET[result.met], height=0.8)
            label_at = value
            if result.target is not None:
                target = result.target.value
                axes.plot([target] * 2, [at - 0.45, at + 0.45], color="black", linewidth=2)
                # Where the two would lie on each other.
                label_at = target if value < target < 1.5 * value else value
            axes.annotate(
                f" {compared(figures.figure, result.unit)}",
                (label_at, at),
                verticalalignment="center",
                fontsize=7,
            )
            names.append(by_whom(result))
            places.append(at)
            at += 1
        at += 0.5
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(_number))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(places, names, fontsize=7)
    axes.set_ylim(at, -1)
    figure.supxlabel(
        f"{label}; green reaches the target (black), red does not\n{in_words(surroundings())}",
        fontsize=7,
    )
    axes.set_axisbelow(True)
    axes.grid(visible=True, axis="x")
    return figure


_FORMS = {"compiled", "plain"}
_CURVES = {"keys-in-flight": "keys in flight", "followers-curve": "followers of one key"}


def _number(value: float, _: int | None) -> str:
    return f"{value:,g}"


def _curves(results: Sequence[Result]) -> Figure:
    """How a cost depends on a number."""
    figure = Figure((9, 3.6), layout="constrained")
    members = dict(groups(results))
    every = figure.subplots(1, len(members), squeeze=False)
    for axes, (subject, of_subject) in zip(every[0], members.items(), strict=True):
        for who in dict.fromkeys(result.who for result in of_subject):
            points = [
                (int(result.point.split()[0].replace(",", "")), result.figures)
                for result in of_subject
                if result.who == who and result.figures is not None
            ]
            numbers = [number for number, _ in points]
            axes.plot(numbers, [one.figure for _, one in points], marker="o", label=who)
            axes.fill_between(
                numbers,
                [one.lower_quartile for _, one in points],
                [one.upper_quartile for _, one in points],
                alpha=0.2,
            )
        for result in of_subject:
            if result.target is not None:
                axes.axhline(result.target.value, color="black", linewidth=0.8, linestyle="--")
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel(_CURVES[subject.name])
        axes.set_title(f"times {subject.against}".replace("`", ""), fontsize=8)
        axes.grid(visible=True)
        axes.legend(frameon=False)
    figure.supxlabel(f"dashed: the target. {in_words(surroundings())}", fontsize=7)
    return figure


def _scaling(grid: Grid) -> Figure:
    """Calls per second by threads and shards, and the model beyond what was measured."""
    figure = Figure((12, 4), layout="constrained")
    left, *others = figure.subplots(1, len(TABLED), sharey=True)
    for axes, workload in zip((left, *others), TABLED, strict=True):
        for shards in grid.shards():
            axes.plot(
                grid.threads,
                [grid.median(Point(workload, shards, count)) / 1e6 for count in grid.threads],
                marker="o",
                linewidth=2.5 if shards is None else 1,
                color="black" if shards is None else None,
                label=grid.label(shards),
            )
        _draw_model(axes, grid, workload)
        axes.set_title(workload.value)
        axes.set_xlabel("threads")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(_number))
        axes.set_ylim(bottom=0)
        axes.grid(visible=True)
    left.set_ylabel("million calls per second, all threads together")
    left.legend(frameon=False, fontsize=7)
    figure.supxlabel(
        "dots: measured; grey: the universal scalability law fitted to the default shards, a model"
        f"\n{in_words(surroundings())}",
        fontsize=7,
    )
    return figure


def _draw_model(axes: Axes, grid: Grid, workload: Workload) -> None:
    law = fitted(grid, workload, None)
    alone = grid.median(Point(workload, None, 1)) / 1e6
    most = grid.threads[-1]
    counts = [1 + step / 100 * (4 * most - 1) for step in range(101)]
    low = [alone * law.coherency.speed_up(count) for count in counts]
    high = [alone * law.contention.speed_up(count) for count in counts]
    axes.fill_between(counts, low, high, color="grey", alpha=0.15, linewidth=0)
    for line in (low, high):
        axes.plot(counts, line, color="grey", linewidth=0.8, linestyle=":")
