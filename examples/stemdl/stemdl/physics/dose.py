"""Counting noise: a detector sees single electrons.

A dose is the mean number of electrons per diffraction pattern. What the detector's
crop and the band limit have lost counts as emitted and not seen.
"""

from __future__ import annotations

import numpy as np


def count(intensity: np.ndarray, dose: float, rng: np.random.Generator) -> np.ndarray:
    """Draw a Poisson number of electrons in every detector pixel.

    Args:
      intensity: fractions of the beam, of any shape; not negative.
      dose: electrons per pattern; infinite: no noise.
      rng: source of the draw.

    Returns:
      float32 fractions of the beam, the shape of `intensity`.

    Raises:
      ValueError: `dose` is not positive.
    """
    if not dose > 0:
        raise ValueError(f"dose={dose}: give a positive number of electrons, or inf")
    if np.isinf(dose):
        return np.asarray(intensity, np.float32)
    # In float64: float32 fractions near 1 times a high dose would lose electrons.
    mean = np.asarray(intensity, np.float64) * dose
    return (rng.poisson(mean) / dose).astype(np.float32)


def noisy(amplitudes: np.ndarray, dose: float, rng: np.random.Generator) -> np.ndarray:
    """`count` for square roots of intensities, which is what data sets hold."""
    if np.isinf(dose):
        return amplitudes
    return np.sqrt(count(np.square(amplitudes), dose, rng))
