"""The command line."""

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryFile

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from shardedflight.bench import plain, plots, report, scaling
from shardedflight.bench.basics import FORM
from shardedflight.bench.benchmarks import benchmarks
from shardedflight.bench.measure import Benchmark, Contender, Result, measure

NAMES = (*(benchmark.name for benchmark in benchmarks(quick=True)), scaling.SUBJECT.name)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m shardedflight.bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measures what a flight costs, as ratios within one run.",
        epilog=(
            "The whole takes about ten minutes on two cores. It takes less with --only\n"
            "(`scaling`, `follower-threads` and `tiers` are the longest), with --without peers,\n"
            "plain or tiers, and with --quick, whose figures only show that it all works.\n\n"
            f"Benchmarks: {', '.join(NAMES)}."
        ),
    )
    parser.add_argument(
        "--only",
        metavar="NAME",
        action="append",
        type=_names,
        help="run this benchmark, or those that match, such as 'memory-*', or a group by its first "
        "word, such as tiers; may be repeated",
    )
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        choices=["peers", "plain", "tiers"],
        help="leave out other libraries, the plain form that is measured beside the compiled one, "
        "or what needs a Valkey and several processes; may be repeated",
    )
    parser.add_argument("--quick", action="store_true", help="a short run: figures mean little")
    parser.add_argument(
        "--keep",
        metavar="FOLDER",
        type=Path,
        default=Path("bench-results", f"{_interpreter()}-{FORM}"),
        help="where figures.json and the plots go (default: %(default)s)",
    )
    parser.add_argument(
        "--markdown", action="store_true", help="print the tables in the form that the docs have"
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target is missed")
    return parser.parse_args(arguments)


def _names(pattern: str) -> list[str]:
    found = [name for name in NAMES if fnmatchcase(name, pattern)]
    if not found:  # the first word of several
        found = [name for name in NAMES if fnmatchcase(name, f"{pattern}-*")]
    if not found:
        raise argparse.ArgumentTypeError(
            f"no benchmark is called {pattern!r}; there are {', '.join(NAMES)}"
        )
    return found


def _interpreter() -> str:
    """Such as cpython-3.14.6t."""
    version = ".".join(map(str, sys.version_info[:3]))
    return f"{sys.implementation.name}-{version}{getattr(sys, 'abiflags', '')}"


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmarks that were asked for, tells what they gave, returns the exit status."""
    options = parse(arguments)
    chosen = NAMES if options.only is None else [name for names in options.only for name in names]
    if "tiers" in options.without:
        chosen = [name for name in chosen if not name.startswith("tiers-")]
    command = shlex.join(["python", "-m", "shardedflight.bench", *arguments])
    try:
        options.keep.mkdir(parents=True, exist_ok=True)
        # Here rather than after ten minutes.
        with TemporaryFile(dir=options.keep):
            pass
    except OSError as error:
        return _cannot_write(options.keep, error)
    # Terminated, it ends as when it is interrupted: whatever it has started ends with it.
    default = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        results, grid = measure_all(chosen, options.without, quick=options.quick)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return 130
    finally:
        signal.signal(signal.SIGTERM, default)
    try:
        keep(options.keep, results, grid, command)
    except OSError as error:
        return _cannot_write(options.keep, error)
    if options.markdown:
        sys.stdout.write(report.as_markdown(results, grid, command))
    else:
        # Only a terminal knows its width.
        console = Console() if sys.stdout.isatty() else Console(width=100)
        console.print(report.as_table(results, quick=options.quick))
        if grid is not None:
            console.print(report.scaling_table(grid))
        console.print(f"Kept in {options.keep}", highlight=False, soft_wrap=True)
    missed = [
        f"{result.subject.name} ({report.by_whom(result)})"
        for result in results
        if result.met is False
    ]
    if options.strict and missed:
        sys.stderr.write(f"Targets missed: {'; '.join(missed)}\n")
        return 1
    return 0


def _cannot_write(folder: Path, error: OSError) -> int:
    sys.stderr.write(f"Cannot write the figures to {folder}: {error.strerror}\n")
    return 2


def keep(folder: Path, results: Sequence[Result], grid: scaling.Grid | None, command: str) -> None:
    """Writes the figures and the plots."""
    figures = report.as_json(results, grid, command)
    text = json.dumps(figures, indent=2, ensure_ascii=False) + "\n"
    (folder / "figures.json").write_text(text, encoding="utf-8")
    for name, picture in plots.pictures(results, grid):
        plots.save(picture, folder / name)


def measure_all(
    names: Sequence[str], without: Sequence[str], *, quick: bool
) -> tuple[list[Result], scaling.Grid | None]:
    """Runs the benchmarks one after another, showing how far it is.

    Args:
        names: Which ones.
        without: May have "peers" and "plain"; what is in `names` is measured in any case.
        quick: Whether figures need not mean anything.
    """
    results: list[Result] = []
    grid: scaling.Grid | None = None
    chosen = [benchmark for benchmark in benchmarks(quick=quick) if benchmark.name in names]
    with ExitStack() as stack:
        begin = stack.enter_context(_progress(len(set(names))))
        worker: plain.Worker | None = None
        if FORM == "compiled" and "plain" not in without and chosen:
            worker = stack.enter_context(plain.worker())
        for benchmark in chosen:
            on_round = begin(benchmark.name, benchmark.rounds)
            with ExitStack() as prepared:
                contenders = prepare(
                    benchmark, prepared, worker, peers="peers" not in without, quick=quick
                )
                results += measure(benchmark, contenders, on_round)
        if scaling.SUBJECT.name in names:
            on_step = begin(scaling.SUBJECT.name, scaling.steps(quick=quick))
            grid = scaling.measure_grid(quick=quick, on_step=on_step)
            results += scaling.results_of(grid)
    return results, grid


def prepare(
    benchmark: Benchmark,
    stack: ExitStack,
    worker: plain.Worker | None,
    *,
    peers: bool,
    quick: bool,
) -> list[Contender]:
    """Makes all contenders of a benchmark, this library's first; `stack` ends them."""
    contenders = list(stack.enter_context(benchmark.prepare(benchmark.operations)))
    if worker is not None and benchmark.both_forms:
        contenders += stack.enter_context(worker.prepare(benchmark.name, quick=quick))
    if peers and benchmark.prepare_peers is not None:
        contenders += stack.enter_context(benchmark.prepare_peers(benchmark.operations))
    return contenders


@contextmanager
def _progress(benchmarks_wanted: int) -> Iterator[Callable[[str, int], Callable[[], None]]]:
    """Yields what is to be called when a benchmark begins; it returns what each round calls."""
    console = Console(stderr=True)
    number = 0
    # Drawn between rounds only: a drawing thread would run into what is measured.
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,
        transient=True,
    )
    with progress:
        task = progress.add_task("")

        def begin(name: str, rounds: int) -> Callable[[], None]:
            nonlocal number
            number += 1
            description = f"{number} of {benchmarks_wanted}: {name}"
            if not console.is_terminal:
                console.print(description, highlight=False)
            progress.reset(task, total=rounds, description=description)
            progress.refresh()
            return on_round

        def on_round() -> None:
            progress.advance(task)
            progress.refresh()

        yield begin
