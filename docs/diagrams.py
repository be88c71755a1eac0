"""Draws the diagrams of these documents, each from a run of the library.

`python docs/diagrams.py` writes docs/diagrams/*.svg. A test checks that what is there is what it
would write.

A `Story` starts callers of one flight and notes what each of them sees; in its picture each caller
has a lane, and time goes down. The stampede is a run as well, of requests against a model of a
database whose clock is stepped by hand. Nothing noted depends on how fast anything is.
"""

import asyncio
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from html import escape
from pathlib import Path
from typing import Any

from shardedflight import ShardedFlight

FOLDER = Path(__file__).resolve().parent / "diagrams"


# -- what happens to callers ----------------------------------------------------------------------


@dataclass
class Run:
    """One run of a caller's function: the rows of the picture in which it began and ended."""

    begun: int
    ended: int
    cancelled: bool


@dataclass
class Lane:
    """One caller: what it called and when, and what came of it."""

    name: str
    call: str
    called: int
    runs: list[Run] = field(default_factory=list[Run])
    back: int | None = None
    answer: str = ""


class Story:
    """Callers of one flight, and what they see, one row of the picture after the other.

    A row is over when every caller is back, is inside its function, or waits in the flight.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.lanes: list[Lane] = []
        #: What happens in a row, in words.
        self.remarks: dict[int, str] = {}
        self.row = 0
        self._flight = ShardedFlight()
        #: How the functions that run now will end.
        self._ends: dict[str, Future[Any]] = {}
        self._tasks: dict[str, Future[None]] = {}
        self._loop = asyncio.new_event_loop()

    @contextmanager
    def told(self) -> Iterator["Story"]:
        """While the story is told its event loop runs."""
        thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()
            self._loop.close()

    # Calls.

    def do(self, name: str) -> None:
        """A thread calls `do`."""
        lane = self._enter(name, "do(load, 'key')")
        self._thread(lane, lambda: self._flight.do(lambda: self._run(lane), "key"))

    def do_many(self, name: str) -> None:
        """A thread calls `do_many`."""
        lane = self._enter(name, "do_many(load, ['key'])")
        self._thread(lane, lambda: self._flight.do_many(lambda _: self._run(lane), ["key"]))

    def do_async(self, name: str) -> None:
        """A task calls `do_async`."""
        lane = self._enter(name, "do_async(load, 'key')")

        async def load() -> Any:
            with self._running(lane) as end:
                return await asyncio.wrap_future(end)

        async def call() -> None:
            with self._noting(lane):
                lane.answer = repr(await self._flight.do_async(load, "key"))

        self._tasks[name] = asyncio.run_coroutine_threadsafe(call(), self._loop)
        self._settle()

    # What happens to them.

    def returns(self, name: str, value: Any) -> None:
        """The function of that caller returns."""
        self._happens(f"{name}'s load returns")
        self._ends[name].set_result(value)
        self._settle(gone=name)

    def raises(self, name: str, error: BaseException) -> None:
        """The function of that caller raises an exception."""
        self._happens(f"{name}'s load raises")
        self._ends[name].set_exception(error)
        self._settle(gone=name)

    def cancel(self, name: str) -> None:
        """The task of that caller is cancelled."""
        self._happens(f"{name} is cancelled")
        self._tasks[name].cancel()
        self._settle(gone=name)

    def forget(self) -> None:
        """Somebody forgets the key."""
        self._happens("forget('key')")
        self._flight.forget("key")

    # How it is noted.

    def _enter(self, name: str, call: str) -> Lane:
        self._happens(f"{name} calls")
        lane = Lane(name, call, self.row)
        self.lanes.append(lane)
        return lane

    def _happens(self, what: str) -> None:
        self.row += 1
        self.remarks[self.row] = what

    def _thread(self, lane: Lane, call: Callable[[], Any]) -> None:
        def body() -> None:
            with self._noting(lane):
                lane.answer = repr(call())

        threading.Thread(target=body, daemon=True).start()
        self._settle()

    @contextmanager
    def _noting(self, lane: Lane) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # noqa: BLE001 - whatever comes out is what is drawn
            lane.answer = type(error).__name__
        lane.back = self.row

    def _run(self, lane: Lane) -> Any:
        with self._running(lane) as end:
            return end.result()

    @contextmanager
    def _running(self, lane: Lane) -> Iterator[Future[Any]]:
        begun, cancelled = self.row, False
        self._ends[lane.name] = end = Future[Any]()
        try:
            yield end
        except asyncio.CancelledError:
            cancelled = True
            raise
        finally:
            lane.runs.append(Run(begun, self.row, cancelled))
            del self._ends[lane.name]

    def _settle(self, gone: str = "") -> None:
        deadline = time.monotonic() + 30
        while not self._settled(gone):
            if time.monotonic() > deadline:
                raise AssertionError(f"nobody moves: {self.lanes}")
            time.sleep(0.001)

    def _settled(self, gone: str) -> bool:
        there = {lane.name for lane in self.lanes if lane.back is None}
        running, now = set(self._ends), self._flight.stats()
        if gone in there or len(running) != now.in_flight or bool(running) != bool(there):
            return False
        return len(running & there) + now.waiting == len(there)


# -- the stories ----------------------------------------------------------------------------------


def value(story: Story) -> None:
    """A value goes to the leader and to all who joined."""
    for name in "ABC":
        story.do(name)
    story.returns("A", "row")


def error(story: Story) -> None:
    """An error is raised in the leader and in all who joined."""
    for name in "ABC":
        story.do(name)
    story.raises("A", OSError())


def missing(story: Story) -> None:
    """A function for many keys has found nothing for this one."""
    story.do_many("A")
    story.do("B")
    story.do_many("C")
    story.returns("A", {})


def lost(story: Story) -> None:
    """A leader is lost, and a follower takes over."""
    for name in "ABC":
        story.do(name)
    story.raises("A", KeyboardInterrupt())
    story.returns("B", "row")


def abandoned(story: Story) -> None:
    """Everybody has left, so the execution is cancelled."""
    story.do_async("A")
    story.do_async("B")
    story.cancel("A")
    story.cancel("B")


def forgotten(story: Story) -> None:
    """A forgotten execution serves those who joined it; the next caller starts anew."""
    story.do("A")
    story.do("B")
    story.forget()
    story.do("C")
    story.returns("C", "new")
    story.returns("A", "old")


STORIES = (value, error, missing, lost, abandoned, forgotten)


def told(tell: Callable[[Story], None]) -> Story:
    """The story, after it has happened."""
    with Story(str(tell.__doc__)).told() as story:
        tell(story)
    return story


# -- a stampede -----------------------------------------------------------------------------------

#: Requests, one for each tick of the clock, and the ticks of work that a query is.
REQUESTS, WORK = 12, 5


@dataclass
class Request:
    """A request for a page whose cache entry has just expired. Times are ticks."""

    came: int
    query: tuple[int, int] | None = None
    answered: int | None = None


class Database:
    """A model: each tick of the clock brings one tick of work, shared by all queries that run."""

    def __init__(self) -> None:
        self.now = 0
        self._left: dict[asyncio.Future[None], Fraction] = {}

    @property
    def running(self) -> int:
        """How many queries run."""
        return len(self._left)

    async def query(self) -> None:
        """Runs a query."""
        done = asyncio.get_running_loop().create_future()
        self._left[done] = Fraction(WORK)
        await done

    def tick(self) -> None:
        """Lets one tick pass."""
        self.now += 1
        each = Fraction(1, max(1, self.running))
        for done in list(self._left):
            self._left[done] -= each
            if self._left[done] <= 0:
                del self._left[done]
                done.set_result(None)


async def stampede(flight: ShardedFlight | None) -> list[Request]:
    """Runs the requests against a cache and the database behind it, with or without a flight."""
    database, cached = Database(), False
    requests: list[Request] = []
    tasks: list[asyncio.Task[None]] = []

    async def fill(request: Request) -> None:
        nonlocal cached
        begun = database.now
        await database.query()
        request.query = (begun, database.now)
        cached = True

    async def answer(request: Request) -> None:
        if not cached:
            miss: Callable[[], Awaitable[None]] = lambda: fill(request)  # noqa: E731
            await (miss() if flight is None else flight.do_async(miss, "page"))
        request.answered = database.now

    def all_settled() -> bool:
        """Whether everybody has an answer, queries, or waits."""
        waiting = 0 if flight is None else flight.stats().waiting
        return database.running + waiting == sum(r.answered is None for r in requests)

    while len(tasks) < REQUESTS or not all(task.done() for task in tasks):
        if len(tasks) < REQUESTS:
            requests.append(Request(database.now))
            tasks.append(asyncio.create_task(answer(requests[-1])))
        while not all_settled():
            await asyncio.sleep(0)
        database.tick()
        await asyncio.sleep(0)
    return requests


# -- drawing --------------------------------------------------------------------------------------

STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1f2328; }
.code { font: 13px ui-monospace, Menlo, Consolas, monospace; }
.quiet { fill: #59636e; }
.strong { font-weight: 600; }
.line { stroke: #8c959f; stroke-width: 1.5; fill: none; }
.wait { stroke: #8c959f; stroke-width: 1.5; stroke-dasharray: 4 4; fill: none; }
.run { fill: #0a5fb4; }
.on-run { fill: #ffffff; }
.arrow { stroke: #0a5fb4; stroke-width: 1.5; fill: none; }
.tip { fill: #0a5fb4; }
.bad { fill: #b3261e; }
.held { fill: #c6d9ee; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .quiet { fill: #9da7b3; }
  .run { fill: #2f81d7; }
  .arrow { stroke: #6cb0f5; }
  .tip { fill: #6cb0f5; }
  .bad { fill: #ff8a80; }
  .held { fill: #33506f; }
}
"""

LEFT, LANE, TOP, ROW = 150, 190, 44, 48


class Picture:
    """An SVG file that is written from top to bottom."""

    def __init__(self, width: int, height: int, title: str) -> None:
        size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
        ]

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        """Writes words."""
        where = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
        self._parts.append(f'<text class="{kind}" {where}>{escape(words)}</text>')

    def line(self, kind: str, x1: float, y1: float, x2: float, y2: float) -> None:
        """Draws a straight line."""
        self._parts.append(f'<path class="{kind}" d="M{x1:g} {y1:g}L{x2:g} {y2:g}"/>')

    def box(self, kind: str, x: float, y: float, width: float, height: float) -> None:
        """Draws a box with round corners."""
        where = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
        self._parts.append(f'<rect class="{kind}" {where} rx="4"/>')

    def dot(self, x: float, y: float, kind: str = "tip") -> None:
        """Draws a dot."""
        self._parts.append(f'<circle class="{kind}" cx="{x:g}" cy="{y:g}" r="4"/>')

    def arrow(self, x1: float, x2: float, y: float) -> None:
        """Draws a level arrow."""
        back = -9 if x2 > x1 else 9
        self.line("arrow", x1, y, x2 + back, y)
        self._parts.append(f'<path class="tip" d="M{x2:g} {y:g}l{back} -5v10z"/>')

    def svg(self) -> str:
        """The file's text."""
        return "\n".join([*self._parts, "</svg>"]) + "\n"


def drawn(story: Story) -> str:
    """The picture of a story."""
    width, height = LEFT + LANE * len(story.lanes), TOP + ROW * story.row + 34
    picture = Picture(width, height, story.title)
    x_of = {lane.name: LEFT + LANE * index + LANE / 2 for index, lane in enumerate(story.lanes)}

    def y(row: int) -> float:
        return TOP + ROW * (row - 1) + 14

    for row, remark in story.remarks.items():
        picture.text(0, y(row) + 5, remark, "quiet")
    for lane in story.lanes:
        assert lane.back is not None
        x = x_of[lane.name]
        picture.text(x, y(lane.called) - 30, lane.name, "strong", "middle")
        picture.text(x, y(lane.called) - 12, lane.call, "code", "middle")
        picture.line("wait", x, y(lane.called), x, y(lane.back))
        for run in lane.runs:
            picture.box("run", x - 44, y(run.begun), 88, y(run.ended) - y(run.begun))
            middle = (y(run.begun) + y(run.ended)) / 2 + 5
            picture.text(x, middle, "load runs", "on-run", "middle")
        picture.dot(x, y(lane.called))
        picture.dot(x, y(lane.back))
    for lane in story.lanes:
        for run in lane.runs:
            tell(picture, story, lane, run, x_of, y(run.ended), y(run.begun))
    for lane in story.lanes:
        assert lane.back is not None
        kind = "code bad" if lane.answer.isidentifier() else "code"
        outlived = any(run.ended > lane.back for run in lane.runs)
        x = x_of[lane.name] + (52 if outlived else 0)
        anchor = "start" if outlived else "middle"
        picture.text(x, y(lane.back) + (5 if outlived else 20), lane.answer, kind, anchor)
    return picture.svg()


def tell(
    picture: Picture,
    story: Story,
    lane: Lane,
    run: Run,
    x_of: dict[str, float],
    ended: float,
    begun: float,
) -> None:
    """Draws who heard of a run's end, or who ended it, and from whom it was taken over."""
    x = x_of[lane.name]
    for other in story.lanes:
        beside = x_of[other.name]
        side = 44 if beside > x else -44
        led = any(each.ended == run.ended for each in other.runs)
        if other.back == run.ended and other is not lane and not led:
            if run.cancelled:
                picture.arrow(beside, x + side, ended)
            else:
                picture.arrow(x + side, beside - side / 8, ended)
        if run.begun > lane.called and any(each.ended == run.begun for each in other.runs):
            picture.arrow(beside - side, x + side, begun)


def drawn_stampede(without: list[Request], with_flight: list[Request]) -> str:
    """The picture of the requests, without a flight and with one."""
    scale, bar, gap = 11, 12, 5
    last = max(request.answered or 0 for request in without)
    width, half = 40 + last * scale + 40, 62 + REQUESTS * (bar + gap)
    picture = Picture(width, 2 * half + 40, "A stampede without a flight, and with one")
    for number, (requests, name) in enumerate(
        ((without, "Without a flight"), (with_flight, "With a flight"))
    ):
        top = number * half
        queries = [request.query for request in requests if request.query is not None]
        end = max(request.answered or 0 for request in requests)
        noun = "query" if len(queries) == 1 else "queries"
        words = f"{len(requests)} requests, {len(queries)} {noun}, all answered after {end} ticks"
        picture.text(0, top + 18, name, "strong")
        picture.text(0, top + 38, words, "quiet")
        for index, request in enumerate(requests):
            assert request.answered is not None
            y = top + 50 + index * (bar + gap)
            x = request.came * scale
            if request.query is not None:
                picture.box("run", x, y, (request.query[1] - request.query[0]) * scale, bar)
            elif request.answered > request.came:
                picture.box("held", x, y, (request.answered - request.came) * scale, bar)
            else:
                picture.dot(x + 4, y + bar / 2)
    y = 2 * half + 10
    picture.box("run", 0, y, 22, bar)
    picture.text(30, y + 11, "runs the query", "quiet")
    picture.box("held", 150, y, 22, bar)
    picture.text(180, y + 11, "waits for another's", "quiet")
    picture.dot(334, y + 6)
    picture.text(346, y + 11, "finds it cached", "quiet")
    return picture.svg()


def pictures() -> dict[str, str]:
    """All diagrams: the names of their files, and what is in them."""
    drawings = {f"{tell.__name__}.svg": drawn(told(tell)) for tell in STORIES}
    with asyncio.Runner() as runner:
        without = runner.run(stampede(None))
        with_flight = runner.run(stampede(ShardedFlight()))
    return {**drawings, "stampede.svg": drawn_stampede(without, with_flight)}


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(exist_ok=True)
    for name, svg in pictures().items():
        (folder / name).write_text(svg, encoding="utf-8")
