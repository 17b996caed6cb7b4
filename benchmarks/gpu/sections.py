"""The sections of a call: what each runs, with what, and where it can run."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import jobs
from jaxcomm.launch import devices
from jaxcomm.launch import run as launcher

# Of the sections, which run in a temporary folder; tests/conformance.py is one of them.
PATHS = (jobs.ROOT,)
# nccl.h 2.30: src/init.cc, NCCL_MULTI_RANK_GPU_ENABLE.
SHARED_GPU = (2, 30)
MPS = "nvidia-cuda-mps-control"
LEFT = 3  # exit code of a rank that leaves
NO_GRAPHS = "--xla_gpu_enable_command_buffer="
ANY_GRAPH = "--xla_gpu_graph_min_graph_size=1"
# XLA launches no graphs while its profiler looks, unless told to.
SHOW_GRAPHS = "--xla_enable_command_buffers_during_profiling=true"
GRAPHS_VARIABLE = "JAXCOMM_NCCL_GRAPHS"
GRAPHS = ((GRAPHS_VARIABLE, "1"),)


@dataclasses.dataclass(frozen=True)
class Machine:
    """What there is to run on.

    Attributes:
      dry: no GPU is used.
      transport: for `jaxcomm.init`.
      launch: how two ranks find each other, "mpi" or "distributed" (jax.distributed).
      devices: the GPUs, by the names CUDA_VISIBLE_DEVICES takes.
      nccl: path and version of NCCL, or None.
      mpi: whether mpiexec and mpi4py are usable.
    """

    dry: bool
    transport: str
    launch: str
    devices: list[str]
    nccl: dict[str, Any] | None
    mpi: bool


@dataclasses.dataclass(frozen=True)
class Section:
    """One run of worker.py.

    Attributes:
      name: unique.
      work: a function of worker.py's.
      ranks: 1 or 2.
      seconds: its time limit.
      correctness: whether its failure fails the whole.
      flags: for XLA_FLAGS, on a GPU.
      env: further variables.
      ends: the last rank leaves, and the others must end by themselves, with an error.
      launch: insists on a way of launching.
      gpu_only: there is nothing to try without a GPU.
      shared: there is nothing to try unless two ranks share a GPU.
      times: what it measures wants the machine for itself.
      call: in which of the two it runs.
      mps: ranks that share a GPU run at once, by NVIDIA's MPS, and not in turn.
    """

    name: str
    work: str
    ranks: int = 1
    seconds: float = 60
    correctness: bool = False
    flags: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    ends: bool = False
    launch: str = ""
    gpu_only: bool = False
    shared: bool = False
    times: bool = False
    call: int = 1
    mps: bool = False


def _leave(when: str) -> Section:
    return Section(
        f"leave {when}",
        "leave",
        ranks=2,
        seconds=80,
        correctness=True,
        env=(("BENCH_WHEN", when),),
        ends=True,
    )


def _graph(ranks: int, name: str, *flags: str, ours: bool = False) -> Section:
    """A step, with `ours` with jaxcomm's calls in CUDA graphs too."""
    flags = (SHOW_GRAPHS, *flags)
    env = GRAPHS if ours else ()
    return Section(
        f"graph{ranks} {name}", "graph", ranks, correctness=True, flags=flags, env=env
    )


def _timed(
    name: str, work: str, ranks: int, seconds: float, call: int = 1, **options: Any
) -> Section:
    return Section(name, work, ranks, seconds, times=True, call=call, **options)


def _step(network: str, seconds: float, call: int = 1) -> Section:
    """A training step, on one rank."""
    env = (("BENCH_NETWORK", network),)
    return _timed(f"step1 {network}", "steps", 1, seconds, call, env=env)


# The most telling first: time may run out.
SECTIONS = (
    Section("exact1", "exact", 1, 110, correctness=True),
    Section("exact2", "exact", 2, 110, correctness=True),
    _timed("time1", "times", 1, 45),
    _timed("time2", "times", 2, 60),
    _step("resnet50", 100),
    _step("stemdl", 80),
    Section("mismatch", "mismatch", 2, 45, correctness=True),
    _graph(1, "default"),
    _graph(1, "ours too", ANY_GRAPH, ours=True),
    _graph(2, "ours too", ANY_GRAPH, ours=True),
    _timed("memory1", "memory", 1, 45, correctness=True),
    _leave("before"),
    _leave("after"),
    Section("refused", "refused", 2, 45, correctness=True, gpu_only=True, shared=True),
    _graph(1, "off", NO_GRAPHS),
    _graph(2, "default"),
    # The second call.
    _timed("time2 mps", "times", 2, 60, call=2, mps=True),
    _timed("overlap2", "overlap", 2, 45, call=2, flags=(NO_GRAPHS,), mps=True),
    _timed("overlap2 graphs", "overlap", 2, 45, call=2, env=GRAPHS, mps=True),
    _timed("graphtime2", "times", 2, 60, call=2, env=GRAPHS, mps=True),
    Section("conformance1", "conform", 1, 100, correctness=True, call=2),
    Section("conformance2", "conform", 2, 150, correctness=True, call=2),
    Section("cores", "cores", 1, 180, times=True, call=2),
    _step("resnet50 bfloat16", 100, call=2),
    _timed("graphtime1", "times", 1, 45, call=2, env=GRAPHS),
    Section("mpi2", "exact", 2, 80, True, launch="mpi", gpu_only=True, call=2),
    _timed("memory2", "memory", 2, 60, call=2, correctness=True),
)


def chosen(names: str, call: int = 1) -> list[Section]:
    """Sections by name, or first word of it, separated by commas; "" for a call's."""
    wanted = names.split(",")
    return [
        section
        for section in SECTIONS
        if (not names and section.call == call)
        or section.name in wanted
        or section.name.split()[0] in wanted
    ]


def unfit(section: Section, machine: Machine) -> str:
    """Say why a section cannot run here; "" if it can."""
    if machine.dry and section.gpu_only:
        return "needs a GPU"
    if section.work == "cores" and not machine.mpi:
        return "no mpiexec, or mpi4py finds no MPI"
    if section.work == "conform" and machine.transport != "nccl":
        return "`make test` runs it over MPI"
    by_mpi = section.ranks > 1 and (section.launch or machine.launch) == "mpi"
    if by_mpi and not machine.mpi:
        return "no mpiexec, or mpi4py finds no MPI"
    if section.mps and not machine.dry and shutil.which(MPS) is None:
        return f"no {MPS}"
    if section.shared and not _shared(machine):
        return "there is a GPU for each rank"
    if section.ranks > 1 and _shared(machine):
        text = machine.nccl["version"] if machine.nccl else "0.0"
        if tuple(int(part) for part in text.split(".")[:2]) < SHARED_GPU:
            return f"one GPU, and NCCL {text} takes one rank per GPU (2.30 takes more)"
    return ""


def _shared(machine: Machine) -> bool:
    return len(machine.devices) == 1


def commands(
    section: Section, machine: Machine, out: Path
) -> list[tuple[list[str], dict[str, str]]]:
    """The processes to start: each one's command line and environment."""
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, PATHS), *inherited]),
        # Plans must not depend on what was tuned on this machine.
        "JAXCOMM_PROFILE": "off",
        "BENCH_TRANSPORT": machine.transport,
        "BENCH_SMALL": str(int(machine.dry)),
        "BENCH_DUMP": str(out.parent / "dump"),
        GRAPHS_VARIABLE: "0",
        **dict(section.env),
    }
    if section.work == "cores":
        command = [sys.executable, "-m", "benchmarks.many_cores", str(out)]
        environ["JAX_PLATFORMS"] = "cpu"
        return [([*command, *(["--quick"] if machine.dry else [])], environ)]
    flags = [os.environ.get("XLA_FLAGS", "")]
    if machine.dry:
        environ["JAX_PLATFORMS"] = "cpu"
    else:
        flags += section.flags
        environ.setdefault("NCCL_DEBUG", "WARN")
    environ["XLA_FLAGS"] = " ".join(filter(None, flags))
    command = ["-m", "benchmarks.gpu.worker", section.work, str(out)]
    launch = section.launch or machine.launch
    if section.ranks == 1:
        return [([sys.executable, *command], environ | _device(0, section, machine))]
    if _shared(machine):
        _let_share(section, environ)
    if launch == "mpi":
        job = launcher.Job(section.ranks, tuple(command))
        return [(launcher.command_line(job), environ | launcher.environment(job))]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environ["BENCH_COORDINATOR"] = f"127.0.0.1:{port}"
    environ["BENCH_RANKS"] = str(section.ranks)
    return [
        (
            [sys.executable, *command],
            environ | {"BENCH_RANK": str(rank)} | _device(rank, section, machine),
        )
        for rank in range(section.ranks)
    ]


def _device(rank: int, section: Section, machine: Machine) -> dict[str, str]:
    """What `jaxcomm run` would show a rank."""
    mine = devices.own(rank, machine.devices)
    if mine is None:
        return {}
    found = {devices.VISIBLE_VARIABLE: mine, devices.ORDINALS_VARIABLE: "0"}
    together = devices.sharers(rank, section.ranks, machine.devices)
    if not any(name in os.environ for name in devices.MEMORY_VARIABLES):
        # What times nothing runs beside another section.
        share = (0.7 if section.times else 0.3) / together
        found[devices.MEMORY_VARIABLE] = f"{share:.2f}"
    return found


def _let_share(section: Section, environ: dict[str, str]) -> None:
    """Let two ranks have one GPU, or make sure that nothing lets them."""
    if section.shared:
        environ.pop("NCCL_MULTI_RANK_GPU_ENABLE", None)
        return
    environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    environ.setdefault("NCCL_MAX_CTAS", "8")
