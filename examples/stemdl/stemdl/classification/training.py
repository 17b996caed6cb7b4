"""One train step of the classifier, and what it is fed with.

It is written as one would for `jax.pmap`: gradients and batch statistics are averaged
over the named axis, whoever supplies that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcomm.data import Batches
from stemdl.classification.data import Patterns
from stemdl.classification.network import ResNet
from stemdl.data import augmentation
from stemdl.training.backends import AXIS, Backend, Step
from stemdl.training.recipe import State

SAMPLES_PER_RATE = 32
"""Patterns of a global batch that one --lr is for: the batch per rank of ORNL's code,
whose rate is 1e-3 times the ranks."""

WEIGHT_DECAY = 1e-2


def optimizer(lr: float, batch: int, steps: int) -> optax.GradientTransformation:
    """AdamW with linear scaling, a linear warm-up and a cosine.

    The rate goes by the global batch: with so many samples per rank that is the rate
    times the ranks, and a run does not depend on how many ranks share its batches.
    """
    peak = lr * batch / SAMPLES_PER_RATE
    warm_up = min(steps // 10, 100)
    rate = optax.warmup_cosine_decay_schedule(
        peak / max(1, warm_up), peak, warm_up, steps, 0.01 * peak
    )
    return optax.adamw(rate, weight_decay=WEIGHT_DECAY)


def initial_state(
    model: ResNet, tx: optax.GradientTransformation, side: int, seed: int, dtype: Any
) -> State:
    """The same in every process that calls it with the same arguments."""
    shape = jnp.zeros((1, side, side), dtype)
    variables = jax.jit(model.init)(jax.random.key(seed), shape)
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    params = variables["params"]
    return State(params, variables["batch_stats"], tx.init(params))


def make_train_step(model: ResNet, tx: optax.GradientTransformation) -> Step:
    """Return `(state, (patterns, groups)) -> (state, loss)` of one device's samples."""

    def train_step(state: State, batch: Any) -> tuple[State, jax.Array]:
        x, y = batch

        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updated = model.apply(
                variables, x, train=True, mutable=["batch_stats"]
            )
            each = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return each.mean(), updated["batch_stats"]

        (loss, batch_stats), grads = jax.value_and_grad(loss_of, has_aux=True)(
            state.params
        )
        grads = jax.lax.pmean(grads, AXIS)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, batch_stats, opt_state), jax.lax.pmean(loss, AXIS)

    return train_step


def batches(
    patterns: Patterns, backend: Backend, batch: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless augmented batches of single patterns, the same for any number of ranks.

    Yields:
      This process's part: patterns and space groups; pmap's with a device axis.
    """
    projections = patterns.x.shape[1]
    x = patterns.x.reshape(-1, *patterns.x.shape[2:])
    y = np.repeat(patterns.y, projections)
    order = Batches(len(x), batch, seed, rank=0, size=1)
    for step in itertools.count():
        rows = backend.share(order.at(step).indices)
        # Turned or mirrored, a crystal keeps its space group, unless that is one of the
        # 22 chiral ones: none here is.
        symmetries = augmentation.draw(seed, order.epoch(step), len(x))
        drawn = [
            augmentation.transform_label(x[i], int(symmetries[i])) for i in rows.flat
        ]
        yield np.reshape(drawn, (*rows.shape, *x.shape[1:])), y[rows]


def classify(model: ResNet, variables: Any, x: np.ndarray) -> np.ndarray:
    """Logits of samples: (n, projections, side, side) to (n, projections, outputs)."""
    apply = jax.jit(model.apply)
    return np.stack([apply(variables, sample) for sample in x])
