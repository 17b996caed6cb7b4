"""Every transport passes the same checks on 1, 2 and 4 ranks."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import pytest

from jaxcomm import settings
from tests.jobs import launch_ranks, on_fake_nccl
from tests.programs import conformance

pytestmark = pytest.mark.long

LIMIT = 600  # seconds of a job, for hangs only

JOBS = [
    pytest.param("local", 1, marks=pytest.mark.thorough),
    pytest.param("mpi", 1, marks=pytest.mark.thorough),
    ("mpi", 2),
    pytest.param("mpi", 4, marks=pytest.mark.thorough),
    # The ranks of a test share a host; these make the MPI calls of ranks that do not.
    pytest.param("mpi apart", 2, marks=pytest.mark.thorough),
    pytest.param("mpi apart", 4, marks=pytest.mark.thorough),
    # And these pretend to have these hosts, on which they share memory.
    pytest.param("mpi 0,1,1,0", 4, marks=pytest.mark.thorough),
    pytest.param("mpi4jax", 1, marks=pytest.mark.thorough),
    pytest.param("mpi4jax", 2, marks=pytest.mark.thorough),
    pytest.param("mpi4jax", 4, marks=pytest.mark.thorough),
    # Over a library of NCCL's interface that reduces host memory.
    pytest.param("nccl", 1, marks=pytest.mark.thorough),
    pytest.param("nccl", 2, marks=pytest.mark.thorough),
    pytest.param("nccl", 4, marks=pytest.mark.thorough),
]


# Where two ranks, or a power of two, hide a mistake, and where transports differ.
SOME = (
    "check_all_reduce_against_numpy",
    "check_a_part_of_a_grouped_sum_is_no_mean",
    "check_derivatives_of_array_collectives",
    "check_permutations_differentiated_from_outside",
    "check_mean_is_one_call",
    "check_weighted_means",
    "check_wire_dtype",
)


@functools.cache
def outcomes(transport: str, ranks: int, *names: str) -> dict[str, str]:
    """Run checks once and return {check: errors}; one job serves all tests."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        name, _, apart = transport.partition(" ")
        env = {"JAXCOMM_SHARED_MEMORY": "off" if apart == "apart" else "on"}
        # Ranks on several hosts call MPI on a thread of their own.
        env["JAXCOMM_OWN_THREAD"] = "on" if apart and ranks == 4 else "off"
        if apart[:1].isdigit():
            env[settings.TEST_HOSTS_VARIABLE] = apart
        if name == "nccl":
            env |= on_fake_nccl()
        command = ["-m", "tests.programs.conformance", results, name, *names]
        done = launch_ranks(ranks, command, timeout=LIMIT, env=env)
        found = json.loads(results.read_text()) if results.exists() else {}
    if done.returncode != 0:
        ended = (
            f"exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-6000:]}"
        )
        found = {name: found.get(name, ended) for name in names}
    return found


@pytest.fixture
def names(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Return the checks of this test's job that pytest was asked for; mostly all."""

    def job(item: pytest.Item) -> tuple[str, list[tuple[str, object]]]:
        params = item.callspec.params  # pyright: ignore[reportAttributeAccessIssue]
        return item.originalname, [  # pyright: ignore[reportAttributeAccessIssue]
            (name, value) for name, value in params.items() if name != "check"
        ]

    wanted = {
        item.callspec.params["check"]  # pyright: ignore[reportAttributeAccessIssue]
        for item in request.session.items
        if item.path == request.path and job(item) == job(request.node)
    }
    return tuple(name for name in conformance.checks() if name in wanted)


def judge(error: str) -> None:
    if error.startswith(conformance.SKIPPED):
        pytest.skip(error.removeprefix(conformance.SKIPPED))
    assert not error, error


@pytest.mark.timeout(LIMIT + 100)
@pytest.mark.parametrize(("transport", "ranks"), JOBS)
@pytest.mark.parametrize("check", sorted(conformance.checks()))
def test_conformance(
    transport: str, ranks: int, check: str, names: tuple[str, ...]
) -> None:
    judge(outcomes(transport, ranks, *names)[check])


@pytest.mark.timeout(LIMIT + 100)
@pytest.mark.parametrize(
    ("transport", "ranks"),
    [
        ("mpi", 3),
        ("mpi 0,1,0", 3),
        pytest.param("mpi", 4, marks=pytest.mark.thorough),
        pytest.param("mpi apart", 3, marks=pytest.mark.thorough),
        ("mpi4jax", 2),
        ("nccl", 2),
    ],
)
@pytest.mark.parametrize("check", SOME)
def test_some_checks(
    transport: str, ranks: int, check: str, names: tuple[str, ...]
) -> None:
    judge(outcomes(transport, ranks, *names)[check])
