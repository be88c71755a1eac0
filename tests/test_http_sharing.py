"""Whose answers are shared, on real servers: every rule, and what would leak without it.

The application answers who asked. A caller that gets another's name has got another's answer.
"""

from typing import Any

import pytest
from http_support import KINDS, PUBLIC, Origin, Reply, Site, names, results, site
from support import PATIENCE, eventually

from shardedflight import ShardedFlight
from shardedflight.http import asgi, wsgi

pytestmark = [pytest.mark.around, pytest.mark.parametrize("kind", KINDS)]


# -- collapsing -----------------------------------------------------------------------------------


def test_a_stampede_runs_the_application_once(kind: str) -> None:
    callers = names("c", 300)
    with site(kind, threads=310) as s:
        leader = s.lead()
        followers = s.follow(callers)
        s.origin.gate.set()
        answers = results(followers)
        assert leader.result(PATIENCE).body == "leader"
        assert {answer.body for answer in answers.values()} == {"leader"}
        assert s.origin.runs == ["leader"]
        assert s.stats.collapsed == 300
        assert s.stats.passed == {}
        assert s.middleware.flight.stats().executions == 1


def test_nothing_is_cached(kind: str) -> None:
    with site(kind) as s:
        s.origin.gate.set()
        assert [s.ask(name).result(PATIENCE).body for name in ("a", "b")] == ["a", "b"]


def test_a_follower_gets_a_copy_without_hop_by_hop_fields(kind: str) -> None:
    fields = [
        PUBLIC,
        ("Content-Type", "text/plain"),
        ("X-One", "1"),
        ("X-One", "2"),
        ("Connection", "X-Private"),
        ("X-Private", "for the next hop"),
        ("Keep-Alive", "timeout=5"),
        ("Cache-Status", "inner; hit"),
    ]
    if kind == "wsgi":  # PEP 3333 forbids applications to send them
        fields = [f for f in fields if f[0] not in ("Connection", "Keep-Alive")]
    with site(kind, Origin(lambda _: Reply(headers=fields))) as s:
        leader = s.lead()
        followers = s.follow(["follower"])
        s.origin.gate.set()
        led, followed = leader.result(PATIENCE), results(followers)["follower"]
    assert led.header("Cache-Status") == "inner; hit"
    # RFC 9211: each cache adds its own member after those that are there.
    assert followed.header("Cache-Status") == "inner; hit, shardedflight; fwd=miss; collapsed"
    assert followed.header("X-One") == "1, 2"
    assert followed.header("Content-Type") == "text/plain"
    if kind == "asgi":
        assert followed.header("X-Private") is None
        assert followed.header("Keep-Alive") is None
    assert (followed.status, followed.body) == (led.status, led.body)


def test_head_requests_are_collapsed_apart_from_get(kind: str) -> None:
    with site(kind) as s:
        leader = s.lead("g")
        other = s.lead("h", method="HEAD")
        followers = s.follow(["x"], method="HEAD")
        s.origin.gate.set()
        assert leader.result(PATIENCE).body == "g"
        assert other.result(PATIENCE).body == ""
        assert results(followers)["x"].collapsed
        assert s.origin.runs == ["g", "h"]


# -- requests that pass through -------------------------------------------------------------------

PASSING: dict[str, tuple[str, dict[str, Any]]] = {
    "a route not named": ("route", {"path": "/private/item"}),
    "a path that only begins like a route": ("route", {"path": "/public-not"}),
    "POST": ("method", {"method": "POST", "path": "/public"}),
    "DELETE": ("method", {"method": "DELETE", "path": "/public"}),
    "a body": ("body", {"body": b"what I look for", "path": "/public"}),
    "Authorization": ("authorization", {"headers": [("Authorization", "Bearer abc")]}),
    "Cookie": ("cookie", {"headers": [("Cookie", "session=1")]}),
    "Proxy-Authorization": ("credentials", {"headers": [("Proxy-Authorization", "Basic abc")]}),
    "an API key": ("credentials", {"headers": [("X-API-Key", "secret")]}),
    "a certificate by a proxy": ("credentials", {"headers": [("X-Client-Cert", "MIIB")]}),
    "a field the application names": ("credentials", {"headers": [("X-Tenant", "acme")]}),
    "Range": ("range", {"headers": [("Range", "bytes=0-1")]}),
    "Upgrade": ("upgrade", {"headers": [("Upgrade", "foo")]}),
    "no-store": ("no-store", {"headers": [("Cache-Control", 'a="b, c", No-Store')]}),
    "a malformed Cache-Control": ("no-store", {"headers": [("Cache-Control", '="')]}),
}


@pytest.mark.parametrize("what", PASSING)
def test_passes_through(kind: str, what: str) -> None:
    """Were these collapsed, the second caller would get the first one's answer."""
    reason, request = PASSING[what]
    request = {"path": "/public/item", **request}
    with site(kind, routes=["/public"], private_headers=["x-tenant"]) as s:
        futures = s.ask_all(["a", "b", "c"], **request)
        eventually(lambda: len(s.origin.runs) == 3, "three runs at once")
        s.origin.gate.set()
        answers = results(futures)
        assert {caller: answer.body for caller, answer in answers.items()} == {
            "a": "a",
            "b": "b",
            "c": "c",
        }
        assert not any(answer.collapsed for answer in answers.values())
        assert s.stats.passed == {reason: 3}
        assert s.middleware.flight.stats().executions == 0


def test_a_chunked_body_passes_through(kind: str) -> None:
    with site(kind) as s:
        s.origin.gate.set()
        connection = s.open("b", headers=[("Transfer-Encoding", "chunked")])
        connection.send(b"4\r\nlook\r\n0\r\n\r\n")
        assert connection.answer().body == "b"
        assert s.stats.passed == {"body": 1}
        assert s.middleware.flight.stats().executions == 0


def test_routes_and_shareable_may_be_functions(kind: str) -> None:
    def of_items(native: Any) -> bool:
        path = native["path"] if kind == "asgi" else native["PATH_INFO"]
        return path == "/item"

    origin = Origin(lambda _: Reply(headers=()))
    with site(kind, origin, routes=of_items, shareable=of_items) as s:
        passing = s.lead("other", path="/other")
        leader = s.lead("a")
        followers = s.follow(["b"])
        s.origin.gate.set()
        assert passing.result(PATIENCE).body == "other"
        assert [leader.result(PATIENCE).body, results(followers)["b"].body] == ["a", "a"]
        assert s.stats.passed == {"route": 1}


# -- the key --------------------------------------------------------------------------------------

KEYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "path": ({"path": "/1"}, {"path": "/2"}),
    "query": ({"path": "/?user=1"}, {"path": "/?user=2"}),
    "order of the query": ({"path": "/?a=1&b=2"}, {"path": "/?b=2&a=1"}),
    "host": ({"headers": [("Host", "a.example")]}, {"headers": [("Host", "b.example")]}),
    **{
        name: ({"headers": [(name, "a")]}, {"headers": [(name, "b")]})
        for name in (
            "Accept",
            "Accept-Encoding",
            "Accept-Language",
            "Origin",
            "If-None-Match",
            "If-Match",
            "If-Modified-Since",
            "If-Unmodified-Since",
            "If-Range",
            "X-Forwarded-Host",
            "X-Forwarded-Proto",
            "X-Original-URL",
            "X-HTTP-Method-Override",
            "X-Region",
        )
    },
    "absent and present": ({}, {"headers": [("Accept-Language", "de")]}),
}


@pytest.mark.parametrize("what", KEYS)
def test_is_part_of_the_key(kind: str, what: str) -> None:
    one, other = KEYS[what]
    with site(kind, key_headers=["X-Region"]) as s:
        first = s.lead("first", **one)
        second = s.lead("second", **other)
        followers = s.follow(["f"], **one)
        s.origin.gate.set()
        assert first.result(PATIENCE).body == "first"
        assert second.result(PATIENCE).body == "second"
        assert results(followers)["f"].body == "first"


def test_an_encoded_path_is_another_path(kind: str) -> None:
    with site(kind) as s:
        first = s.ask("first", path="/a%62c")
        second = s.ask("second", path="/abc")
        eventually(lambda: len(s.origin.runs) == 2, "both run")
        s.origin.gate.set()
        assert [first.result(PATIENCE).body, second.result(PATIENCE).body] == ["first", "second"]


# -- answers that are not shared ------------------------------------------------------------------

REFUSED: dict[str, tuple[str, Reply]] = {
    "private": ("private", Reply(headers=[("Cache-Control", "max-age=60, private")])),
    "private of some fields": ("private", Reply(headers=[("Cache-Control", 'private="x, y"')])),
    "no-store": ("no-store", Reply(headers=[("cache-control", "public, No-Store")])),
    "no-cache": ("no-cache", Reply(headers=[("Cache-Control", "no-cache, max-age=60")])),
    "two fields": ("private", Reply(headers=[PUBLIC, ("Cache-Control", "private")])),
    "malformed": ("malformed", Reply(headers=[("Cache-Control", 'public, "private')])),
    "Set-Cookie": ("set-cookie", Reply(headers=[PUBLIC, ("Set-Cookie", "session=1")])),
    "Vary: *": ("vary", Reply(headers=[PUBLIC, ("Vary", "Accept, *")])),
    "no Cache-Control": ("undeclared", Reply(headers=())),
    "nothing that allows it": ("undeclared", Reply(headers=[("Cache-Control", "no-transform")])),
    "max-age=0": ("stale", Reply(headers=[("Cache-Control", "public, max-age=0")])),
    "s-maxage=0": ("stale", Reply(headers=[("Cache-Control", "max-age=60, s-maxage=0")])),
    "event stream": (
        "stream",
        Reply(headers=[PUBLIC, ("Content-Type", "text/event-stream; charset=utf-8")]),
    ),
    "replaced parts": (
        "stream",
        Reply(headers=[PUBLIC, ("Content-Type", "Multipart/X-Mixed-Replace; boundary=x")]),
    ),
    "too long": ("size", Reply(headers=[PUBLIC, ("Content-Length", "2000000")])),
    **{str(code): ("status", Reply(code)) for code in (201, 302, 307, 400, 401, 403, 418, 429)},
}


@pytest.mark.parametrize("what", REFUSED)
def test_followers_of_an_unshareable_answer_are_released_at_once(kind: str, what: str) -> None:
    """It turns out when they have joined already. They are in the application all together."""
    reason, reply = REFUSED[what]
    length = dict(reply.headers).get("Content-Length")
    origin = Origin(lambda caller: Reply(reply.status, reply.headers, [caller, "..."]))
    if length is not None:
        origin.reply = lambda caller: Reply(
            reply.status, reply.headers, [caller.ljust(10), " " * (int(length) - 10)]
        )
    callers = names("c", 10)
    with site(kind, origin) as s:
        leader = s.lead()
        followers = s.follow(callers)
        s.origin.gate.set()
        # The leader's body is not complete yet, nor is anybody's.
        eventually(lambda: len(s.origin.runs) == 11, "all runs at once")
        assert s.origin.ended == []
        s.origin.rest.set()
        answers = {**results(followers), "leader": leader.result(PATIENCE)}
        for caller, answer in answers.items():
            assert answer.body.rstrip(" .") == caller
            assert not answer.collapsed
            assert answer.status == reply.status
        assert s.stats.unshareable == {reason: 1}
        assert s.stats.released == 10
        assert s.stats.passed == {"released": 10}
        assert s.stats.collapsed == 0


@pytest.mark.parametrize("status", [200, 203, 300, 301, 308, 404, 405, 410, 414, 501, 500, 503])
def test_these_are_shared(kind: str, status: int) -> None:
    with site(kind, Origin(lambda _: Reply(status))) as s:
        leader = s.lead()
        followers = s.follow(["f"])
        s.origin.gate.set()
        answer = results(followers)["f"]
        assert (answer.status, answer.body, answer.collapsed) == (status, "leader", True)
        assert leader.result(PATIENCE).status == status


def test_an_answer_without_a_body_is_shared(kind: str) -> None:
    with site(kind, Origin(lambda _: Reply(204, [PUBLIC], []))) as s:
        leader = s.lead()
        followers = s.follow(["f"])
        s.origin.gate.set()
        assert results(followers)["f"].collapsed
        assert leader.result(PATIENCE).status == 204


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_server_errors_can_be_kept_apart(kind: str, status: int) -> None:
    with site(kind, Origin(lambda _: Reply(status)), server_errors=False) as s:
        leader = s.lead()
        followers = s.follow(["f"])
        s.origin.gate.set()
        assert results(followers)["f"].body == "f"
        assert leader.result(PATIENCE).body == "leader"
        assert s.stats.unshareable == {"status": 1}


def test_no_cache_control_is_shared_where_it_is_declared(kind: str) -> None:
    with site(kind, Origin(lambda _: Reply(headers=())), shareable=["/feed"]) as s:
        leader = s.lead(path="/feed")
        followers = s.follow(["f"], path="/feed")
        s.origin.gate.set()
        assert results(followers)["f"].body == "leader"
        assert leader.result(PATIENCE).body == "leader"


@pytest.mark.parametrize("forbidden", ["private", "no-store", "no-cache", "max-age=0"])
def test_a_declared_route_still_obeys_the_answer(kind: str, forbidden: str) -> None:
    origin = Origin(lambda _: Reply(headers=[("Cache-Control", forbidden)]))
    with site(kind, origin, shareable=["/"]) as s:
        leader = s.lead()
        followers = s.follow(["f"])
        s.origin.gate.set()
        assert results(followers)["f"].body == "f"
        assert leader.result(PATIENCE).body == "leader"


# -- authorization --------------------------------------------------------------------------------

BEARER = [("Authorization", "Bearer mine")]


@pytest.mark.parametrize("control", ["public", "s-maxage=9", "must-revalidate"])
def test_authorization_with_an_answer_for_everybody(kind: str, control: str) -> None:
    origin = Origin(lambda _: Reply(headers=[("Cache-Control", control)]))
    with site(kind, origin, authorization=True) as s:
        leader = s.lead(headers=BEARER)
        followers = s.follow(["f"], headers=[("Authorization", "Bearer another")])
        s.origin.gate.set()
        assert results(followers)["f"].body == "leader"
        assert leader.result(PATIENCE).body == "leader"


@pytest.mark.parametrize("headers", [[("Cache-Control", "max-age=60")], []])
def test_authorization_with_any_other_answer(kind: str, headers: list[tuple[str, str]]) -> None:
    """max-age alone says that the caller's own cache may keep it: RFC 9111 section 3.5."""
    origin = Origin(lambda _: Reply(headers=headers))
    with site(kind, origin, authorization=True, shareable=["/"]) as s:
        leader = s.lead(headers=BEARER)
        followers = s.follow(["f"], headers=[("Authorization", "Bearer another")])
        s.origin.gate.set()
        assert results(followers)["f"].body == "f"
        assert leader.result(PATIENCE).body == "leader"
        assert s.stats.unshareable == {"authorization": 1}


@pytest.mark.parametrize("control", ["max-age=0", "no-cache"])
def test_a_reload_joins_a_first_look(kind: str, control: str) -> None:
    """What a browser adds then is in no key."""
    with site(kind) as s:
        leader = s.lead()
        followers = s.follow(["f"], headers=[("Cache-Control", control)])
        s.origin.gate.set()
        assert results(followers)["f"].body == leader.result(PATIENCE).body == "leader"


def test_authorization_never_joins_an_anonymous_request(kind: str) -> None:
    with site(kind, authorization=True) as s:
        first, second = s.lead("anonymous"), s.lead("known", headers=BEARER)
        s.origin.gate.set()
        assert [first.result(PATIENCE).body, second.result(PATIENCE).body] == ["anonymous", "known"]


# -- Vary -----------------------------------------------------------------------------------------


def agent(name: str) -> list[tuple[str, str]]:
    return [("User-Agent", name)]


def test_vary_regroups_followers_by_variant(kind: str) -> None:
    """One execution for each variant, although all have joined the first one."""
    origin = Origin(lambda _: Reply(headers=[PUBLIC, ("Vary", "User-Agent, Accept")]))
    with site(kind, origin) as s:
        leader = s.lead("leader", headers=agent("a"))
        same = s.follow(names("a", 5), headers=agent("a"))
        others = s.follow(names("b", 5), headers=agent("b"))
        without = s.follow(names("n", 5))
        s.origin.gate.set()
        assert leader.result(PATIENCE).body == "leader"
        assert {answer.body for answer in results(same).values()} == {"leader"}
        for group in (others, without):
            answers = results(group)
            bodies = {answer.body for answer in answers.values()}
            assert len(bodies) == 1
            assert bodies <= set(group)
        assert len(s.origin.runs) == 3
        assert s.stats.collapsed == 5 + 4 + 4
        assert s.stats.passed == {}


def test_a_variant_is_known_from_then_on(kind: str) -> None:
    origin = Origin(lambda _: Reply(headers=[PUBLIC, ("Vary", "User-Agent")]))
    with site(kind, origin) as s:
        s.origin.gate.set()
        s.ask("first", headers=agent("a")).result(PATIENCE)
        s.origin.gate.clear()
        one, other = s.lead("one", headers=agent("a")), s.lead("other", headers=agent("b"))
        s.origin.gate.set()
        assert [one.result(PATIENCE).body, other.result(PATIENCE).body] == ["one", "other"]


def test_an_answer_may_vary_by_more_the_second_time(kind: str) -> None:
    varies = {"leader": "X-A", "b1": "X-B", "b2": "X-B"}
    origin = Origin(lambda c: Reply(headers=[PUBLIC, ("Vary", varies.get(c, "X-A"))]))
    with site(kind, origin) as s:
        leader = s.lead("leader", headers=[("X-A", "1"), ("X-B", "1")])
        one = s.follow(["b1"], headers=[("X-A", "2"), ("X-B", "1")])
        two = s.follow(["b2"], headers=[("X-A", "2"), ("X-B", "2")])
        s.origin.gate.set()
        assert leader.result(PATIENCE).body == "leader"
        assert results(one)["b1"].body == "b1"
        assert results(two)["b2"].body == "b2"


# -- after an unshareable answer ------------------------------------------------------------------


def test_a_key_passes_through_until_an_answer_is_shareable(kind: str) -> None:
    replies = {"b": Reply(), "c": Reply()}
    origin = Origin(lambda caller: replies.get(caller, Reply(headers=())))
    with site(kind, origin) as s:
        s.origin.gate.set()
        s.ask("a").result(PATIENCE)
        s.origin.gate.clear()
        passing = s.ask_all(["x", "y"])
        eventually(lambda: len(s.origin.runs) == 3, "both run at once")
        other = s.lead("other", path="/another/key")
        assert s.stats.passed == {"learned": 2}
        s.origin.gate.set()
        assert {caller: answer.body for caller, answer in results(passing).items()} == {
            "x": "x",
            "y": "y",
        }
        other.result(PATIENCE)
        assert s.ask("b").result(PATIENCE).body == "b"  # passes through, and is shareable
        assert s.stats.passed == {"learned": 3}
        s.origin.gate.clear()
        leader = s.lead("c")
        followers = s.follow(["f"])
        s.origin.gate.set()
        assert [leader.result(PATIENCE).body, results(followers)["f"].body] == ["c", "c"]


def test_a_key_passes_through_for_a_time(kind: str) -> None:
    with site(kind, Origin(lambda _: Reply(headers=())), pass_through_time=0.05) as s:
        s.origin.gate.set()
        s.ask("a").result(PATIENCE)

        def led_again() -> bool:
            s.ask("b").result(PATIENCE)
            return s.middleware.flight.stats().executions == 2

        eventually(led_again, "another execution")


def test_passing_through_can_be_turned_off(kind: str) -> None:
    with site(kind, Origin(lambda _: Reply(headers=())), pass_through_time=0) as s:
        s.origin.gate.set()
        for caller in ("a", "b"):
            s.ask(caller).result(PATIENCE)
        assert s.stats.passed == {}
        assert s.middleware.flight.stats().executions == 2


# -- bodies ---------------------------------------------------------------------------------------


def test_a_long_body_releases_its_followers_and_streams_on(kind: str) -> None:
    chunk = "x" * 100
    origin = Origin(lambda caller: Reply(chunks=[caller, chunk, chunk]))
    with site(kind, origin, body_limit=150) as s:
        leader = s.lead()
        followers = s.follow(["a", "b"])
        s.origin.gate.set()
        s.origin.rest.set()
        assert leader.result(PATIENCE).body == f"leader{chunk}{chunk}"
        for caller, answer in results(followers).items():
            assert answer.body == f"{caller}{chunk}{chunk}"
        assert s.stats.unshareable == {"size": 1}
        assert s.ask("late").result(PATIENCE).body.startswith("late")
        assert s.stats.passed == {"released": 2, "learned": 1}


def test_a_body_of_just_the_limit_is_shared(kind: str) -> None:
    with site(kind, Origin(lambda _: Reply(chunks=["12345", "67890"])), body_limit=10) as s:
        s.origin.rest.set()
        leader = s.lead()
        followers = s.follow(["a"])
        s.origin.gate.set()
        assert leader.result(PATIENCE).body == "1234567890"
        assert results(followers)["a"].collapsed


def test_the_leaders_first_byte_is_not_held_back(kind: str) -> None:
    with site(kind, Origin(lambda caller: Reply(chunks=[caller, "rest"]))) as s:
        leader = s.open("leader")
        eventually(lambda: s.origin.runs == ["leader"])
        followers = s.follow(["f"])
        s.origin.gate.set()
        response = leader.getresponse()
        assert response.read(6) == b"leader"  # the application waits before the rest
        assert s.waiting == 1
        s.origin.rest.set()
        assert response.read() == b"rest"
        leader.close()
        assert results(followers)["f"].body == "leaderrest"


def test_an_answer_that_breaks_off_is_not_shared(kind: str) -> None:
    headers = [PUBLIC, ("Content-Length", "100")]
    whole = "follower".ljust(100)

    def reply(caller: str) -> Reply:
        return Reply(headers=headers, chunks=["leader"] if caller == "leader" else [whole])

    with site(kind, Origin(reply)) as s:
        leader = s.open("leader")
        eventually(lambda: s.origin.runs == ["leader"])
        followers = s.follow(["f"])
        s.origin.gate.set()
        assert results(followers)["f"].body == whole
        assert leader.getresponse().read(6) == b"leader"
        leader.drop()
        assert s.stats.unshareable == {"broken": 1}
        assert s.stats.passed == {"released": 1}


def test_nothing_is_learned_from_an_answer_that_breaks_off(kind: str) -> None:
    headers = [PUBLIC, ("Content-Length", "100")]
    with site(kind, Origin(lambda _: Reply(headers=headers, chunks=["short"]))) as s:
        s.origin.gate.set()
        for number in (1, 2):
            connection = s.open()
            assert connection.getresponse().read(5) == b"short"
            eventually(lambda number=number: s.stats.unshareable == {"broken": number})
            connection.drop()
        assert s.stats.passed == {}


# -- applications that raise ----------------------------------------------------------------------


class Failure(Exception):
    """Of the application."""


def test_an_exception_is_everybodys_on_a_declared_route(kind: str) -> None:
    with site(kind, Origin(lambda _: Reply(error=Failure("on purpose"))), shareable=["/"]) as s:
        leader = s.lead()
        followers = s.follow(names("f", 5))
        s.origin.gate.set()
        assert {answer.status for answer in results(followers).values()} == {500}
        assert leader.result(PATIENCE).status == 500
        assert s.origin.runs == ["leader"]
        assert s.stats.errors == 0


@pytest.mark.parametrize(
    "options", [{}, {"shareable": ["/"], "server_errors": False}], ids=["undeclared", "kept apart"]
)
def test_an_exception_is_the_leaders_alone_elsewhere(kind: str, options: Any) -> None:
    """It may be about the leader's own request, which nobody has said is like the others."""

    def reply(caller: str) -> Reply:
        return Reply(error=Failure("on purpose") if caller == "leader" else None)

    with site(kind, Origin(reply), **options) as s:
        leader = s.lead()
        followers = s.follow(names("f", 5))
        s.origin.gate.set()
        assert {caller: answer.body for caller, answer in results(followers).items()} == {
            caller: caller for caller in names("f", 5)
        }
        assert leader.result(PATIENCE).status == 500


def test_an_exception_with_authorization_is_its_own_callers(kind: str) -> None:
    """It is as a 500 without Cache-Control, which is not for everybody."""

    def reply(caller: str) -> Reply:
        return Reply(error=Failure("on purpose") if caller == "leader" else None, headers=())

    options: Any = {"shareable": ["/"], "authorization": True}
    with site(kind, Origin(reply), **options) as s:
        leader = s.lead(headers=[("Authorization", "Basic bGVhZGVy")])
        follower = s.follow(["f"], headers=[("Authorization", "Basic Zg==")])["f"]
        s.origin.gate.set()
        assert leader.result(PATIENCE).status == 500
        assert follower.result(PATIENCE).body == "f"


# -- waiting --------------------------------------------------------------------------------------


def test_followers_that_wait_too_long_share_one_replacement(kind: str) -> None:
    origin = Origin(held=lambda caller: caller == "leader")
    with site(kind, origin, follower_timeout=0.5) as s:
        leader = s.lead()
        followers = s.ask_all(names("f", 20))
        eventually(lambda: len(s.origin.runs) >= 2, "the replacement")
        s.origin.gate.set()  # for all but the leader
        bodies = {answer.body for answer in results(followers).values()}
        # One, unless the machine was so slow that a replacement was replaced in its turn.
        assert bodies == set(s.origin.runs[1:])
        assert s.stats.replaced == len(bodies)
        assert s.stats.passed == {}
        assert not leader.done()
        origin.held = lambda _: False
        assert leader.result(PATIENCE).body == "leader"


def test_the_first_answer_is_good_for_those_who_turned_to_a_replacement(kind: str) -> None:
    """Else an application slower than the timeout would answer one follower per timeout."""
    origin = Origin(held=lambda caller: caller != "leader")
    with site(kind, origin, follower_timeout=0.2) as s:
        leader = s.lead()
        followers = s.ask_all(names("f", 30))
        eventually(lambda: s.stats.replaced >= 2, "two replacements")
        s.origin.gate.set()  # for the leader alone: the replacements never end by themselves
        assert leader.result(PATIENCE).body == "leader"
        eventually(lambda: all(f.done() for c, f in followers.items() if c not in s.origin.runs))
        for caller, future in followers.items():
            if caller not in s.origin.runs:
                assert future.result(PATIENCE).body == "leader"
        origin.held = lambda _: False
        results(followers)


def test_more_followers_than_the_limit_pass_through(kind: str) -> None:
    with site(kind, max_waiters=3) as s:
        leader = s.lead()
        followers = s.follow(names("f", 3))
        passing = s.lead("one too many")
        s.origin.gate.set()
        assert passing.result(PATIENCE).body == "one too many"
        assert {answer.body for answer in results(followers).values()} == {"leader"}
        leader.result(PATIENCE)
        assert s.stats.passed == {"waiters": 1}


# -- a leader that leaves -------------------------------------------------------------------------


def test_the_execution_outlives_the_leaders_client(kind: str) -> None:
    with site(kind, Origin(lambda _: Reply(chunks=["a", *"b" * 50]))) as s:
        leader = s.open("leader")
        eventually(lambda: s.origin.runs == ["leader"])
        followers = s.follow(names("f", 5))
        leader.drop()
        s.origin.gate.set()
        s.origin.rest.set()
        answers = results(followers)
        assert {answer.body for answer in answers.values()} == {"a" + "b" * 50}
        assert s.origin.runs == ["leader"]
        eventually(lambda: s.origin.ended == ["leader"])


# -- bad input, and going wrong -------------------------------------------------------------------


class Broken(Exception):
    """Of what is inside the middleware."""


def failing(_: Any) -> bool:
    raise Broken("on purpose")


def endless(_: Any) -> bool:
    return endless(_)


class RefusingFlight(ShardedFlight):
    """Goes wrong before it has called anything."""

    def do(self, fn: Any, /, *parts: Any, timeout: float | None = None) -> Any:
        raise Broken("on purpose")

    async def do_async(self, fn: Any, /, *parts: Any) -> Any:
        raise Broken("on purpose")


class LosingFlight(ShardedFlight):
    """Goes wrong when all is done."""

    def do(self, fn: Any, /, *parts: Any, timeout: float | None = None) -> Any:
        super().do(fn, *parts, timeout=timeout)
        raise Broken("on purpose")

    async def do_async(self, fn: Any, /, *parts: Any) -> Any:
        await super().do_async(fn, *parts)
        raise Broken("on purpose")


@pytest.mark.parametrize("option", ["routes", "shareable", "hash", "build_key"])
def test_a_hook_that_calls_itself_without_end_passes_through(kind: str, option: str) -> None:
    options: dict[str, Any] = {option: endless}
    if option in ("hash", "build_key"):
        options = {"flight": ShardedFlight(**options)}
    with site(kind, **options) as s:
        s.origin.gate.set()
        answer = s.ask("a").result(PATIENCE)
        assert (answer.status, answer.body) == (200, "a")
        assert s.stats.passed == {"error": 1}


def test_a_flight_that_loses_what_it_had_costs_nobody_an_answer(kind: str) -> None:
    """The leader has its own answer already, and followers run by themselves."""
    with site(kind, flight=LosingFlight()) as s:
        leader = s.lead()
        followers = s.follow(["a", "b"])
        s.origin.gate.set()
        assert leader.result(PATIENCE).body == "leader"
        answers = results(followers)
        assert {caller: answer.body for caller, answer in answers.items()} == {"a": "a", "b": "b"}
        eventually(lambda: s.stats.errors == 3)  # the leader's comes when its answer is sent
        assert s.stats.passed == {"error": 2}
        assert len(s.origin.runs) == 3


def test_a_flight_that_loses_what_it_had_does_not_hide_the_applications_error(kind: str) -> None:
    with site(kind, Origin(lambda _: Reply(error=Failure())), flight=LosingFlight()) as s:
        s.origin.gate.set()
        assert s.ask().result(PATIENCE).status == 500
        assert s.origin.runs == ["somebody"]


@pytest.mark.parametrize(
    "options",
    [
        {"routes": failing},
        {"shareable": failing},
        {"flight": ShardedFlight(hash=failing)},
        {"flight": ShardedFlight(build_key=failing)},
        {"flight": RefusingFlight()},
    ],
    ids=["routes", "shareable", "hash", "build_key", "flight"],
)
def test_what_goes_wrong_inside_passes_through(
    kind: str, options: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with site(kind, **options) as s:
        s.origin.gate.set()
        for caller in ("a", "b", "c"):
            answer = s.ask(caller).result(PATIENCE)
            assert (answer.status, answer.body) == (200, caller)
        assert s.stats.errors == 3
        assert s.stats.passed == {"error": 3}
    ours = [record for record in caplog.records if record.name == "shardedflight.http"]
    assert len(ours) == 1
    assert ours[0].exc_info is not None
    assert ours[0].exc_info[0] is Broken


def application(*_: Any) -> Any:
    raise AssertionError("nobody asks")


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"routes": "/items"}, TypeError, "routes must be several str"),
    ({"routes": ["items"]}, ValueError, "routes must hold paths that begin with '/'"),
    ({"routes": [b"/items"]}, TypeError, "routes must hold str"),
    ({"routes": None}, TypeError, "routes"),
    ({"shareable": "/"}, TypeError, "shareable must be several str"),
    ({"flight": "mine"}, TypeError, "flight must be a ShardedFlight"),
    ({"body_limit": -1}, ValueError, "body_limit must be at least 0"),
    ({"body_limit": 1.5}, TypeError, "body_limit must be an int"),
    ({"follower_timeout": 0}, ValueError, "follower_timeout must be above 0"),
    ({"follower_timeout": float("nan")}, ValueError, "follower_timeout"),
    ({"follower_timeout": "3"}, TypeError, "follower_timeout must be a number"),
    ({"pass_through_time": -1}, ValueError, "pass_through_time must be at least 0"),
    ({"pass_through_time": float("inf")}, ValueError, "pass_through_time"),
    ({"max_waiters": 0}, ValueError, "max_waiters must be above 0"),
    ({"max_waiters": True}, TypeError, "max_waiters must be an int"),
    ({"server_errors": 1}, TypeError, "server_errors must be True or False"),
    ({"authorization": "yes"}, TypeError, "authorization must be True or False"),
    ({"key_headers": "X-A"}, TypeError, "key_headers must be several str"),
    ({"key_headers": ["X A"]}, ValueError, "key_headers must hold names of header fields"),
    ({"private_headers": [1]}, TypeError, "private_headers must hold str"),
    ({"timeout": 3}, TypeError, "timeout"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=lambda value: str(value))
def test_a_bad_option_is_an_error_at_construction(
    kind: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    module = {"asgi": asgi, "wsgi": wsgi}[kind]
    with pytest.raises(error, match=message):
        module.CoalesceMiddleware(application, **{"routes": ["/"], **options})


def test_the_application_must_be_one(kind: str) -> None:
    module: Any = {"asgi": asgi, "wsgi": wsgi}[kind]
    with pytest.raises(TypeError, match="app must be a"):
        module.CoalesceMiddleware("main:app", routes=["/"])


def test_middlewares_may_share_a_flight(kind: str) -> None:
    flight = ShardedFlight()
    with site(kind, flight=flight) as one, site(kind, flight=flight) as other:
        first, second = one.lead("first"), other.lead("second")
        one.origin.gate.set()
        other.origin.gate.set()
        assert [first.result(PATIENCE).body, second.result(PATIENCE).body] == ["first", "second"]
        assert isinstance(one, Site)
