"""Every transport passes the same checks on 1, 2 and 4 ranks."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import conformance
import pytest
from conftest import launch_ranks, on_fake_nccl

JOBS = [
    ("local", 1),
    pytest.param("mpi", 1, marks=pytest.mark.thorough),
    ("mpi", 2),
    ("mpi", 4),
    # The ranks of a test share a host; these make the MPI calls of ranks that do not.
    pytest.param("mpi apart", 2, marks=pytest.mark.thorough),
    ("mpi apart", 4),
    pytest.param("mpi4jax", 1, marks=pytest.mark.thorough),
    ("mpi4jax", 2),
    pytest.param("mpi4jax", 4, marks=pytest.mark.thorough),
    # Over a library of NCCL's interface that reduces host memory.
    pytest.param("nccl", 1, marks=pytest.mark.thorough),
    ("nccl", 2),
    ("nccl", 4),
]


@functools.cache
def outcomes(transport: str, ranks: int) -> dict[str, str]:
    """Run all checks once and return {check: errors}; one job serves all tests."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        script = Path(conformance.__file__)
        name, _, apart = transport.partition(" ")
        env = {"JAXCOMM_SHARED_MEMORY": "off" if apart else "on"}
        # Ranks on several hosts call MPI on a thread of their own.
        env["JAXCOMM_OWN_THREAD"] = "on" if apart and ranks == 4 else "off"
        if name == "nccl":
            env |= on_fake_nccl()
        done = launch_ranks(ranks, [script, results, name], timeout=300, env=env)
        found = json.loads(results.read_text()) if results.exists() else {}
    if done.returncode != 0:
        ended = (
            f"exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-6000:]}"
        )
        found = {name: found.get(name, ended) for name in conformance.checks()}
    return found


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("transport", "ranks"), JOBS)
@pytest.mark.parametrize("check", sorted(conformance.checks()))
def test_conformance(transport: str, ranks: int, check: str) -> None:
    error = outcomes(transport, ranks)[check]
    assert not error, error
