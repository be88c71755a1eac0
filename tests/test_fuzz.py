"""A few cases of each target of `make fuzz`, always the same; and faults that it has to find."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st

pytest.importorskip("msgspec", reason="the extra `test` is not installed")

from proof.fuzz import __main__ as program
from proof.fuzz.target import Target

from shardedflight.backends import _protocol
from shardedflight.http import _rules

TARGETS = {target.name: target for target in program.targets()}


@pytest.mark.parametrize("name", TARGETS)
def test_what_has_to_hold(name: str) -> None:
    TARGETS[name].bound(30)()


def test_the_cases_are_always_the_same() -> None:
    seen: list[Any] = []
    target = Target("", "", st.integers(), seen.append)
    target.bound(20)()
    target.bound(20)()
    assert len(seen) == 40
    assert seen[:20] == seen[20:]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["fuzz", "--target", "names", "--cases", "300", *arguments])
    return program.main()


def test_the_program_says_how_to_see_a_fault_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--seconds", "0") == 0
    assert re.search(r"^names +1 +\d+", capsys.readouterr().out, re.MULTILINE)
    tags_without_lengths(monkeypatch)
    assert run(monkeypatch, "--seconds", "60") == 1
    again = re.search(r"--target names (--seed \d+) --cases 300", capsys.readouterr().out)
    assert again is not None
    assert run(monkeypatch, *again[1].split()) == 1


# -- faults, planted by replacing what is guarded -------------------------------------------------


def no_rule(what: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Answers are judged as if they had not this field."""
    judge = _rules.Rules.judge

    def lenient(self: Any, request: Any, status: int, headers: Any) -> Any:
        return judge(self, request, status, {k: v for k, v in headers.items() if k != what})

    return lambda patch: patch.setattr(_rules.Rules, "judge", lenient)


def no_field(what: str, named: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Requests are read as if they had not this field."""
    return lambda patch: patch.setattr(_rules, what, getattr(_rules, what) - {named})


def answered(of: str, answer: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """A decision is always the same."""
    return lambda patch: patch.setattr(_rules, of, lambda *_: answer)


def tags_without_lengths(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_protocol, "_tag", lambda tag, content, written: written.append(tag + content))
    patch.setattr(_protocol, "name_of", _protocol.name_of.__wrapped__)


def floats_of_their_own(patch: pytest.MonkeyPatch) -> None:
    """1.0 is not called what 1 is."""
    write = _protocol._write

    def written(part: Any, found: list[bytes]) -> None:
        write(repr(part) if type(part) is float else part, found)

    patch.setattr(_protocol, "_write", written)
    patch.setattr(_protocol, "name_of", _protocol.name_of.__wrapped__)


def digests_unread(patch: pytest.MonkeyPatch) -> None:
    digest = _protocol.Wire._digest
    patch.setattr(_protocol.Wire, "_digest", lambda self, kind, body: digest(self, kind, b""))


FAULTS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "Set-Cookie": ("asgi", no_rule("set-cookie")),
    "Vary": ("asgi", lambda patch: patch.setattr(_rules, "names", lambda value: [])),
    "Content-Type": ("wsgi", no_rule("content-type")),
    "Cache-Control of the answer": ("wsgi", answered("_refused_by_cache_control", None)),
    "Cache-Control of the request": ("asgi", answered("_forbids_storing", False)),
    "the key's Origin": ("asgi", no_field("_KEY_HEADERS", "origin")),
    "Cookie": ("asgi", no_field("_IDENTITY", "cookie")),
    "an API key": ("wsgi", no_field("_CREDENTIALS", "x-api-key")),
    "Range": ("asgi", no_field("_CONDITIONS", "range")),
    "lengths in names": ("names", tags_without_lengths),
    "equal numbers in names": ("names", floats_of_their_own),
    "digests": ("payload", digests_unread),
}


@pytest.mark.once
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, plant = FAULTS[fault]
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        TARGETS[name].bound(6000, shrink=False)()
