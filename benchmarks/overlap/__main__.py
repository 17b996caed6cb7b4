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
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track

from benchmarks.common import jobs, results
from benchmarks.overlap import two_hosts
from jaxcomm.planning import costs

PICTURE = jobs.ROOT / "docs" / "images" / "timeline.png"
COMPUTE, COMMUNICATION = "compute", "communication"
NAMES = {"resnet": "residual network", "stemdl": "STEMDL"}


def overlaps(samples: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """For every way: its median step, and the fraction of what could hide that did.

    That fraction is (compute + communication - step) / min(compute, communication).
    """
    median = {way: statistics.median(times) for way, times in samples.items()}
    compute, wire = median.pop(COMPUTE), median.pop(COMMUNICATION)
    return {
        way: {
            "step_ms": step,
            "over_longer": step / max(compute, wire),
            "overlap": (compute + wire - step) / min(compute, wire),
        }
        for way, step in median.items()
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as tables."""
    lines = [
        f"Two hosts of one core each, {result['megabits']:g} Mbit/s between them, "
        f"{result['date']}. Overlap is the part of what could be hidden that was: "
        "(compute + communication - step) / the shorter of the two."
    ]
    for name, job in result["jobs"].items():
        samples = job["samples_ms"]
        compute, wire = (
            statistics.median(samples[k]) for k in (COMPUTE, COMMUNICATION)
        )
        lines += [
            "",
            f"**{name}**: {job['bytes'] / 1e6:.1f} MB of gradients; medians of "
            f"{len(samples[COMPUTE])}; computing alone takes {compute:.0f} ms, "
            f"communicating alone {wire:.0f} ms: a step takes at least "
            f"{max(compute, wire):.0f} and, with nothing hidden, "
            f"{compute + wire:.0f} ms.",
            "",
            "| | buckets | step, ms | / longer of the two | overlap |",
            "|---|--:|--:|--:|--:|",
        ]
        for way, found in job["overlaps"].items():
            lines.append(
                f"| {way} | {job['buckets'].get(way, '')} | {found['step_ms']:.0f} "
                f"| {found['over_longer']:.2f} | {found['overlap']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def draw(trace: dict[str, Any], buckets: int, path: Path) -> None:
    """Draw the last step of so many buckets, of rank 0, from a timeline file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and not e["pid"]]
    done = sorted((e for e in events if e["tid"] == 1), key=lambda e: e["ts"])[
        -buckets:
    ]
    first, last = done[0]["ts"], done[-1]["ts"]
    waits = {
        e["args"]["bucket"]: e
        for e in events
        if e["tid"] == 0 and first - 1e6 < e["ts"] <= last
    }
    start = min(e["ts"] for e in done)
    start = min([start, *(waits[k]["ts"] for k in waits if k < buckets)])
    figure, axes = plt.subplots(figsize=(9, 3.5), layout="constrained")
    for row, event in enumerate(done):
        wait = waits.get(event["args"]["bucket"])
        if wait is not None:
            axes.barh(
                row, wait["dur"] / 1e3, left=(wait["ts"] - start) / 1e3, color="0.8"
            )
        left = (event["ts"] - start) / 1e3
        axes.barh(row, event["dur"] / 1e3, left=left, color="tab:blue")
    ready = [waits[k]["ts"] for k in waits if k < buckets] or [last]
    axes.axvline((max(ready) - start) / 1e3, color="tab:red", linestyle="--")
    axes.annotate(
        "the last gradient is there",
        ((max(ready) - start) / 1e3, -0.4),
        xytext=(-5, 0),
        textcoords="offset points",
        horizontalalignment="right",
        color="tab:red",
    )
    axes.set_yticks(range(len(done)), [e["name"][:34] for e in done], fontsize=7)
    axes.invert_yaxis()
    axes.set(
        xlabel="ms since the first bucket was ready",
        title="One step: buckets wait (grey) and travel (blue)",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


@click.command()
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
        for _ in track(range(rounds), "rounds"):
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
                "samples_ms": job["samples"],
                "overlaps": overlaps(job["samples"]),
            }
            for name, job in found.items()
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "overlap.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "overlap.md").write_text(markdown(result))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    draw(timeline, shown["buckets"]["planner"], PICTURE)
    Console().print(Markdown(markdown(result)))


if __name__ == "__main__":
    if os.environ.get("OMPI_COMM_WORLD_RANK"):
        sys.exit("start this without mpiexec: it starts its own ranks")
    main()
