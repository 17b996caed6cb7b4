"""Seconds per reduction of some trees, on rank 0 to the file that is given."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import jaxcomm
from benchmarks.common import trees

REPEATS = 7


def main(out: Path) -> None:
    comm = jaxcomm.init()
    kilobyte = {"x": jnp.ones(256)}
    resnet = {n: jnp.ones(s.shape, s.dtype) for n, s in trees.resnet50().items()}
    found = {}
    for name, tree, calls in (("1 KB", kilobyte, 2000), ("ResNet-50", resnet, 10)):
        step = jaxcomm.data_parallel(
            lambda x: jax.lax.pmean(x, "batch"), donate_argnums=0
        )
        tree = jax.block_until_ready(step(tree))
        times = []
        for _ in range(REPEATS):
            comm.barrier()
            start = time.perf_counter()
            for _ in range(calls):
                tree = step(tree)
                jax.block_until_ready(tree)
            times.append((time.perf_counter() - start) / calls)
        found[name] = statistics.median(times)
    if comm.rank == 0:
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
