"""Measure how much of the communication hides behind computation: `make bench-overlap`.

Two ranks on two cores leave no core idle, so a reduction in shared memory has nothing
to hide behind. Here the ranks are two hosts (two_hosts.py) joined by a slow wire: while
it carries a bucket, the cores are free to compute. Needs root and iproute2.

Writes results/overlap.json and .md, and the timeline of one step as a picture.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.progress import track

from benchmarks.common import jobs, results
from benchmarks.overlap import report, two_hosts
from jaxcomm import terminal
from jaxcomm.planning import costs

PICTURE = jobs.ROOT / "docs" / "images" / "timeline.png"
NAMES = {"resnet": "residual network", "stemdl": "STEMDL"}


@click.command(context_settings=terminal.HELP)
@click.option("--megabits", default=400.0, show_default=True, help="Of the wire.")
@click.option("--rounds", type=click.IntRange(1), default=2, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=results.FOLDER)
def main(megabits: float, rounds: int, repeats: int, out: Path) -> None:
    """Measure steps with and without reduction across a slow wire."""
    if why := two_hosts.missing():
        raise click.ClickException(f"two hosts cannot be had here: {why}")
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, two_hosts.wire(megabits):
        file, trace = Path(folder) / "samples.json", Path(folder) / "timeline.json"
        profile = Path(folder) / "profile.json"
        env = {"JAXCOMM_PROFILE": "off"}

        def ours(network: str, count: int, *way: str, **extra: str) -> dict[str, Any]:
            command = ["-m", "benchmarks.overlap.worker", str(file), network]
            command += [str(count), str(profile), *way]
            two_hosts.run(command, timeout=600, env={**env, **extra})
            return json.loads(file.read_text())

        def torch() -> dict[str, Any]:
            command = [str(jobs.PEERS_PYTHON), "-m", "benchmarks.overlap.torch_worker"]
            command += [str(file), str(repeats)]
            two_hosts.run_apart(command, timeout=600)
            return json.loads(file.read_text())

        tune = ["-m", "benchmarks.overlap.tune_worker", str(profile)]
        two_hosts.run(tune, timeout=600, env=env)
        work: dict[str, Callable[[], dict[str, Any]]] = {
            name: functools.partial(ours, network, repeats)
            for network, name in NAMES.items()
        }
        if jobs.PEERS_PYTHON.exists():
            work["residual network, PyTorch DDP over gloo"] = torch
        for _ in track(range(rounds), "rounds", console=terminal.console(stderr=True)):
            for name, run in work.items():
                part = run()
                job = found.setdefault(name, {**part, "samples": {}})
                for way, times in part["samples"].items():
                    job["samples"].setdefault(way, []).extend(times)
        shown = ours("resnet", 1, "planner", JAXCOMM_TIMELINE=str(trace))
        timeline = json.loads(trace.read_text())
        tuned = costs.summary(costs.CostModel.from_json(profile.read_text()))
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": results.machine(),
        "versions": results.versions(),
        "megabits": megabits,
        "tuned": tuned,
        "jobs": {
            name: {
                "bytes": job["bytes"],
                "buckets": job.get("buckets", {}),
                "times_ms": (times := results.summaries(job["samples"])),
                "overlaps": report.overlaps(times),
            }
            for name, job in found.items()
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "overlap.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "overlap.md").write_text(report.markdown(result))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    report.draw(timeline, shown["buckets"]["planner"], PICTURE)
    terminal.markdown(terminal.console(), report.markdown(result))


if __name__ == "__main__":
    if os.environ.get("OMPI_COMM_WORLD_RANK"):
        sys.exit("start this without mpiexec: it starts its own ranks")
    main()
