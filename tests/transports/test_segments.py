"""What is cut up: means over many segments, and arrays that are moved in pieces."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from jaxcomm.planning import costs
from jaxcomm.planning.costs import CostModel
from tests.jobs import Launch
from tests.programs.segments_ranks import SEGMENT

WAYS = {
    "shared": {},
    "apart": {"JAXCOMM_SHARED_MEMORY": "off"},
    "ring": {"JAXCOMM_SHARED_MEMORY": "off", "JAXCOMM_OWN_THREAD": "on"},
}


# Uneven pieces; more in make test-all.
IN_ALL_RUNS = {("shared", 3), ("apart", 2), ("ring", 3)}
CASES = [
    pytest.param(*case, marks=() if case in IN_ALL_RUNS else pytest.mark.thorough)
    for case in itertools.product(WAYS, (2, 3, 4))
]


@pytest.mark.parametrize(("way", "ranks"), CASES)
def test_means_over_many_segments(
    launch: Launch, tmp_path: Path, way: str, ranks: int
) -> None:
    # Leaves of up to 1.3 KB are packed.
    profile = CostModel(
        call=1e-6,
        curve=((8, 1e-6), (SEGMENT, 2e-6)),
        copy_bandwidth=2e9,
        segment_bytes=SEGMENT,
        source="small segments",
    )
    costs.save_profile(profile, tmp_path / "profile.json")
    env = {
        costs.PROFILE_VARIABLE: str(tmp_path / "profile.json"),
        # The window of shared memory then has three slots of a segment.
        "JAXCOMM_STAGING_BYTES": str(3 * SEGMENT),
        **WAYS[way],
    }
    done = launch(ranks, ["-m", "tests.programs.segments_ranks", way], env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all checked") == ranks, done.stdout + done.stderr


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.thorough), 3])
def test_arrays_that_are_moved_in_pieces(
    launch: Launch, tmp_path: Path, ranks: int
) -> None:
    done = launch(ranks, ["-m", "tests.programs.pieces_ranks", tmp_path])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all checked") == ranks, done.stdout + done.stderr
