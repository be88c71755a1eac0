"""The command line of the demo: its options, and a sentence for each value that cannot be.

Standard library and ShardedFlight only, so that `--help` works without the extra.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from shardedflight import InvalidShardsError, ShardedFlight

PROGRAM = "shardedflight demo"

#: What the URL of a server begins with.
_SCHEMES = ("redis://", "rediss://", "unix://")

#: Server processes where there are several and the user has not said how many.
_WORKERS = 4

#: A flight may have more, but they take memory and there is nothing to see.
_MOST_SHARDS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user chose."""

    #: Seconds of load on each route.
    duration: float
    #: Concurrent connections.
    clients: int
    #: Different items that the clients ask for.
    keys: int
    #: Shards of the flight; None leaves the choice to ShardedFlight.
    shards: int | None
    #: Rows in the database.
    rows: int
    #: Server processes.
    workers: int
    #: What their flights meet on: "host", "valkey" or a URL; None: each is on its own.
    backend: str | None
    #: Where the first of them listens, the others on free ports; 0 is any free port.
    port: int
    #: Where the report goes.
    report: Path
    #: Decides the rows and which client asks for what.
    seed: int
    #: One JSON document on standard output instead of a table.
    json: bool


class _Parser(argparse.ArgumentParser):
    """Refuses in one sentence, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: {message}\n")


def _whole(lowest: int, highest: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not lowest <= number <= highest:
            raise argparse.ArgumentTypeError(
                f"{text!r} will not do, give a whole number from {lowest} to {highest}"
            )
        return number

    return convert


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    # NaN is in no interval.
    if not 0.1 <= number <= 600:
        raise argparse.ArgumentTypeError(
            f"{text!r} will not do, give a number of seconds from 0.1 to 600"
        )
    return number


def _shards(text: str) -> int:
    try:
        shards = int(text)
    except ValueError:
        shards = _MOST_SHARDS + 1
    if shards > _MOST_SHARDS:
        raise argparse.ArgumentTypeError(
            f"{text!r} will not do, give a power of two from 1 to {_MOST_SHARDS}"
        )
    try:
        return ShardedFlight(shards).shards
    except InvalidShardsError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _backend(text: str) -> str:
    if text not in ("host", "valkey") and not text.startswith(_SCHEMES):
        raise argparse.ArgumentTypeError(
            f"{text!r} will not do, give host, valkey, or the URL of a server, such as "
            "redis://127.0.0.1:6379"
        )
    return text


def parse(arguments: Sequence[str]) -> Options:
    """Reads the options; exits with status 2 and a sentence if one of them cannot be."""
    parser = _Parser(
        prog=PROGRAM,
        description="Starts an HTTP API over a SQLite database, fires the same load at a route "
        "that queries directly and at one that goes through a flight, and compares the two. With "
        "several server processes, also at one whose flights share beyond their process.",
        allow_abbrev=False,
    )

    def add(name: str, convert: Callable[[str], object], default: object, text: str) -> None:
        shown = text if default is None else f"{text} (default: {default})"
        parser.add_argument(name, metavar="N", type=convert, default=default, help=shown)

    add("--duration", _seconds, 15.0, "seconds of load on each route")
    add("--clients", _whole(1, 2_000), 200, "concurrent connections")
    add("--keys", _whole(1, 1_000_000), 100, "different items that the clients ask for")
    add(
        "--shards",
        _shards,
        None,
        "shards of the flight, a power of two (default: ShardedFlight's own)",
    )
    add("--rows", _whole(1, 1_000_000), 100_000, "rows in the database")
    add(
        "--workers",
        _whole(1, 64),
        None,
        f"server processes (default: 1, or {_WORKERS} with --backend)",
    )
    parser.add_argument(
        "--backend",
        metavar="WHAT",
        type=_backend,
        help="what the flights of several processes meet on: host, a directory of this machine; "
        "valkey, a server that the demo starts; or the URL of a Redis or Valkey "
        "(default: host, if there are several)",
    )
    add("--port", _whole(0, 65_535), 0, "where the first server listens; 0 is any free port")
    add("--seed", _whole(0, 2**63 - 1), 1, "decides the rows and which client asks for what")
    parser.add_argument(
        "--report",
        metavar="PATH",
        type=Path,
        default=Path("shardedflight-demo.html"),
        help="where the report goes, one HTML file (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document, no table")
    given = parser.parse_args(arguments)
    if given.workers is None:
        given.workers = 1 if given.backend is None else _WORKERS
    if given.backend is None and given.workers > 1:
        given.backend = "host"
    return Options(**vars(given))


def main(arguments: Sequence[str]) -> int:
    """Runs the demo and returns the exit status."""
    options = parse(arguments)
    if os.name != "posix":
        sys.stderr.write(
            f"{PROGRAM}: the server inherits a listening socket, which takes a POSIX system\n"
        )
        return 1
    # After the options: the parts of the extra take a while to import, and may be missing.
    from shardedflight.demo.errors import DemoError  # noqa: PLC0415
    from shardedflight.demo.run import run  # noqa: PLC0415
    from shardedflight.demo.tier import check_extra  # noqa: PLC0415

    check_extra(options.backend)

    try:
        return run(options)
    except DemoError as problem:
        sys.stderr.write(f"{PROGRAM}: {problem}\n")
        return 1
