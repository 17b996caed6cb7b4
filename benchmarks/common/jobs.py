"""Start the benchmark's jobs and collect what their processes wrote."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from jaxcomm.launch import run as launcher

# Not resolved: where a link leads here, its folder is the one that is imported from.
ROOT = Path(__file__).parents[2]
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
PEERS_MPIEXEC = PEERS_PYTHON.with_name("mpiexec")
TIMEOUT = 580
_HOST_DEVICES = "--xla_force_host_platform_device_count"


class JobError(Exception):
    """A job failed; the text holds its output."""


def run_job(work: str, peer: str, ranks: int, *arguments: str) -> list[Any]:
    """Run one job of reduction/worker.py; return what each process wrote.

    Peer "plain" is a job of plain mpiexec, and "plain devices" one of plain Python:
    without the malloc settings that `jaxcomm run` adds. In "apart", ranks share no
    memory, as if each had a host of its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result"
        kind = "devices" if peer == "plain devices" else peer
        command = ["-m", "benchmarks.reduction.worker", str(out), work]
        command += ["--peer", kind, *arguments]
        if peer in ("mpi", "cores", "apart", "mpi4jax"):
            launch = [sys.executable, "-m", "jaxcomm", "run", "-n", str(ranks)]
            launch += ["--timeout", str(TIMEOUT), *command]
            _run(
                [launch], [{"JAXCOMM_SHARED_MEMORY": "off"} if peer == "apart" else {}]
            )
        elif peer == "plain":
            job = launcher.Job(ranks, tuple(command))
            extra = launcher.environment(job)
            for name in launcher.MALLOC:
                extra.pop(name, None)
            _run([launcher.command_line(job)], [extra])
        elif peer == "devices" or peer == "plain devices":
            flags = f"{_HOST_DEVICES}={ranks}"
            extra = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}
            if peer == "devices":
                extra |= launcher.MALLOC
            _run([[sys.executable, *command]], [extra])
        else:
            _run([[sys.executable, *command]] * ranks, _together(ranks))
        return _results(out)


def run_torch(shapes: list[list[int]], ranks: int, repeats: int) -> list[Any]:
    """Run the torch job in its own environment."""
    with tempfile.TemporaryDirectory() as folder:
        out, file = Path(folder) / "result", Path(folder) / "shapes.json"
        file.write_text(json.dumps(shapes))
        command = [str(PEERS_PYTHON), "-m", "benchmarks.reduction.torch_worker"]
        command += [str(out), str(file), str(repeats)]
        _run([command] * ranks, _together(ranks))
        return _results(out)


def run_horovod(shapes: list[list[int]], ranks: int, repeats: int) -> list[Any]:
    """Run the Horovod job in its own environment, under its own mpiexec."""
    with tempfile.TemporaryDirectory() as folder:
        out, file = Path(folder) / "result", Path(folder) / "shapes.json"
        file.write_text(json.dumps(shapes))
        # Unbound: Horovod's background thread would share its rank's one core.
        command = [str(PEERS_MPIEXEC), "-n", str(ranks), "--bind-to", "none"]
        command += [str(PEERS_PYTHON), "-m", "benchmarks.reduction.horovod_worker"]
        command += [str(out), str(file), str(repeats)]
        _run([command], [launcher.environment(launcher.Job(ranks, ()))])
        return _results(out)


def run_safety(ranks: int, environment: dict[str, str]) -> dict[str, float]:
    """Run one job of safety/worker.py; return seconds per call by tree."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.0"
        launch = [sys.executable, "-m", "jaxcomm", "run", "-n", str(ranks)]
        launch += ["--timeout", str(TIMEOUT), "-m", "benchmarks.safety.worker"]
        _run([[*launch, str(out)]], [environment])
        return json.loads(out.read_text())


def run_stemdl(network: str, peer: str, repeats: int, ranks: int = 2) -> list[Any]:
    """Run one job of stemdl/worker.py; return what each process wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result"
        command = ["-m", "benchmarks.stemdl.worker", str(out), network, str(repeats)]
        if peer == "devices":
            flags = f"{os.environ.get('XLA_FLAGS', '')} {_HOST_DEVICES}=2"
            extra = {"XLA_FLAGS": flags, **launcher.MALLOC}
            _run([[sys.executable, *command, peer]], [extra])
            return _results(out)
        launch = [sys.executable, "-m", "jaxcomm", "run", "-n", str(ranks)]
        launch += ["--timeout", str(TIMEOUT), *command, peer]
        trace = Path(folder) / "timeline.json"
        extra = {"JAXCOMM_TIMELINE": str(trace)} if peer == "timeline" else {}
        _run([launch], [extra])
        found = _results(out)
        if peer == "timeline":
            found[0]["trace"] = json.loads(trace.read_text())
        return found


def run_torch_stemdl(network: dict[str, Any], repeats: int) -> list[Any]:
    """Run one job of stemdl/torch_worker.py in its own environment."""
    with tempfile.TemporaryDirectory() as folder:
        out, file = Path(folder) / "result", Path(folder) / "network.json"
        file.write_text(json.dumps(network))
        command = [str(PEERS_PYTHON), "-m", "benchmarks.stemdl.torch_worker"]
        _run([[*command, str(out), str(file), str(repeats)]] * 2, _together(2))
        return _results(out)


@functools.cache
def peer_versions() -> dict[str, str]:
    """Versions of the peers that live in an environment of their own, by name."""
    if not PEERS_PYTHON.exists():
        return {}
    script = (
        "import importlib.metadata as m, json\n"
        "found = {d.name: d.version for d in m.distributions()}\n"
        "print(json.dumps({k: v for k, v in found.items() "
        "if k in ('torch', 'horovod')}))"
    )
    done = subprocess.run(
        [str(PEERS_PYTHON), "-c", script], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def slowest(results: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Combine processes: a sample is the slowest one's."""
    return {
        way: [max(times) for times in zip(*(r[way] for r in results), strict=True)]
        for way in results[0]
    }


# The watchdog asks MPI for messages once a second, whatever a step does.
UNWATCHED = {"JAXCOMM_WARN_AFTER": "0", "JAXCOMM_ABORT_AFTER": "0"}


def build_shim(folder: Path) -> Path:
    """Compile the PMPI shim that counts calls."""
    library = folder / "libpmpi_shim.so"
    command = ["c++", "-std=c++17", "-O2", "-shared", "-fPIC", "-o", str(library)]
    source = ROOT / "benchmarks" / "reduction" / "pmpi_shim.cc"
    subprocess.run([*command, str(source), "-ldl"], check=True)
    return library


def _together(ranks: int) -> list[dict[str, str]]:
    """Environments of processes that find each other."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{listener.getsockname()[1]}"
    return [
        {
            "BENCH_RANK": str(rank),
            "BENCH_RANKS": str(ranks),
            "BENCH_COORDINATOR": coordinator,
            **launcher.MALLOC,
        }
        for rank in range(ranks)
    ]


def _run(commands: list[list[str]], environments: list[dict[str, str]]) -> None:
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            # Plans must not depend on what was tuned on this machine.
            env={**os.environ, "JAXCOMM_PROFILE": "off", **extra},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command, extra in zip(commands, environments, strict=True)
    ]
    try:
        outputs = [
            process.communicate(timeout=TIMEOUT + 30)[0] for process in processes
        ]
    finally:
        for process in processes:
            process.kill()
    for process, command, output in zip(processes, commands, outputs, strict=True):
        if process.returncode:
            raise JobError(f"{' '.join(command)}: {process.returncode}\n{output}")


def _results(out: Path) -> list[Any]:
    found = sorted(out.parent.glob(f"{out.name}.*"))
    return [json.loads(path.read_text()) for path in found]
