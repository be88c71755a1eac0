"""ShardedFlight: many callers want the same expensive thing at once; it runs once.

Layers, each importing only from those below it (checked by import-linter in `make check`):

    __main__, demo, bench    programs, on the public names only
    http                     collapsing of HTTP requests, on the public names only
    backends                 where the flights of several processes meet
    observe                  what is told to those who watch: its names, and adapters on them
    _coalesce                the decorator
    _flight                  ShardedFlight
    _many                    many keys in one call
    _future                  what do_future returns
    _tier                    what a flight does that has a backend
    _deadlock                who waits for whom
    _observe                 what observers are told, and who tells them
    _waiting                 how callers wait, and how they are woken
    _core                    who leads, who follows, who is settled; the one compiled module
    _lock, _replica, exceptions, keys
    _uncompiled              what the plain core has in place of Cython and C

`_compiled` stands above the core and is imported here alone, before all that need the core: it
chooses whether the compiled one or the plain one runs, and `__compiled__` tells which.
"""

from . import _compiled
from . import keys as keys
from ._coalesce import coalesce as coalesce
from ._flight import ShardedFlight as ShardedFlight
from ._flight import Stats as Stats
from .exceptions import BackendError as BackendError
from .exceptions import DeadlockError as DeadlockError
from .exceptions import FlightError as FlightError
from .exceptions import FlightErrorGroup as FlightErrorGroup
from .exceptions import FlightTimeout as FlightTimeout
from .exceptions import InvalidShardsError as InvalidShardsError
from .exceptions import RemoteError as RemoteError

__all__ = [
    "BackendError",
    "DeadlockError",
    "FlightError",
    "FlightErrorGroup",
    "FlightTimeout",
    "InvalidShardsError",
    "RemoteError",
    "ShardedFlight",
    "Stats",
    "coalesce",
    "keys",
]

#: Whether the compiled core runs. If not, there is none for this interpreter, or the environment
#: has set `SHARDEDFLIGHT_PURE`.
__compiled__ = _compiled.compiled
