"""What of an adapter starts anew in a forked child."""

import os
import weakref
from typing import Protocol

__all__ = ["renew_in_forked_child"]


class Renewed(Protocol):
    """What starts anew in a forked child."""

    def renew(self) -> None:
        """In the child: no thread of the parent's is there, and a lock that one held stays held."""


_renewed: "weakref.WeakSet[Renewed]" = weakref.WeakSet()


def renew_in_forked_child(renewed: Renewed) -> None:
    """Has `renewed` start anew in every child that is forked as long as it lives."""
    _renewed.add(renewed)


def _after_fork_in_child() -> None:
    for renewed in list(_renewed):
        renewed.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
