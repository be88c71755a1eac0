"""Conducts the demo: checks, database, server, load, report, table."""

import asyncio
import json
import signal
import socket
import sqlite3
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from rich.console import Console

from shardedflight.demo import report, summary
from shardedflight.demo.command import PROGRAM, Options
from shardedflight.demo.control import answering
from shardedflight.demo.database import build
from shardedflight.demo.errors import DemoError
from shardedflight.demo.figures import Figures
from shardedflight.demo.measure import measure
from shardedflight.demo.process import allow_open_files, listen, serving, while_they_run
from shardedflight.demo.progress import Display, display_on
from shardedflight.demo.server import PAGE, THREADS, Settings
from shardedflight.demo.tier import meeting_on

#: Open files beside the connections: event loops, logs, the interpreter's own.
_SPARE_FILES = 64


def run(options: Options) -> int:
    """Runs the demo and returns the exit status; 128 + n if signal n ended it."""
    return asyncio.run(_until_stopped(options))


async def _until_stopped(options: Options) -> int:
    loop = asyncio.get_running_loop()
    demo = asyncio.ensure_future(_demo(options))
    received: list[int] = []

    def stop(number: int) -> None:
        # The first only: another one must not disturb the clearing up.
        if not received:
            received.append(number)
            demo.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # What nohup had ignored stays ignored.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            loop.add_signal_handler(number, stop, number)
    await asyncio.wait([demo])
    if demo.cancelled() and received:
        sys.stderr.write(f"{PROGRAM}: stopped by {signal.Signals(received[0]).name}\n")
        return 128 + received[0]
    return demo.result()


async def _demo(options: Options) -> int:
    destination = report.destination(options.report)
    # A server on the host tier has one more for each key that it follows.
    allow_open_files(2 * options.clients + THREADS + _SPARE_FILES)
    with ExitStack() as stack:
        listeners = [
            stack.enter_context(listen(0 if number else options.port))
            for number in range(options.workers)
        ]
        display = stack.enter_context(display_on(Console(stderr=True)))
        addresses = ["http://{}:{}".format(*listener.getsockname()) for listener in listeners]
        figures = await _measure(options, listeners, addresses, display)
        display.begin("Report")
        # In a thread, for the display and a signal to be attended to meanwhile.
        page = await asyncio.to_thread(report.page, figures, options, addresses)
        report.save(page, destination)
        display.end(f"{len(page) // 1024:,} KB")
    if options.json:
        document = summary.as_json(figures, options)
        document |= {"addresses": addresses, "report": str(destination)}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        console = Console()
        console.print(summary.table(figures))
        console.print(f"Served at {', '.join(addresses)}", highlight=False, soft_wrap=True)
        console.print(f"Report: {destination}", highlight=False, soft_wrap=True)
    if figures.failed:
        raise DemoError(summary.failures(figures))
    return 0


async def _measure(
    options: Options,
    listeners: Sequence[socket.socket],
    addresses: Sequence[str],
    display: Display,
) -> Figures:
    try:
        temporary = tempfile.TemporaryDirectory(prefix="shardedflight-demo-")
    except OSError as error:
        raise DemoError(f"no temporary directory ({error.strerror}): set TMPDIR to one") from None
    with temporary as name:
        directory = Path(name)
        database = directory / "sales.sqlite"
        async with meeting_on(options.backend, directory) as (meeting, helpers):

            def settings(descriptor: int) -> str:
                return Settings(
                    socket=descriptor,
                    database=str(database),
                    shards=options.shards,
                    meeting=meeting,
                ).write()

            if meeting is not None:
                display.begin("Backend")
                display.end(meeting.shown)
            await while_they_run(helpers, _build(database, options, display))
            display.begin("Server")
            async with serving(listeners, settings, directory) as servers:
                children = [*helpers, *servers]
                await while_they_run(children, answering(addresses))
                display.end(
                    ", ".join(
                        f"{address} (process {server.pid})"
                        for address, server in zip(addresses, servers, strict=True)
                    )
                )
                display.begin("Flights")
                display.end(f"{addresses[0]}{PAGE}/ while the demo runs")
                return await while_they_run(children, measure(addresses, options, display))


async def _build(database: Path, options: Options, display: Display) -> None:
    display.begin("Database")
    with closing(
        build(database, rows=options.rows, items=options.keys, seed=options.seed)
    ) as steps:
        try:
            for rows in steps:
                display.show(rows / options.rows, f"{rows:,} rows")
                # For the display and a signal to be attended to.
                await asyncio.sleep(0)
        except sqlite3.Error as error:
            raise DemoError(
                f"the database cannot be built in {database.parent} ({error}): "
                "set TMPDIR to another directory, or ask for fewer --rows"
            ) from None
    display.end(f"{options.rows:,} rows")
