"""One rank does something else: every rank hears of it, or the job ends, in seconds."""

from __future__ import annotations

import pytest

from tests.jobs import Launch, on_fake_nccl

CASES = 14


more = pytest.mark.thorough


@pytest.mark.parametrize(
    ("transport", "ranks"),
    [
        ("mpi", 2),
        pytest.param("mpi", 4, marks=more),
        ("nccl", 2),
        pytest.param("nccl", 4, marks=more),
        pytest.param("mpi4jax", 2, marks=more),
        pytest.param("mpi4jax", 4, marks=more),
    ],
)
def test_every_rank_raises(launch: Launch, transport: str, ranks: int) -> None:
    env = on_fake_nccl() if transport == "nccl" else {}
    # A rank that waits for its timeout, 600 s, instead of comparing takes longer.
    program = ["-m", "tests.programs.mismatch_ranks", transport]
    done = launch(ranks, program, env=env, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{CASES} cases" in done.stdout


ALONE = """
import functools, sys
import jax, jax.numpy as jnp, jaxcomm
from jax import lax
comm = jaxcomm.init(sys.argv[1], timeout=30)
what, odd = sys.argv[2], comm.rank == int(sys.argv[3])

@jaxcomm.data_parallel
def train_step(x):
    return lax.pmean(x, "batch") + lax.pmax(x * 2, "batch")

@jaxcomm.data_parallel
def evaluate(x):
    return lax.psum(x, "batch")

small, large = jnp.ones((2, 3)), jnp.ones((4, 3))
if what != "lower":
    for step in (train_step, evaluate):
        jax.block_until_ready(step(small))
if what == "retrace":
    train_step(large if odd else small).block_until_ready()
elif what == "skip":
    for _ in range(4 - odd):
        train_step(small).block_until_ready()
elif what == "lower":
    train_step.lower(small)
    if not odd:
        train_step(small).block_until_ready()
elif what == "order":
    first, second = (evaluate, train_step) if odd else (train_step, evaluate)
    first(small).block_until_ready()
    second(small).block_until_ready()
elif what == "same size":
    # MPI itself does not see that these do not belong together.
    largest = jaxcomm.data_parallel(lambda x: lax.pmax(x, "batch"))
    largest(small)
    for step in (largest, evaluate) if odd else (evaluate, largest):
        jax.block_until_ready(step(small))
elif what == "branch":
    # Both branches' calls are of one schedule; MPI does not see this either.
    @functools.partial(jaxcomm.data_parallel, allow_divergent=True)
    def either(x, first):
        branches = (lambda v: lax.psum(v, "batch"), lambda v: lax.pmax(v, "batch"))
        return lax.cond(first, *branches, x)

    for _ in range(2):
        jax.block_until_ready(either(small, odd))
print("went on", flush=True)
"""

# What one rank may do to others who are already on their way, and how it is found out.
REPORTS = {
    "retrace": "the ranks are in different calls where all must be in call 4",
    "skip": "ended without a call",
    "lower": "ended without a call",
    "order": "came to the same call from different places of their programs",
    "same size": " made different calls, the first between call 1 and call ",
    "branch": " made different calls, the first between call ",
}


@pytest.mark.parametrize(
    ("what", "ranks", "culprit", "way"),
    [
        ("retrace", 2, 1, {}),
        pytest.param("retrace", 4, 2, {"JAXCOMM_SHARED_MEMORY": "off"}, marks=more),
        ("skip", 2, 0, {"JAXCOMM_SHARED_MEMORY": "off"}),
        pytest.param("skip", 4, 3, {}, marks=more),
        pytest.param("lower", 2, 1, {}, marks=more),
        pytest.param("lower", 4, 1, {}, marks=more),
        pytest.param("order", 2, 0, {}, marks=more),
        ("order", 4, 1, {}),
        ("order", 4, 1, {"JAXCOMM_TEST_HOSTS": "0,0,1,1"}),
        ("same size", 2, 1, {"JAXCOMM_SHARED_MEMORY": "off"}),
        pytest.param("same size", 4, 2, {"JAXCOMM_SHARED_MEMORY": "off"}, marks=more),
        pytest.param("branch", 2, 1, {"JAXCOMM_SHARED_MEMORY": "off"}, marks=more),
    ],
)
def test_the_job_ends(
    job: Launch, what: str, ranks: int, culprit: int, way: dict[str, str]
) -> None:
    done = job(ranks, ALONE, "mpi", what, str(culprit), env=way, timeout=150)
    assert done.returncode in (1, 70), done.stdout + done.stderr
    assert REPORTS[what] in done.stderr, done.stderr
    # Of one rank, with what XLA said of it: not once per rank.
    assert done.stderr.count("ScheduleMismatchError: ") <= 3
    if what in ("skip", "lower"):
        assert f"rank {culprit} ended without a call" in done.stderr


def test_mpi4jax_never_gets_calls_that_differ(job: Launch) -> None:
    done = job(3, ALONE, "mpi4jax", "order", "1", timeout=150)
    assert done.returncode == 1, done.stdout + done.stderr
    assert REPORTS["order"] + "; nothing was reduced" in done.stderr, done.stderr
    assert "went on" not in done.stdout


@pytest.mark.parametrize(("transport", "ranks"), [("mpi", 2), ("nccl", 2)])
def test_every_call_can_be_checked(job: Launch, transport: str, ranks: int) -> None:
    env = {"JAXCOMM_CHECK": "every", "JAXCOMM_SHARED_MEMORY": "off"}
    if transport == "nccl":
        env |= on_fake_nccl()
    done = job(ranks, ALONE, transport, "order", "1", env=env, timeout=150)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the ranks hold different schedules" in done.stderr
    assert "rank 1: " in done.stderr
    assert "went on" not in done.stdout


CHECKS = """
import jax.numpy as jnp, jaxcomm
comm = jaxcomm.init()
for _ in range(5):
    jaxcomm.all_reduce(jnp.ones(3)).block_until_ready()
assert comm.counters()["agreements"] == 5
"""


def test_checks_are_counted_and_may_not_be_misspelt(job: Launch) -> None:
    done = job(2, CHECKS, env={"JAXCOMM_CHECK": "every"})
    assert done.returncode == 0, done.stderr
    done = job(2, CHECKS, env={"JAXCOMM_CHECK": "always"})
    assert done.returncode == 1
    assert "JAXCOMM_CHECK: 'always'; give 'once'" in done.stderr
