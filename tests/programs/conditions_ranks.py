"""Conditions under which a job must go on, or end, as if nothing were special.

mpiexec -n 2 python -m tests.programs.conditions_ranks CONDITION
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import warnings


def in_flight() -> None:
    """The interpreter ends while reductions are under way."""
    import jax
    import jax.numpy as jnp

    import jaxcomm

    @jaxcomm.data_parallel
    def step(x: jax.Array) -> jax.Array:
        return jax.lax.pmean(x + 1, "batch")

    x = jnp.zeros(200_000)
    for _ in range(40):
        x = step(x)


def _load(queue: multiprocessing.SimpleQueue) -> None:
    queue.put(sum(range(1000)))


def forked() -> None:
    """A data loader forks worker processes, some of which end like a program."""
    import jax.numpy as jnp

    import jaxcomm

    warnings.filterwarnings("ignore", message=".*fork.*")
    comm = jaxcomm.init()
    jaxcomm.all_reduce(jnp.ones(3)).block_until_ready()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    worker = context.Process(target=_load, args=(queue,))
    worker.start()
    assert queue.get() == 499_500
    worker.join()
    assert worker.exitcode == 0
    child = os.fork()
    if child == 0:
        try:
            jaxcomm.all_reduce(jnp.ones(3))
        except jaxcomm.errors.TransportUnavailableError as error:
            os._exit(7 if "was forked from" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    total = jaxcomm.all_reduce(jnp.ones(3), op="sum")
    assert float(total[0]) == comm.size


def late() -> None:
    """JAX has a backend, and has computed, before init."""
    import jax
    import jax.numpy as jnp

    x = jax.jit(lambda x: x * 2)(jnp.ones(5)).block_until_ready()
    import jaxcomm

    assert float(jaxcomm.all_reduce(x)[0]) == 2
    assert jaxcomm.size() == 2


def own_mpi() -> None:
    """The user initialises MPI, and finalises it while the watchdog looks on."""
    import mpi4py

    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    from mpi4py import MPI

    MPI.Init_thread(MPI.THREAD_MULTIPLE)
    import jax.numpy as jnp

    import jaxcomm

    comm = jaxcomm.init()
    for _ in range(3):
        jaxcomm.all_reduce(jnp.ones(3)).block_until_ready()
    time.sleep(0.2 * comm.rank)
    MPI.Finalize()
    time.sleep(0.2)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    print("done", flush=True)
