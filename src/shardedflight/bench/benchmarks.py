"""What is compared with what: the list of all benchmarks. `targets.py` has the figures to reach."""

from shardedflight import ShardedFlight
from shardedflight.bench import following, http, leading, memory, peers, tiers
from shardedflight.bench.basics import constant_async, suspends_once
from shardedflight.bench.measure import Benchmark, Prepare, Unit


def benchmarks(*, quick: bool) -> tuple[Benchmark, ...]:
    """Returns all benchmarks but the one of thread scaling.

    Args:
        quick: Whether to do so little that figures mean little.
    """

    def rounds(number: int) -> int:
        return 3 if quick else number

    # Of stampedes.
    processes, scale = (2, 0.1) if quick else (16, 1.0)

    def operations(number: int) -> int:
        return max(20, number // 50) if quick else number

    def points(*numbers: int) -> tuple[int, ...]:
        return numbers[:-2] if quick else numbers

    def leaders(
        name: str,
        what: str,
        prepare: Prepare,
        prepare_peers: Prepare | None = None,
        *,
        blind_to: str,
    ) -> Benchmark:
        return Benchmark(
            name=name,
            what=what,
            against="`d[k] = 1; fn(); del d[k]` in a loop",
            blind_to=blind_to,
            unit=Unit.NANOSECONDS,
            operations=operations(5_000),
            rounds=rounds(81),
            prepare=prepare,
            prepare_peers=prepare_peers,
        )

    return (
        leaders(
            "do",
            "`do`, leader, one `str` part",
            leading.leading(leading.lead_one_part, ShardedFlight),
            peers.leading,
            blind_to="contention; keys that are new, or cold in the processor's caches; what the "
            "caches among the others are for: a hit",
        ),
        leaders(
            "do-two-parts",
            "`do`, leader, two `str` parts",
            leading.leading(leading.lead_two_parts, ShardedFlight),
            blind_to="as `do`; the floor's key has one part",
        ),
        leaders(
            "do-16-shards",
            "`do`, leader, one `str` part, 16 shards",
            leading.leading(leading.lead_one_part, lambda: ShardedFlight(16)),
            blind_to="as `do`; whether shards help threads that run at once",
        ),
        Benchmark(
            name="do-async",
            what="`do_async`, leader, a coroutine that suspends once",
            against="`await asyncio.create_task(fn())`",
            blind_to="a loop with other work: both sides pay for its empty rounds",
            unit=Unit.NANOSECONDS,
            operations=operations(1_000),
            rounds=rounds(61),
            prepare=leading.leading_async(
                suspends_once, leading.bare_task, (leading.SHIELD, leading.shielded_task)
            ),
            prepare_peers=peers.leading_async(suspends_once, leading.bare_task),
        ),
        Benchmark(
            name="do-async-inline",
            what="`do_async`, leader, a coroutine that does not suspend",
            against="a minimal leader that awaits `fn()` inline between `d[k] = 1` and `del d[k]`",
            blind_to="that the floor has no task, which any suspension would need",
            unit=Unit.NANOSECONDS,
            operations=operations(2_000),
            rounds=rounds(61),
            prepare=leading.leading_async(
                constant_async, leading.bare_leader, (leading.ONE_TASK, leading.one_task_each)
            ),
            prepare_peers=peers.leading_async(constant_async, leading.bare_leader),
        ),
        Benchmark(
            name="do-future",
            what="`do_future(fn, k).result()`",
            against="`executor.submit(fn).result()` on the same warm pool of one thread",
            blind_to="a busy pool; most of either side is two threads waking each other, which "
            "takes several times as long on two cores as on one",
            unit=Unit.NANOSECONDS,
            operations=operations(500),
            rounds=rounds(61),
            prepare=leading.submitting,
        ),
        Benchmark(
            name="followers",
            what="`do_async`, 1,000 followers of one key, each",
            against="1,000 tasks that each await a future of their own",
            blind_to="followers on other threads or loops; both sides include making their tasks",
            unit=Unit.NANOSECONDS,
            operations=operations(1_000),
            rounds=rounds(41),
            prepare=following.following(),
            prepare_peers=peers.following,
        ),
        Benchmark(
            name="followers-curve",
            what="`do_async`, so many followers of one key, each",
            against="as many tasks that each await a future of their own",
            blind_to="as `followers`; what a loop's other tasks have to wait meanwhile",
            unit=Unit.NANOSECONDS,
            operations=operations(1_000),
            rounds=rounds(9),
            prepare=following.following(points(1, 10, 100, 1_000, 10_000, 100_000)),
        ),
        Benchmark(
            name="follower-threads",
            what="500 threads following one key by `do`, from the first to the last awake",
            against="500 threads, each on a lock of its own, released in a loop",
            blind_to="what comes before the first is awake; the system's scheduler is most of it",
            unit=Unit.NANOSECONDS,
            operations=operations(500),
            rounds=rounds(21),
            prepare=following.following_threads,
            prepare_peers=peers.following_threads,
        ),
        Benchmark(
            name="keys-in-flight",
            what="`do`, leader, one `str` part, while so many other keys are in flight",
            against="the same while 1,000 other keys are in flight",
            blind_to="a collector that goes through what is in flight: it is off; keys that are "
            "colder than 100,000 of them in turn make them",
            unit=Unit.NANOSECONDS,
            operations=operations(500_000),
            rounds=rounds(9),
            prepare=leading.among(points(1_000, 10_000, 100_000, 1_000_000)),
        ),
        Benchmark(
            name="http",
            what="a request through the middleware that is not collapsed, as its server's time",
            against="the same to the same application without the middleware",
            blind_to="an application that does anything: this one answers at once, so its share "
            "of a real request is smaller; what the system does for a connection",
            unit=Unit.NANOSECONDS,
            operations=operations(800),
            rounds=rounds(31),
            prepare=http.passing,
        ),
        Benchmark(
            name="tiers-leader",
            what="`do`, leader, on a tier beyond the process",
            against="redis: two bare `EVALSHA` of the same payload, by redis-py; host: a file that "
            "is made, locked and removed",
            blind_to="a network, whose time both sides pay; a server that others use",
            unit=Unit.NANOSECONDS,
            operations=operations(1_000),
            rounds=rounds(15),
            prepare=tiers.leading,
            both_forms=False,
        ),
        Benchmark(
            name="tiers-keys",
            what="`do_async`, leaders of distinct keys over one Valkey, all at once",
            against="the same commands in a pipeline for each of their two steps",
            blind_to="a network; that the pipeline waits for nobody and runs no function; several "
            "processes, which share the server's processor and have their own",
            unit=Unit.CALLS_PER_SECOND,
            operations=operations(1_000),
            rounds=rounds(15),
            prepare=tiers.distinct_keys,
            both_forms=False,
        ),
        Benchmark(
            name="tiers-round-trips",
            what="scripts that the server has run",
            against="nothing",
            blind_to="renewals of a lease, three in the time of one for all that a process leads",
            unit=Unit.COUNT,
            operations=5,
            rounds=1,
            prepare=tiers.round_trips,
            both_forms=False,
        ),
        Benchmark(
            name="tiers-memory",
            what="an execution in flight in the server's memory, a process with its connections, "
            "and one of its inboxes",
            against="nothing",
            blind_to="the outcome, which is kept for three leases if anybody followed; buffers of "
            "connections that are behind",
            unit=Unit.BYTES,
            operations=5,
            rounds=1,
            prepare=tiers.memory,
            both_forms=False,
        ),
        Benchmark(
            name="tiers-wake",
            what="two processes, one key: how soon the other has what one has found",
            against="the time until a process has read a line from a pipe",
            blind_to="a network; several followers",
            unit=Unit.SECONDS,
            operations=2,
            rounds=rounds(15),
            prepare=tiers.stampeding(tiers.TIERS, 0.2, fails=False),
            both_forms=False,
        ),
        Benchmark(
            name="tiers-stampede",
            what=f"{processes} processes, one key, a function of {1 * scale:g} s",
            against="the function's time; for who is awake, until half of the processes have read "
            "a line from a pipe",
            blind_to="a network; more processors than the processes, and what they would do else",
            unit=Unit.SECONDS,
            operations=processes,
            rounds=rounds(3),
            prepare=tiers.stampeding(tiers.TIERS, 1 * scale, fails=False),
            prepare_peers=tiers.stampeding(tuple(tiers.OTHERS), 1 * scale, fails=False),
            both_forms=False,
        ),
        Benchmark(
            name="tiers-failure",
            what=f"{processes} processes, one key, a function that raises after {0.5 * scale:g} s",
            against="the function's time",
            blind_to="as `tiers-stampede`",
            unit=Unit.SECONDS,
            operations=processes,
            rounds=rounds(3),
            prepare=tiers.stampeding(tiers.TIERS, 0.5 * scale, fails=True),
            prepare_peers=tiers.stampeding(tuple(tiers.OTHERS), 0.5 * scale, fails=True),
            both_forms=False,
        ),
        Benchmark(
            name="memory-do",
            what="an execution in flight, led by `do` on a thread of its own",
            against="the same threads inside the same function without a flight",
            blind_to="key, function, the thread's stack, and what a thread keeps after its first "
            "call; what is not allocated through Python",
            unit=Unit.BYTES,
            operations=operations(500),
            rounds=rounds(5),
            prepare=memory.leading_threads,
        ),
        Benchmark(
            name="memory-do-async",
            what="an execution in flight, led by `do_async`, with the task that the flight owns",
            against="the same tasks inside the same coroutine function without a flight",
            blind_to="key, function, its coroutine, and the caller's own task",
            unit=Unit.BYTES,
            operations=operations(5_000),
            rounds=rounds(5),
            prepare=memory.leading_tasks,
        ),
        Benchmark(
            name="memory-do-future",
            what="an execution in flight, led by `do_future`",
            against="`executor.submit(fn)` and one more `Future` for the caller",
            blind_to="key, function, and the two futures that no call of this kind can do without",
            unit=Unit.BYTES,
            operations=operations(5_000),
            rounds=rounds(5),
            prepare=memory.leading_futures,
        ),
        Benchmark(
            name="memory-follower",
            what="a coroutine that follows, in a task of its own",
            against="a task that awaits one future shared by all",
            blind_to="the callback by which a future knows its task: both sides have one",
            unit=Unit.BYTES,
            operations=operations(1_000),
            rounds=rounds(5),
            prepare=memory.waiting_tasks,
        ),
        Benchmark(
            name="memory-empty",
            what="a flight in which nothing has been called, default shards",
            against="nothing",
            blind_to="what is not allocated through Python; what the first calls add",
            unit=Unit.BYTES,
            operations=1,
            rounds=rounds(5),
            prepare=memory.idling,
        ),
    )
