"""A Flax Linen ResNet with synchronised batch normalisation and loss scaling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training import dynamic_scale, train_state
from jax import lax

import backend

SIDE, CLASSES, BATCH = 32, 10, 64


class Block(nn.Module):
    """Two convolutions and a way around them."""

    width: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        kind = {"dtype": self.dtype, "param_dtype": self.dtype}

        def norm(y: Any) -> Any:
            return nn.BatchNorm(
                use_running_average=not train, axis_name=backend.AXIS, **kind
            )(y)

        def conv(y: Any, side: int, stride: int = 1) -> Any:
            size, strides = (side, side), (stride, stride)
            return nn.Conv(self.width, size, strides, use_bias=False, **kind)(y)

        y = nn.relu(norm(conv(x, 3, self.stride)))
        y = norm(conv(y, 3))
        if x.shape != y.shape:
            x = norm(conv(x, 1, self.stride))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Three stages of two blocks."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        kind = {"dtype": self.dtype, "param_dtype": self.dtype}
        x = nn.relu(nn.Conv(16, (3, 3), use_bias=False, **kind)(x))
        for width in (16, 32, 64):
            x = Block(width, 1 if width == 16 else 2, self.dtype)(x, train)
            x = Block(width, 1, self.dtype)(x, train)
        return nn.Dense(CLASSES, **kind)(jnp.mean(x, (1, 2)))


class TrainState(train_state.TrainState):
    """Flax's own, with running statistics and the loss scale."""

    batch_stats: Any
    scale: dynamic_scale.DynamicScale


def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
    def loss_fn(params: Any) -> Any:
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            batch["image"],
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return jnp.mean(losses), updates["batch_stats"]

    # Averages gradients over the axis, and skips steps on all devices together.
    grad_fn = state.scale.value_and_grad(loss_fn, has_aux=True, axis_name=backend.AXIS)
    scale, finite, (loss, stats), grads = grad_fn(state.params)
    after = state.apply_gradients(grads=grads, batch_stats=stats, scale=scale)
    keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
    params = jax.tree.map(keep, after.params, state.params)
    opt_state = jax.tree.map(keep, after.opt_state, state.opt_state)
    after = after.replace(params=params, opt_state=opt_state)
    return after, lax.pmean(loss, backend.AXIS)


def batches(dtype: Any) -> Iterator[dict[str, np.ndarray]]:
    """Scikit-learn's digits, enlarged from 8 x 8; the same order in every process."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = digits.images[..., None].astype(dtype) / 16
    images = np.asarray(
        jax.image.resize(images, (len(images), SIDE, SIDE, 1), "bilinear")
    )
    rng = np.random.default_rng(0)
    while True:
        chosen = rng.integers(0, len(images), BATCH)
        labels = digits.target[chosen].astype(np.int32)
        yield {"image": images[chosen], "label": labels}


@backend.options
@click.option("--x64", is_flag=True, help="In float64, where rounding hides nothing.")
def main(backend_name: str, devices: int, steps: int, x64: bool) -> None:
    """Train under jax.pmap or jaxcomm."""
    jax.config.update("jax_enable_x64", x64)
    run = backend.connect(backend_name, devices)
    dtype = np.dtype("float64" if x64 else "float32")
    model = ResNet(dtype)
    # Shapes need no axis, and running statistics are not used for them.
    image = jnp.zeros((1, SIDE, SIDE, 1), dtype)
    variables = model.init(jax.random.key(0), image, train=False)
    state = TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=optax.sgd(0.05, momentum=0.9),
        batch_stats=variables["batch_stats"],
        scale=dynamic_scale.DynamicScale(),
    )
    step = run.pmap(train_step, axis_name=backend.AXIS, donate_argnums=0)
    backend.train(
        run,
        "resnet-x64" if x64 else "resnet",
        step,
        run.replicate(state),
        batches(dtype),
        steps,
        lambda s: {"params": s.params, "batch_stats": s.batch_stats},
    )


if __name__ == "__main__":
    main()
