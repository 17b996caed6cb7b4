"""Ridge regression from the features of 3 x 3 probes to the middle one's patch.

One linear map, shared by all probes: the strongest that a linear method can be here
without knowing where in the scan a probe stands.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.linalg

from stemdl.evaluation.metrics import nrmse

VALIDATION_FRACTION = 0.2
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Penalties that are tried, as fractions of the features' mean variance."""

_CHUNK_BYTES = 64 << 20
"""Of rows at a time: those of full patterns would not fit into memory together."""


@dataclasses.dataclass(frozen=True, eq=False)
class LinearMap:
    """A fitted map.

    Attributes:
      centre: (features,), subtracted.
      spread: (features,), divided by.
      weights: (9 * features + 1, patch * patch) float64.
    """

    centre: np.ndarray
    spread: np.ndarray
    weights: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Reconstruct (n, scan, scan, features) to (n, pixels, pixels) float32."""
        scan, weights = features.shape[1], self.weights.astype(np.float32)
        features = (features - self.centre) / self.spread
        rows = [_neighbours(chunk) @ weights for chunk in _chunks(features)]
        return _from_patches(np.concatenate(rows), scan)


def fit(features: np.ndarray, labels: np.ndarray) -> LinearMap:
    """Fit the map; its penalty is chosen on the last samples, which are fitted too.

    Args:
      features: (n, scan, scan, features) float32.
      labels: (n, pixels, pixels), with pixels a multiple of scan.
    """
    spread = features.std((0, 1, 2)) + 1e-12
    centre = features.mean((0, 1, 2))
    x = (features - centre) / spread
    first = len(x) - max(1, int(VALIDATION_FRACTION * len(x)))
    # Normal equations add up, so the second fit reuses those of the first.
    gram, right = _normal_equations(x[:first], labels[:first])

    def error(ridge: float) -> float:
        try:
            tried = LinearMap(centre, spread, _solve(gram, right, ridge))
        except scipy.linalg.LinAlgError:
            # Of fewer rows than features, float32 hides that none is below zero.
            return np.inf
        return float(nrmse(tried(features[first:]), labels[first:]).mean())

    ridge = min(RIDGES, key=error)
    more_gram, more_right = _normal_equations(x[first:], labels[first:])
    gram += more_gram
    return LinearMap(centre, spread, _solve(gram, right + more_right, ridge))


def _solve(gram: np.ndarray, right: np.ndarray, ridge: float) -> np.ndarray:
    penalised = gram.copy()
    penalised.flat[:: len(gram) + 1] += ridge * np.trace(gram) / len(gram)
    return scipy.linalg.solve(
        penalised, right, assume_a="pos", overwrite_a=True, check_finite=False
    )


def _normal_equations(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Products in the dtype of `x`, sums over chunks of samples in float64."""
    gram = right = np.zeros(())
    start = 0
    for chunk in _chunks(x):
        rows = _neighbours(chunk)
        patches = _to_patches(y[start : start + len(chunk)], x.shape[1])
        gram = gram + (rows.T @ rows).astype(np.float64)
        right = right + (rows.T @ patches).astype(np.float64)
        start += len(chunk)
    return gram, right


def _chunks(x: np.ndarray) -> list[np.ndarray]:
    size = max(1, _CHUNK_BYTES // (9 * x[0].nbytes))
    return [x[start : start + size] for start in range(0, len(x), size)]


def _neighbours(x: np.ndarray) -> np.ndarray:
    """Rows of features of 3 x 3 probes and a one; zeros stand beyond the scan."""
    n, scan = x.shape[:2]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    around = [padded[:, i : i + scan, j : j + scan] for i in range(3) for j in range(3)]
    ones = np.ones((n, scan, scan, 1), x.dtype)
    return np.concatenate([*around, ones], axis=-1).reshape(n * scan * scan, -1)


def _to_patches(labels: np.ndarray, scan: int) -> np.ndarray:
    """Cut (n, pixels, pixels) into rows, one per probe."""
    n, pixels = labels.shape[:2]
    side = pixels // scan
    patches = labels.reshape(n, scan, side, scan, side).transpose(0, 1, 3, 2, 4)
    return patches.reshape(n * scan * scan, side * side)


def _from_patches(rows: np.ndarray, scan: int) -> np.ndarray:
    """Undo `_to_patches`."""
    side = int(np.sqrt(rows.shape[-1]))
    patches = rows.reshape(-1, scan, scan, side, side).transpose(0, 1, 3, 2, 4)
    return patches.reshape(-1, scan * side, scan * side)
