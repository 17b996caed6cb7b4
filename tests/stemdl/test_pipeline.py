"""What `make stemdl` runs, with a network and data that take seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = """
[training]
steps = 20
samples = 16
batch = 8

[network]
name = "toy"
"""


def ran(folder: Path, command: str, *options: str | Path) -> str:
    line = [sys.executable, "-m", "stemdl", command, *options]
    done = subprocess.run(
        line, cwd=folder, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.thorough
@pytest.mark.timeout(700)
def test_simulates_trains_and_evaluates(tmp_path: Path) -> None:
    recipe, out = tmp_path / "few.toml", tmp_path / "out" / "stemdl-few"
    recipe.write_text(RECIPE)
    said = ran(tmp_path, "pipeline", "--recipe", recipe)
    assert "20 steps; no time is known for" in said
    trained, report = out / "run" / "train.json", out / "report.json"
    assert json.loads(trained.read_text())["steps"] == 20
    methods = json.loads(report.read_text())["methods"]
    assert "network" in methods and "ridge, 3x3 full diffraction patterns" in methods
    assert (out / "report.md").exists() and list(out.glob("*.png"))

    # As where the evaluation was cut short: it alone is done again.
    before = trained.stat().st_mtime_ns
    report.unlink()
    assert "its evaluation was cut short" in ran(
        tmp_path, "pipeline", "--recipe", recipe
    )
    assert trained.stat().st_mtime_ns == before and report.exists()

    table = tmp_path / "recipes.json"
    said = ran(tmp_path, "compare", out, "--json", table)
    assert "`few`" in said
    assert json.loads(table.read_text())["few"]["steps"] == 20

    # Another recipe of that name is another training, and so is one that has ended.
    recipe.write_text(RECIPE + "\n[optimizer]\nlr = 0.002\n")
    report.unlink()
    assert "cut short" not in ran(tmp_path, "pipeline", "--recipe", recipe)
    assert trained.stat().st_mtime_ns > before
