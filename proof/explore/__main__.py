"""`python -m proof.explore`: see `--help`."""

import argparse
import contextlib
import platform
import sys
from time import monotonic

import shardedflight

from .plants import PLANTS, Plant
from .scenarios import SCENARIOS
from .search import Explorer, Found, Search, format_plan, parse_plan

DESCRIPTION = """\
Explores interleavings of the plain core under a deterministic scheduler: first every planted fault
has to be found, then none may be found in the core itself. Small scenarios are searched in full up
to a number of switches that nothing forces; then all are run by chance (PCT) for the rest of the
time.

Blind to: the compiled core; the order in which memory is written without the GIL; switches inside
of one line (--instructions has them) or of one operation of C's; what the standard library's own
code does when it is interrupted; signals; and whatever needs more callers, keys or switches."""


class Report:
    """Says what is done, every few seconds."""

    def __init__(self) -> None:
        self._begin = self._last = monotonic()

    def say(self, line: str) -> None:
        """Says it if nothing was said for a while."""
        now = monotonic()
        if now - self._last > 3:
            self._last = now
            print(f"  {now - self._begin:6.0f} s  {line}", flush=True)


def find_plant(explorer: Explorer, plant: Plant, until: float) -> Search:
    """Looks for a planted fault in its scenario: in full, then by chance."""
    scenario = SCENARIOS[plant.scenario]
    search = Search(scenario)
    with plant.planted():
        explorer.exhaust(search, 3, monotonic() + (until - monotonic()) * 0.7)
        if search.found is None:
            explorer.walk(search, plant.name, until)
    return search


def find_plants(explorer: Explorer, until: float) -> list[str]:
    """Looks for every planted fault. Returns those that were not found."""
    print("Planted faults")
    missed: list[str] = []
    for number, plant in enumerate(PLANTS):
        begin = monotonic()
        search = find_plant(explorer, plant, begin + (until - begin) / (len(PLANTS) - number))
        taken = monotonic() - begin
        if search.found is None:
            missed.append(plant.name)
            print(f"  NOT FOUND {plant.name}: {search.runs} runs of {plant.scenario}")
            continue
        message = search.found.fault.message.strip().splitlines()[-1]
        where = f"{search.runs:5} runs of {plant.scenario:14}"
        print(f"  {plant.name:24} {where} {taken:5.1f} s  {message[:60]}", flush=True)
    print(f"{len(PLANTS) - len(missed)} of {len(PLANTS)} planted faults found\n")
    return missed


def explore(
    explorer: Explorer, searches: list[Search], args: argparse.Namespace, until: float
) -> Found | None:
    """Explores the core as it is. Returns what is wrong with it."""
    report = Report()
    begin = monotonic()
    in_full = begin + (until - begin) * 0.7
    for bound in range(args.switches + 1):
        # The small ones first: what they leave of their shares is for the others.
        open_ = sorted(
            [search for search in searches if search.bound < bound],
            key=lambda search: len(search.parents) * search.steps,
        )
        for number, search in enumerate(open_):
            now = monotonic()
            share = (in_full - now) / (len(open_) - number)
            explorer.exhaust(search, bound, now + share, args.runs)
            report.say(f"{search.scenario.name}: {search.runs} runs")
            if search.found is not None:
                return search.found
    for number, search in enumerate(searches):
        now = monotonic()
        share = (until - now) / (len(searches) - number)
        explorer.walk(search, args.seed, now + share, args.runs)
        report.say(f"{search.scenario.name}: {search.walks} runs by chance")
        if search.found is not None:
            return search.found
    return None


def table(searches: list[Search]) -> str:
    """What was explored."""
    lines = ["scenario           steps   0 switches        1        2        3  begun  by chance"]
    for search in searches:
        whole = [*search.bounds[:4], *[None] * 4][:4]
        begun = search.runs - search.walks - (search.bounds[-1] if search.bounds else 0)
        before = 0
        cells: list[str] = []
        for runs in whole:
            cells.append(f"{'-' if runs is None else runs - before:>8}")
            before = before if runs is None else runs
        lines.append(
            f"{search.scenario.name:18} {search.steps:5}     {' '.join(cells)}"
            f" {begun:6} {search.walks:10}"
        )
    return "\n".join(lines)


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(
        prog="python -m proof.explore",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Scenarios:\n"
        + "\n".join(f"  {one.name:18} {one.what}" for one in SCENARIOS.values()),
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="how long, without the plants (60)"
    )
    parser.add_argument(
        "--scenario", action="append", metavar="NAME", choices=[*SCENARIOS], help="only this"
    )
    parser.add_argument("--switches", type=int, default=3, help="the most in full (3)")
    parser.add_argument(
        "--runs", type=int, default=sys.maxsize, help="of each scenario, in full and by chance"
    )
    parser.add_argument("--seed", default="0", help="of what is chosen by chance (0)")
    parser.add_argument("--instructions", action="store_true", help="stop at each, not at lines")
    parser.add_argument("--plants", choices=["only", "no"], help="the planted faults")
    parser.add_argument("--replay", metavar="PLAN", help="runs one plan of one --scenario")
    parser.add_argument("--plant", metavar="FAULT", help="has this one in what is replayed")
    args = parser.parse_args()
    assert not shardedflight.__compiled__
    begin = monotonic()
    explorer = Explorer(by_instruction=args.instructions)
    if args.replay is not None:
        if len(args.scenario or ()) != 1:
            parser.error("--replay needs one --scenario")
        return replay(explorer, args)
    kind = "instructions" if args.instructions else "lines"
    print(f"CPython {platform.python_version()}, plain core, by {kind}, seed {args.seed}\n")
    if args.plants != "no":
        if find_plants(explorer, begin + max(args.seconds, 100)):
            return 1
        if args.plants == "only":
            return 0
    begin = monotonic()
    searches = [Search(SCENARIOS[name]) for name in args.scenario or SCENARIOS]
    found = explore(explorer, searches, args, begin + args.seconds)
    print(table(searches))
    runs = sum(search.runs for search in searches)
    print(f"{runs} interleavings in {monotonic() - begin:.0f} s")
    misfits = sum(search.misfits for search in searches)
    if misfits:
        print(f"{misfits} did not go as planned: the interpreter has shown other steps before")
    if found is None:
        print("No fault found")
        return 0
    print(f"FAULT\n{found}")
    options = " --instructions" * args.instructions
    print(f"Again: --scenario {found.scenario} --replay {format_plan(found.plan)}{options}")
    return 1


def replay(explorer: Explorer, args: argparse.Namespace) -> int:
    """Runs one plan, and says what comes of it."""
    (name,) = args.scenario
    plan = parse_plan(args.replay)
    with contextlib.ExitStack() as stack:
        for plant in PLANTS:
            if plant.name == args.plant:
                stack.enter_context(plant.planted())
        outcome = explorer.plan(SCENARIOS[name], plan)
    if not outcome.scheduler.fits:
        print("The plan does not fit: it is of another version")
    print(f"{outcome.scheduler.step_number} steps, plan {format_plan(outcome.plan)}")
    if outcome.fault is None:
        print("No fault")
        return 0
    print(Found(name, outcome.plan, outcome.fault))
    return 1


if __name__ == "__main__":
    sys.exit(main())
