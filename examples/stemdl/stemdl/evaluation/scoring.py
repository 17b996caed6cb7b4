"""All scores of one method's reconstructions."""

from __future__ import annotations

import dataclasses

import numpy as np

from stemdl.evaluation import columns
from stemdl.evaluation.columns import Comparison
from stemdl.evaluation.metrics import nrmse, pearson
from stemdl.evaluation.ring_correlation import THRESHOLDS, resolution, ring_correlation
from stemdl.evaluation.similarity import ssim


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """Scores of n samples.

    Attributes:
      nrmse: (n,), see `scores.nrmse`.
      pearson: (n,), see `scores.pearson`.
      ssim: (n,), see `similarity.ssim`.
      frequencies: (rings,) in 1/A.
      correlation: (n, rings), Fourier ring correlation.
      comparisons: atom columns, sample by sample.
    """

    nrmse: np.ndarray
    pearson: np.ndarray
    ssim: np.ndarray
    frequencies: np.ndarray
    correlation: np.ndarray
    comparisons: tuple[Comparison, ...]

    def resolution(self, threshold: str) -> np.ndarray:
        """Resolution in A at one of `THRESHOLDS`, (n,); see `resolution`."""
        return resolution(self.frequencies, self.correlation, THRESHOLDS[threshold])

    def select(self, chosen: np.ndarray) -> Scores:
        """The scores of some samples: indices, or a mask of shape (n,)."""
        indices = np.arange(len(self.nrmse))[chosen]
        return Scores(
            nrmse=self.nrmse[indices],
            pearson=self.pearson[indices],
            ssim=self.ssim[indices],
            frequencies=self.frequencies,
            correlation=self.correlation[indices],
            comparisons=tuple(self.comparisons[index] for index in indices),
        )

    def summary(self) -> dict[str, float]:
        """Means and medians over samples; columns are pooled."""
        found: dict[str, float] = {}
        for name in ("nrmse", "pearson", "ssim"):
            values = getattr(self, name)
            found[f"{name}_mean"] = float(values.mean())
            found[f"{name}_median"] = float(np.median(values))
        for threshold in THRESHOLDS:
            median = float(np.median(self.resolution(threshold)))
            found[f"resolution_{threshold}_median_A"] = median
        return found | columns.summarise(list(self.comparisons))

    def per_sample(self) -> dict[str, list[float]]:
        """Every sample's own figures; an error is NaN where no column was found."""
        found = {
            "nrmse": self.nrmse,
            "pearson": self.pearson,
            "ssim": self.ssim,
            **{f"resolution_{t}_A": self.resolution(t) for t in THRESHOLDS},
            "column_error_median_A": [
                np.median(c.errors) if len(c.errors) else np.nan
                for c in self.comparisons
            ],
            "columns_true": [c.true for c in self.comparisons],
            "columns_matched": [len(c.errors) for c in self.comparisons],
            "columns_reconstructed": [c.reconstructed for c in self.comparisons],
            "columns_false": [c.false for c in self.comparisons],
        }
        return {name: np.asarray(v).tolist() for name, v in found.items()}


def score(predicted: np.ndarray, truth: np.ndarray, sampling: float) -> Scores:
    """Score reconstructions.

    Args:
      predicted: (n, pixels, pixels), in units of the truth.
      truth: of the same shape, each of mean 0 and variance 1.
      sampling: distance between pixels in A.
    """
    frequencies, correlation = ring_correlation(predicted, truth, sampling)
    return Scores(
        nrmse=nrmse(predicted, truth),
        pearson=pearson(predicted, truth),
        ssim=ssim(predicted, truth),
        frequencies=frequencies,
        correlation=correlation,
        comparisons=tuple(
            columns.compare(p, t, sampling)
            for p, t in zip(predicted, truth, strict=True)
        ),
    )
