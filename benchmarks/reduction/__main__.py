"""Measure a gradient reduction with jaxcomm and with its peers, side by side.

`make bench` runs it. Jobs alternate over several rounds, and inside a job the ways
alternate, so that a slow minute of the machine falls on all of them. Writes
results/reduction.json (medians, quartiles, machine, versions) and, made from it,
reduction.md and reduction.png. Torch is measured where `make bench-peers` has made its
environment, and Horovod where `make bench-horovod` has built it there.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from benchmarks.common import jobs, results
from benchmarks.reduction import report, worker
from jaxcomm import terminal

PEERS = ("mpi", "apart", "mpi4jax", "devices", "gloo")
LARGE = ("stemdl", "gpt2", "one_leaf")
MEMORY_WAYS = ("no reduction", "jaxcomm", "mpi4jax per leaf", "mpi4jax concatenated")


def plan_jobs(rounds: int, works: list[str]) -> list[tuple[str, str, int]]:
    """(workload, peer, ranks) of every timed job, in the order of running."""
    found = []
    for _ in range(rounds):
        for work in works:
            ranks = 1 if work == "dispatch" else 2
            for peer in PEERS:
                if peer == "gloo" and work == "dispatch":
                    continue  # one process has nothing to gather
                found.append((work, peer, ranks))
            if work == "resnet50":
                found += [(work, "plain", ranks), (work, "plain devices", ranks)]
            if work not in ("dispatch", "mixed"):
                found += [(work, peer, ranks) for peer in jobs.peer_versions()]
        found += [("resnet50", peer, 4) for peer in PEERS if "resnet50" in works]
    return found


def run_timed(work: str, peer: str, ranks: int, repeats: int) -> dict[str, list[float]]:
    count = max(3, repeats // 2) if work in LARGE else repeats
    if peer == "gloo" and work in LARGE:
        count = 3  # a second or more for each step
    if peer in ("torch", "horovod"):
        shapes = [list(leaf.shape) for leaf in worker.WORKLOADS[work]().values()]
        run = jobs.run_torch if peer == "torch" else jobs.run_horovod
        return jobs.slowest(run(shapes, ranks, count))
    return jobs.slowest(jobs.run_job(work, peer, ranks, "--repeats", str(count)))


# Large buffers are mapped one by one and given back at once, so that a peak is what is
# in use, and not how malloc's heap happens to be divided.
EXACT_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "MALLOC_TOP_PAD_": "131072",
}


@contextlib.contextmanager
def environment(**added: str) -> Iterator[None]:
    """Set variables for the jobs started inside."""
    before = dict(os.environ)
    os.environ.update(added)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def other_measures(progress: Progress) -> dict[str, Any]:
    """Calls, memory and planning: not timings, so once is enough."""
    task = progress.add_task("calls, memory, planning", total=2 + len(MEMORY_WAYS))
    with tempfile.TemporaryDirectory() as folder:
        shim = jobs.build_shim(Path(folder))
        with environment(LD_PRELOAD=str(shim), **jobs.UNWATCHED):
            count = ("--what", "calls", "--shim", str(shim))
            calls = jobs.run_job("resnet50", "mpi", 2, *count)[0]
            calls |= jobs.run_job("resnet50", "apart", 2, *count)[0]
    progress.advance(task)
    peaks: dict[str, int] = {}
    for way in MEMORY_WAYS:
        with environment(**EXACT_MALLOC):
            found = jobs.run_job("stemdl", "mpi", 2, "--what", "memory", "--way", way)
        peaks[way] = max(one[way] for one in found)
        progress.advance(task)
    planning = jobs.run_job("resnet50", "mpi", 2, "--what", "planning")
    progress.advance(task)
    return {
        "mpi_calls_per_step": calls,
        "peak_bytes": peaks,
        "planning_ms": {k: max(one[k] for one in planning) for k in planning[0]},
    }


@click.command(context_settings=terminal.HELP)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=7, show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=results.FOLDER,
    help="directory for reduction.json, .md and .png",
)
def main(rounds: int, repeats: int, out: Path) -> None:
    """Measure all workloads in all ways and write the results."""
    console = terminal.console()
    works = list(worker.WORKLOADS)
    samples: dict[tuple[str, int], dict[str, dict[str, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    try:
        with Progress(*columns, console=console) as progress:
            planned = plan_jobs(rounds, works)
            task = progress.add_task("measuring", total=len(planned))
            for work, peer, ranks in planned:
                progress.update(task, description=f"{work}, {peer}, {ranks} ranks")
                for way, times in run_timed(work, peer, ranks, repeats).items():
                    samples[work, ranks][peer][way] += times
                progress.advance(task)
            measures = other_measures(progress)
    except jobs.JobError as error:
        raise click.ClickException(str(error)) from error

    def entry(work: str, ranks: int) -> dict[str, Any]:
        times = {
            peer: results.summaries(found)
            for peer, found in samples[work, ranks].items()
        }
        return {"alone_ms": report.alone(times), "times_ms": times}

    result = {
        "date": datetime.date.today().isoformat(),
        "rounds": rounds,
        "repeats": repeats,
        "machine": results.machine(),
        "versions": results.versions(),
        "workloads": {
            work: entry(work, 1 if work == "dispatch" else 2) for work in works
        },
        "four_ranks": entry("resnet50", 4),
        **measures,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "reduction.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "reduction.md").write_text(report.markdown(result))
    report.plot(result, out / "reduction.png")
    terminal.markdown(console, report.markdown(result))


if __name__ == "__main__":
    main()
