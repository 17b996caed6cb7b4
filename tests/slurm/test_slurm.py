"""jaxcomm under a real Slurm, on two nodes (cluster.py): make test-slurm."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.jobs import ROOT
from tests.slurm import cluster
from tests.slurm.cluster import Cluster

SECONDS = 300  # for one job; a hundredth of that on an idle machine
TRAINING = ROOT / "tests" / "programs" / "slurm_ranks.py"
MPICH = ROOT / ".venv-mpich" / "bin" / "python"

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(cluster.missing() is not None, reason=cluster.missing() or ""),
]

REDUCES = """
import socket
import jaxcomm
comm = jaxcomm.init()
total = jaxcomm.all_reduce(comm.rank + 1, op="sum")
host, local = socket.gethostname()[-2:], f"{comm.local_rank}/{comm.local_size}"
print(f"rank {comm.rank}/{comm.size} on {host} {local}: {int(total)}", flush=True)
"""
WAITS_FOR_THE_OTHER = """
import os, pathlib, sys, time
me, folder = int(os.environ["SLURM_ARRAY_TASK_ID"]), pathlib.Path(sys.argv[0]).parent
(folder / f"runs{me}").touch()
while not (folder / f"runs{1 - me}").exists():
    time.sleep(0.1)
for _ in range(100):
    assert jaxcomm.all_reduce(1, op="sum") == 2
"""
TWO_AND_TWO = [
    "rank 0/4 on n0 0/2: 10",
    "rank 1/4 on n0 1/2: 10",
    "rank 2/4 on n1 0/2: 10",
    "rank 3/4 on n1 1/2: 10",
]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster.running() as running:
        yield running


@pytest.fixture(autouse=True)
def no_jobs_left(slurm: Cluster) -> Iterator[None]:
    yield
    slurm.run(["scancel", "--user=root"])


@pytest.fixture
def reduces(slurm: Cluster) -> Path:
    script = slurm.folder / "reduces.py"
    script.write_text(REDUCES)
    return script


def ranks(text: str) -> list[str]:
    return sorted(line for line in text.splitlines() if line.startswith("rank "))


def wait_until(slurm: Cluster, true: Callable[[], object], what: str) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, f"no {what}: {slurm.logs()}"
        time.sleep(0.2)


def submit(slurm: Cluster, *line: str | Path, cwd: Path | None = None) -> str:
    done = slurm.run(["sbatch", "--parsable", *line], cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def field(slurm: Cluster, job: str, name: str) -> str:
    """Return what `scontrol show job` says; "" of a job that Slurm has forgotten."""
    found = slurm.run(["scontrol", "show", "job", job]).stdout
    match = re.search(rf"\b{name}=(\S+)", found)
    return match[1] if match else ""


def finish(slurm: Cluster, job: str) -> str:
    """Wait until a job has ended; return how."""
    ended = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", "PREEMPTED")
    wait_until(slurm, lambda: field(slurm, job, "JobState") in ended, f"end of {job}")
    return f"{field(slurm, job, 'JobState')} {field(slurm, job, 'ExitCode')}"


def trains(slurm: Cluster, folder: Path, steps: int, *options: str) -> str:
    """Submit a training on two nodes and wait until it runs; return the job's id."""
    script = slurm.folder / "trains.sh"
    python = f"{sys.executable} {TRAINING} {folder} {steps}"
    script.write_text(f"#!/bin/sh\nexec srun --mpi=pmix -K1 {python}\n")
    job = submit(slurm, "-N2", f"--output={folder}.out", *options, script)
    wait_until(slurm, (folder / "runs").exists, "training")
    return job


def test_srun_under_open_mpi(slurm: Cluster, reduces: Path) -> None:
    line = ["srun", "-N2", "--ntasks-per-node=2", "--mpi=pmix", sys.executable, reduces]
    done = slurm.run(line, SECONDS)
    assert done.returncode == 0, done.stderr
    assert ranks(done.stdout) == TWO_AND_TWO
    assert done.stderr == ""  # nor "Sorry! You were supposed to get help"


def test_ranks_that_srun_left_alone_say_so(slurm: Cluster, reduces: Path) -> None:
    """Open MPI has no PMI-2: each rank would train by itself."""
    line = ["srun", "-N2", "--mpi=pmi2", sys.executable, reduces]
    done = slurm.run(line, SECONDS)
    assert done.returncode != 0
    assert "the launcher started 2 ranks, but each of them is alone" in done.stderr
    assert "`srun --mpi=pmix` for Open MPI" in done.stderr
    assert ranks(done.stdout) == []


def test_srun_under_mpich(slurm: Cluster, reduces: Path) -> None:
    """Not over UCX, whose addresses Slurm 22.05's PMI server takes apart wrongly."""
    if not MPICH.exists():
        pytest.skip("no .venv-mpich: make test-slurm makes it")
    line = ["srun", "-N2", "-K1", "--mpi=pmi2", MPICH, reduces]
    over = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"}
    done = slurm.run(line, SECONDS, env=over)
    assert done.returncode == 0, done.stderr
    assert ranks(done.stdout) == ["rank 0/2 on n0 0/1: 3", "rank 1/2 on n1 0/1: 3"]


def test_jaxcomm_run_under_salloc(slurm: Cluster, reduces: Path) -> None:
    run = [sys.executable, "-m", "jaxcomm", "run", reduces]
    done = slurm.run(["salloc", "-N2", "--ntasks-per-node=2", *run], SECONDS)
    assert done.returncode == 0, done.stderr
    assert "4 ranks, on 2 hosts, as Slurm says (-n)" in done.stderr
    assert ranks(done.stdout) == TWO_AND_TWO


def test_jaxcomm_run_under_sbatch(slurm: Cluster, reduces: Path) -> None:
    out = slurm.folder / "batch.out"
    run = f"{sys.executable} -m jaxcomm run {reduces}"
    layout = ["-N2", "--ntasks-per-node=2", f"--output={out}"]
    job = submit(slurm, *layout, f"--wrap={run}")
    assert finish(slurm, job) == "COMPLETED 0:0", out.read_text()
    assert ranks(out.read_text()) == TWO_AND_TWO


def test_scancel_with_sigterm_saves_and_ends_with_0(slurm: Cluster) -> None:
    folder = slurm.folder / "asked"
    job = trains(slurm, folder, 100_000)
    assert slurm.run(["scancel", "--signal=TERM", job]).returncode == 0
    assert finish(slurm, job) == "COMPLETED 0:0"
    text = Path(f"{folder}.out").read_text()
    assert re.search(r"^steps 0 to \d+ of 100000 on 2, ", text, re.MULTILINE), text
    assert list((folder / "checkpoints").iterdir())


def test_near_its_time_limit_a_job_saves(slurm: Cluster) -> None:
    folder = slurm.folder / "limited"
    job = trains(slurm, folder, 100_000, "--time=60", "--signal=TERM@240")
    ran = int(time.time() - _seconds(field(slurm, job, "StartTime")))
    limit = f"TimeLimit={ran // 60 + 4}"  # minutes
    assert slurm.run(["scontrol", "update", f"JobId={job}", limit]).returncode == 0
    assert finish(slurm, job) == "COMPLETED 0:0"
    text = Path(f"{folder}.out").read_text()
    assert re.search(r"^steps 0 to \d+ of 100000 on 2, ", text, re.MULTILINE), text


def test_the_template_goes_on_after_preemption(slurm: Cluster) -> None:
    folder = slurm.folder / "template"
    folder.mkdir()
    program = TRAINING.read_text().replace("sys.argv[1]", "'run'")
    program = program.replace("sys.argv[2]", "100").replace("len(sys.argv) > 3", "0")
    (folder / "train.py").write_text(program)
    script = (ROOT / "docs" / "slurm.sbatch").read_text()
    (folder / "slurm.sbatch").write_text(script)
    bin_folder = str(Path(sys.executable).parent)
    path = os.pathsep.join([bin_folder, os.environ["PATH"]])
    done = slurm.run(
        ["sbatch", "--parsable", "--exclusive", "slurm.sbatch"],
        cwd=folder,
        env={"PATH": path},
    )
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    wait_until(slurm, (folder / "run" / "runs").exists, "training")
    urgent = ["-p", "urgent", "--exclusive", "-N2", "--output=/dev/null"]
    other = submit(slurm, *urgent, "--wrap=sleep 1")
    assert finish(slurm, other) == "COMPLETED 0:0"
    assert finish(slurm, job) == "COMPLETED 0:0"
    text = (folder / f"train-{job}.out").read_text()
    first, second = re.findall(r"^steps (\d+) to (\d+) of 100 on 4", text, re.MULTILINE)
    assert first[0] == "0" and first[1] == second[0] and second[1] == "100", text
    assert "sums {1000.0}" in text, text
    assert field(slurm, job, "Restarts") == "1"


def test_a_node_that_dies_ends_the_job_with_a_report(slurm: Cluster) -> None:
    folder = slurm.folder / "dies"
    limits = {"JAXCOMM_WARN_AFTER": "2", "JAXCOMM_ABORT_AFTER": "5"}
    exports = ",".join(f"{name}={value}" for name, value in limits.items())
    options = ["--no-requeue", f"--export=ALL,{exports}"]
    job = trains(slurm, folder, 100_000, *options)
    dead = slurm.nodes[1]
    slurm.kill_node(dead)
    try:
        how = finish(slurm, job)
        assert how.split()[0] in ("FAILED", "NODE_FAIL"), how
        text = Path(f"{folder}.out").read_text()
        assert "jaxcomm: no progress for 5 s, so the job ends" in text, text
        assert "no answer from rank 1" in text, text
    finally:
        slurm.start_node(dead)


def test_jobs_of_an_array_side_by_side(slurm: Cluster) -> None:
    folder = slurm.folder / "array"
    folder.mkdir()
    script = folder / "waits.py"
    script.write_text(f"{REDUCES}{WAITS_FOR_THE_OTHER}")
    run = f"srun --mpi=pmix -K1 {sys.executable} {script}"
    layout = ["--array=0-1", "-N2", f"--output={folder}/%a.out"]
    job = submit(slurm, *layout, f"--wrap={run}")
    for number in (0, 1):
        how = finish(slurm, f"{job}_{number}")
        text = (folder / f"{number}.out").read_text()
        assert how == "COMPLETED 0:0", text
        assert ranks(text) == ["rank 0/2 on n0 0/1: 3", "rank 1/2 on n1 0/1: 3"]


def _seconds(text: str) -> float:
    return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
