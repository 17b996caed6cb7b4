"""Section of worker.py: whole training steps, with and without collectives."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomm
from benchmarks.gpu import times
from benchmarks.tracing import worker as tracing
from jaxcomm.ranks.communicator import Communicator

SMALL = times.SMALL
# Images of a batch and their side; blocks of the network's stages.
RESNET = (2, 32, (1,)) if SMALL else (32, 224, (3, 4, 6, 3))
STEMDL = "toy" if SMALL else "small"
FIRST = 3  # steps whose losses are kept
# Of the first loss; what follows drifts apart by rounding.
TOLERANCE = {"float32": 2e-3, "bfloat16": 2e-2}
Step = Callable[..., tuple[Any, Any]]


def steps(comm: Communicator) -> dict[str, Any]:
    """Time one network's step under jit alone, jaxcomm and pmap, in turn."""
    network, _, dtype = os.environ["BENCH_NETWORK"].partition(" ")
    dtype = dtype or "float32"
    made = resnet(dtype) if network == "resnet50" else stemdl()
    plain, step, fresh, batch = made
    # Every way has a state of its own, since it is donated.
    states = {
        "jax.jit": fresh(),
        "jaxcomm": fresh(),
        "jax.pmap": jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], fresh()),
    }
    batches = dict.fromkeys(states, batch)
    batches["jax.pmap"] = tuple(part[None] for part in batch)
    batches = jax.device_put(batches)
    mapped = jaxcomm.data_parallel(step, donate_argnums=0)
    run: dict[str, Step] = {
        "jax.jit": jax.jit(plain, donate_argnums=0),
        "jaxcomm": mapped,
        "jax.pmap": jax.pmap(step, axis_name=tracing.AXIS, donate_argnums=0),
    }

    def way(name: str) -> Any:
        states[name], loss = run[name](states[name], *batches[name])
        return loss

    losses = {
        name: [float(np.ravel(way(name))[0]) for _ in range(FIRST)] for name in run
    }
    want = losses["jax.jit"][0]
    close = all(
        math.isclose(found[0], want, rel_tol=TOLERANCE[dtype])
        for found in losses.values()
    )
    ways = {name: functools.partial(way, name) for name in run}
    found = times.interleaved(comm, ways)
    ms = found["ms"]
    return found | {
        "ok": close,
        "losses": losses,
        "batch": [list(part.shape) for part in batch],
        "dtype": dtype,
        "ratios": {
            f"jaxcomm / {name}": ms["jaxcomm"] / ms[name]
            for name in ("jax.jit", "jax.pmap")
        },
        "buckets": len(mapped.schedule.buckets),
    }


def resnet(dtype: str) -> tuple[Step, Step, Callable[[], Any], tuple[Any, ...]]:
    """ResNet-50: the step alone, the step over the axis, a new state, a batch."""
    count, pixels, blocks = RESNET
    kind = None if dtype == "float32" else jnp.dtype(dtype)
    whole = tracing.ResNet50(dtype=kind, blocks=blocks)
    alone = tracing.ResNet50(axis=None, dtype=kind, blocks=blocks)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(count, pixels, pixels, 3)).astype(np.float32)
    batch = (images, rng.integers(0, 1000, count).astype(np.int32))
    shapes = tracing.abstract_state(whole, pixels)

    def plain(state: Any, images: Any, labels: Any) -> tuple[Any, Any]:
        own = state.replace(apply_fn=alone.apply)
        own, loss = tracing.train_step(own, images, labels, lambda tree: tree)
        return own.replace(apply_fn=state.apply_fn), loss

    return plain, tracing.train_step, lambda: drawn(shapes), batch


def drawn(shapes: Any) -> Any:
    """Values for a state: small random matrices, ones and zeros."""
    rng = np.random.default_rng(1)

    def value(leaf: Any) -> Any:
        if len(leaf.shape) < 2:
            return jnp.ones(leaf.shape, leaf.dtype)
        deviation = math.sqrt(2 / math.prod(leaf.shape[:-1]))
        return jnp.asarray(rng.normal(0, deviation, leaf.shape), leaf.dtype)

    state = jax.tree.map(value, shapes)
    zeros = jax.tree.map(jnp.zeros_like, state.opt_state)
    return state.replace(step=jnp.zeros((), jnp.int32), opt_state=zeros)


def stemdl() -> tuple[Step, Step, Callable[[], Any], tuple[Any, ...]]:
    """The STEMDL example's network and training, likewise."""
    from benchmarks.stemdl import worker  # asks for what simulates crystals too

    network = worker.Steps(STEMDL)

    def step(state: Any, *batch: Any) -> tuple[Any, Any]:
        return network.train_step(state, batch)

    # Without other devices there is nothing to average over; JAX drops it.
    plain = network.on_one_device(step, operands=1 + len(network.batch))
    return plain, step, network.state, network.batch
