"""One rank of the tracing benchmark: trace and lower ResNet-50's training step.

benchmarks.tracing.worker OUT REPEATS; OUT gets the samples of rank 0, in milliseconds.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxcomm
from jaxcomm import data_parallel
from jaxcomm.tracing import rewrite

AXIS, WARM_UP = "batch", 1


class Bottleneck(nn.Module):
    """Three convolutions and a way around them (He et al., 2016, table 1)."""

    width: int
    stride: int
    axis: str | None = AXIS
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Any) -> Any:
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=False,
            axis_name=self.axis,
            dtype=self.dtype,
        )
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        strides = (self.stride, self.stride)
        y = nn.relu(norm()(conv(self.width, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.width, (3, 3), strides)(y)))
        y = norm()(conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = norm()(conv(4 * self.width, (1, 1), strides)(x))
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """161 parameters, 53 batch normalisations, synchronised over the axis."""

    axis: str | None = AXIS
    dtype: Any = None
    blocks: tuple[int, ...] = (3, 4, 6, 3)

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(64, (7, 7), (2, 2), use_bias=False, dtype=self.dtype)(x)
        norm = nn.BatchNorm(
            use_running_average=False, axis_name=self.axis, dtype=self.dtype
        )
        x = nn.max_pool(nn.relu(norm(x)), (3, 3), (2, 2), padding="SAME")
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Bottleneck(64 << stage, stride, self.axis, self.dtype)(x)
        return nn.Dense(1000)(jnp.mean(x, (1, 2), dtype=jnp.float32))


class TrainState(train_state.TrainState):
    """Flax's own, with running statistics."""

    batch_stats: Any


def over_axis(tree: Any) -> Any:
    return lax.pmean(tree, AXIS)


def train_step(
    state: TrainState,
    images: Any,
    labels: Any,
    mean: Callable[[Any], Any] = over_axis,
) -> tuple[TrainState, Any]:
    def loss_fn(params: Any) -> Any:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = state.apply_fn(variables, images, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses), updates["batch_stats"]

    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state = state.apply_gradients(grads=mean(grads), batch_stats=stats)
    return state, mean(loss)


def abstract_state(model: ResNet50, pixels: int = 224) -> TrainState:
    """The state's shapes; nothing is computed."""

    def create() -> TrainState:
        images = jnp.zeros((1, pixels, pixels, 3))
        variables = model.init(jax.random.key(0), images)
        return TrainState.create(
            apply_fn=model.apply,
            params=variables["params"],
            tx=optax.sgd(0.1, momentum=0.9),
            batch_stats=variables["batch_stats"],
        )

    traced = jax.make_jaxpr(create, axis_env=[(AXIS, 1)], return_shape=True)
    return traced()[1]


def main(out: Path, repeats: int) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    comm = jaxcomm.init()
    state = abstract_state(ResNet50())
    images = jax.ShapeDtypeStruct((32, 224, 224, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((32,), jnp.int32)
    args = (state, images, labels)
    mapped = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), args)
    kind = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), (AXIS,), axis_types=kind)

    def shard_map() -> Any:
        specs = (P(), P(AXIS), P(AXIS))
        return jax.jit(
            jax.shard_map(
                train_step, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False
            )
        )

    ways: dict[str, Callable[[], Any]] = {
        "jax.pmap": lambda: jax.pmap(train_step, axis_name=AXIS).lower(*mapped),
        "jax.jit of jax.shard_map": lambda: shard_map().lower(*args),
        "jaxcomm.data_parallel": lambda: data_parallel(train_step).lower(*args),
    }
    passed = [0.0]

    def counted(run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return run(*args, **kwargs)
            finally:
                passed[0] += time.perf_counter() - start

        return call

    # What of it is the pass: planning, and writing the program down again.
    rewrite.program = counted(rewrite.program)
    rewrite.Program.run = counted(rewrite.Program.run)
    samples: dict[str, list[float]] = {name: [] for name in (*ways, "of it, the pass")}
    for repeat in range(WARM_UP + repeats):
        for name, way in ways.items():
            jax.clear_caches()
            passed[0] = 0.0
            start = time.perf_counter()
            way()
            seconds = time.perf_counter() - start
            if repeat >= WARM_UP:
                samples[name].append(1e3 * seconds)
        if repeat >= WARM_UP:
            samples["of it, the pass"].append(1e3 * passed[0])
    if comm.rank == 0:
        schedule = data_parallel(train_step)
        schedule.lower(*args)
        found = {"samples": samples, "buckets": len(schedule.schedule.buckets)}
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
