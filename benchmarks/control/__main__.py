"""Measure the control plane's steps on this machine: `make bench-control`.

Bit-vector rounds and rounds through rank 0, over MPI on 2, 4 and 8 ranks
(worker.py); rank 0's work per request and per cached response, in C++
(steps.cc); and, where `make bench-horovod` has built it, Horovod's own
negotiation of tensors of one element. Writes results/control.json, whose medians
`jaxcomm simulate` takes as "measured here".
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from benchmarks.common import jobs, results
from jaxcomm import terminal
from jaxcomm.launch import run as launcher

HERE = Path(__file__).resolve().parent
RANKS = (2, 4, 8)
# Horovod's settings take turns, so that a slow minute falls on all of them.
ROUNDS = 3
HOROVOD_JOB = "Horovod, 2 ranks"
REQUEST = "Horovod's request, from the difference of lower quartiles (us)"
# With a cycle of 0.1 ms, a step of tensors without data is mostly negotiation; with 0,
# threads that never sleep fight for two cores. With 1 ms it is mostly the cycle.
HOROVOD = {
    "cache": {"HOROVOD_CYCLE_TIME": "0.1"},
    "no cache": {"HOROVOD_CYCLE_TIME": "0.1", "HOROVOD_CACHE_CAPACITY": "0"},
    "cache, cycle 1 ms": {"HOROVOD_CYCLE_TIME": "1"},
}


def build(folder: Path) -> Path:
    """Compile steps.cc."""
    library = folder / "libcontrol_steps.so"
    line = ["c++", "-std=c++17", "-O2", "-shared", "-fPIC", "-o", str(library)]
    subprocess.run([*line, str(HERE / "steps.cc")], check=True)
    return library


def steps(library: Path, ranks: int, repeats: int) -> dict[str, list[float]]:
    """Samples of worker.py on so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "samples.json"
        line = [sys.executable, "-m", "jaxcomm", "run", "-n", str(ranks)]
        line += ["-m", "benchmarks.control.worker"]
        line += [str(out), str(library), str(repeats)]
        subprocess.run(line, cwd=jobs.ROOT, check=True, timeout=300)
        return json.loads(out.read_text())


def horovod(repeats: int) -> dict[str, list[float]]:
    """Samples of Horovod on 2 ranks, for each of its settings."""
    found: dict[str, list[float]] = {}
    for label, extra in ROUNDS * list(HOROVOD.items()):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "samples.json"
            line = [str(jobs.PEERS_MPIEXEC), "-n", "2", "--bind-to", "none"]
            line += [str(jobs.PEERS_PYTHON), "-m", "benchmarks.control.horovod_worker"]
            environment = launcher.environment(launcher.Job(2, ()))
            subprocess.run(
                [*line, str(out), str(repeats)],
                cwd=jobs.ROOT,
                env={**os.environ, **environment, **extra},
                check=True,
                timeout=300,
            )
            samples = json.loads(out.read_text())
            for name, times in samples.items():
                found.setdefault(f"{name}, {label}", []).extend(times)
    return found


def request_us(
    times: dict[str, results.Summary], tensors: int = 161, ranks: int = 2
) -> float:
    """What a request costs Horovod: its step without the cache less that with it.

    Of lower quartiles: whatever else runs here only ever adds time.
    """
    name = f"Horovod grouped, {tensors} tensors (us)"
    without, cached = (
        times[f"{name}, {label}"]["quartiles"][0] for label in ("no cache", "cache")
    )
    return (without - cached) / (tensors * ranks)


@click.command(context_settings=terminal.HELP)
@click.option("--repeats", type=click.IntRange(10), default=200, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=results.FOLDER)
def main(repeats: int, out: Path) -> None:
    """Measure, and write medians and quartiles."""
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        samples: dict[str, Any] = {
            f"{ranks} ranks": steps(library, ranks, repeats) for ranks in RANKS
        }
    if "horovod" in jobs.peer_versions():
        samples[HOROVOD_JOB] = horovod(repeats)
    times = {job: results.summaries(found) for job, found in samples.items()}
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": results.machine(),
        "versions": results.versions(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": [round(x, 2) for x in load],
        "load_after": [round(x, 2) for x in os.getloadavg()],
        "note": "more ranks than cores take turns: their times are upper bounds",
        "times": times,
    }
    if HOROVOD_JOB in times:
        result[REQUEST] = round(request_us(times[HOROVOD_JOB]), 3)
    out.mkdir(parents=True, exist_ok=True)
    (out / "control.json").write_text(json.dumps(result, indent=1) + "\n")
    click.echo(json.dumps(times, indent=1))


if __name__ == "__main__":
    main()
