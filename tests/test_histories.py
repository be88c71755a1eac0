"""The checker of histories: it refuses a bad history of each kind, and allows the good ones."""

import itertools
import pickle
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from proof.histories import (
    RULES,
    Call,
    End,
    Execution,
    Forget,
    History,
    NamedError,
    Outcome,
    check,
)

from shardedflight import ShardedFlight

pytestmark = pytest.mark.once


class Script:
    """A history written by hand: times are whole numbers."""

    def __init__(self, process: int = 0, **options: Any) -> None:
        self.history = History(process, **options)
        self.numbers = itertools.count(1000 * process + 1)

    def call(self, begun: int, ended: int | None, how: str = "do", key: str = "k") -> Call:
        call = Call(next(self.numbers), key, how, self.history.process, begun, ended)
        self.history.calls.append(call)
        return call

    def run(self, call: Call, begun: int, ended: int | None, end: End = End.VALUE) -> Execution:
        number = next(self.numbers)
        execution = Execution(
            number, call.key, self.history.process, call.how, call.number, call.begun, begun
        )
        execution.ended, execution.end = ended, end
        self.history.executions[number] = execution
        call.led.append(number)
        return execution

    def serve(self, execution: Execution, *calls: Call, shared: bool | None = None) -> None:
        for call in calls:
            call.answers = 1
            call.source = execution.number
            call.outcome = Outcome(execution.end.value) if execution.end else None
            call.shared = len(calls) > 1 if shared is None else shared
            if call.outcome is not Outcome.VALUE:
                call.shared = None

    def leave(
        self, call: Call, outcome: Outcome = Outcome.LEFT, leaving: int | None = None
    ) -> Call:
        call.answers, call.outcome, call.leaving = 1, outcome, leaving
        return call

    def forget(self, begun: int, ended: int | None, **options: Any) -> None:
        self.history.forgets.append(Forget("k", self.history.process, begun, ended, **options))

    def rules(self, *others: "Script", **options: Any) -> list[str]:
        found = check(self.history, *(other.history for other in others), **options)
        for violation in found:
            assert str(violation).startswith(f"{violation.rule}: {RULES[violation.rule]}")
        return sorted({violation.rule for violation in found})


def led_and_followed(script: Script) -> tuple[Call, Call, Execution]:
    """One leads, one follows, and both are served."""
    leader, follower = script.call(0, 20), script.call(5, 21)
    execution = script.run(leader, 1, 15)
    script.serve(execution, leader, follower)
    return leader, follower, execution


# -- bad ones, one or more for each rule ----------------------------------------------------------


def never_ends(script: Script) -> None:
    leader = script.call(0, 10)
    script.serve(script.run(leader, 1, 5), leader)
    script.call(2, None)


def ends_twice(script: Script) -> None:
    leader = script.call(0, 10)
    script.serve(script.run(leader, 1, 5), leader)
    leader.answers = 2


def of_another_key(script: Script) -> None:
    leader, other = script.call(0, 10), script.call(1, 11, key="other")
    script.serve(script.run(leader, 1, 5), leader, other)


def of_nowhere(script: Script) -> None:
    call = script.call(0, 10)
    call.answers, call.outcome, call.source = 1, Outcome.VALUE, 77


def a_value_of_what_failed(script: Script) -> None:
    _, follower, execution = led_and_followed(script)
    execution.end = End.ERROR
    script.history.calls[0].outcome = Outcome.ERROR
    script.history.calls[0].shared = follower.shared = None


def missing_without_reason(script: Script) -> None:
    leader, _, _ = led_and_followed(script)
    call = script.call(2, leader.ended)
    call.answers, call.outcome = 1, Outcome.MISSING


def comes_after_it_was_settled(script: Script) -> None:
    leader, follower, _ = led_and_followed(script)
    follower.begun, follower.ended = (leader.ended or 0) + 1, (leader.ended or 0) + 2


def does_not_wait(script: Script) -> None:
    _, follower, execution = led_and_followed(script)
    follower.ended = (execution.ended or 0) - 1


def two_at_a_time(script: Script) -> None:
    for begun in (0, 5):
        leader = script.call(begun, 20)
        script.serve(script.run(leader, begun + 1, 15), leader)


def two_at_a_time_and_a_forget_before(script: Script) -> None:
    script.forget(-3, -2)
    two_at_a_time(script)


def three_at_a_time_and_one_forget(script: Script) -> None:
    script.forget(3, 4)
    for begun in (0, 5, 6):
        leader = script.call(begun, 20)
        script.serve(script.run(leader, begun + 1, 15), leader)


def two_at_a_time_of_which_one_is_still_wanted(script: Script) -> None:
    left, follower = script.call(0, 4, how="do_async"), script.call(1, 20)
    script.serve(script.run(left, 1, 15), follower, shared=False)
    script.leave(left, leaving=3)
    leader = script.call(5, 20)
    script.serve(script.run(leader, 6, 15), leader)


def after_a_forget(script: Script) -> None:
    _, follower, _ = led_and_followed(script)
    script.forget(2, follower.begun - 1)


def another_outcome_than_its_own(script: Script) -> None:
    _, follower, _ = led_and_followed(script)
    script.run(follower, 16, 17)


def runs_twice(script: Script) -> None:
    leader = script.call(0, 20)
    script.run(leader, 1, 2, End.LOST)
    script.serve(script.run(leader, 3, 4), leader)
    leader.led.reverse()


def a_leader_that_timed_out(script: Script) -> None:
    leader = script.call(0, 20)
    script.run(leader, 1, 2)
    script.leave(leader, Outcome.TIMED_OUT)


def what_happened_to_another(script: Script) -> None:
    leader, follower = script.call(0, 20), script.call(1, 21)
    execution = script.run(leader, 1, 15, End.LOST)
    script.leave(leader, Outcome.OWN).source = execution.number
    script.leave(follower, Outcome.OWN).source = execution.number


def the_value_of_a_lost_leader(script: Script) -> None:
    leader, follower = script.call(0, 20), script.call(1, 21)
    execution = script.run(leader, 1, 15)
    script.serve(execution, follower, shared=False)
    execution.end = End.LOST
    script.leave(leader, Outcome.OWN).source = execution.number


def a_copy(script: Script) -> None:
    _, follower, _ = led_and_followed(script)
    follower.flaw = "the value is not the very object"


def told_differently(script: Script) -> None:
    _, follower, _ = led_and_followed(script)
    follower.shared = False


def not_told_to_be_shared(script: Script) -> None:
    for call in led_and_followed(script)[:2]:
        call.shared = False


def shared_with_nobody(script: Script) -> None:
    leader = script.call(0, 20)
    script.serve(script.run(leader, 1, 15), leader, shared=True)


BAD: tuple[tuple[str, Callable[[Script], None]], ...] = (
    ("answered", never_ends),
    ("answered", ends_twice),
    ("origin", of_another_key),
    ("origin", of_nowhere),
    ("origin", a_value_of_what_failed),
    ("origin", missing_without_reason),
    ("overlap", comes_after_it_was_settled),
    ("waits", does_not_wait),
    ("one", two_at_a_time),
    ("one", two_at_a_time_and_a_forget_before),
    ("one", three_at_a_time_and_one_forget),
    ("one", two_at_a_time_of_which_one_is_still_wanted),
    ("forget", after_a_forget),
    ("own", another_outcome_than_its_own),
    ("own", runs_twice),
    ("own", a_leader_that_timed_out),
    ("lost", what_happened_to_another),
    ("lost", the_value_of_a_lost_leader),
    ("same", a_copy),
    ("shared", told_differently),
    ("shared", not_told_to_be_shared),
    ("shared", shared_with_nobody),
)


@pytest.mark.parametrize(("rule", "write"), BAD, ids=[write.__name__ for _, write in BAD])
def test_a_bad_history_is_refused_by_the_name_of_its_rule(
    rule: str, write: Callable[[Script], None]
) -> None:
    script = Script()
    write(script)
    assert script.rules() == [rule]


def test_every_rule_has_a_bad_history() -> None:
    assert {rule for rule, _ in BAD} == set(RULES)


# -- good ones ------------------------------------------------------------------------------------


def nothing(script: Script) -> None:
    pass


def a_leader_is_lost(script: Script) -> None:
    leader, heir, follower = script.call(0, 20), script.call(2, 40), script.call(3, 41)
    lost = script.run(leader, 1, 15, End.LOST)
    script.leave(leader, Outcome.OWN).source = lost.number
    script.serve(script.run(heir, 21, 35), heir, follower)


def forgotten_while_it_runs(script: Script) -> None:
    script.forget(3, 4)
    two_at_a_time(script)


def forgotten_and_then_lost(script: Script) -> None:
    """Its heir runs beside the new one, and began later than that."""
    leader, heir = script.call(0, 10), script.call(1, 40)
    lost = script.run(leader, 2, 9, End.LOST)
    script.leave(leader, Outcome.OWN).source = lost.number
    script.forget(3, 4)
    newcomer = script.call(5, 50)
    script.serve(script.run(newcomer, 6, 45), newcomer)
    script.serve(script.run(heir, 11, 35), heir)


def abandoned(script: Script) -> None:
    left = script.leave(script.call(0, 4, how="do_async"), leaving=3)
    script.run(left, 1, 15, End.LOST)
    leader = script.call(5, 20)
    script.serve(script.run(leader, 6, 15), leader)


def a_forget_that_has_not_returned(script: Script) -> None:
    led_and_followed(script)
    script.forget(2, None)


def shared_with_one_that_has_left(script: Script) -> None:
    shared_with_nobody(script)
    script.leave(script.call(2, 19))


def missing(script: Script) -> None:
    leader, follower = script.call(0, 20, how="do_many"), script.call(2, 21)
    execution = script.run(leader, 1, 15, End.MISSING)
    script.serve(execution, leader)
    script.leave(follower, Outcome.MISSING)


@pytest.mark.parametrize(
    "write",
    [
        nothing,
        led_and_followed,
        a_leader_is_lost,
        forgotten_while_it_runs,
        forgotten_and_then_lost,
        abandoned,
        a_forget_that_has_not_returned,
        shared_with_one_that_has_left,
        missing,
    ],
)
def test_a_good_history_is_allowed(write: Callable[[Script], None]) -> None:
    script = Script()
    write(script)
    assert script.rules() == []


def test_on_abandon_finish_keeps_an_execution_joinable() -> None:
    script = Script(cancels=False)
    abandoned(script)
    assert script.rules() == ["one"]


# -- processes ------------------------------------------------------------------------------------


def two_processes() -> tuple[Script, Script, Call, Execution]:
    """One leads in the first, and the other's call is served by it."""
    first, second = Script(1, plain=True), Script(2, plain=True)
    leader, follower = first.call(0, 20), second.call(5, 30)
    execution = first.run(leader, 1, 15)
    first.serve(execution, leader, follower)
    return first, second, follower, execution


def test_an_outcome_may_come_late_to_another_process() -> None:
    first, second, _, execution = two_processes()
    late = second.call(25, 30)  # joins who waits there
    first.serve(execution, late, shared=True)
    assert first.rules(second) == []


def test_nobody_joins_what_was_settled_before_its_process_came() -> None:
    first, second, follower, _ = two_processes()
    follower.begun = 21
    assert first.rules(second) == ["overlap"]
    leader = second.call(19, 20)
    assert first.rules(second) == ["answered", "overlap"]
    second.leave(leader)  # and leads on
    assert first.rules(second) == []


@pytest.mark.parametrize("processes", [1, 2])
def test_who_learns_late_that_there_is_nothing_has_met_somebody(processes: int) -> None:
    scripts = [Script(number, plain=True) for number in range(1, processes + 1)]
    first, last = scripts[0], scripts[-1]
    leader = first.call(0, 20, how="do_many")
    first.serve(first.run(leader, 1, 15, End.MISSING), leader)
    last.forget(2, 3)  # so that the next one asks the backend, even in the same process
    follower = last.leave(last.call(4, 30), Outcome.MISSING)
    last.leave(last.call(25, 30), Outcome.MISSING)
    assert first.rules(*scripts[1:]) == []
    last.history.calls.remove(follower)
    assert first.rules(*scripts[1:]) == ["origin"]


def test_a_thread_that_waits_for_another_process_waits_on_when_its_caller_has_left() -> None:
    """So it is counted, even by a leader that comes later; a coroutine's task ends."""
    first, second = Script(1, plain=True), Script(2, plain=True)
    leader = first.call(10, 20)
    first.serve(first.run(leader, 11, 15), leader, shared=True)
    left = second.leave(second.call(0, 4, how="do_future"))
    assert first.rules(second) == []
    left.how = "do_async"
    assert first.rules(second) == ["shared"]


def test_a_forget_holds_in_all_processes() -> None:
    first, second, follower, _ = two_processes()
    follower.begun = 8
    third = Script(3, plain=True)
    third.forget(4, 6)
    assert first.rules(second, third) == ["forget"]
    third.history.forgets[0].scope = "process"
    assert first.rules(second, third) == []
    third.history.forgets[0].process = 2
    assert first.rules(second, third) == ["forget"]
    third.history.forgets[0].scope = "nobody"
    assert first.rules(second, third) == []


def test_processes_apart_may_lead_for_one_key_at_a_time() -> None:
    scripts = [Script(number, plain=True) for number in (1, 2)]
    for script in scripts:
        leader = script.call(0, 20)
        script.serve(script.run(leader, 1, 15), leader)
    assert scripts[0].rules(scripts[1]) == ["one"]
    assert scripts[0].rules(scripts[1], apart=True) == []


def test_a_forget_is_good_for_all_who_ask_the_backend_then() -> None:
    scripts = [Script(number, plain=True) for number in (1, 2, 3)]
    for script in scripts:
        leader = script.call(0, 20)
        script.serve(script.run(leader, 5, 15), leader)
    assert scripts[0].rules(*scripts[1:]) == ["one"]
    scripts[2].forget(1, 2)
    assert scripts[0].rules(*scripts[1:]) == []
    scripts[2].history.forgets[0].ended = -1
    assert scripts[0].rules(*scripts[1:]) == ["one"]


def test_a_history_goes_to_another_process() -> None:
    script = Script()
    led_and_followed(script)
    copy: History = pickle.loads(pickle.dumps(script.history.strip()))
    assert check(copy) == []
    assert len(copy.calls) == 2


# -- the rules against a search -------------------------------------------------------------------


def linearizable(script: Script) -> bool:
    """Whether some order of points explains a history of one key, by trying all of them.

    The sequential specification: an execution can be begun if none runs; a call joins one that
    runs; it is settled, after its function's end; a call is answered after that. Every function
    begins at its own call's invocation, and nothing is forgotten.
    """
    history = script.history
    executions = list(history.executions.values())
    points = sorted(
        {time for call in history.calls for time in (call.begun, call.ended or 0)}
        | {time for e in executions for time in (e.begun, e.ended or 0)}
    )
    for settled in itertools.product(points, repeat=len(executions)):
        ends = dict(zip((e.number for e in executions), settled, strict=True))
        if all((e.ended or 0) <= ends[e.number] for e in executions) and all(
            call.source in ends and call.begun <= ends[call.source] <= (call.ended or 0)
            for call in history.calls
        ):
            running = sorted((e.begun, e.ended or 0) for e in executions)
            if all(one[1] <= other[0] for one, other in itertools.pairwise(running)):
                return True
    return False


def test_the_rules_agree_with_a_search_on_small_histories() -> None:
    random_ = random.Random(6)
    verdicts = [0, 0]
    for _ in range(1500):
        script = Script()
        calls = [script.call(begun, begun + random_.randrange(1, 12)) for begun in (0, 3, 6)]
        leaders = calls[: random_.randrange(1, 3)]
        executions = [
            script.run(
                leader, leader.begun + random_.randrange(2), leader.begun + random_.randrange(2, 6)
            )
            for leader in leaders
        ]
        for leader, execution in zip(leaders, executions, strict=True):
            script.serve(execution, leader)
        for call in calls[len(leaders) :]:
            script.serve(random_.choice(executions), call)
        for call in calls:
            call.shared = None
        allowed = not set(script.rules()) & {"overlap", "waits", "one"}
        assert allowed == linearizable(script), [str(call) for call in calls]
        verdicts[allowed] += 1
    assert min(verdicts) > 100


# -- recording ------------------------------------------------------------------------------------


def test_a_recorded_history_of_a_flight_is_allowed() -> None:
    history, flight = History(), ShardedFlight()
    start = threading.Barrier(4)

    def caller() -> None:
        start.wait()
        for number in range(50):
            call = history.invoke("k", "do")

            def function(call: Call = call, number: int = number) -> Any:
                execution = history.begin(call)
                if number % 5 == 0:
                    raise history.error(execution)
                return history.value(execution)

            try:
                value, shared = flight.do(function, "k")
            except NamedError as error:
                history.raised(call, error)
            else:
                history.returned(call, value, shared)

    threads = [threading.Thread(target=caller) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert check(history) == []
    assert len(history.calls) == 200


def test_what_is_wrong_with_an_outcome_is_recorded() -> None:
    history = History()
    leader, follower = history.invoke("k", "do"), history.invoke("k", "do")
    execution = history.begin(leader)
    error = history.error(execution)
    history.raised(leader, error)
    history.raised(follower, error)
    assert not leader.flaw
    assert "own object" in follower.flaw
    other = NamedError({"k": execution.number})
    other.numbers = {}
    history.raised(follower, other)
    assert "attribute" in follower.flaw
    history.raised(leader, other)
    assert "very object" in leader.flaw
    running = history.begin(history.invoke("k", "do"))
    value = history.value(running)
    history.returned(follower, type(value)(running.number), True)
    assert "very object" in follower.flaw
    history.returned(follower, None, True)
    assert "None" in follower.flaw
