"""The benchmark of what passes through the middlewares: it measures what it says."""

import pytest

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
