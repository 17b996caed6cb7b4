"""Pictures of atom columns: where they are, and profiles through them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy.ndimage import map_coordinates

from stemdl.data.dataset import Dataset
from stemdl.evaluation import columns
from stemdl.evaluation.figures import DPI, scale_bar, shown
from stemdl.evaluation.scoring import Scores

PROFILES = 3
TRUTH, OURS, MARK = "#1a1a1a", "#d62728", "#00a0ff"

_ON_LINE = 0.3
"""Columns so close to a line, in A, are on it."""


def draw_columns(
    path: Path, dataset: Dataset, predicted: np.ndarray, scores: Scores
) -> None:
    """Mark true and reconstructed columns on one held-out sample of several materials.

    Args:
      path: the PNG to write.
      dataset: holds the held-out samples.
      predicted: (n, pixels, pixels) reconstructions of all of them.
      scores: of the same.
    """
    chosen = shown(scores.nrmse, dataset.test_names)
    side = dataset.optics.window
    figure = Figure(figsize=(2.6 * len(chosen), 6.1), layout="constrained")
    axes = figure.subplots(2, len(chosen), squeeze=False)
    for pair, index in zip(axes.T, chosen, strict=True):
        truth = dataset.test_y[index]
        sampling = side / truth.shape[-1]
        images = (truth, predicted[index])
        true, found = (columns.find(image, sampling) for image in images)
        for axis, image in zip(pair, images, strict=True):
            _show(axis, image, side, truth.max())
            _mark(axis, true, "o", mfc="none", mec=MARK, ms=11, mew=1.6)
        _mark(pair[1], found, "x", mec=OURS, ms=7, mew=1.8)
        result = scores.comparisons[index]
        pair[0].set_title(str(dataset.test_names[index]), fontsize=13)
        pair[1].set_title(
            f"{len(result.errors)} of {result.true} found, {result.false} false",
            fontsize=11,
        )
    axes[0, 0].set_ylabel("true potential", fontsize=12)
    axes[1, 0].set_ylabel("reconstruction", fontsize=12)
    scale_bar(axes[0, 0])
    handles = [
        *axes[1, 0].get_lines(),
        Rectangle((0, 0), 1, 1, fill=False, linestyle=":", edgecolor="#555555"),
    ]
    labels = ["true column", "reconstructed column", "inside: counted"]
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=12
    )
    figure.savefig(path, dpi=DPI)


def draw_profiles(
    path: Path, dataset: Dataset, predicted: np.ndarray, scores: Scores
) -> None:
    """Draw truth and reconstruction along a line through columns of a few materials.

    Args:
      path: the PNG to write.
      dataset: holds the held-out samples.
      predicted: (n, pixels, pixels) reconstructions of all of them.
      scores: of the same.
    """
    chosen = shown(scores.nrmse, dataset.test_names)[:PROFILES]
    side = dataset.optics.window
    figure = Figure(figsize=(9.2, 2.7 * len(chosen)), layout="constrained")
    axes = figure.subplots(
        len(chosen), 2, squeeze=False, gridspec_kw={"width_ratios": [1, 2.6]}
    )
    for (picture, axis), index in zip(axes, chosen, strict=True):
        truth = dataset.test_y[index]
        sampling = side / truth.shape[-1]
        start, end = line_through(columns.find(truth, sampling).positions, side)
        _show(picture, truth, side, truth.max())
        ends = _drawn(np.stack([start, end]), side)
        picture.plot(*ends, color=MARK, lw=2)
        picture.plot(*ends[:, 0], "o", color=MARK, ms=7, clip_on=False)
        picture.set_ylabel(str(dataset.test_names[index]), fontsize=13)
        along = np.linspace(0, np.linalg.norm(end - start), 200)
        for image, label, style in (
            (truth, "truth", {"color": TRUTH, "lw": 2}),
            (predicted[index], "reconstruction", {"color": OURS, "lw": 2, "ls": "--"}),
        ):
            values = profile(image, start, end, len(along), sampling)
            axis.plot(along, values, label=label, **style)
        axis.set_xlim(0, along[-1])
        axis.set_ylabel("potential\n(standardised)", fontsize=11)
        axis.grid(alpha=0.3)
    scale_bar(axes[0, 0])
    axes[0, 0].set_title("true potential", fontsize=12)
    axes[0, 1].set_title("along the line, from its dot", fontsize=12)
    figure.legend(
        *axes[0, 1].get_legend_handles_labels(),
        loc="outside lower right",
        ncols=2,
        frameon=False,
        fontsize=12,
    )
    axes[-1, 1].set_xlabel("distance (Å)", fontsize=11)
    figure.savefig(path, dpi=DPI)


def line_through(positions: np.ndarray, side: float) -> tuple[np.ndarray, np.ndarray]:
    """The line through the window that most columns are on; then the longest.

    Args:
      positions: (m, 2) in A; with fewer than two, the line runs through the middle.
      side: of the window, in A.

    Returns:
      Its ends on the window's edge, (2,) each, in A.
    """
    best = (0, 0.0, np.array([side / 2, 0.0]), np.array([side / 2, side]))
    for a, b in itertools.combinations(positions, 2):
        direction = (b - a) / np.linalg.norm(b - a)
        start, end = _clip(a, direction, side)
        offsets = (positions - a) @ np.array([-direction[1], direction[0]])
        on_it = int((np.abs(offsets) < _ON_LINE).sum())
        length = float(np.linalg.norm(end - start))
        if (on_it, length) > best[:2]:
            best = (on_it, length, start, end)
    return best[2], best[3]


def profile(
    image: np.ndarray, start: np.ndarray, end: np.ndarray, points: int, sampling: float
) -> np.ndarray:
    """Values of an image along a line, by cubic splines: (points,).

    Args:
      image: (pixels, pixels).
      start: (2,) in A from the window's corner.
      end: as `start`.
      points: how many.
      sampling: distance between pixels in A.
    """
    line = start[:, None] + np.linspace(0, 1, points) * (end - start)[:, None]
    return map_coordinates(image, line / sampling - 0.5, order=3, mode="nearest")


def _clip(
    point: np.ndarray, direction: np.ndarray, side: float
) -> tuple[np.ndarray, np.ndarray]:
    """Where a line through a point in the window meets its edge."""
    with np.errstate(divide="ignore"):
        ends = np.sort([-point / direction, (side - point) / direction], axis=0)
    return point + ends[0].max() * direction, point + ends[1].min() * direction


def _show(axis: Axes, image: np.ndarray, side: float, highest: float) -> None:
    extent = (0, side, 0, side)
    axis.imshow(image, cmap="gray_r", vmin=-1, vmax=highest, extent=extent)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlim(0, side)
    axis.set_ylim(0, side)


def _drawn(positions: np.ndarray, side: float) -> np.ndarray:
    """Where (m, 2) positions in the array are in its picture: (2, m), x and y."""
    return np.stack([positions[:, 1], side - positions[:, 0]])


def _mark(axis: Axes, peaks: columns.Peaks, marker: str, **style: object) -> None:
    border, side = columns.BORDER, axis.get_xlim()[1]
    places = _drawn(peaks.positions, side)
    axis.plot(*places, marker, ls="", clip_on=False, **style)  # pyright: ignore
    # What counts lies inside.
    width = side - 2 * border
    axis.add_patch(
        Rectangle((border, border), width, width, fill=False, ls=":", ec="#555555")
    )
