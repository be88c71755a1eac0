"""`shardedflight.observe.page`: over real sockets, and in a real browser."""

import asyncio
import gc
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from http_support import serve_asgi
from support import PATIENCE, eventually, spawn

import shardedflight
from shardedflight import ShardedFlight
from shardedflight.observe.page import FlightsPage

httpx = pytest.importorskip("httpx", reason="the extra `test` is not installed")

HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"


@contextmanager
def running(flight: ShardedFlight, *keys: Any, followers: int = 0) -> Iterator[None]:
    """Keeps an execution for each key in flight, with followers of the first."""
    end = threading.Event()

    def fn() -> None:
        end.wait(PATIENCE)

    before = flight.in_flight()
    calls = [spawn(flight.do, fn, key) for key in keys]
    eventually(lambda: flight.in_flight() == before + len(keys), "the executions")
    calls += [spawn(flight.do, fn, keys[0]) for _ in range(followers)]
    eventually(lambda: flight.stats().waiting == followers, "the followers")
    try:
        yield
    finally:
        end.set()
        for call in calls:
            call.result(PATIENCE)


def executions(page: FlightsPage) -> list[tuple[str | None, int]]:
    (flight,) = page.data()["flights"]
    return [(each["key"], each["followers"]) for each in flight["executions"]]


def test_what_is_in_flight_is_listed_with_its_followers_until_it_ends() -> None:
    flight = ShardedFlight(4, name="f")
    page = FlightsPage(flight)
    with running(flight, "a", "b", followers=2):
        assert sorted(executions(page)) == [("'a'", 2), ("'b'", 0)]
        (shown,) = page.data()["flights"]
        assert shown["name"] == "f"
        assert shown["stats"]["in_flight"] == 2
        assert sum(shown["occupancy"]) == 2
        assert len(shown["occupancy"]) == 4
        assert all(each["age"] >= 0 for each in shown["executions"])
    assert executions(page) == []
    (shown,) = page.data()["flights"]
    assert (shown["stats"]["executions"], shown["stats"]["shared"]) == (2, 2)
    assert shown["saved"] == 0.5


def test_the_oldest_come_first_and_the_rest_is_counted() -> None:
    flight = ShardedFlight(name="f")
    page = FlightsPage(flight, limit=1)
    with running(flight, "old"), running(flight, "new"):
        assert executions(page) == [("'old'", 0)]
        assert page.data()["flights"][0]["more"] == 1


def test_many_shards_share_cells() -> None:
    flight = ShardedFlight(2048, name="f")
    page = FlightsPage(flight)
    with running(flight, *range(5)):
        (shown,) = page.data()["flights"]
        assert len(shown["occupancy"]) == 512
        assert shown["shards_per_cell"] == 4
        assert sum(shown["occupancy"]) == 5


class NoRepr:
    def __repr__(self) -> str:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("x" * 100, "'" + "x" * 8 + "…"),
        ("\ud800", "'\\ud800'"),
        (("a", 1), "('a', 1)"),
        (NoRepr(), "<NoRepr w…"),
    ],
)
def test_keys_are_shortened_and_can_not_break_the_page(key: Any, shown: str) -> None:
    flight = ShardedFlight(name="f")
    page = FlightsPage(flight, key_length=10)
    with running(flight, key):
        assert executions(page) == [(shown, 0)]


def test_keys_can_be_left_out() -> None:
    flight = ShardedFlight(name="f")
    page = FlightsPage(flight, keys=False)
    with running(flight, "secret"):
        assert executions(page) == [(None, 0)]
        assert "secret" not in repr(page.data())


def test_flights_come_and_go() -> None:
    flight, other = ShardedFlight(name="f"), ShardedFlight()
    page = FlightsPage(flight)
    page.add(other, "g")
    assert [each["name"] for each in page.data()["flights"]] == ["f", "g"]
    page.remove(flight)
    assert [each["name"] for each in page.data()["flights"]] == ["g"]
    del other
    gc.collect()
    assert page.data() == {"flights": []}
    page.add(flight)
    page.close()
    assert page.data() == {"flights": []}
    assert flight._subscriptions == ()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"keys": 1}, TypeError, "keys must be True or False, not 1"),
        ({"key_length": 0}, ValueError, "key_length must be 1 or more, not 0"),
        ({"limit": "9"}, TypeError, "limit must be an int, not '9'"),
    ],
)
def test_a_wrong_option_is_an_error_at_once(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        FlightsPage(**arguments)


def test_what_can_not_be_shown_is_an_error_and_leaves_nobody_watching() -> None:
    flight = ShardedFlight(name="f")
    with pytest.raises(ValueError, match="needs a name"):
        FlightsPage(flight, ShardedFlight())
    assert flight._subscriptions == ()
    with pytest.raises(TypeError, match="a ShardedFlight is watched, not 7"):
        FlightsPage(7)  # type: ignore[arg-type]


def test_a_signal_handler_may_call_a_flight_amid_the_pages_own_work() -> None:
    """The page's lock is held by the very thread whose call the page is then told of."""
    flight = ShardedFlight(name="prices")
    page = FlightsPage(flight)

    def interrupted() -> Any:
        with page._flights.lock:
            return flight.do(lambda: "value", "k")

    assert spawn(interrupted).result(PATIENCE) == ("value", False)


def test_over_http() -> None:
    flight = ShardedFlight(name="f")
    with (
        serve_asgi(FlightsPage(flight)) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        page = client.get("/")
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        for answer in (page, client.get("/data")):
            assert answer.headers["cache-control"] == "no-store"
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"
        assert client.get("/data").json()["flights"][0]["name"] == "f"
        head = client.head("/")
        assert (head.status_code, head.content) == (200, b"")
        assert int(head.headers["content-length"]) == len(page.content)
        refused = client.post("/data")
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")


def test_mounted_without_a_slash_it_leads_to_the_one_with_it() -> None:
    routing = pytest.importorskip("starlette.routing")
    applications = pytest.importorskip("starlette.applications")
    flight = ShardedFlight(name="f")
    page = FlightsPage(flight)
    app = applications.Starlette(routes=[routing.Mount("/debug/flights", app=page)])
    for mounted, address in ((app, "/debug/flights"), (page, "/debug/flights")):
        with serve_asgi(mounted) as port, httpx.Client(follow_redirects=True) as client:
            answer = client.get(f"http://127.0.0.1:{port}{address}")
            assert answer.status_code == 200
            assert answer.url.path == "/debug/flights/"
            data = client.get(answer.url.join("data"))
            assert data.json()["flights"][0]["name"] == "f"


def test_a_strange_address_can_not_add_to_the_answers_head() -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, str]:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        sent.append(message)

    path = "/debug/a\r\nset-cookie: b=c \u00e4"
    asyncio.run(FlightsPage()({"type": "http", "method": "GET", "path": path}, receive, send))
    headers = dict(sent[0]["headers"])
    assert headers[b"location"] == b"a%0D%0Aset-cookie%3A%20b%3Dc%20%C3%A4/"


def test_a_websocket_is_closed_and_a_lifespan_is_not_supported() -> None:
    page = FlightsPage()
    sent: list[Any] = []

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(page({"type": "websocket"}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1000}]
    with pytest.raises(RuntimeError, match="no lifespan here"):
        asyncio.run(page({"type": "lifespan"}, receive, send))


# In a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    service = pytest.importorskip("selenium.webdriver.chrome.service")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("there is no chromium with its chromedriver: Debian's `chromium-driver` has it")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    # A container has neither the rights for the sandbox nor much shared memory.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=service.Service(programs[1]))
    try:
        driver.set_page_load_timeout(PATIENCE)
        yield driver
    finally:
        driver.quit()


def text(browser: Any) -> str:
    found: str = browser.execute_script("return document.body.innerText")
    return found


in_one_browser = [
    pytest.mark.once,
    pytest.mark.skipif(shardedflight.__compiled__, reason="the plain core's run has the browser"),
]


@pytest.mark.parametrize("width", [1100, 360])
@pytest.mark.usefixtures("browser")
class TestInABrowser:
    """A screen and a phone."""

    pytestmark = in_one_browser

    def test_it_shows_what_runs_and_refreshes(
        self, browser: Any, width: int, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        flight = ShardedFlight(64, name="products")
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        with serve_asgi(FlightsPage(flight)) as port:
            browser.get(f"http://127.0.0.1:{port}/")
            eventually(lambda: "products" in text(browser), "the flight on the page")
            assert "item-7" not in text(browser)
            with running(flight, "item-7", HOSTILE, "k" * 300, followers=3):
                eventually(lambda: "item-7" in text(browser), "the key on the page")
                assert "<img src=x" in text(browser)
                assert browser.title == "Flights"
                assert browser.find_elements("css selector", "img") == []
                assert len(browser.find_elements("css selector", ".shards i")) == 64
                row = browser.find_element("xpath", "//tr[contains(., 'item-7')]")
                assert row.find_elements("css selector", "td")[1].text == "3"
                wide = "return document.documentElement.scrollWidth - window.innerWidth"
                assert browser.execute_script(wide) <= 0
                kept = os.environ.get("SHARDEDFLIGHT_SCREENSHOTS")
                folder = Path(kept) if kept else tmp_path_factory.mktemp("screenshots")
                folder.mkdir(parents=True, exist_ok=True)
                picture = folder / f"page-{width}.png"
                assert browser.save_screenshot(str(picture))
                assert picture.stat().st_size > 5_000
            eventually(lambda: "item-7" not in text(browser), "the end on the page")
            errors = [e for e in browser.get_log("browser") if "favicon" not in e["message"]]
            assert errors == []
