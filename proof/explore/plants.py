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
    #: What of its source is replaced, by what; each is there once.
    changes: tuple[tuple[str, str], ...]

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
        for before, after in self.changes:
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


Shard = core.Shard
Flight = flight.ShardedFlight

PLANTS: tuple[Plant, ...] = ()
