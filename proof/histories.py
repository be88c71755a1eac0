"""Histories: what callers saw, and whether the contract allows it.

`History` records, from any thread, loop and process, when each call came and went, when each
execution of a function began and ended, and when a key was forgotten. `check` then compares with
the contract (docs/semantics.md). Each rule in `RULES` is one sentence of it.

**Why no search.** To check a history against a sequential specification one looks for an order of
its operations in which each takes effect at one point between its call and its return (Wing and
Gong, *Testing and verifying concurrent objects*, 1993; Lowe, *Testing for linearizability*, 2017).
That is a search, since in general many orders have to be tried. Here every function returns, or
raises, something that names its execution. So it is known who was served by what, and all that is
left to find is, for each execution, one point at which it was settled: after its function's end and
every invocation, and before every response, of those whom it served. Whether there is one is a
comparison of a maximum with a minimum (Gibbons and Korach, *Testing shared memories*, 1997, show
the same for memory whose reads are known to belong to their writes). `tests/test_histories.py`
compares this with a search by brute force.

Times are `time.monotonic_ns`, on Linux one clock for all processes. What ends in the same
nanosecond in which something else begins overlaps it: doubt is always for the product.
"""

import enum
import itertools
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "RULES",
    "Call",
    "End",
    "Execution",
    "Forget",
    "History",
    "Outcome",
    "Violation",
    "check",
]

#: What `check` compares a history with, by the names that violations have.
RULES = {
    "answered": "every call ends, with one outcome",
    "origin": "an outcome comes from an execution of the call's own key that ended so",
    "overlap": "all whom an execution serves have come before the first of them is answered",
    "waits": "nobody is answered before the function has ended",
    "one": "executions of a key that can be joined do not overlap",
    "forget": "who comes after a forget gets nothing that was begun before it",
    "own": "whose function runs, it runs once, and its outcome is the caller's own",
    "lost": "what happens to a lost leader happens to nobody else",
    "same": "followers in its process get the very value, and exceptions like the leader's",
    "shared": "`shared` tells, to all alike, whether more than one caller was served",
}


class End(enum.Enum):
    """How an execution's function ended."""

    VALUE = "value"
    ERROR = "error"
    MISSING = "missing"  # a function for many keys found nothing for this one
    LOST = "lost"  # the leader's own matter


class Outcome(enum.Enum):
    """How a call ended."""

    VALUE = "value"
    ERROR = "error"
    MISSING = "missing"
    OWN = "own"  # the call led and was lost: what happened to it
    TIMED_OUT = "timed out"
    REFUSED = "refused"  # DeadlockError
    LEFT = "left"  # cancelled, or interrupted while it followed
    CLOSED = "closed"  # its event loop was closed under it
    UNTOLD = "untold"  # of many keys: it had an outcome, but the call raised another key's


#: Outcomes that are an execution's.
SERVED = (Outcome.VALUE, Outcome.ERROR, Outcome.MISSING)
#: Of calls that may have been counted as served, though they do not know the outcome.
_GHOSTS = (Outcome.LEFT, Outcome.CLOSED, Outcome.UNTOLD)


@dataclass(slots=True, eq=False)
class Call:
    """One call for one key; a call for many keys is one `Call` for each.

    Attributes:
        number: Which one, for messages.
        key: As text.
        how: The method.
        process: In which process.
        begun: When it was made.
        ended: When its outcome was there.
        outcome: How it ended.
        source: The number of the execution that the outcome names; None for `Outcome.MISSING`.
        shared: As it was told; None if it was not.
        flaw: What is wrong with the value or the exception itself; empty if nothing is.
        leaving: When it was told to leave, if it was.
        answers: How many outcomes it had.
        led: The numbers of the executions of its function.
    """

    number: int
    key: str
    how: str
    process: int
    begun: int
    ended: int | None = None
    outcome: Outcome | None = None
    source: int | None = None
    shared: bool | None = None
    flaw: str = ""
    leaving: int | None = None
    answers: int = 0
    led: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        outcome = "no outcome" if self.outcome is None else self.outcome.value
        return (
            f"call {self.number} of {self.key} by {self.how} in process {self.process} "
            f"[{self.begun}, {self.ended}]: {outcome} of {self.source}, shared {self.shared}"
        )


@dataclass(slots=True, eq=False)
class Execution:
    """One run of a caller's function for one key.

    Attributes:
        number: Which one; its value or exception names it.
        key: As text.
        process: In which process.
        how: The method of the call whose function it is.
        call: The number of that call.
        invoked: When that call was made.
        begun: The function's first step.
        ended: Its last; None if it never came to that.
        end: How.
        thing: The value or the exception. Not part of what goes to another process.
    """

    number: int
    key: str
    process: int
    how: str
    call: int
    invoked: int
    begun: int
    ended: int | None = None
    end: End | None = None
    thing: Any = None

    def __str__(self) -> str:
        end = "no end" if self.end is None else self.end.value
        return (
            f"execution {self.number} of {self.key} by call {self.call} ({self.how}) in process "
            f"{self.process} [{self.begun}, {self.ended}]: {end}"
        )


@dataclass(slots=True, eq=False)
class Forget:
    """One call of `forget`.

    Attributes:
        key: As text.
        process: In which process.
        begun: When it was made.
        ended: When it returned.
        scope: Whom it holds for when it has returned: "all"; or "process", those who call in its
            process; or "nobody" yet.
    """

    key: str
    process: int
    begun: int
    ended: int | None = None
    scope: str = "all"


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule that a history breaks, and the calls and executions that show it."""

    rule: str
    text: str

    def __str__(self) -> str:
        return f"{self.rule}: {RULES[self.rule]}, but {self.text}"


class NamedError(Exception):
    """What functions under test raise: it names their executions, one for each key."""

    def __init__(self, numbers: dict[str, int]) -> None:
        super().__init__("".join(f"execution {n} of <{key}>;" for key, n in numbers.items()))
        #: More than the arguments tell, so that replicas are seen to be whole.
        self.numbers = numbers


def _number_in(error: BaseException, key: str) -> int | None:
    """The execution of `key` that an exception names, also one from another process."""
    found = re.search(rf"execution (\d+) of <{re.escape(key)}>;", str(error))
    return int(found.group(1)) if found else None


class History:
    """Records calls, executions and forgets. Used from any thread.

    Args:
        process: The number of this process.
        cancels: Executions that everybody has left are unlinked: `on_abandon="cancel"`.
        plain: Values have to be of plain types, since they go to other processes.
    """

    def __init__(self, process: int = 0, *, cancels: bool = True, plain: bool = False) -> None:
        self.process = process
        self.cancels = cancels
        self.plain = plain
        self.calls: list[Call] = []
        self.executions: dict[int, Execution] = {}
        self.forgets: list[Forget] = []
        self._numbers = itertools.count(process * 1_000_000_000 + 1)

    # -- recording --------------------------------------------------------------------------------

    def invoke(self, key: str, how: str) -> Call:
        """A call is about to be made."""
        call = Call(next(self._numbers), key, how, self.process, time.monotonic_ns())
        self.calls.append(call)
        return call

    def begin(self, call: Call) -> Execution:
        """The first step of the function of `call`."""
        number = next(self._numbers)
        execution = Execution(
            number,
            call.key,
            self.process,
            call.how,
            call.number,
            call.begun,
            time.monotonic_ns(),
        )
        self.executions[number] = execution
        call.led.append(number)
        return execution

    def value(self, execution: Execution) -> Any:
        """The last step of a function that returns: the value that names its execution."""
        value: Any = {"execution": execution.number} if self.plain else _Token(execution.number)
        execution.thing = value
        self.end(execution, End.VALUE)
        return value

    def error(self, *executions: Execution) -> NamedError:
        """The last step of a function that fails: the exception that names its executions."""
        error = NamedError({execution.key: execution.number for execution in executions})
        for execution in executions:
            execution.thing = error
            self.end(execution, End.ERROR)
        return error

    def end(self, execution: Execution, end: End) -> None:
        """The last step of a function."""
        if execution.end is None:
            execution.end = end
            execution.ended = time.monotonic_ns()

    def returned(self, call: Call, value: Any, shared: bool | None) -> None:
        """The call has a value."""
        self._answer(call, Outcome.VALUE)
        number = value.get("execution") if type(value) is dict else getattr(value, "number", None)
        call.source = number
        call.shared = shared
        execution = self.executions.get(number) if isinstance(number, int) else None
        if number is None:
            call.flaw = f"the value is {value!r}"
        elif execution is not None and execution.thing is not value and not self.plain:
            call.flaw = "the value is not the very object"

    def raised(self, call: Call, error: BaseException, *, replica: bool = False) -> None:
        """The call has an exception that is an execution's. `replica`: also to the leader."""
        self._answer(call, Outcome.ERROR)
        call.source = _number_in(error, call.key)
        execution = self.executions.get(call.source) if call.source is not None else None
        if execution is None or not isinstance(execution.thing, NamedError):
            return
        original = execution.thing
        if type(error) is not type(original) and self.plain:
            return  # it has come back from the backend, as to any other process
        if call.source in call.led and not replica:
            if error is not original:
                call.flaw = "the leader's exception is not the very object"
        elif error is original:
            call.flaw = "the exception is the leader's own object"
        elif type(error) is not type(original) or error.args != original.args:
            call.flaw = f"the exception is {error!r} and not like {original!r}"
        elif getattr(error, "numbers", None) != original.numbers:
            call.flaw = "the exception lacks an attribute of the leader's"

    def missed(self, call: Call) -> None:
        """The call has learnt that there is nothing for its key."""
        self._answer(call, Outcome.MISSING)
        for number in call.led:
            call.source = number

    def gone(self, call: Call, outcome: Outcome, source: int | None = None) -> None:
        """The call has ended without an execution's outcome."""
        self._answer(call, outcome)
        call.source = source

    def _answer(self, call: Call, outcome: Outcome) -> None:
        call.ended = time.monotonic_ns()
        call.answers += 1
        call.outcome = outcome

    def forget(self, key: str, scope: str = "all") -> Forget:
        """`forget` is about to be called; who calls it sets `ended` afterwards."""
        forget = Forget(key, self.process, time.monotonic_ns(), scope=scope)
        self.forgets.append(forget)
        return forget

    def strip(self) -> "History":
        """Drops the values and exceptions, so that the history can go to another process."""
        for execution in self.executions.values():
            execution.thing = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A pickled history records no more."""
        return {**vars(self), "_numbers": None}


class _Token:
    """A value, told from all others by identity."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


# -- checking -------------------------------------------------------------------------------------


class _Checked:
    """One history, or those of several processes, by key."""

    def __init__(self, histories: Iterable[History]) -> None:
        histories = list(histories)
        self.cancels = all(history.cancels for history in histories)
        #: Values cross processes: their number is not the only one there may be.
        self.abroad = any(history.plain for history in histories)
        self.calls = [call for history in histories for call in history.calls]
        self.executions = {n: e for history in histories for n, e in history.executions.items()}
        self.by_key: dict[str, list[Call]] = defaultdict(list)
        self.called = {call.number: call for call in self.calls}
        for call in self.calls:
            self.by_key[call.key].append(call)
        self.executions_by_key: dict[str, list[Execution]] = defaultdict(list)
        for execution in self.executions.values():
            self.executions_by_key[execution.key].append(execution)
        self.forgets: dict[str, list[Forget]] = defaultdict(list)
        for history in histories:
            for forget in history.forgets:
                self.forgets[forget.key].append(forget)
        #: Whom each execution served.
        self.served: dict[int, list[Call]] = defaultdict(list)
        for call in self.calls:
            if call.outcome in SERVED and call.source is not None:
                self.served[call.source].append(call)


def check(*histories: History, apart: bool = False) -> list[Violation]:
    """What the contract does not allow in a history.

    Args:
        *histories: Of one process, or of several that met.
        apart: Processes could lead for one key at a time, since their backend was of no use at
            times: the rule "one" is checked in each process for itself.

    Returns:
        All violations; none if the history is allowed.
    """
    checked = _Checked(histories)
    return [
        violation
        for rule in (
            _answered,
            _origin,
            _overlap,
            _waits,
            _one_in_all if not apart else _one_in_each,
            _forget,
            _own,
            _lost,
            _same,
            _shared,
        )
        for violation in rule(checked)
    ]


def _answered(checked: _Checked) -> Iterator[Violation]:
    for call in checked.calls:
        if call.answers != 1 and not (call.answers == 0 and call.outcome is Outcome.CLOSED):
            yield Violation("answered", f"{call.answers} outcomes: {call}")


def _origin(checked: _Checked) -> Iterator[Violation]:
    for call in checked.calls:
        if call.outcome not in (Outcome.VALUE, Outcome.ERROR):
            continue
        execution = None if call.source is None else checked.executions.get(call.source)
        if execution is None:
            yield Violation("origin", f"there is no such execution: {call}")
        elif execution.key != call.key:
            yield Violation("origin", f"it is another key's: {call} {execution}")
        # What a lost leader left is another rule's.
        elif execution.end not in (End.LOST, End(call.outcome.value)):
            yield Violation("origin", f"it ended otherwise: {call} {execution}")
    for calls in checked.by_key.values():
        missing = [call for call in calls if call.outcome is Outcome.MISSING]
        for call in missing:
            if call.source is None and not any(
                _may_serve(checked, execution, call)
                for execution in checked.executions_by_key[call.key]
                if execution.end is End.MISSING
            ):
                yield Violation("origin", f"no execution was missing then: {call}")


def _may_serve(checked: _Checked, execution: Execution, call: Call) -> bool:
    """Whether `call`, which names no execution, can have been served by this one."""
    if execution.ended is None or call.ended is None or execution.ended > call.ended:
        return False
    leader = checked.called[execution.call]
    if leader.ended is None or leader.outcome not in SERVED:
        return True
    return call.begun <= leader.ended or (checked.abroad and _late(checked, call, leader.ended))


def _overlap(checked: _Checked) -> Iterator[Violation]:
    for number, served in checked.served.items():
        execution = checked.executions.get(number)
        if execution is None:
            continue
        groups: dict[int, list[Call]] = defaultdict(list)
        for call in served:
            groups[call.process].append(call)
        home = groups.get(execution.process, [])
        if checked.abroad:
            # Of one process, too: who waits in a forgotten execution may follow the next one.
            settled = min((call.ended or 0 for call in home), default=0)
            for calls in groups.values() if home else ():
                yield from _overlap_abroad(checked, execution, calls, settled)
            continue
        for latest in home:
            earliest = min(home, key=lambda call: call.ended or 0)
            if latest.begun > (earliest.ended or 0):
                yield Violation("overlap", f"{latest} came after {earliest}")


def _overlap_abroad(
    checked: _Checked, execution: Execution, calls: list[Call], settled: int
) -> Iterator[Violation]:
    """In another process an outcome may arrive late: until then it can be joined there.

    So who comes after it was settled at home has met somebody who came before.
    """
    for call in calls:
        if call.begun > settled and not _late(checked, call, settled):
            yield Violation("overlap", f"{call} came after it was settled: {execution}")


def _late(checked: _Checked, call: Call, settled: int) -> bool:
    """Whether `call` may have met somebody of its process who came before."""
    return any(
        # One who has left may lead on, for those who wait.
        other.begun <= settled
        and (
            other.outcome in (Outcome.LEFT, Outcome.CLOSED)
            or other.ended is None
            or other.ended >= call.begun
        )
        for other in checked.by_key[call.key]
        if other.process == call.process
    )


def _waits(checked: _Checked) -> Iterator[Violation]:
    for number, served in checked.served.items():
        execution = checked.executions.get(number)
        if execution is None:
            continue
        for call in served:
            if execution.ended is None or (call.ended or 0) < execution.ended:
                yield Violation("waits", f"{call} did not wait for {execution}")


def _one_in_all(checked: _Checked) -> Iterator[Violation]:
    for key, executions in checked.executions_by_key.items():
        yield from _one(checked, executions, checked.forgets[key])


def _one_in_each(checked: _Checked) -> Iterator[Violation]:
    for key, executions in checked.executions_by_key.items():
        for process in {execution.process for execution in executions}:
            mine = [execution for execution in executions if execution.process == process]
            yield from _one(checked, mine, checked.forgets[key])


def _one(
    checked: _Checked, executions: list[Execution], forgets: list[Forget]
) -> Iterator[Violation]:
    """Of the executions that run at a time, all but one have been forgotten or abandoned.

    Each needs a forget of its own, which ended after its caller came and began before the latest
    of them did. (A follower that takes over in a forgotten execution came before the forget, too.)
    Where processes meet, one forget is good for all whose callers came before it ended: those who
    ask the backend meanwhile are forgotten with what runs.
    """
    running: list[Execution] = []
    for execution in sorted(executions, key=lambda execution: execution.begun):
        now = execution.begun
        running = [
            other
            for other in running
            if (other.ended is None or other.ended > now) and not _given_up(checked, other, now)
        ]
        running.append(execution)
        # One may be joinable: it is best for the product that it is the one that came last.
        came = sorted((other.invoked for other in running), reverse=True)[1:]
        if not came:
            continue
        reasons = sorted(
            (
                forget.ended if forget.ended is not None else now
                for forget in forgets
                if forget.begun <= now
            ),
            reverse=True,
        )
        if checked.abroad:
            reasons = reasons[:1] * len(came)
        if len(reasons) < len(came) or any(
            ended < invoked for ended, invoked in zip(reasons, came, strict=False)
        ):
            yield Violation(
                "one",
                f"these run at once, with {len(reasons)} forgets: "
                + "; ".join(str(other) for other in running),
            )


def _given_up(checked: _Checked, execution: Execution, now: int) -> bool:
    """Whether everybody may have left it before `now`, so that it was unlinked and cancelled."""
    leader = checked.called[execution.call]
    return (
        checked.cancels
        and "async" in execution.how
        and leader.outcome in (Outcome.LEFT, Outcome.CLOSED)
        and leader.leaving is not None
        and leader.leaving <= now
        and not checked.served.get(execution.number)
    )


def _forget(checked: _Checked) -> Iterator[Violation]:
    for key, forgets in checked.forgets.items():
        for call in checked.by_key[key]:
            if call.source is None or call.outcome not in SERVED:
                continue
            execution = checked.executions.get(call.source)
            if execution is None:
                continue
            for forget in forgets:
                if forget.ended is None or forget.scope == "nobody":
                    continue
                if forget.scope == "process" and forget.process != call.process:
                    continue
                if execution.begun < forget.begun and forget.ended < call.begun:
                    yield Violation(
                        "forget",
                        f"forgotten in [{forget.begun}, {forget.ended}]: {call} {execution}",
                    )
                    break


def _own(checked: _Checked) -> Iterator[Violation]:
    for call in checked.calls:
        if len(call.led) > 1:
            yield Violation("own", f"its function ran {len(call.led)} times: {call}")
        for number in call.led[:1]:
            execution = checked.executions[number]
            if call.outcome in (Outcome.VALUE, Outcome.ERROR) and call.source != number:
                yield Violation("own", f"it got another outcome than its own: {call} {execution}")
            elif call.outcome in SERVED and execution.end is End.LOST:
                yield Violation("own", f"it was lost, and was answered: {call} {execution}")
            elif call.outcome is Outcome.OWN and execution.end is not End.LOST:
                yield Violation("own", f"its function ended otherwise: {call} {execution}")
            elif call.outcome is Outcome.TIMED_OUT:
                yield Violation("own", f"a leader is not limited: {call} {execution}")


def _lost(checked: _Checked) -> Iterator[Violation]:
    for call in checked.calls:
        if call.outcome is Outcome.OWN:
            if call.source is not None and call.source not in call.led:
                yield Violation("lost", f"it has what happened to another leader: {call}")
        elif call.source is not None and call.outcome in SERVED:
            execution = checked.executions.get(call.source)
            if execution is not None and execution.end is End.LOST and call.source not in call.led:
                yield Violation("lost", f"it has a lost leader's outcome: {call} {execution}")


def _same(checked: _Checked) -> Iterator[Violation]:
    for call in checked.calls:
        if call.flaw:
            yield Violation("same", f"{call.flaw}: {call}")


def _shared(checked: _Checked) -> Iterator[Violation]:
    for number, served in checked.served.items():
        execution = checked.executions.get(number)
        if execution is None:
            continue
        flags = {call.shared for call in served if call.shared is not None}
        if len(flags) > 1 and not checked.abroad:
            yield Violation("shared", f"they are told differently: {served[0]} {served[-1]}")
        elif len(served) > 1 and False in flags:
            alone = next(call for call in served if call.shared is False)
            yield Violation("shared", f"{len(served)} were served: {alone} {execution}")
        elif len(served) == 1 and True in flags and not _ghosts(checked, execution, served[0]):
            yield Violation("shared", f"nobody else was served: {served[0]} {execution}")


def _ghosts(checked: _Checked, execution: Execution, served: Call) -> bool:
    """Whether somebody may have been counted as served who has left, or was not told."""
    # That nobody waits in a process any more is on its way to the backend for a moment.
    ghosts = (*_GHOSTS, Outcome.TIMED_OUT) if checked.abroad else _GHOSTS
    since = execution.invoked if checked.abroad else execution.ended
    return any(
        call is not served
        and call.outcome in ghosts
        and call.begun <= (served.ended or 0)
        and (
            call.outcome is Outcome.CLOSED  # it waits until its coroutine is collected
            # Its thread goes on for its process, and may come to wait for a newer leader.
            or (checked.abroad and call.how == "do_future")
            or call.ended is None
            or since is None
            or call.ended >= since
        )
        for call in checked.by_key[execution.key]
    )
