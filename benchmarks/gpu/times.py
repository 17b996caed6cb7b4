"""Sections of worker.py that measure: time per call, memory, overlap."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcomm
from benchmarks.common import results, trees
from benchmarks.gpu import graph
from jaxcomm.ranks.communicator import Communicator

AXIS = "batch"
SMALL = os.environ.get("BENCH_SMALL") == "1"
INNER, REPEATS, WARM_UP = (2, 3, 1) if SMALL else (10, 15, 2)
STEPS, SECONDS = (50, 10) if SMALL else (1000, 35)
SAMPLING_SECONDS = 25  # ranks that share a GPU take turns, and are slow
BLOCK_SECONDS = 0.3
LAYERS, WIDTH = (3, 64) if SMALL else (12, 2048)
MIB = 1 << 20
GROWTH_MIB = 16  # of the device's used memory, which others may use too
LESS = "no reduction"
PAIRS = (
    ("jaxcomm", "XLA's psum"),
    ("jaxcomm, 12 MB buckets", "XLA's psum"),
    ("no reduction", "jax.jit"),
)
Way = Callable[[], Any]


def scaled(tree: Any) -> Any:
    """Stand for the backward pass, whose outputs the reduction reads."""
    return jax.tree.map(lambda leaf: leaf * leaf.dtype.type(1.5), tree)


def mean(tree: Any) -> Any:
    return lax.pmean(tree, AXIS)


def gradients() -> dict[str, jax.Array]:
    shapes = trees.small_leaves(20, 256) if SMALL else trees.resnet50()
    return {name: jnp.ones(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}


def interleaved(comm: Communicator, ways: dict[str, Way]) -> dict[str, Any]:
    """Medians of all ways in turn, in milliseconds a call; a sample is the slowest's.

    A way that fails is left out, with its error.
    """
    failed: dict[str, str] = {}
    longest = 0.0
    for name, way in list(ways.items()):
        try:
            for _ in range(WARM_UP):
                start = time.perf_counter()
                jax.block_until_ready(way())
            longest = max(longest, time.perf_counter() - start)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:1500]
    # All ranks go on with the same ways, and as often.
    told = comm.all_gather_object((sorted(failed), longest))
    lost = {name for names, _ in told for name in names}
    longest = max(seconds for _, seconds in told)
    calls = max(1, min(INNER, int(BLOCK_SECONDS / longest)))
    samples: dict[str, list[float]] = {name: [] for name in ways if name not in lost}
    begun = time.perf_counter()
    for repeat in range(REPEATS):
        if any(comm.all_gather_object(time.perf_counter() - begun > SAMPLING_SECONDS)):
            break
        # Another one is first each time: what went before may matter.
        names = list(samples)
        names = names[repeat % len(names) :] + names[: repeat % len(names)]
        for name in names:
            comm.barrier()
            start = time.perf_counter()
            outputs = [ways[name]() for _ in range(calls)]
            jax.block_until_ready(outputs)
            mine = 1e3 * (time.perf_counter() - start) / calls
            del outputs
            samples[name].append(max(comm.all_gather_object(mine)))
    found = results.summaries(samples)
    repeats = max(map(len, samples.values()), default=0)
    return {
        "ms": {name: each["median"] for name, each in found.items()},
        "quartiles_ms": {name: each["quartiles"] for name, each in found.items()},
        "samples": repeats,
        "failed": failed,
    }


def by_xla(comm: Communicator, body: Callable[[Any], Any], tree: Any) -> Way:
    """The same over XLA's own collectives: `shard_map` over all devices."""
    if len(jax.devices()) != comm.size:
        text = f"{len(jax.devices())} devices in JAX, {comm.size} ranks"

        def none() -> Any:
            raise RuntimeError(f"{text}: XLA's collectives need jax.distributed")

        return none
    mesh = jax.make_mesh((comm.size,), (AXIS,), axis_types=(AxisType.Auto,))
    everywhere = PartitionSpec()
    shape = jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    whole = NamedSharding(mesh, everywhere)
    filled = jax.jit(
        lambda: {name: jnp.ones(*of) for name, of in shape.items()},
        out_shardings=whole,
    )()
    step = jax.jit(
        jax.shard_map(
            body,
            mesh=mesh,
            in_specs=everywhere,
            out_specs=everywhere,
            check_vma=False,
        )
    )
    return lambda: step(filled)


def times(comm: Communicator) -> dict[str, Any]:
    """ResNet-50's gradients: grouped, packed into one leaf, and by XLA's psum."""
    tree = gradients()
    apart = jaxcomm.data_parallel(scaled)
    plain = jax.jit(scaled)

    def ours(**options: Any) -> Any:
        return jaxcomm.data_parallel(lambda tree: mean(scaled(tree)), **options)

    step, several = ours(), ours(bucket_bytes=12 * MIB)
    ways = {
        LESS: lambda: apart(tree),
        "jax.jit": lambda: plain(tree),
        "jaxcomm": lambda: step(tree),
        "jaxcomm, 12 MB buckets": lambda: several(tree),
        "XLA's psum": by_xla(comm, lambda tree: mean(scaled(tree)), tree),
    }
    found = interleaved(comm, ways)
    found["kernels"] = {
        name: kernels(ways[name])
        for name in (LESS, "jax.jit", "jaxcomm", "XLA's psum")
        if name in found["ms"]
    }
    ms = found["ms"]
    # What the reduction adds to the step, and how that compares.
    added = {name: ms[name] - ms[LESS] for name in ms if name not in (LESS, "jax.jit")}
    steps = {
        f"{ours_name} / {peer}": ms[ours_name] / ms[peer]
        for ours_name, peer in PAIRS
        if ours_name in ms and peer in ms
    }
    nbytes = sum(leaf.nbytes for leaf in tree.values())
    buckets = len(step.schedule.buckets) if step.schedules else 0
    counters = comm.counters()
    return found | {
        "bytes": nbytes,
        "leaves": len(tree),
        "buckets": buckets,
        "added_ms": added,
        "ratio of whole steps": steps,
        "counters": counters,
    }


def kernels(way: Way) -> dict[str, int]:
    """How often it ran, of what ran on the device most often in three calls."""
    names = graph.events(lambda: jax.block_until_ready(way()), "/device")
    return {name[:60]: n for name, n in names.most_common(12)}


def used() -> dict[str, float | None]:
    """Memory in MiB: in JAX's allocator, on the whole device, of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    inside = stats.get("bytes_in_use")
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    query += ["-i", os.environ.get("CUDA_VISIBLE_DEVICES", "0")]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        device = float(done.stdout) if done.returncode == 0 else None
    except (OSError, ValueError):
        device = None
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "JAX": None if inside is None else inside / MIB,
        "device": device,
        "host peak": host,
    }


def memory(comm: Communicator) -> dict[str, Any]:
    """Growth over 1,000 steps (fewer if they take long)."""
    step = jaxcomm.data_parallel(lambda t: mean(scaled(t)), donate_argnums=0)
    tree = gradients()
    for _ in range(min(20, STEPS)):
        tree = step(tree)
    jax.block_until_ready(tree)
    before, start, steps = used(), time.monotonic(), 0
    while steps < STEPS:
        for _ in range(50):
            tree = step(tree)
        jax.block_until_ready(tree)
        steps += 50
        late = time.monotonic() - start > SECONDS
        if any(comm.all_gather_object(late)):
            break
    after = used()
    growth = {
        name: None if value is None else (after[name] or 0) - value
        for name, value in before.items()
    }
    ok = (growth["JAX"] or 0) <= 0 and (growth["device"] or 0) <= GROWTH_MIB
    return {"ok": ok, "steps": steps, "growth_mib": growth, "before_mib": before}


def overlap(comm: Communicator) -> dict[str, Any]:
    """Layers of matrix products, whose gradients are reduced: how much is hidden?"""
    x = jnp.ones((WIDTH, WIDTH), jnp.float32)
    weights = {f"layer{k:02}": jnp.eye(WIDTH) for k in range(LAYERS)}

    def loss(weights: Any) -> Any:
        y = x
        for name in sorted(weights):
            y = jnp.tanh(y @ weights[name])
        return jnp.mean(jnp.square(y))

    gradient = jax.grad(loss)
    alone = jaxcomm.data_parallel(gradient)
    travel = jaxcomm.data_parallel(lambda grads: mean(scaled(grads)))
    both = jaxcomm.data_parallel(lambda weights: mean(gradient(weights)))
    several = jaxcomm.data_parallel(
        lambda weights: mean(gradient(weights)), bucket_bytes=12 * MIB
    )
    ways: dict[str, Way] = {
        "compute": lambda: alone(weights),
        "communication": lambda: travel(weights),
        "both": lambda: both(weights),
        "both, 12 MB buckets": lambda: several(weights),
        "both, XLA's psum": by_xla(comm, lambda w: mean(gradient(w)), weights),
    }
    found = interleaved(comm, ways)
    ms = found["ms"]
    if {"compute", "communication"} <= set(ms):
        apart = ms["compute"] + ms["communication"]
        found["hidden share of the communication"] = {
            name: (apart - value) / ms["communication"]
            for name, value in ms.items()
            if name.startswith("both")
        }
    return found | {"layers": LAYERS, "width": WIDTH}
