"""Figures of merit of a reconstruction, one number per sample."""

from __future__ import annotations

import numpy as np
from skimage.metrics import structural_similarity

SSIM_SIGMA = 1.5
"""Of the Gaussian window, in pixels; skimage cuts it to 11 x 11 of them."""

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


def ssim(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Structural similarity (Wang et al., IEEE Trans. Image Process. 13 (2004) 600).

    Gaussian window and constants of that paper; the data range is the truth's, sample
    by sample. Pixels whose window would leave the image are left out of the mean.

    Args:
      predicted: (n, pixels, pixels), at least 11 pixels.
      truth: of the same shape; no sample is flat.

    Returns:
      (n,) numbers; 1 is perfect.
    """
    return np.array(
        [
            structural_similarity(
                t.astype(np.float64),
                p.astype(np.float64),
                data_range=float(np.ptp(t)),
                gaussian_weights=True,
                sigma=SSIM_SIGMA,
                use_sample_covariance=False,
            )
            for p, t in zip(predicted, truth, strict=True)
        ]
    )
