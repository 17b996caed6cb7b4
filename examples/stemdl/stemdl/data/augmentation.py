"""The eight symmetries of the square, applied to everything a sample consists of.

Turning a crystal turns the scan, every diffraction pattern and the potential alike;
so a turned sample is a valid sample that costs no simulation. Optics and grids are
chosen such that this is exact: the detector is odd, probes and label pixels sit at
the centres of cells.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

SYMMETRIES = 8


@functools.lru_cache(maxsize=2)
def draw(seed: int, epoch: int, samples: int) -> np.ndarray:
    """Draw each sample's symmetry in an epoch: (samples,) int64, 0 to 7."""
    return np.random.default_rng([seed, epoch]).integers(SYMMETRIES, size=samples)


def transform(patterns: np.ndarray, symmetry: int) -> np.ndarray:
    """Apply one symmetry to diffraction patterns over a scan.

    Args:
      patterns: (..., scan, scan, detector, detector).
      symmetry: 0 to 7; the lowest two bits count quarter turns, the third transposes
        first.

    Returns:
      An array (a view) of the same shape.
    """
    return _turn(_turn(patterns, symmetry, -4), symmetry, -2)


def transform_label(labels: np.ndarray, symmetry: int) -> np.ndarray:
    """Apply one symmetry to potentials (..., pixels, pixels); returns a view."""
    return _turn(labels, symmetry, -2)


def turned_back(labels: np.ndarray, symmetry: int) -> np.ndarray:
    """Undo `transform_label`; returns a view."""
    labels = np.rot90(labels, -(symmetry & 3), axes=(-2, -1))
    return np.swapaxes(labels, -2, -1) if symmetry & 4 else labels


def averaged(
    predict: Callable[[np.ndarray], np.ndarray], patterns: np.ndarray
) -> np.ndarray:
    """Reconstruct from every orientation of the same patterns, and average.

    Args:
      predict: (n, scan, scan, detector, detector) patterns to (n, pixels, pixels)
        potentials.
      patterns: its argument.

    Returns:
      What `predict` does, each potential the mean of eight.
    """
    turned = [
        turned_back(predict(np.ascontiguousarray(transform(patterns, s))), s)
        for s in range(SYMMETRIES)
    ]
    return np.mean(turned, axis=0)


def augment(
    patterns: np.ndarray, labels: np.ndarray, symmetries: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Apply to each sample of a batch its own symmetry.

    Args:
      patterns: (n, scan, scan, detector, detector).
      labels: (n, pixels, pixels).
      symmetries: (n,) integers, 0 to 7.

    Returns:
      New arrays of the same shapes and dtypes.
    """
    x, y = np.empty_like(patterns), np.empty_like(labels)
    for index, symmetry in enumerate(symmetries):
        x[index] = transform(patterns[index], int(symmetry))
        y[index] = transform_label(labels[index], int(symmetry))
    return x, y


def symmetrised(pattern: np.ndarray) -> np.ndarray:
    """Mean of a (detector, detector) array over all symmetries."""
    return np.mean([_turn(pattern, s, -2) for s in range(SYMMETRIES)], axis=0)


def _turn(array: np.ndarray, symmetry: int, axis: int) -> np.ndarray:
    """Transpose and turn the plane of axes (axis, axis + 1)."""
    plane = (axis, axis + 1)
    if symmetry & 4:
        array = np.swapaxes(array, *plane)
    return np.rot90(array, symmetry & 3, axes=plane)
