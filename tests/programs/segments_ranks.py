"""Exact means and sums over many segments: `segments_ranks.py WAY`; all ranks run it.

WAY is how reductions travel: "shared" memory, MPI calls ("apart") or around a "ring".
`test_segments.py` sets the environment that makes it so, and segments of 4 KiB.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomm
from jaxcomm.ranks.communicator import Communicator
from tests.programs.references import same

SEGMENT = 4096
DTYPES = ("float32", "float64", "float16", "bfloat16", "int32")
# In bytes: a lone element, leaves that are packed (more than the staging buffer holds),
# one of whole segments, and some that end in a tail. The last go around the ring.
SIZES = (0, 16, *[1100] * 14, 2 * SEGMENT, 9008, 20 * SEGMENT, 80_016)


def mean_of(count: int, large: bool) -> np.ndarray:
    """Return what is to come out: no zeros, of which a wrong factor makes nothing."""
    i = np.arange(count)
    # Close to the end of float16's range: their sum is beyond it.
    size = 57_344 + 128 * (i % 61) if large else 1 + i % 47
    return np.where(i % 3 == 0, -size, size).astype(np.float64)


def part_of(rank: int, ranks: int, mean: np.ndarray, dtype: str) -> np.ndarray:
    """Return a rank's part: every sum of parts is exact in every dtype."""
    if dtype == "int32":
        # The quotient is rounded toward zero.
        more = np.sign(mean) * (ranks - 1) if rank == 0 else 0
        return (mean + more).astype(dtype)
    # Float32 numbers, too, that float16 does not hold, though it holds their mean.
    step = {"float16": 128, "float32": 16_384}[dtype] if mean[0] < -1000 else 1
    return (mean + step * (2 * rank - (ranks - 1))).astype(dtype)


def check_exact(comm: Communicator, way: str, wire: str | None, large: bool) -> None:
    """Check the mean and the sum of one tree, in one bucket of each dtype."""
    dtypes = DTYPES if wire is None else ("float32",)
    if large:
        dtypes = ("float16",) if wire is None else ("float32",)
    means = {
        f"{dtype} {k}": mean_of(max(size // np.dtype(dtype).itemsize, 1), large)
        for dtype in dtypes
        for k, size in enumerate(SIZES)
    }
    every = [
        {k: part_of(r, comm.size, m, k.split()[0]) for k, m in means.items()}
        for r in range(comm.size)
    ]
    mine = every[comm.rank]
    before = comm.counters()
    out = jaxcomm.all_reduce(mine, groups=1, wire_dtype=wire)
    check_segments(comm, way, wire, before, mine)
    for name, got in out.items():
        assert got.dtype == mine[name].dtype
        want = means[name].astype(got.dtype)
        same(np.asarray(got), want, err_msg=f"{wire} {name}")
    if large:
        return  # the sums are infinite
    out = jaxcomm.all_reduce(mine, op="sum", groups=1, wire_dtype=wire)
    for name, got in out.items():
        want = np.sum([part[name].astype(np.float64) for part in every], axis=0)
        same(np.asarray(got).astype(np.float64), want, err_msg=f"{wire} sum {name}")


def check_segments(
    comm: Communicator, way: str, wire: str | None, before: Any, tree: Any
) -> None:
    """Insist that there were many segments."""
    counted = {k: n - before[k] for k, n in comm.counters().items()}
    halved = 1 if wire is None else 2
    least = sum(x.nbytes for x in tree.values()) // halved // SEGMENT
    if way == "shared":
        assert counted["segments"] >= least and not counted["mpi_all_reduce"], counted
    elif way == "apart" or wire:
        assert counted["mpi_all_reduce"] >= least and not counted["segments"], counted
    else:
        # The ring's segments are larger: a block of each rank's.
        assert counted["segments"] >= least / 2 / comm.size, counted
        assert counted["mpi_all_reduce"] > len(tree) / 4, counted
    # And that small leaves are packed, into more than the staging buffer holds.
    pack = jaxcomm.plan(tree, groups=1).buckets[0].pack_bytes
    assert 1100 <= pack < 2 * SEGMENT and comm.staging_bytes < 14 * 1100


def check_order(comm: Communicator) -> None:
    """Through shared memory, elements are added in the order of the ranks."""
    rng = [np.random.default_rng([5, rank]) for rank in range(comm.size)]
    for dtype in ("float32", "float64"):
        parts = [r.normal(size=30_011).astype(dtype) for r in rng]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        same(jaxcomm.all_reduce(parts[comm.rank]), total / total.dtype.type(comm.size))
        same(jaxcomm.all_reduce(parts[comm.rank], op="sum"), total)


def main(way: str) -> None:
    jax.config.update("jax_enable_x64", True)
    comm = jaxcomm.init("mpi")
    assert comm.costs.segment_bytes == SEGMENT, comm.costs
    assert comm.shared_memory == (way == "shared")
    for wire in (None, "bfloat16", "float16"):
        check_exact(comm, way, wire, large=False)
    for wire in (None, "float16"):
        check_exact(comm, way, wire, large=True)
    if way == "shared":
        check_order(comm)
    jaxcomm.assert_replicated(jnp.ones(3))
    print("all checked", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
