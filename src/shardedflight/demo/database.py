"""The database: the sales of a shop in one SQLite file, and the query that costs something.

The query reads every row, because it weighs one item against all others and no index helps with
that: some 10 ms for 100,000 rows, in which SQLite has let go of the GIL.
"""

import random
import sqlite3
import threading
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import TypedDict

_TABLE = """
CREATE TABLE sale (
    id INTEGER PRIMARY KEY,
    item INTEGER NOT NULL,
    quantity INTEGER NOT NULL,
    cents INTEGER NOT NULL
)
"""

_INSERT = "INSERT INTO sale (item, quantity, cents) VALUES (?, ?, ?)"

#: What an item sold, and its share of everything sold.
QUERY = """
SELECT
    coalesce(sum(quantity) FILTER (WHERE item = :item), 0),
    coalesce(sum(quantity * cents) FILTER (WHERE item = :item), 0),
    coalesce(sum(quantity * cents) FILTER (WHERE item = :item) * 1.0 / sum(quantity * cents), 0.0)
FROM sale
"""

_STEP = 5_000


class Sales(TypedDict):
    """The answer for one item."""

    item: int
    quantity: int
    cents: int
    share: float


def build(path: Path, *, rows: int, items: int, seed: int) -> Generator[int]:
    """Builds the database, step by step; yields after each how many rows there are.

    It is complete when the iterator is exhausted.
    """
    draw = random.Random(seed).randrange  # noqa: S311 - made-up sales, no secrets
    with closing(sqlite3.connect(path)) as connection:
        # Nobody wants the file back after a crash.
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute(_TABLE)
        for start in range(0, rows, _STEP):
            step = min(_STEP, rows - start)
            connection.executemany(
                _INSERT,
                ((draw(items) + 1, draw(9) + 1, draw(100, 10_000)) for _ in range(step)),
            )
            yield start + step
        connection.commit()


class Database:
    """Reads the database from any number of threads, on a connection for each."""

    def __init__(self, path: Path) -> None:
        self._uri = f"{path.absolute().as_uri()}?mode=ro"
        self._local = threading.local()
        # All threads append to it; only `close`, after them, reads it.
        self._connections: list[sqlite3.Connection] = []

    def sales_of(self, item: int) -> Sales:
        """Runs `QUERY` for the item."""
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(self._uri, uri=True, check_same_thread=False)
            self._local.connection = connection
            self._connections.append(connection)
        quantity, cents, share = connection.execute(QUERY, {"item": item}).fetchone()
        return {"item": item, "quantity": quantity, "cents": cents, "share": share}

    def close(self) -> None:
        """Closes the connections; no thread may be using one."""
        for connection in self._connections:
            connection.close()
