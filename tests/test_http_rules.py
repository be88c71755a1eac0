"""The rules as decisions on values: header fields, and what is remembered of a key."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shardedflight.http
from shardedflight.http import Pass, Refusal, _rounds
from shardedflight.http._rounds import Caller, Rounds
from shardedflight.http._rules import Recording, Request, Rules, Shared, directives, fold

RULES = Rules(["/"], ())

PUBLIC = {"cache-control": "public"}


def request(path: str = "/", rules: Rules = RULES, **headers: str) -> Request:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    assert rules.refuse(fields) is None
    return Request(("GET", path), path, lambda: fields, authorized=False, shareable=False)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("", {}),
        ("public", {"public": ""}),
        ("Max-Age=60 , PUBLIC", {"max-age": "60", "public": ""}),
        ('private="Set-Cookie, X-A"', {"private": "Set-Cookie, X-A"}),
        ('ext="a, public", no-store', {"ext": "a, public", "no-store": ""}),
        (r'ext="a\", public", max-age=1', {"ext": r"a\", public", "max-age": "1"}),
        (",, public,, ,max-age=5,", {"public": "", "max-age": "5"}),
        ("max-age=60, max-age=0", {"max-age": "60"}),
        ('max-age="60"', {"max-age": "60"}),
    ],
)
def test_directives(value: str, found: dict[str, str]) -> None:
    assert directives(value) == found


@pytest.mark.parametrize(
    "value", ['"public"', "a b", 'ext="public', "public; max-age=3", "=", "max-age=", "a==b", "é"]
)
def test_malformed_directives(value: str) -> None:
    with pytest.raises(ValueError, match="no Cache-Control"):
        directives(value)


WORDS = st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True)
QUOTED = st.text(st.characters(codec="latin-1", exclude_characters='"\\', exclude_categories=["C"]))


@given(st.dictionaries(WORDS, st.one_of(st.just(""), WORDS, QUOTED), max_size=5), st.data())
def test_directives_are_read_as_they_are_written(found: dict[str, str], data: Any) -> None:
    parts: list[str] = []
    for name, argument in found.items():
        if not argument:
            parts.append(name)
        elif re.fullmatch("[a-z0-9-]+", argument) and data.draw(st.booleans()):
            parts.append(f"{name}={argument}")
        else:
            parts.append(f'{name}="{argument}"')
    assert directives(data.draw(st.sampled_from([",", ", ", " ,\t"])).join(parts)) == found


@given(st.text(st.characters(codec="latin-1")))
def test_any_text_is_read_or_refused(value: str) -> None:
    """And one that can not be read is not shared."""
    verdict = RULES.judge(request(), 200, {"cache-control": value})
    try:
        found = directives(value)
    except ValueError:
        assert verdict is Refusal.MALFORMED
    else:
        assert verdict is not Refusal.MALFORMED
        if {"private", "no-store", "no-cache"} & set(found):
            assert verdict is not None


@pytest.mark.parametrize("age", ["0", "-1", "abc", '""', "1.5", "00"])
def test_an_answer_without_a_lifetime_is_stale(age: str) -> None:
    assert RULES.judge(request(), 200, {"cache-control": f"max-age={age}"}) is Refusal.STALE


def test_the_lifetime_for_shared_caches_comes_first() -> None:
    assert RULES.judge(request(), 200, {"cache-control": "max-age=0, s-maxage=60"}) is None
    refused = RULES.judge(request(), 200, {"cache-control": "max-age=60, s-maxage=0"})
    assert refused is Refusal.STALE


@pytest.mark.parametrize("digits", ["9" * 5000, "0" * 5000 + "1"])
def test_numbers_of_more_digits_than_python_reads(digits: str) -> None:
    """`int` refuses more than 4300 of them, by a ValueError."""
    assert RULES.judge(request(), 200, {"cache-control": f"max-age={digits}"}) is None
    refused = RULES.judge(request(), 200, {**PUBLIC, "content-length": digits})
    assert refused is (Refusal.SIZE if digits.startswith("9") else None)


def test_every_status_is_decided() -> None:
    public = {"cache-control": "public"}
    shared = [code for code in range(100, 600) if RULES.judge(request(), code, public) is None]
    listed = [200, 203, 204, 300, 301, 308, 404, 405, 410, 414, 501]
    assert shared == sorted([*listed, 500, 502, 503, 504])
    strict = Rules(["/"], (), server_errors=False)
    assert [
        code for code in range(100, 600) if strict.judge(request(), code, public) is None
    ] == listed


def test_fields_of_one_name_are_joined() -> None:
    assert fold([("Vary", "A"), ("vary", "B"), ("X", "1")]) == {"vary": "A, B", "x": "1"}


def test_vary_compares_what_is_absent_with_what_is_empty() -> None:
    shared = Shared(200, lambda: (), b"", request(accept_charset="").variant(["accept-charset"]))
    assert shared.fits(request(accept_charset=""))
    assert not shared.fits(request())


@pytest.mark.parametrize(
    ("path", "inside"),
    [
        ("/a", True),
        ("/a/", True),
        ("/a/b", True),
        ("/ab", False),
        ("/", False),
        ("/b/c", True),
        ("/b", False),
        ("", False),
    ],
)
def test_a_prefix_ends_where_a_segment_ends(path: str, inside: bool) -> None:
    rules = Rules(["/a", "/b/"], ())
    assert rules.admit("GET", path, None) is (None if inside else Pass.ROUTE)


def test_a_recording_of_just_the_announced_length_needs_no_end() -> None:
    recording = Recording(RULES, request())
    length = {"content-length": "3"}
    assert recording.head("200 OK", 200, {**PUBLIC, **length}, lambda: ()) is None
    assert recording.body(b"ab") is None
    verdict = recording.body(b"c")
    assert isinstance(verdict, Shared)
    assert verdict.body == b"abc"


@pytest.mark.parametrize("chunks", [[b"ab"], [b"abcd"], []])
def test_a_recording_of_another_length_is_broken(chunks: list[bytes]) -> None:
    recording = Recording(RULES, request())
    recording.head("200 OK", 200, {**PUBLIC, "content-length": "3"}, lambda: ())
    for chunk in chunks:
        recording.body(chunk)
    assert recording.end() is Refusal.BROKEN


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rounds, "_REMEMBERED", 10)
    rounds = Rounds(RULES)
    for number in range(100):
        caller = Caller(rounds, request(f"/{number}"))
        joined = caller.join()
        assert joined is not None
        caller.lead()
        rounds.finish(joined, caller.request, Refusal.PRIVATE)
        caller.leave()
    assert len(rounds._learned) == 10
    assert rounds._open == {}
    assert Caller(rounds, request("/99")).join() is None
    assert Caller(rounds, request("/0")).join() is not None


def test_the_public_surface_is_all() -> None:
    public = {name for name in vars(shardedflight.http) if not name.startswith("_")}
    assert public - {"asgi", "wsgi", "httpx"} == set(shardedflight.http.__all__)


def test_stats_can_not_be_changed() -> None:
    stats: Any = Rounds(RULES).stats()
    with pytest.raises(AttributeError):
        stats.collapsed = 1
    with pytest.raises(TypeError):
        stats.passed["route"] = 1
