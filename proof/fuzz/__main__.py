"""Goes round the targets with fresh seeds, until a fault is found or the time is up."""

import argparse
import importlib
import importlib.metadata
import importlib.util
import logging
import random
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import shardedflight
from proof.fuzz.target import Target

#: The modules of the targets, with what they need besides hypothesis.
MODULES = {
    "keys": ("msgspec",),
    "hostile": (),
    "hooks": ("msgspec",),
    "http": (),
    "payloads": ("msgspec", "redis"),
}


def targets() -> list[Target]:
    """All targets that can run here."""
    found: list[Target] = []
    for module, needed in MODULES.items():
        if all(importlib.util.find_spec(package) for package in needed):
            found += importlib.import_module(f"proof.fuzz.{module}").TARGETS
    return found


@dataclass
class Total:
    """What was done of a target."""

    rounds: int = 0
    cases: int = 0
    seconds: float = 0.0


def _fuzz(target: Target, hundred: int, seed: int, total: Total) -> bool:
    """One round of a target. Returns whether all held; says so if not."""
    before, began = target.counted(), time.monotonic()
    try:
        target.bound(hundred, seed)()
    except Exception:
        traceback.print_exc()
        print(f"\nFAULT in {target.name}: {target.about}")
        print(f"Again: python -m proof.fuzz --target {target.name} --seed {seed} --cases {hundred}")
        return False
    finally:
        total.rounds += 1
        total.cases += target.counted() - before
        total.seconds += time.monotonic() - began
    return True


def _table(totals: dict[str, Total], chosen: Sequence[Target]) -> None:
    print(f"\n{'target':<10} {'rounds':>7} {'cases':>10} {'seconds':>8}  what held")
    for target in chosen:
        total = totals[target.name]
        print(
            f"{target.name:<10} {total.rounds:>7} {total.cases:>10,} {total.seconds:>8.0f}"
            f"  {target.about}"
        )
    every = sum(total.cases for total in totals.values())
    core = "compiled" if shardedflight.__compiled__ else "plain"
    versions = f"CPython {sys.version.split()[0]}, {core} core"
    print(f"{every:,} cases on {versions}, hypothesis {importlib.metadata.version('hypothesis')}")


def main() -> int:
    """The program. Returns its exit code."""
    available = {target.name: target for target in targets()}
    parser = argparse.ArgumentParser(
        prog="python -m proof.fuzz",
        description="Fuzzes what others can say to a flight, its middlewares and its backends.",
        epilog="Blind to: what no target makes, such as HTTP before a server has parsed it; memory "
        "errors of the compiled core, which make sanitize looks for; and long histories, which are "
        "for make soak and make explore.",
    )
    parser.add_argument("--seconds", type=float, default=60, help="how long to look (60)")
    parser.add_argument("--target", action="append", choices=sorted(available), help="only this")
    parser.add_argument("--seed", type=int, help="run one round with the seed of a fault")
    parser.add_argument("--cases", type=int, default=300, help="cases per round, about (300)")
    parser.add_argument("--list", action="store_true", help="list the targets")
    arguments = parser.parse_args()
    chosen = [available[name] for name in arguments.target or available]
    if arguments.list:
        for target in chosen:
            print(f"{target.name:<10} {target.about}")
        return 0
    log = logging.getLogger("shardedflight")
    before, log.disabled = log.disabled, True  # hooks and servers fail all the time here
    try:
        return _go_round(chosen, arguments)
    finally:
        log.disabled = before


def _go_round(chosen: Sequence[Target], arguments: argparse.Namespace) -> int:
    totals = {target.name: Total() for target in chosen}
    deadline = time.monotonic() + arguments.seconds
    said, held = time.monotonic(), True
    while held:
        for target in chosen:
            seed = (
                random.SystemRandom().getrandbits(48) if arguments.seed is None else arguments.seed
            )
            held = _fuzz(target, arguments.cases, seed, totals[target.name])
            if not held or time.monotonic() >= deadline:
                break
            if time.monotonic() - said > 5:
                said = time.monotonic()
                cases = sum(total.cases for total in totals.values())
                print(f"{deadline - said:6.0f} s left, {cases:,} cases, seed {seed}", flush=True)
        if arguments.seed is not None or time.monotonic() >= deadline:
            break
    _table(totals, chosen)
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())
