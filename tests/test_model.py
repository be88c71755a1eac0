"""The model of the Redis tier's protocol: small scenarios whole, and that planted faults show."""

import pytest
from proof.model.checker import check
from proof.model.planted import PLANTED, Planted
from proof.model.protocol import CRASH, LOSE, RESTART, STALL, Protocol, Scenario

pytestmark = pytest.mark.once

SMALL = [
    Scenario((0, 1), leaves=1),
    Scenario((0, 1), forgets=1, hold=True),
    Scenario((0, 1), faults=1, kinds=(CRASH,)),
    Scenario((0, 1), faults=1, kinds=(STALL,), beats=True),
    Scenario((0, 1), faults=1, kinds=(LOSE,)),
    Scenario((0, 1), faults=1, kinds=(RESTART,)),
]


@pytest.mark.parametrize("scenario", SMALL, ids=str)
def test_the_protocol_has_no_fault_in_any_state_of_a_small_scenario(scenario: Scenario) -> None:
    report = check(Protocol(scenario))
    assert report.complete
    assert not report.fault, report.trace


#: Those that are found within a second or two.
QUICK = [planted for planted in PLANTED if len(planted.scenario.callers) == 2]


@pytest.mark.parametrize("planted", QUICK, ids=lambda planted: planted.name)
def test_a_planted_fault_is_found(planted: Planted) -> None:
    report = check(Protocol(planted.scenario, planted.server, planted.client))
    assert report.fault
    assert len(report.trace) > 1
