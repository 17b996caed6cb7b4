"""Pictures of scores: ring correlation, column errors, thickness and dose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stemdl.evaluation import columns
from stemdl.evaluation.figures import DPI
from stemdl.evaluation.ring_correlation import THRESHOLDS
from stemdl.evaluation.scoring import Scores

OURS = "#d62728"
OTHERS = ("#7f7f7f", "#17a2b8", "#ff9f1c", "#1f77b4", "#6a3d9a")
MARKERS = "sv^Do"


def draw_ring_correlation(path: Path, scores: Mapping[str, Scores]) -> None:
    """Draw the mean Fourier ring correlation of every method, and the thresholds.

    Args:
      path: the PNG to write.
      scores: by method, the network's last.
    """
    figure = Figure(figsize=(7.6, 5.6), layout="constrained")
    axis = figure.subplots()
    name, ours = list(scores.items())[-1]
    frequencies = ours.frequencies
    for (method, found), style in zip(scores.items(), _styles(scores), strict=True):
        axis.plot(frequencies, found.correlation.mean(0), label=method, **style)
    axis.fill_between(
        frequencies,
        *np.percentile(ours.correlation, [25, 75], axis=0),
        color=OURS,
        alpha=0.15,
        lw=0,
        label=f"{name}: middle half of samples",
    )
    for text, threshold in THRESHOLDS.items():
        axis.axhline(threshold, color="black", lw=1, ls=":")
        axis.annotate(
            text,
            (frequencies[-1], threshold),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            fontsize=11,
        )
    axis.set_xlim(0, frequencies[-1])
    axis.set_ylim(-0.1, 1.03)
    axis.set_xlabel("spatial frequency (1/Å)", fontsize=11)
    axis.set_ylabel("Fourier ring correlation with the truth", fontsize=11)
    lengths = [4, 2, 1.5, 1, 0.8, 0.7, 0.6, 0.55]
    top = axis.secondary_xaxis("top")
    top.set_xticks([1 / length for length in lengths], [f"{v:g}" for v in lengths])
    top.set_xlabel("length (Å)", fontsize=11)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=11)
    figure.savefig(path, dpi=DPI)


def draw_column_errors(path: Path, scores: Scores) -> None:
    """Draw a histogram of one method's column errors."""
    errors = np.concatenate([s.errors for s in scores.comparisons])
    summary = scores.summary()
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.hist(errors, bins=np.linspace(0, columns.RADIUS, 51).tolist(), color="#1f77b4")
    if len(errors):
        for name, text, style in (
            ("column_error_median_A", "median", "-"),
            ("column_error_p95_A", "95th percentile", "--"),
        ):
            label = f"{text}: {summary[name]:.3f} Å"
            axis.axvline(summary[name], color=OURS, ls=style, label=label)
        axis.legend(frameon=False, fontsize=11)
    axis.set_xlim(0, columns.RADIUS)
    axis.set_xlabel("distance from true to reconstructed column (Å)", fontsize=11)
    axis.set_ylabel("matched columns", fontsize=11)
    true = sum(s.true for s in scores.comparisons)
    axis.set_title(
        f"{summary['columns_found']:.1%} of {true} columns found; "
        f"{summary['columns_false']:.1%} of the reconstructed ones false",
        fontsize=12,
    )
    figure.savefig(path, dpi=DPI)


def draw_robustness(
    path: Path,
    thickness: Sequence[Mapping[str, Any]],
    dose: Sequence[Mapping[str, Any]],
) -> None:
    """Draw mean NRMSE against thickness and against dose.

    Args:
      path: the PNG to write.
      thickness: as in the report, by bin.
      dose: as in the report.
    """
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    middles = [(b["from_A"] + b["to_A"]) / 2 for b in thickness]
    _lines(left, middles, thickness)
    left.set_xticks(
        middles,
        [f"{b['from_A']:g}–{b['to_A']:g}\nn = {b['samples']}" for b in thickness],
    )
    left.set_xlabel("specimen thickness (Å)", fontsize=11)
    left.set_ylabel("NRMSE, mean over samples", fontsize=11)
    # From much to little: both panels get harder to the right.
    places = list(range(len(dose)))
    _lines(right, places, dose)
    right.set_xticks(places, [_electrons(d["electrons_per_pattern"]) for d in dose])
    right.set_xlabel("electrons per diffraction pattern", fontsize=11)
    for axis in (left, right):
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.margins(x=0.1)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=11
    )
    figure.savefig(path, dpi=DPI)


def _lines(
    axis: Axes, places: Sequence[float], groups: Sequence[Mapping[str, Any]]
) -> None:
    methods = list(groups[0]["methods"])
    for name, style in zip(methods, _styles(methods), strict=True):
        values = [group["methods"][name]["nrmse_mean"] for group in groups]
        axis.plot(places, values, label=name, **style)


def _styles(methods: Any) -> list[dict[str, Any]]:
    others = [
        {"color": color, "marker": marker, "ms": 4, "lw": 1.3}
        for color, marker in zip(OTHERS, MARKERS, strict=True)
    ][: len(methods) - 1]
    return [*others, {"color": OURS, "marker": "o", "ms": 6, "lw": 2.4, "zorder": 3}]


def _electrons(dose: float) -> str:
    if np.isinf(dose):
        return "no noise"
    return f"$10^{{{np.log10(dose):g}}}$"
