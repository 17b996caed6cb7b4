"""The weak-scaling benchmark's figures come from its samples, and its job runs."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.common import jobs
from benchmarks.common.taking_turns import ALONE, TOGETHER
from benchmarks.stemdl import report


def test_a_sample_is_the_slowest_ranks_and_alone_the_mean() -> None:
    ranks = [{"jaxcomm": [1.0, 4.0], ALONE: [1.0, 1.0]},
             {"jaxcomm": [2.0, 3.0], ALONE: [2.0, 3.0]}]  # fmt: skip
    found = report.combined(ranks)
    assert found == {"jaxcomm": [2.0, 4.0], ALONE: [1.5, 2.0]}


def test_efficiencies_compare_neighbouring_samples() -> None:
    # A machine that slows down by ten changes no ratio.
    ranks = {ALONE: [9.0, 90.0], TOGETHER: [10.0, 100.0], "jaxcomm": [12.0, 120.0]}
    found = report.efficiencies(
        {"ranks": ranks, "devices": {"jax.pmap": [11.0, 209.0]}}
    )
    # Samples of another job are nobody's neighbours: medians are compared.
    ours, pmap = found["ranks"]["jaxcomm"], found["devices"]["jax.pmap"]
    assert ours["of_one"] == pytest.approx(0.75)
    assert ours["of_ceiling"] == pytest.approx(10 / 12)
    assert "of_ceiling" not in found["ranks"][TOGETHER]
    assert pmap["of_one"] == pytest.approx(0.45)
    assert pmap["of_ceiling"] == pytest.approx(0.5)


def test_shares_of_a_step_from_a_timeline() -> None:
    def event(rank: int, name: str, start: float, end: float) -> dict[str, Any]:
        return {
            "ph": "X",
            "pid": rank,
            "tid": 1,
            "name": name,
            "ts": start,
            "dur": end - start,
        }

    events = [event(rank, "broadcast", 0, 5) for rank in (0, 1)]
    for step in (1000, 2000, 3000):
        # Rank 1 is 40 us late for the first bucket; both are there for the second.
        events += [event(0, "a", step, step + 50), event(1, "a", step + 40, step + 50)]
        events += [event(rank, "b", step + 90, step + 110) for rank in (0, 1)]
    steps = report.split({"traceEvents": events}, buckets=2)
    assert steps["step"] == pytest.approx([1.0] * 2)
    assert steps["waiting"] == pytest.approx([0.020] * 2)
    assert steps["travelling"] == pytest.approx([0.030] * 2)


@pytest.mark.thorough
@pytest.mark.timeout(200)
def test_the_job_on_two_ranks() -> None:
    found = jobs.run_stemdl("toy", "timeline", 1)
    steps = report.split(found[0]["trace"], found[0]["buckets"])
    # Five blocks of four steps; the last has no next one.
    assert len(steps["step"]) == 19
    for whole, waiting, travelling in zip(*steps.values(), strict=True):
        assert 0 <= waiting < whole
        assert 0 < travelling < whole


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_every_way_is_timed() -> None:
    ranks = jobs.run_stemdl("toy", "ranks", 2)
    devices = jobs.run_stemdl("toy", "devices", 2)
    ways = {"jaxcomm", TOGETHER, ALONE}
    assert [set(one["seconds"]) for one in ranks] == [ways, ways]
    assert set(devices[0]["seconds"]) == {"jax.pmap"}
    for one in [*ranks, *devices]:
        assert all(
            len(times) == 2 and min(times) > 0 for times in one["seconds"].values()
        )
