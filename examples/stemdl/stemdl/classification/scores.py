"""How well space groups are told, and what is taken for what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from stemdl.classification import space_groups
from stemdl.classification.data import Patterns
from stemdl.classification.network import fourier, rings

PENALTIES = (1.0, 10.0, 100.0, 1000.0)
"""Ridge's penalties; the one that is best on the validation materials is taken."""


def score(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Top-1 accuracy and macro-F1.

    Args:
      truth: (n,) space groups.
      predicted: (n,) space groups; one that `truth` lacks is wrong, and no class that
        the F1 is averaged over.
    """
    classes = np.unique(truth)
    nothing: Any = 0.0  # scikit-learn annotates it as a str
    f1 = f1_score(
        truth, predicted, labels=classes, average="macro", zero_division=nothing
    )
    top1 = accuracy_score(truth, predicted)
    return {"top1": float(top1), "macro_f1": float(f1)}


def score_logits(logits: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Score logits (n, outputs); with the share that is among the first five."""
    first = np.argsort(-logits, -1)[:, :5]
    top5 = float((first == truth[:, None]).any(-1).mean())
    return {**score(truth, logits.argmax(-1)), "top5": top5}


def most_frequent(train: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Score the answer that is always the training samples' most frequent group."""
    majority = DummyClassifier(strategy="most_frequent").fit(train[:, None], train)
    return score(truth, np.asarray(majority.predict(truth[:, None])))


def radial_profiles(patterns: np.ndarray) -> np.ndarray:
    """Mean of patterns (..., side, side) over rings a pixel wide: (..., side // 2)."""
    side = patterns.shape[-1]
    distance = np.hypot(*(np.indices((side, side)) - side // 2)).round()
    profiles = [
        patterns[..., distance == radius].mean(-1) for radius in range(side // 2)
    ]
    return np.stack(profiles, -1)


def spectra(patterns: np.ndarray) -> np.ndarray:
    """Angular power spectra of patterns: what turning and mirroring leave of each ring.

    Args:
      patterns: (..., side, side).

    Returns:
      (..., side // 2 + 1, ORDERS) float32, logarithms of amplitudes.
    """
    amplitudes = np.hypot(*fourier(rings(patterns)))
    return np.log(amplitudes + 1e-2).astype(np.float32)


FEATURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "radial profiles": radial_profiles,
    "angular spectra": spectra,
}


def baselines(
    train: Patterns, validation: Patterns, tests: dict[str, Patterns]
) -> dict[str, dict[str, dict[str, float]]]:
    """Score ridge and a random forest on features that turning leaves as they are.

    Like the network they see the three projections of a sample together, in order.

    Args:
      train: what they learn from.
      validation: chooses ridge's penalty.
      tests: what they are scored on, by name.

    Returns:
      For each method, a score for each of `tests`.
    """
    found = {}
    for name, features in FEATURES.items():

        def joined(samples: Patterns, features: Any = features) -> np.ndarray:
            return features(samples.x).reshape(len(samples.x), -1)

        seen = joined(train)
        ridge = _ridge(seen, train.y, joined(validation), validation.y)
        forest = RandomForestClassifier(100, random_state=0).fit(seen, train.y)
        for method, model in (("ridge", ridge), ("forest", forest)):
            found[f"{method}, {name}"] = {
                test: score(samples.y, model.predict(joined(samples)))
                for test, samples in tests.items()
            }
    return found


def _ridge(x: np.ndarray, y: np.ndarray, unseen: np.ndarray, truth: np.ndarray) -> Any:
    fitted = [
        make_pipeline(StandardScaler(), RidgeClassifier(penalty)).fit(x, y)
        for penalty in PENALTIES
    ]
    return max(fitted, key=lambda m: score(truth, m.predict(unseen))["macro_f1"])


def explain(truth: np.ndarray, predicted: np.ndarray, most: int = 20) -> dict[str, Any]:
    """Say what errors have in common with the truth.

    Args:
      truth: (n,) space groups.
      predicted: (n,) space groups.
      most: how many of the commonest errors are listed.

    Returns:
      The shares of errors whose crystal system, Laue class and point group are right,
      beside the shares among all pairs of different groups in `truth`; F1 of each
      group; and the commonest errors.
    """
    wrong = truth != predicted
    pairs = list(zip(truth[wrong].tolist(), predicted[wrong].tolist(), strict=True))
    classes = np.unique(truth).tolist()
    every = [(a, b) for a in classes for b in classes if a != b]
    same: dict[str, Callable[[int], str]] = {
        "crystal_system": space_groups.crystal_system,
        "laue_class": space_groups.laue_class,
        "point_group": space_groups.point_group,
    }

    def shares(of: list[tuple[int, int]]) -> dict[str, float]:
        return {
            name: sum(what(a) == what(b) for a, b in of) / max(1, len(of))
            for name, what in same.items()
        }

    each = f1_score(truth, predicted, labels=classes, average=None, zero_division=0)  # type: ignore[arg-type]
    return {
        "errors": len(pairs) / len(truth),
        "of_errors_right": shares([(a, b) for a, b in pairs if b]),
        "of_all_pairs_right": shares(every),
        "f1_of_group": dict(
            zip(map(str, classes), np.asarray(each).tolist(), strict=True)
        ),
        "commonest": [
            {
                "truth": a,
                "taken_for": b,
                "share": count / int((truth == a).sum()),
                "point_groups": [
                    space_groups.point_group(a),
                    space_groups.point_group(b),
                ],
            }
            for (a, b), count in Counter(p for p in pairs if p[1]).most_common(most)
        ],
    }


def draw_confusion(path: Path, truth: np.ndarray, predicted: np.ndarray) -> None:
    """Draw which share of each space group's samples is taken for which other.

    Args:
      path: the PNG to write.
      truth: (n,) space groups.
      predicted: (n,) space groups.
    """
    classes = np.unique(truth).tolist()
    shares = confusion_matrix(truth, predicted, labels=classes, normalize="true")
    figure = Figure(figsize=(9.6, 8.8), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(
        shown, ax=axes, shrink=0.6, label="share of the true group's samples"
    )
    places = range(len(classes))
    axes.set_xticks(places, map(str, classes), rotation=90, fontsize=5.5)
    axes.set_yticks(places, map(str, classes), fontsize=5.5)
    systems = [space_groups.crystal_system(number) for number in classes]
    for place in places[1:]:
        if systems[place] != systems[place - 1]:
            axes.axhline(place - 0.5, color="tab:orange", linewidth=0.7)
            axes.axvline(place - 0.5, color="tab:orange", linewidth=0.7)
    axes.set(
        title="Materials the network has never seen; lines part crystal systems",
        xlabel="predicted space group",
        ylabel="true space group",
    )
    figure.savefig(path, dpi=150)
