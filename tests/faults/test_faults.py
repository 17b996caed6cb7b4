"""Some trials of faults, a short soak, and conditions that are not faults at all.

`make faults` runs 200 trials and 100,000 calls.
"""

from __future__ import annotations

import pytest

from tests.faults import trials
from tests.jobs import Launch

pytestmark = pytest.mark.long

WAYS = {
    "shared memory": {},
    "own thread": {"JAXCOMM_SHARED_MEMORY": "off", "JAXCOMM_OWN_THREAD": "on"},
}
# Some of the kinds have tests of their own besides.
SEEDS = (7, 9, 14, 23)
MORE = (0, 15, 19, 20)


@pytest.mark.parametrize(
    "seed", [*SEEDS, *(pytest.param(s, marks=pytest.mark.thorough) for s in MORE)]
)
def test_a_fault_ends_in_a_report_or_in_right_results(seed: int) -> None:
    result = trials.run(trials.draw(seed))
    assert result["verdict"] in (trials.RIGHT, trials.REPORTED), result


def test_trials_come_again() -> None:
    drawn = [trials.draw(seed) for seed in range(300)]
    assert drawn == [trials.draw(seed) for seed in range(300)]
    assert {trial.kind for trial in drawn} == set(trials.KINDS)
    assert {trial.way for trial in drawn} == set(trials.WAYS)
    assert {trial.culprit for trial in drawn} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "way", [pytest.param("shared memory", marks=pytest.mark.thorough), "own thread"]
)
def test_nothing_grows(way: str) -> None:
    grown = trials.run_soak(2000, WAYS[way])
    assert not trials.grows(grown), grown


@pytest.mark.parametrize("condition", ["in_flight", "forked", "late", "own_mpi"])
def test_conditions(launch: Launch, condition: str) -> None:
    env = WAYS["own thread" if condition == "in_flight" else "shared memory"]
    done = launch(2, ["-m", "tests.programs.conditions_ranks", condition], env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done") == 2
