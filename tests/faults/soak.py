"""Many calls with random trees: nothing may grow.

mpiexec -n 2 python -m tests.faults.soak CALLS

Prints, on rank 0, one JSON object: by how many bytes this process's memory grew, and by
how many its file descriptors and threads, since the first tenth of the calls; and the
calls per second.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomm

TREES = 20


def usage() -> np.ndarray:
    """Resident bytes, file descriptors, threads of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    descriptors = len(os.listdir("/proc/self/fd"))
    return np.array([pages * 4096, descriptors, len(os.listdir("/proc/self/task"))])


def main(calls: int) -> None:
    comm = jaxcomm.init()
    rng = np.random.default_rng(0)  # the same on every rank
    trees = []
    for _ in range(TREES):
        count = int(rng.integers(1, 30))
        shapes = [tuple(rng.integers(1, 20, rng.integers(0, 4))) for _ in range(count)]
        dtypes = rng.choice(["float32", "bfloat16", "int32"], count)
        trees.append(
            [jnp.ones(s, d) for s, d in zip(shapes, dtypes.tolist(), strict=True)]
        )
    steps = [
        jaxcomm.data_parallel(lambda tree: jax.lax.psum(tree, "batch")) for _ in trees
    ]
    before, start = usage(), time.monotonic()
    for call, which in enumerate(rng.integers(0, TREES, calls)):
        if call == calls // 10:
            jax.block_until_ready(steps[0](trees[0]))
            before, start = usage(), time.monotonic()
        out = steps[which](trees[which])
        if call % 100 == 0:
            assert all((np.asarray(leaf) == comm.size).all() for leaf in out)
    jax.block_until_ready(out)
    seconds = time.monotonic() - start
    grown = np.max(comm.all_gather_object(usage() - before), axis=0)
    names = ("bytes", "descriptors", "threads")
    if comm.rank == 0:
        numbers = dict(zip(names, grown.tolist(), strict=True))
        print(json.dumps({**numbers, "calls_per_s": round(0.9 * calls / seconds)}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
