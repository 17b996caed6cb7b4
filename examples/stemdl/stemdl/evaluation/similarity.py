"""Structural similarity: do two images have the same structure, place by place?"""

from __future__ import annotations

import numpy as np
from skimage.metrics import structural_similarity

SIGMA = 1.5
"""Of the Gaussian window, in pixels; skimage cuts it to 11 x 11 of them."""


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
                sigma=SIGMA,
                use_sample_covariance=False,
            )
            for p, t in zip(predicted, truth, strict=True)
        ]
    )
