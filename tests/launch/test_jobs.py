"""Whole jobs, as a user starts them: right answers, and failures that end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import ROOT, Launch

TEN_LINES = """
import jax, numpy as np, jaxcomm
comm = jaxcomm.init()
mine = {"w": np.arange(6, dtype=np.float32) + comm.rank, "b": np.float32(comm.rank)}
mean = jax.jit(jaxcomm.all_reduce)(mine)
every = comm.all_gather_object(mine)
for name in mine:
    np.testing.assert_array_equal(mean[name], np.mean([m[name] for m in every], axis=0))
print(f"rank {comm.rank} agrees with NumPy over {comm.size}")
"""

MISMATCH = """
import jax.numpy as jnp, jaxcomm
comm = jaxcomm.init(timeout=30)
jaxcomm.all_reduce({"kernel": jnp.ones(4 if comm.rank == 1 else 3)})
"""

RAISES = """
import jaxcomm
comm = jaxcomm.init()
if comm.rank == comm.size - 1:
    raise ValueError("the disk is on fire")
comm.barrier()
"""

RAISES_INSIDE_A_STEP = """
import jax.numpy as jnp, jaxcomm
from jax import lax

@jaxcomm.data_parallel
def step(x):
    y = lax.pmean(x, "batch")
    raise ValueError("of mine\\nin two lines")

def epoch():
    return step(jnp.ones(3))

epoch()
"""

OF_JAXCOMM = """
import jax.numpy as jnp, jaxcomm
from jaxcomm.planning import planner
planner.make_schedule = None
jaxcomm.all_reduce(jnp.ones(3))
"""

PRINTS_ITS_SCHEDULE = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, jaxcomm
from jax import lax

@jaxcomm.data_parallel
def step(params, x):
    loss = lambda p: jnp.mean((x @ p["w"] + p["b"]) ** 2)
    value, grads = jax.value_and_grad(loss)(params)
    return lax.pmean((grads, value), "batch")

step({"w": jnp.ones((200, 300)), "b": jnp.ones(300)}, jnp.ones((4, 200)))
text = step.schedule.explain() + step.schedule.to_json()
Path(sys.argv[1] + str(jaxcomm.rank())).write_text(text)
"""


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ten_lines_equal_numpy(job: Launch, ranks: int) -> None:
    done = job(ranks, TEN_LINES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("agrees with NumPy") == ranks


def plain_mpiexec(
    tmp_path: Path, text: str, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a piece of Python text on two ranks without our launcher."""
    from jaxcomm.launch.run import Job, environment, find_mpiexec

    script = tmp_path / "script.py"
    script.write_text(text)
    return subprocess.run(
        [find_mpiexec().path, "-n", "2", sys.executable, str(script)],
        env={**os.environ, **environment(Job(2, ())), **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_plain_mpiexec_works_without_the_launcher(tmp_path: Path) -> None:
    done = plain_mpiexec(tmp_path, TEN_LINES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("agrees with NumPy over 2") == 2


STUCK = """
import time, jax.numpy as jnp, jaxcomm
comm = jaxcomm.init()
jaxcomm.all_reduce(jnp.ones(3)).block_until_ready()
if comm.rank == 1:
    time.sleep(1000)
jaxcomm.all_reduce(jnp.ones(3)).block_until_ready()
"""


def test_the_watchdog_looks_after_plain_mpiexec_too(tmp_path: Path) -> None:
    done = plain_mpiexec(tmp_path, STUCK, JAXCOMM_ABORT_AFTER="2")
    assert done.returncode == 70, done.stderr
    assert "not arrived: rank 1 (host " in done.stderr
    assert "time.sleep(1000)" in done.stderr


def test_schedule_is_equal_on_all_ranks_and_runs(job: Launch, tmp_path) -> None:
    texts = set()
    for run in ("first", "second"):
        done = job(2, PRINTS_ITS_SCHEDULE, str(tmp_path / run))
        assert done.returncode == 0, done.stderr
        texts |= {(tmp_path / f"{run}{rank}").read_text() for rank in range(2)}
    assert len(texts) == 1
    assert "[0]['w']" in texts.pop()


def test_a_mismatch_ends_the_job_and_names_the_leaf(job: Launch) -> None:
    done = job(2, MISMATCH, timeout=100)
    assert done.returncode not in (0, 124)
    assert "ScheduleMismatchError" in done.stderr
    assert "['kernel'] float32[3] against ['kernel'] float32[4]" in done.stderr


@pytest.mark.parametrize("ranks", [2, 4])
def test_an_exception_on_one_rank_ends_the_others(job: Launch, ranks: int) -> None:
    done = job(ranks, RAISES, timeout=100)
    assert done.returncode == 1
    assert f"rank {ranks - 1} of {ranks} failed" in done.stderr
    assert done.stderr.count("Traceback") == 1
    assert "runpy" not in done.stderr


def test_a_failure_shows_the_lines_of_the_user(job: Launch) -> None:
    """Neither JAX's note nor frames that merely call the user's come before them."""
    done = job(1, RAISES_INSIDE_A_STEP)
    assert done.returncode == 1
    head, *lines = done.stderr.splitlines()
    assert head.endswith(
        "failed (host " + os.uname().nodename + "): ValueError: of mine"
    )
    files = [line for line in lines if line.startswith("  File ")]
    assert [line.rpartition(" ")[2] for line in files] == ["<module>", "epoch", "step"]
    whole = job(1, RAISES_INSIDE_A_STEP, env={"JAX_TRACEBACK_FILTERING": "off"})
    assert "data_parallel.py" in whole.stderr
    # What jaxcomm did not mean to raise is shown whole.
    assert "reductions.py" in job(1, OF_JAXCOMM).stderr


def test_an_exception_ends_the_job_under_plain_mpiexec(tmp_path: Path) -> None:
    done = plain_mpiexec(tmp_path, RAISES)
    assert done.returncode != 0
    assert "rank 1 of 2 failed" in done.stderr
    assert done.stderr.count("Traceback") == 1


def test_import_and_use_without_mpi(tmp_path) -> None:
    text = (
        "import sys; sys.modules['mpi4py'] = None\n"
        "import jax.numpy as jnp, jaxcomm\n"
        "assert jaxcomm.init().transport == 'local' and jaxcomm.size() == 1\n"
        "assert float(jaxcomm.all_reduce(jnp.float32(3))) == 3\n"
        "try:\n"
        "    jaxcomm.init('mpi')\n"
        "except jaxcomm.errors.InvalidOptionError as error:\n"
        "    print(error)\n"
    )
    done = _python(text)
    assert done.returncode == 0, done.stderr
    assert "call init once" in done.stdout


@pytest.mark.parametrize("launcher", [{"OMPI_COMM_WORLD_SIZE": "2"}, {"PMI_SIZE": "2"}])
def test_several_ranks_without_mpi_never_train_apart(launcher: dict[str, str]) -> None:
    text = "import sys; sys.modules['mpi4py'] = None\nimport jaxcomm; jaxcomm.init()"
    done = _python(text, **launcher)
    assert done.returncode != 0
    assert "one of 2 ranks) needs mpi4py" in done.stderr
    assert "pip install 'jaxcomm[mpi]'" in done.stderr


def test_a_launcher_of_another_mpi_is_noticed() -> None:
    # The environment speaks of two ranks, MPI of one: mpiexec and libmpi differ.
    done = _python("import jaxcomm; jaxcomm.init()", PMI_SIZE="2")
    assert done.returncode != 0
    assert "alone in its MPI world" in done.stderr


def test_a_low_thread_level_is_refused() -> None:
    text = (
        "import mpi4py; mpi4py.rc.thread_level = 'funneled'\n"
        "import jaxcomm; jaxcomm.init('mpi')"
    )
    done = _python(text)
    assert "MPI_THREAD_SERIALIZED" in done.stderr


def _python(text: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", text],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


AGAIN = """
import jaxcomm, os
from jaxcomm.errors import InvalidOptionError
given = {
    "transport": "mpi",
    "timeout": 30,
    # Rank 0's holds for all; it is rounded.
    "staging_bytes": 10_000 + 10_000 * int(os.environ["OMPI_COMM_WORLD_RANK"]),
    "warn_after": 20,
    "abort_after": 40.0,
}
comm = jaxcomm.init(**given)
in_force = {**given, "staging_bytes": comm.staging_bytes}
for again in ({}, given, in_force, *({k: v} for k, v in given.items())):
    assert jaxcomm.init(**again) is comm
assert jaxcomm.init("auto") is comm and comm.staging_bytes == 10_000
other = {
    "transport": "local",
    "timeout": 31,
    "staging_bytes": 8192,
    "warn_after": 21,
    "abort_after": 0,
}
for name, value in other.items():
    try:
        jaxcomm.init(**{**given, name: value})
    except InvalidOptionError as error:
        assert f"init({name}={value!r})" in str(error), error
        assert f"already uses {in_force[name]!r}" in str(error), error
    else:
        raise AssertionError(name)
print("the same")
"""


def test_init_again_takes_the_same_and_nothing_else(job: Launch) -> None:
    done = job(2, AGAIN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same") == 2


FIRST_USE = """
import jaxcomm
assert jaxcomm.size() == 1
jaxcomm.init("local", warn_after=60, abort_after=600, timeout=600)
try:
    jaxcomm.init(abort_after=3)
except jaxcomm.errors.InvalidOptionError as error:
    assert "init(abort_after=3), but this process already uses 600.0" in str(error)
    print("refused")
"""


def test_init_after_the_first_use_is_not_ignored() -> None:
    done = _python(FIRST_USE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "refused\n"
