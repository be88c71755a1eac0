"""Every fault that the tiers must survive, a hundred times in a row: `make faults`.

The rows are the table of faults of the host tier and the cluster tier; each names the tests that
bring the fault about, with real servers and real processes. They run by pytest, in rounds: a batch
is one test function with all its parameters, a few times, in a process of its own, and several
batches run at once, since most of a test is waiting. Of every row the closing table says how many
runs there were, how many of them failed, and how long the slowest took.

Blind to: what no test of the row looks at; faults of two rows at the same time; a machine's real
network and disks, since all runs on one machine.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Row:
    """One fault: the tests that bring it about, as `file::function` below tests/."""

    fault: str
    tests: Sequence[str]
    runs: int = 0
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0
    slowest_test: str = ""


def rows() -> list[Row]:
    """The table, in its order, with nothing run yet."""
    return [
        Row(
            "leader process killed",
            (
                "test_host.py::test_a_killed_leader_is_replaced_within_50_ms",
                "test_host.py::test_what_a_killed_leader_left_does_not_count",
                "test_redis.py::test_a_killed_leader_is_replaced_within_its_lease_and_a_tenth",
                "test_tiers.py::test_a_killed_leader_is_replaced_once",
            ),
        ),
        Row(
            "leader stopped past its lease",
            (
                "test_host.py::test_a_stopped_leader_is_waited_for",
                "test_redis.py::test_a_stopped_leader_is_replaced_and_fenced",
            ),
        ),
        Row(
            "function slower than three leases",
            ("test_redis.py::test_a_function_of_more_than_three_leases_is_not_taken_over",),
        ),
        Row("a publish is lost", ("test_redis.py::test_a_message_that_is_lost_is_made_up_for",)),
        Row(
            "pub/sub connection killed",
            ("test_redis.py::test_a_cut_inbox_is_there_again_and_missed_nothing",),
        ),
        Row(
            "server killed, restarted empty",
            ("test_redis.py::test_a_server_killed_and_restarted_empty",),
        ),
        Row(
            "server unreachable, slow, full, read-only, refusing",
            (
                "test_redis.py::test_a_server_that_can_not_be_reached",
                "test_redis.py::test_a_server_that_does_not_answer",
                "test_redis.py::test_callers_do_not_probe_a_server_that_does_not_answer",
                "test_redis.py::test_a_server_out_of_memory",
                "test_redis.py::test_a_read_only_replica",
                "test_redis.py::test_a_wrong_password",
            ),
        ),
        Row(
            "Cluster: slot migrated, primary failed over",
            (
                "test_redis_cluster.py::test_a_slot_that_moves_during_an_execution",
                "test_redis_cluster.py::test_a_primary_that_fails_over_during_an_execution",
            ),
        ),
        Row(
            "corrupt, truncated or hostile payload",
            (
                "test_host.py::test_an_outcome_that_can_not_be_read_is_a_miss",
                "test_redis.py::test_an_outcome_that_can_not_be_read_is_a_miss",
                "test_redis.py::test_strange_messages_are_passed_over",
            ),
        ),
        Row(
            "leader's caller cancelled",
            ("test_tiers.py::test_a_cancelled_leader_hands_over_at_once",),
        ),
        Row(
            "disk full, directory read-only or foreign",
            (
                "test_host.py::test_a_directory_that_others_can_enter_is_refused",
                "test_host.py::test_a_directory_of_somebody_else_is_refused",
                "test_host.py::test_what_is_no_directory_is_refused",
                "test_host.py::test_a_read_only_directory_is_refused",
                "test_host.py::test_a_directory_that_goes_away_leaves_the_process_tier",
                "test_host.py::test_an_outcome_that_the_disk_does_not_take_is_a_lost_one",
                "test_host.py::test_without_descriptors_the_process_tier_remains",
            ),
        ),
        Row(
            "fork and pre-fork servers",
            (
                "test_tiers.py::test_a_forked_child_meets_its_parent",
                "test_tiers.py::test_a_fork_inside_a_leaders_function_ends_it_once",
                "test_host.py::test_a_forked_child_does_not_hold_its_parents_locks",
                "test_prefork.py::test_a_stampede_over_all_workers_runs_once",
            ),
        ),
    ]


# -- in the process of a batch ---------------------------------------------------------------------


class Rounds:
    """A plugin of pytest: each test runs so many times, and what came of it goes into a file."""

    def __init__(self, times: int, file: Path) -> None:
        self.times = times
        self.file = file
        self.took = 0.0

    @pytest.fixture
    def round_of_the_proof(self, request: pytest.FixtureRequest) -> Any:
        """Which round it is."""
        return request.param

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Makes the rounds."""
        metafunc.fixturenames.append("round_of_the_proof")
        metafunc.parametrize(
            "round_of_the_proof",
            range(self.times),
            indirect=True,
            ids=[f"round {number}" for number in range(self.times)],
        )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A line for each round that is over, and one for each that has failed."""
        said: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome}
        # What takes long may be the fixture's server, which is not what is measured.
        self.took = report.duration if report.when == "call" else self.took
        if report.failed:
            text = report.longreprtext
            sections = [f"-- {name}\n{content}" for name, content in report.sections]
            self._write({**said, "why": "\n".join([text, *sections])})
        elif report.when == "call" or report.skipped:
            self._write({**said, "took": self.took})

    def _write(self, said: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(said) + "\n")


def run_batch(test: str, times: int, file: Path) -> int:
    """Runs one test function so many times, in this process; returns pytest's exit code."""
    options = ["-q", "-p", "no:cacheprovider", "--no-header", "--no-summary"]
    options.append(f"--basetemp={file.parent / 'tmp'}")  # several processes run tests at once,
    options += ["-o", "timeout=600", "-o", "faulthandler_timeout=650"]  # and share the machine
    return int(pytest.main([*options, test], plugins=[Rounds(times, file)]))


# -- in the process that runs the batches ----------------------------------------------------------


@dataclass
class Runner:
    """Gives batches to processes and counts what comes of them."""

    table: list[Row]
    batches: "deque[tuple[Row, str, int]]"
    deadline: float
    lock: threading.Lock = field(default_factory=threading.Lock)
    running: set["subprocess.Popen[bytes]"] = field(default_factory=set)
    stopped: bool = False

    def stop(self) -> None:
        """Begins no further batch, and ends those that run, with what they have started."""
        with self.lock:
            self.stopped = True
            self.batches.clear()
            for process in self.running:
                process.terminate()

    def work(self) -> None:
        """Takes batches as long as there are any, and time. On a thread of its own."""
        while time.monotonic() < self.deadline:
            with self.lock:
                if not self.batches:
                    return
                row, test, times = self.batches.popleft()
            self._run(row, test, times)

    def _run(self, row: Row, test: str, times: int) -> None:
        with tempfile.TemporaryDirectory(prefix="faults-") as directory:
            file = Path(directory, "results")
            command = [sys.executable, "-m", "proof.faults", "--batch", test, str(times), str(file)]
            with self.lock:
                if self.stopped:
                    return
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
                self.running.add(process)
            said, _ = process.communicate()
            lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
            with self.lock:
                self.running.remove(process)
                failed = self._count(row, lines)
                # A test that hangs ends its process, and so does what crashes it.
                if not self.stopped and (
                    process.returncode not in (0, 1) or (process.returncode == 1 and not failed)
                ):
                    row.runs += 1
                    text = said.decode(errors="replace")[-20_000:]
                    self._failed(row, f"{test} ended with {process.returncode}", text)

    def _count(self, row: Row, lines: Sequence[str]) -> bool:
        failed = False
        for line in lines:
            said = json.loads(line)
            if said["outcome"] == "skipped":
                continue
            row.runs += 1
            if "why" in said:
                self._failed(row, said["test"], said["why"])
                failed = True
            elif said["took"] > row.slowest:
                row.slowest, row.slowest_test = said["took"], said["test"]
        return failed

    def _failed(self, row: Row, test: str, why: str) -> None:
        row.failures.append(test)
        print(f"\n=== {row.fault}: {test}\n{why}\n", flush=True)


def batches(table: Sequence[Row], times: int, size: int) -> Iterator[tuple[Row, str, int]]:
    """All that is to be run, so that of a run cut short every row has its share."""
    for done in range(0, times, size):
        for row in table:
            for test in row.tests:
                yield row, str(ROOT / "tests" / test), min(size, times - done)


def totals(table: Sequence[Row]) -> tuple[int, int]:
    """How many runs there were, and how many of them failed."""
    return sum(row.runs for row in table), sum(len(row.failures) for row in table)


def show(table: Sequence[Row]) -> None:
    """Prints the closing table."""
    print(f"\n{'fault':<52}{'runs':>7}{'failed':>8}{'slowest':>10}")
    for row in table:
        slowest = f"{row.slowest:.2f} s"
        print(f"{row.fault:<52}{row.runs:>7}{len(row.failures):>8}{slowest:>10}")
    runs, failed = totals(table)
    print(f"{'all':<52}{runs:>7}{failed:>8}")


def survived(table: list[Row], times: int, size: int, jobs: int, seconds: float) -> bool:
    """Runs the rows' tests and prints how they went; returns whether all ran and none failed."""
    started = time.monotonic()
    runner = Runner(table, deque(batches(table, times, size)), started + seconds)
    total = len(runner.batches)
    threads = [threading.Thread(target=runner.work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    said = started
    try:
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.1)
            if time.monotonic() - said >= 10:
                said = time.monotonic()
                begun = total - len(runner.batches)
                runs, failed = totals(table)
                counts = f"{begun} of {total} batches begun, {runs} runs, {failed} failed"
                print(f"{said - started:6.0f} s: {counts}", flush=True)
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):  # a second one must not disturb the ending
            signal.signal(number, signal.SIG_IGN)
        runner.stop()
        for thread in threads:
            thread.join()
    show(table)
    left = len(runner.batches)
    if runner.stopped:
        print("It was stopped.")
    elif left:
        print(f"The time was over with {left} of {total} batches not begun.")
    return not runner.stopped and not any(row.failures for row in table)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m proof.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--times", type=int, default=100, help="runs of each test (100)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin none after that")
    parser.add_argument("--jobs", type=int, default=4, help="tests at a time (4)")
    parser.add_argument("--size", type=int, default=10, help="runs in one process (10)")
    parser.add_argument("--row", default="", help="only faults with this word")
    parser.add_argument("--batch", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    # Terminated, it ends as when it is interrupted, so that fixtures end what they have started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if options.batch:
        test, times, file = options.batch
        return run_batch(test, int(times), Path(file))
    for name in ("times", "jobs", "size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    chosen = [row for row in rows() if options.row in row.fault]
    if not chosen:
        parser.error(f"no fault has {options.row!r} in its name")
    version = sys.version.split()[0] + getattr(sys, "abiflags", "")
    print(f"CPython {version}: each test {options.times} times, {options.jobs} at a time")
    return 0 if survived(chosen, options.times, options.size, options.jobs, options.seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
