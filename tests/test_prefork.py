"""A stampede over all workers of a real pre-fork server: gunicorn, with uvicorn's workers."""

import http.client
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import eventually, spawn
from test_tiers import tier  # noqa: F401  # pyright: ignore[reportUnusedImport] - a fixture
from valkey_support import free_port

pytestmark = pytest.mark.around

WORKERS, REQUESTS = 4, 40


@pytest.mark.skipif(os.name == "nt", reason="there is no gunicorn for Windows")
@pytest.mark.parametrize("preload", [True, False])
def test_a_stampede_over_all_workers_runs_once(
    tier: Any,  # noqa: F811
    tmp_path: Path,
    preload: bool,
) -> None:
    port = free_port()
    environment = {
        **os.environ,
        "PREFORK_DIRECTORY": str(tmp_path),
        "PREFORK_TIER": json.dumps(tier.spec),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    command = [sys.executable, "-m", "gunicorn", "prefork_app:app", "--log-level", "warning"]
    command += ["-w", str(WORKERS), "-k", "uvicorn_worker.UvicornWorker", "--no-control-socket"]
    command += ["--bind", f"127.0.0.1:{port}", *(["--preload"] if preload else [])]
    with subprocess.Popen(command, env=environment) as server:
        try:
            _stampede(tier, tmp_path, port)
        finally:
            server.terminate()


def _lines(file: Path) -> list[str]:
    return file.read_text().split() if file.exists() else []


def _have_arrived(directory: Path, number: int) -> bool:
    return len(_lines(directory / "arrived")) == number


def _stampede(tier: Any, directory: Path, port: int) -> None:  # noqa: F811
    def get() -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        try:
            connection.request("GET", "/")
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def accepts() -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        try:
            connection.connect()
        except OSError:
            return False
        finally:
            connection.close()
        return True

    eventually(accepts, "the server")
    answers: list[Any] = []
    # More and more, until every worker has some: the kernel chooses whom a connection goes to.
    while len(set(_lines(directory / "arrived"))) < WORKERS or len(answers) < REQUESTS:
        answers += [spawn(get) for _ in range(REQUESTS // 2)]
        eventually(partial(_have_arrived, directory, len(answers)))
        assert len(answers) < 100 * REQUESTS
    eventually(lambda: tier.followers() == WORKERS - 1)
    (directory / "go").touch()
    assert [answer.result(30) for answer in answers] == [["rows", True]] * len(answers)
    assert len(_lines(directory / "runs")) == 1
