"""One train step of the classifier, and what it is fed with.

It is written as one would for `jax.pmap`: gradients and batch statistics are averaged
over the named axis, whoever supplies that.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcomm.data import Batches
from stemdl.classification.data import Patterns
from stemdl.classification.network import ResNet, SpectralNet
from stemdl.data import augmentation
from stemdl.training.backends import AXIS, Backend, Step
from stemdl.training.recipe import State

Model = SpectralNet | ResNet

SAMPLES_PER_RATE = 32
"""Samples of a global batch that one --lr is for: the batch per rank of ORNL's code,
whose rate is 1e-3 times the ranks."""

WEIGHT_DECAY = 1e-2

SMOOTHING = 0.1
"""Share of each label that is spread over all outputs (Szegedy et al.,
arXiv:1512.00567)."""


_STREAM = 1
"""Keeps draws of projections apart from those of `augmentation.draw`."""

AT_ONCE = 32
"""Samples that `classify` gives to the network together."""


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
    model: Model,
    tx: optax.GradientTransformation,
    shape: tuple[int, ...],
    seed: int,
    dtype: Any,
) -> State:
    """The same in every process that calls it with the same arguments.

    Args:
      model: the network.
      tx: the optimiser.
      shape: of one sample.
      seed: of the parameters.
      dtype: of the parameters.
    """
    variables = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, *shape), dtype))
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    params = variables["params"]
    return State(params, variables["batch_stats"], tx.init(params))


def make_train_step(model: Model, tx: optax.GradientTransformation) -> Step:
    """Return `(state, (patterns, groups)) -> (state, loss)` of one device's samples."""

    def train_step(state: State, batch: Any) -> tuple[State, jax.Array]:
        x, y = batch

        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updated = model.apply(
                variables, x, train=True, mutable=["batch_stats"]
            )
            labels = jax.nn.one_hot(y, logits.shape[-1], dtype=logits.dtype)
            labels = optax.smooth_labels(labels, SMOOTHING)
            return optax.softmax_cross_entropy(logits, labels).mean(), updated[
                "batch_stats"
            ]

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
    """Endless augmented batches of samples, the same for any number of ranks.

    Yields:
      This process's part: patterns and space groups; pmap's with a device axis.
    """
    x, y = patterns.x, patterns.y
    order = Batches(len(x), batch, seed, rank=0, size=1)
    for step in itertools.count():
        rows = backend.share(order.at(step).indices)
        # Turned or mirrored, a crystal keeps its space group, unless that is one of the
        # 22 chiral ones: it is then the other of its pair, and of each pair only one is
        # there.
        symmetries = augmentation.draw(seed, order.epoch(step), len(x))
        chosen = _projections(seed, order.epoch(step), patterns)
        drawn = [
            augmentation.transform_label(
                x[chosen[i], np.arange(x.shape[1])], int(symmetries[i])
            )
            for i in rows.flat
        ]
        yield np.reshape(drawn, (*rows.shape, *x.shape[1:])), y[rows]


@functools.lru_cache(maxsize=2)
def _projections(seed: int, epoch: int, patterns: Patterns) -> np.ndarray:
    """Samples (n, projections) of the same material: each projection from one of them.

    Projections are simulated independently, so such a sample is as valid as they are.
    """
    _, first, inverse, count = np.unique(
        patterns.material, return_index=True, return_inverse=True, return_counts=True
    )
    rng = np.random.default_rng([seed, epoch, _STREAM])
    shape = (len(patterns.y), patterns.x.shape[1])
    # A material's samples follow one another.
    return first[inverse][:, None] + (
        rng.integers(1 << 30, size=shape) % count[inverse][:, None]
    )


def classify(model: Model, variables: Any, x: np.ndarray) -> np.ndarray:
    """Logits of samples: (n, projections, side, side) to (n, outputs)."""
    apply = jax.jit(model.apply)
    logits = []
    for start in range(0, len(x), AT_ONCE):
        part = x[start : start + AT_ONCE]
        # Filled up, so that one program serves the last ones too.
        filled = np.concatenate(
            [part, np.zeros((AT_ONCE - len(part), *x.shape[1:]), x.dtype)]
        )
        logits.append(np.asarray(apply(variables, filled))[: len(part)])
    return np.concatenate(logits)
