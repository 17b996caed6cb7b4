"""Scores on held-out materials during the training. Nothing is chosen by them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from stemdl.evaluation.metrics import nrmse, pearson
from stemdl.model.network import StemNet
from stemdl.training.backends import Backend

BATCH = 40


class Predictor:
    """A network, jitted for inference."""

    def __init__(self, model: StemNet):
        self._apply = jax.jit(model.apply)

    def __call__(self, variables: Any, patterns: np.ndarray) -> np.ndarray:
        """Reconstruct potentials, some samples at a time.

        Args:
          variables: {"params", "batch_stats"}.
          patterns: (n, scan, scan, detector, detector) standardised amplitudes.

        Returns:
          (n, pixels, pixels) potentials, standardised.
        """
        parts = [
            self._apply(variables, patterns[start : start + BATCH])
            for start in range(0, len(patterns), BATCH)
        ]
        return np.concatenate([np.asarray(part) for part in parts])


class Monitor:
    """Scores a network on each process's share of samples and averages over all."""

    def __init__(
        self,
        model: StemNet,
        held_out: tuple[np.ndarray, np.ndarray],
        backend: Backend,
    ):
        self._predict, self._backend = Predictor(model), backend
        self._x, self._y = held_out

    def __call__(self, params: Any, batch_stats: Any) -> dict[str, float]:
        """Mean "nrmse" and "pearson" over all samples; every process calls it."""
        sums = {"nrmse": 0.0, "pearson": 0.0, "samples": float(len(self._y))}
        # With more processes than files of held-out samples some have none.
        if len(self._y):
            variables = {"params": params, "batch_stats": batch_stats}
            predicted = self._predict(variables, self._x)
            sums["nrmse"] = float(nrmse(predicted, self._y).sum())
            sums["pearson"] = float(pearson(predicted, self._y).sum())
        # One bucket: sums and number travel together.
        total = self._backend.mean(jax.tree.map(np.float32, sums))
        samples = total.pop("samples")
        return {name: float(score / samples) for name, score in total.items()}
