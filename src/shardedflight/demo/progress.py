"""What the user sees while the demo runs: bars on a terminal, lines elsewhere."""

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

#: Seconds between two lines.
_LINE_INTERVAL = 1.0


class Display(Protocol):
    """Shows one step after another."""

    def begin(self, step: str) -> None:
        """Shows that a step begins; the one before has ended."""

    def show(self, done: float, note: str) -> None:
        """Shows how far the step is, as a fraction, and what there is to tell."""

    def end(self, note: str) -> None:
        """Shows that the step has ended, and with what."""


class Bars:
    """On a terminal: a bar for each step, with its latest note."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = TaskID(0)

    def begin(self, step: str) -> None:
        """Adds a bar."""
        self._task = self._progress.add_task(step, total=1.0, note="")

    def show(self, done: float, note: str) -> None:
        """Moves the bar and changes the note."""
        self._progress.update(self._task, completed=min(done, 1.0), note=note)

    def end(self, note: str) -> None:
        """Fills the bar."""
        self.show(1.0, note)


class Lines:
    """Elsewhere: a line when a step begins and ends, and now and then between."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._step = ""
        self._next = 0.0

    def begin(self, step: str) -> None:
        """Prints the step."""
        self._step = step
        self._next = time.monotonic() + _LINE_INTERVAL
        self._print("")

    def show(self, done: float, note: str) -> None:
        """Prints the note, unless there was a line a moment ago."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _LINE_INTERVAL
            self._print(note)

    def end(self, note: str) -> None:
        """Prints the last note."""
        self._print(note)

    def _print(self, note: str) -> None:
        line = f"{self._step}: {note}" if note else self._step
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def display_on(console: Console) -> Generator[Display]:
    """Shows progress on the console as its kind allows."""
    if not console.is_terminal or console.is_dumb_terminal:
        yield Lines(console)
        return
    with Progress(
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        TextColumn("{task.fields[note]}"),
        console=console,
    ) as progress:
        yield Bars(progress)
