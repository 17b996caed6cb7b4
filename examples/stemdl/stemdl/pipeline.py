"""Simulate, train on two ranks, evaluate on held-out materials, report.

`make stemdl` runs it, `make stemdl RECIPE=small` with another recipe.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from jaxcomm import terminal
from stemdl import config
from stemdl.config import SAMPLES, Config

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
RANKS = 2
SHARDS = 4

BUDGETS = {
    "tiny": (2.0, 3.0, 5.0),
    "tiny-probes": (2.0, 3.0, 5.0),
    "tiny-dose": (2.0, 3.0, 5.0),
    "small": (2.0, 30.0, 5.0),
}
"""Minutes on two cores: simulation, training, evaluation."""


def run(title: str, console: Console, *command: str | Path) -> float:
    """Run a step and return its minutes; ends this process where it fails."""
    terminal.heading(console, title)
    began = time.monotonic()
    done = subprocess.run([sys.executable, *map(str, command)], check=False)
    if done.returncode:
        line = " ".join(map(str, command))
        raise click.ClickException(f"exit code {done.returncode} from: {line}")
    return (time.monotonic() - began) / 60


def trained_by(resolved: Config, samples: int, directory: Path) -> bool:
    """Whether a run is this recipe's; on which data, its evaluation looks."""
    training = dataclasses.replace(resolved.training, samples=samples)
    path = directory / "config.toml"
    return config.load(path) == dataclasses.replace(resolved, training=training)


@click.command(context_settings=terminal.HELP)
@click.option(
    "--recipe",
    default="tiny",
    show_default=True,
    help=f"one of {', '.join(BUDGETS)}, or a TOML file",
)
@click.option(
    "--data", type=click.Path(path_type=Path), default="data", show_default=True
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="[default: out/stemdl-RECIPE]"
)
def main(recipe: str, data: Path, out: Path | None) -> None:
    """Run the whole example and leave a report."""
    console = terminal.console(stderr=True)
    named = recipe in BUDGETS
    path = RECIPES / f"{recipe}.toml" if named else Path(recipe)
    try:
        resolved = config.load(path)
    except config.SettingError as error:
        raise click.UsageError(str(error)) from error
    out = out or Path("out") / f"stemdl-{path.stem}"
    samples = resolved.training.samples or SAMPLES
    shards = data / f"shards-{samples}"
    budget = BUDGETS.get(recipe)
    if budget:
        simulation, training, evaluation = budget
        text = (
            f"On two cores: {simulation:g} min of simulation (none if {shards} is "
            f"there), {training:g} min of training, {evaluation:g} min of evaluation"
        )
    else:
        text = f"{resolved.training.steps} steps; no time is known for {path}"
    console.print(text, highlight=False, soft_wrap=True)

    launch = ("-m", "jaxcomm", "run", "-n", str(RANKS))
    simulator = ("-m", "stemdl", "simulate")
    options = ("--samples", str(samples), "--shards", str(SHARDS), "--out", shards)
    spent = [run("1  simulate", console, *launch, *simulator, *options)]
    trainer = ("-m", "stemdl", "train")
    each = max(1, resolved.training.steps // 10)
    options = ("--config", path, "--shards", shards, "--out", out / "run")
    options += ("--evaluate-every", str(each), "--checkpoint-every", str(each))
    title, report = f"2  train on {RANKS} MPI ranks", out / "report.json"
    ended = (out / "run" / "train.json").exists()
    if ended and not report.exists() and trained_by(resolved, samples, out / "run"):
        console.print(f"{out / 'run'} is trained; its evaluation was cut short")
        spent.append(0.0)
    else:
        report.unlink(missing_ok=True)
        # One that was cut short goes on; one that has ended is done again.
        options += ("--no-resume",) if ended else ()
        spent.append(run(title, console, *launch, *trainer, *options))
    options = ("--run", out / "run", "--shards", shards, "--out", out)
    options += ("--strongest", "--orientations")
    title = "3  evaluate on materials the network has never seen"
    spent.append(run(title, console, "-m", "stemdl", "evaluate", *options))

    table = Table("step", "minutes", "budget")
    for k, name in enumerate(("simulation", "training", "evaluation")):
        table.add_row(name, f"{spent[k]:.1f}", f"{budget[k]:g}" if budget else "")
    console.print(table)
    console.print(f"report: {out / 'report.md'}", highlight=False, soft_wrap=True)
