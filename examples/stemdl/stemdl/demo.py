"""The whole path in a few minutes: simulate, plan, train, compare with pmap, evaluate.

`make demo` runs it. Everything it reports is measured while it runs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from jaxcomm import terminal
from stemdl.config import versions
from stemdl.data.cache import data_config, data_option, simulate
from stemdl.data.dataset import load
from stemdl.evaluation.baselines import baselines
from stemdl.evaluation.evaluate import evaluate
from stemdl.model.network import NETWORKS
from stemdl.training import parameters

RANKS = 2
STEPS, SAMPLES = 1600, 1500
PMAP_STEPS = 200
COMPARE_STEPS = 20
RUNS = ("jaxcomm", "pmap", "jaxcomm64", "pmap64")
RESULTS = ("report.json", "reconstruction.png", "loss.png", "schedule.txt")
TRAIN = ("-m", "stemdl", "train")


def on_ranks(out: Path, *options: str) -> dict[str, Any]:
    """Train on MPI ranks through jaxcomm; returns what `stemdl train` reports."""
    launch = [sys.executable, "-m", "jaxcomm", "run", "-n", str(RANKS)]
    return _train([*launch, *TRAIN, *options, "--out", str(out)], out)


def under_pmap(out: Path, *options: str) -> dict[str, Any]:
    """The same in one process on as many host devices."""
    devices = f"--xla_force_host_platform_device_count={RANKS}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {devices}".strip()
    command = [sys.executable, *TRAIN, "--backend", "pmap", *options]
    return _train([*command, "--out", str(out)], out, XLA_FLAGS=flags)


def _train(command: list[str], out: Path, **environment: str) -> dict[str, Any]:
    finished = subprocess.run(command, env=os.environ | environment)
    if finished.returncode:
        raise click.ClickException(
            f"training failed with exit code {finished.returncode}: {' '.join(command)}"
        )
    return json.loads((out / "train.json").read_text())


def difference(ranks: Path, devices: Path) -> float:
    """Largest relative difference of two runs' parameters after `COMPARE_STEPS`."""
    name = f"params_{COMPARE_STEPS}.npz"
    return parameters.max_relative_difference(ranks / name, devices / name)


def show(console: Console, report: dict[str, Any]) -> None:
    """Print the report's figures."""
    table = Table("on held-out materials", "NRMSE (0 perfect, 1 = the mean)")
    for name, score in report["baselines"].items():
        table.add_row(name, f"{score:.3f}")
    table.add_row(
        f"network, {report['steps']} steps", f"{report['nrmse']:.3f}", style="bold"
    )
    console.print(table)
    table = Table("training", "samples/s")
    table.add_row(f"jaxcomm, {RANKS} MPI ranks", f"{report['samples_per_s']:.0f}")
    table.add_row(
        f"jax.pmap, {RANKS} host devices", f"{report['pmap_samples_per_s']:.0f}"
    )
    console.print(table)
    console.print(
        f"Parameters after {COMPARE_STEPS} steps differ from pmap's by at most "
        f"{report['pmap_max_relative_difference']:.1e} of a leaf's largest value in "
        f"float32, {report['pmap_max_relative_difference_float64']:.1e} in float64."
    )
    console.print(
        f"Control messages per step: {report['control_messages_per_step']:g}; "
        f"schedule {report['schedule_fingerprint'][:16]}"
    )


@click.command(context_settings=terminal.HELP)
@click.option(
    "--steps", type=click.IntRange(COMPARE_STEPS + 4), default=STEPS, show_default=True
)
@click.option(
    "--network", type=click.Choice(list(NETWORKS)), default="tiny", show_default=True
)
@data_option
@click.option(
    "--out", type=click.Path(path_type=Path), default="out/demo", show_default=True
)
def main(steps: int, network: str, data_dir: Path, out: Path) -> None:
    """Train a small STEMDL network on two MPI ranks.

    Then show what it learned.
    """
    console = terminal.console(stderr=True)
    runs = out / "runs"
    # Results of an earlier demo must not pass for this one's; others' files stay.
    for name in RUNS:
        shutil.rmtree(runs / name, ignore_errors=True)
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)
    runs.mkdir(parents=True, exist_ok=True)
    # A demo cut short trains on fewer samples as well.
    samples = min(SAMPLES, max(160, SAMPLES * steps // STEPS))
    config = data_config(samples)

    terminal.heading(console, "1  simulate diffraction")
    simulate(config, data_dir, os.cpu_count() or 1, console)
    console.print(f"{config.samples} samples in {config.path(data_dir)}")
    common = ("--samples", str(samples), "--data", str(data_dir))
    common += ("--network", network)
    common += ("--compare-steps", str(COMPARE_STEPS), "--steps", str(steps))

    terminal.heading(console, f"2  train on {RANKS} MPI ranks: jaxcomm")
    ours = on_ranks(runs / "jaxcomm", *common)

    terminal.heading(
        console, f"3  train the same under jax.pmap on {RANKS} host devices"
    )
    pmap = under_pmap(runs / "pmap", *common, "--stop", str(min(steps, PMAP_STEPS)))

    terminal.heading(
        console, "4  both once more, briefly, in float64: is the difference rounding?"
    )
    double = (*common, "--float64", "--stop", str(COMPARE_STEPS))
    on_ranks(runs / "jaxcomm64", *double)
    under_pmap(runs / "pmap64", *double)

    terminal.heading(console, "5  evaluate on materials the network has never seen")
    dataset = load(config, data_dir)
    scores = evaluate(dataset, runs / "jaxcomm", out)
    shutil.copy(runs / "jaxcomm" / "schedule.txt", out)
    report = {
        **{key: ours[key] for key in ("ranks", "steps", "batch", "seconds")},
        "samples_per_s": ours["samples_per_s"],
        **scores,
        "baselines": baselines(dataset),
        "pmap_steps": pmap["steps"],
        "pmap_samples_per_s": pmap["samples_per_s"],
        "pmap_max_relative_difference": difference(runs / "jaxcomm", runs / "pmap"),
        "pmap_max_relative_difference_float64": difference(
            runs / "jaxcomm64", runs / "pmap64"
        ),
        "schedule_fingerprint": ours["schedule_fingerprint"],
        "control_messages_per_step": ours["control_messages_per_step"],
        "versions": versions(),
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    show(console, report)
    console.print(f"Report, pictures and schedule: {out}")
