"""The benchmark of what passes through the middlewares: it measures what it says."""

import sys
from pathlib import Path

import pytest
from support import Program

pytest.importorskip("rich", reason="the extra `bench` is not installed")
pytest.importorskip("uvicorn", reason="the extra `bench` is not installed")
pytest.importorskip("cheroot", reason="the extra `bench` is not installed")

from shardedflight.bench import http

pytestmark = pytest.mark.around


@pytest.mark.parametrize("interface", ["asgi", "wsgi"])
def test_requests_that_go_another_way_are_refused(interface: str) -> None:
    cookie = http.CASES[1]
    with http.served(interface, "middleware") as ours, http.served(interface, "bare") as floor:
        assert ours.cost(cookie, 20) > 0
        assert floor.cost(cookie, 20) > 0
        wrong = http.Case("a cookie", http.CASES[0].text, cookie.way)
        with pytest.raises(RuntimeError, match="requests: a cookie"):
            ours.cost(wrong, 20)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_run_that_is_terminated_leaves_no_server(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shardedflight.bench", "--only", "http", "--without", "plain"]
    program = Program([*command, "--keep", str(tmp_path)], mark=str(tmp_path))
    status, said = program.terminated("bench.http_server", 4)
    assert status == 130
    assert said.endswith("Interrupted.\n")
