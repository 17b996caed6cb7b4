"""A causal language model in plain JAX, with dropout and a checkpoint half-way."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

import backend

VOCABULARY, LENGTH, WIDTH, HEADS, LAYERS, BATCH = 128, 32, 32, 4, 2, 16
DROPOUT, HELD_OUT = 0.1, 40  # HELD_OUT stretches do not fill their last batch


def initial(key: Any) -> dict[str, Any]:
    """Return parameters; those of the layers are stacked, for `lax.scan`."""
    shapes = {
        "embed": (VOCABULARY, WIDTH),
        "places": (LENGTH, WIDTH),
        "layers": {
            "qkv": (LAYERS, WIDTH, 3 * WIDTH),
            "merge": (LAYERS, WIDTH, WIDTH),
            "widen": (LAYERS, WIDTH, 4 * WIDTH),
            "narrow": (LAYERS, 4 * WIDTH, WIDTH),
        },
    }
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(leaves))
    scaled = [
        jax.random.normal(key, shape) * shape[-2] ** -0.5
        for key, shape in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, scaled)


def normalise(x: Any) -> Any:
    return x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def drop(x: Any, key: Any) -> Any:
    """Set some to 0, and magnify the others; none without a key."""
    if key is None:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - DROPOUT, x.shape), x, 0) / (
        1 - DROPOUT
    )


def losses(params: Any, tokens: Any, key: Any = None) -> Any:
    """Return each stretch's mean loss; with dropout where there is a key."""
    causal = jnp.tri(LENGTH, dtype=bool)

    @jax.checkpoint
    def layer(x: Any, of_layer: Any) -> tuple[Any, None]:
        weights, keys = of_layer
        first, second = (None, None) if keys is None else keys
        heads = jnp.reshape(
            normalise(x) @ weights["qkv"], (*x.shape[:2], 3, HEADS, WIDTH // HEADS)
        )
        q, k, v = (heads[:, :, i] for i in range(3))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (WIDTH // HEADS) ** -0.5
        scores = jax.nn.softmax(jnp.where(causal, scores, -1e9))
        merged = jnp.reshape(jnp.einsum("bhqk,bkhd->bqhd", scores, v), x.shape)
        x = x + drop(merged @ weights["merge"], first)
        wide = jax.nn.gelu(normalise(x) @ weights["widen"])
        return x + drop(wide @ weights["narrow"], second), None

    x = params["embed"][tokens[:, :-1]] + params["places"]
    keys = None if key is None else jax.random.split(key, (LAYERS, 2))
    x, _ = lax.scan(layer, x, (params["layers"], keys))
    logits = normalise(x) @ params["embed"].T
    return jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]), -1
    )


def text() -> np.ndarray:
    """The text behind help(), which Python's library holds."""
    from pydoc_data import topics

    whole = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    return np.frombuffer(whole.encode("ascii", "replace"), np.uint8).astype(np.int32)


def stretches(codes: np.ndarray, starts: Any) -> np.ndarray:
    return np.stack([codes[s : s + LENGTH + 1] for s in starts])


def held_out(codes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of the text's end, and weights: 0 for what fills up the last one."""
    tail = codes[-HELD_OUT * LENGTH - 1 :]
    rows = stretches(tail, range(0, HELD_OUT * LENGTH, LENGTH))
    for first in range(0, HELD_OUT, BATCH):
        batch = rows[first : first + BATCH]
        short = BATCH - len(batch)
        weights = np.pad(np.ones(len(batch), np.float32), (0, short))
        yield np.pad(batch, ((0, short), (0, 0))), weights


@backend.options
@click.option("--resume", is_flag=True, help="Begin at the checkpoint of a run before.")
def main(backend_name: str, devices: int, steps: int, resume: bool) -> None:
    """Train under pmap or shard_map, JAX's or jaxcomm's."""
    run = backend.connect(backend_name, devices)
    # A large epsilon keeps rounding of tiny gradients from being magnified.
    tx = optax.adamw(3e-3, eps=1e-4)
    codes = text()

    def local_loss(params: Any, batch: Any) -> Any:
        tokens, keys = batch  # this device's block of keys holds one
        return jnp.mean(losses(params, tokens, keys[0]))

    def update(state: Any, grads: Any) -> Any:
        params, opt_state = state
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def pmap_step(state: Any, batch: Any) -> tuple[Any, Any]:
        loss, grads = jax.value_and_grad(local_loss)(state[0], batch)
        grads = lax.pmean(grads, backend.AXIS)
        return update(state, grads), lax.pmean(loss, backend.AXIS)

    def shard_map_step(state: Any, batch: Any) -> tuple[Any, Any]:
        # jax.grad adds over devices where parameters are P(): the mean's is whole.
        def loss_fn(params: Any) -> Any:
            return lax.pmean(local_loss(params, batch), backend.AXIS)

        loss, grads = jax.value_and_grad(loss_fn)(state[0])
        return update(state, grads), loss

    def evaluate(params: Any, batch: Any) -> Any:
        tokens, weights = batch
        sums = jnp.sum(weights * losses(params, tokens)), jnp.sum(weights)
        return lax.psum(sums, backend.AXIS)

    if run.shard_map:
        specs = {"in_specs": (P(), P(backend.AXIS)), "out_specs": P()}
        step = jax.jit(run.shard_map(shard_map_step, **specs), donate_argnums=0)
        eval_step = jax.jit(run.shard_map(evaluate, **specs))
    else:
        step = run.pmap(pmap_step, axis_name=backend.AXIS, donate_argnums=0)
        eval_step = run.pmap(evaluate, axis_name=backend.AXIS)

    def batches(start: int) -> Iterator[Any]:
        """Make a step's batch and keys from its number: any step can be the first."""
        for number in itertools.count(start):
            rng = np.random.default_rng((0, number))
            starts = rng.integers(0, len(codes) - (HELD_OUT + 1) * LENGTH - 1, BATCH)
            key = jax.random.fold_in(jax.random.PRNGKey(1), number)
            yield stretches(codes, starts), jax.random.split(key, run.total)

    def results(state: Any) -> Any:
        """Parameters, and the mean loss over the held-out stretches."""
        found = [eval_step(state[0], run.shard(batch)) for batch in held_out(codes)]
        total, weight = jax.tree.map(lambda *x: sum(x), *found)
        return {"params": state[0], "held out": total / weight}

    params = initial(jax.random.key(0))
    begin, state = 0, (params, tx.init(params))
    if resume:
        begin, state = backend.restore(run, "language_model", like=state)
    else:
        backend.forget(run, "language_model")

    def after(done: int, state: Any) -> None:
        if not resume and done == (steps + 1) // 2:
            backend.save(run, "language_model", done, run.first_copy(state))

    name = "language_model-resumed" if resume else "language_model"
    left, state = steps - begin, run.replicate(state)
    backend.train(run, name, step, state, batches(begin), left, results, after)


if __name__ == "__main__":
    main()
