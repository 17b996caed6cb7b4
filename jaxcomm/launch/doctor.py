"""`jaxcomm doctor`: what was found on this machine, and what to do about the rest.

MPI and GPU libraries may hang or end the process that imports them, so every look at
them happens in a process of its own, with a time limit.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.table import Table
from rich.text import Text

from jaxcomm import terminal
from jaxcomm.launch import doctor_gpu
from jaxcomm.launch import run as launcher
from jaxcomm.launch.finding import SECONDS, Finding, look

_OLDEST_JAX = (0, 10, 2)

_LOOK_AT_JAX = """
import json, warnings
warnings.simplefilter("ignore")
import jax, jaxlib
print(json.dumps({"jax": jax.__version__, "jaxlib": jaxlib.__version__,
                  "devices": [f"{d.platform}:{d.device_kind}" for d in jax.devices()]}))
"""
_LOOK_AT_MPI = """
import json, mpi4py
from mpi4py import MPI
levels = {MPI.THREAD_SINGLE: "single", MPI.THREAD_FUNNELED: "funneled",
          MPI.THREAD_SERIALIZED: "serialized", MPI.THREAD_MULTIPLE: "multiple"}
from jaxcomm import native
print(json.dumps({"mpi4py": mpi4py.__version__,
                  "library": MPI.Get_library_version().splitlines()[0].strip(" \\0"),
                  "threads": levels[MPI.Query_thread()],
                  "paths": native.loaded_mpi_libraries()}))
"""
_LOOK_AT_NATIVE = """
import json
from jaxcomm import native
native.load()
print(json.dumps({"path": str(native.library_path()), "kernels": native.kernels()}))
"""
_LOOK_AT_MPI4JAX = """
import json, warnings
warnings.simplefilter("ignore")
import mpi4jax
print(json.dumps({"version": mpi4jax.__version__}))
"""
_TWO_RANKS = """
import sys
import jax.numpy as jnp, jaxcomm
comm = jaxcomm.init("mpi", timeout=30)
total = float(jaxcomm.all_reduce(jnp.float32(comm.rank + 1), op="sum"))
sys.exit(0 if (comm.size, total) == (2, 3.0) else 1)
"""


def main(as_json: bool) -> int:
    """Print the findings; return 0 if several ranks can train here over MPI, else 1."""
    ranks = _two_ranks()
    findings = [
        _python(),
        *_jax(),
        _native(),
        *_mpi(),
        _mpiexec(),
        ranks,
        _mpi4jax(),
        *doctor_gpu.rows(),
        _cores(),
        _malloc(),
        _huge_pages(),
        _slurm(),
    ]
    if as_json:
        rows = [dataclasses.asdict(finding) for finding in findings]
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
    else:
        _print(findings)
    return 0 if ranks.status == "ok" else 1


def _print(findings: list[Finding]) -> None:
    colours = {"ok": "green", "warn": "yellow", "missing": "red"}
    console = terminal.console()
    console.print("jaxcomm doctor", style="italic")
    table = Table()
    for name in ("", "", "found", "what to do"):
        table.add_column(name, overflow="fold")
    for f in findings:
        status = Text(f.status, colours[f.status])
        table.add_row(f.what, status, f.found, f.remedy)
    console.print(table)


def _python() -> Finding:
    version = platform.python_version()
    jaxcomm = importlib.metadata.version("jaxcomm")
    return Finding("Python", "ok", f"{version}; jaxcomm {jaxcomm}")


def _jax() -> list[Finding]:
    seen, error = look(_LOOK_AT_JAX)
    if seen is None:
        return [Finding("JAX", "missing", error, "pip install 'jax>=0.10.2'")]
    version = tuple(int(part) for part in seen["jax"].split(".")[:3])
    new_enough = version >= _OLDEST_JAX
    return [
        Finding(
            "JAX",
            "ok" if new_enough else "missing",
            f"jax {seen['jax']}, jaxlib {seen['jaxlib']}",
            "" if new_enough else "pip install -U 'jax>=0.10.2'",
        ),
        Finding("JAX devices", "ok", ", ".join(seen["devices"])),
    ]


def _native() -> Finding:
    seen, error = look(_LOOK_AT_NATIVE)
    if seen is None:
        return Finding(
            "native library",
            "missing",
            error,
            "install the package (pip install ., or make setup in a checkout)",
        )
    return Finding("native library", "ok", f"{seen['path']} ({seen['kernels']})")


def _mpi() -> list[Finding]:
    remedy = "pip install 'jaxcomm[mpi]', or mpi4py against your cluster's MPI"
    seen, error = look(_LOOK_AT_MPI)
    if seen is None:
        return [Finding("MPI", "missing", error, remedy)]
    enough = seen["threads"] in ("multiple", "serialized")
    return [
        Finding("MPI", "ok", f"{seen['library']}; mpi4py {seen['mpi4py']}"),
        Finding("MPI library", "ok", ", ".join(seen["paths"]) or "(linked statically)"),
        Finding(
            "MPI threads",
            "ok" if enough else "missing",
            f"MPI_THREAD_{seen['threads'].upper()}",
            "" if enough else "leave mpi4py.rc.thread_level at 'multiple'",
        ),
    ]


def _mpiexec() -> Finding:
    try:
        found = launcher.find_mpiexec()
    except launcher.LaunchError as error:
        return Finding("mpiexec", "missing", "none", str(error))
    text = f"{found.path} ({found.vendor}: {found.version})"
    if found.vendor == "unknown":
        remedy = "set JAXCOMM_MPIEXEC to the mpiexec of the library above"
        return Finding("mpiexec", "warn", text, remedy)
    return Finding("mpiexec", "ok", text)


def _two_ranks() -> Finding:
    what = "2 ranks reduce"
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "two_ranks.py"
        script.write_text(_TWO_RANKS)
        line = [sys.executable, "-m", "jaxcomm", "run", "-n", "2"]
        line += ["--timeout", str(SECONDS), str(script)]
        # Over MPI: one GPU may be all there is.
        env = {**os.environ, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            line, env=env, capture_output=True, text=True, check=False
        )
    if done.returncode == 0:
        return Finding(what, "ok", "1 + 2 = 3, through jaxcomm run")
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    # The rank's own error says more than the launcher's report of it.
    errors = [line for line in lines if "Error" in line or "failed" in line]
    shown = (errors or lines or [f"exit code {done.returncode}"])[0]
    remedy = "see the rows above; then `jaxcomm run -n 2 --verbose` on a script"
    return Finding(what, "missing", shown[:300], remedy)


def _mpi4jax() -> Finding:
    seen, error = look(_LOOK_AT_MPI4JAX)
    if seen is None:
        remedy = "only transport='mpi4jax' needs it; build it against the same MPI"
        return Finding("mpi4jax", "warn", error, remedy)
    return Finding("mpi4jax", "ok", seen["version"])


def _cores() -> Finding:
    usable, total = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    text = f"{usable} of {total} usable"
    if usable < total:
        remedy = "this process is bound; more ranks than its cores will share them"
        return Finding("cores", "warn", text, remedy)
    return Finding("cores", "ok", text)


def _malloc() -> Finding:
    names = [name for name in launcher.MALLOC if name in os.environ]
    if names:
        text = ", ".join(f"{name}={os.environ[name]}" for name in names)
        return Finding("malloc", "ok", text)
    remedy = "outside jaxcomm run, export what `jaxcomm run --verbose` prints"
    return Finding("malloc", "ok", "jaxcomm run sets its thresholds", remedy)


def _huge_pages() -> Finding:
    file = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    text = file.read_text().strip() if file.exists() else "unknown to this kernel"
    if "[never]" in text:
        remedy = f"large leaves reduce slower; as root: echo madvise > {file}"
        return Finding("huge pages", "warn", "never", remedy)
    chosen = text.partition("[")[2].partition("]")[0]
    return Finding("huge pages", "ok", chosen or text)


def _slurm() -> Finding:
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return Finding("Slurm", "ok", "not in a job")
    step = "inside a step" if "SLURM_STEP_ID" in os.environ else "in the batch script"
    return Finding("Slurm", "ok", f"job {job}, {step}")
