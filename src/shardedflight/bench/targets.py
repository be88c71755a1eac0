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


#: What threads of the benchmark "scaling" call: few keys of their own, many, or those of all. Two
#: threads with many keys come to share all lines of memory, whatever the keys are.
FEW_KEYS = "200 own keys"
MANY_KEYS = "10,000 own keys"
SAME_KEYS = "the same 10,000 keys"

#: What is compared there. The first three are to reach something with own keys, few or many.
SPEED_UP = "default shards, 2 threads / 1"
ONE_SHARD = "2 threads, default shards / 1 shard"
SIXTEEN_SHARDS = "2 threads, 16 shards / 1 shard"

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

_FREE_THREADED = {f"{SAME_KEYS}, {SPEED_UP}": Target(1.4, at_least=True)}
for _keys in (FEW_KEYS, MANY_KEYS):
    _FREE_THREADED[f"{_keys}, {SPEED_UP}"] = Target(1.8, at_least=True)
    _FREE_THREADED[f"{_keys}, {ONE_SHARD}"] = Target(1.6, at_least=True)
    _FREE_THREADED[f"{_keys}, {SIXTEEN_SHARDS}"] = Target(1.3, at_least=True)
