"""The STEMDL example's evaluation: scores against closed forms, and a whole report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click
import jax
import numpy as np
import pytest
from rich.console import Console

import jaxcomm
from stemdl.config import Config, Network, Training
from stemdl.data import dataset, simulation
from stemdl.data.cache import data_config
from stemdl.evaluation import (
    baselines,
    columns,
    consistency,
    evaluate,
    ridge,
    robustness,
    sites,
)
from stemdl.evaluation.metrics import nrmse
from stemdl.evaluation.ring_correlation import resolution, ring_correlation
from stemdl.evaluation.similarity import ssim
from stemdl.physics.optics import Optics
from stemdl.training import parameters, recipe

SAMPLING = 0.25
CONFIG = data_config(16)
OPTICS = CONFIG.optics


def noise(seed: int, samples: int = 100) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(samples, 32, 32))


def columns_at(positions: np.ndarray, heights: np.ndarray | float = 4.0) -> np.ndarray:
    """Gaussians of 0.35 A at (m, 2) positions in A over a background of -1."""
    axis = (np.arange(32) + 0.5) * SAMPLING
    waves = np.exp(-((positions[..., None] - axis) ** 2) / (2 * 0.35**2))
    heights = np.broadcast_to(heights, len(positions))
    return np.einsum("m,mx,my->xy", heights, waves[:, 0], waves[:, 1]) - 1


@pytest.fixture(scope="module")
def samples() -> dataset.Arrays:
    return dataset.simulate_part(CONFIG, 0, 1)


@pytest.fixture(scope="module")
def data(
    samples: dataset.Arrays, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dataset.Dataset, Path]:
    directory = tmp_path_factory.mktemp("data")
    dataset.save(CONFIG, samples, directory)
    return dataset.load(CONFIG, directory), directory


def test_ring_correlation_of_equal_images_is_one_and_of_noise_none() -> None:
    x = noise(0)
    frequencies, same = ring_correlation(x, x, SAMPLING)
    np.testing.assert_allclose(frequencies, np.arange(1, 16) / 8)
    np.testing.assert_allclose(same, 1)
    np.testing.assert_allclose(ring_correlation(-3 * x, x, SAMPLING)[1], -1)
    _, other = ring_correlation(noise(1), x, SAMPLING)
    # Few coefficients make single rings large; their mean over images is not.
    assert np.abs(other.mean(0)).max() < 0.2
    assert np.abs(other[:, 5:].mean()) < 0.02
    assert not ring_correlation(np.zeros_like(x), x, SAMPLING)[1].any()


def test_resolution_is_where_agreement_ends() -> None:
    x = noise(0)
    spectrum, other = np.fft.fft2(x), np.fft.fft2(noise(1))
    k = np.fft.fftfreq(32, SAMPLING)
    low = np.hypot(k[:, None], k) < 1.0
    mixed = np.fft.ifft2(np.where(low, spectrum, other)).real
    found = resolution(*ring_correlation(mixed, x, SAMPLING), 0.5)
    # A Fourier pixel is 1/8 per A, and the window spreads over two.
    assert 1 / 1.125 < np.median(found) < 1 / 0.875


def test_resolution_interpolates_between_rings() -> None:
    frequencies = np.array([0.25, 0.5, 1.0, 2.0])
    curves = np.array([[0.1, 1, 0.75, 0.25], [1, 0.4, 1, 1], [1, 1, 1, 1]])
    np.testing.assert_allclose(
        resolution(frequencies, curves, 0.5), [2 / 3, np.inf, 0.5]
    )


def test_ssim_of_a_checkerboard() -> None:
    # Its local mean is 0 and its variance 1, so the formula has two terms to know.
    x = np.where(np.indices((1, 32, 32)).sum(0) % 2, 1.0, -1.0)
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    np.testing.assert_allclose(ssim(x, x), 1)
    np.testing.assert_allclose(ssim(x + 0.1, x), c1 / (0.1**2 + c1), rtol=1e-4)
    np.testing.assert_allclose(ssim(0.5 * x, x), (1 + c2) / (1.25 + c2), rtol=1e-4)
    np.testing.assert_allclose(ssim(-x, x), (c2 - 2) / (c2 + 2), rtol=1e-4)


def test_columns_shifted_missing_and_extra() -> None:
    rng = np.random.default_rng(0)
    grid = np.array(
        [(i, j) for i in (1.2, 3.1, 5.0, 6.9) for j in (1.1, 3.0, 4.9, 6.8)]
    )
    true = grid + rng.uniform(-0.12, 0.12, grid.shape)
    shift = np.array([0.09, -0.12])
    kept, extra = np.delete(true, [5, 6], axis=0), np.array([[3.1, 3.95]])
    found = np.concatenate([kept + shift, extra])
    result = columns.compare(columns_at(found, 3.6), columns_at(true), SAMPLING)
    assert (result.true, result.reconstructed, result.false) == (16, 15, 1)
    assert len(result.errors) == 14
    np.testing.assert_allclose(result.errors, 0.15, atol=0.02)
    np.testing.assert_allclose(result.height_errors, 0.1, atol=0.02)
    summary = columns.summarise([result, result])
    assert summary["columns_found"] == 14 / 16
    assert summary["columns_false"] == 1 / 15
    assert summary["column_error_median_A"] == pytest.approx(0.15, abs=0.01)
    assert summary["column_height_error_median"] == pytest.approx(0.1, abs=0.01)


def test_columns_are_where_they_were_put() -> None:
    rng = np.random.default_rng(0)
    positions = 4 + rng.uniform(-0.5, 0.5, (40, 1, 2))
    peaks = [columns.find(columns_at(p, 4.0), SAMPLING) for p in positions]
    found = np.concatenate([p.positions for p in peaks])
    np.testing.assert_allclose(found, positions[:, 0], atol=0.015)
    np.testing.assert_allclose([p.heights[0] for p in peaks], 3, atol=0.06)


def test_columns_at_the_border_are_partners_only() -> None:
    true = np.array([[0.55, 4.0], [0.45, 6.0], [4.0, 4.0]])
    # The first leaves what is counted, the second enters it; both stay partners.
    found = np.array([[0.45, 4.0], [0.55, 6.0], [4.0, 4.0]])
    result = columns.compare(columns_at(found), columns_at(true), SAMPLING)
    assert (result.true, len(result.errors)) == (2, 2)
    assert (result.reconstructed, result.false) == (2, 0)


def test_columns_are_matched_one_to_one() -> None:
    def peaks(*x: float) -> columns.Peaks:
        return columns.Peaks(
            np.array([(4.0, v) for v in x]).reshape(-1, 2), np.ones(len(x))
        )

    # The nearest pair alone would leave the other two without partners.
    rows, partners = columns.match(peaks(2.0, 2.6), peaks(1.6, 2.25))
    assert list(zip(rows, partners, strict=True)) == [(0, 0), (1, 1)]
    rows, partners = columns.match(peaks(2.0), peaks(2.4, 2.1))
    assert list(zip(rows, partners, strict=True)) == [(0, 1)]
    for other in (peaks(), peaks(2.51)):
        assert not len(columns.match(peaks(2.0), other)[0])


def test_nothing_found_is_no_error() -> None:
    truth = columns_at(np.array([[4.0, 4.0]]))
    summary = columns.summarise([columns.compare(0 * truth, truth, SAMPLING)])
    assert summary["columns_found"] == summary["columns_false"] == 0
    assert np.isnan(summary["column_error_median_A"])


def test_a_profile_runs_through_the_columns() -> None:
    row = np.array([(1.0 + t, 2.0 + 0.5 * t) for t in (0.5, 2.0, 4.0, 5.5)])
    start, end = sites.line_through(np.concatenate([row, [[6.0, 1.0]]]), 8.0)
    np.testing.assert_allclose(sorted([start, end], key=tuple), [[0, 1.5], [8, 5.5]])
    values = sites.profile(columns_at(row), start, end, 1000, SAMPLING)
    along = np.linspace(0, 1, 1000)[:, None] * (end - start) + start
    nearest = np.abs(along[:, 0] - row[:, :1]).argmin(1)
    np.testing.assert_allclose(values[nearest], 3, atol=0.1)


def test_r_factor() -> None:
    assert consistency.r_factor(np.array([1.0, 1.0]), np.array([1.0, 2.0])) == 1 / 3


def test_patterns_follow_from_the_truth(samples: dataset.Arrays) -> None:
    index = int(np.argmin(robustness.thicknesses(CONFIG)))
    thickness = robustness.thicknesses(CONFIG)[index]
    label = samples["labels"][CONFIG.train + index]
    observed = samples["amplitudes"][CONFIG.train + index]
    slices = int(np.ceil(thickness / OPTICS.slice_thickness))

    def r(of: np.ndarray) -> float:
        return consistency.fit(of, slices, observed, OPTICS).r

    truth, flat = r(label), consistency.flat(observed, OPTICS)
    assert truth < 0.5 * flat
    # Moved, turned or of another crystal, it explains less: axes and origin are right.
    others = [np.roll(label, 1, 0), np.roll(label, -1, 1), label.T, label[::-1]]
    for other in (*others, samples["labels"][CONFIG.train + index - 1]):
        assert truth < 0.8 * r(other)


def test_the_gain_is_found(samples: dataset.Arrays) -> None:
    label, gain = samples["labels"][0], 700.0
    lines = consistency.central(OPTICS)
    assert list(lines) == [1, 2]
    observed = np.ones((4, 4, 25, 25), np.float32)
    observed[np.ix_(lines, lines)] = consistency.simulate(label, 12, gain, OPTICS)
    found = consistency.fit(label, 12, observed, OPTICS)
    assert found.gain == pytest.approx(gain, rel=0.02)
    assert found.r < 0.01


def test_a_linear_map_is_found_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4, 4, 3)).astype(np.float32)
    # Zeros beyond the scan are means only if the means are zero.
    x[:50] -= x[:50].mean((0, 1, 2))
    weights = rng.normal(size=(28, 4))
    y = ridge._from_patches(ridge._neighbours(x) @ weights, 4)
    fitted = ridge.fit(x[:50], y[:50])
    np.testing.assert_allclose(fitted(x[50:]), y[50:], atol=0.05)
    monkeypatch.setattr(ridge, "_CHUNK_BYTES", 10_000)
    np.testing.assert_allclose(
        ridge.fit(x[:50], y[:50]).weights, fitted.weights, atol=1e-4
    )


def test_centre_of_mass() -> None:
    optics = Optics()
    intensity = np.zeros((1, 1, 2, 25, 25), np.float32)
    intensity[0, 0, 0, 12 + 3, 12 - 2] = 0.5
    intensity[0, 0, 1, 12, [12, 12 + 4]] = 0.25, 0.75
    images = baselines.virtual_images(intensity, optics)[0, 0]
    pixel = optics.wavelength / optics.box / (optics.aperture_mrad * 1e-3)
    wanted = np.array([[3, -2], [0, 3]]) * pixel
    np.testing.assert_allclose(images[:, 4:], wanted, rtol=1e-5)
    np.testing.assert_allclose(images[:, 1], [0.5, 1.0])


def test_every_baseline_reconstructs(data: tuple[dataset.Dataset, Path]) -> None:
    whole = data[0]
    fitted = baselines.fit(whole)
    for predict in fitted.values():
        found = predict(whole.test_x)
        assert found.shape == whole.test_y.shape and found.dtype == np.float32
    error = nrmse(fitted["mean label"](whole.test_x), whole.test_y).mean()
    assert error == pytest.approx(1, abs=0.1)


@pytest.mark.thorough
def test_the_strongest_linear_map(data: tuple[dataset.Dataset, Path]) -> None:
    whole = data[0]
    found = baselines.fit(whole, strongest=True)[baselines.STRONGEST](whole.test_x)
    assert found.shape == whole.test_y.shape and np.isfinite(found).all()


@pytest.fixture(scope="module")
def untrained(
    data: tuple[dataset.Dataset, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run as `stemdl train` leaves it, before its first step."""
    run = tmp_path_factory.mktemp("run")
    config = Config(network=Network(name="toy"), training=Training(samples=16))
    model = recipe.build(config.network, OPTICS.label_pixels)
    variables = jax.jit(model.init)(jax.random.key(0), data[0].test_x[:1])
    parameters.save(run / "params.npz", variables)
    (run / "config.toml").write_text(config.to_toml())
    trained = {"losses": [1.0, 0.9, 0.8], "steps": 3, "ranks": 1, "backend": "jaxcomm"}
    trained["data"] = json.loads(CONFIG.to_json())
    (run / "train.json").write_text(json.dumps(trained))
    return run


def test_report(
    data: tuple[dataset.Dataset, Path], untrained: Path, tmp_path: Path
) -> None:
    (whole, directory), run, out = data, untrained, tmp_path / "out"
    line = ["--run", str(run), "--data", str(directory), "--out", str(out)]
    evaluate.main.main(line, standalone_mode=False)
    report = json.loads((out / "report.json").read_text())
    assert list(report["methods"])[3:] == ["ridge, 3x3 diffraction patterns", "network"]
    # Figures of samples and of summaries are the same ones.
    model = recipe.build(Network(name="toy"), OPTICS.label_pixels)
    predicted = evaluate.reconstruct(model, run / "params.npz", whole.test_x)
    wanted = np.sqrt(
        ((predicted - whole.test_y) ** 2).mean((1, 2)) / (whole.test_y**2).mean((1, 2))
    )
    per_sample = report["samples"]["methods"]["network"]["nrmse"]
    np.testing.assert_allclose(per_sample, wanted, rtol=1e-4)
    mean = report["methods"]["network"]["nrmse_mean"]
    assert mean == pytest.approx(wanted.mean(), rel=1e-4)
    assert sum(b["samples"] for b in report["thickness"]) == CONFIG.test
    doses = [d["electrons_per_pattern"] for d in report["dose"]]
    assert doses == ["inf", 1e6, 1e5, 1e4]
    linear = [
        d["methods"]["ridge, virtual images"]["nrmse_mean"] for d in report["dose"]
    ]
    assert len(set(linear)) == 4
    r = report["consistency"]["r_mean"]
    assert r["true label"] < r["flat potential"]
    text = (out / "report.md").read_text()
    assert f"| {mean:.3f} |" in text
    pictures = [part.split(")")[0] for part in text.split("](")[1:]]
    assert len(pictures) == 7
    for picture in pictures:
        assert (out / picture).stat().st_size > 10_000


def test_a_run_or_data_that_are_not_there(
    data: tuple[dataset.Dataset, Path], untrained: Path, tmp_path: Path
) -> None:
    directory, run = data[1], tmp_path / "run"

    def refused(*options: str) -> str:
        line = ["--run", str(run), *options]
        with pytest.raises(click.UsageError) as caught:
            evaluate.main.main(line, standalone_mode=False)
        return caught.value.message

    assert "params.npz does not exist; `stemdl train`" in refused()
    shutil.copytree(untrained, run)
    assert "stemdl cache" in refused("--data", str(tmp_path / "none"))
    assert "manifest.json does not exist" in refused("--shards", str(tmp_path))
    assert "--samples" in refused("--shards", str(tmp_path), "--samples", "16")
    # More to test on may be other data, but not another microscope's.
    trained = json.loads((run / "train.json").read_text())
    trained["data"]["test"] += 1
    trained["data"]["optics"]["energy_ev"] = 2e5
    (run / "train.json").write_text(json.dumps(trained))
    message = refused("--data", str(directory))
    assert "optics.energy_ev was 200000.0 and is 100000.0" in message
    (run / "config.toml").write_text(Config(training=Training(samples=16)).to_toml())
    message = refused("--data", str(directory))
    assert "params.npz does not fit the network" in message


def test_shards_are_evaluated_like_the_cache(
    data: tuple[dataset.Dataset, Path], samples: dataset.Arrays, tmp_path: Path
) -> None:
    def sample(_: dataset.DataConfig, index: int) -> tuple[np.ndarray, np.ndarray]:
        return samples["amplitudes"][index], samples["labels"][index]

    comm, quiet = jaxcomm.world(), Console(quiet=True)
    simulation.produce(CONFIG, tmp_path, 2, comm, quiet, sample)
    found, whole = evaluate._sharded(tmp_path)
    assert found == CONFIG
    np.testing.assert_array_equal(whole.test_y, data[0].test_y)
    np.testing.assert_allclose(whole.test_x, data[0].test_x, rtol=1e-3, atol=1e-4)


def test_thickness_is_the_held_out_samples_own(samples: dataset.Arrays) -> None:
    thickness = robustness.thicknesses(CONFIG)
    assert thickness.shape == (CONFIG.test,)
    specimen = dataset.specimen_of(CONFIG, CONFIG.train + 3)
    assert thickness[3] == specimen.thickness
    assert samples["material"][CONFIG.train + 3] == CONFIG.material(CONFIG.train + 3)
    edges, places = robustness.bins(thickness)
    for value, place in zip(thickness, places, strict=True):
        assert edges[place] <= value <= edges[place + 1]
