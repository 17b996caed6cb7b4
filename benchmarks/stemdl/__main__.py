"""Weak scaling of the STEMDL training step on two cores: `make bench-stemdl`.

Every rank has one core and the same batch, whatever their number. Steps with jaxcomm
take turns with steps of the same program without communication, on both cores at once
and on one while the other is idle: see taking_turns.py. Beside them `jax.pmap` on two
host devices, and PyTorch's DDP where `make .venv-peers/bin/python` has installed it.

Writes results/stemdl.json, after every job, and .md.
"""

from __future__ import annotations

import csv
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from benchmarks.common import jobs, results, taking_turns
from benchmarks.stemdl import report
from benchmarks.stemdl.sizes import SIZES
from jaxcomm import terminal
from stemdl.model.network import NETWORKS

NETWORKS_TIMED = ("tiny", "small", "medium")
# A step of medium takes as long as a hundred of tiny's: one round of it must do.
REPEATS = {"tiny": 7, "small": 6, "medium": 2, "toy": 3}
ONE_ROUND = ("medium",)
TRAINING: dict[str, Any] = {"network": "tiny", "steps": 200, "samples": 64}


def twin(name: str) -> dict[str, Any]:
    """What torch_worker.py needs to build the same network."""
    size, model = SIZES[name], NETWORKS[name]
    return {
        "growth": model.growth,
        "kernel": model.kernel,
        "up_kernel": model.up_kernel,
        "layers": list(model.layers),
        "channels": size.scan**2,
        "pixels": size.pixels,
        "batch": size.batch,
        "calls": size.calls,
    }


def measure(
    name: str,
    peer: str,
    repeats: int,
    samples: dict[str, dict[str, list[float]]],
    entry: dict[str, Any],
) -> None:
    """Run one job; add to a network's samples by peer and way, and to its entry.

    Raises:
      JobError: it failed, or PyTorch's twin is another network.
    """
    if peer == "torch":
        found = jobs.run_torch_stemdl(twin(name), repeats)
        numbers = entry["parameters"], found[0]["parameters"]
        if numbers[0] != numbers[1]:
            raise jobs.JobError(
                f"{name}: {numbers[0]} parameters in JAX, {numbers[1]} in PyTorch"
            )
    else:
        found = jobs.run_stemdl(name, peer, repeats)
    if peer == "timeline":
        split = report.split(found[0]["trace"], found[0]["buckets"])
        # The first calls touch memory.
        first = taking_turns.WARM_UP * SIZES[name].calls
        shares = {share: times[first:] for share, times in split.items()}
        entry["split_ms"] = results.summaries(shares)
        return
    if peer == "ranks":
        entry |= {key: found[0][key] for key in ("parameters", "bytes", "buckets")}
    calls = SIZES[name].calls
    mine = samples.setdefault(peer, {})
    for way, times in report.combined([f["seconds"] for f in found]).items():
        mine.setdefault(way, []).extend(1e3 * t / calls for t in times)
    entry["times_ms"] = report.efficiencies(samples)


def data_time(rounds: int) -> dict[str, Any]:
    """Steps of real trainings from shards and from memory, and their waits for data."""
    steps, samples = TRAINING["steps"], str(TRAINING["samples"])
    taken: dict[str, list[dict[str, float]]] = {"shards": [], "memory": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = {"shards": folder / "shards", "memory": folder / "data"}
        _on_ranks("simulate", "--samples", samples, "--out", sources["shards"])
        for _ in range(rounds):
            for source, place in sources.items():
                option = "--shards" if source == "shards" else "--data"
                options = [option, place, "--out", folder / "run", "--log-every", 10]
                for key, value in TRAINING.items():
                    options += [f"--{key}", value]
                _on_ranks("train", *options)
                with (folder / "run/metrics.csv").open(newline="") as file:
                    rows = list(csv.DictReader(file))
                taken[source] += [
                    {key: float(row[key]) for key in ("step_ms", "data_ms")}
                    for row in rows
                    if int(row["step"]) > steps // 4
                ]
    return {
        **TRAINING,
        "rounds": rounds,
        **{
            source: {key: statistics.median(r[key] for r in rows) for key in rows[0]}
            for source, rows in taken.items()
        },
    }


def _on_ranks(name: str, *options: object) -> None:
    command = [sys.executable, "-m", "jaxcomm", "run", "-n", "2"]
    command += ["-m", "stemdl", name]
    command += map(str, options)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise jobs.JobError(f"{' '.join(command)}\n{done.stderr[-3000:]}")


@click.command(context_settings=terminal.HELP)
@click.option("--quick", is_flag=True, help="one round of few repeats, to try it")
@click.option("--rounds", type=click.IntRange(1), default=2, show_default=True)
@click.option(
    "--network",
    "names",
    type=click.Choice(list(SIZES)),
    multiple=True,
    default=NETWORKS_TIMED,
    show_default=True,
)
@click.option("--out", type=click.Path(path_type=Path), default=results.FOLDER)
def main(quick: bool, rounds: int, names: tuple[str, ...], out: Path) -> None:
    """Time all networks in all ways and write the results."""
    console = terminal.console(stderr=True)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < taking_turns.RANKS:
        raise click.ClickException("one core: weak scaling needs two")
    # All peers get the same ones; jobs inherit it.
    os.sched_setaffinity(0, cores[: taking_turns.RANKS])
    peers = ["ranks", "devices", *(["torch"] if jobs.peer_versions() else [])]
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "quick": quick,
        "rounds": 1 if quick else rounds,
        "machine": results.machine(),
        "versions": results.versions(),
        "networks": {
            name: {"batch_per_rank": SIZES[name].batch, "calls": SIZES[name].calls}
            for name in names
        },
    }
    samples: dict[str, dict[str, dict[str, list[float]]]] = {name: {} for name in names}
    out.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        (out / "stemdl.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / "stemdl.md").write_text(report.markdown(result))

    try:
        for round_ in range(result["rounds"]):
            for name in names:
                if round_ > 0 and name in ONE_ROUND:
                    continue
                # Shares of a step need no second round.
                more = ["timeline"] if round_ == 0 else []
                for peer in peers + more:
                    console.print(f"{round_ + 1}: {name}, {peer}", highlight=False)
                    repeats = 2 if quick else REPEATS[name]
                    entry = result["networks"][name]
                    measure(name, peer, repeats, samples[name], entry)
                    write()
        result["training"] = data_time(1 if quick else 3)
    except jobs.JobError as error:
        raise click.ClickException(str(error)) from error
    write()
    terminal.markdown(console, report.markdown(result))


if __name__ == "__main__":
    main()
