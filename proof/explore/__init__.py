"""A deterministic explorer of the interleavings of the plain core.

`scheduler` runs threads one at a time, by a plan; `tracing` says where a switch can matter;
`primitives` are the locks, event loops and executors that the scheduler knows of. `world` records
what the callers of one run have seen and compares it with the contract. `scenarios` are what is
run, `search` how its plans are chosen, and `plants` the faults that have to be found.
"""

import os

# The compiled core has no lines to stop at. Before anything of this package imports the flight.
os.environ["SHARDEDFLIGHT_PURE"] = "1"
os.environ["SHARDEDFLIGHT_REQUIRE_COMPILED"] = ""
