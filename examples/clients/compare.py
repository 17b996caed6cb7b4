"""Run every script under both backends and compare: `make examples`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
from rich.table import Table

import backend
from jaxcomm import terminal

HERE = Path(__file__).resolve().parent
# Batch normalisation on so few images magnifies rounding a hundredfold a step: the
# ResNet's parameters are compared in float64.
RUNS = {
    "resnet": ("resnet.py",),
    "resnet-x64": ("resnet.py", "--x64"),
    "transformer": ("transformer.py",),
    "mlp": ("mlp.py",),
}
COMPARED = ("resnet-x64", "transformer", "mlp")
TOLERANCE = 1e-6


@click.command(context_settings=terminal.HELP)
@click.option("--steps", type=click.IntRange(4), default=20, show_default=True)
@click.option("--ranks", type=click.IntRange(1), default=2, show_default=True)
def main(steps: int, ranks: int) -> None:
    """Train each client both ways; fail where parameters differ."""
    launch = [sys.executable, "-m", "jaxcomm", "run", "-n", str(ranks)]
    launch += ["--timeout", "300"]
    for script, *options in RUNS.values():
        line = [str(HERE / script), *options, "--steps", str(steps), "--backend"]
        pmap = [sys.executable, *line, "pmap", "--devices", str(ranks)]
        subprocess.run(pmap, check=True)
        subprocess.run([*launch, *line, "jaxcomm"], check=True)
    found = backend.report(list(RUNS))
    table = Table(title=f"{steps} steps on {ranks} devices")
    table.add_column("client")
    for column in found["mlp"]:
        table.add_column(column, justify="right")
    for name, row in found.items():
        table.add_row(name, *(f"{value:.3g}" for value in row.values()))
    terminal.console().print(table)
    gaps = {name: found[name]["relative difference"] for name in COMPARED}
    if bad := {name: gap for name, gap in gaps.items() if not gap <= TOLERANCE}:
        raise click.ClickException(f"parameters differ by more than {TOLERANCE}: {bad}")


if __name__ == "__main__":
    main()
