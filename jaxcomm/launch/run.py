"""What `jaxcomm run` starts: N ranks of a script under the mpiexec that fits."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from jaxcomm.launch import allocation, devices
from jaxcomm.launch.allocation import Allocation
from jaxcomm.launch.worker import THREADS_VARIABLE

MPIEXEC_VARIABLE = "JAXCOMM_MPIEXEC"
RESTART_VARIABLE = "JAXCOMM_RESTART"

# Large XLA:CPU buffers come from malloc; above these thresholds glibc would map them
# afresh, and fault their pages in, on every step. XLA allocates on several threads, and
# a thread's own arena takes nothing above 64 MiB, whatever the threshold.
# Huge pages halve the cost of walking through gradients, where the kernel gives them.
MALLOC = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 31),
    "MALLOC_TOP_PAD_": str(64 << 20),
}

# Of a job that stays on this host: nothing goes through a network.
_ONE_HOST = {"OMPI_MCA_btl": "self,sm", "OMPI_MCA_pml": "ob1"}
# With any of these the user says how ranks are connected, or where they run.
_CONNECTIONS = (
    "OMPI_MCA_btl",
    "OMPI_MCA_pml",
    "OMPI_MCA_mtl",
    "PRTE_MCA_oob",
    "PRTE_MCA_if",
    "PRTE_MCA_prte_if",
    "PRTE_MCA_prte_default_hostfile",
    "PRTE_MCA_ras",
)
# Where a batch system has given us nodes, mpiexec starts ranks on all of them.
_ALLOCATIONS = (
    "SLURM_JOB_ID",
    "SLURM_JOBID",
    "PBS_JOBID",
    "LSB_JOBID",
    "PE_HOSTFILE",
    "COBALT_JOBID",
    "FLUX_JOB_ID",
)


class LaunchError(Exception):
    """The job cannot be started; the text says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Mpiexec:
    """An mpiexec program.

    Attributes:
      path: where it is.
      vendor: "Open MPI", "MPICH" (and what derives from it: Hydra) or "unknown".
      version: the first line of what it says of itself.
    """

    path: str
    vendor: str
    version: str


@dataclasses.dataclass(frozen=True)
class Job:
    """What to start, and how.

    Attributes:
      ranks: number of processes.
      command: the script and its arguments, or "-m", module, arguments.
      threads: XLA threads per rank; None shares the cores out.
      output: "merge", "prefix" (each line starts with its rank).
      oversubscribe: whether more ranks than cores are accepted.
      pin: whether each rank is kept to its share of cores.
      bind_gpu: whether each rank sees one GPU of its host, by local rank.
      hosts: comma-separated hosts, handed to mpiexec.
      hostfile: handed to mpiexec.
      timeout: seconds until the job is ended, all attempts together; None for never.
      grace: seconds that the ranks have to end by themselves once asked to.
      max_restarts: how often the job is started again after it failed.
      attempt: how often it has been; the ranks read it in JAXCOMM_RESTART.
      verbose: whether what mpiexec says of a failure is shown.
    """

    ranks: int
    command: tuple[str, ...]
    threads: int | None = None
    output: str = "merge"
    oversubscribe: bool = True
    pin: bool = True
    bind_gpu: bool = True
    hosts: str | None = None
    hostfile: str | None = None
    timeout: float | None = None
    grace: float = 30.0
    max_restarts: int = 0
    attempt: int = 0
    verbose: bool = False


def find_mpiexec() -> Mpiexec:
    """Return the mpiexec that belongs to the MPI mpi4py loads.

    A wheel of Open MPI or MPICH puts it beside the interpreter, and mpi4py then loads
    that wheel's library; else the PATH decides, as it does for a cluster's module.

    Raises:
      LaunchError: there is none; says how to get one.
    """
    chosen = os.environ.get(MPIEXEC_VARIABLE)
    beside = Path(sysconfig.get_path("scripts")) / "mpiexec"
    path = chosen or (str(beside) if beside.exists() else shutil.which("mpiexec"))
    if path is None or not os.access(path, os.X_OK):
        raise LaunchError(
            (f"{MPIEXEC_VARIABLE}={chosen} is not an executable. " if chosen else "")
            + "No mpiexec was found beside Python or on the PATH. Install one with "
            "`pip install 'jaxcomm[mpi]'`, or load your cluster's MPI module; under "
            "Slurm, `srun python script.py` needs none."
        )
    return _identify(path)


@functools.cache
def _identify(path: str) -> Mpiexec:
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=30, check=False
        )
        text = done.stdout + done.stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"{path} --version failed: {error}") from error
    if "Open MPI" in text or "prte" in text.lower():
        vendor = "Open MPI"
    elif "HYDRA" in text.upper() or "Intel(R) MPI" in text:
        vendor = "MPICH"
    else:
        vendor = "unknown"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return Mpiexec(path, vendor, lines[0] if lines else "")


def on_this_host(job: Job) -> bool:
    """Tell whether all ranks are sure to run here, and the user leaves it to us how."""
    return not (
        job.hosts
        or job.hostfile
        or any(name in os.environ for name in _ALLOCATIONS)
        or any(name.startswith(_CONNECTIONS) for name in os.environ)
    )


def allocated(job: Job) -> Allocation | None:
    """Return the hosts that a batch system has given, unless the user names others.

    Raises:
      LaunchError: what the batch system says cannot be understood.
    """
    if job.hosts or job.hostfile:
        return None
    try:
        return allocation.find()
    except (OSError, ValueError) as error:
        raise LaunchError(
            f"the hosts that the batch system gave cannot be read: {error}. Name them "
            "by --host or --hostfile"
        ) from error


def environment(job: Job) -> dict[str, str]:
    """Return the variables that the ranks get on top of the caller's own."""
    threads = job.threads or _cores_of_a_rank(job)
    added = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", **MALLOC}
    added["OMP_NUM_THREADS"] = str(threads)
    if job.pin and not (job.hosts or job.hostfile):
        added[THREADS_VARIABLE] = str(threads)
    if on_this_host(job):
        added |= _ONE_HOST
    if not job.bind_gpu:
        added[devices.BINDING_VARIABLE] = "off"
    if os.geteuid() == 0:
        # Open MPI refuses root without both; containers often have no one else.
        added["OMPI_ALLOW_RUN_AS_ROOT"] = "1"
        added["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
    mine = {name: value for name, value in added.items() if name not in os.environ}
    return mine | {RESTART_VARIABLE: str(job.attempt)}


def _cores_of_a_rank(job: Job) -> int:
    given = allocated(job)
    if given is not None and given.cores and job.ranks == given.ranks:
        return given.cores
    together = -(-job.ranks // len(given.hosts)) if given else job.ranks
    return max(1, len(os.sched_getaffinity(0)) // together)


def started_by_mpiexec(job: Job) -> bool:
    """Tell whether a job needs MPI, as all do but those of one rank on this host."""
    given = allocated(job)
    # salloc leaves the user where he was; Slurm names the node that a process is on.
    elsewhere = (
        given is not None
        and given.scheduler == "Slurm"
        and "SLURMD_NODENAME" not in os.environ
    )
    return job.ranks > 1 or bool(job.hosts or job.hostfile) or elsewhere


def default_ranks(job: Job) -> tuple[int, str]:
    """Return how many ranks suit the batch job, or this host, and why so many."""
    given = allocated(job)
    if given is not None and (given.counted or len(given.hosts) > 1):
        hosts = f"{len(given.hosts)} host{'s' if len(given.hosts) > 1 else ''}"
        return given.ranks, f"on {hosts}, as {given.scheduler} says"
    ranks, what = _ranks_here(job.threads)
    return ranks, f"one for each {what}"


def command_line(job: Job) -> list[str]:
    """Return the full command that starts the job.

    Raises:
      LaunchError: no mpiexec, or more ranks than cores where that is refused.
    """
    worker = [sys.executable, "-m", "jaxcomm.launch.worker", *job.command]
    if not started_by_mpiexec(job):
        return worker
    places, of_what = capacity(job)
    local = not (job.hosts or job.hostfile)
    given = allocated(job)
    crowded = local and job.ranks > min(places, given.ranks if given else places)
    if local and job.ranks > places and not job.oversubscribe:
        raise LaunchError(
            f"{job.ranks} ranks on {places} {of_what}, and --no-oversubscribe: ask for "
            f"at most {places} ranks, or leave the option out to let them share cores"
        )
    # What Slurm gave, mpiexec sees itself and starts its daemons there by srun. The
    # wheels' know nothing of LSF, and of PBS not how to start anything.
    hosts = job.hosts
    if given is not None and given.scheduler != "Slurm":
        hosts, local = given.host_list(), len(given.hosts) == 1
    mpiexec = find_mpiexec()
    line = [mpiexec.path, "-n", str(job.ranks)]
    library = _loopback_library()
    if mpiexec.vendor == "Open MPI" and library and on_this_host(job):
        # For mpiexec alone: what the ranks listen on is theirs to say.
        own = os.environ.get("LD_PRELOAD")
        line = ["env", f"LD_PRELOAD={':'.join(filter(None, (library, own)))}", *line]
        worker = [*_with_preloaded(own), *worker]
    if mpiexec.vendor == "Open MPI":
        line += ["--bind-to", "none"] if local else []
        line += ["--oversubscribe"] if crowded else []
        line += ["--output", "tag"] if job.output == "prefix" else []
        line += ["--host", hosts] if hosts else []
        line += ["--hostfile", job.hostfile] if job.hostfile else []
        if not local:
            for name in environment(job):
                line += ["-x", name]
    else:
        line += ["-bind-to", "none"] if local and mpiexec.vendor == "MPICH" else []
        line += ["-l"] if job.output == "prefix" else []
        line += ["-hosts", hosts] if hosts else []
        line += ["-f", job.hostfile] if job.hostfile else []
    return [*line, *worker]


def capacity(job: Job) -> tuple[int, str]:
    """Return how many ranks have a place of their own, and what the places are."""
    given = allocated(job)
    if given is not None and given.counted:
        return given.ranks, f"slots of the {given.scheduler} job"
    return len(os.sched_getaffinity(0)), "cores"


def _ranks_here(threads: int | None = None) -> tuple[int, str]:
    """Return how many ranks suit this host, and what there is one for each of."""
    gpus = len(devices.visible()) if devices.wanted() else 0
    if gpus:
        return gpus, "GPU"
    cores = len(os.sched_getaffinity(0)) // (threads or 1)
    return max(1, cores), "core" if (threads or 1) == 1 else f"{threads} cores"


def _with_preloaded(own: str | None) -> list[str]:
    return ["env", "-u", "LD_PRELOAD"] if own is None else ["env", f"LD_PRELOAD={own}"]


def _loopback_library() -> str:
    """Return the path of mpi/loopback.cc's library; "" in a bare source tree."""
    found = importlib.util.find_spec("jaxcomm.native")  # without JAX
    folders = (found and found.submodule_search_locations) or ()
    paths = [Path(folder) / "libjaxcomm_loopback.so" for folder in folders]
    return next((str(path) for path in paths if path.exists()), "")
