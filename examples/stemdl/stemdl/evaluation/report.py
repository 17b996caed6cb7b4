"""The whole evaluation as one tree of plain figures, and the pictures to it."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stemdl.data.dataset import DataConfig, Dataset
from stemdl.evaluation import consistency, curves, figures, markdown, robustness, sites
from stemdl.evaluation.baselines import Predictor
from stemdl.evaluation.scoring import Scores

NETWORK = "network"
"""Name of the trained network among the methods; the last of them."""

CONSISTENT = 80
"""Held-out samples whose patterns are simulated again, the first ones: materials take
turns."""


def write(
    out: Path,
    dataset: Dataset,
    config: DataConfig,
    methods: Mapping[str, Predictor],
    settings: Mapping[str, Any],
    losses: list[float],
    told: Callable[[str], None],
) -> dict[str, Any]:
    """Evaluate and write `report.json`, `report.md` and the pictures to `out`.

    Args:
      out: an existing directory.
      dataset: its held-out samples are scored.
      config: what the data set was simulated from.
      methods: what reconstructs, by name: baselines, then `NETWORK`.
      settings: of the run, as shown in the report.
      losses: of every training step.
      told: is called with what is done next.

    Returns:
      The content of `report.json`.
    """
    sampling = dataset.optics.window / dataset.optics.label_pixels
    told("scoring")
    doses: list[tuple[float, dict[str, Scores]]] = []
    for dose, scored in robustness.by_dose(dataset, methods, sampling):
        doses.append((dose, scored))
        told(f"scored at {dose:g} electrons per pattern")
    # Without noise, which is the first dose.
    scores = doses[0][1]
    thickness = robustness.thicknesses(config)
    edges, places = robustness.bins(thickness)
    predicted = methods[NETWORK](dataset.test_x)
    told("simulating patterns from reconstructions")
    report = {
        "settings": dict(settings),
        "data": json.loads(config.to_json()),
        "methods": {name: s.summary() for name, s in scores.items()},
        "materials": _by_group(scores, dataset.test_names),
        "thickness": _by_thickness(scores, edges, places),
        "dose": [
            {"electrons_per_pattern": dose, "methods": _summaries(scored)}
            for dose, scored in doses
        ],
        "consistency": _consistency(dataset, methods, thickness),
        "ring_correlation": {
            "frequencies_per_A": scores[NETWORK].frequencies.tolist(),
            "mean": {n: s.correlation.mean(0).tolist() for n, s in scores.items()},
        },
        "samples": {
            "index": list(range(config.train, config.samples)),
            "material": dataset.test_names.tolist(),
            "thickness_A": thickness.tolist(),
            "methods": {name: s.per_sample() for name, s in scores.items()},
        },
    }
    told("drawing")
    figures.draw_reconstructions(out / "reconstruction.png", dataset, predicted)
    figures.draw_losses(out / "loss.png", losses)
    ours = scores[NETWORK]
    sites.draw_columns(out / "columns.png", dataset, predicted, ours)
    sites.draw_profiles(out / "profile.png", dataset, predicted, ours)
    curves.draw_column_errors(out / "column_errors.png", ours)
    curves.draw_ring_correlation(out / "ring_correlation.png", scores)
    curves.draw_robustness(out / "robustness.png", report["thickness"], report["dose"])
    report = _plain(report)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "report.md").write_text(markdown.render(report))
    return report


def _summaries(scores: Mapping[str, Scores]) -> dict[str, dict[str, float]]:
    return {name: s.summary() for name, s in scores.items()}


def _by_group(scores: Mapping[str, Scores], groups: np.ndarray) -> dict[str, Any]:
    return {
        str(group): {
            "samples": int((groups == group).sum()),
            "methods": _summaries(
                {name: s.select(groups == group) for name, s in scores.items()}
            ),
        }
        for group in dict.fromkeys(groups)
    }


def _by_thickness(
    scores: Mapping[str, Scores], edges: np.ndarray, places: np.ndarray
) -> list[dict[str, Any]]:
    grouped = _by_group(scores, places)
    return [
        {"from_A": float(low), "to_A": float(high), **grouped[str(number)]}
        for number, (low, high) in enumerate(itertools.pairwise(edges))
        if str(number) in grouped
    ]


def _consistency(
    dataset: Dataset, methods: Mapping[str, Predictor], thickness: np.ndarray
) -> dict[str, Any]:
    """R factors of truth, network, the baseline before it, and of what is wrong."""
    count, optics = min(CONSISTENT, len(thickness)), dataset.optics
    observed = dataset.amplitudes(dataset.test_x[:count])
    slices = np.ceil(thickness[:count] / optics.slice_thickness).astype(int)
    truth = dataset.test_y[:count]
    labels = {"true label": truth}
    for name in reversed(list(methods)[-2:]):
        labels[name] = methods[name](dataset.test_x[:count])
    # Has a gain to fit, too, which a flat potential has not.
    labels["another sample's label"] = np.roll(truth, 1, axis=0)
    fits = {
        name: [
            consistency.fit(label, int(depth), patterns, optics)
            for label, depth, patterns in zip(those, slices, observed, strict=True)
        ]
        for name, those in labels.items()
    }
    r = {name: [fit.r for fit in those] for name, those in fits.items()}
    r["flat potential"] = [consistency.flat(patterns, optics) for patterns in observed]
    return {
        "samples": count,
        "probes": len(consistency.central(optics)) ** 2,
        "r_mean": {name: float(np.mean(values)) for name, values in r.items()},
        "r_median": {name: float(np.median(values)) for name, values in r.items()},
        "r": r,
        "gain_V_A": {name: [fit.gain for fit in those] for name, those in fits.items()},
    }


def _plain(tree: Any) -> Any:
    """JSON has neither infinity nor NaN: "inf" and null stand for them."""
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_plain(value) for value in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return None if math.isnan(tree) else "inf"
    return tree
