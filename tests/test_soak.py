"""`make soak` for a few seconds; and that it would tell if something were wrong."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from proof.histories import End, History, check
from proof.soak.census import left_behind
from proof.soak.keys import PLAIN_KEYS, Lost
from proof.soak.mix import Mix, Mood, watch_forgets
from proof.soak.tally import compare
from support import PATIENCE, eventually, eventually_async, spawn

from shardedflight import ShardedFlight, _flight
from shardedflight._core import Execution
from shardedflight._replica import Failure

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(os.name == "nt", reason="it forks, and asks /proc")
@pytest.mark.parametrize(
    "options",
    [["1", "--moods", "exact,rough,observed"], ["2", "--moods", "host"]],
    ids=["one process", "over a backend"],
)
def test_a_short_soak_finds_nothing(tmp_path: Path, options: list[str]) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "proof.soak", "--seconds", "3", "--window", "0.3"]
    command += ["--json", str(figures), "--processes", *options]
    done = subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    assert found["windows"] >= 3
    assert found["calls"] > found["executions"] > 100
    for what in ("hung", "violations", "miscounted", "left", "leaked", "faults"):
        assert found[what] == 0


# -- planted faults -------------------------------------------------------------------------------


def mixed(seconds: float = 0.3) -> tuple[Mix, list[str], set[str]]:
    """A window: the mix, what is miscounted, and the rules that are broken."""
    flight, history = ShardedFlight(), History()
    mix = Mix(flight, history, Mood("exact"), "planted", size=2, forks=False)
    before = flight.stats()
    mix.run(seconds)
    return mix, compare(mix, before, flight.stats()), {v.rule for v in check(history)}


def breaks(rule: str) -> bool:
    """Whether a rule is broken in one of some windows: in a short one nobody may meet."""
    return any(rule in mixed()[2] for _ in range(20))


def test_a_window_without_a_fault() -> None:
    mix, miscounted, rules = mixed()
    assert (mix.faults, miscounted, rules) == ([], [], set())
    assert left_behind(mix.flight) == []


@pytest.fixture
def conclude(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replaces how every run is settled."""

    def replace(planted: Any) -> None:
        real = ShardedFlight._conclude
        monkeypatch.setattr(ShardedFlight, "_conclude", lambda *args: planted(real, *args))

    return replace


def test_an_outcome_that_is_always_called_shared_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ShardedFlight._lead

    def planted(*args: Any) -> Any:
        return real(*args)[0], True

    monkeypatch.setattr(ShardedFlight, "_lead", planted)
    assert breaks("shared")


def test_an_error_that_is_handed_out_as_it_is_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Failure, "replica", lambda failure: failure._error, raising=True)
    assert breaks("same")


def test_a_total_that_is_not_counted_is_found(conclude: Any) -> None:
    lock, lost = threading.Lock(), [0]

    def planted(real: Any, flight: Any, shard: Any, *args: Any) -> Any:
        record = real(flight, shard, *args)
        with lock:
            lost[0] += 1
            if lost[0] == 20:
                shard.shared -= 1
        return record

    conclude(planted)
    assert any("stats().shared" in text for text in mixed()[1])


def test_a_record_that_is_left_is_found() -> None:
    flight = ShardedFlight(1)
    flight.do(lambda: None, "k")
    (shard,) = flight._made_shards()
    shard.met[1] = Execution(("k", 1))
    assert any("records" in text for text in left_behind(flight))


# -- what is no fault -----------------------------------------------------------------------------


def test_a_record_is_not_left_while_its_waiters_are_being_woken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By then nothing is in flight."""
    flight = ShardedFlight()
    waking, wake, real = threading.Event(), threading.Event(), _flight.wake_all

    def held_up(record: Execution) -> None:
        waking.set()
        assert wake.wait(PATIENCE)
        real(record)

    monkeypatch.setattr(_flight, "wake_all", held_up)
    met = threading.Event()
    leader = spawn(flight.do, lambda: met.wait(PATIENCE), "k")
    eventually(lambda: flight.in_flight() == 1)
    follower = spawn(flight.do, lambda: False, "k")
    eventually(lambda: flight.stats().waiting == 1)
    met.set()
    assert waking.wait(PATIENCE)
    assert flight.in_flight() == 0
    assert left_behind(flight) != []
    looking = spawn(left_behind, flight, PATIENCE)
    wake.set()
    assert looking.result(PATIENCE) == []
    assert leader.result(PATIENCE) == follower.result(PATIENCE) == (True, True)


@pytest.mark.parametrize("told", ["at once", "when the other run has ended"])
def test_a_call_for_many_that_one_loss_ends_has_left_its_other_runs(told: str) -> None:
    """So they are abandoned: somebody else may run for their keys before they have ended."""
    flight, history = ShardedFlight(), History()
    mix = Mix(flight, history, Mood("rough", leaving=True), "one loss", size=1, forks=False)

    async def main() -> None:
        led, lose_b, lose_a = asyncio.Event(), asyncio.Event(), asyncio.Event()
        run_again, end = asyncio.Event(), asyncio.Event()

        async def lost() -> None:
            led.set()
            await lose_b.wait()
            raise Lost(None)

        async def function(names: list[str]) -> dict[str, int]:
            executions = [history.begin(calls[name]) for name in names]
            try:
                if names == ["a"]:
                    await lose_a.wait()
                    raise Lost(executions[0].number)
                run_again.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    await end.wait()
            finally:
                for execution in executions:
                    history.end(execution, End.LOST)
            raise AssertionError

        calls = {name: history.invoke(name, "do_many_async") for name in "ab"}

        async def many() -> Lost:
            with pytest.raises(Lost) as caught:
                await flight.do_many_async(function, ["a", "b"])
            return caught.value

        async def newer() -> Any:
            return history.value(history.begin(call))

        leader = asyncio.create_task(flight.do_async(lost, "b"))
        await led.wait()
        caller = asyncio.create_task(many())
        await eventually_async(lambda: flight.stats().waiting == 1)
        lose_b.set()
        await run_again.wait()
        lose_a.set()
        error = await caller
        if told == "at once":
            mix._many_failed(calls, error)
        call = history.invoke("b", "do_async")
        history.returned(call, *await flight.do_async(newer, "b"))
        end.set()
        await eventually_async(lambda: flight.in_flight() == 0)
        if told != "at once":
            mix._many_failed(calls, error)
        await asyncio.gather(leader, return_exceptions=True)

    asyncio.run(main())
    assert [str(violation) for violation in check(history)] == []


@pytest.mark.skipif(os.name == "nt", reason="the host tier is for POSIX")
def test_a_forget_that_the_backend_has_done_has_not_ended_before_it_returns(tmp_path: Path) -> None:
    """Until then it forgets who has come since. On an event loop's thread, too, which does not wait
    for the backend: it was taken to have ended when the backend had done it."""
    from shardedflight.backends.host import HostBackend

    backend = HostBackend(tmp_path / "flights")
    flight, history = ShardedFlight(backend=backend), History(plain=True)
    watch_forgets(backend)
    mix = Mix(flight, history, Mood("host", leaving=True, meets=True), "forget", forks=False)
    tier: Any = flight._tier
    known = tier._known
    looked: list[int] = []

    def look(*args: Any) -> Any:
        looked.append(time.monotonic_ns())
        return known(*args)

    tier._known = look

    async def forget() -> None:
        mix._forget(PLAIN_KEYS[0])

    asyncio.run(forget())
    (noted,) = history.forgets
    assert looked
    assert noted.ended is not None
    assert noted.ended >= looked[-1]
