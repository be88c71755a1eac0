"""The benchmark: what it prints and writes. No test here looks at how fast anything is."""

import gc
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich", reason="the extra `bench` is not installed")
pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")

from shardedflight.bench import command, following, leading, peers, plain, report, scaling
from shardedflight.bench.basics import FORM, expect
from shardedflight.bench.measure import Benchmark, Contender, Pair, Result, Side, Unit, measure
from shardedflight.bench.model import Law, fit
from shardedflight.bench.targets import (
    FEW_KEYS,
    MANY_KEYS,
    ONE_SHARD,
    SAME_KEYS,
    SIXTEEN_SHARDS,
    SPEED_UP,
    Target,
    target_of,
)

pytestmark = [pytest.mark.around, pytest.mark.once]


@dataclass(frozen=True)
class Run:
    """What a run has left."""

    figures: dict[str, Any]
    folder: Path
    shown: str
    progress: str

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [row for row in self.figures["rows"] if row["name"] == name]


def run_bench(folder: Path, *arguments: str) -> Run:
    run = subprocess.run(
        [sys.executable, "-m", "shardedflight.bench", "--keep", str(folder), *arguments],
        capture_output=True,
        check=False,
        encoding="utf-8",
        env=environment(),
        timeout=110,
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    return Run(figures, folder, run.stdout, run.stderr)


def environment() -> dict[str, str]:
    """This process's environment, in which a child finds the package and speaks UTF-8."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"}


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All but what test_tiers_bench.py runs, in a folder that is not there before."""
    folder = tmp_path_factory.mktemp("bench") / "a" / "folder"
    return run_bench(folder, "--quick", "--without", "tiers")


def made_up(
    ours: Side, floor: Side, *, unit: Unit = Unit.NANOSECONDS, name: str = "made-up"
) -> Benchmark:
    """Makes a benchmark whose sides cost what the test says."""

    @contextmanager
    def prepare(operations: int) -> Iterator[Sequence[Contender]]:
        assert operations == 20
        yield [Contender(FORM, Pair(ours, floor))]

    return Benchmark(
        name=name,
        what="ours",
        against="floor",
        blind_to="everything",
        unit=unit,
        operations=20,
        rounds=4,
        prepare=prepare,
    )


def only(benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the command have this benchmark and no other."""

    def benchmarks(*, quick: bool) -> tuple[Benchmark, ...]:
        return (benchmark,)

    monkeypatch.setattr(command, "benchmarks", benchmarks)
    monkeypatch.setattr(command, "NAMES", (benchmark.name,))


def measured(benchmark: Benchmark, on_round: Callable[[], object] = lambda: None) -> Result:
    with benchmark.prepare(benchmark.operations) as contenders:
        (result,) = measure(benchmark, contenders, on_round)
    return result


def costs(*answers: float) -> Side:
    """A side that costs nothing while it is warmed, and then one answer after the other."""
    remaining = iter([0.0, *answers])
    return lambda: next(remaining)


# A whole run.

#: What it has.
NAMES = [name for name in command.NAMES if not name.startswith("tiers-")]


def test_a_run_writes_every_benchmark_with_its_figures(quick_run: Run) -> None:
    assert {row["name"] for row in quick_run.figures["rows"]} == set(NAMES)
    for row in quick_run.figures["rows"]:
        assert row["blind_to"]
        if row["absent"]:
            assert row["by"] in {peer.package for peer in peers.PEERS}
            continue
        assert row["unit"] in {"ns", "B", "/s"}
        # Compiled, a leader that nobody meets allocates nothing: its memory may be none at all.
        assert row["ours"] >= 0 if row["unit"] == "B" else row["ours"] > 0
        assert row["floor"] >= 0
        lower, upper = row["quartiles"]
        assert lower <= row["figure"] <= upper


def test_every_target_stands_beside_its_figure(quick_run: Run) -> None:
    for row in quick_run.figures["rows"]:
        target = target_of(row["name"], row["point"], row["by"])
        if target is None or row["by"] not in {"compiled", "plain"}:
            assert (row["target"], row["met"]) == (None, None)
        else:
            assert row["target"] == target.value
            assert row["met"] == target.met_by(row["figure"])
    with_target = {row["name"] for row in quick_run.figures["rows"] if row["target"] is not None}
    assert {"do", "do-two-parts", "do-async", "do-future", "followers"} <= with_target
    assert {"follower-threads", "memory-do", "memory-do-async", "memory-empty"} <= with_target
    assert "≤ 1.10x" in quick_run.shown
    assert "≤ 300 B" in quick_run.shown


def test_a_run_says_where_it_ran(quick_run: Run) -> None:
    around = quick_run.figures["surroundings"]
    assert around["python"] == ".".join(map(str, sys.version_info[:3]))
    assert around["cores"] >= 1
    assert around["form"] == FORM
    assert quick_run.figures["command"].startswith("python -m shardedflight.bench --keep ")


def test_a_run_prints_every_benchmark_and_what_it_is_blind_to(quick_run: Run) -> None:
    for name in NAMES:
        assert f"\n{name}: " in quick_run.shown
    assert quick_run.shown.count("\nblind to: ") == len(NAMES)
    assert quick_run.shown.count("\nagainst ") == len(NAMES)
    assert "█" in quick_run.shown
    assert "its figures mean little" in " ".join(quick_run.shown.split())


def test_a_run_shows_how_far_it_is(quick_run: Run) -> None:
    number = len(NAMES)
    expected = [f"{at} of {number}: {name}" for at, name in enumerate(NAMES, 1)]
    assert quick_run.progress.splitlines()[:number] == expected


@pytest.mark.parametrize("name", ["ratios", "memory", "curves", "scaling"])
def test_a_run_draws(quick_run: Run, name: str) -> None:
    picture = (quick_run.folder / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 1_000


def test_the_grid_of_threads_and_shards_is_whole(quick_run: Run) -> None:
    points = quick_run.figures["scaling"]["points"]
    for workload in (FEW_KEYS, MANY_KEYS, SAME_KEYS):
        found = {(p["shards"], p["threads"]) for p in points if p["workload"] == workload}
        assert set(product((1, 4, 16, 64, 256, None), (1, 2))) <= found
    for point in points:
        assert all(rate > 0 for rate in point["calls_per_second"])
    assert {row["point"] for row in quick_run.rows("scaling")} >= {
        f"{SAME_KEYS}, {SPEED_UP}",
        *(
            f"{keys}, {what}"
            for keys in (FEW_KEYS, MANY_KEYS)
            for what in (SPEED_UP, ONE_SHARD, SIXTEEN_SHARDS)
        ),
    }


def test_what_is_beyond_the_cores_is_called_a_model(quick_run: Run) -> None:
    assert "a model" in quick_run.figures["scaling"]["model"]["law"]
    assert "A model, not a measurement: the universal scalability law" in " ".join(
        quick_run.shown.split()
    )


SUPPORTED = {
    "do": {"coalescer", "oneflight", "singleflight", "cachebox", "cachetools", "dogpile.cache"},
    "do-async": {"coalescer", "oneflight", "singleflight", "async-lru", "cachebox"},
}
SUPPORTED["follower-threads"] = SUPPORTED["do"]
SUPPORTED["followers"] = SUPPORTED["do-async-inline"] = SUPPORTED["do-async"]


#: What is measured beside this library, but for other libraries.
BESIDE = {
    "do-async": leading.SHIELD,
    "do-async-inline": leading.ONE_TASK,
    "do-future": leading.SECOND_FUTURE,
    "followers": following.A_LIST,
    "follower-threads": following.AN_OUTCOME,
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_a_figure_is_made_of_stands_beside_it(quick_run: Run, name: str) -> None:
    (row,) = (row for row in quick_run.rows(name) if row["by"] == BESIDE[name])
    assert row["figure"] > 0
    assert row["target"] is None


def is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.parametrize("name", SUPPORTED)
def test_others_are_measured_where_they_are_installed(quick_run: Run, name: str) -> None:
    rows = {
        row["by"]: row
        for row in quick_run.rows(name)
        if row["by"] not in {FORM, "plain", *BESIDE.values()}
    }
    assert set(rows) == SUPPORTED[name]
    for package, row in rows.items():
        if is_installed(package):
            assert row["absent"] == ""
            assert row["figure"] > 0
        else:
            assert row["absent"] == "not installed"
            assert f"  {package}: not installed" in quick_run.shown


def test_as_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--only", "memory-d*", "--only", "memory-follower", "--markdown"]
    assert command.main([*arguments, "--keep", str(tmp_path)]) == 0
    mark, blank, *table = capsys.readouterr().out.splitlines()
    assert mark.startswith("`python -m shardedflight.bench --quick --only ")
    assert blank == ""
    whats = [line.split(" | ")[0] for line in table[2:]]
    assert len(set(whats)) == 4
    assert {line.count("|") for line in table} == {10}
    assert all(" B |" in line for line in table[2:])
    assert not (tmp_path / "ratios.png").exists()


def test_the_grid_as_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--only", "scaling", "--markdown", "--keep", str(tmp_path)]
    assert command.main(arguments) == 0
    shown = capsys.readouterr().out
    assert f"| 0.01 s a point | {FEW_KEYS}, 1 thread | {FEW_KEYS}, 2 threads | " in shown
    assert "| 256 shards | " in shown
    assert "A model, not a measurement: " in shown


# The command line.


def test_an_unknown_benchmark_is_refused_by_naming_the_known(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as refused:
        command.main(["--only", "nonsense"])
    assert refused.value.code == 2
    message = capsys.readouterr().err
    assert "no benchmark is called 'nonsense'; there are do, " in message
    assert "memory-follower" in message


def test_a_group_is_chosen_by_its_first_word() -> None:
    (chosen,) = command.parse(["--only", "tiers"]).only
    assert chosen == [name for name in command.NAMES if name.startswith("tiers-")]
    assert command.parse(["--only", "do"]).only == [["do"]]


def test_an_unwritable_folder_is_one_sentence_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(made_up(costs(), costs()), monkeypatch)
    (tmp_path / "file").write_text("")
    assert command.main(["--keep", str(tmp_path / "file" / "folder")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"Cannot write the figures to {tmp_path / 'file' / 'folder'}: ")
    assert said.err.count("\n") == 1


def test_a_file_that_cannot_be_written_in_the_end_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(made_up(costs(1, 1, 1, 1), costs(1, 1, 1, 1)), monkeypatch)
    (tmp_path / "figures.json").mkdir()
    assert command.main(["--without", "plain", "--keep", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("Cannot write the figures to ")


@pytest.mark.parametrize(
    ("name", "arguments", "ours", "status"),
    [
        ("do-future", [], 3.0, 0),
        ("do-future", ["--strict"], 3.0, 1),
        ("do-future", ["--strict"], 1.0, 0),
        ("do-16-shards", ["--strict"], 9.0, 0),
    ],
)
def test_only_strict_fails_for_a_missed_target(
    name: str,
    arguments: list[str],
    ours: float,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    only(made_up(costs(*[ours] * 4), costs(1, 1, 1, 1), name=name), monkeypatch)
    assert command.main([*arguments, "--without", "plain", "--keep", str(tmp_path)]) == status
    missed = f"Targets missed: do-future ({FORM})\n"
    assert capsys.readouterr().err.endswith(missed) == (status == 1)


def test_an_interrupt_ends_it_with_one_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> float:
        raise KeyboardInterrupt

    only(made_up(interrupted, costs()), monkeypatch)
    assert command.main(["--without", "plain", "--keep", str(tmp_path)]) == 130
    assert capsys.readouterr().err.endswith("Interrupted.\n")
    assert list(tmp_path.iterdir()) == []


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


# Other libraries, and the other form of this one.


def test_a_peer_that_does_not_work_is_a_row_that_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(fn: Callable[[], int]) -> peers.Way:
        raise ImportError("no such symbol")

    def works(fn: Callable[[], int]) -> peers.Way:
        return peers.Way(lambda key, function: function(), ("k", fn))

    monkeypatch.setattr(
        peers,
        "PEERS",
        (
            peers.Peer("absent", "", lambda fn: __import__("shardedflight_absent"), None),
            peers.Peer("broken", "", broken, None),
            peers.Peer("works", "", works, None),
        ),
    )
    with peers.leading(20) as contenders:
        pass
    assert {contender.who: contender.absent for contender in contenders} == {
        "absent": "not installed",
        "broken": "does not work here: ImportError: no such symbol",
        "works": "",
    }


def test_a_peer_that_shares_nothing_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(fn: Callable[[], int]) -> peers.Way:
        return peers.Way(lambda key, function: function(), ("k", fn))

    monkeypatch.setattr(peers, "PEERS", (peers.Peer("alone", "", alone, None),))
    with peers.following_threads(3) as contenders:
        pass
    assert "executions" in contenders[0].absent


def test_the_plain_form_is_measured_by_another_process() -> None:
    with plain.worker() as worker:
        for name, points in [("memory-do-future", 1), ("followers-curve", 4)]:
            with worker.prepare(name, quick=True) as contenders:
                assert [contender.who for contender in contenders] == ["plain"] * points
                pair = contenders[-1].pair
                assert pair is not None
                assert pair.ours() > 0
                assert pair.floor() > 0


def test_a_compiled_installation_measures_the_plain_form_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "FORM", "compiled")
    arguments = ["--quick", "--only", "memory-do", "--markdown", "--keep", str(tmp_path)]
    assert command.main(arguments) == 0
    rows = capsys.readouterr().out.splitlines()[4:]
    assert [row.split(" | ")[2] for row in rows] == [FORM, "plain"]
    assert command.main([*arguments, "--without", "plain"]) == 0
    assert len(capsys.readouterr().out.splitlines()[4:]) == 1


def test_a_worker_that_has_ended_is_an_error_that_says_so() -> None:
    with (
        plain.worker() as worker,
        pytest.raises(RuntimeError, match="has ended"),
        worker.prepare("no such benchmark", quick=True),
    ):
        pass


# Measuring.


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    result = measured(made_up(costs(10, 20, 30, 80), costs(10, 10, 10, 10), name="do-future"))
    figures = result.figures
    assert figures is not None
    assert (figures.figure, figures.lower_quartile, figures.upper_quartile) == (2.5, 1.75, 4.25)
    assert (figures.ours, figures.floor) == (25, 10)
    assert result.met is False


def test_memory_is_compared_by_its_difference() -> None:
    sides = costs(10, 20, 30, 40), costs(9, 18, 29, 38)
    result = measured(made_up(*sides, unit=Unit.BYTES, name="memory-do"))
    assert result.figures is not None
    assert result.figures.figure == 1.5
    assert result.met is True


@pytest.mark.parametrize("unit", [Unit.SECONDS, Unit.COUNT])
def test_seconds_and_counts_are_not_compared(unit: Unit) -> None:
    sides = costs(1, 2, 3, 4), costs(9, 9, 9, 9)
    result = measured(made_up(*sides, unit=unit))
    assert result.figures is not None
    assert (result.figures.figure, result.figures.floor) == (2.5, 9)


def test_a_point_may_have_a_unit_of_its_own() -> None:
    benchmark = made_up(costs(), costs())
    contenders = [
        Contender(FORM, Pair(costs(3, 3, 3, 3), costs(2, 2, 2, 2)), unit=unit)
        for unit in (None, Unit.COUNT)
    ]
    ratio, count = measure(benchmark, contenders, lambda: None)
    assert ratio.figures is not None
    assert count.figures is not None
    assert (ratio.figures.figure, count.figures.figure) == (1.5, 3)
    assert (ratio.unit, count.unit) == (Unit.NANOSECONDS, Unit.COUNT)
    assert report.cells(count)[2] == "3"


def test_rounds_alternate_and_swap_their_order() -> None:
    order: list[str] = []

    def side(name: str) -> Callable[[], float]:
        def run() -> float:
            order.append(name)
            return 1.0

        return run

    rounds: list[None] = []
    measured(made_up(side("ours"), side("floor")), lambda: rounds.append(None))
    assert order[2:] == ["ours", "floor", "floor", "ours", "ours", "floor", "floor", "ours"]
    assert len(rounds) == 4


def test_the_collector_is_off_while_a_side_runs_and_back_on_after_it() -> None:
    seen: list[bool] = []

    def side() -> float:
        seen.append(gc.isenabled())
        return 1.0

    measured(made_up(side, side), lambda: seen.append(not gc.isenabled()))
    assert len(seen) == 14
    assert not any(seen)


def test_a_benchmark_refuses_to_measure_something_else() -> None:
    with pytest.raises(RuntimeError, match="executions: expected 2, found 1"):
        expect(1, 2, "executions")


# Targets.


@pytest.mark.parametrize(
    ("name", "point", "form", "python", "gil", "target"),
    [
        ("do", "", "compiled", (3, 13), True, Target(1.5)),
        ("do", "", "compiled", (3, 14), False, Target(1.5)),
        ("do", "", "compiled", (3, 12), True, Target(1.8)),
        ("do", "", "plain", (3, 14), True, Target(6)),
        ("do-two-parts", "", "compiled", (3, 11), True, Target(2.2)),
        ("do-async-inline", "", "compiled", (3, 11), True, None),
        ("do-async-inline", "", "compiled", (3, 12), True, Target(3)),
        ("do-async", "", "compiled", (3, 11), True, Target(1.1)),
        ("do-future", "", "compiled", (3, 11), True, Target(1.1)),
        ("followers", "", "compiled", (3, 11), True, Target(1.1)),
        ("followers-curve", "100,000 followers", "compiled", (3, 11), True, Target(1.1)),
        ("followers-curve", "10 followers", "compiled", (3, 11), True, None),
        ("follower-threads", "", "compiled", (3, 11), True, Target(1.2)),
        ("keys-in-flight", "1,000,000 keys", "compiled", (3, 11), True, Target(1.5)),
        ("keys-in-flight", "10,000 keys", "compiled", (3, 11), True, None),
        ("memory-do-future", "", "compiled", (3, 11), True, Target(300)),
        ("memory-follower", "", "compiled", (3, 11), True, None),
        ("tiers-leader", "redis", "plain", (3, 11), True, Target(1.3)),
        ("tiers-leader", "host", "plain", (3, 11), True, None),
        ("tiers-keys", "redis", "compiled", (3, 11), True, Target(0.5, at_least=True)),
        ("tiers-round-trips", "a leader", "compiled", (3, 11), True, Target(2)),
        ("tiers-round-trips", "a follower", "compiled", (3, 11), True, Target(1)),
        ("tiers-wake", "redis, awake", "compiled", (3, 11), True, Target(0.002)),
        ("tiers-stampede", "host, awake", "compiled", (3, 11), True, Target(0.005)),
        ("tiers-stampede", "redis, all have it", "compiled", (3, 11), True, Target(1.05)),
        ("tiers-failure", "host, all have it", "compiled", (3, 11), True, Target(0.6)),
        ("tiers-failure", "host, executions", "compiled", (3, 11), True, Target(1)),
        ("scaling", f"{FEW_KEYS}, {SPEED_UP}", "compiled", (3, 14), True, None),
        *(
            ("scaling", f"{keys}, {what}", "compiled", (3, 14), False, Target(least, at_least=True))
            for keys in (FEW_KEYS, MANY_KEYS)
            for what, least in ((SPEED_UP, 1.8), (ONE_SHARD, 1.6), (SIXTEEN_SHARDS, 1.3))
        ),
        (
            "scaling",
            f"{SAME_KEYS}, {SPEED_UP}",
            "compiled",
            (3, 14),
            False,
            Target(1.4, at_least=True),
        ),
    ],
)
def test_targets_depend_on_interpreter_and_form(
    name: str, point: str, form: str, python: tuple[int, int], gil: bool, target: Target | None
) -> None:
    assert target_of(name, point, form, python=python, gil=gil) == target


def test_every_target_has_a_benchmark() -> None:
    points = {
        "followers-curve": "100,000 followers",
        "keys-in-flight": "1,000,000 keys",
        "scaling": f"{FEW_KEYS}, {SPEED_UP}",
        "tiers-leader": "redis",
        "tiers-keys": "redis",
        "tiers-round-trips": "a leader",
        "tiers-wake": "redis, awake",
        "tiers-stampede": "host, awake",
        "tiers-failure": "redis, executions",
    }
    without = {
        name
        for name in command.NAMES
        if target_of(name, points.get(name, ""), "compiled", python=(3, 14), gil=False) is None
    }
    assert without == {"do-16-shards", "memory-follower", "tiers-memory"}


def test_a_target_is_on_one_side() -> None:
    assert Target(1.5).met_by(1.5)
    assert not Target(1.5).met_by(1.51)
    assert Target(1.5, at_least=True).met_by(1.5)
    assert not Target(1.5, at_least=True).met_by(1.49)


# The model.


def test_the_law_is_found_again_in_points_that_follow_it() -> None:
    law = Law(sigma=0.05, kappa=0.001)
    found = fit({threads: [1e6 * law.speed_up(threads)] * 3 for threads in (1, 2, 4, 8)})
    assert found.decided
    assert found.contention.sigma == pytest.approx(0.05)
    assert found.coherency.kappa == pytest.approx(0.001)


def test_two_numbers_of_threads_leave_the_law_between_two() -> None:
    found = fit({1: [100.0, 100.0], 2: [160.0, 160.0]})
    assert not found.decided
    for law in (found.contention, found.coherency):
        assert law.speed_up(1) == 1
        assert law.speed_up(2) == pytest.approx(1.6)
    assert found.coherency.speed_up(8) < found.contention.speed_up(8)


@pytest.mark.parametrize("rates", [{1: [100.0], 2: [210.0]}, {1: [100.0], 2: [150.0], 4: [340.0]}])
def test_no_coefficient_is_below_nothing(rates: dict[int, list[float]]) -> None:
    found = fit(rates)
    for law in (found.contention, found.coherency):
        assert law.sigma >= 0
        assert law.kappa >= 0


@pytest.mark.parametrize(
    ("gil", "two", "busy"), [(False, 1.5, True), (False, 1.9, False), (True, 1.0, False)]
)
def test_a_busy_machine_is_told(gil: bool, two: float, busy: bool) -> None:
    rates = {point: [1e6 * (two if point.threads == 2 else 1)] for point in scaling.points()}
    said = report.in_all(scaling.Grid(1, scaling.thread_counts(), 0.5, rates), gil=gil)
    assert ("The machine was not free" in said) == busy


def test_threads_are_counted_up_to_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, counts in [(1, (1, 2)), (2, (1, 2)), (8, (1, 2, 4, 8)), (12, (1, 2, 4, 8, 12))]:
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert scaling.thread_counts() == counts
