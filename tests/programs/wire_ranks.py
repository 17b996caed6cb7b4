"""Reduce, for what leaves a host to be counted outside: `wire_ranks.py MB TIMES`."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomm
from tests.programs.references import same


def main(megabytes: int, times: int) -> None:
    comm = jaxcomm.init("mpi")
    assert comm.backend.two_tiers and comm.hosts > 1, comm
    step = jaxcomm.data_parallel(lambda x: jaxcomm.all_reduce(x, op="sum"))
    x = jnp.full(megabytes * 250_000, 1.0 + comm.rank, jnp.float32)
    want = np.full(x.shape, comm.size * (comm.size + 1) / 2, np.float32)
    for _ in range(times):
        same(np.asarray(jax.block_until_ready(step(x))), want)
    print(f"rank {comm.rank} of {comm.hosts} hosts: all checked", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
