"""`RedisBackend`: the processes of many machines meet at a Redis or Valkey server, or a Cluster.

**A lease, addressed pushes, and outcomes that are fenced.** Who joins a name leads it for the time
of a lease, which one thread of its process renews for all that the process leads; or is entered
among those who follow, in the same step in which the server looks whether there is a leader. When
the leader has ended, the server publishes the outcome to the inboxes of these, and only if the
leader's token is still the one it knows. So a leader that was too late serves its own process only.
The scripts are in `_scripts`.

**Nobody depends on a message.** A follower that has heard nothing when the leader's lease must have
run out joins again; it finds the outcome, a leader, or leads. So does it when its inbox was cut
off and is there again. A leader that is lost in a living process is handed over at once.

**Threads.** Commands are sent by whoever may block: a caller's thread sends its own, and whatever
others have queued meanwhile, in one go, and reads the answers ("flat combining", Hendler et al.,
SPAA 2010). For coroutines the *keeper* does that, a thread that also renews leases and watches the
time. No coroutine is ever in the middle of a command, so none can leave an answer behind for the
next one. A second thread for each server listens.

**A server that is not to be had** is not asked again before the keeper has reached it; meanwhile
every call is told so at once.
"""

import contextlib
import heapq
import importlib.metadata
import itertools
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from functools import partial
from hashlib import sha1
from importlib import import_module
from typing import Any, cast

import redis
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.crc import key_slot
from redis.exceptions import (
    ClusterDownError,
    MovedError,
    NoScriptError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.retry import Retry

from shardedflight._lock import Bell, SteadyLock
from shardedflight._threads import without_context
from shardedflight._tier import Lead, Sealed, Turn
from shardedflight.exceptions import BackendError

from . import _scripts
from ._protocol import Codec, Wire

__all__ = ["RedisBackend"]

_log = logging.getLogger("shardedflight")

# What redis-py imports when it connects. CPython does not renew the locks of modules in a forked
# child: one that is forked while another thread imports them would wait for good when it connects.
import_module("encodings.idna")
with contextlib.suppress(ImportError):
    importlib.metadata.version("redis")

#: Requests that are sent in one go; and how many times a thread does that for others.
_BATCH, _HELP = 256, 8
#: Bytes of an outcome that go with a message; a larger one is fetched by those who want it.
_INLINE = 64 << 10
#: Seconds between two attempts to reach a server.
_PROBE = 0.5
#: Seconds that may be asked for: what locks, sockets and servers count in can not hold any number.
_DAY = 86400
#: The bytes of a name.
_NAME = 20
#: What redis-py raises when a server or a Cluster can not be used: its classes have no one base.
_UNUSABLE = (RedisError, RedisClusterException, OSError)

_backends: "weakref.WeakSet[RedisBackend]" = weakref.WeakSet()
#: As a forked child has found them; it keeps them for good. Threads that are gone may hold their
#: locks, which their destructors would wait for.
_clients_of_parents: list[object] = []


class _Script:
    """A script, as the beginning of a command that runs it."""

    def __init__(self, source: str) -> None:
        text = source.encode()
        digest = sha1(text, usedforsecurity=False).hexdigest().encode()
        self.by_source = b"$4\r\nEVAL\r\n$%d\r\n%b\r\n" % (len(text), text)
        self.by_digest = b"$7\r\nEVALSHA\r\n$40\r\n%b\r\n" % digest


_JOIN, _DONE, _GIVE = (_Script(s) for s in (_scripts.JOIN, _scripts.DONE, _scripts.GIVE))
_BEAT, _FORGET, _LEAVE = (_Script(s) for s in (_scripts.BEAT, _scripts.FORGET, _scripts.LEAVE))


class _Request(Future[Any]):
    """One script to be run, and its answer. Fails with BackendError."""

    def __init__(
        self, script: _Script | None, shard: int, keys: Sequence[str], args: Sequence[Any]
    ) -> None:
        super().__init__()
        self.script = script
        self.shard = shard
        self._keys = keys
        self._args = args
        #: Sent a second time: nobody knows whether it was done the first time.
        self.repeated = False
        self.moved = False

    def packed(self, by_source: bool) -> bytes:
        """The command as it is sent: several times faster than redis-py, which asks each type."""
        if self.script is None:
            return b"*1\r\n$4\r\nPING\r\n"
        head = self.script.by_source if by_source else self.script.by_digest
        count = 3 + len(self._keys) + len(self._args)
        packed = [b"*%d\r\n" % count, head]
        for part in (len(self._keys), *self._keys, *self._args):
            content = part if type(part) is bytes else str(part).encode()
            packed.append(b"$%d\r\n%b\r\n" % (len(content), content))
        return b"".join(packed)

    def wanted(self) -> bool:
        """Whether it is to be sent. Asked just before, by who sends."""
        return True

    def answer(self, reply: Any) -> None:
        try:  # for each reply: `suppress` takes longer
            self.set_result(reply)
        except InvalidStateError:
            pass

    def fail(self, error: BaseException) -> None:
        with contextlib.suppress(InvalidStateError):
            self.set_exception(_unusable(error))


class _RedisLead(Lead):
    __slots__ = ("inbox", "name")

    def __init__(self, name: bytes, token: int, inherited: bool, inbox: str) -> None:
        super().__init__(token, inherited)
        self.name = name
        #: Whose it is: not a forked child's of its process.
        self.inbox = inbox


class _RedisTurn(Turn):
    """All fields but the first are written under the backend's lock, or before anybody has it."""

    _backend: "RedisBackend"

    def __init__(self, backend: "RedisBackend", name: bytes, reject: int) -> None:
        super().__init__(backend)
        self.name = name
        self.reject = reject
        #: The number of its request: the server knows a repeated one by it.
        self.number = backend.new_number()
        #: The number by which its process is entered in what it follows: of the last turn that has
        #: come to follow it.
        self.entered = 0
        #: The token of what it leads or follows; 0 while it is asked for.
        self.token = 0
        #: The token of what it has followed before.
        self.followed = 0
        #: The greatest token that is known to be forgotten, of those that this turn may be about.
        self.forgotten = 0

    def joinable(self) -> bool:
        # While it asks for the first time, nobody knows what it is going to lead or follow. If the
        # answer is what was forgotten, it is not joined from then on.
        return not 0 < (self.token or self.followed) <= self.forgotten

    def cancel(self) -> bool:
        if not super().cancel():
            return False
        backend = self._backend
        # Or `_follow` or `_again` will see it. In a forked child it is its parent's, and not there.
        if self.followed and self.name in backend._follows:
            # By the keeper: it may be the garbage collector that cancels it, at any point.
            backend.wake_to(lambda: backend._leave(self))
        return True


class _Follow:
    """The turns of this process for one name that wait for a message. Under the backend's lock."""

    __slots__ = ("early", "turns")

    def __init__(self) -> None:
        self.turns: list[_RedisTurn] = []
        #: Messages by token, which may have come before the answer that tells of their execution.
        self.early: dict[int, tuple[bytes, bytes]] = {}


class _Node:
    """One server: a connection for requests and one that listens."""

    def __init__(self, backend: "RedisBackend", pool: Any) -> None:
        self._backend = backend
        self._pool = pool
        self.queue: deque[_Request] = deque()
        #: Held by who sends. Taken by `_take`: a signal handler must not send in the middle.
        self._sending = SteadyLock()
        self._connection: Any = None
        #: When it could not be reached; requests fail at once then.
        self.broken: BaseException | None = None
        self.listener: _Listener | None = None

    def connect(self, **more: Any) -> Any:
        """A new connection. With answers as RESP2 has them, and without attempts of its own."""
        options = {
            name: value
            for name, value in self._pool.connection_kwargs.items()
            if not name.startswith("maint_notifications")
        }
        options |= {
            "protocol": 2,
            "decode_responses": False,
            "health_check_interval": 0,
            "retry": Retry(NoBackoff(), 0),
            "retry_on_error": [],
            "retry_on_timeout": False,
            "socket_timeout": self._backend.timeout,
            "socket_connect_timeout": self._backend.timeout,
            **more,
        }
        connection = self._pool.connection_class(**options)
        connection.connect()
        return connection

    def help(self, rounds: float = float("inf")) -> None:
        """Sends what is queued, on this thread, unless another thread is about it."""
        batch: list[_Request] = []
        try:
            while self.queue:
                broken = self.broken
                if broken is not None:  # at once, even while somebody probes
                    batch = []
                    self._dequeue(batch, len(self.queue))
                    for request in batch:
                        request.fail(broken)
                    return
                if rounds <= 0:
                    self._backend.wake()
                    return
                rounds -= 1
                if not self._take():
                    return  # whoever sends looks into the queue once more
                try:
                    batch = []
                    self._dequeue(batch, _BATCH)
                    self._send(batch)
                finally:
                    self._sending.release()
        except BaseException as error:  # an interrupt, which is not of those who wait
            for request in batch:
                request.fail(error)
            self._backend.wake()  # others have seen that somebody sends, and rely on it
            raise

    def _dequeue(self, batch: list[_Request], most: int) -> None:
        # In one step, so that no interrupt comes when they are in neither.
        with contextlib.suppress(IndexError):
            batch.extend(itertools.islice(iter(self.queue.popleft, None), most))

    def _take(self) -> bool:
        """Takes `_sending`, unless it is taken, were it by this thread. As SteadyLock does."""
        if self.sends_here():
            return False
        try:
            return self._sending.acquire(blocking=False)
        except BaseException:
            if self.sends_here():
                self._sending.release()
            raise

    def sends_here(self) -> bool:
        """Whether this thread is in the midst of it."""
        return _owned(self._sending)

    def listens_here(self) -> bool:
        return self.listener is not None and _owned(self.listener.lock)

    def probe(self) -> None:
        """Looks whether the server can be reached again. By the keeper: it may take `timeout`."""
        with self._sending:
            self._send([_Request(None, 0, (), ())], probing=True)

    def _send(self, batch: list[_Request], *, probing: bool = False) -> None:
        if self.broken is not None and not probing:
            for request in batch:
                request.fail(self.broken)
            return
        try:
            batch = [request for request in batch if request.wanted()]
            if not batch:
                return
            fresh = self._connection is None
            try:
                if fresh:
                    self._connection = self.connect()
                again = self._exchange(batch, by_source=False)
            except (redis.ConnectionError, OSError):
                if fresh:
                    raise
                # An idle connection may have been closed: that says nothing about the server.
                self._disconnect()
                batch = [request for request in batch if not request.done()]
                for request in batch:
                    request.repeated = True
                self._connection = self.connect()
                again = self._exchange(batch, by_source=False)
            if again:
                for request in self._exchange(again, by_source=True):
                    request.fail(NoScriptError("the server does not know what it was just sent"))
            self.broken = None
        except BaseException as error:
            self._disconnect()
            # What is no answer of Redis's makes its parser raise anything.
            if isinstance(error, Exception):
                self.broken = error
                self._backend.wake()
            for request in batch:
                if not request.done():
                    request.fail(error)
            if not isinstance(error, Exception):
                raise

    def _exchange(self, batch: list[_Request], by_source: bool) -> list[_Request]:
        """Sends and reads. Returns those whose script the server does not have."""
        connection = self._connection
        commands = b"".join([request.packed(by_source) for request in batch])
        connection.send_packed_command([commands], check_health=False)
        missing: list[_Request] = []
        for request in batch:
            try:
                reply = connection.read_response()
            except NoScriptError:
                missing.append(request)
            except (MovedError, ClusterDownError) as error:
                self._backend.moved(request, error)
            except ResponseError as error:
                if isinstance(error, ReadOnlyError):
                    self._backend.wake_to(self._drop_connection)
                request.fail(error)
            else:
                request.answer(reply)
        return missing

    def _drop_connection(self) -> None:
        """The server has become a replica: its name may lead to another one by now."""
        if self._take():
            try:
                self._disconnect()
            finally:
                self._sending.release()

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.disconnect()

    def close(self) -> None:
        if self.listener is not None:
            self.listener.close()
        with self._sending:
            self._disconnect()
            self.broken = BackendError("the backend was closed")
        self.help()


class _Listener:
    """A thread that reads the messages to this process from one server."""

    def __init__(self, backend: "RedisBackend", node: _Node) -> None:
        self._backend = backend
        self._node = node
        #: Held while something is written to the connection, or it is replaced, and for what
        #: follows; and what tells of its changes.
        self.lock = SteadyLock()
        self._changed = threading.Condition(self.lock)
        self._connection: Any = None
        self._closed = False
        #: The inboxes, and whether the server knows them.
        self._inboxes: dict[str, bool] = {}
        self._failures = 0
        #: Why there is no connection.
        self._reason: Exception | None = None
        #: Nothing has been said in the log.
        self._unlogged = True
        _start_thread(self._run, "shardedflight-redis-inbox")

    def subscribe(self, inbox: str) -> bool:
        """Returns when the server knows the inbox; False if its slot is at another server.

        Raises BackendError if neither is known in time.
        """
        if self._inboxes.get(inbox):
            return True
        with self._changed:
            if inbox not in self._inboxes:
                self._inboxes[inbox] = False
                if self._connection is not None:
                    with contextlib.suppress(RedisError, OSError):  # the thread will see it
                        self._connection.send_command("SSUBSCRIBE", inbox)
            before = self._failures
            self._changed.wait_for(
                lambda: self._inboxes.get(inbox, True) or self._failures > before,
                self._backend.timeout,
            )
            if self._inboxes.get(inbox) is False:
                reason = self._reason or "it does not take subscriptions"
                raise BackendError(f"the server can not be used: {reason}") from self._reason
            return inbox in self._inboxes

    def _run(self) -> None:
        while not self._closed:
            try:
                self._connect()
                self._listen()
            except (RedisError, OSError) as error:
                self._reason = error
            except Exception as error:  # noqa: BLE001 - it must go on: followers depend on it
                self._reason = error
                self._complain()
            finally:
                self._disconnect()
            if not self._closed:
                time.sleep(_PROBE / 10)

    def _complain(self) -> None:
        if self._closed:  # the connection was closed in the middle of anything
            return
        if self._unlogged:
            self._unlogged = False
            _log.exception("%r: what the server said can not be read", self._backend)

    def _connect(self) -> None:
        connection = self._node.connect(socket_timeout=max(1.0, self._backend.lease))
        with self._changed:
            self._connection, self._reason = connection, None
            for inbox in self._inboxes:
                connection.send_command("SSUBSCRIBE", inbox)
        if self._closed:
            raise OSError("closed")

    def _listen(self) -> None:
        silent = False
        while True:
            try:
                message = self._connection.read_response(disconnect_on_error=False)
            except MovedError as error:
                silent, slot = False, error.slot_id
                self._lose(lambda inbox, slot=slot: key_slot(inbox.encode()) == slot)  # type: ignore[misc]
                continue
            except redis.TimeoutError:
                if silent:  # not even to a PING did it say anything
                    raise
                silent = True
                with self._changed:
                    self._connection.send_command("PING")
                continue
            silent = False
            match message:
                case [b"smessage", _, bytes(content)]:
                    self._backend.hear(content)
                case [b"ssubscribe", bytes(inbox), _]:
                    with self._changed:
                        self._inboxes[inbox.decode()] = True
                        self._changed.notify_all()
                    self._backend.heard_again(inbox.decode())
                case [b"sunsubscribe", bytes(lost), _]:
                    self._lose(lambda inbox: inbox == lost.decode())
                case _:
                    pass

    def _lose(self, lost: Callable[[str], bool]) -> None:
        """The slots of these inboxes are at another server."""
        with self._changed:
            for inbox in [*filter(lost, self._inboxes)]:
                del self._inboxes[inbox]
            self._changed.notify_all()
        self._backend.wake_to(self._backend.relocate)

    def _disconnect(self) -> None:
        with self._changed:
            connection, self._connection = self._connection, None
            self._inboxes = dict.fromkeys(self._inboxes, False)
            self._failures += 1
            self._changed.notify_all()
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.disconnect()

    def close(self) -> None:
        self._closed = True
        self._disconnect()


class RedisBackend(Wire):
    """Lets processes on any machines share executions, by Redis 7 or Valkey 8 or later.

    Args:
        server: A URL as `redis.Redis.from_url` takes it, or a client of the user's own:
            `redis.Redis` or `redis.cluster.RedisCluster`. Of a client its settings are used;
            connections are made anew.
        cluster: The URL leads to a Cluster.
        namespace: Processes with one namespace meet, those with another never.
        lease: Seconds after which a leader that is not heard of is replaced. All processes must
            have the same. It, and the next two, may be a day at the most.
        hold: Seconds for which an outcome also serves calls that come after its execution: a
            small cache. With 0, there is none.
        timeout: Seconds after which a server that does not answer is given up, and functions run
            for their own process.
        codec: For values; by default `MessagePack()`.
        limit: Bytes that an outcome may have on its way to other processes. With a larger one,
            each process runs its own function.
        shards: In how many slots of a Cluster the names lie; by default 64, or 1 without a
            Cluster. All processes must have the same.

    Raises:
        BackendError: An argument is wrong. The server is not asked here.

    May be used by any number of flights, threads and event loops. A forked child may go on using
    it, with connections of its own. Flights with one name, or without, meet on one backend.
    """

    def __init__(
        self,
        server: "str | redis.Redis | RedisCluster",
        *,
        cluster: bool = False,
        namespace: str = "shardedflight",
        lease: float = 2.0,
        hold: float = 0.0,
        timeout: float = 1.0,
        codec: Codec | None = None,
        limit: int = 8 << 20,
        shards: int | None = None,
    ) -> None:
        super().__init__(namespace, codec, limit)
        if "{" in namespace or "}" in namespace:
            raise BackendError(f"namespace must be without braces, not {namespace!r}")
        _check_seconds("lease", lease, 0.1)
        _check_seconds("hold", hold, 0.0)
        _check_seconds("timeout", timeout, 0.01)
        self._clustered = bool(cluster) or isinstance(server, RedisCluster)
        if shards is None:
            shards = 64 if self._clustered else 1
        if type(shards) is not int or not 1 <= shards <= 16384:
            raise BackendError(f"shards must be an int from 1 to 16384, not {shards!r}")
        self.lease = float(lease)
        self.timeout = float(timeout)
        #: The user's, or made when it is first needed; and how.
        self._client: Any = None
        self._make_client: Any = None
        if isinstance(server, str):
            _check_url(server)
            self._make_client = self._client_for(server)
        elif isinstance(server, (redis.Redis, RedisCluster)):
            self._client = server
        else:
            raise BackendError(
                f"server must be a URL, a redis.Redis or a RedisCluster, not {server!r}"
            )
        self._hold = float(hold)
        self._shards = shards
        self._restart()
        _backends.add(self)

    def _leave_client(self) -> None:
        """To the parent. The user's own has to do: how it was made is not known."""
        if self._make_client is not None and self._client is not None:
            _clients_of_parents.append(self._client)
            self._client = None

    def _restart(self) -> None:
        self._lock = SteadyLock()
        self._inbox = os.urandom(8).hex()
        self._closed = False
        #: Servers, by address; None if there is but one. Under the lock.
        self._nodes: dict[Any, _Node] = {}
        #: The servers of the shards, as long as they are where they were.
        self._by_shard: dict[int, _Node] = {}
        self._follows: dict[bytes, _Follow] = {}
        #: What this process leads, by name and token, with the turn that has told so, which holds
        #: the lead. One that is dropped stays until the keeper gives it up.
        self._leads: dict[tuple[bytes, int], tuple[weakref.ref[Lead], weakref.ref[_RedisTurn]]] = {}
        #: When who follows joins again. Turns that have ended before, and their outcomes, are not
        #: kept by it. Under the lock.
        self._watchdogs: list[tuple[float, int, weakref.ref[_RedisTurn]]] = []
        self._numbers = itertools.count(1)
        #: What the keeper is to do.
        self._tasks: deque[Callable[[], None]] = deque()
        self._bell = Bell()
        self._keeper: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.namespace}>"

    def close(self) -> None:
        """Closes its connections and ends its threads. Flights go on, each for its own process."""
        with self._lock:
            self._closed = True
            nodes = list(self._nodes.values())
        self._bell.ring()
        keeper = self._keeper
        if keeper is not None and keeper is not threading.current_thread():
            keeper.join()
        for node in nodes:
            node.close()
        self._do_tasks()
        with self._lock:
            turns = [turn for follow in self._follows.values() for turn in follow.turns]
            self._follows.clear()
        for turn in turns:
            turn.fail(BackendError("the backend was closed"))

    # -- as a backend -----------------------------------------------------------------------------

    def join(self, wanted: Sequence[tuple[bytes, int]], here: bool) -> Sequence[Turn]:
        """See `Backend.join`."""
        turns = [_RedisTurn(self, name, reject) for name, reject in wanted]
        try:
            self._start_keeper()
        except BackendError as error:
            for turn in turns:
                turn.fail(error)
            return turns
        answered: Callable[[object], None] | None = None
        if len(turns) > 1:
            answered = self._await_all(turns)
        if here:
            try:
                self._join(turns, answered)
                self._help(_HELP)
            except BaseException:  # an interrupt: its caller has no turn that it could leave
                for turn in turns:
                    turn.leave()
                raise
        else:
            self.wake_to(lambda: self._join(turns, answered))
        return turns

    def _await_all(self, turns: Sequence[_RedisTurn]) -> Callable[[object], None]:
        """What is to be called once for each of `turns`, when its request has been answered."""
        asked: Future[None] = Future()
        left = itertools.count(1)

        def answered(_: object) -> None:
            if next(left) == len(turns):
                asked.set_result(None)

        for turn in turns:
            turn.asked = asked
        return answered

    def finish(self, ended: Sequence[tuple[Lead, bytes]], here: bool) -> "Sequence[Future[int]]":
        """See `Backend.finish`."""
        requests: list[_Request] = []
        for lead, payload in ended:
            assert isinstance(lead, _RedisLead)
            request = self._end(lead, payload)
            requests.append(request)
            # Until the answer is there the lease is renewed, and the lead hears of a forget.
            request.add_done_callback(partial(self._drop_lead, lead))
            if lead.inbox != self._inbox:
                request.answer(0)
        self._submit([request for request in requests if not request.done()])
        if here:
            self._help(_HELP)
        else:
            self.wake()
        return requests

    def give_up(self, lead: Lead) -> None:
        """See `Backend.give_up`."""
        assert isinstance(lead, _RedisLead)
        if lead.inbox == self._inbox:
            self._drop_lead(lead)
            self._give(lead.name, lead.token)

    def forget(self, name: bytes, lead: Lead | None = None) -> "Future[None]":
        """See `Backend.forget`. Other processes have it a moment later than this one."""
        f, r, g = self._keys(name, "f", "r", "g")
        token = 0 if lead is None else lead.token
        request = _Request(_FORGET, self._shard(name), [f, r, f"{g}:"], [name, token])
        try:
            self._start_keeper()
        except BackendError as error:
            request.fail(error)
            return request
        self._submit([request])
        self.wake()
        if not request.done() and self._can_not_wait():
            self._help(_HELP)
            # It stays queued: it is done once this thread goes on.
            request.fail(BackendError("forgotten a moment later, by the thread that was to wait"))
        return request

    def _can_not_wait(self) -> bool:
        """Whether this thread, in a destructor or a signal handler, has what others need now."""
        return (
            threading.current_thread() is self._keeper
            or _owned(self._lock)
            or any(node.sends_here() or node.listens_here() for node in list(self._nodes.values()))
        )

    # -- joining ----------------------------------------------------------------------------------

    def _join(self, turns: Sequence[_RedisTurn], answered: Callable[[object], None] | None) -> None:
        """Queues the requests of `turns`, once their inboxes are known."""
        requests: list[_Request] = []
        for turn in turns:
            turn_answered = None if answered is None else _once(answered)
            if turn_answered is not None:
                # Who has its turn has been answered, too: it has failed, or a message came early.
                turn.add_done_callback(turn_answered)
            try:
                inbox = self._subscribed(self._shard(turn.name))
            except Exception as error:  # noqa: BLE001 - by the keeper nobody else would be told
                self._leave(turn)
                turn.fail(_unusable(error))
                continue
            with self._lock:
                self._enter(turn)
            f, r, t, g = self._keys(turn.name, "f", "r", "t", "g")
            lease = round(self.lease * 1000)
            args = (inbox, turn.number, lease, turn.followed, turn.reject)
            request = _Join(turn, self._shard(turn.name), (f, r, t, f"{g}:"), args)
            request.add_done_callback(lambda done, turn=turn: self._joined(turn, done))  # type: ignore[misc]
            if turn_answered is not None:
                request.add_done_callback(turn_answered)
            requests.append(request)
        self._submit(requests)

    def _joined(self, turn: _RedisTurn, done: "Future[Any]") -> None:
        """The server has answered."""
        try:
            kind, token, more = _read_joined(done.result())
        except BackendError as error:
            self._leave(turn)
            turn.fail(error)
            return
        if kind == 1:
            self._follow(turn, token, more / 1000)
            return
        self._dismiss(turn)
        if kind == 2:
            turn.settle(Sealed(token, more))
            return
        lead = _RedisLead(turn.name, token, turn.followed > 0, self._inbox)
        turn.token = token
        with self._lock:
            self._leads[turn.name, token] = (weakref.ref(lead), weakref.ref(turn))
        if not turn.settle(lead):
            self.give_up(lead)

    def _follow(self, turn: _RedisTurn, token: int, lease: float) -> None:
        """The turn follows: it waits for a message, or for the time when none will come."""
        early: tuple[bytes, bytes] | None = None
        sooner = False
        with self._lock:
            turn.token = turn.followed = token
            turn.entered = turn.number
            follow = self._follows.get(turn.name)
            for other in () if follow is None else follow.turns:
                if other.followed == token:
                    other.entered = turn.number
            if follow is not None and turn in follow.turns:  # neither closed meanwhile nor left
                early = follow.early.get(token)
                if early is None:
                    when = time.monotonic() + max(lease, 0.0) * 1.05 + 0.005
                    watchdog = (when, next(self._numbers), weakref.ref(turn))
                    heapq.heappush(self._watchdogs, watchdog)
                    sooner = self._watchdogs[0] is watchdog
                else:
                    self._remove(follow, turn)
        if turn.cancelled():
            self._leave(turn)
        elif early is not None:
            self._news(turn, *early)
        elif sooner:
            self.wake()

    def _leave(self, turn: _RedisTurn) -> None:
        """The turn does not wait any more. Nor does its process, if no other turn does."""
        with self._lock:
            follow = self._follows.get(turn.name)
            if follow is not None:
                self._remove(follow, turn)
                if any(other.followed == turn.followed for other in follow.turns):
                    return
            number, turn.entered = turn.entered, 0
        if number:
            shard = self._shard(turn.name)
            f, g = self._keys(turn.name, "f", "g")
            args = (turn.followed, self._inbox_of(shard), number)
            self._submit([_Request(_LEAVE, shard, (f, f"{g}:{turn.followed}"), args)])
            self.wake()

    def _enter(self, turn: _RedisTurn) -> None:
        """Under the lock. From now on messages may be about this turn."""
        turns = self._follows.setdefault(turn.name, _Follow()).turns
        if turn not in turns:
            turns.append(turn)

    def _dismiss(self, turn: _RedisTurn) -> None:
        with self._lock:
            follow = self._follows.get(turn.name)
            if follow is not None:
                self._remove(follow, turn)

    def _remove(self, follow: _Follow, turn: _RedisTurn) -> None:
        """Under the lock."""
        with contextlib.suppress(ValueError):
            follow.turns.remove(turn)
        if not any(other.token == 0 for other in follow.turns):
            follow.early.clear()
        if not follow.turns and self._follows.get(turn.name) is follow:
            del self._follows[turn.name]

    def _again(self, turn: _RedisTurn) -> None:
        """A turn that has followed joins again, if it does not do so already."""
        if turn.done():
            self._leave(turn)
            return
        with self._lock:
            if turn.token == 0:
                return
            turn.token = 0
            turn.number = self.new_number()
            self._enter(turn)  # it hears of a forget meanwhile
        self._join([turn], None)

    # -- messages ---------------------------------------------------------------------------------

    def hear(self, content: bytes) -> None:
        """A message has come. On a listener's thread."""
        kind, name = content[:1], content[1 : 1 + _NAME]
        digits, _, payload = content[1 + _NAME :].partition(b":")
        try:
            token = int(digits)
        except ValueError:  # not of ours
            return
        with self._lock:
            if kind == b"f":
                self._forgotten(name, token)
                return
            follow = self._follows.get(name)
            if follow is None:
                return
            turns = [turn for turn in follow.turns if turn.token == token]
            if any(turn.token == 0 for turn in follow.turns):
                follow.early[token] = (kind, payload)
            for turn in turns:
                self._remove(follow, turn)
        for turn in turns:
            self._news(turn, kind, payload)

    def _news(self, turn: _RedisTurn, kind: bytes, payload: bytes) -> None:
        if kind == b"d" and turn.token != turn.reject:
            turn.settle(Sealed(turn.token, payload))
            return
        if kind == b"l":  # what was forgotten is gone: the next answer is of another one
            with self._lock:
                turn.forgotten = 0
        # A large outcome has to be fetched; a lost leader's followers join anew.
        self.wake_to(lambda: self._again(turn))

    def _forgotten(self, name: bytes, token: int) -> None:
        """Under the lock."""
        follow = self._follows.get(name)
        for turn in () if follow is None else follow.turns:
            if turn.token in (token, 0):
                turn.forgotten = max(turn.forgotten, token)
        known = self._leads.get((name, token))
        led = None if known is None else known[1]()
        if led is not None:
            led.forgotten = token

    def heard_again(self, inbox: str) -> None:
        """Messages to this inbox may have been missed: who waits for one joins again."""
        shard = int(inbox[inbox.rindex(":", 0, inbox.index("}")) + 1 : inbox.index("}")])
        with self._lock:
            turns = [
                turn
                for name, follow in self._follows.items()
                if self._shard(name) == shard
                for turn in follow.turns
                if turn.token
            ]
        for turn in turns:
            self.wake_to(lambda turn=turn: self._again(turn))  # type: ignore[misc]

    # -- ending -----------------------------------------------------------------------------------

    def _end(self, lead: _RedisLead, payload: bytes) -> _Request:
        f, g, r = self._keys(lead.name, "f", "g", "r")
        hold, lease = round(self._hold * 1000), round(self.lease * 1000)
        args = (lead.token, lead.name, payload, hold, 3 * lease, _INLINE)
        shard = self._shard(lead.name)
        return _Done(_DONE, shard, (f, f"{g}:{lead.token}", r), args)

    def _give(self, name: bytes, token: int) -> None:
        f, g = self._keys(name, "f", "g")
        shard = self._shard(name)
        self._submit([_Request(_GIVE, shard, (f, f"{g}:{token}"), (token, name))])
        self.wake()

    def _drop_lead(self, lead: _RedisLead, _: object = None) -> None:
        with self._lock:
            self._leads.pop((lead.name, lead.token), None)

    def new_number(self) -> int:
        """What no other request of this process is called."""
        return next(self._numbers)

    # -- servers ----------------------------------------------------------------------------------

    def _shard(self, name: bytes) -> int:
        return int.from_bytes(name[:4], "big") % self._shards

    def _keys(self, name: bytes, *kinds: str) -> list[str]:
        tag, called = f"{{{self.namespace}:{self._shard(name)}}}", name.hex()
        return [f"{tag}:t" if kind == "t" else f"{tag}:{kind}:{called}" for kind in kinds]

    def _inbox_of(self, shard: int) -> str:
        return f"{{{self.namespace}:{shard}}}:i:{self._inbox}"

    def _subscribed(self, shard: int) -> str:
        """The inbox for a shard, once its server knows it."""
        node = self._node(shard)
        if node.broken is not None:
            raise _unusable(node.broken)
        listener = node.listener
        if listener is None:
            with self._lock:
                if self._closed:
                    raise BackendError("the backend was closed")
                if node.listener is None:
                    node.listener = _Listener(self, node)
                listener = node.listener
        inbox = self._inbox_of(shard)
        try:
            known = listener.subscribe(inbox)
        except BackendError as error:
            node.broken = error
            self.wake()
            raise
        if not known:
            raise BackendError("the slot has moved to another server")
        return inbox

    def _node(self, shard: int) -> _Node:
        if self._closed:
            raise BackendError("the backend was closed")
        node = self._by_shard.get(shard)
        if node is None:
            with self._lock:
                if self._closed:  # its servers have been closed
                    raise BackendError("the backend was closed")
                address, pool = self._locate(shard)
                node = self._nodes.get(address)
                if node is None:
                    node = self._nodes[address] = _Node(self, pool)
                self._by_shard[shard] = node
        return node

    def _locate(self, shard: int) -> tuple[Any, Any]:
        """The address and the settings of a shard's server. Under the lock."""
        try:
            if self._client is None:
                self._client = self._make_client()
            if not self._clustered:
                return None, self._client.connection_pool
            node = self._client.get_node_from_key(f"{{{self.namespace}:{shard}}}")
            return node.name, self._client.get_redis_connection(node).connection_pool
        except _UNUSABLE as error:
            raise _unusable(error) from error

    def _client_for(self, url: str) -> Callable[[], Any]:
        if not self._clustered:
            return partial(cast("Any", redis.Redis).from_url, url)
        times = {"socket_timeout": self.timeout, "socket_connect_timeout": self.timeout}
        return partial(cast("Any", RedisCluster).from_url, url, **times)

    def moved(self, request: _Request, error: RedisError) -> None:
        """A request has come to the wrong server, or to one that has lost its Cluster."""
        if request.moved:
            request.fail(error)
            return
        request.moved = True

        def again() -> None:
            try:
                self.relocate()
                with contextlib.suppress(BackendError):
                    self._subscribed(request.shard)
            finally:
                self._submit([request])

        self.wake_to(again)

    def relocate(self) -> None:
        """Asks the Cluster who has which slots, and subscribes there. By the keeper."""
        if not self._clustered or self._client is None:
            return
        with contextlib.suppress(*_UNUSABLE):
            self._client.nodes_manager.initialize()
        with self._lock:
            self._by_shard.clear()
            shards = {self._shard(name) for name in self._follows}
        for shard in shards:
            with contextlib.suppress(BackendError):
                self._subscribed(shard)

    def _submit(self, requests: Sequence[_Request]) -> None:
        for request in requests:
            try:
                node = self._node(request.shard)
            except BackendError as error:
                request.fail(error)
                continue
            node.queue.append(request)
            # `close` writes both, and fails what is queued after that.
            if self._closed and node.broken is not None:
                node.help()

    def _help(self, rounds: float = float("inf")) -> None:
        for node in list(self._nodes.values()):
            node.help(rounds)

    # -- the keeper -------------------------------------------------------------------------------

    def wake_to(self, task: Callable[[], None]) -> None:
        """Has the keeper do something."""
        self._tasks.append(task)
        self.wake()
        if self._closed:
            self._do_tasks()

    def wake(self) -> None:
        """Has the keeper look what there is to do."""
        self._bell.ring()

    def _start_keeper(self) -> None:
        """For who joins or forgets: all else comes of that. Raises BackendError if it can not."""
        keeper = self._keeper
        if keeper is not None:
            return
        with self._lock:
            if self._keeper is not None or self._closed:
                return
            self._keeper = _start_thread(self._keep, "shardedflight-redis-keeper")

    def _keep(self) -> None:
        while True:
            try:
                self._keep_on()
                return
            except Exception:  # noqa: BLE001 - it must go on: all leases depend on it
                _log.exception("%r: the keeper has failed, and begins anew", self)
            if self._closed:
                return
            self._bell.wait(_PROBE)

    def _keep_on(self) -> None:
        """Returns when it is closed."""
        next_beat = next_probe = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + self.lease / 3
                self._beat()
            broken = [node for node in list(self._nodes.values()) if node.broken is not None]
            self._bark(now)
            self._bell.wait(0)  # what it has rung for is seen to now
            self._do_tasks()
            self._help(_HELP)  # not for good: callers that never cease would keep it from its beat
            if self._closed:
                self._help()
                return
            if broken and now >= next_probe:
                self.relocate()
                for node in broken:
                    node.probe()
                next_probe = time.monotonic() + _PROBE
            wake_at = [next_beat]
            with self._lock:
                if self._watchdogs:
                    wake_at.append(self._watchdogs[0][0])
            if broken:
                wake_at.append(next_probe)
            self._bell.wait(max(0.0, min(wake_at) - time.monotonic()))

    def _do_tasks(self) -> None:
        for _ in range(len(self._tasks)):  # one may lead to the next, for as long as a slot moves
            try:
                task = self._tasks.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                task()
            except Exception:  # noqa: BLE001 - it must go on: all leases depend on it
                _log.exception("%r: a step of the keeper has failed", self)

    def _bark(self, now: float) -> None:
        """Has those join again who have heard nothing in time."""
        while True:
            with self._lock:
                if not self._watchdogs or self._watchdogs[0][0] > now:
                    return
                turn = heapq.heappop(self._watchdogs)[2]()
                follow = None if turn is None else self._follows.get(turn.name)
                waits = follow is not None and turn in follow.turns and turn.token
            if turn is not None and waits:
                self._tasks.append(lambda turn=turn: self._again(turn))  # type: ignore[misc]

    def _beat(self) -> None:
        """Renews the leases of all that this process leads, and gives up what was dropped."""
        by_shard: dict[int, list[tuple[bytes, int]]] = {}
        with self._lock:
            for (name, token), (lead, _) in self._leads.copy().items():
                if lead() is None:
                    del self._leads[name, token]
                    self._tasks.append(lambda name=name, token=token: self._give(name, token))  # type: ignore[misc]
                else:
                    by_shard.setdefault(self._shard(name), []).append((name, token))
        requests: list[_Request] = []
        for shard, leads in by_shard.items():
            for start in range(0, len(leads), _BATCH):
                some = leads[start : start + _BATCH]
                keys: list[str] = []
                for name, token in some:
                    f, g = self._keys(name, "f", "g")
                    keys += (f, f"{g}:{token}")
                args = (round(self.lease * 1000), *(token for _, token in some))
                requests.append(_Request(_BEAT, shard, keys, args))
        self._submit(requests)


class _Join(_Request):
    """A turn is asked for. Who had left before would count among those who follow."""

    def __init__(
        self, turn: _RedisTurn, shard: int, keys: Sequence[str], args: Sequence[Any]
    ) -> None:
        super().__init__(_JOIN, shard, keys, args)
        self._turn = turn

    def wanted(self) -> bool:
        if not self._turn.done():
            return True
        self.fail(BackendError("its caller has left"))
        return False


class _Done(_Request):
    """The end of a lead. Asked twice, the second answer would be that it is not led any more."""

    def answer(self, reply: Any) -> None:
        super().answer(0 if self.repeated and reply == -1 else reply)


def _read_joined(reply: Any) -> tuple[int, int, Any]:
    """The answer to JOIN. Raises BackendError if it is none: anybody may write to the server."""
    match reply:
        case (
            [0 as kind, bytes(token)]
            | [1 as kind, bytes(token), int()]
            | [2 as kind, bytes(token), bytes()]
        ) if token.isdigit() and len(token) < 20:
            return kind, int(token), reply[-1]
        case _:
            raise BackendError(f"the server's answer can not be read: {reply!r:.200}")


def _once(callback: Callable[[object], None]) -> Callable[[object], None]:
    """Calls back for the first of several."""
    first = [True]

    def call(argument: object) -> None:
        with contextlib.suppress(IndexError):
            first.pop()
            callback(argument)

    return call


def _unusable(error: BaseException) -> BackendError:
    """A new one for each who is told: a traceback grows where it is raised."""
    known = isinstance(error, BackendError)
    failure = BackendError(str(error) if known else f"the server can not be used: {error}")
    failure.__cause__ = error
    return failure


def _owned(lock: SteadyLock) -> bool:
    """Whether this thread has it. As `threading.Condition` asks."""
    return bool(cast("Any", lock)._is_owned())


def _start_thread(run: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=run, name=name, daemon=True)
    try:
        without_context(thread.start)
    except RuntimeError as error:  # the process has as many as it may have
        raise BackendError(f"{name}: {error}") from error
    return thread


def _check_url(url: str) -> None:
    try:
        cast("Any", redis.ConnectionPool).from_url(url)  # it connects to nothing yet
    except ValueError as error:
        raise BackendError(f"server must be a URL of Redis: {error}") from error


def _check_seconds(name: str, value: object, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= _DAY:
        raise BackendError(
            f"{name} must be a number of seconds from {least} to {_DAY}, a day, not {value!r}"
        )


def _after_fork_in_child() -> None:
    for backend in list(_backends):
        backend._leave_client()
        backend._restart()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
