"""Watching a flight: `Observer`, what it is told, and adapters that are observers.

The adapters are modules of their own, each with an extra of the same name, on public names only.
"""

from shardedflight._core import End as End
from shardedflight._observe import Departure as Departure
from shardedflight._observe import Ended as Ended
from shardedflight._observe import Joined as Joined
from shardedflight._observe import Left as Left
from shardedflight._observe import ObservedExecution as ObservedExecution
from shardedflight._observe import Observer as Observer
from shardedflight._observe import Started as Started

__all__ = [
    "Departure",
    "End",
    "Ended",
    "Joined",
    "Left",
    "ObservedExecution",
    "Observer",
    "Started",
]
