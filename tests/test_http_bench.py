"""The benchmark of what passes through runs. Its figures are not judged."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("uvicorn", reason="the extra `bench` is not installed")


def test_every_case_is_measured() -> None:
    command = [sys.executable, "-m", "shardedflight.bench.http", "--rounds=2", "--seconds=0.01"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=60, env=environment
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert len(run.stdout.splitlines()) == 4
    assert run.stdout.count("requests/s with the middleware") == 4
