"""The command line."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from shardedflight.bench import report
from shardedflight.bench.measure import Result, Row, measure, rounds_of
from shardedflight.bench.rows import ROWS


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(
        prog="python -m shardedflight.bench",
        description="Measures what a flight costs, as ratios within one run.",
    )
    parser.add_argument(
        "--only",
        metavar="ROW",
        action="append",
        choices=names,
        help=f"measure this row; may be repeated. Rows: {', '.join(names)}",
    )
    parser.add_argument("--quick", action="store_true", help="a short run: figures mean little")
    parser.add_argument("--json", metavar="PATH", type=Path, help="write all figures to this file")
    parser.add_argument(
        "--markdown", action="store_true", help="print the table in the form that README.md has"
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 if an aim is missed")
    options = parser.parse_args(arguments)
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no directory {options.json.parent}")
    return options


def main(arguments: Sequence[str]) -> int:
    """Measures the rows that were asked for, tells what they gave, and returns the exit status."""
    options = parse(arguments)
    rows = [row for row in ROWS if options.only is None or row.name in options.only]
    command = shlex.join(["python", "-m", "shardedflight.bench", *arguments])
    try:
        results = measure_all(rows, quick=options.quick)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return 130
    if options.json is not None:
        figures = report.as_json(results, command)
        try:
            options.json.write_text(
                json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        except OSError as error:
            sys.stderr.write(f"Cannot write the figures to {options.json}: {error.strerror}\n")
            return 2
    if options.markdown:
        sys.stdout.write(report.as_markdown(results, command))
    else:
        # Only a terminal knows its width.
        console = Console() if sys.stdout.isatty() else Console(width=100)
        console.print(report.as_table(results, quick=options.quick))
    missed = [result.row.name for result in results if result.met is False]
    if options.strict and missed:
        sys.stderr.write(f"Aims missed: {', '.join(missed)}\n")
        return 1
    return 0


def measure_all(rows: Sequence[Row], *, quick: bool) -> list[Result]:
    """Measures the rows one after another, showing how far it is."""
    console = Console(stderr=True)
    results: list[Result] = []
    # Drawn between rounds only: a drawing thread would run into what is measured.
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        auto_refresh=False,
        transient=True,
    )
    with progress:
        task = progress.add_task("")

        def on_round() -> None:
            progress.advance(task)
            progress.refresh()

        for number, row in enumerate(rows, 1):
            description = f"{number} of {len(rows)}: {row.name}"
            if not console.is_terminal:
                console.print(description)
            progress.reset(task, total=rounds_of(row, quick=quick), description=description)
            results.append(measure(row, quick=quick, on_round=on_round))
    return results
