"""Greenlets in place of threads, as gunicorn's gevent workers and Celery's gevent pool have them.

gevent patches the standard library, so each test runs in a process of its own.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

import shardedflight

pytest.importorskip("gevent", reason="gevent is not installed")

#: What such a process tells does not depend on the core of this one.
pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(shardedflight.__compiled__, reason="the plain core's run does it"),
]

PATCHED = """
from gevent import monkey
monkey.patch_all()

import json, time
import gevent
from gevent.event import Event
import shardedflight
from shardedflight import DeadlockError, FlightTimeout, ShardedFlight

flight = ShardedFlight()
runs = []

def until_waiting(number):
    while flight.stats().waiting < number:
        gevent.sleep(0.001)

def outcome(greenlet):
    return greenlet.get(timeout=30)
"""


def said(code: str) -> Any:
    """What a process whose threads are greenlets prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", PATCHED + code],
        env={name: value for name, value in os.environ.items() if name != "SHARDEDFLIGHT_PURE"},
        capture_output=True,
        check=False,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_greenlets_of_one_thread_join_one_execution() -> None:
    assert said("""
def fn():
    runs.append(1)
    until_waiting(4)
    return "value"

greenlets = [gevent.spawn(flight.do, fn, "k") for _ in range(5)]
print(json.dumps([[outcome(each) for each in greenlets], len(runs)]))
""") == [[["value", True]] * 5, 1]


def test_a_follower_leaves_after_its_timeout() -> None:
    assert said("""
end = Event()

def follow():
    try:
        flight.do(lambda: None, "k", timeout=0.01)
    except FlightTimeout:
        return "timed out"

leader = gevent.spawn(flight.do, lambda: end.wait(30), "k")
gevent.sleep(0)
follower = outcome(gevent.spawn(follow))
end.set()
print(json.dumps([follower, outcome(leader)]))
""") == ["timed out", [True, False]]


def test_a_follower_takes_over_from_a_leader_that_is_killed() -> None:
    assert said("""
end = Event()
leader = gevent.spawn(flight.do, end.wait, "k")
gevent.sleep(0)
follower = gevent.spawn(flight.do, lambda: "its own", "k")
until_waiting(1)
leader.kill()
print(json.dumps([outcome(follower), flight.in_flight()]))
""") == [["its own", False], 0]


def test_futures_run_on_a_pool_of_greenlets() -> None:
    assert said("""
def fn():
    runs.append(1)
    until_waiting(2)
    return "value"

futures = [flight.do_future(fn, "k") for _ in range(3)]
print(json.dumps([[each.result(30) for each in futures], len(runs)]))
""") == [[["value", True]] * 3, 1]


def test_a_key_inside_its_own_function_is_an_error() -> None:
    assert said("""
try:
    flight.do(lambda: flight.do(lambda: None, "k"), "k")
except DeadlockError as error:
    print(json.dumps(error.keys))
""") == ["k", "k"]


def test_a_cycle_of_greenlets_is_an_error() -> None:
    assert said("""
inside = Event()
errors = []

def first():
    inside.wait(30)
    return flight.do(lambda: None, "b")

def second():
    inside.set()
    until_waiting(1)
    try:
        flight.do(lambda: None, "a")
    except DeadlockError as error:
        errors.append(error.keys)

greenlets = [gevent.spawn(flight.do, first, "a"), gevent.spawn(flight.do, second, "b")]
for each in greenlets:
    outcome(each)
print(json.dumps(errors))
""") == [["b", "a", "b"]]
