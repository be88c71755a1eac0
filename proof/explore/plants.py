"""Faults that are planted, to see that they are found.

Each is a small change to the source of one function of the flight, which is compiled anew with it:
if the source is not what was expected, that is an error, not a fault that can not be found.
"""

import ast
import contextlib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import shardedflight._core as core
import shardedflight._deadlock as deadlock
import shardedflight._flight as flight
import shardedflight._many as many
import shardedflight._waiting as waiting

__all__ = ["PLANTS", "Plant"]


@dataclass(frozen=True)
class Plant:
    """A fault."""

    name: str
    #: The scenario that has to find it.
    scenario: str
    #: Where: the class or module, and the function's name.
    owner: Any
    function: str
    #: What of its source is replaced, by what; each is there once. The source begins at the left.
    changes: dict[str, str]

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        """Has the fault while it lasts."""
        old: FunctionType = vars(self.owner)[self.function]
        new = self._changed(old)
        setattr(self.owner, self.function, new)
        if old.__code__ in deadlock.leading_code:
            deadlock.leading_code.add(new.__code__)
        try:
            yield
        finally:
            setattr(self.owner, self.function, old)

    def _changed(self, old: FunctionType) -> FunctionType:
        source = textwrap.dedent(inspect.getsource(old))
        for before, after in self.changes.items():
            if source.count(before) != 1:
                raise ValueError(f"{self.name}: {before!r} is not once in {old.__qualname__}")
            source = source.replace(before, after)
        tree = ast.parse(source)
        ast.increment_lineno(tree, old.__code__.co_firstlineno - 1)
        code = compile(tree, old.__code__.co_filename, "exec", dont_inherit=True)
        names: dict[str, Any] = {}
        exec(code, old.__globals__, names)
        (new,) = names.values()
        new.__kwdefaults__ = old.__kwdefaults__
        new.__qualname__ = old.__qualname__
        assert isinstance(new, FunctionType)
        return new


PLANTS = (
    Plant(
        "get, then set",  # where `setdefault` does both at once
        "two",
        core.Core,
        "do",
        {
            "        if shard.table.setdefault(h, seat) is seat and (": (
                "        head = shard.table.get(h)\n"
                "        if head is None:\n"
                "            shard.table[h] = head = seat\n"
                "        if head is seat and ("
            ),
        },
    ),
    Plant(
        "looks, then unlinks",  # the leader's side of Dekker's argument
        "two",
        core.Core,
        "do",
        {
            "            del shard.table[h]\n": (
                "            met = shard.any_met\n            del shard.table[h]\n"
            ),
            "            if not shard.any_met:": "            if not met:",
        },
    ),
    Plant(
        "no second look",  # the newcomer's side
        "two",
        core.Shard,
        "_meet",
        {
            "if self.get(h) is seat:": "if True:",
        },
    ),
    Plant(
        "joins outside the lock",
        "two",
        core.Shard,
        "follow",
        {
            (
                "            if record is not None and record.joinable:\n"
                "                record.waiters[waiter] = loop\n"
                "                return record"
            ): (
                "        if record is not None and record.joinable:\n"
                "            record.waiters[waiter] = loop\n"
                "            return record"
            ),
        },
    ),
    Plant(
        "wakes, then publishes",
        "two",
        core.Shard,
        "settle",
        {
            "        served = count_served(waiters)\n": (
                "        served = count_served(waiters)\n"
                "        for waiter in waiters:\n"
                "            waiter.wake(record)\n"
            ),
        },
    ),
    Plant(
        "rings, then tells",
        "two",
        waiting.Sleeper,
        "wake",
        {
            ("    self.news.append((execution, False))\n    self.ring()"): (
                "    self.ring()\n    self.news.append((execution, False))"
            ),
        },
    ),
    Plant(
        "does not wake the last",
        "three",
        flight,
        "wake_all",
        {
            "(execution.waiters or {}).items()": (
                "list(execution.waiters.items())[: max(1, len(execution.waiters) - 1)]"
            ),
        },
    ),
    Plant(
        "unlinks whoever is there",  # the identity check at the end
        "newcomer",
        core.Shard,
        "unlink",
        {
            (
                "    if self.table.get(h) is not seat:\n"
                "        return False\n"
                "    del self.table[h]\n"
            ): ("    if self.table.pop(h, None) is None:\n        return False\n"),
        },
    ),
    Plant(
        "forget unlinks",
        "forget",
        core.Shard,
        "forget_seat",
        {
            "record.joinable = False": "record.joinable = not self.unlink(h, seat)",
        },
    ),
    Plant(
        "overflow not looked at",
        "newcomer",
        core.Core,
        "do",
        {
            "not shard.any_beside or h not in shard.overflow": "True",
        },
    ),
    Plant(
        "goes beside unseen",
        "freed",
        core.Shard,
        "_link_beside",
        {
            "if holder is head:": "if holder is not None:",
        },
    ),
    Plant(
        "overflow seen once",
        "newcomers_join",
        core.Shard,
        "_lead",
        {
            "elif changes != self.overflow_changes or not": "elif not",
        },
    ),
    Plant(
        "leaves after the end",
        "timeout",
        core.Shard,
        "leave",
        {
            "record.end is not None or waiter not in": "waiter not in",
        },
    ),
    Plant(
        "leaves when it is told",
        "timeout",
        flight.ShardedFlight,
        "_follow",
        {
            "                    sleeper.wait()\n": "",
        },
    ),
    Plant(
        "promotes two",
        "lost_two",
        flight.ShardedFlight,
        "_conclude",
        {
            "        if offer(record, heir, gone):\n": (
                "        if offer(record, heir, gone):\n"
                "            for other in list(record.waiters)[:1]:\n"
                "                offer(record, other, gone)\n"
            ),
        },
    ),
    Plant(
        "promotes one that left",
        "loop_heirs",
        flight.ShardedFlight,
        "_withdraw",
        {
            "if record.leader is waiter:": "if record.leader is None:",
        },
    ),
    Plant(
        "looks, then waits",  # the edge is entered after the search for a cycle
        "cycle_begun",
        deadlock,
        "_enter",
        {
            (
                "            blocked[me] = executions if outer is None"
                " else _Nested(executions, outer)\n"
            ): "",
            "_roots_of(thread):\n                        return": (
                "_roots_of(thread):\n                        blocked[me] = executions\n"
                "                        return"
            ),
            "        with _lock:\n": (
                "        if future is None:\n"
                "            blocked[me] = executions\n"
                "        with _lock:\n"
            ),
        },
    ),
    Plant(
        "found by two",  # the edge of a wait that was refused is still seen
        "cycle_waits",
        deadlock,
        "_enter",
        {
            (
                "            if cycle is not None:\n                _end(executions, future)"
            ): "            pass",
        },
    ),
    Plant(
        "hears one of two",
        "many_crossing",
        many._Batch,
        "hear",
        {
            "while waiter.news:": "for _ in waiter.news[:1]:",
        },
    ),
    Plant(
        "gives to who is busy",  # the heir runs a function, which waits for what it is to lead
        "many_heir",
        flight,
        "held_up",
        {
            "return waiter.leads is not None": "return False",
        },
    ),
    Plant(
        "forgets the loops",  # a thread that waits asks only whether the leader's thread does
        "inner_loop",
        deadlock,
        "_enter",
        {
            " and not _roots_of(thread)": "",
        },
    ),
    Plant(
        "takes inner for outer",  # what is led by a call on the loop seems to need the loop
        "inner_busy",
        deadlock,
        "_needed_on",
        {
            "id(execution.seat) in root.seats and ": "",
        },
    ),
    Plant(
        "joins the dying",
        "loop_abandoned",
        core.Shard,
        "_deserted",
        {
            "    record.joinable = False\n": "",
        },
    ),
    Plant(
        "wakes no loop",
        "loop_thread",
        waiting,
        "_call_soon",
        {
            "(loop.call_soon if here else loop.call_soon_threadsafe)": "loop.call_soon",
        },
    ),
)
