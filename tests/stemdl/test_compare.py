"""The table of several trainings of the STEMDL example."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest

from stemdl.config import load
from stemdl.evaluation import comparison
from stemdl.training.step_log import COLUMNS


def left_by(folder: Path, nrmse: float, column_error: float | None) -> Path:
    """What of a training's files the table is made from."""
    scores: dict[str, Any] = {
        "nrmse_mean": nrmse,
        "ssim_mean": 0.9,
        "columns_found": 0.97,
        "columns_false": 0.02,
        "column_error_median_A": column_error,
        "resolution_0.5_median_A": "inf",
    }
    methods = {"mean label": {**scores, "nrmse_mean": 1.0}, "network": scores}
    doses = ["inf", 1e6, 1e5, 1e4]
    report = {
        "settings": {"orientations averaged": 8},
        "methods": methods,
        "materials": {"Pd": {"samples": 1, "methods": methods}},
        "dose": [{"electrons_per_pattern": d, "methods": methods} for d in doses],
        "consistency": {"r_mean": {"network": 0.1}},
    }
    run = folder / "run"
    run.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(report))
    (run / "config.toml").write_text(load(None, ["network.layout=probes"]).to_toml())
    (run / "train.json").write_text(json.dumps({"steps": 160, "seconds": 9.87}))
    lines = [",".join(COLUMNS)]
    # The first is compilation.
    for step, milliseconds in ((20, 900), (120, 50), (140, 60), (160, 70)):
        lines.append(f"{step},0.5,{milliseconds},0.5,2,48,,")
    (run / "metrics.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_a_line_for_each_training(tmp_path: Path) -> None:
    one = left_by(tmp_path / "stemdl-one", 0.25, 0.03)
    other = left_by(tmp_path / "stemdl-other", 0.5, None)
    found = {folder.name: comparison.summary(folder) for folder in (one, other)}
    assert found["stemdl-one"]["layout"] == "probes"
    assert found["stemdl-one"]["step_ms"] == 60
    assert found["stemdl-one"]["columns_found_by_material"] == {"Pd": 0.97}
    text = comparison.markdown(found).splitlines()
    assert text[2].startswith("| mean label |  |  |  | 1.000 |")
    assert text[3:] == [
        "| `stemdl-one` | 160 | 60 | 8 | 0.250 | 0.90 | 0.970 | 0.020 | 0.030 |  "
        "| 0.25 | 0.25 |",
        "| `stemdl-other` | 160 | 60 | 8 | 0.500 | 0.90 | 0.970 | 0.020 |  |  "
        "| 0.50 | 0.50 |",
    ]


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    folder = left_by(tmp_path / "stemdl-one", 0.25, 0.03)
    (folder / "run/metrics.csv").unlink()
    with pytest.raises(click.UsageError, match=r"metrics\.csv does not exist"):
        comparison.summary(folder)
