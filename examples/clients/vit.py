"""A Flax Linen vision transformer with dropout; its key is part of the `TrainState`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training import train_state
from jax import lax
from jax.sharding import PartitionSpec as P

import backend

SIDE, PATCH, WIDTH, HEADS, LAYERS, CLASSES, BATCH = 8, 2, 32, 4, 1, 10, 64
DROPOUT = 0.1


class Layer(nn.Module):
    """Attention and a two-layer perceptron, each around a normalisation."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        attention = nn.MultiHeadDotProductAttention(HEADS, dropout_rate=DROPOUT)
        y = attention(nn.LayerNorm()(x), deterministic=not train)
        x = x + nn.Dropout(DROPOUT)(y, deterministic=not train)
        y = nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x)))
        return x + nn.Dropout(DROPOUT)(nn.Dense(WIDTH)(y), deterministic=not train)


class ViT(nn.Module):
    """Patches and a class token in, the class token's logits out."""

    @nn.compact
    def __call__(self, images: Any, train: bool) -> Any:
        x = nn.Conv(WIDTH, (PATCH, PATCH), strides=(PATCH, PATCH))(images)
        x = jnp.reshape(x, (len(x), -1, WIDTH))
        token = self.param("token", nn.initializers.zeros, (1, 1, WIDTH))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, WIDTH)), x], axis=1)
        places = nn.initializers.normal(0.02)
        x = x + self.param("places", places, (1, *x.shape[1:]))
        for _ in range(LAYERS):
            x = Layer()(x, train)
        return nn.Dense(CLASSES)(nn.LayerNorm()(x[:, 0]))


class TrainState(train_state.TrainState):
    """Flax's own, with the key that dropout's keys are made from."""

    key: Any


def local_loss(params: Any, state: TrainState, batch: Any) -> Any:
    """Return the mean loss of this device's images."""
    # Another key at every step and on every device.
    key = jax.random.fold_in(state.key, state.step)
    key = jax.random.fold_in(key, lax.axis_index(backend.AXIS))
    images, labels = batch
    logits = state.apply_fn(
        {"params": params}, images, train=True, rngs={"dropout": key}
    )
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def pmap_step(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
    loss, grads = jax.value_and_grad(local_loss)(state.params, state, batch)
    grads = lax.pmean(grads, backend.AXIS)
    return state.apply_gradients(grads=grads), lax.pmean(loss, backend.AXIS)


def shard_map_step(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
    # jax.grad adds over devices where parameters are P(): the mean's gradient is whole.
    def loss_fn(params: Any) -> Any:
        return lax.pmean(local_loss(params, state, batch), backend.AXIS)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Scikit-learn's digits; the same order in every process."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = digits.images[..., None].astype(np.float32) / 16
    rng = np.random.default_rng(0)
    while True:
        chosen = rng.integers(0, len(images), BATCH)
        yield images[chosen], digits.target[chosen].astype(np.int32)


@backend.options
def main(backend_name: str, devices: int, steps: int) -> None:
    """Train under pmap or shard_map, JAX's or jaxcomm's."""
    run = backend.connect(backend_name, devices)
    model = ViT()
    image = jnp.zeros((1, SIDE, SIDE, 1))
    init = jax.jit(model.init, static_argnames="train")
    params = init(jax.random.key(0), image, train=False)["params"]
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.05, momentum=0.9))
    state = TrainState.create(
        apply_fn=model.apply, params=params, tx=tx, key=jax.random.key(1)
    )
    if run.shard_map:
        specs = P(), P(backend.AXIS)
        mapped = run.shard_map(shard_map_step, in_specs=specs, out_specs=P())
        step = jax.jit(mapped, donate_argnums=0)
    else:
        step = run.pmap(pmap_step, axis_name=backend.AXIS, donate_argnums=0)
    state = run.replicate(state)
    backend.train(run, "vit", step, state, batches(), steps, lambda s: s.params)


if __name__ == "__main__":
    main()
