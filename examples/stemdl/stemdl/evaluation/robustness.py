"""Scores against what makes the problem hard: thickness of the specimen, and dose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from stemdl.data.dataset import DataConfig, Dataset, specimen_of
from stemdl.evaluation.baselines import Predictor
from stemdl.evaluation.scoring import Scores, score
from stemdl.physics.dose import noisy

DOSES = (np.inf, 1e6, 1e5, 1e4)
"""Electrons per diffraction pattern."""

BINS = 4
SEED = 0
"""Of the counting noise; the same draw for all methods."""


def thicknesses(config: DataConfig) -> np.ndarray:
    """Thickness in A of every held-out sample, (test,)."""
    indices = range(config.train, config.samples)
    return np.array([specimen_of(config, index).thickness for index in indices])


def bins(thickness: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Divide the range of thicknesses equally.

    Returns:
      Edges, (bins + 1,) in A, and the bin of each sample, (n,).
    """
    edges = np.linspace(np.floor(thickness.min()), np.ceil(thickness.max()), BINS + 1)
    return edges, np.clip(np.digitize(thickness, edges) - 1, 0, BINS - 1)


def by_dose(
    dataset: Dataset, methods: Mapping[str, Predictor], sampling: float
) -> Iterator[tuple[float, dict[str, Scores]]]:
    """Score all methods on the held-out patterns as a detector counts them.

    Baselines are fitted without noise.

    Yields:
      A dose, and the scores by method.
    """
    amplitudes = dataset.amplitudes(dataset.test_x)
    for dose in DOSES:
        counted = noisy(amplitudes, dose, np.random.default_rng(SEED))
        x = (counted - dataset.mean) / dataset.std
        yield (
            dose,
            {
                name: score(predict(x), dataset.test_y, sampling)
                for name, predict in methods.items()
            },
        )
