"""What is explored: few callers, few keys, every way in which they can meet.

A scenario waits for what makes it interesting (a follower that is registered, a function that has
begun), so that the search need not spend its switches on getting there. What follows then is open.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from .world import Failed, Key, Lost, World

__all__ = ["SCENARIOS", "Scenario"]

A, B = Key("a"), Key("b")


@dataclass(frozen=True)
class Scenario:
    """Something to explore."""

    name: str
    what: str
    build: Callable[[World], None]
    #: Functions of the flight; if there are any, threads switch in these alone.
    only: tuple[str, ...] = ()


SCENARIOS: dict[str, Scenario] = {}


def scenario(*only: str) -> Callable[[Callable[[World], None]], Callable[[World], None]]:
    """Enters a function as a scenario."""

    def enter(build: Callable[[World], None]) -> Callable[[World], None]:
        name = build.__name__
        SCENARIOS[name] = Scenario(name, (build.__doc__ or "").strip(), build, only)
        return build

    return enter


# -- threads --------------------------------------------------------------------------------------


@scenario()
def two(w: World) -> None:
    """Two callers of one key."""
    w.thread(lambda: w.do("k"))
    w.thread(lambda: w.do("k"))


@scenario()
def three(w: World) -> None:
    """Three callers of one key."""
    for _ in range(3):
        w.thread(lambda: w.do("k"))


@scenario()
def twice(w: World) -> None:
    """Two callers of one key, who both call again."""
    w.thread(lambda: w.do("k"), lambda: w.do("k"))
    w.thread(lambda: w.do("k"), lambda: w.do("k"))


@scenario()
def error(w: World) -> None:
    """The leader's function fails."""
    w.thread(lambda: w.do("k", error=Failed))
    w.thread(lambda: w.do("k", error=Failed))


@scenario()
def forget(w: World) -> None:
    """A key is forgotten while its leader begins and ends."""
    w.thread(lambda: w.do("k"))
    w.thread(lambda: w.forget("k"))


@scenario()
def forget_followed(w: World) -> None:
    """A key is forgotten while one joins; and one comes after that."""
    w.thread(lambda: w.do("k"))
    w.thread(lambda: w.do("k"))
    w.thread(lambda: w.forget("k"), lambda: w.do("k"))


@scenario()
def newcomer(w: World) -> None:
    """The forgotten execution ends while its successor runs, and a third caller comes."""

    def inside() -> None:
        w.forget("k")
        w.begun(2)

    w.thread(lambda: w.do("k", inside=inside))
    w.thread(lambda: w.until(lambda: w.forgotten), lambda: w.do("k"))
    w.thread(lambda: w.begun(2), lambda: w.do("k"))


@scenario()
def newcomers(w: World) -> None:
    """Two callers come while a forgotten execution runs."""

    def inside() -> None:
        w.forget("k")
        w.begun(2)

    w.thread(lambda: w.do("k", inside=inside))
    w.thread(lambda: w.until(lambda: w.forgotten), lambda: w.do("k"))
    w.thread(lambda: w.until(lambda: w.forgotten), lambda: w.do("k"))


@scenario("_lead", "_link_beside")
def newcomers_join(w: World) -> None:
    """`newcomers`, with switches only where they begin to lead."""
    newcomers(w)


@scenario()
def freed(w: World) -> None:
    """A forgotten execution ends while its successor comes, and another caller comes then."""

    def inside() -> None:
        w.forget("k")
        w.until(lambda: len(w.calls) > 1)

    w.thread(lambda: w.do("k", inside=inside))
    w.thread(lambda: w.until(lambda: w.forgotten), lambda: w.do("k"))
    w.thread(w.ended, lambda: w.do("k", inside=lambda: w.waiting(2)))


@scenario()
def timeout(w: World) -> None:
    """A follower whose time may be up at any moment."""
    w.thread(lambda: w.do("k"))
    w.thread(lambda: w.do("k", timeout=1.0))


@scenario()
def timeout_error(w: World) -> None:
    """The leader fails, and the follower's time may be up."""
    w.thread(lambda: w.do("k", error=Failed, inside=w.waiting))
    w.thread(w.begun, lambda: w.do("k", timeout=1.0))


@scenario()
def lost(w: World) -> None:
    """The leader is lost, and somebody else may wait."""
    w.thread(lambda: w.do("k", error=Lost))
    w.thread(lambda: w.do("k"))


@scenario()
def lost_two(w: World) -> None:
    """The leader is lost; one of two followers takes over."""
    w.thread(lambda: w.do("k", error=Lost, inside=lambda: w.waiting(2)))
    w.thread(w.begun, lambda: w.do("k"))
    w.thread(w.begun, lambda: w.do("k"))


@scenario()
def lost_twice(w: World) -> None:
    """The leader is lost, and so is the one that takes over; a third may have joined."""
    w.thread(lambda: w.do("k", error=Lost, inside=w.waiting))
    w.thread(w.begun, lambda: w.do("k", error=Lost))
    w.thread(w.begun, lambda: w.do("k"))


@scenario()
def lost_timeout(w: World) -> None:
    """The leader is lost, and the follower's time may be up before it takes over."""
    w.thread(lambda: w.do("k", error=Lost, inside=w.waiting))
    w.thread(w.begun, lambda: w.do("k", timeout=1.0))


@scenario()
def lost_timeouts(w: World) -> None:
    """The leader is lost; the first of two followers may leave as it is to take over."""
    w.thread(lambda: w.do("k", error=Lost, inside=lambda: w.waiting(2)))
    w.thread(w.begun, lambda: w.do("k", timeout=1.0))
    w.thread(w.waiting, lambda: w.do("k"))


@scenario()
def lost_forgotten(w: World) -> None:
    """The leader is lost while its key is forgotten; a newcomer comes."""
    w.thread(lambda: w.do("k", error=Lost, inside=w.waiting))
    w.thread(w.begun, lambda: w.do("k"))
    w.thread(w.waiting, lambda: w.forget("k"), lambda: w.do("k"))


# -- two keys with one hash -----------------------------------------------------------------------


@scenario()
def one_hash(w: World) -> None:
    """Two keys with one hash."""
    w.thread(lambda: w.do(A))
    w.thread(lambda: w.do(B))


@scenario()
def one_hash_three(w: World) -> None:
    """Two keys with one hash, two callers of the second."""
    w.thread(lambda: w.do(A))
    w.thread(lambda: w.do(B))
    w.thread(lambda: w.do(B))


@scenario()
def one_hash_beside(w: World) -> None:
    """A key runs beside another one with its hash, which ends as a second caller comes."""
    w.thread(lambda: w.do(A, inside=lambda: w.begun(key=B)))
    w.thread(w.begun, lambda: w.do(B))
    w.thread(lambda: w.begun(key=B), lambda: w.do(B))


@scenario()
def one_hash_twice(w: World) -> None:
    """A key that runs beside another one ends, and so does the other one."""
    w.thread(lambda: w.do(A, inside=lambda: w.begun(key=B)), lambda: w.do(A))
    w.thread(w.begun, lambda: w.do(B))


# -- deadlocks ------------------------------------------------------------------------------------


@scenario()
def cycle(w: World) -> None:
    """Two functions that want each other's key."""
    w.deadlocks = (0, 1)
    w.thread(lambda: w.do(1, inside=lambda: w.do(2)))
    w.thread(lambda: w.do(2, inside=lambda: w.do(1)))


@scenario()
def cycle_begun(w: World) -> None:
    """`cycle`, once both have begun: one of the two has to be told, and only one."""
    w.deadlocks = (1, 1)
    w.thread(lambda: w.do(1, inside=lambda: (w.begun(key=2), w.do(2))))
    w.thread(lambda: w.do(2, inside=lambda: (w.begun(key=1), w.do(1))))


@scenario("_enter", "end_wait", "_follow")
def cycle_waits(w: World) -> None:
    """`cycle_begun`, with switches only where the waits begin and end."""
    cycle_begun(w)


@scenario()
def cycle_three(w: World) -> None:
    """Three functions in a ring."""
    w.deadlocks = (1, 1)
    for key in range(3):
        w.thread(lambda key=key: w.do(key, inside=lambda: (w.begun(3), w.do((key + 1) % 3))))


# -- many keys ------------------------------------------------------------------------------------


@scenario()
def many_crossing(w: World) -> None:
    """Two calls for the same keys in opposite orders."""
    w.thread(lambda: w.many(1, 2))
    w.thread(lambda: w.many(2, 1))


@scenario()
def many_one(w: World) -> None:
    """A call for two keys and one for one of them."""
    w.thread(lambda: w.many(1, 2))
    w.thread(lambda: w.do(2))


@scenario()
def many_lost(w: World) -> None:
    """A call for two keys takes over the one whose leader is lost."""
    w.thread(lambda: w.do(2, error=Lost, inside=w.waiting))
    w.thread(w.begun, lambda: w.many(1, 2))


@scenario()
def many_heir(w: World) -> None:
    """`many_lost`, and the function for the other key asks for that one as well."""
    w.deadlocks = (0, 1)
    asks = [lambda: w.do(2)]
    w.thread(lambda: w.do(2, error=Lost, inside=w.waiting))
    w.thread(w.begun, lambda: w.many(1, 2, inside=lambda: asks.pop()() if asks else None))


# -- futures --------------------------------------------------------------------------------------


@scenario()
def future(w: World) -> None:
    """A future and a caller."""
    w.thread(lambda: w.result(*w.future("k")))
    w.thread(lambda: w.do("k"))


@scenario()
def future_cancelled(w: World) -> None:
    """A future that leads is cancelled; a caller may follow it."""
    _cancelled_future(w)
    w.thread(lambda: w.do("k"))


@scenario()
def future_follows(w: World) -> None:
    """The leader is lost, and the future that is to take over is cancelled."""
    w.thread(lambda: w.do("k", error=Lost, inside=w.waiting))
    _cancelled_future(w, w.begun)


def _cancelled_future(w: World, first: Callable[[], object] = lambda: None) -> None:
    made: list[Any] = []

    def make() -> None:
        first()
        made.append(w.future("k"))
        made[0][0].cancelled = True
        w.result(*made[0])

    w.thread(make)

    def cancel() -> None:
        w.until(lambda: bool(made))
        made[0][1].cancel()

    w.thread(cancel, name="canceller")


@scenario()
def cycle_future(w: World) -> None:
    """A function waits for a future whose function wants the first one's key."""
    w.deadlocks = (1, 1)
    w.thread(lambda: w.do(1, inside=lambda: w.result(*w.future(2, inside=lambda: w.do(1)))))


# -- coroutines -----------------------------------------------------------------------------------


def _nap() -> Coroutine[Any, Any, None]:
    return asyncio.sleep(0)


def _sleep() -> Coroutine[Any, Any, None]:
    """Longer than all else takes: the time of a run stands still as long as anybody goes on."""
    return asyncio.sleep(1)


@scenario()
def loop_thread(w: World) -> None:
    """A coroutine and a thread."""
    w.loop(lambda: w.do_async("k", inside=_nap))
    w.thread(lambda: w.do("k"))


@scenario()
def loop_loop(w: World) -> None:
    """Coroutines of two loops."""
    w.loop(lambda: w.do_async("k", inside=_nap))
    w.loop(lambda: w.do_async("k", inside=_nap))


@scenario()
def loop_cycle(w: World) -> None:
    """Coroutines of two loops that want each other's key."""
    w.deadlocks = (0, 1)
    w.loop(lambda: w.do_async(1, inside=lambda: w.do_async(2)))
    w.loop(lambda: w.do_async(2, inside=lambda: w.do_async(1)))


@scenario()
def loop_thread_cycle(w: World) -> None:
    """A coroutine and a thread that want each other's key."""
    w.deadlocks = (0, 1)
    w.loop(lambda: w.do_async(1, inside=lambda: w.do_async(2)))
    w.thread(lambda: w.do(2, inside=lambda: w.do(1)))


@scenario()
def loop_error(w: World) -> None:
    """A coroutine that fails, two that may follow: in its loop and on a thread."""
    w.loop(lambda: w.do_async("k", inside=_nap, error=Failed), lambda: w.do_async("k"))
    w.thread(lambda: w.do("k"))


@scenario()
def loop_cancelled(w: World) -> None:
    """The caller that leads is cancelled; a thread may follow."""
    _cancelled(w)
    w.thread(lambda: w.do("k"))


@scenario()
def loop_closed(w: World) -> None:
    """`loop_cancelled`, and the loop is closed under the task for which the thread may wait."""
    _cancelled(w, closes=True)
    w.thread(lambda: w.do("k"))


@scenario()
def loop_abandoned(w: World) -> None:
    """The last caller leaves, and a newcomer comes."""
    _cancelled(w)
    w.thread(w.begun, lambda: w.do("k"))


@scenario()
def loop_heir(w: World) -> None:
    """The leader is lost, and the coroutine that is to take over is cancelled."""
    w.thread(lambda: w.do("k", error=Lost, inside=w.waiting))
    _cancelled(w, w.begun)


@scenario()
def loop_heirs(w: World) -> None:
    """`loop_heir`, and there is another follower."""
    w.thread(lambda: w.do("k", error=Lost, inside=lambda: w.waiting(2)))
    _cancelled(w, w.begun)
    w.thread(w.waiting, lambda: w.do("k"))


@scenario("_announced", "_enter", "_follow")
def loop_blocked(w: World) -> None:
    """The leader is lost, one of two heirs is on a loop that is blocked, the other's may be soon.

    With switches only where the heir is chosen, and where waits begin and end.
    """
    w.deadlocks = (0, 1)
    w.thread(lambda: w.do(1, error=Lost, inside=lambda: w.waiting(3)))
    w.thread(w.begun, lambda: w.do(2, inside=w.ended))
    w.loop(lambda: _after(lambda: w.begun(2), w), lambda: _blocking(w, 2))
    w.loop(lambda: _after(lambda: w.waiting(2), w), lambda: _blocking(w, 1))


def _after(first: Callable[[], object], w: World) -> Coroutine[Any, Any, Any]:
    first()
    return w.do_async(1)


async def _blocking(w: World, key: Any) -> None:
    w.do(key)


@scenario("_enter", "begin_loop", "end_await", "do_async")
def inner_loops(w: World) -> None:
    """Two functions that run event loops, whose coroutines want each other's key.

    With switches only where loops are first used, and where waits begin and end.
    """
    w.deadlocks = (1, 1)
    for mine, other in ((1, 2), (2, 1)):
        w.thread(lambda mine=mine, other=other: w.do(mine, inside=lambda: _inner(w, other)))


def _inner(w: World, key: Any) -> None:
    w.begun(2)
    w.run(lambda: w.do_async(key))


@scenario("_enter", "begin_loop", "end_await", "end_wait", "_follow")
def inner_loop(w: World) -> None:
    """A function that runs an event loop, and one that waits itself, for each other's key."""
    w.deadlocks = (1, 1)
    w.thread(lambda: w.do(1, inside=lambda: _inner(w, 2)))
    w.thread(lambda: w.do(2, inside=lambda: (w.begun(2), w.do(1))))


@scenario("_enter", "begin_loop", "look", "end_await", "_follow")
def inner_child(w: World) -> None:
    """`inner_loop`, but a child of the root task waits, and is awaited after a while."""
    w.deadlocks = (1, 1)

    async def root() -> None:
        child = asyncio.ensure_future(w.do_async(2))
        await _nap()
        await asyncio.wait([child])

    w.thread(lambda: w.do(1, inside=lambda: (w.begun(2), w.run(root))))
    w.thread(lambda: w.do(2, inside=lambda: (w.begun(2), w.do(1))))


@scenario("_enter", "begin_loop", "end_await", "end_wait", "_follow")
def inner_busy(w: World) -> None:
    """A coroutine blocks a function's loop by leading 3; who waits for that is in no cycle."""
    w.deadlocks = (0, 0)

    async def block() -> None:
        await _nap()
        w.do(3, inside=lambda: w.waiting(2))

    async def root() -> None:
        await asyncio.gather(w.do_async(2), block())

    w.thread(lambda: w.do(1, inside=lambda: (w.begun(2), w.run(root))))
    w.thread(lambda: w.do(2, inside=lambda: (w.begun(key=3), w.do(3))))


def _cancelled(w: World, first: Callable[[], object] = lambda: None, closes: bool = False) -> None:
    """A loop with a caller, and a thread that cancels it. Then it goes on, or it is closed."""
    made: list[Any] = []

    async def main() -> None:
        first()
        task = asyncio.ensure_future(w.do_async("k", inside=_sleep, may_be_cancelled=True))
        made.append((asyncio.get_running_loop(), task))
        await asyncio.wait([task])
        while not closes and w.busy:
            await _sleep()

    def cancel() -> None:
        loop, task = made[0]
        with contextlib.suppress(RuntimeError):  # closed
            loop.call_soon_threadsafe(task.cancel)

    w.loop(main)
    w.thread(lambda: w.until(lambda: bool(made)), cancel, name="canceller")
