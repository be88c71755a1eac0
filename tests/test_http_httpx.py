"""Outgoing requests, on real servers: one client's equal requests go out once."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from http_support import PUBLIC, Origin, Reply, serve_asgi
from support import PATIENCE, eventually, eventually_async, spawn

httpx = pytest.importorskip("httpx", reason="the extra `httpx` is not installed")

from shardedflight import ShardedFlight  # noqa: E402
from shardedflight.http.httpx import AsyncCoalesceTransport, CoalesceTransport  # noqa: E402

WHO = {"X-Caller": "client"}


@pytest.fixture
def origin() -> Origin:
    return Origin(lambda caller: Reply(headers=()))


@pytest.fixture
def base(origin: Origin) -> Iterator[str]:
    with serve_asgi(origin.asgi) as port:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            origin.gate.set()
            origin.rest.set()


def client(base: str, **options: Any) -> Any:
    options.setdefault("follower_timeout", PATIENCE)
    transport = CoalesceTransport(**options)
    made = httpx.Client(transport=transport, base_url=base, headers=WHO, timeout=PATIENCE)
    made.transport = transport
    return made


def async_client(base: str, **options: Any) -> Any:
    options.setdefault("follower_timeout", PATIENCE)
    transport = AsyncCoalesceTransport(**options)
    made = httpx.AsyncClient(transport=transport, base_url=base, headers=WHO, timeout=PATIENCE)
    made.transport = transport
    return made


def run(main: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), PATIENCE))  # type: ignore[arg-type]


def waiting(c: Any) -> int:
    return c.transport.flight.stats().waiting


def test_threads_share_one_request(origin: Origin, base: str) -> None:
    with client(base) as c:
        answers = [spawn(c.get, "/item") for _ in range(50)]
        eventually(lambda: waiting(c) == 49)
        origin.gate.set()
        responses = [answer.result(PATIENCE) for answer in answers]
        assert {response.text for response in responses} == {"client"}
        collapsed = [r for r in responses if r.headers.get("cache-status")]
        assert len(collapsed) == 49
        assert {r.http_version for r in responses} == {"HTTP/1.1"}
        assert {r.reason_phrase for r in responses} == {"OK"}
        assert len({id(r) for r in responses}) == 50
        assert origin.runs == ["client"]
        assert c.transport.stats().collapsed == 49


def test_coroutines_share_one_request(origin: Origin, base: str) -> None:
    async def main() -> None:
        async with async_client(base) as c:
            answers = [asyncio.ensure_future(c.get("/item")) for _ in range(200)]
            await eventually_async(lambda: waiting(c) == 199)
            origin.gate.set()
            responses = await asyncio.gather(*answers)
            assert {response.text for response in responses} == {"client"}
            assert origin.runs == ["client"]
            assert c.transport.stats().collapsed == 199

    run(main)


def test_every_header_field_is_in_the_key(origin: Origin, base: str) -> None:
    """Credentials too: two users of one client each have answers of their own."""
    fields = [
        {},
        {"Authorization": "Bearer a"},
        {"Authorization": "Bearer b"},
        {"Cookie": "session=a"},
        {"X-API-Key": "a"},
        {"X-Anything": "a"},
    ]
    with client(base) as c:
        answers = [
            spawn(c.get, "/item", headers={"X-Caller": str(number), **headers})
            for number, headers in enumerate([*fields, *fields])
        ]
        eventually(lambda: len(origin.runs) == 12)
        origin.gate.set()
        assert [answer.result(PATIENCE).text for answer in answers] == [
            str(number) for number in range(12)
        ]


def test_equal_credentials_are_one_request(origin: Origin, base: str) -> None:
    with client(base, authorization=False) as c:
        headers = {"Authorization": "Bearer a", "Cookie": "session=a"}
        answers = [spawn(c.get, "/item", headers=headers) for _ in range(3)]
        eventually(lambda: waiting(c) == 2)
        origin.gate.set()
        assert {answer.result(PATIENCE).text for answer in answers} == {"client"}
        assert len(origin.runs) == 1


@pytest.mark.parametrize(
    ("reason", "arguments", "options"),
    [
        ("method", {"method": "POST"}, {}),
        ("body", {"method": "GET", "content": b"x"}, {}),
        ("range", {"method": "GET", "headers": {"Range": "bytes=0-1"}}, {}),
        ("no-store", {"method": "GET", "headers": {"Cache-Control": "no-store"}}, {}),
        ("route", {"method": "GET"}, {"routes": ["/other"]}),
    ],
)
def test_passes_through(
    origin: Origin, base: str, reason: str, arguments: Any, options: Any
) -> None:
    with client(base, **options) as c:
        answers = [spawn(c.request, url="/item", **arguments) for _ in range(2)]
        eventually(lambda: len(origin.runs) == 2)
        origin.gate.set()
        assert {answer.result(PATIENCE).text for answer in answers} == {"client"}
        assert c.transport.stats().passed == {reason: 2}


@pytest.mark.parametrize(
    ("reason", "headers", "options"),
    [
        ("private", [("Cache-Control", "private")], {}),
        ("no-store", [("Cache-Control", "no-store")], {}),
        ("set-cookie", [("Set-Cookie", "session=1")], {}),
        ("vary", [("Vary", "*")], {}),
        ("undeclared", [], {"shareable": ()}),
    ],
)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_unshareable_answers_are_each_callers_own(
    origin: Origin, base: str, reason: str, headers: Any, options: Any, kind: str
) -> None:
    origin.reply = lambda _: Reply(headers=headers, chunks=[str(len(origin.runs)), "rest"])

    def check(c: Any, bodies: set[str]) -> None:
        assert len(origin.runs) == 5
        assert bodies <= {f"{number}rest" for number in range(1, 6)}
        assert c.transport.stats().unshareable == {reason: 1}
        assert c.transport.stats().passed == {"released": 4}

    if kind == "sync":
        with client(base, **options) as c:
            answers = [spawn(c.get, "/item") for _ in range(5)]
            eventually(lambda: waiting(c) == 4)
            origin.gate.set()
            eventually(lambda: len(origin.runs) == 5)  # before any body is complete
            origin.rest.set()
            check(c, {answer.result(PATIENCE).text for answer in answers})
        return

    async def main() -> None:
        async with async_client(base, **options) as c:
            answers = [asyncio.ensure_future(c.get("/item")) for _ in range(5)]
            await eventually_async(lambda: waiting(c) == 4)
            origin.gate.set()
            await eventually_async(lambda: len(origin.runs) == 5)
            origin.rest.set()
            check(c, {(await answer).text for answer in answers})

    run(main)


def test_a_long_body_streams_on_to_the_leader(origin: Origin, base: str) -> None:
    origin.reply = lambda _: Reply(headers=[PUBLIC], chunks=["a" * 100, "b" * 100, "c" * 100])
    origin.rest.set()

    async def main() -> None:
        async with async_client(base, body_limit=150) as c:
            answers = [asyncio.ensure_future(c.get("/item")) for _ in range(3)]
            await eventually_async(lambda: waiting(c) == 2)
            origin.gate.set()
            for response in await asyncio.gather(*answers):
                assert response.text == "a" * 100 + "b" * 100 + "c" * 100
            assert len(origin.runs) == 3

    run(main)
    with client(base, body_limit=150) as c, c.stream("GET", "/item") as response:
        assert len(b"".join(response.iter_bytes())) == 300


def test_compressed_bodies_stay_compressed_on_the_way(origin: Origin, base: str) -> None:
    import gzip

    packed = gzip.compress(b"text" * 100)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            origin.runs.append("client")
            await eventually_async(origin.gate.is_set)
            headers = [(b"content-encoding", b"gzip"), (b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": packed})

    with serve_asgi(app, lifespan="off") as port, client(f"http://127.0.0.1:{port}") as c:
        answers = [spawn(c.get, "/item") for _ in range(2)]
        eventually(lambda: waiting(c) == 1)
        origin.gate.set()
        assert {answer.result(PATIENCE).text for answer in answers} == {"text" * 100}


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_failure_to_send_is_everybodys(kind: str) -> None:
    sends: list[int] = []
    gate = threading.Event()

    class Failing(httpx.BaseTransport, httpx.AsyncBaseTransport):
        def handle_request(self, request: Any) -> Any:
            sends.append(1)
            assert gate.wait(PATIENCE)
            raise httpx.ConnectError("nobody there", request=request)

        async def handle_async_request(self, request: Any) -> Any:
            sends.append(1)
            await eventually_async(gate.is_set)
            raise httpx.ConnectError("nobody there", request=request)

    if kind == "sync":
        with client("http://nowhere.invalid", transport=Failing()) as c:
            answers = [spawn(c.get, "/item") for _ in range(5)]
            eventually(lambda: waiting(c) == 4)
            gate.set()
            errors = [answer.exception(PATIENCE) for answer in answers]
    else:

        async def main() -> None:
            async with async_client("http://nowhere.invalid", transport=Failing()) as c:
                tasks = [asyncio.ensure_future(c.get("/item")) for _ in range(5)]
                await eventually_async(lambda: waiting(c) == 4)
                gate.set()
                errors.extend(await asyncio.gather(*tasks, return_exceptions=True))

        errors = []
        run(main)
    assert {type(error) for error in errors} == {httpx.ConnectError}
    assert {str(error) for error in errors} == {"nobody there"}
    assert len({id(error) for error in errors}) == 5
    assert len(sends) == 1


def test_a_cancelled_leader_leaves_its_followers_alone(origin: Origin, base: str) -> None:
    async def main() -> None:
        async with async_client(base) as c:
            leader = asyncio.ensure_future(c.get("/item"))
            await eventually_async(lambda: origin.runs == ["client"])
            follower = asyncio.ensure_future(c.get("/item"))
            await eventually_async(lambda: waiting(c) == 1)
            leader.cancel()
            await asyncio.wait([leader])
            origin.gate.set()
            assert (await follower).text == "client"
            assert leader.cancelled()
            assert origin.runs == ["client"]
            await eventually_async(lambda: c.transport._tasks == set())

    run(main)


def test_different_timeouts_are_different_requests(origin: Origin, base: str) -> None:
    """Who is patient does not get the error of who is not."""
    with client(base) as c:
        patient = spawn(c.get, "/item", timeout=PATIENCE)
        other = spawn(c.get, "/item", timeout=PATIENCE + 1)
        eventually(lambda: len(origin.runs) == 2)
        origin.gate.set()
        assert patient.result(PATIENCE).text == other.result(PATIENCE).text == "client"


def test_followers_that_wait_too_long_share_one_replacement(origin: Origin, base: str) -> None:
    with client(base, follower_timeout=0.3) as c:
        answers = [spawn(c.get, "/item") for _ in range(5)]
        eventually(lambda: len(origin.runs) >= 2)
        origin.gate.set()
        assert {answer.result(PATIENCE).text for answer in answers} == {"client"}
        assert c.transport.stats().replaced == len(origin.runs) - 1


def failing(_: Any) -> Any:
    raise LookupError("on purpose")


@pytest.mark.parametrize("options", [{"routes": failing}, {"flight": ShardedFlight(hash=failing)}])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_what_goes_wrong_inside_passes_through(
    origin: Origin, base: str, options: Any, kind: str
) -> None:
    origin.gate.set()
    if kind == "sync":
        with client(base, **options) as c:
            assert c.get("/item").text == "client"
            assert c.transport.stats().errors == 1
        return

    async def main() -> None:
        async with async_client(base, **options) as c:
            assert (await c.get("/item")).text == "client"
            assert c.transport.stats().errors == 1

    run(main)


def test_routes_may_be_a_function_of_the_request(origin: Origin, base: str) -> None:
    origin.gate.set()
    with client(base, routes=lambda request: request.url.host == "elsewhere") as c:
        assert c.get("/item").text == "client"
        assert c.transport.stats().passed == {"route": 1}


@pytest.mark.parametrize("kind", [CoalesceTransport, AsyncCoalesceTransport])
def test_a_bad_option_is_an_error_at_construction(kind: Any) -> None:
    with pytest.raises(TypeError, match="transport must be an httpx"):
        kind("http://here")
    with pytest.raises(ValueError, match="max_waiters"):
        kind(max_waiters=0)
    with pytest.raises(TypeError, match="routes must be several str"):
        kind(routes="/")


@pytest.mark.parametrize("field", ["Cache-Control", "X-Other"])
def test_a_strange_head_from_the_server_is_no_error_of_the_client(
    origin: Origin, base: str, field: str
) -> None:
    """Such as a lifetime of more digits than Python reads."""
    origin.reply = lambda caller: Reply(headers=[(field, "max-age=" + "9" * 5000)])
    origin.gate.set()
    with client(base) as c:
        assert c.get("/item").text == "client"
        assert c.transport.stats().errors == 0
