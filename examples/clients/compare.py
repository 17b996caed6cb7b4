"""Run every script under both backends and compare: `make examples`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

import backend

HERE = Path(__file__).resolve().parent
NAMES = ["resnet", "transformer", "mlp"]
TOLERANCE = 1e-6


@click.command()
@click.option("--steps", type=click.IntRange(4), default=20, show_default=True)
@click.option("--ranks", type=click.IntRange(1), default=2, show_default=True)
def main(steps: int, ranks: int) -> None:
    """Train each client both ways; fail where parameters differ."""
    for name in NAMES:
        script = str(HERE / f"{name}.py")
        count = ["--steps", str(steps)]
        pmap = [script, "--backend", "pmap", "--devices", str(ranks), *count]
        subprocess.run([sys.executable, *pmap], check=True)
        launch = [sys.executable, "-m", "jaxcomm", "run", "-n", str(ranks)]
        line = [*launch, "--timeout", "300", script, "--backend", "jaxcomm", *count]
        subprocess.run(line, check=True)
    found = backend.report(NAMES)
    table = Table(title=f"{steps} steps on {ranks} devices")
    table.add_column("client")
    for column in found[NAMES[0]]:
        table.add_column(column, justify="right")
    for name, row in found.items():
        table.add_row(name, *(f"{value:.3g}" for value in row.values()))
    Console().print(table)
    gaps = {name: row["largest relative difference"] for name, row in found.items()}
    if bad := {name: gap for name, gap in gaps.items() if not gap <= TOLERANCE}:
        raise click.ClickException(f"parameters differ by more than {TOLERANCE}: {bad}")


if __name__ == "__main__":
    main()
