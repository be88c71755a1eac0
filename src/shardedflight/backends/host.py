"""`HostBackend`: the processes of one machine meet in a directory, by the locks of its files.

**Leading.** The file of a key, named by the key's digest, belongs to who has locked it with
`flock`. The kernel frees the lock when its holder ends, in whatever way: so there is no lease, and
nothing to guess. A leader that is stopped is not lost, its followers wait for it.

**Following.** A follower that finds the file locked appends a mark to it, and a thread of its
process waits for a shared lock; there is one for each key that the process follows. The leader
takes the file's name away, looks for marks then, appends the outcome if there are any, and unlocks.
All followers get the lock at once. One whose mark came too late finds no outcome and begins anew.
When nobody of its process waits any more, a mark is taken back: it is appended once more. The
kernel removes the file when the last of them has closed it.

**A lost leader** leaves a lock that is free, and a file that can be written: who has ended well has
made it read-only first. Its followers take the name away from the file, if it still has one, and
begin anew: one of them leads. `forget` takes the name away, and appends a mark of its own.

Descriptors that a forked child inherits would keep a lock: it closes them before anything else.
"""

import contextlib
import errno
import itertools
import os
import stat
import struct
import threading
import time
import weakref
from _thread import RLock, start_new_thread
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from shardedflight._lock import SteadyLock
from shardedflight._threads import pools_of_parents, without_context
from shardedflight._tier import Lead, Sealed, Turn
from shardedflight.exceptions import BackendError

from ._protocol import Codec, Wire

try:
    import fcntl
except ImportError as error:
    raise ImportError("the host tier needs the file locks of POSIX systems") from error

__all__ = ["HostBackend"]

#: What a file consists of: marks of followers and of `forget`, and at last the outcome with its
#: token and length.
_MARK, _OUTCOME, _FORGOTTEN = b"\x01", b"\x02", b"\x01forgot\x03"
_MARK_SIZE = 8
_HEAD = struct.Struct(">QQ")

#: A call that has followed so many leaders that left no outcome runs its function for its process.
_ROUNDS = 5
#: The mode of a file whose leader has ended well. No right of anybody depends on it.
_ENDED = 0o400

#: Descriptors of files that may be locked; changed together with what opens them, so that a forked
#: child knows them all.
_held: set[int] = set()
_forking = RLock()
_backends: "weakref.WeakSet[HostBackend]" = weakref.WeakSet()


class _Mine(threading.local):
    """What this thread has locked for a moment. What is closed counts no more."""

    def __init__(self) -> None:
        self.locked: list[_File] = []


_mine = _Mine()


class _File:
    """An open file of a key, and what tells it from a later one of the same name."""

    __slots__ = ("_closing", "_identity", "_lock", "_owner", "fd", "forgotten", "lost", "path")

    def __init__(self, path: str, flags: int = os.O_RDWR | os.O_CREAT | os.O_APPEND) -> None:
        self.path = path
        #: Held where `fd` is used by another thread than its leader's, and where it is taken away:
        #: once that is closed, its number may be a stranger's.
        self._closing = SteadyLock()
        with _forking:
            self.fd = os.open(path, os.O_NOFOLLOW | flags, 0o600)
            _held.add(self.fd)
        self._owner = os.getpid()
        self._identity = _identity(os.fstat(self.fd))
        #: How it was locked by `lock`.
        self._lock = fcntl.LOCK_UN
        #: Whether there was the mark of a forget when it was read last.
        self.forgotten = False
        #: Its leader, of this process, has ended without an outcome.
        self.lost = False

    def try_lock(self) -> bool:
        """Locks the file if nobody has."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def lock(self, lock: int) -> None:
        """Locks it for a moment, until it is closed.

        Raises:
            OSError: This thread has done so already, and runs a signal handler or a destructor in
                the midst of that: it would wait for itself, and all other processes with it.
        """
        mine = _mine.locked
        mine[:] = [file for file in mine if file.ours()]
        if not lock & fcntl.LOCK_NB and any(
            file.path == self.path and (file._lock | lock) & fcntl.LOCK_EX for file in mine
        ):
            raise OSError(errno.EDEADLK, os.strerror(errno.EDEADLK), self.path)
        self._lock = lock
        mine.append(self)
        fcntl.flock(self.fd, lock)

    def named(self) -> bool:
        """Whether the file still has its name, so that others find it."""
        try:
            return _identity(os.stat(self.path, follow_symlinks=False)) == self._identity
        except FileNotFoundError:
            return False

    def read(self) -> tuple[set[bytes], bytes]:
        """The marks that were not taken back, and what follows the marks."""
        with self._closing:
            data = os.pread(self.fd, os.fstat(self.fd).st_size, 0)
        marks: set[bytes] = set()
        start = 0
        while data.startswith(_MARK, start):
            mark = data[start : start + _MARK_SIZE]
            if mark in marks and mark != _FORGOTTEN:
                marks.remove(mark)
            else:
                marks.add(mark)
            start += _MARK_SIZE
        self.forgotten = _FORGOTTEN in marks
        return marks, data[start:]

    def forget(self) -> None:
        """Others shall not find it any more, and who has found it shall know why."""
        if self.unname(fcntl.LOCK_EX):  # first: what can be found is not forgotten
            with self._closing:
                if self.ours():
                    os.write(self.fd, _FORGOTTEN)

    def over(self) -> bool:
        """Whether it was forgotten, or has an outcome."""
        marks, outcome = self.read()
        return _FORGOTTEN in marks or bool(outcome)

    def unname(self, lock: int = fcntl.LOCK_SH) -> bool:
        """Takes its name away, if it has it.

        If another one took it away between the look and the deed, it could be a later file's by
        then. So only who has locked the file does it; and `forget`, which has locked the directory
        alone, while all others share its lock.
        """
        try:
            directory = _File(self.path.rpartition("/")[0], os.O_RDONLY)
            try:
                directory.lock(lock)
                if not self.named():
                    return False
                os.unlink(self.path)
            finally:
                directory.close()
        except FileNotFoundError:
            return False
        return True

    def close(self, unlock: bool = True) -> None:
        """Closes it, once, and in the process that has opened it."""
        if self._owner != os.getpid():  # a thread that is gone may have the lock
            return
        with self._closing:
            fd, self.fd = self.fd, -1
        if fd < 0:
            return
        if unlock:  # a child that is being forked may have the descriptor for a moment more
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)
        _held.discard(fd)
        os.close(fd)

    def ours(self) -> bool:
        """Whether this process has opened it and not closed it."""
        return self.fd >= 0 and self._owner == os.getpid()


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


class _HostLead(Lead):
    __slots__ = ("_ends", "file")

    def __init__(self, file: _File, token: int, inherited: bool) -> None:
        super().__init__(token, inherited)
        self.file = file
        self._ends = itertools.count()

    def end(self) -> bool:
        """Whether the caller is to end it. A caller that leaves may give up what is ending.

        Two that take a file's name away could take that of the next one, between the look and the
        deed.
        """
        return next(self._ends) == 0 and self.file.ours()

    def __del__(self) -> None:
        if hasattr(self, "_ends") and self.end():  # the flight has lost it
            _drop(self.file)


def _drop(file: _File, lock: int = fcntl.LOCK_SH | fcntl.LOCK_NB) -> None:
    """Ends a lead without an outcome.

    It may be the garbage collector that does so, at any point, even where this thread has locked
    the directory alone: then it is another thread that waits for that.
    """
    file.lost = True
    try:
        file.unname(lock)
    except BlockingIOError:
        # With no more threads it keeps its name, as a leader's that was killed.
        with contextlib.suppress(RuntimeError):
            start_new_thread(_drop, (file, fcntl.LOCK_SH))
            return
    except OSError:
        pass
    file.close()


class _HostTurn(Turn):
    _backend: "HostBackend"

    def __init__(self, backend: "HostBackend", name: bytes) -> None:
        super().__init__(backend)
        self.name = name
        #: What it leads or follows. Written by who enters it, before anybody can join it.
        self.file: _File | None = None
        #: By which it follows. Under the backend's lock.
        self.watch: _Watch | None = None
        #: How many leaders it has followed in vain, and whether the last one was lost.
        self.rounds = 0
        self.lost = False
        #: The token of an outcome that could not be read.
        self.reject = 0

    def cancel(self) -> bool:
        if not super().cancel():
            return False
        file = self.file
        if file is not None and file.ours():  # or who enters it will see it
            # On another thread: it may be the garbage collector that does so, at any point.
            with contextlib.suppress(RuntimeError):  # no more threads
                start_new_thread(self._backend._leave, (self,))
        return True

    def joinable(self) -> bool:
        file = self.file
        if file is None:
            return True
        try:
            # Who waits for a leader that was lost, or that has not seen its mark, begins anew: that
            # can be joined. Where there is an outcome, a forget finds nothing to mark.
            joinable = file.lost or (file.fd >= 0 and (file.named() or not file.over()))
        except OSError:  # closed meanwhile
            joinable = False
        return joinable or self.file is not file

    def was_forgotten(self) -> bool:
        # What has ended by itself is not joined, for a forget would not have found it.
        file = self.file
        return file is not None and file.forgotten


class _Watch:
    """One key that this process follows: a thread that waits for its leader, and who is served."""

    __slots__ = ("_mark", "file", "name", "turns")

    def __init__(self, turn: _HostTurn, file: _File) -> None:
        self.name = turn.name
        self.file = file
        self._mark = _MARK + os.urandom(_MARK_SIZE - len(_MARK))
        self.mark()
        #: Under the backend's lock; None once the leader has ended.
        self.turns: list[_HostTurn] | None = [turn]

    def mark(self) -> None:
        """Somebody waits; or nobody does any more, every second time."""
        os.write(self.file.fd, self._mark)


class HostBackend(Wire):
    """Lets the worker processes of one machine share executions. For POSIX systems.

    Args:
        directory: Where they meet: a local directory that is this user's alone. It is made if
            there is none.
        namespace: Processes with one namespace meet, those with another never.
        codec: For values; by default `MessagePack()`.
        limit: Bytes that an outcome may have on its way to other processes. With a larger one,
            each process runs its own function.

    Raises:
        BackendError: The directory can not be used, or an argument is wrong.

    May be used by any number of flights, threads and event loops. A forked child may go on using
    it. Flights with one name, or without, meet on one backend.
    """

    def __init__(
        self,
        directory: "str | os.PathLike[str]",
        *,
        namespace: str = "shardedflight",
        codec: Codec | None = None,
        limit: int = 64 << 20,
    ) -> None:
        super().__init__(namespace, codec, limit)
        self.directory = _checked(directory)
        self._restart()
        self._sweep()
        _backends.add(self)

    def _restart(self) -> None:
        self._lock = SteadyLock()
        self._watches: dict[bytes, _Watch] = {}
        self._pool: ThreadPoolExecutor | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.directory}>"

    def close(self) -> None:
        """Ends the backend's idle threads. It can be used again; nothing has to be closed."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()

    # -- as a backend -----------------------------------------------------------------------------

    def join(self, wanted: Sequence[tuple[bytes, int]], here: bool) -> Sequence[Turn]:
        """See `Backend.join`."""
        turns = [_HostTurn(self, name) for name, _ in wanted]
        for turn, (_, reject) in zip(turns, wanted, strict=True):
            turn.reject = reject
        asked: Future[None] | None = None
        if len(turns) > 1:
            asked = Future()
            for turn in turns:
                turn.asked = asked
        self._run(here, self._enter_all, turns, asked)
        return turns

    def finish(self, ended: Sequence[tuple[Lead, bytes]], here: bool) -> "Sequence[Future[int]]":
        """See `Backend.finish`. Nobody is fenced here: a lock is not lost."""
        futures: list[Future[int]] = [Future() for _ in ended]
        self._run(here, self._finish_all, ended, futures)
        return futures

    def give_up(self, lead: Lead) -> None:
        """See `Backend.give_up`. It does not wait for locks."""
        assert isinstance(lead, _HostLead)
        if lead.end():
            _drop(lead.file)

    def forget(self, name: bytes, lead: Lead | None = None) -> "Future[None]":
        """See `Backend.forget`. It is done at once."""
        done: Future[None] = Future()
        try:
            if lead is None:
                file = _File(self._path(name), os.O_RDWR | os.O_APPEND)
                try:
                    file.forget()
                finally:
                    file.close()
            else:
                assert isinstance(lead, _HostLead)
                lead.file.forget()
        except FileNotFoundError:
            done.set_result(None)
        except OSError as error:
            if error.errno == errno.EDEADLK:  # it is done as soon as it can be, and not in time
                with contextlib.suppress(RuntimeError):
                    start_new_thread(self.forget, (name, lead))
            done.set_exception(_unusable(error))
        else:
            done.set_result(None)
        return done

    def _run(self, here: bool, work: Callable[..., None], *args: Any) -> None:
        if here:
            work(*args)
            return
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(4, thread_name_prefix="shardedflight-host")
            pool = self._pool
        jobs: list[Callable[[], None]] = [partial(work, *args)]
        try:
            without_context(pool.submit, _run_once, jobs)
        except RuntimeError:  # closed meanwhile, no more threads, or the main thread has ended
            _run_once(jobs)

    def _path(self, name: bytes) -> str:
        return f"{self.directory}/{name.hex()}"

    # -- joining ----------------------------------------------------------------------------------

    def _enter_all(self, turns: Sequence[_HostTurn], asked: "Future[None] | None") -> None:
        try:
            for turn in turns:
                self._enter(turn)
        finally:
            if asked is not None:
                asked.set_result(None)

    def _enter(self, turn: _HostTurn) -> None:
        """Leads or follows."""
        try:
            while not turn.cancelled() and not self._attach(turn):
                file = _File(self._path(turn.name))
                try:
                    locked = file.try_lock()
                    if self._lead(turn, file) if locked else self._follow(turn, file):
                        return
                except BaseException:
                    file.close()
                    raise
                file.close()
        except OSError as error:
            turn.fail(_unusable(error))

    def _lead(self, turn: _HostTurn, file: _File) -> bool:
        """Leads, with the file locked. False if it is not the file to lead with."""
        if not file.named():
            return False
        if os.fstat(file.fd).st_size:  # a lost leader's: whoever waits for that begins anew
            file.unname()
            return False
        lead = _HostLead(file, self._next_token(), turn.lost)
        turn.file = file
        if not turn.settle(lead):
            self.give_up(lead)
        return True

    def _next_token(self) -> int:
        """The time in microseconds, or more: greater than all before, whatever the clock does.

        It is written over the last one, all digits of it: ext4 takes a file that was emptied and
        written for one that has to be on the disk when it is closed, which takes milliseconds.
        """
        file = _File(f"{self.directory}/token", os.O_RDWR | os.O_CREAT)
        try:
            file.lock(fcntl.LOCK_EX)
            last = os.pread(file.fd, 32, 0)
            # What is no number of 64 bits was left by a crash, or by somebody else.
            known = last.isdigit() and int(last) < 1 << 63
            token = max(int(last) + 1 if known else 0, time.time_ns() // 1_000)
            os.pwrite(file.fd, b"%020d" % token, 0)
            return token
        finally:
            file.close()

    def _attach(self, turn: _HostTurn) -> bool:
        """Follows what this process follows already, if others can join that.

        Returns:
            Whether it does, or nobody waits any more.
        """
        with self._lock:
            if turn.cancelled():  # before a mark is made
                return True
            watch = self._watches.get(turn.name)
            if watch is None or watch.turns is None or not watch.file.named():
                return False
            if not watch.turns:
                watch.mark()
            turn.file = watch.file
            watch.turns.append(turn)
            turn.watch = watch
        if turn.cancelled():  # before `_leave` could find it
            self._leave(turn)
        return True

    def _leave(self, turn: _HostTurn) -> None:
        """The turn does not wait any more. Nor does its process, if no other turn does."""
        with self._lock:
            watch, turn.watch = turn.watch, None
            if watch is None or watch.turns is None or not watch.file.ours():
                return
            watch.turns.remove(turn)
            if not watch.turns:
                with contextlib.suppress(OSError):  # then it is counted
                    watch.mark()

    def _follow(self, turn: _HostTurn, file: _File) -> bool:
        """Follows who has locked the file. False if it was forgotten, or nobody waits any more."""
        # That is asked last: a mark is counted, even if it is taken back a moment later.
        if _FORGOTTEN in file.read()[0] or turn.cancelled():
            return False
        watch = _Watch(turn, file)
        turn.file = file
        with self._lock:
            self._watches[turn.name] = watch
            turn.watch = watch
        try:
            thread = threading.Thread(
                target=self._watch, args=(watch,), name="shardedflight-host-watch", daemon=True
            )
            without_context(thread.start)
        except RuntimeError as error:  # no more threads
            self._unwatch(watch)
            raise OSError(errno.EAGAIN, str(error)) from error
        if turn.cancelled():
            self._leave(turn)
        return True

    def _unwatch(self, watch: _Watch) -> list[_HostTurn]:
        with self._lock:
            turns, watch.turns = watch.turns, None
            if self._watches.get(watch.name) is watch:
                del self._watches[watch.name]
        return turns or []

    def _watch(self, watch: _Watch) -> None:
        """Waits until the leader has ended. On a thread of its own."""
        file = watch.file
        try:
            fcntl.flock(file.fd, fcntl.LOCK_SH)
            turns = self._unwatch(watch)
            sealed = _read_outcome(file)
            lost = sealed is None and os.fstat(file.fd).st_mode & 0o777 != _ENDED
            if sealed is None:  # they begin anew
                for turn in turns:
                    turn.file = None
            if lost:
                fcntl.flock(file.fd, fcntl.LOCK_UN)  # two that hold it both would never get it
                fcntl.flock(file.fd, fcntl.LOCK_EX)
                file.unname()
        except OSError as error:
            turns = self._unwatch(watch)
            for turn in turns:
                turn.fail(_unusable(error))
            return
        finally:
            file.close()
        for turn in turns:
            if sealed is not None and sealed.token != turn.reject:
                turn.settle(sealed)
                continue
            turn.rounds += 1
            turn.lost = turn.lost or lost
            if turn.rounds < _ROUNDS:
                self._enter(turn)
            else:
                turn.fail(BackendError(f"{turn.rounds} leaders in other processes left no outcome"))

    # -- ending -----------------------------------------------------------------------------------

    def _finish_all(
        self, ended: Sequence[tuple[Lead, bytes]], futures: "Sequence[Future[int]]"
    ) -> None:
        for (lead, payload), future in zip(ended, futures, strict=True):
            assert isinstance(lead, _HostLead)
            try:
                followers = self._finish(lead, payload)
            except OSError as error:
                future.set_exception(_unusable(error))
            else:
                future.set_result(followers)

    def _finish(self, lead: _HostLead, payload: bytes) -> int:
        file = lead.file
        if not lead.end():  # given up; or a forked child ends what its parent leads
            return 0
        try:
            file.unname()
            os.fchmod(file.fd, _ENDED)
            marks = file.read()[0] - {_FORGOTTEN}
            if not marks:
                return 0
            record = b"".join((_OUTCOME, _HEAD.pack(lead.token, len(payload)), payload))
            if os.write(file.fd, record) != len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return len(marks)
        finally:
            file.close()

    def _sweep(self) -> None:
        """Removes what leaders that were killed have left."""
        for entry in _entries(self.directory):
            if len(entry) != 40:
                continue
            with contextlib.suppress(OSError):
                file = _File(f"{self.directory}/{entry}")
                try:
                    if file.try_lock():
                        file.unname()
                finally:
                    file.close()


def _run_once(jobs: list[Callable[[], None]]) -> None:
    """Runs the only job, if nobody does. A pool that has refused one may have kept it."""
    try:
        job = jobs.pop()
    except IndexError:
        return
    job()


def _entries(directory: str) -> Iterator[str]:
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        yield from [entry.name for entry in entries]


def _read_outcome(file: _File) -> Sealed | None:
    """The outcome in a file, if it is there and whole."""
    _, data = file.read()
    if not data.startswith(_OUTCOME) or len(data) < 1 + _HEAD.size:
        return None
    token, length = _HEAD.unpack_from(data, 1)
    payload = data[1 + _HEAD.size :][:length]
    return Sealed(token, payload) if len(payload) == length else None


def _unusable(error: OSError) -> BackendError:
    failure = BackendError(f"the directory can not be used: {error}")
    failure.__cause__ = error
    return failure


def _checked(directory: "str | os.PathLike[str]") -> str:
    """The directory's path, if it can be used."""
    if not isinstance(directory, (str, os.PathLike)):
        raise BackendError(f"directory must be a path, not {directory!r}")
    path = Path(directory).absolute()
    try:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode):
            raise BackendError(f"{path} is not a directory")
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise BackendError(
                f"{path} must belong to this user alone (uid {os.geteuid()}, mode 0700), and has "
                f"uid {status.st_uid} and mode {status.st_mode & 0o7777:04o}: other users could "
                "answer calls there"
            )
        probe = _File(f"{path}/token")
        try:
            probe.lock(fcntl.LOCK_SH)
        finally:
            probe.close()
    except OSError as error:
        raise BackendError(f"{path} can not be used: {error}") from error
    return str(path)


def _before_fork() -> None:
    _forking.acquire()


def _after_fork_in_parent() -> None:
    _forking.release()


def _after_fork_in_child() -> None:
    global _forking  # noqa: PLW0603 - it may be held by a thread that is gone
    _forking = RLock()
    for fd in _held:
        with contextlib.suppress(OSError):
            os.close(fd)
    _held.clear()
    for backend in list(_backends):
        if backend._pool is not None:
            pools_of_parents.append(backend._pool)
        backend._restart()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
