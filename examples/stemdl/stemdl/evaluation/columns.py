"""Atom columns: found in truth and reconstruction alike, and matched one to one.

A column is a local maximum of the potential; columns closer than the label's blur
count as one. Positions are in A from the window's corner, along both array axes.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from scipy.ndimage import map_coordinates
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from skimage.feature import peak_local_max

THRESHOLD = 0.5
"""Least height above the window's mean, in standard deviations of the truth."""

SEPARATION = 0.5
"""A maximum is the highest value within so many A along each axis."""

RADIUS = 0.5
"""Farthest that a reconstructed column may lie from the true one, in A."""

BORDER = 0.5
"""Columns closer to the window's edge than this, in A, may be partners but do not count
themselves: the edge hides where their maxima are."""

# Least-squares fit of a quadratic to 3 x 3 values, in the order of `_maximum`.
_STEPS = np.array([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)], np.float64)
_FIT = np.linalg.pinv(
    np.column_stack([np.ones(9), _STEPS, _STEPS**2, _STEPS[:, 0] * _STEPS[:, 1]])
)


class Peaks(NamedTuple):
    """Maxima of an image: positions (m, 2) in A, heights (m,) in the image's units."""

    positions: np.ndarray
    heights: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Columns of one sample, those of the border aside.

    Attributes:
      errors: distances in A between true columns and their partners, (matched,).
      height_errors: relative errors of the partners' heights, (matched,). Heights are
        above the truth's lowest value, the background between columns.
      true: number of true columns.
      reconstructed: number of reconstructed columns.
      false: number of reconstructed columns without a partner.
    """

    errors: np.ndarray
    height_errors: np.ndarray
    true: int
    reconstructed: int
    false: int


def find(image: np.ndarray, sampling: float) -> Peaks:
    """Find the columns of one (pixels, pixels) image, `sampling` A between pixels."""
    pixels = peak_local_max(
        image.astype(np.float64),
        min_distance=max(1, round(SEPARATION / sampling)),
        threshold_abs=THRESHOLD,
        # The fit needs a pixel on each side.
        exclude_border=1,  # pyright: ignore[reportArgumentType]
    )
    offsets = [_maximum(image, *pixel) for pixel in pixels]
    places = pixels + np.reshape(offsets, (-1, 2))
    # The quadratic would flatten a maximum that lies between pixels.
    heights = map_coordinates(image, places.T, order=3, mode="nearest")
    return Peaks((places + 0.5) * sampling, heights)


def match(truth: Peaks, found: Peaks) -> tuple[np.ndarray, np.ndarray]:
    """Pair columns one to one: as many as lie within `RADIUS`, then the closest.

    Returns:
      Indices into `truth` and into `found`, (matched,) each.
    """
    distances = cdist(truth.positions, found.positions)
    # Farther pairs cost more than all close ones together, so none replaces any.
    far = RADIUS * (1 + min(distances.shape))
    near = distances <= RADIUS
    rows, columns = linear_sum_assignment(np.where(near, distances, far))
    kept = near[rows, columns]
    return rows[kept], columns[kept]


def compare(predicted: np.ndarray, truth: np.ndarray, sampling: float) -> Comparison:
    """Compare the columns of one reconstruction with the true ones.

    Args:
      predicted: (pixels, pixels), in units of the truth.
      truth: (pixels, pixels), of mean 0 and variance 1.
      sampling: distance between pixels in A.
    """
    side = truth.shape[-1] * sampling
    true, found = find(truth, sampling), find(predicted, sampling)
    rows, partners = match(true, found)
    counted, visible = inside(true, side), inside(found, side)
    base = truth.min()
    errors = np.linalg.norm(true.positions[rows] - found.positions[partners], axis=1)
    ratios = (found.heights[partners] - base) / (true.heights[rows] - base)
    alone = np.ones(len(found.heights), bool)
    alone[partners] = False
    kept = counted[rows]
    return Comparison(
        errors=errors[kept],
        height_errors=np.abs(ratios[kept] - 1),
        true=int(counted.sum()),
        reconstructed=int(visible.sum()),
        false=int((alone & visible).sum()),
    )


def inside(peaks: Peaks, side: float) -> np.ndarray:
    """Which columns count: (m,) bool; `side` is the window's, in A."""
    p = peaks.positions
    return np.all((p >= BORDER) & (p <= side - BORDER), axis=1)


def summarise(samples: list[Comparison]) -> dict[str, float]:
    """Pool the columns of many samples.

    Returns:
      "column_error_median_A", "column_error_p95_A", "column_height_error_median" (NaN
      if none is matched); "columns_found", matched over true; "columns_false",
      unmatched over reconstructed (0 if there are none).
    """
    errors = np.concatenate([s.errors for s in samples])
    heights = np.concatenate([s.height_errors for s in samples])
    true = sum(s.true for s in samples)
    reconstructed = sum(s.reconstructed for s in samples)
    some = len(errors) > 0
    return {
        "column_error_median_A": float(np.median(errors)) if some else np.nan,
        "column_error_p95_A": float(np.percentile(errors, 95)) if some else np.nan,
        "column_height_error_median": float(np.median(heights)) if some else np.nan,
        "columns_found": len(errors) / true if true else np.nan,
        "columns_false": sum(s.false for s in samples) / max(1, reconstructed),
    }


def _maximum(image: np.ndarray, row: int, column: int) -> np.ndarray:
    """Offset in pixels, (2,), of the quadratic's maximum near a pixel."""
    values = image[row - 1 : row + 2, column - 1 : column + 2].astype(np.float64)
    _, gi, gj, ci, cj, cross = _FIT @ values.ravel()
    hessian = np.array([[2 * ci, cross], [cross, 2 * cj]])
    if np.linalg.eigvalsh(hessian).max() >= 0:
        return np.zeros(2)
    # The maximum lies in the pixel's own neighbourhood, or the fit is none.
    return np.clip(np.linalg.solve(hessian, [-gi, -gj]), -1, 1)
