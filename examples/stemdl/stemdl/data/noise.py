"""Counting noise as augmentation: at every epoch each sample gets a dose of its own."""

from __future__ import annotations

import dataclasses

import numpy as np

from stemdl import config
from stemdl.physics import dose

_STREAM = 1
"""Keeps these draws apart from those of `augmentation.draw`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Noise:
    """Draws doses log-uniformly; the same for any number of ranks.

    Attributes:
      least: electrons per diffraction pattern; 0: no noise at all.
      most: the same, at the other end.
      seed: of the draws, with the epoch and the sample's index.
      mean: (detector, detector) float32, which standardised patterns lack.
      std: (detector, detector) float32, by which they are divided.
    """

    least: float
    most: float
    seed: int
    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def of(
        cls, wanted: config.Noise, seed: int, mean: np.ndarray, std: np.ndarray
    ) -> Noise:
        """Noise as a configuration wants it, for data with these statistics."""
        return cls(wanted.least_dose, wanted.most_dose, seed, mean, std)

    def add(self, patterns: np.ndarray, rows: np.ndarray, epoch: int) -> np.ndarray:
        """Count electrons in the patterns of a batch.

        Args:
          patterns: (n, scan, scan, detector, detector) float32, standardised.
          rows: (n,) indices of the samples.
          epoch: which one it is.

        Returns:
          An array of the same shape, standardised with the noiseless statistics.
        """
        if self.least == 0:
            return patterns
        noisy = np.empty_like(patterns)
        for index, row in enumerate(rows):
            rng = np.random.default_rng([self.seed, epoch, int(row), _STREAM])
            low, high = np.log10(self.least), np.log10(self.most)
            electrons = float(10 ** rng.uniform(low, high))
            # Rounding may leave an amplitude of zero slightly negative.
            clean = np.maximum(patterns[index] * self.std + self.mean, 0)
            noisy[index] = dose.noisy(clean, electrons, rng)
        return (noisy - self.mean) / self.std
