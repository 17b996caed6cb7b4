"""One rank of the overlap benchmark: steps of a network with and without reduction.

benchmarks.overlap.worker OUT NETWORK REPEATS PROFILE [WAY]; OUT gets the samples, in
milliseconds, of all ways or of one. PROFILE is what `tune_worker.py` wrote.
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
from jaxcomm.planning.costs import CostModel
from stemdl.model.network import StemNet

AXIS, WARM_UP = "batch", 2
IMAGES, SIDE, WIDTHS, BLOCKS = 16, 32, (32, 64, 128), 8
STACKS, SCAN, DETECTOR, GROWTH = 10, 4, 24, 24


class ResNet(nn.Module):
    """A residual network of 24 blocks; no normalisation, so only gradients travel."""

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


def resnet(rank: int) -> tuple[Any, Callable[[bool], Callable[[Any], Any]]]:
    """Parameters, and from "whether anything travels" to a loss of parameters."""
    network = ResNet()
    images = jax.random.normal(jax.random.key(rank), (IMAGES, SIDE, SIDE, 3))

    def loss(params: Any) -> Any:
        return jnp.mean(jnp.square(network.apply(params, images)))  # pyright: ignore

    return network.init(jax.random.key(0), images), lambda _: loss


def stemdl(rank: int) -> tuple[Any, Callable[[bool], Callable[[Any], Any]]]:
    """The example's network, three times as wide, with synchronised batch norms."""
    shape = (STACKS, SCAN, SCAN, DETECTOR, DETECTOR)
    patterns = jax.random.normal(jax.random.key(rank), shape)
    variables = StemNet(growth=GROWTH).init(jax.random.key(0), patterns)
    stats = variables["batch_stats"]

    def loss_with(axis: str | None) -> Callable[[Any], Any]:
        network = StemNet(growth=GROWTH, axis_name=axis)

        def loss(params: Any) -> Any:
            tree = {"params": params, "batch_stats": stats}
            out, _ = network.apply(tree, patterns, train=True, mutable=["batch_stats"])
            return jnp.mean(jnp.square(out))  # pyright: ignore

        return loss

    return variables["params"], lambda travels: loss_with(AXIS if travels else None)


NETWORKS = {"resnet": resnet, "stemdl": stemdl}


def main(out: Path, network: str, repeats: int, profile: Path, only: str = "") -> None:
    comm = jaxcomm.init()
    params, loss = NETWORKS[network](comm.rank)
    # The same ranks again, planned for with what was measured on this wire.
    tuned = comm.subgroup(range(comm.size))
    assert tuned is not None
    tuned.costs = CostModel.from_json(profile.read_text())
    decorated: dict[str, Any] = {}

    def step(
        name: str,
        reduce: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> Callable[[], None]:
        gradients = jax.grad(loss(reduce is not None))
        run = jaxcomm.data_parallel(
            lambda p: reduce(gradients(p)) if reduce else gradients(p), **options
        )
        decorated[name] = run
        return lambda: jax.block_until_ready(run(params))

    average = lambda grads: lax.pmean(grads, AXIS)  # noqa: E731
    alone = jaxcomm.data_parallel(lambda g: average(jax.tree.map(lambda x: 2 * x, g)))
    ways = {
        "compute": lambda name: step(name),
        "communication": lambda _: lambda: jax.block_until_ready(alone(params)),
        "planner": lambda name: step(name, average),
        "planner after jaxcomm tune": lambda name: step(name, average, comm=tuned),
        "planner, reverse leaf order": lambda name: step(name, jaxcomm.all_reduce),
        "one bucket": lambda name: step(name, average, groups=1),
        "buckets of 256 KiB": lambda name: step(name, average, bucket_bytes=1 << 18),
        "buckets of 1 MiB": lambda name: step(name, average, bucket_bytes=1 << 20),
    }
    runs = {name: make(name) for name, make in ways.items() if only in ("", name)}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(WARM_UP + repeats):
        for name, run in runs.items():
            comm.barrier()
            start = time.perf_counter()
            run()
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
    main(
        Path(sys.argv[1]),
        sys.argv[2],
        int(sys.argv[3]),
        Path(sys.argv[4]),
        *sys.argv[5:],
    )
