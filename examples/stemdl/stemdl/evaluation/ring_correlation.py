"""Fourier ring correlation: up to which spatial frequency two images agree.

Saxton and Baumeister, J. Microsc. 127 (1982) 127. Here one image is the truth, for
which 0.5 is the usual threshold; 1/7 is that of two noisy halves (Rosenthal and
Henderson, J. Mol. Biol. 333 (2003) 721).
"""

from __future__ import annotations

import numpy as np
from scipy.signal.windows import hann

THRESHOLDS = {"0.5": 0.5, "1/7": 1 / 7}


def ring_correlation(
    predicted: np.ndarray, truth: np.ndarray, sampling: float
) -> tuple[np.ndarray, np.ndarray]:
    """Correlate the Fourier coefficients of two images ring by ring.

    Images cut from a crystal are not periodic: a Hann window keeps their edges from
    correlating, and its weighted mean is subtracted, which would leak into the first
    ring. Rings are one Fourier pixel wide; the corners beyond Nyquist are left out.

    Args:
      predicted: (n, pixels, pixels).
      truth: of the same shape.
      sampling: distance between pixels in A.

    Returns:
      Frequencies of the rings, (rings,) in 1/A, and correlations, (n, rings) from -1
      to 1; 0 where a ring of either image is empty.
    """
    pixels = truth.shape[-1]
    window = hann(pixels)
    p, t = (_coefficients(image, np.outer(window, window)) for image in
            (predicted, truth))  # fmt: skip
    k = np.fft.fftfreq(pixels, 1 / pixels)
    ring = np.rint(np.hypot(k[:, None], k)).astype(int)
    numbers = np.arange(1, pixels // 2)
    masks = np.stack([ring.ravel() == number for number in numbers], axis=1)

    def per_ring(values: np.ndarray) -> np.ndarray:
        return values.reshape(len(values), -1) @ masks.astype(np.float64)

    product = per_ring(np.real(p * t.conj()))
    norm = np.sqrt(per_ring(np.abs(p) ** 2) * per_ring(np.abs(t) ** 2))
    correlation = np.divide(product, norm, out=np.zeros_like(norm), where=norm > 0)
    return numbers / (pixels * sampling), correlation


def resolution(
    frequencies: np.ndarray, correlation: np.ndarray, threshold: float
) -> np.ndarray:
    """Length at which the correlation first falls below a threshold.

    It is interpolated linearly in frequency between rings. The first ring is passed
    over: it has few coefficients, and a crystal has next to nothing there.

    Args:
      frequencies: (rings,) in 1/A.
      correlation: (n, rings).
      threshold: such as 0.5.

    Returns:
      (n,) in A: infinite where even the second ring is below, and the last ring's
      length, two pixels and a little, where none is.
    """
    frequencies, correlation = frequencies[1:], correlation[:, 1:]
    found = np.full(len(correlation), 1 / frequencies[-1])
    for row, curve in enumerate(correlation):
        below = np.flatnonzero(curve < threshold)
        if not len(below):
            continue
        k = below[0]
        if k == 0:
            found[row] = np.inf
            continue
        share = (curve[k - 1] - threshold) / (curve[k - 1] - curve[k])
        step = frequencies[k] - frequencies[k - 1]
        found[row] = 1 / (frequencies[k - 1] + share * step)
    return found


def _coefficients(images: np.ndarray, window: np.ndarray) -> np.ndarray:
    images = images.astype(np.float64)
    mean = (images * window).sum((-2, -1), keepdims=True) / window.sum()
    return np.fft.fft2((images - mean) * window)
