"""One rank of the overlap benchmark: steps of a network with and without reduction.

worker_overlap.py OUT REPEATS [WAY]; OUT gets the samples, in milliseconds, of all ways
or of one.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

import jaxcomm

WARM_UP, IMAGES, SIDE = 2, 16, 32
WIDTHS, BLOCKS = (32, 64, 128), 4


class Network(nn.Module):
    """A residual network of 12 blocks; no normalisation, so only gradients travel."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(WIDTHS[0], (3, 3))(x)
        for width in WIDTHS:
            for block in range(BLOCKS):
                strides = (2, 2) if block == 0 and width > WIDTHS[0] else (1, 1)
                y = nn.relu(nn.Conv(width, (3, 3), strides)(x))
                y = nn.Conv(width, (3, 3))(y)
                if x.shape != y.shape:
                    x = nn.Conv(width, (1, 1), strides)(x)
                x = nn.relu(x + 0.1 * y)
        return nn.Dense(10)(jnp.mean(x, (1, 2)))


def main(out: Path, repeats: int, only: str = "") -> None:
    comm = jaxcomm.init()
    network = Network()
    images = jax.random.normal(jax.random.key(comm.rank), (IMAGES, SIDE, SIDE, 3))
    params = network.init(jax.random.key(0), images)

    def gradients(params: Any) -> Any:
        def loss(p: Any) -> Any:
            return jnp.mean(jnp.square(network.apply(p, images)))  # pyright: ignore

        return jax.grad(loss)(params)

    decorated: dict[str, Any] = {}

    def step(
        name: str, reduce: Callable[[Any], Any], **options: Any
    ) -> Callable[[], None]:
        run = jaxcomm.data_parallel(lambda p: reduce(gradients(p)), **options)
        decorated[name] = run
        return lambda: jax.block_until_ready(run(params))

    average = lambda grads: lax.pmean(grads, "batch")  # noqa: E731
    alone = jaxcomm.data_parallel(lambda g: average(jax.tree.map(lambda x: 2 * x, g)))
    ways = {
        "compute": step("compute", lambda grads: grads),
        "communication": lambda: jax.block_until_ready(alone(params)),
        "planner, ready order": step("planner", average),
        "planner, reverse leaf order": step("reverse", jaxcomm.all_reduce),
        "one bucket": step("one", average, groups=1),
        "256 KiB": step("256 KiB", average, bucket_bytes=1 << 18),
        "1 MiB": step("1 MiB", average, bucket_bytes=1 << 20),
    }
    ways = {name: way for name, way in ways.items() if only in ("", name)}
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(WARM_UP + repeats):
        for name, way in ways.items():
            comm.barrier()
            start = time.perf_counter()
            way()
            seconds = max(comm.all_gather_object(time.perf_counter() - start))
            if repeat >= WARM_UP:
                samples[name].append(1e3 * seconds)
    if comm.rank == 0:
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        buckets = {
            name: len(run.schedule.buckets)
            for name, run in decorated.items()
            if run.schedules
        }
        found = {"samples": samples, "bytes": nbytes, "buckets": buckets}
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
