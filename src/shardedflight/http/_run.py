"""One request's way through a flight, once for threads and once for coroutines."""

import asyncio

from shardedflight import FlightTimeout, ShardedFlight

from ._rounds import Caller, Round, Rounds
from ._rules import Recording, Refusal, Shared, Verdict

__all__ = ["TaskRun", "ThreadRun"]


class Run:
    """One request: it waits for rounds, and runs the application if it comes to lead one."""

    def __init__(self, rounds: Rounds, caller: Caller) -> None:
        self.rounds = rounds
        self.caller = caller
        self.recording = Recording(rounds.rules, caller.request)
        #: The application runs for this request: what it raises is the request's end.
        self.begun = False
        self._round: Round | None = None

    @property
    def round(self) -> Round:
        """The round that the request waits for, or leads."""
        assert self._round is not None
        return self._round

    @property
    def failed(self) -> bool:
        """The flight's error is the application's, for this request and its round."""
        return self.begun or (self._round is not None and self._round.failed)

    def _begin(self) -> Verdict | None:
        """The application is about to run, unless the round has ended just before."""
        if self.round.verdict is None:
            self.caller.lead()
            self.begun = True
        return self.round.verdict

    def _finish(self, verdict: Verdict) -> Verdict:
        self.rounds.finish(self.round, self.caller.request, verdict)
        return verdict

    def _finish_failed(self) -> bool:
        """The application has raised. True if the followers are to get that."""
        request = self.caller.request
        if not self.recording.begun and self.rounds.rules.shares_failure(request):
            self.rounds.fail(self.round)
            return True
        self._finish(self.recording.verdict or self.recording.refuse(Refusal.BROKEN))
        return False


class ThreadRun(Run):
    """A request that occupies a thread."""

    def __init__(self, rounds: Rounds, caller: Caller) -> None:
        super().__init__(rounds, caller)
        #: What ends the leader's own request: the application's error, or its client's.
        self.error: Exception | None = None

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
            return self._finish(self.record())
        except Exception as error:
            if self._finish_failed():
                raise
            self.error = error
            assert self.round.verdict is not None
            return self.round.verdict

    def raise_error(self) -> None:
        """Raises what ends the leader's own request, if anything does."""
        error, self.error = self.error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # or this frame and the error would keep each other alive

    def record(self) -> Verdict:
        """Runs the application until it is known who may have what."""
        raise NotImplementedError


class TaskRun(Run):
    """A request that occupies a task of an event loop."""

    #: The request's client has left.
    gone = False

    async def fly(self, flight: ShardedFlight) -> Shared | None:
        """A follower's answer; None if the request has led, is gone, or passes through.

        Raises:
            Exception: The application's, if `failed`, else what went wrong here.
        """
        caller = self.caller
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

    async def _lead(self) -> Verdict:
        ended = self._begin()
        if ended is not None:
            return ended
        self._limit.reschedule(None)  # of waiting for somebody else
        self.unwatch()
        return await self.lead()

    async def lead(self) -> Verdict:
        """Runs the application until it is known who may have what, and finishes the round."""
        raise NotImplementedError

    def watch(self, limit: asyncio.Timeout) -> None:
        """The request may become a follower: `limit` is to end when its client leaves."""

    def unwatch(self) -> None:
        """It is none, or none any more."""
