"""Run every script in all of its ways and compare: `make examples`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
from rich.table import Table

import backend
from jaxcomm import terminal

HERE = Path(__file__).resolve().parent
PMAP, ALL = ("pmap", "jaxcomm"), tuple(backend.WAYS)
# Batch normalisation on so few images magnifies rounding a hundredfold a step: the
# ResNet's parameters are compared in float64. So are the actor-critic's, where one
# action that hangs on the last bit changes all that follows.
RUNS = {
    "resnet": (PMAP, "resnet.py"),
    "resnet-x64": (PMAP, "resnet.py", "--x64"),
    "transformer": (PMAP, "transformer.py"),
    "mlp": (PMAP, "mlp.py"),
    "vit": (ALL, "vit.py"),
    "actor_critic": (ALL, "actor_critic.py"),
    "actor_critic-x64": (ALL, "actor_critic.py", "--x64"),
    "language_model": (ALL, "language_model.py"),
    "language_model-resumed": (ALL, "language_model.py", "--resume"),
}
COMPARED = RUNS.keys() - {"resnet", "actor_critic"}
TOLERANCE = 1e-6


def same(name: str, other: str, way: str) -> None:
    """Fail where two scripts' parameters are not the same bits."""
    mine, theirs = (backend.load(one, way)[0] for one in (name, other))
    if not all(np.array_equal(mine[leaf], theirs[leaf]) for leaf in theirs):
        raise click.ClickException(f"{name} differs from {other} under {way}")


@click.command(context_settings=terminal.HELP)
@click.option("--steps", type=click.IntRange(4), default=20, show_default=True)
@click.option("--ranks", type=click.IntRange(1), default=2, show_default=True)
@click.option("--only", type=click.Choice(list(RUNS)), multiple=True)
def main(steps: int, ranks: int, only: tuple[str, ...]) -> None:
    """Train each client in its ways; fail where losses or parameters differ."""
    launch = [sys.executable, "-m", "jaxcomm", "run", "-n", str(ranks)]
    launch += ["--timeout", "300"]
    runs = {name: run for name, run in RUNS.items() if name in (only or RUNS)}
    for ways, script, *options in runs.values():
        for way in ways:
            line = [str(HERE / script), *options, "--steps", str(steps)]
            line += ["--backend", way, "--devices", str(ranks)]
            start = launch if way.startswith("jaxcomm") else [sys.executable]
            subprocess.run([*start, *line], check=True)

    found = {name: backend.compare(name, run[0]) for name, run in runs.items()}
    (backend.OUT / "report.json").write_text(json.dumps(found, indent=1) + "\n")
    table = Table(title=f"{steps} steps on {ranks} devices")
    for column in ("client", "way"):
        table.add_column(column)
    for column in next(iter(found.values()))["pmap"]:
        table.add_column(column, justify="right")
    for name, rows in found.items():
        for way, row in rows.items():
            table.add_row(name, way, *(f"{value:.3g}" for value in row.values()))
    terminal.console().print(table)

    bad = [
        f"{name} under {way}"
        for name in found.keys() & COMPARED
        for way, row in found[name].items()
        if not max(list(row.values())[:2]) <= TOLERANCE
    ]
    if bad:
        raise click.ClickException(f"differ from pmap by more than {TOLERANCE}: {bad}")
    if found.keys() >= {"language_model", "language_model-resumed"}:
        for way in ALL:
            same("language_model-resumed", "language_model", way)


if __name__ == "__main__":
    main()
