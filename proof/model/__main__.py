"""`python -m proof.model`: explores the protocol of the Redis tier, and finds what was planted."""

import argparse
import sys
import time

from .checker import Report, check
from .planted import PLANTED
from .protocol import Protocol, Scenario
from .spaces import LARGE, SMALL

_BLIND = """
A model is not the code. The server's half is compared with the real scripts by tests/test_model.py;
the client's half was written by hand after redis.py, and nothing but reading compares the two.
One key; no Cluster whose slots move; no failover to a replica that lags; no server whose clock goes
back; no codec, no fork; time is an order of events, not seconds. Spaces are bounded by callers and
faults. A scenario that was cut off by a limit is judged as far as it was explored.
"""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m proof.model",
        description="Explores a model of the Redis tier's protocol: every order of every step, and "
        "every fault at each of them. Prints the shortest way to what is wrong.",
        epilog=_BLIND,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="for all (default: 600)")
    parser.add_argument(
        "--states", type=int, default=2_000_000, help="for each (default: 2,000,000)"
    )
    parser.add_argument("--only", default="", help="scenarios whose name contains this")
    parser.add_argument("--no-planted", action="store_true", help="leave out the planted faults")
    arguments = parser.parse_args()
    if arguments.seconds <= 0 or arguments.states < 1:
        parser.error("--seconds and --states must be positive")
    return arguments


def _say(name: str, report: Report) -> None:
    print(
        f"  ... {name}: {report.states:,} states, {report.transitions:,} steps, "
        f"depth {report.depth}, {report.seconds:.0f} s",
        flush=True,
    )


def _print_trace(report: Report) -> None:
    print(f"FAULT: {report.fault}, after {len(report.trace) - 1} steps:")
    for number, (label, state) in enumerate(report.trace):
        print(f"  {number:3} {' '.join(map(str, label)):16} {state}")


def _explore(spaces: dict[str, Scenario], until: float, most: int) -> bool:
    """Prints a line for each scenario. False if something is wrong with one."""
    sound = True
    print(f"{'scenario':38} {'states':>9} {'steps':>10} {'depth':>5} {'s':>6}  explored")
    for name, scenario in spaces.items():
        left = until - time.monotonic()
        if left <= 0:
            print(f"{name:38} no time left")
            continue

        def progress(report: Report, name: str = name) -> None:
            _say(name, report)

        report = check(Protocol(scenario), seconds=left, most=most, progress=progress)
        explored = "FAULT" if report.fault else "whole" if report.complete else "in part"
        print(
            f"{name:38} {report.states:9,} {report.transitions:10,} {report.depth:5} "
            f"{report.seconds:6.1f}  {explored}",
            flush=True,
        )
        if report.fault:
            print(scenario)
            _print_trace(report)
            sound = False
    return sound


def _find_planted() -> bool:
    """Prints a line for each planted fault. False if one was not found."""
    found = 0
    print(f"\n{'planted fault':62} {'states':>8} {'steps to it':>11}  found as")
    for planted in PLANTED:
        report = check(Protocol(planted.scenario, planted.server, planted.client), most=500_000)
        found += bool(report.fault)
        steps = f"{len(report.trace) - 1:11}" if report.fault else f"{'-':>11}"
        print(
            f"{planted.name:62} {report.states:8,} {steps}  {report.fault or 'NOT FOUND'}",
            flush=True,
        )
    print(f"{found} of {len(PLANTED)} planted faults found")
    return found == len(PLANTED)


def main() -> int:
    """Runs it. Returns the exit code: 1 if something is wrong."""
    arguments = _arguments()
    until = time.monotonic() + arguments.seconds
    sound = arguments.no_planted or bool(arguments.only) or _find_planted()
    print()
    spaces = {name: s for name, s in (SMALL | LARGE).items() if arguments.only in name}
    return 0 if _explore(spaces, until, arguments.states) and sound else 1


if __name__ == "__main__":
    sys.exit(main())
