"""What is the host tier's own: locks, files, the directory, fork. See test_tiers for the rest."""

import asyncio
import fcntl
import gc
import itertools
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import PATIENCE, eventually, spawn
from test_processes import need_fork
from test_tiers import HOWS, marks, values
from tier_support import Worker

from shardedflight import BackendError, DeadlockError, FlightErrorGroup, ShardedFlight, coalesce
from shardedflight._lock import SteadyLock
from shardedflight._tier import Lead, Sealed, Turn
from shardedflight.backends import fencing_token

if os.name == "nt":
    pytest.skip("the host tier is for POSIX", allow_module_level=True)

from shardedflight.backends import host
from shardedflight.backends.host import HostBackend, _HostTurn

pytestmark = pytest.mark.around


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "flights"


@pytest.fixture
def start(directory: Path) -> Iterator[Callable[[int], list[Worker]]]:
    started: list[Worker] = []

    def start(count: int) -> list[Worker]:
        options = {"directory": str(directory)}
        started.extend(Worker("host", "HostBackend", options) for _ in range(count))
        return [worker.ready() for worker in started[-count:]]

    yield start
    for worker in started:
        worker.stop()


def files(directory: Path) -> list[Path]:
    return list(directory.glob("?" * 40))


def test_an_outcome_that_is_on_its_way_is_not_joined_after_a_forget(
    directory: Path, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Section 6: the other process has ended; who comes after a forget begins anew all the same."""
    (worker,) = start(1)
    flight = ShardedFlight(backend=HostBackend(directory), name="workers")
    leader = worker.call("do", "k")
    leader.runs()
    follower = spawn(flight.do, lambda: "not run", "k")
    eventually(lambda: marks(directory) == 1)
    tier: Any = flight._tier
    eventually(lambda: any(turns for _, turns in tier._abroad.values()))  # it knows whom it follows
    told, tell = threading.Event(), threading.Event()
    real = Turn.settle

    def settle(turn: Turn, won: Any) -> bool:
        if not told.is_set():
            told.set()
            assert tell.wait(PATIENCE)
        return real(turn, won)

    monkeypatch.setattr(Turn, "settle", settle)
    leader.let_return("old")
    leader.ends()
    assert told.wait(PATIENCE)
    worker.forget("k")
    try:
        assert flight.do(lambda: "new", "k", timeout=5)[0] == "new"
    finally:
        tell.set()
    assert follower.result(PATIENCE) == ("old", True)


@pytest.mark.parametrize("forgets", [False, True])
def test_an_end_that_is_on_its_way_is_not_counted_as_forgotten(
    directory: Path, forgets: bool
) -> None:
    """Who comes then begins anew, for the backend would not have found it for a forget."""
    backend, elsewhere = HostBackend(directory), HostBackend(directory)
    flight = ShardedFlight(backend=backend)
    real = backend.finish

    async def value() -> int:
        if forgets and backend.finish != real:
            elsewhere.forget(backend.name(None, ("k",)))
        return 1

    async def call() -> None:
        told: list[Future[int]] = []

        def finish(*ended: Any) -> Any:
            (done,) = real(*ended)
            followers = done.result(PATIENCE)
            backend.finish = real  # type: ignore[method-assign]
            told.append(Future())
            second.add_done_callback(lambda _: told[0].set_result(followers))
            go.set()
            return told

        async def begin_anew() -> Any:
            await go.wait()
            return await flight.do_async(value, "k")

        go = asyncio.Event()
        second = asyncio.ensure_future(begin_anew())
        backend.finish = finish  # type: ignore[method-assign]
        assert await flight.do_async(value, "k") == (1, False)
        assert await second == (1, False)

    asyncio.run(call())
    assert (flight.stats().executions, flight.stats().forgotten) == (2, 1 if forgets else 0)


def hold(
    monkeypatch: pytest.MonkeyPatch, where: type, method: str, times: int = 1
) -> tuple[threading.Event, threading.Event]:
    """Holds up the first calls of a method. Returns what tells that, and what lets them go on."""
    held, go = threading.Event(), threading.Event()
    real = getattr(where, method)
    left = iter(range(times))

    def held_up(*args: Any) -> Any:
        if next(left, None) is not None:
            held.set()
            assert go.wait(PATIENCE)
        return real(*args)

    monkeypatch.setattr(where, method, held_up)
    return held, go


def test_a_lost_leader_is_not_taken_for_a_forgotten_one(
    directory: Path, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for one that is lost begins anew, and all callers of its process join that."""
    (worker,) = start(1)
    flight = ShardedFlight(backend=HostBackend(directory), name="workers")
    leader = worker.call("do", "k")
    leader.runs()
    heir = spawn(flight.do, lambda: "new", "k")
    eventually(lambda: marks(directory) == 1)
    held, go = hold(monkeypatch, HostBackend, "_unwatch")
    worker.signal(signal.SIGKILL)
    assert held.wait(PATIENCE)
    for file in files(directory):
        file.unlink()  # as the leader does, if it is lost but not killed
    follower = spawn(flight.do, lambda: "not run", "k")
    eventually(lambda: flight.stats().waiting == 1)
    go.set()
    assert heir.result(PATIENCE) == follower.result(PATIENCE) == ("new", True)
    assert flight.stats().forgotten == 0


def test_a_follower_that_came_too_late_is_not_taken_for_a_forgotten_one(
    directory: Path, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader had looked for marks before: who waits begins anew, and its process joins that."""
    (worker,) = start(1)
    flight = ShardedFlight(backend=HostBackend(directory), name="workers")
    leader = worker.call("do", "k")
    leader.runs()
    following, follow = hold(monkeypatch, HostBackend, "_follow")
    late = spawn(flight.do, lambda: "new", "k")
    assert following.wait(PATIENCE)
    leader.let_return("old")
    assert values(leader.ends()) == ("old", False)
    watching, watch = hold(monkeypatch, HostBackend, "_unwatch")
    follow.set()
    assert watching.wait(PATIENCE)
    followers = []
    for number in range(1, 4):
        followers.append(spawn(flight.do, lambda: "not run", "k"))
        eventually(lambda number=number: flight.stats().waiting == number)  # type: ignore[misc]
    watch.set()
    assert [call.result(PATIENCE) for call in (late, *followers)] == [("new", True)] * 4
    assert flight.stats().forgotten == 0


def test_who_has_found_what_is_forgotten_meanwhile_is_not_joined(
    directory: Path, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Section 6: it came before the forget ended, but who comes after that begins anew."""
    (worker,) = start(1)
    flight = ShardedFlight(backend=HostBackend(directory), name="workers")
    leader = worker.call("do", "k")
    leader.runs()
    forgetting, forget = hold(monkeypatch, HostBackend, "forget")
    forgotten = spawn(flight.forget, "k")
    assert forgetting.wait(PATIENCE)
    following, follow = hold(monkeypatch, HostBackend, "_follow")
    before = spawn(flight.do, lambda: "before", "k")
    assert following.wait(PATIENCE)
    forget.set()
    forgotten.result(PATIENCE)
    try:
        assert flight.do(lambda: "after", "k", timeout=5) == ("after", False)
    finally:
        follow.set()
    assert before.result(PATIENCE) == ("before", False)
    leader.let_return("old")
    assert values(leader.ends()) == ("old", False)


def test_who_was_passed_over_with_an_outcome_is_joined_when_its_heir_leads(
    directory: Path, start: Any
) -> None:
    """Found by the soak: the leader here was lost with an outcome that it had not taken. Its heir
    began anew, and forgot in all processes what it led, though nobody had called forget."""
    first, second = start(2)
    flight = ShardedFlight(backend=HostBackend(directory), name="workers")
    leader = first.call("do", "k")
    leader.runs()
    loop = asyncio.new_event_loop()

    async def begin() -> Any:
        caller = asyncio.create_task(flight.do_async(asyncio.Event().wait, "k"))
        while marks(directory) != 1:
            await asyncio.sleep(0.001)
        return caller

    async def lose() -> None:
        flights_own = asyncio.all_tasks() - {asyncio.current_task(), caller}  # type: ignore[arg-type]
        for task in flights_own:
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller

    caller = loop.run_until_complete(begin())
    runs, goes_on = threading.Event(), threading.Event()

    def function() -> str:
        runs.set()
        assert goes_on.wait(PATIENCE)
        return "the heir's"

    heir = spawn(flight.do, function, "k")
    eventually(lambda: flight.stats().waiting == 1)
    leader.let_return("old")
    assert values(leader.ends()) == ("old", True)
    tier: Any = flight._tier
    ((_, (turn,)),) = tier._abroad.values()
    turn.result(PATIENCE)
    assert flight.do(lambda: "between", "k") == ("between", False)
    loop.run_until_complete(lose())
    loop.close()
    assert runs.wait(PATIENCE)
    others = [second.call("do", "k"), first.call("do", "k")]
    eventually(lambda: marks(directory) == 2)
    here = spawn(flight.do, lambda: "not run", "k")
    eventually(lambda: flight.stats().waiting == 1)
    goes_on.set()
    assert heir.result(PATIENCE) == here.result(PATIENCE) == ("the heir's", True)
    assert [values(call.ends()) for call in others] == [("the heir's", True)] * 2


def test_who_was_passed_over_and_leads_is_the_one_that_is_joined(
    directory: Path, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or its function could wait for another call of its process, and that for this leader."""
    first, second = start(2)
    flight = ShardedFlight(backend=HostBackend(directory), name="workers")
    leader = first.call("do", "k")
    leader.runs()
    runs, goes_on = threading.Event(), threading.Event()

    def function() -> str:
        with pytest.raises(DeadlockError):
            flight.do(lambda: "not run", "k", timeout=PATIENCE)
        runs.set()
        assert goes_on.wait(PATIENCE)
        return "new"

    passed_over = spawn(flight.do, function, "k")
    tier: Any = flight._tier
    # The mark comes before it knows whom it follows.
    eventually(lambda: any(turns and turns[0].watch for _, turns in tier._abroad.values()))
    second.forget("k")
    assert flight.do(lambda: "between", "k") == ("between", False)
    leading, lead = hold(monkeypatch, HostBackend, "_next_token")
    first.signal(signal.SIGKILL)
    assert leading.wait(PATIENCE)
    beside = spawn(flight.do, lambda: "not run", "k")
    eventually(lambda: marks(directory) == 1)
    lead.set()
    assert runs.wait(PATIENCE)
    goes_on.set()
    assert passed_over.result(PATIENCE) == beside.result(PATIENCE) == ("new", True)


def led_by(backend: HostBackend) -> Lead:
    """What a backend leads for a key that nobody else has asked for."""
    (turn,) = backend.join([(b"n" * 20, 0)], True)
    lead = turn.result(PATIENCE)
    assert isinstance(lead, Lead)
    return lead


def test_what_is_ended_is_not_given_up_as_well(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that take a name away could take that of the next leader: its caller may leave then."""
    first, second = HostBackend(directory), HostBackend(directory)
    lead = led_by(first)
    ending, end = hold(monkeypatch, os, "unlink")  # type: ignore[arg-type]
    finished = spawn(first.finish, [(lead, b"outcome")], True)
    assert ending.wait(PATIENCE)
    first.give_up(lead)
    (follower,) = second.join([(b"n" * 20, 0)], True)
    assert not follower.done()
    end.set()
    assert finished.result(PATIENCE)[0].result(PATIENCE) == 1
    assert follower.result(PATIENCE) == Sealed(lead.token, b"outcome")


def test_a_forget_and_an_end_take_one_name_away(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that of the next leader, too, which would be led beside then."""
    first, second, third = (HostBackend(directory) for _ in range(3))
    lead = led_by(first)
    ending, end = hold(monkeypatch, os, "unlink")  # type: ignore[arg-type]
    finished = spawn(first.finish, [(lead, b"outcome")], True)
    assert ending.wait(PATIENCE)
    forgotten = spawn(second.forget, b"n" * 20)
    wait([forgotten], timeout=0.3)  # it waits for the end, or has done it at once
    (newer,) = second.join([(b"n" * 20, 0)], True)
    end.set()
    finished.result(PATIENCE)
    forgotten.result(PATIENCE)
    (newest,) = third.join([(b"n" * 20, 0)], True)
    assert [isinstance(newer.result(PATIENCE), Lead), newest.done()].count(True) == 1


def test_the_mark_of_a_forget_goes_to_no_strangers_descriptor(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lead that it is for may end meanwhile: the number of its descriptor is another's then."""
    #: The end waits for the mark, or has closed the file.
    decided = threading.Event()

    class Lock(SteadyLock):
        def __enter__(self) -> bool:
            if self.acquire(blocking=False):
                return True
            decided.set()
            return super().__enter__()

    monkeypatch.setattr(host, "SteadyLock", Lock)
    backend = HostBackend(directory)
    lead: Any = led_by(backend)
    fd = lead.file.fd
    strangers: list[int] = []
    ends: list[Any] = []
    real_write, real_close = os.write, os.close

    def close(closed: int) -> None:
        real_close(closed)
        if closed == fd and not strangers:
            strangers.append(os.open(tmp_path / "stranger", os.O_RDWR | os.O_CREAT))
            decided.set()

    def write(to: int, data: bytes) -> int:
        if data == host._FORGOTTEN:
            ends.append(spawn(backend.finish, [(lead, b"outcome")], True))
            assert decided.wait(PATIENCE)
        return real_write(to, data)

    monkeypatch.setattr(os, "close", close)
    monkeypatch.setattr(os, "write", write)
    backend.forget(b"n" * 20, lead).result(PATIENCE)
    (end,) = ends
    assert [done.result(PATIENCE) for done in end.result(PATIENCE)] == [0]
    monkeypatch.undo()
    assert (tmp_path / "stranger").read_bytes() == b""
    os.close(*strangers)


def test_a_forget_that_finds_its_lead_ended_marks_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has taken the name away, and the end has closed the file by then."""
    backend = HostBackend(directory)
    lead: Any = led_by(backend)
    real = host._File.unname

    def unname_and_end(file: Any, *lock: int) -> bool:
        unnamed = real(file, *lock)
        if file is lead.file and lock:
            assert spawn(backend.finish, [(lead, b"outcome")], True).result(PATIENCE)[0].done()
            assert not file.ours()
        return unnamed

    monkeypatch.setattr(host._File, "unname", unname_and_end)
    backend.forget(b"n" * 20, lead).result(PATIENCE)


def not_for_ever(call: "Future[Any]") -> Any:
    """The call's result. If it waits for itself, nothing that follows waits for it."""
    try:
        return call.result(PATIENCE)
    finally:
        for fd in [] if call.done() else host._held:
            fcntl.flock(fd, fcntl.LOCK_UN)


@pytest.mark.parametrize("inner", ["do", "forget"])
@pytest.mark.parametrize("amid", ["token", "end", "forget"])
def test_a_signal_handler_does_not_wait_for_the_thread_that_it_interrupts(
    directory: Path, monkeypatch: pytest.MonkeyPatch, amid: str, inner: str
) -> None:
    """It may come where its thread has locked the directory, or the last token. What it can not
    have then is counted; and what it forgets is forgotten when its thread has gone on."""
    flight = ShardedFlight(backend=HostBackend(directory))
    elsewhere = HostBackend(directory)
    keys = ["other"] if inner == "forget" else []
    keys += ["k"] if amid == "forget" else []
    led = {elsewhere.name(None, (key,)): key for key in keys}
    turns = elsewhere.join([(name, 0) for name in led], True)
    leads = [turn.result(PATIENCE) for turn in turns]
    answers: list[Any] = []
    real_pread, real_unlink = os.pread, os.unlink

    def handler() -> None:
        monkeypatch.setattr(os, "pread", real_pread)
        monkeypatch.setattr(os, "unlink", real_unlink)
        answers.append(
            flight.do(lambda: "inner", "other") if inner == "do" else flight.forget("other")
        )

    def pread(fd: int, size: int, offset: int) -> bytes:
        if size == 32:
            handler()
        return real_pread(fd, size, offset)

    def unlink(path: str) -> None:
        handler()
        real_unlink(path)

    if amid == "token":
        monkeypatch.setattr(os, "pread", pread)
    else:
        monkeypatch.setattr(os, "unlink", unlink)
    if amid == "forget":
        not_for_ever(spawn(flight.forget, "k"))
    else:
        assert not_for_ever(spawn(flight.do, lambda: "outer", "k")) == ("outer", False)
    assert answers == [("inner", False) if inner == "do" else None]
    waits = (amid, inner) not in {("token", "forget"), ("end", "do")}
    assert flight.stats().fallbacks == (1 if waits else 0)
    for name in led:
        eventually(partial(gone, directory, name))
    for lead in leads:
        assert isinstance(lead, Lead)
        elsewhere.give_up(lead)


def gone(directory: Path, name: bytes) -> bool:
    return not (directory / name.hex()).exists()


@pytest.mark.parametrize("threads", [True, False])
def test_a_lead_is_dropped_where_its_thread_has_locked_the_directory(
    directory: Path, monkeypatch: pytest.MonkeyPatch, threads: bool
) -> None:
    """The garbage collector comes at any point of a `forget`, which has locked it alone."""
    backend, other = HostBackend(directory), HostBackend(directory)
    leads = [led_by(backend)]
    (forgotten,) = backend.join([(b"f" * 20, 0)], True)
    forgotten_lead: Any = forgotten.result(PATIENCE)
    real = host._File.named

    def drop_and_look(file: Any) -> bool:
        leads.clear()
        gc.collect()
        return real(file)

    def no_thread(*_: Any) -> int:
        raise RuntimeError("can't start new thread")

    if not threads:
        monkeypatch.setattr(host, "start_new_thread", no_thread)
    monkeypatch.setattr(host._File, "named", drop_and_look)
    forgetting = spawn(backend.forget, b"f" * 20)
    not_for_ever(forgetting).result(PATIENCE)
    assert not leads
    if threads:
        eventually(lambda: files(directory) == [])
    other.give_up(led_by(other))
    assert files(directory) == []
    backend.give_up(forgotten_lead)


def test_a_directory_that_is_removed_takes_no_outcome_away(directory: Path) -> None:
    """Something may clear up there: who has met by then is served all the same."""
    first, second = HostBackend(directory), HostBackend(directory)
    lead = led_by(first)
    (follower,) = second.join([(b"n" * 20, 0)], True)
    shutil.rmtree(directory)
    (finished,) = first.finish([(lead, b"outcome")], True)
    assert finished.result(PATIENCE) == 1
    assert follower.result(PATIENCE) == Sealed(lead.token, b"outcome")


@pytest.mark.parametrize("at", ["_File.try_lock", "HostBackend._attach"])
def test_who_left_before_it_was_a_follower_leaves_no_mark(
    directory: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """It is entered on a thread of the backend, which may come late: when there is a new leader."""
    first, second = HostBackend(directory), HostBackend(directory)
    lead = led_by(first)
    if at == "HostBackend._attach":  # its process follows already, though nobody waits
        (before,) = second.join([(b"n" * 20, 0)], True)
        assert before.cancel()
        eventually(lambda: marks(directory) == 0)
    (file,) = files(directory)
    written = file.read_bytes()
    owner, method = at.split(".")
    entering, enter = hold(monkeypatch, getattr(host, owner), method)
    (late,) = second.join([(b"n" * 20, 0)], False)
    assert entering.wait(PATIENCE)
    assert late.cancel()
    enter.set()
    second.close()  # when it has entered
    assert file.read_bytes() == written
    assert [done.result(PATIENCE) for done in first.finish([(lead, b"outcome")], True)] == [0]


def test_a_killed_leader_is_replaced_within_50_ms(directory: Path, start: Any) -> None:
    """The best of some: the machine may be busy, and a backend that polls never is so fast."""
    took: list[float] = []
    while not took or (min(took) > 0.05 and len(took) < 20):
        first, second = start(2)
        leader = first.call("do", "k")
        leader.runs()
        follower = second.call("do", "k")
        eventually(lambda: marks(directory) == 1)
        before = time.perf_counter()
        first.signal(signal.SIGKILL)
        follower.runs()
        took.append(time.perf_counter() - before)
        follower.let_return(1)
        follower.ends()
    assert min(took) <= 0.05


def test_a_stopped_leader_is_waited_for(directory: Path, start: Any) -> None:
    first, second = start(2)
    leader = first.call("do", "k")
    leader.runs()
    follower = second.call("do", "k")
    eventually(lambda: marks(directory) == 1)
    first.signal(signal.SIGSTOP)
    leader.let_return(1)
    other = second.call("do", "other")
    other.runs()  # nothing else is held up
    assert follower.events.empty()
    first.signal(signal.SIGCONT)
    assert follower.ends()["value"] == 1


def test_nothing_is_left_in_the_directory(directory: Path, start: Any) -> None:
    first, second = start(2)
    leader = first.call("do", "k")
    leader.runs()
    follower = second.call("do", "k")
    eventually(lambda: marks(directory) == 1)
    leader.let_return("x" * 100_000)
    assert follower.ends()["value"] == "x" * 100_000
    assert files(directory) == []
    killed = first.call("do", "l")
    killed.runs()
    first.kill()
    assert len(files(directory)) == 1
    HostBackend(directory)
    assert files(directory) == []


def test_what_a_killed_leader_left_does_not_count(directory: Path, start: Any) -> None:
    first, second, third = start(3)
    first.call("do", "k").runs()
    second.call("do", "k")
    eventually(lambda: marks(directory) == 1)
    second.kill()
    first.kill()
    call = third.call("do", "k")
    call.runs()
    call.let_return(1)
    assert (call.ends()["shared"], third.stats()["takeovers"]) == (False, 0)


# -- the directory --------------------------------------------------------------------------------


def test_the_directory_is_made_private(directory: Path) -> None:
    HostBackend(directory)
    assert directory.stat().st_mode & 0o7777 == 0o700


def test_a_directory_that_others_can_enter_is_refused(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o755)
    with pytest.raises(BackendError, match="0700"):
        HostBackend(directory)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_somebody_else_is_refused(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    os.chown(directory, 12345, 12345)
    with pytest.raises(BackendError, match="12345"):
        HostBackend(directory)


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for path in (tmp_path / "file", tmp_path / "link", tmp_path / "none" / "none"):
        with pytest.raises(BackendError):
            HostBackend(path)
    with pytest.raises(BackendError, match="directory"):
        HostBackend(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


_AS_NOBODY = """
import os, sys
from pathlib import Path
from shardedflight import BackendError
from shardedflight.backends import MessagePack
from shardedflight.backends import host
from shardedflight.backends.host import HostBackend
path, codec = Path(sys.argv[1]), MessagePack()  # before nothing can be imported any more
os.chown(path, 65534, 65534); path.chmod(0o500)
os.setgroups([]); os.setgid(65534); os.setuid(65534)
os.chdir(path)
try:
    HostBackend(path, codec=codec)
except BackendError as error:
    print("refused", error.__cause__)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_read_only_directory_is_refused() -> None:
    directory = tempfile.mkdtemp()  # pytest's are root's alone
    said = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, str(directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    Path(directory).rmdir()
    assert said.stdout.startswith("refused [Errno 13]"), said.stderr


def test_a_directory_that_goes_away_leaves_the_process_tier(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flight = ShardedFlight(backend=HostBackend(directory))
    for entry in directory.iterdir():
        entry.unlink()
    directory.rmdir()
    with caplog.at_level(logging.WARNING, "shardedflight"):
        for number in range(3):
            assert flight.do(lambda: number, "k") == (number, False)  # noqa: B023
    assert flight.stats().fallbacks == 3
    assert len(caplog.records) == 1
    directory.mkdir(mode=0o700)
    assert flight.do(lambda: 4, "k") == (4, False)
    assert flight.stats().remote_leads == 1


def test_an_outcome_that_the_disk_does_not_take_is_a_lost_one(directory: Path, start: Any) -> None:
    """A limit on the size of files is the full disk that a test can have."""
    (follower_process,) = start(1)
    flight = ShardedFlight(backend=HostBackend(directory), name="workers")
    running, go = threading.Event(), threading.Event()

    def run() -> str:
        running.set()
        assert go.wait(PATIENCE)
        return "x" * 10_000

    leader = spawn(flight.do, run, "k")
    assert running.wait(PATIENCE)
    follower = follower_process.call("do", "k")
    eventually(lambda: marks(directory) == 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    try:
        go.set()
        assert leader.result(PATIENCE) == ("x" * 10_000, False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert flight.stats().fallbacks == 1
    follower.runs()
    follower.let_return(1)
    assert follower.ends()["value"] == 1


def test_without_descriptors_the_process_tier_remains(directory: Path) -> None:
    flight = ShardedFlight(backend=HostBackend(directory))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        assert flight.do(lambda: 1, "k") == (1, False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert flight.stats().fallbacks == 1


_AFTER_MAIN = """
import asyncio, sys, threading
from shardedflight import ShardedFlight
from shardedflight.backends.host import HostBackend
flight = ShardedFlight(backend=HostBackend(sys.argv[1]))
runs, ended = threading.Event(), threading.main_thread().join
async def run_until_main_has_ended():
    runs.set()
    ended()
    return "old"
async def new():
    return "new"
async def main():
    await flight.do_async(new, "the pool has a thread")
    print(await flight.do_async(run_until_main_has_ended, "k"), flush=True)
    print(await flight.do_async(new, "k"), flush=True)
    print(flight.stats().errors, flight.in_flight(), flush=True)
threading.Thread(target=lambda: asyncio.run(main())).start()
runs.wait()
"""


def test_an_event_loop_may_outlive_the_main_thread(directory: Path) -> None:
    """The pools of `concurrent.futures` take no more work then."""
    said = subprocess.run(
        [sys.executable, "-c", _AFTER_MAIN, str(directory)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert said.stdout.splitlines() == ["('old', False)", "('new', False)", "0 0"], said.stderr


@pytest.mark.parametrize("call", range(2))
def test_a_call_beside_the_close_of_its_backend_is_answered(
    directory: Path, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool is closed when it has been looked up, by the join or by the end."""
    backend = HostBackend(directory)
    flight = ShardedFlight(backend=backend)
    real = host.without_context
    calls = itertools.count()

    def close_and_call(*args: Any) -> Any:
        if next(calls) == call:
            spawn(backend.close).result(PATIENCE)
        return real(*args)

    async def value() -> int:
        return 1

    monkeypatch.setattr(host, "without_context", close_and_call)
    assert asyncio.run(flight.do_async(value, "k")) == (1, False)
    assert (flight.stats().remote_leads, flight.stats().fallbacks) == (1, 0)
    assert files(directory) == []


def test_what_a_pool_keeps_that_can_start_no_thread_is_done_once(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the work in its queue by then, for a thread that it can start later."""
    backend = HostBackend(directory)
    flight = ShardedFlight(backend=backend)
    real = threading.Thread.start
    threads = False
    tokens: list[int] = []

    def start(thread: threading.Thread) -> None:
        if "shardedflight-host" in thread.name and not threads:
            raise RuntimeError("can't start new thread")
        real(thread)

    def next_token(asked: HostBackend) -> int:
        tokens.append(real_token(asked))
        return tokens[-1]

    async def value() -> int:
        return 1

    real_token = HostBackend._next_token
    monkeypatch.setattr(HostBackend, "_next_token", next_token)
    monkeypatch.setattr(threading.Thread, "start", start)
    assert asyncio.run(flight.do_async(value, "k")) == (1, False)
    threads = True
    assert asyncio.run(flight.do_async(value, "k")) == (1, False)
    backend.close()
    assert len(tokens) == flight.stats().remote_leads == 2
    assert files(directory) == []


def test_what_is_larger_than_the_limit_stays_in_its_process(directory: Path, start: Any) -> None:
    (second,) = start(1)
    flight = ShardedFlight(backend=HostBackend(directory, limit=100), name="workers")
    running, go = threading.Event(), threading.Event()

    def run() -> str:
        running.set()
        assert go.wait(PATIENCE)
        return "x" * 200

    leader = spawn(flight.do, run, "k")
    assert running.wait(PATIENCE)
    follower = second.call("do", "k")
    eventually(lambda: marks(directory) == 1)
    go.set()
    assert leader.result(PATIENCE)[0] == "x" * 200
    follower.runs()
    follower.let_return("own")
    assert follower.ends()["value"] == "own"
    assert second.stats()["fallbacks"] == flight.stats().fallbacks == 1


@pytest.mark.parametrize("content", [b"", b"x", b"\0" * 16, b"9" * 32, b"-5", b"1_0"])
@pytest.mark.parametrize("method", ["do", "do_future"])
def test_a_last_token_that_is_none_is_passed_over(
    directory: Path, method: str, content: bytes
) -> None:
    """As after a crash of the machine: some file systems leave zeros."""
    flight = ShardedFlight(backend=HostBackend(directory))
    (directory / "token").write_bytes(content)
    if method == "do":
        assert flight.do(fencing_token, "k")[0] in range(10**15, 2**64)
    else:
        assert flight.do_future(fencing_token, "k").result(PATIENCE)[0] in range(10**15, 2**64)
    assert flight.stats().fallbacks == 0


@pytest.mark.parametrize("how", HOWS)
def test_outcomes_that_can_not_be_read_are_asked_for_three_times(
    directory: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the function runs for its process, for each of many keys as for one."""
    backend = HostBackend(directory)
    flight = ShardedFlight(backend=backend)
    tokens = itertools.count(1)
    asked: list[int] = []

    def join(wanted: Any, here: bool) -> list[Turn]:
        turns = [_HostTurn(backend, name) for name, _ in wanted]
        for turn, (_, reject) in zip(turns, wanted, strict=True):
            asked.append(reject)
            assert len(asked) < 100, "it never ends"
            assert turn.settle(Sealed(next(tokens), b"another codec's"))
        return list(turns)

    monkeypatch.setattr(backend, "join", join)
    keys = ["k", "l"] if "many" in how else ["k"]

    def function(*_: Any) -> Any:
        return dict.fromkeys(keys, "own") if "many" in how else "own"

    async def coroutine(*_: Any) -> Any:
        return function()

    called = getattr(flight, how)(
        coroutine if "async" in how else function, keys if "many" in how else "k"
    )
    if how == "do_future":
        called = called.result(PATIENCE)
    elif "async" in how:
        called = asyncio.run(called)
    own = ("own", False)
    assert called == (dict.fromkeys(keys, own) if "many" in how else own)
    assert len(asked) == 3 * len(keys)
    assert asked.count(0) == len(keys)
    assert (flight.stats().misses, flight.stats().remote_follows) == (3 * len(keys), 0)


@pytest.mark.parametrize("payload", [b"", b"nonsense", b"SF\x01V" + b"x" * 30])
def test_an_outcome_that_can_not_be_read_is_a_miss(
    directory: Path, start: Any, payload: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (second,) = start(1)
    backend = HostBackend(directory)
    flight = ShardedFlight(backend=backend, name="workers")
    monkeypatch.setattr(backend, "seal", lambda outcome: payload)
    running, go = threading.Event(), threading.Event()

    def run() -> str:
        running.set()
        assert go.wait(PATIENCE)
        return "never"

    leader = spawn(flight.do, run, "k")
    assert running.wait(PATIENCE)
    follower = second.call("do", "k")
    eventually(lambda: marks(directory) == 1)
    go.set()
    leader.result(PATIENCE)
    follower.runs()
    follower.let_return("own")
    assert follower.ends()["value"] == "own"
    assert (second.stats()["misses"], second.stats()["remote_follows"]) == (1, 0)


# -- values and keys ------------------------------------------------------------------------------


def test_a_value_that_would_change_is_an_error_at_once(directory: Path) -> None:
    flight = ShardedFlight(backend=HostBackend(directory))
    with pytest.raises(TypeError, match="tuple"):
        flight.do(lambda: (1, 2), "k")

    async def pair() -> Any:
        return (1, 2)

    with pytest.raises(TypeError, match="tuple"):
        asyncio.run(flight.do_async(pair, "k"))
    with pytest.raises(FlightErrorGroup, match="1 of 2 keys failed") as caught:
        flight.do_many(lambda keys: {"k": (1, 2), "l": 3}, ["k", "l"])
    assert caught.value.found == {"l": (3, False)}
    assert flight.in_flight() == 0
    assert files(directory) == []


def test_a_value_is_refused_even_if_the_error_is_larger_than_the_limit(directory: Path) -> None:
    """Of several keys, only the one whose value would change fails."""
    flight = ShardedFlight(backend=HostBackend(directory, limit=100))
    with pytest.raises(TypeError, match="type=") as refused:
        flight.do(lambda: (1, 2), "k")
    assert type(refused.value) is TypeError

    async def pair() -> Any:
        return (1, 2)

    with pytest.raises(TypeError, match="type="):
        asyncio.run(flight.do_async(pair, "k"))
    with pytest.raises(FlightErrorGroup, match="1 of 2 keys failed") as caught:
        flight.do_many(lambda keys: {"k": (1, 2), "l": 3}, ["k", "l"])
    assert caught.value.found == {"l": (3, False)}
    assert [type(error) for error in caught.value.exceptions] == [TypeError]
    assert flight.stats().fallbacks == 3
    assert files(directory) == []


@pytest.mark.parametrize("how", ["do", "do_future", "do_many", "do_async"])
def test_a_key_that_can_not_leave_is_an_error_before_anything_runs(
    directory: Path, how: str
) -> None:
    flight = ShardedFlight(backend=HostBackend(directory))
    ran: list[Any] = []
    with pytest.raises(TypeError, match="build_key="):
        if how == "do_many":
            flight.do_many(lambda keys: ran.append(keys) or {}, [object()])
        elif how == "do_async":
            asyncio.run(flight.do_async(lambda: asyncio.sleep(0, ran.append(1)), object()))
        else:
            getattr(flight, how)(lambda: ran.append(1), object())
    assert not ran
    assert flight.in_flight() == 0


def test_what_is_refused_hands_over(directory: Path) -> None:
    """A coroutine function given to `do`, a plain one to `do_async`: nothing stays in the way."""
    flight = ShardedFlight(backend=HostBackend(directory))

    async def coroutine() -> int:
        return 1

    with pytest.raises(TypeError, match="do_async"):
        flight.do(lambda: coroutine(), "k")
    with pytest.raises(TypeError, match="do_future"):
        asyncio.run(flight.do_async(lambda: 1, "k"))  # type: ignore[arg-type, return-value]  # pyright: ignore[reportArgumentType]
    assert files(directory) == []
    assert flight.do(lambda: 1, "k") == (1, False)


@pytest.mark.parametrize("how", [*HOWS, "do_many, led for all", "do_many_async, led for all"])
def test_who_does_not_lead_for_all_processes_has_no_token(
    directory: Path, tmp_path: Path, how: str
) -> None:
    """Not that of the function that calls, either, whose context a coroutine and, free-threaded, a
    new thread have. Nor has a function for many keys, of which each has its own."""
    how, _, led = how.partition(", ")
    gone = tmp_path / "gone"
    backend = HostBackend(gone)
    found: list[int | None] = []

    def function(*_: Any) -> Any:
        found.append(fencing_token())
        return {"k": 1}

    async def coroutine(*_: Any) -> Any:
        return function()

    def call() -> None:
        assert fencing_token() is not None
        work = coroutine if "async" in how else function
        called = getattr(flight, how)(work, ["k"] if "many" in how else "k")
        if how == "do_future":
            called.result(PATIENCE)
        elif "async" in how:
            asyncio.run(called)

    with ThreadPoolExecutor() as pool:
        flight = ShardedFlight(backend=backend, executor=pool)
        if not led:
            (gone / "token").unlink()
            gone.rmdir()
        ShardedFlight(backend=HostBackend(directory)).do(call, "k")
    assert found == [None]
    assert (flight.stats().remote_leads, flight.stats().fallbacks) == ((1, 0) if led else (0, 1))


def test_the_token_is_there_while_the_function_runs(directory: Path) -> None:
    flight = ShardedFlight(backend=HostBackend(directory))

    async def token() -> Any:
        await asyncio.sleep(0)
        return fencing_token()

    tokens: list[Any] = [
        flight.do(fencing_token, "k")[0],
        asyncio.run(flight.do_async(token, "k"))[0],
    ]
    assert fencing_token() is None
    assert 0 < tokens[0] < tokens[1]
    assert ShardedFlight().do(fencing_token, "k") == (None, False)


def test_a_loop_closed_under_its_leader_hands_over(directory: Path, start: Any) -> None:
    (second,) = start(1)
    flight = ShardedFlight(backend=HostBackend(directory), name="workers")

    async def forever() -> None:
        await asyncio.get_running_loop().create_future()

    def lead_and_close() -> None:
        loop = asyncio.new_event_loop()
        task = loop.create_task(flight.do_async(forever, "k"))
        while not marks(directory):
            loop.run_until_complete(asyncio.sleep(0.001))
        for pending in asyncio.all_tasks(loop):
            pending._log_destroy_pending = False  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
        assert not task.done()
        loop.close()

    leader = spawn(lead_and_close)
    eventually(lambda: len(files(directory)) == 1)
    follower = second.call("do", "k")
    leader.result(PATIENCE)

    follower.runs()
    follower.let_return(1)
    assert follower.ends()["value"] == 1


# -- coalesce -------------------------------------------------------------------------------------


def doubled(number: int) -> int:
    return 2 * number


class Rows:
    def get(self, number: int) -> int:
        return number

    def get_by_key(self, number: int) -> int:
        return number


def test_coalesced_functions_need_a_name_that_others_know(directory: Path) -> None:
    flight = ShardedFlight(backend=HostBackend(directory))
    assert coalesce(flight=flight)(doubled)(2) == 4
    assert flight.stats().remote_leads == 1
    with pytest.raises(ValueError, match="by name"):
        coalesce(flight=flight)(lambda: 1)

    def inner() -> int:
        return 1

    with pytest.raises(ValueError, match="by name"):
        coalesce(flight=flight)(inner)


def test_coalesced_methods_need_a_key(directory: Path) -> None:
    flight = ShardedFlight(backend=HostBackend(directory))
    get = coalesce(flight=flight)(Rows.get)
    with pytest.raises(TypeError, match="key="):
        get.__get__(Rows())(1)
    get = coalesce(flight=flight, key=lambda self, number: number)(Rows.get_by_key)
    assert get.__get__(Rows())(1) == 1


# -- fork -----------------------------------------------------------------------------------------


@need_fork
def test_a_forked_child_does_not_hold_its_parents_locks(directory: Path, start: Any) -> None:
    (follower_process,) = start(1)
    flight = ShardedFlight(backend=HostBackend(directory), name="workers")
    read, write = os.pipe()
    lives, life = os.pipe()
    pid = os.fork()
    if pid == 0:  # it leads, forks a child that lives on, and is killed

        def run() -> None:
            child = os.fork()
            os.close(life)
            if child == 0:
                os.read(lives, 1)  # until the test ends
                os._exit(0)
            os.write(write, b"%d" % child)
            signal.pause()

        try:
            flight.do(run, "k")
        finally:
            os._exit(1)
    grandchild = int(os.read(read, 20))
    follower = follower_process.call("do", "k")
    eventually(lambda: marks(directory) == 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    follower.runs()
    os.kill(grandchild, 0)  # it is alive all the while
    follower.let_return(1)
    assert follower.ends()["value"] == 1
    for descriptor in (read, write, lives, life):
        os.close(descriptor)


def test_who_is_late_to_tell_that_a_loop_was_closed_does_not_end_the_heirs_turn(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each loop that is closed has a thread look for what was led there; two may find the same."""
    here, elsewhere = (ShardedFlight(backend=HostBackend(directory)) for _ in range(2))
    tier = here._tier
    assert tier is not None
    lose = tier.lose
    gate, entered, resume, told = (threading.Event() for _ in range(4))

    def fn() -> None:
        gate.wait(PATIENCE)
        raise SystemExit

    async def own() -> str:
        return "own"

    def lose_late(*args: Any) -> None:
        if entered.is_set():
            lose(*args)
            return
        entered.set()
        resume.wait(PATIENCE)
        lose(*args)
        told.set()

    monkeypatch.setattr(tier, "lose", lose_late)
    leader = spawn(elsewhere.do, fn, "k")
    eventually(lambda: bool(files(directory)))
    loop = asyncio.new_event_loop()
    stopped = spawn(loop.run_forever)
    former = asyncio.run_coroutine_threadsafe(here.do_async(own, "k"), loop)
    eventually(lambda: marks(directory) == 1 and len(tier._abroad) == 1)
    (known,) = tier._abroad.values()
    heir = spawn(here.do, lambda: "heir", "k")
    eventually(lambda: here.stats().waiting == 1)
    loop.call_soon_threadsafe(loop.stop)
    stopped.result(PATIENCE)
    loop.close()
    assert entered.wait(PATIENCE)
    here._loop_closed()  # as another one's thread
    eventually(lambda: bool(tier._abroad) and known not in tier._abroad.values())
    resume.set()
    assert told.wait(PATIENCE)
    gate.set()
    assert isinstance(leader.exception(PATIENCE), SystemExit)
    assert heir.result(PATIENCE) == ("heir", False)
    del former
    gc.collect()
