"""Optimisers and learning rates: Adam or SGD, LARC per scope, warm-up and decay."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from stemdl.config import Optimizer, Schedule
from stemdl.model.network import scope_of

HIGHEST_LR = 1.0
"""Cap on a rate that was multiplied by the number of ranks, as in STEMDL."""

SMALLEST_RATIO = 1e-7
"""STEMDL's `LARC_min_update`, which keeps a scope of zeros from standing still."""


def learning_rate(
    optimizer: Optimizer, schedule: Schedule, steps: int, ranks: int
) -> optax.Schedule:
    """Linear warm-up, then a cosine or a staircase.

    Args:
      optimizer: its `lr` is reached after the warm-up, times `ranks` if the schedule
        says so (Goyal et al., arXiv:1706.02677), at most `HIGHEST_LR`.
      schedule: the shape.
      steps: length of the training; a cosine ends there, a warm-up by its middle.
      ranks: how many share a batch.

    Returns:
      The rate as a function of the number of updates done.
    """
    peak = optimizer.lr
    if schedule.times_ranks:
        peak = min(peak * ranks, max(HIGHEST_LR, optimizer.lr))
    warm_up = min(schedule.warm_up_steps, steps // 2)
    first = peak / max(1, schedule.warm_up_steps)
    if schedule.name == "cosine":
        final = schedule.final_fraction * peak
        return optax.warmup_cosine_decay_schedule(first, peak, warm_up, steps, final)
    staircase = optax.exponential_decay(
        peak, schedule.decay_steps, schedule.decay_rate, staircase=True
    )
    if warm_up == 0:
        return staircase
    rise = optax.linear_schedule(first, peak, warm_up)
    return optax.join_schedules([rise, staircase], [warm_up])


def make(
    optimizer: Optimizer, schedule: Schedule, steps: int, ranks: int = 1
) -> optax.GradientTransformation:
    """Return the transformation of reduced gradients into updates."""
    rate = learning_rate(optimizer, schedule, steps, ranks)
    if optimizer.name == "adam":
        tx = optax.adam(rate)
    else:
        tx = optax.sgd(rate, momentum=optimizer.momentum or None)
    if optimizer.larc == "off":
        return tx
    clip_to = rate if optimizer.larc == "clip" else None
    return optax.chain(
        scale_by_larc(optimizer.larc_eta, optimizer.larc_epsilon, clip_to), tx
    )


def scale_by_larc(
    eta: float, epsilon: float, clip_to: optax.Schedule | None = None
) -> optax.GradientTransformation:
    """Layer-wise adaptive rates (You et al., arXiv:1708.03888), a scope at a time.

    Norms are those of all leaves of a scope together, as `post_process_gradients` of
    nlaanait/stemdl has it; `optax.scale_by_trust_ratio` goes by single leaves. A
    scope's gradients are multiplied by eta |w| / (|g| + epsilon), at most 1 and at
    least `SMALLEST_RATIO`.

    Args:
      eta: how much of a scope's norm an update of rate 1 may be.
      epsilon: added to the gradient's norm.
      clip_to: the learning rate. If given the factor is divided by it, so that only
        updates larger than eta |w| are made smaller.

    Returns:
      A transformation that needs `params`.
    """

    def init(params: Any) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "LARC needs the parameters: tx.update(grads, state, params)"
            )
        rate = 1.0 if clip_to is None else clip_to(state.count)
        found, treedef = jax.tree_util.tree_flatten_with_path(updates)
        members: dict[str | None, list[int]] = {}
        for k, (path, _) in enumerate(found):
            members.setdefault(scope_of(jax.tree_util.keystr(path)), []).append(k)
        gradients = [leaf for _, leaf in found]
        weights = jax.tree.leaves(params)
        for chosen in members.values():
            of_weights = optax.tree.norm([weights[k] for k in chosen])
            of_gradients = optax.tree.norm([gradients[k] for k in chosen])
            ratio = eta * of_weights / (rate * (of_gradients + epsilon))
            ratio = jnp.clip(ratio, SMALLEST_RATIO, 1.0)
            for k in chosen:
                gradients[k] = gradients[k] * ratio.astype(gradients[k].dtype)
        count = optax.safe_increment(state.count)
        return (
            jax.tree.unflatten(treedef, gradients),
            optax.ScaleByScheduleState(count),
        )

    return optax.GradientTransformation(init, update)
