"""One job of the benchmark: time some ways of reducing, interleaved.

Every process writes {way: [milliseconds, ...]} to OUT.<rank>; a sample of the job is
the slowest process's.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import jaxcomm
from benchmarks.common import trees

WARM_UP = 2
SEGMENT_BYTES = 2 << 20
MIB = 1 << 20
BLOCK = 1 << 16  # elements that stay in a core's cache
FIXED_MIB = (1, 4, 25, 128)
TRANSPORTS = {"devices": "local", "plain": "mpi", "apart": "mpi", "cores": "mpi"}
APART = "jaxcomm, MPI calls only"
PLAIN_WAYS = ("no reduction", "jaxcomm", "mpi4jax per leaf")
WORKLOADS: dict[str, Callable[[], trees.Shapes]] = {
    "resnet50": trees.resnet50,
    "stemdl": trees.stemdl,
    "gpt2": trees.gpt2,
    "small": lambda: trees.small_leaves(1000, 256),
    "one_leaf": trees.one_leaf,
    "mixed": trees.mixed,
    "dispatch": lambda: trees.small_leaves(100, 4),
}
Way = Callable[[], Any]


def scaled(tree: Any) -> Any:
    """Stand for the backward pass, whose outputs the reduction reads."""
    return jax.tree.map(lambda leaf: leaf * leaf.dtype.type(1.5), tree)


def filled(shapes: trees.Shapes, leading: tuple[int, ...] = ()) -> Any:
    return {
        name: jnp.ones((*leading, *shape.shape), shape.dtype)
        for name, shape in shapes.items()
    }


def waiting(step: Callable[[Any], Any], tree: Any) -> Way:
    return lambda: jax.block_until_ready(step(tree))


def ours(**options: Any) -> Any:
    return jaxcomm.data_parallel(lambda t: jaxcomm.all_reduce(scaled(t), **options))


def mpi_steps(shapes: trees.Shapes) -> dict[str, Callable[[Any], Any]]:
    """Steps of one process per device over MPI, by name."""
    steps = our_steps(shapes)
    dtypes = {leaf.dtype for leaf in shapes.values()}
    if dtypes == {np.dtype("float32")}:
        steps |= mpi4jax_steps()
    return steps


def mpi4jax_steps() -> dict[str, Callable[[Any], Any]]:
    import mpi4jax
    from mpi4py import MPI

    size = jaxcomm.size()

    def per_leaf(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: mpi4jax.allreduce(leaf, op=MPI.SUM) / size, scaled(tree)
        )

    def concatenated(tree: Any) -> Any:
        leaves, treedef = jax.tree.flatten(scaled(tree))
        flat = jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])
        flat = mpi4jax.allreduce(flat, op=MPI.SUM) / size
        ends = np.cumsum([leaf.size for leaf in leaves])
        parts = jnp.split(flat, ends[:-1])
        shaped = [p.reshape(x.shape) for p, x in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(treedef, shaped)

    return {
        "mpi4jax per leaf": jax.jit(per_leaf),
        "mpi4jax concatenated": jax.jit(concatenated),
    }


def our_steps(shapes: trees.Shapes) -> dict[str, Callable[[Any], Any]]:
    steps: dict[str, Callable[[Any], Any]] = {
        "no reduction": jax.jit(scaled),
        "jaxcomm": ours(),
        "jaxcomm, bare in jit": jax.jit(lambda t: jaxcomm.all_reduce(scaled(t))),
    }
    for mib in FIXED_MIB:
        steps[f"jaxcomm, buckets of {mib} MiB"] = ours(bucket_bytes=mib * MIB)
    dtypes = {leaf.dtype for leaf in shapes.values()}
    if dtypes == {np.dtype("float32")}:
        steps["jaxcomm, bfloat16 wire"] = ours(wire_dtype="bfloat16")
    return steps


def mpi_ways(shapes: trees.Shapes) -> dict[str, Way]:
    tree = filled(shapes)
    ways = {name: waiting(step, tree) for name, step in mpi_steps(shapes).items()}
    if any(leaf.dtype != np.float32 for leaf in shapes.values()):
        return ways
    return ways | raw_ways(shapes)


def raw_ways(shapes: trees.Shapes) -> dict[str, Way]:
    """MPI alone, and what memory alone allows, for float32 leaves."""
    from mpi4py import MPI

    # Zeros stay zeros, so that the sums need no clearing between repeats.
    buffers = [np.zeros(shape.shape, shape.dtype).ravel() for shape in shapes.values()]

    def raw() -> None:
        for buffer in buffers:
            step = SEGMENT_BYTES // buffer.itemsize
            for start in range(0, len(buffer), step):
                segment = buffer[start : start + step]
                MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, segment, MPI.SUM)

    size = jaxcomm.size()
    others = [np.ones_like(buffer) for buffer in buffers]

    def memory() -> None:
        # The least an all-reduce can do: add up the others' parts of this rank's slice,
        # in blocks that stay in cache, and copy the other slices.
        for mine, theirs in zip(buffers, others, strict=True):
            part = len(mine) // size
            for start in range(0, part, BLOCK):
                end = min(start + BLOCK, part)
                for other in range(size - 1):
                    at = other * part
                    block = theirs[at + start : at + end]
                    np.add(mine[start:end], block, out=mine[start:end])
            mine[part:] = theirs[part:]

    return {"raw MPI in place": raw, "memory limit (NumPy)": memory}


def device_ways(shapes: trees.Shapes) -> dict[str, Way]:
    """Ways of one process for all devices."""
    devices = jax.local_device_count()
    leading = filled(shapes, (devices,))
    mesh = jax.make_mesh((devices,), ("batch",))
    spec = PartitionSpec("batch")

    def mapped(step: Callable[[Any], Any]) -> Way:
        tree = jax.pmap(lambda t: t)(leading)
        return waiting(jax.pmap(step, axis_name="batch"), tree)

    def sharded(step: Callable[[Any], Any]) -> Way:
        tree = jax.device_put(leading, NamedSharding(mesh, spec))
        return waiting(shard_map(step, mesh, spec), tree)

    return {
        "no reduction": mapped(scaled),
        "pmap": mapped(lambda t: jax.lax.pmean(scaled(t), "batch")),
        "no reduction, shard_map": sharded(scaled),
        "shard_map": sharded(lambda t: jax.lax.pmean(scaled(t), "batch")),
    }


def shard_map(step: Callable[[Any], Any], mesh: Any, spec: Any) -> Callable[[Any], Any]:
    """Map over a mesh; each device keeps its own copy of the result."""
    return jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )


def gloo_ways(shapes: trees.Shapes) -> dict[str, Way]:
    """Ways of one JAX program over two processes."""
    mesh = jax.make_mesh((jax.device_count(),), ("batch",))
    spec = PartitionSpec("batch")
    sharding = NamedSharding(mesh, spec)
    tree = jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, leaf),
        jax.tree.map(np.asarray, filled(shapes, (1,))),
    )
    return {
        "no reduction": waiting(shard_map(scaled, mesh, spec), tree),
        "shard_map, gloo": waiting(
            shard_map(lambda t: jax.lax.pmean(scaled(t), "batch"), mesh, spec), tree
        ),
    }


def measure(
    ways: dict[str, Way], repeats: int, calls: int, barrier: Callable[[], None]
) -> dict[str, list[float]]:
    """Time all ways in turn, `repeats` times; this process's milliseconds per call."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(WARM_UP + repeats):
        for name, way in ways.items():
            # Shown only when the job fails: the last line names the way that did.
            print(f"repeat {repeat}: {name}", flush=True)
            barrier()
            start = time.perf_counter()
            for _ in range(calls):
                way()
            seconds = time.perf_counter() - start
            if repeat >= WARM_UP:
                samples[name].append(1e3 * seconds / calls)
    return samples


def count_calls(
    ways: dict[str, Callable[[Any], Any]], tree: Any, shim: Path
) -> dict[str, dict[str, float]]:
    """MPI calls per step by kind, for every way; preload the shim."""
    library = ctypes.CDLL(str(shim))
    library.pmpi_shim_names.restype = ctypes.c_char_p
    names = library.pmpi_shim_names().decode().split()

    def counts() -> np.ndarray:
        out = (ctypes.c_int64 * len(names))()
        library.pmpi_shim_counts(out)
        return np.array(out)

    steps, found = 10, {}
    for name, step in ways.items():
        jax.block_until_ready(step(tree))  # traces, and checks the schedule
        before = counts()
        for _ in range(steps):
            jax.block_until_ready(step(tree))
        per_step = (counts() - before) / steps
        found[name] = {n: c for n, c in zip(names, per_step.tolist(), strict=True) if c}
    return found


def peak_bytes(shapes: trees.Shapes, way: str) -> dict[str, int]:
    """This process's peak resident memory after three steps of one way."""
    step = mpi_steps(shapes)[way]
    tree = filled(shapes)
    for _ in range(3):
        jax.block_until_ready(step(tree))
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return {way: 1024 * int(found[1])}


def time_planning(shapes: trees.Shapes) -> dict[str, float]:
    """Milliseconds of tracing, planning, checking, each by itself."""
    from jaxcomm.collectives import reductions
    from jaxcomm.planning import planner

    comm, tree = jaxcomm.world(), filled(shapes)

    def milliseconds(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    jax.jit(scaled).lower({"warm": jnp.ones(3)})
    ours().lower({"warm": jnp.ones(3)})
    paths, leaves, _ = reductions.flatten(tree)
    specs = reductions.leaf_specs(paths, leaves)
    many = {
        f"leaf{k:05}": jax.ShapeDtypeStruct((k % 50, 7), "f4") for k in range(10000)
    }
    result = {
        "trace and lower without reduction": milliseconds(
            lambda: jax.jit(scaled).lower(tree)
        ),
        "trace and lower with jaxcomm": milliseconds(lambda: ours().lower(tree)),
        "plan": milliseconds(
            lambda: planner.make_schedule(specs, op="sum", size=comm.size)
        ),
        "plan of 10,000 leaves": milliseconds(lambda: jaxcomm.plan(many)),
    }
    schedule = planner.make_schedule(specs, op="sum", size=comm.size)
    digest = comm.agreement.register(schedule)
    comm.barrier()
    result["check across ranks"] = milliseconds(
        lambda: comm.agreement.answer(digest, -1, -1)
    )
    key = (leaves, jax.tree.structure(tree), comm, "mean", None, None, None)
    jaxcomm.all_reduce(tree)
    hits = [
        milliseconds(lambda: planner.find(reductions._plan_key(*key)))
        for _ in range(100)
    ]
    result["plan from the cache"] = float(np.median(hits))
    return result


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("work", type=click.Choice(list(WORKLOADS)))
@click.option(
    "--peer",
    type=click.Choice(["mpi", "cores", "apart", "plain", "mpi4jax", "devices", "gloo"]),
    default="mpi",
)
@click.option(
    "--what", type=click.Choice(["time", "calls", "memory", "planning"]), default="time"
)
@click.option("--way", default="jaxcomm", help="The way whose memory is measured.")
@click.option("--shim", type=click.Path(path_type=Path))
@click.option("--repeats", type=click.IntRange(1), default=10)
def main(
    out: Path, work: str, peer: str, what: str, way: str, shim: Path, repeats: int
) -> None:
    """Measure one workload in this job."""
    shapes = WORKLOADS[work]()
    # Steps of microseconds are timed in numbers; gloo takes seconds for any.
    calls = 1 if peer == "gloo" else {"dispatch": 100, "small": 20}.get(work, 1)
    rank, barrier = 0, lambda: None
    if peer == "gloo":
        rank = int(os.environ["BENCH_RANK"])
        jax.distributed.initialize(
            os.environ["BENCH_COORDINATOR"], int(os.environ["BENCH_RANKS"]), rank
        )
        from jax.experimental import multihost_utils

        barrier = lambda: multihost_utils.sync_global_devices("sample")  # noqa: E731
    else:
        comm = jaxcomm.init(TRANSPORTS.get(peer, peer))
        rank, barrier = comm.rank, comm.barrier
    result: Any
    if what == "calls":
        steps = mpi_steps(shapes)
        if peer == "apart":
            steps = {APART: steps["jaxcomm"]}
        result = count_calls(steps, filled(shapes), shim)
    elif what == "memory":
        result = peak_bytes(shapes, way)
    elif what == "planning":
        result = time_planning(shapes)
    else:
        if peer == "mpi":
            ways = mpi_ways(shapes)
        elif peer == "cores":
            tree = filled(shapes)
            ways = {
                "no reduction": waiting(jax.jit(scaled), tree),
                "jaxcomm": waiting(ours(), tree),
                **raw_ways(shapes),
            }
        elif peer == "plain":
            steps, tree = mpi_steps(shapes), filled(shapes)
            ways = {name: waiting(steps[name], tree) for name in PLAIN_WAYS}
        elif peer == "apart":
            tree = filled(shapes)
            ways = {
                "no reduction": waiting(jax.jit(scaled), tree),
                APART: waiting(ours(), tree),
            }
        elif peer == "mpi4jax":
            tree = filled(shapes)
            ways = {
                "no reduction": waiting(jax.jit(scaled), tree),
                "jaxcomm over mpi4jax": waiting(ours(), tree),
            }
        elif peer == "devices":
            ways = device_ways(shapes)
        else:
            ways = gloo_ways(shapes)
        result = measure(ways, repeats, calls, barrier)
    out.with_suffix(f".{rank}").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
