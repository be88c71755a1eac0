"""The plain form of the library, measured in the same run as the compiled one.

One process has one form. So a worker with `SHARDEDFLIGHT_PURE=1` prepares the same benchmark, and
runs a side whenever it is told to; the floor under it is its own. While it runs, this process
waits, and the other way round.

The two speak JSON, a line at a time: `["do", false]` prepares a benchmark and is answered by its
points; `[0, "ours"]` runs a side of the first of them and is answered by what it took; `null` ends
the benchmark.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import IO, Any

from shardedflight.bench.basics import FORM
from shardedflight.bench.benchmarks import benchmarks
from shardedflight.bench.measure import Contender, Pair, undisturbed, unwatched

#: Seconds that the worker has to end by itself.
_PATIENCE = 10.0


class Worker:
    """The other process, from this side; for one thread."""

    def __init__(self, requests: IO[str], answers: IO[str]) -> None:
        self._requests = requests
        self._answers = answers

    @contextmanager
    def prepare(self, name: str, *, quick: bool) -> Iterator[Sequence[Contender]]:
        """Prepares a benchmark over there; yields its contenders."""
        points = self._ask([name, quick])
        yield [
            Contender(
                "plain",
                Pair(
                    partial(self._ask, [number, "ours"]),
                    partial(self._ask, [number, "floor"]),
                ),
                point,
            )
            for number, point in enumerate(points)
        ]
        self._ask(None)

    def _ask(self, request: object) -> Any:
        try:
            print(json.dumps(request), file=self._requests, flush=True)
            answer = self._answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError("the process that measures the plain form has ended")
        return json.loads(answer)


@contextmanager
def worker() -> Iterator[Worker]:
    """Starts the other process; ends it with the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "shardedflight.bench.plain"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "SHARDEDFLIGHT_PURE": "1"},
        encoding="utf-8",
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        try:
            yield Worker(process.stdin, process.stdout)
        finally:
            try:
                process.stdin.close()
            except BrokenPipeError:
                pass  # it has ended before it read the last request
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Does what is asked until there is no more."""

    def answer(value: object) -> None:
        print(json.dumps(value), file=answers, flush=True)

    for request in requests:
        name, quick = json.loads(request)
        benchmark = next(one for one in benchmarks(quick=quick) if one.name == name)
        with benchmark.prepare(benchmark.operations) as prepared, unwatched():
            contenders = [contender for contender in prepared if contender.who == FORM]
            answer([contender.point for contender in contenders])
            for line in requests:
                command = json.loads(line)
                if command is None:
                    break
                number: int = command[0]
                pair = contenders[number].pair
                assert pair is not None
                answer(undisturbed(pair.ours if command[1] == "ours" else pair.floor))
        answer(None)


if __name__ == "__main__":
    if FORM != "plain":
        sys.exit("SHARDEDFLIGHT_PURE=1 has not made this library plain")
    try:
        serve(sys.stdin, sys.stdout)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)
