"""A small nnx transformer that learns to continue Python's own manual pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

import backend

VOCABULARY, LENGTH, WIDTH, HEADS, LAYERS, BATCH = 128, 64, 64, 4, 2, 16


class Layer(nnx.Module):
    """Attention and a two-layer perceptron, each around a normalisation."""

    def __init__(self, rngs: nnx.Rngs):
        self.before = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.between = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.widen = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.narrow = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.before(x), mask=mask)
        return x + self.narrow(nnx.gelu(self.widen(self.between(x))))


class Transformer(nnx.Module):
    """From characters to the next one's logits."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.places = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.layers = nnx.List([Layer(rngs) for _ in range(LAYERS)])
        self.out = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens) + self.places(jnp.arange(LENGTH))
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


def batches() -> Iterator[np.ndarray]:
    """Stretches of the text behind help(), which Python's library holds."""
    from pydoc_data import topics

    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
    rng = np.random.default_rng(0)
    while True:
        starts = rng.integers(0, len(codes) - LENGTH - 1, BATCH)
        yield np.stack([codes[s : s + LENGTH + 1] for s in starts]).astype(np.int32)


@backend.options
def main(backend_name: str, devices: int, steps: int) -> None:
    """Train under jax.pmap or jaxcomm."""
    run = backend.connect(backend_name, devices)
    graph, params = nnx.split(Transformer(nnx.Rngs(0)))
    # A large epsilon keeps rounding of tiny gradients from being magnified.
    tx = optax.adamw(3e-3, eps=1e-4)

    def train_step(state: Any, tokens: Any) -> tuple[Any, Any]:
        params, opt_state = state

        def loss_fn(params: Any) -> Any:
            logits = nnx.merge(graph, params)(tokens[:, :-1])
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, tokens[:, 1:]
            )
            return jnp.mean(losses)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        grads = lax.pmean(grads, backend.AXIS)
        updates, opt_state = tx.update(grads, opt_state, params)
        state = optax.apply_updates(params, updates), opt_state
        return state, lax.pmean(loss, backend.AXIS)

    step = run.pmap(train_step, axis_name=backend.AXIS, donate_argnums=0)
    state = run.replicate((params, tx.init(params)))
    backend.train(run, "transformer", step, state, batches(), steps, lambda s: s[0])


if __name__ == "__main__":
    main()
