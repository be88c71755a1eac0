"""The flights that an adapter watches: by name, and only as long as they live."""

import threading
import weakref
from collections.abc import Callable

from shardedflight import ShardedFlight
from shardedflight.observe import Observer

from ._forks import renew_in_forked_child

__all__ = ["Flights"]


class Flights:
    """Flights by name, each with the observer that tells an adapter of it.

    They are not kept alive. A flight that is gone is noticed when somebody asks: a destructor could
    find the locks of the adapter's library taken by its own thread.
    """

    def __init__(self) -> None:
        self.renew()
        renew_in_forked_child(self)
        #: Changed under the lock.
        self._entries: dict[str, tuple[weakref.ref[ShardedFlight], Observer]] = {}
        self._gone: list[str] = []

    def renew(self) -> None:
        """In a forked child."""
        #: Held while a flight comes or goes, with what the adapter has of it: a new one may have
        #: the name of one that is gone. A destructor may come here amid that.
        self.lock = threading.RLock()

    def add(
        self, flight: ShardedFlight, name: str | None, observer_of: Callable[[str], Observer]
    ) -> None:
        """Begins to watch a flight.

        Args:
            flight: Which.
            name: What it is called. None: as it calls itself.
            observer_of: Makes the observer of the flight of that name.

        Raises:
            TypeError: `flight` is no flight, or the name no str.
            ValueError: It has no name, or another flight has it.
        """
        if not isinstance(flight, ShardedFlight):
            raise TypeError(f"a ShardedFlight is watched, not {flight!r}")
        if name is None:
            name = flight.name
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be a str, not {name!r}")
        if not name:
            raise ValueError(f"the flight needs a name, its own or the one given here: {flight!r}")
        with self.lock:
            self._drop_gone()
            for known, (reference, _) in self._entries.items():
                if reference() is flight:
                    raise ValueError(f"the flight is watched already, as {known!r}: {flight!r}")
            if name in self._entries:
                raise ValueError(f"another flight of the name {name!r} is watched already")
            observer = observer_of(name)
            self._entries[name] = (weakref.ref(flight), observer)
        flight.add_observer(observer)

    def remove(self, flight: ShardedFlight) -> str:
        """Watches a flight no more.

        Returns:
            Its name.

        Raises:
            ValueError: It was not watched.
        """
        with self.lock:
            found = [name for name, (known, _) in self._entries.items() if known() is flight]
            if not found:
                raise ValueError(f"the flight is not watched: {flight!r}")
            (name,) = found
            _, observer = self._entries.pop(name)
        flight.remove_observer(observer)
        return name

    def alive(self) -> list[tuple[str, ShardedFlight]]:
        """All flights that are watched, with their names."""
        with self.lock:
            found = [(name, reference()) for name, (reference, _) in self._entries.items()]
        return [(name, flight) for name, flight in found if flight is not None]

    def take_gone(self) -> list[str]:
        """The names of those that are gone; each once."""
        with self.lock:
            self._drop_gone()
            gone, self._gone = self._gone, []
            return [name for name in gone if name not in self._entries]

    def _drop_gone(self) -> None:
        gone = [name for name, (reference, _) in self._entries.items() if reference() is None]
        for name in gone:
            del self._entries[name]
        self._gone += gone
