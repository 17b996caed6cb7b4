"""The watchdog: a job that stops moving ends, and says who waits for whom and where."""

from __future__ import annotations

import re

import pytest

from tests.jobs import Launch

STEPS = """
import os, signal, sys, threading, time
import jax, jax.numpy as jnp, jaxcomm
comm = jaxcomm.init(sys.argv[1])
what, culprit = sys.argv[2], int(sys.argv[3])

@jaxcomm.data_parallel
def train_step(params):
    grads = jax.tree.map(lambda p: p * 0.5, params)
    return jax.lax.pmean(grads, "batch")

def wander_off():
    if what == "sleep":
        time.sleep(1000)
    while what == "loop":
        pass
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "skip":
        comm.barrier()

params = {"kernel": jnp.ones((300, 70)), "bias": jnp.ones(7)}
for step in range(6):
    if step == 3 and comm.rank == culprit:
        wander_off()
    params = jax.block_until_ready(train_step(params))
print("went on", flush=True)
"""

ENDS = """
import atexit, os, signal, sys
def stay():
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
atexit.register(stay)  # so it runs after what init registers
import jax.numpy as jnp, jaxcomm
rank = jaxcomm.init("mpi").rank
assert float(jaxcomm.all_reduce(jnp.ones(3), op="sum")[0]) == 2
print("right", flush=True)
"""

WAYS = {
    "shared memory": {},
    "MPI calls": {"JAXCOMM_SHARED_MEMORY": "off"},
    "own thread": {"JAXCOMM_SHARED_MEMORY": "off", "JAXCOMM_OWN_THREAD": "on"},
    # Of four ranks on two hosts.
    "two tiers": {"JAXCOMM_TEST_HOSTS": "0,0,1,1"},
}


IN_STEP = "waits in call 4: bucket 0 of 1 (mean of [0]['bias'], [0]['kernel']; 84,028"


def stalled(job: Launch, ranks: int, what: str, culprit: int, way: str) -> str:
    """Run a job that stops moving; return its report."""
    limits = {"JAXCOMM_WARN_AFTER": "1", "JAXCOMM_ABORT_AFTER": "3"}
    done = job(
        ranks,
        STEPS,
        "mpi",
        what,
        str(culprit),
        env={**WAYS[way], **limits},
        timeout=150,
    )
    assert done.returncode == 70, done.stdout + done.stderr
    assert "went on" not in done.stdout
    text = done.stderr
    # One reports; on a crowded machine another may that has not heard of it in time.
    assert "jaxcomm: no progress for" in text, text
    assert IN_STEP in text, text
    # A warning came first, from each rank that waits.
    assert "s for the other ranks in call 4" in text
    waits = of_rank(text, "waits here")
    if what != "skip":  # perhaps the one in the barrier reports
        # Our own functions have names, though the library exports few of them.
        assert re.search(r"jaxcomm::.* \(libjaxcomm_native.so\+0x", waits), text
        if way == "MPI calls":
            assert "PMPI_Allreduce (libmpi" in waits, text
    if vendor() == "Open MPI":
        assert re.search(r"MPI of ranks? 0.*: Open MPI v\S+; pml \w+; btl self", text)
    return text


def of_rank(text: str, what: str) -> str:
    """Return the part of a report about the rank of which it says `what`."""
    lines = text[text.index(what) :].splitlines()
    # What belongs to a rank is indented by more than two.
    ends = (n for n, line in enumerate(lines[1:], 1) if not line.startswith("   "))
    return "\n".join(lines[: next(ends, len(lines))])


def vendor() -> str:
    from mpi4py import MPI

    return MPI.get_vendor()[0]


@pytest.mark.parametrize(
    ("what", "way"),
    [
        ("sleep", "shared memory"),
        pytest.param("loop", "MPI calls", marks=pytest.mark.thorough),
        pytest.param("sleep", "own thread", marks=pytest.mark.thorough),
    ],
)
def test_a_rank_that_is_stuck_in_python(job: Launch, what: str, way: str) -> None:
    text = stalled(job, 2, what, 1, way)
    assert "waiting in this call: rank 0\n" in text
    assert "not arrived: rank 1 (host " in text
    assert "its last call was 3" in text
    missing = of_rank(text, "not arrived: rank 1")
    assert "in wander_off" in missing  # where it is
    assert "Its native threads are at\n    thread " in missing
    assert ("nanosleep (libc" in missing) == (what == "sleep"), missing


@pytest.mark.parametrize("way", ["shared memory", "two tiers"])
def test_a_rank_that_is_stopped(job: Launch, way: str) -> None:
    text = stalled(job, 4, "stop", 2, way)
    assert "waiting in this call: ranks 0-1, 3\n" in text
    assert "no answer from rank 2: ended, stopped" in text


def test_a_rank_that_calls_something_else(job: Launch) -> None:
    text = stalled(job, 4, "skip", 0, "shared memory")
    # Whichever of the two waits is reported, the other is told of as well.
    assert "the host-side barrier" in text
    assert "not arrived: rank 0" in text or "not arrived: rank 1" in text


@pytest.mark.parametrize(
    ("ranks", "way"), [(2, "own thread"), (4, "shared memory"), (4, "two tiers")]
)
def test_a_rank_that_is_killed_ends_the_others(
    job: Launch, ranks: int, way: str
) -> None:
    done = job(ranks, STEPS, "mpi", "kill", "1", env=WAYS[way], timeout=150)
    assert done.returncode not in (0, 70, 124), done.stdout + done.stderr
    assert "went on" not in done.stdout


LATE = """
import time
import jax.numpy as jnp, jaxcomm
comm = jaxcomm.init(timeout=2)
if comm.rank == 1:
    time.sleep(30)
try:
    jaxcomm.all_reduce(jnp.ones(3))
except jaxcomm.errors.StallError as error:
    assert "waited 2 s for the other ranks to check a schedule" in str(error)
    raise
"""


def test_a_rank_that_never_compares_its_schedule(job: Launch) -> None:
    done = job(2, LATE, timeout=150)
    assert done.returncode == 1
    assert "StallError: rank 0 of 2 waited 2 s" in done.stderr, done.stderr


BARRIER = """
import time, jaxcomm
comm = jaxcomm.init()
comm.barrier()
if comm.rank == 0:
    time.sleep(1000)
comm.all_gather_object("here")
"""


def test_host_side_exchanges_are_watched_too(job: Launch) -> None:
    done = job(2, BARRIER, env={"JAXCOMM_ABORT_AFTER": "2"}, timeout=150)
    assert done.returncode == 70, done.stderr
    assert "the host-side gathering of objects" in done.stderr
    assert "not arrived: rank 0" in done.stderr
    assert "time.sleep(1000)" in done.stderr


def test_warnings_can_be_off(job: Launch) -> None:
    limits = {"JAXCOMM_WARN_AFTER": "0", "JAXCOMM_ABORT_AFTER": "2"}
    done = job(2, STEPS, "mpi", "sleep", "0", env=limits, timeout=150)
    assert done.returncode == 70
    assert "has waited" not in done.stderr  # warnings are off


SLOW = """
import time
import jax.numpy as jnp, jaxcomm
comm = jaxcomm.init(warn_after=0.5, abort_after=0)
for _ in range(2):
    if comm.rank == 1:
        time.sleep(2)
    jaxcomm.all_reduce(jnp.ones(3)).block_until_ready()
for bad in (-1, "soon"):
    try:
        jaxcomm.init(warn_after=bad)
    except jaxcomm.errors.InvalidOptionError as error:
        assert "warn_after" in str(error)
"""


MOVING = """
import time
import jax.numpy as jnp, jaxcomm
comm = jaxcomm.init(warn_after=0, abort_after=1.5)
x = jnp.ones(4)
jaxcomm.all_reduce(x)
pair = comm.subgroup([0, 1])
if comm.rank < 2:
    end = time.monotonic() + 5
    while time.monotonic() < end:
        jaxcomm.all_reduce(x, comm=pair, op="sum").block_until_ready()
        time.sleep(0.05)
        if comm.rank == 0:
            done = time.monotonic() >= end
        if pair.broadcast_object(done if comm.rank == 0 else None):
            break
jaxcomm.all_reduce(x).block_until_ready()
"""


def test_a_job_that_moves_goes_on(job: Launch) -> None:
    done = job(3, MOVING.replace("while time.monotonic() < end", "while True"))
    assert done.returncode == 0, done.stderr
    assert "still waits in call 2" in done.stderr


def test_a_slow_rank_is_only_warned_about(job: Launch) -> None:
    done = job(2, SLOW, timeout=150)
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 2 has waited" in done.stderr


def test_unusable_limits(job: Launch) -> None:
    text = "import jaxcomm; jaxcomm.init()"
    done = job(2, text, env={"JAXCOMM_ABORT_AFTER": "soon"})
    assert done.returncode == 1
    assert "JAXCOMM_ABORT_AFTER: 'soon'; give a time in seconds" in done.stderr


def test_a_rank_that_is_stopped_after_its_last_call(job: Launch) -> None:
    """The others wait for it in MPI_Finalize, where there is no Python."""
    done = job(2, ENDS, env={"JAXCOMM_WARN_AFTER": "1", "JAXCOMM_ABORT_AFTER": "3"})
    assert done.returncode == 70, done.stderr
    assert done.stdout.count("right") == 2
    text = "has waited 3 s in MPI_Finalize for the other ranks, so the job ends"
    assert text in done.stderr and "rank 0 of 2" in done.stderr
    # Where its native threads are.
    assert re.search(r"mpi_finalize \(libmpi", done.stderr, re.IGNORECASE)
