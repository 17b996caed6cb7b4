"""Counting noise in the STEMDL example's training."""

from __future__ import annotations

import numpy as np
import pytest

from stemdl import config
from stemdl.data.noise import Noise
from stemdl.physics import dose

MEAN, STD = np.full((5, 5), 0.2, np.float32), np.full((5, 5), 0.1, np.float32)


def noise(least: float, most: float) -> Noise:
    return Noise(least, most, seed=3, mean=MEAN, std=STD)


def patterns(samples: int) -> np.ndarray:
    x = np.random.default_rng(0).random((samples, 2, 2, 5, 5), np.float32)
    return (x * 0.2 - MEAN) / STD


def test_a_sample_gets_the_same_noise_in_any_batch() -> None:
    x, rows = patterns(4), np.array([7, 2, 9, 4])
    whole = noise(1e3, 1e5).add(x, rows, 1)
    parts = [noise(1e3, 1e5).add(x[k::2], rows[k::2], 1) for k in range(2)]
    for k in range(2):
        np.testing.assert_array_equal(whole[k::2], parts[k])
    other = noise(1e3, 1e5).add(x, rows, 2)
    assert all((a != b).any() for a, b in zip(whole, other, strict=True))


def test_a_low_dose_is_noisier_and_no_dose_is_none() -> None:
    x, rows = patterns(3), np.arange(3)
    assert noise(0, 1e7).add(x, rows, 0) is x
    errors = [np.std(noise(d, d).add(x, rows, 0) - x) for d in (1e3, 1e5, 1e7)]
    # The square root of a count of n spreads by 1/2 whatever n, that is, in units of
    # std, 0.5 / sqrt(dose) / 0.1.
    np.testing.assert_allclose(errors[1:], 5 / np.sqrt([1e5, 1e7]), rtol=0.2)
    assert errors[0] > errors[1] > errors[2]


def test_electrons_are_counted() -> None:
    rng = np.random.default_rng(0)
    seen = dose.count(np.full(20_000, 0.01), 1e3, rng) * 1e3
    np.testing.assert_allclose(seen, np.round(seen), atol=1e-3)
    assert abs(seen.mean() - 10) < 0.1 and abs(seen.var() - 10) < 0.5
    clean = np.ones(3, np.float32)
    np.testing.assert_array_equal(dose.count(clean, np.inf, rng), clean)
    for bad in (0, -1, np.nan):
        with pytest.raises(ValueError, match="positive number of electrons"):
            dose.count(clean, bad, rng)


def test_doses_that_are_none() -> None:
    for text in ("0.5", "1e8"):
        with pytest.raises(config.SettingError, match=r"noise\.least_dose=.* neither"):
            config.load(None, [f"noise.least_dose={text}"])
