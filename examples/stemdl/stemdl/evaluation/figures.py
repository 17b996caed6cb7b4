"""Pictures of what the network reconstructs and of how it learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, NullFormatter

from stemdl.data.dataset import Dataset
from stemdl.evaluation.metrics import nrmse

SHOWN = ("SrTiO3", "GaAs", "Ti", "CeO2", "Nb")
DPI = 150


def draw_reconstructions(path: Path, dataset: Dataset, predicted: np.ndarray) -> None:
    """Draw one held-out sample of several materials, each beside its diffraction.

    Truth, reconstruction and difference share one colour scale. Each sample is the
    material's median one by error, neither the best nor the worst.

    Args:
      path: the PNG to write.
      dataset: holds the held-out samples.
      predicted: (n, pixels, pixels) reconstructions of all of them.
    """
    errors = nrmse(predicted, dataset.test_y)
    chosen = shown(errors, dataset.test_names)
    titles = ("4 × 4 diffraction patterns", "true potential", "reconstruction",
              "difference")  # fmt: skip
    figure = Figure(figsize=(9.4, 2.15 * len(chosen) + 0.5), layout="constrained")
    axes = figure.subplots(len(chosen), len(titles), squeeze=False)
    truth = dataset.test_y[chosen]
    low, high = float(truth.min()), float(truth.max())
    # The difference needs both signs; zero is white for all three.
    norm = TwoSlopeNorm(0.0, min(low, -0.5 * high), high)
    image = None
    for row, index in zip(axes, chosen, strict=True):
        _draw_patterns(row[0], dataset.amplitudes(dataset.test_x[index]))
        row[0].set_ylabel(str(dataset.test_names[index]), fontsize=12)
        difference = predicted[index] - dataset.test_y[index]
        pictures = (dataset.test_y[index], predicted[index], difference)
        for axis, picture in zip(row[1:], pictures, strict=True):
            image = axis.imshow(
                picture,
                cmap="RdBu_r",
                norm=norm,
                extent=(0, dataset.optics.window, 0, dataset.optics.window),
            )
        row[3].set_ylabel(f"NRMSE {errors[index]:.2f}", fontsize=9)
        row[3].yaxis.set_label_position("right")
        scale_bar(row[1])
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=11)
    assert image is not None
    figure.colorbar(
        image, ax=axes[:, 3], shrink=0.6, label="projected potential (standardised)"
    )
    figure.suptitle("Materials the network has never seen", fontsize=13)
    figure.savefig(path, dpi=DPI)


def draw_losses(path: Path, losses: list[float]) -> None:
    """Draw the loss of every step and its running mean over 25 steps."""
    width = min(25, len(losses))
    mean = np.convolve(losses, np.full(width, 1 / width), mode="valid")
    steps = np.arange(1, len(losses) + 1)
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axis = figure.subplots()
    axis.semilogy(steps, losses, color="#9ecae1", linewidth=0.7, label="each step")
    axis.semilogy(
        steps[width - 1 :], mean, color="#08519c", label=f"mean of {width} steps"
    )
    axis.set_xlabel("step")
    axis.set_ylabel("training loss")
    axis.set_xlim(0, len(losses))
    axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=DPI)


def shown(errors: np.ndarray, names: np.ndarray) -> list[int]:
    """Choose a sample of each material of `SHOWN`, or of the first where none is there.

    Args:
      errors: (n,) by which each is its material's median one.
      names: (n,) of str.
    """
    there = [name for name in SHOWN if name in names]
    chosen = []
    for name in there or list(dict.fromkeys(names))[: len(SHOWN)]:
        candidates = np.flatnonzero(names == name)
        middle = np.argsort(errors[candidates])[len(candidates) // 2]
        chosen.append(int(candidates[middle]))
    return chosen


def _draw_patterns(axis: Axes, amplitudes: np.ndarray) -> None:
    """Tile (scan, scan, detector, detector) patterns with a gap between them."""
    gap = 2
    padded = np.pad(
        amplitudes, ((0, 0), (0, 0), (gap, gap), (gap, gap)), constant_values=np.nan
    )
    scan, _, side, _ = padded.shape
    tiles = padded.transpose(0, 2, 1, 3).reshape(scan * side, scan * side)
    axis.imshow(tiles, cmap="magma", vmin=0)
    axis.set_frame_on(False)


def scale_bar(axis: Axes) -> None:
    """Mark 2 A in the lower left corner of a picture whose axes are in A."""
    axis.plot([0.5, 2.5], [0.5, 0.5], color="black", linewidth=3)
    axis.text(
        1.5, 0.75, "2 Å", ha="center", va="bottom", fontsize=9,
        bbox={"facecolor": "white", "alpha": 0.6, "edgecolor": "none", "pad": 1},
    )  # fmt: skip
