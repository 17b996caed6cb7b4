"""One table of several trainings, from what `make stemdl` has left of each.

python -m stemdl compare out/stemdl-* --json docs/stemdl-recipes.json
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from jaxcomm import terminal
from stemdl import config
from stemdl.evaluation.report import NETWORK

# The first lines of metrics.csv hold compilation.
WARM_UP_STEPS = 100

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("steps", "steps", "d"),
    ("step_ms", "step, ms", ".0f"),
    ("orientations", "orientations", "d"),
    ("nrmse", "NRMSE", ".3f"),
    ("ssim", "SSIM", ".2f"),
    ("found", "columns found", ".3f"),
    ("false", "false", ".3f"),
    ("error_A", "error, Å", ".3f"),
    ("resolution_A", "FRC 0.5, Å", ".2f"),
    ("nrmse_1e5", "at 10^5 e", ".2f"),
    ("nrmse_1e4", "at 10^4 e", ".2f"),
)


def times(run: Path) -> dict[str, float]:
    """Medians of metrics.csv's lines: a step, and what of it waits for data.

    Of a training that has hardly begun, nothing.
    """
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["step"]) > WARM_UP_STEPS]
    keys = ("step_ms", "data_ms", "communication_ms") if rows else ()
    found = {key: statistics.median(float(row[key]) for row in rows) for key in keys}
    return {key: round(value, 3) for key, value in found.items()}


def figures(report: dict[str, Any], method: str) -> dict[str, float]:
    """A method's figures on all held-out samples, without noise and with."""
    scores = report["methods"][method]
    dose = {str(d["electrons_per_pattern"]): d["methods"] for d in report["dose"]}
    return {
        "nrmse": scores["nrmse_mean"],
        "ssim": scores["ssim_mean"],
        "found": scores["columns_found"],
        "false": scores["columns_false"],
        "error_A": scores["column_error_median_A"],
        "resolution_A": scores["resolution_0.5_median_A"],
        "nrmse_1e5": dose["100000.0"][method]["nrmse_mean"],
        "nrmse_1e4": dose["10000.0"][method]["nrmse_mean"],
    }


def summary(folder: Path) -> dict[str, Any]:
    """What one training was and reached.

    Raises:
      click.UsageError: it is not what `make stemdl` leaves, or not all of it.
    """
    run = folder / "run"
    for path in (folder / "report.json", run / "config.toml", run / "metrics.csv"):
        if not path.exists():
            raise click.UsageError(f"{path} does not exist; `make stemdl` leaves it")
    report = json.loads((folder / "report.json").read_text())
    resolved = config.load(run / "config.toml")
    trained = json.loads((run / "train.json").read_text())
    return {
        "settings": report["settings"],
        "layout": resolved.network.layout,
        "steps": trained["steps"],
        "orientations": report["settings"].get("orientations averaged", 1),
        "training_s": round(trained["seconds"], 1),
        **times(run),
        "columns_found_by_material": {
            name: entry["methods"][NETWORK]["columns_found"]
            for name, entry in report["materials"].items()
        },
        "methods": {name: figures(report, name) for name in report["methods"]},
        "r_factor": report["consistency"]["r_mean"],
    }


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """A line for each training, and one for each baseline of the first."""
    lines = [
        "| | " + " | ".join(title for _, title, _ in COLUMNS) + " |",
        "|---|" + "--:|" * len(COLUMNS),
    ]

    def line(name: str, values: dict[str, Any]) -> str:
        cells = (
            format(values[key], kind) if values.get(key) not in (None, "inf") else ""
            for key, _, kind in COLUMNS
        )
        return f"| {name} | " + " | ".join(cells) + " |"

    first = next(iter(found.values()))
    lines += [
        line(name, values)
        for name, values in first["methods"].items()
        if name != NETWORK
    ]
    lines += [
        line(f"`{name}`", entry | entry["methods"][NETWORK])
        for name, entry in found.items()
    ]
    return "\n".join(lines)


@click.command(context_settings=terminal.HELP)
@click.argument(
    "folders", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path)
)
@click.option("--json", "target", type=click.Path(path_type=Path), help="write it too")
def main(folders: Sequence[Path], target: Path | None) -> None:
    """Compare trainings that `make stemdl` has left in FOLDERS."""
    found = {folder.name.removeprefix("stemdl-"): summary(folder) for folder in folders}
    if target:
        target.write_text(json.dumps(found, indent=1) + "\n")
    click.echo(markdown(found))
