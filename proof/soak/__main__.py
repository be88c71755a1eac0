"""The program: starts the workers, tells them the windows, merges what they saw, prints."""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import pickle
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import SystemRandom
from typing import Any

from proof.histories import History, Violation, check

from . import worker
from .mix import PATIENCE, Mood

_ROOT = Path(__file__).resolve().parent.parent.parent

_MOODS = {
    "exact": Mood("exact"),
    "rough": Mood("rough", leaving=True),
    "observed": Mood("observed", leaving=True, observed=True),
    "host": Mood("host", leaving=True, meets=True),
    "redis": Mood("redis", leaving=True, meets=True),
}

#: Where processes meet, what is forgotten on its way to somebody may run once more than it has to.
#: Of so many executions one may.
_TWICE = 1 / 2_000

_DESCRIPTION = """\
Calls every method of a flight at once, at random, from threads, several event loops and several
processes, with failures, lost leaders, cancellations, timeouts, forgets, event loops closed under
their tasks, and forks, in windows of a second or so. After each window nothing may be in flight,
every total of stats() has to be what the callers saw, and the history of the window has to be
allowed by the contract (proof/histories.py). At the end no thread, task, descriptor or file may be
left, and memory has to be as it was in the middle.

Windows: exact (nobody leaves, so that every total is known), rough (callers leave), observed (the
same, and an observer counts too), host and redis (the processes meet over a backend).

It is blind to what the scheduler does not do: a seed repeats the calls, not their interleaving. It
does not kill processes or servers; proof.faults does."""


class _Process:
    """A worker, and its pipes."""

    def __init__(self, number: int, options: dict[str, Any]) -> None:
        self.number = number
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "proof.soak", "--worker", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_ROOT,
            text=True,
        )

    def tell(self, order: dict[str, Any]) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps(order) + "\n")
        self.popen.stdin.flush()

    def hear(self, patience: float) -> dict[str, Any]:
        """The next answer. One that is not there after `patience` seconds is a hung process."""
        assert self.popen.stdout is not None
        ready, _, _ = select.select([self.popen.stdout], [], [], patience)
        if not ready:
            self.popen.send_signal(signal.SIGABRT)  # faulthandler prints where it is
            self.popen.wait()
            return {"hung": f"process {self.number} says nothing for {patience:.0f} s"}
        line = self.popen.stdout.readline()
        if not line:
            return {"hung": f"process {self.number} ended with {self.popen.wait()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class Soak:
    """One run.

    Args:
        options: Of the command line.
        moods: Of the windows, in turn.
        directory: For what the processes share.
        redis: The URL of a server, if they meet over one.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        moods: list[str],
        directory: Path,
        redis: str | None,
    ) -> None:
        self.options = options
        self.moods = moods
        self.directory = directory
        self.host = directory / "host"
        self.totals: Counter[str] = Counter()
        #: Executions in windows in which processes meet.
        self.met = 0
        self.outcomes: Counter[str] = Counter()
        self.used: Counter[str] = Counter()
        self.faults: list[str] = []
        #: Of each process, after each window.
        self.censuses: list[list[dict[str, int]]] = [[] for _ in range(options.processes)]
        self.python = ""
        self.seconds = 0.0
        self.processes: list[_Process] = []
        if "host" in moods:
            self.host.mkdir(0o700)
        for number in range(options.processes):
            shared = {
                "process": number,
                "host": str(self.host) if "host" in moods else None,
                "redis": redis,
                "tracemalloc": options.tracemalloc,
            }
            self.processes.append(_Process(number, shared))

    def run(self) -> None:
        """Windows, until the time is over or somebody is hung."""
        hello = [process.hear(PATIENCE) for process in self.processes]
        if any("hung" in answer for answer in hello):
            raise SystemExit(f"the workers do not start: {hello}")
        core = "compiled" if hello[0]["compiled"] else "plain"
        self.python = f"CPython {hello[0]['python']}, {core} core"
        print(
            f"{self.python}, {self.options.processes} processes, seed {self.options.seed}",
            flush=True,
        )
        begun = said = time.monotonic()
        number = 0
        try:
            while time.monotonic() < begun + self.options.seconds and not self.totals["hung"]:
                self._window(number)
                number += 1
                self.seconds = time.monotonic() - begun
                if time.monotonic() > said + self.options.every:
                    said = time.monotonic()
                    print(self._progress(), flush=True)
            if not self.totals["hung"]:
                self._end()
        finally:
            self.stop()

    def _window(self, number: int) -> None:
        name = self.moods[number % len(self.moods)]
        mood = _MOODS[name]
        files = [self.directory / f"history {process.number}" for process in self.processes]
        for process, file in zip(self.processes, files, strict=True):
            process.tell(
                {
                    "number": number,
                    "moods": len(self.moods),
                    "mood": dataclasses.asdict(mood),
                    "seconds": self.options.window,
                    "seed": self.options.seed,
                    "size": self.options.size,
                    "forks": not self.options.no_forks,
                    "file": str(file),
                }
            )
        patience = self.options.window + 3 * PATIENCE
        answers = [process.hear(patience) for process in self.processes]
        self.totals["windows"] += 1
        for process, answer in zip(self.processes, answers, strict=True):
            if "hung" in answer:
                self.totals["hung"] += 1
                self._fault(answer["hung"])
                continue
            self.outcomes.update(answer["outcomes"])
            self.used.update(answer["used"])
            for fault in answer["faults"]:
                self._fault(fault)
            self.censuses[process.number].append(answer["census"])
            for what, value in answer.items():
                if type(value) is int:
                    self.totals[what] += value
        if mood.meets and not any("hung" in answer for answer in answers):
            self._merge(files, answers, number, name)

    def _merge(
        self, files: list[Path], answers: list[dict[str, Any]], number: int, name: str
    ) -> None:
        """What the processes saw, together."""
        histories: list[History] = [pickle.loads(file.read_bytes()) for file in files]
        troubles = ("fenced", "fallbacks", "misses")
        apart = any(answer["used"][what] for answer in answers for what in troubles)
        violations: list[Violation] = check(*histories, apart=apart)
        twice = [violation for violation in violations if violation.rule == "one"]
        self.totals["twice"] += len(twice)
        for violation in twice[:1]:
            print(f"twice: window {number}, {name}: {violation}", flush=True)
        self.met += sum(answer["executions"] for answer in answers)
        violations = [violation for violation in violations if violation.rule != "one"]
        self.totals["violations"] += len(violations)
        for violation in violations[:5]:
            self._fault(f"window {number}, {name}: {violation}")

    def _fault(self, text: str) -> None:
        self.faults.append(text)
        if len(self.faults) <= self.options.most:
            print(f"FAULT: {text}", flush=True)

    def _end(self) -> None:
        for process in self.processes:
            process.tell({"stop": True})
        for process in self.processes:
            answer = process.hear(2 * PATIENCE)
            if "hung" in answer:
                self.totals["hung"] += 1
                self._fault(answer["hung"])
                continue
            self.totals["left"] += answer["left"]
            for fault in answer["faults"]:
                self._fault(fault)
        if self.host.exists():
            files = sorted(str(file.relative_to(self.host)) for file in self.host.rglob("*"))
            left = [file for file in files if file != "token"]  # which the backend keeps
            self.totals["left"] += len(left)
            for file in left[:5]:
                self._fault(f"left in the directory of the backend: {file}")
        if self.totals["twice"] > max(5, self.met * _TWICE):
            self._fault(
                f"{self.totals['twice']} of {self.met} executions ran beside others of their key"
            )
        for number, censuses in enumerate(self.censuses):
            self._grown(number, censuses)

    def _grown(self, number: int, censuses: list[dict[str, int]]) -> None:
        """Compares the middle with the end."""
        if len(censuses) < 20:
            return
        for what, (ratio, more) in {
            "blocks": (0.01, 1500),
            "kilobytes": (0.05, 6000),
            "descriptors": (0.0, 2),
            "threads": (0.0, 2),
        }.items():
            middle, end = _middle_and_end(censuses, what)
            if end > middle * (1 + ratio) + more:
                self.totals["leaked"] += 1
                self._fault(f"process {number}: {what} grew from {middle:.0f} to {end:.0f}")

    def stop(self) -> None:
        """Ends what is left of the workers."""
        for process in self.processes:
            process.stop()

    def _progress(self) -> str:
        totals = self.totals
        memory = ", ".join(
            f"{censuses[-1]['kilobytes'] / 1024:.0f}" for censuses in self.censuses if censuses
        )
        return (
            f"{self.seconds:6.0f} s  {totals['windows']} windows  {totals['calls']:,} calls  "
            f"{totals['executions']:,} executions  {totals['forks']} forks  "
            f"{memory} MB  {len(self.faults)} faults"
        )

    def figures(self) -> dict[str, Any]:
        """What is printed at the end."""
        names = ("windows", "calls", "executions", "forgets", "forks", "promotions", "abandoned")
        names = (*names, "deadlocks", "hung", "violations", "twice", "miscounted", "left", "leaked")
        found: dict[str, Any] = {
            "python": self.python,
            "seed": self.options.seed,
            "moods": self.moods,
            "processes": self.options.processes,
            "seconds": round(self.seconds, 1),
            **{name: self.totals[name] for name in names},
            "faults": len(self.faults),
            "outcomes": dict(self.outcomes),
            "backend": {name: count for name, count in self.used.items() if count},
        }
        for what in ("kilobytes", "blocks", "descriptors", "threads"):
            if all(len(censuses) > 1 for censuses in self.censuses):
                pairs = [_middle_and_end(censuses, what) for censuses in self.censuses]
                found[f"{what}, middle and end"] = [[round(a), round(b)] for a, b in pairs]
        return found


def _middle_and_end(censuses: list[dict[str, int]], what: str) -> tuple[float, float]:
    """Medians of the windows around the middle, and of the last ones."""
    number = len(censuses)
    middle = censuses[number * 4 // 10 : number * 6 // 10 + 1]
    end = censuses[number * 8 // 10 :]
    return (
        statistics.median(census.get(what, 0) for census in middle),
        statistics.median(census.get(what, 0) for census in end),
    )


def _table(figures: dict[str, Any]) -> str:
    rows: list[tuple[str, str]] = []
    for name, value in figures.items():
        if isinstance(value, dict):
            text = ", ".join(f"{k} {v:,}" for k, v in value.items())
        elif isinstance(value, list):
            text = ", ".join(
                " -> ".join(f"{number:,}" for number in item) if isinstance(item, list) else item
                for item in value
            )
        else:
            text = f"{value:,}" if isinstance(value, (int, float)) else str(value)
        rows.append((name, text))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m proof.soak",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="for how long (60)")
    parser.add_argument("--processes", type=int, default=2, help="how many (2)")
    parser.add_argument("--size", type=int, default=4, help="threads in each, loops half of it (4)")
    parser.add_argument("--window", type=float, default=1.0, help="seconds of a window (1)")
    parser.add_argument("--seed", default=str(SystemRandom().randrange(10**9)), help="any text")
    parser.add_argument(
        "--moods", default="exact,rough,observed,host", help="kinds of windows, in turn"
    )
    parser.add_argument("--redis", metavar="URL", help="of a server: adds windows of kind redis")
    parser.add_argument("--valkey", action="store_true", help="the same, with a server of its own")
    parser.add_argument("--no-forks", action="store_true", help="no forks")
    parser.add_argument("--tracemalloc", action="store_true", help="trace memory: slow")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between lines (5)")
    parser.add_argument("--most", type=int, default=20, help="faults to print (20)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there, too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    # Terminated, it ends as when it is interrupted, and ends what it has started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options.moods = options.moods.split(",")
    unknown = [mood for mood in options.moods if mood not in _MOODS]
    if unknown:
        parser.error(f"no such kind of window: {unknown[0]}")
    return options


def main() -> int:
    """Runs the soak. Returns 1 if there was any fault."""
    options = _arguments()
    if options.worker:
        worker.main(options.worker)
        return 0
    moods: list[str] = options.moods
    if "host" in moods and (os.name == "nt" or importlib.util.find_spec("msgspec") is None):
        print("Without windows of kind host: they need POSIX and the extra host")
        moods.remove("host")
    with contextlib.ExitStack() as stack:
        redis = options.redis
        if options.valkey:
            sys.path.insert(0, str(_ROOT / "tests"))
            # For those who have one.
            from valkey_support import (  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
                Valkey,
            )

            server = Valkey()
            stack.callback(server.stop)
            redis = server.url
        if redis and "redis" not in moods:
            moods.append("redis")
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        soak = Soak(options, moods, directory, redis)
        stack.callback(soak.stop)
        soak.run()
    figures = soak.figures()
    print(_table(figures))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if soak.faults else 0


if __name__ == "__main__":
    sys.exit(main())
