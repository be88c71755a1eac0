"""The keys of the soak, and what its functions do."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from random import Random

__all__ = ["KEYS", "PLAIN_KEYS", "Exit", "Interrupt", "Key", "Lost", "Plan"]


@dataclass(frozen=True, slots=True)
class Key:
    """A key: how a history calls it, and its parts."""

    text: str
    parts: tuple[Hashable, ...]


class _Twin:
    """Unequal objects of one hash, compared by code of a user's."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Twin) and self._name == other._name

    def __hash__(self) -> int:
        return 7

    def __repr__(self) -> str:
        return f"twin {self._name}"


def _keys(*keys: tuple[Hashable, ...]) -> tuple[Key, ...]:
    return tuple(Key(repr(parts), parts) for parts in keys)


#: That can go to other processes: -1 and -2, and 0 and 2**61 - 1, have one hash in CPython; a
#: tuple and its items are two keys.
PLAIN_KEYS = _keys(
    ("hot",), (-1,), (-2,), (0,), (2**61 - 1,), ("a", "b"), (("a", "b"),), (), ("cold",)
)
#: And others.
KEYS = (*PLAIN_KEYS, *_keys((_Twin("A"),), (_Twin("B"),), (_Twin("A"), _Twin("B"))))


class Lost(BaseException):
    """Loses a leader. It names the execution, or those of one run for many keys."""


class Interrupt(KeyboardInterrupt, Lost):
    """The same, as Python's own."""


class Exit(SystemExit, Lost):
    """The same, as Python's own."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a function does.

    Attributes:
        pause: How many seconds it takes; 0: it does not even suspend.
        end: "value", "error", "lost", "wrong" (it is of the wrong kind, coroutine or plain), or
            "cancel" (a coroutine that cancels itself).
        nested: It wants this key, too.
        forgets: It forgets its own key.
        forks: It forks.
    """

    pause: float
    end: str = "value"
    nested: Key | None = None
    forgets: bool = False
    forks: bool = False

    @classmethod
    def draw(cls, random: Random, keys: Sequence[Key], key: Key, *, coroutine: bool) -> "Plan":
        """One by chance, for a function of `key`."""
        pause = random.choice((0, 0, random.uniform(0, 0.001), random.uniform(0, 0.005)))
        end = random.choices(
            ("value", "error", "lost", "wrong", "cancel" if coroutine else "value"),
            (70, 14, 8, 3, 3),
        )[0]
        nested = None
        if random.random() < 0.1:
            nested = key if random.random() < 0.3 else random.choice(keys)
        # Who has forgotten its key is not lost: its heir could forget another execution.
        forgets = end in ("value", "error") and random.random() < 0.05
        if forgets and nested is key:
            nested = None
        return cls(pause, end, nested, forgets)
