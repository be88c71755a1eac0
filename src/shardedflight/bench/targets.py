"""The figures to reach, by interpreter and by form of the library."""

import sys
from dataclasses import dataclass

#: Whether threads really run at once in this process.
GIL = bool(getattr(sys, "_is_gil_enabled", lambda: True)())


@dataclass(frozen=True)
class Target:
    """A figure is to be at most, or at least, this."""

    value: float
    at_least: bool = False

    def met_by(self, figure: float) -> bool:
        """Tells whether the figure is on the right side."""
        return figure >= self.value if self.at_least else figure <= self.value


def target_of(
    benchmark: str,
    point: str,
    form: str,
    *,
    python: tuple[int, int] = sys.version_info[:2],
    gil: bool = GIL,
) -> Target | None:
    """Returns the target of a row, or None if it has none.

    Args:
        benchmark: The benchmark's name.
        point: Which of the benchmark's points, where it has several.
        form: "compiled" or "plain".
        python: The interpreter's version.
        gil: Whether the interpreter's threads take turns.
    """
    match benchmark, point:
        case (("do" | "do-two-parts"), _) if form == "plain":
            return Target(6)
        case "do", _:
            return Target(1.5 if python >= (3, 13) else 1.8)
        case "do-two-parts", _:
            return Target(2.2)
        case "do-async-inline", _ if python >= (3, 12):
            return Target(3)
        case (("do-async" | "do-future"), _):
            return Target(1.1)
        case ("followers", _) | ("followers-curve", "1,000 followers" | "100,000 followers"):
            return Target(1.1)
        case "follower-threads", _:
            return Target(1.2)
        case "keys-in-flight", "1,000,000 keys":
            return Target(1.5)
        case (("memory-do" | "memory-do-async" | "memory-do-future"), _):
            return Target(300)
        case "memory-empty", _:
            return Target(65_536)
        case "http", _ if "a leader" not in point:
            return Target(1 / 0.9)  # 10 % of the throughput
        case name, _ if name.startswith("tiers-"):
            return _TIERS.get((name, point))
        case "scaling", _ if not gil and python >= (3, 14):
            return _FREE_THREADED.get(point)
        case _:
            return None


#: The points of the benchmark "scaling" that are to reach something.
OWN_KEYS = "own keys, default shards, 2 threads / 1"
ONE_SHARD = "own keys, 2 threads, default shards / 1 shard"
SIXTEEN_SHARDS = "own keys, 2 threads, 16 shards / 1 shard"
SAME_KEYS = "same keys, default shards, 2 threads / 1"

_TIERS = {
    ("tiers-leader", "redis"): Target(1.3),
    ("tiers-keys", "redis"): Target(0.5, at_least=True),
    ("tiers-round-trips", "a leader"): Target(2),
    ("tiers-round-trips", "a follower"): Target(1),
    ("tiers-wake", "redis, awake"): Target(0.002),
    ("tiers-stampede", "host, awake"): Target(0.005),
}
for _tier in ("redis", "host"):
    _TIERS["tiers-wake", f"{_tier}, executions"] = Target(1)
    _TIERS["tiers-stampede", f"{_tier}, executions"] = Target(1)
    _TIERS["tiers-stampede", f"{_tier}, all have it"] = Target(1.05)
    _TIERS["tiers-failure", f"{_tier}, executions"] = Target(1)
    _TIERS["tiers-failure", f"{_tier}, all have it"] = Target(0.6)

_FREE_THREADED = {
    OWN_KEYS: Target(1.8, at_least=True),
    ONE_SHARD: Target(1.6, at_least=True),
    SIXTEEN_SHARDS: Target(1.3, at_least=True),
    SAME_KEYS: Target(1.4, at_least=True),
}
