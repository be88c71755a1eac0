"""The explorer of interleavings: a short run of it, and that it is what it says.

It is a process of its own: it puts other locks, event loops and threads into the flight's modules.
What it does here is counted in interleavings, not in seconds.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import shardedflight

ROOT = Path(__file__).resolve().parent.parent

#: What such a process tells does not depend on the core of this one.
pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(shardedflight.__compiled__, reason="the plain core's run does it"),
]


def run(*args: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, *args], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def explore(*args: str, code: int = 0) -> str:
    return run("-m", "proof.explore", "--seconds", "100", *args, code=code)


def test_every_planted_fault_is_found() -> None:
    assert "24 of 24 planted faults found" in explore("--plants", "only")


def test_no_fault_is_found_in_the_core() -> None:
    found = explore("--plants", "no", "--runs", "40")
    assert "No fault found" in found


def test_of_a_cycle_one_caller_is_told() -> None:
    """It was two now and then: each saw the other's wait, which had been refused already."""
    found = explore(
        "--plants", "no", "--scenario", "cycle_waits", "--switches", "2", "--runs", "300"
    )
    assert "No fault found" in found


def test_a_fault_can_be_seen_again() -> None:
    """What is printed is enough: the scenario and the plan."""
    program = """
from time import monotonic
from proof.explore.plants import PLANTS
from proof.explore.__main__ import find_plant
from proof.explore.search import Explorer, format_plan

explorer = Explorer()
plant = next(plant for plant in PLANTS if plant.name == "no second look")
found = find_plant(explorer, plant, monotonic() + 60).found
print(found.fault.message)
print(format_plan(found.plan))
"""
    message, plan = run("-c", program).splitlines()
    options = ("--scenario", "two", "--replay", plan)
    first = explore(*options, "--plant", "no second look", code=1)
    assert message in first
    assert first == explore(*options, "--plant", "no second look", code=1)
    # And where everybody was.
    assert re.search(r"_core\.py:\d+ do: ", first)
    assert "No fault" in explore(*options)


def test_one_seed_gives_one_schedule_and_so_does_its_plan() -> None:
    program = """
from proof.explore.scenarios import SCENARIOS
from proof.explore.search import ByChance, Explorer, Planned

explorer = Explorer()
for name in ("lost_timeouts", "loop_heirs", "future_cancelled"):
    plans = set()
    for seed in range(20):
        trails = []
        by_chance = explorer.run(SCENARIOS[name], ByChance(str(seed), 200), trail=trails.append)
        plan = by_chance.plan
        for strategy in (ByChance(str(seed), 200), Planned(plan)):
            again = []
            assert explorer.run(SCENARIOS[name], strategy, trail=again.append).plan == plan
            assert again == trails, (name, seed)
        assert len(trails) > 50
        plans.add(plan)
    print(name, len(plans))
"""
    for line in run("-c", program).splitlines():
        assert int(line.split()[1]) > 10
