"""The STEMDL example trains the same, however gradients travel."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

import equality

ONE_BUCKET, SCOPES = "2 ranks, one bucket", "2 ranks, a bucket per scope"
TOY = ("--network", "toy", "--steps", "6", "--batch", "8", "--samples", "16")


# Half of the time is XLA's optimiser, which has little to do here.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


@pytest.fixture(autouse=True)
def _compile_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", FLAGS)


def run(folder: Path, *options: str) -> tuple[Result, dict[str, Any]]:
    out = folder / "out"
    line = [*options, "--data", str(folder / "data"), "--out", str(out)]
    done = CliRunner().invoke(equality.main, line)
    assert done.exit_code == 0, done.output
    return done, json.loads((out / "equality.json").read_text())


@pytest.mark.timeout(300)
def test_one_rank_and_two_whatever_the_buckets(tmp_path: Path) -> None:
    chosen = ("--run", ONE_BUCKET, "--run", SCOPES, "--dtype", "float64")
    report = run(tmp_path, *TOY, *chosen)[1]
    found = report["results"]["float64"]
    assert list(found) == [equality.REFERENCE, ONE_BUCKET, SCOPES]
    for entry in found.values():
        assert entry["difference"] <= 1e-10
        assert len(entry["losses"]) == 6
    # The program with other buckets is another one, and its parameters are not.
    assert found[SCOPES]["equals"] == {"run": ONE_BUCKET, "bitwise": True}
    assert found[SCOPES]["buckets"] > found[ONE_BUCKET]["buckets"]
    assert not report["problems"]
    assert (tmp_path / "out/equality.md").read_text() == equality.markdown(report)
    assert (tmp_path / "out/equality.png").stat().st_size > 10_000
    check_that_differences_are_found(report["results"])
    files = tmp_path / "out/runs"
    check_bits(files / "float64-1/params_6.npz", tmp_path / "changed.npz")


def check_that_differences_are_found(results: dict[str, Any]) -> None:
    def after(name: str, key: str, value: Any) -> str:
        changed = copy.deepcopy(results)
        changed["float64"][name][key] = value
        (found,) = equality.problems(changed)
        return found

    assert "by 1.0e-09, more than 1e-10" in after(ONE_BUCKET, "difference", 1e-9)
    assert "by nan, more than" in after(SCOPES, "difference", math.nan)
    unequal = {"run": ONE_BUCKET, "bitwise": False}
    assert f"not bitwise equal to {ONE_BUCKET}" in after(SCOPES, "equals", unequal)
    same = results["float64"][ONE_BUCKET]["schedule"]
    assert f"the same buckets as {ONE_BUCKET}" in after(SCOPES, "schedule", same)


def check_bits(path: Path, changed: Path) -> None:
    assert equality.bitwise_equal(path, path)
    with np.load(path) as file:
        arrays = dict(file)
    key = next(iter(arrays))
    arrays[key] = np.nextafter(arrays[key], np.inf)
    np.savez(changed, **arrays)
    assert not equality.bitwise_equal(path, changed)


@pytest.mark.thorough
def test_a_training_that_fails_shows_its_output(tmp_path: Path) -> None:
    options = ["--steps", "many"]
    with pytest.raises(click.ClickException, match="'many' is not a valid integer"):
        equality.train(equality.RUNS["2 devices, pmap"], tmp_path, options)


@pytest.mark.thorough
@pytest.mark.timeout(1500)
def test_all_ways_in_both_dtypes(tmp_path: Path) -> None:
    report = run(tmp_path, *TOY)[1]
    assert list(report["results"]) == ["float32", "float64"]
    for found in report["results"].values():
        assert list(found) == list(equality.RUNS)
        equals = [name for name, entry in found.items() if entry["equals"]]
        assert equals == [ONE_BUCKET, SCOPES, "4 ranks, a bucket per scope"]
