"""The STEMDL example: its physics, its data, and the whole demo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from stemdl.data import augmentation, dataset
from stemdl.evaluation.metrics import nrmse
from stemdl.model.network import StemNet
from stemdl.physics import crystals
from stemdl.training import parameters
from tests.jobs import ROOT

pytestmark = pytest.mark.long

CONFIG = dataset.DataConfig(train=4, test=2)


@pytest.fixture(scope="module")
def samples() -> dataset.Arrays:
    return dataset.simulate_part(CONFIG, 0, 1)


def test_a_sample_does_not_depend_on_who_simulates_it(
    samples: dataset.Arrays,
) -> None:
    parts = [dataset.simulate_part(CONFIG, part, 2) for part in range(2)]
    joined = dataset.join(parts)
    for key, array in samples.items():
        np.testing.assert_array_equal(joined[key], array)


def test_patterns_hold_no_more_than_the_beam(samples: dataset.Arrays) -> None:
    beam = (samples["amplitudes"].astype(np.float64) ** 2).sum((-2, -1))
    assert beam.max() < 1.001
    # The band limit and the detector's edge lose some, most close to heavy columns.
    assert beam.mean() > 0.85


def test_labels_are_standardised(samples: dataset.Arrays) -> None:
    np.testing.assert_allclose(samples["labels"].mean((-2, -1)), 0, atol=1e-5)
    np.testing.assert_allclose(samples["labels"].std((-2, -1)), 1, rtol=1e-5)


def test_held_out_materials_are_never_trained_on() -> None:
    assert not set(crystals.materials(True)) & set(crystals.materials(False))


def test_augmentation_moves_scan_detector_and_label_together(
    samples: dataset.Arrays,
) -> None:
    x = np.repeat(samples["amplitudes"][:1], augmentation.SYMMETRIES, axis=0)
    image = x.sum((-2, -1))
    symmetries = np.arange(augmentation.SYMMETRIES)
    moved_x, moved_image = augmentation.augment(x, image, symmetries)
    # The image that a detector sums up is a label on the scan's own grid.
    np.testing.assert_allclose(moved_x.sum((-2, -1)), moved_image, rtol=1e-5)
    pattern = np.repeat(x[:1].sum((1, 2)), augmentation.SYMMETRIES, axis=0)
    moved_pattern = augmentation.augment(x, pattern, symmetries)[1]
    np.testing.assert_allclose(moved_x.sum((1, 2)), moved_pattern, rtol=1e-5)
    assert len(np.unique(moved_x, axis=0)) == augmentation.SYMMETRIES


def test_reconstructions_are_turned_back_before_they_are_averaged(
    samples: dataset.Arrays,
) -> None:
    x = samples["amplitudes"]
    seen = []

    def predict(patterns: np.ndarray) -> np.ndarray:
        seen.append(patterns)
        image = patterns.sum((-2, -1))
        image[:, 0, 0] = 0  # not the same in every orientation
        return image

    image = x.sum((-2, -1))
    corners = np.ones_like(image)
    corners[:, [0, 0, -1, -1], [0, -1, 0, -1]] = 3 / 4  # each is 0 in two of eight
    found = augmentation.averaged(predict, x)
    np.testing.assert_allclose(found, corners * image, rtol=1e-5)
    assert len({patterns.tobytes() for patterns in seen}) == augmentation.SYMMETRIES


def test_a_bad_cache_is_named(tmp_path: Path, samples: dataset.Arrays) -> None:
    with pytest.raises(FileNotFoundError, match=r"stemdl cache"):
        dataset.load(CONFIG, tmp_path)
    path = dataset.save(CONFIG, samples, tmp_path)
    assert len(dataset.load(CONFIG, tmp_path).test_x) == CONFIG.test
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(dataset.CacheError, match=path.name):
        dataset.load(CONFIG, tmp_path)
    dataset.save(dataset.DataConfig(train=3, test=3), samples, tmp_path).replace(path)
    with pytest.raises(dataset.CacheError, match="another configuration"):
        dataset.load(CONFIG, tmp_path)


def test_the_network_has_the_size_it_claims(tmp_path: Path) -> None:
    x = jax.ShapeDtypeStruct((1, 4, 4, 25, 25), np.float32)
    shapes = jax.eval_shape(StemNet().init, jax.random.key(0), x)["params"]
    leaves = jax.tree.leaves(shapes)
    assert (len(leaves), sum(leaf.size for leaf in leaves)) == (35, 420_992)
    parameters.save(tmp_path / "p.npz", {"w": np.ones(3)})
    with pytest.raises(ValueError, match="Freq2Space"):
        parameters.load(tmp_path / "p.npz", shapes)


def test_nrmse_is_one_for_the_mean() -> None:
    truth = np.random.default_rng(0).normal(size=(2, 8, 8))
    truth -= truth.mean((-2, -1), keepdims=True)
    np.testing.assert_allclose(nrmse(np.zeros_like(truth), truth), 1)
    np.testing.assert_allclose(nrmse(truth, truth), 0)


@pytest.mark.timeout(500)
def test_demo(tmp_path: Path) -> None:
    steps = 40
    command = [sys.executable, "-m", "jaxcomm", "demo", "--steps", str(steps)]
    command += [
        "--network",
        "toy",
        "--out",
        tmp_path / "out",
        "--data",
        tmp_path / "data",
    ]
    (tmp_path / "out/runs/mine").mkdir(parents=True)
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=480, check=False
    )
    assert (tmp_path / "out/runs/mine").is_dir()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["ranks"] == 2
    assert report["steps"] == steps
    assert report["control_messages_per_step"] == 0
    assert report["samples_per_s"] > 0
    assert report["pmap_samples_per_s"] > 0
    # In float32 rounding differs by the order of summation; in float64 it is nothing.
    assert report["pmap_max_relative_difference"] < 0.1
    assert report["pmap_max_relative_difference_float64"] < 1e-10
    # So short a training beats the mean; the whole demo beats every baseline.
    assert report["nrmse"] < report["baselines"]["mean label"]
    assert (
        report["schedule_fingerprint"][:12]
        in (tmp_path / "out/schedule.txt").read_text()
    )
    for picture in ("reconstruction.png", "loss.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 10_000
