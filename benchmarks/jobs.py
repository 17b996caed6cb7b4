"""Start the benchmark's jobs and collect what their processes wrote."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from jaxcomm.launch import run as launcher

HERE = Path(__file__).resolve().parent
PEERS_PYTHON = HERE.parent / ".venv-peers" / "bin" / "python"
TIMEOUT = 580


class JobError(Exception):
    """A job failed; the text holds its output."""


def run_job(work: str, peer: str, ranks: int, *arguments: str) -> list[Any]:
    """Run one job of worker.py; return what each process wrote.

    Peer "plain" is a job of plain mpiexec, and "plain devices" one of plain Python:
    without the malloc settings that `jaxcomm run` adds.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result"
        kind = "devices" if peer == "plain devices" else peer
        command = [str(HERE / "worker.py"), str(out), work, "--peer", kind, *arguments]
        if peer in ("mpi", "mpi4jax"):
            launch = [sys.executable, "-m", "jaxcomm", "run", "-n", str(ranks)]
            launch += ["--timeout", str(TIMEOUT), *command]
            _run([launch], [{}])
        elif peer == "plain":
            job = launcher.Job(ranks, tuple(command))
            extra = launcher.environment(job)
            for name in launcher.MALLOC:
                extra.pop(name, None)
            _run([launcher.command_line(job)], [extra])
        elif peer == "devices" or peer == "plain devices":
            flags = f"--xla_force_host_platform_device_count={ranks}"
            extra = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}
            if peer == "devices":
                extra |= launcher.MALLOC
            _run([[sys.executable, *command]], [extra])
        else:
            _run([[sys.executable, *command]] * ranks, _pinned(ranks))
        return _results(out)


def run_torch(shapes: list[list[int]], ranks: int, repeats: int) -> list[Any]:
    """Run the torch job in its own environment."""
    with tempfile.TemporaryDirectory() as folder:
        out, file = Path(folder) / "result", Path(folder) / "shapes.json"
        file.write_text(json.dumps(shapes))
        command = [str(PEERS_PYTHON), str(HERE / "worker_torch.py")]
        command += [str(out), str(file), str(repeats)]
        _run([command] * ranks, _pinned(ranks))
        return _results(out)


def slowest(results: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Combine processes: a sample is the slowest one's."""
    return {
        way: [max(times) for times in zip(*(r[way] for r in results), strict=True)]
        for way in results[0]
    }


def build_shim(folder: Path) -> Path:
    """Compile the PMPI shim that counts calls."""
    library = folder / "libpmpi_shim.so"
    command = ["c++", "-std=c++17", "-O2", "-shared", "-fPIC", "-o", str(library)]
    subprocess.run([*command, str(HERE / "pmpi_shim.cc"), "-ldl"], check=True)
    return library


def _pinned(ranks: int) -> list[dict[str, str]]:
    """Environments of processes that find each other and keep to their own cores."""
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
    cores = sorted(os.sched_getaffinity(0))
    processes = []
    for k, (command, extra) in enumerate(zip(commands, environments, strict=True)):
        mine = [cores[k % len(cores)]] if len(commands) > 1 else cores
        processes.append(
            subprocess.Popen(
                ["taskset", "-c", ",".join(map(str, mine)), *command],
                # Plans must not depend on what was tuned on this machine.
                env={**os.environ, "JAXCOMM_PROFILE": "off", **extra},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
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
