"""`make model`: explores the protocol of the Redis tier, and faults planted in it."""

import argparse
import sys
import time
from collections.abc import Iterator

from .checker import Report, check
from .planted import PLANTED
from .protocol import CRASH, CUT, KILL, LOSE, REFUSE, RESTART, STALL, Protocol, Scenario

#: What is explored, the smallest first: what it is about, and its size.
SCENARIOS: tuple[tuple[str, Scenario], ...] = (
    ("two processes", Scenario((0, 1))),
    ("two callers of one process, one of another", Scenario((0, 0, 1))),
    ("a caller leaves", Scenario((0, 1), leaves=1)),
    ("renewals", Scenario((0, 1), beats=True, faults=1, kinds=(STALL,))),
    *((f"a fault: {kind}", Scenario((0, 1), faults=1, kinds=(kind,)))
      for kind in (CRASH, STALL, LOSE, CUT, KILL, REFUSE, RESTART)),
    ("a forget", Scenario((0, 1), forgets=1)),
    ("a forget, outcomes are held", Scenario((0, 1), forgets=1, hold=True)),
    ("large outcomes", Scenario((0, 1), large=True, faults=1)),
    ("a fault and a caller that leaves", Scenario((0, 1), faults=1, leaves=1)),
    ("a fault and a forget", Scenario((0, 1), faults=1, forgets=1)),
    ("three callers, a forget", Scenario((0, 0, 1), forgets=1)),
    ("three processes, one is stopped", Scenario((0, 1, 2), faults=1, kinds=(STALL,))),
    ("two faults", Scenario((0, 1), faults=2)),
    ("three processes, a restart", Scenario((0, 1, 2), faults=1, kinds=(RESTART,))),
)  # fmt: skip


def say(report: Report) -> None:
    """A line of progress."""
    print(f"    {report.states:>10,} states, {report.seconds:.0f} s", flush=True)


def row(name: str, report: Report) -> str:
    """A line of the table."""
    said = report.fault or ("all states" if report.complete else "no fault as far as it went")
    return f"{name:56} {report.states:>10,} {report.transitions:>11,} {report.depth:>5}  {said}"


def explain(report: Report) -> Iterator[str]:
    """The way to a fault, step by step."""
    for number, (label, state) in enumerate(report.trace):
        yield f"{number:3} {' '.join(map(str, label))}\n      {state}"


def main() -> int:
    """Prints the table; 1 if the protocol has a fault or a planted one is not found."""
    parser = argparse.ArgumentParser(prog="python -m proof.model", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="for all scenarios together")
    parser.add_argument(
        "--planted", action="store_true", help="only the planted faults, with their traces"
    )
    options = parser.parse_args()
    heading = f"{'scenario':56} {'states':>10} {'transitions':>11} {'depth':>5}"
    print(heading)
    failed = False
    if not options.planted:
        deadline = time.monotonic() + options.seconds
        for left, (name, scenario) in zip(range(len(SCENARIOS), 0, -1), SCENARIOS, strict=True):
            # What small ones leave over is for the larger ones behind them.
            share = max(1.0, (deadline - time.monotonic()) / left)
            report = check(Protocol(scenario), seconds=share, progress=say)
            print(row(name, report), flush=True)
            if report.fault:
                failed = True
                print("\n".join(explain(report)))
    for planted in PLANTED:
        model = Protocol(planted.scenario, planted.server, planted.client)
        report = check(model, progress=say)
        print(row(planted.name, report), flush=True)
        if not report.fault:
            failed = True
            print(f"    planted, and not found: {planted.name}")
        elif options.planted:
            print("\n".join(explain(report)))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
