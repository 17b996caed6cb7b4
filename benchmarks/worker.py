"""One job of the benchmark: time some ways of reducing, interleaved; print JSON.

Rank 0 writes {way: [milliseconds, ...]} to the file that is named first. Each sample
is the slowest rank's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np

import jaxcomm
import trees

WARM_UP = 3
SEGMENT_BYTES = 2 << 20
Way = Callable[[], Any]


def scaled(tree: Any) -> Any:
    """Stand for the backward pass, whose outputs the reduction reads."""
    return jax.tree.map(lambda leaf: 1.5 * leaf, tree)


def filled(shapes: trees.Shapes, leading: tuple[int, ...] = ()) -> Any:
    return {
        name: jnp.ones((*leading, *shape.shape), shape.dtype)
        for name, shape in shapes.items()
    }


def waiting(step: Callable[[Any], Any], tree: Any) -> Way:
    return lambda: jax.block_until_ready(step(tree))


def rank_ways(shapes: trees.Shapes, transport: str) -> dict[str, Way]:
    """Ways of one process per device. Each but "raw MPI" also scales the tree."""
    comm = jaxcomm.init(transport)
    tree = filled(shapes)
    ours = jaxcomm.data_parallel(lambda t: jaxcomm.all_reduce(scaled(t)))
    no_reduction = {"no reduction": waiting(jax.jit(scaled), tree)}
    if transport == "mpi4jax":
        return no_reduction | {"jaxcomm over mpi4jax": waiting(ours, tree)}

    import mpi4jax
    from mpi4py import MPI

    def per_leaf(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: mpi4jax.allreduce(leaf, op=MPI.SUM) / comm.size, scaled(tree)
        )

    buffers = [np.ones(shape.shape, shape.dtype).ravel() for shape in shapes.values()]

    def raw() -> None:
        for buffer in buffers:
            step = SEGMENT_BYTES // buffer.itemsize
            for start in range(0, len(buffer), step):
                segment = buffer[start : start + step]
                MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, segment, MPI.SUM)
            buffer.fill(1)

    def fill_only() -> None:
        for buffer in buffers:
            buffer.fill(1)

    bare = jax.jit(lambda t: jaxcomm.all_reduce(scaled(t)))
    return no_reduction | {
        "jaxcomm": waiting(ours, tree),
        "jaxcomm, bare in jit": waiting(bare, tree),
        "mpi4jax per leaf": waiting(jax.jit(per_leaf), tree),
        "raw MPI and fill": raw,
        "fill": fill_only,
    }


def device_ways(shapes: trees.Shapes) -> dict[str, Way]:
    """Ways of one process for all devices."""
    devices = jax.local_device_count()

    def placed(step: Callable[[Any], Any]) -> Way:
        mapped = jax.pmap(step, axis_name="batch")
        tree = jax.pmap(lambda t: t)(filled(shapes, (devices,)))
        return waiting(mapped, tree)

    return {
        "no reduction": placed(scaled),
        "pmap": placed(lambda t: jax.lax.pmean(scaled(t), "batch")),
    }


def measure(ways: dict[str, Way], repeats: int, calls: int) -> dict[str, list[float]]:
    """Time all ways in turn, `repeats` times; milliseconds per call, slowest rank."""
    comm = jaxcomm.world()
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(WARM_UP + repeats):
        for name, way in ways.items():
            comm.barrier()
            start = time.perf_counter()
            for _ in range(calls):
                way()
            seconds = max(comm.all_gather_object(time.perf_counter() - start))
            if repeat >= WARM_UP:
                samples[name].append(1e3 * seconds / calls)
    return samples


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("work", type=click.Choice(["resnet50", "small", "dispatch"]))
@click.option("--transport", type=click.Choice(["mpi", "mpi4jax", "pmap"]))
@click.option("--repeats", type=click.IntRange(1), default=10)
def main(out: Path, work: str, transport: str, repeats: int) -> None:
    """Measure one workload in this job."""
    shapes, calls = {
        "resnet50": (trees.resnet50(), 1),
        "small": (trees.small_leaves(1000, 256), 1),
        "dispatch": (trees.small_leaves(100, 4), 100),
    }[work]
    if transport == "pmap":
        jaxcomm.init("local")
        ways = device_ways(shapes)
    else:
        ways = rank_ways(shapes, transport)
    samples = measure(ways, repeats, calls)
    if jaxcomm.rank() == 0:
        out.write_text(json.dumps(samples))


if __name__ == "__main__":
    main()
