"""Is it the same training, however gradients travel?

python -m stemdl equality --network tiny --steps 60 --out out/equality

Trains one network on one global batch by `stemdl train`: on one rank, on several, with
other buckets, over another transport, under `jax.pmap`; in float32 and in float64.
Writes equality.json, equality.md and equality.png, and ends with exit code 1 where
parameters differ that must not.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from jaxcomm import terminal
from stemdl.config import versions
from stemdl.data.cache import data_config, data_option, simulate
from stemdl.model.network import NETWORKS
from stemdl.training import parameters
from stemdl.training.telemetry import UNTIMED_STEPS

TRAIN = ("-m", "stemdl", "train")
DTYPES = ("float32", "float64")

TOLERANCE = 1e-10
"""Of parameters in float64: max|a - b| / max|a| of the worst leaf. Sums that are only
ordered otherwise stay far below it, an average over the wrong samples far above."""

ONE_BUCKET = 1 << 40
"""Bytes at which the planner would close a bucket: never."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One way to train.

    Attributes:
      ranks: processes, or devices of `jax.pmap`.
      options: of `stemdl train`.
      transport: of jaxcomm.
      pmap: in one process, on so many host devices.
    """

    ranks: int
    options: tuple[str, ...] = ()
    transport: str = "auto"
    pmap: bool = False

    def command(self) -> list[str]:
        """What starts it, but for the options that all runs share."""
        if self.pmap:
            return [sys.executable, *TRAIN, "--backend", "pmap"]
        launch = [sys.executable, "-m", "jaxcomm", "run", "-n", str(self.ranks)]
        transport = ["--transport", self.transport]
        return [*launch, *TRAIN, *transport, *self.options]

    def environment(self) -> dict[str, str]:
        """What it runs with on top of ours."""
        if not self.pmap:
            return {}
        devices = f"--xla_force_host_platform_device_count={self.ranks}"
        return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {devices}".strip()}


def _set(assignment: str) -> tuple[str, ...]:
    return ("--set", f"communication.{assignment}")


REFERENCE = "1 rank"
RUNS = {
    REFERENCE: Run(1),
    "2 ranks": Run(2),
    "2 ranks, one bucket": Run(2, _set(f"bucket_bytes={ONE_BUCKET}")),
    "2 ranks, a bucket per scope": Run(2, _set("groups=scopes")),
    "2 ranks, mpi4jax": Run(2, transport="mpi4jax"),
    "4 ranks": Run(4),
    "4 ranks, a bucket per scope": Run(4, _set("groups=scopes")),
    "2 devices, pmap": Run(2, pmap=True),
    "4 devices, pmap": Run(4, pmap=True),
}


def train(run: Run, out: Path, common: Sequence[str]) -> dict[str, Any]:
    """Run one training; return losses, and buckets and fingerprint of its schedule."""
    finished = subprocess.run(
        [*run.command(), *common, "--out", str(out)],
        env=os.environ | run.environment(),
        capture_output=True,
        text=True,
    )
    if finished.returncode:
        raise click.ClickException(
            f"training failed with exit code {finished.returncode}: "
            f"{' '.join(finished.args)}\n{finished.stderr[-3000:]}"
        )
    report = json.loads((out / "train.json").read_text())
    found = {"losses": report["losses"], "buckets": None, "schedule": None}
    if not run.pmap:
        text = (out / "schedule.txt").read_text()
        buckets = re.search(r"(\d+) buckets", text)
        found["buckets"] = int(buckets.group(1)) if buckets else None
        found["schedule"] = report["schedule_fingerprint"]
    return found


def bitwise_equal(a: Path, b: Path) -> bool:
    """Whether two files of `parameters.save` hold the same names and bits."""
    with np.load(a) as first, np.load(b) as second:
        return set(first.files) == set(second.files) and all(
            first[key].dtype == second[key].dtype
            and first[key].tobytes() == second[key].tobytes()
            for key in first.files
        )


def compare(runs: dict[str, Path], found: dict[str, dict[str, Any]]) -> None:
    """Add to every run how far it is from one rank, and from its like.

    Args:
      runs: each run's file of parameters.
      found: what `train` returned; gets "difference", the largest relative one from
        `REFERENCE`, and "equals", the run of as many ranks whose bits it must have and
        whether it has them. Summed in rank order, buckets have no say in them.
    """
    first: dict[int, str] = {}
    for name, path in runs.items():
        run, entry = RUNS[name], found[name]
        entry["difference"] = parameters.max_relative_difference(runs[REFERENCE], path)
        entry["equals"] = None
        if run.pmap or run.transport != "auto":
            continue
        other = first.setdefault(run.ranks, name)
        if other != name:
            same = bitwise_equal(runs[other], path)
            entry["equals"] = {"run": other, "bitwise": same}


def problems(results: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """What must not be, in words; `results` holds `compare`'s by dtype and run."""
    wrong = []
    for dtype, found in results.items():
        for name, entry in found.items():
            # Not "greater", which a difference that is no number is not.
            if dtype == "float64" and not entry["difference"] <= TOLERANCE:
                wrong.append(
                    f"{name}, {dtype}: parameters differ from those of {REFERENCE} by "
                    f"{entry['difference']:.1e}, more than {TOLERANCE:g}"
                )
            if (equals := entry["equals"]) is None:
                continue
            other = equals["run"]
            if not equals["bitwise"]:
                wrong.append(f"{name}, {dtype}: not bitwise equal to {other}")
            if entry["schedule"] == found[other]["schedule"]:
                wrong.append(f"{name}, {dtype}: the same buckets as {other}")
    return wrong


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    dtypes = list(report["results"])
    lines = [
        f"`{report['network']}`, {report['steps']} steps, {report['batch']} samples "
        "a step over all ranks. Differences of parameters are max\\|a - b\\| / "
        f"max\\|a\\| of the worst array, from {REFERENCE}; float64 must stay below "
        f"{report['tolerance_float64']:g}.",
        "",
        f"| | buckets | {' | '.join(dtypes)} | bitwise equal to |",
        "|---|--:|" + "--:|" * len(dtypes) + "---|",
    ]
    for name, entry in report["results"][dtypes[0]].items():
        runs = [report["results"][dtype][name] for dtype in dtypes]
        cells = ["" if name == REFERENCE else f"{r['difference']:.1e}" for r in runs]
        equals = ""
        if entry["equals"]:
            same = all(run["equals"]["bitwise"] for run in runs)
            equals = f"{'' if same else '**not** '}{entry['equals']['run']}"
        buckets = entry["buckets"] or ""
        lines.append(f"| {name} | {buckets} | {' | '.join(cells)} | {equals} |")
    return "\n".join(lines) + "\n"


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the losses of all runs, and how far each is from that of one rank."""
    results = report["results"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    shown, found = next(iter(results.items()))
    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]
    steps = np.arange(1, report["steps"] + 1)
    for k, (name, entry) in enumerate(found.items()):
        # Thick below, thin on top: curves that are one show as nested stripes.
        width = 1.2 * (len(found) - k)
        left.plot(steps, entry["losses"], color=colours[k], linewidth=width, label=name)
    left.set(yscale="log", xlabel="step", ylabel=f"training loss, {shown}")
    left.legend(frameon=False, fontsize=7)
    for dtype, style in zip(results, ("-", "--"), strict=False):
        reference = np.array(results[dtype][REFERENCE]["losses"])
        for k, (name, entry) in enumerate(results[dtype].items()):
            difference = np.abs(np.array(entry["losses"]) / reference - 1)
            if name != REFERENCE:
                # A logarithm shows no zero: the smallest step of the dtype stands in.
                least = np.finfo(dtype).eps / 2
                right.plot(
                    steps,
                    np.maximum(difference, least),
                    style,
                    color=colours[k],
                    linewidth=0.6 + 0.4 * (len(found) - k),
                )
        right.plot([], [], style, color="0.3", label=dtype)
    right.set(yscale="log", xlabel="step")
    right.set_ylabel(f"|loss / loss of {REFERENCE} - 1|")
    right.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


@click.command(context_settings=terminal.HELP)
@click.option("--network", type=click.Choice(list(NETWORKS)), default="tiny")
@click.option("--steps", type=click.IntRange(UNTIMED_STEPS + 1), default=60)
@click.option("--batch", type=click.IntRange(4), default=16, help="over all ranks")
@click.option("--samples", type=click.IntRange(4), default=160)
@click.option(
    "--run",
    "chosen",
    metavar="NAME",
    type=click.Choice(list(RUNS)),
    multiple=True,
    help=f"only this, beside {REFERENCE}; may be repeated: {'; '.join(RUNS)}",
)
@click.option(
    "--dtype",
    "dtypes",
    type=click.Choice(DTYPES),
    multiple=True,
    default=DTYPES,
    show_default=True,
)
@data_option
@click.option("--out", type=click.Path(path_type=Path), default="out/equality")
def main(
    network: str,
    steps: int,
    batch: int,
    samples: int,
    chosen: tuple[str, ...],
    dtypes: tuple[str, ...],
    data_dir: Path,
    out: Path,
) -> None:
    """Train in all ways and compare.

    The exit code is 1 where what must be equal is not.
    """
    console = terminal.console(stderr=True)
    names = [name for name in RUNS if not chosen or name in (REFERENCE, *chosen)]
    simulate(data_config(samples), data_dir, os.cpu_count() or 1, console)
    common = ["--network", network, "--steps", str(steps), "--batch", str(batch)]
    common += ["--samples", str(samples), "--data", str(data_dir)]
    common += ["--compare-steps", str(steps), "--no-resume"]
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for dtype in dtypes:
        options = [*common, *(["--float64"] if dtype == "float64" else [])]
        found, files = {}, {}
        for number, name in enumerate(names):
            console.print(f"{dtype}: {name}", highlight=False)
            folder = out / "runs" / f"{dtype}-{number}"
            found[name] = train(RUNS[name], folder, options)
            files[name] = folder / f"params_{steps}.npz"
        compare(files, found)
        results[dtype] = found
    wrong = problems(results)
    report = {
        "network": network,
        "steps": steps,
        "batch": batch,
        "tolerance_float64": TOLERANCE,
        "problems": wrong,
        "results": results,
        "versions": versions(),
    }
    (out / "equality.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "equality.md").write_text(markdown(report))
    draw(report, out / "equality.png")
    terminal.markdown(console, markdown(report))
    console.print(f"Report, table and picture: {out}")
    if wrong:
        raise click.ClickException("\n".join(wrong))
