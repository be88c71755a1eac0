"""Collapsing of HTTP requests: equal requests at the same time run the application once.

`asgi.CoalesceMiddleware` and `wsgi.CoalesceMiddleware` collapse what comes in, the transports in
`httpx` what goes out. Which requests may be collapsed, and whose answers may be shared, is decided
in one place for all three (`_rules`), who waits for what in another (`_rounds`).

Layers, each importing only from those below it: asgi, wsgi, httpx; _rounds; _rules.
"""

from ._rounds import HttpStats as HttpStats
from ._rules import Options as Options
from ._rules import Pass as Pass
from ._rules import Refusal as Refusal

__all__ = ["HttpStats", "Options", "Pass", "Refusal"]
