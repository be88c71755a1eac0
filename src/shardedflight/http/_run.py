"""One request's way through a flight, once for threads and once for coroutines."""

import asyncio
from collections.abc import Awaitable
from contextvars import ContextVar

from shardedflight import FlightTimeout, ShardedFlight

from ._rounds import Caller, Round, Rounds
from ._rules import Recording, Refusal, Shared, Verdict

__all__ = ["TaskRun", "ThreadRun"]


class _Place:
    """Where code runs. Contexts keep it as long as any task of the application lives."""

    __slots__ = ("round",)

    def __init__(self, round_: Round) -> None:
        #: The round; None from its end on, for it has the answer.
        self.round: Round | None = round_


#: In which round's application this code runs.
_inside: ContextVar[_Place | None] = ContextVar("shardedflight.http.inside", default=None)


class Run:
    """One request: it waits for rounds, and runs the application if it comes to lead one."""

    def __init__(self, rounds: Rounds, caller: Caller) -> None:
        self.rounds = rounds
        self.caller = caller
        self.recording = Recording(rounds.rules, caller.request)
        #: The application runs for this request, or has run: it is the leader.
        self.begun = False
        #: What ends the leader's own request, and nobody else's: the application's error, or its
        #: client's.
        self.error: Exception | None = None
        self._round: Round | None = None
        self._place: _Place | None = None

    @property
    def round(self) -> Round:
        """The round that the request waits for, or leads."""
        assert self._round is not None
        return self._round

    @property
    def failed(self) -> bool:
        """The flight's error is the application's, for all of the round."""
        return self._round is not None and self._round.failed

    def _begin(self) -> Verdict | None:
        """The application is about to run, unless the round has ended just before."""
        if self.round.verdict is None:
            self.caller.lead()
            self.begun = True
        return self.round.verdict

    def raise_error(self) -> None:
        """Raises what ends the leader's own request, if anything does."""
        error, self.error = self.error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # or this frame and the error would keep each other alive

    def _finish(self, verdict: Verdict) -> Verdict:
        self.rounds.finish(self.round, self.caller.request, verdict)
        self._forget_place()
        return verdict

    def _forget_place(self) -> None:
        if self._place is not None:
            self._place.round = None

    def _finish_failed(self) -> Verdict | None:
        """The application has raised. None if the followers are to get that."""
        request = self.caller.request
        if not self.recording.begun and self.rounds.rules.shares_failure(request):
            self.rounds.fail(self.round)
            self._forget_place()
            return None
        return self._finish(self.recording.verdict or self.recording.refuse(Refusal.BROKEN))


class ThreadRun(Run):
    """A request that occupies a thread."""

    def fly(self, flight: ShardedFlight) -> Shared | None:
        """A follower's answer; None if the request has led or passes through.

        Raises:
            Exception: The application's, if `failed`, else what went wrong here.
        """
        caller = self.caller
        while (round_ := caller.join()) is not None:
            self._round = round_
            verdict = round_.verdict
            try:
                if verdict is None:
                    timeout = self.rounds.rules.follower_timeout
                    verdict, _ = flight.do(self._lead, round_.name, timeout=timeout)
            except FlightTimeout:
                if self.failed:
                    raise
            finally:
                caller.leave()
            if self.begun:
                return None
            answer = caller.judge(verdict)
            if answer is not None:
                return answer
        return None

    def _lead(self) -> Verdict:
        ended = self._begin()
        if ended is not None:
            return ended
        try:
            verdict = self.record()
        except Exception as error:
            self.error = error
            ended = self._finish_failed()
            if ended is None:
                self.error = None  # the flight takes it to everybody
                raise
            return ended
        return self._finish(verdict)

    def record(self) -> Verdict:
        """Runs the application until it is known who may have what."""
        raise NotImplementedError


class TaskRun(Run):
    """A request that occupies a task of an event loop.

    Rounds of which each waits for the next are found here and not by the flight, which sees them,
    too: it may give the error to a caller that leads, and has an application to go on with. Here it
    is always one that would follow, and can as well run by itself.
    """

    #: The request's client has left.
    gone = False

    async def fly(self, flight: ShardedFlight) -> Shared | None:
        """A follower's answer; None if the request has led, is gone, or passes through.

        Raises:
            Exception: The application's, if `failed`, else what went wrong here.
        """
        caller = self.caller
        place = _inside.get()
        caller.inside = None if place is None else place.round
        while (round_ := caller.join()) is not None:
            self._round = round_
            verdict = round_.verdict
            limit = asyncio.timeout(self.rounds.rules.follower_timeout)
            try:
                async with limit:
                    self._limit = limit
                    self.watch(limit)
                    if verdict is None:
                        verdict, _ = await flight.do_async(self._lead, round_.name)
            except TimeoutError:
                if self.begun or not limit.expired():
                    raise
            finally:
                self.unwatch()
                caller.leave()
            if self.begun or self.gone:
                return None
            answer = caller.judge(verdict)
            if answer is not None:
                return answer
        return None

    def _lead(self) -> Awaitable[Verdict]:
        ended = self._begin()
        if ended is not None:
            return _known(ended)
        self._limit.reschedule(None)  # of waiting for somebody else
        self.unwatch()
        self._place = _Place(self.round)
        _inside.set(self._place)
        return self.lead()

    async def lead(self) -> Verdict:
        """Runs the application until it is known who may have what, and finishes the round."""
        raise NotImplementedError

    def watch(self, limit: asyncio.Timeout) -> None:
        """The request may become a follower: `limit` is to end when its client leaves."""

    def unwatch(self) -> None:
        """It is none, or none any more."""


async def _known(verdict: Verdict) -> Verdict:
    return verdict
