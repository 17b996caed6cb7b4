"""Hosts and counts from the variables that batch systems set.

Slurm's own are used for real in tests/slurm.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from jaxcomm.launch import run
from jaxcomm.launch.allocation import Allocation, find
from jaxcomm.launch.run import Job, LaunchError
from tests.jobs import Launch

VARIABLES = ("SLURM_", "SLURMD_", "PBS_", "LSB_")


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests may run in somebody's batch job."""
    for name in os.environ:
        if name.startswith(VARIABLES):
            monkeypatch.delenv(name)


def slurm(nodes: str, tasks: str, **more: str) -> dict[str, str]:
    names = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": nodes}
    return {**names, "SLURM_TASKS_PER_NODE": tasks, **more}


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("n1", ("n1",)),
        ("n1,m2", ("n1", "m2")),
        ("n[1-3]", ("n1", "n2", "n3")),
        ("n[08-10,12],login", ("n08", "n09", "n10", "n12", "login")),
        ("a-[1-2].x,b[7]", ("a-1.x", "a-2.x", "b7")),
        ("r[1-2]n[01-02]", ("r1n01", "r1n02", "r2n01", "r2n02")),
    ],
)
def test_slurm_lists_of_hosts(nodes: str, hosts: tuple[str, ...]) -> None:
    found = find(slurm(nodes, f"1(x{len(hosts)})"))
    assert found == Allocation("Slurm", hosts, (1,) * len(hosts), counted=False)


def test_slurm_counts_and_cores() -> None:
    given = slurm("n[1-4]", "2(x3),1", SLURM_NTASKS="7")
    found = find(given | {"SLURM_JOB_CPUS_PER_NODE": "8(x3),5"})
    assert found is not None and found.ranks == 7
    assert found == Allocation("Slurm", ("n1", "n2", "n3", "n4"), (2, 2, 2, 1), 4)
    found = find(given | {"SLURM_CPUS_PER_TASK": "3"})
    assert found is not None and found.cores == 3
    with pytest.raises(ValueError, match="names 2 hosts, and SLURM_TASKS_PER_NODE"):
        find(slurm("n[1-2]", "2(x3)"))


def test_pbs_and_lsf(tmp_path: Path) -> None:
    nodes = tmp_path / "nodes"
    nodes.write_text("n2.x\nn2.x\nn1.x\n")
    assert find({"PBS_NODEFILE": str(nodes)}) == Allocation(
        "PBS", ("n2.x", "n1.x"), (2, 1)
    )
    lsf = Allocation("LSF", ("n2", "n1"), (2, 1))
    assert find({"LSB_HOSTS": "n2 n2 n1"}) == lsf
    assert find({"LSB_MCPU_HOSTS": "n2 2 n1 1"}) == lsf
    assert lsf.host_list() == "n2:2,n1:1"


def test_outside_of_a_batch_job() -> None:
    assert find({}) is None
    # Some sites set this one for every login.
    assert find({"SLURM_CLUSTER_NAME": "x", "LSB_HOSTS": ""}) is None


def test_a_list_that_cannot_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PBS_NODEFILE", str(tmp_path / "gone"))
    with pytest.raises(LaunchError, match=r"gone.*by --host or --hostfile"):
        run.default_ranks(Job(1, ("x.py",)))
    assert run.allocated(Job(1, ("x.py",), hosts="n1")) is None


def test_slurm_decides_where_it_was_told_how_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = {"SLURM_NTASKS": "4", "SLURM_CPUS_PER_TASK": "3"}
    for name, value in slurm("n[1-2]", "2(x2)", **counts).items():
        monkeypatch.setenv(name, value)
    job = Job(1, ("x.py",))
    assert run.default_ranks(job) == (4, "on 2 hosts, as Slurm says")
    assert run.environment(Job(4, ("x.py",)))["OMP_NUM_THREADS"] == "3"
    # mpiexec finds the hosts itself; one rank too is for a node, not for where we are.
    assert "--host" not in run.command_line(Job(4, ("x.py",)))
    assert run.started_by_mpiexec(job)
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    assert not run.started_by_mpiexec(job)
    # More than Slurm counted share what there is.
    assert "--oversubscribe" in run.command_line(Job(5, ("x.py",)))
    with pytest.raises(LaunchError, match="5 ranks on 4 slots of the Slurm job"):
        run.command_line(Job(5, ("x.py",), oversubscribe=False))
    # On one host, and not told how many, it says 1: as many as suit the host.
    for name, value in slurm("n1", "1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_NTASKS")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    cores = len(os.sched_getaffinity(0))
    assert run.default_ranks(job) == (cores, "one for each core")
    assert run.capacity(job) == (cores, "cores")
    assert "--oversubscribe" in run.command_line(Job(2, ("x.py",)))


def test_hosts_of_lsf_are_handed_to_mpiexec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSB_JOBID", "7")
    monkeypatch.setenv("LSB_MCPU_HOSTS", "n2 2 n1 1")
    assert run.default_ranks(Job(1, ("x.py",))) == (3, "on 2 hosts, as LSF says")
    line = run.command_line(Job(3, ("x.py",)))
    assert line[line.index("--host") + 1] == "n2:2,n1:1"
    assert "-x" in line


@pytest.mark.parametrize("scheduler", ["PBS", "LSF"])
def test_ranks_start_where_pbs_and_lsf_say(
    job: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str
) -> None:
    host = socket.gethostname()
    if scheduler == "PBS":
        (tmp_path / "nodes").write_text(f"{host}\n" * 3)
        monkeypatch.setenv("PBS_NODEFILE", str(tmp_path / "nodes"))
        monkeypatch.setenv("PBS_JOBID", "7")
    else:
        monkeypatch.setenv("LSB_MCPU_HOSTS", f"{host} 3")
        monkeypatch.setenv("LSB_JOBID", "7")
    text = "from mpi4py import MPI; print('ranks:', MPI.COMM_WORLD.size)"
    done = job(None, text)
    assert done.returncode == 0, done.stderr
    assert f"jaxcomm: 3 ranks, on 1 host, as {scheduler} says (-n)" in done.stderr
    assert done.stdout.count("ranks: 3") == 3
