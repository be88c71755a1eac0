"""The benchmark: what it prints and writes. No test here looks at how fast anything is."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich", reason="the extra `bench` is not installed")

from shardedflight.bench import command
from shardedflight.bench.measure import Row, Side, Unit, measure
from shardedflight.bench.rows import ROWS, expect

NAMES = [row.name for row in ROWS]


def row_of(
    ours: Side, floor: Side, *, unit: Unit = Unit.NANOSECONDS, aim: float | None = 2.0
) -> Row:
    """Makes a row whose sides cost what the test says."""

    @contextmanager
    def prepare(operations: int) -> Iterator[tuple[Side, Side]]:
        assert operations == 20
        yield ours, floor

    return Row(
        name="made-up",
        what="ours",
        against="floor",
        aim=aim,
        blind_to="everything",
        unit=unit,
        operations=20,
        rounds=4,
        prepare=prepare,
    )


def costs(*answers: float) -> Side:
    """A side that costs nothing while it is warmed, and then one answer after the other."""
    remaining = iter([0.0, *answers])
    return lambda: next(remaining)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, str]:
    """What `--quick` writes, prints, and shows while it works."""
    path = tmp_path_factory.mktemp("bench") / "figures.json"
    run = subprocess.run(
        [sys.executable, "-m", "shardedflight.bench", "--quick", "--json", str(path)],
        capture_output=True,
        check=False,
        encoding="utf-8",
        env=environment(),
        timeout=100,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(path.read_text(encoding="utf-8")), run.stdout, run.stderr


def environment() -> dict[str, str]:
    """This process's environment, in which a child finds the package and speaks UTF-8."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"}


def test_a_run_writes_every_row_with_its_figures(
    quick_run: tuple[dict[str, Any], str, str],
) -> None:
    figures, _, _ = quick_run
    assert [row["name"] for row in figures["rows"]] == NAMES
    for row in figures["rows"]:
        assert row["unit"] in {"ns", "B"}
        assert row["ours"] > 0
        assert row["floor"] >= 0
        lower, upper = row["quartiles"]
        assert lower <= row["figure"] <= upper
        assert row["met"] == (None if row["aim"] is None else row["figure"] <= row["aim"])
        assert row["blind_to"]
        assert row["rounds"] == 3


def test_a_run_says_where_it_ran(quick_run: tuple[dict[str, Any], str, str]) -> None:
    figures, _, _ = quick_run
    around = figures["surroundings"]
    assert around["python"] == ".".join(map(str, sys.version_info[:3]))
    assert around["cores"] >= 1
    assert figures["command"].startswith("python -m shardedflight.bench --quick --json ")


def test_a_run_prints_one_table_with_every_row(
    quick_run: tuple[dict[str, Any], str, str],
) -> None:
    figures, table, _ = quick_run
    for row in figures["rows"]:
        assert f" {row['name']}: " in table
    assert table.count("blind to: ") == len(NAMES)
    assert table.count("against ") >= len(NAMES)
    assert "its figures mean little" in " ".join(table.split())


def test_a_run_shows_how_far_it_is(quick_run: tuple[dict[str, Any], str, str]) -> None:
    _, _, shown = quick_run
    expected = [f"{number} of {len(NAMES)}: {name}" for number, name in enumerate(NAMES, 1)]
    assert shown.splitlines()[: len(NAMES)] == expected


def test_one_row_as_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--quick", "--only", "do", "--only", "memory-do", "--markdown"]) == 0
    mark, blank, *table = capsys.readouterr().out.splitlines()
    assert mark.startswith("`python -m shardedflight.bench --quick --only do --only memory-do ")
    assert blank == ""
    assert len(table) == 4
    assert {line.count("|") for line in table} == {9}
    assert "x |" in table[2]
    assert "B |" in table[3]


def test_an_unknown_row_is_refused_by_naming_the_known(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as refused:
        command.main(["--only", "nonsense"])
    assert refused.value.code == 2
    message = capsys.readouterr().err
    assert "nonsense" in message
    assert "memory-follower" in message


def test_a_missing_directory_is_refused_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "ROWS", [row_of(costs(), costs())])
    with pytest.raises(SystemExit) as refused:
        command.main(["--json", str(tmp_path / "absent" / "figures.json")])
    assert refused.value.code == 2
    assert "absent" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "ROWS", [row_of(costs(1, 1, 1, 1), costs(1, 1, 1, 1))])
    assert command.main(["--json", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("Cannot write the figures to ")


@pytest.mark.parametrize(
    ("arguments", "ours", "status"),
    [([], 3.0, 0), (["--strict"], 3.0, 1), (["--strict"], 2.0, 0)],
)
def test_only_strict_fails_for_a_missed_aim(
    arguments: list[str],
    ours: float,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "ROWS", [row_of(costs(ours, ours, ours, ours), costs(1, 1, 1, 1))])
    assert command.main(arguments) == status
    assert ("Aims missed: made-up" in capsys.readouterr().err) == (status == 1)


def test_a_row_without_an_aim_is_never_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_of(costs(9, 9, 9, 9), costs(1, 1, 1, 1), aim=None)
    monkeypatch.setattr(command, "ROWS", [row])
    assert command.main(["--strict"]) == 0


def test_an_interrupt_ends_it_with_one_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "ROWS", [row_of(interrupted, costs())])
    assert command.main([]) == 130
    assert capsys.readouterr().err.endswith("Interrupted.\n")


def test_without_rich_it_says_what_to_install() -> None:
    code = (
        "import runpy, sys; sys.modules['rich'] = None; "
        "runpy.run_module('shardedflight.bench', run_name='__main__')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=False,
        encoding="utf-8",
        env=environment(),
        timeout=60,
    )
    assert run.returncode == 1
    assert run.stderr == (
        "shardedflight.bench needs rich, which is not installed: "
        'pip install "shardedflight[bench]"\n'
    )


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    row = row_of(costs(10, 20, 30, 80), costs(10, 10, 10, 10))
    result = measure(row, quick=False, on_round=lambda: None)
    assert (result.figure, result.lower_quartile, result.upper_quartile) == (2.5, 1.75, 4.25)
    assert (result.ours, result.floor) == (25, 10)
    assert result.met is False


def test_memory_is_compared_by_its_difference() -> None:
    row = row_of(costs(10, 20, 30, 40), costs(9, 18, 29, 38), unit=Unit.BYTES)
    result = measure(row, quick=False, on_round=lambda: None)
    assert result.figure == 1.5
    assert result.met is True


def test_rounds_alternate_and_swap_their_order() -> None:
    order: list[str] = []

    def side(name: str) -> Callable[[], float]:
        def run() -> float:
            order.append(name)
            return 1.0

        return run

    rounds: list[None] = []
    row = row_of(side("ours"), side("floor"))
    measure(row, quick=False, on_round=lambda: rounds.append(None))
    assert order[2:] == ["ours", "floor", "floor", "ours", "ours", "floor", "floor", "ours"]
    assert len(rounds) == 4


def test_the_collector_is_off_while_a_side_runs_and_back_on_after_it() -> None:
    seen: list[bool] = []

    def side() -> float:
        seen.append(gc.isenabled())
        return 1.0

    measure(row_of(side, side), quick=False, on_round=lambda: seen.append(not gc.isenabled()))
    assert not any(seen)


def test_a_row_refuses_to_measure_something_else() -> None:
    with pytest.raises(RuntimeError, match="executions: expected 2, found 1"):
        expect(1, 2, "executions")
