"""The benchmark counts real MPI calls, and its tables come from its JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.common import jobs, results
from benchmarks.overlap import report as overlap
from benchmarks.reduction import report
from benchmarks.tracing import report as tracing

pytestmark = pytest.mark.long


def test_a_step_makes_no_mpi_call_but_its_reductions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim = jobs.build_shim(tmp_path)
    monkeypatch.setenv("LD_PRELOAD", str(shim))
    for name, value in jobs.UNWATCHED.items():
        monkeypatch.setenv(name, value)
    count = ("--what", "calls", "--shim", str(shim))
    for calls in jobs.run_job("dispatch", "mpi", 2, *count):
        assert calls["no reduction"] == {}
        # The ranks share memory.
        assert calls["jaxcomm"] == {}
        # The shim sees mpi4jax's calls too, so it would have seen ours.
        assert calls["mpi4jax per leaf"] == {"Allreduce": 100}
    for calls in jobs.run_job("dispatch", "apart", 2, *count):
        # 100 leaves of 16 bytes, packed.
        (found,) = calls.values()
        assert set(found) == {"Allreduce"}
        assert found["Allreduce"] < 10


def test_timing_job() -> None:
    samples = jobs.slowest(jobs.run_job("dispatch", "mpi4jax", 2, "--repeats", "2"))
    assert set(samples) == {"no reduction", "jaxcomm over mpi4jax"}
    assert all(len(times) == 2 and min(times) > 0 for times in samples.values())
    times = results.summaries(samples)
    assert set(report.alone({"mpi4jax": times})) == {"jaxcomm over mpi4jax"}


def test_a_failing_job_shows_its_output() -> None:
    with pytest.raises(jobs.JobError, match="Invalid value for '--repeats'"):
        jobs.run_job("small", "mpi", 2, "--repeats", "0")


def test_tables_are_those_of_the_json() -> None:
    result = json.loads((results.FOLDER / "reduction.json").read_text())
    assert (results.FOLDER / "reduction.md").read_text() == report.markdown(result)
    for work, entry in result["workloads"].items():
        assert entry["alone_ms"] == report.alone(entry["times_ms"]), work


def test_overlap_and_tracing_tables_too() -> None:
    result = json.loads((results.FOLDER / "overlap.json").read_text())
    assert (results.FOLDER / "overlap.md").read_text() == overlap.markdown(result)
    for job in result["jobs"].values():
        assert job["overlaps"] == overlap.overlaps(job["times_ms"])
    result = json.loads((results.FOLDER / "tracing.json").read_text())
    assert (results.FOLDER / "tracing.md").read_text() == tracing.markdown(result)
