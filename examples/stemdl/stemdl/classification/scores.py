"""How well space groups are told, and the picture of what is taken for what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import ConfusionMatrixDisplay, accuracy_score, f1_score


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
    """Score the mean over a sample's projections, and the projections one by one.

    Args:
      logits: (n, projections, outputs).
      truth: (n,) space groups.
    """
    return {
        **score(truth, logits.mean(1).argmax(-1)),
        "top1_of_each_projection": [
            score(truth, one.argmax(-1))["top1"] for one in logits.swapaxes(0, 1)
        ],
    }


def most_frequent(train: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Score the answer that is always the training samples' most frequent group."""
    majority = DummyClassifier(strategy="most_frequent").fit(train[:, None], train)
    return score(truth, np.asarray(majority.predict(truth[:, None])))


def radial_profiles(patterns: np.ndarray) -> np.ndarray:
    """Mean of patterns (..., side, side) over rings a pixel wide: (..., side // 2)."""
    side = patterns.shape[-1]
    distance = np.hypot(*(np.indices((side, side)) - side // 2)).round()
    rings = [patterns[..., distance == radius].mean(-1) for radius in range(side // 2)]
    return np.stack(rings, -1)


def radial_forest(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray
) -> dict[str, float]:
    """Score a random forest on radial profiles: what sizes alone tell.

    It learns from single patterns and averages logarithms of probabilities over a
    sample's projections, as the network does.

    Args:
      train_x: (n, projections, side, side) patterns.
      train_y: (n,) space groups.
      test_x: as train_x.
      test_y: as train_y.
    """
    seen, unseen = radial_profiles(train_x), radial_profiles(test_x)
    forest = RandomForestClassifier(300, random_state=0)
    forest.fit(seen.reshape(-1, seen.shape[-1]), train_y.repeat(seen.shape[1]))
    probabilities = forest.predict_proba(unseen.reshape(-1, unseen.shape[-1]))
    # Where no tree votes for a group its logarithm would be infinite.
    logits = np.log(np.maximum(np.asarray(probabilities), 1e-6))
    mean = logits.reshape(*unseen.shape[:2], -1).mean(1)
    return score(test_y, forest.classes_[mean.argmax(-1)])


def draw_confusion(path: Path, truth: np.ndarray, predicted: np.ndarray) -> None:
    """Draw which share of each space group's samples is taken for which other.

    Args:
      path: the PNG to write.
      truth: (n,) space groups.
      predicted: (n,) space groups.
    """
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.subplots()
    ConfusionMatrixDisplay.from_predictions(
        truth, predicted, normalize="true", values_format=".2f", cmap="Blues", ax=axes,
        im_kw={"vmin": 0, "vmax": 1},
    )  # fmt: skip
    axes.set(
        title="Materials the network has never seen",
        xlabel="predicted space group",
        ylabel="true space group",
    )
    figure.savefig(path, dpi=150)
