"""The batch on which a training came to grief, kept to look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def keep(
    path: Path, step: int, samples: np.ndarray, patterns: np.ndarray, labels: np.ndarray
) -> str:
    """Write one process's part of a batch, and say what is wrong with it.

    Args:
      path: the .npz file to make, of arrays named as the arguments.
      step: at which it was used, counted from 1.
      samples: (..., n) indices into the training samples.
      patterns: (..., n, scan, scan, detector, detector), as the network saw them.
      labels: (..., n, pixels, pixels).

    Returns:
      A sentence that names the samples, and those that are not finite themselves.
    """
    samples = np.asarray(samples).ravel()
    np.savez(path, step=step, samples=samples, patterns=patterns, labels=labels)
    bad = [
        sample
        for sample, x, y in zip(
            samples.tolist(),
            patterns.reshape(len(samples), -1),
            labels.reshape(len(samples), -1),
            strict=True,
        )
        if not (np.isfinite(x).all() and np.isfinite(y).all())
    ]
    found = f"of these {bad} hold infinite or NaN values" if bad else "all are finite"
    return f"samples {samples.tolist()}, {found}; saved to {path}"
