"""The scenarios that are explored, small ones first."""

from .protocol import CRASH, CUT, KILL, LOSE, REFUSE, RESTART, STALL, Scenario

__all__ = ["LARGE", "SMALL"]

_PAIR, _TWO_AND_ONE, _THREE = (0, 1), (0, 0, 1), (0, 1, 2)

#: Seconds each.
SMALL: dict[str, Scenario] = {
    "two processes": Scenario(_PAIR),
    "three processes": Scenario(_THREE),
    "two processes, any fault": Scenario(_PAIR, faults=1),
    "the same, outcomes held": Scenario(_PAIR, faults=1, hold=True),
    "the same, outcomes fetched": Scenario(_PAIR, faults=1, large=True),
    "the same, renewals as steps": Scenario(_PAIR, faults=1, beats=True),
    "two callers and one, one leaves": Scenario(_TWO_AND_ONE, leaves=1),
    "two processes, a forget, one leaves": Scenario(_PAIR, forgets=1, leaves=1),
}

#: Up to three minutes each.
LARGE: dict[str, Scenario] = {
    "two callers and one, a forget": Scenario(_TWO_AND_ONE, forgets=1),
    "two processes, any fault, one leaves": Scenario(_PAIR, faults=1, leaves=1),
    "two callers and one, any fault": Scenario(_TWO_AND_ONE, faults=1),
    "three processes, one leaves": Scenario(_THREE, leaves=1),
    "two processes, any fault, a forget": Scenario(_PAIR, faults=1, forgets=1),
    "three processes, a leader lost": Scenario(_THREE, faults=1, kinds=(CRASH, STALL)),
    "three processes, messages lost": Scenario(_THREE, faults=1, kinds=(LOSE, CUT)),
    "three processes, commands lost": Scenario(_THREE, faults=1, kinds=(KILL, REFUSE)),
    "three processes, a restart": Scenario(_THREE, faults=1, kinds=(RESTART,)),
    "two processes, two faults": Scenario(_PAIR, faults=2),
}
