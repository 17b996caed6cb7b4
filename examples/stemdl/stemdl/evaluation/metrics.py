"""Figures of merit of a reconstruction, one number per sample."""

from __future__ import annotations

import numpy as np

_PLANE = (-2, -1)


def nrmse(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Root mean square error over root mean square truth.

    Args:
      predicted: (n, pixels, pixels).
      truth: of the same shape and mean 0 per sample, so that predicting the mean
        scores 1.

    Returns:
      (n,) numbers; 0 is perfect.
    """
    error = np.mean((predicted - truth) ** 2, axis=_PLANE)
    return np.sqrt(error / np.mean(truth**2, axis=_PLANE))


def pearson(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Correlation coefficient of the pixels: (n,) numbers; 0 where one is flat."""
    p = predicted - predicted.mean(axis=_PLANE, keepdims=True)
    t = truth - truth.mean(axis=_PLANE, keepdims=True)
    norm = np.sqrt((p**2).sum(axis=_PLANE) * (t**2).sum(axis=_PLANE))
    product = (p * t).sum(axis=_PLANE)
    return np.divide(product, norm, out=np.zeros_like(norm), where=norm > 0)
