"""What the plain core has in place of the `cython` module and of the C in `_core.pxd`.

Only Cython itself reads `import cython`, while it compiles. Where the core runs as Python, it finds
its names here, whether Cython is installed or not: so there is one plain core, not two.
"""

from threading import get_ident
from typing import Any

__all__ = ["COMPILED", "compiled", "get_ident", "hash_of", "peek"]

#: Whether the module that asks was compiled. Cython puts True in its place.
compiled = False

#: The same, as a name that `_core.pxd` has as a constant of C's.
COMPILED = False

#: What places a key in the tables.
hash_of = hash

#: Looks a key up in a dict that other threads change.
peek = dict[Any, Any].get

# Names of C's, which stand only where COMPILED is true.
FULL: Any = None
TAKEN: Any = None
blocks_in: Any = None
borrow: Any = None
call: Any = None
check_self: Any = None
defer: Any = None
hash_of_call: Any = None
index_of: Any = None
is_line: Any = None
line_at: Any = None
line_claim: Any = None
line_claim_more: Any = None
line_count: Any = None
line_get: Any = None
line_in: Any = None
line_leave: Any = None
line_link: Any = None
line_mark: Any = None
line_pass: Any = None
line_release: Any = None
line_seat: Any = None
line_seats: Any = None
line_taken: Any = None
line_unlink: Any = None
lines_idle: Any = None
lines_orphan: Any = None
lines_running: Any = None
lines_started: Any = None
make_lines: Any = None
mixed: Any = None
next_serial: Any = None
nothing: Any = None
slots_of: Any = None
stride_of: Any = None
take: Any = None
