"""Losses between potentials, as `calculate_loss_regressor` of nlaanait/stemdl has them.

Each takes predictions and labels, (n, pixels, pixels) of any float dtype, and returns a
scalar: the mean over samples, so that equal batches may be averaged over ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
import optax
from jax import Array

Loss = Callable[[Array, Array], Array]

NAMES = ("mse", "pairwise", "mae", "huber")


def pairwise(predicted: Array, labels: Array) -> Array:
    """Mean over all ordered pairs of pixels i != j of ((d_i - d_j)^2), d the error.

    TensorFlow 1's `mean_pairwise_squared_error`, but for its sum over the batch, where
    STEMDL had one sample per rank. A constant offset costs nothing. The pairs are not
    formed: their sum is 2 m sum (d - mean d)^2 for m pixels, of m (m - 1) pairs.
    """
    error = (predicted - labels).reshape(len(labels), -1)
    deviation = error - error.mean(1, keepdims=True)
    return 2 * jnp.mean((deviation**2).sum(1)) / (error.shape[1] - 1)


def gradient_error(predicted: Array, labels: Array) -> Array:
    """Mean squared differences between the errors of neighbouring pixels, both ways.

    It weighs an error by the square of its spatial frequency, and so counts what atom
    columns that nearly touch differ by.
    """
    error = predicted - labels
    down, across = jnp.diff(error, axis=1), jnp.diff(error, axis=2)
    return jnp.mean(down**2) + jnp.mean(across**2)


def named(name: str, huber_delta: float = 1.0, gradient_weight: float = 0.0) -> Loss:
    """Return one of `NAMES`, plus `gradient_error` times a weight.

    Args:
      name: "mse", "pairwise", "mae" (mean absolute error) or "huber".
      huber_delta: error beyond which Huber's loss grows linearly.
      gradient_weight: of `gradient_error`.
    """
    loss = _pixels(name, huber_delta)
    if not gradient_weight:
        return loss
    return lambda predicted, labels: (
        loss(predicted, labels) + gradient_weight * gradient_error(predicted, labels)
    )


def _pixels(name: str, huber_delta: float) -> Loss:
    if name == "pairwise":
        return pairwise
    each = {
        "mse": optax.losses.squared_error,
        "mae": lambda predicted, labels: jnp.abs(predicted - labels),
        "huber": functools.partial(optax.losses.huber_loss, delta=huber_delta),
    }[name]
    return lambda predicted, labels: jnp.mean(each(predicted, labels))
