"""The STEMDL example trains the same, however gradients travel."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from stemdl.data import dataset
from stemdl.data.cache import data_config
from stemdl.training import equality, parameters

pytestmark = pytest.mark.long

PLAIN, SCOPES = "2 ranks", "2 ranks, a bucket per scope"
SAMPLES = 16
SHORT = ("--steps", "4", "--batch", "4", "--samples", str(SAMPLES))


def run(folder: Path, *options: str) -> dict[str, Any]:
    """Compare on numbers drawn at random: they are there sooner than diffraction."""
    wanted, rng = data_config(SAMPLES), np.random.default_rng(0)
    probes, pixels = wanted.optics.probes, wanted.optics.label_pixels
    x = rng.random((wanted.samples, probes, probes, 25, 25), np.float32)
    y = rng.normal(size=(wanted.samples, pixels, pixels)).astype(np.float32)
    names = np.array([wanted.material(k) for k in range(wanted.samples)])
    arrays = {"amplitudes": x, "labels": y, "material": names}
    dataset.save(wanted, arrays, folder / "data")
    out = folder / "out"
    line = [*options, "--data", str(folder / "data"), "--out", str(out)]
    done = CliRunner().invoke(equality.main, line)
    assert done.exit_code == 0, done.output
    return json.loads((out / "equality.json").read_text())


@pytest.mark.thorough  # test_demo compares with pmap
@pytest.mark.timeout(300)
def test_one_rank_and_two(tmp_path: Path) -> None:
    # All ways, and what is bitwise equal: thorough, below.
    options = ("--network", "toy", "--run", PLAIN, "--run", SCOPES)
    report = run(tmp_path, *SHORT, *options, "--dtype", "float64")
    found = report["results"]["float64"]
    assert list(found) == [equality.REFERENCE, PLAIN, SCOPES]
    assert found[SCOPES]["equals"] == {"run": PLAIN, "bitwise": True}
    for entry in found.values():
        assert entry["difference"] <= 1e-10
        assert len(entry["losses"]) == 4
    assert found[SCOPES]["difference"] > 0
    assert found[SCOPES]["buckets"] > found[equality.REFERENCE]["buckets"]
    assert not report["problems"]
    assert (tmp_path / "out/equality.md").read_text() == equality.markdown(report)
    assert (tmp_path / "out/equality.png").stat().st_size > 10_000


def test_what_must_not_be_is_found() -> None:
    def after(**changed: Any) -> list[str]:
        first = {"difference": 1e-12, "equals": None, "schedule": "a"}
        second = {**first, "schedule": "b"}
        second["equals"] = {"run": PLAIN, "bitwise": True}
        found = {PLAIN: first, SCOPES: {**second, **changed}}
        return equality.problems({"float64": found})

    assert after() == []
    (text,) = after(difference=1e-9)
    assert f"{SCOPES}, float64" in text and "by 1.0e-09, more than 1e-10" in text
    assert "by nan, more than" in after(difference=math.nan)[0]
    (text,) = after(equals={"run": "2 ranks", "bitwise": False})
    assert "not bitwise equal to 2 ranks" in text
    assert "the same buckets as 2 ranks" in after(schedule="a")[0]


def test_one_bit_is_a_difference(tmp_path: Path) -> None:
    same, other = tmp_path / "same.npz", tmp_path / "other.npz"
    tree = {"w": np.ones(3), "b": np.zeros(2)}
    parameters.save(same, tree)
    assert equality.bitwise_equal(same, same)
    parameters.save(other, {**tree, "w": np.nextafter(tree["w"], 2)})
    assert not equality.bitwise_equal(same, other)
    # Zeros of another sign are equal numbers and other bits.
    parameters.save(other, {**tree, "b": -tree["b"]})
    assert not equality.bitwise_equal(same, other)
    parameters.save(other, {"w": tree["w"]})
    assert not equality.bitwise_equal(same, other)


@pytest.mark.thorough
def test_a_training_that_fails_shows_its_output(tmp_path: Path) -> None:
    options = ["--steps", "many"]
    with pytest.raises(click.ClickException, match="'many' is not a valid integer"):
        equality.train(equality.RUNS["2 devices, pmap"], tmp_path, options)


@pytest.mark.thorough
@pytest.mark.timeout(1500)
def test_all_ways_in_both_dtypes(tmp_path: Path) -> None:
    report = run(tmp_path, *SHORT, "--network", "toy")
    assert list(report["results"]) == ["float32", "float64"]
    for found in report["results"].values():
        assert list(found) == list(equality.RUNS)
        equals = [name for name, entry in found.items() if entry["equals"]]
        wanted = ["2 ranks, one bucket", SCOPES, "4 ranks, a bucket per scope"]
        assert equals == wanted
