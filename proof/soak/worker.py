"""A process of the soak: told one window after another, it says what was seen in each."""

import contextlib
import faulthandler
import gc
import json
import logging
import os
import pickle
import sys
import threading
import time
import tracemalloc
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import shardedflight
from proof.histories import History, Outcome, check
from shardedflight import ShardedFlight
from shardedflight.observe import Observer

from .census import census, left_behind
from .mix import PATIENCE, HungError, Mix, Mood, watch_forgets
from .tally import compare

__all__ = ["main"]

#: How many faults of a window are told.
_MOST = 5

#: The flights of the windows in which processes do not meet, one after another.
_FLIGHTS: tuple[dict[str, Any], ...] = (
    {},
    {"shards": 4, "on_abandon": "finish"},
    {"shards": 2, "hash": lambda key: hash(key) & 2},
    {"shards": 64, "build_key": lambda *parts: parts, "name": "built"},
)


class _Tally(Observer):
    """Counts what an observer is told. Without a lock, which a forked child would find held."""

    def __init__(self) -> None:
        self._told: list[str] = []

    def _count(self, what: str) -> None:
        self._told.append(what)

    @property
    def counts(self) -> Counter[str]:
        """How often it was told what."""
        return Counter(self._told)

    def quiet(self) -> bool:
        """Whether everything that has begun has ended."""
        counts = self.counts
        return counts["started"] == counts["ended"] and counts["joined"] == counts["left"]

    def execution_started(self, event: Any, /) -> None:
        """A function is about to run."""
        self._count("started")

    def execution_ended(self, event: Any, /) -> None:
        """It has ended."""
        self._count("ended")

    def follower_joined(self, event: Any, /) -> None:
        """A follower waits."""
        self._count("joined")

    def follower_left(self, event: Any, /) -> None:
        """It waits no more."""
        self._count("left")
        self._count(event.departure.name)


class _Worker:
    """The flights of this process."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.process: int = options["process"]
        self.options = options
        self.flights = [ShardedFlight(**arguments) for arguments in _FLIGHTS]
        self.meeting: dict[str, ShardedFlight] = {}
        if options.get("host"):
            from shardedflight.backends.host import HostBackend  # noqa: PLC0415 - an extra

            self.meeting["host"] = ShardedFlight(backend=HostBackend(options["host"]), name="soak")
        if options.get("redis"):
            from shardedflight.backends.redis import RedisBackend  # noqa: PLC0415 - an extra

            self.meeting["redis"] = ShardedFlight(
                backend=RedisBackend(options["redis"]), name="soak"
            )
        for flight in self.meeting.values():
            watch_forgets(cast("Any", flight._tier).backend)

    def window(self, order: dict[str, Any]) -> dict[str, Any]:
        """One window."""
        mood = Mood(**order["mood"])
        number: int = order["number"]
        if mood.meets:
            flight = self.meeting[mood.name]
        else:
            flight = self.flights[number // order["moods"] % len(self.flights)]
        history = History(
            self.process + 1 + 100 * number, cancels=flight._cancels, plain=mood.meets
        )
        history.process = self.process
        observer = _Tally()
        mix = Mix(
            flight,
            history,
            mood,
            f"{order['seed']} {self.process} {number}",
            size=order["size"],
            forks=order["forks"],
            quiet=observer.quiet,
        )
        if mood.observed:
            flight.add_observer(observer)
        before = flight.stats()
        begun = time.monotonic()
        mix.run(order["seconds"])
        seconds = time.monotonic() - begun
        after = flight.stats()
        if mood.observed:
            flight.remove_observer(observer)
        result = self._judge(mix, before, after, observer)
        result["seconds"] = seconds
        result["used"] = {
            name: getattr(after, name) - getattr(before, name)
            for name in ("remote_leads", "remote_follows", "takeovers", "fenced", "fallbacks")
        } | {"misses": after.misses - before.misses}
        if mood.meets:
            Path(order["file"]).write_bytes(pickle.dumps(history.strip()))
        else:
            violations = check(history)
            result["violations"] = len(violations)
            result["faults"] += [str(violation) for violation in violations[:_MOST]]
        del mix, history
        result["census"] = census()
        return result

    def _judge(self, mix: Mix, before: Any, after: Any, observer: _Tally) -> dict[str, Any]:
        history = mix.history
        outcomes = dict.fromkeys((outcome.value for outcome in Outcome), 0)
        for call in history.calls:
            if call.outcome is not None:
                outcomes[call.outcome.value] += 1
        miscounted = compare(mix, before, after)
        if mix.mood.observed:
            miscounted += _observed(observer.counts, mix)
        left = left_behind(mix.flight, PATIENCE)
        where = f"process {self.process}, window {mix.seed}, {mix.mood.name}: "
        return {
            "calls": len(history.calls),
            "executions": len(history.executions),
            "forgets": len(history.forgets),
            "forks": len(mix.children),
            "cancelled": len(mix.cancelled),
            "outcomes": outcomes,
            "promotions": after.promotions - before.promotions,
            "abandoned": after.abandoned - before.abandoned,
            "deadlocks": after.deadlocks - before.deadlocks,
            "miscounted": len(miscounted),
            "left": len(left),
            "faults": [where + fault for fault in (miscounted + left + mix.faults)[:_MOST]],
        }

    def end(self) -> dict[str, Any]:
        """Drops everything; what is left then has leaked."""
        flights = [weakref.ref(flight) for flight in (*self.flights, *self.meeting.values())]
        names = [repr(flight()) for flight in flights]
        self.flights.clear()
        backends = [flight._tier for flight in self.meeting.values()]
        self.meeting.clear()
        for tier in filter(None, backends):
            cast("Any", tier.backend).close()
        backends.clear()
        tier = None
        deadline = time.monotonic() + PATIENCE
        while True:
            found = census()
            alive = [name for name, ref in zip(names, flights, strict=True) if ref() is not None]
            threads = [thread.name for thread in threading.enumerate()[1:]]
            if (not alive and not threads) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        faults = [f"process {self.process}: {name} is not collected" for name in alive]
        faults += [f"process {self.process}: thread {name} is left" for name in threads]
        return {"faults": faults, "left": len(faults), "census": found}


def _observed(counts: Counter[str], mix: Mix) -> list[str]:
    wrong: list[str] = []
    timed_out = sum(call.outcome is Outcome.TIMED_OUT for call in mix.history.calls)
    if counts["TIMED_OUT"] != timed_out:
        wrong.append(f"an observer was told of {counts['TIMED_OUT']} timeouts, not {timed_out}")
    if mix.flight.observer_errors:
        wrong.append(f"{mix.flight.observer_errors} errors of observers")
    return wrong


def main(text: str) -> None:
    """Runs a worker: orders come as lines on standard input, answers go to standard output."""
    options = json.loads(text)
    faulthandler.enable()
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    # Forks of a process with threads, and what is left of closed loops, are what is wanted here.
    warnings.simplefilter("ignore")
    if options["tracemalloc"]:
        tracemalloc.start()
    answer = _answers()
    worker = _Worker(options)
    answer(
        {
            "python": sys.version.split()[0] + getattr(sys, "abiflags", ""),
            "compiled": shardedflight.__compiled__,
            "census": census(),
        }
    )
    for line in sys.stdin:
        order = json.loads(line)
        if order.get("stop"):
            answer(worker.end())
            return
        try:
            answer(worker.window(order))
        except HungError as error:
            answer({"hung": str(error)})
            os._exit(1)
    gc.collect()


def _answers() -> Callable[[dict[str, Any]], None]:
    """What writes answers. Whatever else is printed here goes to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(answer: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):
            out.write(json.dumps(answer) + "\n")
            out.flush()

    return answer
