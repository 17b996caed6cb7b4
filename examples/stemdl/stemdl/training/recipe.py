"""One train step, put together from a configuration.

It is written as one would for `jax.pmap`: gradients and batch statistics are averaged
over the named axis, whoever supplies that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcomm
from stemdl.config import Communication, Config, Network
from stemdl.model import losses
from stemdl.model.network import NETWORKS, StemNet, scope_of
from stemdl.training import precision
from stemdl.training.backends import AXIS, Backend
from stemdl.training.precision import LossScale

Batch = tuple[jax.Array, jax.Array]
TrainStep = Callable[["State", Batch], tuple["State", jax.Array]]

GROUPS = {"planner": None, "scopes": scope_of}


class State(NamedTuple):
    """What a train step reads and renews; no loss scale but in float16."""

    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    loss_scale: LossScale | None = None


def build(network: Network, pixels: int, **attributes: Any) -> StemNet:
    """Return the network that a configuration names.

    Args:
      network: the settings.
      pixels: side of the labels.
      **attributes: others of `StemNet`: axis_name, dtype.
    """
    if network.layout != "default":
        attributes["layout"] = network.layout
    return NETWORKS[network.name].clone(
        pixels=pixels, checkpoint=network.checkpoint, **attributes
    )


def initial_state(
    model: StemNet, tx: optax.GradientTransformation, sample: np.ndarray, config: Config
) -> State:
    """The same on every rank that calls it with the same configuration.

    Args:
      model: the network.
      tx: the optimiser.
      sample: (scan, scan, detector, detector) patterns, for their shape.
      config: gives the seed and the dtypes.
    """
    training = config.training
    variables = jax.jit(model.init)(jax.random.key(training.seed), sample[None])
    dtype = jnp.float64 if training.float64 else jnp.float32
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    scale = precision.initial(config.precision)
    return State(params, batch_stats, tx.init(params), scale)


def gradient_mean(communication: Communication) -> Callable[[Any], Any]:
    """Return what averages gradients over ranks.

    Without a wire dtype that is `lax.pmean`, planned with all other collectives of the
    step. With one it is `all_reduce`, which keeps batch statistics out of it.
    """
    if communication.wire_dtype == "float32":
        return lambda grads: jax.lax.pmean(grads, AXIS)
    return lambda grads: jaxcomm.all_reduce(
        grads,
        wire_dtype=communication.wire_dtype,
        groups=GROUPS[communication.groups],
        bucket_bytes=communication.bucket_bytes or None,
    )


def make_train_step(
    model: StemNet, tx: optax.GradientTransformation, config: Config
) -> TrainStep:
    """Return `(state, (patterns, labels)) -> (state, loss)` of one device's samples.

    A rank's samples divide over `training.accumulate`. `optax.MultiSteps` would
    accumulate over calls and reduce each part; here a batch is reduced once.
    """
    loss_of = losses.named(**dataclasses.asdict(config.loss))
    parts = config.training.accumulate
    mean = gradient_mean(config.communication)

    def part(params: Any, batch_stats: Any, scale: Any, batch: Batch) -> Any:
        """Gradients of the scaled loss, the loss, and the new batch statistics."""
        x, y = batch

        def scaled(params: Any) -> tuple[jax.Array, Any]:
            predicted, updated = model.apply(
                {"params": params, "batch_stats": batch_stats},
                x,
                train=True,
                mutable=["batch_stats"],
            )
            loss = loss_of(predicted, y)
            scaled = loss if scale is None else loss * scale
            return scaled, (loss, updated.get("batch_stats", {}))

        return jax.grad(scaled, has_aux=True)(params)

    def train_step(state: State, batch: Batch) -> tuple[State, jax.Array]:
        loss_scale = state.loss_scale
        scale = None if loss_scale is None else loss_scale.scale
        if parts == 1:
            grads, (loss, batch_stats) = part(
                state.params, state.batch_stats, scale, batch
            )
        else:
            split = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), batch)

            def add(carry: Any, batch: Batch) -> tuple[Any, None]:
                before, loss_before, batch_stats = carry
                grads, (loss, batch_stats) = part(
                    state.params, batch_stats, scale, batch
                )
                total = jax.tree.map(jnp.add, before, grads)
                return (total, loss_before + loss, batch_stats), None

            zeros = jax.tree.map(jnp.zeros_like, state.params)
            zero = jnp.zeros((), batch[1].dtype)
            start = (zeros, zero, state.batch_stats)
            (grads, loss, batch_stats), _ = jax.lax.scan(add, start, split)
            grads, loss = jax.tree.map(lambda a: a / parts, (grads, loss))
        grads = mean(grads)
        if scale is not None:
            # Only now: in float16 on the wire they too need the scale's help.
            grads = jax.tree.map(lambda g: g / scale, grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = State(params, batch_stats, opt_state)
        if loss_scale is not None:
            finite = precision.all_finite(grads)
            # Statistics too: what overflowed may have passed through them.
            new = precision.where(finite, new, state._replace(loss_scale=None))
            interval = config.precision.growth_interval
            new = new._replace(loss_scale=loss_scale.after(finite, interval))
        return new, jax.lax.pmean(loss, AXIS)

    return train_step


def compile_step(
    model: StemNet, tx: optax.GradientTransformation, config: Config, backend: Backend
) -> Any:
    """Make the step of `make_train_step` run on all devices of a backend."""
    communication = config.communication
    return backend.compile(
        make_train_step(model, tx, config),
        groups=GROUPS[communication.groups],
        bucket_bytes=communication.bucket_bytes or None,
    )
