"""The protocol of the Redis tier as a model: processes, their callers, one name, and an adversary.

**A caller** goes through the phases below as `Tier.lead` and `RedisBackend` take it: it joins what
its own process has, or asks the server; follows or leads; is answered. A phase changes where the
code takes a lock, hands a task to the keeper, or waits; what lies between is one step.

**A process** has one connection for commands, which answers in order, and one for messages. Either
may be cut: commands that were not answered are sent again, messages are lost.

**The adversary** may, as often as the scenario allows: kill a process; stop one for so long that
its lease ends; lose a message; cut either connection, with commands that the server has still to
read; have the server refuse; restart it empty. Callers may leave, and forget. Processes and the
server take turns in every possible way, which is what a stopped process is, too.

**What has to hold** is said in `Protocol.wrong`, `_World.answer`, `_World.lead` and
`_World.execute`, and in `checker` for progress. What is only there to say it, and no part of the
protocol, is called a ghost.
"""

from collections.abc import Iterator
from typing import NamedTuple

from .checker import FAULT, STEP, TIME
from .server import EMPTY, Execution, Message, Server, Store

__all__ = ["Call", "Client", "Process", "Protocol", "Request", "Scenario", "State"]

#: A caller has not come yet; waits for its process's inbox to be known, for the answer to JOIN, for
#: a message, for the keeper to join again; runs its function for all, or for its own process; waits
#: for the answer to DONE; follows a caller of its own process; has its answer; has left; is dead.
IDLE, OPENING, JOINING, FOLLOWING, AGAIN = "idle", "opening", "joining", "following", "again"
RUNNING, ALONE, ENDING, LOCAL = "running", "alone", "ending", "local"
ANSWERED, LEFT, DEAD = "answered", "left", "dead"
_OVER = frozenset((IDLE, ANSWERED, LEFT, DEAD))
#: Its turn is not done.
_PENDING = frozenset((OPENING, JOINING, FOLLOWING, AGAIN))
#: Any message may be about it.
_ASKING = frozenset((OPENING, JOINING))

#: What the adversary can do.
CRASH, STALL, LOSE, CUT = "crash", "stall", "lose", "cut"
KILL, REFUSE, RESTART = "kill", "refuse", "restart"


class Scenario(NamedTuple):
    """How large the space is.

    Attributes:
        callers: The process of each, in the order of processes.
        faults: How many there are at the most.
        kinds: Which.
        forgets: How often the key is forgotten at the most.
        leaves: How many callers leave.
        beats: Renewals are steps of their own, rather than taken for granted.
        hold: Outcomes serve later callers, too.
        large: Outcomes do not go with messages.
    """

    callers: tuple[int, ...] = (0, 1)
    faults: int = 0
    kinds: tuple[str, ...] = (CRASH, STALL, LOSE, CUT, KILL, REFUSE, RESTART)
    forgets: int = 0
    leaves: int = 0
    beats: bool = False
    hold: bool = False
    large: bool = False


class Call(NamedTuple):
    """A caller, and the turn of its process that it leads."""

    process: int
    phase: str = IDLE
    #: The turn's `token`, `followed` and `forgotten`.
    token: int = 0
    followed: int = 0
    forgotten: int = 0
    #: The number by which its process is entered in what it follows.
    entered: int = 0
    #: Under which token its function runs, or has run.
    led: int = 0
    #: How often the keeper has been told to join again.
    again: int = 0
    #: The watchdog is set.
    watched: bool = False
    #: It has left while its turn was asked for.
    left: bool = False
    #: Whom in its process it follows.
    via: int = -1
    #: Ghosts, as bits: the tokens by which it must not be served; whether it has asked the server.
    stale: int = 0
    asked: bool = False


class Request(NamedTuple):
    """A command on its way, or its answer on the way back."""

    script: str
    call: int
    #: Of JOIN the number, else the token.
    number: int = 0
    #: Of JOIN the token that was followed; of LEAVE the number.
    followed: int = 0
    reply: tuple[int, ...] | None = None
    repeated: bool = False
    #: A ghost: the tokens that were forgotten when the server had done it.
    forgotten: int = 0

    def can_be_dropped(self, c: int) -> bool:
        """Whether it is the caller's, to join, and was not sent."""
        return (self.script, self.call, self.reply, self.repeated) == ("join", c, None, False)


class Process(NamedTuple):
    """One process, and its two connections."""

    alive: bool = True
    #: 0: the server does not know its inbox; 1: it does; 2: and the process knows that.
    inbox: int = 0
    messages: tuple[Message, ...] = ()
    requests: tuple[Request, ...] = ()
    #: `_Follow.early`.
    early: tuple[Message, ...] = ()
    #: Whom callers of this process join.
    seat: int = -1
    #: A ghost: the tokens that this process has heard to be forgotten.
    told: int = 0


class State(NamedTuple):
    """All of it."""

    store: Store
    processes: tuple[Process, ...]
    calls: tuple[Call, ...]
    #: Commands of connections that are cut, which the server may still read.
    late: tuple[Request, ...]
    faults: int
    forgets: int
    leaves: int
    #: Ghosts: how many more executions than one the faults so far excuse; whether they excuse that
    #: somebody waits for time to pass; tokens as bits.
    excused: int = 0
    patient: bool = False
    ended: int = 0
    forgotten: int = 0
    announced: int = 0
    published: int = 0
    bad: str = ""


class Client:
    """What a planted fault of a process changes. True, or as it should be."""

    #: Joins only when its inbox is known.
    subscribes_first = True
    #: Joins again when no message has come in time.
    has_watchdog = True
    #: Keeps messages that come before the answer that they belong to.
    keeps_early = True
    #: Looks for which token a message is.
    compares_tokens = True
    #: Says what it has followed when it joins again.
    says_followed = True
    #: Hands over what it leads when its caller is lost, and what it comes to lead too late.
    gives_up = True
    gives_back = True
    #: Hears that others have forgotten.
    hears_forget = True
    hears_while_ending = True
    hears_while_opening = True
    #: Does not ask again while it asks.
    asks_once = True
    #: Tells the server that it follows no more; also when it had left before it was answered.
    says_left = True
    says_left_late = True


class _World:
    """A state that is being changed."""

    def __init__(self, model: "Protocol", state: State) -> None:
        self.model = model
        self.scenario, self.client, self.server = model.scenario, model.client, model.server
        self.store = state.store
        self.processes = list(state.processes)
        self.calls = list(state.calls)
        self.late = state.late
        self.faults, self.forgets, self.leaves = state.faults, state.forgets, state.leaves
        self.excused, self.patient = state.excused, state.patient
        self.ended, self.published = state.ended, state.published
        self.forgotten, self.announced = state.forgotten, state.announced
        self.bad = state.bad

    def freeze(self) -> State:
        """The state, without ghosts that can tell nothing any more, so that states are alike."""
        processes, ended, forgotten = tuple(self.processes), self.ended, self.forgotten
        if not any(call.phase == IDLE for call in self.calls):
            ended = 0
            processes = tuple(p._replace(told=0) if p.told else p for p in processes)
            if all(call.asked or call.phase in _OVER for call in self.calls):
                forgotten = 0
        return State(
            self.store,
            processes,
            tuple(self.calls),
            self.late,
            self.faults,
            self.forgets,
            self.leaves,
            self.excused,
            self.patient,
            ended,
            forgotten,
            self.announced,
            self.published,
            self.bad,
        )

    def call(self, c: int, **changes: object) -> None:
        self.calls[c] = self.calls[c]._replace(**changes)  # type: ignore[arg-type]

    def process(self, p: int, **changes: object) -> None:
        self.processes[p] = self.processes[p]._replace(**changes)  # type: ignore[arg-type]

    def over(self, c: int, phase: str) -> None:
        """The caller is done with. What it was matters no more, so that states are alike."""
        call = self.calls[c]
        self.calls[c] = Call(call.process, phase, led=call.led)

    def of(self, p: int) -> list[int]:
        return [c for c, call in enumerate(self.calls) if call.process == p]

    # -- callers ----------------------------------------------------------------------------------

    def start(self, c: int) -> None:
        """`Tier.check`, then it joins its process's leader or leads."""
        p = self.calls[c].process
        process = self.processes[p]
        asks = False
        if process.seat >= 0:
            turn = self.calls[process.seat]
            known = turn.token or turn.followed
            if 0 < known <= turn.forgotten:
                process = process._replace(seat=-1)
                self.processes[p] = process
            asks = known == 0 and turn.phase in _ASKING
        stale = process.told
        if process.seat < 0 and not self.scenario.hold:
            stale |= self.ended
        if self.faults == self.scenario.faults:
            on_the_way = sum(1 << m.token for m in process.messages if m.kind == "f")
            stale |= self.announced & ~on_the_way
        if process.seat >= 0 and asks:
            # What was heard since it asks may be what it is going to follow: nobody knows yet.
            stale = self.calls[process.seat].stale
        if process.seat >= 0:
            self.call(c, phase=LOCAL, via=process.seat, stale=stale)
        else:
            self.process(p, seat=c)
            self.call(c, phase=OPENING, stale=stale)
            if process.inbox == 2 or not self.client.subscribes_first:
                self.join(c)
            elif process.inbox == 0:
                # When does not matter, for before it is known nothing is asked.
                self.subscribe(p)

    def join(self, c: int) -> None:
        """`_join`, once the inbox is known."""
        call = self.calls[c]
        if call.left:
            self.drop(c)
            return
        p = call.process
        late = (request for request in self.late if self.calls[request.call].process == p)
        requests = [*late, *self.processes[p].requests]
        used = {request.number for request in requests if request.script == "join"}
        used.update(request.followed for request in requests if request.script == "leave")
        used.update(self.calls[other].entered for other in self.of(p))
        for execution in self.store.executions():
            used.update(number for inbox, number in execution.followers if inbox == p)
            if execution.leader == p:
                used.add(execution.number)
        number = next(n for n in range(1, 100) if n not in used)
        followed = call.followed if self.client.says_followed else 0
        self.call(c, phase=JOINING)
        self.send(call.process, Request("join", c, number, followed))

    def drop(self, c: int) -> None:
        """What is not sent, for its caller has left: `_Join.wanted`."""
        p = self.calls[c].process
        requests = self.processes[p].requests
        self.process(p, requests=tuple(r for r in requests if not r.can_be_dropped(c)))
        self.unfollow(c)
        self.over(c, LEFT)
        self.clear_early(p)

    def unfollow(self, c: int) -> None:
        """`_leave`: its process does not wait any more, if no other caller does."""
        call = self.calls[c]
        self.call(c, entered=0)
        others = (self.calls[other] for other in self.of(call.process) if other != c)
        if (
            call.entered
            and self.client.says_left
            and not any(o.phase in _PENDING and o.followed == call.followed for o in others)
        ):
            self.send(call.process, Request("leave", c, call.followed, call.entered))

    def leave(self, c: int) -> None:
        """The caller is cancelled, or interrupted. Another one of its process takes over."""
        self.leaves -= 1
        call = self.calls[c]
        if call.phase in (RUNNING, ENDING):
            self.over(c, LEFT)
            if self.client.gives_up:
                self.send(call.process, Request("give", c, call.led))
        elif call.phase in (OPENING, JOINING):
            self.call(c, left=True)
            self.unfollow(c)
        else:
            self.unfollow(c)
            self.over(c, LEFT)
        here = [other for other in self.of(call.process) if self.calls[other].via == c]
        if here:
            heir, *rest = here
            self.call(heir, phase=OPENING, via=-1)
            for other in rest:
                self.call(other, via=heir)
        if self.processes[call.process].seat == c:
            self.process(call.process, seat=here[0] if here else -1)

    def end(self, c: int) -> None:
        """The function returns."""
        call = self.calls[c]
        if call.phase == ALONE:
            self.answer(c, c)
        else:
            self.call(c, phase=ENDING)
            self.send(call.process, Request("done", c, call.led))

    def answer(self, c: int, payload: int) -> None:
        """The caller, and those of its process who follow it, have the outcome of `payload`."""
        call = self.calls[c]
        for other in (c, *self.of(call.process)):
            one = self.calls[other]
            if other == c or one.via == c:
                if one.stale >> self.calls[payload].led & 1:
                    self.bad = "a caller has an outcome of before it came, or that was forgotten"
                self.over(other, ANSWERED)
        if self.processes[call.process].seat == c:
            self.process(call.process, seat=-1)

    def answer_from(self, c: int, token: int, payload: int) -> None:
        """The turn has the outcome of another process."""
        if self.calls[payload].led != token:
            self.bad = "an outcome is handed out under the token of another execution"
        self.settle(c, payload)

    def settle(self, c: int, payload: int) -> None:
        if self.calls[c].left:
            self.over(c, LEFT)
        else:
            self.answer(c, payload)

    def lead(self, c: int, token: int) -> None:
        """The function runs under a token."""
        followed = self.calls[c].followed
        if (
            self.published >> followed & 1
            and followed
            and not self.excused
            and self.forgets == self.scenario.forgets
        ):
            self.bad = "who has followed an execution whose outcome was published runs its own"
        self.call(c, phase=RUNNING, led=token, token=token, entered=0, again=0, watched=False)

    def alone(self, c: int) -> None:
        """The turn has failed: the function runs for its own process."""
        if self.calls[c].left:
            self.over(c, LEFT)
        else:
            self.call(c, phase=ALONE, entered=0, again=0, watched=False)

    # -- commands ---------------------------------------------------------------------------------

    def send(self, p: int, request: Request) -> None:
        self.process(p, requests=(*self.processes[p].requests, request))

    def forget(self, p: int) -> None:
        self.forgets -= 1
        self.send(p, Request("forget", -1))

    def execute(self, p: int, at: int) -> None:
        """The server does the next command of a process."""
        requests = self.processes[p].requests
        request = self.run(requests[at])
        unanswered = request.script in ("give", "beat", "leave") or not self.processes[p].alive
        kept = () if unanswered else (request,)
        self.process(p, requests=(*requests[:at], *kept, *requests[at + 1 :]))

    def run(self, request: Request) -> Request:
        before, server = self.store, self.server
        c, token = request.call, request.number
        match request.script:
            case "join":
                if not self.calls[c].asked:
                    self.call(c, asked=True, stale=self.calls[c].stale | self.forgotten)
                inbox = self.calls[c].process
                result = server.join(before, inbox, token, request.followed)
                lead = result[0].f
                if before.f is None and lead is not None and lead.token <= before.clock:
                    self.bad = "a token is given a second time"
            case "done":
                result = server.done(before, token, c, self.scenario.hold, self.scenario.large)
                if result[1][0] >= 0:
                    self.published |= 1 << token
                    self.count(before, token)
            case "give":
                result = server.give(before, token)
            case "leave":
                process = self.calls[c].process
                result = server.leave(before, token, process, request.followed)
            case "beat":
                result = server.beat(before, token)
                for execution in before.executions():
                    after = result[0].find(execution.token)
                    if execution.token != token and after != execution:
                        self.bad = "a lease is renewed by another than its leader"
            case _:
                if before.f is not None:
                    self.announced |= 1 << before.f.token
                if before.r is not None:
                    self.forgotten |= 1 << before.r.token
                self.forgotten |= self.announced
                result = server.forget(before)
        self.store, reply, messages = result
        for message in messages:
            process = self.processes[message.to]
            if process.alive and process.inbox:
                self.process(message.to, messages=(*process.messages, message))
        return request._replace(reply=reply, forgotten=self.forgotten)

    def count(self, before: Store, token: int) -> None:
        """Whom an end is shared with: somebody waits there, or has left only just now."""
        execution = before.find(token)
        if execution is None or self.faults < self.scenario.faults:
            return
        for p, _ in execution.followers:
            waits = any(
                self.calls[c].phase in _ASKING
                or (self.calls[c].phase in _PENDING and self.calls[c].followed == token)
                for c in self.of(p)
            )
            leaves = any(
                (r.script, r.number) == ("leave", token) for r in self.processes[p].requests
            )
            if not waits and not leaves:
                self.bad = "an outcome is shared with a process in which nobody waits"

    def receive(self, p: int) -> None:
        """The next answer arrives."""
        request, *rest = self.processes[p].requests
        self.process(p, requests=tuple(rest))
        assert request.reply is not None
        c = request.call
        if request.script == "join":
            self.joined(c, request.number, *request.reply)
        elif request.script == "done":
            if self.calls[c].phase == ENDING:
                self.ended |= 1 << request.number
                self.answer(c, c)
        else:
            self.process(p, told=self.processes[p].told | request.forgotten, seat=-1)

    def joined(self, c: int, number: int, kind: int, token: int, payload: int = 0) -> None:
        """`_joined`."""
        call = self.calls[c]
        if kind == 1:
            if call.phase in (OPENING, JOINING, FOLLOWING):
                self.follow(c, number, token)
        elif kind == 2:
            if call.phase in _PENDING:
                self.answer_from(c, token, payload)
        elif call.phase in _PENDING and not call.left:
            self.lead(c, token)
        else:
            if call.phase in _PENDING:
                self.over(c, LEFT)
            elif call.phase in (RUNNING, ENDING):
                if self.faults == self.scenario.faults:
                    self.bad = "a caller that leads has come to lead a second time"
                self.call(c, token=token)
            if self.client.gives_back:
                self.send(call.process, Request("give", c, token))
        self.clear_early(call.process)

    def follow(self, c: int, number: int, token: int) -> None:
        """`_follow`."""
        call = self.calls[c]
        self.call(c, token=token, followed=token, entered=number)
        for other in self.of(call.process):
            if self.calls[other].phase in _PENDING and self.calls[other].followed == token:
                self.call(other, entered=number)
        if call.left:
            if self.client.says_left_late:
                self.unfollow(c)
            self.over(c, LEFT)
            return
        early = [m for m in self.processes[call.process].early if m.token == token]
        if early:
            self.news(c, early[0])
        else:
            self.call(c, phase=FOLLOWING, watched=self.client.has_watchdog)

    def is_asking(self, p: int) -> bool:
        return any(self.calls[c].phase in _ASKING for c in self.of(p))

    def clear_early(self, p: int) -> None:
        """`_remove`: kept as long as a turn is asked for."""
        if self.processes[p].early and not self.is_asking(p):
            self.process(p, early=())

    # -- messages, and the keeper -----------------------------------------------------------------

    def subscribe(self, p: int) -> None:
        confirmed = Message(p, "s", 0)
        self.process(p, inbox=1, messages=(*self.processes[p].messages, confirmed))

    def hear(self, p: int) -> None:
        """`hear`, or the confirmation of a subscription."""
        message, *rest = self.processes[p].messages
        self.process(p, messages=tuple(rest))
        here = self.of(p)
        if message.kind == "s":
            self.process(p, inbox=2)
            for c in here:
                if self.calls[c].phase == FOLLOWING:
                    self.rejoin(c)
        elif message.kind == "f":
            self.process(p, told=self.processes[p].told | 1 << message.token)
            for c in here if self.client.hears_forget else ():
                self.hear_forgotten(c, message.token)
        else:
            following = [c for c in here if self.calls[c].phase == FOLLOWING]
            if self.is_asking(p) and self.client.keeps_early:
                early = [m for m in self.processes[p].early if m.token != message.token]
                self.process(p, early=tuple(sorted((*early, message))))
            for c in following:
                if self.calls[c].token == message.token or not self.client.compares_tokens:
                    self.news(c, message)
            self.clear_early(p)

    def hear_forgotten(self, c: int, token: int) -> None:
        """`_forgotten`."""
        call = self.calls[c]
        asks = call.phase == JOINING or (call.phase == OPENING and self.client.hears_while_opening)
        leads = call.phase == RUNNING or (call.phase == ENDING and self.client.hears_while_ending)
        if asks or (call.phase == FOLLOWING and call.token == token):
            self.call(c, forgotten=max(call.forgotten, token))
        elif leads and call.led == token:
            self.call(c, forgotten=token)

    def news(self, c: int, message: Message) -> None:
        """`_news`."""
        if message.kind == "d":
            self.answer_from(c, message.token, message.payload)
        else:
            forgotten = 0 if message.kind == "l" else self.calls[c].forgotten
            self.call(c, phase=AGAIN, forgotten=forgotten)
            self.rejoin(c)

    def rejoin(self, c: int) -> None:
        self.call(c, again=min(2, self.calls[c].again + 1), watched=False)

    def bark(self, c: int) -> None:
        """The watchdog: nothing was heard for a lease."""
        self.rejoin(c)

    def again(self, c: int) -> None:
        """`_again`, to where it waits for the inbox."""
        call = self.calls[c]
        if call.phase in _ASKING and self.client.asks_once:
            self.call(c, again=call.again - 1)
        else:
            self.call(c, phase=OPENING, token=0, again=call.again - 1)

    # -- the adversary ----------------------------------------------------------------------------

    def fault(self, excused: int = 0, patient: bool = True) -> None:
        self.faults -= 1
        self.excused += excused
        self.patient = self.patient or patient

    def crash(self, p: int, late: bool) -> None:
        """Killed; what it has sent the server may still read."""
        self.fault()
        unread = tuple(r for r in self.processes[p].requests if r.reply is None) if late else ()
        self.processes[p] = Process(alive=False, requests=unread)
        for c in self.of(p):
            if self.calls[c].phase not in (ANSWERED, LEFT):
                self.over(c, DEAD)

    def cut(self, p: int) -> None:
        """The connection for messages."""
        failed = [c for c in self.of(p) if self.calls[c].phase == OPENING]
        self.fault(excused=bool(failed))
        self.silence(p)

    def silence(self, p: int) -> None:
        self.process(p, inbox=0, messages=())
        for c in self.of(p):
            if self.calls[c].phase == OPENING:
                self.unfollow(c)
                self.alone(c)

    def kill(self, p: int, late: bool) -> None:
        """The connection for commands; the process sends again what was not answered."""
        # What a leader asked for may be forgotten when it asks again: then it leads anew, and who
        # has followed it waits for its lease.
        self.fault(patient=late or self.scenario.forgets > 0)
        if late:
            self.leave_behind(p)
        again = tuple(
            request._replace(reply=None, repeated=True) for request in self.processes[p].requests
        )
        self.process(p, requests=again)

    def leave_behind(self, p: int) -> None:
        unread = (r for r in self.processes[p].requests if r.reply is None)
        self.late = tuple(sorted((*self.late, *unread), key=repr))

    def refuse(self, p: int, late: bool) -> None:
        """The server does not answer in time, twice: the process gives its commands up."""
        self.fault(excused=1)
        if late:
            self.leave_behind(p)
        requests = self.processes[p].requests
        self.process(p, requests=())
        for request in requests:
            c = request.call
            if request.script == "join" and self.calls[c].phase in _PENDING:
                self.alone(c)
            elif request.script == "done" and self.calls[c].phase == ENDING:
                self.answer(c, c)
            elif request.script == "forget":
                self.process(p, seat=-1)
        self.clear_early(p)

    def restart(self) -> None:
        """The server comes back empty: nobody knows who leads."""
        self.fault(excused=len(self.processes))
        self.store = self.server.restart(self.store)
        for p, process in enumerate(self.processes):
            self.silence(p)
            again = tuple(r._replace(reply=None, repeated=True) for r in process.requests)
            self.process(p, requests=again if process.alive else ())

    def stall(self, token: int) -> None:
        """A process that leads is stopped for longer than its lease."""
        self.fault(excused=1)
        self.expire(token)

    def expire(self, token: int) -> None:
        while self.store.find(token) is not None:
            self.store = self.server.tick(self.store, token)

    def lose(self, p: int) -> None:
        """A message."""
        self.fault()
        self.process(p, messages=self.processes[p].messages[1:])

    # -- time -------------------------------------------------------------------------------------

    def tick(self, token: int) -> None:
        """A third of a lease passes."""
        self.store = self.server.tick(self.store, token)

    def grow_old(self) -> None:
        """New callers are not to have the outcome any more."""
        assert self.store.r is not None
        self.store = self.store._replace(r=self.store.r._replace(fresh=False))

    def run_late(self, at: int) -> None:
        request = self.late[at]
        self.late = (*self.late[:at], *self.late[at + 1 :])
        self.run(request)


#: A step: what it is, its kind, and where it leads.
_Step = tuple[tuple[object, ...], int, State]


class Protocol:
    """The model, for `checker.check`."""

    def __init__(
        self, scenario: Scenario, server: Server | None = None, client: Client | None = None
    ) -> None:
        self.scenario = scenario
        self.server = server or Server()
        self.client = client or Client()
        count = max(scenario.callers) + 1
        #: How many callers each process has: those with as many can be taken for each other.
        self._sizes = [scenario.callers.count(p) for p in range(count)]

    def first(self) -> State:
        """Nobody has come yet."""
        scenario = self.scenario
        return State(
            EMPTY,
            tuple(Process() for _ in self._sizes),
            tuple(Call(p) for p in scenario.callers),
            (),
            scenario.faults,
            scenario.forgets,
            scenario.leaves,
        )

    def wrong(self, state: State) -> str:
        """Safety."""
        if state.bad:
            return state.bad
        running = sum(
            (call.phase == RUNNING and not state.announced >> call.led & 1)
            or (call.phase == ALONE and state.processes[call.process].seat == c)
            for c, call in enumerate(state.calls)
        )
        if running > 1 + state.excused:
            return f"{running} executions run, and faults excuse {state.excused} besides one"
        return ""

    def quiet(self, state: State) -> bool:
        """Nobody waits."""
        return all(call.phase in _OVER for call in state.calls)

    def patient(self, state: State) -> bool:
        """There were faults that excuse it."""
        return state.patient

    def steps(self, state: State) -> Iterator[_Step]:
        """What may happen."""
        for label, kind in self._labels(state):
            world = _World(self, state)
            name, *arguments = label
            getattr(world, name)(*arguments)
            yield label, kind, world.freeze()

    def _labels(self, state: State) -> Iterator[tuple[tuple[str, *tuple[int, ...]], int]]:
        begun = {call.process for call in state.calls if call.phase != IDLE}
        for c, call in enumerate(state.calls):
            yield from self._of_call(state, c, call, begun)
        for p, process in enumerate(state.processes):
            yield from self._of_process(state, p, process, begun)
        for at in range(len(state.late)):
            yield ("run_late", at), STEP
        yield from self._of_time(state)
        if state.faults and RESTART in self.scenario.kinds and begun:
            yield ("restart",), FAULT

    def _of_call(
        self, state: State, c: int, call: Call, begun: set[int]
    ) -> Iterator[tuple[tuple[str, *tuple[int, ...]], int]]:
        phase = call.phase
        if phase == IDLE:
            if self._may_come(state, c, begun):
                yield ("start", c), FAULT
            return
        if phase in (ANSWERED, LEFT, DEAD):
            return
        if phase == OPENING and (
            state.processes[call.process].inbox == 2 or not self.client.subscribes_first
        ):
            yield ("join", c), STEP
        if call.again and phase != OPENING:
            yield ("again", c), STEP
        requests = state.processes[call.process].requests
        if call.left and any(request.can_be_dropped(c) for request in requests):
            yield ("drop", c), STEP
        if phase == FOLLOWING and call.watched:
            yield ("bark", c), TIME
        if phase in (RUNNING, ALONE):
            yield ("end", c), STEP
        if state.leaves and not call.left:
            yield ("leave", c), FAULT

    def _may_come(self, state: State, c: int, begun: set[int]) -> bool:
        """Whoever can be taken for another one comes after it."""
        p = self.scenario.callers[c]
        if c and self.scenario.callers[c - 1] == p:
            return state.calls[c - 1].phase != IDLE
        return p == 0 or self._sizes[p - 1] != self._sizes[p] or p - 1 in begun

    def _of_process(
        self, state: State, p: int, process: Process, begun: set[int]
    ) -> Iterator[tuple[tuple[str, *tuple[int, ...]], int]]:
        unread = next((i for i, r in enumerate(process.requests) if r.reply is None), -1)
        if unread >= 0:
            yield ("execute", p, unread), STEP
        if not process.alive:
            return
        mine = [call for call in state.calls if call.process == p]
        if process.requests and process.requests[0].reply is not None:
            yield ("receive", p), STEP
        if process.messages:
            yield ("hear", p), STEP
        if process.inbox == 0 and any(call.phase not in _OVER for call in mine):
            yield ("subscribe", p), STEP
        if self.scenario.beats:
            yield from self._beats(state, process, mine)
        if state.forgets and p in begun:
            yield ("forget", p), FAULT
        if state.faults and p in begun:
            yield from self._faults_of(p, process, unread >= 0)

    def _beats(
        self, state: State, process: Process, mine: list[Call]
    ) -> Iterator[tuple[tuple[str, *tuple[int, ...]], int]]:
        if any(execution.due for execution in state.store.executions()):
            for c, call in enumerate(state.calls):
                request = Request("beat", c, call.led)
                if call in mine and call.phase == RUNNING and request not in process.requests:
                    yield ("send", call.process, request), STEP  # type: ignore[misc]

    def _faults_of(
        self, p: int, process: Process, unread: bool
    ) -> Iterator[tuple[tuple[str, *tuple[int, ...]], int]]:
        kinds = self.scenario.kinds
        lates = (False, True) if unread else (False,)
        if LOSE in kinds and process.messages and process.messages[0].kind != "s":
            yield ("lose", p), FAULT
        if CUT in kinds and process.inbox:
            yield ("cut", p), FAULT
        for late in lates:
            if CRASH in kinds:
                yield ("crash", p, late), FAULT
            if process.requests and KILL in kinds:
                yield ("kill", p, late), FAULT
            if process.requests and REFUSE in kinds:
                yield ("refuse", p, late), FAULT

    def _of_time(self, state: State) -> Iterator[tuple[tuple[str, *tuple[int, ...]], int]]:
        store = state.store
        for execution in store.executions():
            token = execution.token
            if self.scenario.beats and not execution.due:
                yield ("tick", token), TIME
            elif not self._is_led(state, execution):
                yield ("expire", token), TIME
            elif state.faults and STALL in self.scenario.kinds:
                yield ("stall", token), FAULT
        # That it is dropped in the end changes nothing: nobody is given it any more.
        if store.r is not None and store.r.fresh:
            yield ("grow_old",), TIME

    def _is_led(self, state: State, execution: Execution) -> bool:
        """Whether a process renews the lease, or is about to, or to hand it over."""
        token = execution.token
        if any(call.led == token and call.phase in (RUNNING, ENDING) for call in state.calls):
            return True
        for p, process in enumerate(state.processes):
            for request in process.requests if process.alive else ():
                if request.script == "give" and request.number == token:
                    return True
                if request.script == "join" and (
                    request.reply == (0, token)
                    or (
                        request.reply is None
                        and (p, request.number) == (execution.leader, execution.number)
                    )
                ):
                    return True
        return False

    def show(self, state: State) -> str:
        """The store, and each caller."""
        return _show(state)


def _show_execution(kind: str, execution: Execution) -> str:
    followers = ",".join(f"p{p}" for p, _ in sorted(execution.followers))
    return f"{kind}={execution.token}(p{execution.leader}<-{followers or '-'})"


def _show(state: State) -> str:
    store = state.store
    parts = [
        _show_execution("f", store.f) if store.f else "f=-",
        *(_show_execution("g", e) for e in store.g),
        *([f"r={store.r.token}"] if store.r else []),
    ]
    calls = [
        f"p{call.process}.{c} {call.phase}{f' {call.led or call.token}' if call.token else ''}"
        for c, call in enumerate(state.calls)
        if call.phase != IDLE
    ]
    return " ".join(parts) + " | " + ", ".join(calls)
