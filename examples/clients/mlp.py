"""An Equinox MLP: arrays apart from all else by `eqx.partition`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import backend

BATCH = 128


def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Scikit-learn's digits; the same order in every process."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = digits.data.astype(np.float32) / 16
    rng = np.random.default_rng(0)
    while True:
        chosen = rng.integers(0, len(images), BATCH)
        yield images[chosen], digits.target[chosen].astype(np.int32)


@backend.options
def main(backend_name: str, devices: int, steps: int) -> None:
    """Train under jax.pmap or jaxcomm."""
    run = backend.connect(backend_name, devices)
    model = eqx.nn.MLP(64, 10, width_size=128, depth=2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    tx = optax.sgd(0.1, momentum=0.9)

    def train_step(state: Any, batch: Any) -> tuple[Any, Any]:
        params, opt_state = state
        images, labels = batch

        def loss_fn(params: Any) -> Any:
            logits = jax.vmap(eqx.combine(params, static))(images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.mean(losses)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        grads = lax.pmean(grads, backend.AXIS)
        updates, opt_state = tx.update(grads, opt_state, params)
        state = optax.apply_updates(params, updates), opt_state
        return state, lax.pmean(loss, backend.AXIS)

    step = run.pmap(train_step, axis_name=backend.AXIS, donate_argnums=0)
    state = run.replicate((params, tx.init(params)))
    backend.train(run, "mlp", step, state, batches(), steps, lambda s: s[0])


if __name__ == "__main__":
    main()
