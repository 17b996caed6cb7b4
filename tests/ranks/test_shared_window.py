"""Memory that ranks share: nothing else is touched, and all ranks decide alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxcomm.launch.run import Job, environment, find_mpiexec
from tests.jobs import Launch

# What follows init, and the right answers where ranks share memory or do not.
USES = """
import jax.numpy as jnp, numpy as np, jaxcomm
comm = jaxcomm.init("mpi", abort_after=30)
part = comm.subgroup(range(comm.size)[::-1])
shared = comm.all_gather_object((comm.shared_memory, part.shared_memory))
for on in (comm, part):
    got = jaxcomm.all_reduce(jnp.arange(3000.0) + comm.rank, op="sum", comm=on)
    np.testing.assert_array_equal(got, comm.size * np.arange(3000.0) + 1)
    assert (on.counters()["segments"] > 0) == on.shared_memory
assert len(set(shared)) == 1, shared
print("shared", *shared[0], flush=True)
"""

FAILS = """
import errno, mmap, os, sys, types
from mpi4py import MPI
import jaxcomm
from jaxcomm import native
from jaxcomm.transports import shared_window

if sys.argv[1] == "sched_getaffinity":  # others ask for it too
    os = shared_window.os = types.SimpleNamespace(**vars(os))

def fails(error):
    def call(*_, **__):
        raise error
    return call

KINDS = {
    "memfd_create": (os, OSError(errno.EMFILE, "Too many open files")),
    "sched_getaffinity": (os, ValueError("no such thing")),
    "posix_fallocate": (os, OSError(errno.ENOSPC, "No space left on device")),
    "pread": (os, MemoryError()),
    "stat": (os, PermissionError(errno.EACCES, "Permission denied")),
    "mmap": (mmap, RuntimeError("cannot map")),
    "share_memory": (native, MemoryError()),
}
what, rank = sys.argv[1], int(sys.argv[2])
if MPI.COMM_WORLD.rank == rank:
    module, error = KINDS[what]
    original = getattr(module, what)

    def call(*arguments, **options):
        own = what == "share_memory" and not arguments[1]  # leaves them again
        path = str(arguments[0]) if arguments else ""
        if own or (what == "stat" and "/fd/" not in path):
            return original(*arguments, **options)
        raise error

    setattr(module, what, call)
"""


@pytest.mark.parametrize(
    ("what", "rank"),
    [
        ("memfd_create", 0),
        pytest.param("sched_getaffinity", 1, marks=pytest.mark.thorough),
        pytest.param("posix_fallocate", 0, marks=pytest.mark.thorough),
        ("posix_fallocate", 1),
        ("pread", 1),
        pytest.param("stat", 1, marks=pytest.mark.thorough),
        pytest.param("mmap", 0, marks=pytest.mark.thorough),
        ("mmap", 1),
        pytest.param("share_memory", 0, marks=pytest.mark.thorough),
        ("share_memory", 1),
    ],
)
def test_a_failure_on_one_rank_is_the_same_for_all(
    job: Launch, what: str, rank: int
) -> None:
    done = job(2, FAILS + USES, what, str(rank))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("shared False") == 2


def test_ranks_share_memory_where_nothing_fails(job: Launch) -> None:
    done = job(2, USES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("shared True True") == 2


def test_subgroups_share_no_memory_either_where_it_is_off(job: Launch) -> None:
    done = job(2, USES, env={"JAXCOMM_SHARED_MEMORY": "off"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("shared False False") == 2


# Rank 0 speaks of a file that is another one for rank 1, as in two PID namespaces.
VICTIM = """
import os, sys
from mpi4py import MPI
from jaxcomm.transports import shared_window
world = MPI.COMM_WORLD
NUMBER = 500
pids = world.allgather(os.getpid())
if world.rank == 1:
    os.dup2(os.open(sys.argv[1], os.O_RDWR), NUMBER)
else:
    create = os.memfd_create
    def memfd_create(name):
        file = create(name)
        os.dup2(file, NUMBER)
        return NUMBER
    os.memfd_create = memfd_create
    os.getpid = lambda: pids[1]
if sys.argv[2] == "alike":  # as if the kernels had numbered both alike
    shared_window._identity = lambda status: 0
"""


@pytest.mark.parametrize("kind", ["another", "alike"])
def test_another_file_is_left_as_it_is(job: Launch, tmp_path: Path, kind: str) -> None:
    victim = tmp_path / "victim"
    content = os.urandom(1 << 20) * 8  # larger than all windows
    victim.write_bytes(content)
    done = job(2, VICTIM + USES, str(victim), kind)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("shared False") == 2
    assert victim.read_bytes() == content


NAMESPACE = """
import os, sys
assert os.getpid() == 1, os.getpid()
first = os.environ["OMPI_COMM_WORLD_RANK"] == "0"
files = [os.open(sys.argv[1], os.O_RDWR) for _ in range(600 if first else 700)]
"""


def test_ranks_in_pid_namespaces_of_their_own(tmp_path: Path) -> None:
    apart = ["unshare", "--pid", "--fork", "--mount-proc"]
    if find_mpiexec().vendor != "Open MPI":
        pytest.skip("for Open MPI")
    try:
        subprocess.run([*apart, "true"], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs root and unshare: {error}")
    script, victim = tmp_path / "script.py", tmp_path / "victim"
    script.write_text(NAMESPACE + USES)
    content = os.urandom(1 << 20) * 8
    victim.write_bytes(content)
    mpiexec = [find_mpiexec().path, "-n", "2", "--bind-to", "none"]
    done = subprocess.run(
        [*mpiexec, *apart, sys.executable, str(script), str(victim)],
        # Open MPI's own shared memory does not work there.
        env={**os.environ, **environment(Job(2, ())), "OMPI_MCA_btl": "self,tcp"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert victim.read_bytes() == content
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("shared False False") == 2
